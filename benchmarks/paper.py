"""Accuracy on photos of paper: MNIST's digits in ink on simulated sheets, in bad light.

Each kind of disturbance is a row of `KINDS`. A picture is made as a photo comes about: a sheet,
perhaps with lines, is written on, lies in some light, is seen at a tilt, blurred and noisy, and
saved as a file. Sizes, places, colours and strengths are drawn anew for each picture. Each shows
one digit, and is read as one (`--single` of src/inference.py).
"""

import report  # finds src

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from common import cli
from common.errors import UserError
from common.files import atomic_write, check_writable, write_bytes
from deploy.digit_image import read_digits
from deploy.predict import predict

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

WHITE = {"white": (0.95, 0.94, 0.92)}
BLACK = {"black": (0.10, 0.10, 0.12)}
PAPERS: dict[str, Colour] = {
    "cream": (0.96, 0.91, 0.78),
    "yellow": (0.98, 0.90, 0.42),
    "pink": (0.97, 0.72, 0.76),
    "green": (0.70, 0.89, 0.67),
    "blue": (0.66, 0.80, 0.94),
    "orange": (0.97, 0.70, 0.38),
    "recycled": (0.76, 0.74, 0.70),
    "kraft": (0.70, 0.55, 0.40),
}
INKS: dict[str, Colour] = {
    "black": (0.10, 0.10, 0.12),
    "blue": (0.10, 0.20, 0.62),
    "red": (0.78, 0.10, 0.14),
    "green": (0.05, 0.42, 0.20),
    "violet": (0.42, 0.12, 0.55),
    "pencil": (0.38, 0.38, 0.40),
}
BOARDS: dict[str, Colour] = {
    "green board": (0.14, 0.27, 0.21),
    "slate": (0.16, 0.16, 0.18),
    "black card": (0.05, 0.05, 0.06),
    "dark screen": (0.09, 0.10, 0.16),
}
CHALKS: dict[str, Colour] = {
    "white": (0.92, 0.92, 0.90),
    "yellow": (0.93, 0.86, 0.45),
    "pink": (0.94, 0.66, 0.70),
    "blue": (0.60, 0.78, 0.93),
}
TABLES: dict[str, Colour] = {"wood": (0.45, 0.30, 0.18), "dark": (0.16, 0.16, 0.18)}


@dataclass(frozen=True)
class Kind:
    """A kind of picture. Each strength is the most that is drawn, from half of it on; 0: none."""

    papers: tuple[dict[str, Colour], ...] = (WHITE,)
    inks: tuple[dict[str, Colour], ...] = (BLACK,)
    thin: float = 0.0  # share of the pen's width that is missing
    chalk: float = 0.0  # holes in the stroke and smears beside it
    ruled: float = 0.0  # share of the light that a printed line takes
    squared: float = 0.0  # the same, lines in both directions
    grain: float = 0.0  # standard deviation of the sheet's brightness
    light: float = 0.0  # share of the light that is missing in the darkest corner
    shadow: float = 0.0  # the same, in a shadow with an edge
    tilt: float = 0.0  # degrees; and a perspective of a hundredth of the side for each
    table: float = 0.0  # share of the side where the sheet has ended
    blur: float = 0.0  # standard deviation in hundredths of the digit's height
    noise: float = 0.0  # standard deviation of the sensor's
    jpeg: tuple[int, int] | None = None  # quality, drawn between; None: PNG
    form: str = "RGB"  # of the file: RGB, RGBA (ink on nothing), 16 (bits of grey), EXIF (turned)


