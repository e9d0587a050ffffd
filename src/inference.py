"""What you do with a trained model: picture its predictions, score it, export it, ask it.

Each mode is a function, which MODES names; flags.py has their flags.
"""

import common.startup  # noqa: F401 before PyTorch

from common import cli
from deploy.flags import EXPORTS, WEIGHTS, default_output, parse_args

if __name__ == "__main__":
    cli.check_flags(parse_args)  # before PyTorch is imported, which takes seconds

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from analysis import explain, figures, model_figures, score_figures
from analysis.report import reliability_text, write_report
from analysis.words import PICTURE, words_for
from common.device import choose_device
from common.errors import UserError
from common.files import check_writable, write_bytes, write_json
from data.dataset import Dataset, Split, as_pictures
from deploy import webpage
from deploy.answers import show
from deploy.datasets import load_own_set, load_test_images
from deploy.picture_files import list_images
from deploy.predict import answer_files, check_image_shape
from deploy.weights import write_for_timm
from saving.checkpoint import find_checkpoint, load_checkpoint
from saving.weights_file import write_safetensors
from utils import BatchLoader, accuracy, images_at_once
from vit_model import ViT

SCORED = ("sha256", "data_dir", "images")  # what tells one evaluation from another
MAPPED_IMAGES = 2000  # enough to see the classes; t-SNE of all 10,000 takes a minute


@dataclass(frozen=True)
class Task:
    """What a mode works on: the flags, and the model with its checkpoint."""

    args: argparse.Namespace
    model: ViT  # on `device`, in evaluation mode
    checkpoint: dict[str, Any]
    device: torch.device

    @cached_property
    def scored(self) -> tuple[str, Split]:
        """What the test images' set is called, and they. Raises UserError if they can't be had."""
        return load_test_images(self.checkpoint, self.args.checkpoint, self.args.data_dir)

    @property
    def scored_on(self) -> str:
        """What the test images' set is called, as pictures can show it."""
        return figures.label(self.scored[0])

    @cached_property
    def test(self) -> BatchLoader:
        """The test images, normalised as the images that the model was trained on."""
        split = self.scored[1].to(self.device)
        size = images_at_once(split.images.shape[-1])
        return BatchLoader(split, size, **self.checkpoint["normalization"])

    @cached_property
    def outputs(self) -> explain.Outputs:
        """What the model makes of the whole test set, computed once."""
        return explain.outputs(self.model, self.test, self.temperature)

    @property
    def temperature(self) -> float:
        """Of the model's probabilities."""
        return self.checkpoint["calibration"]["temperature"]

    def names(self, classes: Iterable[int] | None = None) -> list[str]:
        """The names of these classes, or of all, as pictures can show them."""
        names = figures.labels(self.checkpoint["class_names"])
        return names if classes is None else [names[i] for i in classes]


def take_sample(
    task: Task, size: int, indices: list[int] | None = None
) -> tuple[list[int], BatchLoader, explain.Outputs]:
    """The test images with these indices, or `size` random ones, as one batch, and the outputs."""
    test = task.test
    if indices is None:
        order = np.random.default_rng(task.args.seed).permutation(len(test.split))
        indices = order[:size].tolist()
    split = test.split[torch.tensor(indices, device=task.device)]
    loader = BatchLoader(split, len(split), test.mean, test.std)
    return indices, loader, explain.outputs(task.model, loader, task.temperature)


def pixels(split: Split) -> np.ndarray:
    """The images as figures show them: uint8 (n, S, S), or (n, S, S, 3) in colour."""
    return as_pictures(split.images.cpu().numpy())


# ------------------------------------------------------------------------- the modes that draw


def draw_predictions(task: Task) -> Figure:
    """16 random test images under what the model takes them for."""
    _, loader, outputs = take_sample(task, 16)
    right = f"{outputs.correct.sum()} of {len(outputs.labels)} test images right"
    return score_figures.predictions(
        pixels(loader.split),
        task.names(outputs.labels),
        task.names(outputs.predicted),
        outputs.confidence,
        f"{right} ({task.scored_on})",
    )


