"""Where a run's time goes: from the command to the first step, and the parts of an epoch.

Each start-up is that of a process of its own. The parts are those of two epochs of src/train.py on
whole images, as Python's profiler counts them, which makes a step a little slower.
"""

import report  # finds src

import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import train
from common import cli
from common.device import choose_device
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.load import load_dataset
from recipes import RECIPES
from settings import add_flags

# A part's time is that of these functions, by file and name.
PARTS = {
    "batches: shuffled, augmented, normalised": [("utils.py", "__iter__")],
    "forward and backward pass": [("train.py", "forward_backward")],
    "gradient clipping": [("optim.py", "clip_gradients")],
    "optimizer": [("train.py", "take_step")],
    "average of the weights": [("optimizers/average.py", "step_batch")],
    "validation": [("utils.py", "evaluate")],
    "saving": [("training/run.py", "end_epoch")],
}


def start_up(command: list[str]) -> float:
    """Seconds from a command to its first training step."""
    start, seconds = time.perf_counter(), None
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("steps:"):  # the last line before them
                seconds = time.perf_counter() - start
    if process.returncode or seconds is None:
        raise UserError(f"{' '.join(command)} ended with status {process.returncode}")
    return seconds


def profile(flags: list[str]) -> dict[tuple[str, str], float]:
    """Seconds in each function of src in a run with these flags, by file and name."""
    profiler = cProfile.Profile()
    with patch.object(sys, "argv", ["train.py", *flags]), redirect_stdout(sys.stderr):
        profiler.runcall(train.main)
    rows = pstats.Stats(profiler).stats.items()
    return {
        (Path(file).relative_to(report.SRC).as_posix(), name): with_calls
        for (file, _, name), (_, _, _, with_calls, _) in rows
        if Path(file).is_relative_to(report.SRC)
    }


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--recipe", default="article", choices=RECIPES, help="of src/recipes.py")
    parser.add_argument("--images", default=12_800, type=cli.integer(1), help="in each epoch")
    parser.add_argument("--turns", default=3, type=cli.integer(1), help="start-ups of each kind")
    add_flags(parser, ("data_dir", "device"))
    parser.set_defaults(data_dir=NAMED_SETS["mnist"].data_dir)
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    dataset = load_dataset("mnist", args.data_dir)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", "mnist", "--data_dir", str(Path(args.data_dir).resolve())]
        flags += ["--recipe", args.recipe, "--patch_drop", "0", "--device", args.device]
        flags += report.all_into(folder)
        short = [*flags, "--epochs", "1", "--train_samples", "1"]
        for what, command in {
            "python src/train.py": [report.SRC / "train.py"],
            "python launch.py train.py": [report.SRC.parent / "launch.py", "train.py"],
        }.items():
            times = [start_up([*map(str, command), *short]) for _ in range(args.turns)]
            rows.append([f"`{what}` to its first step", f"{statistics.median(times):.1f} s", ""])
        parts = profile([*flags, "--epochs", "2", "--train_samples", str(args.images)])
        history = json.loads(Path(folder, "history.json").read_text())

    seconds = {what: sum(parts[name] for name in names) for what, names in PARTS.items()}
    evaluated = 2 * len(dataset.val) + len(dataset.test)  # the test images once, after the epochs
    seconds["validation"] *= 2 * len(dataset.val) / evaluated
    whole = sum(epoch["seconds"] for epoch in history["epochs"]) + seconds["saving"]
    seconds["all else"] = whole - sum(seconds.values())
    # An epoch of all images has more steps, but is validated and saved once, too.
    scale = len(dataset.train) / history["train_images"]
    epoch = {
        what: time / 2 * (1 if what in ("validation", "saving") else scale)
        for what, time in seconds.items()
    }
    total = sum(epoch.values())
    rows += [[what, f"{time:.2f} s", f"{100 * time / total:.1f} %"] for what, time in epoch.items()]
    rows.append([f"**an epoch of {len(dataset.train):,} images**", f"{total:.1f} s", "100 %"])
    report.publish(
        f"Where the time of `{args.recipe}` goes",
        ["what", "time", "of an epoch"],
        rows,
        device=device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
