"""What is added up over the steps of an epoch, and a step whose numbers are not finite."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.device import widest_float
from common.distributed import World
from utils import Batch


class NotFiniteError(Exception):
    """The loss or the gradient of a step, counted from 1, is infinite or not a number.

    On a GPU, which is asked later, the step's numbers are not known.
    """

    def __init__(self, step: int, **numbers: float) -> None:
        super().__init__(", ".join(f"{name} {value:g}" for name, value in numbers.items()))
        self.step, self.numbers = step, numbers


@dataclass
class EpochSums:
    """Sums over an epoch's finished steps; sums over images cover this process's images only."""

    loss_and_hits: Tensor  # (2,), over images
    grad_norm: Tensor
    first_bad: Tensor  # on a GPU, the first step that was not finite, from 1; 0: none
    lrs: list[float]  # by parameter group
    images: int = 0
    steps: int = 0
    skipped: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def zeros(cls, optimizer: Optimizer, device: torch.device) -> "EpochSums":
        sums = torch.zeros(2, dtype=widest_float(device), device=device)
        first_bad = torch.zeros((), dtype=torch.int64, device=device)
        return cls(sums, sums.new_zeros(()), first_bad, [0.0] * len(optimizer.param_groups))

    def add_step(self, lrs: list[float]) -> None:
        self.steps += 1
        self.lrs = [total + lr for total, lr in zip(self.lrs, lrs, strict=True)]

    def add_images(self, batch: Batch, loss: Tensor, hits: Tensor, grad_norm: Tensor) -> None:
        """Add what a used step has computed; on the device, so that Python waits for no GPU.

        Args:
            loss: this process's share of the whole batch's mean.
            hits: how many of this process's images were classified right.
        """
        loss, hits = loss.to(self.loss_and_hits.dtype), hits.to(self.loss_and_hits.dtype)
        self.loss_and_hits += torch.stack((loss * batch.global_size, hits))
        self.images += len(batch.labels)
        self.grad_norm += grad_norm

    def note(self, finite: Tensor) -> None:
        """Remember, on the device, whether the step under way is the first bad one."""
        is_first = (self.first_bad == 0) & ~finite
        self.first_bad = torch.where(is_first, self.steps + 1, self.first_bad)

    def check(self) -> None:
        """Raise NotFiniteError if a noted step was not finite; waits for a GPU."""
        if step := int(self.first_bad):
            raise NotFiniteError(step)

    def row(self, optimizer: Optimizer, world: World) -> dict[str, Any]:
        """A part of history.json's row: means over all processes' images, `train_loss` and
        `train_acc` (top-1 %), and over the steps, `grad_norm` (before clipping) and `lr` (by
        parameter group)."""
        loss, hits, images = self._of_all(world)
        names = [group.get("name", "all parameters") for group in optimizer.param_groups]
        used = self.steps - len(self.skipped)
        return {
            "train_loss": loss / images if images else math.nan,
            "train_acc": 100.0 * hits / images if images else math.nan,
            "grad_norm": self.grad_norm.item() / used if used else math.nan,
            "lr": {name: lr / self.steps for name, lr in zip(names, self.lrs, strict=True)},
            **({"skipped_steps": self.skipped} if self.skipped else {}),
        }

    def _of_all(self, world: World) -> list[float]:
        images = self.loss_and_hits.new_tensor([self.images])
        return world.sum(torch.cat((self.loss_and_hits, images))).tolist()

    def state_dict(self, world: World) -> dict[str, Any]:
        """Plain numbers, of all processes together."""
        return {
            "sums": self._of_all(world),
            "grad_norm": self.grad_norm.item(),
            "lrs": list(self.lrs),
            "steps": self.steps,
            "skipped": list(self.skipped),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        loss, hits, images = (float(value) * world.leads for value in state["sums"])
        self.loss_and_hits.copy_(self.loss_and_hits.new_tensor([loss, hits]))
        self.images = int(images)
        self.grad_norm.fill_(state["grad_norm"])
        self.lrs = [float(lr) for _, lr in zip(self.lrs, state["lrs"], strict=True)]
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self.skipped = [int(step) for step in state["skipped"]]