def draw_attention(task: Task) -> Figure:
    """What every layer and head looks at in chosen or random test images."""
    chosen, last = task.args.index, len(task.test.split) - 1
    if chosen and max(chosen) > last:
        raise UserError(
            f"--index {max(chosen)}: the {task.scored[0]} test set has images 0 to {last}"
        )
    indices, loader, outputs = take_sample(task, 3, chosen)
    ((images, _),) = loader
    weights = explain.attention_weights(task.model, images)
    shown = [f"test image {i}" for i in indices]
    names = task.names(outputs.predicted), outputs.confidence, task.names(outputs.labels)
    reader = "The CLS token's" if task.model.pool == "cls" else "All patches' mean"
    return model_figures.attention(
        pixels(loader.split),
        explain.patch_map(weights, task.model).cpu().numpy(),
        explain.patch_map(explain.rollout(weights), task.model).cpu().numpy(),
        list(zip(shown, *names, strict=True)),
        words_for(task.checkpoint) is not PICTURE,
        f"{reader} attention to each patch ({task.scored_on})",
    )


def draw_embeddings(task: Task) -> Figure:
    """Position embeddings, patch filters, and the head's input in 2-D."""
    outputs, seed = task.outputs, task.args.seed or 0
    some = np.random.default_rng(seed).permutation(len(outputs.labels))[:MAPPED_IMAGES]
    return model_figures.embeddings(
        explain.position_similarity(task.model),
        isinstance(task.model.pos_embed, nn.Parameter),
        *explain.filter_components(task.model),
        explain.project(outputs.features[some], seed),
        outputs.labels[some],
        task.names(),
        f"Embeddings of positions, patches and images ({task.scored_on})",
    )


def draw_confusion(task: Task) -> Figure:
    """Confusion matrix, every class's scores, and the most confident mistakes."""
    outputs, names = task.outputs, task.names()
    wrong = np.flatnonzero(~outputs.correct)
    worst = wrong[np.argsort(-outputs.confidence[wrong], kind="stable")][:16]
    mistakes = {
        "images": pixels(task.test.split)[worst],
        "labels": task.names(outputs.labels[worst]),
        "predicted": task.names(outputs.predicted[worst]),
        "probabilities": outputs.confidence[worst],
    }
    right = f"{100 * outputs.correct.mean():.2f} % of {len(outputs.labels):,} test images right"
    return score_figures.confusion(
        outputs.confusion,
        outputs.class_scores,
        names,
        mistakes,
        f"{right} ({task.scored_on})",
    )


def draw_calibration(task: Task) -> Figure:
    """Reliability diagram with the expected calibration error."""
    outputs = task.outputs
    return score_figures.reliability(
        explain.reliability(outputs.confidence, outputs.correct),
        f"Expected calibration error {reliability_text(outputs)} ({task.scored_on})\n"
        f"mean confidence {100 * outputs.confidence.mean():.2f} %, "
        f"accuracy {100 * outputs.correct.mean():.2f} %",
    )


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
        dataset=task.scored[0],
        pictures=pictures,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"Written: {task.args.output.with_suffix('.md')}, and its pictures")


# ----------------------------------------------------------------------------- the other modes


def score(task: Task) -> None:
    """Score on the test set, as training ends; an evaluation of another model or set is kept."""
    smoothing, dataset = task.checkpoint["settings"]["label_smoothing"], task.scored[0]
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
        "data_dir": task.args.data_dir and os.path.abspath(task.args.data_dir),
        "images": len(labels),
        "loss": loss,
        "label_smoothing": smoothing,
        "cross_entropy": outputs.cross_entropy,
        "temperature": task.temperature,
        "top1": top1,
        "top5": top5,
    }
    keep = None
    if not _is_evaluation_of({name: result[name] for name in SCORED}, path):
        numbered = (path.with_stem(f"{path.stem}.{i}") for i in count(1))
        keep = next(name for name in numbered if not name.exists())
        print(f"Kept: {path}, which is of another checkpoint or other images, as {keep}")
    write_json(path, result, keep)


def _is_evaluation_of(scored: Mapping[str, Any], path: Path) -> bool:
    """Whether the file at `path` is of the same checkpoint and images, or there is none."""
    try:
        before = json.loads(path.read_bytes())
        return all(before[name] == value for name, value in scored.items())
    except FileNotFoundError:
        return True
    except (LookupError, OSError, RecursionError, TypeError, ValueError):
        return False


def export_file(task: Task) -> None:
    """Write the model as a file that runs without this project, if that does as well."""
    from deploy import export  # slow: it imports ONNX and its runtime

    args = task.args
    precision = "fp16" if args.half else "int8" if args.quantize == "int8" else "fp32"
    dataset = load_images(task, "--quantize int8" if precision == "int8" else None)
    exported = export.export(
        task.model.cpu(),
        task.checkpoint,
        mode=args.mode,
        precision=precision,
        raw_input=args.raw_input,
        int8_images=dataset and dataset.train.images[: export.INT8_IMAGES],
    )
    print(export.compare(exported, precision, args.output.name, dataset and dataset.val))
    write_bytes(args.output, exported.content)


