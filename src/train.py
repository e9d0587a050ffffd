"""Train the Vision Transformer: arguments, data, model, optimizer, loop, checkpoint, report.

This is the recipe, top to bottom. Around it

    recipes.py             every flag and its default: `Settings`, how a run learns, `Options`, on
                           what and where; the recipes; what a data set changes
    training/run.py        what keeps a run safe: stops, steps that are not finite, other processes
    training/run_files.py  what best_model.pt, last.pt and history.json hold, and the printed report
"""

import common.startup  # noqa: F401 sets up threads, so before PyTorch

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from common import cli
from recipes import Options, Settings, parse_args, resolve

if __name__ == "__main__":
    cli.check_flags(parse_args)  # a wrong one ends the script here: PyTorch's import takes seconds

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.device import choose_device, choose_precision
from common.distributed import SINGLE_PROCESS, World, device_of, find_world
from common.errors import UserError
from data.augment import Augment
from data.dataset import Dataset
from data.load import load_on_all_processes
from optim import build_optimizer, check_calls, clip_gradients, needs_closure
from optimizers.average import WeightAverage
from optimizers.schedule import Schedule, build_scheduler
from training.resume import SavedRun, seed_generators
from training.run import Run, open_run
from training.speed import keep_freed_memory, prepare
from utils import Batch, evaluate, make_loaders
from vit_model import ViT


def main() -> None:
    typed, given = parse_args()  # given: the flags that the command line names
    world = find_world()
    device = device_of(world, choose_device(typed.device))
    keep_freed_memory()
    # Of a run that is resumed the options are its own, but for the few that may change.
    with open_run(typed, given, world, device) as (options, saved):
        settings, dataset = load_data(options, given, saved, world)
        train(options, settings, dataset, saved, device, world)


def load_data(
    options: Options, given: Mapping[str, Any], saved: SavedRun | None, world: World
) -> tuple[Settings, Dataset]:
    """The data set, and the settings of a run on it.

    Wrong flags are refused before a download, so the settings are resolved twice: for the data set
    that is expected, and for the one that came.

    Raises:
        UserError: flags contradict each other or have no effect, or the data set can't be had.
    """
    if saved:
        return saved.settings, load_on_all_processes(saved.dataset, options.data_dir, world)
    expected = "mnist" if options.dataset == "auto" else options.dataset
    settings = resolve(options.recipe, expected, given)
    check_calls(settings.optimizer, settings.scheduler, swa_lr=settings.swa_lr, given=given)
    if expected == "digits" and "data_dir" in given:
        raise UserError(
            f"--data_dir {options.data_dir} has no effect: the digits come with scikit-learn; "
            "leave it out"
        )
    # With --data_dir, "auto" is MNIST alone: the digits are no replacement for a folder's content.
    name = expected if "data_dir" in given else options.dataset
    dataset = load_on_all_processes(name, options.data_dir, world)
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
    loaders = make_loaders(
        dataset,
        settings.batch_size,
        options.num_workers,
        device=device,
        seed=options.seed,
        train_samples=options.train_samples,
        augment=Augment(**settings.section("augmentation")),
        world=world,
    )
    train_loader, val_loader, test_loader = loaders

    seed_generators(options.seed)  # alike in all processes, and so are the weights that are drawn
    _, in_chans, img_size, _ = dataset.train.images.shape
    model_config = {"img_size": img_size, "in_chans": in_chans}
    model_config |= {"num_classes": len(dataset.class_names), **settings.section("model")}
    model = ViT(**model_config).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    optimizer, schedule = build_optimizer_and_schedule(settings, model, len(train_loader))
    average = WeightAverage(model, ema_decay=settings.ema_decay, swa_start=settings.swa_start)

    precision = choose_precision(options.precision, device)
    run = Run(options, settings, dataset, precision, device, world, saved)
    run.start(model, model_config, optimizer, schedule, average, loaders)  # or where `saved` was
    step_options = {"precision": precision, "grad_accum_steps": options.grad_accum_steps}
    network = prepare(model, options.compile, train_loader, **step_options, world=world)
    backward = partial(forward_backward, network, criterion, optimizer, **step_options, world=world)
    with run:  # a stop, or a step that is not finite, ends the script here, in good order
        for epoch in run.epochs():
            model.train()
            for batch in run.batches(train_loader):
                loss, hits = backward(batch)
                grad_norm = clip_gradients(optimizer, settings.grad_clip)
                finite = run.is_finite(loss, grad_norm)  # the same answer in all processes
                if finite:
                    take_step(optimizer, backward, batch, world)
                    average.step_batch()
                schedule.step_batch()  # also after a skipped step: the run keeps its length
                run.end_step(batch, loss, hits, grad_norm, finite)
            average.step_epoch(epoch)
            # Of the averaged weights where there is an average, else of the model's own.
            validation = evaluate(average.module, val_loader, criterion, device, world)
            schedule.step_epoch(validation.loss)
            run.end_epoch(validation)  # which keeps the model with the highest accuracy
    run.finish(evaluate(run.best_model(), test_loader, criterion, device, world))


def build_optimizer_and_schedule(
    settings: Settings, model: nn.Module, steps_per_epoch: int
) -> tuple[Optimizer, Schedule]:
    """What `settings.optimizer` and `settings.scheduler` call for, with the flags beside them."""
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
    """Fill `.grad` with the gradient of the mean loss over the whole batch, in all processes.

    This process's part of the batch goes through the network in `grad_accum_steps` pieces, one
    after the other; the batch and its gradient stay the same.

    Returns:
        This process's share of the mean loss; the shares of all processes add up to it. And how
        many images of its part are classified right.
    """
    optimizer.zero_grad()
    loss = torch.zeros((), device=batch.images.device)
    hits = torch.zeros((), dtype=torch.int64, device=batch.images.device)
    no_sync = getattr(network, "no_sync", nullcontext)  # only of several processes
    pieces = zip(
        batch.images.tensor_split(grad_accum_steps),
        batch.labels.tensor_split(grad_accum_steps),
        strict=True,
    )
    for i, (x, y) in enumerate(pieces, 1):
        with no_sync() if i < grad_accum_steps else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(x).float()  # (B, num_classes)
            # An empty piece, of an epoch's last batch, has no mean. Its sum, 0, has a backward pass
            # too, which the other processes wait for.
            share = criterion(logits, y) * (len(y) / batch.global_size) if len(y) else logits.sum()
            (share * world.size).backward()  # the mean over processes makes it a sum
        loss += share.detach()
        hits += (logits.detach().argmax(dim=1) == y).sum()
    return loss, hits


def take_step(
    optimizer: Optimizer,
    backward: Callable[[Batch], tuple[Tensor, Tensor]],
    batch: Batch,
    world: World,
) -> None:
    """Update the weights by their gradients.

    LBFGS computes loss and gradients again at each point that it tries, and takes them as they are.
    """
    if needs_closure(optimizer):
        optimizer.step(lambda: world.sum(backward(batch)[0]))
    else:
        optimizer.step()


if __name__ == "__main__":
    cli.run(main)
