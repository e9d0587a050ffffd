"""src/optim.py, calls.py, oneflow_optim.py: texts, formulas, groups, averages, restoring."""

import copy
import io
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import optim
from common.errors import UserError
from optim import (
    GALLERY,
    WeightAverage,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    needs_closure,
)
from optimizers import oneflow_optim
from optimizers.calls import OPTIMIZERS, SCHEDULERS, parse_call
from optimizers.muon import Muon
from vit_model import ViT

SCRIPT = Path(__file__).parent.parent / "src" / "optim.py"
RUN = {"lr": 1e-2, "weight_decay": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a network waits for its threads longer than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_vit() -> ViT:
    torch.manual_seed(0)
    return ViT(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, dropout=0.0)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (16,), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    images, labels = batch(seed)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    if needs_closure(optimizer):
        return optimizer.step(closure).item()
    loss = closure()
    clip_gradients(optimizer, 1.0)
    optimizer.step()
    return loss.item()


def saved(state: object) -> object:
    """`state` through a file, as the scripts load it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def one_weight(values: list[float], grad: list[float] | None = None) -> nn.Parameter:
    p = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    p.grad = torch.tensor(grad or values, dtype=torch.float64)
    return p


def used_rates(text: str, *, lr: float = 1.0, epochs: int = 12, **settings) -> list[float]:
    """The learning rate of each epoch (batch, with interval="step") of a run with one group."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    settings = {"steps_per_epoch": 3} | settings
    return [r[0] for _, r in build_scheduler(text, optimizer, epochs=epochs, **settings).rates()]


# The default -------------------------------------------------------------------------------------


def test_default_is_plain_adamw_and_cosine_to_the_bit():
    ours, plain = tiny_vit(), tiny_vit()
    a = build_optimizer("AdamW", ours, lr=1e-3, weight_decay=1e-4)
    schedule = build_scheduler("CosineAnnealingLR", a, epochs=4, steps_per_epoch=3)
    b = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    cosine = lr_scheduler.CosineAnnealingLR(b, T_max=4)
    for epoch in range(4):
        assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
        for i in range(3):
            train_step(ours, a, seed=3 * epoch + i)
            schedule.step_batch()
            images, labels = batch(3 * epoch + i)
            b.zero_grad()
            nn.functional.cross_entropy(plain(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            b.step()
        schedule.step_epoch(0.5)
        cosine.step()
    assert same(ours, plain)
    assert type(a) is torch.optim.AdamW and a.param_groups[0]["fused"]
    assert a.text == "AdamW(lr=0.001, weight_decay=0.0001)"
    assert schedule.text == "CosineAnnealingLR(T_max=4)"


def test_importing_costs_no_matplotlib():
    code = "import optim, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0


# Texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("cosine", "CosineAnnealingLR(T_max=20)"),
        ("ONECYCLE", "OneCycleLR(max_lr=0.01, total_steps=2000, cycle_momentum=True)"),
        ("plateau(patience=2)", "ReduceLROnPlateau(patience=2)"),
        ("steplr(10, .5)", "StepLR(step_size=10, gamma=0.5)"),
        ("polynomial", "PolynomialLR(total_iters=20)"),
        ("PolynomialLR(cycle=True)", "PolynomialLR(steps=20, cycle=True)"),
        ("MultiStepLR([2**3, 15])", "MultiStepLR(milestones=[8, 15])"),
        ("LambdaLR(lambda epoch: 0.9**epoch)", "LambdaLR(lr_lambda='lambda epoch: 0.9 ** epoch')"),
        (
            "SequentialLR([linear(0.1), cosine], milestones=[5])",
            "SequentialLR(schedulers=[LinearLR(start_factor=0.1), CosineAnnealingLR(T_max=15)], "
            "milestones=[5])",
        ),
    ],
)
def test_schedule_text_is_resolved_and_makes_the_same_again(text, resolved):
    optimizer = build_optimizer("AdamW", tiny_vit(), **RUN)
    first = build_scheduler(text, optimizer, epochs=20, steps_per_epoch=100)
    again = build_scheduler(first.text, optimizer, epochs=20, steps_per_epoch=100)
    assert first.text == again.text == resolved
    assert first.rates(limit=100) == again.rates(limit=100)


@pytest.mark.parametrize(
    ("text", "cls", "resolved"),
    [
        ("adamw", torch.optim.AdamW, "AdamW(lr=0.01, weight_decay=0.01)"),
        ("SGD(0.1, 0.9, nesterov=True)", torch.optim.SGD, None),
        ("Rprop", torch.optim.Rprop, "Rprop(lr=0.01)"),
        ("Adam(do_bias_correction=False)", oneflow_optim.Adam, None),
        ("adamw(do_bias_correction=True)", oneflow_optim.AdamW, None),
        ("lamb(adam_w_mode=False)", oneflow_optim.LAMB, None),
    ],
)
def test_optimizer_text_is_resolved_and_makes_the_same_again(text, cls, resolved):
    first = build_optimizer(text, tiny_vit(), **RUN)
    again = build_optimizer(first.text, tiny_vit(), lr=9.0, weight_decay=9.0)
    assert type(first) is type(again) is cls
    assert first.text == again.text == (resolved or first.text)
    assert first.defaults == again.defaults


def test_an_argument_in_the_text_wins_over_the_run():
    optimizer = build_optimizer("SGD(lr=0.5, weight_decay=0)", tiny_vit(), **RUN)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0


OPTIMIZER_MISTAKES = {
    "AdmaW": r"'AdmaW' is not known; expected one of AdamW, Adam",
    "SGD(momentun=0.9)": r"momentun.*SGD\(lr=0.001, momentum=0, dampening=0",
    "SGD(momentum='a')": "momentum='a' given, expected float",
    "SGD(nesterov='yes')": "nesterov='yes' given, expected bool",
    "SGD(nesterov=True)": "SGD.*Nesterov momentum requires a momentum",
    "Adam(betas=0.9)": "betas=0.9 given",
    "Adam(betas=(0.9, 0.99, 0.999))": "betas",
    "Adam(betas=(2, 0.9))": "Invalid beta",
    "Adam(lr=-1)": "Invalid learning rate",
    "LAMB(eps=-1)": "eps=-1 is negative",
    "LAMB(betas=(0.9, 1))": r"not in \[0, 1\)",
    "SGD(lr=1e999)": "no finite real number",
    "SGD(lr=nan)": "nan is no value",
    "SGD(lr=inf)": "inf is no value",
    "SGD(lr=(-1) ** 0.5)": "no finite real number",
    "SGD(lr=1/0)": "division by zero",
    "SGD(lr=True)": "lr=True given",
    "SGD(lr=StepLR(3))": "'StepLR' is not known",
    "SGD(params=[])": "params",
    "SGD(capturable=True)": "capturable",
    "Muon(ns_steps=1000)": "Muon",
    "LBFGS(line_search_fn='x')": "strong_wolfe",
    "LBFGS(history_size=10**12)": "history_size",
    "SparseAdam": "SparseAdam needs sparse gradients",
    "SGD(clip_grad_max_norm=-1)": "not above 0",
    "SGD(clip_grad_max_norm=[1, 2])": "1 parameter groups, but 2 norms",
    "SGD(clip_grad_max_norm=1, clip_grad_norm_type='a')": "clip_grad_norm_type",
    "SGD(*[1])": "is no value",
    "SGD(**{})": "is no value",
    "SGD(lr=0.1, lr=0.2)": "gives an argument twice",
    "": "no call such as",
    "SGD(": "no call such as",
    "3": "no call such as",
    "SGD().step()": "no call such as",
    "torch.optim.SGD()": "no call such as",
}
SCHEDULER_MISTAKES = {
    "cosin": r"'cosin' is not known; expected one of Cosine",
    "StepLR": r"StepLR\(\) lacks step_size; StepLR\(step_size, gamma=0.1\)",
    "StepLR(step_size=-5)": "step_size=-5 given",
    "StepLR(step_size=0)": "StepLR",
    "StepLR(step_size=2.5)": "step_size=2.5 given, expected int;",
    "CosineAnnealingLR(T_max=-1)": "T_max=-1 given, expected int of at least 0;",
    "StepLR(2, gamma=-1)": "the learning rate is",
    "MultiStepLR(milestones=3)": "milestones=3 given",
    "MultiStepLR(milestones=['a'])": "milestones",
    "CosineAnnealingLR(T_max=0)": "zero",
    "CosineAnnealingLR(eta_min=nan)": "nan is no value",
    "OneCycleLR(total_steps=5)": "Tried to step",
    "LambdaLR('epoch.real')": "epoch.real is no value",
    "LambdaLR('open(1)')": r"open\(1\) is no value",
    "LambdaLR('1 / (5 - epoch)')": "'1 / \\(5 - epoch\\)' at 5: ",
    "LambdaLR('-epoch')": "the learning rate is",
    "LambdaLR('10 ** (10 ** epoch)')": "no finite real number",
    "LambdaLR(3)": "lr_lambda=3 given",
    "LambdaLR(['1', '1'])": "lr_lambdas",
    "SequentialLR([cosine, cosine], milestones=[])": "rising milestones",
    "SequentialLR([cosine, cosine, cosine], milestones=[9, 3])": "rising milestones",
    "SequentialLR([cosine, plateau], milestones=[3])": "ReduceLROnPlateau",
    "ChainedScheduler([1, 2])": "schedulers",
    "ChainedScheduler([])": "at least one",
    "CyclicLR(max_lr=[1, 2])": "max_lr",
}


@pytest.mark.parametrize("text", OPTIMIZER_MISTAKES)
def test_a_mistake_in_an_optimizer_is_named(text):
    with pytest.raises(UserError, match=OPTIMIZER_MISTAKES[text]):
        build_optimizer(text, tiny_vit(), lr=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("text", SCHEDULER_MISTAKES)
def test_a_mistake_in_a_schedule_is_named(text):
    optimizer = build_optimizer("SGD", tiny_vit(), **RUN)
    with pytest.raises(UserError, match=SCHEDULER_MISTAKES[text]):
        build_scheduler(text, optimizer, epochs=20, steps_per_epoch=10)


HOSTILE = {
    "code": "__import__('os').system('touch hostile')",
    "code as value": "SGD(lr=__import__('os').getpid())",
    "10 MB of brackets": "(" * 10_000_000,
    "10 MB of name": "A" * 10_000_000,
    "brackets": "[" * 3000,
    "closing first": ")" * 100 + "(" * 100,
    "nested calls": "SequentialLR([" * 1000 + "])" * 1000,
    "a few nested calls": "SequentialLR([" * 200 + "cosine" + "], milestones=[])" * 200,
    "signs": "SGD(lr=" + "-" * 3900 + "1)",
    "sum": "SGD(lr=" + "+".join(["1"] * 1900) + ")",
    "power tower": "SGD(lr=2**10**10)",
    "power tower to the right": "SGD(lr=" + "9**" * 900 + "9)",
    "large product": "SGD(lr=" + "*".join(["9" * 90] * 40) + ")",
    "large number": "SGD(lr=" + "9" * 3900 + ")",
    "large text": "SGD(lr='a' * 10**10)",
    "large list": "MultiStepLR([1] * 10**10)",
    "comprehension": "MultiStepLR([i for i in range(10**10)])",
    "null": "SGD(\0)",
    "walrus": "SGD(lr=(a := 1))",
    "format": "SGD(lr=f'{1:1000000000}')",
    "expression tower": "LambdaLR('9**9**9**9')",
    "expression sum": "LambdaLR('" + "+".join(["epoch"] * 600) + "')",
    "expression nested": "LambdaLR('" + "-" * 3900 + "epoch')",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_at_once(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        build_optimizer(text, model, **RUN)
    assert len(str(error.value)) < 1000
    if not text.startswith("SGD"):
        with pytest.raises(UserError) as error:
            build_scheduler(text, optimizer, epochs=20, steps_per_epoch=10)
        assert len(str(error.value)) < 5000
    assert time.perf_counter() - start < 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SGD(lr=1" + " " * 4000 + ")", "4,009 characters given"),
        ("SGD(lr=" + "(" * 30 + "1" + ")" * 30 + ")", "nested deeper than 20 brackets"),
    ],
)
def test_text_has_limits(text, message):
    with pytest.raises(UserError, match=message):
        parse_call(text, OPTIMIZERS)


def test_an_expression_knows_arithmetic_and_nothing_else():
    text = "LambdaLR('min(1, sqrt(epoch + 1) / 2) if epoch % 2 == 0 else cos(pi * epoch / 24)')"
    expected = [
        min(1, math.sqrt(e + 1) / 2) if e % 2 == 0 else math.cos(math.pi * e / 24)
        for e in range(12)
    ]
    assert used_rates(text) == expected


# OneFlow's formulas ------------------------------------------------------------------------------


def adam_by_hand(p, grads, *, lr, wd, in_update, corrected, layerwise, b1=0.9, b2=0.99, eps=1e-3):
    """Plain-Python steps over a list of numbers; LAMB with `layerwise`, else Adam or AdamW."""
    p, v, s = list(p), [0.0] * len(p), [0.0] * len(p)
    for t, grad in enumerate(grads, start=1):
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


GRADS = [[0.5, -1.0, 2.0], [-0.25, 3.0, 0.125], [1.5, 0.0, -2.0], [0.1, 0.2, 0.3]]


@pytest.mark.parametrize("start", [[3.0, -4.0, 12.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(
    ("cls", "options", "in_update"),
    [
        (oneflow_optim.LAMB, {"adam_w_mode": True}, True),
        (oneflow_optim.LAMB, {"adam_w_mode": False}, False),
        (oneflow_optim.Adam, {}, False),
        (oneflow_optim.AdamW, {}, True),
    ],
)
def test_lamb_and_adam_follow_oneflows_formulas(cls, options, in_update, corrected, start):
    p, other = one_weight(start), one_weight([1.0])
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = cls([p, other], **settings, do_bias_correction=corrected, **options)
    for grad in GRADS:
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    layerwise = cls is oneflow_optim.LAMB
    expected = adam_by_hand(
        start, GRADS, lr=0.1, wd=0.1, in_update=in_update, corrected=corrected, layerwise=layerwise
    )
    assert p.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_lamb_three_steps_by_hand(adam_w_mode):
    """p = 2, g = 1, b1 = b2 = 0.5, eps = 0, no bias correction, weight decay 0.5, lr 0.1.

    One number is its own norm, so ||p|| / ||u|| u = p while u > 0: p falls by a tenth every step.
    """
    p = one_weight([2.0], [1.0])
    settings = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.5}
    optimizer = oneflow_optim.LAMB(
        [p], **settings, adam_w_mode=adam_w_mode, do_bias_correction=False
    )
    moments = [(0.5, 0.5), (0.75, 0.75), (0.875, 0.875)]
    if not adam_w_mode:  # g + 0.5 p = 2, 1.9, 1.81
        moments = [(1.0, 2.0), (1.45, 2.805), (1.63, 3.04055)]
    for weight, (v, s) in zip((1.8, 1.62, 1.458), moments, strict=True):
        optimizer.step()
        assert p.item() == pytest.approx(weight, rel=1e-12)
        assert optimizer.state[p]["exp_avg"].item() == pytest.approx(v, rel=1e-12)
        assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(s, rel=1e-12)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_with_bias_correction_oneflows_adam_is_pytorchs(name):
    a, b = one_weight([3.0, -4.0, 12.0]), one_weight([3.0, -4.0, 12.0])
    ours = getattr(oneflow_optim, name)([a], lr=1e-2, weight_decay=0.1)
    torchs = getattr(torch.optim, name)([b], lr=1e-2, weight_decay=0.1)
    for grad in GRADS:
        for p, optimizer in ((a, ours), (b, torchs)):
            p.grad = torch.tensor(grad, dtype=torch.float64)
            optimizer.step()
    assert a.tolist() == pytest.approx(b.tolist(), rel=1e-12)


def test_cosine_decay_has_its_closed_form_past_the_end():
    rates = used_rates("CosineDecayLR(decay_steps=7, alpha=0.2)", lr=0.5)
    for t, rate in enumerate(rates):
        f = 0.8 * 0.5 * (1 + math.cos(math.pi * t / 7)) + 0.2
        assert rate == pytest.approx(0.5 * (f if t <= 7 else 0.2), rel=1e-12)
    assert rates[8] == rates[11] == pytest.approx(0.1)


@pytest.mark.parametrize("cycle", [False, True])
def test_oneflow_polynomial_has_its_closed_form_past_the_end(cycle):
    text = f"PolynomialLR(steps=4, end_learning_rate=0.01, power=2, cycle={cycle})"
    rates = used_rates(text, lr=0.5)
    for t, rate in enumerate(rates):
        done = t / (4 * max(1, math.ceil(t / 4))) if cycle else min(t, 4) / 4
        assert rate == pytest.approx((0.5 - 0.01) * (1 - done) ** 2 + 0.01, rel=1e-12)
    assert rates[5] == pytest.approx(0.01 if not cycle else 0.49 * (3 / 8) ** 2 + 0.01)


# Every optimizer ---------------------------------------------------------------------------------

SETTINGS = {  # where the tests' own learning rate is not enough
    "Adadelta": "Adadelta(lr=10)",
    "Adafactor": "Adafactor(lr=0.1)",
    "Adagrad": "Adagrad(lr=0.05)",
    "ASGD": "ASGD(lr=1)",
    "LAMB": "LAMB(lr=0.03)",
    "LBFGS": "LBFGS(lr=1, max_iter=4, history_size=5, line_search_fn='strong_wolfe')",
    "RAdam": "RAdam(lr=0.03)",
    "Rprop": "Rprop(lr=0.01)",
    "SGD": "SGD(lr=0.1, momentum=0.9, nesterov=True)",
}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"SparseAdam"}))
def test_every_optimizer_learns(name):
    model = tiny_vit()
    optimizer = build_optimizer(SETTINGS.get(name, name), model, **RUN)
    losses = [train_step(model, optimizer) for _ in range(60)]
    assert min(losses) < 0.8 * losses[0]


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, plain = tiny_vit(), tiny_vit()
    optimizer = build_optimizer("Muon(momentum=0.9)", model, **RUN, head_lr=0.5)
    muon, adamw = (
        "Muon(lr=0.02, weight_decay=0.01, momentum=0.9)",
        "AdamW(lr=0.01, weight_decay=0.01)",
    )
    assert optimizer.text == f"{muon} on the blocks' matrices, {adamw} on the rest"
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"body": 0.01, "head": 0.5, "matrices": 0.02}

    inside = [n for n, p in plain.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    parameters = dict(plain.named_parameters())
    head = [p for n, p in parameters.items() if n.startswith("head.")]
    rest = [p for n, p in parameters.items() if n not in inside and not n.startswith("head.")]
    # Query, key and value are three matrices to Muon: parts that share the packed one's memory.
    packed = parameters["blocks.0.attn.in_proj_weight"]
    parts = [nn.Parameter(part) for part in packed.detach().chunk(3)]
    others = [parameters[n] for n in inside if parameters[n] is not packed]
    muon = torch.optim.Muon([*parts, *others], lr=0.02, weight_decay=0.01, momentum=0.9)
    groups = [{"params": rest}, {"params": head, "lr": 0.5}]
    adamw = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01, fused=True)
    assert len(inside) == 4
    for seed in range(3):
        train_step(model, optimizer, seed)
        images, labels = batch(seed)
        plain.zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        torch.nn.utils.clip_grad_norm_([*rest, *head, *(parameters[n] for n in inside)], 1.0)
        for part, grad in zip(parts, packed.grad.chunk(3), strict=True):
            part.grad = grad
        muon.step()
        adamw.step()
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=2e-4)  # a rounding of bf16 in the update, times lr
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "ns_steps": 3, "weight_decay": 0.5},
        {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (3.0, -3.2, 1.2)},
    ],
)
def test_muon_takes_the_steps_of_pytorchs(settings):
    torch.manual_seed(0)
    shapes = [(8, 8), (32, 8), (8, 32), (8, 8), (24, 8)]
    ours, theirs = ([nn.Parameter(torch.randn(s)) for s in shapes] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    optimizers = [
        Muon(ours, packed={}, lr=0.05, **settings),
        torch.optim.Muon(theirs, lr=0.05, **settings),
    ]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=4e-3, rtol=0)  # bf16, in another order of sums
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(states[0][1]["momentum_buffer"], states[1][1]["momentum_buffer"])


