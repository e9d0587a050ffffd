"""The pictures that `--image` names: files, folders of them, one on stdin."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from common.errors import UserError
from common.text import printable
from data.decode import MAX_BYTES
from data.pictures import has_image_name

STDIN = "-"
Read = TypeVar("Read")


def list_images(names: list[str]) -> list[str]:
    """The names, with each folder replaced by the pictures directly in it, sorted by name. Raises
    UserError if a folder can't be read or holds no picture, or "-" is named twice.
    """
    if names.count(STDIN) > 1:
        raise UserError(f"--image {STDIN} given {names.count(STDIN)} times: stdin is one image")
    images = []
    for name in names:
        if name == STDIN or not os.path.isdir(name):
            images.append(name)
            continue
        try:
            inside = [
                str(path)
                for path in sorted(Path(name).iterdir())
                if has_image_name(path.name) and not path.name.startswith(".") and path.is_file()
            ]
        except OSError as error:
            raise UserError(f"folder {name} cannot be read: {error.strerror}") from None
        if not inside:
            raise UserError(
                f"folder {name} has no images in it (folders in it are not searched): "
                "name one that has, or the files"
            )
        images += inside
    return images


def read_each(
    names: Sequence[str], read: Callable[[str | BinaryIO, str], Read]
) -> Iterator[Read | UserError]:
    """What `read(source, what)` makes of each picture, or why it could not be read.

    Args:
        read: of a path or an open file, and of what messages call it.
    """
    for name in tqdm(names, desc="reading", unit="image", leave=False, disable=None):
        try:
            source, what = (_read_stdin(), "on stdin") if name == STDIN else (name, printable(name))
            yield read(source, f"image {what}")
        except UserError as error:
            yield error


def _read_stdin() -> io.BytesIO:
    if sys.stdin is None:
        raise UserError("image on stdin: stdin is closed")
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"image on stdin is larger than {MAX_BYTES // 2**20} MB: scale it down")
    return io.BytesIO(content)
