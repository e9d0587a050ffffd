"""Pictures of any kind become images of a data set: upright, of one size, with what they show."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFilter, ImageOps

from common.errors import UserError
from data.pictures import MAX_SIDE, has_image_name, prepare, read_picture

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def through_file(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return read_picture(file, "image x")[0]


def prepared(
    image: Image.Image, side: int = 32, chans: int = 3, resize: str = "crop"
) -> np.ndarray:
    pixels = prepare(through_file(image), side, chans, resize)
    assert pixels.shape == (chans, side, side) and pixels.dtype == np.uint8
    return pixels


# ----------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_an_image_of_the_right_size_keeps_its_pixels(resize):
    image = Image.fromarray(NOISE)
    assert np.array_equal(prepared(image, resize=resize), NOISE.transpose(2, 0, 1))
    grey = image.convert("L")
    assert np.array_equal(prepared(grey, chans=1, resize=resize)[0], np.asarray(grey))
    assert np.array_equal(prepared(grey, resize=resize)[1], np.asarray(grey))
    opaque = image.convert("RGBA")
    assert np.array_equal(prepared(opaque, resize=resize), NOISE.transpose(2, 0, 1))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("factor", [1, 10, 0.25])
def test_crop_takes_the_middle_pad_all_of_it_and_stretch_all_of_the_square(factor, turned):
    """A picture three times as wide as high, in a red, a green and a blue square, on its side."""
    side = round(40 * factor)
    colours = [Image.new("RGB", (side, side), c) for c in ("red", "lime", "blue")]
    image = Image.fromarray(np.hstack([np.asarray(c) for c in colours]))
    image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
    crop = prepared(image)
    assert crop[1].min() > 250 and crop[0].max() < 5
    rows = (0, 2, 1) if turned else (0, 1, 2)  # along the length from left, or from below
    stretched = prepared(image, side=30, resize="stretch").transpose(rows)
    padded = prepared(image, side=30, resize="pad").transpose(rows)
    bands = [slice(2, 8), slice(12, 18), slice(22, 28)]
    order = (2, 1, 0) if turned else (0, 1, 2)
    for channel, band in zip(order, bands, strict=True):
        for pixels, height in ((stretched, slice(0, 30)), (padded, slice(11, 19))):
            assert pixels[channel][height, band].min() > 240
            others = [c for c in range(3) if c != channel]
            assert pixels[others][:, height, band].max() < 15
    frame = np.concatenate((padded[:, :9], padded[:, 21:]), axis=1)
    assert np.ptp(frame.reshape(3, -1), axis=1).max() == 0  # one colour, of the border's mean
    # Of 80 pixels of the border 20 and 10 are red, 20 green.
    assert frame[:, 0, 0].tolist() == pytest.approx([255 * n / 80 for n in (30, 20, 30)], abs=2)


def test_shrinking_averages_and_leaves_no_moire():
    """One-pixel stripes become even grey, wherever they are sampled; also in a large JPEG."""
    stripes = np.zeros((960, 960), dtype=np.uint8)
    stripes[:, ::2] = 255
    for width in (960, 957, 931):
        image = Image.fromarray(stripes[:, :width])
        assert np.abs(prepared(image, 64, 1).astype(int) - 127)[..., 1:-1].max() <= 4
    rough = Image.fromarray(NOISE).resize((960, 960)).filter(ImageFilter.GaussianBlur(5))
    file = io.BytesIO()
    rough.save(file, "JPEG", quality=95)
    whole = prepare(read_picture(file, "x")[0], 64, 3, "crop").astype(int)
    fast = prepare(read_picture(file, "x", side=3 * 64)[0], 64, 3, "crop").astype(int)
    assert read_picture(file, "x", side=3 * 64)[0].size == (240, 240)  # a quarter, decoded at once
    assert np.abs(whole - fast).max() <= 8
    expected = np.asarray(rough.resize((64, 64), Image.Resampling.BOX)).transpose(2, 0, 1)
    assert np.abs(whole - expected).mean() < 3


def test_small_and_odd_sizes_are_enlarged():
    for size in ((1, 1), (2, 900), (900, 2), (3, 5), (31, 33)):
        for resize in ("crop", "pad", "stretch"):
            for side in (8, 33):
                flat = prepared(Image.new("RGB", size, (9, 99, 199)), side, 3, resize)
                assert np.array_equal(flat[:, 0, 0], [9, 99, 199]) and np.ptp(flat[0]) == 0


# ------------------------------------------------------------------------------------------ modes


def test_every_mode_shows_what_it_shows():
    ramp = np.tile(np.linspace(20, 230, 32).astype(np.uint8), (32, 1))
    grey = Image.fromarray(ramp)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    modes = {mode: grey.convert("RGB").convert(mode) for mode in ("L", "LA", "RGB", "RGBA")}
    palette = grey.convert("P", palette=Image.Palette.ADAPTIVE)
    for mode, image in {**modes, "I;16": deep, "P": palette}.items():
        for chans in (1, 3):
            pixels = prepared(image, chans=chans)
            assert np.abs(pixels.astype(int) - ramp).max() <= 1, mode
    for kind, image in (("TIFF", grey.convert("RGB").convert("CMYK")), ("PNG", grey.convert("1"))):
        pixels = prepare(through_file(image, kind), 32, 1, "crop")
        assert pixels[0, :, -4:].mean() - pixels[0, :, :4].mean() > 150
    red = Image.new("RGB", (32, 32), (200, 30, 30))
    assert prepared(red)[:, 5, 5].tolist() == [200, 30, 30]
    assert prepared(red, chans=1)[0, 5, 5] == 81  # ITU-R 601: 0.299, 0.587, 0.114
    cmyk = through_file(red.convert("CMYK"), "JPEG", quality=95)
    assert prepare(cmyk, 32, 3, "crop")[:, 5, 5] == pytest.approx([200, 30, 30], abs=4)


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((10, 20, 30, 255), (8, 8, 24, 24))
    image.paste((0, 0, 0, 128), (0, 0, 32, 4))
    pixels = prepared(image)
    assert pixels[:, 30, 30].tolist() == [255, 255, 255]
    assert pixels[:, 16, 16].tolist() == [10, 20, 30]
    assert pixels[:, 1, 16].tolist() == pytest.approx([127] * 3, abs=1)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    seen = prepare(through_file(palette, "GIF", transparency=1), 32, 3, "crop")
    assert seen.min() == 255


def test_what_the_system_says_of_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file" / "x.png", "Not a directory"), (tmp_path, "Is a dir")):
        with pytest.raises(UserError, match=f"picture cannot be read: {reason}"):
            read_picture(str(path), "picture")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows_own(orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(NOISE[:20]).save(file, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert np.array_equal(read_picture(file, "x")[0], expected)


def test_a_picture_on_its_side_is_turned_as_its_file_says():
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste("black", (0, 0, 30, 40))  # dark at the left
    for orientation, undo in ((6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG"):
            seen = through_file(upright.transpose(undo), kind, exif=exif)
            assert seen.size == (60, 40)
            pixels = prepare(seen, 32, 1, "stretch")[0]
            assert pixels[:, :12].max() < 20 and pixels[:, 20:].min() > 235


def test_a_picture_with_damaged_data_about_it_is_read_all_the_same():
    noise = Image.fromarray(NOISE)
    for kind in ("PNG", "WEBP"):
        seen = through_file(noise, kind, exif=b"no EXIF", lossless=True)
        assert (np.asarray(seen) == NOISE).all()
    rows = (0x0112, 3, 1, b"\0\6\0\0"), (0x0128, 2, 4, b"cm?\0")  # turned; no number for a unit
    rows = b"".join(struct.pack(">HHI4s", *row) for row in rows)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + rows + bytes(4)
    assert through_file(Image.new("RGB", (60, 40)), "JPEG", exif=exif).size == (40, 60)


# ----------------------------------------------------------------------------------------- limits


def test_what_is_no_picture_is_refused_in_one_line(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(NOISE).save(whole, "PNG")
    long = io.BytesIO()
    Image.new("L", (MAX_SIDE + 1, 2)).save(long, "PNG")
    cases = {
        "damaged, or none of PNG": io.BytesIO(whole.getvalue()[:200]),
        "none of PNG, JPEG": io.BytesIO(b"some text"),
        "is too large: 10001x2 pixels": long,
        "not found": tmp_path / "missing.png",
        "cannot be read: Is a directory": tmp_path,
    }
    for words, source in cases.items():
        with pytest.raises(UserError, match=f"^image x .*{words}") as caught:
            read_picture(source, "image x")
        assert "\n" not in str(caught.value)


def test_image_files_are_known_by_their_names():
    for name in (
        "a.png",
        "B.JPG",
        "c.jpeg",
        "d.webp",
        "e.tif",
        "f.gif",
        "g.bmp",
        "h.ppm",
        "i.jfif",
    ):
        assert has_image_name(name)
    for name in ("README.txt", "png", "a.png.zip", "notes", "a.pdf", "a.eps", "a.heic"):
        assert not has_image_name(name)


def test_what_reads_pictures_starts_without_pytorch():
    code = "import sys, data.decode; print({'torch', 'scipy', 'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "src", stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "set()\n"
