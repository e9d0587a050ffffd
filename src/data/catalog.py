"""The named data sets: one table of what differs between them.

Needs no PyTorch, since the flags of train.py are read with it.
"""

import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

DIGITS = tuple(string.digits)
# How a picture becomes an image of a data set. Either its digit is scaled and centred, as MNIST's
# are; or it is shrunk: its middle square, or all of it, with borders or stretched to a square.
PREPARATIONS = ("digit", "crop", "pad", "stretch")


class NamedSet(NamedTuple):
    """What is known of a data set without reading it."""

    title: str
    img_size: int  # side of its images in pixels
    in_chans: int  # 1: grey, 3: colour
    class_names: tuple[str, ...]
    data_dir: str | None = "./datasets"  # where its files are by default; None: it needs none
    preparation: str = "crop"  # one of PREPARATIONS
    mirrors: bool = False  # whether a mirrored image is still one of its class
    settings: Mapping[str, Any] = MappingProxyType({})  # what replaces a recipe's settings


FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat")
FASHION += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10 += ("dog", "frog", "horse", "ship", "truck")
PHOTOS = {"hflip": 0.5, "random_crop": 4, "rotate": 0.0, "translate": 0.0}

NAMED_SETS = {
    "mnist": NamedSet("MNIST", 28, 1, DIGITS, data_dir="./mnist", preparation="digit"),
    "digits": NamedSet(
        "scikit-learn's digits",
        28,
        1,
        DIGITS,
        data_dir=None,
        preparation="digit",
        # 20 passes over 1,437 images are too few steps for 16 blocks: fewer blocks, more passes.
        settings={"epochs": 100, "batch_size": 64, "depth": 4},
    ),
}
