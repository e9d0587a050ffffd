"""Optimizers, learning-rate schedules and weight averages, from the calls a user writes as text.

python src/optim.py --list      every name with its arguments and defaults
python src/optim.py --plot      a picture of all schedules, or of the one given by --scheduler
"""

import common.startup  # noqa: F401 before PyTorch

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from common import cli
from common.errors import UserError
from optimizers import oneflow_optim
from optimizers.calls import (
    OPTIMIZERS,
    SCHEDULERS,
    Call,
    Classes,
    describe_signature,
    parse_call,
    signature_of,
)
from optimizers.muon import Muon
from recipes import DEFAULTS

MAX_HISTORY = 1000  # LBFGS's history_size; each entry is as large as the model
MAX_REHEARSAL = 20_000  # changes of the learning rate that are tried out beforehand
MAX_PLOTTED = 1_000_000  # steps of a run that is drawn


@contextmanager
def _naming(call: Call) -> Iterator[None]:
    """Turn whatever PyTorch raises on a call's arguments into a `UserError` that names the call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{call}: {error or type(error).__name__}") from error


# The optimizer -----------------------------------------------------------------------------------


def build_optimizer(
    text: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_lr: float | None = None,
    no_decay: bool = False,
) -> Optimizer:
    """The optimizer that `text` calls for, on the parameters of `model`.

    `lr` and `weight_decay` are used where the text does not set them and the optimizer knows them.
    `head_lr` is the rate of the parameters under `head.`; `no_decay` spares biases, norms, CLS
    token and position embedding the weight decay. Where there are several groups, each has its
    `name`.

    Muon gets the weight matrices under `blocks.`, with a rate of 0.02 where the text sets none, and
    takes the packed projection for query, key and value as three; all else is AdamW's, with `lr`
    and `weight_decay`.

    The optimizer's `text` is the call with what was filled in, for Muon with AdamW's beside it.

    Raises:
        UserError: `text` is no call of a known optimizer, or the optimizer refuses its arguments.
    """
    call = parse_call(text, OPTIMIZERS)
    if call.cls is torch.optim.SparseAdam:
        raise UserError("SparseAdam needs sparse gradients and this model has none: take Adam")
    if call.cls is torch.optim.LBFGS:
        if not 1 <= call.arguments.get("history_size", 1) <= MAX_HISTORY:
            raise UserError(f"{call}: history_size is not from 1 to {MAX_HISTORY}")
        if call.arguments.get("max_iter", 1) < 1:
            raise UserError(f"{call}: max_iter is not at least 1")
        if "clip_grad_max_norm" in call.arguments:
            raise UserError(
                f"{call}: LBFGS learns from gradients as they are, they are not clipped"
            )
        if head_lr is not None:
            raise UserError("--head_lr: LBFGS takes all parameters as one group, leave it out")
    if no_decay and "weight_decay" not in signature_of(call.cls).parameters:
        raise UserError(f"--no_decay: {call.cls.__name__} has no weight decay, leave it out")
    known, muon = signature_of(call.cls).parameters, call.cls is torch.optim.Muon
    filled = {"lr": 0.02 if muon else lr, "weight_decay": weight_decay}
    filled = {name: value for name, value in filled.items() if name in known}
    call = Call(call.cls, filled | call.arguments)

    device = next(model.parameters()).device
    arguments = {k: v for k, v in call.arguments.items() if not k.startswith("clip_grad_")}
    if "fused" in known and "fused" not in arguments and not arguments.get("foreach"):
        # PyTorch's other implementations are its own choice; the fused ones must be asked for.
        # Adagrad's is for CPUs alone in older releases.
        arguments["fused"] = device.type in (
            ("cpu",) if call.cls is torch.optim.Adagrad else ("cpu", "cuda")
        )
    groups = _parameter_groups(model, head_lr, no_decay and "weight_decay" in known, muon)
    _set_clipping(groups, call)
    with _naming(call):
        _rehearse(call.cls, arguments, device)
        if muon:
            adamw = {"lr": lr, "weight_decay": weight_decay}
            adamw["fused"] = device.type in ("cpu", "cuda")
            named = model.named_parameters()
            arguments["packed"] = {p: 3 for n, p in named if n.endswith("in_proj_weight")}
            optimizer = MuonWithAdamW(groups, muon=arguments, adamw=adamw)
        else:
            optimizer = call.cls(groups, **arguments)
    optimizer.text = str(call)
    if muon:
        optimizer.text += f" on the blocks' matrices, AdamW({lr=}, {weight_decay=}) on the rest"
    return optimizer


def _parameter_groups(
    model: nn.Module, head_lr: float | None, no_decay: bool, muon: bool
) -> list[dict[str, Any]]:
    sorted_out: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        matrix = muon and name.startswith("blocks.") and p.ndim == 2
        head = head_lr is not None and name.startswith("head.")
        bare = no_decay and (p.ndim < 2 or name in ("cls_token", "pos_embed"))
        sorted_out.setdefault((matrix, head, bare), []).append(p)
    if muon and not any(matrix for matrix, _, _ in sorted_out):
        raise UserError("Muon updates the weight matrices under blocks. and this model has none")
    if head_lr is not None and not any(head for _, head, _ in sorted_out):
        raise UserError("--head_lr is for the parameters under head. and this model has none")

    groups = []
    for (matrix, head, bare), params in sorted(sorted_out.items(), key=lambda item: item[0]):
        group = {"params": params}
        if len(sorted_out) > 1:
            group["name"] = "matrices" if matrix else "head" if head else "body"
            group["name"] += ", no decay" if bare else ""
        group |= {"muon": matrix} if muon else {}
        group |= {"lr": head_lr} if head else {}
        group |= {"weight_decay": 0.0} if bare else {}
        groups.append(group)
    return groups


def _set_clipping(groups: list[dict[str, Any]], call: Call) -> None:
    """Give the groups the call's `clip_grad_max_norm`; a list has a value for each of them."""
    max_norms = call.arguments.get("clip_grad_max_norm")
    norm_type = call.arguments.get("clip_grad_norm_type")
    max_norms = max_norms if isinstance(max_norms, list) else [max_norms] * len(groups)
    norm_type = 2.0 if norm_type is None else math.inf if norm_type == "inf" else norm_type
    if len(max_norms) != len(groups):
        raise UserError(f"{call}: {len(groups)} parameter groups, but {len(max_norms)} norms")
    if isinstance(norm_type, str) or norm_type <= 0:
        raise UserError(f"{call}: clip_grad_norm_type is neither a number above 0 nor 'inf'")
    for group, max_norm in zip(groups, max_norms, strict=True):
        if max_norm is not None and max_norm <= 0:
            raise UserError(f"{call}: clip_grad_max_norm is not above 0")
        if max_norm is not None:
            group.update(clip_grad_max_norm=max_norm, clip_grad_norm_type=norm_type)


