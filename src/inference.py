"""Use a trained model: picture its predictions, score it, export it, read one's own digits."""

import common.startup  # noqa: F401 before PyTorch

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from analysis import explain, figures
from analysis.report import calibration_errors, write_report
from common import cli
from common.device import choose_device
from common.errors import UserError
from common.files import atomic_write, check_writable, write_json
from data.dataset import Dataset
from data.load import load_dataset
from deploy import export
from deploy.predict import FORMATS, answer, list_images, read_images, show
from recipes import DATASET_SETTINGS
from saving.checkpoint import find_checkpoint, load_checkpoint
from utils import BatchLoader, accuracy
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

    @cached_property
    def test(self) -> BatchLoader:
        """The test set that the model was made for, normalised as in its training, loaded once."""
        split = self.dataset().test.to(self.device)
        return BatchLoader(split, 500, **self.checkpoint["normalization"])

    @cached_property
    def outputs(self) -> explain.Outputs:
        """What the model makes of the whole test set, run once."""
        return explain.outputs(self.model, self.test, self.temperature)

    @property
    def temperature(self) -> float:
        """Of the model's probabilities."""
        return self.checkpoint["calibration"]["temperature"]

    @property
    def class_names(self) -> list[str]:
        """The names of the classes as pictures can show them."""
        return [figures.label(name) for name in self.checkpoint["class_names"]]


# ------------------------------------------------------------------------- the modes that draw


@torch.no_grad()
def draw_predictions(task: Task) -> Figure:
    """16 random test images under what the model takes them for."""
    pixels, images, labels = _images(task, _random(task, 16))
    probabilities, guesses = (task.model(images) / task.temperature).softmax(dim=1).max(dim=1)
    right = int((guesses == labels).sum())
    return figures.predictions(
        pixels,
        [task.class_names[i] for i in labels.tolist()],
        [task.class_names[i] for i in guesses.tolist()],
        probabilities.tolist(),
        f"{right} of {len(labels)} test images right ({task.checkpoint['dataset']})",
    )


@torch.no_grad()
def draw_attention(task: Task) -> Figure:
    """What every layer and head looks at in chosen or random test images."""
    chosen, count = task.args.index or _random(task, 3), len(task.test.split)
    if max(chosen) >= count:
        raise UserError(
            f"--index {max(chosen)}: the {task.checkpoint['dataset']} test set has images 0 to "
            f"{count - 1}"
        )
    pixels, images, labels = _images(task, chosen)
    weights = explain.attention_weights(task.model, images)
    probabilities, guesses = (task.model(images) / task.temperature).softmax(dim=1).max(dim=1)
    names = task.class_names
    titles = [
        f"test image {i}\n{names[guess]}: {100 * p:.1f} % (true: {names[label]})"
        for i, guess, p, label in zip(
            chosen, guesses.tolist(), probabilities.tolist(), labels.tolist(), strict=True
        )
    ]
    reader = "The CLS token's" if task.model.pool == "cls" else "All patches' mean"
    return figures.attention(
        pixels,
        explain.patch_map(weights, task.model).cpu().numpy(),
        explain.patch_map(explain.rollout(weights), task.model).cpu().numpy(),
        titles,
        f"{reader} attention to each patch ({task.checkpoint['dataset']})",
    )


def draw_embeddings(task: Task) -> Figure:
    """Position embeddings, patch filters, and the head's input in 2-D."""
    outputs, seed = task.outputs, task.args.seed or 0
    # Enough to see the classes; t-SNE of all 10,000 takes a minute.
    some = np.random.default_rng(seed).permutation(len(outputs.labels))[:MAPPED_IMAGES]
    return figures.embeddings(
        explain.position_similarity(task.model),
        isinstance(task.model.pos_embed, nn.Parameter),
        *explain.filter_components(task.model),
        explain.project(outputs.features[some], seed),
        outputs.labels[some],
        task.class_names,
        f"Embeddings of positions, patches and images ({task.checkpoint['dataset']})",
    )


def draw_confusion(task: Task) -> Figure:
    """Confusion matrix, every class's scores, and the most confident mistakes."""
    outputs, names = task.outputs, task.class_names
    wrong = np.flatnonzero(~outputs.correct)
    worst = wrong[np.argsort(-outputs.confidence[wrong], kind="stable")][:16]
    mistakes = {
        "images": task.test.split.images[worst, 0].cpu().numpy(),
        "labels": [names[i] for i in outputs.labels[worst]],
        "predicted": [names[i] for i in outputs.predicted[worst]],
        "probabilities": outputs.confidence[worst],
    }
    right = f"{100 * outputs.correct.mean():.2f} % of {len(outputs.labels):,} test images right"
    return figures.confusion(
        explain.confusion_matrix(outputs.labels, outputs.predicted, len(names)),
        names,
        mistakes,
        f"{right} ({task.checkpoint['dataset']})",
    )


