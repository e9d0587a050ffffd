"""The published files of a data set: found or downloaded, and checked before they are read."""

import bz2
import gzip
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.request import Request, build_opener

from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write, open_to_read
from data.catalog import DataFile, NamedSet
from data.dataset import DataMissingError

TIMEOUT = 20  # seconds; a host that is silent for longer is given up
MAX_BYTES = 10**9  # of a file; the largest, EMNIST's, has 562 million
CHUNK = 2**20


@contextmanager
def open_files(row: NamedSet, data_dir: str | Path) -> Iterator[list[BinaryIO]]:
    """Open all files of a data set, downloaded first where they are missing, each checked by its
    MD5. Raises DataMissingError if one can't be had, UserError if one is damaged.
    """
    _download_missing(row, Path(data_dir))
    with ExitStack() as stack:
        yield [stack.enter_context(_open_checked(file, Path(data_dir))) for file in row.files]


def has_files(row: NamedSet, data_dir: str | Path) -> bool:
    """Whether any of a data set's files is there."""
    return any(_find(file, Path(data_dir)) for file in row.files)


def read_unpacked(file: BinaryIO, limit: int) -> bytes:
    """What an open file holds, unpacked if its name ends in .gz or .bz2. Raises UserError if that
    is more than `limit` bytes.
    """
    unpack = {".gz": gzip.open, ".bz2": bz2.open}.get(Path(file.name).suffix, nullcontext)
    with unpack(file) as unpacked:
        content = unpacked.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{file.name} is no published file: it holds more than {limit:,} bytes")
    return content


def _find(file: DataFile, data_dir: Path) -> tuple[Path, str] | None:
    """Where the file lies, unpacked or not, and the MD5 that it must have."""
    packed = data_dir / file.path
    variants = [(packed.with_suffix(""), file.unpacked_md5)] if file.unpacked_md5 else []
    variants.append((packed, file.md5))
    return next((variant for variant in variants if os.path.exists(variant[0])), None)


@contextmanager
def _open_checked(file: DataFile, data_dir: Path) -> Iterator[BinaryIO]:
    path, md5 = _find(file, data_dir)
    with open_to_read(path) as opened:
        size = os.fstat(opened.fileno()).st_size
        found = "not computed"
        if size <= MAX_BYTES:
            found = hashlib.file_digest(opened, "md5").hexdigest()
        if found != md5:
            raise UserError(
                f"{path} is damaged: {size} bytes with MD5 {found}, expected MD5 {md5}; delete it "
                "to have it downloaded again, or put a good copy there"
            )
        opened.seek(0)
        yield opened


# --------------------------------------------------------------------------------------- download


def _download_missing(row: NamedSet, data_dir: Path) -> None:
    missing = [file for file in row.files if _find(file, data_dir) is None]
    if not missing:
        return
    folder = (data_dir / missing[0].path).parent  # of all
    made = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    try:
        for file in list(missing):
            _download(file, data_dir / file.path)
            missing.remove(file)
    except Exception as error:  # whatever a host, a proxy or the disk comes up with
        with suppress(OSError):  # of use only if a file has come
            for parent in made:
                parent.rmdir()
        names = ", ".join(f"{Path(file.path).name} (MD5 {file.md5})" for file in missing)
        raise DataMissingError(
            f"put what is missing of {row.title} into {folder}: {names}; it cannot be downloaded: "
            f"{_reason(error)}"
        ) from None


def _download(file: DataFile, path: Path) -> None:
    """Fetch a file from the first host that has it. Raises the last one's error if none has."""
    for number, url in enumerate(file.urls, 1):
        try:
            return _fetch(url, path, file.md5)
        except Exception:
            if number == len(file.urls):
                raise


class _TransferError(Exception):
    """What came is not the file. Not an OSError, which `atomic_write` would blame on the disk."""


def _fetch(url: str, path: Path, md5: str) -> None:
    request = Request(url, headers={"User-Agent": "vit-mnist"})  # some refuse Python's own
    opened = build_opener().open(request, timeout=TIMEOUT)  # asks the environment for a proxy
    with opened as response, atomic_write(path) as temporary:
        digest, size = hashlib.md5(), 0
        bar = tqdm(total=response.length, desc=path.name, unit="B", unit_scale=True, disable=None)
        with bar, open(temporary, "wb") as out:
            for chunk in _chunks(response):
                size += len(chunk)
                if size > MAX_BYTES:
                    raise _TransferError(f"{url} sends more than {MAX_BYTES:,} bytes")
                digest.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != md5:
            raise _TransferError(f"{url} sent {size:,} bytes with another MD5")


def _chunks(response: BinaryIO) -> Iterator[bytes]:
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except OSError as error:
        raise _TransferError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    cause = getattr(error, "reason", error)  # urllib wraps the system's errors
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return "".join(filter(str.isprintable, " ".join(text.split())))[:150]
