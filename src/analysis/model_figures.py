"""Figures of a trained model: predictions, attention, embeddings, confusion, reliability.

What they show is computed by explain.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.explain import Reliability, accuracy_interval
from analysis.figures import BLUE, GREEN, GREY, RED, tidy

# Ten classes: Petroff's colours (https://arxiv.org/abs/2107.02270), and marks for who sees none.
CLASS_COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6")
CLASS_COLORS += ("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
CLASS_MARKS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")
MORE_IS_DARKER = "Blues"  # from nothing to much
BELOW_AND_ABOVE = "PuOr"  # on both sides of 0

# ------------------------------------------------------------------------------------ predictions


def predictions(
    images: np.ndarray,
    labels: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    title: str,
) -> Figure:
    """Draw images (n, H, W) in a grid, each under its predicted label, that label's probability
    and the true label: green where they agree, red where not."""
    side = max(1, math.ceil(math.sqrt(len(images))))
    figure = Figure(figsize=(2.1 * side, 2.25 * side + 0.4), layout="constrained")
    grid = figure.subplots(side, side, squeeze=False).ravel()
    _gallery(grid, 10, images, labels, predicted, probabilities)
    figure.suptitle(title)
    return figure


def _gallery(
    grid: Sequence[Axes],
    fontsize: float,
    images: np.ndarray,
    labels: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
) -> None:
    for axes in grid:
        axes.axis("off")
    columns = (images, labels, predicted, probabilities)
    for axes, image, label, guess, p in zip(grid, *columns, strict=False):
        _digit(axes, image, f"{guess}: {100 * p:.1f} % (true: {label})", guess == label, fontsize)


def _digit(axes: Axes, image: np.ndarray, text: str, correct: bool, fontsize: float) -> None:
    """Draw an image under a text, whose colour says whether the prediction is correct. Its weight
    says it too, for those who see no colour."""
    color, weight = (GREEN, "normal") if correct else (RED, "bold")
    axes.imshow(image, cmap="gray", interpolation="nearest")
    axes.set_title(text, color=color, fontweight=weight, fontsize=fontsize)
    axes.axis("off")


# -------------------------------------------------------------------------------------- attention


def attention(
    images: np.ndarray,
    maps: np.ndarray,
    rollout_maps: np.ndarray,
    titles: Sequence[str],
    correct: Sequence[bool],
    title: str,
) -> Figure:
    """Draw for each image the attention of every layer and head over it, and its rollout.

    Args:
        images: (n, S, S).
        maps: what the head's input takes from each patch, (n, L, H, side, side).
        rollout_maps: the same of the rollout, (n, side, side).
        titles: the text above each image.
        correct: whether each image's prediction is.
    """
    layers, heads = maps.shape[1:3]
    axis_names = "layer", "head"
    if heads > layers:  # the longer of the two runs along the page
        maps, axis_names = maps.swapaxes(1, 2), ("head", "layer")
    columns, rows = maps.shape[1:3]
    tile = min(0.75, 12 / columns)  # inches
    height = max(3.2, rows * tile + 0.7)
    figure = Figure(
        figsize=(5.2 + columns * tile + 1, (height + 0.1) * len(images) + 0.6),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
    ratios = [2.4, 2.4, columns * tile + 0.4]
    grid = figure.subplots(len(images), 3, squeeze=False, width_ratios=ratios)
    # The root: heads that look everywhere show their differences beside those that look at one.
    norm = PowerNorm(0.5, vmin=0, vmax=float(maps.max()))
    shares = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    shares = shares[(shares == 0) | (shares > norm.vmax / 50) & (shares <= norm.vmax)]
    scale = images.shape[-1] // maps.shape[-1]  # pixels of a patch
    for (image_axes, rollout_axes, axes), image, text, is_correct, tiles, flow in zip(
        grid, images, titles, correct, maps, rollout_maps, strict=True
    ):
        _digit(image_axes, image, text, is_correct, 10)
        _rollout(rollout_axes, _enlarge(flow, scale), image)
        weights = _attention_tiles(axes, _enlarge(tiles, scale), image, axis_names, norm)
        bar = figure.colorbar(weights, ax=axes, pad=0.01, format=PercentFormatter(1, 0, " %"))
        bar.set_ticks(shares)
        for part in (image_axes, rollout_axes, axes):
            part.set_anchor("N")
    figure.suptitle(title)
    return figure


def _rollout(axes: Axes, flow: np.ndarray, image: np.ndarray) -> None:
    """Draw a rollout (S, S) over the outline of its image, with a scale of its own below."""
    shown = axes.imshow(flow, cmap=MORE_IS_DARKER)
    _outline(axes, image)
    axes.set_title("rollout", fontsize=10)
    axes.set(xticks=[], yticks=[])
    look = {"ticks": MaxNLocator(3), "format": PercentFormatter(1, symbol=" %")}
    below = axes.inset_axes((0, -0.1, 1, 0.05))
    axes.figure.colorbar(shown, below, orientation="horizontal", **look)


def _attention_tiles(
    axes: Axes, tiles: np.ndarray, image: np.ndarray, axis_names: tuple[str, str], norm: Normalize
) -> ScalarMappable:
    """Draw maps (columns, rows, S, S) side by side, each over the outline of the image."""
    (columns, rows), gap = tiles.shape[:2], 3
    weights = axes.imshow(_mosaic(tiles.swapaxes(0, 1), gap), cmap=MORE_IS_DARKER, norm=norm)
    _outline(axes, _mosaic(np.broadcast_to(image, (rows, columns, *image.shape)), gap))
    _number_tiles(axes, columns, rows, len(image), gap)
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    axes.set_title("by layer and head", fontsize=10)
    return weights


def _enlarge(tiles: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each value of (..., h, w) in both directions."""
    return tiles.repeat(factor, axis=-2).repeat(factor, axis=-1)


def _mosaic(tiles: np.ndarray, gap: int) -> np.ndarray:
    """Tiles (rows, columns, h, w) as one picture, with NaN between them."""
    rows, columns, h, w = tiles.shape
    padding = ((0, 0), (0, 0), (0, gap), (0, gap))
    padded = np.pad(tiles.astype(float), padding, constant_values=np.nan)
    return padded.swapaxes(1, 2).reshape(rows * (h + gap), columns * (w + gap))[:-gap, :-gap]


def _number_tiles(axes: Axes, columns: int, rows: int, size: int, gap: int) -> None:
    """Number the columns and rows of a mosaic from 1."""
    middle, step = (size - 1) / 2, size + gap
    axes.set_xticks(middle + step * np.arange(columns), range(1, columns + 1))
    axes.set_yticks(middle + step * np.arange(rows), range(1, rows + 1))
    _remove_frame(axes)


def _remove_frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _outline(axes: Axes, image: np.ndarray) -> None:
    """Draw the outline of a digit, which hides little of what lies under it."""
    if np.nanmin(image) < np.nanmax(image):
        axes.contour(image, [np.nanmax(image) / 2], colors=RED, linewidths=0.9)


# ------------------------------------------------------------------------------------- embeddings


def embeddings(
    similarity: np.ndarray,
    learned: bool,
    components: np.ndarray,
    shares: np.ndarray,
    maps: dict[str, np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Draw the position embeddings' similarity, the patch filters' components, and features in 2-D.

    Args:
        similarity: (side, side, side, side), a map for each patch.
        learned: whether the position embeddings are learned or fixed.
        components: (count, P, P), of the patch embedding's filters.
        shares: the share of the filters' variance that each component explains, (count,).
        maps: points (n, 2) by the method's name.
        labels: their classes (n,).
    """
    figure = Figure(figsize=(13, 12.2), layout="constrained")
    (position_axes, filter_axes), map_axes = figure.subplots(2, 2)
    _position_maps(position_axes, similarity)
    kind = "learned" if learned else "fixed"
    position_axes.set(title=f"Position embeddings ({kind}): each compared with all")
    _filter_tiles(filter_axes, components, shares)
    for axes, (name, points) in zip(map_axes, maps.items(), strict=True):
        _class_map(axes, points, labels, class_names)
        axes.set(title=f"{name} of the features that the head reads, {len(points):,} test images")
        axes.set(xlabel=f"{name} 1", ylabel=f"{name} 2", xticks=[], yticks=[])
    figure.legend(
        *map_axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(10, len(class_names)),
        frameon=False,
        markerscale=2,
        title="class",
    )
    figure.suptitle(title)
    return figure


def _position_maps(axes: Axes, similarity: np.ndarray) -> None:
    side, gap = len(similarity), 2
    scale = -(-16 // side)
    tiles = _mosaic(_enlarge(similarity, scale), gap)
    shown = axes.imshow(tiles, cmap="cividis", vmax=1)
    _number_tiles(axes, side, side, side * scale, gap)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.figure.colorbar(shown, ax=axes, shrink=0.85, label="cosine similarity")


def _filter_tiles(axes: Axes, components: np.ndarray, shares: np.ndarray) -> None:
    """Draw components (count, P, P) in rows of 7, each scaled to its largest weight."""
    columns, patch = min(7, len(components)), components.shape[-1]
    rows = -(-len(components) // columns)
    tiles = np.full((rows * columns, patch, patch), np.nan)
    tiles[: len(components)] = components / np.abs(components).max(axis=(1, 2), keepdims=True)
    mosaic = _mosaic(tiles.reshape(rows, columns, patch, patch), 1)
    shown = axes.imshow(mosaic, cmap=BELOW_AND_ABOVE, vmin=-1, vmax=1)
    axes.set(
        title=f"Patch embedding: {len(components)} principal components of its filters",
        xlabel=f"{patch}x{patch} pixels each; {100 * shares.sum():.0f} % of the variance in all",
        xticks=[],
        yticks=[],
    )
    _remove_frame(axes)
    axes.figure.colorbar(shown, ax=axes, shrink=0.55, label="weight / largest in the tile")


def _class_map(
    axes: Axes, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Scatter points by class, in its colour and mark, with its name in the middle of them."""
    middles = {}
    for i, name in enumerate(class_names):
        own = points[labels == i]
        color = CLASS_COLORS[i % len(CLASS_COLORS)]
        mark = CLASS_MARKS[i % len(CLASS_MARKS)]
        axes.scatter(*own.T, s=14, color=color, marker=mark, linewidths=0, alpha=0.75, label=name)
        if len(own):
            # The point next to the median: the median itself may lie between two groups.
            distances = np.linalg.norm(own - np.median(own, axis=0), axis=1)
            middles[name] = own[distances.argmin()]
    look = {"ha": "center", "va": "center", "fontsize": 15, "fontweight": "bold"}
    halo = [withStroke(linewidth=4, foreground="white")]
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    spots = _apart(np.array(list(middles.values())) / span, 0.06) * span
    for name, spot in zip(middles, spots, strict=True):
        axes.annotate(name, spot, path_effects=halo, **look)


def _apart(spots: np.ndarray, distance: float) -> np.ndarray:
    """Move points (n, 2) until no two are closer than `distance`, or for 100 rounds."""
    spots = spots + 1e-6 * np.arange(len(spots))[:, None]  # equal ones have no direction to move
    for _ in range(100):
        away = spots[:, None] - spots  # (n, n, 2)
        lengths = np.linalg.norm(away, axis=2, keepdims=True) + np.eye(len(spots))[..., None]
        spots = spots + (away / lengths * np.maximum(distance - lengths, 0)).sum(axis=1) / 2
    return spots


# -------------------------------------------------------------------- confusion and reliability


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
        scores: precision, recall and F1, (K, 3) in [0, 1].
        mistakes: `images` (m, H, W), and their `labels`, `predicted` and `probabilities`, as
            `predictions` takes them; at most 16 are shown.
    """
    figure = Figure(figsize=(12.5, 11.8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[7.2, 4.6])
    matrix_axes, score_axes = upper.subplots(1, 2, width_ratios=[10, 3.6])
    small = min(10.0, 100 / len(counts))
    names = range(len(class_names)), class_names

    norm = LogNorm(vmin=0.5, vmax=max(2, counts.max()))  # a single mistake is to be seen
    masked = np.ma.masked_equal(counts, 0)
    matrix_axes.imshow(masked, cmap=MORE_IS_DARKER, norm=norm, aspect="auto")
    _write_cells(matrix_axes, np.char.mod("%d", counts), norm(masked).filled(0), small)
    matrix_axes.set_xticks(*names)
    matrix_axes.set(title="Images by true and predicted class")
    matrix_axes.set(xlabel="predicted class", ylabel="true class")

    low = float(scores.min())
    score_axes.imshow(scores, cmap=MORE_IS_DARKER, vmin=low, vmax=2 - low, aspect="auto")
    _write_cells(score_axes, np.char.mod("%.2f", 100 * scores), np.zeros_like(scores), small)
    score_axes.set_xticks(range(3), ["precision", "recall", "F1"])
    score_axes.set(title="By class (%)")
    for axes in (matrix_axes, score_axes):
        axes.set_yticks(*names)
        _remove_frame(axes)

    if len(mistakes["labels"]):
        _gallery(lower.subplots(2, 8).ravel(), 9, **mistakes)
        lower.suptitle("The most confident mistakes")
    else:
        lower.suptitle("There is no mistake")
    figure.suptitle(title)
    return figure


def _write_cells(axes: Axes, texts: np.ndarray, darkness: np.ndarray, size: float) -> None:
    """Write a text (rows, columns) into each cell, white where its darkness in [0, 1] is high."""
    for (row, column), text in np.ndenumerate(texts):
        color = "white" if darkness[row, column] > 0.6 else "black" if text != "0" else "#999999"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


def reliability(bins: Reliability, title: str) -> Figure:
    """Draw a reliability diagram: accuracy against confidence, and the number of images."""
    edges = np.linspace(0, 100, len(bins.counts) + 1)
    used = bins.counts > 0
    middles = ((edges[1:] + edges[:-1]) / 2)[used]
    counts, accuracy = bins.counts[used], 100 * bins.accuracy[used]
    look = {"width": 0.94 * edges[1], "color": BLUE, "alpha": 0.35}
    figure = Figure(figsize=(7, 8.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 100], [0, 100], "--", color=GREY, label="perfectly calibrated")
    upper.bar(middles, accuracy, label="accuracy, 95 % interval", **look)
    ends = [accuracy_interval(*bin) for bin in zip(bins.correct[used], counts, strict=True)]
    low, high = 100 * np.array(ends).T
    reach = np.maximum(0, (accuracy - low, high - accuracy))  # rounding, at 0 and 100 %
    upper.errorbar(middles, accuracy, reach, fmt="none", ecolor=BLUE, capsize=3)
    confidence = 100 * bins.confidence[used]
    upper.plot(confidence, accuracy, "o", color=RED, label="a bin's mean confidence")
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    lower.bar(middles, counts, **look)
    lower.set(xlabel="confidence: the predicted class's probability (%)", ylabel="images")
    lower.set(yscale="log", ylim=(0.7, None))
    for axes in (upper, lower):
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, columnspacing=1.2)
    figure.suptitle(title)
    return figure