# Parameter groups and clipping -------------------------------------------------------------------


def test_no_decay_spares_biases_norms_cls_token_and_positions():
    model = tiny_vit()
    optimizer = build_optimizer("AdamW", model, **RUN, head_lr=0.5, no_decay=True)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        group["name"]: ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert list(found) == ["body", "body, no decay", "head", "head, no decay"]
    block = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.3.weight"}
    decayed = {"patch_embed.proj.weight"} | {f"blocks.0.{name}" for name in block}
    assert found["body"] == (decayed, 0.01, 0.01)
    assert found["head"] == ({"head.weight"}, 0.5, 0.01)
    assert found["head, no decay"] == ({"head.bias"}, 0.5, 0.0)
    assert {"cls_token", "pos_embed", "norm.weight"} <= found["body, no decay"][0]
    assert found["body, no decay"][2] == 0.0
    assert sum(len(members) for members, _, _ in found.values()) == len(names)


@pytest.mark.parametrize("settings", [{"head_lr": 0.1}, {}])
def test_groups_that_the_model_lacks_are_refused(settings):
    with pytest.raises(UserError, match=r"under (head|blocks)\."):
        build_optimizer("AdamW" if settings else "Muon", nn.Linear(2, 2), **RUN, **settings)


def test_each_group_is_clipped_by_its_own_norm_and_the_rest_together():
    a, b, c = one_weight([1, 1], [3, 4]), one_weight([1, 1], [6, -8]), one_weight([1], [2.4])
    own = {"clip_grad_max_norm": 1.0}
    groups = [
        {"params": [a], **own, "clip_grad_norm_type": 2.0},
        {"params": [b], **own, "clip_grad_norm_type": math.inf},
        {"params": [c]},
    ]
    total = clip_gradients(torch.optim.SGD(groups, lr=1.0), 1.2)
    assert total.item() == pytest.approx(math.sqrt(25 + 100 + 2.4**2))
    assert a.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert b.grad.tolist() == pytest.approx([0.75, -1.0], rel=1e-5)
    assert c.grad.tolist() == pytest.approx([1.2], rel=1e-5)


