"""A trained model's report: a page that opens offline, and the same as Markdown.

Whatever comes from a file, a checkpoint, `history.json` or a timing, may have been made by a
stranger or edited by hand: it is checked, cut to one short line, and escaped.
"""

import html
import os
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis import figures
from analysis.explain import Outputs, accuracy_interval, reliability
from analysis.figures import numbered, one_line, score_text
from analysis.run_files import read_run_files
from analysis.words import PICTURE, PREPARED, words_for
from common.files import write_bytes, write_text
from saving.checkpoint import versions
from utils import accuracy
from vit_model import ViT, count_parameters

MAX_ROWS = 200  # shown of a table

# The heading of each picture, and what it shows; braces are filled by `_told`.
PICTURES = {
    "visualize": (
        "Predictions",
        "Test images drawn at random. Above each: the predicted class, its probability, and the "
        "true class; green where they agree, vermilion where not.",
    ),
    "confusion": (
        "Confusion matrix",
        "Rows are true classes, columns predicted ones; the colour scale is logarithmic, so that "
        "single mistakes are seen. Precision is the share of the images predicted as a class that "
        "belong to it, recall the share of the images of a class that are predicted as it, F1 "
        "their harmonic mean.",
    ),
    "calibration": (
        "Reliability",
        "Of the predictions made with 80 % confidence, 80 % should be right. Where a bar ends "
        "above the diagonal, the model is right more often than it claims (label smoothing does "
        "that), below it less often. A temperature, set on validation images when training ends, "
        "corrects that. The expected calibration error is the mean distance to the diagonal, "
        "weighted by the number of images, which is shown below (Guo et al., 2017). A bin with "
        "few images says little: its bar is pale.",
    ),
    "attention": (
        "Attention",
        "How much {reader} from each patch, over {ground}, for every layer and head. Darker is "
        "more; the colours follow the square root, so that small shares can be told apart, too. "
        "Rollout (Abnar & Zuidema, 2020) multiplies the layers, residual connections included, "
        "which gives what reaches the head in the end; it has a scale of its own.",
    ),
    "embeddings": (
        "Embeddings",
        "Each tile on the left compares one patch's position embedding with those of all patches. "
        "The principal components of the filters are the patterns that the patch embedding looks "
        "for (ViT, figure 7). Below, what the head reads of each test image, projected to the "
        "plane by PCA and by t-SNE. In t-SNE, neighbours are neighbours, but distances between "
        "groups tell little.",
    ),
    "curves": (
        "Training",
        "Loss, accuracy, learning rate and gradient norm, epoch by epoch; the star marks the epoch "
        "that the best model is from.",
    ),
}


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False  # shown on demand, where the format can


@dataclass(frozen=True)
class Section:
    """A part of the report: its heading, then what there is of text, picture and tables."""

    heading: str
    text: str = ""
    picture: str = ""  # a name among the report's pictures
    tables: Sequence[Table] = ()


def write_report(
    path: Path,
    *,
    checkpoint_path: str | Path,
    checkpoint: dict[str, Any],
    model: ViT,
    outputs: Outputs,
    dataset: str,
    pictures: dict[str, bytes],
) -> list[str]:
    """Write the report to `path` (.html) and, beside it, as Markdown with its pictures. Raises
    UserError if a file can't be written.

    Args:
        checkpoint_path: where the checkpoint stands; history.json and timings beside it are used.
        checkpoint: what `load_checkpoint` returned with `model`.
        outputs: the model's, on the whole test set.
        dataset: what the test set is called.
        pictures: PNG files by the names of `PICTURES`.

    Returns:
        Notes, a line each: what was left out of the report, and why.
    """
    history, timings, notes = read_run_files(Path(checkpoint_path).parent, checkpoint)
    if history:
        pictures = {**pictures, "curves": figures.png(figures.training_curves(history))}
    sections = [_results(checkpoint, model, outputs, one_line(dataset, 100))]
    tables = {"confusion": [_scores_by_class(outputs, checkpoint["class_names"])]}
    tables["curves"] = [_epochs(history)] if history else []
    for name in (name for name in PICTURES if name in pictures):
        heading, text = PICTURES[name]
        text = text.format_map(_told(checkpoint, model))
        sections.append(Section(heading, text, name, tables.get(name, ())))
    sections += [_comparison(*timings)] if timings else []
    sections.append(_settings(checkpoint, history))
    # At most two folders of a path are shown, as reports are passed on.
    if notes:
        folder = f"{Path(checkpoint_path).parent}{os.sep}"
        text = " ".join(f"{note.replace(folder, '')}." for note in notes)
        sections.append(Section("Left out", text=text))
    shown = one_line(str(Path(*Path(checkpoint_path).parts[-3:])), 200)
    right = f"{100 * outputs.correct.mean():.2f} % right"
    content = {
        "title": f"Vision Transformer on {one_line(dataset, 100)}: {right}",
        "lead": f"{shown}, report of {date.today().isoformat()}",
        "sections": sections,
        "max_rows": MAX_ROWS,
    }
    links, embedded = {}, {}
    for name, png in pictures.items():
        picture_path = path.with_name(f"{path.stem}_{name}.png")
        write_bytes(picture_path, png)
        links[name] = Markup(quote(os.fsencode(picture_path.name)))
        embedded[name] = f"data:image/png;base64,{b64encode(png).decode()}"
    write_text(path.with_suffix(".md"), MARKDOWN.render(content, images=links))
    write_text(path, HTML.render(content, images=embedded))
    return notes


