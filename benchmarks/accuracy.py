"""Accuracy and time of a recipe over several seeds, and time to accuracy over several budgets.

Each run is a process of its own, `src/train.py --recipe NAME --seed S`, which scores the test set
once, at its end. With several `--epochs` the table tells after which budget a mean test accuracy is
reached; the schedule always ends with the budget, and no run is stopped by looking at the test set.
The first of the two times is that of the epochs, from compiling and the first training step to the
last validation, without what is written between them; the second is the process's from start to
end, importing, loading, testing and drawing included.

    python benchmarks/accuracy.py --recipe best --dataset folder --data_dir photos --seeds 5
"""

import report  # finds src

import shlex
import statistics
import time

from tqdm import tqdm

from common import cli
from common.device import choose_device
from recipes import DATASET_SETTINGS, RECIPES
from settings import add_flags
from training.resolve import resolve

TARGETS = (97.39, 99.0, 99.5, 99.7)  # % of MNIST's test set


def train(seed: int, epochs: int, args, more: list[str]) -> tuple[float, float, float, float]:
    """Test and validation accuracy (%), seconds from the first step and of the process."""
    start = time.perf_counter()
    data_dir = ("--data_dir", args.data_dir) if args.data_dir else ()
    history = report.train(
        *("--recipe", args.recipe, "--epochs", epochs, "--seed", seed, "--dataset", args.dataset),
        *(*data_dir, "--device", args.device, *more),
    )
    whole = time.perf_counter() - start
    seconds = sum(row["seconds"] for row in history["epochs"])
    return history["test"]["top1"], history["test"]["best_val_acc"], seconds, whole


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
    device, is_mnist = choose_device(args.device), args.dataset == "mnist"

    rows, reached = [], {}
    for epochs in sorted(args.epochs or [resolve(args.recipe, args.dataset, {}).epochs]):
        seeds = tqdm(range(args.seeds), desc=f"{epochs} epochs", leave=False, disable=None)
        runs = [train(seed, epochs, args, shlex.split(args.flags)) for seed in seeds]
        test, val, seconds, whole = zip(*runs, strict=True)
        spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        mean_test = statistics.mean(test)
        rows.append(
            [
                str(epochs),
                f"{mean_test:.2f}{spread} %",
                f"{min(test):.2f} %",
                f"{statistics.mean(val):.2f} %",
                f"{statistics.mean(seconds):.1f} s",
                f"{statistics.mean(whole):.1f} s",
            ]
        )
        for target in TARGETS:
            if mean_test >= target:
                reached.setdefault(target, f"{target} % after {rows[-1][4]}")
    what = f"`{args.recipe}`" if is_mnist else f"`{args.recipe}` on {args.dataset}"
    report.publish(
        f"Accuracy of {what}, {args.seeds} seed{'s' * (args.seeds > 1)}",
        ["epochs", "test, mean", "test, min", "validation, mean", "from first step", "process"],
        rows,
        device=device,
        record=args.record,
        notes=f"Reached: {'; '.join(reached.values()) or f'less than {TARGETS[0]} %'}." * is_mnist,
    )


if __name__ == "__main__":
    cli.run(main)