def test_clipping_off_leaves_the_gradients_and_returns_the_norm():
    p = one_weight([1, 1], [3, 4])
    assert clip_gradients(torch.optim.SGD([p], lr=1.0), 0.0).item() == 5.0
    assert p.grad.tolist() == [3, 4]


def test_the_text_sets_the_clipping_of_every_group():
    text = "SGD(clip_grad_max_norm=[1, 2.5], clip_grad_norm_type='inf')"
    optimizer = build_optimizer(text, tiny_vit(), **RUN, head_lr=0.1)
    assert [g["clip_grad_max_norm"] for g in optimizer.param_groups] == [1, 2.5]
    assert all(g["clip_grad_norm_type"] == math.inf for g in optimizer.param_groups)


# Schedules ---------------------------------------------------------------------------------------


def torch_sequential(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
        swa_utils.SWALR(optimizer, swa_lr=0.3, anneal_epochs=2),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4, 9])


def torch_chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            "SequentialLR([linear(0.1, total_iters=4), cosine, SWALR(0.3, 2)], milestones=[4, 9])",
            torch_sequential,
        ),
        ("chained([ConstantLR, ExponentialLR(0.9)])", torch_chained),
        ("restarts(3, T_mult=2)", lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2)),
        ("OneCycleLR", lambda o: lr_scheduler.OneCycleLR(o, [1.0, 0.2], total_steps=12)),
        (
            "CyclicLR(step_size_up=3)",
            lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.02], [1.0, 0.2], step_size_up=3),
        ),
        (
            "LambdaLR(['0.9 ** epoch', '1 / (1 + epoch)'])",
            lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (1 + e)]),
        ),
        ("multiplicative('0.9')", lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9)),
        ("PolynomialLR(power=2)", lambda o: lr_scheduler.PolynomialLR(o, 12, 2)),
    ],
)
def test_a_schedule_is_pytorchs_own_for_every_group(text, plain):
    def two_groups():
        groups = [{"params": [one_weight([1])]}, {"params": [one_weight([1])], "lr": 0.2}]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    settings = {"epochs": 12, "steps_per_epoch": 1}
    schedule = build_scheduler(text, two_groups(), **settings)
    optimizer = two_groups()
    scheduler = plain(optimizer)
    for _, rates in schedule.rates():
        assert rates == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-15)
        optimizer.step()
        scheduler.step()


