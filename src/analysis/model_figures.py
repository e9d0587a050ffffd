"""Figures of what is inside a trained model: attention and embeddings.

What they show is computed by explain.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from analysis.figures import RED, percent_formatter, ticks_with_ends
from analysis.tiles import (
    MORE_IS_DARKER,
    draw_image,
    enlarge,
    mosaic,
    number_tiles,
    remove_frame,
    text_width,
    write_caption,
)

# Ten classes: Petroff's colours (https://arxiv.org/abs/2107.02270), and marks for who sees none. Of
# more classes each has another pair of the two.
CLASS_COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6")
CLASS_COLORS += ("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
CLASS_MARKS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")
MAP_SIDE = 5.4  # inches of a map
# The share of a map that the names of classes may cover; above it, numbers stand there.
MAX_COVERED = 0.08
BELOW_AND_ABOVE = "PuOr"  # on both sides of 0
IMAGE_WIDTH = 2.4  # inches of an image beside its attention

# -------------------------------------------------------------------------------------- attention


def attention(
    images: np.ndarray,
    maps: np.ndarray,
    rollout_maps: np.ndarray,
    captions: Sequence[tuple[str, str, float, str]],
    outlined: bool,
    title: str,
) -> Figure:
    """Draw for each image the attention of every layer and head over it, and its rollout.

    Args:
        images: (n, S, S) or (n, S, S, 3).
        maps: what the head's input takes from each patch, (n, L, H, side, side).
        rollout_maps: the same of the rollout, (n, side, side).
        captions: of each image its name, predicted class, probability and true class.
        outlined: whether the images are digits or letters, whose outline tells all of them; else
            the maps tint a pale grey version of the image.
    """
    layers, heads = maps.shape[1:3]
    axis_names = "layer", "head"
    if heads > layers:  # the longer of the two runs along the page
        maps, axis_names = maps.swapaxes(1, 2), ("head", "layer")
    columns, rows = maps.shape[1:3]
    tile = min(0.75, 12 / columns)  # inches
    height = max(3.4, rows * tile + 0.7)
    figure = Figure(
        figsize=(2 * IMAGE_WIDTH + columns * tile + 1.4, (height + 0.1) * len(images) + 0.6),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
    ratios = [IMAGE_WIDTH, IMAGE_WIDTH, columns * tile + 0.4]
    grid = figure.subplots(len(images), 3, squeeze=False, width_ratios=ratios)
    # The root: heads that look everywhere show their differences beside those that look at one.
    norm = PowerNorm(0.5, vmin=0, vmax=float(maps.max()))
    scale = images.shape[1] // maps.shape[-1]  # pixels of a patch
    for (image_axes, rollout_axes, axes), image, (name, *caption), tiles, flow in zip(
        grid, images, captions, maps, rollout_maps, strict=True
    ):
        draw_image(image_axes, image)
        write_caption(image_axes, *caption, IMAGE_WIDTH, 10, above=name)
        grey = image if image.ndim == 2 else image @ (0.299, 0.587, 0.114)
        _rollout(rollout_axes, enlarge(flow, scale), grey, outlined)
        _attention_tiles(axes, enlarge(tiles, scale), grey, outlined, axis_names, norm)
        _attention_bar(axes, norm)
        for part in (image_axes, rollout_axes, axes):
            part.set_anchor("N")
    figure.suptitle(title)
    return figure


def _rollout(axes: Axes, flow: np.ndarray, grey: np.ndarray, outlined: bool) -> None:
    """Draw a rollout (S, S) over its image, with a scale of its own below."""
    norm = Normalize(flow.min(), flow.max())
    _draw_over(axes, flow, grey, outlined, norm)
    axes.set_title("rollout", fontsize=10)
    axes.set(xticks=[], yticks=[])
    below = axes.inset_axes((0, -0.1, 1, 0.05))
    axes.figure.colorbar(
        ScalarMappable(norm, MORE_IS_DARKER),
        below,
        orientation="horizontal",
        ticks=ticks_with_ends(norm.vmin, norm.vmax, 3),
        format=percent_formatter(norm.vmax - norm.vmin),
    )


def _attention_tiles(
    axes: Axes,
    tiles: np.ndarray,
    grey: np.ndarray,
    outlined: bool,
    axis_names: tuple[str, str],
    norm: Normalize,
) -> None:
    """Draw maps (columns, rows, S, S) side by side, each over the image."""
    columns, rows = tiles.shape[:2]
    gap = max(3, len(grey) // 12)
    images = mosaic(np.broadcast_to(grey, (rows, columns, *grey.shape)), gap)
    _draw_over(axes, mosaic(tiles.swapaxes(0, 1), gap), images, outlined, norm)
    number_tiles(axes, columns, rows, len(grey), gap)
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    axes.set_title("by layer and head", fontsize=10)


def _attention_bar(axes: Axes, norm: Normalize) -> None:
    """The scale of all layers and heads: round shares, and its end."""
    shares = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    between = (shares > norm.vmax / 50) & (shares < 0.85 * norm.vmax)
    axes.figure.colorbar(
        ScalarMappable(norm, MORE_IS_DARKER),
        ax=axes,
        pad=0.01,
        ticks=[*shares[(shares == 0) | between], norm.vmax],
        format=percent_formatter(norm.vmax),
    )


def _draw_over(
    axes: Axes, weights: np.ndarray, grey: np.ndarray, outlined: bool, norm: Normalize
) -> None:
    """Draw weights (h, w) over the outline of digits, or tinting a pale version of the image.

    Args:
        grey: (h, w), 0 to 255.
    """
    if outlined:
        axes.imshow(weights, cmap=MORE_IS_DARKER, norm=norm)
        if np.nanmin(grey) < np.nanmax(grey):
            axes.contour(grey, [np.nanmax(grey) / 2], colors=RED, linewidths=0.9)
        return
    low, high = np.nanmin(grey), np.nanmax(grey)
    # So pale that no shadow in the image looks like attention.
    pale = 0.7 + 0.3 * (grey - low) / max(high - low, 1)
    tint = colormaps[MORE_IS_DARKER](norm(weights))[..., :3] * pale[..., None]
    axes.imshow(np.nan_to_num(tint, nan=1.0), interpolation="nearest")


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
        components: (count, C, P, P), of the patch embedding's filters.
        shares: the share of the filters' variance that each component explains, (count,).
        maps: points (n, 2) by the method's name.
        labels: their classes (n,).
    """
    names, texts, size = list(class_names), list(class_names), 11
    if sum(text_width(name, size) * size / 72 for name in names) > MAX_COVERED * MAP_SIDE**2:
        texts, size = [str(i) for i in range(1, len(names) + 1)], 7 if len(names) > 50 else 9
        names = [f"{text} {name}" for text, name in zip(texts, names, strict=True)]
    legend_size = 10 if len(names) <= 30 else 8
    columns = int(12.4 / (max(text_width(name, legend_size) for name in names) + 0.6))
    columns = max(1, min(10, columns))
    legend_height = 0.2 * math.ceil(len(names) / columns)
    figure = Figure(figsize=(13, 12 + legend_height), layout="constrained")
    (position_axes, filter_axes), map_axes = figure.subplots(2, 2)
    _position_maps(position_axes, similarity)
    kind = "learned" if learned else "fixed"
    position_axes.set(title=f"Position embeddings ({kind}): each compared with all")
    _filter_tiles(filter_axes, components, shares)
    for axes, (name, points) in zip(map_axes, maps.items(), strict=True):
        _class_map(axes, points, labels, names, texts, size)
        axes.set(title=f"{name} of the features that the head reads, {len(points):,} test images")
        axes.set(xlabel=f"{name} 1", ylabel=f"{name} 2", xticks=[], yticks=[])
    figure.legend(
        *map_axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=legend_size,
        markerscale=2,
        title="class",
    )
    figure.suptitle(title)
    return figure


