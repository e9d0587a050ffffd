"""Muon in a few large matrix products instead of many small ones, and AdamW beside it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from optimizers.stepwise import GroupwiseStep


class Muon(GroupwiseStep, torch.optim.Muon):
    """`torch.optim.Muon` that orthogonalises all matrices of one shape together.

    The blocks of a transformer have matrices of two or three shapes, each many times. The formulas
    and the state are PyTorch's; here a step of small matrices takes a few calls in all where
    PyTorch's takes dozens for each matrix.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    Args:
        params: matrices, or groups of them.
        packed: which of the matrices are several stacked in one, and how many: each of these is
            orthogonalised by itself, as the query, key and value projections should be.
    """

    def __init__(self, params: Iterable, *, packed: dict[Tensor, int], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._packed = packed

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        updates = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(updates, grads, 1 - group["momentum"])
        if group["nesterov"]:
            updates = torch._foreach_lerp(grads, updates, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

        # By shape, tall ones transposed: the update of a transpose is the update's transpose.
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, update in zip(params, updates, strict=True):
            parts = self._packed.get(p, 1)
            for matrix, part in zip(p.chunk(parts), update.chunk(parts), strict=True):
                wide = part if part.shape[0] <= part.shape[1] else part.T
                by_shape.setdefault(wide.shape, []).append((matrix, wide))
        for pairs in by_shape.values():
            wide = torch.stack([part for _, part in pairs])
            options = group["ns_coefficients"], group["ns_steps"], group["eps"]
            for (matrix, _), update in zip(pairs, orthogonalize(wide, *options), strict=True):
                update = update if update.shape == matrix.shape else update.T
                rate = group["lr"] * rate_factor(matrix.shape, group["adjust_lr_fn"])
                matrix.add_(update, alpha=-rate)


class MuonWithAdamW(Optimizer):
    """Muon for the groups marked `muon`, AdamW for the others.

    Both work on the groups and the state of this one optimizer, so schedules and checkpoints see no
    difference. AdamW's groups come first.

    Args:
        groups: of parameters, as for any optimizer; `muon` says whose they are.
        muon: arguments of `Muon`.
        adamw: arguments of `torch.optim.AdamW`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, muon: dict[str, Any], adamw: dict[str, Any]
    ) -> None:
        self.adamw = AdamW([group for group in groups if not group["muon"]], **adamw)
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


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Bring all singular values near 1, by a quintic Newton-Schulz iteration in bf16.

    Shape: (n, rows, columns) with rows <= columns -> the same.
    """
    a, b, c = coefficients
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the largest is at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def rate_factor(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    """What the learning rate is multiplied by, for a matrix (outputs, inputs)."""
    rows, columns = shape
    match adjust_lr_fn:
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case "spectral_unclamped":
            return math.sqrt(rows / columns)
        case _:  # "original"
            return math.sqrt(max(1, rows / columns))
