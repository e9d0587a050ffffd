"""A data set by its name."""

from pathlib import Path

from common.errors import UserError
from data.dataset import Dataset
from data.digits import load_digits
from data.mnist import load_mnist


def load_dataset(name: str, data_dir: str | Path = "./mnist") -> Dataset:
    """Load a data set by name: "mnist" or "digits".

    Raises:
        DataMissingError: MNIST is not in `data_dir` and can't be downloaded.
        UserError: a file of it is damaged.
    """
    if name == "mnist":
        return load_mnist(data_dir)
    if name == "digits":
        return load_digits()
    raise UserError(f"data set {name!r} is not known: expected mnist or digits")
