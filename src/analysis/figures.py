"""Every picture of the project. They are drawn without a display and without global state."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.explain import Calibration, class_scores
from common.errors import UserError
from common.files import atomic_write

# Okabe & Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
COLORS = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")
STYLES = ("-", "--", "-.", ":")  # tell the lines apart in print, too
# Ten classes: Petroff's colours (https://arxiv.org/abs/2107.02270), and marks for who sees none.
CLASS_COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6")
CLASS_COLORS += ("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
CLASS_MARKS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")
MORE_IS_DARKER = "Blues"  # from nothing to much
BELOW_AND_ABOVE = "PuOr"  # on both sides of 0


def check_format(path: Path) -> None:
    """Raise UserError if no picture can be written in the format of the name's ending."""
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"{path} names no format of a picture: end it in .png, .pdf or .svg")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of its name's ending, whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def one_line(text: str, limit: int) -> str:
    """A text that may come from anywhere as one printable line of at most `limit` characters."""
    text = text[: 20 * limit].encode(errors="replace").decode()  # half characters can't be written
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def label(text: str) -> str:
    """`one_line` for a picture: short, and never taken for a formula."""
    return one_line(text, 20).replace("\\", "/").replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def training_curves(history: dict[str, Any]) -> Figure:
    """Draw loss, accuracy, learning rate and gradient norm over the epochs of a `history.json`,
    finished or not."""
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
    best = best_row(history)
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
    test = history["test"]
    ending = f"{test['top1']:.2f} % on the test set" if test else "not finished"
    figure.suptitle(f"ViT on {history['dataset']}: {ending}")
    return figure


def best_row(history: dict[str, Any]) -> dict[str, Any]:
    """The row of the epoch that left the run's best model.

    That is the last one that was the best when it ended; older histories don't tell, there it is
    the one of the highest accuracy.
    """
    rows = history["epochs"]
    marked = [row for row in rows if row.get("is_best")]
    return marked[-1] if marked else max(rows, key=lambda row: row["val_acc"])


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
    for axes, image, label, guess, p in zip(
        grid, images, labels, predicted, probabilities, strict=False
    ):
        axes.imshow(image, cmap="gray", interpolation="nearest")
        right = label == guess
        axes.set_title(  # the words say it too, for those who see no colour
            f"{guess}: {100 * p:.1f} % (true: {label})",
            color=GREEN if right else RED,
            fontweight="normal" if right else "bold",
            fontsize=fontsize,
        )


def attention(
    images: np.ndarray,
    maps: np.ndarray,
    rollout_maps: np.ndarray,
    titles: Sequence[str],
    title: str,
) -> Figure:
    """Draw for each image the attention of every layer and head over it, and its rollout.

    Args:
        images: (n, S, S).
        maps: what the head's input takes from each patch, (n, L, H, side, side).
        rollout_maps: the same of the rollout, (n, side, side).
        titles: a line above each image.
    """
    layers, heads = maps.shape[1:3]
    axis_names = "layer", "head"
    if heads > layers:  # the longer of the two runs along the page
        maps, axis_names = maps.swapaxes(1, 2), ("head", "layer")
    columns, rows = maps.shape[1:3]
    tile = min(0.75, 12 / columns)  # inches
    height = max(3.2, rows * tile + 0.7)
    figure = Figure(
        figsize=(5.2 + columns * tile + 1, height * len(images) + 0.6), layout="constrained"
    )
    ratios = [2.4, 2.4, columns * tile + 0.4]
    grid = figure.subplots(len(images), 3, squeeze=False, width_ratios=ratios)
    # The root: heads that look everywhere show their differences beside those that look at one.
    norm, gap = PowerNorm(0.5, vmin=0, vmax=float(maps.max())), 3
    for (image_axes, rollout_axes, axes), image, tiles, flow, text in zip(
        grid, images, maps, rollout_maps, titles, strict=True
    ):
        image_axes.imshow(image, cmap="gray", interpolation="nearest")
        image_axes.set_title(text, fontsize=10)
        scale = len(image) // flow.shape[-1]
        shown = rollout_axes.imshow(_enlarge(flow, scale), cmap=MORE_IS_DARKER)
        _outline(rollout_axes, image)
        rollout_axes.set_title("rollout", fontsize=10)
        ticks = MaxNLocator(3)
        percent = PercentFormatter(1, symbol=" %")
        below = rollout_axes.inset_axes((0, -0.1, 1, 0.05))
        figure.colorbar(shown, below, orientation="horizontal", ticks=ticks, format=percent)
        image_axes.axis("off")
        rollout_axes.set(xticks=[], yticks=[])

        mosaic = _mosaic(_enlarge(tiles.swapaxes(0, 1), scale), gap)
        weights = axes.imshow(mosaic, cmap=MORE_IS_DARKER, norm=norm)
        _outline(axes, _mosaic(np.broadcast_to(image, (rows, columns, *image.shape)), gap))
        step, middle = len(image) + gap, len(image) / 2 - 0.5
        axes.set_xticks(middle + step * np.arange(columns), range(1, columns + 1))
        axes.set_yticks(middle + step * np.arange(rows), range(1, rows + 1))
        axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
        axes.set_title("by layer and head", fontsize=10)
        for part in (image_axes, rollout_axes, axes):
            part.set_anchor("N")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(weights, ax=axes, pad=0.01, format=PercentFormatter(1, 0, " %"))
        shares = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
        bar.set_ticks(shares[(shares == 0) | (shares > norm.vmax / 50) & (shares <= norm.vmax)])
    figure.suptitle(title)
    return figure


