"""muon.py: PyTorch's Muon in other products, and AdamW beside it."""

import pytest
import torch
from tiny_training import RUN, loss_of, tiny_vit, train_step
from torch import nn

from optim import build_optimizer
from optimizers.muon import rate_factor


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"nesterov": False, "ns_steps": 3, "weight_decay": 0.5},
        {"ns_coefficients": (3.0, -3.2, 1.2), "adjust_lr_fn": "match_rms_adamw"},
    ],
)
def test_the_matrices_of_the_blocks_move_as_by_pytorchs_muon_and_the_rest_as_by_adamw(options):
    options = {"lr": 0.02, "weight_decay": 0.01, **options}
    call = f"Muon({', '.join(f'{name}={value!r}' for name, value in options.items())})"
    model, plain = tiny_vit(), tiny_vit()
    optimizer = build_optimizer(call.replace("lr=0.02, ", ""), model, **RUN, head_lr=0.5)
    adamw = "AdamW(lr=0.01, weight_decay=0.01)"
    assert optimizer.text == f"{call} on the blocks' matrices, {adamw} on the rest"
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"body": 0.01, "head": 0.5, "matrices": 0.02}

    named = dict(plain.named_parameters())
    inside = {n: p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2}
    head = [p for n, p in named.items() if n.startswith("head.")]
    rest = [p for n, p in named.items() if n not in inside and not n.startswith("head.")]
    # Query, key and value are three matrices to Muon: parts that share the packed one's memory.
    packed = inside.pop("blocks.0.attn.in_proj_weight")
    parts = [nn.Parameter(part) for part in packed.detach().chunk(3)]
    assert len(inside) == 3
    muon = torch.optim.Muon([*parts, *inside.values()], **options)
    groups = [{"params": rest}, {"params": head, "lr": 0.5}]
    adamw = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01, fused=True)
    for seed in range(3):
        train_step(model, optimizer, seed)
        loss_of(plain, seed)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for part, grad in zip(parts, packed.grad.chunk(3), strict=True):
            part.grad = grad
        muon.step()
        adamw.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # A rounding of bf16 in the update, times lr.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)


def test_the_unclamped_rate_is_lower_for_wide_matrices():
    shape = torch.Size([8, 32])
    assert rate_factor(shape, "spectral_unclamped") == 0.5 and rate_factor(shape, "original") == 1
