"""Brings a picture of a digit, a drawing or a photo of paper, to the form of MNIST's images.

MNIST's digits are light on black, scaled to fit a box of 20x20 with their proportions kept, and
placed in 28x28 with their centre of mass in the middle (LeCun et al., 1998, section III.A), which
is pixel (14, 14) counted from 0: so placed, MNIST's own images come out as they are.

On the way a picture is an array: colour (H, W, 3) or grey (H, W, 1) in [0, 1] as it was read, then
how much darker than its paper each pixel is, "ink" (H, W), from 0 on.
"""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from cli import UserError

MAX_SIDE = 10_000  # pixels; a larger picture would take gigabytes to decode
WORKING_SIDE = 800  # pixels; larger pictures are shrunk before they are looked at
MIN_CONTRAST = 0.1  # of black to white; below that, what stands out is noise
FAINT = 0.2  # of the ink's strength; fainter pixels don't belong to the strokes of a drawing
FAINT_IN_PHOTO = 0.4  # the same, where shadows and grain are left
EVEN = 0.05  # a border whose pixels differ by less than this is a drawing's, or a scan's
WIDEST_STROKE = 0.3  # of the picture's longer side; what is wider and dark is a shadow
STEEPEST_LINE = 0.36  # pixels up per pixel along: printed lines of a sheet tilted by 20 degrees


