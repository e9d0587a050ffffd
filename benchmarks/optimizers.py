"""Every optimizer for the same short run of src/train.py on MNIST; prints a Markdown table.

The learning rates are those that worked best in a short search on a small network; none is tuned
to the last percent, so the table says what learns how fast, not which optimizer is best.
"""

import report  # finds src

import argparse

from tqdm import tqdm

from common import cli
from common.device import choose_device
from common.errors import UserError
from data.catalog import NAMED_SETS
from settings import add_flags

# The call, and the flags that it needs beside COMMON.
OPTIMIZERS: list[tuple[str, list[str]]] = [
    ("AdamW(lr=1e-3)", []),
    ("AdamW(lr=5e-4, do_bias_correction=False)", []),
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
    ("LBFGS(lr=0.1, max_iter=4, history_size=10)", ["--dropout", "0", "--precision", "fp32"]),
    ("LAMB(lr=0.01)", []),
    ("LAMB(lr=0.01, adam_w_mode=False)", []),
    ("Muon(lr=0.02)", ["--lr", "3e-3"]),
]
COMMON = ["--depth", "4", "--scheduler", "CosineAnnealingLR", "--scheduler_interval", "step"]


def train(call: str, flags: list[str], args: argparse.Namespace) -> tuple[float, float]:
    """Validation accuracy after the run (%), milliseconds per step."""
    history = report.train(
        *("--optimizer", call, *COMMON, "--epochs", args.epochs, "--batch_size", args.batch_size),
        *("--train_samples", args.train_samples, "--data_dir", args.data_dir),
        *("--device", args.device, *flags),
    )
    last = history["epochs"][-1]
    return last["val_acc"], 1000 * args.batch_size / last["images_per_second"]


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--only", default="", help="optimizers whose call begins with this")
    parser.add_argument("--epochs", type=cli.integer(1), default=1, help="length of each run")
    parser.add_argument("--batch_size", type=cli.integer(1), default=128, help="images per step")
    parser.add_argument("--train_samples", type=cli.integer(1), default=54_000, help="images")
    add_flags(parser, ("data_dir", "device"))
    parser.set_defaults(data_dir=NAMED_SETS["mnist"].data_dir)
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    chosen = [each for each in OPTIMIZERS if each[0].lower().startswith(args.only.lower())]
    if not chosen:
        raise UserError(f"--only {args.only}: no call begins with it; leave it out for all")
    rows = []
    for call, flags in tqdm(chosen, unit="run", leave=False, disable=None):
        accuracy, milliseconds = train(call, flags, args)
        more = f"`{' '.join(flags)}`" if flags else ""
        rows.append([f"`{call}`", more, f"{accuracy:.2f} %", f"{milliseconds:.0f}"])
    report.publish(
        f"Optimizers, each run with `{' '.join(COMMON)}`",
        ["optimizer", "more flags", "validation accuracy", "ms per step"],
        rows,
        device=device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
