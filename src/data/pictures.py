"""The one door for pictures: opened within limits, set upright, made an image of a data set.

Needs no PyTorch, so that the processes that read a folder start quickly.
"""

import errno
import os
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from common.errors import UserError

# What is read. Pillow knows more formats: for EPS it would run the file as a program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")
MAX_SIDE = 10_000  # pixels
MAX_PIXELS = 50_000_000  # to decode; more would take gigabytes
# By the value of EXIF's Orientation.
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM")
TURNS += ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
TURNS = {value: Image.Transpose[name] for value, name in enumerate(TURNS, start=2)}
# From so many times the side that is wanted on, shrinking in means of blocks is not seen: the rest
# of the way is BICUBIC's. It is the value that Pillow's documentation gives.
REDUCING_GAP = 3


def read_picture(
    source: str | Path | BinaryIO, what: str, side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """A picture, decoded, upright, and of few modes: grey L, RGB, RGBA if it may be transparent, F
    with the brightness in [0, 1] if it has 16 or 32 bits a pixel. Raises UserError if there is no
    such file, Pillow can't read it, or it is too large.

    Args:
        source: a path, or a file open in binary mode.
        what: what messages call the picture.
        side: a JPEG may be decoded smaller, as long as both its sides have so many pixels.

    Returns:
        The picture, and the width and height that it has in full, upright.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large size, which is checked below
            image = Image.open(source, formats=FORMATS)
            size = image.size
            too_long = max(size) > MAX_SIDE
            if too_long or size[0] * size[1] > MAX_PIXELS:
                limit = f"{MAX_SIDE:,} a side" if too_long else f"{MAX_PIXELS // 10**6} million"
                raise UserError(
                    f"{what} is too large: {size[0]}x{size[1]} pixels, expected at most {limit}; "
                    "scale it down"
                )
            if side is not None:
                image.draft(None, (side, side))
            stored = image.size
            image = _upright(image)
            size = size[::-1] if image.size != stored else size
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel
            image = Image.fromarray(_from_deep(image))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        else:
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        return image, size
    except FileNotFoundError:
        raise UserError(f"{what} not found: name an existing image file") from None
    except Image.DecompressionBombError:  # more than Pillow opens at all
        raise UserError(
            f"{what} is too large: expected at most {MAX_PIXELS // 10**6} million pixels; "
            "scale it down"
        ) from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever comes on damaged files
        # The system's, not Pillow's; a damaged file can lead to a place that there isn't.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"{what} cannot be read: {error.strerror}") from None
        raise UserError(
            f"{what} cannot be read: damaged, or none of {', '.join(FORMATS)}; "
            "give a PNG or JPEG file"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    """The picture, decoded, as its camera was held. Other EXIF data is left unread: unlike the
    pixels, it is often damaged.
    """
    image.load()
    turn = None
    with suppress(Exception):  # whatever Pillow makes of damaged data
        turn = TURNS.get(image.getexif().get(0x0112))
    return image if turn is None else image.transpose(turn)


def stored_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height by the file's header alone, perhaps swapped; None if it can't be told."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    return None


def _from_deep(image: Image.Image) -> np.ndarray:
    """The brightness in [0, 1] of a picture of 16 or 32 bits a pixel, float32 (H, W)."""
    grey = np.array(image, dtype=np.float32)  # changed in place: it may take 200 MB
    np.nan_to_num(grey, copy=False, posinf=0, neginf=0)
    # Nothing says which value is white: the lowest of the usual ones that no pixel exceeds.
    grey /= next((white for white in (1, 255, 4095, 65535) if grey.max() <= white), grey.max())
    return np.clip(grey, 0, 1, out=grey)


@cache
def _endings() -> frozenset[str]:
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, form in endings if form in FORMATS)


def has_image_name(name: str) -> bool:
    """Whether a file's name ends as those of the formats that are read do."""
    return os.path.splitext(name)[1].lower() in _endings()


# -------------------------------------------------------------------------- an image of a data set


def prepare(image: Image.Image, img_size: int, in_chans: int, resize: str) -> np.ndarray:
    """Make a picture an image of a data set: uint8 (in_chans, img_size, img_size).

    An image that has this size already keeps its pixels. All others are scaled by bicubic
    interpolation, widened to an average over the pixels that become one where they are shrunk. It
    is what Vision Transformers are usually trained with: sharper than a mean of blocks, and unlike
    Lanczos almost without bright seams along edges.

    Args:
        image: as `read_picture` gives it. What is transparent in it becomes white.
        in_chans: 1: grey, 3: colour.
        resize: "crop": the middle square of it. "pad": all of it, in the middle of a square of the
            mean colour of its border, since against black its edge would be the strongest in the
            image. "stretch": all of it, its proportions changed.
    """
    image = _opaque(image).convert("L" if in_chans == 1 else "RGB")
    square = img_size, img_size
    if image.size != square:
        if resize == "crop":
            (width, height), short = image.size, min(image.size)
            left, top = (width - short) // 2, (height - short) // 2
            image = image.crop((left, top, left + short, top + short))
        size = square
        if resize == "pad":
            size = tuple(max(1, round(side * img_size / max(image.size))) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    pixels = np.asarray(image).reshape(image.height, image.width, in_chans).transpose(2, 0, 1)
    return pixels if image.size == square else _padded(pixels, img_size)


def _opaque(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a value, on white."""
    if image.mode == "F":
        return Image.fromarray(np.rint(255 * np.asarray(image)).astype(np.uint8))
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _padded(pixels: np.ndarray, side: int) -> np.ndarray:
    """The image (C, h, w) in the middle of a square of the mean colour of its border, (C, S, S)."""
    channels, height, width = pixels.shape
    edges = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
    colour = np.rint(np.concatenate(edges, axis=1).mean(axis=1)).astype(np.uint8)
    square = np.empty((channels, side, side), dtype=np.uint8)
    square[:] = colour[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return square