def _rehearse(cls: type[Optimizer], arguments: dict[str, Any], device: torch.device) -> None:
    """One step on a 2 x 2 matrix: some classes refuse their arguments only there."""
    weight = nn.Parameter(torch.ones(2, 2, device=device))
    if "max_iter" in signature_of(cls).parameters:
        arguments = arguments | {"max_iter": 1}
    optimizer = cls([weight], **arguments)

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for the groups marked `muon`, AdamW for the others.

    Both work on the groups and the state of this one optimizer, so schedules and checkpoints see no
    difference. AdamW's groups come first.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, muon: dict[str, Any], adamw: dict[str, Any]
    ) -> None:
        self.adamw = torch.optim.AdamW([group for group in groups if not group["muon"]], **adamw)
        self.muon = Muon([group for group in groups if group["muon"]], **muon)
        super().__init__(self.adamw.param_groups + self.muon.param_groups, {})
        self.defaults = self.muon.defaults  # where schedules look for a momentum to cycle
        self._share()

    def _share(self) -> None:
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.muon.param_groups = [group for group in self.param_groups if group["muon"]]
        self.adamw.state = self.muon.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step computes loss and gradients several times, as LBFGS does.

    The loop then steps with `loss = optimizer.step(closure)`, where `closure()` zeroes the
    gradients, runs the model on the batch at hand, calls `backward` and returns the loss. It does
    not clip: LBFGS learns the curvature from the differences between gradients.
    """
    return isinstance(optimizer, torch.optim.LBFGS)


def clip_gradients(optimizer: Optimizer, grad_clip: float) -> Tensor:
    """Clip the gradients in place; the result is their total 2-norm before, left on their device.

    Groups with a `clip_grad_max_norm` are clipped each by its own norm of type
    `clip_grad_norm_type`, the others together, by their global norm, to `grad_clip` (0: not at
    all).
    """
    own = [group for group in optimizer.param_groups if "clip_grad_max_norm" in group]
    rest = [group for group in optimizer.param_groups if "clip_grad_max_norm" not in group]
    shared = [p for group in rest for p in group["params"]]
    if grad_clip and not own:
        return clip_grad_norm_(shared, grad_clip)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total_norm = get_total_norm([p.grad for p in params if p.grad is not None])
    if grad_clip:
        clip_grad_norm_(shared, grad_clip)
    for group in own:
        clip_grad_norm_(group["params"], group["clip_grad_max_norm"], group["clip_grad_norm_type"])
    return total_norm


# The schedule ------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a schedule may take from the run it is for."""

    length: int  # in steps of the schedule: epochs or batches
    rates: list[float]  # the learning rates of the groups
    momentum: bool  # whether the optimizer has one to cycle

    def times(self, factor: float) -> float | list[float]:
        rates = [rate * factor for rate in self.rates]
        return rates if len(rates) > 1 else rates[0]


