"""A last.pt from a stranger: the run goes on from it, or says in one line why not."""

import shutil
from pathlib import Path

import mutations
import pytest
from hypothesis import assume, given
from mutations import STRUCTURE_EDITS, VERY_FEW, ZIP_EDITS, bounded

import train


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> Path:
    """What a run has left that was stopped in the middle of its first epoch."""
    flags = "--epochs 2 --train_samples 40 --batch_size 20 --depth 1 --save_every_steps 1"
    here = mutations.after_training(tmp_path_factory.mktemp("fuzz"), f"{flags} --ema_decay 0.5")
    return here / "last.prev.pt"


def check_resume(run, tmp_path, content: bytes) -> int:
    """Go on from it, to the end: 0, or 2 with one line that says why not."""
    (tmp_path / "hostile.pt").write_bytes(content)
    with bounded(memory=500 << 20):
        flags = ["--output_dir", "outputs", "--todo_path", "TODO.md"]
        result = run(train.main, "--resume", "hostile.pt", "--device", "cpu", *flags)
    lines = result.err.splitlines()
    others = [line for line in lines if not line.startswith(("WARNING", "note"))]
    assert result.status in (0, 2) and len(others) == (result.status == 2), result.err[-3000:]
    assert all(line.startswith("error: ") for line in others)
    assert not (tmp_path / "ran").exists()
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result.status


def test_a_run_goes_on_from_what_was_not_tampered_with(last, run, tmp_path):
    assert check_resume(run, tmp_path, last.read_bytes()) == 0


@VERY_FEW
@given(plan=STRUCTURE_EDITS)
def test_resume_with_other_structures(last, run, tmp_path, plan):
    content = mutations.restructured(last, plan)
    assume(content is not None)
    check_resume(run, tmp_path, content)


@VERY_FEW
@given(plan=ZIP_EDITS)
def test_resume_from_a_damaged_archive(last, run, tmp_path, plan):
    check_resume(run, tmp_path, mutations.rezipped(last.read_bytes(), plan))


LAUGHS = "random/0/torch run/settings/optimizer run/settings/depth position/epoch best/epoch"
LAUGHS += " position/totals/skipped history/0/skipped_steps optimizer_state_dict/param_groups/0/lr"
NANS = "position/totals/seconds position/totals/lrs/0 best/acc"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((place, ("ODD", "laughs")) for place in LAUGHS.split()),
        *((place, float("nan")) for place in NANS.split()),
        ("run/seed", ("ODD", "10**5000")),
        ("position/totals/steps", -5),
        ("position/totals/steps", 10**9),
        ("history/0/other", ("ODD", "tensor")),
        ("history/0/lr", {(1, 2): 0.1}),
        ("scheduler_state_dict/val_losses", ("ODD", "many names")),
        ("scheduler_state_dict/batch", 10**9),
        ("average_state_dict/n_averaged", ("ODD", "scalar tensor")),
        ("optimizer_state_dict/state/0/exp_avg", ("ODD", "meta")),
        ("optimizer_state_dict/state/8/step", 0),
        ("optimizer_state_dict/state/8/exp_avg_sq", None),
        ("optimizer_state_dict/state/8/exp_avg", [1.0]),
        ("raw_model_state_dict/head.weight", ("ODD", "nan")),
    ],
    ids=str,
)
def test_a_run_does_not_fall_over_such_a_value(last, run, tmp_path, place, value):
    check_resume(run, tmp_path, mutations.with_value(last, place, value))
