"""Accuracy and time of a recipe over several seeds, and time to accuracy over several budgets.

Each run is a process of its own, `src/train.py --recipe NAME --seed S`, which scores the test set
once, at its end. With several `--epochs` the table tells after which budget a mean test accuracy is
reached; the schedule always ends with the budget, and no run is stopped by looking at the test set.
The first of the two times is that of the epochs, from compiling and the first training step to the
last validation, without what is written between them; the second is the process's from start to
end, importing, loading, testing and drawing included. What holds on any machine are the FLOPs of
training, see `report.training_flops`; beside them stands their rate in the first time, as a share
of the machine's peak. For MNIST the first time is told in epochs of the plain way (plain.py, fp32),
too. Both are measured after each run, since a machine's speed changes.

    python benchmarks/accuracy.py --recipe cifar --dataset folder --data_dir photos --seeds 5
"""

import report  # finds src

import shlex
import statistics
import time
from argparse import Namespace
from math import nan
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import cli
from common.device import choose_device
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.load import load_dataset
from plain import PlainWay
from recipes import DATASET_SETTINGS, RECIPES
from settings import add_flags
from training.resolve import resolve

PLAIN_STEPS, PLAIN_BATCH = 10, 128  # that tell the plain way's speed
TARGETS = (97.39, 99.0, 99.5, 99.7)  # % of MNIST's test set


class Measured(NamedTuple):
    """What a run tells: accuracies in percent, seconds from the first step and of the process."""

    test: float
    val: float
    seconds: float
    whole: float
    flops: float
    of_peak: float
    plain_epochs: float


def train(
    seed: int, epochs: int, args: Namespace, more: list[str], plain: PlainWay | None
) -> Measured:
    start = time.perf_counter()
    data_dir = ("--data_dir", args.data_dir) if args.data_dir else ()
    history = report.train(
        *("--recipe", args.recipe, "--epochs", epochs, "--seed", seed, "--dataset", args.dataset),
        *(*data_dir, "--device", args.device, *more),
    )
    whole = time.perf_counter() - start
    seconds = sum(row["seconds"] for row in history["epochs"])
    flops = report.training_flops(history)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[history["precision"]]
    of_peak = flops / seconds / report.matmul_peak(dtype, choose_device(args.device))
    plain_epoch = nan
    if plain:
        steps = 54_000 / PLAIN_BATCH  # of an epoch
        plain_epoch = steps * plain.seconds("fp32", PLAIN_STEPS) / PLAIN_STEPS
    test, val = (history["test"][name] for name in ("top1", "best_val_acc"))
    return Measured(test, val, seconds, whole, flops, of_peak, seconds / plain_epoch)


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--recipe", default="article", choices=RECIPES, help="of src/recipes.py")
    parser.add_argument(
        "--seeds", default=3, type=cli.integer(1, 1000), help="runs, from seed 0 on"
    )
    parser.add_argument(
        "--epochs", default=None, type=cli.integer(1), nargs="+", help="None: the recipe's own"
    )
    parser.add_argument(
        "--flags", default="", help='more of src/train.py\'s, as in --flags="--embed_dim 64"'
    )
    parser.add_argument("--dataset", default="mnist", choices=DATASET_SETTINGS, help="any set")
    add_flags(parser, ("data_dir", "device"))
    report.add_record(parser)
    args = parser.parse_args()
    try:
        flags = shlex.split(args.flags)
    except ValueError as error:
        raise UserError(f"--flags {args.flags}: {error}") from None
    device, is_mnist = choose_device(args.device), args.dataset == "mnist"

    plain = None
    if is_mnist:
        data_dir = args.data_dir or NAMED_SETS["mnist"].data_dir
        load_dataset("mnist", data_dir)  # fetches it, if need be
        plain = PlainWay(data_dir, device, PLAIN_BATCH)
        plain.seconds("fp32", 2)  # warm-up
    rows, reached = [], {}
    for epochs in sorted(args.epochs or [resolve(args.recipe, args.dataset, {}).epochs]):
        seeds = tqdm(range(args.seeds), desc=f"{epochs} epochs", leave=False, disable=None)
        runs = [train(seed, epochs, args, flags, plain) for seed in seeds]
        test = [run.test for run in runs]
        spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        mean = Measured(*map(statistics.mean, zip(*runs, strict=True)))
        rows.append(
            [
                str(epochs),
                f"{mean.test:.2f}{spread} %",
                f"{min(test):.2f} %",
                f"{mean.val:.2f} %",
                f"{mean.seconds:.1f} s",
                f"{mean.whole:.1f} s",
                f"{mean.flops / 1e12:.1f}",
                f"{100 * mean.of_peak:.0f} %",
                f"{mean.plain_epochs:.2f}" if is_mnist else "-",
            ]
        )
        for target in TARGETS:
            if mean.test >= target:
                reached.setdefault(target, f"{target} % after {rows[-1][4]}")
    if plain:
        plain.close()
    what = f"`{args.recipe}`" if is_mnist else f"`{args.recipe}` on {args.dataset}"
    accuracies = ["test, mean", "test, min", "validation, mean"]
    report.publish(
        f"Accuracy of {what}, {args.seeds} seed{'s' * (args.seeds > 1)}",
        [
            "epochs",
            *accuracies,
            "from first step",
            "process",
            "TFLOP",
            "of the peak",
            "plain epochs",
        ],
        rows,
        device=device,
        record=args.record,
        notes=f"Reached: {'; '.join(reached.values()) or f'less than {TARGETS[0]} %'}." * is_mnist,
    )


if __name__ == "__main__":
    cli.run(main)
