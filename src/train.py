"""Train the Vision Transformer: arguments, data, model, optimizer, loop, checkpoint, report."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import cli
import figures
import optim
from augment import Augment
from checkpoint import load_checkpoint, save_checkpoint, versions
from cli import UserError
from files import check_writable, uninterrupted, write_json, write_text
from recipes import DATASET_SETTINGS, DEFAULTS, RECIPES
from speed import compile_network, keep_memory
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

MODEL_SETTINGS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "dropout")
MODEL_SETTINGS += ("pool", "pos_embed")
# Settings that the printed calls of optimizer and schedule have in them.
SHOWN_AS_CALLS = {"optimizer", "lr", "weight_decay", "scheduler", "scheduler_interval"}
SHOWN_AS_CALLS |= {"warmup_epochs", "swa_lr", "swa_anneal_epochs", "swa_anneal_strategy"}


def parse_args() -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and what of the recipe it names: that wins over a data set's settings."""
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
        group.add_argument(f"--{name}", type=type, default=DEFAULTS[name], help=help)

    def add_choice(group: argparse._ArgumentGroup, name: str, choices: Any, help: str) -> None:
        group.add_argument(f"--{name}", choices=choices, default=DEFAULTS[name], help=help)

    recipe = parser.add_argument_group("recipe (the defaults of all flags below are the article's)")
    recipe.add_argument(
        "--recipe",
        default="article",
        choices=RECIPES,
        help="flags by name, from recipes.py: article, the published ones; fast, the least time to "
        "99 %%; best, the highest accuracy in 20 minutes; flags given beside it win",
    )
    add_setting(recipe, "epochs", cli.integer(1, 10**6), "passes over the training images")
    add_setting(recipe, "batch_size", cli.integer(1), "images in a step")
    add_setting(recipe, "label_smoothing", cli.number(0, 1), "share of a target spread evenly")
    recipe.add_argument(
        "--seed", default=42, type=cli.integer(0), help="of weights, order, augmentation, dropout"
    )
    optim.add_arguments(parser)

    model = parser.add_argument_group("model")
    add_setting(model, "patch_size", cli.integer(1), "side of a patch in pixels; divides 28")
    add_setting(model, "embed_dim", cli.integer(1, 10**5), "width of a token")
    add_setting(model, "depth", cli.integer(1, 10**4), "transformer blocks")
    add_setting(model, "num_heads", cli.integer(1), "attention heads; divide embed_dim")
    add_setting(model, "mlp_ratio", cli.number(0, 1000, above=True), "MLP width over token width")
    add_setting(model, "dropout", cli.number(0, 1), "share of values dropped in training")
    add_choice(model, "pool", ("cls", "mean"), "what the head reads: CLS, or the tokens' mean")
    add_choice(model, "pos_embed", ("learned", "sincos2d"), "position embeddings")

    augment = parser.add_argument_group("augmentation (strengths; 0: off)")
    add_setting(augment, "rotate", cli.number(0, 181), "degrees, at most, to either side")
    add_setting(augment, "translate", cli.number(0, 1), "shift, at most, in image sides")
    add_setting(augment, "scale", cli.number(0, 1), "the size varies by this share, up and down")
    add_setting(augment, "shear", cli.number(0, 90), "slant in degrees, at most, to either side")
    add_setting(augment, "elastic", cli.number(0, 28), "bending: std of the shifts in pixels")
    add_setting(augment, "erase", cli.number(0, 1), "share of images that lose a rectangle")

    machine = parser.add_argument_group("machine")
    cli.add_device(machine)
    machine.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of training's matrix products; auto: bf16 where the hardware has it",
    )
    machine.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="the network by torch.compile; auto: on CUDA",
    )

    written = parser.add_argument_group("what is written")
    written.add_argument("--save_dir", default="./checkpoints", type=Path, help="model, history")
    written.add_argument("--output_dir", default="./outputs", type=Path, help="pictures")
    written.add_argument("--todo_path", default="./TODO.md", type=Path, help="progress table")
    args, given = parser.parse_args(), parser.given()
    return args, {name: value for name, value in given.items() if name in DEFAULTS}


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


