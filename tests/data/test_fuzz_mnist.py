"""MNIST's files, damaged or replaced: there is one MNIST, and all else is refused in one line."""

import gzip
import os
from pathlib import Path

import pytest
from conftest import MNIST, needs_mnist
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, VERY_FEW, bounded, edited, result_or_error

from data.catalog import MNIST_FILES
from data.load import load_dataset

NAMES = [Path(file.path).stem for file in MNIST_FILES]
BOTH = {"": gzip.decompress, ".gz": bytes}  # how a file may lie there


def folder_with(raw: Path, target: str, content: bytes | None) -> None:
    """MNIST's real files in `raw`, but for `target`, which gets another content or is no file."""
    raw.mkdir(parents=True, exist_ok=True)
    for entry in list(raw.iterdir()):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    for name in NAMES:
        if not target.startswith(name):
            (raw / f"{name}.gz").symlink_to(MNIST / "MNIST" / "raw" / f"{name}.gz")
    if content is not None:
        (raw / target).write_bytes(content)


@needs_mnist
@VERY_FEW
@given(
    file=st.sampled_from(sorted(NAMES)),
    ending=st.sampled_from(sorted(BOTH)),
    edits=EDITS,
    inside=st.booleans(),
)
def test_mnist_with_a_damaged_file(tmp_path, offline, file, ending, edits, inside):
    packed = (MNIST / "MNIST" / "raw" / f"{file}.gz").read_bytes()
    if inside and "labels" in file and ending:
        content = gzip.compress(edited(gzip.decompress(packed), edits))
    else:
        content = edited(BOTH[ending](packed), edits)
    folder_with(tmp_path / "MNIST" / "raw", file + ending, content)
    with bounded(memory=600 << 20):
        data = result_or_error(load_dataset, "mnist", tmp_path)
    if not isinstance(data, str):
        assert [len(part) for part in (data.train, data.val, data.test)] == [54_000, 6_000, 10_000]
        assert data.test.labels.bincount()[:3].tolist() == [980, 1135, 1032]


@needs_mnist
@pytest.mark.parametrize("ending", BOTH)
def test_what_stands_in_a_file_of_mnists_place_is_refused_at_once(tmp_path, offline, ending):
    target = "train-images-idx3-ubyte" + ending
    raw = tmp_path / "MNIST" / "raw"
    places = {
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "link to itself": lambda path: path.symlink_to(path),
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "bomb": lambda path: path.write_bytes(gzip.compress(bytes(1 << 28), 1)),
        "large": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    }
    for place in places.values():
        folder_with(raw, target, None)
        place(raw / target)
        with bounded(memory=200 << 20):
            answer = result_or_error(load_dataset, "mnist", tmp_path)
        assert target.removesuffix(".gz") in answer
