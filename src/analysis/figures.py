"""Figures of a training run and of schedules, and what all figures share.

Nothing needs a display. model_figures.py draws a trained model.
"""

import io
import math
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from common.errors import UserError
from common.files import atomic_write
from common.text import printable

# Okabe & Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
COLORS = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")
STYLES = ("-", "--", "-.", ":")  # tell the lines apart in print, too
# Fonts with Chinese, Japanese and Korean letters, which Matplotlib's own lacks: names of classes
# may have them.
EAST_ASIAN = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei")
EAST_ASIAN += ("Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS")
_installed = set(font_manager.get_font_names())
_east_asian = [name for name in EAST_ASIAN if name in _installed]
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *_east_asian[:1]]


def check_format(path: Path) -> None:
    """Raise UserError if figures are not written in the format of the name's ending."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(
            f"{path}: figures are written as .png, .pdf or .svg; give it one of these endings"
        )


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the name's ending, whole or not at all."""
    with atomic_write(path) as temporary:
        _draw(figure, temporary, dpi=150)


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    content = io.BytesIO()
    _draw(figure, content, format="png", dpi=110)
    return content.getvalue()


def _draw(figure: Figure, to: Path | io.BytesIO, **how) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # see note_missing_letters
        figure.savefig(to, **how)


def note_missing_letters(names: Sequence[str]) -> None:
    """Say so if names have letters that no font here has: figures show boxes in their place."""
    fonts = [FT2Font(font_manager.findfont(name)) for name in matplotlib.rcParams["font.family"]]
    known = set().union(*(font.get_charmap() for font in fonts))
    missing = sorted({c for name in names for c in label(name) if ord(c) not in known})
    if missing:
        print(
            f"note: no font here has {''.join(missing[:10])}, of the names of classes; pictures "
            "show boxes in their place: install a font that has, such as Noto Sans CJK",
            file=sys.stderr,
        )


