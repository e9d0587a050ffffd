"""TODO.md's progress table: a row for each epoch of a run."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from common.files import read_bytes, write_text

TODO_HEADING = "## Training progress"
TODO_HEADER = [
    "| Epoch | State | Train loss | Val top-1 (%) | Best so far | Finished |",
    "|---|---|---|---|---|---|",
]


def reset_todo_md(
    epochs: int,
    todo_path: str | Path,
    dataset: str,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Give TODO.md's progress table a row for each epoch of a run; other text stays.

    Args:
        history: rows of history.json, of the epochs that are done; the others are not started.
    """
    before, _, after, newline = _split_todo(todo_path)
    if len(before) > 1 and before[-2].startswith("Data set: ") and not before[-1]:
        before = before[:-2]
    rows = [
        _todo_row(n, row["train_loss"], row["val_acc"], row["is_best"], row["finished"])
        for n, row in enumerate(history, 1)
    ]
    rows += [f"| {n} | not started | | | | |" for n in range(len(rows) + 1, epochs + 1)]
    before += [f"Data set: {dataset}", ""]
    write_text(todo_path, newline.join([*before, *TODO_HEADER, *rows, *after]))


def update_todo_md(
    epoch: int,
    train_loss: float,
    val_acc: float,
    is_best: bool,
    todo_path: str | Path = "./TODO.md",
) -> None:
    """Fill in an epoch's row of TODO.md's progress table, adding the row or table if it is gone."""
    before, rows, after, newline = _split_todo(todo_path)
    row = _todo_row(epoch, train_loss, val_acc, is_best, timestamp())
    same = [i for i, r in enumerate(rows) if r.split("|")[1].strip() == str(epoch)]
    first = same[0] if same else len(rows)
    others = [r for i, r in enumerate(rows) if i > first and i not in same]
    rows = [*rows[:first], row, *others]
    write_text(todo_path, newline.join([*before, *TODO_HEADER, *rows, *after]))


def _todo_row(epoch: int, train_loss: float, val_acc: float, is_best: bool, finished: str) -> str:
    best = "yes" if is_best else "no"
    return f"| {epoch} | done | {train_loss:.4f} | {val_acc:.2f} | {best} | {finished} |"


def timestamp() -> str:
    """The local time, to the second."""
    return datetime.now().isoformat(" ", "seconds")


def _split_todo(todo_path: str | Path) -> tuple[list[str], list[str], list[str], str]:
    """TODO.md's lines before, in (rows only) and after the progress table, and what ends a line."""
    text = "# TODO\n"
    if os.path.exists(todo_path):
        text = read_bytes(Path(todo_path)).decode("utf-8", errors="surrogateescape")
    newline = "\r\n" if 0 < text.count("\n") == text.count("\r\n") else "\n"
    lines = text.split(newline)
    bare = [line.rstrip("\r") for line in lines]  # where the ends of lines are mixed
    if TODO_HEADER[0] not in bare:
        heading = "" if TODO_HEADING in bare else TODO_HEADING
        return [*lines, heading, ""], [], [""], newline
    start = end = bare.index(TODO_HEADER[0]) + 1
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    ruled = start < end and not bare[start].strip("|-: ")
    return lines[: start - 1], bare[start + ruled : end], lines[end:] or [""], newline
