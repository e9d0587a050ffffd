"""Nothing is lost: runs that are stopped, killed or starved of disk go on bit for bit."""

import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_DIGITS, assert_one_error_line, comparable, history, posix, read

import train
from saving.checkpoint import load_checkpoint, save_checkpoint
from training import resume
from training.resolve import check_data_flags
from training.run import Run
from utils import BatchLoader

# 6 steps an epoch.
TINY = [*TINY_DIGITS, *"--train_samples 150 --batch_size 25 --epochs 4".split()]
CONSTANT = [*TINY, "--scheduler", "ConstantLR(factor=1)"]  # its rates don't depend on --epochs
LAST, BEST = Path("checkpoints/last.pt"), Path("checkpoints/best_model.pt")
PREVIOUS = LAST.with_name("last.prev.pt")
# For a last.pt that was put somewhere else.
HERE = ("--output_dir", "outputs", "--todo_path", "TODO.md")


def assert_same_run(folder: Path, reference: Path) -> None:
    """Two finished runs left the same."""
    for name in (LAST, BEST):
        assert comparable(read(folder / name)) == comparable(read(reference / name))
    told = [comparable(history(each / "checkpoints")) for each in (folder, reference)]
    assert told[0] == told[1]
    row = r"\| done \| [^|]+ \| [^|]+ \| \w+ \|"
    rows, expected = (re.findall(row, (f / "TODO.md").read_text()) for f in (folder, reference))
    assert rows == expected and len(rows) == len(told[0]["epochs"])
    assert not list((folder / "checkpoints").glob("*.tmp*"))


# ------------------------------------------------------------------------------------ exact resume


@posix
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--optimizer Muon --ema_decay 0.9 --head_lr 1e-3 --grad_accum_steps 3",
        "--swa_start 2 --swa_lr 1e-3 --scheduler onecycle --optimizer SGD(momentum=0.9)",
        "--optimizer LBFGS(lr=0.1,max_iter=3) --precision fp32 --scheduler plateau",
        "--recipe fast --ema_decay 0.5 --warmup_epochs 1 --num_workers 2 --elastic 1 --pool mean",
        "--mixup 0.4 --cutmix 1 --class_weights auto --random_crop 2 --rand_augment 2",
        "--marks 0.3 --noise 0.5 --rand_conv 0.4 --keep_clean 0.1 --augmix 0.4 --num_workers 2",
    ],
)
def test_a_run_that_is_stopped_thrice_goes_on_bit_for_bit(run, complete, folder, at_step, flags):
    flags = [*flags.split(), *TINY]
    reference = folder("reference")
    complete(*flags)
    stopped = folder("stopped")
    before, spent = 0, {}
    for step, number in ((3, signal.SIGINT), (9, signal.SIGHUP), (14, signal.SIGTERM)):
        at_step(step - before, lambda number=number: signal.raise_signal(number))
        result = run(train.main, *(["--resume"] if before else flags))
        epochs, steps = divmod(step, 6)
        assert result.status == 128 + number and result.err.count("\n") == 1
        told = f"stopped by {number.name} after {epochs} of 4 epochs and {steps} steps"
        assert (
            told in result.err
            and f"to continue: python3 {ROOT}/launch.py train.py --resume checkpoints/last.pt"
            in result.err
        )
        position = read(LAST)["position"]
        assert position["step"] == steps
        before, spent[epochs] = step, position["totals"]["seconds"]
    assert complete("--resume").err == ""
    # An epoch's time counts what it took before the stop.
    rows = history()["epochs"]
    assert all(0 < seconds < rows[epoch]["seconds"] for epoch, seconds in spent.items())
    assert_same_run(stopped, reference)


@posix
def test_a_second_ctrl_c_stops_at_once_and_the_last_save_stays(run, complete, folder, at_step):
    folder("run")

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(8, twice)
    result = run(train.main, *TINY)
    assert result.status == 130
    assert f"from the last save: python3 {ROOT}/launch.py train.py --resume" in result.err
    assert read(LAST)["position"] | {"totals": None} == {"epoch": 1, "step": 0, "totals": None}
    # A run says that it replaces another, unfinished one, and only that.
    complete(*TINY, "--epochs", 1, "--save_dir", "other")
    shutil.copytree("checkpoints", "third")
    result = complete("--resume", "other/last.pt", "--save_dir", "third", "--epochs", 2)
    assert "note: third/last.pt holds a run that stopped after 1 of 4 epochs" in result.err
    result = complete(*TINY, "--epochs", 1)
    assert "note: checkpoints/last.pt holds a run that stopped after 1 of 4 epochs" in result.err
    assert complete(*TINY, "--epochs", 1).err == ""


