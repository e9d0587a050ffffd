"""A training step alone and beside one busy process, by how threads wait for each other.

PyTorch's Linux wheels bring libgomp, whose threads spin while they wait. Where one of them waits
for a core, the others spin in vain. GOMP_SPINCOUNT says how long. Every setting has a process of
its own in each turn, since libgomp reads it once, when PyTorch is imported.
"""

import report  # finds src

import json
import os
import statistics
import subprocess
import sys
from functools import partial

import torch
from torch import nn

import optim
from common import cli
from common.device import choose_device, choose_precision
from common.errors import UserError
from settings import Settings, add_flags
from training.speed import keep_freed_memory
from utils import Batch
from vit_model import ViT

SETTINGS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},  # which src/common/startup.py replaces
    "GOMP_SPINCOUNT=500": {"GOMP_SPINCOUNT": "500"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=1500": {"GOMP_SPINCOUNT": "1500"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def steps(number: int) -> list[float]:
    """Seconds of each of so many steps of the default network, after three for warm-up."""
    keep_freed_memory()
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    model = ViT().train()
    optimizer = optim.build_optimizer("AdamW", model, lr=1e-3, weight_decay=1e-4)
    images = torch.randn(Settings().batch_size, 1, 28, 28)
    labels = torch.randint(10, (len(images),))
    batch = Batch(images, labels, labels, len(images))
    parts = model, nn.CrossEntropyLoss(), optimizer, batch, Settings().grad_clip
    step = partial(report.train_step, *parts, precision=precision)
    return [report.seconds(step, device) for _ in range(number + 3)][3:]


def in_a_process(variables: dict[str, str], number: int) -> list[float]:
    """`steps` in a new process with these environment variables and none of the others here."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, __file__, "--one", str(number), "--device", "cpu"]
    printed = subprocess.check_output(command, env=kept | variables, text=True)
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--steps", default=15, type=cli.integer(1), help="in each process")
    parser.add_argument("--turns", default=3, type=cli.integer(1), help="processes of each setting")
    parser.add_argument("--one", type=cli.integer(1), help="print the seconds of so many steps")
    report.add_record(parser)
    add_flags(parser, ("device",))
    args = parser.parse_args()
    if args.device != "auto" and choose_device(args.device).type != "cpu":
        raise UserError(f"--device {args.device}: this is about the threads of a CPU")
    if args.one and args.record:
        raise UserError("--one prints seconds, and no table for --record to keep: give one of them")
    if args.one:
        print(json.dumps(steps(args.one)))
        return
    quiet = {name: [] for name in SETTINGS}
    busy = {name: [] for name in SETTINGS}
    for _ in range(args.turns):
        for name, variables in SETTINGS.items():
            quiet[name] += in_a_process(variables, args.steps)
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
                try:
                    busy[name] += in_a_process(variables, args.steps)
                finally:
                    other.kill()
    rows = [
        [
            name,
            f"{1000 * statistics.median(quiet[name]):.0f} ms",
            f"{1000 * statistics.median(busy[name]):.0f} ms",
            f"{1000 * statistics.mean(busy[name]):.0f} ms",
            f"{1000 * max(busy[name]):.0f} ms",
        ]
        for name in SETTINGS
    ]
    report.publish(
        f"A step of the default network, {args.turns} turns of {args.steps} steps, alone and "
        "beside one busy process",
        ["threads", "alone, median", "beside, median", "beside, mean", "beside, longest"],
        rows,
        device=torch.device("cpu"),
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
