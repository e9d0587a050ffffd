"""All that a run needs to go on as if it had never stopped, in a file: `last.pt`.

The one before it is kept as `last.prev.pt`. Both are checkpoints that inference.py can use, with
more in them: the run's settings, the position in it, the state of every random generator, the
history. Nothing in them is believed before it is checked: they may come from strangers. So the
paths that the run reads and writes stand in a file beside them, which counts only where it was
written.
"""

import argparse
import copy
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from common.distributed import World
from common.errors import UserError
from common.files import replacing, write_text
from optim import Schedule, WeightAverage
from recipes import DEFAULTS, fingerprint
from saving.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint

LAST, PREVIOUS, PATHS_FILE = "last.pt", "last.prev.pt", "last.paths.json"
BEST, RAW_BEST = "best_model.pt", "best_model.raw.pt"
PATHS = ("data_dir", "output_dir", "todo_path")  # flags whose values stand in PATHS_FILE
# What belongs to a finished run beside its best model.
RESULTS = (RAW_BEST, "history.json", "timing_cpu.txt", "timing_cuda.txt")
# Flags that a run may go on with other values of. All others are the run's own.
MAY_CHANGE = {"resume", "epochs", "device", "save_dir", "output_dir", "todo_path", "data_dir"}
MAY_CHANGE |= {"num_workers", "compile", "save_every_steps", "on_nonfinite", "grad_accum_steps"}
# What a run repeats beside its settings, as flags.
OF_THE_RUN = ("recipe", "dataset", "seed", "train_samples", "precision", "num_workers")
OF_THE_RUN += ("grad_accum_steps", "save_every_steps", "on_nonfinite")
OF_A_STATE = ("average_state_dict", "run", "position", "best", "history", "random")
ROW = ("epoch", "train_loss", "train_acc", "grad_norm", "lr", "val_loss", "val_acc", "val_top5")
ROW += ("seconds", "images_per_second")
SOMETIMES_IN_ROW = ("skipped_steps", "is_best", "finished")


def save_last(
    folder: Path, state: dict[str, Any], args: argparse.Namespace, *, first: bool
) -> None:
    """Write `last.pt` and the run's paths; the `last.pt` of before becomes `last.prev.pt`.

    Args:
        args: with the flags of PATHS.
        first: of a run: then what was there is an earlier run's, and is not kept.

    Raises:
        UserError: it can't be written. What was there is still there.
    """
    paths = {name: str(Path(getattr(args, name)).absolute()) for name in PATHS}
    about = {"folder": str(folder.resolve()), "fingerprint": state["run"]["fingerprint"]}
    paths = json.dumps({**about, **paths}, indent=2) + "\n"
    if _read_text(folder / PATHS_FILE) != paths:
        write_text(folder / PATHS_FILE, paths)
    save_checkpoint(folder / LAST, state, keep=None if first else folder / PREVIOUS)
    if first:
        (folder / PREVIOUS).unlink(missing_ok=True)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def find_paths(source: Path, run: dict[str, Any], given: dict[str, Any]) -> dict[str, str]:
    """The paths with which the run in `source` goes on, where the command line names none.

    Args:
        run: what the file says of it; the digits need no `--data_dir`.
        given: the flags that the command line names.

    Raises:
        UserError: they are not told, or were told for another folder: this one was moved, or is a
            stranger's, which must not choose where we write.
    """
    wanted = [name for name in PATHS if name not in given]
    try:
        told = json.loads(_read_text(source.with_name(PATHS_FILE)))
        about = told["folder"], told["fingerprint"]
        if about == (str(source.parent.resolve()), run["fingerprint"]):
            return {name: str(told[name]) for name in wanted}
        reason = "was written for another folder or run"
    except (ValueError, LookupError, TypeError, RecursionError):
        reason = "is not there or damaged"
    wanted = [f"--{name}" for name in wanted if (name, run["dataset"]) != ("data_dir", "digits")]
    if wanted:
        raise UserError(
            f"where the run in {source} reads and writes is not known: "
            f"{source.with_name(PATHS_FILE)} {reason}; give {', '.join(wanted)} again"
        )
    return {}