PHOTO = {"grain": 0.02, "noise": 0.02, "jpeg": (80, 92)}
DARK = {"papers": (BOARDS,), "inks": (CHALKS,), "chalk": 1.0}
TOGETHER = {
    "grain": 0.04,
    "light": 0.5,
    "shadow": 0.5,
    "tilt": 12.0,
    "blur": 2.0,
    "noise": 0.04,
    "jpeg": (35, 85),
    "form": "EXIF",
}
KINDS = {
    "plain sheet": Kind(),
    "thin pen": Kind(thin=0.7, **PHOTO),
    "grain and noise": Kind(grain=0.06, noise=0.08, jpeg=(80, 92)),
    "uneven light": Kind(light=0.7, **PHOTO),
    "shadow": Kind(shadow=0.6, light=0.3, **PHOTO),
    "ruled": Kind(ruled=0.5, **PHOTO),
    "squared": Kind(squared=0.5, **PHOTO),
    "paper and ink colours": Kind(papers=(WHITE, PAPERS), inks=(INKS,), **PHOTO),
    "tilt": Kind(tilt=15.0, **PHOTO),
    "edge of the sheet": Kind(table=0.2, tilt=8.0, **PHOTO),
    "blur": Kind(blur=4.0, **PHOTO),
    "JPEG artefacts": Kind(grain=0.02, noise=0.03, jpeg=(8, 25)),
    "transparency": Kind(inks=(INKS, CHALKS), form="RGBA"),
    "chalk on a board": Kind(**DARK, light=0.4, **PHOTO),
    "16 bits": Kind(grain=0.03, noise=0.03, light=0.5, form="16"),
    "turned by EXIF": Kind(**PHOTO, form="EXIF"),
    "all together, ruled": Kind((WHITE, PAPERS), (INKS,), thin=0.5, ruled=0.4, **TOGETHER),
    "all together, squared": Kind((WHITE, PAPERS), (INKS,), thin=0.5, squared=0.4, **TOGETHER),
    "all together, on a board": Kind(**DARK, **TOGETHER),
}

# An EXIF orientation says how to turn the stored picture upright; this is how to store it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ORIENTATION = 0x0112


# ---------------------------------------------------------------------------------- the picture


def photograph(digit: np.ndarray, kind: Kind, generator: np.random.Generator) -> bytes:
    """A picture file that shows `digit`, uint8 (28, 28) light on black, as `kind` says."""

    def drawn(most: float) -> float:
        return generator.uniform(0.5, 1) * most

    def colour(sets: tuple[dict[str, Colour], ...]) -> np.ndarray:
        chosen = sets[generator.integers(len(sets))]
        return np.array(chosen[str(generator.choice(list(chosen)))])

    frame = tuple(int(side) for side in generator.integers(320, 720, 2))  # height, width
    # Of MNIST's box of 20 pixels.
    height = generator.uniform(0.25, 0.7) * min(frame) * (1 - kind.table)
    # The sheet goes on beyond the frame, so that a tilt shows no end of it.
    margin = max(frame) // 3 if kind.tilt else 0
    sheet = frame[0] + 2 * margin, frame[1] + 2 * margin
    view = _view(frame, margin, drawn(kind.tilt), generator)
    reach = 0.7 * height * (1 + kind.tilt / 50)
    y, x = (_between(reach + kind.table * side, side - reach, generator) for side in frame)
    ink = _write(digit, sheet, _seen(view, x, y), height, drawn(kind.thin))
    ink_colour = colour(kind.inks)
    if kind.form == "RGBA":
        hidden = generator.integers(2)  # black or white below nothing
        colours = np.where(ink[..., None] > 0, ink_colour, hidden)
        return _save(np.dstack([colours, ink]), kind, generator)

    page = colour(kind.papers) * np.ones((*sheet, 1))
    if kind.chalk:
        smears = ndimage.gaussian_filter(generator.normal(size=sheet), (0.05 * height, height / 4))
        page += 0.05 * drawn(kind.chalk) * (smears / smears.std())[..., None]
        holes = ndimage.gaussian_filter(generator.normal(size=sheet), 0.008 * height)
        ink *= np.clip(1 - drawn(kind.chalk) * 0.4 * (holes / holes.std() + 0.5), 0, 1)
    if kind.ruled or kind.squared:
        lines = _lines(sheet, height, both=kind.squared > 0, generator=generator)
        line_colour = np.array([(1.0, 0.5, 0.1), (1.0, 0.9, 0.8)])[generator.integers(2)]
        page *= 1 - drawn(kind.ruled or kind.squared) * lines[..., None] * line_colour
    if kind.grain:
        fibres = ndimage.gaussian_filter(generator.normal(size=sheet), generator.uniform(1, 4))
        page *= 1 + (drawn(kind.grain) / fibres.std() * fibres)[..., None]
    page += ink[..., None] * (ink_colour - page)

    if kind.table:
        top, left = (margin + int(drawn(kind.table) * side) for side in frame)
        table = colour((TABLES,))
        page[:top] = table
        if generator.integers(2):
            page[:, :left] = table
    if kind.tilt:
        page = _warp(page, frame, view)
    page = page * _light(frame, drawn(kind.light), drawn(kind.shadow), generator)[..., None]
    if kind.blur:
        page = ndimage.gaussian_filter(page, (*[drawn(kind.blur) / 100 * height] * 2, 0))
    page += drawn(kind.noise) * generator.normal(size=(*frame, 1))
    page += drawn(kind.noise) / 2 * generator.normal(size=page.shape)
    return _save(page, kind, generator)


