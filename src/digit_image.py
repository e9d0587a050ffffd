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

# What pictures come in. Pillow knows more: for EPS it would run the file as a program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")
MAX_SIDE = 10_000  # pixels; a larger picture would take gigabytes to decode
WORKING_SIDE = 2_000  # pixels; larger pictures are shrunk before they are looked at
MIN_CONTRAST = 0.1  # of black to white; below that, what stands out is noise
BACKGROUND = 0.2  # of the ink's strength; fainter pixels don't widen the digit's box


def read_digit(path: str | Path) -> np.ndarray:
    """Read an image file and bring its digit to MNIST's form: uint8 (28, 28), light on black.

    Raises:
        UserError: there is no such file, Pillow can't read it, it is too large or shows nothing.
    """
    path = Path(path)
    ink = _ink(_read_grey(path))
    if ink.max() < MIN_CONTRAST:
        raise UserError(f"image {path} is blank: expected one digit, dark on light or the reverse")
    ink /= ink.max()
    rows, columns = (np.flatnonzero((ink > BACKGROUND).any(axis=axis)) for axis in (1, 0))
    return _centre(_fit(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))


def _read_grey(path: Path) -> np.ndarray:
    """The picture's brightness in [0, 1], as it is seen: turned upright, laid on paper."""
    try:
        with warnings.catch_warnings():
            # The size is looked at here, and a warning of Pillow's is one more line for the user.
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=FORMATS)
            if max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel
            grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
            white = next((top for top in (1, 255, 65535) if grey.max() <= top), grey.max())
            return np.clip(grey / white, 0, 1)
        transparent = image.has_transparency_data
        image = image.convert("LA" if transparent else "L")
        if max(image.size) > WORKING_SIDE:
            image = image.reduce(-(-max(image.size) // WORKING_SIDE))
        pixels = np.asarray(image, dtype=np.float32) / 255
        if not transparent:
            return pixels
        grey, alpha = pixels[..., 0], pixels[..., 1]
        # A drawing on nothing is laid on the paper that it can be seen on.
        paper = float(np.average(grey, weights=alpha + 1e-9) < 0.5)
        return grey * alpha + paper * (1 - alpha)
    except FileNotFoundError:
        raise UserError(f"image {path} not found: name an existing image file") from None
    except Image.DecompressionBombError as error:
        raise UserError(
            f"image {path} is too large ({error}): expected at most {MAX_SIDE} pixels a side, "
            "scale it down"
        ) from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise whatever comes on damaged files
        raise UserError(
            f"image {path} cannot be read: damaged, or none of {', '.join(FORMATS)}; "
            "give a PNG or JPEG file"
        ) from None


def _ink(grey: np.ndarray) -> np.ndarray:
    """How much each pixel differs from the background, in the direction in which most do."""
    border = np.concatenate((grey[0], grey[-1], grey[:, 0], grey[:, -1]))
    background = np.median(border)
    dark_on_light = background - grey.min() > grey.max() - background
    return np.maximum(background - grey if dark_on_light else grey - background, 0.0)


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
