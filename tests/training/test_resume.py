"""Nothing is lost: runs that are stopped, killed or starved of disk go on bit for bit."""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_error_line

import train
from common import files
from saving.checkpoint import load_checkpoint, save_checkpoint
from training import resume
from utils import BatchLoader

TINY = "--device cpu --dataset digits --train_samples 150 --batch_size 25".split()
TINY += "--depth 1 --embed_dim 16 --num_heads 2 --epochs 4".split()
LAST, BEST = Path("checkpoints/last.pt"), Path("checkpoints/best_model.pt")
# For a last.pt that was put somewhere else.
HERE = ("--output_dir", "outputs", "--todo_path", "TODO.md")
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Where two checkpoints differ by a single bit; times aside."""
    times = ("seconds", "images_per_second", "finished")
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        keys = [key for key in a if key not in times]
        return [d for key in keys for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a} and {b}"]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Two finished runs left the same, to the last bit."""
    for name in (LAST, BEST):
        assert differences(read(folder / name), read(reference / name)) == []
    texts = [
        json.loads((f / "checkpoints" / "history.json").read_text()) for f in (folder, reference)
    ]
    assert differences(*texts) == []
    rows = re.findall(r"\| done \| [^|]+ \| [^|]+ \| \w+ \|", (folder / "TODO.md").read_text())
    assert rows == re.findall(
        r"\| done \| [^|]+ \| [^|]+ \| \w+ \|", (reference / "TODO.md").read_text()
    )
    assert len(rows) == len(texts[0]["epochs"])
    assert not list((folder / "checkpoints").glob("*.tmp*"))


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): do `action` while the run's step n, counted from 1, is under way."""

    def arrange(number: int, action) -> None:
        steps = iter(range(1, 10**9))
        original = train.optim.clip_gradients

        def clip_gradients(*args):
            if next(steps) == number:
                action()
            return original(*args)

        monkeypatch.setattr(train.optim, "clip_gradients", clip_gradients)

    yield arrange
    monkeypatch.undo()


# ------------------------------------------------------------------------------------ exact resume


@posix
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--optimizer Muon --ema_decay 0.9 --head_lr 1e-3 --grad_accum_steps 3",
        "--swa_start 2 --swa_lr 1e-3 --scheduler onecycle --optimizer SGD(momentum=0.9)",
        "--optimizer LBFGS(lr=0.1,max_iter=3) --precision fp32 --scheduler plateau",
        "--recipe fast --warmup_epochs 1 --num_workers 2 --elastic 1 --pool mean",
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(run, folder, at_step, flags):
    flags = [*flags.split(), *TINY]
    reference = folder("reference")
    assert run(train.main, *flags).status == 0
    stops = {"int": (3, signal.SIGINT), "term": (14, signal.SIGTERM), "hup": (9, signal.SIGHUP)}
    for name, (step, number) in stops.items():
        stopped = folder(name)
        at_step(step, lambda number=number: signal.raise_signal(number))
        result = run(train.main, *flags)
        epochs, steps = divmod(step, 6)
        assert result.status == 128 + number and result.err.count("\n") == 1
        assert (
            f"stopped by {number.name} after {epochs} of 4 epochs and {steps} steps" in result.err
        )
        assert "with: --resume checkpoints/last.pt" in result.err
        assert read(LAST)["position"]["step"] == steps
        result = run(train.main, "--resume")
        assert result.status == 0 and result.err == ""
        assert_same_run(stopped, reference)


@posix
def test_a_second_ctrl_c_stops_at_once_and_the_last_save_stays(run, folder, at_step):
    folder("run")

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(8, twice)
    result = run(train.main, *TINY)
    assert (
        result.status == 130 and "from the last save, run this again with: --resume" in result.err
    )
    assert read(LAST)["position"] | {"totals": None} == {"epoch": 1, "step": 0, "totals": None}


