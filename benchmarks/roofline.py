"""How much of the machine training uses: the model's FLOPs per second over the measured peak.

The peak is the best rate of a large square matrix product, in fp32 and bf16. The model's FLOPs are
counted by PyTorch on one forward pass and taken three times, for the backward pass has two products
for each one forward; elementwise work counts as nothing.
"""

import report  # finds src

import statistics
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import optim
from common import cli
from common.device import choose_device
from recipes import RECIPES
from settings import Settings, add_flags, section_of
from training.speed import compile_network, keep_freed_memory
from utils import Batch
from vit_model import ViT


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--recipe", default="article", choices=RECIPES, help="of src/recipes.py")
    parser.add_argument("--turns", default=20, type=cli.integer(1), help="timed training steps")
    add_flags(parser, ("device", "compile"))
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    keep_freed_memory()
    settings = Settings(**RECIPES[args.recipe])
    torch.manual_seed(0)
    images = torch.randn(settings.batch_size, 1, 28, 28, device=device)
    labels = torch.randint(10, (settings.batch_size,), device=device)
    batch = Batch(images, labels, labels, len(images))
    criterion = nn.CrossEntropyLoss()
    peaks = {
        "fp32": report.matmul_peak(torch.float32, device),
        "bf16": report.matmul_peak(torch.bfloat16, device),
    }
    rows = []
    for precision, peak in peaks.items():
        model = ViT(**section_of(settings, "model")).to(device)
        optimizer = optim.build_optimizer(
            settings.optimizer, model, lr=settings.lr, weight_decay=settings.weight_decay
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        network = compile_network(model, args.compile, images, precision)

        parts = network, criterion, optimizer, batch, settings.grad_clip
        step = partial(report.train_step, *parts, precision=precision)

        flops = 3 * counter.get_total_flops()
        turns = [report.seconds(step, device) for _ in range(args.turns + 3)]
        time_of_step = statistics.median(turns[3:])  # after three for warm-up
        rows.append(
            [
                precision,
                f"{flops / 1e9:.1f}",
                f"{1000 * time_of_step:.1f} ms",
                f"{flops / time_of_step / 1e9:.0f}",
                f"{peak / 1e9:.0f}",
                f"{100 * flops / time_of_step / peak:.0f} %",
            ]
        )
    report.publish(
        f"Roofline of a training step of `{args.recipe}`, batch {settings.batch_size}",
        ["precision", "GFLOP a step", "step", "GFLOP/s", "matmul peak, GFLOP/s", "used"],
        rows,
        device=device,
        record=args.record,
        notes=f"Median of {args.turns} steps without the loader.",
    )


if __name__ == "__main__":
    cli.run(main)
