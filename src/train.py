"""Train the Vision Transformer: arguments, data, model, optimizer, loop, checkpoint, report.

This is the recipe, top to bottom. What keeps a run safe, its files, stops, other processes and bad
numbers, is in training/run.py; the flags, with their defaults, are in recipes.py.
"""

import common.startup  # noqa: F401 before PyTorch

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from common import cli
from recipes import Options, Settings, parse_args, resolve

if __name__ == "__main__":
    cli.check_flags(parse_args)  # before PyTorch is imported, which takes seconds

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.device import choose_device, choose_precision
from common.distributed import SINGLE_PROCESS, World, device_of, find_world
from common.errors import UserError
from data.augment import Augment
from data.dataset import Dataset
from data.load import load_on_all
from optim import build_optimizer, check_calls, clip_gradients, needs_closure
from optimizers.average import WeightAverage
from optimizers.schedule import Schedule, build_scheduler
from training.resume import SavedRun, seed_generators
from training.run import Run, open_run
from training.speed import keep_memory, prepare
from utils import Batch, evaluate, make_loaders
from vit_model import ViT


def main() -> None:
    options, given = parse_args()
    world = find_world()
    device = device_of(world, choose_device(options.device))
    keep_memory()
    with open_run(options, given, world, device) as (options, saved):
        settings, dataset = load_data(options, given, saved, world)
        train(options, settings, dataset, saved, device, world)


def load_data(
    options: Options, given: Mapping[str, Any], saved: SavedRun | None, world: World
) -> tuple[Settings, Dataset]:
    """The data set, and the run's settings on it; what is wrong is refused before a download."""
    if saved:
        return saved.settings, load_on_all(saved.dataset, options.data_dir, world)
    likely = "mnist" if options.dataset == "auto" else options.dataset
    settings = resolve(options.recipe, likely, given)
    check_calls(settings.optimizer, settings.scheduler, swa_lr=settings.swa_lr, given=given)
    if likely == "digits" and "data_dir" in given:
        raise UserError(
            f"--data_dir {options.data_dir} has no effect: the digits come with scikit-learn; "
            "leave it out"
        )
    # Who names a folder wants what is in it, and no digits in its place.
    name = likely if "data_dir" in given else options.dataset
    dataset = load_on_all(name, options.data_dir, world)
    return resolve(options.recipe, dataset.name, given), dataset


def train(
    options: Options,
    settings: Settings,
    dataset: Dataset,
    saved: SavedRun | None,
    device: torch.device,
    world: World,
) -> None:
    """Train a model, from the batches to the report.

    Args:
        saved: a run to go on with; None: begin one.
        world: the processes that train together, each on a part of every batch.
    """
    precision = choose_precision(options.precision, device)
    loaders = train_loader, val_loader, test_loader = make_loaders(
        dataset,
        settings.batch_size,
        options.num_workers,
        device=device,
        seed=options.seed,
        train_samples=options.train_samples,
        augment=Augment(**settings.section("augmentation")),
        world=world,
    )

    seed_generators(options.seed)
    model_config = {"img_size": 28, "in_chans": 1, "num_classes": len(dataset.class_names)}
    model_config |= settings.section("model")
    model = ViT(**model_config).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    optimizer, schedule = build_optimizer_and_schedule(settings, model, len(train_loader))
    average = WeightAverage(model, ema_decay=settings.ema_decay, swa_start=settings.swa_start)

    run = Run(options, settings, dataset, precision, device, world, saved)
    run.start(model, model_config, optimizer, schedule, average, loaders)
    how = {"precision": precision, "grad_accum_steps": options.grad_accum_steps, "world": world}
    network = prepare(model, options.compile, train_loader, **how)  # compiled, or distributed
    compute = partial(forward_backward, network, criterion, optimizer, **how)
    with run:
        for epoch in run.epochs():
            model.train()
            for batch in run.batches(train_loader):
                loss, hits = compute(batch)
                grad_norm = clip_gradients(optimizer, settings.grad_clip)
                if used := run.is_finite(loss, grad_norm):
                    take_step(optimizer, compute, batch, world)
                    average.step_batch()
                schedule.step_batch()  # also after a skipped step: the run keeps its length
                run.end_step(batch, loss, hits, grad_norm, used)
            average.step_epoch(epoch)
            validation = evaluate(average.module, val_loader, criterion, device, world)
            schedule.step_epoch(validation.loss)
            run.end_epoch(validation)
    run.finish(evaluate(run.best_model(), test_loader, criterion, device, world))


def build_optimizer_and_schedule(
    settings: Settings, model: nn.Module, steps_per_epoch: int
) -> tuple[Optimizer, Schedule]:
    """AdamW and CosineAnnealingLR, or what the settings call for."""
    optimizer = build_optimizer(
        settings.optimizer,
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        head_lr=settings.head_lr,
        no_decay=settings.no_decay,
    )
    schedule = build_scheduler(
        settings.scheduler,
        optimizer,
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        interval=settings.scheduler_interval,
        warmup_epochs=settings.warmup_epochs,
        swa_start=settings.swa_start,
        swa_lr=settings.swa_lr,
        swa_anneal_epochs=settings.swa_anneal_epochs,
        swa_anneal_strategy=settings.swa_anneal_strategy,
    )
    return optimizer, schedule


def forward_backward(
    network: Callable[[Tensor], Tensor],
    criterion: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    *,
    precision: str = "fp32",
    grad_accum_steps: int = 1,
    world: World = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of the mean loss over the whole batch, of which this process has a part.

    The part passes the network in `grad_accum_steps` pieces, one after the other.

    Returns:
        This process's share of the mean loss, and how many of its images are classified right.
    """
    optimizer.zero_grad()
    loss = torch.zeros((), device=batch.images.device)
    hits = torch.zeros((), dtype=torch.int64, device=batch.images.device)
    without_sync = getattr(network, "no_sync", nullcontext)  # of gradients, between processes
    pieces = zip(
        batch.images.tensor_split(grad_accum_steps),
        batch.labels.tensor_split(grad_accum_steps),
        strict=True,
    )
    for i, (x, y) in enumerate(pieces, 1):
        with without_sync() if i < grad_accum_steps else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(x).float()  # (B, num_classes)
            # Of an empty piece, at the end of an epoch, the mean would be no number.
            share = criterion(logits, y) * (len(y) / batch.size) if len(y) else logits.sum()
            (share * world.size).backward()  # the mean over processes follows
        loss += share.detach()
        hits += (logits.detach().argmax(dim=1) == y).sum()
    return loss, hits


def take_step(
    optimizer: Optimizer,
    compute: Callable[[Batch], tuple[Tensor, Tensor]],
    batch: Batch,
    world: World,
) -> None:
    """Update the weights; LBFGS computes loss and gradient again at each point that it tries."""
    if needs_closure(optimizer):
        optimizer.step(lambda: world.sum(compute(batch)[0]))
    else:
        optimizer.step()


if __name__ == "__main__":
    cli.run(main)
