"""Accuracy on numbers of several digits: printed, drawn by strokes, and rows of MNIST's digits.

A picture counts as right if all its digits are read rightly and in order, and nothing else is.
"""

import report  # first: it finds src

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import cli
from common.errors import UserError
from deploy.digit_image import read_digits
from deploy.predict import answer_digits
from vit_model import ViT

PRINTED = (
    "82 007 -7 10:45 42 2025 3.14 1,299 0 19.99 24.12.2025 2025-12-24 555-0199 030-123456 08:30 "
    "-15 0.5 1000000 98765 404 6174 1729 365.25 23:59:59 1.618 90210 -273.15 77 8888 31,415,926 "
    "60 96 5 2048 12:00 -0.07 1984 33"
).split()
FONTS = {  # None: Pillow's own; the others come with matplotlib
    "Pillow's": None,
    "DejaVu Sans": "DejaVuSans",
    "bold": "DejaVuSans-Bold",
    "oblique": "DejaVuSans-Oblique",
    "Serif": "DejaVuSerif",
    "Serif bold": "DejaVuSerif-Bold",
    "Mono": "DejaVuSansMono",
    "Mono bold": "DejaVuSansMono-Bold",
}
SIZES = (16, 32, 64, 120)  # pixels an em
DRAWN = ("42 4 17 4 90 4 305 4 2025 88 61 57 64 123 44 450 7 5 958 1066 39 72 246 814").split()


@dataclass(frozen=True)
class Picture:
    """A picture of a number."""

    text: str  # its digits
    pixels: np.ndarray  # uint8 (H, W)

    def file(self) -> io.BytesIO:
        """As a PNG file."""
        content = io.BytesIO()
        Image.fromarray(self.pixels).save(content, "PNG", compress_level=1)
        content.seek(0)
        return content


# ---------------------------------------------------------------------------------------- printed


def printed(texts: list[str], font: str, size: int) -> Iterator[Picture]:
    """Each text in black on white, at the font's own spacing."""
    name, folder = FONTS[font], Path(matplotlib.get_data_path(), "fonts", "ttf")
    letters = (
        ImageFont.truetype(folder / f"{name}.ttf", size) if name else ImageFont.load_default(size)
    )
    for text in texts:
        left, top, right, bottom = map(round, letters.getbbox(text))
        image = Image.new("L", (right - left + 2 * size, bottom - top + 2 * size), 255)
        ImageDraw.Draw(image).text((size - left, size - top), text, fill=0, font=letters)
        digits = "".join(filter(str.isdigit, text))
        yield Picture(digits, np.asarray(image))


# ------------------------------------------------------------------------------------------ drawn


def _arc(x: float, y: float, a: float, b: float, start: float, stop: float) -> list:
    """Points of an ellipse around (x, y), from one angle to another: 0 is right, 90 is down."""
    angles = np.deg2rad(np.linspace(start, stop, 14))
    return list(zip(x + a * np.cos(angles), y + b * np.sin(angles), strict=True))


# Strokes as a hand draws them, in a box 0.6 wide and 1 high; some digits in two ways.
STROKES = {
    "0": [[_arc(0.3, 0.5, 0.28, 0.5, -95, 262)], [_arc(0.3, 0.5, 0.3, 0.5, -60, 300)]],
    "1": [[[(0.3, 0), (0.28, 1)]], [[(0.12, 0.25), (0.33, 0), (0.32, 1)]]],
    "2": [[[*_arc(0.3, 0.28, 0.27, 0.28, -170, 30), (0.03, 0.98), (0.6, 0.97)]]],
    "3": [[[*_arc(0.26, 0.25, 0.25, 0.25, -150, 80), *_arc(0.26, 0.73, 0.3, 0.27, -85, 150)]]],
    "4": [
        [[(0.24, 0), (0.0, 0.62), (0.62, 0.6)], [(0.45, 0.25), (0.43, 1)]],
        [[(0.06, 0.02), (0.03, 0.55), (0.6, 0.53)], [(0.5, 0.0), (0.48, 1)]],
    ],
    "5": [
        [[(0.12, 0.02), (0.08, 0.42), *_arc(0.25, 0.68, 0.3, 0.31, -100, 140)],
         [(0.12, 0.02), (0.56, 0.0)]],
        [[(0.55, 0), (0.12, 0.02), (0.08, 0.42), *_arc(0.25, 0.68, 0.3, 0.31, -100, 140)]],
    ],
    "6": [[[(0.45, 0.02), (0.17, 0.32), *_arc(0.29, 0.72, 0.25, 0.27, 190, -170)]]],
    "7": [[[(0.02, 0.03), (0.58, 0.0), (0.22, 1)]],
          [[(0.02, 0.03), (0.58, 0.0), (0.22, 1)], [(0.16, 0.5), (0.55, 0.48)]]],
    "8": [[[*_arc(0.3, 0.24, 0.23, 0.24, 90, -270), *_arc(0.3, 0.74, 0.28, 0.26, -90, 270)]]],
    "9": [[[*_arc(0.3, 0.28, 0.26, 0.28, -20, -375), (0.5, 0.45), (0.42, 1)]]],
}  # fmt: skip


