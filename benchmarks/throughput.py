"""Training throughput: this project's loop against the plain way of writing it, in one run.

The plain way is that of plain.py, in fp32 and under bf16 autocast; this project's loop runs in both
as well. Where timm and vit-pytorch are installed, their ViT of the same size runs in this project's
loop. All train on MNIST with the same augmentation, batch size and optimizer, in turns, so that a
machine that slows down slows all.
"""

import report  # finds src

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import optim
import utils
from common import cli
from common.device import choose_device
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.load import load_dataset
from plain import ADAMW, PlainWay
from settings import Settings, add_flags
from training.speed import compile_network, keep_freed_memory
from vit_model import ViT

DEFAULTS = Settings()


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
    add_flags(parser, ("data_dir", "device", "compile"))
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

    plain, loops = PlainWay(args.data_dir, device, args.batch_size, args.num_workers), {}
    for precision in ("fp32", "bf16"):
        loops[f"plain, {precision}"] = partial(plain.seconds, precision, args.steps)
    for precision in ("fp32", "bf16"):
        loops[f"this project, {precision}"] = in_our_loop(ViT(), precision)
    for name, model in peers().items():
        loops[f"{name} in this loop, bf16"] = in_our_loop(model, "bf16")

    for turn in loops.values():
        turn()  # warm-up
    turns = [[turn() for turn in loops.values()] for _ in range(args.turns)]
    plain.close()
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
