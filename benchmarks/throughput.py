"""Training throughput: this project's loop against the plain way of writing it, in one run.

The plain way is torchvision's dataset with PIL transforms in a DataLoader, nn.MultiheadAttention
and nn.Dropout, in fp32 and under bf16 autocast; this project's loop runs in both as well. Where
timm and vit-pytorch are installed, their ViT of the same size runs in this project's loop. All
train on MNIST with the same augmentation, batch size and optimizer, in turns, so that a machine
that slows down slows all.
"""

import report  # finds src

import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import optim
import utils
from common import cli
from common.device import choose_device
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.load import load_dataset
from settings import Settings, add_flags
from training.speed import compile_network, keep_freed_memory
from vit_model import TransformerBlock, ViT

DEFAULTS = Settings()
ADAMW = {"lr": DEFAULTS.lr, "weight_decay": DEFAULTS.weight_decay}


class PlainBlock(TransformerBlock):
    """The same block of PyTorch's own parts."""

    def __init__(self) -> None:
        super().__init__(dim=96, num_heads=4, dropout=0.1)
        self.attn = nn.MultiheadAttention(96, 4, dropout=0.1, batch_first=True)
        fc1, gelu, _, fc2, _ = self.mlp
        self.mlp = nn.Sequential(fc1, gelu, nn.Dropout(0.1), fc2, nn.Dropout(0.1))

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
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
    precision: str,
    steps: int,
) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=DEFAULTS.label_smoothing)
    model.train()
    for images, labels in islice(loader, steps):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), DEFAULTS.grad_clip)
        optimizer.step()
        loss.item()  # for the progress bar


def plain_process(
    connection: Connection, data_dir: str, batch_size: int, num_workers: int, device: torch.device
) -> None:
    """Take so many steps in a precision whenever both come in, and answer with the seconds.

    A process of its own, for what this project's loop sets in its process is not the plain way's.
    """
    model = plain_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    loader = plain_loader(data_dir, batch_size, num_workers)
    with suppress(EOFError):  # the other process is gone
        while True:
            parts = model, loader, optimizer, device, *connection.recv()
            connection.send(report.seconds(partial(plain_steps, *parts), device))


def peers() -> dict[str, nn.Module]:
    """Other projects' ViT of the default size, of those that are installed."""
    models = {}
    try:
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "num_heads": 4}
        rates = dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), 0.1)
        models["timm's ViT"] = VisionTransformer(depth=16, num_classes=10, **sizes, **rates)
    except ImportError:
        pass
    try:
        from vit_pytorch import ViT as OtherViT

        sizes = {"image_size": 28, "patch_size": 7, "channels": 1, "dim": 96, "mlp_dim": 384}
        heads = {"heads": 4, "dim_head": 24, "dropout": 0.1, "emb_dropout": 0.1}
        models["vit-pytorch's ViT"] = OtherViT(depth=16, num_classes=10, **sizes, **heads)
    except ImportError:
        pass
    return models


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--steps", default=20, type=cli.integer(1), help="training steps a turn")
    parser.add_argument("--turns", default=5, type=cli.integer(1), help="timed turns of each")
    parser.add_argument("--batch_size", default=128, type=cli.integer(1), help="images a step")
    parser.add_argument(
        "--num_workers", default=0, type=cli.integer(0), help="of the plain way's DataLoader"
    )
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="as train")
    add_flags(parser, ("data_dir", "device"))
    parser.set_defaults(data_dir=NAMED_SETS["mnist"].data_dir)
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    images = args.steps * args.batch_size
    if images > 54_000:
        raise UserError(
            f"--steps x --batch_size are {images} images, MNIST trains on 54,000: lower one"
        )
    keep_freed_memory()
    dataset = load_dataset("mnist", args.data_dir)
    loader = utils.make_loaders(dataset, args.batch_size, device=device, train_samples=images)[0]
    criterion = nn.CrossEntropyLoss(label_smoothing=DEFAULTS.label_smoothing)

    def in_our_loop(model: nn.Module, precision: str) -> Callable[[], float]:
        model = model.to(device).train()
        optimizer = optim.build_optimizer(DEFAULTS.optimizer, model, **ADAMW)
        sample = torch.zeros(args.batch_size, 1, 28, 28, device=device)
        network = compile_network(model, args.compile, sample, precision)
        parts = network, loader, criterion, optimizer
        turn = partial(report.train_epoch, *parts, DEFAULTS.grad_clip, precision=precision)
        return partial(report.seconds, turn, device)

    ours, theirs = Pipe()
    spawn = get_context("spawn")  # CUDA does not survive a fork
    plain_args = (theirs, args.data_dir, args.batch_size, args.num_workers, device)
    plain = spawn.Process(target=plain_process, args=plain_args)
    plain.start()
    theirs.close()  # so that waiting for an answer ends if the process does

    def plain_turn(precision: str) -> float:
        try:
            ours.send((precision, args.steps))
            return ours.recv()
        except (EOFError, OSError):
            raise UserError("the process of the plain way ended, see above") from None

    loops = {}
    for precision in ("fp32", "bf16"):
        loops[f"plain, {precision}"] = partial(plain_turn, precision)
    for precision in ("fp32", "bf16"):
        loops[f"this project, {precision}"] = in_our_loop(ViT(), precision)
    for name, model in peers().items():
        loops[f"{name} in this loop, bf16"] = in_our_loop(model, "bf16")

    for turn in loops.values():
        turn()  # warm-up
    turns = [[turn() for turn in loops.values()] for _ in range(args.turns)]
    ours.close()
    plain.join()
    rows = []
    for name, times in zip(loops, zip(*turns, strict=True), strict=True):
        rate = images / statistics.median(times)
        ratios = [slow / fast for (slow, *_), fast in zip(turns, times, strict=True)]
        rows.append(
            [
                name,
                f"{rate:.0f}",
                f"{1000 * args.batch_size / rate:.0f}",
                f"{54_000 / rate:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        )
    report.publish(
        f"Training throughput, median of {args.turns} turns of {args.steps} steps of "
        f"{args.batch_size} images",
        ["loop", "images/s", "ms per step", "s per epoch of 54,000", "times plain fp32"],
        rows,
        device=device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