def load_last(path: Path) -> tuple[dict[str, Any], Path]:
    """Read a run's state, from the file before it with a warning where this one is damaged.

    Args:
        path: a file named `*.pt`, or a folder with a `last.pt`.

    Returns:
        The checkpoint, and the file that it was read from.

    Raises:
        UserError: neither file holds the state of a run.
    """
    is_folder = path.is_dir() or (not path.exists() and path.suffix != ".pt")
    path = path / LAST if is_folder else path
    previous = path.with_name(PREVIOUS)
    if not path.exists() and not (path.name == LAST and previous.exists()):
        raise UserError(
            f"there is no {path} to resume: leave --resume out to start a run, or name the "
            f"{LAST} that one has left"
        )
    try:
        return _load(path), path
    except UserError as error:
        if path.name != LAST or not previous.exists():
            raise
        state = _load(previous)
        reason = str(error).partition(";")[0]  # what follows is what else to do
        print(f"WARNING: {reason}\ngoing on from the save before it, {previous}", file=sys.stderr)
        return state, previous


def _load(path: Path) -> dict[str, Any]:
    _, state = load_checkpoint(path)  # which rebuilds the model from it, so sizes agree
    if "run" not in state:
        raise UserError(f"{path} holds a model but not the state of a run: name a {LAST}")
    try:
        epoch, step = state["position"]["epoch"], state["position"]["step"]
        if type(epoch) is not int or type(step) is not int or epoch < 0 or step < 0:
            raise ValueError(f"position {epoch!r}, {step!r}")
        if len(state["history"]) != epoch:
            raise ValueError(f"{len(state['history'])} rows of history after {epoch} epochs")
        best_acc = -1.0
        for number, row in enumerate(state["history"], 1):
            check_row(row, number)
            row.setdefault("is_best", row["val_acc"] > best_acc)  # not told by older ones
            best_acc = max(best_acc, row["val_acc"])
        totals = state["position"]["totals"]
        sums = [*totals["sums"], totals["grad_norm"], *totals["lrs"], totals["seconds"]]
        if totals["steps"] != step or not all(map(math.isfinite, sums)):
            raise ValueError("its sums over the epoch are not those of its steps")
        best = state["best"]
        if type(best["epoch"]) is not int or not 0 <= best["epoch"] <= epoch:
            raise ValueError(f"best epoch {best['epoch']!r}")
        best["acc"] = float(best["acc"])
        if not math.isfinite(best["acc"]):
            raise ValueError(f"best accuracy {best['acc']}")
        config, settings = state["model_config"], state["run"]["settings"]
        for name in config.keys() & settings.keys():
            if config[name] != settings[name]:
                raise ValueError(f"{name} {settings[name]!r} in its settings, {config[name]!r} not")
        as_flags(state["run"])
        told = state["run"].setdefault("fingerprint", fingerprint(state["run"]))
        if not re.fullmatch("[0-9a-f]{12}", told):
            raise ValueError("its fingerprint is none")
    except Exception as error:  # whatever a file that was made to mislead brings up
        raise _unusable(path, error) from None
    return state


def _unusable(path: Path, error: Exception) -> UserError:
    reason = f"no {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())
    return UserError(
        f"{path} is not the state of a run ({reason[:200]}): name a {LAST} that src/train.py wrote"
    )


def check_row(row: dict[str, Any], number: int) -> None:
    """Raise an error if a row of the history is not as train.py writes epoch `number`'s."""
    numbers = [row[name] for name in ROW if name != "lr"] + [*row["lr"].values()]
    skipped = row.get("skipped_steps", [])
    numbers += skipped
    known = row.keys() <= {*ROW, *SOMETIMES_IN_ROW} and all(type(n) is str for n in row["lr"])
    datetime.fromisoformat(row.get("finished", "2000-01-01"))
    if not known or type(skipped) is not list or type(row.get("is_best", True)) is not bool:
        raise ValueError(f"its history of epoch {number} has other things in it")
    if row["epoch"] != number or not row["lr"]:
        raise ValueError(f"epoch {number} is missing in its history")
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"its history of epoch {number} has other values than numbers")


def as_flags(run: dict[str, Any]) -> list[str]:
    """A run's settings as a command line, so that they are checked like one."""
    values = {name: run[name] for name in OF_THE_RUN}
    flags = []
    for name, value in {**values, **{name: run["settings"][name] for name in DEFAULTS}}.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None and value is not False:
            flags.append(f"--{name}={value}")
    return flags