def write_page(task: Task) -> None:
    """Write the page to draw on with the model in it, if that does as well in fp16."""
    args = task.args
    webpage.check_digits(task.checkpoint, args.checkpoint)
    dataset = load_images(task)
    compared = webpage.compare(task.model, task.checkpoint, dataset and dataset.val)
    page = webpage.build_page(task.model, task.checkpoint).encode()
    print(f"{args.output.name}: {len(page) / 1e6:.2f} MB, {compared}")
    write_bytes(args.output, page)


def load_images(task: Task, needed_by: str | None = None) -> Dataset | None:
    """The data set that the model was trained on; None, and a note, if it can't be had. Raises
    UserError then if a flag needs it, or --data_dir names no folder.
    """
    try:
        return load_own_set(task.checkpoint, task.args.checkpoint, task.args.data_dir)
    except UserError as error:
        if task.args.data_dir and not os.path.isdir(task.args.data_dir) and not needed_by:
            raise
        if needed_by:
            raise UserError(f"{needed_by} needs training images: {error}") from None
        reason = " ".join(str(error).split())
        print(f"note: nothing is measured on validation images: {reason}", file=sys.stderr)


def write_weights(task: Task) -> None:
    """Write the weights for others: as a file of safetensors, or by timm's names."""
    path, model, checkpoint = task.args.output, task.model.cpu(), task.checkpoint
    if task.args.mode == "safetensors":
        write_safetensors(path, model.state_dict(), checkpoint)
        return
    call = write_for_timm(path, model, checkpoint["model_config"])
    print(f"load with: {call}")
    mean, std = checkpoint["normalization"].values()
    print(f"it takes:  (pixel / 255 - mean) / std, by channel: mean {mean}, std {std}")


def read_pictures(task: Task) -> None:
    """Print and write what each picture shows; those that can't be read are named."""
    names, words = list_images(task.args.image), words_for(task.checkpoint)
    if task.args.single and words is PICTURE:
        raise UserError("--single is for models that read digits; this one takes whole pictures")
    answers = answer_files(task.model, task.checkpoint, names, task.args.single)
    about = {name: task.checkpoint[name] for name in ("dataset", "class_names")}
    result = {"checkpoint": task.args.checkpoint, **about, "images": answers}
    some_read = any("prediction" in row for row in answers)
    if some_read:  # first, for whoever reads stdout may stop reading
        write_json(task.args.output, result)
    if show(result, task.args.format, words):
        return
    if some_read and task.args.format == "text":
        print(f"Written: {task.args.output}")
    sys.exit(2)


MODES: dict[str, Callable[[Task], None]] = {
    **dict.fromkeys(PICTURES, picture),
    "report": report,
    "evaluate": score,
    **dict.fromkeys(EXPORTS, export_file),
    **dict.fromkeys(WEIGHTS, write_weights),
    "webpage": write_page,
    "predict": read_pictures,
}


def main() -> None:
    args = parse_args()
    if args.mode in PICTURES and args.output:
        figures.check_format(args.output)
    device = choose_device(args.device)
    args.checkpoint = str(find_checkpoint(args.checkpoint))
    model, checkpoint = load_checkpoint(args.checkpoint)
    if args.mode in (*PICTURES, "report"):
        figures.note_missing_letters(checkpoint["class_names"])
    if args.mode not in EXPORTS + WEIGHTS:
        advice = f": only --mode {', '.join(EXPORTS + WEIGHTS)} serve it"
        check_image_shape(checkpoint, args.checkpoint, advice)
    args.output = args.output or default_output(args.mode, checkpoint["source"])
    check_writable(args.output)
    if args.output.exists() and args.output.samefile(args.checkpoint):
        raise UserError(f"--output {args.output} would replace the model itself: name another file")
    trained = f"{checkpoint['dataset']}, epoch {checkpoint['epoch']}"
    validation = f"validation {checkpoint['best_acc']:.2f} %"
    if args.format == "text":  # JSON and CSV stand on stdout alone
        print(f"checkpoint: {args.checkpoint} ({trained}, {validation})")
    existed = args.output.exists()
    MODES[args.mode](Task(args, model.to(device), checkpoint, device))
    if existed and args.mode in (*EXPORTS, *WEIGHTS, "webpage"):  # several models share the name
        print(f"Replaced: {args.output}, which was there (--output names another file)")
    if args.format == "text":
        print(f"Written: {args.output}")


if __name__ == "__main__":
    cli.run(main)
