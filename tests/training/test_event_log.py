"""The log for TensorBoard, as TensorBoard's own reader has it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_DIGITS, assert_one_error_line, history, posix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common.distributed import SINGLE_PROCESS
from training.event_log import EventLog

# 6 steps an epoch, with two learning rates.
LOGGED = [*TINY_DIGITS, *"--train_samples 150 --batch_size 25 --head_lr 2e-3".split()]
LOGGED += "--log tensorboard --epochs".split()
LOGS = Path("outputs/tensorboard")


def events(here: Path = Path()) -> EventAccumulator:
    """What TensorBoard reads of the one run that was started in a folder."""
    (folder,) = (here / LOGS).iterdir()
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(log: EventAccumulator, start: str) -> dict[str, dict[int, float]]:
    """Steps and values of the tags that begin so; no step stands in them twice."""
    found = {}
    for tag in log.Tags()["scalars"]:
        if tag.startswith(start):
            read = [(event.step, event.value) for event in log.Scalars(tag)]
            found[tag] = dict(read)
            assert len(read) == len(found[tag]), tag
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """The folder of a finished run with a log, of two epochs."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *LOGGED, "2"])
        train.main()
    return folder


def test_the_log_has_the_numbers_of_history_json(logged):
    told, log = history(logged / "checkpoints"), events(logged)
    assert [path.name for path in (logged / LOGS).iterdir()] == [
        f"digits-article-seed42-{told['fingerprint']}"
    ]
    steps = scalars(log, "step/")
    rates = {"step/lr/body": "body", "step/lr/head": "head"}
    assert set(steps) == {"step/loss", "step/grad_norm", *rates}
    for tag, values in steps.items():
        assert list(values) == list(range(1, 13)), tag
    for row, first in zip(told["epochs"], (1, 7), strict=True):
        mean = {tag: sum(v[n] for n in range(first, first + 6)) / 6 for tag, v in steps.items()}
        expected = {"step/loss": row["train_loss"], "step/grad_norm": row["grad_norm"]}
        expected |= {tag: row["lr"][group] for tag, group in rates.items()}
        assert mean == pytest.approx(expected)

    names = ("train_loss", "train_acc", "val_loss", "val_acc", "val_top5")
    assert scalars(log, "epoch/") == {
        f"epoch/{name}": {6 * row["epoch"]: pytest.approx(row[name]) for row in told["epochs"]}
        for name in names
    }
    assert scalars(log, "test/") == {
        f"test/{name}": {13: pytest.approx(told["test"][name])} for name in ("loss", "top1", "top5")
    }


def test_the_log_has_pictures_and_settings(logged):
    log = events(logged)
    for name, width in (("curves", 1000), ("attention", 500)):
        (picture,) = log.Images(name)
        assert picture.width > width and picture.step == 13
    (text,) = log.Tensors("settings/text_summary")
    optimizer = b"| optimizer | `AdamW(lr=0.001, weight_decay=0.0001)` |"
    assert optimizer in text.tensor_proto.string_val[0]
    settings = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"AdamW(lr=0.001, weight_decay=0.0001)" in settings


@posix
@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_curves(run, complete, folder, at_step):
    folder("reference")
    complete(*LOGGED, 3)
    expected = events()
    here = folder("stopped")
    at_step(9, lambda: signal.raise_signal(signal.SIGINT))
    stopped = run(train.main, *LOGGED, 3)
    assert stopped.err.endswith("--device cpu --log tensorboard\n")  # the command to continue
    (log,) = LOGS.iterdir()
    assert f"log:      {log}; to see it: tensorboard --logdir {LOGS}\n" in stopped.out
    # What the stopped process has noted is written.
    assert list(scalars(events(), "step/loss")["step/loss"]) == list(range(1, 10))
    shutil.copytree("checkpoints", here / "saved")
    for _ in range(2):  # also from a save that is older than the log
        shutil.rmtree("checkpoints")
        shutil.copytree(here / "saved", "checkpoints")
        time.sleep(1)  # TensorBoard sorts the files by the second in which they were made
        complete("--resume", "--log", "tensorboard")
        log = events()
        for start in ("step/", "epoch/", "test/"):
            assert scalars(log, start) == scalars(expected, start)
        assert [picture.step for picture in log.Images("curves")] == [19]
    # More epochs replace the result.
    time.sleep(1)
    complete("--resume", "--log", "tensorboard", "--epochs", 4)
    assert list(scalars(events(), "test/")["test/top1"]) == [25]


def test_steps_are_logged_up_to_one_that_is_not_finite(run):
    flags = ["--scheduler", "LambdaLR('1 if step < 7 else 1e30')", "--grad_clip", 0]
    result = run(train.main, *LOGGED, 2, *flags, "--scheduler_interval", "step")
    assert_one_error_line(result, "step 3 of epoch 2 is not finite")
    assert list(scalars(events(), "step/")["step/loss"]) == list(range(1, 9))


def test_no_step_waits_for_the_device():
    """Tensors of the device "meta" have no numbers: to ask for one is an error."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    log = EventLog(None, {}, optimizer, 0, SINGLE_PROCESS)
    log.folder = Path("on")
    number = torch.zeros((), device="meta")
    for _ in range(19):
        log.add_step([0.1], number, number)
    with pytest.raises(NotImplementedError):
        log.write()


def test_a_log_that_cannot_be_written_is_one_error_line(run):
    Path("outputs").mkdir()
    LOGS.write_text("not a folder")
    assert_one_error_line(run(train.main, *LOGGED, 1), "outputs/tensorboard", "cannot be written")


@pytest.mark.slow
def test_without_the_package_a_run_ends_before_it_starts(tmp_path):
    blocked = (
        "import runpy, sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'tensorboard':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", blocked, ROOT / "src" / "train.py", *LOGGED, "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    result = SimpleNamespace(status=done.returncode, err=done.stderr)
    assert_one_error_line(result, "--log tensorboard", "pip install tensorboard")
    assert done.stdout == "" and not list(tmp_path.rglob("*.pt"))
