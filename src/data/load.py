"""A data set by its name."""

import sys
from pathlib import Path

from common.distributed import World
from common.errors import UserError
from data.dataset import DataMissingError, Dataset
from data.digits import load_digits
from data.mnist import load_mnist


def load_dataset(name: str, data_dir: str | Path = "./mnist") -> Dataset:
    """Load a data set by name: "mnist", "digits", or "auto": MNIST or, with a warning where it is
    not to be had, the digits.

    Raises:
        DataMissingError: MNIST is not in `data_dir` and can't be downloaded.
        UserError: a file of it is damaged.
    """
    if name == "digits":
        return load_digits()
    if name not in ("mnist", "auto"):
        raise UserError(f"data set {name!r} is not known: expected mnist or digits")
    try:
        return load_mnist(data_dir)
    except DataMissingError as error:
        if name == "mnist":
            raise
        rule = "!" * 80
        warning = "WARNING: training on scikit-learn's 8x8 digits, NOT on MNIST"
        print(f"{rule}\n{warning}\n{error}\n{rule}", file=sys.stderr)
        return load_digits()


def load_on_all_processes(name: str, data_dir: str | Path, world: World) -> Dataset:
    """`load_dataset`, the same in all processes; one on each machine downloads it."""
    dataset = load_dataset(name, data_dir) if world.leads else None
    name = world.share(dataset and dataset.name)
    if world.rank and world.local_rank == 0:
        dataset = load_dataset(name, data_dir)
    world.gather(None)  # by now it is on every machine
    return dataset or load_dataset(name, data_dir)
