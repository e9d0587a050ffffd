"""A trained model as a file: written whole, read without running what it carries, rebuilt.

A checkpoint is a dict. Four keys are the published ones: `epoch`, `model_state_dict`,
`optimizer_state_dict` and `best_acc` (percent). Ours add `model_config`, `normalization`,
`dataset`, `class_names`, `settings` and `versions`, all that it takes to use the model.
"""

import io
import platform
import re
import warnings
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from cli import UserError
from files import replacing
from utils import DIGITS
from vit_model import ViT

# What a published checkpoint, which has four keys only, was trained with.
PUBLISHED = {
    "normalization": {"mean": 0.1307, "std": 0.3081},
    "dataset": "mnist",
    "class_names": list(DIGITS),
    "settings": {"label_smoothing": 0.1},
}
PUBLISHED_NUM_HEADS = 4  # the one size that can't be read off a tensor

OWN_CHECKPOINT = Path("checkpoints/best_model.pt")  # where train.py, run here, leaves its model
PRETRAINED = Path(__file__).resolve().parents[1] / "checkpoints" / "pretrained" / "best_model.pt"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }


def find_checkpoint(given: str | Path | None = None) -> Path:
    """The checkpoint to use: the one `given`, else the current folder's, else the pretrained one.

    Raises:
        UserError: none is given, and neither of the others is there.
    """
    if given is not None:
        return Path(given)
    for path in (OWN_CHECKPOINT, PRETRAINED):
        if path.is_file():
            return path
    raise UserError(
        f"there is no checkpoint, neither {OWN_CHECKPOINT} here nor the pretrained {PRETRAINED}: "
        "train first, or name one with --checkpoint"
    )


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all. Raises UserError if it can't be written."""
    content = io.BytesIO()  # PyTorch's own error on a full disk hides the reason
    torch.save(checkpoint, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: str | Path) -> tuple[ViT, dict[str, Any]]:
    """Read a checkpoint, ours or a published one.

    Returns:
        The model on the CPU, in evaluation mode, and the checkpoint with every key of ours.

    Raises:
        UserError: there is no such file, it is damaged or no checkpoint, or holds another model.
    """
    checkpoint = {**PUBLISHED, **_read(Path(path))}
    state = checkpoint["model_state_dict"]
    advice = "name one that src/train.py wrote"
    try:
        sizes = _sizes(state)
        config = {"num_heads": PUBLISHED_NUM_HEADS, **sizes, **checkpoint.get("model_config", {})}
        # A ratio is told by whole neurons only: 2.7 x 96 are 259, which would read 2.698.
        hidden_dim = round(config["embed_dim"] * config["mlp_ratio"])
        told = {**config, "mlp_ratio": hidden_dim / config["embed_dim"]}
        if any(told[name] != size for name, size in sizes.items()):
            raise ValueError(f"its configuration {config} is not its tensors' {sizes}")
        # Tensors may claim to be larger than what is stored of them, so ask before allocating.
        if sum(tensor.numel() for tensor in state.values()) > Path(path).stat().st_size:
            raise ValueError("its tensors are larger than the file")
        model = ViT(**config)
        model.load_state_dict(state)
        checkpoint["epoch"] = int(checkpoint["epoch"])
        checkpoint["best_acc"] = float(checkpoint["best_acc"])
        checkpoint["dataset"] = str(checkpoint["dataset"])
        checkpoint["class_names"] = [str(name) for name in checkpoint["class_names"]]
        checkpoint["normalization"] = {
            name: float(checkpoint["normalization"][name]) for name in ("mean", "std")
        }
        checkpoint["settings"] = {
            **checkpoint["settings"],
            "label_smoothing": float(checkpoint["settings"]["label_smoothing"]),
        }
        if len(checkpoint["class_names"]) != config["num_classes"]:
            raise ValueError(f"{config['num_classes']} classes, but other names for them")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = f"no {e} in it" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this ViT ({reason}); {advice}") from None
    checkpoint["model_config"] = config
    return model.eval(), checkpoint


def _read(path: Path) -> dict[str, Any]:
    advice = "name one that src/train.py wrote"
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is no checkpoint: it is empty; {advice}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd formats; the error below is enough
            # weights_only: a pickle can carry code, and this refuses to run any.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "train first, or name one with --checkpoint"
        raise UserError(
            f"checkpoint {path} cannot be read: {error.strerror or error}; {hint}"
        ) from None
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds on bytes that are not its own
        code = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", str(error))
        if code:
            name = code[1] or code[2]
            reason = f"refused, since it would run code ({name.rstrip('.')}) when loaded"
        else:
            reason = "truncated or damaged, or of another format, and so not loaded"
        raise UserError(f"{path} is no checkpoint: {reason}; {advice}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise UserError(f"{path} is no checkpoint: it has no model_state_dict; {advice}")
    return checkpoint


def _sizes(state: dict[str, Tensor]) -> dict[str, int | float | str]:
    """The arguments of `ViT` that its tensors' shapes tell."""
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    pool = "cls" if "cls_token" in state else "mean"
    num_patches = state["pos_embed"].shape[1] - (pool == "cls")
    return {
        "img_size": isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": embed_dim,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "mlp_ratio": state["blocks.0.mlp.0.weight"].shape[0] / embed_dim,
        "pool": pool,
    }
