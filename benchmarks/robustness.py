"""Accuracy on images that differ a little: changed MNIST digits, other handwriting, MNIST-C.

The kinds of change are in corruptions.py. Half of them are for choosing a recipe, on validation
images. The other half is held out: it is scored on the test images, once, when the recipe is fixed.

MNIST-C (Mu & Gilmer, "MNIST-C: A Robustness Benchmark for Computer Vision", 2019) has one version
of all test images for each of its corruptions. It is read where its files are.
"""

import report  # finds src

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from tqdm import tqdm

from analysis import figures
from analysis.explain import outputs
from common import cli
from common.device import choose_device
from common.errors import UserError
from common.files import check_writable, read_bytes
from corruptions import KINDS, corrupt
from data.catalog import DIGITS
from data.dataset import Split
from data.load import load_dataset
from paper import read_all
from saving.checkpoint import find_checkpoint, image_shape, load_checkpoint
from settings import add_flags
from utils import BatchLoader
from vit_model import ViT

TITLES = {"choosing": "For choosing a recipe", "held-out": "Held out"}
MNIST_C = "shot_noise impulse_noise glass_blur motion_blur shear scale rotate brightness translate"
MNIST_C = (*MNIST_C.split(), *"stripe fog spatter dotted_line zigzag canny_edges".split())
MNIST_C_BYTES = 8_000_000  # the largest of its files that are read has 7,840,128
ENLARGED = 160  # pixels a side of other handwriting, before it is read as a picture


