"""Train the Vision Transformer: arguments, data, model, optimizer, loop, checkpoint, report.

This is the recipe, top to bottom. The flags are in settings.py; what keeps a run safe (stops,
saves, steps that are not finite) is in training/run.py.
"""

import common.startup  # noqa: F401 sets up threads, so before PyTorch

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from common import cli
from settings import Options, Settings, parse_args, section_of
from training.resolve import check_data_flags, resolve

if __name__ == "__main__":
    cli.check_flags(parse_args)  # refuses a wrong flag now, before the slow import of PyTorch

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from common.device import choose_device, choose_precision
from common.distributed import SINGLE_PROCESS, World, device_of, find_world
from data.augment import Augment
from data.dataset import Dataset
from data.folder import without_known
from data.load import load_on_all_processes
from data.mix import Mix
from optim import build_optimizer_and_schedule, check_calls, clip_gradients
from optimizers.average import WeightAverage
from saving.pretrained import Pretrained, read_pretrained
from training.resume import SavedRun, check_same_images
from training.run import Run, open_run
from training.speed import keep_freed_memory, prepare
from utils import Batch, BatchLoader, class_weights, evaluate, make_loaders
from vit_model import ViT


def main() -> None:
    typed, given = parse_args()  # given: the flags that the command line names
    world = find_world()
    device = device_of(world, choose_device(typed.device))
    keep_freed_memory()
    # A resumed run keeps its options but for those that settings.py marks with `changes`.
    with open_run(typed, given, world, device) as (options, saved):
        settings, dataset, trained = load_data(options, given, saved, world)
        train(options, settings, dataset, trained, saved, device, world)


def load_data(
    options: Options, given: Mapping[str, Any], saved: SavedRun | None, world: World
) -> tuple[Settings, Dataset, Pretrained | None]:
    """The data set, the settings of a run on it, and the trained model that it starts from, if any.

    The settings are resolved twice. First for the data set that is expected, so that most wrong
    flags are refused before a download; then for the one that was loaded, as the digits may have
    replaced MNIST. Raises UserError if flags contradict each other or have no effect, the data set
    can't be had, or it isn't the one that the saved run was trained on.
    """
    how_to_load = options.data_dir, section_of(options, "folder"), world
    if saved:
        dataset = load_on_all_processes(saved.dataset, *how_to_load)
        return saved.settings, check_same_images(saved, dataset), None
    expected = "mnist" if options.dataset == "auto" else options.dataset
    check_data_flags(expected, given)
    trained = None
    if "init_from" in given and world.leads:
        trained = read_pretrained(given["init_from"], given.get("num_heads"))
    trained = world.share(trained)
    sizes = trained and trained.config
    settings = resolve(options.recipe, expected, given, sizes, options.img_size)
    check_calls(settings.optimizer, settings.scheduler, swa_lr=settings.swa_lr, given=given)
    # Who names a folder wants what is in it: then the digits don't replace a missing MNIST.
    name = expected if "data_dir" in given else options.dataset
    dataset = load_on_all_processes(name, *how_to_load)
    dataset = without_known(dataset, trained and trained.trained_on)
    side, images = dataset.image_shape[-1], len(dataset.train[: options.train_samples])
    settings = resolve(options.recipe, dataset.source, given, sizes, side, images)
    return settings, dataset, trained


def train(
    options: Options,
    settings: Settings,
    dataset: Dataset,
    trained: Pretrained | None,
    saved: SavedRun | None,
    device: torch.device,
    world: World,
) -> None:
    """Train a model, from the batches to the report.

    Args:
        trained: the model to start from; None starts from random weights.
        saved: the run to resume; None starts a new one.
        world: the processes that train together, each on a part of every batch.
    """
    augment = Augment(**section_of(settings, "augmentation"))
    sizes = settings.batch_size, options.num_workers
    drawn = {"seed": options.seed, "train_samples": options.train_samples, "augment": augment}
    loaders = make_loaders(dataset, *sizes, device=device, **drawn, world=world)
    train_loader, val_loader, test_loader = loaders

    # The same in all processes, so that they draw the same weights; `run.start` then seeds all but
    # the first anew.
    torch.manual_seed(options.seed)
    model, model_config = build_model(settings, dataset, trained)
    model.to(device)
    num_classes = len(dataset.class_names)
    mix = Mix(num_classes, **section_of(settings, "mixing"))
    train_criterion, criterion = build_criteria(settings, train_loader, num_classes)
    optimizer, schedule = build_optimizer_and_schedule(settings, model, len(train_loader))
    average = WeightAverage(model, ema_decay=settings.ema_decay, swa_start=settings.swa_start)

    precision = choose_precision(options.precision, device)
    run = Run(options, settings, dataset, precision, device, world, saved)
    run.start(model, model_config, optimizer, schedule, average, loaders)  # or restore `saved`
    step_options = {"precision": precision, "grad_accum_steps": options.grad_accum_steps}
    network = prepare(model, options.compile, train_loader, **step_options, world=world)
    compute_gradients = partial(
        forward_backward, network, train_criterion, optimizer, **step_options, world=world
    )
    with run:  # Ctrl-C saves and ends the script; a step that is not finite ends it unsaved
        for epoch in run.epochs():
            model.train()
            model.patch_drop = patch_drop_in(epoch, settings.epochs, settings.patch_drop)
            for batch in map(mix, run.batches(train_loader)):
                loss, hits = compute_gradients(batch)  # zero_grad, forward, backward
                grad_norm = clip_gradients(optimizer, settings.grad_clip)
                # The same answer in all processes. On a GPU the check may come some steps later.
                finite = run.is_finite(loss, grad_norm)
                if finite:  # else the step is left out, with --on_nonfinite skip
                    take_step(optimizer, compute_gradients, batch, world)
                    average.step_batch()
                schedule.step_batch()  # also after a skipped step: the run keeps its length
                run.end_step(batch, loss, hits, grad_norm, finite)
            average.step_epoch(epoch)
            # Validate the averaged weights if there is an average, else the model's own.
            validation = evaluate(average.module, val_loader, criterion, device, world)
            schedule.step_epoch(validation.loss)
            run.end_epoch(validation)  # writes last.pt, and best_model.pt if it is the best so far
    run.finish(evaluate(run.best_model(), test_loader, criterion, device, world))


