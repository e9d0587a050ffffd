"""What the optimizers of this project share: the frame of a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GroupwiseStep:
    """Beside an `Optimizer`: a step that updates the parameters with a gradient, group by group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, [p.grad for p in params], group)
        return loss

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError
