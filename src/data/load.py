"""A data set by its name."""

import sys
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.distributed import World
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.cifar import read_cifar10, read_cifar100
from data.dataset import DataMissingError, Dataset, Split, divide, pixel_statistics
from data.digits import load_digits
from data.folder import load_folder
from data.idx import read_emnist, read_mnist
from data.published import open_files
from data.svhn import read_svhn
from data.usps import read_usps

# What is to train and to test, from a set's open files in the catalog's order.
READERS: dict[str, Callable[..., tuple[Split, Split]]] = {
    "mnist": read_mnist,
    "fashionmnist": read_mnist,
    "kmnist": read_mnist,
    "emnist-letters": partial(read_emnist, name="letters", first_label=1),
    "emnist-balanced": partial(read_emnist, name="balanced"),
    "qmnist": read_mnist,
    "usps": read_usps,
    "svhn": read_svhn,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
}


def load_dataset(
    name: str, data_dir: str | Path | None = None, folder: Mapping[str, Any] | None = None
) -> Dataset:
    """Load a data set by its name for --dataset. Raises DataMissingError if a file of it is neither
    in `data_dir` nor can be downloaded, UserError if one is damaged or there is no such data set.

    Args:
        name: "auto" is MNIST or, with a warning where it is not to be had, the digits.
        data_dir: where its files are, or are put; None: where the table of named sets says.
        folder: of the data set "folder", arguments of `load_folder`.
    """
    if name == "folder":
        return load_folder(data_dir, **(folder or {}))
    if name == "auto":
        try:
            return load_dataset("mnist", data_dir)
        except DataMissingError as error:
            rule = "!" * 80
            warning = "WARNING: training on scikit-learn's 8x8 digits, NOT on MNIST"
            print(f"{rule}\n{warning}\n{error}\n{rule}", file=sys.stderr)
            return load_dataset("digits")
    if name not in NAMED_SETS:
        known = ", ".join([*NAMED_SETS, "folder"])
        raise UserError(f"data set {name!r} is not known: expected {known}")
    if name == "digits":
        return load_digits()
    row = NAMED_SETS[name]
    with open_files(row, data_dir or row.data_dir) as files:
        published, test = READERS[name](*files)
    num_val = len(published) // 10  # a tenth of what was published to train
    train, val = divide(published, len(published) - num_val, num_val)
    mean, std = row.statistics or pixel_statistics(train.images)
    return Dataset(name, row.class_names, mean, std, train, val, test, name, row.preparation)


def load_on_all_processes(
    name: str, data_dir: str | Path | None, folder: Mapping[str, Any], world: World
) -> Dataset:
    """`load_dataset`, the same in all processes; one on each machine downloads it. Raises UserError
    in all of them if one can't load it, or they found different images.
    """

    def load() -> Dataset | str:
        try:
            return load_dataset(name, data_dir, folder)
        except UserError as error:
            return str(error)

    dataset = load_dataset(name, data_dir, folder) if world.leads else None
    name = world.share(dataset and dataset.source)
    if world.rank and world.local_rank == 0:
        dataset = load()
    world.gather(None)  # by now it is on every machine
    dataset = dataset or load()
    found = world.gather(dataset if isinstance(dataset, str) else _marks(dataset))
    for each in found:
        if isinstance(each, str):
            raise UserError(each)
        if each != found[0]:
            raise UserError(
                f"the processes found different images in {data_dir}: give all the same, and leave "
                "them as they are while they are read"
            )
    return dataset


def _marks(dataset: Dataset) -> tuple[Any, ...]:
    """What tells a data set from another."""
    marks = [split.labels for split in (dataset.train, dataset.val, dataset.test)]
    marks += [mark for mark in (dataset.trained_on, dataset.tested_on) if mark is not None]
    return dataset.class_names, dataset.image_shape, *(zlib.crc32(mark.numpy()) for mark in marks)
