"""Files that are whole or not there: no crash, full disk or Ctrl-C leaves half of one."""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cli import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; once the block has filled it, rename it to `path`.

    Raises:
        UserError: the folder or the file can't be written. What stood at `path` is still there.
    """
    path = Path(path).resolve()  # a symbolic link stays, and what it names is replaced
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        _make_room(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # gone already, or its folder never was there
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all. Raises UserError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def check_writable(path: str | Path) -> None:
    """Raise UserError now, rather than after an hour, if the file `path` can't be written later."""
    path = Path(path).resolve()
    try:
        _make_room(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from None


def _make_room(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # renaming over a device would put a file there
        raise OSError(None, "it is a folder or a device")


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror or error}; name another place")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done, so that files which belong together agree."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    held = []
    previous = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        raise KeyboardInterrupt
