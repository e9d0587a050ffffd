"""Folders of pictures: three classes of shapes, and what else people have in such folders."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cross", "disc", "square")


def shape(name: str, width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A light shape about the middle of a dark picture, in colours of their own."""
    dark, light = (tuple(generator.integers(*span, 3).tolist()) for span in ((0, 90), (160, 256)))
    image = Image.new("RGB", (width, height), dark)
    draw = ImageDraw.Draw(image)
    x, y = (side * generator.uniform(0.45, 0.55) for side in (width, height))
    r = min(width, height) * generator.uniform(0.25, 0.4)
    if name == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=light)
    elif name == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=light)
    else:
        draw.line((x - r, y, x + r, y), fill=light, width=max(1, round(r / 3)))
        draw.line((x, y - r, x, y + r), fill=light, width=max(1, round(r / 3)))
    return image


def draw_shapes(
    folder: Path, count: int = 6, side: tuple[int, int] = (20, 40), seed: int = 0
) -> Path:
    """`<class>/0.png`, ... so many of each class, of sides from one length to below the other."""
    generator = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            width, height = generator.integers(*side, 2).tolist()
            shape(name, width, height, generator).save(folder / name / f"{i}.png")
    return folder


def draw_odd_folder(folder: Path) -> Path:
    """300 pictures with all that is odd among them; 297 of them can be used.

    97 of each class as JPEG or PNG, from 20x30 to 900x700; one that is cut off, one of 1x1 pixel,
    a text named .png; one with 16 bits, one with alpha, one of CMYK, one palette, one grey, one
    that lies on its side; a class without a picture; and files that are no pictures.
    """
    generator = np.random.default_rng(1)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(97):
            width, height = (20, 30) if i == 0 else (900, 700) if i == 1 else (0, 0)
            if not width:
                width, height = generator.integers(20, 200, 2).tolist()
            image = shape(name, width, height, generator)
            image.save(folder / name / f"{i}.{'jpg' if i % 2 else 'png'}", quality=90)
    whole = (folder / "cross" / "1.jpg").read_bytes()
    (folder / "cross" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "disc" / "text.png").write_text("not a picture\n")
    Image.new("RGB", (1, 1), "red").save(folder / "square" / "dot.png")
    disc = shape("disc", 60, 50, generator)
    grey = np.asarray(disc.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(folder / "disc" / "deep.png")
    faded = disc.convert("RGBA")
    faded.putalpha(disc.convert("L"))
    faded.save(folder / "disc" / "alpha.png")
    disc.convert("CMYK").save(folder / "disc" / "cmyk.jpg")
    disc.convert("P").save(folder / "disc" / "palette.gif")
    disc.convert("L").save(folder / "disc" / "grey.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    disc.save(folder / "disc" / "turned.JPEG", exif=exif)
    (folder / "empty").mkdir()
    (folder / "empty" / "README.txt").write_text("soon\n")
    litter = "__MACOSX/disc/._0.jpg", "lost+found/a.png"
    for name in (".DS_Store", "Thumbs.db", "disc/.hidden.png", *litter):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0")
    return folder
