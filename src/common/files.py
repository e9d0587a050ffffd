"""Files that are written whole or not at all, and folders that one process has for itself."""

import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from common.errors import UserError

_TEMPORARY = ".tmp"  # in the names of files that are being written


@contextmanager
def atomic_write(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; once the block has written to it, rename it to `path`.

    The new file is on the disk before it is renamed, and the old one stays as `keep` if that is
    given. So `path` is a complete file, new or old, at any time. Raises UserError if the folder
    or the file can't be written. The old file is still there.
    """
    # A symbolic link is kept, the file that it points to replaced.
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{_TEMPORARY}{path.suffix}")
    try:
        _make_room(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep_as(path, Path(keep))
        os.replace(temporary, path)
        with suppress(OSError):  # the new name is on the disk, where a folder can be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # renamed, or never created
            temporary.unlink()


def _keep_as(path: Path, kept: Path) -> None:
    """Give a file a second name; only that where the file system knows no hard links."""
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        os.replace(path, kept)


def write_text(path: str | Path, text: str, keep: str | Path | None = None) -> None:
    """Write `text` to `path`. `keep` and UserError: as in `atomic_write`."""
    with atomic_write(path, keep) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_bytes(
    path: str | Path, content: bytes | memoryview, keep: str | Path | None = None
) -> None:
    """Write `content` to `path`. `keep` and UserError: as in `atomic_write`."""
    with atomic_write(path, keep) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, data: Any, keep: str | Path | None = None) -> None:
    """Write `data` to `path` as indented JSON. `keep` and UserError: as in `atomic_write`."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n", keep)


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """At most `limit` bytes of a file. Raises UserError if it can't be read, or may never end."""
    with open_to_read(path) as file:
        return file.read(limit)


@contextmanager
def open_to_read(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes. Raises UserError if it can't be read, or may never end."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(None, "it is a folder or a device")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def check_writable(path: str | Path) -> None:
    """Raise UserError at once if `path` can't be written, rather than after an hour of training."""
    path = Path(os.path.realpath(path))
    try:
        _make_room(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Keep other processes from using `folder` until the block, or this process, has ended.

    Half-written files of killed processes are removed from it. A file system without locks gives no
    protection; a note on stderr says so. Raises UserError if another process uses the folder, or it
    can't be written.
    """
    path = Path(os.path.realpath(folder), ".lock")
    pid_path = path.with_name(".lock.pid")  # filelock does not tell which process has the lock
    check_writable(path)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pid = ""
        with suppress(OSError):
            pid = pid_path.read_text(encoding="utf-8").strip()
        raise UserError(
            f"{folder} is in use by another run (process {pid or 'unknown'}): wait for it, or name "
            "another folder with --save_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "filename", None):  # it could not be opened, let alone locked
            raise cannot_write(path, error) from None
        print(f"note: {path} cannot be locked: {error}", file=sys.stderr)
    try:
        with suppress(OSError):
            pid_path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        for unfinished in path.parent.glob(f".*.*{_TEMPORARY}.*"):
            with suppress(OSError):
                unfinished.unlink()
        yield
    finally:
        with suppress(OSError):
            pid_path.unlink()
        lock.release()


def _make_room(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OSError(None, "a part of its path is a file, not a folder") from None
    if path.exists() and not path.is_file():  # renaming would replace a device by a file
        raise OSError(None, "it is a folder or a device")


def cannot_write(path: Path, error: OSError) -> UserError:
    """One line that says why, and what helps."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some space" if full else "name another place"
    return UserError(f"{path} cannot be written: {error.strerror or error}; {advice}")
