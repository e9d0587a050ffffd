"""The command line of optim.py. Nothing here needs PyTorch, so that flags are read before it."""

import argparse
from pathlib import Path
from typing import Any

from common import cli
from common.errors import UserError
from settings import Settings, add_flags, section_of

MAX_PLOTTED = 1_000_000  # steps of a run that is drawn


def parse_args() -> tuple[argparse.Namespace, dict[str, Any]]:
    """All flags of the command line with their values, and those that it names. Raises UserError if
    a flag is not known, its value is out of bounds, or it has no effect.
    """
    parser = cli.Parser(
        description="List the optimizers and schedules, or draw how a schedule moves the rate."
    )
    parser.add_argument("--list", action="store_true", help="print the names and their arguments")
    parser.add_argument("--plot", action="store_true", help="draw --scheduler, or all schedules")
    parser.add_argument("--output", type=Path, default=Path("./outputs/lr_schedules.png"))
    parser.add_argument("--epochs", type=cli.integer(1), default=20, help="length of the run")
    parser.add_argument("--steps_per_epoch", type=cli.integer(1), default=422, help="batches")
    add_flags(parser, section_of(Settings(), "optimization"))
    parser.set_defaults(scheduler=None)
    args, given = parser.parse_args(), parser.given
    if not (args.list or args.plot):
        raise UserError("nothing to do: give --list or --plot")
    if args.plot and args.epochs * args.steps_per_epoch > MAX_PLOTTED:
        raise UserError(
            f"--epochs {args.epochs} x --steps_per_epoch {args.steps_per_epoch} are too many to "
            f"draw: expected at most {MAX_PLOTTED:,} steps"
        )
    if not args.plot and (without_effect := given.keys() - {"list"}):
        raise UserError(f"--{min(without_effect)} has no effect without --plot")
    others = given.keys() - {"plot", "list", "output", "scheduler"}
    if args.plot and others and not args.scheduler:
        raise UserError(
            f"--{min(others)} is for one schedule: name it with --scheduler, or leave it out to "
            "draw the gallery of all"
        )
    return args, given
