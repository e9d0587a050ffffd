"""oneflow_optim.py: the optimizers' formulas, written out; test_schedule.py has the schedules'."""

import math

import pytest
import torch
from tiny_training import one_weight

from optimizers import oneflow_optim

GRADS = [[0.5, -1.0, 2.0], [-0.25, 3.0, 0.125], [1.5, 0.0, -2.0], [0.1, 0.2, 0.3]]
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}


def by_hand(p, *, in_update, corrected, layerwise, lr, betas, eps, weight_decay):
    """Plain-Python steps over a list of numbers; LAMB with `layerwise`, else Adam or AdamW."""
    (b1, b2), wd = betas, weight_decay
    v, s = [0.0] * len(p), [0.0] * len(p)
    for t, grad in enumerate(GRADS, start=1):
        g = grad if in_update else [gi + wd * pi for gi, pi in zip(grad, p, strict=True)]
        v = [b1 * vi + (1 - b1) * gi for vi, gi in zip(v, g, strict=True)]
        s = [b2 * si + (1 - b2) * gi * gi for si, gi in zip(s, g, strict=True)]
        cv, cs = (1 - b1**t, 1 - b2**t) if corrected else (1.0, 1.0)
        u = [vi / cv / (math.sqrt(si / cs) + eps) for vi, si in zip(v, s, strict=True)]
        u = [ui + wd * pi if in_update else ui for ui, pi in zip(u, p, strict=True)]
        norm_p, norm_u = math.hypot(*p), math.hypot(*u)
        ratio = norm_p / norm_u if layerwise and norm_p and norm_u else 1.0
        p = [pi - lr * ratio * ui for pi, ui in zip(p, u, strict=True)]
    return p


def after_steps(cls, start, **settings):
    p = one_weight(start)
    optimizer = cls([p, one_weight([1.0])], **settings)
    for grad in GRADS:
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    return p.tolist()


@pytest.mark.parametrize("start", [[3.0, -4.0, 12.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "in_update"),
    [
        ("LAMB", {"adam_w_mode": True}, True),
        ("LAMB", {"adam_w_mode": False}, False),
        ("Adam", {}, False),
        ("AdamW", {}, True),
    ],
)
def test_lamb_and_adam_follow_their_formulas(name, options, in_update, corrected, start):
    layerwise = name == "LAMB"
    kinds = {"in_update": in_update, "corrected": corrected, "layerwise": layerwise}
    expected = pytest.approx(by_hand(start, **kinds, **SETTINGS), rel=1e-12)
    cls = getattr(oneflow_optim, name)
    assert after_steps(cls, start, **SETTINGS, do_bias_correction=corrected, **options) == expected
    if corrected and not layerwise:
        assert after_steps(getattr(torch.optim, name), start, **SETTINGS) == expected
