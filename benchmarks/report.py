"""What the benchmarks share: a training run, a stopwatch, a table with its machine, the records."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SRC))

import common.startup  # noqa: E402, F401 before PyTorch

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import Optimizer  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from analysis.explain import accuracy_interval  # noqa: E402
from analysis.words import DIGIT, words_for  # noqa: E402
from common import cli  # noqa: E402
from common.device import choose_device, describe_threads  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.files import write_text  # noqa: E402
from data.dataset import Split  # noqa: E402
from data.load import load_dataset  # noqa: E402
from deploy.flags import add_checkpoint  # noqa: E402
from optim import clip_gradients  # noqa: E402
from saving.checkpoint import find_checkpoint, load_checkpoint  # noqa: E402
from settings import add_flags  # noqa: E402
from train import forward_backward, patch_drop_in  # noqa: E402
from utils import Batch, BatchLoader  # noqa: E402
from vit_model import ViT  # noqa: E402

RECORDS = Path(__file__).with_name("RECORDS.md")


def add_record(parser: argparse.ArgumentParser) -> None:
    """The flag `--record`; `publish` reads it."""
    parser.add_argument(
        "--record", action="store_true", help="append the table to benchmarks/RECORDS.md as well"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The flags of a benchmark that reads digits in pictures; `load_reading` reads them."""
    add_checkpoint(parser)
    parser.add_argument(
        "--split", default="test", choices=["val", "test"], help="whose digits; val to develop"
    )
    parser.add_argument("--seed", default=0, type=cli.integer(0), help="of all that is drawn")
    add_flags(parser, ("data_dir", "device"))
    add_record(parser)


def load_reading(args: argparse.Namespace) -> tuple[ViT, dict[str, Any], Split]:
    """The model on the device, its checkpoint, and MNIST's digits, as the flags say."""
    device = choose_device(args.device)
    model, checkpoint = load_checkpoint(find_checkpoint(args.checkpoint))
    if words_for(checkpoint) is not DIGIT:
        raise UserError("--checkpoint: expected a model of digits")
    split = getattr(load_dataset("mnist", args.data_dir), args.split)
    return model.to(device), checkpoint, split


def processor() -> str:
    """The CPU's name, or its architecture where the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def train(*flags: object) -> dict[str, Any]:
    """The history of one run of src/train.py with these flags, in folders of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SRC / "train.py"), *map(str, flags), *all_into(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        return json.loads(Path(folder, "history.json").read_text())


def all_into(folder: str) -> list[str]:
    """The flags with which src/train.py writes all that it writes to one folder."""
    todo_path = str(Path(folder, "TODO.md"))
    return ["--save_dir", folder, "--output_dir", folder, "--todo_path", todo_path]


def training_flops(history: dict[str, Any]) -> float:
    """FLOPs of the matrix products and convolutions of a run that `train` returned.

    PyTorch counts those of a forward pass. They are taken three times, for the backward pass has
    two products for each one forward. The network of the averaged weights is not counted, as it is
    only evaluated.
    """
    model = ViT(**history["model_config"]).to("meta").train()
    side = model.patch_embed.img_size
    image = torch.empty(1, history["model_config"]["in_chans"], side, side, device="meta")
    epochs, flops = history["settings"]["epochs"], 0
    shares = [patch_drop_in(epoch, epochs, model.patch_drop) for epoch in range(1, epochs + 1)]
    for share, passes in Counter(shares).items():
        model.patch_drop = share
        with FlopCounterMode(display=False) as counter:
            model(image)
        flops += 3 * counter.get_total_flops() * passes * history["train_images"]
    return flops


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of the best of 20 products of square matrices, after three for warm-up."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min([seconds(lambda: a @ b, device) for _ in range(23)][3:])


def commit() -> str:
    """The commit that is measured; "+" follows where src or the benchmarks differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", SRC, *arguments], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git("diff", "--quiet", "HEAD", "--", ".", ":/benchmarks/*.py").returncode
    except OSError:  # no git
        return "no commit"
    return f"commit {head.stdout.strip()}{'+' * changed}" if head.returncode == 0 else "no commit"


def train_epoch(
    network: Callable[[Tensor], Tensor],
    loader: BatchLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    grad_clip: float,
    **how: Any,
) -> None:
    """The steps of src/train.py over one pass, without what a run does beside them."""
    for number, (images, labels) in enumerate(loader):
        batch = Batch(images, labels, labels, loader.size_of(number))
        train_step(network, criterion, optimizer, batch, grad_clip, **how)


def train_step(
    network: Callable[[Tensor], Tensor],
    criterion: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    grad_clip: float,
    **how: Any,
) -> None:
    """A step of src/train.py."""
    forward_backward(network, criterion, optimizer, batch, **how)
    clip_gradients(optimizer, grad_clip)
    optimizer.step()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes, until the device is done."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def with_interval(scores: np.ndarray) -> tuple[str, str]:
    """The mean of scores (n,) in percent and its 95 % interval: Wilson's where each is right or
    wrong, else that of a normal distribution."""
    mean = scores.mean()
    if scores.dtype == bool:
        low, high = accuracy_interval(int(scores.sum()), len(scores))
    else:
        reach = 1.96 * scores.std() / np.sqrt(len(scores))
        low, high = max(0, mean - reach), min(1, mean + reach)
    return f"{100 * mean:.2f} %", f"{100 * low:.1f} to {100 * high:.1f} %"


def publish(
    title: str,
    header: list[str],
    rows: list[list[str]],
    *,
    device: torch.device,
    record: bool,
    notes: str = "",
) -> None:
    """Print a Markdown table with the machine, the versions and the command that made it.

    Args:
        record: append it to RECORDS.md as well.
        notes: a paragraph below the table.
    """
    flags = [arg for arg in sys.argv[1:] if arg != "--record"]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *flags])
    machine = f"{processor()}, {describe_threads()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    lines = [
        f"### {title}",
        "",
        f"`{command}`",
        "",
        f"{date.today()}; {commit()}; {machine}; Python {platform.python_version()}, PyTorch "
        f"{torch.__version__}",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        *(["", notes] if notes else []),
    ]
    print("\n".join(lines))
    if record:
        before = RECORDS.read_text(encoding="utf-8").rstrip() if RECORDS.exists() else "# Records"
        write_text(RECORDS, "\n".join([before, "", *lines, ""]))
        print(f"\nAppended to {RECORDS}")