class Reader(NamedTuple):
    """A trained model."""

    name: str
    model: ViT
    normalization: dict[str, list[float]]
    source: str  # the data set that it was trained on

    def is_right(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Which images, uint8 (n, 28, 28), it classifies correctly: bool (n,)."""
        device = next(self.model.parameters()).device
        split = Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))
        loader = BatchLoader(split.to(device), 500, **self.normalization)
        return outputs(self.model, loader).correct


class Row(NamedTuple):
    """What was scored, and how each model did on it."""

    name: str
    scores: list[np.ndarray]  # (n,): which images were right; in a mean, in what share of its kinds
    family: str = ""
    half: str = ""
    examples: np.ndarray | None = None  # some of the images, uint8 (k, 28, 28)

    def cells(self) -> list[str]:
        accuracies = (cell for scores in self.scores for cell in report.with_interval(scores))
        return [self.name, self.family, self.half, *accuracies]


def mean_row(name: str, rows: Sequence[Row]) -> Row:
    """The mean over kinds of change to the same images."""
    columns = zip(*(row.scores for row in rows), strict=True)
    return Row(f"**{name}**", [np.mean(column, axis=0) for column in columns])


# ----------------------------------------------------------------------------------- what is scored


def load_readers(paths: Sequence[str] | None, device: torch.device) -> list[Reader]:
    """The models on the device. Raises UserError if one is not for digits in MNIST's form."""
    readers = []
    for given in paths or [None]:
        path = find_checkpoint(given)
        model, checkpoint = load_checkpoint(path)
        if (shape := image_shape(checkpoint)) != (1, 28, 28):
            raise UserError(f"{path} takes images of {shape}: name a model of (1, 28, 28)")
        if tuple(checkpoint["class_names"]) != DIGITS:
            raise UserError(f"{path} knows other classes than the ten digits: name a model of them")
        about = checkpoint["normalization"], checkpoint["source"]
        readers.append(Reader(str(path), model.to(device), *about))
    return readers


def other_handwriting(count: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits of 8x8, read from enlarged pictures as `predict` would.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.

    Args:
        count: only the first so many.

    Returns:
        Images uint8 (n, 28, 28), which pictures were refused, bool (n,), and labels (n,).
    """
    from sklearn.datasets import load_digits

    pixels, labels = (array[:count] for array in load_digits(return_X_y=True))
    files, names = [], [f"digit {number}" for number in range(len(labels))]
    for digit in pixels.reshape(-1, 8, 8):
        small = Image.fromarray(255 - np.rint(digit * (255 / 16)).astype(np.uint8))
        large = small.resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        ImageOps.expand(large, ENLARGED // 4, fill=255).save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
    bar = tqdm(files, desc="other handwriting", leave=False, disable=None)
    return *read_all(bar, names), labels


def read_mnist_c(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """MNIST-C's test images in the published layout: of each corruption its name, images uint8
    (10000, 28, 28) and labels int64 (10000,). `identity` comes last, if it is there. Raises
    UserError if a file is missing or not as published.
    """
    found = []
    for name in [*MNIST_C, *(["identity"] if (folder / "identity").exists() else [])]:
        paths = folder / name / "test_images.npy", folder / name / "test_labels.npy"
        images, labels = _read_npy(paths[0], (10_000, 28, 28, 1)), _read_npy(paths[1], (10_000,))
        if images.dtype != np.uint8:
            raise UserError(f"{paths[0]} holds values of {images.dtype}, expected uint8")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
            raise UserError(f"{paths[1]} holds other labels than the whole numbers from 0 to 9")
        found.append((name, images[..., 0], labels.astype(np.int64)))
    return found


def _read_npy(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array of this shape in a file. One of Python objects, which can run code, is refused."""
    try:
        content = read_bytes(path, MNIST_C_BYTES)
    except UserError as error:
        layout = "<corruption>/test_images.npy and <corruption>/test_labels.npy"
        raise UserError(f"{error}: --mnist_c wants MNIST-C's folder, with {layout}") from None
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds on damaged files
        raise UserError(f"{path} is not a NumPy array of numbers: {error}") from None
    if getattr(array, "shape", None) != shape:
        raise UserError(f"{path} is not an array of shape {shape}, as MNIST-C has it")
    return array


# -------------------------------------------------------------------------------------- the picture

# In dots: an image and its gap at two dots a pixel, a heading, the names, an accuracy, a margin.
DPI, IMAGE, HEADING, NAMES, ACCURACY, MARGIN = 150, 64, 38, 160, 80, 30


def draw(rows: Sequence[Row], picks: np.ndarray, caption: str) -> Figure:
    """Draw some examples of each kind with the accuracy on all its images, a column for each half;
    the first row is of images as they are. What the first model misreads has a frame.

    Args:
        picks: which images the examples are, (k,).
        caption: the line below.
    """
    unchanged, *rows = rows
    halves = [half for half in TITLES if any(row.half == half for row in rows)]
    families = list(dict.fromkeys(row.family for row in rows))
    beside = NAMES + ACCURACY * len(unchanged.scores)
    width = len(halves) * (beside + IMAGE * len(picks) + MARGIN) + MARGIN
    tallest = max(sum(row.half == half for row in rows) for half in halves)
    height = HEADING * (len(families) + 2) + IMAGE * (tallest + 1) + 2 * MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def place(left: float, top: float) -> tuple[float, float]:
        return left / width, 1 - top / height

    def write(text: str, left: float, top: float, **look) -> None:
        figure.text(*place(left, top), text, **{"va": "center", "fontsize": 8.5, **look})

    for number, half in enumerate(halves):
        left = MARGIN + number * (width - MARGIN) / len(halves)
        top = MARGIN + HEADING
        own = [row for row in rows if row.half == half]
        means = " / ".join(f"{100 * scores.mean():.1f} %" for scores in mean_row("", own).scores)
        write(f"{TITLES[half]}: mean {means}", left, MARGIN, fontsize=11, weight="bold")
        for family in ["", *families]:
            members = [row for row in own if row.family == family] if family else [unchanged]
            if family:
                write(family, left, top + 0.6 * HEADING, color=figures.GREY, style="italic")
                top += HEADING
            for row in members:
                middle = top + IMAGE / 2
                write(row.name, left, middle)
                for i, scores in enumerate(row.scores, start=1):
                    end = left + NAMES + ACCURACY * i - 12
                    write(f"{100 * scores.mean():.1f} %", end, middle, ha="right")
                corner = place(left + beside, top + IMAGE)
                size = IMAGE * len(picks) / width, IMAGE / height
                _strip(figure.add_axes((*corner, *size)), row.examples, ~row.scores[0][picks])
                top += IMAGE
    write(caption, MARGIN, height - MARGIN, fontsize=8, color=figures.GREY)
    return figure


def _strip(axes: Axes, examples: np.ndarray, misread: np.ndarray) -> None:
    """Draw images (k, 28, 28) side by side, a frame around those that are misread, bool (k,)."""
    strip = np.pad(examples, ((0, 0), (2, 2), (2, 2)), constant_values=255)
    axes.imshow(np.hstack(strip), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.axis("off")
    for i in np.flatnonzero(misread):
        corner, side = (32 * i + 0.5, 0.5), 30
        axes.add_patch(Rectangle(corner, side, side, fill=False, color=figures.RED, linewidth=1.5))


# ------------------------------------------------------------------------------------ the benchmark


def parse_args() -> argparse.Namespace:
    """The flags, with `split` set."""
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    own = "./checkpoints/best_model.pt if it is there, else the pretrained one of this repository"
    add("--checkpoint", nargs="+", help=f"trained models, side by side; None: {own}")
    add("--kinds", default="choosing", choices=[*TITLES, "all"], help="which half of the suite")
    split = "MNIST's images that are changed; None: val with --kinds choosing, else test"
    add("--split", choices=["val", "test"], help=split)
    add("--images", type=cli.integer(1), help="only so many, drawn by --seed; None: all")
    add("--seed", default=0, type=cli.integer(0), help="of all that is drawn")
    layout = "also score MNIST-C, from <corruption>/test_images.npy and test_labels.npy in there"
    add("--mnist_c", type=Path, metavar="DIR", help=layout)
    picture = "draw each kind with its accuracy, such as docs/robustness.png"
    add("--picture", type=Path, metavar="FILE", help=picture)
    add_flags(parser, ("data_dir", "device"))
    report.add_record(parser)
    args = parser.parse_args()
    args.split = args.split or ("val" if args.kinds == "choosing" else "test")
    if args.picture:
        figures.check_format(args.picture)
        check_writable(args.picture)
    return args


def score(readers: Sequence[Reader], images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """For each model, which images, uint8 (n, 28, 28), it classifies correctly: bool (n,)."""
    return [reader.is_right(images, labels) for reader in readers]


def score_kinds(
    readers: Sequence[Reader],
    half: str,
    images: np.ndarray,
    labels: np.ndarray,
    picks: np.ndarray,
    seed: int,
) -> list[Row]:
    """A row for each kind of this half; of the images, `picks` are kept as examples."""
    rows = []
    own = {name: kind for name, kind in KINDS.items() if kind.half == half}
    for name, kind in tqdm(own.items(), desc=half, disable=None):
        changed = corrupt(images, name, seed)
        scores = score(readers, changed, labels)
        rows.append(Row(name, scores, kind.family, half, changed[picks]))
    return rows


def main() -> None:
    args = parse_args()
    device = choose_device(args.device)
    readers = load_readers(args.checkpoint, device)
    mnist_c = read_mnist_c(args.mnist_c) if args.mnist_c else []
    split = getattr(load_dataset("mnist", args.data_dir), args.split)
    order = np.random.default_rng(args.seed).permutation(len(split))[: args.images]
    images, labels = split.images[order, 0].numpy(), split.labels[order].numpy()
    picks = np.unique(labels, return_index=True)[1]  # one image of each digit

    unchanged = Row("unchanged", score(readers, images, labels), examples=images[picks])
    rows, means = [], []
    for half in TITLES if args.kinds == "all" else [args.kinds]:
        own = score_kinds(readers, half, images, labels, picks, args.seed)
        rows += own
        means.append(mean_row(f"mean, {half}", own))
    others, refused, their_labels = other_handwriting(args.images)
    scores = [right & ~refused for right in score(readers, others, their_labels)]
    rest = [unchanged, Row("other handwriting", scores)]

    corruptions = [
        Row(name, score(readers, changed[: args.images], own_labels[: args.images]), half="MNIST-C")
        for name, changed, own_labels in tqdm(mnist_c, desc="MNIST-C", disable=None)
    ]
    if corruptions:
        means.append(mean_row("mean, MNIST-C", corruptions[: len(MNIST_C)]))

    count = len(images)
    title = f"Changed images: {count:,} of MNIST's {args.split} split in each kind"
    header = ["what", "family", "half"]
    for reader in readers:
        header += [reader.name if len(readers) > 1 else "accuracy", "95 % interval"]
    table = [row.cells() for row in (*rows, *corruptions, *means, *rest)]
    report.publish(title, header, table, device=device, record=args.record, notes=notes(readers))
    if args.picture:
        caption = f"Accuracy on {count:,} images of MNIST's {args.split} split; "
        caption += "frames: what is misread" + (" by the first model" if len(readers) > 1 else "")
        figures.save(draw([unchanged, *rows], picks, caption), args.picture)
        print(f"\nSaved {args.picture}")


def notes(readers: Sequence[Reader]) -> str:
    """What the table's reader should know."""
    text = "A mean's interval is that of drawing other images; the kinds stay the same."
    seen = [reader.name for reader in readers if reader.source == "digits"]
    if seen:
        text += f" The other handwriting is what {', '.join(seen)} was trained on."
    return text


if __name__ == "__main__":
    cli.run(main)