def escape_markdown(value: Any) -> str:
    """A value as text that Markdown shows as it is; `Markup` is taken for Markdown itself."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]|~!])", r"\\\1", html.escape(str(value), quote=False))


_OPTIONS = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
_OPTIONS["loader"] = FileSystemLoader(Path(__file__).parent)
HTML = Environment(autoescape=True, **_OPTIONS).get_template("report.html.j2")
MARKDOWN = Environment(finalize=escape_markdown, **_OPTIONS).get_template("report.md.j2")


# ------------------------------------------------------------------- the sections


def _told(checkpoint: dict[str, Any], model: ViT) -> dict[str, str]:
    """What the texts on pictures say of this model and its images."""
    words, averages = words_for(checkpoint), model.pool == "mean"
    return {
        "reader": "all patches on average take" if averages else "the CLS token takes",
        "ground": "a pale grey version of the image"
        if words is PICTURE
        else f"the outline of the {words.one}",
    }


def _results(checkpoint: dict[str, Any], model: ViT, outputs: Outputs, dataset: str) -> Section:
    logits, labels = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels)
    n, right = len(outputs.labels), int(outputs.correct.sum())
    low, high = accuracy_interval(right, n)
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    rows = [
        ("test accuracy", f"{100 * right / n:.2f} % ({n - right:,} of {n:,} wrong; {interval})"),
        ("test cross-entropy", f"{outputs.cross_entropy:.4f} nats (labels not smoothed)"),
        ("expected calibration error", reliability_text(outputs)),
        ("validation accuracy", f"{checkpoint['best_acc']:.2f} % in epoch {checkpoint['epoch']}"),
        ("parameters", f"{count_parameters(model):,}"),
        ("tested on", dataset),
        ("trained on", checkpoint["dataset"]),
        ("classes", _listed(checkpoint["class_names"])),
        ("images", _described(checkpoint)),
    ]
    if len(checkpoint["class_names"]) > 5:  # of five all would count
        top5 = f"{accuracy(logits, labels, (5,))[0]:.2f} %"
        rows.insert(1, ("test accuracy, top-5", top5))
    return Section("Results", tables=[Table(("", "result"), rows)])


def _names(class_names: Sequence[str]) -> list[str]:
    return numbered([one_line(name, 24) for name in class_names])


def _listed(class_names: Sequence[str]) -> str:
    """How many classes there are, and the names of the first."""
    some = ", ".join(_names(class_names)[:10])
    return f"{len(class_names)}: {some}{', ...' if len(class_names) > 10 else ''}"


def _described(checkpoint: dict[str, Any]) -> str:
    """Size and colours of the images, and how a picture becomes one."""
    side, channels = (checkpoint["model_config"][name] for name in ("img_size", "in_chans"))
    colours = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
    return f"{side}x{side} pixels, {colours}; a picture is {PREPARED[checkpoint['preparation']]}"


def reliability_text(outputs: Outputs) -> str:
    """The expected calibration error and, if there is a temperature, what it is without."""
    error, without = (
        f"{100 * reliability(each.confidence, each.correct).expected_error:.2f} %"
        for each in (outputs, replace(outputs, temperature=1.0))
    )
    if outputs.temperature == 1:
        return error
    return f"{error} at temperature {outputs.temperature:.3f}, {without} at 1"


def _scores_by_class(outputs: Outputs, class_names: Sequence[str]) -> Table:
    images = outputs.confusion.sum(axis=1)
    rows = [
        (name, f"{count:,}", *map(score_text, scores))
        for name, count, scores in zip(
            _names(class_names), images, outputs.class_scores, strict=True
        )
    ]
    return Table(("class", "images", "precision (%)", "recall (%)", "F1 (%)"), rows)


def _epochs(history: dict[str, Any]) -> Table:
    columns = {  # the heading of each, what it shows, and with how many decimals
        "train loss": ("train_loss", 4),
        "train top-1 (%)": ("train_acc", 2),
        "val loss": ("val_loss", 4),
        "val top-1 (%)": ("val_acc", 2),
        "val top-5 (%)": ("val_top5", 2),
        "time (s)": ("seconds", 1),
    }
    best = figures.best_row(history)
    rows = [
        (
            f"{row['epoch']}{' ★' if row is best else ''}",
            *(f"{row[name]:.{decimals}f}" for name, decimals in columns.values()),
        )
        for row in history["epochs"]
    ]
    return Table(("epoch", *columns), rows, folded=True)


def _comparison(cpu: dict[str, Any], gpu: dict[str, Any]) -> Section:
    def line(name: str, key: str, unit: str) -> tuple[str, ...]:
        values = [f"{run[key]:.2f} {unit}" if key in run else "not given" for run in (cpu, gpu)]
        ratio = f"{cpu[key] / gpu[key]:.2f} times" if unit == "s" else ""
        return name, *values, ratio

    rows = [
        (name.replace("_", " "), cpu.get(name, "not given"), gpu.get(name, "not given"), "")
        for name in ("device", "dataset", "epochs", "batch_size")
    ]
    rows += [
        line("training time", "total_train_time", "s"),
        line("time per epoch", "avg_time_per_epoch", "s"),
        line("best validation accuracy", "best_val_acc", "%"),
        line("test accuracy", "test_acc", "%"),
        line("test accuracy, top-5", "test_top5", "%"),
    ]
    text = "The same training on both devices."
    header = ("", "CPU", "GPU", "CPU / GPU")
    return Section("CPU against GPU", text, tables=[Table(header, rows)])


def _settings(checkpoint: dict[str, Any], history: dict[str, Any] | None) -> Section:
    def table(title: str, header: str, values: Any, folded: bool = False) -> Table:
        pairs = values.items() if isinstance(values, dict) else ()
        rows = [
            (one_line(_shown(name), 40), one_line(_shown(value), 160))
            for name, value in pairs
            if value is not None
        ]
        return Table((title, header), rows, folded)

    settings = checkpoint["settings"]
    if history:
        settings = history["settings"] | {name: history[name] for name in ("device", "precision")}
    tables = [
        table("network", "value", checkpoint["model_config"]),
        table("training", "value", settings, folded=True),
        table("trained with", "version", checkpoint.get("versions")),
        table("report made with", "version", versions()),
    ]
    return Section("Settings and versions", tables=[table for table in tables if table.rows])


def _shown(value: Any) -> str:
    """A value as text; of what may take long to print, or fail, the name of its type."""
    brief = isinstance(value, int) and abs(value) < 10**18
    if brief or isinstance(value, str | float):
        return str(value)
    return f"({type(value).__name__})"
