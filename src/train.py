"""Train the Vision Transformer: arguments, data, model, optimizer, loop, checkpoint, report."""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import cli
import figures
from checkpoint import load_checkpoint, save_checkpoint, versions
from cli import UserError
from files import check_writable, uninterrupted, write_json, write_text
from recipes import DATASET_SETTINGS, DEFAULTS
from utils import (
    BatchLoader,
    DataMissingError,
    Dataset,
    evaluate,
    load_dataset,
    make_loaders,
    reset_todo_md,
    update_todo_md,
)
from vit_model import ViT, count_parameters


def parse_args() -> argparse.Namespace:
    """The command line, with the recipe's flags only where they were given."""
    parser = cli.Parser(description=__doc__)

    data = parser.add_argument_group("data")
    cli.add_data_dir(data)
    data.add_argument(
        "--dataset",
        default="auto",
        choices=["auto", *DATASET_SETTINGS],
        help="auto: mnist, or digits where MNIST can neither be found nor downloaded",
    )
    data.add_argument(
        "--train_samples",
        type=cli.integer(1),
        metavar="N",
        help="train on the first N images only, for a quick look; None: on all",
    )
    data.add_argument(
        "--num_workers",
        default=0,
        type=cli.integer(0, 256),
        help="threads that prepare batches ahead; 0: none",
    )

    def add_setting(group: argparse._ArgumentGroup, name: str, type: Any, help: str) -> None:
        # Not stored unless given, so that a data set's own setting can tell; see `settings_for`.
        shown = f"{help} (default: {DEFAULTS[name]})"
        group.add_argument(f"--{name}", type=type, default=argparse.SUPPRESS, help=shown)

    recipe = parser.add_argument_group("recipe (the digits have defaults of their own: recipes.py)")
    add_setting(recipe, "epochs", cli.integer(1, 10**6), "passes over the training images")
    add_setting(recipe, "batch_size", cli.integer(1), "images in a step")
    add_setting(recipe, "lr", cli.number(0, above=True), "AdamW's learning rate at the start")
    add_setting(recipe, "weight_decay", cli.number(0), "AdamW's weight decay")
    add_setting(recipe, "label_smoothing", cli.number(0, 1), "share of a target spread evenly")
    add_setting(recipe, "grad_clip", cli.number(0), "largest global gradient norm; 0: off")
    recipe.add_argument(
        "--seed", default=42, type=cli.integer(0), help="of weights, order, augmentation, dropout"
    )

    model = parser.add_argument_group("model")
    add_setting(model, "patch_size", cli.integer(1), "side of a patch in pixels; divides 28")
    add_setting(model, "embed_dim", cli.integer(1, 10**5), "width of a token")
    add_setting(model, "depth", cli.integer(1, 10**4), "transformer blocks")
    add_setting(model, "num_heads", cli.integer(1), "attention heads; divide embed_dim")
    add_setting(model, "mlp_ratio", cli.number(0, 1000, above=True), "MLP width over token width")
    add_setting(model, "dropout", cli.number(0, 1), "share of values dropped in training")

    machine = parser.add_argument_group("machine")
    cli.add_device(machine)
    machine.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of training's matrix products; auto: bf16 where the hardware has it",
    )

    written = parser.add_argument_group("what is written")
    written.add_argument("--save_dir", default="./checkpoints", type=Path, help="model, history")
    written.add_argument("--output_dir", default="./outputs", type=Path, help="pictures")
    written.add_argument("--todo_path", default="./TODO.md", type=Path, help="progress table")
    return parser.parse_args()


def choose_dataset(name: str, data_dir: str) -> Dataset:
    """The data set asked for; for "auto" MNIST or, where it is not to be had, the digits."""
    if name != "auto":
        return load_dataset(name, data_dir)
    try:
        return load_dataset("mnist", data_dir)
    except DataMissingError as error:
        rule = "!" * 80
        warning = "WARNING: training on scikit-learn's 8x8 digits, NOT on MNIST"
        print(f"{rule}\n{warning}\n{error}\n{rule}", file=sys.stderr)
        return load_dataset("digits")