@posix
@pytest.mark.parametrize("again", [[], ["--seed", 7]], ids=["same settings", "others"])
def test_a_run_that_could_go_on_makes_way_and_goes_on_elsewhere(
    run, complete, folder, at_step, again
):
    reference = folder("reference")
    complete(*TINY)
    folder("run")
    at_step(16, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(train.main, *TINY).status == 143
    at_step(2, lambda: signal.raise_signal(signal.SIGINT))  # whoever forgot --resume
    result = run(train.main, *TINY, *again)
    assert "checkpoints/last.pt holds a run that stopped after 2 of 4 epochs" in result.err
    (kept,) = (path.parent for path in Path("checkpoints").glob("*/last.pt"))
    assert f"the run that stopped after 2 of 4 epochs is now in {kept}" in result.out
    assert read(LAST)["position"]["step"] == 2
    complete("--resume", kept)
    Path("went_on").mkdir()
    kept.rename("went_on/checkpoints")
    shutil.copy("TODO.md", "went_on")
    assert_same_run(Path("went_on"), reference)


@posix
def test_ctrl_c_in_a_save_stops_in_good_order(run, complete, folder, monkeypatch):
    """The files that belong together are all written before the run stops."""
    reference = folder("reference")
    complete(*TINY)
    here = folder("run")
    original = resume.save_last

    def interrupted(*args, **kwargs) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # even if pressed twice
        original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_last", interrupted)
        result = run(train.main, *TINY)
    assert result.status == 130 and "after 1 of 4 epochs and 0 steps, all saved" in result.err
    assert len(history()["epochs"]) == 1
    assert Path("TODO.md").read_text().count("| done |") == 1
    complete("--resume")
    assert_same_run(here, reference)


def test_a_finished_run_can_be_given_more_epochs_also_in_another_folder(complete, folder):
    long = folder("long")
    complete(*CONSTANT)
    folder("short")
    complete(*CONSTANT, "--epochs", 2)
    complete("--resume", "checkpoints", "--epochs", 4, "--save_dir", "other")
    last, expected = comparable(read("other/last.pt")), comparable(read(long / LAST))
    assert [last[key] == expected[key] for key in ("model_state_dict", "best")] == [True, True]
    todo = Path("TODO.md").read_text()
    assert todo.count("| done |") == 4 and "not started" not in todo
    result = complete("--resume", "other")  # nothing left to train: it is scored again
    assert f"Test Acc: {history('other')['test']['top1']:.2f} %" in result.out
    # A schedule that depends on --epochs goes on as the longer one.
    folder("longer")
    complete(*TINY, "--epochs", 2)
    complete("--resume", "--epochs", 4)
    rates = [row["lr"]["all parameters"] for row in history()["epochs"][2:]]
    assert rates == pytest.approx([1e-3 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in (2, 3)])


# ---------------------------------------------------------------------- killed processes, full disk


@posix
@pytest.mark.parametrize(
    ("kills", "epochs"), [(4, 20), pytest.param(20, 60, marks=pytest.mark.slow)]
)
def test_kills_cost_not_a_bit(start, folder, kills, epochs):
    """SIGKILL at random moments, half of them inside a save; the run goes on each time."""
    flags = [*TINY, "--epochs", epochs, "--save_every_steps", "2", "--ema_decay", "0.9"]
    reference, killed = folder("reference"), folder("killed")
    process = start(reference, flags)
    process.join()
    assert process.exitcode == 0
    chance = random.Random(0)
    positions = []
    for kill in range(kills):
        going_on = LAST.exists() or PREVIOUS.exists()
        before = LAST.stat().st_mtime_ns if LAST.exists() else 0
        arguments = ["--resume", "--save_every_steps", "2"] if going_on else flags
        process = start(killed, arguments, die_at=chance.randrange(5, 40) if kill % 2 else None)
        if not kill % 2:
            deadline = time.monotonic() + 60  # until it saves, so that each gets somewhere
            while time.monotonic() < deadline and (
                not LAST.exists() or LAST.stat().st_mtime_ns == before
            ):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path("err.txt").read_text()
        path = LAST if LAST.exists() else PREVIOUS
        if path.exists():
            position = read(path)["position"]
            positions.append((position["epoch"], position["step"]))
    assert positions == sorted(positions) and positions[-1][0] < epochs
    process = start(killed, ["--resume"])
    process.join()
    assert process.exitcode == 0, Path("err.txt").read_text()
    assert_same_run(killed, reference)


@posix
def test_a_disk_that_fills_up_in_a_save_costs_what_came_after_the_last(start, complete, folder):
    reference = folder("reference")
    complete(*CONSTANT)
    full = folder("full")
    complete(*CONSTANT, "--epochs", 2)
    before = LAST.read_bytes()
    process = start(full, ["--resume", "--epochs", 4], limit=20_000)
    process.join()
    assert process.exitcode == 2
    error = Path("err.txt").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "cannot be written: File too large" in error and ".pt" in error
    assert LAST.read_bytes() == before
    assert not list(LAST.parent.glob(".*.tmp*"))
    complete("--resume", "--epochs", 4)
    resumed, expected = comparable(read(LAST)), comparable(read(reference / LAST))
    assert resumed["model_state_dict"] == expected["model_state_dict"]


@posix
def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(start, run, complete, folder):
    process = start(folder("run"), [*TINY, "--epochs", 10**5])
    while not LAST.exists():
        assert process.is_alive(), Path("err.txt").read_text()
        time.sleep(0.01)
    for flags in (TINY, ["--resume"]):
        result = run(train.main, *flags)
        words = "checkpoints is in use by another run", str(process.pid), "--save_dir"
        assert_one_error_line(result, *words)
    complete(*TINY, "--epochs", 1, "--save_dir", "other")
    process.kill()
    process.join()
    complete(*TINY, "--epochs", 1)


def test_the_save_before_is_never_that_of_an_earlier_run(complete, folder):
    folder("run")
    complete(*TINY, "--epochs", 2)
    assert PREVIOUS.exists()
    complete(*TINY, "--epochs", 1)  # which saves once
    assert not PREVIOUS.exists()


@posix
def test_a_signal_that_nohup_ignores_stays_ignored(complete, folder, at_step):
    folder("run")
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, lambda: signal.raise_signal(signal.SIGHUP))
        complete(*TINY, "--epochs", 1)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_damaged_save_is_told_by_its_checksum_and_the_one_before_serves(run, complete, folder):
    flags = [*TINY, "--epochs", 2, "--save_every_steps", 4]
    here = folder("run")
    complete(*flags)
    whole, before = comparable(read(LAST)), PREVIOUS.read_bytes()
    flipped = bytearray(LAST.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (flipped, flipped[:5000], b"", None):
        PREVIOUS.write_bytes(before)
        LAST.unlink() if content is None else LAST.write_bytes(content)
        result = complete("--resume")
        warning = r"WARNING: .*\ngoing on from the save before it, .*last.prev.pt\n"
        assert re.fullmatch(warning, result.err)
        assert "after 1 of 2 epochs and 4 steps" in result.out
        assert comparable(read(LAST)) == whole
        assert len(history(here / "checkpoints")["epochs"]) == 2
        assert read(PREVIOUS)["position"]["step"] == 4  # not the damaged one
    for path in (LAST, PREVIOUS):
        path.write_bytes(flipped)
    assert_one_error_line(run(train.main, "--resume"), "last.prev.pt is damaged", "checksum")


# ------------------------------------------------------------------------------------- bad numbers


def poison(monkeypatch) -> None:
    """An image of step 3 of epoch 2 is infinite."""
    original = BatchLoader._batch

    def poisoned(self, epoch, number, rank, batch):
        images, labels = original(self, epoch, number, rank, batch)
        if self.shuffle and (epoch, number) == (1, 3):
            images[7] = float("inf")
        return images, labels

    monkeypatch.setattr(BatchLoader, "_batch", poisoned)


def test_a_step_that_is_not_finite_ends_the_run_with_its_batch_kept(
    run, complete, folder, monkeypatch
):
    folder("run")
    poison(monkeypatch)
    result = run(train.main, *TINY, "--scheduler_interval", "step")
    words = "step 3 of epoch 2", "loss nan", "lr 0.00075", "nonfinite.pt"
    words += ("train.py --resume checkpoints/last.pt", " --on_nonfinite skip")
    assert_one_error_line(result, *words)
    kept = read("checkpoints/nonfinite.pt")
    assert (kept["epoch"], kept["step"], kept["images"].shape) == (2, 3, (25, 1, 28, 28))
    assert torch.isinf(kept["images"][7]).all() and torch.isfinite(kept["images"][8]).all()
    assert all(torch.isfinite(value).all() for value in kept["model_state_dict"].values())
    assert read(LAST)["position"]["epoch"] == 1
    result = complete("--resume", "--on_nonfinite", "skip")
    assert "note: step 3 of epoch 2 skipped: loss nan" in result.err
    rows = history()["epochs"]
    assert [row.get("skipped_steps") for row in rows] == [None, [3], None, None]
    assert rows[1]["train_loss"] < 5
    # The schedule moves past the skipped step: the rates of all 24 steps are those of any run.
    rates = 1e-3 * (1 + np.cos(np.pi * np.arange(24) / 24)) / 2
    means = rates.reshape(4, 6).mean(axis=1)
    assert [row["lr"]["all parameters"] for row in rows] == pytest.approx(means.tolist())


@posix
def test_an_epoch_with_a_skipped_step_goes_on_bit_for_bit(
    run, complete, folder, at_step, monkeypatch
):
    poison(monkeypatch)
    flags = [*TINY, "--on_nonfinite", "skip"]
    reference = folder("reference")
    complete(*flags)
    here = folder("stopped")
    at_step(11, lambda: signal.raise_signal(signal.SIGTERM))  # after the skipped one
    assert run(train.main, *flags).status == 143
    complete("--resume")
    assert history()["epochs"][1]["skipped_steps"] == [3]
    assert_same_run(here, reference)


@pytest.mark.parametrize("flags", [[], ["--save_every_steps", 4]])
def test_a_bad_step_that_is_known_later_as_on_a_gpu_is_never_saved(run, folder, monkeypatch, flags):
    poison(monkeypatch)
    monkeypatch.setattr(Run, "_asks_later", property(lambda _: True, lambda *_: None), False)
    folder("run")
    assert_one_error_line(run(train.main, *TINY, *flags), "step 3 of epoch 2 is not finite")
    assert read(LAST)["position"] | {"totals": None} == {"epoch": 1, "step": 0, "totals": None}
    weights = read("checkpoints/nonfinite.pt")["model_state_dict"]
    assert read("checkpoints/nonfinite.pt")["step"] == 3 and weights


# ----------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of a run of one epoch."""
    here = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "argv", ["train.py", *TINY, "--epochs", "1"])
        train.main()
    return here


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr 0.5", "--lr 0.5 contradicts 0.001 leave"),
        ("--seed 7", "--seed 7 contradicts 42"),
        ("--recipe best", "--recipe best contradicts article"),
        ("--dataset mnist", "--dataset mnist contradicts digits"),
        ("--no_decay", "--no_decay contradicts False"),
        ("--class_weights auto", "--class_weights auto contradicts none"),
        ("--optimizer SGD", "--optimizer SGD contradicts AdamW"),
        ("--data_dir x", "--data_dir x has no effect: scikit-learn's digits need no files"),
        ("--cache_dir x", "--cache_dir x has no effect"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(run, stopped, flags, words):
    before = (stopped / LAST).read_bytes()
    result = run(train.main, "--resume", stopped / LAST, *flags.split())
    assert_one_error_line(result, *words.split())
    assert (stopped / LAST).read_bytes() == before


def test_fewer_epochs_than_the_run_has_are_refused_and_what_agrees_is_taken(run, complete, stopped):
    flags = "--lr 1e-3 --depth 1 --dataset auto --epochs 2 --num_workers 1 --save_dir new".split()
    complete("--resume", stopped / LAST.parent, *flags)
    assert read("new/last.pt")["position"]["epoch"] == 2
    result = run(train.main, "--resume", "new", "--epochs", 1)
    assert_one_error_line(result, "--epochs 1 is less than the 2")


def test_last_pt_is_a_checkpoint_too_but_no_other_checkpoint_is_a_run(run, stopped, tmp_path):
    model, content = load_checkpoint(stopped / LAST)
    assert content["epoch"] == 1 and not model.training
    assert resume.load_last(stopped / "checkpoints")[1] == stopped / LAST
    assert_one_error_line(run(train.main, "--resume"), "there is no checkpoints/last.pt to resume")
    assert_one_error_line(run(train.main, "--resume", "x.pt"), "there is no x.pt to resume")
    assert_one_error_line(run(train.main, "--resume", "x" * 300), "last.pt to resume")
    check_data_flags("mnist", {"data_dir": "x" * 300})  # whoever reads it says what is wrong
    assert_one_error_line(run(train.main, "--resume", stopped / BEST), "not the state of a run")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("run settings", {"lr": "nan", "depth": 10**9, "optimizer": "__import__('os')"}),
        ("run", {"seed": None, "dataset": "--todo_path=x", "settings": 7}),
        ("run", {"dataset": "auto"}),
        ("run", {"fingerprint": "0123456789ab\ntest_acc: 100"}),
        ("position", {"epoch": -1, "step": 10**9}),
        ("position totals", {"lrs": [1, 2, 3], "seconds": "long"}),
        ("history 0", {"val_loss": "high", "lr": {}, "strange": 1}),
        ("best", {"acc": [], "epoch": 2}),
        ("optimizer_state_dict", {"state": 7, "param_groups": []}),
        ("optimizer_state_dict state 0", {"exp_avg": torch.zeros(3)}),
        ("scheduler_state_dict", {"val_losses": "abc"}),
        ("random 0", {"torch": torch.zeros(3)}),
        ("raw_model_state_dict", {"head.bias": torch.zeros(3)}),
        ("", {"random": None, "history": [{}, {}], "run": None}),
    ],
)
def test_a_state_that_was_tampered_with_ends_in_one_line(run, stopped, place, changes):
    for name, value in changes.items():
        state = read(stopped / LAST)
        harmed = state
        for key in place.split():
            harmed = harmed[int(key) if key.isdigit() else key]
        harmed[name] = value
        save_checkpoint("last.pt", state)
        result = run(train.main, "--resume", "last.pt", "--epochs", 2, *HERE)
        assert_one_error_line(result)