def merge(run: argparse.Namespace, given: dict[str, Any], path: Path) -> argparse.Namespace:
    """The run's arguments, with what the command line may change and does.

    Raises:
        UserError: a flag contradicts the run.
    """
    for name, value in given.items():
        stored = getattr(run, name)
        if name not in MAY_CHANGE and value not in (stored, "auto"):
            raise UserError(
                f"--{name} {value} contradicts the run in {path}, which has {stored}: leave it "
                "out, or leave --resume out to start a new run"
            )
        if name == "epochs" and value < stored:
            raise UserError(
                f"--epochs {value} is less than the {stored} of the run in {path}: give more, or "
                "leave it out"
            )
    changed = {name: value for name, value in given.items() if name in MAY_CHANGE}
    return argparse.Namespace(**{**vars(run), **changed})


def flags_to_go_on(args: argparse.Namespace, defaults: argparse.Namespace, path: Path) -> str:
    """The flags to go on with from `path`: `--resume`, and what is told of the machine alone."""
    flags = ["--resume", str(path)]
    for name in ("device", "compile"):
        if getattr(args, name) != getattr(defaults, name):
            flags += [f"--{name}", str(getattr(args, name))]
    return shlex.join(flags)


def note_unfinished(folder: Path) -> None:
    """Say so if a new run in `folder` will replace one that could go on."""
    try:
        state = _load(folder / LAST)
    except UserError:
        return
    done, epochs = state["position"]["epoch"], state["run"]["settings"]["epochs"]
    if done < epochs:
        print(
            f"note: {folder / LAST} holds a run that stopped after {done} of {epochs} epochs; this "
            "new run will replace it, --resume would go on with it",
            file=sys.stderr,
        )


def set_aside(folder: Path, new: dict[str, Any]) -> None:
    """Move another run's best model out of the way, with its history and timings, and say so.

    They go to a folder in `folder`, named after the time when the model was written. The model of a
    run with the same settings on the same data set stays: it is to be replaced.

    Args:
        new: the checkpoint that will take the place, with `dataset` and `settings`.

    Raises:
        UserError: they can't be moved.
    """
    best_path = folder / BEST
    if not best_path.exists():
        return
    try:
        old = read_checkpoint(best_path)
        if all(old[name] == new[name] for name in ("dataset", "settings")):
            return
        what = f"the best model of another run ({old['best_acc']:.2f} % of its validation images)"
    except (UserError, LookupError, TypeError, ValueError, RuntimeError):  # or not comparable
        what = "a best model of unknown settings"
    when = datetime.fromtimestamp(best_path.stat().st_mtime)
    aside = folder / when.strftime("%Y-%m-%d_%H-%M-%S")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}_")
    try:
        aside.mkdir()
        for name in (*RESULTS, BEST):
            if (folder / name).exists():
                os.replace(folder / name, aside / name)
    except OSError as error:
        raise UserError(
            f"{best_path} of another run cannot be moved to {aside} ({error.strerror or error}): "
            "name another folder with --save_dir"
        ) from None
    print(f"kept:     {what} is now {aside / BEST}")


def keep_raw_best(best_path: Path, swa_start: int) -> None:
    """Copy the best model of the epochs before `swa_start` to `best_model.raw.pt`.

    From then on only averages compete, and the first one takes its place.
    """
    try:
        is_raw = read_checkpoint(best_path)["epoch"] < swa_start
    except (UserError, LookupError, TypeError):
        return  # there is none
    if is_raw:
        with replacing(best_path.with_name(RAW_BEST)) as temporary:
            shutil.copyfile(best_path, temporary)


# ------------------------------------------------------------------------------------- going there


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever a state that doesn't fit brings up in the block into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _unusable(path, error) from None


def restore(
    state: dict[str, Any],
    model: nn.Module,
    averaged: WeightAverage,
    optimizer: Optimizer,
    schedule: Schedule,
    device: torch.device,
    world: World,
) -> None:
    """Put everything where it was when `state` was saved.

    Processes beyond those that the state knows keep their generators as they are.

    Raises:
        Exception: whatever they raise on a state that doesn't fit.
    """
    model.load_state_dict(state["raw_model_state_dict"])
    averaged.load_state_dict(state["average_state_dict"])
    load_optimizer(optimizer, state["optimizer_state_dict"], model)
    schedule.load_state_dict(state["scheduler_state_dict"])  # after it: it sets the rates
    there = len(state["scheduler_state_dict"]["val_losses"]), state["scheduler_state_dict"]["batch"]
    if there != (state["position"]["epoch"], state["position"]["step"]):
        raise ValueError(f"its schedule is at {there}, the run is not")
    if world.rank < len(state["random"]):
        set_random_state(state["random"][world.rank], device)


