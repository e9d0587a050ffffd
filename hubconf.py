"""The pretrained model for torch.hub, which needs PyTorch alone: torch.hub.load(REPO, "vit_mnist").

Files of src/ are loaded by path: in another's program, names such as `data` may be taken.
"""

import functools
import importlib.util
import pathlib
import types

import torch

dependencies = ["torch"]


def vit_mnist() -> torch.nn.Module:
    """The pretrained Vision Transformer, trained on MNIST (99.60 % of its test images).

    Shape: float32 (B, 1, 28, 28) -> logits (B, 10), one for each digit.

    `model.transforms` makes such a batch of one digit in the middle, with a margin around it as in
    MNIST: of a PIL image of any size, or of a uint8 array or tensor (28, 28) or (B, 28, 28). It may
    be dark on light. `(logits / model.temperature).softmax(1)` are calibrated probabilities.
    """
    root = pathlib.Path(__file__).parent
    read_archive = _module(root / "src" / "saving" / "archive.py").read_archive
    checkpoint = read_archive((root / "checkpoints" / "pretrained" / "best_model.pt").read_bytes())
    model = _module(root / "src" / "vit_model.py").ViT(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    model.transforms = functools.partial(_transforms, **checkpoint["normalization"])
    model.temperature = checkpoint["calibration"]["temperature"]
    return model.eval()


def _transforms(image, mean: list[float], std: list[float]) -> torch.Tensor:
    """float32 (B, 1, 28, 28), normalised. Raises ValueError for images of another kind."""
    if hasattr(image, "convert"):  # PIL's
        if image.mode.startswith(("I", "F")):  # which of its values is white is not known
            raise ValueError(f"expected a PIL image of 8 bits a value, got mode {image.mode}")
        # Black ink on nothing is black ink on white paper.
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            paper = image.copy()
            paper.paste((255, 255, 255, 255), (0, 0, *image.size))
            paper.alpha_composite(image)
            image = paper
        small = image.convert("L").resize((28, 28))
        image = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(28, 28)
    pixels = torch.as_tensor(image)
    if pixels.dtype != torch.uint8 or pixels.shape[-2:] != (28, 28):
        raise ValueError(
            f"expected a PIL image, or uint8 of (28, 28), got {pixels.dtype} of "
            f"{tuple(pixels.shape)}"
        )
    pixels = pixels.reshape(-1, 1, 28, 28)
    dark_on_light = pixels.flatten(1).median(dim=1).values > 127
    pixels = torch.where(dark_on_light.view(-1, 1, 1, 1), 255 - pixels, pixels)
    mean, std = torch.tensor([mean, std], device=pixels.device)
    return (pixels / 255 - mean) / std


def _module(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"vit_mnist_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
