"""Brings a picture of a digit, a drawing or a photo of paper, to the form of MNIST's images.

MNIST's digits are light on black, scaled to fit a box of 20x20 with their proportions kept, and
placed in 28x28 with their centre of mass in the middle (LeCun et al., 1998, section III.A). The
middle is pixel (14, 14), counted from 0: with it MNIST's own images come out as they are.

On the way a picture is an array: colour (H, W, 3) or grey (H, W, 1) in [0, 1] as it was read, then
"ink" (H, W), how much darker than its paper each pixel is, from 0 on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from scipy import ndimage

from common.errors import UserError
from data.pictures import read_picture
from deploy.digit_pieces import group_pieces
from deploy.printed_lines import without_lines

MAX_DIGITS = 200
WORKING_SIDE = 800  # pixels; larger pictures are shrunk before they are looked at
MIN_CONTRAST = 0.05  # of black to white; below that, what stands out is noise
MIN_CONTRAST_IN_PHOTO = 0.2  # of the paper's brightness
FAINT = 0.2  # of the strongest ink; fainter pixels are not part of the strokes of a drawing
FAINT_IN_PHOTO = 0.4  # the same in a photo, where shadows and grain remain
LEAST_GRAIN = 0.004  # standard deviation of a photo's paper; a drawing's is 0
EVEN = 0.05  # a border whose pixels differ by less than this is a drawing's, or a scan's
THINNEST_STROKE = 0.08  # of the digit's longer side
PARTING_LEVELS = 0.35, 0.5, 0.65  # of a piece's strongest ink; digits that touch may part there
WIDEST_STROKE = 0.3  # of the picture's longer side; what is wider and dark is a shadow
TOUCHING = np.ones((3, 3))  # pixels that touch at a corner are connected, too


@dataclass(frozen=True)
class Digit:
    """A digit of a picture."""

    pixels: np.ndarray  # uint8 (28, 28) in MNIST's form
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright picture


@dataclass(frozen=True)
class Reading:
    """What was found in a picture."""

    # At least one, in reading order: lines from the top, each from the left.
    digits: tuple[Digit, ...]
    size: tuple[int, int]  # width and height of the upright picture in pixels


def read_digits(
    source: str | Path | BinaryIO,
    what: str = "image",
    *,
    single: bool = False,
    things: str = "digits",
) -> Reading:
    """Find the digits in a picture and bring each to MNIST's form: light on black.

    Digits may be dark on light or light on dark, in colour, on paper with shadows, grain and
    printed lines, in several lines. Marks that are much lower than the digits (minus, colon, comma)
    are left out; a mark that is as high is taken for a digit. Raises UserError if there is no such
    file, Pillow can't read it, it is too large, shows nothing or more than MAX_DIGITS.

    Args:
        source: a path, or a file open in binary mode.
        what: what messages call the picture.
        single: the picture is known to hold one digit, and all its ink is that digit's.
        things: what messages call the digits, which may be letters.
    """
    picture, size = _read_picture(source, what)
    ink, pieces, photo = _connect(without_lines(_ink(picture)), what, things)
    labels = _label_digits(ink, pieces, photo, single)
    if labels.max() > MAX_DIGITS:
        raise UserError(
            f"{what} shows {labels.max()} marks, expected at most {MAX_DIGITS} {things}"
        )
    scale = np.tile(np.array(size) / ink.shape[::-1], 2)
    digits = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        own = labels[rows, columns] == i
        others_gone = np.where(own | (labels[rows, columns] == 0), ink[rows, columns], 0)
        strokes = _strokes(others_gone, own, photo)
        box = np.rint(scale * (columns.start, rows.start, columns.stop, rows.stop)).astype(int)
        digits.append(Digit(_centre(_fit(_thicken(strokes))), tuple(box.tolist())))
    return Reading(tuple(digits), size)


# ------------------------------------------------------------------------------------ the picture


def _read_picture(source: str | Path | BinaryIO, what: str) -> tuple[np.ndarray, tuple[int, int]]:
    """The picture, upright, on paper, at most WORKING_SIDE a side, and its size before that.

    The size is that of the upright picture, width and height.
    """
    image, size = read_picture(source, what, WORKING_SIDE)
    pixels = np.asarray(image.reduce(_factor(image.size, WORKING_SIDE)), dtype=np.float32)
    return _laid_on_paper(np.atleast_3d(pixels) / (1 if image.mode == "F" else 255)), size


def _laid_on_paper(picture: np.ndarray) -> np.ndarray:
    """Put a transparent picture (H, W, 4) on white, or on black if it is light."""
    if picture.shape[2] < 4:
        return picture
    colour, alpha = picture[..., :3], picture[..., 3:]
    paper = float((colour * alpha).sum() <= 0.5 * 3 * alpha.sum())
    return colour * alpha + paper * (1 - alpha)


def _factor(size: tuple[int, ...], side: int) -> int:
    """By how much to shrink so that the longer side is at most `side`."""
    return -(-max(size) // side)


def _shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture (H, W, C) in means of blocks, so that its longer side is at most `side`."""
    factor = _factor(picture.shape[:2], side)
    channels = np.moveaxis(picture, 2, 0)
    return np.dstack([np.asarray(Image.fromarray(c).reduce(factor)) for c in channels])


