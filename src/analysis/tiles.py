"""What figures of a trained model share: images under captions, and tiles side by side."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from analysis.figures import GREEN, RED

MORE_IS_DARKER = "Blues"  # from nothing to much
MAX_NUMBERS = 16  # of tiles along a side; of more, some are left out


def text_width(text: str, size: float) -> float:
    """The width of a text in inches, in bold letters of `size` points; drawn as pixels, letters
    are a little wider than their outlines."""
    bold = FontProperties(size=size, weight="bold")
    lines = [line for line in text.split("\n") if line.strip()]  # a path of nothing has no extents
    widths = [TextPath((0, 0), line, prop=bold).get_extents().x1 for line in lines]
    return 1.05 * max(widths, default=0) / 72


# ---------------------------------------------------------------------------------------- captions


def gallery(
    grid: Sequence[Axes],
    width: float,
    fontsize: float,
    images: np.ndarray,
    labels: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
) -> None:
    """Draw images (n, H, W) or (n, H, W, 3), each `width` inches wide and under its caption."""
    for axes in grid:
        axes.axis("off")
    columns = (images, labels, predicted, probabilities)
    for axes, image, label, guess, p in zip(grid, *columns, strict=False):
        draw_image(axes, image)
        write_caption(axes, guess, p, label, width, fontsize)


def draw_image(axes: Axes, image: np.ndarray) -> None:
    """Draw an image (H, W) or (H, W, 3), uint8."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.axis("off")


def write_caption(
    axes: Axes,
    guess: str,
    probability: float,
    label: str,
    width: float,
    fontsize: float,
    above: str = "",
) -> None:
    """Write the predicted class, its probability and the true class over an image, not wider than
    `width` inches.

    The colour says whether the prediction is right; the weight says it too, for those who see no
    colour.

    Args:
        above: a line that stands above.
    """
    first, second = f"{guess}: {100 * probability:.1f} %", f"(true: {label})"
    text = f"{first} {second}"
    if text_width(text, fontsize) > width:
        text = f"{first}\n{second}"
    fontsize = min(fontsize, fontsize * width / text_width(text, fontsize))
    color, weight = (GREEN, "normal") if guess == label else (RED, "bold")
    text = f"{above}\n{text}" if above else text
    axes.set_title(text, color=color, fontweight=weight, fontsize=fontsize)


# ------------------------------------------------------------------------------------------- tiles


def enlarge(tiles: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each value of (..., h, w) in both directions."""
    return tiles.repeat(factor, axis=-2).repeat(factor, axis=-1)


def mosaic(tiles: np.ndarray, gap: int) -> np.ndarray:
    """Tiles (rows, columns, h, w) as one picture, with NaN between them."""
    rows, columns, h, w = tiles.shape
    padding = ((0, 0), (0, 0), (0, gap), (0, gap))
    padded = np.pad(tiles.astype(float), padding, constant_values=np.nan)
    return padded.swapaxes(1, 2).reshape(rows * (h + gap), columns * (w + gap))[:-gap, :-gap]


def number_tiles(axes: Axes, columns: int, rows: int, size: int, gap: int) -> None:
    """Number the columns and rows of a mosaic from 1."""
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        shown = np.arange(0, count, math.ceil(count / MAX_NUMBERS))
        axis.set_ticks((size - 1) / 2 + (size + gap) * shown, shown + 1)
    remove_frame(axes)


def remove_frame(axes: Axes) -> None:
    """Neither lines around the axes nor marks at the ticks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
