"""MNIST, from its four files."""

import gzip
import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from common.files import read_bytes
from data.catalog import DIGITS
from data.dataset import DataMissingError, Dataset, Split, divide


class MnistFile(NamedTuple):
    """One of Yann LeCun's four files: MD5 as published (.gz), MD5 unpacked, shape of its array."""

    packed_md5: str
    md5: str
    shape: tuple[int, ...]


MNIST_FILES = {
    "train-images-idx3-ubyte": MnistFile(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb", (60000, 28, 28)
    ),
    "train-labels-idx1-ubyte": MnistFile(
        "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624", (60000,)
    ),
    "t10k-images-idx3-ubyte": MnistFile(
        "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea", (10000, 28, 28)
    ),
    "t10k-labels-idx1-ubyte": MnistFile(
        "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637", (10000,)
    ),
}
MAX_IDX_BYTES = 50_000_000  # the largest file has 47,040,016


def load_mnist(data_dir: str | Path = "./mnist") -> Dataset:
    """MNIST from `<data_dir>/MNIST/raw`, fetched with torchvision if not there: 54,000 / 6,000 /
    10,000 images for training, validation and test.

    Raises:
        DataMissingError, UserError: as `load_dataset`.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    missing = [n for n in MNIST_FILES if not any(map(os.path.exists, _variants(raw, n)))]
    if missing:
        _download_mnist(Path(data_dir), missing)
    train_images, train_labels, test_images, test_labels = (_read_idx(raw, n) for n in MNIST_FILES)
    train, val = divide(_to_split(train_images, train_labels), 54_000, 6_000)
    test = _to_split(test_images, test_labels)
    return Dataset("mnist", DIGITS, (0.1307,), (0.3081,), train, val, test, "mnist", "digit")


def _variants(raw: Path, name: str) -> tuple[Path, Path]:
    return raw / name, raw / f"{name}.gz"


def _download_mnist(data_dir: Path, missing: list[str]) -> None:
    from torchvision.datasets import MNIST

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none: a silent mirror would hang for ever
    raw = data_dir / "MNIST" / "raw"
    made = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        MNIST(data_dir, download=True)
    except Exception as error:  # whatever a mirror, a proxy or the disk comes up with
        with suppress(OSError):  # made before the first byte came; of use only if one did
            for folder in made:
                folder.rmdir()
        needed = ", ".join(f"{name}.gz (MD5 {f.packed_md5})" for name, f in MNIST_FILES.items())
        raise DataMissingError(
            f"MNIST is not in {raw} ({', '.join(missing)} missing) and cannot be downloaded "
            f"({str(error).strip() or type(error).__name__}); put there the four files {needed}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _read_idx(raw: Path, name: str) -> np.ndarray:
    """Read one of MNIST's files, packed or not. Raises UserError if it is damaged."""
    expected = MNIST_FILES[name]
    plain, packed = _variants(raw, name)
    path, md5 = (plain, expected.md5) if os.path.exists(plain) else (packed, expected.packed_md5)
    content = read_bytes(path, MAX_IDX_BYTES)
    if (found := hashlib.md5(content).hexdigest()) != md5:
        raise UserError(
            f"{path} is damaged: {len(content)} bytes with MD5 {found}, expected MD5 {md5}; "
            "delete it to have it downloaded again, or put a good copy there"
        )
    content = gzip.decompress(content) if path == packed else content
    # IDX: a magic number and one big-endian int32 per axis, then the bytes.
    header = 4 * (1 + len(expected.shape))
    return np.frombuffer(content, np.uint8, offset=header).reshape(expected.shape).copy()


def _to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())
