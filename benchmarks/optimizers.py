"""Every optimizer for the same short run of src/train.py on MNIST; prints a Markdown table.

The learning rates are those that worked best in a short search on a small network; none is tuned
to the last percent, so the table says what learns how fast, not which optimizer is best.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src"
sys.path.insert(0, str(SRC))

import cli  # noqa: E402
from cli import UserError  # noqa: E402

# The call, and the flags that differ from the common ones.
OPTIMIZERS: list[tuple[str, list[str]]] = [
    ("AdamW(lr=1e-3)", []),
    ("AdamW(lr=5e-4, do_bias_correction=False)", ["--warmup_epochs", "1"]),
    ("Adam(lr=1e-3)", []),
    ("Adamax(lr=3e-3)", []),
    ("NAdam(lr=1e-3)", []),
    ("RAdam(lr=3e-3)", []),
    ("Adafactor(lr=0.02)", []),
    ("Adagrad(lr=0.01)", []),
    ("Adadelta(lr=1)", []),
    ("RMSprop(lr=5e-4)", []),
    ("Rprop(lr=1e-3, step_sizes=(1e-6, 1e-2))", []),
    ("SGD(lr=0.1, momentum=0.9, nesterov=True)", []),
    ("ASGD(lr=0.3)", []),
    ("LBFGS(lr=0.1, max_iter=4, history_size=10)", ["--grad_clip", "0"]),
    ("LAMB(lr=0.01)", []),
    ("LAMB(lr=0.01, adam_w_mode=False)", []),
    ("Muon(lr=0.02)", ["--lr", "3e-3"]),
]
COMMON = ["--scheduler", "CosineAnnealingLR", "--scheduler_interval", "step"]


def train(call: str, flags: list[str], args: argparse.Namespace) -> tuple[float, float]:
    """(best validation accuracy in percent, milliseconds per step) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SRC / "train.py"), "--optimizer", call, *COMMON]
        command += ["--epochs", str(args.epochs), "--batch_size", str(args.batch_size)]
        command += ["--train_samples", str(args.train_samples), "--data_dir", str(args.data_dir)]
        command += ["--save_dir", folder, "--output_dir", folder]
        command += ["--todo_path", str(Path(folder, "TODO.md")), *flags, *args.flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        epochs = json.loads(Path(folder, "history.json").read_text())["epochs"]
    accuracy = max(epoch["val_acc"] for epoch in epochs)
    return accuracy, 1000 * args.batch_size / epochs[-1]["images_per_second"]


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="optimizers whose call begins with this")
    parser.add_argument("--epochs", type=cli.integer(1), default=2, help="length of each run")
    parser.add_argument("--batch_size", type=cli.integer(1), default=128, help="images per step")
    parser.add_argument("--train_samples", type=cli.integer(1), default=20_000, help="images")
    parser.add_argument("--data_dir", type=Path, default=Path("./mnist"), help="where MNIST is")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()
    print(
        "| optimizer | flags | validation accuracy | ms per step |\n|---|---|---|---|", flush=True
    )
    for call, flags in OPTIMIZERS:
        if call.lower().startswith(args.only.lower()):
            accuracy, milliseconds = train(call, flags, args)
            row = f"| `{call}` | {' '.join(flags)} | {accuracy:.2f} % | {milliseconds:.1f} |"
            print(row, flush=True)


if __name__ == "__main__":
    cli.run(main)
