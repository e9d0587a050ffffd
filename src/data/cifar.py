"""CIFAR-10 and CIFAR-100, from their binary archives.

An archive is a tar.gz of files of records: a byte for the class, in CIFAR-100 after one for the
class's group, then 32x32 bytes of red, green and blue each.
"""

import tarfile
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from common.errors import UserError
from data.dataset import Split, to_split

MAX_BYTES = 160_000_000  # of a file; the largest, CIFAR-100's train.bin, has 153,700,000


def read_cifar10(archive: BinaryIO) -> tuple[Split, Split]:
    """What is to train and to test."""
    batches = [f"data_batch_{number}.bin" for number in range(1, 6)]
    contents = _read_members(archive, [*batches, "test_batch.bin"])
    train = b"".join(contents[name] for name in batches)
    return _read_records(train, 1), _read_records(contents["test_batch.bin"], 1)


def read_cifar100(archive: BinaryIO) -> tuple[Split, Split]:
    """What is to train and to test, with the 100 fine classes."""
    contents = _read_members(archive, ["train.bin", "test.bin"])
    return _read_records(contents["train.bin"], 2), _read_records(contents["test.bin"], 2)


def _read_members(archive: BinaryIO, names: list[str]) -> dict[str, bytes]:
    """The files with these names, in memory: nothing is written."""
    contents = {}
    with tarfile.open(fileobj=archive, mode="r|gz", bufsize=2**20) as members:  # in one pass
        for member in members:
            name = PurePosixPath(member.name).name
            if name not in names:
                continue
            if member.size > MAX_BYTES:
                raise UserError(
                    f"{archive.name} is no published file: its {name} claims to have "
                    f"{member.size:,} bytes"
                )
            contents[name] = members.extractfile(member).read()
    return contents


def _read_records(content: bytes, label_bytes: int) -> Split:
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return to_split(images, records[:, label_bytes - 1])