def one_line(text: str, limit: int) -> str:
    """A text from an untrusted file as one printable line of at most `limit` characters."""
    text = printable(" ".join(text[: 20 * limit].split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def label(text: str) -> str:
    """`one_line` for a figure: at most 20 characters, and never read as a formula."""
    return one_line(text, 20).replace("\\", "/").replace("$", r"\$")


def labels(texts: Sequence[str]) -> list[str]:
    """`label` of each; those that it makes alike are numbered."""
    return numbered([label(text) for text in texts])


def numbered(names: Sequence[str]) -> list[str]:
    """Names that were cut short; those alike get their places, from 0, to tell them apart."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} {i}" for i, name in enumerate(names)]


def training_curves(history: dict[str, Any]) -> Figure:
    """Draw loss, accuracy, learning rate and gradient norm over the epochs of a `history.json`,
    which may be that of an unfinished run."""
    rows = history["epochs"]
    epochs = [row["epoch"] for row in rows]
    ticks = FixedLocator(ticks_with_ends(epochs[0], epochs[-1], 8, whole=True))
    line = {"marker": "o" if len(epochs) <= 30 else "", "markersize": 3}

    def plot(axes: Axes, name: str, **look: Any) -> None:
        axes.plot(epochs, [row[name] for row in rows], **look, **line)

    figure = Figure(figsize=(12, 7), layout="constrained")
    (loss, top1), (rate, norm) = figure.subplots(2, 2)
    for axes, title, unit in (
        (loss, "Loss", "cross-entropy (nats)"),
        (top1, "Accuracy", "top-1 (%)"),
        (rate, "Learning rate", "mean over the epoch"),
        (norm, "Gradient norm", "before clipping, mean over the epoch"),
    ):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        tidy(axes)
        axes.xaxis.set_major_locator(ticks)
    for axes, measure in ((loss, "loss"), (top1, "acc")):
        plot(axes, f"train_{measure}", color=ORANGE, label="training")
        plot(axes, f"val_{measure}", color=BLUE, label="validation")
    best = best_row(history)
    text = f"best: {best['val_acc']:.2f} % in epoch {best['epoch']}"
    star = {"markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.6, "label": text}
    top1.plot(best["epoch"], best["val_acc"], "*", color=GREEN, **star)  # hollow: a point is in it
    groups: dict[str, list[float]] = {}  # those that differ in weight decay alone share a curve
    for group in rows[0]["lr"]:
        rates = [row["lr"][group] for row in rows]
        if rates not in groups.values():
            groups[group] = rates
    for i, (group, rates) in enumerate(groups.items()):
        named = i < 3 or i >= len(groups) - 3  # with a rate for each layer there may be dozens
        rate.plot(epochs, rates, label=group if named else None, **_look(i), **line)
    plot(norm, "grad_norm", color=GREY)
    for axes in (loss, top1, *([rate] if len(groups) > 1 else [])):
        axes.legend(frameon=False)
    for axes in (rate, norm):
        axes.set_ylim(bottom=0)
    test = history["test"]
    ending = f"{test['top1']:.2f} % on the test set" if test else "not finished"
    figure.suptitle(f"ViT on {label(history['dataset'])}: {ending}")
    return figure


def best_row(history: dict[str, Any]) -> dict[str, Any]:
    """The row of the epoch whose model is the run's best: the last that is marked as such."""
    return [row for row in history["epochs"] if row["is_best"]][-1]


def lr_schedules(panels: Sequence[dict[str, Any]]) -> Figure:
    """Draw learning rates over the epochs, a panel for each schedule, all with the same scale.

    A panel has a `title`; `epochs`, the n + 1 bounds of n stretches of constant rate, in epochs;
    and `rates`, the n learning rates of every parameter group, by the group's name.
    """
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = (5.0, 2.6) if columns > 1 else (9.0, 5.0)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    top = max(max(rates) for panel in panels for rates in panel["rates"].values())
    exponent = math.floor(math.log10(top)) if top else 0

    for axes, panel in zip(grid, panels, strict=False):
        for i, (name, rates) in enumerate(panel["rates"].items()):
            look = {"baseline": None, "label": name, "linewidth": 1.8, **_look(i)}
            axes.stairs([rate / 10**exponent for rate in rates], panel["epochs"], **look)
        title = textwrap.fill(panel["title"], round(width * 11), break_on_hyphens=False)
        axes.set_title(title, fontsize=9, family="monospace")
        axes.set(xlim=(0, panel["epochs"][-1]), ylim=(0, 1.05 * top / 10**exponent or 1))
        tidy(axes)
        if len(panel["rates"]) > 1:
            axes.legend(fontsize=9, frameon=False)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("epoch")
    figure.supylabel(rf"learning rate ($10^{{{exponent}}}$)")
    return figure


def tidy(axes: Axes) -> None:
    """Whole numbers below, a light grid, no frame above and on the right."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def ticks_with_ends(low: float, high: float, count: int = 5, whole: bool = False) -> np.ndarray:
    """Both ends of a scale, and about `count` round or `whole` numbers that stand clear of them."""
    if not low < high:
        return np.array([low])
    between = MaxNLocator(count, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
    clear = max(0.6 * (between[1] - between[0]), 0.7 / count * (high - low))
    between = between[(between > low + clear) & (between < high - clear)]
    return np.array([low, *between, high])


def percent_formatter(span: float) -> PercentFormatter:
    """Shares as percentages, with as many decimals as tell apart those of a scale of this span."""
    decimals = 1 - math.floor(math.log10(100 * span)) if span > 0 else 1
    return PercentFormatter(1, max(0, decimals), " %")


def score_text(score: float) -> str:
    """A share in percent; "-" where it is NaN, i.e. undefined."""
    return "-" if math.isnan(score) else f"{100 * score:.2f}"


def _look(number: int) -> dict[str, str]:
    """Colour and line style of a parameter group."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": STYLES[number % len(STYLES)]}