def test_plateau_goes_by_the_validation_loss_and_keeps_each_groups_floor():
    groups = [{"params": [one_weight([1])]}, {"params": [one_weight([1])], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    text = "plateau(factor=0.1, patience=1, min_lr=[0, 0.05])"
    schedule = build_scheduler(text, optimizer, epochs=9, steps_per_epoch=2)
    seen = []
    for loss in (3.0, 2.0, 2.5, 2.5, 1.0, 0.5):
        schedule.step_epoch(loss)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen[:3] == [[1.0, 0.2]] * 3
    assert seen[3:] == [[0.1, 0.05]] * 3


@pytest.mark.parametrize(
    ("text", "interval", "calls"),
    [
        ("onecycle", "step", 6),
        ("cyclic", "step", 6),
        ("cosine", "epoch", 2),
        ("plateau", "epoch", 2),
    ],
)
def test_interval_has_a_default_for_each_schedule(text, interval, calls):
    optimizer = build_optimizer("AdamW", tiny_vit(), **RUN)
    schedule = build_scheduler(text, optimizer, epochs=2, steps_per_epoch=3)
    assert schedule.interval == interval and len(schedule.rates()) == calls
    if text != "plateau":
        other = {"step": "epoch", "epoch": "step"}[interval]
        schedule = build_scheduler(text, optimizer, epochs=2, steps_per_epoch=3, interval=other)
        assert schedule.interval == other


@pytest.mark.parametrize(
    "text", ["cosine", "onecycle", "plateau", "LinearLR(0.5)", "chained([step(2)])"]
)
def test_warm_up_is_linear_and_the_schedule_begins_after_it(text):
    settings = {"lr": 2.0, "steps_per_epoch": 4}
    warm = used_rates(text, epochs=9, warmup_epochs=2, **settings)
    cold = used_rates(text, epochs=7, **settings)
    assert warm[:8] == pytest.approx([cold[0] * (i + 1) / 8 for i in range(8)], rel=1e-12)
    assert warm[8:] == cold


def test_an_optimizer_without_momentum_can_cycle_its_rate():
    optimizer = build_optimizer("Adagrad", tiny_vit(), **RUN)
    schedule = build_scheduler("onecycle", optimizer, epochs=2, steps_per_epoch=5)
    assert "cycle_momentum=False" in schedule.text


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_swa_rate_takes_over_from_the_schedule(interval):
    text = "LinearLR(1, 0.5, total_iters=100)"
    settings = {"epochs": 10, "steps_per_epoch": 2, "interval": interval}
    swa = {"swa_lr": 0.1, "swa_anneal_epochs": 2, "swa_anneal_strategy": "linear"}
    plain = used_rates(text, **settings)
    rates = used_rates(text, **settings, swa_start=6, **swa)
    first = 5 if interval == "epoch" else 10
    reached = plain[first]
    assert rates[: first + 1] == plain[: first + 1]
    assert rates[first + 1 :] == pytest.approx([(reached + 0.1) / 2, 0.1, 0.1, 0.1])


def test_swa_rate_keeps_the_ratio_of_the_groups():
    optimizer = build_optimizer("SGD", tiny_vit(), **RUN, head_lr=0.03)
    settings = {"swa_start": 2, "swa_lr": 0.005, "swa_anneal_epochs": 1}
    schedule = build_scheduler("cosine", optimizer, epochs=5, steps_per_epoch=1, **settings)
    assert schedule.rates()[-1][1] == pytest.approx([0.005, 0.015])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 5}, "leaves nothing"),
        ({"swa_start": 6}, "an epoch from 1 to 5"),
        ({"swa_start": 2, "warmup_epochs": 2}, "an epoch from 3 to 5"),
        ({"swa_lr": 0.1}, "needs --swa_start"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        used_rates("cosine", epochs=5, **settings)
    with pytest.raises(UserError, match="validation loss"):
        used_rates("plateau", interval="step")


# Restoring ---------------------------------------------------------------------------------------

PAIRED_OPTIMIZERS = [
    SETTINGS.get(name, name) for name in sorted(set(OPTIMIZERS) - {"SparseAdam"})
] + ["AdamW(do_bias_correction=False)", "RMSprop(momentum=0.9, centered=True)"]
PAIRED_SCHEDULERS = [text for text, _ in GALLERY if "['0.9" not in text]


def go(model, optimizer, schedule, average, steps):
    seen = []
    for step in steps:
        train_step(model, optimizer, seed=step)
        schedule.step_batch()
        average.step_batch()
        if step % 2:
            schedule.step_epoch(val_loss=1.0 + step % 3)
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


def start(optimizer_text, scheduler_text, **settings):
    model = tiny_vit()
    decays = not optimizer_text.startswith("Rprop")
    groups = {} if "LBFGS" in optimizer_text else {"head_lr": 5e-3, "no_decay": decays}
    optimizer = build_optimizer(optimizer_text, model, **RUN, **groups)
    run = {"epochs": 20, "steps_per_epoch": 2} | settings
    schedule = build_scheduler(scheduler_text, optimizer, **run)
    return model, optimizer, schedule, WeightAverage(model, ema_decay=0.9)


def assert_restored(optimizer_text, scheduler_text, **settings):
    whole = start(optimizer_text, scheduler_text, **settings)
    rates = go(*whole, range(10))
    half = start(optimizer_text, scheduler_text, **settings)
    assert go(*half, range(5)) == rates[:5]
    states = saved([part.state_dict() for part in half])
    again = start(optimizer_text, scheduler_text, **settings)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    assert go(*again, range(5, 10)) == rates[5:]
    assert same(again[0], whole[0]) and same(again[3].module, whole[3].module)


@pytest.mark.parametrize("optimizer_text", PAIRED_OPTIMIZERS)
@pytest.mark.parametrize("scheduler_text", ["cosine", "onecycle", "plateau(factor=.5, patience=0)"])
def test_every_optimizer_goes_on_bit_for_bit_after_a_save(optimizer_text, scheduler_text):
    assert_restored(optimizer_text, scheduler_text)


@pytest.mark.parametrize("optimizer_text", ["AdamW", "Muon", "SGD(momentum=0.9)"])
@pytest.mark.parametrize("scheduler_text", PAIRED_SCHEDULERS)
def test_every_schedule_goes_on_bit_for_bit_after_a_save(optimizer_text, scheduler_text):
    assert_restored(optimizer_text, scheduler_text)


@pytest.mark.parametrize("scheduler_text", ["cosine", "onecycle", "plateau(patience=0)"])
def test_warm_up_and_swa_go_on_bit_for_bit_after_a_save(scheduler_text):
    assert_restored("AdamW", scheduler_text, warmup_epochs=3)
    assert_restored("AdamW", scheduler_text, swa_start=2, swa_lr=1e-4, swa_anneal_epochs=2)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_run_goes_on_with_more_epochs_on_the_longer_schedule():
    _, _, schedule, _ = start("AdamW", "cosine", epochs=4)
    for _ in range(4):
        schedule.step_epoch(1.0)
    _, optimizer, longer, _ = start("AdamW", "cosine", epochs=8)
    longer.load_state_dict(saved(schedule.state_dict()))
    assert longer.text == "CosineAnnealingLR(T_max=8)"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(RUN["lr"] / 2)
    with pytest.raises(UserError, match="at epoch 6, batch 0"):
        schedule.load_state_dict({"val_losses": [1.0] * 6, "batch": 0})


@pytest.mark.parametrize("scheduler_text", ["LambdaLR('0.9 ** epoch')", "onecycle", "plateau"])
def test_a_run_resumed_with_another_learning_rate_has_it(scheduler_text):
    parts = start("AdamW", scheduler_text)
    go(*parts, range(5))
    states = saved([part.state_dict() for part in parts])
    doubled = {"lr": 2 * RUN["lr"], "head_lr": 1e-2, "weight_decay": 1e-2, "no_decay": True}
    optimizer = build_optimizer("AdamW", tiny_vit(), **doubled)
    schedule = build_scheduler(scheduler_text, optimizer, epochs=20, steps_per_epoch=2)
    optimizer.load_state_dict(states[1])
    schedule.load_state_dict(states[2])
    for group, single in zip(optimizer.param_groups, parts[1].param_groups, strict=True):
        assert group["lr"] == pytest.approx(2 * single["lr"])


def test_every_schedule_is_in_the_gallery():
    shown = {call.cls for text, _ in GALLERY for call in parse_call(text, SCHEDULERS).all_calls()}
    assert shown == {cls for classes in SCHEDULERS.values() for cls in classes}


# Averages ----------------------------------------------------------------------------------------


def test_ema_is_the_mean_taken_by_hand():
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, ema_decay=0.75)
    assert average.module is model and not average.active
    expected = None
    for value in (1.0, 3.0, -2.0, 5.0):
        nn.init.constant_(model.weight, value)
        average.step_batch()
        average.step_epoch(1, [], torch.device("cpu"))
        expected = value if expected is None else 0.75 * expected + 0.25 * value
    assert average.module.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 5.0


