"""What `oneflow.optim` has beyond `torch.optim`: LAMB, `do_bias_correction`, two schedules."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optimizers.stepwise import GroupwiseStep


class LAMB(GroupwiseStep, Optimizer):
    """LAMB (You et al., ICLR 2020, https://arxiv.org/abs/1904.00962), with OneFlow's options.

        v = b1 v + (1 - b1) g;   s = b2 s + (1 - b2) g^2;   u = v / (sqrt(s) + eps)
        p = p - lr * ratio * u,  ratio = ||p|| / ||u||, or 1 where either norm is 0

    `do_bias_correction` divides v by 1 - b1^t and s by 1 - b2^t in u. Weight decay is added to u
    with `adam_w_mode`, to g without. Raises ValueError if an argument is outside its range.
    """

    layerwise = True  # whether a tensor's step is scaled by `ratio`

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        do_bias_correction: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} is negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} are not in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"adam_w_mode": adam_w_mode, "do_bias_correction": do_bias_correction}
        super().__init__(params, defaults)

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        if weight_decay and not group["adam_w_mode"]:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)

        v = [state["exp_avg"] for state in states]
        s = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(v, grads, 1 - beta1)
        torch._foreach_mul_(s, beta2)
        torch._foreach_addcmul_(s, grads, grads, value=1 - beta2)

        updates, denominators = v, torch._foreach_sqrt(s)
        if group["do_bias_correction"]:
            steps = [state["step"] for state in states]
            updates = torch._foreach_div(v, [1 - beta1**t for t in steps])
            torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(updates, denominators)
        if weight_decay and group["adam_w_mode"]:
            torch._foreach_add_(updates, params, alpha=weight_decay)

        if self.layerwise:
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True)
            ratios = [torch.where((p > 0) & (u > 0), p / u, 1.0) for p, u in norms]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(params, updates, alpha=-group["lr"])


class Adam(LAMB):
    """Adam with OneFlow's `do_bias_correction`: weight decay is added to the gradient."""

    layerwise = False
    decay_in_update = False

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        do_bias_correction: bool = True,
    ) -> None:
        mode = self.decay_in_update
        super().__init__(params, lr, betas, eps, weight_decay, mode, do_bias_correction)


class AdamW(Adam):
    """AdamW with OneFlow's `do_bias_correction`: weight decay is added to the update."""

    decay_in_update = True


class CosineDecayLR(LRScheduler):
    """A half cosine from the base rate to `alpha` times that at `decay_steps` and from there on."""

    def __init__(
        self, optimizer: Optimizer, decay_steps: int, alpha: float = 0.0, last_epoch: int = -1
    ) -> None:
        if decay_steps <= 0:
            raise ValueError(f"decay_steps={decay_steps} is not positive")
        self.decay_steps, self.alpha = decay_steps, alpha
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        t = min(self.last_epoch, self.decay_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * t / self.decay_steps))
        return [base * ((1 - self.alpha) * cosine + self.alpha) for base in self.base_lrs]


class PolynomialLR(LRScheduler):
    """lr = (base - end) (1 - t/T)^power + end, T = steps (OneFlow).

    Past `steps` the end rate is kept, or with `cycle` T becomes the next multiple of `steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        end_learning_rate: float = 1e-4,
        power: float = 1.0,
        cycle: bool = False,
        last_epoch: int = -1,
    ) -> None:
        if steps <= 0:
            raise ValueError(f"steps={steps} is not positive")
        self.steps, self.end_learning_rate = steps, end_learning_rate
        self.power, self.cycle = power, cycle
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        t, T, end = self.last_epoch, self.steps, self.end_learning_rate
        if self.cycle:
            T *= max(1, math.ceil(t / T))
        factor = (1 - min(t, T) / T) ** self.power
        return [(base - end) * factor + end for base in self.base_lrs]
