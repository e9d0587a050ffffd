"""Photos of three classes, coloured shapes on coloured paper, for tests of models of one's own."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle")
HUES = {"circle": 0.0, "square": 0.3, "triangle": 0.62}  # red, green, blue, more or less
SIZES = ((40, 40), (64, 48), (45, 60))  # width and height


def draw_shape(kind: str, generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A shape in about its colour, near the middle of paper of any colour, but pale or dark."""
    hue = HUES[kind] + generator.normal(0, 0.05)
    paper = generator.random(), 0.25, generator.choice([0.25, 0.9])
    colours = colorsys.hsv_to_rgb(*paper), colorsys.hsv_to_rgb(hue % 1, 0.9, 0.7)
    paper, ink = (tuple(round(255 * value) for value in colour) for colour in colours)
    image = Image.new("RGB", (4 * size[0], 4 * size[1]), paper)
    radius = 4 * min(size) * generator.uniform(0.28, 0.36)
    x, y = (2 * side + generator.uniform(-0.1, 0.1) * radius for side in size)
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse(box, fill=ink)
    elif kind == "square":
        pen.rectangle(box, fill=ink)
    else:
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=ink)
    return image.resize(size, Image.Resampling.BOX)


def draw_folder(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` PNG files of each class, `folder/circle/0.png` and so on."""
    generator = np.random.default_rng(seed)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            image = draw_shape(kind, generator, SIZES[i % len(SIZES)])
            image.save(folder / kind / f"{i}.png")
    return folder
