"""All that a run needs to go on as if it had never stopped, in a file: `last.pt`.

The one before it is kept as `last.prev.pt`. Both are checkpoints that inference.py can use, with
more in them: the run's flags, the position in it, the state of every random generator, the history.
They may come from strangers, so saving/run_state.py checks them, and the paths that the run reads
and writes stand in a file beside them, which counts only where it was written.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.distributed import World
from common.errors import UserError
from common.files import write_text
from common.text import shell_command
from data.dataset import Dataset
from data.folder import without_known
from optimizers.average import WeightAverage
from optimizers.schedule import Schedule
from saving.checkpoint import save_checkpoint
from saving.run_state import load_optimizer, read_run_state, refusing
from saving.stored_settings import from_stored
from settings import FLAGS, Options, Settings
from training.best_model import BEST, RESULTS, move_aside
from training.epoch_sums import EpochSums
from training.resolve import check_data_flags, resolve

LAUNCH = Path(__file__).resolve().parents[2] / "launch.py"
LAST, PREVIOUS, PATHS_FILE = "last.pt", "last.prev.pt", "last.paths.json"
# Flags whose values stand in PATHS_FILE.
PATHS = ("data_dir", "cache_dir", "output_dir", "todo_path")


@dataclass(frozen=True)
class SavedRun:
    """What a `last.pt` holds, checked, and the settings with which its run continues."""

    path: Path
    content: dict[str, Any]
    settings: Settings
    dataset: str

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.content["position"]["epoch"]

    def is_in(self, folder: Path) -> bool:
        """Whether it is the one that goes on there; a copy under another name is not."""
        return self.path.resolve().parent == folder.resolve() and self.path.name in (LAST, PREVIOUS)

    @property
    def fingerprint(self) -> str:
        return self.content["run"]["fingerprint"]


# ------------------------------------------------------------------------------------------ writing


def save_last(
    folder: Path, state: dict[str, Any], options: Options, *, first: bool, keep: bool
) -> None:
    """Write `last.pt` and the run's paths. Raises UserError if it can't be written; the
    `last.pt` of before is then still there.

    Args:
        first: the run's first save here: an earlier run's `last.prev.pt` goes.
        keep: the `last.pt` of before becomes `last.prev.pt`.
    """
    paths = {name: getattr(options, name) for name in PATHS}  # None: the digits need no data_dir
    paths = {name: path and str(Path(path).absolute()) for name, path in paths.items()}
    about = {"folder": str(folder.resolve()), "fingerprint": state["run"]["fingerprint"]}
    paths = json.dumps({**about, **paths}, indent=2) + "\n"
    if _read_text(folder / PATHS_FILE) != paths:
        write_text(folder / PATHS_FILE, paths)
    save_checkpoint(folder / LAST, state, keep=folder / PREVIOUS if keep else None)
    if first:
        (folder / PREVIOUS).unlink(missing_ok=True)


def command_to_continue(options: Options, last_path: Path, world: World) -> str:
    """The command that continues a run, with the flags about the machine, which are not saved; of
    several machines that of one process.
    """
    launch = "launch.py" if LAUNCH.parent == Path.cwd() else str(LAUNCH)
    together = ["--nproc", str(world.size)] if 1 < world.size == world.local_size else []
    python = "python" if os.name == "nt" else "python3"
    command = [python, launch, *together, "train.py", "--resume", str(last_path)]
    for name in ("device", "compile", "log"):
        if getattr(options, name) != FLAGS[name].default:
            command += [f"--{name}", getattr(options, name)]
    return shell_command(command)


# ------------------------------------------------------------------------------------------ reading


def load_last(path: Path) -> tuple[dict[str, Any], Path]:
    """Read a run's state; if the file is damaged, warn and read the save before it. Raises
    UserError if neither file holds the state of a run.

    Args:
        path: a file named `*.pt`, or a folder with a `last.pt`.
    """
    is_folder = os.path.isdir(path) or (not os.path.exists(path) and path.suffix != ".pt")
    path = path / LAST if is_folder else path
    previous = path.with_name(PREVIOUS)
    if not os.path.exists(path) and not (path.name == LAST and os.path.exists(previous)):
        raise UserError(
            f"there is no {path} to resume: leave --resume out to start a run, or name the "
            f"{LAST} that one has left"
        )
    try:
        return read_run_state(path), path
    except UserError as error:
        if path.name != LAST or not previous.exists():
            raise
        state = read_run_state(previous)
        reason = str(error).partition(";")[0]  # what follows is what else to do
        print(f"WARNING: {reason}\ngoing on from the save before it, {previous}", file=sys.stderr)
        return state, previous


def find_paths(source: Path, run: dict[str, Any], given: dict[str, Any]) -> dict[str, str | Path]:
    """The paths with which the run in `source` goes on, where the command line names none. Raises
    UserError if they are not told, or were told for another folder: this one was moved, or is a
    stranger's, which must not choose where we write; and where a path has no effect.

    Args:
        run: what the file says of it; the digits need no `--data_dir`.
        given: the flags that the command line names.
    """
    if run["dataset"] != "folder":
        check_data_flags(run["dataset"], given)
    wanted = [name for name in PATHS if name not in given]
    try:
        # Earlier versions did not keep cache_dir.
        told = {"cache_dir": None} | json.loads(_read_text(source.with_name(PATHS_FILE)))
        about = told["folder"], told["fingerprint"]
        if about == (str(source.parent.resolve()), run["fingerprint"]):
            found = {name: told[name] for name in wanted}
            return {name: p and FLAGS[name].metadata["type"](p) for name, p in found.items()}
        reason = "was written for another folder or run"
    except (ValueError, LookupError, TypeError, RecursionError):
        reason = "is not there or damaged"
    idle = {"cache_dir"} | ({"data_dir"} if run["dataset"] == "digits" else set())
    wanted = [f"--{name}" for name in wanted if name not in idle]
    if wanted:
        raise UserError(
            f"where the run in {source} reads and writes is not known: "
            f"{source.with_name(PATHS_FILE)} {reason}; give {', '.join(wanted)} again"
        )
    return {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def go_on(
    content: dict[str, Any], path: Path, options: Options, given: dict[str, Any]
) -> tuple[Options, SavedRun]:
    """The saved run in `path`, with the changes that the command line may make. Raises UserError
    if a flag contradicts the run.

    Args:
        options: of the command line; its `save_dir` is kept.
        given: the flags that it names, with the paths found for those that it doesn't.
    """
    stored, settings = from_stored(content["run"])
    before = {**vars(stored), **settings}
    for name, value in given.items():
        may_change = FLAGS[name].metadata["changes"]
        if not may_change and value != before[name] and (name, value) != ("dataset", "auto"):
            has = "was started without it" if before[name] is None else f"has {before[name]}"
            raise UserError(
                f"--{name} {value} contradicts the run in {path}, which {has}: leave it out, or "
                "leave --resume out to start a new run"
            )
        if name == "epochs" and value < before[name]:
            raise UserError(
                f"--epochs {value} is less than the {before[name]} of the run in {path}: give "
                "more, or leave it out"
            )
    changes = {name: value for name, value in given.items() if FLAGS[name].metadata["changes"]}
    settings = resolve(stored.recipe, stored.dataset, {**settings, **changes})
    changes = {name: value for name, value in changes.items() if hasattr(stored, name)}
    options = replace(stored, **changes | {"save_dir": options.save_dir})
    return options, SavedRun(path, content, settings, stored.dataset)


def check_same_images(saved: SavedRun, dataset: Dataset) -> Dataset:
    """The data set as the run had it. Raises UserError unless a folder still has the images and
    classes that the run began with.
    """
    if dataset.trained_on is None:
        return without_known(dataset, saved.content.get("trained_before"))
    content = saved.content
    shape = tuple(content["model_config"][name] for name in ("in_chans", "img_size"))
    with refusing(saved.path):
        same = torch.equal(content["trained_on"], dataset.trained_on)
    same &= content["class_names"] == list(dataset.class_names)
    if not same or shape != dataset.image_shape[:2]:
        raise UserError(
            f"the images in {dataset.name} are not those that the run in {saved.path} was trained "
            "on: put these back and take others out, or leave --resume out to start a new run"
        )
    return without_known(dataset, content.get("trained_before"))


def note_unfinished(folder: Path, saved: SavedRun | None) -> None:
    """Say so if a run that could go on in `folder` will make way for another, or for another state
    of itself, which is in `saved`.
    """
    if found := _unfinished(folder):
        path, state = found
        fate = "move it to a folder of its own" if _is_kept(state, saved) else "replace it"
        print(
            f"note: {path} holds a run that stopped after {_progress(state)} epochs; --resume "
            f"{folder / LAST} would continue it, the first save of this run will {fate}",
            file=sys.stderr,
        )


def set_unfinished_aside(folder: Path, saved: SavedRun | None) -> None:
    """Move all files of another run that could go on, after an epoch or more, to a folder of their
    own in `folder`, where `--resume` finds them. Raises UserError if they can't be moved.
    """
    if (found := _unfinished(folder)) and _is_kept(found[1], saved):
        path, state = found
        paths = _read_text(folder / PATHS_FILE)
        aside = move_aside(path, (LAST, PREVIOUS, PATHS_FILE, BEST, *RESULTS))
        with suppress(ValueError, TypeError):  # damaged: then the paths will be asked for
            paths = json.loads(paths) | {"folder": str(aside.resolve())}
            write_text(aside / PATHS_FILE, json.dumps(paths, indent=2) + "\n")
        print(f"kept:     the run that stopped after {_progress(state)} epochs is now in {aside}")


def _unfinished(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file and the state of a run that could go on in a folder; None if there is none."""
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            state = read_run_state(path)
        except UserError:
            continue
        done = state["position"]["epoch"] >= state["run"]["settings"]["epochs"]
        return None if done else (path, state)
    return None


