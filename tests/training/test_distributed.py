"""Several processes train as one: the same gradients, exact metrics, one that dies ends all."""

import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import TINY_DIGITS, assert_one_error_line, comparable, history, launch, read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common import distributed
from common.distributed import StopBroadcast, World
from common.errors import UserError
from data.augment import Augment
from data.digits import load_digits
from settings import Options
from training.resume import command_to_continue, load_last
from utils import BatchLoader, make_loaders
from vit_model import ViT

# One step of plain gradient descent on 70 images: the weights' change is the gradient.
ONE_STEP = [*TINY_DIGITS, *"--train_samples 70 --batch_size 70 --epochs 1".split()]
ONE_STEP += "--optimizer SGD(lr=1) --dropout 0 --rotate 0 --translate 0".split()
ONE_STEP += "--precision fp32 --grad_clip 0".split()


LAST = Path("checkpoints/last.pt")


@pytest.fixture
def together(start):
    """together(count, folder, flags, status=0): train there with so many processes, to the end."""

    def train_together(count: int, folder: Path, *flags: object, status: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        processes = []
        for rank in map(str, range(count)):
            place = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(start(folder, flags, place))
        for rank, process in enumerate(processes):
            process.join(120)
            assert process.exitcode == status, (folder / f"err{rank}.txt").read_text()

    return train_together


def listening(pid: int) -> list[str]:
    """The addresses where a process waits for connections, in hexadecimal as /proc has them."""
    files = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            files.add(os.readlink(link))
    tables = [Path(f"/proc/{pid}/net/tcp").read_text()]
    if (ipv6 := Path(f"/proc/{pid}/net/tcp6")).exists():  # not in a kernel without it
        tables.append(ipv6.read_text())
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    return [
        address.partition(":")[0]
        for _, address, _, state, *_, inode in (row[:10] for row in rows)
        if state == "0A" and f"socket:[{inode}]" in files
    ]


def test_every_image_is_in_one_process_and_the_batch_is_the_same():
    data = load_digits()
    for size in (1, 2, 3, 7):
        loaders = [
            make_loaders(data, 100, augment=None, world=World(rank, size), train_samples=250)[0]
            for rank in range(size)
        ]
        for step, parts in enumerate(zip(*loaders, strict=True)):
            images = torch.cat([images for images, _ in parts])
            assert max(len(y) for _, y in parts) - min(len(y) for _, y in parts) <= 1
            whole, labels = loaders[0].batch_of_all(0, step)
            assert torch.equal(images, whole) and len(labels) == loaders[0].size_of(step)
            alone = make_loaders(data, 100, augment=None, train_samples=250)[0]
            assert torch.equal(alone.batch_of_all(0, step)[0], whole)
        assert sum(loaders[0].size_of(step) for step in range(3)) == 250
    # Each process changes its images by amounts of its own, and the parts of one image differ.
    one = data.train[torch.zeros(8, dtype=torch.int64)]
    ours, theirs = (
        next(iter(BatchLoader(one, 8, 0.0, 1.0, augment=Augment(), world=World(rank, 2))))[0]
        for rank in (0, 1)
    )
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("flags", ["--freeze backbone", "--layer_decay 0.5"])
def test_all_processes_start_from_the_file(complete, folder, together, tmp_path, flags):
    model = ViT(depth=1, embed_dim=16, num_heads=4)
    torch.save(model.state_dict(), tmp_path / "start.pt")
    flags = [*ONE_STEP[:4], *ONE_STEP[10:], "--init_from", tmp_path / "start.pt", *flags.split()]
    folder("alone")
    complete(*flags)
    expected = read(LAST)["model_state_dict"]
    here = folder("two")
    together(2, here, *flags)
    found = read(LAST)["model_state_dict"]
    assert "started from: start.pt (this project)" in Path("out0.txt").read_text()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-6
        is_frozen = flags[-1] == "backbone" and not name.startswith("head.")
        assert torch.equal(found[name], model.state_dict()[name]) == is_frozen, name


def test_gradients_are_those_of_one_process(complete, folder, together):
    """Also in parts, one after the other, and where 3 processes share 70 images unevenly."""
    folder("alone")
    complete(*ONE_STEP)
    expected = read(LAST)["model_state_dict"]
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for count, parts in ((1, 4), (2, 1), (3, 2)):
        here = folder(f"{count}x{parts}")
        if count == 1:
            complete(*ONE_STEP, "--grad_accum_steps", parts)
        else:
            together(count, here, *ONE_STEP, "--grad_accum_steps", parts)
            assert f"{count} processes" in Path("out0.txt").read_text()
            assert Path("out1.txt").read_text() == "" == Path("err1.txt").read_text()
        found = read(LAST)["model_state_dict"]
        for name in expected:
            assert (found[name] - expected[name]).abs().max() <= 1e-6 * max(largest, 1)


def test_checkpoints_move_between_one_and_two_processes_and_metrics_are_exact(
    complete, folder, together
):
    here = folder("run")
    flags = [*TINY_DIGITS, "--train_samples", 200, "--batch_size", 30, "--lr", 1e-2]
    together(2, here, *flags, "--epochs", 3, "--ema_decay", 0.9)
    of_two = history()
    assert of_two["processes"] == 2 and len(read(LAST)["random"]) == 2
    # Nothing is left to train: the same model is scored by one process.
    complete("--resume")
    assert history()["test"] == of_two["test"]
    complete("--resume", "--epochs", 4)
    together(2, here, "--resume", "--epochs", 5)
    assert [row["epoch"] for row in history()["epochs"]] == [1, 2, 3, 4, 5]


def test_two_processes_that_stop_within_an_epoch_go_on_bit_for_bit(folder, together):
    here = folder("two")
    flags = "--train_samples 150 --batch_size 24 --epochs 2 --save_every_steps 4".split()
    together(2, here, *TINY_DIGITS, *flags)
    whole, rows = read(LAST), history()["epochs"]
    # Each process draws its own masks.
    first, second = (state["torch"] for state in whole["random"])
    assert not torch.equal(first, second)
    LAST.unlink()  # last.prev.pt is of the fourth step of epoch 2
    together(2, here, "--resume")
    assert "after 1 of 2 epochs and 4 steps" in Path("out0.txt").read_text()
    again = read(LAST)
    for key in ("raw_model_state_dict", "optimizer_state_dict", "random"):
        assert comparable(again[key]) == comparable(whole[key]), key
    for found, expected in zip(history()["epochs"], rows, strict=True):
        for name in ("train_loss", "train_acc", "grad_norm", "val_loss", "val_acc"):
            assert found[name] == pytest.approx(expected[name], rel=1e-12), name


def test_the_command_to_continue_starts_as_many_processes_again():
    def command(*place: int) -> str:
        return command_to_continue(Options(device="cpu"), LAST, World(*place))

    assert " --nproc 2 train.py --resume checkpoints/last.pt --device cpu" in command(0, 2, 0, 2)
    for place in ((0, 4, 0, 2), (0, 1, 0, 1)):  # of several machines, of one process
        assert "--nproc" not in command(*place)


def test_the_log_of_two_processes_has_the_losses_of_whole_batches(folder, together):
    here = folder("run")
    flags = "--train_samples 60 --batch_size 30 --epochs 2 --log tensorboard".split()
    together(2, here, *TINY_DIGITS, *flags)
    (log,) = Path("outputs/tensorboard").iterdir()
    steps = EventAccumulator(str(log)).Reload().Scalars("step/loss")
    assert [event.step for event in steps] == [1, 2, 3, 4]
    first, second = (row["train_loss"] for row in history()["epochs"])
    assert sum(event.value for event in steps[:2]) / 2 == pytest.approx(first)
    assert sum(event.value for event in steps[2:]) / 2 == pytest.approx(second)


def test_wrong_usage_is_told_once(folder, together):
    together(2, folder("run"), *TINY_DIGITS, "--warmup_epochs", 500, status=2)
    told = Path("err0.txt").read_text()
    assert told.startswith("error: --warmup_epochs 500") and told.count("\n") == 1
    assert Path("err1.txt").read_text() == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_that_dies_ends_the_others_and_ctrl_c_stops_all_in_one_step(folder):
    folder("run")
    flags = [*TINY_DIGITS, "--batch_size", 30, "--epochs", 10**5, "--save_every_steps", 5]
    for number in (signal.SIGKILL, signal.SIGINT):
        before = LAST.stat().st_mtime_ns if LAST.exists() else 0
        process = launch(2, *(flags if number == signal.SIGKILL else ["--resume"]))
        while not LAST.exists() or LAST.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        addresses = {address for child in children for address in listening(int(child))}
        assert addresses == {"0100007F"}  # 127.0.0.1: nobody else reaches them
        if number == signal.SIGKILL:
            os.kill(int(children[1]), number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == 2
            assert "error: process 1 of 2 was ended by SIGKILL" in errors
            assert "Traceback" not in errors
        else:
            assert process.returncode == 130
            assert len(re.findall(r"^stopped by SIGINT after ", errors, re.MULTILINE)) == 1
        load_last(LAST.parent)  # what is there is whole


def meet(rank: int, store: str) -> None:
    """One of two processes, of which one has something to say: each must hear of it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    world = World(rank, 2, rank, 2)
    for bad in (0, 1):
        assert not world.all(torch.tensor(rank != bad))
    assert world.all(torch.tensor(True)) and not world.all(torch.tensor(False))
    assert world.sum(torch.tensor([rank + 1.0])).item() == 3
    assert world.share(rank) == 0 and world.gather(rank) == [0, 1]
    stop = StopBroadcast(world)
    assert [stop.after_step(rank * number) for number in (0, 15, 0, 0)] == [0, 0, 15, 0]
    torch.distributed.destroy_process_group()


def test_what_one_process_tells_reaches_all(tmp_path, start):
    """A step that is bad in one process is bad in all, and a stop is a stop of all."""
    store = str(tmp_path / "store")
    torch.multiprocessing.start_processes(meet, (store,), nprocs=2, start_method="forkserver")


def test_places_that_make_no_sense_are_refused(monkeypatch, run):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert_one_error_line(run(train.main), "RANK='2'", "torchrun")
    monkeypatch.setenv("RANK", "1")
    assert_one_error_line(run(train.main), "MASTER_ADDR=''", "torchrun")
    monkeypatch.undo()
    with pytest.raises(UserError, match="a GPU of its own"):
        distributed.device_of(World(0, 2), torch.device("cuda:0"))
