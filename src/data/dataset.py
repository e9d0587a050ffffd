"""A data set in memory: its images with their classes, in three parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

SPLIT_SEED = 42  # the split is part of the task, not of the run: `--seed` leaves it alone


@dataclass(frozen=True)
class Split:
    """Images with their classes: uint8 (n, C, S, S) and int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


def to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """A copy of the images (n, C, S, S), uint8, and of their classes (n,), any numbers."""
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


class Batch(NamedTuple):
    """What one process gets of a batch.

    Attributes:
        images: normalised, (B, C, S, S).
        targets: what the loss compares with: the labels, or the shares of the classes in a mixed
            image, (B, num_classes).
        labels: classes (B,); of a mixed image the one with the larger share.
        global_size: images of the whole batch, in all processes together.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    global_size: int


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: what it is called where results are shown.
        mean, std: of the training pixels scaled to [0, 1], for each channel.
        source: the name by which `load_dataset` finds it.
        preparation: how a picture becomes one of its images, of `catalog.PREPARATIONS`.
        trained_on: of a folder's images, int64: what tells each file of the training images, then
            of the validation images, from all others.
        tested_on: the same of the test images.
        trained_before: the same of all images that the model to start from had been trained on.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split
    source: str
    preparation: str
    trained_on: Tensor | None = None
    tested_on: Tensor | None = None
    trained_before: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])


def per_channel(
    values: Sequence[float] | float, device: str | torch.device | None = None
) -> Tensor:
    """A value for each channel, to be combined with images (B, C, S, S): (C, 1, 1)."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]; a deviation is at
    least 0.001, so that a channel of one value can be divided by it.

    They are exact: they follow from how often each of the 256 values occurs. Images that are mapped
    into memory from a file are read in parts.

    Shape: uint8 (n, C, H, W).
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(1000):
        for of_channel, pixels in zip(counts, part.unbind(dim=1), strict=True):
            of_channel += pixels.flatten().bincount(minlength=256)
    shares = counts.double() / counts.sum(dim=1, keepdim=True)  # (C, 256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    variance = (shares * (values - mean.unsqueeze(1)) ** 2).sum(dim=1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1e-3).tolist())


def as_pictures(images: np.ndarray) -> np.ndarray:
    """Images (n, C, S, S) as pictures have them: grey ones (n, S, S), others (n, S, S, C)."""
    return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)


class DataMissingError(UserError):
    """The data set is neither on this machine nor to be fetched."""


def divide(split: Split, *sizes: int) -> list[Split]:
    """Parts of these sizes, drawn at random, always the same."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return [split[part] for part in order.split(list(sizes))]
