"""Brings a picture of a digit, whatever its size and colours, to the form of MNIST's images.

MNIST's digits are light on black, scaled to fit a box of 20x20 with their proportions kept, and
placed in 28x28 with their centre of mass in the middle (LeCun et al., 1998, section III.A), which
is pixel (14, 14) counted from 0: so placed, MNIST's own images come out as they are.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cli import UserError

MAX_SIDE = 10_000  # pixels; a larger picture would take gigabytes to decode
MIN_CONTRAST = 0.1  # of black to white; below that, what stands out is noise
BACKGROUND = 0.2  # of the ink's strength; fainter pixels don't widen the digit's box


def read_digit(path: str | Path) -> np.ndarray:
    """Read an image file and bring its digit to MNIST's form: uint8 (28, 28), light on black.

    Raises:
        UserError: there is no such file, Pillow can't read it, it is too large or shows nothing.
    """
    ink = _ink(_read_grey(Path(path)))
    if ink is None:
        raise UserError(
            f"image {path} is blank: expected one digit, dark on light or light on dark"
        )
    rows, columns = (np.flatnonzero((ink > BACKGROUND).any(axis=axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _centre(_fit(ink))


def _read_grey(path: Path) -> np.ndarray:
    """The picture's brightness in [0, 1], as it is seen: turned upright, laid on paper."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_SIDE sees to it
            image = Image.open(path)
        if max(image.size) > MAX_SIDE:
            raise UserError(
                f"image {path} is {image.width}x{image.height} pixels, "
                f"expected at most {MAX_SIDE} a side: scale it down"
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel
            grey = np.asarray(image, dtype=np.float64)
            low, high = np.nanmin(grey), np.nanmax(grey)
            return np.nan_to_num((grey - low) / max(high - low, 1e-9))
        if not image.has_transparency_data:
            return np.asarray(image.convert("L"), dtype=np.float64) / 255
        grey, alpha = np.moveaxis(np.asarray(image.convert("LA"), dtype=np.float64) / 255, -1, 0)
        # A drawing on nothing is laid on the paper that it can be seen on.
        paper = float(np.average(grey, weights=alpha + 1e-9) < 0.5)
        return grey * alpha + paper * (1 - alpha)
    except FileNotFoundError:
        raise UserError(f"image {path} not found: name an existing image file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no picture that Pillow can read, or a damaged one"
        if isinstance(error, (IsADirectoryError, PermissionError)):
            reason = error.strerror
        raise UserError(f"image {path} cannot be read: {reason}; give a PNG or JPEG file") from None


def _ink(grey: np.ndarray) -> np.ndarray | None:
    """How much each pixel differs from the background, strongest 1; None if none does."""
    border = np.concatenate((grey[0], grey[-1], grey[:, 0], grey[:, -1]))
    background = np.median(border)
    dark_on_light = background - grey.min() > grey.max() - background
    ink = np.maximum(background - grey if dark_on_light else grey - background, 0.0)
    return ink / ink.max() if ink.max() >= MIN_CONTRAST else None


def _fit(ink: np.ndarray) -> np.ndarray:
    """Scale so that the longer side is 20 pixels."""
    height, width = ink.shape
    scale = 20 / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(np.round(ink * 255).astype(np.uint8))
    small = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
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
    canvas[top : top + height, left : left + width] = np.round(digit * 255)
    return canvas