def _is_kept(state: dict[str, Any], saved: SavedRun | None) -> bool:
    """Whether a run that could go on is another than that in `saved`, and worth a folder."""
    same = saved is not None and saved.fingerprint == state["run"]["fingerprint"]
    return state["position"]["epoch"] > 0 and not same


def _progress(state: dict[str, Any]) -> str:
    return f"{state['position']['epoch']} of {state['run']['settings']['epochs']}"


def restore(
    saved: SavedRun,
    model: nn.Module,
    average: WeightAverage,
    optimizer: Optimizer,
    schedule: Schedule,
    sums: EpochSums,
    device: torch.device,
    world: World,
) -> None:
    """Put everything where it was when the run was saved.

    Processes beyond those that the state knows keep their generators as they are. Raises UserError
    if the state doesn't fit.
    """
    state = saved.content
    with refusing(saved.path):
        model.load_state_dict(state["raw_model_state_dict"])
        average.load_state_dict(state["average_state_dict"])
        load_optimizer(optimizer, state["optimizer_state_dict"], model)
        position = state["scheduler_state_dict"]
        schedule.load_state_dict(position)  # after the optimizer's: it sets the rates
        there = len(position["val_losses"]), position["batch"]
        if there != (state["position"]["epoch"], state["position"]["step"]):
            raise ValueError(f"its schedule is at {there}, the run is not")
        if world.rank < len(state["random"]):
            set_random_state(state["random"][world.rank], device)
        sums.load_state_dict(state["position"]["totals"], world)


# ------------------------------------------------------------------------------ random generators


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of PyTorch's generators in this process: dropout, the patches that are left out,
    mixup and CutMix draw from them.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators where they were; a GPU's only if there was one."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
