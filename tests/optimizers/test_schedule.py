"""schedule.py: PyTorch's rates for every group, warm-up, annealing, and going on after a save."""

import math

import pytest
import torch
from tiny_training import one_weight, saved
from torch.optim import lr_scheduler as plain
from torch.optim.swa_utils import SWALR

from common.errors import UserError
from optimizers import schedule as schedules
from optimizers.calls import SCHEDULERS, parse_call
from optimizers.gallery import GALLERY
from optimizers.schedule import Schedule, build_scheduler


def two_groups(lr: float = 1.0) -> torch.optim.Optimizer:
    groups = [{"params": [one_weight([1])]}, {"params": [one_weight([1])], "lr": 0.2 * lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def scheduled(text: str, *, lr: float = 1.0, **settings) -> Schedule:
    return build_scheduler(text, two_groups(lr), **{"epochs": 20, "steps_per_epoch": 2} | settings)


def rates_of(text: str, **settings) -> list[list[float]]:
    return [rates for _, rates in scheduled(text, **settings).rates()]


def go(schedule: Schedule, steps: range) -> list[list[dict]]:
    """Take these steps of a run; all that the optimizer's groups hold after each."""
    seen = []
    for step in steps:
        schedule.optimizer.step()
        schedule.step_batch()
        if (step + 1) % schedule.steps_per_epoch == 0:
            schedule.step_epoch(val_loss=1.0 + step % 3)
        groups = schedule.optimizer.param_groups
        seen.append([{k: v for k, v in group.items() if k != "params"} for group in groups])
    return seen


def polynomial(base: float, x: int, cycle: bool) -> float:
    done = x / (4 * max(1, math.ceil(x / 4))) if cycle else min(x, 4) / 4
    return (base - 0.01) * (1 - done) ** 2 + 0.01


ARITHMETIC = "min(1, sqrt(x + 1) / 2) if x % 2 == 0 else cos(pi * x / 24)"
PLAIN = {
    "cosine": lambda o: plain.CosineAnnealingLR(o, 12),
    "PolynomialLR(power=2)": lambda o: plain.PolynomialLR(o, 12, 2),
    "restarts(3, T_mult=2)": lambda o: plain.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: plain.OneCycleLR(o, [1.0, 0.2], total_steps=12),
    "CyclicLR(step_size_up=3)": lambda o: plain.CyclicLR(o, [0.1, 0.02], [1.0, 0.2], 3),
    "multiplicative('0.9')": lambda o: plain.MultiplicativeLR(o, lambda x: 0.9),
    f"LambdaLR(['{ARITHMETIC}', '1 / (1 + epoch)'])": lambda o: plain.LambdaLR(
        o, [lambda x: eval(ARITHMETIC, vars(math) | {"x": x}), lambda x: 1 / (1 + x)]
    ),
    "chained([ConstantLR, ExponentialLR(0.9)])": lambda o: plain.ChainedScheduler(
        [plain.ConstantLR(o), plain.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR([linear(0.1), cosine, SWALR([0.3, 0.1])], milestones=[4, 9])": (
        lambda o: plain.SequentialLR(
            o, [plain.LinearLR(o, 0.1), plain.CosineAnnealingLR(o, 5), SWALR(o, [0.3, 0.1])], [4, 9]
        )
    ),
    # OneFlow's, whose formulas are written out here.
    "CosineDecayLR(decay_steps=7, alpha=0.2)": lambda o: plain.LambdaLR(
        o, lambda x: 0.8 * 0.5 * (1 + math.cos(math.pi * min(x, 7) / 7)) + 0.2
    ),
    **{
        f"PolynomialLR(steps=4, end_learning_rate=0.01, power=2, cycle={cycle})": (
            lambda o, cycle=cycle: plain.LambdaLR(
                o, [lambda x, b=b: polynomial(b, x, cycle) / b for b in (1.0, 0.2)]
            )
        )
        for cycle in (False, True)
    },
}


@pytest.mark.parametrize("text", PLAIN)
def test_a_schedule_is_the_written_out_one_for_every_group(text):
    optimizer = two_groups()
    scheduler = PLAIN[text](optimizer)
    for rates in rates_of(text, epochs=12, steps_per_epoch=1):
        assert rates == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_plateau_goes_by_the_validation_loss_and_keeps_each_groups_floor():
    schedule = scheduled("plateau(factor=0.1, patience=1, min_lr=[0, 0.05])")
    seen = []
    for loss in (3.0, 2.0, 2.5, 2.5, 1.0, 0.5):
        schedule.step_epoch(loss)
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
    assert seen == [[1.0, 0.2]] * 3 + [[0.1, 0.05]] * 3


@pytest.mark.parametrize(
    ("text", "interval", "moves"),
    [
        ("onecycle", None, 6),
        ("onecycle", "epoch", 2),
        ("chained((cyclic, step(1)))", None, 6),
        ("cosine", None, 2),
        ("cosine", "step", 6),
        ("plateau", None, 2),
    ],
)
def test_a_schedule_moves_every_epoch_or_every_batch(text, interval, moves):
    assert len(rates_of(text, epochs=2, steps_per_epoch=3, interval=interval)) == moves


def test_a_momentum_is_cycled_only_where_there_is_one():
    optimizer = torch.optim.Adagrad([one_weight([1])])
    schedule = build_scheduler("onecycle", optimizer, epochs=2, steps_per_epoch=5)
    assert "cycle_momentum=False" in schedule.text
    assert "cycle_momentum=True" in scheduled("onecycle").text


@pytest.mark.parametrize(
    "text", ["cosine", "onecycle", "plateau", "LinearLR(0.5)", "chained([step(2)])"]
)
def test_warm_up_is_linear_and_the_schedule_begins_after_it(text):
    warm = rates_of(text, epochs=9, warmup_epochs=2, lr=2.0)
    cold = rates_of(text, epochs=7, lr=2.0)
    for i in range(4):
        assert warm[i] == pytest.approx([rate * (i + 1) / 4 for rate in cold[0]], rel=1e-12)
    assert warm[4:] == cold


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_swa_rate_takes_over_from_the_schedule_and_keeps_the_ratio_of_the_groups(interval):
    settings = {"epochs": 10, "interval": interval}
    swa = {"swa_start": 6, "swa_lr": 0.1, "swa_anneal_epochs": 2, "swa_anneal_strategy": "linear"}
    before = rates_of("linear(1, 0.5, 100)", **settings)
    rates = rates_of("linear(1, 0.5, 100)", **settings, **swa)
    first = 5 if interval == "epoch" else 10
    assert rates[: first + 1] == before[: first + 1]
    halfway = (before[first][0] + 0.1) / 2
    for found, rate in zip(rates[first + 1 :], (halfway, 0.1, 0.1, 0.1), strict=True):
        assert found == pytest.approx([rate, 0.2 * rate])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("cosine", {"warmup_epochs": 20}, "leaves nothing"),
        ("cosine", {"swa_start": 21}, "an epoch from 1 to 20"),
        ("cosine", {"swa_start": 2, "warmup_epochs": 2}, "an epoch from 3 to 20"),
        ("cosine", {"swa_lr": 0.1}, "needs --swa_start"),
        ("plateau", {"interval": "step"}, "validation loss"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(text, settings, message):
    with pytest.raises(UserError, match=message):
        scheduled(text, **settings)


@pytest.mark.parametrize("text", ["OneCycleLR(total_steps=20)", "LambdaLR('1 - epoch / 20')"])
def test_a_schedule_that_fails_after_the_rehearsal_is_named_then(text, monkeypatch):
    monkeypatch.setattr(schedules, "MAX_REHEARSAL", 10)
    schedule = scheduled(text, interval="step")
    with pytest.raises(UserError, match=r"in epoch 1\d"):
        go(schedule, range(40))


def test_one_cycle_may_have_its_peak_after_the_first_step():
    rates = rates_of("OneCycleLR(pct_start=0.025, anneal_strategy='linear')", interval="step")
    assert len(rates) == 40 and all(0 < rate <= 1 for row in rates for rate in row)
    assert rates[0][0] > 0.9


SWA = {"swa_start": 13, "swa_lr": 0.1, "swa_anneal_epochs": 3}
MORE = [("onecycle", {"warmup_epochs": 3}), ("onecycle", SWA), ("plateau(patience=0)", SWA)]


@pytest.mark.parametrize(("text", "flags"), [*GALLERY, *MORE])
def test_every_schedule_goes_on_identically_after_a_save(text, flags):
    names = {"scheduler_interval": "interval"}
    flags = {names.get(flag, flag): value for flag, value in flags.items() if flag != "head_lr"}
    begun, again = scheduled(text, **flags), scheduled(text, **flags)
    expected = go(scheduled(text, **flags), range(40))
    for start, end in ((0, 3), (3, 27)):  # in the warm-up and while SWA anneals, if there are any
        go(begun, range(start, end))
        again.load_state_dict(saved(begun.state_dict()))
        assert go(again, range(end, 40)) == expected[end:]


def test_every_schedule_is_in_the_gallery():
    shown = {call.cls for text, _ in GALLERY for call in parse_call(text, SCHEDULERS).all_calls()}
    assert shown == {cls for classes in SCHEDULERS.values() for cls in classes}


def test_a_run_goes_on_with_more_epochs_on_the_longer_schedule():
    schedule, longer = scheduled("cosine", epochs=4), scheduled("cosine", epochs=8)
    go(schedule, range(8))
    longer.load_state_dict(saved(schedule.state_dict()))
    assert longer.text == "CosineAnnealingLR(T_max=8)"
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="at epoch 6, batch 0"):
        schedule.load_state_dict({"val_losses": [1.0] * 6, "batch": 0})


@pytest.mark.parametrize("text", ["LambdaLR('0.9 ** epoch')", "onecycle", "plateau"])
def test_a_run_resumed_with_another_learning_rate_has_it(text):
    single, doubled = scheduled(text), scheduled(text, lr=2.0)
    go(single, range(5))
    doubled.optimizer.load_state_dict(saved(single.optimizer.state_dict()))
    doubled.load_state_dict(saved(single.state_dict()))
    groups = doubled.optimizer.param_groups, single.optimizer.param_groups
    for ours, theirs in zip(*groups, strict=True):
        assert ours["lr"] == pytest.approx(2 * theirs["lr"])