def test_a_finished_run_can_be_given_more_epochs(run, folder):
    long = folder("long")
    flags = [*TINY, "--scheduler", "ConstantLR(factor=1)"]
    assert run(train.main, *flags).status == 0
    folder("short")
    assert run(train.main, *flags, "--epochs", 2).status == 0
    assert run(train.main, "--resume", "--epochs", 4).status == 0
    assert differences(read(LAST)["model_state_dict"], read(long / LAST)["model_state_dict"]) == []
    todo = Path("TODO.md").read_text()
    assert todo.count("| done |") == 4 and "not started" not in todo
    result = run(train.main, "--resume")  # nothing left to train: it is scored again
    test = json.loads(Path("checkpoints/history.json").read_text())["test"]
    assert result.status == 0 and f"Test Acc: {test['top1']:.2f} %" in result.out


def test_a_run_can_go_on_in_another_folder(run, folder, at_step):
    reference = folder("reference")
    assert run(train.main, *TINY).status == 0
    folder("moved")
    at_step(20, lambda: signal.raise_signal(signal.SIGINT))
    assert run(train.main, *TINY).status == 130
    assert run(train.main, "--resume", LAST, "--save_dir", "other").status == 0
    for name in ("last.pt", "best_model.pt"):
        assert differences(read(Path("other", name)), read(reference / "checkpoints" / name)) == []


# ---------------------------------------------------------------------- killed processes, full disk


@posix
def test_twenty_kills_cost_not_a_bit(start, tmp_path):
    """SIGKILL at random moments, half of them inside a save; the run goes on each time."""
    flags = [*TINY, "--epochs", "60", "--save_every_steps", "2", "--ema_decay", "0.9"]
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    reference.mkdir()
    killed.mkdir()
    process = start(reference, flags)
    process.join()
    assert process.exitcode == 0
    chance = random.Random(0)
    positions = []
    for kill in range(20):
        saved = [killed / LAST, killed / LAST.with_name("last.prev.pt")]
        going_on = any(path.exists() for path in saved)
        before = saved[0].stat().st_mtime_ns if saved[0].exists() else 0
        arguments = ["--resume", "--save_every_steps", "2"] if going_on else flags
        if kill % 2:
            process = start(killed, arguments, die_at=chance.randrange(5, 40))
        else:
            process = start(killed, arguments)
            deadline = time.monotonic() + 60  # until it saves, so that each gets somewhere
            while time.monotonic() < deadline and (
                not saved[0].exists() or saved[0].stat().st_mtime_ns == before
            ):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (killed / "err.txt").read_text()
        path = saved[0] if saved[0].exists() else saved[1]
        if path.exists():
            position = read(path)["position"]
            positions.append((position["epoch"], position["step"]))
    assert positions == sorted(positions) and positions[-1][0] < 60
    process = start(killed, ["--resume"])
    process.join()
    assert process.exitcode == 0, (killed / "err.txt").read_text()
    assert_same_run(killed, reference)


@posix
def test_a_disk_that_fills_up_in_a_save_costs_what_came_after_the_last(start, tmp_path):
    reference, full = tmp_path / "reference", tmp_path / "full"
    reference.mkdir()
    full.mkdir()
    for folder, epochs in ((reference, 4), (full, 2)):
        process = start(folder, [*TINY, "--scheduler", "ConstantLR(factor=1)", "--epochs", epochs])
        process.join()
    before = (full / LAST).read_bytes()
    process = start(full, ["--resume", "--epochs", 4], limit=20_000)
    process.join()
    assert process.exitcode == 2
    error = (full / "err.txt").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "cannot be written: File too large" in error and ".pt" in error
    assert (full / LAST).read_bytes() == before
    assert not list((full / "checkpoints").glob(".*.tmp*"))
    process = start(full, ["--resume", "--epochs", 4])
    process.join()
    a, b = read(full / LAST), read(reference / LAST)
    assert differences(a["model_state_dict"], b["model_state_dict"]) == []


