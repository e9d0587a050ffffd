"""A trained model's report: a page that opens offline, and the same as Markdown.

Whatever comes from a file, a checkpoint, `history.json` or a timing, may have been made by a
stranger or edited by hand: it is checked, cut to one short line, and escaped.
"""

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from analysis import figures
from analysis.explain import Outputs, calibration, class_scores, confusion_matrix
from analysis.figures import one_line
from common.errors import UserError
from common.files import atomic_write, write_text
from saving.checkpoint import versions
from vit_model import ViT, count_parameters

SAME = ("fingerprint", "dataset", "epochs", "batch_size")  # in timings that are compared
MAX_BYTES = 20_000_000  # of a history; a row of it takes about 500
MAX_ROWS = 200  # shown of a table
EPOCH_NUMBERS = ("epoch", "train_loss", "train_acc", "grad_norm")
EPOCH_NUMBERS += ("val_loss", "val_acc", "val_top5", "seconds")
TIMING_NUMBERS = ("total_train_time", "avg_time_per_epoch", "best_val_acc", "test_acc")

# Of each picture: its heading, and what it shows.
PICTURES = {
    "visualize": (
        "Predictions",
        "Test images drawn at random. Above each: the predicted class, its probability, and the "
        "true class; green where they agree, vermilion where not.",
    ),
    "confusion": (
        "Confusion matrix",
        "Rows are true classes, columns predicted ones; the colour is logarithmic, so that single "
        "mistakes are seen. Precision is the share of right ones among the images taken for a "
        "class, recall the share found among the images of it, F1 their harmonic mean.",
    ),
    "calibration": (
        "Calibration",
        "Of the predictions made with 80 % confidence, 80 % should be right. Bars above the "
        "diagonal are more often right than the model claims (label smoothing does that), bars "
        "below less often. A temperature, set on validation images when training ends, corrects "
        "that. The expected calibration error is the mean distance to the diagonal, weighted by "
        "the images below (Guo et al., 2017).",
    ),
    "attention": (
        "Attention",
        "Over the outline of the digit, how much the CLS token takes from each patch, or, in a "
        "network without one, all patches on average: for every layer and head, darker is more "
        "(the colours follow the root, so that small shares differ, too). Rollout (Abnar & "
        "Zuidema, 2020) multiplies the layers, residual connections included: what reaches the "
        "head in the end, on a scale of its own.",
    ),
    "embeddings": (
        "Embeddings",
        "Each tile on the left compares one patch's position embedding with all others'. The "
        "filters' principal components are the patterns that the patch embedding looks for (ViT, "
        "figure 7). Below, what the head reads of each test image, brought to the plane by PCA and "
        "t-SNE: in t-SNE neighbours are neighbours, distances between groups tell little.",
    ),
    "curves": (
        "Training",
        "Loss, accuracy, learning rate and gradient norm, epoch by epoch; the star is the best "
        "validation accuracy.",
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
    """A part of the report: its heading, then what there is of text, picture and table."""

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
    pictures: dict[str, bytes],
) -> list[str]:
    """Write the report to `path` (.html) and, beside it, as Markdown with its pictures.

    Args:
        checkpoint_path: where the checkpoint stands; history.json and timings beside it are used.
        checkpoint: what `load_checkpoint` returned with `model`.
        outputs: the model's, on the whole test set.
        pictures: PNG files by the names of `PICTURES`.

    Returns:
        Notes, a line each: what was left out of the report, and why.

    Raises:
        UserError: a file can't be written.
    """
    folder = Path(checkpoint_path).parent
    notes: list[str] = []
    history = _or_note(read_history, folder / "history.json", notes)
    timings = [
        _or_note(read_timing, folder / f"timing_{kind}.txt", notes) for kind in ("cpu", "cuda")
    ]
    if history and not _same_run(history, checkpoint):
        notes.append(f"{folder / 'history.json'} is left out: it is not of this checkpoint's run")
        history = None
    if history:
        pictures = {**pictures, "curves": figures.png(figures.training_curves(history))}

    dataset = checkpoint["dataset"]
    title = f"Vision Transformer on {dataset}: {100 * outputs.correct.mean():.2f} % right"
    # Two folders are enough to know it; a report is shown to others.
    shown = Path(*Path(checkpoint_path).parts[-3:])
    lead = f"{one_line(str(shown), 200)}, report of {date.today().isoformat()}"
    tables = {"confusion": [_scores_by_class(outputs, checkpoint["class_names"])]}
    if history:
        tables["curves"] = [_epochs(history)]
    sections = [_results(checkpoint, model, outputs)]
    sections += [
        Section(*PICTURES[name], picture=name, tables=tables.get(name, ()))
        for name in PICTURES
        if name in pictures
    ]
    if all(timings):
        told = [[timing.get(name) for name in SAME] for timing in timings]
        if told[0] != told[1] or timings[0].get("fingerprint") != checkpoint.get("fingerprint"):
            notes.append("times on CPU and GPU are left out: not both are of this run's settings")
        else:
            sections.append(_comparison(*(_with_top5(timing, history) for timing in timings)))
    sections.append(_settings(checkpoint, history))
    if notes:
        sections.append(Section("Left out", text=" ".join(f"{note}." for note in notes)))

    markdown = path.with_suffix(".md")
    links = {name: f"{path.stem}_{name}.png" for name in pictures}
    for name, content in pictures.items():
        with atomic_write(path.with_name(links[name])) as temporary:
            temporary.write_bytes(content)
    write_text(markdown, _to_markdown(title, lead, sections, links))
    write_text(path, _to_html(title, lead, sections, pictures))
    return notes


# ------------------------------------------------------------------- the files beside the model


def read_history(path: Path) -> dict[str, Any]:
    """A run's `history.json`, as far as the report uses it, with every number checked.

    Raises:
        UserError: it is damaged, or has another form.
        FileNotFoundError: there is none.
    """
    try:
        data = json.loads(_read(path))
        rows = [
            {
                **{name: _number(row[name]) for name in EPOCH_NUMBERS},
                "epoch": int(_number(row["epoch"])),
                "is_best": row.get("is_best") is True,
                "lr": {figures.label(k): _number(v) for k, v in list(row["lr"].items())[:20]},
            }
            for row in data["epochs"]
        ]
        if not rows or any(row["lr"].keys() != rows[0]["lr"].keys() for row in rows):
            raise ValueError("no epochs, or others' learning rates")
        test = data["test"]
        if test is not None:
            test = {name: _number(test[name]) for name in ("loss", "top1", "top5")}
        settings = data["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no history of a training run ({_reason(error)})") from None
    except RecursionError:
        raise UserError(f"{path} is no history of a training run (nested too deep)") from None
    return {
        "dataset": figures.label(str(data.get("dataset"))),
        "fingerprint": data.get("fingerprint"),
        "device": one_line(str(data.get("device")), 60),
        "precision": one_line(str(data.get("precision")), 20),
        "settings": settings,
        "epochs": rows,
        "test": test,
    }


def read_timing(path: Path) -> dict[str, Any]:
    """A run's `timing_<device type>.txt`, lines of `key: value`; times in seconds.

    Raises:
        UserError: it is damaged, or has another form.
        FileNotFoundError: there is none.
    """
    try:
        pairs = (line.partition(":") for line in _read(path).splitlines()[:100])
        timing: dict[str, Any] = {key.strip(): one_line(value, 80) for key, _, value in pairs}
        for name in TIMING_NUMBERS:
            timing[name] = _number(float(timing[name]))
        if "test_top5" in timing:
            timing["test_top5"] = _number(float(timing["test_top5"]))
        if min(timing["total_train_time"], timing["avg_time_per_epoch"]) <= 0:
            raise ValueError("a time that is not above 0")
    except (ArithmeticError, LookupError, ValueError) as error:
        raise UserError(f"{path} is no timing of a training run ({_reason(error)})") from None
    return timing


def _read(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        if not path.is_file():  # a device may never end
            raise OSError(None, "it is a folder or a device")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is too large: over {MAX_BYTES // 1_000_000} MB")
    return content.decode()


def _or_note(read, path: Path, notes: list[str]) -> dict[str, Any] | None:
    """What `read` makes of a file; None if there is none, or, with a note, if it is damaged."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except UserError as error:
        notes.append(f"{one_line(str(error), 300)}; it is left out")
        return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{type(value).__name__} for a number")
    if not abs(value) <= 1e12:  # not for NaN, either
        raise ValueError("a number that is not finite, or too large")
    return float(value)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else one_line(str(error), 120)


def _same_run(history: dict[str, Any], checkpoint: dict[str, Any]) -> bool:
    """Whether the history tells the checkpoint's settings and its validation accuracy."""
    found = any(abs(row["val_acc"] - checkpoint["best_acc"]) < 0.01 for row in history["epochs"])
    same = history["fingerprint"] == checkpoint.get("fingerprint")
    return found and same and history["dataset"] == checkpoint["dataset"]


# ------------------------------------------------------------------- the sections


def _results(checkpoint: dict[str, Any], model: ViT, outputs: Outputs) -> Section:
    own = np.take_along_axis(outputs.probabilities, outputs.labels[:, None], axis=1)  # (n, 1)
    top5 = (outputs.probabilities > own).sum(axis=1) < 5
    n, wrong = len(outputs.labels), int((~outputs.correct).sum())
    rows = [
        ("test accuracy", f"{100 * outputs.correct.mean():.2f} % ({wrong:,} of {n:,} wrong)"),
        ("test accuracy, top-5", f"{100 * top5.mean():.2f} %"),
        ("test cross-entropy", f"{outputs.cross_entropy:.4f} nats (labels not smoothed)"),
        ("expected calibration error", calibration_errors(outputs)),
        ("validation accuracy", f"{checkpoint['best_acc']:.2f} % in epoch {checkpoint['epoch']}"),
        ("parameters", f"{count_parameters(model):,}"),
        ("data set", checkpoint["dataset"]),
    ]
    return Section("Results", tables=[Table(("", "result"), rows)])


def calibration_errors(outputs: Outputs) -> str:
    """The expected calibration error, and, where there is a temperature, what it is without."""
    error, without = (
        calibration(each.confidence, each.correct).expected_error
        for each in (outputs, replace(outputs, temperature=1.0))
    )
    if outputs.temperature == 1:
        return f"{100 * error:.2f} %"
    return (
        f"{100 * error:.2f} % at temperature {outputs.temperature:.3f}, {100 * without:.2f} % at 1"
    )


def _scores_by_class(outputs: Outputs, class_names: Sequence[str]) -> Table:
    counts = confusion_matrix(outputs.labels, outputs.predicted, len(class_names))
    scores = class_scores(counts)
    rows = [
        (
            one_line(name, 24),
            f"{counts[i].sum():,}",
            *(f"{100 * scores[score][i]:.2f}" for score in ("precision", "recall", "f1")),
        )
        for i, name in enumerate(class_names)
    ]
    return Table(("class", "images", "precision (%)", "recall (%)", "F1 (%)"), rows)


def _epochs(history: dict[str, Any]) -> Table:
    header = ("epoch", "train loss", "train top-1 (%)", "val loss", "val top-1 (%)")
    header += ("val top-5 (%)", "time (s)")
    best = figures.best_row(history)
    rows = [
        (
            f"{row['epoch']}{' ★' if row is best else ''}",
            f"{row['train_loss']:.4f}",
            f"{row['train_acc']:.2f}",
            f"{row['val_loss']:.4f}",
            f"{row['val_acc']:.2f}",
            f"{row['val_top5']:.2f}",
            f"{row['seconds']:.1f}",
        )
        for row in history["epochs"]
    ]
    return Table(header, rows, folded=True)


def _with_top5(timing: dict[str, Any], history: dict[str, Any] | None) -> dict[str, Any]:
    """The timing with the top-5 accuracy of its own run's history, where it has none."""
    test = history and history["test"]
    own = test and history["device"] == timing.get("device")
    if own and abs(test["top1"] - timing["test_acc"]) < 0.01:
        return {"test_top5": test["top5"], **timing}
    return timing


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
    def rows(values: Any) -> list[tuple[str, str]]:
        pairs = list(values.items()) if isinstance(values, dict) else []
        return [
            (one_line(_shown(name), 40), one_line(_shown(value), 160))
            for name, value in pairs
            if value is not None
        ]

    settings = rows(history["settings"] if history else checkpoint["settings"])
    if history:
        settings += [(name, history[name]) for name in ("device", "precision")]
    tables = [
        Table(("network", "value"), rows(checkpoint["model_config"])),
        Table(("training", "value"), settings, folded=True),
        Table(("trained with", "version"), rows(checkpoint.get("versions"))),
        Table(("report made with", "version"), rows(versions())),
    ]
    return Section("Settings and versions", tables=[table for table in tables if table.rows])


def _shown(value: Any) -> str:
    if isinstance(value, str | float | bool):
        return str(value)
    if isinstance(value, int) and abs(value) < 10**18:
        return str(value)
    return f"({type(value).__name__})"  # printing it may take long, or fail


# ------------------------------------------------------------------- the two formats


def _to_markdown(title: str, lead: str, sections: Sequence[Section], links: dict[str, str]) -> str:
    def safe(text: str) -> str:
        return re.sub(r"([\\`*_\[\]|~!])", r"\\\1", html.escape(text, quote=False))

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(safe, cells))} |"

    lines = [f"# {safe(title)}", "", safe(lead), ""]
    for section in sections:
        lines += [f"## {safe(section.heading)}", ""]
        if section.text:
            lines += [safe(section.text), ""]
        if section.picture:
            lines += [f"![{section.heading}]({quote(links[section.picture])})", ""]
        for table in section.tables:
            lines += [row(table.header), "|" + "---|" * len(table.header)]
            lines += [*map(row, table.rows[:MAX_ROWS]), *_cut(table), ""]
    return "\n".join(lines)


def _cut(table: Table) -> list[str]:
    more = len(table.rows) - MAX_ROWS
    return ["", f"({more:,} more rows are not shown)"] if more > 0 else []


STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --soft: #59626b; --page: #fbfbfa;
  --card: #fff; --line: #dcdfe2; --accent: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e8; --soft: #a2abb3; --page: #16191c;
  --card: #1f2327; --line: #383e44; --accent: #56b4e9 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--page);
  color: var(--text); font: 1.0625rem/1.6 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25 }
