"""average.py: means taken by hand, and what they are of."""

import copy

import pytest
from tiny_training import RUN, same, saved, tiny_vit, train_step
from torch import nn

from common.errors import UserError
from optim import build_optimizer
from optimizers.average import WeightAverage


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"ema_decay": 0.75}, [64.0, 56.0, 42.25, 32.1875, 25.640625]),
        ({"swa_start": 3}, [64.0, 32.0, 1.0, 1.5, 3.0]),
        ({"ema_decay": 0.0}, [64.0, 32.0, 1.0, 2.0, 6.0]),
        ({}, [64.0, 32.0, 1.0, 2.0, 6.0]),
    ],
)
def test_an_average_is_the_mean_taken_by_hand_and_without_one_the_model_itself(kind, expected):
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, **kind)
    assert average.module is model
    for epoch, value in enumerate((64.0, 32.0, 1.0, 2.0, 6.0), start=1):
        nn.init.constant_(model.weight, value)
        average.step_batch()
        average.step_epoch(epoch)
        assert average.module.weight.item() == expected[epoch - 1]
        assert average.active == (any(kind.values()) and epoch >= kind.get("swa_start", 1))
        assert model.weight.item() == value
    assert bool(average.state_dict()) == average.active


def test_two_averages_are_refused_and_an_ema_decay_of_0_is_none():
    with pytest.raises(UserError, match=r"--ema_decay 0\.9 and --swa_start 2 .*--ema_decay 0 "):
        WeightAverage(nn.Linear(1, 1), ema_decay=0.9, swa_start=2)
    assert WeightAverage(nn.Linear(1, 1), ema_decay=0.0, swa_start=2).swa_start == 2


@pytest.mark.parametrize("kind", [{"ema_decay": 0.9}, {"swa_start": 1}])
def test_an_average_goes_on_bit_for_bit_after_a_save_and_training_does_not_move_it(kind):
    model = tiny_vit()
    optimizer = build_optimizer("SGD", model, **RUN)
    average, again = WeightAverage(model, **kind), WeightAverage(model, **kind)
    for epoch in (1, 2):
        average.step_batch()
        average.step_epoch(epoch)
        before = copy.deepcopy(average.module)
        train_step(model, optimizer)
        assert same(average.module, before) and not same(model, before)
    again.load_state_dict(saved(average.state_dict()))
    for each in (average, again):
        each.step_batch()
        each.step_epoch(3)
    assert same(average.module, again.module) and not same(average.module, before)
