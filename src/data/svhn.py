"""Street View House Numbers, cropped to single digits, from MATLAB files."""

from math import prod
from typing import BinaryIO

from common.errors import UserError
from data.dataset import Split, to_split

MAX_VALUES = 260_000_000  # of an array; the largest, of the images to train, has 225,045,504


def read_svhn(train: BinaryIO, test: BinaryIO) -> tuple[Split, Split]:
    """What is to train and to test."""
    return _read_mat(train), _read_mat(test)


def _read_mat(file: BinaryIO) -> Split:
    """A file has images X, uint8 (32, 32, 3, n), and labels y (n, 1), where 10 stands for 0."""
    from scipy.io import loadmat, whosmat  # slow

    for name, shape, _ in whosmat(file):
        if prod(shape) > MAX_VALUES:
            raise UserError(
                f"{file.name} is no published file: its {name} claims to have "
                f"{prod(shape):,} values"
            )
    file.seek(0)
    arrays = loadmat(file, variable_names=["X", "y"])
    return to_split(arrays["X"].transpose(3, 2, 0, 1), arrays["y"].ravel() % 10)