h2 { margin: 3rem 0 .5rem; font-size: 1.35rem }
p { max-width: 46rem; margin: .5rem 0 1rem; overflow-wrap: anywhere }
.lead { color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem }
a { color: var(--accent) }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto; padding: .5rem;
  background: #fff; border: 1px solid var(--line); border-radius: .5rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; background: var(--card); font-variant-numeric: tabular-nums;
  font-size: .95rem }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right }
th { font-weight: 600 }
th:first-child, td:first-child, .text td, .text th { text-align: left }
td:last-child { overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--accent) }
@media print { body { max-width: none } h2, img { break-inside: avoid } nav { display: none } }
"""


def _to_html(title: str, lead: str, sections: Sequence[Section], pictures: dict[str, bytes]) -> str:
    safe = html.escape
    entries = [f'<a href="#s{i}">{safe(s.heading)}</a>' for i, s in enumerate(sections)]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        # No script and nothing from elsewhere, whatever a checkpoint smuggles in.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{safe(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{safe(title)}</h1><p class="lead">{safe(lead)}</p>',
        f"<nav>{''.join(entries)}</nav>",
    ]
    for i, section in enumerate(sections):
        parts.append(f'<section id="s{i}"><h2>{safe(section.heading)}</h2>')
        if section.text:
            parts.append(f"<p>{safe(section.text)}</p>")
        if section.picture:
            data = base64.b64encode(pictures[section.picture]).decode()
            alt = safe(f"{section.heading}: see the text above")
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
        parts += [_html_table(table) for table in section.tables]
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>", ""])


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    kind = ' class="text"' if len(table.header) == 2 else ""
    rows = "".join(row(cells, "td") for cells in table.rows[:MAX_ROWS])
    text = f'<div class="scroll"><table{kind}><thead>{row(table.header, "th")}</thead>'
    text += f"<tbody>{rows}</tbody></table>{''.join(_cut(table))}</div>"
    if table.folded:
        name = html.escape(f"{len(table.rows)} rows: {', '.join(table.header[:3])} ...")
        text = f"<details><summary>{name}</summary>{text}</details>"
    return text
