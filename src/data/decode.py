"""Reads image files in processes of their own: all cores share the work, and none dies of a file.

multiprocessing would import the main script in each of them, and PyTorch with it. These are small
programs: a line of JSON with paths goes in, a line of JSON and then the pixels come out. They end
when their stdin does, and so with the process that started them, however that ends.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import startup
from common.errors import UserError
from data.pictures import prepare, read_picture

MAX_BYTES = 2**28  # of a file; no picture that is small enough to be read takes more
MIN_SIDE = 2  # pixels; what is a pixel wide counts visits of a page, and shows nothing
# A JPEG is decoded at a size at least so many times the image's; `prepare` does the rest.
DRAFT = 3
MAX_TOGETHER, BYTES_TOGETHER = 64, 2**20  # files, and their pixels, for which a process is asked
SRC = Path(__file__).resolve().parents[1]
# How the reasons begin that lie in a file itself, unless its reader was killed.
LASTING = ("cannot be read: damaged", "is too large", "is too small", "ended the process")
KILLED = "(status -9)"  # by the system, as where memory is short
READY = b"ready\n"  # what a reader prints before its first answer
PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from data import decode; decode.serve()"


class Picture(NamedTuple):
    """What is kept of a file."""

    hash: int  # 64 bits that tell its bytes from all others
    size: tuple[int, int]  # width and height of the upright picture
    pixels: np.ndarray  # uint8 (C, S, S)


def lies_in_the_file(reason: str) -> bool:
    """Whether another try would meet the same reason why a file can't be used."""
    return reason.startswith(LASTING) and not reason.endswith(KILLED)


def decode(path: str, img_size: int, in_chans: int | None, resize: str) -> Picture:
    """Read one file. Raises UserError, with a reason that follows the file's name, if it can't be
    used.

    Args:
        in_chans: None: one channel if all are equal, else three.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"is too large: expected at most {MAX_BYTES // 2**20} MB")
    image, size = read_picture(io.BytesIO(content), "", DRAFT * img_size)
    if min(size) < MIN_SIDE:
        raise UserError(
            f"is too small: {size[0]}x{size[1]} pixels, expected at least {MIN_SIDE} a side"
        )
    pixels = prepare(image, img_size, in_chans or 3, resize)
    if in_chans is None and (pixels == pixels[0]).all():
        pixels = pixels[:1]
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return Picture(int.from_bytes(digest, "little"), size, pixels)


def decode_files(paths: Sequence[str], **how: Any) -> Iterator[Picture | str]:
    """The pictures in these files, in their order; where there is none, a text that says why.

    Close it (contextlib.closing) where it isn't read to its end.

    Args:
        how: the other arguments of `decode`.
    """
    together = BYTES_TOGETHER // (3 * how["img_size"] ** 2)
    together = max(1, min(MAX_TOGETHER, together))
    parts = [paths[i : i + together] for i in range(0, len(paths), together)]
    readers = _start_readers(min(startup.cores(), len(parts)), how)
    idle, ahead = list(readers), deque()

    def read(part: Sequence[str]) -> list[Picture | str]:
        reader = idle.pop()  # there are as many threads as readers
        answers = reader.read(part)
        idle.append(reader)
        return answers

    with ThreadPoolExecutor(max(1, len(readers))) as pool:
        try:
            tasks = iter(parts)
            ahead.extend(pool.submit(read, part) for part in islice(tasks, 4 * len(readers)))
            while ahead:
                yield from ahead.popleft().result()
                ahead.extend(pool.submit(read, part) for part in islice(tasks, 1))
        finally:
            for task in ahead:
                task.cancel()
            for reader in readers:
                reader.stop()


def _start_readers(count: int, how: dict[str, Any]) -> list["_Reader"]:
    """So many readers, or half as many as the system allows, which leaves room for their threads.
    Raises UserError if it allows none.
    """
    readers = []
    for _ in range(count):
        try:
            readers.append(_Reader(how))
        except UserError:
            if not readers:
                raise
            for _ in range(len(readers) // 2):
                readers.pop().stop()
            break
    return readers


class _Reader:
    """A process that reads files, and is replaced if it dies of one."""

    def __init__(self, how: dict[str, Any]) -> None:
        self._how, self._stopped = how, False
        self._start()

    def _start(self) -> None:
        """Raises UserError if the system allows no other process."""
        self._ready = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(SRC)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Ctrl-C in a terminal is for the process that started it.
                process_group=None if os.name == "nt" else 0,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"no process to read images can be started: {reason}") from None

    def read(self, paths: Sequence[str]) -> list[Picture | str]:
        try:
            return self._ask(paths)
        except (EOFError, BrokenPipeError):
            status = self._end()
            if self._stopped or status in (0, 1):  # 1: an exception that it has printed
                raise RuntimeError("a process that reads images has ended") from None
        self._start()
        if len(paths) == 1:
            return [f"ended the process that read it (status {status})"]
        return [answer for path in paths for answer in self.read([path])]

    def _ask(self, paths: Sequence[str]) -> list[Picture | str]:
        self._process.stdin.write(json.dumps([paths, self._how]).encode() + b"\n")
        self._process.stdin.flush()
        while not self._ready:  # what a site's own start-up code prints comes before
            self._ready = self._read(None) == READY
        answers, side = [], self._how["img_size"]
        for answer in json.loads(self._read(None)):
            if isinstance(answer, list):
                number, size, channels = answer
                pixels = np.frombuffer(self._read(channels * side**2), np.uint8)
                answer = Picture(number, tuple(size), pixels.reshape(channels, side, side))
            answers.append(answer)
        return answers

    def _read(self, size: int | None) -> bytes:
        """So many bytes; None: a line."""
        output = self._process.stdout
        data = output.readline() if size is None else output.read(size)
        if not data.endswith(b"\n") if size is None else len(data) < size:
            raise EOFError
        return data

    def stop(self) -> None:
        self._stopped = True
        self._process.kill()
        self._end()

    def _end(self) -> int:
        """Wait for the process's end; its status."""
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what is left to be written has no reader
                pipe.close()
        return status


def serve() -> None:
    """What such a process does: answer what `_Reader` asks, until there is no more of it."""
    output = open(os.dup(1), "wb")  # noqa: SIM115 as long as the process lives
    os.dup2(2, 1)  # for all else that prints
    output.write(b"\n" + READY)
    output.flush()
    for line in sys.stdin:
        paths, how = json.loads(line)
        answers, pixels = [], []
        for path in paths:
            try:
                picture = decode(path, **how)
            except UserError as error:
                answers.append(str(error).partition(";")[0].strip())
            except MemoryError:
                answers.append("needs more memory than is free")
            else:
                answers.append([picture.hash, picture.size, len(picture.pixels)])
                pixels.append(picture.pixels.tobytes())
        try:
            output.write(b"".join([json.dumps(answers).encode(), b"\n", *pixels]))
            output.flush()
        except BrokenPipeError:  # who asked is gone; without Python's own words on that
            os._exit(1)
