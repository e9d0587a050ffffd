"""The loss of a step: class weights and soft targets, in parts and in several processes."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_DIGITS, history
from tiny_training import tiny_vit
from torch import Tensor, nn

from common.distributed import SINGLE_PROCESS, World
from data.augment import Augment
from data.dataset import Batch
from data.digits import load_digits
from data.mix import Mix
from saving.checkpoint import load_checkpoint
from train import forward_backward, take_step
from utils import class_weights, evaluate, make_loaders

SMOOTHING = 0.1


def slow_loss(logits: Tensor, shares: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of weighted losses over the sum of the weights, an image and a class at a time.

    Args:
        shares: of the classes in each image, (B, K), before label smoothing.
    """
    losses, weights = [], []
    classes = shares.shape[1]
    for row, target in zip(logits.log_softmax(dim=1), shares, strict=True):
        for k in range(classes):
            w = 1.0 if weight is None else weight[k]
            smoothed = (1 - SMOOTHING) * target[k] + SMOOTHING / classes
            losses.append(-w * smoothed * row[k])
            weights.append(w * target[k])
    return torch.stack(losses).sum() / torch.stack(weights).sum()


def a_batch(mixed: bool) -> tuple[Batch, Tensor]:
    """23 images, and the shares of the classes in them; always the same."""
    torch.manual_seed(1)
    labels = torch.tensor([0] * 12 + [1] * 7 + [2] * 3 + [4])[torch.randperm(23)]
    batch = Batch(torch.randn(23, 1, 8, 8), labels, labels, 23)
    if mixed:
        batch = Mix(10, mixup=1.0)(batch)
        assert ((batch.targets > 0.1) & (batch.targets < 0.9)).any()
        return batch, batch.targets
    return batch, nn.functional.one_hot(labels, 10).float()


def criterion_of(weight: Tensor | None) -> nn.Module:
    reduction = "mean" if weight is None else "sum"
    return nn.CrossEntropyLoss(weight, label_smoothing=SMOOTHING, reduction=reduction)


def check_step(mixed: bool, weighted: bool, parts: int, world: World = SINGLE_PROCESS) -> None:
    """Loss and gradient of this process's part of a batch, with those of all others, are the slow
    version's of the whole batch.
    """
    batch, shares = a_batch(mixed)
    weight = class_weights(torch.tensor([0] * 12 + [1] * 7 + [2] * 3 + [4]), 10)
    weight = weight if weighted else None
    model, expected = tiny_vit(), tiny_vit()
    whole = slow_loss(expected(batch.images), shares, weight)
    whole.backward()
    ours = [part.tensor_split(world.size)[world.rank] for part in batch[:3]]
    optimizer = torch.optim.SGD(model.parameters())
    loss, hits = forward_backward(
        world.wrap(model),
        criterion_of(weight),
        optimizer,
        Batch(*ours, 23),
        grad_accum_steps=parts,
        world=world,
    )
    torch.testing.assert_close(world.sum(loss), whole.detach(), atol=1e-6, rtol=1e-6)
    found = (expected(batch.images).argmax(dim=1) == batch.labels).sum()
    assert world.sum(hits) == found
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_a_steps_loss_is_that_of_the_whole_batch(mixed, weighted, parts):
    check_step(mixed, weighted, parts)


def check_closure(world: World) -> None:
    """LBFGS decides by the loss of the whole batch: the same in all processes."""
    losses = []

    class Seen(torch.optim.LBFGS):
        def step(self, closure):
            losses.append(closure().item())

    batch, _ = a_batch(mixed=False)
    ours = [part.tensor_split(world.size)[world.rank] for part in batch[:3]]
    model, criterion = tiny_vit(), criterion_of(None)
    optimizer, network = Seen(model.parameters()), world.wrap(model)
    gradients = partial(forward_backward, network, criterion, optimizer, world=world)
    take_step(optimizer, gradients, Batch(*ours, 23), world)
    expected = criterion(tiny_vit()(batch.images), batch.labels).item()
    assert world.gather(losses) == [[pytest.approx(expected)]] * world.size


def step_together(rank: int, store: str) -> None:
    """One of two processes, in which the rare classes are not spread evenly."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    world = World(rank, 2, rank, 2)
    for mixed in (False, True):
        for weighted in (False, True):
            for parts in (1, 3):
                check_step(mixed, weighted, parts, world)
    check_closure(world)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path, start):
    store = str(tmp_path / "store")
    torch.multiprocessing.start_processes(
        step_together, (store,), nprocs=2, start_method="forkserver"
    )


def test_classes_count_alike_and_a_class_without_images_not_at_all():
    labels = torch.tensor([0] * 6 + [2] * 3 + [3])
    weights = class_weights(labels, 5)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 0.0, 10 / 9, 10 / 3, 0.0]))
    assert weights[labels].mean().item() == pytest.approx(1)
    assert torch.equal(class_weights(torch.arange(10), 10), torch.ones(10))


def test_training_is_weighted_and_mixed_and_evaluation_is_neither(complete):
    """One step from weights that it leaves as they are, so that the loss can be had again."""
    flags = "--train_samples 70 --batch_size 70 --epochs 1 --optimizer SGD(lr=1e-12) --dropout 0"
    flags += " --rotate 0 --translate 0 --precision fp32 --class_weights auto"
    loaders = make_loaders(load_digits(), 70, augment=Augment(0, 0), train_samples=70)
    batch = loaders[0].batch_of_all(0, 0)
    weight = class_weights(batch[1], 10)
    assert weight.max() > 1.5 * weight.min()
    for alpha in (None, 1e300):  # which makes every share a half
        complete(*TINY_DIGITS, *flags.split(), *([] if alpha is None else ["--mixup", alpha]))
        model, _ = load_checkpoint(Path("checkpoints/best_model.pt"))
        images, shares = batch[0], nn.functional.one_hot(batch[1], 10).float()
        if alpha:
            images, shares = ((x + x.roll(1, dims=0)) / 2 for x in (images, shares))
        with torch.no_grad():
            logits = model(images)
        row = history()["epochs"][0]
        expected = slow_loss(logits, shares, weight).item()
        assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
        hits = (logits.argmax(dim=1) == batch[1]).float().mean().item()
        assert row["train_acc"] == pytest.approx(100 * hits)
        plain = evaluate(model, loaders[1], criterion_of(None), "cpu")
        assert row["val_loss"] == pytest.approx(plain.loss, rel=1e-5)
        assert not math.isclose(expected, slow_loss(logits, shares, None).item(), rel_tol=1e-3)