def test_what_a_new_run_finds_cannot_end_it(complete, stopped):
    """A `last.pt` without a number of epochs, a best model of odd values."""
    state, best = read(stopped / LAST), read(stopped / BEST)
    del state["run"]["settings"]["epochs"]
    LAST.parent.mkdir()
    save_checkpoint(LAST, state)
    assert "kept:     the run that stopped after 1 of " in complete(*TINY, "--epochs", 1).out
    save_checkpoint(BEST, {**best, "best_acc": 10**400, "fingerprint": "other"})
    assert "a best model of unknown settings" in complete(*TINY, "--epochs", 1).out
    save_checkpoint(BEST, {**best, "epoch": torch.tensor([1, 2])})
    save_checkpoint(LAST, read(stopped / LAST))
    assert "WARNING: the best model so far" in complete("--resume", "--epochs", 2, *HERE).err


def test_a_run_that_another_ones_copied_state_replaces_is_told_and_its_model_kept(complete, folder):
    folder("run")
    complete(*TINY, "--epochs", 2, "--seed", 1)
    copy = LAST.rename(LAST.with_name("first.pt"))
    complete(*TINY, "--epochs", 2, "--seed", 7)
    LAST.write_bytes(b"damaged")  # the save before it could still go on
    told = complete("--resume", copy, "--epochs", 3, *HERE).err
    assert f"note: {PREVIOUS} holds a run that stopped after 1 of 2 epochs" in told
    assert "WARNING: the best model so far" in told
    models = [load_checkpoint(path)[1] for path in (BEST, *Path("checkpoints").glob("*/best*"))]
    seed, *kept = [model["settings"]["seed"] for model in models]
    assert seed == history()["settings"]["seed"] == 1 and sorted(kept) == [1, 7]


