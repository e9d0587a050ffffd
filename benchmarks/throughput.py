"""Training throughput: this project's loop against the plain way of writing it, in one run.

The plain way is torchvision's dataset with PIL transforms in a DataLoader, nn.MultiheadAttention,
nn.Dropout and fp32. Both train the default network on MNIST with the same augmentation, batch size
and optimizer, in turns, so that a machine that slows down slows both.
"""

import platform
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import cli
import optim
import utils
from recipes import DEFAULTS
from train import train_one_epoch
from vit_model import TransformerBlock, ViT


class PlainBlock(TransformerBlock):
    """The same block of PyTorch's own parts."""

    def __init__(self) -> None:
        super().__init__(dim=96, num_heads=4, dropout=0.1)
        self.attn = nn.MultiheadAttention(96, 4, dropout=0.1, batch_first=True)
        self.mlp[2], self.mlp[4] = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def plain_model() -> ViT:
    model = ViT()
    model.pos_drop = nn.Dropout(0.1)
    model.blocks = nn.ModuleList(PlainBlock() for _ in range(16))
    return model


def plain_loader(data_dir: str, batch_size: int, num_workers: int) -> DataLoader:
    transform = transforms.Compose(
        [
            transforms.RandomAffine(degrees=7, translate=(0.1, 0.1)),
            transforms.ToTensor(),
            transforms.Normalize((0.1307,), (0.3081,)),
        ]
    )
    # download=True unpacks files that are there, and fetches nothing then.
    dataset = datasets.MNIST(data_dir, train=True, transform=transform, download=True)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=num_workers)


def plain_steps(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    steps: int,
) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=DEFAULTS["label_smoothing"])
    model.train()
    for images, labels in islice(loader, steps):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), DEFAULTS["grad_clip"])
        optimizer.step()
        loss.item()  # for the progress bar


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--steps", default=20, type=cli.integer(1), help="training steps a turn")
    parser.add_argument("--turns", default=5, type=cli.integer(1), help="timed turns of each")
    parser.add_argument("--batch_size", default=128, type=cli.integer(1), help="images a step")
    parser.add_argument(
        "--num_workers", default=0, type=cli.integer(0), help="of the plain way's DataLoader"
    )
    cli.add_data_dir(parser)
    cli.add_device(parser)
    args = parser.parse_args()
    device = cli.choose_device(args.device)
    precision = cli.choose_precision("auto", device)
    images = args.steps * args.batch_size

    if images > 54_000:
        raise cli.UserError(f"--steps x --batch_size are {images} images, MNIST trains on 54,000")
    dataset = utils.load_mnist(args.data_dir)
    settings = {"lr": DEFAULTS["lr"], "weight_decay": DEFAULTS["weight_decay"]}
    model, plain = ViT().to(device), plain_model().to(device)
    ours_optimizer = optim.build_optimizer(DEFAULTS["optimizer"], model, **settings)
    schedule = optim.build_scheduler(
        "ConstantLR(factor=1)", ours_optimizer, epochs=args.turns + 1, steps_per_epoch=args.steps
    )
    averaged = optim.WeightAverage(model)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), **settings)
    loader = utils.make_loaders(dataset, args.batch_size, device=device, train_samples=images)[0]
    slow_loader = plain_loader(args.data_dir, args.batch_size, args.num_workers)
    criterion = nn.CrossEntropyLoss(label_smoothing=DEFAULTS["label_smoothing"])

    def ours() -> None:
        train_one_epoch(
            model,
            loader,
            criterion,
            ours_optimizer,
            schedule,
            averaged,
            grad_clip=DEFAULTS["grad_clip"],
            precision=precision,
            description="",
        )

    def theirs() -> None:
        plain_steps(plain, slow_loader, plain_optimizer, device, args.steps)

    def seconds(turn) -> float:
        start = time.perf_counter()
        turn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(theirs), seconds(ours)  # warm-up
    times = [(seconds(theirs), seconds(ours)) for _ in range(args.turns)]
    plain_rate, our_rate = (
        images / statistics.median(column) for column in zip(*times, strict=True)
    )
    ratios = [slow / fast for slow, fast in times]
    print(f"{cli.describe_device(device)}, Python {platform.python_version()}, ", end="")
    print(
        f"PyTorch {torch.__version__}; `python benchmarks/throughput.py {' '.join(sys.argv[1:])}`"
    )
    print(f"\nMedian of {args.turns} turns of {args.steps} steps of {args.batch_size} images:\n")
    print("| loop | images/s | ms per step | s per epoch of 54,000 |\n|---|---|---|---|")
    for name, rate in (("plain, fp32", plain_rate), (f"this project, {precision}", our_rate)):
        step = 1000 * args.batch_size / rate
        print(f"| {name} | {rate:.0f} | {step:.0f} | {54_000 / rate:.1f} |")
    print(f"\nratio: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    cli.run(main)
