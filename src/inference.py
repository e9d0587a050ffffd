"""Use a trained model: picture its predictions, score it, export it, read one's own digits."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import cli
import export
import figures
from checkpoint import find_checkpoint, load_checkpoint
from cli import UserError
from digit_image import read_digit
from files import check_writable, replacing, write_json
from recipes import DATASET_SETTINGS
from utils import BatchLoader, Dataset, evaluate, load_dataset
from vit_model import ViT


@dataclass(frozen=True)
class Task:
    """What a mode works on: the command line, and the model with its checkpoint."""

    args: argparse.Namespace
    model: ViT  # on `device`, in evaluation mode
    checkpoint: dict[str, Any]
    device: torch.device

    def dataset(self) -> Dataset:
        """The data set that the model was made for. Raises UserError if it can't be had."""
        name, config = self.checkpoint["dataset"], self.checkpoint["model_config"]
        if name not in DATASET_SETTINGS:
            names = ", ".join(DATASET_SETTINGS)
            raise UserError(f"the checkpoint is for data set {name!r}, not {names}")
        if (config["img_size"], config["in_chans"]) != (28, 1):
            raise UserError(f"{self.args.checkpoint} takes other images than {name}'s 1x28x28")
        return load_dataset(name, self.args.data_dir)

    def test_loader(self) -> BatchLoader:
        """The test set that the model was made for, normalised as in its training."""
        split = self.dataset().test.to(self.device)
        return BatchLoader(split, 500, **self.checkpoint["normalization"])


# ------------------------------------------------------------------------------------- the modes


@torch.no_grad()
def visualize(task: Task) -> None:
    """Draw 16 random test images under what the model takes them for."""
    loader, class_names = task.test_loader(), task.checkpoint["class_names"]
    generator = np.random.default_rng(task.args.seed)
    chosen = torch.from_numpy(generator.permutation(len(loader.split))[:16])
    part = loader.split[chosen.to(loader.split.labels.device)]
    images, labels = next(iter(BatchLoader(part, 16, loader.mean, loader.std)))
    guesses = task.model(images).argmax(dim=1)
    right = int((guesses == labels).sum())
    title = f"{right} of {len(part)} test images right ({task.checkpoint['dataset']})"
    figure = figures.predictions(
        part.images[:, 0].cpu().numpy(),
        [class_names[i] for i in labels.tolist()],
        [class_names[i] for i in guesses.tolist()],
        title,
    )
    figures.save(figure, task.args.output)
    print(title)


def score(task: Task) -> None:
    """Score on the test set, as training ends."""
    smoothing = task.checkpoint["settings"]["label_smoothing"]
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    loss, top1, top5 = evaluate(task.model, task.test_loader(), criterion, task.device)
    dataset = task.checkpoint["dataset"]
    cli.print_test_result(dataset, loss, top1, top5)
    result = {"dataset": dataset, "loss": loss, "top1": top1, "top5": top5}
    write_json(task.args.output, {"checkpoint": task.args.checkpoint, **result})


def export_file(task: Task) -> None:
    """Write the model as a file that runs without this project, once it does as well."""
    args = task.args
    precision = "fp16" if args.half else "int8" if args.quantize == "int8" else "fp32"
    try:
        dataset = task.dataset()
    except UserError as error:
        if precision == "int8":
            raise UserError(f"--quantize int8 is set by training images: {error}") from None
        print(f"note: the test accuracy is not measured: {error}", file=sys.stderr)
        dataset = None
    exported = export.export(
        task.model.cpu(),
        task.checkpoint,
        mode=args.mode,
        precision=precision,
        raw_input=args.raw_input,
        calibration=dataset and dataset.train.images[: export.CALIBRATION_IMAGES],
    )
    print(export.compare(exported, precision, args.output.name, dataset and dataset.test))
    with replacing(args.output) as temporary:
        temporary.write_bytes(exported.content)


