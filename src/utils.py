"""Brings the data set in, as batches, and the metrics out.

Small images are read once, kept in memory as bytes on the device that trains, and cut into whole
batches there. No image passes through Python on its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.device import widest_float
from common.distributed import SINGLE_PROCESS, World
from common.progress import update_todo_md  # noqa: F401 re-exported
from data.augment import Augment
from data.dataset import Batch, Dataset, Split, per_channel  # noqa: F401 Batch is re-exported
from data.load import load_dataset

PUBLISHED_AUGMENT = Augment()


# --------------------------------------------------------------------------------------- batches


class Metrics(NamedTuple):
    """Means over the images of a data set; accuracies in percent."""

    loss: float
    top1: float
    top5: float


@dataclass(eq=False)
class BatchLoader:
    """Iterates over (images, labels) batches: float (B, C, S, S), normalised, and int64 (B,).

    Order and augmentation of a batch depend on `seed`, the pass and the batch's number alone, so a
    run repeats exactly, whatever else draws random numbers and however many workers prepare; and it
    can go on from any batch. Of several processes each gets its own part of every batch.
    """

    split: Split  # batches lie on the device where it lies
    batch_size: int  # the last batch may have fewer images
    mean: Sequence[float] | float  # of the training pixels scaled to [0, 1], by channel or of all
    std: Sequence[float] | float
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None  # of pixels in [0, 1]
    shuffle: bool = False  # draw another order for each pass
    seed: int = 42
    num_workers: int = 0  # threads that prepare batches ahead
    world: World = SINGLE_PROCESS
    epoch: int = 0  # passes begun; set this and `skip` to continue where another loader was
    skip: int = 0  # batches that the next pass leaves out

    def __post_init__(self) -> None:
        device = self.split.images.device
        self._mean, self._std = per_channel(self.mean, device), per_channel(self.std, device)

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        skip, self.skip = self.skip, 0
        batches = enumerate(self._order(epoch).split(self.batch_size), 1)
        tasks = ((epoch, number, self.world.rank, batch) for number, batch in batches)
        tasks = islice(tasks, skip, None)
        if self.num_workers == 0:
            yield from (self._batch(*task) for task in tasks)
            return
        with ThreadPoolExecutor(self.num_workers) as pool:
            ahead = deque(
                pool.submit(self._batch, *task) for task in islice(tasks, 2 * self.num_workers)
            )
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self._batch, *task) for task in islice(tasks, 1))
                yield batch

    def numbered(self, first: int, step: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Every `step`th batch from number `first` on, unshuffled, with its number from 0."""
        batches = self._in_order().split(self.batch_size)
        for i in range(first, len(batches), step):
            yield i, self._batch(0, i + 1, 0, batches[i])

    def batch_of_all(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """What a step's batch was, or will be, in all processes together; both counted from 0."""
        batch = self._order(epoch).split(self.batch_size)[step]
        parts = [self._batch(epoch, step + 1, rank, batch) for rank in range(self.world.size)]
        images, labels = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(labels)

    def size_of(self, step: int) -> int:
        """How many images a step's batch has in all processes together; counted from 0."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def _in_order(self) -> Tensor:
        return torch.arange(len(self.split), device=self.split.labels.device)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return self._in_order()
        # Batches are numbered from 1: number 0 is the order's. It is drawn on the CPU: a run that
        # moves to another device in mid-epoch leaves no image out.
        generator = self._generator(epoch, 0, 0, "cpu")
        order = torch.randperm(len(self.split), generator=generator)
        return order.to(self.split.labels.device)

    def _generator(
        self, epoch: int, number: int, rank: int, device: str | torch.device
    ) -> torch.Generator:
        mixed = np.random.SeedSequence((self.seed, epoch, number, rank))
        # 63 bits: what manual_seed takes on every device.
        seed = int(mixed.generate_state(1, np.uint64)[0]) >> 1
        return torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def _batch(self, epoch: int, number: int, rank: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        part = self.split[batch.tensor_split(self.world.size)[rank]]
        images = part.images.float().div_(255)
        if self.augment is not None and len(images):
            generator = self._generator(epoch, number, rank, images.device)
            images = self.augment(images, generator)
        return images.sub_(self._mean).div_(self._std), part.labels


def make_loaders(
    dataset: Dataset,
    batch_size: int = 128,
    num_workers: int = 0,
    *,
    device: str | torch.device = "cpu",
    seed: int = 42,
    train_samples: int | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = PUBLISHED_AUGMENT,
    world: World = SINGLE_PROCESS,
) -> tuple[BatchLoader, BatchLoader, BatchLoader]:
    """Loaders of a data set's training, validation and test images, in memory on `device`.

    Training batches are shuffled and augmented, the two others never.

    Args:
        train_samples: train on the first so many images only; None is all of them.
        augment: of the training batches, see `BatchLoader`.
        world: the processes that share the training batches; see `evaluate` for the others.
    """

    def loader(split: Split, size: int, **how) -> BatchLoader:
        return BatchLoader(split.to(device), size, dataset.mean, dataset.std, **how)

    order = {"shuffle": True, "seed": seed, "num_workers": num_workers, "world": world}
    train = loader(dataset.train[:train_samples], batch_size, augment=augment, **order)
    size = images_at_once(dataset.image_shape[-1])
    return train, loader(dataset.val, size), loader(dataset.test, size)


def images_at_once(side: int) -> int:
    """How many images to evaluate at once, whatever the batch in training is: no gradient is kept.
    It falls with their pixels, for memory grows with the square of the number of tokens.
    """
    return max(1, 500 * 32**2 // max(side, 32) ** 2)


def get_mnist_loaders(
    data_dir: str | Path = "./mnist", batch_size: int = 128, num_workers: int = 0, **kwargs
) -> tuple[BatchLoader, BatchLoader, BatchLoader]:
    """MNIST's training, validation and test loaders; see `load_dataset` and `make_loaders`."""
    return make_loaders(load_dataset("mnist", data_dir), batch_size, num_workers, **kwargs)


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights (num_classes,) with which every class that has images counts the same in the loss,
    and the mean over all images is 1. A class without images has weight 0: label smoothing would
    else make much of it.

    Args:
        labels: classes (n,) of the training images.
    """
    counts = labels.bincount(minlength=num_classes)
    present = counts > 0
    return present * len(labels) / (present.sum() * counts.clamp(min=1))


# --------------------------------------------------------------------------------------- metrics


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Percentage of samples whose target is among the k highest logits, for each k of `topk`.

    Shape: logits (B, num_classes), classes (B,).
    """
    hits = _top_hits(output, target, max(topk))
    return [100.0 * hits[:, :k].any(dim=1).float().mean().item() for k in topk]


def _top_hits(output: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether the target is the class of rank 1, 2, ... k: bool (B, k), fewer of fewer classes."""
    ranks = output.topk(min(k, output.shape[1]), dim=1).indices
    return ranks == target.unsqueeze(1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: BatchLoader,
    criterion: nn.Module,
    device: str | torch.device,
    world: World = SINGLE_PROCESS,
) -> Metrics:
    """Mean loss, top-1 % and top-5 % over all images, in fp32 and with dropout off.

    The means are exact: a smaller last batch weighs less. Of several processes each takes whole
    batches in turn, and all get the result that one alone would get.
    """
    training = model.training
    model.eval()
    # A row for each batch, summed at the end, on the device: Python waits for a GPU only there, and
    # the sum has one order, however many processes there are.
    exact = widest_float(torch.device(device))
    rows = torch.zeros(len(loader), 3, dtype=exact, device=device)
    for i, (images, labels) in loader.numbered(world.rank, world.size):
        logits, labels = model(images.to(device)), labels.to(device)
        hits = _top_hits(logits, labels, 5)
        batch = criterion(logits, labels) * len(labels), 100 * hits[:, 0].sum(), 100 * hits.sum()
        rows[i] = torch.stack([value.to(exact) for value in batch])
    model.train(training)
    return Metrics(*(world.sum(rows).sum(dim=0) / len(loader.split)).tolist())