def read_digit(source: str | Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """Read a picture and bring its digit to MNIST's form: uint8 (28, 28), light on black.

    The digit may be dark on light or light on dark, in colour, on paper with shadows, grain and
    printed lines.

    Args:
        source: a path, or a file open in binary mode.
        name: of the picture in messages; None is its path.

    Raises:
        UserError: there is no such file, Pillow can't read it, it is too large, shows nothing or
            several digits.
    """
    name = name or str(getattr(source, "name", source))
    picture = _read_picture(source, name)
    ink = _without_lines(_ink(_dark_on_light(picture)))
    return _centre(_fit(_thicken(_strokes(ink, name))))


# ------------------------------------------------------------------------------------ the picture


def _read_picture(source: str | Path | BinaryIO, name: str) -> np.ndarray:
    """The picture as it is seen: turned upright, laid on paper; not larger than WORKING_SIDE."""
    try:
        with warnings.catch_warnings():
            # The size is looked at here, and a warning of Pillow's is one more line for the user.
            warnings.simplefilter("ignore")
            image = Image.open(source)
            if max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            image.draft(None, (WORKING_SIDE, WORKING_SIDE))  # a JPEG is decoded at that size
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel
            return _shrink(_from_deep(image), WORKING_SIDE)
        if not image.has_transparency_data:
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
            return _shrink(np.atleast_3d(np.asarray(image)), WORKING_SIDE) / 255
        pixels = _shrink(np.asarray(image.convert("RGBA")), WORKING_SIDE) / 255
        colour, alpha = pixels[..., :3], pixels[..., 3:]
        # A drawing on nothing is laid on the paper that it can be seen on.
        paper = float((colour * alpha).sum() < 0.5 * 3 * alpha.sum() + 1e-9)
        return colour * alpha + paper * (1 - alpha)
    except FileNotFoundError:
        raise UserError(f"image {name} not found: name an existing image file") from None
    except Image.DecompressionBombError as error:
        raise UserError(
            f"image {name} is too large ({error}): expected at most {MAX_SIDE} pixels a side, "
            "scale it down"
        ) from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"image {name} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise whatever comes on damaged files
        raise UserError(
            f"image {name} cannot be read: damaged, or no picture of a kind that Pillow knows; "
            "give a PNG or JPEG file"
        ) from None


def _from_deep(image: Image.Image) -> np.ndarray:
    """The brightness in [0, 1] of a picture of 16 or 32 bits a pixel, (H, W, 1) float32."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    # Nothing says where white is: the least of the usual values that none exceeds.
    white = next((top for top in (1, 255, 4095, 65535) if grey.max() <= top), grey.max())
    return np.clip(grey / white, 0, 1)[..., None]


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Mean pixels (H, W, C) so that the longer side is at most `side`, as float32."""
    factor = -(-max(pixels.shape[:2]) // side)

    def reduced(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).reduce(factor), dtype=np.float32)

    if factor == 1:
        return pixels.astype(np.float32)
    return np.dstack([reduced(np.ascontiguousarray(c)) for c in np.moveaxis(pixels, 2, 0)])


# ------------------------------------------------------------------------ from paper to pure ink


def _even_paper(picture: np.ndarray) -> np.ndarray | None:
    """The colour (C,) of the paper if it is the same all along the border, else None."""
    border = np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    level = np.median(border, axis=0)
    even = np.abs(border - level).max(axis=1) < EVEN
    return level if even.mean() > 0.9 else None


def _dark_on_light(picture: np.ndarray) -> np.ndarray:
    """The picture in grey (H, W), turned into its negative if the digit is lighter than its paper.

    Each channel weighs as much as the ink stands out in it: red ink is seen in green and blue.
    """
    small = _shrink(picture, 200)
    paper = _even_paper(small)
    if paper is None:
        paper = ndimage.gaussian_filter(small, (*[max(small.shape) / 6] * 2, 0))
    contrast = small - paper
    # Cubes: a few strokes of strong ink outweigh the many pixels that differ a little.
    direction = (contrast * np.square(contrast).sum(axis=2, keepdims=True)).mean(axis=(0, 1))
    if direction.sum() > 0:
        picture, direction = 1 - picture, -direction
    weights = np.maximum(-direction, 0) + 1e-12
    return picture @ (weights / weights.sum()).astype(np.float32)


def _ink(grey: np.ndarray) -> np.ndarray:
    """The share of the paper's brightness that is missing in each pixel, 0 on bare paper."""
    level = _even_paper(grey[..., None])
    paper = _uneven_paper(grey) if level is None else level[0]
    return 1 - grey / np.maximum(paper, 0.05)


def _uneven_paper(grey: np.ndarray) -> np.ndarray:
    """The paper's brightness in each pixel, as if nothing were written on it, (H, W)."""
    small = _shrink(grey[..., None], 100)[..., 0]
    window = round(WIDEST_STROKE * max(small.shape))
    # Closing fills whatever is dark and narrower than the window, and keeps the edges of shadows.
    closed = ndimage.grey_closing(small, size=(window, window))
    closed = Image.fromarray(ndimage.gaussian_filter(closed, 1.5))
    paper = np.asarray(closed.resize(grey.shape[::-1], Image.Resampling.BILINEAR))
    return paper * np.median(grey / np.maximum(paper, 0.05))  # it took the grain's lightest spots


# -------------------------------------------------------------------------------- printed lines


def _without_lines(ink: np.ndarray) -> np.ndarray:
    """Take printed lines away: straight, and from one edge of the picture to the other."""
    return _without_rows(_without_rows(ink).T).T


def _without_rows(ink: np.ndarray) -> np.ndarray:
    """Take away the printed lines that run from left to right, whatever their slope."""
    scale = -(-max(ink.shape) // 200)
    ink = ink.copy()
    for row, slope in _find_lines(_shrink(ink[..., None], -(-max(ink.shape) // scale))[..., 0]):
        line = _align(ink, (row + 0.5) * scale - 0.5, slope, scale)
        reach = 2 * scale + 3
        offsets = np.arange(-reach, reach + 1)
        rows, columns, inside = _pixels(ink.shape, *line, offsets)
        values = ink[rows, columns]
        # A pen crosses the line here and there: the median is the line's.
        profile = np.array([np.median(v[i]) if i.any() else 0 for v, i in zip(values, inside)])
        profile = np.maximum(profile - np.median(profile), 0)[:, None]
        values = np.where(values < 1.5 * profile + 0.15, values - profile, values)
        ink[rows[inside], columns[inside]] = values[inside]
    return ink


def _pixels(shape, row, slope, offsets):
    """The pixels of parallel lines: rows and columns (n, W), and whether they are in the picture.

    The first line crosses the middle column at `row`; the others lie `offsets` below it.
    """
    height, width = shape
    x = np.arange(width)
    rows = np.rint(row + slope * (x - width / 2)).astype(int) + np.asarray(offsets)[:, None]
    inside = (rows >= 0) & (rows < height)
    return np.clip(rows, 0, height - 1), np.broadcast_to(x, rows.shape), inside


def _find_lines(ink: np.ndarray) -> list[tuple[float, float]]:
    """Lines from edge to edge: the row where each crosses the middle column, and its slope."""
    height, width = ink.shape
    beyond = int(STEEPEST_LINE * width / 2)
    slopes = np.linspace(-STEEPEST_LINE, STEEPEST_LINE, 91)
    offsets = np.arange(-beyond, height + beyond)
    strength = np.stack([_strength(ink, slope, offsets) for slope in slopes])  # (slope, row)
    strength -= ndimage.median_filter(strength, size=(1, 21))
    least = max(0.03, 5 * 1.4826 * float(np.median(np.abs(strength))))
    lines = []
    while strength.max() > least:
        i, j = np.unravel_index(strength.argmax(), strength.shape)
        lines.append((float(offsets[j]), float(slopes[i])))
        strength[:, max(0, j - 5) : j + 6] = 0
    return lines


def _strength(ink: np.ndarray, slope: float, offsets: np.ndarray) -> np.ndarray:
    """How dark lines of a slope are along most of their length and at both ends, (rows,)."""
    rows, columns, inside = _pixels(ink.shape, 0, slope, offsets)
    starts = np.linspace(0, ink.shape[1], 10, endpoint=False).astype(int)
    count = np.add.reduceat(inside, starts, axis=1, dtype=np.float32)
    total = np.add.reduceat(np.where(inside, ink[rows, columns], 0), starts, axis=1)
    whole = count > 0.7 * np.diff(starts, append=ink.shape[1])
    parts = np.where(whole, total / np.maximum(count, 1), np.inf)
    number = whole.sum(axis=1)
    fourth = np.sort(parts, axis=1)[np.arange(len(parts)), (0.3 * number).astype(int)]
    first = parts[np.arange(len(parts)), whole.argmax(axis=1)]
    last = parts[np.arange(len(parts)), 9 - whole[:, ::-1].argmax(axis=1)]
    ends = 2 * np.minimum(first, last)
    return np.where(number >= 3, np.minimum(fourth, ends), 0)


def _align(ink: np.ndarray, row: float, slope: float, scale: int) -> tuple[float, float]:
    """The darkest line within the error of one found in the picture shrunk by `scale`."""
    offsets = np.arange(-scale - 1, scale + 2)
    best, found = -np.inf, (row, slope)
    for candidate in slope + np.linspace(-0.006, 0.006, 9):
        rows, columns, inside = _pixels(ink.shape, row, candidate, offsets)
        values = np.where(inside, np.minimum(ink[rows, columns], 0.5), 0).sum(axis=1)
        if values.max() > best:
            best, found = values.max(), (row + offsets[values.argmax()], candidate)
    return found


# ------------------------------------------------------------------------------------- the digit


def _strokes(ink: np.ndarray, name: str) -> np.ndarray:
    """The ink of the digit alone, cut out with the strongest ink 1: no specks, nothing else."""
    noise = 1.4826 * float(np.median(np.abs(ink)))
    photo = noise > 0.004
    if photo:
        ink = ndimage.gaussian_filter(ink, max(ink.shape) / 400)
    strong = ink.max()
    if strong < max(MIN_CONTRAST, 4 * noise):
        raise UserError(f"image {name} is blank: expected one digit, dark on light or the reverse")
    threshold = (FAINT_IN_PHOTO if photo else FAINT) * strong
    labels, number = ndimage.label(ink > threshold, structure=np.ones((3, 3)))
    masses = ndimage.sum_labels(ink, labels, np.arange(1, number + 1))
    boxes = [
        (rows.start, columns.start, rows.stop, columns.stop)
        for rows, columns in ndimage.find_objects(labels)
    ]
    boxes = np.array(boxes)
    at_edge = (boxes[:, :2] == 0).any(axis=1) | (boxes[:, 2:] == ink.shape).any(axis=1)
    main = int(np.where(at_edge, 0.1, 1.0).__mul__(masses).argmax())
    top, left, bottom, right = boxes[main]
    size = max(bottom - top, right - left)
    gaps = np.maximum(boxes[:, :2] - (bottom, right), (top, left) - boxes[:, 2:]).max(axis=1)
    lengths = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    belongs = (gaps < 0.25 * size) & (masses > 0.03 * masses[main]) & ~at_edge
    belongs[main] = True
    others = ~belongs & ~at_edge & (lengths > 0.6 * size) & (lengths > max(ink.shape) / 50)
    if others.any():
        raise UserError(
            f"image {name} shows {1 + others.sum()} digits or more: expected one, cut them apart"
        )
    kept = np.isin(labels, 1 + np.flatnonzero(belongs))
    rows, columns = ndimage.find_objects(kept.astype(np.uint8))[0]
    around = ndimage.binary_dilation(kept[rows, columns], iterations=max(1, round(size / 20)))
    ink = np.where(around, ink[rows, columns], 0)
    strong = np.percentile(ink[kept[rows, columns]], 75) if photo else ink.max()
    return np.clip(ink / strong, 0, 1).astype(np.float32)


def _thicken(ink: np.ndarray) -> np.ndarray:
    """Widen the strokes of a fine pen: MNIST has none thinner than about 1.6 pixels of 20."""
    pen = ink > 0.5
    width = 4 * ndimage.distance_transform_edt(np.pad(pen, 1))[1:-1, 1:-1][pen].mean() - 2
    radius = round((0.08 * max(ink.shape) - width) / 2)
    if radius < 1:
        return ink
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return ndimage.grey_dilation(np.pad(ink, radius), footprint=x * x + y * y <= radius * radius)


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
    corner = []
    for axis, length in enumerate(digit.shape):
        mass = digit.sum(axis=1 - axis)
        centre = (mass * np.arange(length)).sum() / mass.sum()
        corner.append(int(np.clip(round(14 - centre), 0, 28 - length)))
    top, left = corner
    height, width = digit.shape
    canvas[top : top + height, left : left + width] = np.round(digit * 255).astype(np.uint8)
    return canvas