def drawn(texts: list[str], generator: np.random.Generator) -> Iterator[Picture]:
    """Each text as a mouse draws it: every point, digit, distance and the brush vary.

    A 4's upright stroke lies up to 0.2 of its size beside the other; a 5's bar up to 0.1.
    """
    for text in texts:
        height, slant = generator.uniform(80, 260), generator.uniform(-0.1, 0.25)
        width, climb = generator.uniform(0.05, 0.12) * height, generator.uniform(-0.08, 0.08)
        x, lines = height, []
        for digit in text:
            size = height * generator.uniform(0.85, 1.15)
            y = height * (1 + generator.normal(0, 0.04)) + climb * (x - height)
            strokes = _strokes(digit, len(text) == 1, slant, generator)
            strokes = [size * stroke for stroke in strokes]
            points = np.concatenate(strokes)
            x -= points[:, 0].min()
            lines += [stroke + np.array((x, y)) for stroke in strokes]
            x += points[:, 0].max() + width + height * generator.uniform(0.1, 0.5)
        frame = round(x + height), round(3.2 * height + abs(climb) * x)
        image = Image.new("L", frame, 255)
        pen = ImageDraw.Draw(image)
        for line in lines:
            line += (0, abs(climb) * x / 2)
            pen.line([tuple(point) for point in line], 0, round(width), joint="curve")
            for px, py in (line[0], line[-1]):  # round ends
                pen.circle((px, py), width / 2, fill=0)
        yield Picture(text, np.asarray(image))


def _strokes(digit, alone, slant, generator) -> list[np.ndarray]:
    """One digit's strokes, each an array of points (n, 2) of x and y."""
    forms = STROKES[digit]
    form = forms[generator.integers(len(forms))]
    strokes = [np.array(stroke, dtype=float) for stroke in form]
    if digit in "45" and len(strokes) == 2:
        most = 0.2 if digit == "4" else 0.1
        if digit == "4":  # the bar ends before the upright stroke, or crosses it
            gap = generator.uniform(0.1, most) if alone else generator.uniform(-0.15, 0.1)
            strokes[0][-1, 0] = strokes[1][:, 0].mean() - 0.05
            strokes[1][:, 0] += gap
        else:
            strokes[1] += (generator.uniform(-0.02, most), generator.uniform(-most / 2, 0))
    angle = np.deg2rad(generator.normal(0, 4))
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    stretch = generator.uniform(0.85, 1.15), 1
    for i, stroke in enumerate(strokes):
        stroke[:, 0] += slant * (0.5 - stroke[:, 1])
        shaky = stroke + generator.normal(0, 0.012, stroke.shape)
        strokes[i] = (shaky * stretch) @ turn
    return strokes


# ------------------------------------------------------------------------------------------- rows


def rows(
    digits: np.ndarray, labels: np.ndarray, count: int, generator: np.random.Generator
) -> Iterator[Picture]:
    """`count` rows of 2 to 6 digits, uint8 (n, 28, 28), light on dark, from tight to wide.

    The blank columns between two digits are 1 to 20 of their 28 pixels; each is 0.8 to 1.2 of its
    size, and moved up or down by up to 2. Half of the pictures are enlarged, up to eight times.
    """
    for _ in range(count):
        chosen = generator.integers(len(digits), size=generator.integers(2, 7))
        row = np.zeros((42, 260), dtype=np.uint8)
        x = int(generator.integers(4, 20))
        for digit in digits[chosen]:
            side = round(28 * generator.uniform(0.8, 1.2))
            block = np.asarray(Image.fromarray(digit).resize((side, side)))
            inked = np.flatnonzero(block.max(axis=0) > 40)
            block = block[:, inked[0] : inked[-1] + 1]
            top = round((42 - side) / 2) + int(generator.integers(-2, 3))
            part = row[top : top + side, x : x + block.shape[1]]
            np.maximum(part, block, out=part)
            x += block.shape[1] + int(generator.integers(1, 21))
        picture = Image.fromarray(row[:, : x + 8])
        if generator.random() < 0.5:
            scale = generator.uniform(1, 8)
            picture = picture.resize(
                (round(scale * picture.width), round(scale * picture.height)),
                Image.Resampling.BICUBIC,
            )
        text = "".join(map(str, labels[chosen]))
        yield Picture(text, np.asarray(picture))


# -------------------------------------------------------------------------------- the benchmark


def read_all(
    pictures: list[Picture], model: ViT, checkpoint: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """What is read in each picture, and its digits."""
    readings = []
    for picture in pictures:
        try:
            readings.append(read_digits(picture.file(), picture.text))
        except UserError as error:
            readings.append(error)
    texts = [picture.text for picture in pictures]
    answers = answer_digits(model, checkpoint, texts, readings)
    return [row.get("prediction", "") for row in answers], texts


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--rows", default=500, type=cli.integer(1, 10_000), help="of MNIST digits")
    parser.add_argument("--drawn", default=10, type=cli.integer(1, 1000), help="times each number")
    report.add_reading(parser)
    args = parser.parse_args()
    model, checkpoint, split = report.load_reading(args)
    digits, labels = split.images[:, 0].numpy(), split.labels.numpy()

    generator = np.random.default_rng(args.seed)
    kinds = {f"printed, {font}": [] for font in FONTS}
    for font, size in product(FONTS, SIZES):
        kinds[f"printed, {font}"] += printed(PRINTED, font, size)
    kinds["drawn"] = list(drawn(DRAWN * args.drawn, generator))
    kinds["rows of MNIST's digits"] = list(rows(digits, labels, args.rows, generator))
    table = []
    for kind, pictures in tqdm(kinds.items(), desc="kinds", disable=None):
        read, true = read_all(pictures, model, checkpoint)
        pairs = list(zip(read, true, strict=True))
        right = 100 * np.mean([a == b for a, b in pairs])
        found = 100 * np.mean([len(a) == len(b) for a, b in pairs])
        table.append([kind, str(len(pictures)), f"{right:.1f} %", f"{found:.1f} %"])
    report.publish(
        f"Several digits: rows of MNIST's {args.split} split, printed and drawn numbers",
        ["kind of picture", "pictures", "all digits right", "as many digits as there are"],
        table,
        device=next(model.parameters()).device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