def settings_for(recipe: str, dataset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The run's settings: the defaults, what replaces them in the recipe, what the data set asks
    for, what was given by hand.

    Raises:
        UserError: the settings don't fit together.
    """
    settings = {**DEFAULTS, **RECIPES[recipe], **DATASET_SETTINGS[dataset], **given}
    if 28 % settings["patch_size"] != 0:
        raise UserError(
            f"--patch_size {settings['patch_size']} does not divide the image's side of 28: "
            "give 1, 2, 4, 7, 14 or 28"
        )
    if round(settings["embed_dim"] * settings["mlp_ratio"]) < 1:
        raise UserError(f"--mlp_ratio {settings['mlp_ratio']} leaves the MLP no neuron: raise it")
    if settings["pos_embed"] == "sincos2d" and settings["embed_dim"] % 4 != 0:
        raise UserError(
            f"--embed_dim {settings['embed_dim']} is not divisible by 4, as --pos_embed sincos2d "
            "wants it: change one of them"
        )
    if settings["embed_dim"] % settings["num_heads"] != 0:
        raise UserError(
            f"--embed_dim {settings['embed_dim']} is not divisible by "
            f"--num_heads {settings['num_heads']}: change one of them"
        )
    return settings


def train_one_epoch(
    network: Callable[[Tensor], Tensor],
    loader: BatchLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    schedule: optim.Schedule,
    averaged: optim.WeightAverage,
    *,
    grad_clip: float,
    precision: str,
    description: str,
) -> dict[str, Any]:
    """One pass over the training images.

    Args:
        network: the model, in training mode, or what `compile_network` made of it.

    Returns:
        Means over the images, `train_loss` and `train_acc` (top-1 %), and over the steps,
        `grad_norm` (before clipping) and `lr` (by parameter group): a part of history.json's row.
    """
    device = loader.split.images.device
    total_loss = torch.zeros((), device=device)
    total_hits = torch.zeros((), device=device)
    total_norm = torch.zeros((), device=device)
    total_lrs = [0.0] * len(optimizer.param_groups)

    def forward_backward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        loss = criterion(logits.float(), labels)
        loss.backward()
        return loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()

    bar = tqdm(loader, desc=description, unit="batch", leave=False, disable=None)
    for step, (images, labels) in enumerate(bar):
        for i, group in enumerate(optimizer.param_groups):
            total_lrs[i] += group["lr"]
        loss, hits = forward_backward(images, labels)
        if optim.needs_closure(optimizer):
            # LBFGS makes passes of its own beside this one, on gradients as they are.
            grad_norm = optim.clip_gradients(optimizer, 0.0)
            optimizer.step(partial(lambda x, y: forward_backward(x, y)[0], images, labels))
        else:
            grad_norm = optim.clip_gradients(optimizer, grad_clip)
            optimizer.step()
        schedule.step_batch()
        averaged.step_batch()

        # Summed on the device: Python waits for a GPU only where the bar wants a number.
        total_loss += loss * len(labels)
        total_hits += hits
        total_norm += grad_norm
        if not bar.disable and step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    names = [group.get("name", "all parameters") for group in optimizer.param_groups]
    return {
        "train_loss": total_loss.item() / len(loader.split),
        "train_acc": 100.0 * total_hits.item() / len(loader.split),
        "grad_norm": total_norm.item() / len(loader),
        "lr": {name: lr / len(loader) for name, lr in zip(names, total_lrs, strict=True)},
    }


def main() -> None:
    # ------------------------------------------------------------------------------- arguments
    args, given = parse_args()
    device = cli.choose_device(args.device)
    precision = cli.choose_precision(args.precision, device)
    keep_memory()
    best_path = args.save_dir / "best_model.pt"
    history_path = args.save_dir / "history.json"
    timing_path = args.save_dir / f"timing_{device.type}.txt"
    curves_path = args.output_dir / "training_curves.png"
    for path in (best_path, history_path, timing_path, curves_path, args.todo_path):
        check_writable(path)

    # ------------------------------------------------------------------------------------ data
    likely = "mnist" if args.dataset == "auto" else args.dataset
    settings_for(args.recipe, likely, given)  # refuses before a download what would fail after it
    dataset = choose_dataset(args.dataset, args.data_dir)
    settings = settings_for(args.recipe, dataset.name, given)
    train_loader, val_loader, test_loader = make_loaders(
        dataset,
        settings["batch_size"],
        args.num_workers,
        device=device,
        seed=args.seed,
        train_samples=args.train_samples,
        augment=Augment(**{field.name: settings[field.name] for field in fields(Augment)}),
    )

    # ----------------------------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    model_config = {
        "img_size": 28,
        "in_chans": 1,
        "num_classes": len(dataset.class_names),
        **{name: settings[name] for name in MODEL_SETTINGS},
    }
    model = ViT(**model_config).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=settings["label_smoothing"])

    # ------------------------------------------------------------------------------- optimizer
    optimizer = optim.build_optimizer(
        settings["optimizer"],
        model,
        **{name: settings[name] for name in ("lr", "weight_decay", "head_lr", "no_decay")},
    )
    # A rate or decay in the call itself wins over the flags': keep what is really used.
    first_group = optimizer.param_groups[0]
    settings["lr"], settings["weight_decay"] = first_group["lr"], first_group.get("weight_decay")
    schedule = optim.build_scheduler(
        settings["scheduler"],
        optimizer,
        epochs=settings["epochs"],
        steps_per_epoch=len(train_loader),
        interval=settings["scheduler_interval"],
        warmup_epochs=settings["warmup_epochs"],
        swa_start=settings["swa_start"],
        swa_lr=settings["swa_lr"],
        swa_anneal_epochs=settings["swa_anneal_epochs"],
        swa_anneal_strategy=settings["swa_anneal_strategy"],
    )
    averaged = optim.WeightAverage(
        model, ema_decay=settings["ema_decay"], swa_start=settings["swa_start"]
    )

    sizes = [f"{len(loader.split):,}" for loader in (train_loader, val_loader, test_loader)]
    print(f"data:     {dataset.name}, {' / '.join(sizes)} images to train, validate, test")
    print(f"model:    ViT, {count_parameters(model):,} parameters")
    print(f"device:   {cli.describe_device(device)}, {precision}, seed {args.seed}")
    shown = {n: v for n, v in settings.items() if v is not None and n not in SHOWN_AS_CALLS}
    print(f"recipe:   {args.recipe}: {', '.join(f'{n} {v}' for n, v in shown.items())}")
    print(f"steps:    {optimizer.text}; {schedule}")

    batch_size = min(settings["batch_size"], len(train_loader.split))
    sample = torch.zeros(batch_size, 1, 28, 28, device=device)
    network = compile_network(model, args.compile, sample, precision)

    # ------------------------------------------------------------------------------------ loop
    history = {
        "dataset": dataset.name,
        "settings": {
            "recipe": args.recipe,
            **settings,
            "optimizer": optimizer.text,
            "scheduler": schedule.text,
            "scheduler_interval": schedule.interval,
            "seed": args.seed,
            "train_samples": args.train_samples,
        },
        "device": cli.describe_device(device),
        "precision": precision,
        "parameters": count_parameters(model),
        "versions": versions(),
        "epochs": [],
        "test": None,
    }
    about = {  # what it takes, beside the weights, to use the model
        "model_config": model_config,
        "normalization": {"mean": dataset.mean, "std": dataset.std},
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "settings": history["settings"],
        "versions": history["versions"],
    }
    best_acc, best_epoch = -1.0, 0
    try:
        for epoch in range(1, settings["epochs"] + 1):
            start = time.perf_counter()
            model.train()
            row = train_one_epoch(
                network,
                train_loader,
                criterion,
                optimizer,
                schedule,
                averaged,
                grad_clip=settings["grad_clip"],
                precision=precision,
                description=f"epoch {epoch}/{settings['epochs']}",
            )
            train_seconds = time.perf_counter() - start
            averaged.step_epoch(epoch, train_loader, device)
            val_loss, val_acc, val_top5 = evaluate(averaged.module, val_loader, criterion, device)
            if not all(map(math.isfinite, (row["train_loss"], row["grad_norm"], val_loss))):
                raise UserError(
                    f"loss or gradient is no longer finite in epoch {epoch}: lower the "
                    "learning rate or --grad_clip; the best model so far is kept"
                )
            schedule.step_epoch(val_loss)
            seconds = time.perf_counter() - start

            # ---------------------------------------------------------------------- checkpoint
            if epoch == settings["swa_start"]:
                best_acc = -1.0  # from here on it is the average that is to be the best
            is_best = val_acc > best_acc
            with uninterrupted():
                history["epochs"].append(
                    {
                        "epoch": epoch,
                        **row,
                        "val_loss": val_loss,
                        "val_acc": val_acc,
                        "val_top5": val_top5,
                        "seconds": seconds,
                        "images_per_second": len(train_loader.split) / train_seconds,
                    }
                )
                if is_best:
                    best_acc, best_epoch = val_acc, epoch
                    state = {
                        "epoch": epoch,
                        "model_state_dict": averaged.module.state_dict(),
                        "optimizer_state_dict": optimizer.state_dict(),
                        "scheduler_state_dict": schedule.state_dict(),
                        "best_acc": best_acc,
                    }
                    if averaged.active:
                        state["raw_model_state_dict"] = model.state_dict()
                    save_checkpoint(best_path, {**state, **about})
                write_json(history_path, history)
                if epoch == 1:  # not before: until then the files are an earlier run's, and agree
                    reset_todo_md(settings["epochs"], args.todo_path, dataset.name)
                update_todo_md(epoch, row["train_loss"], val_acc, is_best, args.todo_path)
            print(
                f"Epoch {epoch:2d}/{settings['epochs']}  "
                f"Train Loss: {row['train_loss']:.4f}  Acc: {row['train_acc']:.2f} %  |  "
                f"Val Loss: {val_loss:.4f}  Acc: {val_acc:.2f} %  Top-5: {val_top5:.2f} %  |  "
                f"lr {next(iter(row['lr'].values())):.1e}  {seconds:.1f} s"
            )
            if is_best:
                print(f"          best so far, saved to {best_path}")
    except KeyboardInterrupt:
        kept = f"best model (epoch {best_epoch}) in {best_path}, history in {history_path}"
        raise KeyboardInterrupt(
            f"interrupted after {len(history['epochs'])} of {settings['epochs']} epochs: "
            + (kept if best_epoch else "nothing written, an earlier run's files are as they were")
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