def _enlarge(tiles: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each value of (..., h, w) in both directions."""
    return tiles.repeat(factor, axis=-2).repeat(factor, axis=-1)


def _mosaic(tiles: np.ndarray, gap: int) -> np.ndarray:
    """Tiles (rows, columns, h, w) as one picture, with NaN between them."""
    rows, columns, h, w = tiles.shape
    padding = ((0, 0), (0, 0), (0, gap), (0, gap))
    padded = np.pad(tiles.astype(float), padding, constant_values=np.nan)
    return padded.swapaxes(1, 2).reshape(rows * (h + gap), columns * (w + gap))[:-gap, :-gap]


def _outline(axes: Axes, image: np.ndarray) -> None:
    """Draw the outline of a digit, which leaves free what lies under it."""
    if np.nanmin(image) < np.nanmax(image):
        axes.contour(image, [np.nanmax(image) / 2], colors=RED, linewidths=0.9)


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
        learned: whether the position embeddings are, or are fixed.
        components: (count, P, P), of the patch embedding's filters.
        shares: of the filters' variance, (count,).
        maps: points (n, 2) by the method's name.
        labels: their classes (n,).
    """
    figure = Figure(figsize=(13, 12.2), layout="constrained")
    (position_axes, filter_axes), map_axes = figure.subplots(2, 2)

    side = len(similarity)
    scale = -(-16 // side)
    tiles = _mosaic(_enlarge(similarity, scale), 2)
    shown = position_axes.imshow(tiles, cmap="cividis", vmax=1)
    ticks = (side * scale - 1) / 2 + (side * scale + 2) * np.arange(side)
    position_axes.set_xticks(ticks, range(1, side + 1))
    position_axes.set_yticks(ticks, range(1, side + 1))
    position_axes.set(
        title=f"Position embeddings ({'learned' if learned else 'fixed'}): each compared with all",
        xlabel="column of the patch",
        ylabel="row of the patch",
    )
    figure.colorbar(shown, ax=position_axes, shrink=0.85, label="cosine similarity")

    columns = min(7, len(components))
    rows = -(-len(components) // columns)
    tiles = np.full((rows * columns, *components.shape[1:]), np.nan)
    tiles[: len(components)] = components / np.abs(components).max(axis=(1, 2), keepdims=True)
    mosaic = _mosaic(tiles.reshape(rows, columns, *tiles.shape[1:]), 1)
    shown = filter_axes.imshow(mosaic, cmap=BELOW_AND_ABOVE, vmin=-1, vmax=1)
    patch = components.shape[-1]
    filter_axes.set(
        title=f"Patch embedding: {len(components)} principal components of its filters",
        xlabel=f"{patch}x{patch} pixels each; {100 * shares.sum():.0f} % of the variance in all",
        xticks=[],
        yticks=[],
    )
    figure.colorbar(shown, ax=filter_axes, shrink=0.55, label="weight / largest in the tile")

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
    for axes in (position_axes, filter_axes):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle(title)
    return figure


def _class_map(
    axes: Axes, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Scatter points by class, in its colour and mark, with its name at its middle."""
    middles = {}
    for i, name in enumerate(class_names):
        own = points[labels == i]
        color = CLASS_COLORS[i % len(CLASS_COLORS)]
        mark = CLASS_MARKS[i % len(CLASS_MARKS)]
        axes.scatter(*own.T, s=14, color=color, marker=mark, linewidths=0, alpha=0.75, label=name)
        if len(own):
            # The point next to the median: that may itself lie between two groups.
            distances = np.linalg.norm(own - np.median(own, axis=0), axis=1)
            middles[name] = own[distances.argmin()]
    look = {"ha": "center", "va": "center", "fontsize": 15, "fontweight": "bold"}
    halo = [withStroke(linewidth=4, foreground="white")]
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    places = _apart(np.array(list(middles.values())) / span, 0.06) * span
    for name, place in zip(middles, places, strict=True):
        axes.annotate(name, place, path_effects=halo, **look)


def _apart(places: np.ndarray, distance: float) -> np.ndarray:
    """Move points (n, 2) until no two are closer than `distance`, as far as 100 rounds get."""
    places = places + 1e-6 * np.arange(len(places))[:, None]  # two on one spot can't part
    for _ in range(100):
        away = places[:, None] - places  # (n, n, 2)
        lengths = np.linalg.norm(away, axis=2, keepdims=True) + np.eye(len(places))[..., None]
        places = places + (away / lengths * np.maximum(distance - lengths, 0)).sum(axis=1) / 2
    return places


def confusion(
    counts: np.ndarray,
    class_names: Sequence[str],
    mistakes: dict[str, Sequence[Any]],
    title: str,
) -> Figure:
    """Draw a confusion matrix, every class's precision, recall and F1, and mistakes.

    Args:
        counts: (K, K), the true class is the row.
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
    matrix_axes.set_yticks(*names)
    matrix_axes.set(
        title="Images by true and predicted class", xlabel="predicted class", ylabel="true class"
    )

    scores = np.stack(list(class_scores(counts).values()), axis=1)  # (K, 3)
    low = float(scores.min())
    score_axes.imshow(scores, cmap=MORE_IS_DARKER, vmin=low, vmax=2 - low, aspect="auto")
    _write_cells(score_axes, np.char.mod("%.2f", 100 * scores), np.zeros_like(scores), small)
    score_axes.set_xticks(range(3), ["precision", "recall", "F1"])
    score_axes.set_yticks(*names)
    score_axes.set(title="By class (%)")
    for axes in (matrix_axes, score_axes):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

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


def calibration(bins: Calibration, title: str) -> Figure:
    """Draw a reliability diagram: accuracy against confidence, and how many images there are."""
    edges = np.linspace(0, 100, len(bins.counts) + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    width = 0.94 * (edges[1] - edges[0])
    there = bins.counts > 0
    figure = Figure(figsize=(7, 8.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 100], [0, 100], "--", color=GREY, label="perfectly calibrated")
    upper.bar(
        middles[there],
        100 * bins.accuracy[there],
        width,
        color=BLUE,
        alpha=0.35,
        label="accuracy, 95 % interval",
    )
    low, high = 100 * bins.interval[:, there]
    accuracy = 100 * bins.accuracy[there]
    reach = np.maximum(0, (accuracy - low, high - accuracy))  # rounding, at 0 and 100 %
    upper.errorbar(middles[there], accuracy, reach, fmt="none", ecolor=BLUE, capsize=3)
    upper.plot(
        100 * bins.confidence[there],
        accuracy,
        "o",
        color=RED,
        label="a bin's mean confidence",
    )
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    lower.bar(middles, bins.counts, width, color=BLUE, alpha=0.35)
    lower.set_yscale("log")
    lower.set(xlabel="confidence: the predicted class's probability (%)", ylabel="images")
    lower.set_ylim(bottom=0.7)
    for axes in (upper, lower):
        _tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, columnspacing=1.2)
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
