"""Numbers of several digits: found, ordered and read in print, drawings and rows of MNIST."""

import io
import sys
import time

import numpy as np
import pytest
from conftest import MNIST, ROOT, needs_mnist
from PIL import Image, ImageDraw

from common.errors import UserError
from data.load import load_dataset
from deploy import digit_pieces
from deploy.digit_image import MAX_DIGITS, Reading, read_digits
from deploy.predict import answer_digits
from saving.checkpoint import PRETRAINED, load_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))
from several_digits import DRAWN, FONTS, PRINTED, SIZES, Picture, drawn, printed, read_all, rows

needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model")


@pytest.fixture(scope="module")
def pretrained():
    return load_checkpoint(PRETRAINED)


def read(image: Image.Image, kind: str = "PNG", **options) -> Reading:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return read_digits(file, "image x")


def lines(*strokes: list, size: tuple[int, int] = (300, 200), width: int = 12) -> Image.Image:
    """Black lines on white."""
    image = Image.new("L", size, 255)
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, 0, width, joint="curve")
    return image


# ---------------------------------------------------------------------------------- whole numbers


def all_printed() -> list[Picture]:
    """Each number in a font and size of its own; the model takes the 1 of Pillow's font for a 7."""
    fonts = [font for font in FONTS if font != "Pillow's"]
    choices = ((t, fonts[i % len(fonts)], SIZES[i % len(SIZES)]) for i, t in enumerate(PRINTED))
    return [picture for text, *how in choices for picture in printed([text], *how)]


def mnist_rows() -> list[Picture]:
    split = load_dataset("mnist", MNIST).val
    digits, labels = split.images[:, 0].numpy(), split.labels.numpy()
    return list(rows(digits, labels, 100, np.random.default_rng(0)))


@needs_pretrained
@pytest.mark.parametrize(
    ("make", "count", "most_wrong"),
    [
        (all_printed, 38, 1),
        (lambda: list(drawn(DRAWN, np.random.default_rng(0))), 24, 3),
        pytest.param(mnist_rows, 100, 5, marks=needs_mnist),
    ],
    ids=["printed", "drawn", "rows of MNIST's digits"],
)
def test_numbers_are_read(pretrained, make, count, most_wrong):
    pairs = list(zip(*read_all(make(), *pretrained), strict=True))
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(pairs) == count and len(wrong) <= most_wrong, wrong


def test_every_digit_of_pillows_own_font_is_found():
    for picture in (p for size in SIZES for p in printed(PRINTED, "Pillow's", size)):
        assert len(read_digits(picture.file(), "image x").digits) == len(picture.text), picture.text


# --------------------------------------------------------------------------------- places and order


def ring(pen: ImageDraw.ImageDraw, x: int, y: int, height: int = 60, width: int = 40) -> None:
    pen.ellipse((x, y, x + width, y + height), outline=0, width=8)


def test_lines_are_read_from_the_top_and_each_from_the_left():
    places = [(60, 50), (150, 70), (240, 88), (20, 170), (110, 185), (260, 222), (180, 320)]
    image = Image.new("L", (400, 450), 255)
    for x, y in reversed(places):  # the lines fall to the right
        ring(ImageDraw.Draw(image), x, y)
    boxes = [digit.box for digit in read(image).digits]
    assert [box[:2] for box in boxes] == [pytest.approx(place, abs=1) for place in places]


@pytest.mark.parametrize(("kind", "turned"), [("PNG", False), ("PNG", True), ("JPEG", True)])
def test_boxes_are_of_the_upright_picture_at_its_own_size(kind, turned):
    image = Image.new("L", (2000, 1500), 255)
    for x in (300, 800):
        ring(ImageDraw.Draw(image), x, 400, 500, 300)
    exif = Image.Exif()
    if turned:  # stored lying; its EXIF data says: turn by 90 degrees
        exif[0x0112] = 6
        image = image.transpose(Image.Transpose.ROTATE_90)
    reading = read(image, kind, exif=exif)
    assert reading.size == (2000, 1500)
    for digit, left in zip(reading.digits, (300, 800), strict=True):
        assert digit.box == pytest.approx((left, 400, left + 301, 901), abs=8)


# ------------------------------------------------------------------------ what makes up one digit


STROKES = {
    "an open 4": [[(60, 40), (45, 150), (105, 147)], [(150, 40), (145, 240)]],
    "a 4 whose stem begins low": [[(60, 40), (45, 150), (105, 147)], [(140, 110), (138, 240)]],
    "a 5 with its bar apart": [
        [(60, 50), (55, 110), (110, 120), (115, 180), (50, 210)],
        [(75, 40), (140, 30)],
    ],
    "a 5 with its bar beside it": [
        [(60, 50), (55, 110), (110, 120), (115, 180), (50, 210)],
        [(90, 50), (150, 35)],
    ],
    "a broken 1": [[(100, 40), (100, 120)], [(101, 135), (102, 220)]],
    "a 7 with its crossbar apart": [[(50, 40), (140, 38), (125, 100)], [(115, 122), (90, 230)]],
}


@pytest.mark.parametrize("strokes", STROKES.values(), ids=STROKES)
@pytest.mark.parametrize("alone", [True, False])
def test_strokes_that_lie_apart_are_one_digit(strokes, alone):
    image = lines(*strokes, size=(420, 280), width=10)
    if not alone:
        ring(ImageDraw.Draw(image), 250, 40, 190, 100)
    assert len(read(image).digits) == (1 if alone else 2)


@pytest.mark.parametrize("text", ["-7", "10:45", "3,14", "3.14", "1:1", "0-0"])
@pytest.mark.parametrize("font", ["Pillow's", "bold", "Serif bold"])
def test_marks_are_left_out(text, font):
    for picture in (p for size in SIZES for p in printed([text], font, size)):
        assert len(read_digits(picture.file(), "image x").digits) == len(picture.text), picture.text


def test_a_mark_with_no_digit_beside_it_is_answered():
    assert len(read(lines([(50, 50), (250, 50)])).digits) == 1


def test_a_neighbour_leaves_no_trace_in_a_digit():
    """Two slanting strokes whose boxes overlap."""
    strokes = [(130, 40), (80, 160)], [(160, 40), (110, 160)]
    one = read(lines(strokes[0])).digits[0].pixels
    first, second = (digit.pixels.astype(int) for digit in read(lines(*strokes)).digits)
    assert np.abs(first - one).mean() < 1 and np.abs(second - one).mean() < 1


# --------------------------------------------------------------------------------------- the bounds


def test_too_many_marks_are_told_in_one_line():
    corners = [(20 + 45 * (i % 16), 20 + 55 * (i // 16)) for i in range(MAX_DIGITS + 1)]
    marks = lines(*([(x, y), (x, y + 30)] for x, y in corners), size=(800, 800), width=5)
    with pytest.raises(UserError, match=f"image x shows 201 marks, .* {MAX_DIGITS} digits"):
        read(marks)


@pytest.mark.parametrize(
    ("density", "grain"), [(0.02, 1), (0.2, 1), (0.5, 1), (0.02, 5), (0.2, 20)]
)
def test_noise_takes_no_longer_than_a_few_seconds(density, grain):
    dots = np.random.default_rng(0).random((800 // grain, 800 // grain)) < density
    image = Image.fromarray(np.kron(~dots, np.ones((grain, grain))).astype(np.uint8) * 255)
    start = time.process_time()
    try:
        read(image)
    except UserError as error:
        assert str(error).startswith("image x ")
    assert time.process_time() - start < 10


def test_one_call_of_the_model_reads_all_digits_of_all_pictures(pretrained):
    model, checkpoint = pretrained
    readings = [read_digits(p.file(), "image x") for p in printed(["123", "45"], "bold", 40)]
    readings.insert(1, UserError("none"))
    sizes = []
    hook = model.patch_embed.register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    answers = answer_digits(model, checkpoint, ["a", "b", "c"], readings)
    hook.remove()
    assert [row.get("prediction") for row in answers] == ["123", None, "45"] and sizes == [5]


def test_marks_alone_are_not_lost_among_what_sets_the_height():
    """400 heavy blobs beside thousands of long thin lines, which are not looked at."""
    blobs = np.array([[60 * i, 0, 60 * i + 40, 40] for i in range(400)])
    lines = np.array([[10 * i, 100, 10 * i + 1, 200] for i in range(4000)])
    mass = np.concatenate((np.full(400, 200.0), np.full(4000, 100.0)))
    assert digit_pieces.group_pieces(np.concatenate((blobs, lines)), mass)
