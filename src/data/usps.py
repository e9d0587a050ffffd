"""USPS, handwritten digits of US postal codes, from text files of LIBSVM's format."""

from typing import BinaryIO

import numpy as np

from data.dataset import Split, to_split
from data.published import read_unpacked

MAX_BYTES = 60_000_000  # unpacked; far more than the 7,291 lines to train take


def read_usps(train: BinaryIO, test: BinaryIO) -> tuple[Split, Split]:
    """What is to train and to test."""
    return _read_lines(train), _read_lines(test)


def _read_lines(file: BinaryIO) -> Split:
    """A line is a digit plus 1, then `index:value` of 256 pixels in [-1, 1], white on black."""
    text = read_unpacked(file, MAX_BYTES).replace(b":", b" ")
    rows = np.fromstring(text, sep=" ").reshape(-1, 1 + 2 * 256)
    pixels = rows[:, 2::2].astype(np.float32).reshape(-1, 1, 16, 16)
    images = ((pixels + 1) / 2 * 255).astype(np.uint8)  # in single precision: as torchvision does
    return to_split(images, rows[:, 0] - 1)
