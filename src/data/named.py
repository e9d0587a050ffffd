"""The named data sets, each by the reader of its format."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.catalog import NAMED_SETS
from data.cifar import read_cifar10, read_cifar100
from data.dataset import Dataset, Split, divide, pixel_statistics
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


def load_named(name: str, data_dir: str | Path) -> Dataset:
    """A data set of the catalog that has files. A tenth of the images that were published to train
    is for validation. DataMissingError, UserError: as `load_dataset`.
    """
    row = NAMED_SETS[name]
    with open_files(row, data_dir) as files:
        published, test = READERS[name](*files)
    num_val = len(published) // 10
    train, val = divide(published, len(published) - num_val, num_val)
    mean, std = row.statistics or pixel_statistics(train.images)
    return Dataset(name, row.class_names, mean, std, train, val, test, name, row.preparation)
