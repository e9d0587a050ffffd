"""Pictures of digits, drawings and photos of paper, come out in the form of MNIST's images."""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import MNIST, ROOT, needs_mnist
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.errors import UserError
from data.digits import load_digits
from data.load import load_dataset
from deploy.digit_image import read_digits
from deploy.printed_lines import without_lines

sys.path.insert(0, str(ROOT / "benchmarks"))
from paper import KINDS, photograph

DIGITS = load_digits().test.images[:, 0].numpy()
COLUMNS = np.arange(28)


def read(pixels: np.ndarray, kind: str = "PNG", **options) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return read_digits(file, "image x", single=True).digits[0].pixels


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# --------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize("size", [(28, 28), (300, 200), (40, 900)])
def test_a_digit_is_scaled_into_its_box_and_centred_by_mass(size):
    y, x = np.ogrid[: size[0], : size[1]]
    disc = ((y - 0.4 * size[0]) ** 2 + (x - 0.6 * size[1]) ** 2 < 11**2).astype(np.uint8) * 255
    for picture in (disc, 255 - disc):
        digit = read(picture)
        assert digit.shape == (28, 28) and digit.dtype == np.uint8 and digit.max() == 255
        rows, columns = np.nonzero(digit > 100)
        assert np.ptp(rows) in (18, 19) and np.ptp(columns) in (18, 19)
        mass = digit / digit.sum()
        assert (mass.sum(1) @ COLUMNS, mass.sum(0) @ COLUMNS) == pytest.approx((14, 14), abs=0.6)


@pytest.mark.parametrize("turned", [False, True])
def test_proportions_are_kept_and_a_turned_photo_is_set_upright(turned):
    bar = np.zeros((100, 100), dtype=np.uint8)
    bar[10:90, 48:56] = 255  # 80 high, 8 wide
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    digit = read(bar.T, "JPEG", exif=exif, quality=95) if turned else read(bar)
    rows, columns = np.nonzero(digit > 127)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 2)


def test_faint_and_thin_marks_on_a_large_page_survive():
    page = np.zeros((3000, 3000), dtype=np.uint8)
    page[500, 500] = page[2500, 2400] = 255
    assert read(page).max() == 255
    page[500:2500, 1200] = 255  # one pixel wide
    assert (read(page) > 200).any(axis=1).sum() >= 18


@needs_mnist
def test_mnists_own_images_come_out_as_they_are():
    images = load_dataset("mnist", MNIST).test.images[:100, 0].numpy()
    differences = [np.abs(read(image).astype(int) - image).mean() for image in images]
    assert np.less(differences, 0.5).sum() >= 97  # of 255: a faint edge may be taken for paper


def test_a_file_object_gives_what_its_path_gives_and_is_named_in_messages(tmp_path):
    Image.fromarray(DIGITS[0]).save(tmp_path / "digit.png")
    content = (tmp_path / "digit.png").read_bytes()
    both = [
        read_digits(source, single=True) for source in (io.BytesIO(content), tmp_path / "digit.png")
    ]
    assert np.array_equal(both[0].digits[0].pixels, both[1].digits[0].pixels)
    with pytest.raises(UserError, match="image my upload cannot be read"):
        read_digits(io.BytesIO(content[:40]), "image my upload")


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (5, 7), (3, 9000), (120, 90), (120, 90, 3)])
def test_any_picture_gives_a_digit_or_one_message(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for picture in (pixels, pixels // 200 * 255, np.zeros_like(pixels)):
        try:
            digit = read(picture)
        except UserError as error:
            assert str(error).startswith("image x ")
        else:
            assert digit.shape == (28, 28) and digit.max() == 255


def test_the_strokes_of_a_fine_pen_are_widened():
    page = np.full((400, 400), 255, dtype=np.uint8)
    page[80:320, 120:123] = page[80:83, 120:280] = 0
    stem = read(page)[14:22].astype(float)
    assert stem.sum(axis=1) / 255 == pytest.approx(1.6, abs=0.3)  # 3 pixels of 240 were 0.25


def test_a_digit_that_fills_its_picture_is_no_photo():
    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
    image = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(image).text((60, 60), "8", fill=0, font=ImageFont.truetype(font, 200))
    left, top, right, bottom = ImageOps.invert(image).getbbox()
    for margin in (2, 4, 8):
        cut = image.crop((left - margin, top - margin, right + margin, bottom + margin))
        assert read(np.asarray(cut)).max() > 200  # once "is blank", above half of it in ink


def test_specks_are_left_out():
    one, speck = np.asarray(Image.fromarray(DIGITS[0]).resize((200, 200))), np.zeros((200, 200))
    speck[95:100, 95:100] = 255
    assert likeness(read(np.hstack([one, speck.astype(np.uint8)])), read(one)) > 0.99


# ----------------------------------------------------------------------------------------- photos


@pytest.mark.parametrize("name", KINDS)
def test_a_digit_on_paper_comes_back(name):
    """Four digits of each kind that the benchmark measures are much like what they were."""
    generator = np.random.default_rng(1)
    found = []
    for digit in DIGITS[:4]:
        photo = io.BytesIO(photograph(digit, KINDS[name], generator))
        found.append(likeness(read_digits(photo, single=True).digits[0].pixels, read(digit)))
    # A tilted digit stays tilted; strokes of a thin pen are not as wide.
    least = 0.45 if KINDS[name].tilt else 0.6 if KINDS[name].thin else 0.8
    assert np.mean(found) > least, found


@pytest.mark.parametrize("name", ["ruled", "squared", "uneven light", "shadow", "grain and noise"])
def test_bare_paper_is_blank(name):
    nothing = np.zeros((28, 28), dtype=np.uint8)
    for seed in range(2):
        photo = photograph(nothing, KINDS[name], np.random.default_rng(seed))
        with pytest.raises(UserError, match="is blank"):
            read_digits(io.BytesIO(photo), single=True)


def test_lines_from_edge_to_edge_go_and_strokes_that_cross_them_stay():
    ink = np.zeros((300, 400), dtype=np.float32)
    x = np.arange(400)
    for row in (60, 150, 240):
        ink[(row + 0.1 * (x - 200)).round().astype(int), x] = 0.4
    ink[40:260, 180:190] = ink[100:106, 180:300] = 0.9
    left = without_lines(ink)
    strokes = ink > 0.8
    assert left[strokes].min() > 0.85 and left[~strokes].max() < 0.1