def _between(low: float, high: float, generator: np.random.Generator) -> float:
    """A place between the two, or their middle where there is no room."""
    return generator.uniform(low, high) if low < high else (low + high) / 2


def _write(digit, sheet, place, height, thin) -> np.ndarray:
    """The pen's trace on a sheet: how much of it covers each pixel, (H, W) in [0, 1]."""
    side = round(28 / 20 * height)
    big = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    big = ndimage.gaussian_filter(np.asarray(big, dtype=np.float64) / 255, 0.012 * height)
    edge = 0.35 + 0.4 * thin  # a pen's edge is sharp: cut where MNIST's blurred one is so strong
    strength = np.clip((big - edge) / 0.12 + 0.5, 0, 1)
    if thin:  # a felt pen's middle is left
        depth = ndimage.distance_transform_edt(strength > 0.5)
        crest = ndimage.maximum_filter(depth, round(0.14 * height))
        strength = ndimage.gaussian_filter((depth > thin * crest) & (depth > 0), 0.7, output=float)
        strength = np.clip(1.5 * strength, 0, 1)
    ink = np.zeros(sheet)
    top, left = (max(0, round(centre - side / 2)) for centre in place)
    part = ink[top : top + side, left : left + side]
    part[:] = strength[: part.shape[0], : part.shape[1]]
    return ink


def _lines(sheet, height, *, both, generator) -> np.ndarray:
    """Printed lines, (H, W) in [0, 1]: a digit is about as high as one or a few spaces."""
    spacing = height * (generator.uniform(0.3, 0.9) if both else generator.uniform(0.6, 1.3))
    width = max(1.0, generator.uniform(0.01, 0.03) * height)
    covers = []
    for length in sheet:
        position = (np.arange(length) + generator.uniform(0, spacing)) % spacing
        covers.append(np.clip(width / 2 + 0.5 - np.abs(position - spacing / 2), 0, 1))
    rows, columns = covers
    if not both:
        return np.broadcast_to(rows[:, None], sheet)
    return np.maximum(rows[:, None], columns[None, :])


def _light(frame, missing, shadow, generator) -> np.ndarray:
    """The light that falls on each pixel, (H, W) in [0, 1]: a slope, and a shadow's edge."""
    y, x = (np.linspace(-1, 1, side) for side in frame)
    angle, other = generator.uniform(0, 2 * np.pi, 2)
    across = np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]
    slope = (across + np.sqrt(2)) / (2 * np.sqrt(2))
    edge = np.cos(other) * x[None, :] + np.sin(other) * y[:, None]
    edge = edge + 0.15 * np.sin(3 * across + angle) - generator.uniform(-0.5, 0.5)
    shade = 1 / (1 + np.exp(-edge / generator.uniform(0.02, 0.12)))
    return (1 - missing * slope) * (1 - shadow * shade)


def _view(frame, margin, degrees, generator) -> np.ndarray:
    """Where on the sheet each pixel of the frame lies, seen from a side: coefficients (8,)."""
    height, width = frame
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    middle = corners.mean(axis=0)
    angle = np.deg2rad(degrees) * generator.choice([-1, 1])
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shifts = degrees / 100 * generator.uniform(-1, 1, (4, 2)) * (width, height)
    seen = margin + middle + (corners - middle + shifts) @ turn.T
    equations = []
    for (x, y), (u, v) in zip(corners, seen, strict=True):
        equations += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
    return np.linalg.solve(equations, seen.ravel())