# Arguments that a call may leave out, and what they are then.
FROM_RUN: dict[type[LRScheduler], dict[str, Callable[[Run], Any]]] = {
    lr_scheduler.CosineAnnealingLR: {"T_max": lambda run: run.length},
    lr_scheduler.PolynomialLR: {"total_iters": lambda run: run.length},
    oneflow_optim.CosineDecayLR: {"decay_steps": lambda run: run.length},
    oneflow_optim.PolynomialLR: {"steps": lambda run: run.length},
    lr_scheduler.OneCycleLR: {
        "max_lr": lambda run: run.times(1),
        "total_steps": lambda run: run.length,
        "cycle_momentum": lambda run: run.momentum,
    },
    lr_scheduler.CyclicLR: {
        "base_lr": lambda run: run.times(0.1),
        "max_lr": lambda run: run.times(1),
        "step_size_up": lambda run: max(1, run.length // 10),  # five cycles in the run
        "cycle_momentum": lambda run: run.momentum,
    },
}
PER_STEP = (lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR)  # made for a step after every batch


def _fill(call: Call, run: Run) -> Call:
    """`call`, and those inside it, with the arguments of FROM_RUN."""
    derived = {name: value(run) for name, value in FROM_RUN.get(call.cls, {}).items()}
    if "epochs" in call.arguments:  # OneCycleLR's other way to say total_steps
        derived.pop("total_steps", None)
    arguments = derived | call.arguments
    parameters = signature_of(call.cls).parameters
    missing = [p.name for p in parameters.values() if p.default is p.empty]
    missing = [name for name in missing if name not in arguments]
    if missing:
        raise UserError(f"{call} lacks {', '.join(missing)}; {describe_signature(call.cls)}")

    inner = arguments.get("schedulers", [])
    lengths = [run.length] * len(inner)
    if call.cls is lr_scheduler.SequentialLR:
        bounds = [0, *arguments["milestones"]]
        if len(bounds) != len(inner) or bounds != sorted(set(bounds)):
            raise UserError(f"{call}: {len(inner)} schedules need rising milestones between them")
        lengths = [max(1, b - a) for a, b in itertools.pairwise([*bounds, run.length])]
    if inner:
        arguments["schedulers"] = [
            _fill(each, Run(length, run.rates, run.momentum))
            for each, length in zip(inner, lengths, strict=True)
        ]
    return Call(call.cls, arguments)


def _construct(call: Call, optimizer: Optimizer) -> LRScheduler:
    arguments = dict(call.arguments)
    if "schedulers" in arguments:
        arguments["schedulers"] = [_construct(each, optimizer) for each in arguments["schedulers"]]
    return call.cls(optimizer=optimizer, **arguments)


class Schedule:
    """The learning rates of a run: a warm-up, the schedule, the annealing to the rate for
    averaging.

    After every batch call `step_batch()`, after every epoch `step_epoch(val_loss)`. A checkpoint
    holds the position alone, as plain numbers; loading goes there again from the start. So all
    schedules are restored exactly, and a run can be resumed with more epochs.

    Attributes:
        text: the call with what was filled in; it makes the same schedule again.
        interval: "epoch" or "step", how often the schedule moves.
        scheduler: PyTorch's object that moves now.
    """

    def __init__(
        self,
        call: Call,
        optimizer: Optimizer,
        *,
        epochs: int,
        steps_per_epoch: int,
        interval: str,
        warmup_epochs: int = 0,
        swa: Call | None = None,
        swa_start: int | None = None,
    ) -> None:
        self.call, self.text, self.interval = call, str(call), interval
        self.optimizer, self.epochs, self.steps_per_epoch = optimizer, epochs, steps_per_epoch
        self.warmup_epochs, self.swa, self.swa_start = warmup_epochs, swa, swa_start
        self._initial = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._val_losses: list[float | None] = []
        self._batch = 0
        # Which refuses what would fail in the run; a longer text is more work at each change.
        self.rates(limit=MAX_REHEARSAL * 200 // max(200, len(self.text)))

    def __str__(self) -> str:
        text = f"{self.text}, every {self.interval}"
        if self.warmup_epochs:
            text += f", after {self.warmup_epochs} epochs of warm-up"
        return text + (f", from epoch {self.swa_start} {self.swa}" if self.swa else "")

    def step_batch(self) -> None:
        """To be called after every step of the optimizer."""
        self._batch += 1
        if self._epoch < self.warmup_epochs:
            self._warm_up()
        elif self._batchwise:
            self._move()

    def step_epoch(self, val_loss: float | None = None) -> None:
        """To be called after every epoch; ReduceLROnPlateau goes by the validation loss."""
        self._val_losses.append(None if val_loss is None else float(val_loss))
        self._batch = 0
        if self._epoch > self.warmup_epochs and not self._batchwise:
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self._move(*([val_loss] if plateau else []))
        self._enter_epoch()

    def _move(self, *arguments: float) -> None:
        """Move the schedule by one. The rehearsal ends before a very long run does."""
        try:
            self.scheduler.step(*arguments)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.call} in epoch {self._epoch + 1}: {error}") from error
        done = self._epoch * self.steps_per_epoch + self._batch
        if done < self.epochs * self.steps_per_epoch:  # no step will use the rates after the last
            self._check_rates()

    def _check_rates(self) -> None:
        rates = self._rates()
        if not all(0 <= rate < math.inf for rate in rates):
            raise UserError(f"{self.call}: the learning rate is {rates} in epoch {self._epoch + 1}")

    def rates(
        self, val_loss: float = 1.0, limit: int | None = None
    ) -> list[tuple[float, list[float]]]:
        """The run from its start: (epochs done, learning rate of each group) wherever these change.

        At most `limit` of these; the validation loss is taken to be `val_loss` throughout.
        """

        def run() -> Iterator[tuple[float, list[float]]]:
            for epoch in range(self.epochs):
                for batch in range(self.steps_per_epoch if self._batchwise else 1):
                    yield epoch + batch / self.steps_per_epoch, self._rates()
                    self.step_batch()
                self.step_epoch(val_loss)

        position = self.state_dict()
        with _naming(self.call):
            self._rewind()
            points = list(itertools.islice(run(), limit))
        self.load_state_dict(position)
        return points

    def state_dict(self) -> dict[str, Any]:
        """The position: the validation losses of the epochs done, the batches done in the next."""
        return {"val_losses": list(self._val_losses), "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position and set the rates there; the optimizer's state is loaded apart.

        Raises:
            UserError: the position is not in this run.
        """
        losses, batch = state["val_losses"], state["batch"]
        if len(losses) > self.epochs or not 0 <= batch <= self.steps_per_epoch:
            raise UserError(
                f"the checkpoint is at epoch {len(losses)}, batch {batch} of its schedule; "
                f"this run has {self.epochs} epochs of {self.steps_per_epoch} batches"
            )
        with _naming(self.call):
            self._rewind()
            for loss in losses:
                for _ in range(self.steps_per_epoch if self._batchwise else 0):
                    self.step_batch()
                self.step_epoch(loss)
            for _ in range(batch):
                self.step_batch()

    @property
    def _epoch(self) -> int:
        """Epochs done."""
        return len(self._val_losses)

    @property
    def _batchwise(self) -> bool:
        """Whether the rates change within the epoch."""
        warming_up = self._epoch < self.warmup_epochs
        return warming_up or (self.interval == "step" and not self._annealing)

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _rewind(self) -> None:
        for group, initial in zip(self.optimizer.param_groups, self._initial, strict=True):
            params = group["params"]
            group.clear()  # of what a schedule keeps there
            group.update(initial, params=params)
        self._val_losses, self._batch = [], 0
        self._annealing = False
        self.scheduler = _construct(self.call, self.optimizer)
        self._first_rates = self._rates()
        self._check_rates()
        self._enter_epoch()

    def _enter_epoch(self) -> None:
        if self._epoch < self.warmup_epochs:
            self._warm_up()
        if self.swa and self._epoch == self.swa_start - 1:
            self.scheduler = _construct(self.swa, self.optimizer)
            self._annealing = True

    def _warm_up(self) -> None:
        """From 1/n of the schedule's first rates in the first of n batches to these in the last."""
        n = self.warmup_epochs * self.steps_per_epoch
        share = min(1.0, (self._epoch * self.steps_per_epoch + self._batch + 1) / n)
        for group, rate in zip(self.optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = rate * share


def build_scheduler(
    text: str,
    optimizer: Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
    interval: str | None = None,
    warmup_epochs: int = 0,
    swa_start: int | None = None,
    swa_lr: float | None = None,
    swa_anneal_epochs: int = 10,
    swa_anneal_strategy: str = "cos",
) -> Schedule:
    """The schedule that `text` calls for, on the groups of `optimizer`, tried out for the whole
    run.

    `interval` is "epoch" or "step"; None stands for "step" with CyclicLR and OneCycleLR, alone or
    inside another, else for "epoch". In the `warmup_epochs` the rate grows with every batch; the
    schedule begins after them, and its lengths are counted from there.

    With `swa_lr`, PyTorch's SWALR takes over in epoch `swa_start`, counted from 1, and anneals the
    rate of that epoch to `swa_lr`. A group that starts with k times the first group's rate goes to
    k times `swa_lr`.

    Raises:
        UserError: `text` is no call of a known schedule, or it does not fit the run or the
        optimizer.
    """
    call = parse_call(text, SCHEDULERS)
    if interval is None:
        interval = "step" if any(each.cls in PER_STEP for each in call.all_calls()) else "epoch"
    elif interval == "step" and call.cls is lr_scheduler.ReduceLROnPlateau:
        raise UserError("ReduceLROnPlateau reads the validation loss, once an epoch")
    if warmup_epochs >= epochs:
        raise UserError(f"--warmup_epochs {warmup_epochs} leaves nothing of --epochs {epochs}")
    if swa_start is not None and not warmup_epochs < swa_start <= epochs:
        expected = f"expected an epoch from {warmup_epochs + 1} to {epochs}"
        raise UserError(f"--swa_start {swa_start}: {expected}")
    if swa_lr is not None and swa_start is None:
        raise UserError(f"--swa_lr {swa_lr} needs --swa_start")

    length = (epochs - warmup_epochs) * (steps_per_epoch if interval == "step" else 1)
    rates = [group["lr"] for group in optimizer.param_groups]
    momentum = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    run, swa = Run(length, rates, momentum), None
    if swa_lr is not None:
        swa = Call(
            swa_utils.SWALR,
            {
                "swa_lr": run.times(swa_lr / rates[0]) if rates[0] else swa_lr,
                "anneal_epochs": swa_anneal_epochs,
                "anneal_strategy": swa_anneal_strategy,
            },
        )
    return Schedule(
        _fill(call, run),
        optimizer,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        interval=interval,
        warmup_epochs=warmup_epochs,
        swa=swa,
        swa_start=swa_start,
    )


# Averages of the weights -------------------------------------------------------------------------


class WeightAverage:
    """An average of a model's weights over the run; the model itself where none is asked for.

    `ema_decay`: average = decay * average + (1 - decay) * weights after every batch. `swa_start`:
    the mean of the weights at the ends of the epochs from this one on, counted from 1 (Izmailov et
    al., UAI 2018, https://arxiv.org/abs/1803.05407). An `ema_decay` of 0 is none.

    Raises:
        UserError: both are asked for.
    """

    def __init__(
        self, model: nn.Module, *, ema_decay: float | None = None, swa_start: int | None = None
    ) -> None:
        ema_decay = ema_decay or None
        if ema_decay is not None and swa_start is not None:
            raise UserError(
                f"--ema_decay {ema_decay} and --swa_start {swa_start} are two averages: choose one "
                "(--ema_decay 0 turns a recipe's off)"
            )
        self.model, self.ema_decay, self.swa_start = model, ema_decay, swa_start
        self._averaged = None
        if ema_decay is not None:
            average = swa_utils.get_ema_multi_avg_fn(ema_decay)
            self._averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        elif swa_start is not None:
            self._averaged = swa_utils.AveragedModel(model)

    @property
    def active(self) -> bool:
        """Whether there is an average yet."""
        return self._averaged is not None and bool(self._averaged.n_averaged > 0)

    @property
    def module(self) -> nn.Module:
        """The network to validate, save as best and export: the model until there is an average."""
        return self._averaged.module if self.active else self.model

    def step_batch(self) -> None:
        """To be called after every step of the optimizer."""
        if self.ema_decay is not None:
            self._averaged.update_parameters(self.model)

    def step_epoch(self, epoch: int, loader: Iterable, device: torch.device) -> None:
        """To be called after every epoch, counted from 1, before validation.

        A model with batch norms goes through `loader` once, for the statistics of the averaged
        weights.
        """
        if self.swa_start is not None and epoch >= self.swa_start:
            self._averaged.update_parameters(self.model)
        if self.active:
            swa_utils.update_bn(loader, self._averaged.module, device)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._averaged is None else self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved average; a checkpoint without one starts a new one."""
        if self._averaged is not None and state:
            self._averaged.load_state_dict(state)


# Command line ------------------------------------------------------------------------------------


def refuse_unused(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse flags that would have no effect beside the calls of optimizer and schedule.

    Args:
        settings: the run's.
        given: the flags that were given by hand: those of a recipe may be idle.

    Raises:
        UserError: one of them would be dropped; it says why.
    """
    optimizer = parse_call(settings["optimizer"], OPTIMIZERS)
    scheduler = parse_call(settings["scheduler"], SCHEDULERS)
    known, kind = signature_of(optimizer.cls).parameters, optimizer.cls.__name__
    reasons = {}
    if optimizer.cls is not torch.optim.Muon:  # whose other half, AdamW, takes both
        for name in ("lr", "weight_decay"):
            if name in optimizer.arguments:
                reasons[name] = f"{optimizer} sets its own"
            elif name not in known:
                reasons[name] = f"{kind} has none"
    fixed = {lr_scheduler.OneCycleLR: {"max_lr"}, lr_scheduler.CyclicLR: {"base_lr", "max_lr"}}
    if scheduler.cls in fixed and fixed[scheduler.cls] <= scheduler.arguments.keys():
        reasons |= dict.fromkeys(("lr", "head_lr"), f"{scheduler} sets all rates itself")
    max_norms = optimizer.arguments.get("clip_grad_max_norm")
    if optimizer.cls is torch.optim.LBFGS:
        reasons["grad_clip"] = "LBFGS learns from gradients as they are, they are not clipped"
    elif max_norms is not None and None not in (max_norms if type(max_norms) is list else []):
        reasons["grad_clip"] = f"{optimizer} clips by its own"
    if settings["swa_lr"] is None:
        names = ("swa_anneal_epochs", "swa_anneal_strategy")
        reasons |= dict.fromkeys(names, "there is no --swa_lr to anneal to")
    for name, reason in reasons.items():
        if name in given:
            raise UserError(f"--{name} {given[name]} has no effect: {reason}; leave it out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags for what stands above, for every script that trains."""
    group = parser.add_argument_group("optimization (names: python src/optim.py --list)")

    def add(name: str, help: str, **kwargs: Any) -> None:
        group.add_argument(f"--{name}", default=DEFAULTS[name], help=help, **kwargs)

    def call_of(classes: Classes) -> Callable[[str], str]:
        def check(text: str) -> str:
            try:
                parse_call(text, classes)
            except UserError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
            return text

        return check

    rate, fraction, epoch = cli.number(0, above=True), cli.number(0, 1), cli.integer(1)
    add("optimizer", 'a call: "SGD(momentum=0.9, nesterov=True)"', type=call_of(OPTIMIZERS))
    add("lr", "learning rate at the start", type=rate)
    add("head_lr", "learning rate of the head, if another", type=rate)
    add("weight_decay", "weight decay", type=cli.number(0))
    add("no_decay", "none on biases, norms, CLS token, positions", action="store_true")
    add("grad_clip", "largest global gradient norm; 0: off", type=cli.number(0))
    add("scheduler", 'a call: "StepLR(step_size=5)"', type=call_of(SCHEDULERS))
    add("scheduler_interval", "how often the schedule moves", choices=("epoch", "step"))
    add("warmup_epochs", "linear warm-up before the schedule", type=cli.integer(0))
    add("ema_decay", "average the weights exponentially, keeping this share a step", type=fraction)
    add("swa_start", "average the weights from the end of this epoch on", type=epoch)
    add("swa_lr", "learning rate while --swa_start averages", type=rate)
    add("swa_anneal_epochs", "epochs to get there", type=cli.integer(0))
    add("swa_anneal_strategy", "and how", choices=("cos", "linear"))


# What --plot shows, for runs of about 20 epochs: a call, and the flags that go with it.
GALLERY: list[tuple[str, dict[str, Any]]] = [
    ("ConstantLR(factor=0.5, total_iters=5)", {}),
    ("LinearLR(start_factor=0.1, total_iters=5)", {}),
    ("StepLR(step_size=5, gamma=0.5)", {}),
    ("MultiStepLR(milestones=[10, 15], gamma=0.1)", {}),
    ("ExponentialLR(gamma=0.85)", {}),
    ("LambdaLR(['0.9 ** epoch', '1 - epoch / 20'])", {"head_lr": 5e-4}),
    ("MultiplicativeLR('0.95 if epoch < 12 else 0.7')", {}),
    ("PolynomialLR(power=2)", {}),
    ("CosineAnnealingLR", {"head_lr": 5e-4}),
    ("CosineAnnealingWarmRestarts(T_0=4, T_mult=2)", {}),
    ("ReduceLROnPlateau(factor=0.5, patience=3)", {}),
    ("CyclicLR(mode='triangular2')", {}),
    ("OneCycleLR", {"head_lr": 5e-4}),
    ("OneCycleLR(three_phase=True, anneal_strategy='linear')", {}),
    ("SequentialLR([LinearLR(0.1, total_iters=4), CosineAnnealingLR], milestones=[4])", {}),
    ("ChainedScheduler([LinearLR(0.1, total_iters=4), ExponentialLR(0.9)])", {}),
    ("CosineDecayLR(decay_steps=15, alpha=0.1)", {}),
    ("PolynomialLR(steps=15, end_learning_rate=1e-4)", {}),
    ("PolynomialLR(steps=5, end_learning_rate=1e-4, cycle=True)", {}),
    ("SWALR(swa_lr=2e-4, anneal_epochs=8)", {}),
    ("CosineAnnealingLR", {"swa_start": 13, "swa_lr": 4e-4, "swa_anneal_epochs": 3}),
    ("CosineAnnealingLR", {"warmup_epochs": 3}),
    ("ReduceLROnPlateau(factor=0.3, patience=2)", {"warmup_epochs": 2, "head_lr": 5e-4}),
    ("LambdaLR('1 / sqrt(1 + step / 400)')", {"scheduler_interval": "step"}),
]


def _panel(args: argparse.Namespace, model: nn.Module, title: str) -> dict[str, Any]:
    """The schedule that the flags describe, as `figures.lr_schedules` draws it."""

    def picked(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names}

    groups = picked("lr", "weight_decay", "head_lr", "no_decay")
    optimizer = build_optimizer(args.optimizer, model, **groups)
    run = picked("epochs", "steps_per_epoch", "warmup_epochs")
    swa = picked("swa_start", "swa_lr", "swa_anneal_epochs", "swa_anneal_strategy")
    interval = args.scheduler_interval
    schedule = build_scheduler(args.scheduler, optimizer, interval=interval, **run, **swa)
    epochs, rates = zip(*schedule.rates(), strict=True)
    curves = {}  # groups that differ in weight decay alone share one
    for group, curve in zip(optimizer.param_groups, zip(*rates, strict=True), strict=True):
        if curve not in curves.values():
            curves[group.get("name", "all parameters")] = curve
    title = title or str(schedule)
    if schedule.call.cls is lr_scheduler.ReduceLROnPlateau:
        title += " (validation loss never improving)"
    return {"title": title, "epochs": [*epochs, args.epochs], "rates": curves}


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names and their arguments")
    parser.add_argument("--plot", action="store_true", help="draw --scheduler, or all schedules")
    parser.add_argument("--output", type=Path, default=Path("./outputs/lr_schedules.png"))
    parser.add_argument("--epochs", type=cli.integer(1), default=20, help="length of the run")
    parser.add_argument("--steps_per_epoch", type=cli.integer(1), default=422, help="batches")
    add_arguments(parser)
    parser.set_defaults(scheduler=None)
    args = parser.parse_args()
    if args.list:
        print("<run>: taken from the run where it is left out\n\nOptimizers")
        for cls in itertools.chain.from_iterable(OPTIMIZERS.values()):
            print("  " + describe_signature(cls, ("lr", "weight_decay")))
        print("  each also with clip_grad_max_norm and clip_grad_norm_type\n\nSchedules")
        for cls in itertools.chain.from_iterable(SCHEDULERS.values()):
            print("  " + describe_signature(cls, FROM_RUN.get(cls, ())))
    if args.plot:
        from vit_model import ViT

        model = ViT(embed_dim=8, depth=1, num_heads=1)
        if args.epochs * args.steps_per_epoch > MAX_PLOTTED:
            raise UserError(
                f"--epochs {args.epochs} x --steps_per_epoch {args.steps_per_epoch} are too many "
                f"to draw: expected at most {MAX_PLOTTED:,} steps"
            )
        others = parser.given().keys() - {"plot", "list", "output", "scheduler"}
        if others and not args.scheduler:
            raise UserError(
                f"--{min(others)} is for one schedule: name it with --scheduler, or leave it out "
                "to draw the gallery of all"
            )
        if args.scheduler:
            refuse_unused(vars(args), parser.given())
            panels = [_panel(args, model, "")]
            print(panels[0]["title"])
        else:
            panels = []
            for call, flags in GALLERY:
                title = " ".join([call, *(f"--{flag} {value}" for flag, value in flags.items())])
                settings = vars(args) | {"scheduler": call} | flags
                panels.append(_panel(argparse.Namespace(**settings), model, title))
        from analysis import figures  # only here: who imports this file may do without matplotlib

        figures.save(figures.lr_schedules(panels), args.output)
        print(f"Written: {args.output}")
    if not (args.list or args.plot):
        raise UserError("nothing to do: give --list or --plot")


if __name__ == "__main__":
    cli.run(main)
