"""Small data sets in the formats of the published ones, written as real files."""

import bz2
import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import savemat

from data.catalog import NAMED_SETS, NamedSet

Part = tuple[np.ndarray, np.ndarray]  # images (n, C, S, S), labels (n,), as they are to be read


def parts_of(name: str) -> tuple[Part, Part]:
    """210 images to train and 110 to test, random but always the same; no image has a symmetry."""
    row, random = NAMED_SETS[name], np.random.default_rng(len(name))
    shape = row.in_chans, row.img_size, row.img_size
    train, test = (
        (random.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % len(row.class_names))
        for n in (210, 110)
    )
    return train, test


def idx(array: np.ndarray, number_type: int = 8) -> bytes:
    form = {8: ">u1", 12: ">i4"}[number_type]
    lengths = np.array(array.shape, ">i4").tobytes()
    return bytes([0, 0, number_type, array.ndim]) + lengths + array.astype(form).tobytes()


def mnist_files(*parts: Part) -> list[bytes]:
    arrays = [array for images, labels in parts for array in (images[:, 0], labels)]
    return [gzip.compress(idx(array), 1) for array in arrays]


def qmnist_files(*parts: Part) -> list[bytes]:
    contents = mnist_files(*parts)
    for i, (_, labels) in enumerate(parts):
        others = np.arange(7 * len(labels)).reshape(-1, 7) * 1000  # who wrote it, and more
        contents[2 * i + 1] = gzip.compress(idx(np.column_stack((labels, others)), 12))
    return contents


def emnist_files(name: str, first_label: int, *parts: Part) -> list[bytes]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for division, shift in (("digits", 3), (name, first_label)):  # the first is not asked for
            for part, (images, labels) in zip(("train", "test"), parts, strict=True):
                prefix = f"gzip/emnist-{division}-{part}"
                turned = idx(images[:, 0].swapaxes(1, 2))
                archive.writestr(f"{prefix}-images-idx3-ubyte.gz", gzip.compress(turned, 1))
                labels = gzip.compress(idx(labels + shift))
                archive.writestr(f"{prefix}-labels-idx1-ubyte.gz", labels)
    return [content.getvalue()]


def usps_files(*parts: Part) -> list[bytes]:
    contents = []
    for images, labels in parts:
        # Half a step above what is to come out, since that is rounded down.
        values = (images.reshape(-1, 256) + 0.5) / 127.5 - 1
        lines = (
            f"{label + 1} " + " ".join(f"{i}:{v:.6f}" for i, v in enumerate(row, 1)) + " \n"
            for row, label in zip(values, labels, strict=True)
        )
        contents.append(bz2.compress("".join(lines).encode()))
    return contents


def svhn_files(*parts: Part) -> list[bytes]:
    contents = []
    for images, labels in parts:
        file, labels = io.BytesIO(), np.where(labels == 0, 10, labels).astype(np.uint8)
        arrays = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]}
        savemat(file, arrays, do_compression=True)
        contents.append(file.getvalue())
    return contents


def cifar_files(folder: str, names: list[str], train: Part, test: Part) -> list[bytes]:
    """The last of `names` is of the test images; the others share those to train."""
    images = [*np.array_split(train[0], len(names) - 1), test[0]]
    labels = [*np.array_split(train[1], len(names) - 1), test[1]]
    files = {"readme.html": b"<html>"}
    for name, some, their in zip(names, images, labels, strict=True):
        columns = [their[:, None], some.reshape(len(some), -1)]
        if folder == "cifar-100-binary":
            columns.insert(0, their[:, None] % 20)  # the group
        files[name] = np.hstack(columns).astype(np.uint8).tobytes()
    return [tarred({f"{folder}/{name}": files[name] for name in sorted(files, reverse=True)})]


def tarred(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def cifar10_files(*parts: Part) -> list[bytes]:
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return cifar_files("cifar-10-batches-bin", [*batches, "test_batch.bin"], *parts)


def cifar100_files(*parts: Part) -> list[bytes]:
    return cifar_files("cifar-100-binary", ["train.bin", "test.bin"], *parts)


FILES: dict[str, Callable[..., list[bytes]]] = {
    "mnist": mnist_files,
    "fashionmnist": mnist_files,
    "kmnist": mnist_files,
    "emnist-letters": lambda *parts: emnist_files("letters", 1, *parts),
    "emnist-balanced": lambda *parts: emnist_files("balanced", 0, *parts),
    "qmnist": qmnist_files,
    "usps": usps_files,
    "svhn": svhn_files,
    "cifar10": cifar10_files,
    "cifar100": cifar100_files,
}


def write_files(row: NamedSet, contents: list[bytes], data_dir: Path) -> NamedSet:
    """Write a set's files where they belong. Returns its row with their MD5s."""
    files = []
    for file, content in zip(row.files, contents, strict=True):
        path = data_dir / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files.append(file._replace(md5=hashlib.md5(content).hexdigest()))
    return row._replace(files=tuple(files))