def read_digits(task: Task) -> None:
    """Print and write what digit each image file shows."""
    class_names = task.checkpoint["class_names"]
    images = np.stack([read_digit(path) for path in task.args.image])
    probabilities = predict(task.model, images, task.checkpoint["normalization"])
    results = []
    for path, row in zip(task.args.image, probabilities, strict=True):
        digit = class_names[int(row.argmax())]
        every = dict(zip(class_names, row.tolist(), strict=True))
        results.append({"image": path, "prediction": digit, "probabilities": every})
        shown = "  ".join(f"{name}: {100 * p:.1f} %" for name, p in every.items())
        print(f"{path}: {digit}  ({shown})")
    trained_on = {"checkpoint": task.args.checkpoint, "dataset": task.checkpoint["dataset"]}
    write_json(task.args.output, {**trained_on, "images": results})


@torch.no_grad()
def predict(model: ViT, images: np.ndarray, normalization: dict[str, float]) -> np.ndarray:
    """Class probabilities (n, num_classes) of images in MNIST's form, uint8 (n, 28, 28)."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(images).to(device).unsqueeze(1).float() / 255
    logits = model((pixels - normalization["mean"]) / normalization["std"])
    return logits.softmax(dim=1).cpu().numpy()


class Mode(NamedTuple):
    """What `--mode` names: its line in the help, the file it writes, and what it does."""

    help: str
    output: str
    run: Callable[[Task], None]


MODES = {
    "visualize": Mode("16 random test images", "./outputs/predictions.png", visualize),
    "evaluate": Mode("score on the test set", "./outputs/evaluation.json", score),
    "onnx": Mode("export to ONNX", "./outputs/vit_mnist.onnx", export_file),
    "torch_export": Mode("export with torch.export", "./outputs/vit_mnist.pt2", export_file),
    "predict": Mode("your own images", "./outputs/predictions.json", read_digits),
}


# ---------------------------------------------------------------------------------- command line


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "--mode",
        default="visualize",
        choices=list(MODES),
        help="; ".join(f"{name}: {mode.help}" for name, mode in MODES.items()),
    )
    parser.add_argument(
        "--checkpoint",
        help="trained model; None: ./checkpoints/best_model.pt if it is there, else the pretrained "
        "one of this repository",
    )
    parser.add_argument(
        "--image", nargs="+", action="extend", metavar="FILE", help="for predict: image files"
    )
    files = ", ".join(f"{name}: {mode.output}" for name, mode in MODES.items())
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, help=f"file that is written (default: {files})"
    )
    parser.add_argument(
        "--seed", type=cli.integer(0), help="for visualize: draws the same images again"
    )
    cli.add_data_dir(parser)
    cli.add_device(parser)
    export.add_flags(parser)
    args = parser.parse_args()
    export.check_flags(args)
    if (args.mode == "predict") != (args.image is not None):
        raise UserError("--mode predict and --image FILE go together: give both or neither")
    args.output = Path(getattr(args, "output", MODES[args.mode].output))
    if args.mode == "visualize":
        figures.check_format(args.output)
    return args


def main() -> None:
    args = parse_args()
    device = cli.choose_device(args.device)
    args.checkpoint = str(find_checkpoint(args.checkpoint))
    model, checkpoint = load_checkpoint(args.checkpoint)
    config = checkpoint["model_config"]
    if args.mode not in export.MODES and (config["img_size"], config["in_chans"]) != (28, 1):
        raise UserError(
            f"{args.checkpoint} takes images of {config['in_chans']}x{config['img_size']}x"
            f"{config['img_size']}, expected 1x28x28: only {' and '.join(export.MODES)} serve it"
        )
    check_writable(args.output)
    trained = f"{checkpoint['dataset']}, epoch {checkpoint['epoch']}"
    print(f"checkpoint: {args.checkpoint} ({trained}, validation {checkpoint['best_acc']:.2f} %)")
    MODES[args.mode].run(Task(args, model.to(device), checkpoint, device))
    print(f"Written: {args.output}")


if __name__ == "__main__":
    cli.run(main)
