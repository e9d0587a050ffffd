"""Data-parallel training on one machine: steps of 1, 2, ... processes, and the exchange's cost.

The whole batch stays the same, each process has a part. The cores are shared: more processes have
fewer threads each. They take turns, each in new processes, so that a machine that slows down slows
all. The all-reduce is that of the gradients alone, one vector of fp32.
"""

import report  # finds src

import os
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing
from torch import nn

import optim
from common import cli, distributed, startup
from common.device import choose_device, choose_precision
from common.distributed import World
from data.load import load_dataset
from settings import Settings, add_flags
from training.speed import keep_freed_memory
from utils import make_loaders
from vit_model import ViT, count_parameters

DEFAULTS = Settings()


def work(
    rank: int, size: int, device: torch.device, data_dir: str, steps: int, threads: int, result: str
) -> None:
    """One process of `size`; the first writes the seconds that `measure` gives."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    world = World(rank, size, rank)
    device = distributed.device_of(world, device)
    with distributed.joined(world, device):
        step, exchange = measure(world, device, data_dir, steps)
    if world.leads:
        Path(result).write_text(f"{step} {exchange}")
    if size > 1:
        cli.end_at_once()


def measure(world: World, device: torch.device, data_dir: str, steps: int) -> tuple[float, float]:
    """Seconds of a step, from an epoch of so many, and of one sum of gradients."""
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    model = ViT().to(device).train()
    samples = steps * DEFAULTS.batch_size
    loader = make_loaders(
        load_dataset("mnist", data_dir), device=device, train_samples=samples, world=world
    )[0]
    rates = {"lr": DEFAULTS.lr, "weight_decay": DEFAULTS.weight_decay}
    optimizer = optim.build_optimizer("AdamW", model, **rates)
    parts = world.wrap(model), loader, nn.CrossEntropyLoss(), optimizer, DEFAULTS.grad_clip
    epoch = partial(report.train_epoch, *parts, precision=precision, world=world)
    gradients = torch.zeros(count_parameters(model), device=device)
    epoch()  # warm-up
    world.sum(gradients)
    return (
        report.seconds(epoch, device) / steps,
        report.seconds(lambda: world.sum(gradients), device),
    )


def turn(
    size: int, device: torch.device, data_dir: str, steps: int, threads: int
) -> tuple[float, float]:
    """Seconds of a step and of an all-reduce with `size` new processes."""
    with TemporaryDirectory() as folder:
        os.environ[distributed.STORE] = str(Path(folder, "store"))
        result = Path(folder, "result")
        arguments = (size, device, data_dir, steps, threads, str(result))
        torch.multiprocessing.spawn(work, arguments, nprocs=size)
        step, exchange = map(float, result.read_text().split())
    return step, exchange


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--processes", nargs="+", default=[1, 2], type=cli.integer(1, 1024))
    parser.add_argument("--steps", default=20, type=cli.integer(1, 421), help="in a turn")
    parser.add_argument("--turns", default=5, type=cli.integer(1), help="timed turns of each")
    add_flags(parser, ("data_dir", "device"))
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    load_dataset("mnist", args.data_dir)  # tells what is wrong with it in one line
    threads = {size: max(1, startup.cores() // size) for size in args.processes}
    turns = [
        [turn(size, device, args.data_dir, args.steps, threads[size]) for size in args.processes]
        for _ in range(args.turns)
    ]
    rows = []
    for size, times in zip(args.processes, zip(*turns, strict=True), strict=True):
        step, exchange = (statistics.median(seconds) for seconds in zip(*times, strict=True))
        pairs = zip(turns, times, strict=True)
        ratios = [first / own for ((first, _), *_), (own, _) in pairs]
        rows.append(
            [
                str(size),
                str(threads[size]),
                f"{DEFAULTS.batch_size / size:.0f}",
                f"{1000 * step:.0f} ms",
                f"{DEFAULTS.batch_size / step:.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{1000 * exchange:.1f} ms" if size > 1 else "none",
            ]
        )
    speed = f"times the speed of {args.processes[0]}"
    report.publish(
        f"Data-parallel training, whole batch {DEFAULTS.batch_size}, median of {args.turns} "
        f"turns of {args.steps} steps",
        ["processes", "threads each", "images each", "step", "images/s", speed, "all-reduce"],
        rows,
        device=device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