@posix
def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(start, run, folder):
    here = folder("run")
    process = start(here, [*TINY, "--epochs", 10**5])
    while not LAST.exists():
        assert process.is_alive(), (here / "err.txt").read_text()
        time.sleep(0.01)
    for flags in (TINY, ["--resume"]):
        result = run(train.main, *flags)
        assert_one_error_line(
            result, "checkpoints is in use by another run", str(process.pid), "--save_dir"
        )
    assert run(train.main, *TINY, "--save_dir", "other").status == 0
    process.kill()
    process.join()
    assert run(train.main, *TINY).status == 0


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / ".last.123.tmp.pt").write_bytes(b"half")
    (tmp_path / ".note").write_text("mine")
    with files.lock_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.pid", ".note"]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_a_damaged_save_is_told_by_its_checksum_and_the_one_before_serves(run, folder, harm):
    flags = [*TINY, "--save_every_steps", 4]
    reference = folder("reference")
    assert run(train.main, *flags).status == 0
    here = folder("run")
    assert run(train.main, *flags).status == 0
    content = bytearray(LAST.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "gone":
        LAST.unlink()
    else:
        LAST.write_bytes({"flip": content, "cut": content[:5000], "empty": b""}[harm])
    result = run(train.main, "--resume")
    assert result.status == 0
    assert re.match(r"WARNING: .*\ngoing on from the save before it, .*last.prev.pt\n$", result.err)
    assert "after 3 epochs and 4 steps" in result.out
    assert_same_run(here, reference)
    LAST.write_bytes(content)
    LAST.with_name("last.prev.pt").write_bytes(content)
    assert_one_error_line(run(train.main, "--resume"), "last.prev.pt is damaged", "checksum")


# ------------------------------------------------------------------------------------- bad numbers


def test_a_step_that_is_not_finite_ends_the_run_with_its_batch_kept(run, folder, monkeypatch):
    folder("run")
    original = BatchLoader._batch

    def poisoned(self, epoch, number, rank, batch):
        images, labels = original(self, epoch, number, rank, batch)
        if self.shuffle and (epoch, number) == (1, 3):
            images[7] = float("inf")
        return images, labels

    monkeypatch.setattr(BatchLoader, "_batch", poisoned)
    result = run(train.main, *TINY)
    assert_one_error_line(
        result, "step 3 of epoch 2", "loss nan", "lr 0.000853553", "nonfinite.pt", "skip"
    )
    kept = read(Path("checkpoints/nonfinite.pt"))
    assert (kept["epoch"], kept["step"], kept["images"].shape) == (2, 3, (25, 1, 28, 28))
    assert torch.isinf(kept["images"][7]).all() and torch.isfinite(kept["images"][8]).all()
    assert all(torch.isfinite(value).all() for value in kept["model_state_dict"].values())
    assert read(LAST)["position"]["epoch"] == 1
    result = run(train.main, "--resume", "--on_nonfinite", "skip")
    assert result.status == 0 and "note: step 3 of epoch 2 skipped: loss nan" in result.err
    rows = json.loads(Path("checkpoints/history.json").read_text())["epochs"]
    assert [row.get("skipped_steps") for row in rows] == [None, [3], None, None]
    assert rows[1]["train_loss"] < 5


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
        ("--optimizer SGD", "--optimizer SGD contradicts AdamW"),
        ("--epochs 0", "--epochs '0'"),
        ("--save_every_steps 0", "--save_every_steps '0'"),
        ("--on_nonfinite hope", "--on_nonfinite hope stop skip"),
        ("--grad_accum_steps 0", "--grad_accum_steps '0'"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(run, stopped, flags, words):
    before = (stopped / LAST).read_bytes()
    result = run(train.main, "--resume", stopped / LAST, *flags.split())
    assert_one_error_line(result, *words.split())
    assert (stopped / LAST).read_bytes() == before


def test_flags_that_agree_or_may_change_are_taken(run, stopped, tmp_path):
    flags = "--lr 1e-3 --depth 1 --dataset auto --epochs 2 --num_workers 1 --save_dir new".split()
    assert run(train.main, "--resume", stopped / LAST.parent, *flags).status == 0
    assert read(tmp_path / "new" / "last.pt")["position"]["epoch"] == 2


def test_what_is_no_run_is_refused(run, stopped, tmp_path):
    assert_one_error_line(run(train.main, "--resume"), "there is no checkpoints/last.pt to resume")
    assert_one_error_line(run(train.main, "--resume", "x.pt"), "there is no x.pt to resume")
    assert_one_error_line(run(train.main, "--resume", stopped / BEST), "not the state of a run")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: state["run"]["settings"].update(lr="nan"),
        lambda state: state["run"]["settings"].update(depth=10**9),
        lambda state: state["run"]["settings"].update(optimizer="__import__('os')"),
        lambda state: state["run"]["settings"].pop("lr"),
        lambda state: state["run"].update(dataset="--todo_path=x"),
        lambda state: state["run"].update(fingerprint="0123456789ab\ntest_acc: 100"),
        lambda state: state["run"].update(fingerprint=torch.zeros(3)),
        lambda state: state["position"].update(epoch=-1),
        lambda state: state["position"].update(step=10**9),
        lambda state: state["position"]["totals"].update(lrs=[1, 2, 3]),
        lambda state: state["history"][0].update(val_loss="high"),
        lambda state: state["history"].append({}),
        lambda state: state["best"].update(acc=[]),
        lambda state: state["optimizer_state_dict"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["optimizer_state_dict"].update(state=7),
        lambda state: state["scheduler_state_dict"].update(val_losses="abc"),
        lambda state: state["random"][0].update(torch=torch.zeros(3)),
        lambda state: state["random"][0].update(numpy=None),
        lambda state: state["raw_model_state_dict"].pop("head.bias"),
        lambda state: state.update(average_state_dict=None, random=None),
    ],
)
def test_a_state_that_was_tampered_with_ends_in_one_line(run, stopped, harm):
    state = read(stopped / LAST)
    harm(state)
    save_checkpoint("last.pt", state)
    result = run(train.main, "--resume", "last.pt", "--epochs", 2, *HERE)
    assert_one_error_line(result)


def test_paths_are_not_taken_from_the_file(run, stopped, tmp_path):
    state = read(stopped / LAST)
    places = {"todo_path": "evil.md", "output_dir": "evil", "save_dir": "evil"}
    state["run"] |= places
    state["run"]["settings"] |= places
    save_checkpoint("last.pt", state)
    assert run(train.main, "--resume", "last.pt", "--epochs", 2, *HERE).status == 0
    assert not list(tmp_path.glob("evil*")) and Path("outputs/training_curves.png").exists()


def test_a_resumed_run_reads_and_writes_where_it_did(run, folder):
    """Also when it is called from another folder, where another run has its own files."""
    first = folder("first")
    flags = [*TINY, "--output_dir", "pictures", "--todo_path", "plans/TODO.md"]
    assert run(train.main, *flags, "--epochs", 2).status == 0
    (first / "pictures" / "training_curves.png").unlink()
    folder("second")
    assert run(train.main, *TINY, "--epochs", 1).status == 0
    others = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    result = run(train.main, "--resume", first / LAST, "--epochs", 3)
    assert result.status == 0 and result.err == ""
    assert (first / "pictures" / "training_curves.png").exists()
    assert (first / "plans" / "TODO.md").read_text().count("| done |") == 3
    assert {path: path.read_bytes() for path in others} == others
    # A flag given by hand wins, and is known from then on.
    assert (
        run(train.main, "--resume", first / LAST, "--epochs", 4, "--todo_path", "T.md").status == 0
    )
    assert run(train.main, "--resume", first / LAST, "--epochs", 5).status == 0
    assert Path("T.md").read_text().count("| done |") == 5
    assert (first / "plans" / "TODO.md").read_text().count("| done |") == 3


@pytest.mark.parametrize("told", ["moved", "no file", "no JSON", "[]", '{"folder": 7}', "another"])
def test_a_moved_run_needs_its_paths_again(run, folder, told):
    first = folder("first")
    assert run(train.main, *TINY, "--epochs", 1).status == 0
    folder("second")
    (first / "checkpoints").rename("moved")
    paths = Path("moved/last.paths.json")
    assert paths.exists()
    if told == "no file":
        paths.unlink()
    elif told == "another":  # a run that was killed before it wrote its own last.pt
        here = str(Path("moved").resolve())
        paths.write_text(
            json.dumps(json.loads(paths.read_text()) | {"folder": here, "fingerprint": "0"})
        )
    elif told != "moved":
        paths.write_text(told)
    before = sorted(Path().rglob("*"))
    resume_it = ["--resume", "moved", "--epochs", 2]
    result = run(train.main, *resume_it)
    assert_one_error_line(result, "moved/last.pt", "give --output_dir, --todo_path again")
    assert "--data_dir" not in result.err  # the digits come with scikit-learn
    result = run(train.main, *resume_it, "--output_dir", "outputs")
    assert_one_error_line(result, "give --todo_path again")
    assert sorted(Path().rglob("*")) == before
    assert run(train.main, *resume_it, *HERE).status == 0
    assert run(train.main, "--resume", "moved", "--epochs", 3).status == 0


def test_the_progress_table_is_brought_to_what_the_run_has_done(run, folder):
    """With the times of then, and without another run's rows."""
    folder("run")
    assert run(train.main, *TINY, "--epochs", 2).status == 0
    times = ["2020-01-01 10:00:00", "2020-01-01 10:00:09"]
    state = read(LAST)
    for row, finished in zip(state["history"], times, strict=True):
        row["finished"] = finished
    save_checkpoint(LAST, state)
    another = "| 1 | done | 9.9999 | 11.11 | yes | 2021-01-01 00:00:00 |"
    for table in (another, another.replace("| 1 |", "| 3 |")):
        text = Path("TODO.md").read_text()
        Path("TODO.md").write_text(re.sub(r"(\| \d+ \| .*\n)+", f"{table}\n", text))
        assert run(train.main, "--resume").status == 0
        rows = re.findall(r"^\| \d+ \|.*", Path("TODO.md").read_text(), re.MULTILINE)
        expected = [
            f"| {row['epoch']} | done | {row['train_loss']:.4f} | {row['val_acc']:.2f} | "
            f"{'yes' if row['is_best'] else 'no'} | {row['finished']} |"
            for row in state["history"]
        ]
        assert rows == expected


def test_every_random_generator_is_put_back():
    draw = [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(1).item()]
    resume.seed_generators(3)
    first = [one() for one in draw for _ in range(3)]
    state = resume.random_state(torch.device("cpu"))
    then = [one() for one in draw for _ in range(3)]
    assert [one() for one in draw for _ in range(3)] != then
    resume.set_random_state(state, torch.device("cpu"))
    assert [one() for one in draw for _ in range(3)] == then
    resume.seed_generators(3)
    assert [one() for one in draw for _ in range(3)] == first


def test_a_new_run_says_that_it_replaces_an_unfinished_one(run, folder, at_step):
    folder("run")
    at_step(8, lambda: signal.raise_signal(signal.SIGINT))
    assert run(train.main, *TINY).status == 130
    result = run(train.main, *TINY, "--epochs", 1)
    assert result.status == 0
    assert "note: checkpoints/last.pt holds a run that stopped after 1 of 4 epochs" in result.err
    assert run(train.main, *TINY, "--epochs", 1).err == ""  # that one was finished


def test_a_lost_best_model_is_said_and_replaced(run, folder, at_step):
    folder("run")
    assert run(train.main, *TINY, "--epochs", 2).status == 0
    BEST.unlink()
    result = run(train.main, "--resume")
    assert result.status == 0 and result.err.startswith("WARNING: the best model so far")
    rows = json.loads(Path("checkpoints/history.json").read_text())["epochs"]
    best = load_checkpoint(BEST)[1]
    assert (best["epoch"], best["best_acc"]) == (2, rows[1]["val_acc"]) and rows[1]["is_best"]
    assert run(train.main, "--resume").err == ""


def test_last_pt_is_a_checkpoint_too(stopped):
    model, content = load_checkpoint(stopped / LAST)
    assert content["epoch"] == 1 and not model.training
    assert resume.load_last(stopped / "checkpoints")[1] == stopped / LAST


@posix
def test_ctrl_c_in_a_save_stops_in_good_order(run, folder, monkeypatch):
    """The files that belong together are all written before the run stops."""
    reference = folder("reference")
    assert run(train.main, *TINY).status == 0
    here = folder("run")
    original = resume.save_last

    def interrupted(*args, **kwargs) -> None:
        signal.raise_signal(signal.SIGINT)
        original(*args, **kwargs)

    monkeypatch.setattr(resume, "save_last", interrupted)
    result = run(train.main, *TINY)
    assert result.status == 130 and "after 1 of 4 epochs and 0 steps, all saved" in result.err
    assert len(json.loads(Path("checkpoints/history.json").read_text())["epochs"]) == 1
    assert Path("TODO.md").read_text().count("| done |") == 1
    monkeypatch.setattr(resume, "save_last", original)
    assert run(train.main, "--resume").status == 0
    assert_same_run(here, reference)
