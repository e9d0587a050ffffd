"""Use a trained model: picture its predictions, score it, export it, read one's own digits."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import cli
import figures
from checkpoint import load_checkpoint
from cli import UserError
from export import export_onnx
from files import check_writable, write_json
from predict import FORMATS, answer, list_images, read_images, show
from recipes import DATASET_SETTINGS
from utils import BatchLoader, evaluate, load_dataset
from vit_model import ViT


@dataclass(frozen=True)
class Task:
    """What a mode works on: the command line, and the model with its checkpoint."""

    args: argparse.Namespace
    model: ViT  # on `device`, in evaluation mode
    checkpoint: dict[str, Any]
    device: torch.device

    def test_loader(self) -> BatchLoader:
        """The test set that the model was made for, normalised as in its training."""
        name = self.checkpoint["dataset"]
        if name not in DATASET_SETTINGS:
            names = ", ".join(DATASET_SETTINGS)
            raise UserError(f"the checkpoint is for data set {name!r}, not {names}")
        split = load_dataset(name, self.args.data_dir).test.to(self.device)
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


def onnx(task: Task) -> None:
    """Export to ONNX."""
    normalization = task.checkpoint["normalization"]
    # What a user of the file has to know, and can read from it.
    metadata = {
        "dataset": task.checkpoint["dataset"],
        "class_names": json.dumps(task.checkpoint["class_names"]),
        "input": "(pixel / 255 - mean) / std, light on black",
        "mean": str(normalization["mean"]),
        "std": str(normalization["std"]),
    }
    config = task.checkpoint["model_config"]
    largest = export_onnx(task.model.cpu(), config, metadata, task.args.output)
    print(f"largest difference from PyTorch on batches of 1, 7 and 128: {largest:.1e}")


def read_digits(task: Task) -> None:
    """Print and write what digit each picture shows; those that can't be read are named."""
    names = list_images(task.args.image)
    answers = answer(task.model, task.checkpoint, names, read_images(names))
    about = {name: task.checkpoint[name] for name in ("dataset", "class_names")}
    result = {"checkpoint": task.args.checkpoint, **about, "images": answers}
    all_read = show(result, task.args.format)
    if any("prediction" in row for row in answers):
        write_json(task.args.output, result)
    if not all_read:
        sys.exit(2)


class Mode(NamedTuple):
    """What `--mode` names: its line in the help, the file it writes, and what it does."""

    help: str
    output: str
    run: Callable[[Task], None]


MODES = {
    "visualize": Mode("16 random test images", "./outputs/predictions.png", visualize),
    "evaluate": Mode("score on the test set", "./outputs/evaluation.json", score),
    "onnx": Mode("export", "./outputs/vit_mnist.onnx", onnx),
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
    parser.add_argument("--checkpoint", default="./checkpoints/best_model.pt", help="trained model")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="for predict: image files, folders (the images right in them), - for stdin",
    )
    parser.add_argument(
        "--format",
        default="text",
        choices=list(FORMATS),
        help="of predict on stdout; with json and csv nothing else is printed there",
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
    args = parser.parse_args()
    if (args.mode == "predict") != (args.image is not None):
        raise UserError("--mode predict and --image FILE go together: give both or neither")
    if args.mode != "predict" and args.format != "text":
        raise UserError(f"--format {args.format} is for --mode predict")
    args.output = Path(getattr(args, "output", MODES[args.mode].output))
    if args.mode == "visualize":
        figures.check_format(args.output)
    return args


def main() -> None:
    args = parse_args()
    device = cli.choose_device(args.device)
    model, checkpoint = load_checkpoint(args.checkpoint)
    config = checkpoint["model_config"]
    if args.mode != "onnx" and (config["img_size"], config["in_chans"]) != (28, 1):
        raise UserError(
            f"{args.checkpoint} takes images of {config['in_chans']}x{config['img_size']}x"
            f"{config['img_size']}, expected 1x28x28: only --mode onnx serves it"
        )
    check_writable(args.output)
    trained = f"{checkpoint['dataset']}, epoch {checkpoint['epoch']}"
    validation = f"validation {checkpoint['best_acc']:.2f} %"
    if args.format == "text":  # JSON and CSV stand on stdout alone
        print(f"checkpoint: {args.checkpoint} ({trained}, {validation})")
    MODES[args.mode].run(Task(args, model.to(device), checkpoint, device))
    if args.format == "text":
        print(f"Written: {args.output}")


if __name__ == "__main__":
    cli.run(main)