def test_paths_are_not_taken_from_the_file(complete, stopped):
    state = read(stopped / LAST)
    paths = {"todo_path": "evil.md", "output_dir": "evil", "save_dir": "evil"}
    state["run"] |= paths
    state["run"]["settings"] |= paths
    save_checkpoint("last.pt", state)
    complete("--resume", "last.pt", "--epochs", 2, *HERE)
    assert not list(Path().glob("evil*")) and Path("outputs/training_curves.png").exists()


def test_a_resumed_run_reads_and_writes_where_it_did(complete, folder):
    """Also when it is called from another folder, where another run has its own files."""
    first = folder("first")
    curves = first / "pictures" / "training_curves.png"
    complete(*TINY, "--output_dir", "pictures", "--todo_path", "plans/TODO.md", "--epochs", 2)
    curves.unlink()
    folder("second")
    complete(*TINY, "--epochs", 1)
    others = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    assert complete("--resume", first / LAST, "--epochs", 3).err == ""
    assert curves.exists()
    assert (first / "plans" / "TODO.md").read_text().count("| done |") == 3
    assert {path: path.read_bytes() for path in others} == others
    # A flag given by hand wins, and is known from then on.
    complete("--resume", first / LAST, "--epochs", 4, "--todo_path", "T.md")
    complete("--resume", first / LAST, "--epochs", 5)
    assert Path("T.md").read_text().count("| done |") == 5
    assert (first / "plans" / "TODO.md").read_text().count("| done |") == 3


