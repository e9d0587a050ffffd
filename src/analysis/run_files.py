"""The files that a training run leaves beside its checkpoint, `history.json` and the timings.

A stranger may have made them, or someone may have edited them by hand: every number is checked,
and every text cut to one short line.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis.figures import label, one_line
from common.errors import UserError
from common.files import read_bytes

MAX_BYTES = 20_000_000  # of a history; an epoch takes about 500
EPOCH_NUMBERS = ("epoch", "train_loss", "train_acc", "grad_norm")
EPOCH_NUMBERS += ("val_loss", "val_acc", "val_top5", "seconds")
TIMING_NUMBERS = ("total_train_time", "avg_time_per_epoch", "best_val_acc", "test_acc")
SAME = ("fingerprint", "dataset", "epochs", "batch_size")  # in timings that are compared
# Raised where a file holds something else than such a file does.
WRONG_CONTENT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
WRONG_CONTENT += (RecursionError,)  # JSON that is nested too deep


def read_run_files(
    folder: Path, checkpoint: dict[str, Any]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[str]]:
    """Read what a run left in `folder`, as far as it belongs to the checkpoint.

    Returns:
        The history, or None; the timings of the same training on a CPU and on a GPU, or an empty
        list; and notes, a line each, on what is left out and why.
    """
    notes: list[str] = []

    def read(reader: Callable[[Path], dict[str, Any]], name: str) -> dict[str, Any] | None:
        try:
            return reader(folder / name)
        except FileNotFoundError:
            return None
        except UserError as error:
            notes.append(f"{one_line(str(error), 300)}; it is left out")
            return None

    history = read(read_history, "history.json")
    timings = [read(read_timing, f"timing_{kind}.txt") for kind in ("cpu", "cuda")]
    if history and not _same_run(history, checkpoint):
        notes.append(f"{folder / 'history.json'} is left out: it is not of this checkpoint's run")
        history = None
    if not all(timings):
        return history, [], notes
    cpu, gpu = ([timing.get(name) for name in SAME] for timing in timings)
    if cpu != gpu or timings[0].get("fingerprint") != checkpoint.get("fingerprint"):
        notes.append("times on CPU and GPU are left out: not both are of this run's settings")
        return history, [], notes
    return history, timings, notes


def read_history(path: Path) -> dict[str, Any]:
    """A run's `history.json`, as far as the report uses it, with every number checked. Raises
    UserError if it is damaged, or has another form, FileNotFoundError if there is none.
    """
    try:
        data = json.loads(_read(path))
        rows = [
            {
                **{name: _number(row[name]) for name in EPOCH_NUMBERS},
                "epoch": int(_number(row["epoch"])),
                "is_best": row.get("is_best") is True,
                "lr": {label(k): _number(v) for k, v in list(row["lr"].items())[:20]},
            }
            for row in data["epochs"]
        ]
        if not any(row["is_best"] for row in rows):
            raise ValueError("no epoch is the best one")
        if any(row["lr"].keys() != rows[0]["lr"].keys() for row in rows):
            raise ValueError("not the same learning rates in all epochs")
        test = data["test"]
        if test is not None:
            test = {name: _number(test[name]) for name in ("loss", "top1", "top5")}
        if not isinstance(data["settings"], dict):
            raise TypeError("settings")
        return {
            "dataset": str(data.get("dataset")),
            "fingerprint": data.get("fingerprint"),
            **{name: data.get(name) for name in ("device", "precision")},
            "settings": data["settings"],
            "epochs": rows,
            "test": test,
        }
    except WRONG_CONTENT as error:
        raise UserError(f"{path} is not a history of a training run ({_reason(error)})") from None


def read_timing(path: Path) -> dict[str, Any]:
    """A run's `timing_<device type>.txt`, lines of `key: value`; times in seconds. Raises UserError
    if it is damaged, or has another form, FileNotFoundError if there is none.
    """
    try:
        pairs = (line.partition(":") for line in _read(path).splitlines()[:100])
        timing: dict[str, Any] = {key.strip(): one_line(value, 80) for key, _, value in pairs}
        optional = ("test_top5",) if "test_top5" in timing else ()
        timing |= {name: _number(float(timing[name])) for name in (*TIMING_NUMBERS, *optional)}
        if min(timing["total_train_time"], timing["avg_time_per_epoch"]) <= 0:
            raise ValueError("a time that is not above 0")
    except WRONG_CONTENT as error:
        raise UserError(f"{path} is not a timing of a training run ({_reason(error)})") from None
    return timing


def _read(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(path)
    content = read_bytes(path, MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is too large: over {MAX_BYTES // 1_000_000} MB")
    return content.decode()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{type(value).__name__} for a number")
    if not abs(value) <= 1e12:  # true of NaN as well
        raise ValueError("a number that is not finite, or too large")
    return float(value)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else one_line(str(error), 120)


def _same_run(history: dict[str, Any], checkpoint: dict[str, Any]) -> bool:
    """Whether the history has the checkpoint's settings and, in an epoch, its accuracy."""
    found = any(abs(row["val_acc"] - checkpoint["best_acc"]) < 0.01 for row in history["epochs"])
    same = history["fingerprint"] == checkpoint.get("fingerprint")
    return found and same and history["dataset"] == checkpoint["dataset"]