def bring_best(state: dict[str, Any], source: Path, best_path: Path) -> tuple[float, int]:
    """Make sure that the best model so far is at `best_path`.

    Args:
        source: the file that `state` is from; the best model may lie beside it.

    Returns:
        Its validation accuracy in percent and its epoch; -1 and 0 if it is lost.
    """
    acc, epoch = state["best"]["acc"], state["best"]["epoch"]
    if not epoch:
        return acc, epoch
    beside = source.with_name(best_path.name)
    moved = beside.resolve() != best_path.resolve()
    try:
        best = read_checkpoint(beside)
        # One of a later epoch was written just before the stop, and will be written again.
        if (best.get("epoch"), best.get("best_acc")) == (epoch, acc) or best["epoch"] > epoch:
            if moved:
                set_aside(best_path.parent, state)
                save_checkpoint(best_path, best)
            return acc, epoch
    except UserError:
        pass  # it is not there, or damaged
    print(
        f"WARNING: the best model so far, of epoch {epoch} with {acc:.2f} %, is not beside "
        f"{source}: the best from here on takes its place",
        file=sys.stderr,
    )
    if state["position"]["step"]:
        return -1.0, 0
    last = state["history"][-1]
    last["is_best"] = True
    set_aside(best_path.parent, state)
    content = {name: value for name, value in state.items() if name not in OF_A_STATE}
    save_checkpoint(best_path, {**content, "best_acc": last["val_acc"]})
    return last["val_acc"], last["epoch"]


# ------------------------------------------------------------------------------ random generators


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's, PyTorch's and the GPU's generator in this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put all generators where they were; a GPU's only if there was one."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    if not 0 <= rest[0] <= len(keys) == 624:  # NumPy reads where it is told
        raise ValueError("its NumPy generator is at no place in its numbers")
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


# -------------------------------------------------------------------------------------- optimizer


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], model: nn.Module) -> None:
    """Load an optimizer's state after a look at every tensor.

    The fused steps look at none: one of a wrong shape would have them write anywhere in memory.

    Raises:
        Exception: the state is not such an optimizer's.
    """
    if isinstance(optimizer, torch.optim.LBFGS):  # not fused, and with lists that grow
        length = sum(p.numel() for p in model.parameters())
        allowed = {0: {name: [(), (length,), list, None] for name in state["state"].get(0, {})}}
    else:
        allowed = _shapes_after_a_step(optimizer, model)
    if state["state"] and state["state"].keys() != allowed.keys():
        raise ValueError("its optimizer knows other parameters")
    state = copy.deepcopy(state)
    for index, values in state["state"].items():
        if values.keys() != allowed[index].keys():
            raise ValueError(f"its optimizer's state has {', '.join(values)}")
        for name, value in values.items():
            values[name] = _checked(value, allowed[index][name])
    optimizer.load_state_dict(state)


def _shapes_after_a_step(optimizer: Optimizer, model: nn.Module) -> dict[int, dict[str, list]]:
    """The shapes that each value of the optimizer's state may have, None for a number; the model
    stays as it is."""
    weights = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    # The class's own step: schedules count the calls of the instance's.
    type(optimizer).step(optimizer)
    optimizer.zero_grad()
    model.load_state_dict(weights)
    state = optimizer.state_dict()["state"]
    return {
        index: {
            name: [tuple(v.shape) if isinstance(v, torch.Tensor) else None]
            for name, v in values.items()
        }
        for index, values in state.items()
    }


def _checked(value: Any, shapes: list) -> Any:
    if isinstance(value, list) and list in shapes:
        return [_checked(item, shapes) for item in value]
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or tuple(value.shape) not in shapes:
            raise ValueError(f"its optimizer's state has a tensor {tuple(value.shape)}")
        if value.dtype != torch.float32:
            raise ValueError(f"its optimizer's state has numbers of {value.dtype}")
        return value.clone(
            memory_format=torch.contiguous_format
        )  # strides may hide how little it is
    number = value is None or (type(value) in (int, float) and abs(value) <= 2**53)
    if None not in shapes or not number:
        raise ValueError(f"its optimizer's state has a {type(value).__name__} out of place")
    return value
