"""What the optimizers of this project share: the frame of a step."""

from collections.abc import Callable

import torch
from torch import Tensor


class GroupwiseStep:
    """Beside an `Optimizer`: a step that hands `_update` each group's parameters with gradients."""

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
