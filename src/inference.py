"""Use a trained model: picture its predictions, score it, export it, read one's own digits."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cli
import figures
from checkpoint import load_checkpoint
from cli import UserError
from digit_image import read_digit
from files import check_writable, replacing, write_json
from recipes import DATASET_SETTINGS
from utils import BatchLoader, evaluate, load_dataset
from vit_model import ViT

DEFAULT_OUTPUT = {
    "visualize": "./outputs/predictions.png",
    "onnx": "./outputs/vit_mnist.onnx",
    "evaluate": "./outputs/evaluation.json",
    "predict": "./outputs/predictions.json",
}
ONNX_TOLERANCE = 1e-4  # between PyTorch's and ONNX Runtime's logits


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "--mode",
        default="visualize",
        choices=list(DEFAULT_OUTPUT),
        help="visualize: 16 random test images; onnx: export; "
        "evaluate: score on the test set; predict: your own images",
    )
    parser.add_argument("--checkpoint", default="./checkpoints/best_model.pt", help="trained model")
    parser.add_argument(
        "--image", nargs="+", action="extend", metavar="FILE", help="for predict: image files"
    )
    files = ", ".join(f"{mode}: {path}" for mode, path in DEFAULT_OUTPUT.items())
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, help=f"file that is written (default: {files})"
    )
    parser.add_argument(
        "--seed", type=cli.integer(0), help="for visualize: draws the same images again"
    )
    cli.add_data_dir(parser)
    cli.add_device(parser)
    args = parser.parse_args()
    if (args.mode == "predict") != (args.image is not None):
        raise UserError("--mode predict and --image FILE go together: give both or neither")
    args.output = Path(getattr(args, "output", DEFAULT_OUTPUT[args.mode]))
    if args.mode == "visualize":
        figures.check_format(args.output)
    return args


def test_loader(checkpoint: dict[str, Any], data_dir: str, device: torch.device) -> BatchLoader:
    """The test set that the checkpoint's model was made for, normalised as in its training."""
    if checkpoint["dataset"] not in DATASET_SETTINGS:
        names = ", ".join(DATASET_SETTINGS)
        raise UserError(f"the checkpoint is for data set {checkpoint['dataset']!r}, not {names}")
    split = load_dataset(checkpoint["dataset"], data_dir).test.to(device)
    return BatchLoader(split, 500, **checkpoint["normalization"])


@torch.no_grad()
def visualize(model: ViT, loader: BatchLoader, class_names: list[str], seed: int | None) -> dict:
    """Predict 16 random test images. Returns the arguments of `figures.predictions`."""
    generator = np.random.default_rng(seed)
    chosen = torch.from_numpy(generator.permutation(len(loader.split))[:16])
    part = loader.split[chosen.to(loader.split.labels.device)]
    images, labels = next(iter(BatchLoader(part, 16, loader.mean, loader.std)))
    guesses = model(images).argmax(dim=1)
    return {
        "images": part.images[:, 0].cpu().numpy(),
        "labels": [class_names[i] for i in labels.tolist()],
        "predicted": [class_names[i] for i in guesses.tolist()],
    }


@torch.no_grad()
def export_onnx(model: ViT, config: dict[str, Any], metadata: dict[str, str], path: Path) -> float:
    """Export to one ONNX file with a free batch axis, check it, and run it against PyTorch.

    Args:
        model: on the CPU.
        config: the model's arguments, for the size of its images.
        metadata: what the file says of itself.

    Returns:
        The largest difference of a logit over batches of 1, 7 and 128 random images.

    Raises:
        UserError: it is over `ONNX_TOLERANCE`, or the file can't be written.
    """
    import onnx
    import onnxruntime

    def random_images(batch: int) -> Tensor:
        side = config["img_size"]
        return torch.randn(batch, config["in_chans"], side, side)

    with replacing(path) as temporary:
        torch.onnx.export(
            model,
            (random_images(2),),
            temporary,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=20,  # the first with Gelu; 17 brought LayerNormalization
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        exported = onnx.load(temporary)
        onnx.helper.set_model_props(exported, metadata)
        onnx.save(exported, temporary)
        onnx.checker.check_model(temporary, full_check=True)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        largest = 0.0
        for batch in (1, 7, 128):
            images = random_images(batch)
            (output,) = session.run(["output"], {"input": images.numpy()})
            largest = max(largest, float(np.abs(output - model(images).numpy()).max()))
        if not largest <= ONNX_TOLERANCE:
            raise UserError(
                f"{path} not written: ONNX Runtime's logits differ from PyTorch's by "
                f"{largest:.1e}, expected at most {ONNX_TOLERANCE:.0e}"
            )
    return largest


@torch.no_grad()
def predict(model: ViT, images: np.ndarray, normalization: dict[str, float]) -> np.ndarray:
    """Class probabilities (n, num_classes) of images in MNIST's form, uint8 (n, 28, 28)."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(images).to(device).unsqueeze(1).float() / 255
    logits = model((pixels - normalization["mean"]) / normalization["std"])
    return logits.softmax(dim=1).cpu().numpy()


def main() -> None:
    args = parse_args()
    device = cli.choose_device(args.device)
    model, checkpoint = load_checkpoint(args.checkpoint)
    config, class_names = checkpoint["model_config"], checkpoint["class_names"]
    if args.mode != "onnx" and (config["img_size"], config["in_chans"]) != (28, 1):
        raise UserError(
            f"{args.checkpoint} takes images of {config['in_chans']}x{config['img_size']}x"
            f"{config['img_size']}, expected 1x28x28: only --mode onnx serves it"
        )
    check_writable(args.output)
    trained = f"{checkpoint['dataset']}, epoch {checkpoint['epoch']}"
    print(f"checkpoint: {args.checkpoint} ({trained}, validation {checkpoint['best_acc']:.2f} %)")

    if args.mode == "visualize":
        loader = test_loader(checkpoint, args.data_dir, device)
        grid = visualize(model.to(device), loader, class_names, args.seed)
        right = sum(a == b for a, b in zip(grid["labels"], grid["predicted"], strict=True))
        title = f"{right} of {len(grid['labels'])} test images right ({checkpoint['dataset']})"
        figures.save(figures.predictions(**grid, title=title), args.output)
        print(title)

    elif args.mode == "evaluate":
        loader = test_loader(checkpoint, args.data_dir, device)
        criterion = nn.CrossEntropyLoss(label_smoothing=checkpoint["settings"]["label_smoothing"])
        loss, top1, top5 = evaluate(model.to(device), loader, criterion, device)
        cli.print_test_result(checkpoint["dataset"], loss, top1, top5)
        result = {"dataset": checkpoint["dataset"], "loss": loss, "top1": top1, "top5": top5}
        write_json(args.output, {"checkpoint": args.checkpoint, **result})

    elif args.mode == "onnx":
        # What a user of the file has to know, and can read from it.
        metadata = {
            "dataset": checkpoint["dataset"],
            "class_names": json.dumps(class_names),
            "input": "(pixel / 255 - mean) / std, light on black",
            "mean": str(checkpoint["normalization"]["mean"]),
            "std": str(checkpoint["normalization"]["std"]),
        }
        largest = export_onnx(model, config, metadata, args.output)
        print(f"largest difference from PyTorch on batches of 1, 7 and 128: {largest:.1e}")

    else:
        images = np.stack([read_digit(path) for path in args.image])
        results = []
        for path, row in zip(
            args.image, predict(model.to(device), images, checkpoint["normalization"]), strict=True
        ):
            digit = class_names[int(row.argmax())]
            results.append(
                {
                    "image": path,
                    "prediction": digit,
                    "probabilities": dict(zip(class_names, row.tolist(), strict=True)),
                }
            )
            every = "  ".join(
                f"{n}: {100 * p:.1f} %" for n, p in zip(class_names, row, strict=True)
            )
            print(f"{path}: {digit}  ({every})")
        trained_on = {"checkpoint": args.checkpoint, "dataset": checkpoint["dataset"]}
        write_json(args.output, {**trained_on, "images": results})

    print(f"Written: {args.output}")


if __name__ == "__main__":
    cli.run(main)