def test_swa_is_the_mean_of_the_epochs_from_its_start():
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, swa_start=3)
    for epoch, value in enumerate((100.0, 100.0, 1.0, 2.0, 6.0), start=1):
        nn.init.constant_(model.weight, value)
        average.step_batch()
        average.step_epoch(epoch, [], torch.device("cpu"))
        assert average.active == (epoch >= 3)
    assert average.module.weight.item() == pytest.approx(3.0)


def test_batch_norm_statistics_are_those_of_the_averaged_weights():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(model, swa_start=1)
    images = torch.tensor([[1.0], [2.0], [6.0]])
    for epoch, value in enumerate((1.0, 3.0), start=1):
        nn.init.constant_(model[0].weight, value)
        average.step_epoch(epoch, [(images, None)], torch.device("cpu"))
    assert average.module[1].running_mean.item() == pytest.approx(3.0 * 2.0)


def test_without_an_average_the_model_itself_is_used():
    model = nn.Linear(1, 1)
    average = WeightAverage(model)
    average.step_batch()
    average.step_epoch(1, [], torch.device("cpu"))
    assert average.module is model and average.state_dict() == {}
    with pytest.raises(UserError, match="choose one"):
        WeightAverage(model, ema_decay=0.9, swa_start=2)


def test_training_does_not_move_the_average():
    model = tiny_vit()
    optimizer = build_optimizer("SGD", model, **RUN)
    average = WeightAverage(model, swa_start=1)
    average.step_epoch(1, [], torch.device("cpu"))
    before = copy.deepcopy(average.module)
    train_step(model, optimizer)
    average.step_batch()
    assert same(average.module, before) and not same(model, before)