# ------------------------------------------------------------------------ from paper to pure ink


def _even_paper(picture: np.ndarray) -> np.ndarray | None:
    """The colour (C,) of the paper if it is the same all along the border, else None."""
    border = np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    level = np.median(border, axis=0)
    even = np.abs(border - level).max(axis=1) < EVEN
    return level if even.mean() > 0.9 else None


def _ink(picture: np.ndarray) -> np.ndarray:
    """How much darker than its paper each pixel is, or how much lighter than its board, (H, W)."""
    direction = _ink_direction(_shrink(picture, 200))
    light_on_dark = direction.sum() > 0
    if light_on_dark:
        picture, direction = 1 - picture, -direction
    # Each channel weighs as much as the ink stands out in it: red ink does in green and blue.
    weights = np.maximum(-direction, 0) + 1e-12
    grey = picture @ (weights / weights.sum()).astype(np.float32)
    level = _even_paper(grey[..., None])
    paper = _uneven_paper(grey) if level is None else level[0]
    # Ink takes a share of the light that falls on its paper; what chalk gives back is added.
    return (paper - grey) / (1 if light_on_dark else np.maximum(paper, 0.05))


def _ink_direction(picture: np.ndarray) -> np.ndarray:
    """The change of colour (C,) from paper to ink: negative is darker."""
    paper = _even_paper(picture)
    if paper is None:
        paper = ndimage.gaussian_filter(picture, (*[max(picture.shape) / 6] * 2, 0))
    contrast = picture - paper
    # Cubes: a few strokes of strong ink outweigh the many pixels that differ a little.
    return (contrast * np.square(contrast).sum(axis=2, keepdims=True)).mean(axis=(0, 1))


def _uneven_paper(grey: np.ndarray) -> np.ndarray:
    """The paper's brightness in each pixel, as if nothing were written on it, (H, W)."""
    small = _shrink(grey[..., None], 100)[..., 0]
    window = round(WIDEST_STROKE * max(small.shape))
    # Closing fills whatever is dark and narrower than the window, and keeps the edges of shadows.
    padded = np.pad(small, window, mode="reflect", reflect_type="odd")  # a slope goes on
    closed = ndimage.gaussian_filter(ndimage.grey_closing(padded, size=(window, window)), 1.5)
    closed = Image.fromarray(closed[window:-window, window:-window])
    paper = np.asarray(closed.resize(grey.shape[::-1], Image.Resampling.BILINEAR))
    return paper * np.median(grey / np.maximum(paper, 0.05))  # closing took the lightest grain


# ------------------------------------------------------------------------------------- the digit


def _connect(ink: np.ndarray, what: str, things: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """The ink without grain, its connected pieces as labels, and whether it is a photo's.

    Labels (H, W) say of which piece each pixel is, from 1 on; 0 is paper.
    """
    photo = _grain(ink) > LEAST_GRAIN
    if photo:
        ink = ndimage.gaussian_filter(ink, max(ink.shape) / 400)
    strong = ink.max()
    if strong < (max(MIN_CONTRAST_IN_PHOTO, 6 * _grain(ink)) if photo else MIN_CONTRAST):
        raise UserError(f"{what} is blank: expected {things}, dark on light or the reverse")
    faint = (FAINT_IN_PHOTO if photo else FAINT) * strong
    return ink, ndimage.label(ink > faint, TOUCHING)[0], photo


def _grain(ink: np.ndarray) -> float:
    """The standard deviation of bare paper, which is most of what has little ink."""
    return 1.4826 * float(np.median(np.abs(ink[ink <= max(0, ink.max()) / 2])))


def _label_digits(ink: np.ndarray, pieces: np.ndarray, photo: bool, single: bool) -> np.ndarray:
    """The digits as labels (H, W), numbered in reading order, of the connected `pieces` (H, W)."""
    if not single:
        pieces = _separate(ink, pieces)
    numbers = np.arange(1, pieces.max() + 1)
    mass = ndimage.sum_labels(ink, pieces, numbers)
    strength = ndimage.mean(ink, pieces, numbers)
    slices = ndimage.find_objects(pieces)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices])
    large = np.maximum(*(boxes[:, 2:] - boxes[:, :2]).T) > max(ink.shape) / 20
    # In a photo, what reaches its edge is the table, a shadow or a finger.
    inner = (boxes[:, :2] > 0).all(axis=1) & (boxes[:, 2:] < ink.shape[::-1]).all(axis=1)
    inner |= not photo
    main = np.where(inner & large if (inner & large).any() else True, mass, 0).argmax()
    inner[main] = True
    if single:
        groups = [np.flatnonzero(_one_digit(boxes, mass, inner, main, photo))]
    else:
        strong = np.flatnonzero(inner & ((strength > 0.7 * strength[main]) | (not photo)))
        groups = [strong[group] for group in group_pieces(boxes[strong], mass[strong])]
    digit_of_piece = np.zeros(len(numbers) + 1, dtype=int)
    for i, group in enumerate(groups, start=1):
        digit_of_piece[numbers[group]] = i
    return digit_of_piece[pieces]


def _separate(ink: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Divide wide pieces that only faint ink holds together, such as the digits of small print."""
    pieces, count = pieces.copy(), pieces.max()
    found = ndimage.find_objects(pieces)
    tallest = max(rows.stop - rows.start for rows, _ in found)
    for i, (rows, columns) in enumerate(found, start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if width < height or height < max(6, 0.4 * tallest):  # a row of digits is wide
            continue
        piece = pieces[rows, columns]
        own = np.where(piece == i, ink[rows, columns], 0)
        parts = max((_high_parts(own, level) for level in PARTING_LEVELS), key=np.max)
        extra = parts.max() - 1
        if extra > 0:
            _, nearest = ndimage.distance_transform_edt(parts == 0, return_indices=True)
            numbers = np.array([0, i, *range(count + 1, count + extra + 1)])
            piece[piece == i] = numbers[parts[tuple(nearest)]][piece == i]
            count += extra
    return pieces


def _high_parts(ink: np.ndarray, level: float) -> np.ndarray:
    """The strong parts of a piece that lie side by side, each almost as high, as labels (H, W)."""
    parts, _ = ndimage.label(ink > level * ink.max(), TOUCHING)
    found = ndimage.find_objects(parts)
    high = np.array([rows.stop - rows.start >= 0.6 * len(ink) for rows, _ in found])
    widths = np.array([columns.stop - columns.start for _, columns in found])
    if widths[high].sum() > 1.15 * ink.shape[1]:  # one above the other: the halves of a lying 0
        return np.zeros_like(parts)
    return np.concatenate(([0], np.cumsum(high) * high))[parts]


def _one_digit(
    boxes: np.ndarray, mass: np.ndarray, inner: np.ndarray, main: int, photo: bool
) -> np.ndarray:
    """Which pieces make up the only digit, bool (n,): the main one, and what is near or long.

    In a photo a long piece that is not near may be a shadow.
    """
    parts = np.arange(len(boxes)) == main
    start, stop = boxes[:, :2], boxes[:, 2:]
    length = (stop - start).max(axis=1)
    while True:  # a broken stroke's pieces join the box one after the other
        top_left, bottom_right = start[parts].min(axis=0), stop[parts].max(axis=0)
        size = (bottom_right - top_left).max()
        gap = np.maximum(start - bottom_right, top_left - stop).max(axis=1)
        near = inner & (gap < 0.2 * size) & (mass > 0.02 * mass[main])
        if not photo:
            near |= length > 0.3 * length[main]
        if not (near & ~parts).any():
            return parts
        parts |= near


def _strokes(ink: np.ndarray, kept: np.ndarray, photo: bool) -> np.ndarray:
    """The ink of a digit alone, the strongest 1.

    Args:
        ink: (h, w), of the box that the digit lies in.
        kept: bool (h, w), the digit's pixels.
    """
    strong = np.percentile(ink[kept], 75) if photo else ink[kept].max()
    edge = max(1, round(max(ink.shape) / 20))  # a pixel of the result
    ink = np.where(ndimage.binary_dilation(kept, iterations=edge), ink, 0)
    return np.clip(ink / strong, 0, 1).astype(np.float32)


def _thicken(ink: np.ndarray) -> np.ndarray:
    """Widen the strokes of a fine pen to what is narrow in MNIST, 1.6 pixels of 20."""
    pen = ink > 0.5
    # Of a bar's pixels the mean distance to its edge is a quarter of its width and half a pixel.
    width = 4 * ndimage.distance_transform_edt(np.pad(pen, 1))[1:-1, 1:-1][pen].mean() - 2
    missing = round((THINNEST_STROKE * max(ink.shape) - width) / 2)
    if missing < 1:
        return ink
    ink, pen = np.pad(ink, missing), np.pad(pen, missing)
    grown = np.clip(missing + 0.5 - ndimage.distance_transform_edt(~pen), 0, 1)
    return np.maximum(ink, grown.astype(np.float32))


def _fit(ink: np.ndarray) -> np.ndarray:
    """Scale so that the longer side is 20 pixels and the strongest ink 1."""
    height, width = ink.shape
    scale = 20 / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(ink.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)
    small = np.maximum(np.asarray(small), 0.0)
    return small / small.max()  # thin lines of a large picture fade as it shrinks


def _centre(digit: np.ndarray) -> np.ndarray:
    """Place in 28x28 with the centre of mass on pixel (14, 14), or as near as the digit fits."""
    canvas = np.zeros((28, 28), dtype=np.uint8)
    height, width = digit.shape
    masses = digit.sum(axis=1), digit.sum(axis=0)
    centre = np.array([(mass * np.arange(len(mass))).sum() / mass.sum() for mass in masses])
    top, left = np.clip(np.rint(14 - centre).astype(int), 0, (28 - height, 28 - width))
    canvas[top : top + height, left : left + width] = np.round(digit * 255)
    return canvas
