"""The state of a run, read from its `last.pt` and checked: the file may be a stranger's.

It is a checkpoint with more in it: `run` (its flags), `position`, `best`, `history`, `random`,
`average_state_dict` and `raw_model_state_dict`. The flags are checked by settings.py, the model's
tensors by checkpoint.py, the optimizer's state here, once there is an optimizer to compare with.
"""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.errors import UserError
from recipes import DATASET_SETTINGS
from saving.checkpoint import load_checkpoint, refusal
from saving.stored_settings import from_stored

# What a state has beyond a checkpoint of a trained model.
STATE_KEYS = ("average_state_dict", "run", "position", "best", "history", "random")
ROW_KEYS = ("epoch", "train_loss", "train_acc", "grad_norm", "lr", "val_loss", "val_acc")
ROW_KEYS += ("val_top5", "seconds", "images_per_second")
OTHER_ROW_KEYS = ("skipped_steps", "is_best", "finished")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever a state that doesn't fit raises in the block into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a hostile file can raise anything
        raise refusal(path, error, what="the state of a run") from None


def read_run_state(path: Path) -> dict[str, Any]:
    """The content of a `last.pt`, all checked but the optimizer's state. Raises UserError if it
    can't be read, or holds no state of a run.
    """
    _, state = load_checkpoint(path)  # which rebuilds the model from it, so sizes agree
    if "run" not in state:
        raise UserError(f"{path} holds a model but not the state of a run: name a last.pt")
    with refusing(path):
        _check_history(state["history"], state["position"]["epoch"])
        _check_position(state["position"])
        best = state["best"]
        best["acc"] = float(best["acc"])
        if type(best["epoch"]) is not int or not 0 <= best["epoch"] <= state["position"]["epoch"]:
            raise ValueError(f"best epoch {best['epoch']!r}")
        if not math.isfinite(best["acc"]):
            raise ValueError(f"best accuracy {best['acc']}")
        run, config = state["run"], state["model_config"]
        _, settings = from_stored(run)
        if run["dataset"] not in DATASET_SETTINGS:  # "auto" is a flag, not a data set
            raise ValueError(f"its data set is {run['dataset']!r}")
        for name in config.keys() & settings.keys():
            if config[name] != settings[name]:
                raise ValueError(f"{name} is {settings[name]!r} in its settings, but not its model")
        if not re.fullmatch("[0-9a-f]{12}", run["fingerprint"]):
            raise ValueError("its fingerprint is not 12 hexadecimal digits")
        run["settings"] = settings  # complete and checked
    return state


def _check_position(position: dict[str, Any]) -> None:
    epoch, step, sums = position["epoch"], position["step"], position["totals"]
    if type(epoch) is not int or type(step) is not int or epoch < 0 or step < 0:
        raise ValueError(f"position {epoch!r}, {step!r}")
    numbers = [*sums["sums"], sums["grad_norm"], *sums["lrs"], sums["seconds"]]
    if sums["steps"] != step or not all(map(math.isfinite, numbers)):
        raise ValueError("its sums over the epoch are not those of its steps")


def _check_history(history: list[dict[str, Any]], epochs: int) -> None:
    if len(history) != epochs:
        raise ValueError(f"{len(history)} rows of history after {epochs} epochs")
    for number, row in enumerate(history, 1):
        _check_row(row, number)


def _check_row(row: dict[str, Any], number: int) -> None:
    """Raise an error if a row of the history is not as train.py writes epoch `number`'s."""
    numbers = [row[name] for name in ROW_KEYS if name != "lr"] + [*row["lr"].values()]
    skipped = row.get("skipped_steps", [])
    numbers += skipped
    known = row.keys() <= {*ROW_KEYS, *OTHER_ROW_KEYS}
    known &= all(type(name) is str for name in row["lr"])
    datetime.fromisoformat(row["finished"])
    if not known or type(skipped) is not list or type(row["is_best"]) is not bool:
        raise ValueError(f"its history of epoch {number} has other things in it")
    if row["epoch"] != number or not row["lr"]:
        raise ValueError(f"epoch {number} is missing in its history")
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"its history of epoch {number} has values that are not numbers")


# -------------------------------------------------------------------------------------- optimizer


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], model: nn.Module) -> None:
    """Load an optimizer's state after a look at every tensor.

    The fused steps look at none: one of a wrong shape would have them write anywhere in memory.
    Raises Exception if the state is not such an optimizer's.
    """
    if isinstance(optimizer, torch.optim.LBFGS):  # not fused, and with lists that grow
        length = sum(p.numel() for p in optimizer.param_groups[0]["params"])
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
            values[name] = _validated(value, allowed[index][name])
    # The saved value decides on which device the step counters go, but the fused step needs them on
    # the parameters' own; the run may come from a machine without it.
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        if "fused" in own:
            saved["fused"] = own["fused"]
    optimizer.load_state_dict(state)


def _shapes_after_a_step(optimizer: Optimizer, model: nn.Module) -> dict[int, dict[str, list]]:
    """The shapes that each value of the optimizer's state may have, None for a number; the model
    stays as it is."""
    weights = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        for p in group["params"]:
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


def _validated(value: Any, shapes: list) -> Any:
    if isinstance(value, list) and list in shapes:
        return [_validated(item, shapes) for item in value]
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or tuple(value.shape) not in shapes:
            raise ValueError(f"its optimizer's state has a tensor {tuple(value.shape)}")
        if value.dtype != torch.float32:
            raise ValueError(f"its optimizer's state has numbers of {value.dtype}")
        # A copy: with strides of 0 a tensor can be larger than what is stored of it.
        return value.clone(memory_format=torch.contiguous_format)
    number = value is None or (type(value) in (int, float) and abs(value) <= 2**53)
    if None not in shapes or not number:
        raise ValueError(f"its optimizer's state has a {type(value).__name__} out of place")
    return value
