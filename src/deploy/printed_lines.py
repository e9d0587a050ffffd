"""Removes the printed lines of ruled and squared paper from a picture, and leaves the ink.

A printed line is straight and runs from one edge of the picture to another, as no stroke of a digit
does. It is found by the mean ink along every straight line, a Radon transform. Its ink, the median
along it, is subtracted everywhere on it, except where a pen has crossed it.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

SEARCH_SIDE = 200  # pixels of the longer side of the picture in which lines are looked for
SLOPES = np.linspace(-0.36, 0.36, 91)  # rows per column: a sheet turned by up to 20 degrees
PARTS = 10  # of a line, which has to show in most of them and at both ends
MIN_STRENGTH = 0.03  # of the paper's brightness
APART = 5  # rows between two lines, in the picture in which they are looked for


def without_lines(ink: np.ndarray) -> np.ndarray:
    """Remove the lines along rows and columns.

    Args:
        ink: float32 (H, W), the share of the paper's brightness that is missing.
    """
    edges = ink[[0, -1]].max(), ink[:, [0, -1]].max()
    if max(edges) < MIN_STRENGTH:  # a drawing, in which a search would take time in vain
        return ink
    return _without_rows(_without_rows(ink).T).T


def _without_rows(ink: np.ndarray) -> np.ndarray:
    scale = -(-max(ink.shape) // SEARCH_SIDE)
    beside = np.arange(-2 * scale - 3, 2 * scale + 4)
    ink = ink.copy()
    for row, slope in _find_lines(np.asarray(Image.fromarray(ink).reduce(scale))):
        middle, slope = _align(ink, (row + 0.5) * scale - 0.5, slope, scale)
        rows, columns, inside = _pixels(ink.shape, middle + beside, slope)
        whole = inside.all(axis=0)
        if not whole.any():
            continue
        values = ink[rows, columns]
        profile = np.median(values[:, whole], axis=1, keepdims=True)
        profile = np.maximum(profile - np.median(profile), 0)
        values = np.where(values < 1.5 * profile + 0.15, values - profile, values)
        ink[rows[inside], columns[inside]] = values[inside]
    return ink


def _pixels(shape, middles, slope) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels of n parallel lines: rows (n, W), columns (n, W), and whether they are inside.

    Args:
        middles: (n,), the row where each line crosses the middle column; it may be outside.
    """
    height, width = shape
    x = np.arange(width)
    rows = np.rint(np.add.outer(middles, slope * (x - width / 2))).astype(int)
    inside = (rows >= 0) & (rows < height)
    return np.clip(rows, 0, height - 1), np.broadcast_to(x, rows.shape), inside


def _find_lines(ink: np.ndarray) -> list[tuple[float, float]]:
    """Lines from edge to edge, the strongest first: row in the middle column, and slope."""
    height, width = ink.shape
    beyond = int(SLOPES[-1] * width / 2)
    middles = np.arange(-beyond, height + beyond)
    strength = np.stack([_strength(ink, middles, slope) for slope in SLOPES])
    strength -= ndimage.median_filter(strength, size=(1, 4 * APART + 1))  # shadows are wider
    least = max(MIN_STRENGTH, 5 * 1.4826 * float(np.median(np.abs(strength))))
    lines = []
    while strength.max() > least:
        i, j = np.unravel_index(strength.argmax(), strength.shape)
        lines.append((float(middles[j]), float(SLOPES[i])))
        strength[:, max(0, j - APART) : j + APART + 1] = 0
    return lines


def _strength(ink: np.ndarray, middles: np.ndarray, slope: float) -> np.ndarray:
    """The mean ink (n,) that seven in ten parts of each line have, at most twice its ends'."""
    rows, columns, inside = _pixels(ink.shape, middles, slope)
    starts = np.linspace(0, ink.shape[1], PARTS, endpoint=False).astype(int)
    count = np.add.reduceat(inside, starts, axis=1, dtype=np.float32)
    total = np.add.reduceat(np.where(inside, ink[rows, columns], 0), starts, axis=1)
    whole = count > 0.7 * np.diff(starts, append=ink.shape[1])  # the others are mostly outside
    means = np.where(whole, total / np.maximum(count, 1), np.inf)
    line, number = np.arange(len(means)), whole.sum(axis=1)
    most = np.sort(means, axis=1)[line, (0.3 * number).astype(int)]
    first = means[line, whole.argmax(axis=1)]
    last = means[line, PARTS - 1 - whole[:, ::-1].argmax(axis=1)]
    return np.where(number >= 3, np.minimum(most, 2 * np.minimum(first, last)), 0)


def _align(ink: np.ndarray, middle: float, slope: float, scale: int) -> tuple[float, float]:
    """The darkest line near one that was found in the picture shrunk by `scale`."""
    beside = np.arange(-scale - 1, scale + 2)
    best, found = -np.inf, (middle, slope)
    for near in slope + np.linspace(-0.006, 0.006, 9):
        rows, columns, inside = _pixels(ink.shape, middle + beside, near)
        sums = np.where(inside, np.minimum(ink[rows, columns], 0.5), 0).sum(axis=1)
        if sums.max() > best:
            best, found = sums.max(), (middle + float(beside[sums.argmax()]), float(near))
    return found
