"""What changes of light and stroke look like, and what they cost beside a training step.

Each family of the recipe, at its share, and all of them together change the same batch; the step is
that of the recipe's network. They are timed in turns, so that a machine that slows down slows all.
"""

import report  # finds src

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import optim
from analysis import figures
from common import cli
from common.device import choose_device, choose_precision
from common.errors import UserError
from common.files import check_writable
from data.augment import Augment
from data.dataset import Split
from data.disturb import FAMILIES, Draw, disturb
from data.load import load_dataset
from recipes import RECIPES
from settings import Settings, add_flags, section_of
from training.speed import keep_freed_memory
from utils import Batch
from vit_model import ViT

EXAMPLES, DPI = 18, 150  # images in a row of the picture; its dots an inch, two for each pixel
LEFT, ABOVE = 2.1, 0.4  # inches for the names of the rows, and for the title


def draw_picture(rows: Mapping[str, Tensor], title: str) -> Figure:
    """A row of images (n, 1, 28, 28) beside each name."""
    tiles = [
        np.pad(images[:, 0], ((0, 0), (1, 1), (1, 1)), constant_values=1)
        for images in rows.values()
    ]
    whole = np.vstack([np.hstack(row) for row in tiles])
    height, width = (2 * side / DPI for side in whole.shape)
    whole_width, whole_height = LEFT + width, height + ABOVE
    figure = Figure(figsize=(whole_width, whole_height), dpi=DPI)
    figure.text(0.5, 1 - ABOVE / 2 / whole_height, title, ha="center", va="center", size=10)
    place = LEFT / whole_width, 0, width / whole_width, height / whole_height
    axes = figure.add_axes(place)
    axes.imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    side = len(whole) / len(rows)
    axes.set_yticks([side * (number + 0.5) for number in range(len(rows))], labels=list(rows))
    axes.tick_params(length=0, labelsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure


def examples(images: Tensor, augment: Augment, generator: torch.Generator) -> dict[str, Tensor]:
    """Images as they are, changed by each kind, by all together, and mixed."""
    rows = {"unchanged": images}
    for family, kinds in FAMILIES.items():
        for name, change in kinds.items():
            rows[f"{family}: {name}"] = change(images, Draw(len(images), generator))
    for name in ("the recipe's shares", "the same again"):
        rows[name] = disturb(images, augment.shares, generator, augment.keep_clean)
    rows["mixed (AugMix)"] = disturb(images, augment.shares, generator, augmix=0.999)
    return rows


def times(
    settings: Settings, augment: Augment, split: Split, precision: str, turns: int
) -> dict[str, list[float]]:
    """Seconds of each turn, of a training step and of what `augment` does beside it."""
    device = split.images.device
    images, generator = split.images.float() / 255, torch.Generator(device).manual_seed(0)
    model = ViT(**section_of(settings, "model")).to(device).train()
    optimizer = optim.build_optimizer(
        settings.optimizer, model, lr=settings.lr, weight_decay=settings.weight_decay
    )
    batch = Batch(images, split.labels, split.labels, len(images))

    parts = model, nn.CrossEntropyLoss(), optimizer, batch, settings.grad_clip
    timed = {"a training step": partial(report.train_step, *parts, precision=precision)}
    for name, share in augment.shares.items():
        alone = {name: share}, generator, augment.keep_clean
        timed[f"`--{name} {share}`"] = partial(disturb, images, *alone)
    all_of_them = augment.shares, generator, augment.keep_clean, augment.augmix
    timed["all of them, with `--augmix`"] = partial(disturb, images, *all_of_them)
    moves = replace(augment, **dict.fromkeys(augment.shares, 0.0))
    timed["what else the recipe does to images"] = partial(moves, images, generator)
    rows = [[report.seconds(run, device) for run in timed.values()] for _ in range(turns + 3)]
    return dict(zip(timed, map(list, zip(*rows[3:], strict=True)), strict=True))


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--recipe", default="robust", choices=RECIPES, help="of src/recipes.py")
    parser.add_argument("--turns", default=20, type=cli.integer(1), help="timed turns of each")
    picture = "draw every kind of change, such as docs/disturbances.png"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    add_flags(parser, ("data_dir", "device"))
    report.add_record(parser)
    args = parser.parse_args()
    if args.picture:
        figures.check_format(args.picture)
        check_writable(args.picture)
    device = choose_device(args.device)
    settings = Settings(**RECIPES[args.recipe])
    augment = Augment(**section_of(settings, "augmentation"))
    if not augment.shares:
        raise UserError(f"--recipe {args.recipe} changes neither light nor stroke: name another")
    keep_freed_memory()
    torch.manual_seed(0)
    split = load_dataset("mnist", args.data_dir).train[: settings.batch_size]
    precision = choose_precision("auto", device)
    found = times(settings, augment, split.to(device), precision, args.turns)
    steps = next(iter(found.values()))
    rows = []
    for name, own in found.items():
        of_step = statistics.median(time / step for time, step in zip(own, steps, strict=True))
        rows.append([name, f"{1000 * statistics.median(own):.1f} ms", f"{100 * of_step:.1f} %"])
    report.publish(
        f"Changes of light and stroke of `{args.recipe}`, batch {settings.batch_size}",
        ["what", "time", "of a step"],
        rows,
        device=device,
        record=args.record,
        notes=f"Medians of {args.turns} turns, the step in {precision} without the loader.",
    )
    if args.picture:
        images = split.images[:EXAMPLES].float() / 255
        rows = examples(images, augment, torch.Generator().manual_seed(0))
        title = f"What the recipe {args.recipe} does to light and strokes in training"
        figures.save(draw_picture(rows, title), args.picture)
        print(f"\nSaved {args.picture}")


if __name__ == "__main__":
    cli.run(main)
