"""The file of a run's best model: whose it is, what it replaces, where it is when a run goes on."""

import os
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write
from saving.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from saving.run_state import STATE_KEYS

BEST, RAW_BEST = "best_model.pt", "best_model.raw.pt"
# What belongs to a finished run beside its best model.
RESULTS = (RAW_BEST, "history.json", "timing_cpu.txt", "timing_cuda.txt", "timing_mps.txt")


def set_aside(folder: Path, new: dict[str, Any]) -> None:
    """Move another run's best model out of the way, with its history and timings, and say so.

    They go to a folder in `folder`, named after the time when the model was written. The model of a
    run with the same settings on the same images stays: it is to be replaced. Raises UserError if
    they can't be moved.

    Args:
        new: the checkpoint that will take the place, with `dataset`, `settings` and `fingerprint`.
    """
    best_path = folder / BEST
    if not best_path.exists():
        return
    try:
        old = read_checkpoint(best_path)
        if all(old[name] == new[name] for name in ("dataset", "settings", "fingerprint")):
            return
        what = f"the best model of another run ({old['best_acc']:.2f} % of its validation images)"
    except Exception:  # a value of a wrong kind can raise anything
        what = "a best model of unknown settings"
    print(f"kept:     {what} is now {move_aside(best_path, RESULTS) / BEST}")


def move_aside(path: Path, others: Sequence[str]) -> Path:
    """Move a file, after others beside it, to a folder there that is named after the time when it
    was written. Raises UserError if they can't be moved. Returns the folder.
    """
    when = datetime.fromtimestamp(path.stat().st_mtime)
    aside = path.with_name(when.strftime("%Y-%m-%d_%H-%M-%S"))
    while aside.exists():
        aside = aside.with_name(f"{aside.name}_")
    try:
        aside.mkdir()
        for name in (*others, path.name):
            if path.with_name(name).exists():
                os.replace(path.with_name(name), aside / name)
    except OSError as error:
        raise UserError(
            f"{path} of another run cannot be moved to {aside} ({error.strerror or error}): name "
            "another folder with --save_dir"
        ) from None
    return aside


def keep_raw_best(best_path: Path, swa_start: int) -> None:
    """Copy the best model of the epochs before `swa_start` to `best_model.raw.pt`.

    From then on only averages compete, and the first one takes its place.
    """
    try:
        is_raw = load_checkpoint(best_path)[1]["epoch"] < swa_start
    except UserError:
        return  # there is none
    if is_raw:
        _copy(best_path, best_path.with_name(RAW_BEST))


def _copy(path: Path, to: Path) -> None:
    with atomic_write(to) as temporary:
        shutil.copyfile(path, temporary)


def restore_best(state: dict[str, Any], source: Path, best_path: Path) -> tuple[float, int]:
    """Make sure that the best model so far is at `best_path`.

    Args:
        state: the run's, to go on from.
        source: the file that `state` is from; the best model may lie beside it.

    Returns:
        Its validation accuracy in percent and its epoch. If it is lost: those of the last epoch,
        whose model takes its place, or, if the run stopped within an epoch, -1 and 0.
    """
    acc, epoch = state["best"]["acc"], state["best"]["epoch"]
    if not epoch:
        return acc, epoch
    beside = source.with_name(best_path.name)
    try:
        best = load_checkpoint(beside)[1]
    except UserError:
        best = None  # it is not there, damaged, or not a run's
    own = best and best.get("fingerprint") == state["run"]["fingerprint"]
    # One of a later epoch was written just before the stop, and will be written again.
    if own and ((best["epoch"], best["best_acc"]) == (epoch, acc) or best["epoch"] > epoch):
        if beside.resolve() != best_path.resolve():
            set_aside(best_path.parent, state)
            _copy(beside, best_path)
        return acc, epoch
    print(
        f"WARNING: the best model so far, of epoch {epoch} with {acc:.2f} %, is not beside "
        f"{source}: the best model from now on counts as the best",
        file=sys.stderr,
    )
    if state["position"]["step"]:
        return -1.0, 0
    last = state["history"][-1]
    last["is_best"] = True
    set_aside(best_path.parent, state)
    content = {name: value for name, value in state.items() if name not in STATE_KEYS}
    save_checkpoint(best_path, {**content, "best_acc": last["val_acc"]})
    return last["val_acc"], last["epoch"]