def settings_for(dataset: str, args: argparse.Namespace) -> dict[str, Any]:
    """The run's recipe: the published one, what the data set asks for, what was given by hand.

    Raises:
        UserError: the settings don't fit together.
    """
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    settings = {**DEFAULTS, **DATASET_SETTINGS[dataset], **given}
    if 28 % settings["patch_size"] != 0:
        raise UserError(
            f"--patch_size {settings['patch_size']} does not divide the image's side of 28: "
            "give 1, 2, 4, 7, 14 or 28"
        )
    if round(settings["embed_dim"] * settings["mlp_ratio"]) < 1:
        raise UserError(f"--mlp_ratio {settings['mlp_ratio']} leaves the MLP no neuron: raise it")
    if settings["embed_dim"] % settings["num_heads"] != 0:
        raise UserError(
            f"--embed_dim {settings['embed_dim']} is not divisible by "
            f"--num_heads {settings['num_heads']}: change one of them"
        )
    return settings


def train_one_epoch(
    model: nn.Module,
    loader: BatchLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    *,
    grad_clip: float,
    precision: str,
    description: str,
) -> tuple[float, float]:
    """One pass over the training images. Returns the mean loss and top-1 % over them."""
    model.train()
    device = loader.split.images.device
    total_loss = torch.zeros((), device=device)
    total_hits = torch.zeros((), device=device)
    bar = tqdm(loader, desc=description, unit="batch", leave=False, disable=None)
    for step, (images, labels) in enumerate(bar):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss = criterion(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        if grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()

        # Summed on the device: Python waits for a GPU only where the bar wants a number.
        total_loss += loss.detach() * len(labels)
        total_hits += (logits.argmax(dim=1) == labels).sum()
        if not bar.disable and step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return total_loss.item() / len(loader.split), 100.0 * total_hits.item() / len(loader.split)


def main() -> None:
    # ------------------------------------------------------------------------------- arguments
    args = parse_args()
    device = cli.choose_device(args.device)
    precision = cli.choose_precision(args.precision, device)
    best_path = args.save_dir / "best_model.pt"
    history_path = args.save_dir / "history.json"
    timing_path = args.save_dir / f"timing_{device.type}.txt"
    curves_path = args.output_dir / "training_curves.png"
    for path in (best_path, history_path, timing_path, curves_path, args.todo_path):
        check_writable(path)

    # ------------------------------------------------------------------------------------ data
    settings_for("mnist" if args.dataset == "auto" else args.dataset, args)  # before a download
    dataset = choose_dataset(args.dataset, args.data_dir)
    settings = settings_for(dataset.name, args)
    train_loader, val_loader, test_loader = make_loaders(
        dataset,
        settings["batch_size"],
        args.num_workers,
        device=device,
        seed=args.seed,
        train_samples=args.train_samples,
    )

    # ----------------------------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    model_config = {
        "img_size": 28,
        "in_chans": 1,
        "num_classes": len(dataset.class_names),
        **{
            name: settings[name]
            for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "dropout")
        },
    }
    model = ViT(**model_config).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=settings["label_smoothing"])

    # ------------------------------------------------------------------------------- optimizer
    optimizer = AdamW(
        model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"], fused=True
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=settings["epochs"])

    sizes = [f"{len(loader.split):,}" for loader in (train_loader, val_loader, test_loader)]
    print(f"data:     {dataset.name}, {' / '.join(sizes)} images to train, validate, test")
    print(f"model:    ViT, {count_parameters(model):,} parameters")
    print(f"device:   {cli.describe_device(device)}, {precision}, seed {args.seed}")
    print(f"settings: {', '.join(f'{name} {value}' for name, value in settings.items())}")

    # ------------------------------------------------------------------------------------ loop
    history = {
        "dataset": dataset.name,
        "settings": {**settings, "seed": args.seed, "train_samples": args.train_samples},
        "device": cli.describe_device(device),
        "precision": precision,
        "parameters": count_parameters(model),
        "versions": versions(),
        "epochs": [],
        "test": None,
    }
    best_acc, best_epoch = -1.0, 0
    with uninterrupted():
        write_json(history_path, history)
        reset_todo_md(settings["epochs"], args.todo_path, dataset.name)
    try:
        for epoch in range(1, settings["epochs"] + 1):
            start = time.perf_counter()
            lr = scheduler.get_last_lr()[0]
            train_loss, train_acc = train_one_epoch(
                model,
                train_loader,
                criterion,
                optimizer,
                grad_clip=settings["grad_clip"],
                precision=precision,
                description=f"epoch {epoch}/{settings['epochs']}",
            )
            train_seconds = time.perf_counter() - start
            if not math.isfinite(train_loss):
                raise UserError(
                    f"the loss became {train_loss} in epoch {epoch}: lower --lr {settings['lr']} "
                    f"or --grad_clip {settings['grad_clip']}; the best model so far is kept"
                )
            val_loss, val_acc, val_top5 = evaluate(model, val_loader, criterion, device)
            scheduler.step()
            seconds = time.perf_counter() - start

            # ---------------------------------------------------------------------- checkpoint
            is_best = val_acc > best_acc
            with uninterrupted():
                history["epochs"].append(
                    {
                        "epoch": epoch,
                        "train_loss": train_loss,
                        "train_acc": train_acc,
                        "val_loss": val_loss,
                        "val_acc": val_acc,
                        "val_top5": val_top5,
                        "lr": lr,
                        "seconds": seconds,
                        "images_per_second": len(train_loader.split) / train_seconds,
                    }
                )
                if is_best:
                    best_acc, best_epoch = val_acc, epoch
                    save_checkpoint(
                        best_path,
                        {
                            "epoch": epoch,
                            "model_state_dict": model.state_dict(),
                            "optimizer_state_dict": optimizer.state_dict(),
                            "best_acc": best_acc,
                            "model_config": model_config,
                            "normalization": {"mean": dataset.mean, "std": dataset.std},
                            "dataset": dataset.name,
                            "class_names": list(dataset.class_names),
                            "settings": history["settings"],
                            "versions": history["versions"],
                        },
                    )
                write_json(history_path, history)
                update_todo_md(epoch, train_loss, val_acc, is_best, args.todo_path)
            print(
                f"Epoch {epoch:2d}/{settings['epochs']}  "
                f"Train Loss: {train_loss:.4f}  Acc: {train_acc:.2f} %  |  "
                f"Val Loss: {val_loss:.4f}  Acc: {val_acc:.2f} %  Top-5: {val_top5:.2f} %  |  "
                f"lr {lr:.1e}  {seconds:.1f} s"
            )
            if is_best:
                print(f"          best so far, saved to {best_path}")
    except KeyboardInterrupt:
        kept = f"best model (epoch {best_epoch}) in {best_path}"
        if not best_epoch:
            kept = "no model of this run yet"
            kept += f", {best_path} is an earlier run's" if best_path.exists() else ""
        raise KeyboardInterrupt(
            f"interrupted after {len(history['epochs'])} of {settings['epochs']} epochs: {kept}, "
            f"history in {history_path}"
        ) from None

    # ---------------------------------------------------------------------------------- report
    best_model, _ = load_checkpoint(best_path)
    test_loss, test_acc, test_top5 = evaluate(best_model.to(device), test_loader, criterion, device)
    history["test"] = {
        "loss": test_loss,
        "top1": test_acc,
        "top5": test_top5,
        "best_val_acc": best_acc,
        "best_epoch": best_epoch,
    }
    total_seconds = sum(row["seconds"] for row in history["epochs"])
    timing = {
        "device": cli.describe_device(device),
        "epochs": settings["epochs"],
        "batch_size": settings["batch_size"],
        "total_train_time": f"{total_seconds:.2f}",
        "avg_time_per_epoch": f"{total_seconds / settings['epochs']:.2f}",
        "best_val_acc": f"{best_acc:.2f}",
        "test_acc": f"{test_acc:.2f}",
        "dataset": dataset.name,
    }
    with uninterrupted():
        write_json(history_path, history)
        write_text(timing_path, "".join(f"{key}: {value}\n" for key, value in timing.items()))
        figures.save(figures.training_curves(history), curves_path)
    cli.print_test_result(dataset.name, test_loss, test_acc, test_top5)
    print(f"Best Val Acc: {best_acc:.2f} % @ Epoch {best_epoch}")
    print(
        f"Time: {total_seconds:.1f} s in all, {total_seconds / settings['epochs']:.1f} s an epoch, "
        f"{settings['epochs'] * len(train_loader.split) / total_seconds:.0f} images/s"
    )
    print(f"Written: {best_path}, {history_path}, {timing_path}, {curves_path}, {args.todo_path}")


if __name__ == "__main__":
    cli.run(main)
