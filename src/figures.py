"""Every picture of the project. They are drawn without a display and without global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cli import UserError
from files import replacing

# Okabe & Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"


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
    """Draw loss, accuracy and learning rate over the epochs of a finished run's
    `history.json`."""
    epochs = [row["epoch"] for row in history["epochs"]]

    def column(name: str) -> list[float]:
        return [row[name] for row in history["epochs"]]

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, top1, rate = figure.subplots(1, 3)
    for axes, title, unit in (
        (loss, "Loss", "cross-entropy (nats)"),
        (top1, "Accuracy", "top-1 (%)"),
        (rate, "Learning rate", "learning rate"),
    ):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    line = {"marker": "o" if len(epochs) <= 30 else "", "markersize": 3}
    loss.plot(epochs, column("train_loss"), color=ORANGE, label="training", **line)
    loss.plot(epochs, column("val_loss"), color=BLUE, label="validation", **line)
    loss.legend(frameon=False)
    top1.plot(epochs, column("train_acc"), color=ORANGE, label="training", **line)
    top1.plot(epochs, column("val_acc"), color=BLUE, label="validation", **line)
    best = max(history["epochs"], key=lambda row: row["val_acc"])
    label = f"best: {best['val_acc']:.2f} % in epoch {best['epoch']}"
    top1.plot(best["epoch"], best["val_acc"], "*", color=GREEN, markersize=12, label=label)
    top1.legend(frameon=False, loc="lower right")
    rate.plot(epochs, column("lr"), color=GREY, **line)
    rate.set_ylim(bottom=0)
    title = f"ViT on {history['dataset']}"
    title += f": {history['test']['top1']:.2f} % on the test set"
    figure.suptitle(title)
    return figure


def predictions(
    images: np.ndarray, labels: Sequence[str], predicted: Sequence[str], title: str
) -> Figure:
    """Draw images (n, H, W) in a grid, each under its predicted and true label: green where they
    agree, red where not."""
    side = max(1, int(np.ceil(np.sqrt(len(images)))))
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
