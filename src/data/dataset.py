"""A data set in memory: its images with their classes, in three parts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError

DIGITS = tuple("0123456789")
SPLIT_SEED = 42  # the split is part of the task, not of the run: `--seed` leaves it alone


@dataclass(frozen=True)
class Split:
    """Images with their classes: uint8 (n, 1, 28, 28) and int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set in memory; `mean` and `std` are of its training pixels scaled to [0, 1]."""

    name: str
    class_names: tuple[str, ...]
    mean: float
    std: float
    train: Split
    val: Split
    test: Split


class DataMissingError(UserError):
    """The data set is neither on this machine nor to be fetched."""


def divide(split: Split, *sizes: int) -> list[Split]:
    """Parts of these sizes, drawn at random, always the same."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return [split[part] for part in order.split(list(sizes))]