def _seen(view, x, y) -> tuple[float, float]:
    """The sheet's row and column that the frame's pixel (x, y) shows."""
    a, b, c, d, e, f, g, h = view
    depth = g * x + h * y + 1
    return (d * x + e * y + f) / depth, (a * x + b * y + c) / depth


def _warp(page, frame, view) -> np.ndarray:
    """What of the sheet lies in the frame, (H, W, 3)."""
    size = frame[::-1]
    warp = size, Image.Transform.PERSPECTIVE, view, Image.Resampling.BICUBIC
    channels = [Image.fromarray(page[..., i].astype(np.float32)).transform(*warp) for i in range(3)]
    return np.dstack([np.asarray(channel, dtype=np.float64) for channel in channels])


def _save(pixels: np.ndarray, kind: Kind, generator: np.random.Generator) -> bytes:
    """The file's bytes of a picture (H, W, 3) or (H, W, 4) in [0, 1]."""
    pixels, file, options = np.clip(pixels, 0, 1), io.BytesIO(), {}
    if kind.form == "16":
        white = generator.choice([4095, 65535])  # of a sensor of 12 bits, of a scan
        image = Image.fromarray((pixels.mean(axis=2) * white).astype(np.uint16))
    else:
        image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    if kind.form == "EXIF":
        orientation = int(generator.choice(list(STORED)))
        image = image.transpose(STORED[orientation])
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    if kind.jpeg:
        image.save(file, "JPEG", quality=int(generator.integers(*kind.jpeg)), **options)
    else:
        image.save(file, "PNG", compress_level=1, **options)
    return file.getvalue()


# -------------------------------------------------------------------------------- the benchmark


def read_all(files: list[bytes], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """What `read_digits` makes of the files, uint8 (n, 28, 28), and which it refused, bool (n,)."""
    digits = np.zeros((len(files), 28, 28), dtype=np.uint8)
    refused = np.zeros(len(files), dtype=bool)
    for i, (content, name) in enumerate(zip(files, names, strict=True)):
        try:
            digits[i] = read_digits(io.BytesIO(content), name, single=True).digits[0].pixels
        except UserError:
            refused[i] = True
    return digits, refused


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--images", default=100, type=cli.integer(1, 300), help="of each kind")
    parser.add_argument("--kinds", default=None, nargs="+", choices=KINDS, help="None: all")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the pictures there")
    report.add_reading(parser)
    args = parser.parse_args()
    model, checkpoint, split = report.load_reading(args)
    if args.save:
        check_writable(args.save / "a picture")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(args.seed))

    def right(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return predict(model, images[:, None], checkpoint).probabilities.argmax(axis=1) == labels

    rows, read_rightly, themselves = [], [], []
    for name in tqdm(args.kinds or KINDS, desc="kinds", disable=None):
        # By the kind's row in the table: a kind gives the same pictures alone as among all.
        row = list(KINDS).index(name)
        generator = np.random.default_rng([args.seed, row])
        part = split[order[row * args.images :][: args.images]]  # each kind has digits of its own
        originals, labels = part.images[:, 0].numpy(), part.labels.numpy()
        files = [photograph(digit, KINDS[name], generator) for digit in originals]
        names = [f"{name.replace(' ', '-')}-{i:04}-{n}" for i, n in enumerate(labels)]
        digits, refused = read_all(files, names)
        read_rightly.append(right(digits, labels) & ~refused)
        themselves.append(right(originals, labels))
        rows.append([name, *report.with_interval(read_rightly[-1]), str(int(refused.sum()))])
        for content, stem, digit in zip(files, names, digits, strict=True) if args.save else ():
            suffix = ".jpg" if KINDS[name].jpeg else ".png"
            write_bytes(args.save / (stem + suffix), content)
            with atomic_write(args.save / f"{stem}-read.png") as temporary:
                Image.fromarray(digit).save(temporary, "PNG")
    rows.append(["**over all**", *report.with_interval(np.concatenate(read_rightly)), ""])
    rows.append(["the digits themselves", *report.with_interval(np.concatenate(themselves)), ""])
    report.publish(
        f"Photos of paper: {args.images} digits of MNIST's {args.split} split in each kind",
        ["kind of picture", "read rightly", "95 % interval", "refused"],
        rows,
        device=next(model.parameters()).device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