def patch_drop_in(epoch: int, epochs: int, share: float) -> float:
    """The share of the patches that an epoch, counted from 1, leaves out: none in the last third,
    which sees whole images as the test does.
    """
    return share if 3 * epoch <= 2 * epochs else 0.0


def build_model(
    settings: Settings, dataset: Dataset, trained: Pretrained | None
) -> tuple[ViT, dict[str, Any]]:
    """The network, started from `trained` if there is one, and the arguments of `ViT` for it."""
    in_chans, img_size, _ = dataset.image_shape
    config = {"img_size": img_size, "in_chans": in_chans, "num_classes": len(dataset.class_names)}
    config |= section_of(settings, "model")
    model = ViT(**config)
    if trained is not None:
        print(f"started from: {trained.load_into(model, dataset.class_names)}")
    if settings.freeze == "backbone":  # also in a resumed run, whose weights come later
        model.requires_grad_(False).head.requires_grad_()
    return model, config


def build_criteria(
    settings: Settings, train_loader: BatchLoader, num_classes: int
) -> tuple[nn.Module, nn.Module]:
    """The losses to train with and to score with: the latter never weighs classes."""
    smoothing = settings.label_smoothing
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    if settings.class_weights == "none":
        return criterion, criterion
    weights = class_weights(train_loader.split.labels, num_classes)
    return nn.CrossEntropyLoss(weights, label_smoothing=smoothing, reduction="sum"), criterion


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

    Args:
        criterion: the mean over images; with class weights the sum, here divided by the weights of
            the whole batch.

    Returns:
        This process's share of the mean loss; the shares of all processes add up to it. And how
        many images of its part are classified right.
    """
    optimizer.zero_grad()
    loss = torch.zeros((), device=batch.images.device)
    hits = torch.zeros((), dtype=torch.int64, device=batch.images.device)
    no_sync = getattr(network, "no_sync", nullcontext)  # only DDP has it
    total = batch.global_size
    if (weight := criterion.weight) is not None:
        # Mixed or not, a batch's labels weigh together what its targets do (see Mix).
        total = world.sum(weight[batch.labels].sum())
    parts = (batch.images, batch.targets, batch.labels)
    pieces = zip(*(part.tensor_split(grad_accum_steps) for part in parts), strict=True)
    for i, (x, targets, y) in enumerate(pieces, 1):
        with no_sync() if i < grad_accum_steps else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(x).float()  # (B, num_classes)
            # A piece without images, of an epoch's last batch, has no mean; but the other processes
            # wait for its backward pass.
            size = len(y) if weight is None else 1
            share = criterion(logits, targets) * (size / total) if len(y) else logits.sum()
            (share * world.size).backward()  # DDP takes the mean over processes, we want the sum
        loss += share.detach()
        hits += (logits.detach().argmax(dim=1) == y).sum()
    return loss, hits


def take_step(
    optimizer: Optimizer,
    compute_gradients: Callable[[Batch], tuple[Tensor, Tensor]],
    batch: Batch,
    world: World,
) -> None:
    """Update the weights by their gradients.

    LBFGS computes loss and gradients again at each point that it tries; these are not clipped.
    """
    if isinstance(optimizer, LBFGS):
        optimizer.step(lambda: world.sum(compute_gradients(batch)[0]))
    else:
        optimizer.step()


if __name__ == "__main__":
    cli.run(main)
