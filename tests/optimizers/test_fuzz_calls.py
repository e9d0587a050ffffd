"""Calls of optimizers and schedules as text: each is built and steps, or is refused in one line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import FREE_TEXTS, NUMBERS, bounded, result_or_error

import optim
from optimizers import calls
from optimizers.calls import OPTIMIZERS, SCHEDULERS, parse_call
from vit_model import ViT

SCALARS = st.sampled_from(
    [
        *NUMBERS,
        *"-x 1/0 0**-1 (-1)**0.5 epoch step x pi e 'a' 'min' 'linear' 'cos' 'inf' [] [1]".split(),
        *"'triangular2' '0.9**epoch' '9**9**epoch' '1/epoch' 'epoch' [1,2] (0.9,0.999) ()".split(),
        *"[0.1]*10 {} {1:2} lambda:1 (yield) *[1] f'{x}' b'a'".split(),
        *["lambda x:x", "lambda epoch:1/epoch"],
    ]
)
USUAL = ["1", "3", "0.5", "1e-3", "[1, 2]", "[2]", "'0.9 ** epoch'", "[StepLR(2), LinearLR(0.5)]"]
CLASSES = [cls for each in (OPTIMIZERS, SCHEDULERS) for group in each.values() for cls in group]
PARAMETERS = sorted({name for cls in CLASSES for name in calls.signature_of(cls).parameters})
NAMES = [*OPTIMIZERS, *SCHEDULERS, *calls.SHORT_NAMES]
NAMES += ["step", "exp", "max", "nothing", "__import__"]


def any_call(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    value = inner | st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
    named = st.tuples(st.sampled_from(PARAMETERS), value).map("=".join)
    arguments = st.lists(value | named | named, max_size=4).map(", ".join)
    return st.tuples(st.sampled_from(NAMES), arguments).map(lambda parts: "{}({})".format(*parts))


def fitting_call(cls: type) -> st.SearchStrategy[str]:
    """A call with parameters that the class has, most of them with values that serve."""
    needed, others = {}, {}
    for name, parameter in calls.signature_of(cls).parameters.items():
        has_none = parameter.default is parameter.empty
        usual = USUAL if has_none else [repr(parameter.default)]
        (needed if has_none else others)[name] = st.sampled_from(9 * usual) | SCALARS
    return st.fixed_dictionaries(needed, optional=others).map(
        lambda given: f"{cls.__name__}({', '.join(map('='.join, given.items()))})"
    )


TEXTS = (
    st.sampled_from(CLASSES).flatmap(fitting_call)
    | st.sampled_from(CLASSES).flatmap(fitting_call)
    | st.recursive(SCALARS | st.sampled_from(NAMES), any_call, max_leaves=6)
    | FREE_TEXTS
)


@pytest.fixture(scope="module")
def network() -> ViT:
    torch.manual_seed(0)
    return ViT(embed_dim=8, depth=1, num_heads=2, dropout=0.0)


def use(text: str, network: ViT, groups: dict, **flags) -> None:
    """Build what the text calls for, and take the steps of a short run."""
    for classes in (OPTIMIZERS, SCHEDULERS):
        parsed = result_or_error(parse_call, text, classes)
        if not isinstance(parsed, str):
            assert repr(parse_call(repr(parsed), classes)) == repr(parsed)
    groups = {"lr": 1e-3, "weight_decay": 1e-4, **groups}
    optimizer = result_or_error(optim.build_optimizer, text, network, **groups)
    if isinstance(optimizer, str):
        optimizer = optim.build_optimizer("SGD(momentum=0.9)", network, **groups)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.clip_gradients(optimizer, 1.0)
    schedule = optim.build_scheduler(text, optimizer, epochs=4, steps_per_epoch=5, **flags)
    for _ in range(4):
        for _ in range(5):
            assert all(0 <= group["lr"] < float("inf") for group in optimizer.param_groups)
            schedule.step_batch()
        schedule.step_epoch(1.0)


@given(
    text=TEXTS,
    interval=st.sampled_from([None, "epoch", "step"]),
    warmup=st.integers(0, 2),
    head_lr=st.sampled_from([None, 1e-3]),
    swa_lr=st.sampled_from([None, 1e-4]),
)
def test_calls_of_optimizers_and_schedules(text, interval, warmup, head_lr, swa_lr, network):
    flags = {"interval": interval, "warmup_epochs": warmup}
    flags |= {"swa_lr": swa_lr, "swa_start": 3} if swa_lr else {}
    with bounded():
        result_or_error(use, text, network, {"head_lr": head_lr}, **flags)


@pytest.mark.parametrize(
    "text",
    [
        "LambdaLR('9**9**9')",
        f"LambdaLR('max({'epoch,' * 1200}1)')",
        f"ChainedScheduler([{'ExponentialLR(0.9),' * 200}])",
        f"LambdaLR({'[' * 19}'1'{']' * 19})",
        "Muon(ns_steps=1000000000)",
        "LBFGS(max_iter=1000000000)",
        "CosineAnnealingWarmRestarts(T_0=1, T_mult=10000000000)",
        "MultiStepLR([9999999999999999999])",
    ],
)
def test_calls_that_ask_for_much_are_answered_at_once(text, network):
    groups = {"lr": 0.1, "weight_decay": 0.0}
    steps = {"epochs": 1000, "steps_per_epoch": 1000, "interval": "step"}
    with bounded(seconds=5):
        optimizer = optim.build_optimizer("SGD", network, **groups)
        result_or_error(optim.build_optimizer, text, network, **groups)
        result_or_error(optim.build_scheduler, text, optimizer, **steps)