def draw_calibration(task: Task) -> Figure:
    """Reliability diagram with the expected calibration error."""
    outputs = task.outputs
    bins = explain.calibration(outputs.confidence, outputs.correct)
    return figures.calibration(
        bins,
        f"Expected calibration error {calibration_errors(outputs)} "
        f"({task.checkpoint['dataset']})\nmean confidence {100 * outputs.confidence.mean():.2f} %, "
        f"accuracy {100 * outputs.correct.mean():.2f} %",
    )


def _random(task: Task, count: int) -> list[int]:
    """Positions of random test images."""
    return np.random.default_rng(task.args.seed).permutation(len(task.test.split))[:count].tolist()


def _images(task: Task, chosen: list[int]) -> tuple[np.ndarray, Tensor, Tensor]:
    """Test images as pixels (n, 28, 28), as the model reads them (n, 1, 28, 28), and labels."""
    test = task.test
    part = test.split[torch.tensor(chosen, device=test.split.labels.device)]
    images, labels = next(iter(BatchLoader(part, len(part), test.mean, test.std)))
    return part.images[:, 0].cpu().numpy(), images, labels


MAPPED_IMAGES = 2000
MOST_IMAGES = 12  # a picture of more is too tall to read
PICTURES = {
    "visualize": draw_predictions,
    "attention": draw_attention,
    "embeddings": draw_embeddings,
    "confusion": draw_confusion,
    "calibration": draw_calibration,
}


def picture(task: Task) -> None:
    """Draw what the mode names."""
    figure = PICTURES[task.args.mode](task)
    figures.save(figure, task.args.output)
    print(figure.get_suptitle())


def report(task: Task) -> None:
    """Draw all pictures and write the report around them."""
    bar = tqdm(PICTURES.items(), desc="pictures", leave=False, disable=None)
    pictures = {name: figures.png(draw(task)) for name, draw in bar}
    notes = write_report(
        task.args.output,
        checkpoint_path=task.args.checkpoint,
        checkpoint=task.checkpoint,
        model=task.model,
        outputs=task.outputs,
        pictures=pictures,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"Written: {task.args.output.with_suffix('.md')}, and its pictures")


# ----------------------------------------------------------------------------- the other modes


