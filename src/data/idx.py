"""Data sets in MNIST's format, IDX: MNIST, Fashion-MNIST, KMNIST, QMNIST and, in one zip, EMNIST.

IDX: two zero bytes, one for the type of the numbers, one for how many axes there are, an int32 for
the length of each axis, then the numbers, all big-endian.
"""

import zipfile
from typing import BinaryIO

import numpy as np

from data.dataset import Split, to_split
from data.published import read_unpacked

MAX_BYTES = 120_000_000  # unpacked; the largest, EMNIST's letters to train, has 97,843,216
TYPES = {8: ">u1", 12: ">i4"}


def read_mnist(
    train_images: BinaryIO, train_labels: BinaryIO, test_images: BinaryIO, test_labels: BinaryIO
) -> tuple[Split, Split]:
    """What is to train and to test in four files, each packed if its name ends in .gz."""
    return _read_pair(train_images, train_labels), _read_pair(test_images, test_labels)


def read_emnist(archive: BinaryIO, name: str, first_label: int = 0) -> tuple[Split, Split]:
    """What is to train and to test of one of EMNIST's divisions.

    Its images lie in the files with rows and columns exchanged; here they stand upright.

    Args:
        first_label: the label that becomes class 0.
    """
    parts = []
    with zipfile.ZipFile(archive) as files:
        for part in ("train", "test"):
            prefix = f"gzip/emnist-{name}-{part}"
            with (
                files.open(f"{prefix}-images-idx3-ubyte.gz") as images,
                files.open(f"{prefix}-labels-idx1-ubyte.gz") as labels,
            ):
                split = _read_pair(images, labels)
            upright = split.images.transpose(2, 3).contiguous()
            parts.append(Split(upright, split.labels - first_label))
    return parts[0], parts[1]


def _read_pair(images: BinaryIO, labels: BinaryIO) -> Split:
    classes = _read_idx(labels)
    if classes.ndim == 2:  # QMNIST: the class, then who wrote it, and more
        classes = classes[:, 0]
    return to_split(_read_idx(images)[:, None], classes)


def _read_idx(file: BinaryIO) -> np.ndarray:
    content = read_unpacked(file, MAX_BYTES)
    number_type, num_axes = content[2:4]
    shape = np.frombuffer(content, ">i4", num_axes, offset=4)
    start = 4 + 4 * num_axes
    return np.frombuffer(content, TYPES[number_type], offset=start).reshape(shape)
