"""Prepared images in a file, which is mapped into memory when they are needed again.

Two files, `<name>.npy` with the images and `<name>.json` with what is known of each file, are
written whole, the second last. Its name has a hash of what the images depend on: paths, sizes and
times of the files, and the settings. Both have a checksum, since half a cache looks like a whole
one. The folder may be a stranger's: what its cache can do at worst is to have other images in it.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.files import atomic_write, check_writable, read_bytes, write_text
from data.decode import lies_in_the_file

VERSION = 2  # of the files, and of what `decode` and `_arrange` make: raise it when that changes
STEP_BYTES = 2**24  # that are copied or summed at a time
LEFTOVER_AGE = 86_400  # seconds after which what a killed process was writing is removed


class Cached(NamedTuple):
    """What a cache holds.

    Attributes:
        answers: of each listed file its hash, or why it isn't used.
        images: uint8 (n, C, S, S), of those that are used.
    """

    answers: list[int | str]
    images: np.ndarray


class Place(NamedTuple):
    """Where the cache of a folder is, for some content of it and some settings."""

    folder: Path
    prefix: str  # of the names of all caches of the folder of images
    key: str
    wanted: bool  # someone named this place

    @property
    def array(self) -> Path:
        return self.folder / f"{self.prefix}{self.key}.npy"

    @property
    def index(self) -> Path:
        return self.folder / f"{self.prefix}{self.key}.json"

    def others(self) -> list[Path]:
        """Files of other caches of the same folder of images."""
        found = self.folder.glob(f"{self.prefix}*")
        return [path for path in found if path not in (self.array, self.index)]


def find_place(data_dir: Path, cache_dir: str | Path | None, depends_on: Any) -> Place:
    """Where images from `data_dir` are kept: in it, or in `cache_dir`.

    Args:
        depends_on: all that they depend on, but their size, as JSON can have it.
    """
    key = _hash(json.dumps(depends_on).encode())
    if cache_dir is None:
        return Place(data_dir, ".vit-cache-", key, wanted=False)
    whose = _hash(os.fsencode(data_dir.resolve()))  # several folders may have theirs there
    return Place(Path(cache_dir), f"vit-cache-{whose}-", key, wanted=True)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def can_write(place: Place) -> bool:
    """Whether a cache can be written. Raises UserError if not, and it is `wanted` there."""
    with _saving(place):
        check_writable(place.array)
        return True
    return False


@contextmanager
def _saving(place: Place) -> Iterator[None]:
    """A note on stderr is enough if a cache can't be written, unless it is `wanted`."""
    try:
        yield
    except UserError as error:
        if place.wanted:
            raise
        reason = str(error).partition(";")[0]
        print(
            f"note: {reason}: the images are read anew by each run; --cache_dir names a folder to "
            "keep them in",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------------------- read


def load(
    place: Place, data_dir: Path, files: Sequence[str], img_size: int | None, in_chans: int | None
) -> Cached | None:
    """The cache, mapped into memory; None, with a note on stderr, if what is there is of other
    files or settings, of another version or damaged, and without one if nothing is there.

    Args:
        files: all that are listed in `data_dir`.
        img_size: side of the images; None: it was found from the images.
        in_chans: their channels; None: the same.
    """
    if os.path.exists(place.index) or os.path.exists(place.array):
        try:
            index, images = _read(place, len(files))
        except Exception:  # whatever a damaged file brings up
            _note(place, "is damaged or half written")
            return None
        if index["version"] != VERSION:
            _note(place, "is of another version of this project")
            return None
        answers = zip(files, index["answers"], strict=True)
        refused = [name for name, a in answers if isinstance(a, str) and not lies_in_the_file(a)]
        if any(_can_open(data_dir / name) for name in refused):
            _note(place, "lacks images that could not be read when it was made")
            return None
        # What was found from the images does for who asks for just that.
        sizes = zip((img_size, in_chans), index["sizes"], images.shape[2:0:-1], strict=True)
        if all(asked == was or (was is None and asked == found) for asked, was, found in sizes):
            return Cached(index["answers"], images)
    elif not place.others():
        return None
    _note(place, "is of other files or settings")
    return None


def _can_open(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def _read(place: Place, num_files: int) -> tuple[dict[str, Any], np.ndarray]:
    """The two files. Raises an exception of some kind if they are damaged."""
    head, _, text = read_bytes(place.index, 10_000 + 500 * num_files).partition(b"\n")
    index = json.loads(text)
    images = np.lib.format.open_memmap(place.array, mode="c")
    _, channels, height, width = images.shape
    sound = int(head, 16) == zlib.crc32(text) and index["crc32"] == _crc32(images)
    sound &= channels in (1, 3) and height == width and images.dtype == np.uint8
    sound &= len(index["answers"]) == num_files and all(map(_is_answer, index["answers"]))
    sound &= len(index["sizes"]) == 2 and type(index["version"]) is int
    if not sound:
        raise ValueError
    return index, images


def _note(place: Place, what: str) -> None:
    print(f"note: the cache in {place.folder} {what}: all images are read anew", file=sys.stderr)


def _is_answer(value: object) -> bool:
    return 0 <= value < 2**64 if type(value) is int else isinstance(value, str)


def _crc32(images: np.ndarray) -> int:
    checksum, step = 0, _step(images)
    for start in range(0, len(images), step):
        checksum = zlib.crc32(images[start : start + step], checksum)
    return checksum


def _step(images: np.ndarray) -> int:
    """How many images are some megabytes."""
    return max(1, STEP_BYTES // images[0].nbytes)


# ------------------------------------------------------------------------------------------ write


class Spool:
    """Images in a file without a name or in memory, until their order is known."""

    def __init__(self, place: Place | None) -> None:
        self._place = place
        self._file = io.BytesIO()
        if place is not None:
            self._file = tempfile.TemporaryFile(dir=place.folder)  # noqa: SIM115 see __exit__

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what is left to be written is of no use
            self._file.close()

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()

    def add(self, image: np.ndarray) -> None:
        """Raises UserError if it can't be written."""
        with self._telling():
            self._file.write(image.tobytes())

    def images(self, *shape: int) -> np.ndarray:
        """All that was added, uint8 (n, *shape); from a file, of use until the spool is closed.
        Raises UserError if it can't be written.
        """
        if self._place is None:
            return np.frombuffer(self._file.getvalue(), np.uint8).reshape(-1, *shape)
        with self._telling():
            self._file.flush()
        return np.memmap(self._file, np.uint8, "r").reshape(-1, *shape)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._place.folder} cannot be written: {error.strerror or error}; free some "
                "space, or name another place with --cache_dir"
            ) from None


def save(
    place: Place,
    answers: list[int | str],
    images: np.ndarray,
    order: np.ndarray,
    img_size: int | None,
    in_chans: int | None,
) -> bool:
    """Write a cache, and remove the others of the same folder of images; whether that was done.
    Raises UserError if not, and it is `wanted` there.

    Args:
        images: (n, C, S, S), of which those at `order` are written.
        img_size, in_chans: what was asked for, see `load`.
    """
    with _saving(place):
        _write(place, answers, images, order, [img_size, in_chans])
        return True
    return False


def _write(
    place: Place,
    answers: list[int | str],
    images: np.ndarray,
    order: np.ndarray,
    sizes: list[int | None],
) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(order), *images.shape[1:])}
    checksum, step = 0, _step(images)
    with atomic_write(place.array) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(order), step):
            part = np.ascontiguousarray(images[order[start : start + step]])
            checksum = zlib.crc32(part, checksum)
            file.write(part)
    index = {"version": VERSION, "crc32": checksum, "sizes": sizes}
    text = json.dumps({**index, "answers": answers})
    try:
        write_text(place.index, f"{zlib.crc32(text.encode()):08x}\n{text}")
    except UserError:
        place.array.unlink(missing_ok=True)  # of no use alone
        raise
    now = time.time()
    unfinished = place.folder.glob(f".{place.prefix}*.tmp.*")  # as atomic_write calls them
    with suppress(OSError):  # in use, on Windows
        for path in place.others():
            path.unlink()
        for path in unfinished:
            if now - path.stat().st_mtime > LEFTOVER_AGE:
                path.unlink()