def _position_maps(axes: Axes, similarity: np.ndarray) -> None:
    side, gap = len(similarity), 2
    scale = -(-16 // side)
    low = min(float(similarity.min()), 0.999)
    shown = axes.imshow(mosaic(enlarge(similarity, scale), gap), cmap="cividis", vmin=low, vmax=1)
    number_tiles(axes, side, side, side * scale, gap)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.85, label="cosine similarity")
    ticks = ticks_with_ends(low, 1)
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" if low < 0.9 else f"{tick:.3f}" for tick in ticks])


def _filter_tiles(axes: Axes, components: np.ndarray, shares: np.ndarray) -> None:
    """Draw components (count, C, P, P) in rows of 7, each scaled to its largest weight: of three
    channels in colour, else the mean over the channels."""
    count, patch = len(components), components.shape[-1]
    columns = min(7, count)
    in_colour = components.shape[1] == 3
    channels = components if in_colour else components.mean(axis=1, keepdims=True)
    largest = np.abs(channels).max(axis=(1, 2, 3), keepdims=True)
    channels = channels / np.maximum(largest, np.finfo(float).tiny)
    rows = -(-count // columns)
    tiles = np.full((rows * columns, *channels.shape[1:]), np.nan)
    tiles[:count] = channels
    tiles = tiles.reshape(rows, columns, *channels.shape[1:]).transpose(2, 0, 1, 3, 4)
    picture = np.stack([mosaic(tile, 1) for tile in tiles], axis=-1)
    if in_colour:  # grey is 0
        axes.imshow(np.nan_to_num((picture + 1) / 2, nan=1.0), interpolation="nearest")
    else:
        look = {"cmap": BELOW_AND_ABOVE, "vmin": -1, "vmax": 1, "interpolation": "nearest"}
        shown = axes.imshow(picture[..., 0], **look)
        axes.figure.colorbar(shown, ax=axes, shrink=0.55, label="weight / largest in the tile")
    told = f"{patch}x{patch} pixels each; {100 * shares.sum():.0f} % of the variance in all"
    told += "\nmiddle grey: a weight of 0 in every channel" if in_colour else ""
    axes.set(title=f"Patch embedding: {count} principal components of its filters", xlabel=told)
    axes.set(xticks=[], yticks=[])
    remove_frame(axes)


def beside(points: np.ndarray, middle: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Where a box of this width and height (2,) covers the fewest points (n, 2): on the middle or
    beside it, the nearer the better."""
    steps = np.stack(np.meshgrid([-1, -0.6, 0, 0.6, 1], [-3, -2, -1, 0, 1, 2, 3]), axis=-1)
    places = middle + steps.reshape(-1, 2) * box
    covered = (np.abs(points - places[:, None]) < box / 2).all(axis=2).sum(axis=1)
    outside = (np.abs(places - 0.5) > 0.5 - box / 2).any(axis=1)
    distance = np.linalg.norm(places - middle, axis=1)
    return places[(covered / len(points) + distance + outside).argmin()]


def _class_map(
    axes: Axes,
    points: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    texts: Sequence[str],
    size: float,
) -> None:
    """Scatter points by class, in its colour and mark, with its text near the middle of them.

    Args:
        names: of the classes, for the legend.
        texts: what stands in the map for each, in letters of `size` points.
    """
    low, span = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-9)
    points = 0.05 + 0.9 * (points - low) / span
    shown, boxes, spots = [], [], []
    for i, name in enumerate(names):
        own = points[labels == i]
        color = CLASS_COLORS[i % len(CLASS_COLORS)]
        mark = CLASS_MARKS[(i + i // len(CLASS_COLORS)) % len(CLASS_MARKS)]
        axes.scatter(*own.T, s=14, color=color, marker=mark, linewidths=0, alpha=0.75, label=name)
        if len(own):
            # The point next to the median: the median itself may lie between two groups.
            distances = np.linalg.norm(own - np.median(own, axis=0), axis=1)
            shown.append(texts[i])
            boxes.append(np.array((text_width(texts[i], size), size / 72)) / MAP_SIDE + 0.01)
            spots.append(beside(points, own[distances.argmin()], boxes[-1]))
    look = {"ha": "center", "va": "center", "fontsize": size, "fontweight": "bold"}
    halo = [withStroke(linewidth=1.5, foreground="white")]
    for text, spot in zip(shown, apart(np.array(spots), np.array(boxes)), strict=True):
        axes.text(*spot, text, path_effects=halo, **look)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def apart(spots: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Move the middles (n, 2) of boxes with these widths and heights (n, 2) within [0, 1] until no
    two overlap, or for 500 rounds; each time along the way on which less is missing."""
    spots = spots + 1e-6 * np.arange(len(spots))[:, None]  # equal ones have no direction to move
    room, others = (boxes[:, None] + boxes) / 2, ~np.eye(len(spots), dtype=bool)
    for _ in range(500):
        away = spots[:, None] - spots  # (n, n, 2)
        missing = room - np.abs(away)
        overlap = (missing > 0).all(axis=2) & others
        if not overlap.any():
            break
        way = np.eye(2)[missing.argmin(axis=2)] * overlap[..., None]
        spots = spots + (way * missing * np.sign(away)).sum(axis=1) * 0.51
        spots = np.clip(spots, boxes / 2, 1 - boxes / 2)
    return spots