def score(task: Task) -> None:
    """Score on the test set, as training ends; an evaluation of another checkpoint is kept."""
    smoothing, dataset = task.checkpoint["settings"]["label_smoothing"], task.checkpoint["dataset"]
    outputs, path = task.outputs, task.args.output
    logits, labels = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels)
    loss = F.cross_entropy(logits.double(), labels, label_smoothing=smoothing).item()
    top1, top5 = accuracy(logits, labels, (1, 5))
    cli.print_test_result(dataset, loss, top1, top5)
    print(
        f"Cross-entropy: {outputs.cross_entropy:.4f}  (labels not smoothed, temperature "
        f"{task.temperature:.3f}; Test Loss: labels smoothed by {smoothing:g}, temperature 1)"
    )
    with open(task.args.checkpoint, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    result = {
        "checkpoint": task.args.checkpoint,
        "sha256": digest,
        "dataset": dataset,
        "loss": loss,
    }
    result |= {"label_smoothing": smoothing, "cross_entropy": outputs.cross_entropy}
    result |= {"temperature": task.temperature, "top1": top1, "top5": top5}
    keep = None
    if not _is_evaluation_of(digest, path):
        numbered = (path.with_stem(f"{path.stem}.{i}") for i in count(1))
        keep = next(name for name in numbered if not name.exists())
        print(f"Kept: {path}, which is of another checkpoint, as {keep}")
    write_json(path, result, keep)


def _is_evaluation_of(digest: str, path: Path) -> bool:
    """Whether the file at `path` is of the checkpoint with this SHA-256, or there is none."""
    try:
        return json.loads(path.read_bytes())["sha256"] == digest
    except FileNotFoundError:
        return True
    except (LookupError, OSError, RecursionError, TypeError, ValueError):
        return False


def export_file(task: Task) -> None:
    """Write the model as a file that runs without this project, once it does as well."""
    args = task.args
    precision = "fp16" if args.half else "int8" if args.quantize == "int8" else "fp32"
    try:
        dataset = task.dataset()
    except UserError as error:
        if precision == "int8":
            raise UserError(f"--quantize int8 is set by training images: {error}") from None
        print(f"note: the validation accuracy is not measured: {error}", file=sys.stderr)
        dataset = None
    exported = export.export(
        task.model.cpu(),
        task.checkpoint,
        mode=args.mode,
        precision=precision,
        raw_input=args.raw_input,
        calibration=dataset and dataset.train.images[: export.CALIBRATION_IMAGES],
    )
    print(export.compare(exported, precision, args.output.name, dataset and dataset.val))
    with atomic_write(args.output) as temporary:
        temporary.write_bytes(exported.content)


def read_digits(task: Task) -> None:
    """Print and write what digits each picture shows; those that can't be read are named."""
    names = list_images(task.args.image)
    readings = read_images(names, task.args.single)
    answers = answer(task.model, task.checkpoint, names, readings)
    about = {name: task.checkpoint[name] for name in ("dataset", "class_names")}
    result = {"checkpoint": task.args.checkpoint, **about, "images": answers}
    all_read = show(result, task.args.format)
    if any("prediction" in row for row in answers):
        write_json(task.args.output, result)
        if not all_read and task.args.format == "text":
            print(f"Written: {task.args.output}")
    if not all_read:
        sys.exit(2)


class Mode(NamedTuple):
    """What `--mode` names: its line in the help, the file it writes, and what it does."""

    help: str
    output: str
    run: Callable[[Task], None]


MODES = {
    "visualize": Mode("16 random test images", "./outputs/predictions.png", picture),
    "attention": Mode("what it looks at", "./outputs/attention.png", picture),
    "embeddings": Mode("places, patches, classes", "./outputs/embeddings.png", picture),
    "confusion": Mode("right and wrong by class", "./outputs/confusion.png", picture),
    "calibration": Mode("confidence, accuracy", "./outputs/calibration.png", picture),
    "report": Mode("a page with all pictures", "./outputs/report.html", report),
    "evaluate": Mode("score on the test set", "./outputs/evaluation.json", score),
    "onnx": Mode("export to ONNX", "./outputs/vit_mnist.onnx", export_file),
    "torch_export": Mode("export with torch.export", "./outputs/vit_mnist.pt2", export_file),
    "predict": Mode("your own images", "./outputs/predictions.json", read_digits),
}


# ---------------------------------------------------------------------------------- command line

# What would change nothing in other modes is refused there.
FLAGS_OF_MODES: dict[str, tuple[tuple[str, ...], str]] = {
    "image": (("predict",), "names pictures to read"),
    "format": (("predict",), "(text, csv, json) is the form of the answers"),
    "single": (("predict",), "takes a picture for one digit"),
    "index": (("attention", "report"), "chooses test images"),
    "seed": (("visualize", "attention", "embeddings", "report"), "draws test images at random"),
    "half": (("onnx",), "is the precision of a file"),
    "quantize": (("onnx",), "is the precision of a file"),
    "raw_input": (export.MODES, "is what a file takes and gives"),
}


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
        "--image",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="for predict: image files, folders (the images right in them), - for stdin",
    )
    parser.add_argument(
        "--single",
        action="store_true",
        help="for predict: each image is known to hold one digit; its strokes may lie apart",
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
        "--seed", type=cli.integer(0), help="for pictures: draws the same images again"
    )
    parser.add_argument(
        "--index",
        nargs="+",
        type=cli.integer(0),
        metavar="N",
        help="for attention and report: these test images, counted from 0, not random ones",
    )
    cli.add_data_dir(parser)
    cli.add_device(parser)
    export.add_flags(parser)
    args = parser.parse_args()
    _check_flags(args, parser)
    args.output = Path(getattr(args, "output", MODES[args.mode].output))
    if args.mode in PICTURES:
        figures.check_format(args.output)
    if args.mode == "report" and args.output.suffix.lower() != ".html":
        raise UserError(f"--output {args.output}: a report's name ends in .html")
    return args


def _check_flags(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Raise UserError where a flag does not go with the mode or with another flag."""
    given = parser.given()
    for flag, (modes, effect) in FLAGS_OF_MODES.items():
        if args.mode not in modes and flag in given:
            raise UserError(
                f"--mode {args.mode} given, but --{flag} {effect}, which is for --mode "
                f"{' or '.join(modes)}: leave it out"
            )
    if args.half and args.quantize != "none":
        raise UserError(f"--half and --quantize {args.quantize} contradict each other: give one")
    if args.mode == "predict" and args.image is None:
        raise UserError("--mode predict: name the pictures to read with --image FILE")
    if args.index and len(args.index) > MOST_IMAGES:
        raise UserError(f"--index names {len(args.index)} images, expected at most {MOST_IMAGES}")


def main() -> None:
    args = parse_args()
    device = choose_device(args.device)
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
    validation = f"validation {checkpoint['best_acc']:.2f} %"
    if args.format == "text":  # JSON and CSV stand on stdout alone
        print(f"checkpoint: {args.checkpoint} ({trained}, {validation})")
    MODES[args.mode].run(Task(args, model.to(device), checkpoint, device))
    if args.format == "text":
        print(f"Written: {args.output}")


if __name__ == "__main__":
    cli.run(main)