def test_a_moved_run_needs_its_paths_again(run, complete, folder):
    first = folder("first")
    complete(*TINY, "--epochs", 1)
    folder("second")
    (first / "checkpoints").rename("moved")
    paths = Path("moved/last.paths.json")
    told = paths.read_text()
    # Of a run that was killed before it wrote its own last.pt.
    another = json.loads(told) | {"folder": str(Path("moved").resolve()), "fingerprint": "0"}
    for text in (told, None, "no JSON", "[]", '{"folder": 7}', json.dumps(another)):
        paths.unlink() if text is None else paths.write_text(text)
        before = sorted(Path().rglob("*"))
        result = run(train.main, "--resume", "moved", "--epochs", 2)
        assert_one_error_line(result, "moved/last.pt", "give --output_dir, --todo_path again")
        assert "--data_dir" not in result.err  # the digits come with scikit-learn
        result = run(train.main, "--resume", "moved", "--epochs", 2, "--output_dir", "outputs")
        assert_one_error_line(result, "give --todo_path again")
        assert sorted(Path().rglob("*")) == before
    complete("--resume", "moved", "--epochs", 2, *HERE)
    complete("--resume", "moved", "--epochs", 3)


def test_the_progress_table_is_brought_to_what_the_run_has_done(complete, folder):
    """With the times of then, and without another run's rows."""
    folder("run")
    complete(*TINY, "--epochs", 2)
    times = ["2020-01-01 10:00:00", "2020-01-01 10:00:09"]
    state = read(LAST)
    for row, finished in zip(state["history"], times, strict=True):
        row["finished"] = finished
    save_checkpoint(LAST, state)
    expected = [
        f"| {row['epoch']} | done | {row['train_loss']:.4f} | {row['val_acc']:.2f} | "
        f"{'yes' if row['is_best'] else 'no'} | {row['finished']} |"
        for row in state["history"]
    ]
    for number in (1, 3):
        another = f"| {number} | done | 9.9999 | 11.11 | yes | 2021-01-01 00:00:00 |\n"
        text = Path("TODO.md").read_text()
        Path("TODO.md").write_text(re.sub(r"(\| \d+ \| .*\n)+", another, text))
        complete("--resume")
        rows = re.findall(r"^\| \d+ \|.*", Path("TODO.md").read_text(), re.MULTILINE)
        assert rows == expected


def test_the_random_generator_is_put_back():
    state = resume.random_state(torch.device("cpu"))
    then = torch.rand(3)
    assert not torch.equal(torch.rand(3), then)
    resume.set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), then)


@posix
def test_a_best_model_lost_within_an_epoch_is_not_made_up(run, complete, folder, at_step):
    folder("run")
    at_step(9, lambda: signal.raise_signal(signal.SIGTERM))
    run(train.main, *TINY)
    BEST.unlink()
    at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    assert "WARNING: the best model so far" in run(train.main, "--resume").err
    assert not BEST.exists()  # no weights of mid-epoch under the accuracy of others
    complete("--resume")
    assert load_checkpoint(BEST)[1]["epoch"] >= 2


def test_a_lost_best_model_is_said_and_replaced(complete, folder):
    folder("run")
    complete(*TINY, "--epochs", 2)
    BEST.unlink()
    assert complete("--resume").err.startswith("WARNING: the best model so far")
    rows, best = history()["epochs"], load_checkpoint(BEST)[1]
    assert (best["epoch"], best["best_acc"]) == (2, rows[1]["val_acc"]) and rows[1]["is_best"]
    assert complete("--resume").err == ""
