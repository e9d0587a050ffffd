"""Files that are whole or not there: no crash, full disk or Ctrl-C leaves half of one.

A folder can be held by one process.
"""

import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError

_TEMPORARY = ".tmp"  # in the names of files that are being written


@contextmanager
def replacing(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path`; once the block has filled it, rename it to `path`.

    It is on the disk before it takes the name, and what stood there becomes `keep` if that is
    given: so one good file is there at any time, whatever fails.

    Raises:
        UserError: the folder or the file can't be written. What stood at `path` is still there.
    """
    path = Path(path).resolve()  # a symbolic link stays, and what it names is replaced
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{_TEMPORARY}{path.suffix}")
    try:
        _make_room(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # gone already, or its folder never was there
            temporary.unlink()


def write_text(path: str | Path, text: str, keep: str | Path | None = None) -> None:
    """Write `text` to `path`, whole or not at all. `keep` and UserError: as in `replacing`."""
    with replacing(path, keep) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, data: Any, keep: str | Path | None = None) -> None:
    """Write `data` to `path` as indented JSON, like `write_text`."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n", keep)


def check_writable(path: str | Path) -> None:
    """Raise UserError now, rather than after an hour, if the file `path` can't be written later."""
    path = Path(path).resolve()
    try:
        _make_room(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from None


def _sync_folder(folder: Path) -> None:
    """Have the folder's new names on the disk, where a folder can be opened for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keep other processes from holding `folder`; the system lets go of it when this one ends.

    What a killed process left half written in it is removed.

    Raises:
        UserError: another process holds it, or it can't be written.
    """
    path = Path(folder).resolve() / ".lock"
    try:
        _make_room(path)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 closed below
    except OSError as error:
        raise _cannot_write(path, error) from None
    with file:
        if not _lock(file):
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise UserError(
                f"{folder} is in use by another run (process {holder}): wait for it, or name "
                "another folder with --save_dir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for left in path.parent.glob(f".*.*{_TEMPORARY}.*"):
            with suppress(OSError):
                left.unlink()
        yield


def _lock(file: TextIO) -> bool:
    """Lock an open file, without waiting; False if another process has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows, where a process's locks end with it as well
        import msvcrt

        try:
            file.seek(1000)  # beyond what is read of it: a locked byte can't be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        print(f"note: {file.name} cannot be locked: {error.strerror}", file=sys.stderr)
    return True


def _make_room(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # renaming over a device would put a file there
        raise OSError(None, "it is a folder or a device")


def _cannot_write(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some space" if full else "name another place"
    return UserError(f"{path} cannot be written: {error.strerror or error}; {advice}")
