"""Figures of how well a trained model does: predictions, confusion, reliability.

What they show is computed by explain.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullFormatter

from analysis.explain import Reliability, accuracy_interval
from analysis.figures import BLUE, GREY, RED, score_text, tidy
from analysis.tiles import MORE_IS_DARKER, gallery, remove_frame, text_width

MAX_WRITTEN = 26  # classes whose counts are written into the cells; of more, colours tell
MATRIX_SIDE = 6.4, 8.2  # inches of a confusion matrix of few classes, and of up to 58
LEAST_ROW = 0.14  # inches; a class's name of 7 points stands in it
LARGEST_SIDE = 40  # inches: of 286 classes; names of more become too small to read
FEW_IMAGES = 10  # a bin with fewer is drawn pale: its accuracy says little


def predictions(
    images: np.ndarray,
    labels: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    title: str,
) -> Figure:
    """Draw images (n, H, W) or (n, H, W, 3) in a grid, each under its predicted label, that label's
    probability and the true label: green where they agree, red where not."""
    columns = max(3, math.ceil(math.sqrt(len(images))))  # the title needs three
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    gallery(grid, 1.95, 10, images, labels, predicted, probabilities)
    figure.suptitle(title)
    return figure


# --------------------------------------------------------------------------------------- confusion


def confusion(
    counts: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
    mistakes: dict[str, Sequence[Any]],
    title: str,
) -> Figure:
    """Draw a confusion matrix, every class's precision, recall and F1, and mistakes.

    Args:
        counts: images (K, K), the true class is the row.
        scores: precision, recall and F1, (K, 3) in [0, 1]; NaN: undefined.
        mistakes: `images` (m, H, W) or (m, H, W, 3), and their `labels`, `predicted` and
            `probabilities`, as `predictions` takes them; at most 16 are shown.
    """
    side = max(np.clip(0.82 * len(counts), *MATRIX_SIDE), LEAST_ROW * len(counts))
    side = min(side, LARGEST_SIDE)
    fontsize = min(10, 0.75 * 72 * side / len(counts))
    margin = max(text_width(name, fontsize) for name in class_names)
    width = 1.36 * side + 2 * margin + 1.2
    tile, rows = width / 8 - 0.15, min(2, -(-len(mistakes["labels"]) // 8))
    upper_height, lower_height = 0.85 * side + margin + 0.9, rows * (tile + 0.5) + 0.6
    figure = Figure(figsize=(width, upper_height + lower_height + 0.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[upper_height, lower_height])
    matrix_axes, score_axes = upper.subplots(1, 2, width_ratios=[10, 3.6])
    _confusion_matrix(upper, matrix_axes, counts)
    matrix_axes.set_xticks(range(len(class_names)), class_names, fontsize=fontsize)
    if margin > 0.9 * side / len(counts):
        matrix_axes.tick_params(axis="x", rotation=90)
    _class_scores(score_axes, scores, fontsize)
    for axes in (matrix_axes, score_axes):
        axes.set_yticks(range(len(class_names)), class_names, fontsize=fontsize)
        remove_frame(axes)
    if len(mistakes["labels"]):
        gallery(lower.subplots(rows, 8).ravel(), tile, 9, **mistakes)
        lower.suptitle("The most confident mistakes")
    else:
        lower.suptitle("There is no mistake")
    figure.suptitle(title)
    return figure


def _confusion_matrix(figure: SubFigure, axes: Axes, counts: np.ndarray) -> None:
    """Draw counts (K, K) as numbers in coloured cells, or, of many classes, as colours alone."""
    norm = LogNorm(vmin=0.5, vmax=max(2, counts.max()))  # a single mistake is to be seen
    masked = np.ma.masked_equal(counts, 0)
    shown = axes.imshow(masked, cmap=MORE_IS_DARKER, norm=norm, aspect="auto")
    axes.set(title="Images by true and predicted class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(counts) <= MAX_WRITTEN:
        size = min(10, 180 / len(counts))
        _write_cells(axes, np.char.mod("%d", counts), norm(masked).filled(0), size)
        return
    bar = figure.colorbar(shown, ax=axes, pad=0.01, shrink=0.5, label="images; none: white")
    ticks = [*(n for n in 10 ** np.arange(7) if n < 0.6 * norm.vmax), norm.vmax]
    bar.set_ticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
    bar.minorticks_off()


def _class_scores(axes: Axes, scores: np.ndarray, fontsize: float) -> None:
    """Write scores (K, 3) as percentages, each over a bar of its length."""
    rows, columns = np.indices(scores.shape)
    width = 0.92  # of 100 %, where cells are 1 wide
    axes.barh(
        rows.ravel(), np.full(scores.size, width), 0.9, columns.ravel() - width / 2, fc="0.95"
    )
    lengths = width * np.nan_to_num(scores.ravel())
    axes.barh(rows.ravel(), lengths, 0.9, columns.ravel() - width / 2, fc="#b7d4ea")
    _write_cells(axes, np.vectorize(score_text)(scores), np.zeros_like(scores), fontsize)
    axes.set_xticks(range(3), ["precision", "recall", "F1"])
    axes.set(title="By class (%)", xlim=(-0.5, 2.5), ylim=(len(scores) - 0.5, -0.5))


def _write_cells(axes: Axes, texts: np.ndarray, darkness: np.ndarray, size: float) -> None:
    """Write a text (rows, columns) into each cell, white where its darkness in [0, 1] is high."""
    for (row, column), text in np.ndenumerate(texts):
        color = "white" if darkness[row, column] > 0.6 else "black" if text != "0" else "#999999"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


# ------------------------------------------------------------------------------------- reliability


def reliability(bins: Reliability, title: str) -> Figure:
    """Draw a reliability diagram: accuracy against confidence, and the number of images.

    A bin's dot stands at its images' mean confidence, its bar has the bin's width.
    """
    edges = np.linspace(0, 100, len(bins.counts) + 1)
    used = bins.counts > 0
    counts, accuracy = bins.counts[used], 100 * bins.accuracy[used]
    confidence = 100 * bins.confidence[used]
    place = {"x": edges[:-1][used], "width": edges[1], "align": "edge", "edgecolor": "white"}
    look = {"color": [(BLUE, 0.35 if n >= FEW_IMAGES else 0.12) for n in counts], "linewidth": 1}
    figure = Figure(figsize=(7, 8.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 100], [0, 100], "--", color=GREY, label="perfectly calibrated")
    upper.bar(height=accuracy, **place, **look)
    ends = [accuracy_interval(*bin) for bin in zip(bins.correct[used], counts, strict=True)]
    low, high = 100 * np.array(ends).T
    reach = np.maximum(0, (accuracy - low, high - accuracy))  # rounding, at 0 and 100 %
    about = {"ecolor": BLUE, "capsize": 3, "color": RED, "markersize": 6, "clip_on": False}
    label = "mean confidence and accuracy of a bin, 95 % interval"
    upper.errorbar(confidence, accuracy, reach, fmt="o", label=label, **about)
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    lower.bar(height=counts, **place, **look)
    lower.set(xlabel="confidence: the predicted class's probability (%)", ylabel="images")
    lower.set(yscale="log", ylim=(0.5, None))  # a single image has a bar, too
    for axes in (upper, lower):
        tidy(axes)
        # Every third of the 15 bins ends at a whole number of percent, as the others' marks don't.
        axes.xaxis.set_major_locator(FixedLocator(edges[::3]))
        axes.xaxis.set_minor_locator(FixedLocator(edges))
    if (counts < FEW_IMAGES).any():
        upper.bar(0, 0, color=(BLUE, 0.12), label=f"pale: fewer than {FEW_IMAGES} images")
    if counts.max() < 50:  # less than two powers of ten
        lower.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50]))
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=2, frameon=False, columnspacing=1.2)
    figure.suptitle(title)
    return figure