# Command line ------------------------------------------------------------------------------------


def command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)


def test_list_names_everything_with_its_defaults():
    done = command("--list")
    assert done.returncode == 0 and done.stderr == ""
    for name in (*OPTIMIZERS, *SCHEDULERS):
        assert f"  {name}(" in done.stdout
    assert "SGD(lr=<run>, momentum=0, dampening=0, weight_decay=<run>" in done.stdout
    assert "CosineAnnealingLR(T_max=<run>, eta_min=0.0)" in done.stdout


def test_plot_draws_what_a_run_will_use(tmp_path):
    path = tmp_path / "new" / "one.png"
    flags = ["--scheduler", "onecycle", "--head-lr", "0.1", "--epochs", "3"]
    done = command("--plot", *flags, "--steps_per_epoch", "10", "--output", str(path))
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("OneCycleLR(max_lr=[0.001, 0.1], total_steps=30")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_bad_text_is_one_line_and_status_2(tmp_path):
    done = command("--plot", "--scheduler", "cosine(\n", "--output", str(tmp_path / "a.png"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --scheduler: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_fails_late_is_named_then(monkeypatch):
    """The rehearsal of a long run ends before the run does."""
    monkeypatch.setattr(optim, "MAX_REHEARSAL", 10)
    optimizer = build_optimizer("AdamW", tiny_vit(), **RUN)
    for text in ("OneCycleLR(total_steps=20)", "LambdaLR('1 - epoch / 20')"):
        settings = {"epochs": 30, "steps_per_epoch": 1, "interval": "step"}
        schedule = build_scheduler(text, optimizer, **settings)
        with pytest.raises(UserError, match=r"in epoch 2\d"):
            for _ in range(30):
                optimizer.step()
                schedule.step_batch()
                schedule.step_epoch(1.0)


def test_the_gallery_takes_no_flags_of_a_run(tmp_path):
    done = command("--plot", "--epochs", "10", "--output", str(tmp_path / "x.png"))
    assert done.returncode == 2 and "--epochs is for one schedule" in done.stderr
    done = command("--plot", "--scheduler=cosine", "--epochs", "2000000")
    assert done.returncode == 2 and "too many to draw" in done.stderr


def test_an_ema_decay_of_0_turns_a_recipes_average_off():
    model = tiny_vit()
    assert WeightAverage(model, ema_decay=0.0).module is model
    assert WeightAverage(model, ema_decay=0.0, swa_start=2).swa_start == 2
    with pytest.raises(UserError, match=r"--ema_decay 0\.9 and --swa_start 2 .*--ema_decay 0 "):
        WeightAverage(model, ema_decay=0.9, swa_start=2)
