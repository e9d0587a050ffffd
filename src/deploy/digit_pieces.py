"""Sorts pieces of ink, connected strokes, into digits: which belong together, in which order.

Boxes (n, 4) are in pixels: left, top, right, bottom, the last two beyond the ink. Limits are shares
of a digit's height, for which the median of the pieces' longer sides, weighted by ink, is taken.
"""

import numpy as np

MAX_PIECES = 400  # to group, the heaviest first; a page of digits has fewer
SPECK = 0.3  # a piece that is smaller joins a digit or is left out
MIN_HEIGHT, MIN_SIDE = 0.4, 0.5  # of a digit; what is smaller is a mark: a minus, a comma
TALL = 0.8  # of two pieces' joint height: if both are as high as this, they are two digits
DOT = 0.45  # pieces no longer than this, a colon's, are not joined to each other
NEAR = 0.04  # the largest gap in a broken stroke
STACK_GAP = 0.2  # the largest gap between a piece and the one above it; lines lie further apart
BAR, BAR_GAP = 0.3, 0.2  # the least width of a 5's bar, and its largest gap from the rest
OPEN_GAP = 0.27  # of a 4's own height: the largest gap between its two strokes
OPEN_STEM = 0.45  # of a 4's own height: the largest width of its upright stroke, which may slant


def group_pieces(boxes: np.ndarray, mass: np.ndarray) -> list[np.ndarray]:
    """The pieces of each digit, as indices, the digits in reading order.

    Args:
        boxes: (n, 4), n at least 1.
        mass: (n,), the ink of each piece.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    height = _typical_height(size, mass)
    order = np.argsort(-mass, kind="stable")
    strokes = order[size[order] >= SPECK * height][:MAX_PIECES]
    groups = _join([[i] for i in strokes], boxes[strokes].astype(float), height)
    found = np.array([_hull(boxes[group]) for group in groups])
    sides = found[:, 2:] - found[:, :2]
    is_digit = (sides[:, 1] >= MIN_HEIGHT * height) & (sides.max(axis=1) >= MIN_SIDE * height)
    if not is_digit.any():  # a lying stroke with nothing to compare it with, or marks alone
        is_digit = sides.max(axis=1) >= min(MIN_SIDE * height, sides.max())
    groups = [group for group, digit in zip(groups, is_digit, strict=True) if digit]
    found = found[is_digit]
    for speck in order[size[order] < SPECK * height][: 10 * MAX_PIECES]:
        gap = _gaps(found, boxes[speck]).max(axis=1)
        if gap.min() <= NEAR * height:
            groups[gap.argmin()].append(speck)
    return [np.array(groups[i]) for i in _reading_order(found)]


def _typical_height(size: np.ndarray, mass: np.ndarray) -> float:
    """The median longer side, not height: the pieces of a broken digit may all be low."""
    order = np.argsort(size)
    return float(size[order][np.searchsorted(np.cumsum(mass[order]), mass.sum() / 2)])


def _hull(boxes: np.ndarray) -> np.ndarray:
    """The box (4,) around boxes (n, 4)."""
    return np.concatenate((boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)))


def _gaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The gaps between boxes (..., 4) along x and y, (..., 2); negative where they overlap."""
    return np.maximum(a[..., :2], b[..., :2]) - np.minimum(a[..., 2:], b[..., 2:])


def _join(groups: list[list[int]], boxes: np.ndarray, height: float) -> list[list[int]]:
    """Join groups, the nearest first, until no two are parts of one digit."""
    distance = _distance(boxes[:, None], boxes[None], height)
    np.fill_diagonal(distance, np.inf)
    while distance.min() < np.inf:
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        groups[i], groups[j] = groups[i] + groups[j], []
        boxes[i], boxes[j] = _hull(boxes[[i, j]]), np.nan  # and so at no distance from any
        distance[i] = _distance(boxes[i], boxes, height)
        distance[:, i] = _distance(boxes, boxes[i], height)
        distance[j] = distance[:, j] = distance[i, i] = np.inf
    return [group for group in groups if group]


def _distance(a: np.ndarray, b: np.ndarray, height: float) -> np.ndarray:
    """The gap between two pieces of one digit of which `a` begins further left, else infinity."""
    gap = np.maximum(_gaps(a, b), 0).max(axis=-1)
    return np.where(_are_one(a, b, height), gap, np.inf)


def _are_one(a: np.ndarray, b: np.ndarray, height: float) -> np.ndarray:
    """Whether two pieces are of one digit and `a` begins no further right than `b`, bool (...)."""
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    gap = _gaps(a, b)
    union = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
    lower, taller = np.minimum(size_a, size_b)[..., 1], np.maximum(size_a, size_b)[..., 1]
    shared = -gap / np.minimum(size_a, size_b)

    inside = (shared > 0.6).all(axis=-1)
    fragments = taller < TALL * union[..., 1]  # neither is as high as both
    broken = (gap <= np.where(fragments, 3, 1)[..., None] * NEAR * height).all(axis=-1)
    stacked = (shared[..., 0] > 0.4) & (shared[..., 1] < 0.5) & (gap[..., 1] <= STACK_GAP * height)
    bar_of_five = (
        (gap <= BAR_GAP * height).all(axis=-1)
        & (size_b[..., 0] > np.maximum(size_b[..., 1], BAR * height))
        & (b[..., 3] <= (a[..., 1] + a[..., 3]) / 2)
    )
    unit = union[..., 1]
    open_four = (
        (gap[..., 0] <= OPEN_GAP * unit)
        & (size_a[..., 1] >= 0.35 * unit)
        & (size_b[..., 1] >= 0.6 * unit)
        & (size_b[..., 0] <= OPEN_STEM * unit)
        & (a[..., 3] <= b[..., 3] - 0.25 * unit)
        & (a[..., 1] <= b[..., 1] + 0.3 * unit)
        & (shared[..., 1] > 0.1)
    )
    dots = np.maximum(size_a, size_b).max(axis=-1) <= DOT * height  # a colon's
    one = inside | broken | open_four | ((stacked | bar_of_five) & ~dots)
    two_digits = lower > TALL * union[..., 1]
    fits = union[..., 0] <= 1.2 * np.maximum(height, taller)
    return one & ~two_digits & fits & (a[..., 0] <= b[..., 0])


def _reading_order(boxes: np.ndarray) -> list[int]:
    """Lines from the top, each from the left. A line may climb or fall."""
    lines: list[list[int]] = []
    for i in np.argsort(boxes[:, 0] + boxes[:, 2], kind="stable"):
        ends = boxes[[line[-1] for line in lines]] if lines else boxes[:0]
        height = np.minimum(ends[:, 3] - ends[:, 1], boxes[i, 3] - boxes[i, 1])
        shared = -_gaps(ends, boxes[i])[:, 1] / height
        if len(lines) and shared.max() > 0.4:
            lines[shared.argmax()].append(int(i))
        else:
            lines.append([int(i)])
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    width, rise = np.array([middle[line[-1]] - middle[line[0]] for line in lines]).sum(axis=0)
    level = middle[:, 1] - middle[:, 0] * (rise / width if width else 0)
    return [i for line in sorted(lines, key=lambda line: level[line].mean()) for i in line]
