"""Learning-rate schedules from the calls a user writes, fitted to a run and rehearsed before it."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from common.errors import UserError
from optimizers import oneflow_optim
from optimizers.calls import SCHEDULERS, Call, describe_signature, naming, parse_call, signature_of

MAX_REHEARSAL = 20_000  # changes of the learning rate that are tried out beforehand


@dataclass
class ScheduleSpan:
    """What the arguments of a schedule may be derived from."""

    length: int  # in steps of the schedule: epochs or batches
    rates: list[float]  # the learning rates of the groups
    momentum: bool  # whether the optimizer has one to cycle

    def times(self, factor: float) -> float | list[float]:
        rates = [rate * factor for rate in self.rates]
        return rates if len(rates) > 1 else rates[0]


# Arguments that a call may leave out, and what they are then.
FROM_RUN: dict[type[LRScheduler], dict[str, Callable[[ScheduleSpan], Any]]] = {
    lr_scheduler.CosineAnnealingLR: {"T_max": lambda span: span.length},
    lr_scheduler.PolynomialLR: {"total_iters": lambda span: span.length},
    oneflow_optim.CosineDecayLR: {"decay_steps": lambda span: span.length},
    oneflow_optim.PolynomialLR: {"steps": lambda span: span.length},
    lr_scheduler.OneCycleLR: {
        "max_lr": lambda span: span.times(1),
        "total_steps": lambda span: span.length,
        "cycle_momentum": lambda span: span.momentum,
    },
    lr_scheduler.CyclicLR: {
        "base_lr": lambda span: span.times(0.1),
        "max_lr": lambda span: span.times(1),
        "step_size_up": lambda span: max(1, span.length // 10),  # five cycles in the run
        "cycle_momentum": lambda span: span.momentum,
    },
}
PER_STEP = (lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR)  # made for a step after every batch


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
) -> "Schedule":
    """The schedule that `text` calls for, on the groups of `optimizer`, tried out for the whole
    run. Raises UserError if `text` is not a call of a known schedule, or it does not fit the run or
    the optimizer.

    Args:
        interval: "epoch" or "step", how often the schedule moves; None: "step" with CyclicLR and
            OneCycleLR, alone or inside another, else "epoch".
        warmup_epochs: in these the rate grows with every batch; the schedule begins after them, and
            its lengths are counted from there.
        swa_start: the epoch, counted from 1, in which PyTorch's SWALR takes over from the schedule
            if there is an `swa_lr`.
        swa_lr: where SWALR takes the rate of the first group; a group that starts with k times the
            first group's rate goes to k times `swa_lr`.
    """
    call = parse_call(text, SCHEDULERS)
    if interval is None:
        interval = "step" if any(each.cls in PER_STEP for each in call.all_calls()) else "epoch"
    elif interval == "step" and call.cls is ReduceLROnPlateau:
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
    span, swa = ScheduleSpan(length, rates, momentum), None
    if swa_lr is not None:
        swa_rates = span.times(swa_lr / rates[0]) if rates[0] else swa_lr
        annealing = {"anneal_epochs": swa_anneal_epochs, "anneal_strategy": swa_anneal_strategy}
        swa = Call(swa_utils.SWALR, {"swa_lr": swa_rates, **annealing})
    call = _fill(call, span)
    return Schedule(
        call, optimizer, epochs, steps_per_epoch, interval, warmup_epochs, swa, swa_start
    )


def _fill(call: Call, span: ScheduleSpan) -> Call:
    """`call`, and those inside it, with the arguments of FROM_RUN."""
    derived = {name: value(span) for name, value in FROM_RUN.get(call.cls, {}).items()}
    if "epochs" in call.arguments:  # OneCycleLR's other way to say total_steps
        derived.pop("total_steps", None)
    arguments = derived | call.arguments
    parameters = signature_of(call.cls).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
    if missing:
        raise UserError(f"{call} lacks {', '.join(missing)}; {describe_signature(call.cls)}")
    if inner := arguments.get("schedulers", ()):
        lengths = [span.length] * len(inner)
        if call.cls is lr_scheduler.SequentialLR:
            bounds = [0, *arguments["milestones"]]
            if len(bounds) != len(inner) or bounds != sorted(set(bounds)):
                raise UserError(
                    f"{call}: {len(inner)} schedules need rising milestones between them"
                )
            lengths = [max(1, b - a) for a, b in itertools.pairwise([*bounds, span.length])]
        pairs = zip(inner, lengths, strict=True)
        arguments["schedulers"] = [_fill(each, replace(span, length=n)) for each, n in pairs]
    if call.cls is lr_scheduler.OneCycleLR and "total_steps" in arguments:
        share = arguments.get("pct_start", 0.3)
        if share * arguments["total_steps"] == 1:  # PyTorch would divide by 0, this phase's length
            arguments["pct_start"] = 0.999 * share
    return Call(call.cls, arguments)


def _construct(call: Call, optimizer: Optimizer) -> LRScheduler:
    arguments = dict(call.arguments)
    if "schedulers" in arguments:
        arguments["schedulers"] = [_construct(each, optimizer) for each in arguments["schedulers"]]
    return call.cls(optimizer=optimizer, **arguments)


@dataclass(eq=False)
class Schedule:
    """The learning rates of a run: a linear warm-up, the schedule, the annealing to the rate for
    averaging; without the first and the last where none is asked for.

    After every batch call `step_batch()`, after every epoch `step_epoch(val_loss)`. A checkpoint
    holds the position alone, as plain numbers; loading replays the run up to there. So all
    schedules are restored exactly, and a run can be resumed with more epochs.
    """

    call: Call  # with what was filled in
    optimizer: Optimizer
    epochs: int
    steps_per_epoch: int
    interval: str  # "epoch" or "step", how often the schedule moves
    warmup_epochs: int
    swa: Call | None
    swa_start: int | None

    def __post_init__(self) -> None:
        self.text = str(self.call)  # which makes the same schedule again
        self._initial = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self._val_losses: list[float] = []
        self._batch = 0
        # Refuses what would fail in the run. The longer the text, the more work each change is.
        self.rates(limit=MAX_REHEARSAL * 200 // max(200, len(self.text)))

    def __str__(self) -> str:
        text = f"{self.text}, every {self.interval}"
        if self.warmup_epochs:
            text += f", after {self.warmup_epochs} epochs of warm-up"
        return text + (f", from epoch {self.swa_start} {self.swa}" if self.swa else "")

    # ------------------------------------------------------------------------------------ stepping

    def step_batch(self) -> None:
        """To be called after every batch."""
        self._batch += 1
        if self._epoch < self.warmup_epochs:
            self._warm_up()
        elif self._moves_within_epoch:
            self._move()

    def step_epoch(self, val_loss: float) -> None:
        """To be called after every epoch; ReduceLROnPlateau goes by the validation loss."""
        self._val_losses.append(float(val_loss))
        self._batch = 0
        if self._epoch > self.warmup_epochs and not self._moves_within_epoch:
            self._move(*([val_loss] if isinstance(self.scheduler, ReduceLROnPlateau) else []))
        self._enter_epoch()

    @property
    def _epoch(self) -> int:
        """Epochs done."""
        return len(self._val_losses)

    @property
    def _moves_within_epoch(self) -> bool:
        warming_up = self._epoch < self.warmup_epochs
        return warming_up or (self.interval == "step" and not self._annealing)

    def _enter_epoch(self) -> None:
        if self._epoch < self.warmup_epochs:
            self._warm_up()
        if self.swa and self._epoch == self.swa_start - 1:
            self.scheduler = _construct(self.swa, self.optimizer)
            self._annealing = True

    def _warm_up(self) -> None:
        """In the i-th of n batches, i/n of the schedule's first rates."""
        n = self.warmup_epochs * self.steps_per_epoch
        share = min(1.0, (self._epoch * self.steps_per_epoch + self._batch + 1) / n)
        for group, rate in zip(self.optimizer.param_groups, self._first_rates, strict=True):
            group["lr"] = rate * share

    def _move(self, *arguments: float) -> None:
        """Move the schedule by one step, which may fail late in a run longer than the rehearsal."""
        try:
            self.scheduler.step(*arguments)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.call} in epoch {self._epoch + 1}: {error}") from error
        done = self._epoch * self.steps_per_epoch + self._batch
        if done < self.epochs * self.steps_per_epoch:  # no step will use the rates after the last
            self._check_rates()

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _check_rates(self) -> None:
        rates = self._rates()
        if not all(0 <= rate < math.inf for rate in rates):
            raise UserError(f"{self.call}: the learning rate is {rates} in epoch {self._epoch + 1}")

    # ------------------------------------------------------------------------------------ position

    def rates(self, limit: int | None = None) -> list[tuple[float, list[float]]]:
        """The run from its start: (epochs done, learning rate of each group) wherever these change.

        At most `limit` of these; the validation loss is taken to stay the same throughout.
        """
        position = self.state_dict()
        with naming(self.call):
            points = list(itertools.islice(self._replay([1.0] * self.epochs), limit))
        self.load_state_dict(position)
        return points

    def state_dict(self) -> dict[str, Any]:
        """The position: the validation losses of the epochs done, the batches done in the next."""
        return {"val_losses": list(self._val_losses), "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position and set the rates there; the optimizer's state is loaded
        separately. Raises UserError if the position is not in this run.
        """
        losses, batch = state["val_losses"], state["batch"]
        if len(losses) > self.epochs or not 0 <= batch <= self.steps_per_epoch:
            raise UserError(
                f"the checkpoint is at epoch {len(losses)}, batch {batch} of its schedule; "
                f"this run has {self.epochs} epochs of {self.steps_per_epoch} batches"
            )
        with naming(self.call):
            for _ in self._replay(losses):
                pass
            for _ in range(batch):
                self.step_batch()

    def _replay(self, val_losses: list[float]) -> Iterator[tuple[float, list[float]]]:
        """Replay these epochs from the start, yielding what `rates` returns."""
        self._rewind()
        for epoch, loss in enumerate(val_losses):
            for batch in range(self.steps_per_epoch if self._moves_within_epoch else 1):
                yield epoch + batch / self.steps_per_epoch, self._rates()
                self.step_batch()
            self.step_epoch(loss)

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
