"""Pictures from strangers: each is read as a digit or refused in one line, within bounds."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, bounded, edited, result_or_error
from PIL import Image

from data.pictures import FORMATS
from deploy import digit_image


def saved(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def pictures() -> dict[str, bytes]:
    """A 3, dark on light, in every mode and format that is read."""
    digit = np.ones((20, 20), dtype=np.float32)
    digit[3:5, 5:14] = digit[9:11, 6:14] = digit[15:17, 5:14] = digit[3:17, 13:15] = 0
    grey = Image.fromarray((255 * digit).astype(np.uint8))
    modes = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I"]
    images = {mode: grey.convert("RGB").convert(mode) for mode in modes}
    images["I;16"] = Image.fromarray((65535 * digit).astype(np.uint16))
    digit[0, :4] = [np.nan, np.inf, -np.inf, 1e38]
    images["F"] = Image.fromarray(digit)
    images["one pixel"] = Image.new("L", (1, 1))
    images["one row"] = Image.new("RGB", (50, 1), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {}
    for kind in FORMATS:
        for mode, image in images.items():
            options = {"save_all": True, "append_images": [image] * 3} if mode == "P" else {}
            for extra in (options, {"exif": exif, **options}):
                try:
                    made[f"{kind} {mode}"] = saved(image, kind, **extra)
                except Exception:  # most formats know few modes
                    continue
    for compression in ("tiff_deflate", "tiff_lzw", "packbits", "group4", "jpeg"):
        image = images["1" if compression == "group4" else "L"]
        made[f"TIFF {compression}"] = saved(image, "TIFF", compression=compression)
    return made


PICTURES = pictures()


def refusal(content: bytes, path: Path) -> str:
    """Read it: the error's text, none for a digit."""
    path.write_bytes(content)
    with bounded(memory=800 << 20):
        reading = result_or_error(digit_image.read_digits, path, single=True)
    if isinstance(reading, str):
        return reading
    digit = reading.digits[0].pixels
    assert digit.shape == (28, 28) and digit.dtype == np.uint8 and digit.max() > 100
    return ""


@given(kind=st.sampled_from(sorted(PICTURES)), edits=EDITS)
def test_image_files_with_damaged_bytes(tmp_path, kind, edits):
    refusal(edited(PICTURES[kind], edits), tmp_path / "image")


def test_image_files_as_they_are(tmp_path):
    answers = {k: refusal(v, tmp_path / "image") for k, v in PICTURES.items()}
    for kind in ("PNG L", "PNG RGBA", "PNG I;16", "JPEG CMYK", "TIFF F", "TIFF group4", "GIF P"):
        assert not answers[kind]
    assert "blank" in answers["PNG one pixel"]


def png(width: int, height: int, depth: int, color: int, pixels: bytes, *chunks: bytes) -> bytes:
    """A PNG whose header may say what it likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(each[:4], each[4:]) for each in chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


def tiff_that_claims(tag: int, value: int) -> bytes:
    """A small TIFF in which one entry of the directory says another number."""
    content = bytearray(saved(Image.new("L", (20, 20)), "TIFF"))
    (at,) = struct.unpack_from("<I", content, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", content, at)[0], 12):
        if struct.unpack_from("<H", content, entry)[0] == tag:
            struct.pack_into("<HII", content, entry + 2, 4, 1, value)
    return bytes(content)


BOMBS = {
    "claims 10^9 a side": lambda: png(10**9, 10**9, 8, 0, zeros(100)),
    "claims 10,000 a side": lambda: png(10_000, 10_000, 8, 2, zeros(100)),
    "claims 2^31 - 1 by 1": lambda: png(2**31 - 1, 1, 8, 0, zeros(100)),
    "no pixels": lambda: png(0, 0, 8, 0, zeros(100)),
    "16-bit colours": lambda: png(10_000, 5_000, 16, 2, zeros(5_000 * 60_001)),
    "pixels past the end": lambda: png(28, 28, 8, 0, zeros(1 << 28)),
    "text": lambda: png(28, 28, 8, 0, zeros(28 * 29), b"zTXtx\0\0" + zeros(1 << 28)),
    "texts": lambda: png(28, 28, 8, 0, zeros(784 + 28), *[b"zTXtx\0\0" + zeros(1 << 20)] * 100),
    "profile": lambda: png(28, 28, 8, 0, zeros(28 * 29), b"iCCPx\0\0" + zeros(1 << 28)),
    "exif": lambda: png(28, 28, 8, 0, zeros(28 * 29), b"eXIf" + b"II*\0\x08\0\0\0\xff\xff" * 9),
    "many frames": lambda: saved(
        Image.new("P", (20, 20)), "GIF", save_all=True, append_images=[Image.new("P", (9, 9))] * 100
    ),
    "TIFF's width": lambda: tiff_that_claims(256, 2**31 - 1),
    "TIFF's rows": lambda: tiff_that_claims(257, 9_999),
    "TIFF's strip": lambda: tiff_that_claims(278, 2**32 - 1),
    "TIFF's samples": lambda: tiff_that_claims(277, 2**16),
    "TIFF's strip length": lambda: tiff_that_claims(279, 2**32 - 1),
    "largest, 16 bits": lambda: png(10_000, 5_000, 16, 0, zeros(5_000 * 20_001)),
    "largest, colours and alpha": lambda: png(10_000, 5_000, 8, 6, zeros(5_000 * 40_001)),
    "largest, floats": lambda: saved(
        Image.fromarray(np.zeros((10_000, 5_000), np.float32)), "TIFF", compression="tiff_deflate"
    ),
}
SLOW = [pytest.param(bomb, marks=pytest.mark.slow) for bomb in BOMBS if "largest" in bomb]


@pytest.mark.parametrize("bomb", [*(bomb for bomb in BOMBS if "largest" not in bomb), *SLOW])
def test_small_image_files_that_want_much_memory(tmp_path, bomb):
    assert refusal(BOMBS[bomb](), tmp_path / "image") or "past" in bomb


def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, which runs it."""
    for program in ("gs", "gswin64c"):
        (tmp_path / program).write_text(f"#!/bin/sh\necho ran > {tmp_path}/ran\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n{} loop\n%%EOF\n"
    assert "cannot be read" in refusal(program, tmp_path / "image")
    assert not (tmp_path / "ran").exists()
