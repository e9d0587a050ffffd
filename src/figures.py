"""Every picture of the project. They are drawn without a display and without global state."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cli import UserError
from files import replacing

# Okabe & Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
COLORS = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")
STYLES = ("-", "--", "-.", ":")  # tell the lines apart in print, too


def check_format(path: Path) -> None:
    """Raise UserError if no picture can be written in the format of the name's ending."""
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"{path} names no format of a picture: end it in .png, .pdf or .svg")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of its name's ending, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def training_curves(history: dict[str, Any]) -> Figure:
    """Draw loss, accuracy, learning rate and gradient norm over the epochs of a finished run's
    `history.json`."""
    epochs = [row["epoch"] for row in history["epochs"]]
    line = {"marker": "o" if len(epochs) <= 30 else "", "markersize": 3}

    def plot(axes: Axes, name: str, **look: Any) -> None:
        axes.plot(epochs, [row[name] for row in history["epochs"]], **look, **line)

    figure = Figure(figsize=(12, 7), layout="constrained")
    (loss, top1), (rate, norm) = figure.subplots(2, 2)
    for axes, title, unit in (
        (loss, "Loss", "cross-entropy (nats)"),
        (top1, "Accuracy", "top-1 (%)"),
        (rate, "Learning rate", "mean over the epoch"),
        (norm, "Gradient norm", "before clipping, mean over the epoch"),
    ):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        _tidy(axes)
    plot(loss, "train_loss", color=ORANGE, label="training")
    plot(loss, "val_loss", color=BLUE, label="validation")
    loss.legend(frameon=False)
    plot(top1, "train_acc", color=ORANGE, label="training")
    plot(top1, "val_acc", color=BLUE, label="validation")
    best = max(history["epochs"], key=lambda row: row["val_acc"])
    label = f"best: {best['val_acc']:.2f} % in epoch {best['epoch']}"
    top1.plot(best["epoch"], best["val_acc"], "*", color=GREEN, markersize=12, label=label)
    top1.legend(frameon=False)
    groups: dict[str, list[float]] = {}  # those that differ in weight decay alone share a curve
    for group in history["epochs"][0]["lr"]:
        rates = [row["lr"][group] for row in history["epochs"]]
        if rates not in groups.values():
            groups[group] = rates
    for i, (group, rates) in enumerate(groups.items()):
        look = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}
        rate.plot(epochs, rates, label=group, **look, **line)
    if len(groups) > 1:
        rate.legend(frameon=False)
    rate.set_ylim(bottom=0)
    plot(norm, "grad_norm", color=GREY)
    norm.set_ylim(bottom=0)
    title = f"ViT on {history['dataset']}: {history['test']['top1']:.2f} % on the test set"
    figure.suptitle(title)
    return figure


def predictions(
    images: np.ndarray, labels: Sequence[str], predicted: Sequence[str], title: str
) -> Figure:
    """Draw images (n, H, W) in a grid, each under its predicted and true label: green where they
    agree, red where not."""
    side = max(1, math.ceil(math.sqrt(len(images))))
    figure = Figure(figsize=(2 * side, 2.25 * side + 0.4), layout="constrained")
    grid = figure.subplots(side, side, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, guess in zip(grid, images, labels, predicted, strict=False):
        axes.imshow(image, cmap="gray", interpolation="nearest")
        right = label == guess
        text = f"{guess} (true: {label})"  # the words say it too, for those who see no colour
        axes.set_title(
            text, color=GREEN if right else RED, fontweight="normal" if right else "bold"
        )
    figure.suptitle(title)
    return figure


def lr_schedules(panels: Sequence[dict[str, Any]]) -> Figure:
    """Draw learning rates over a run, a panel for each schedule, all with the same axes.

    A panel has a `title`; `epochs`, the n + 1 bounds of n stretches of constant rate, in epochs;
    and `rates`, the n learning rates of every parameter group, under the group's name.
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
            values = [rate / 10**exponent for rate in rates]
            look = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}
            axes.stairs(values, panel["epochs"], baseline=None, label=name, linewidth=1.8, **look)
        title = textwrap.fill(panel["title"], round(width * 11), break_on_hyphens=False)
        axes.set_title(title, fontsize=9, family="monospace")
        axes.set(xlim=(0, panel["epochs"][-1]), ylim=(0, 1.05 * top / 10**exponent or 1))
        _tidy(axes)
        if len(panel["rates"]) > 1:
            axes.legend(fontsize=9, frameon=False)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("epoch")
    figure.supylabel(rf"learning rate ($10^{{{exponent}}}$)")
    return figure


def _tidy(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
