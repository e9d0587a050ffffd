"""The named data sets: one table of what differs between them, and of their published files.

Needs no PyTorch, since the flags of train.py are read with it. The files, their MD5s and where they
lie below the data set's folder are torchvision's, but for CIFAR, of which it has pickles: ours are
the binary archives.
"""

import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# How a picture becomes an image of a data set. Either its digit is scaled and centred, as MNIST's
# are; or it is shrunk: its middle square, or all of it, with borders or stretched to a square.
PREPARATIONS = ("digit", "crop", "pad", "stretch")


class DataFile(NamedTuple):
    """A published file: its path below the data set's folder, its MD5, the addresses that have it
    and, if it may also lie there unpacked, the MD5 that it has then.
    """

    path: str
    md5: str
    urls: tuple[str, ...]
    unpacked_md5: str | None = None


class NamedSet(NamedTuple):
    """What is known of a data set without reading it."""

    title: str
    img_size: int  # side of its images in pixels
    in_chans: int  # 1: grey, 3: colour
    class_names: tuple[str, ...]
    files: tuple[DataFile, ...] = ()  # in the order in which its reader takes them
    data_dir: str | None = "./datasets"  # where its files are by default; None: it needs none
    # Mean and std of each channel, as published; None: measured whenever it is loaded.
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    preparation: str = "crop"  # one of PREPARATIONS
    mirrors: bool = False  # whether a mirrored image is still one of its class
    settings: Mapping[str, Any] = MappingProxyType({})  # what replaces a recipe's settings


# ------------------------------------------------------------------------------------ class names

DIGITS = tuple(string.digits)
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat")
FASHION += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
KUZUSHIJI = tuple("o ki su tsu na ha ma ya re wo".split())
LETTERS = tuple(string.ascii_uppercase)  # each class holds both cases
# The small letters that do not look like their capitals; with all others a class holds both cases.
BALANCED = (*DIGITS, *LETTERS, *"abdefghnqrt")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10 += ("dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)


# ----------------------------------------------------------------------------------------- files

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_files(
    folder: str,
    hosts: tuple[str, ...],
    md5s: str,
    names: tuple[str, ...] = IDX_NAMES,
    unpacked_md5s: str = "",
) -> tuple[DataFile, ...]:
    """Four packed files: images and labels to train, images and labels to test."""
    rows = zip(names, md5s.split(), unpacked_md5s.split() or [None] * 4, strict=True)
    return tuple(
        DataFile(f"{folder}/raw/{name}.gz", md5, tuple(f"{h}{name}.gz" for h in hosts), unpacked)
        for name, md5, unpacked in rows
    )


def one_file(name: str, md5: str, host: str) -> DataFile:
    return DataFile(name, md5, (host + name,))


MNIST_FILES = idx_files(
    "MNIST",
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://yann.lecun.com/exdb/mnist/"),
    "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
    "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
    unpacked_md5s="6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624 "
    "2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637",
)
FASHION_FILES = idx_files(
    "FashionMNIST",
    (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # it has no https
    ),
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
    "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
)
KMNIST_FILES = idx_files(
    "KMNIST",
    ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    "bdb82020997e1d708af4cf47b453dcf7 e144d726b3acfaa3e44228e80efcd344 "
    "5c965bf0a639b31b8f53240b1b52f4d7 7320c461ea6c1c855c0b718fb2a4b134",
)
QMNIST_FILES = idx_files(
    "QMNIST",
    ("https://raw.githubusercontent.com/facebookresearch/qmnist/master/",),
    "ed72d4157d28c017586c42bc6afe6370 0058f8dd561b90ffdd0f734c6a30e5e4 "
    "1394631089c404de565df7b7aeaf9412 5b5b05890a5e13444e108efe57b788aa",
    names=(
        "qmnist-train-images-idx3-ubyte",
        "qmnist-train-labels-idx2-int",
        "qmnist-test-images-idx3-ubyte",
        "qmnist-test-labels-idx2-int",
    ),
)
EMNIST_URL = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
EMNIST_FILES = (DataFile("EMNIST/raw/gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e", (EMNIST_URL,)),)
USPS_HOST = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/"
USPS_FILES = (
    one_file("usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197", USPS_HOST),
    one_file("usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118", USPS_HOST),
)
SVHN_HOST = "https://ufldl.stanford.edu/housenumbers/"
SVHN_FILES = (
    one_file("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", SVHN_HOST),
    one_file("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", SVHN_HOST),
)
CIFAR_HOST = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_FILES = (
    one_file("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", CIFAR_HOST),
)
CIFAR100_FILES = (
    one_file("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", CIFAR_HOST),
)


# ------------------------------------------------------------------------------------- the table

PHOTOS = {"hflip": 0.5, "random_crop": 4, "rotate": 0.0, "translate": 0.0}

NAMED_SETS = {
    "mnist": NamedSet(
        "MNIST",
        28,
        1,
        DIGITS,
        MNIST_FILES,
        data_dir="./mnist",
        statistics=((0.1307,), (0.3081,)),
        preparation="digit",
    ),
    "digits": NamedSet(
        "scikit-learn's digits",
        28,
        1,
        DIGITS,
        data_dir=None,
        statistics=((0.1593,), (0.2986,)),
        preparation="digit",
        # 20 passes over 1,437 images are too few steps for 16 blocks: fewer blocks, more passes,
        # all of them over whole images.
        settings={"epochs": 100, "batch_size": 64, "depth": 4, "patch_drop": 0.0},
    ),
    "fashionmnist": NamedSet(
        "Fashion-MNIST", 28, 1, FASHION, FASHION_FILES, mirrors=True, settings={"hflip": 0.5}
    ),
    "kmnist": NamedSet("KMNIST", 28, 1, KUZUSHIJI, KMNIST_FILES),
    "emnist-letters": NamedSet("EMNIST letters", 28, 1, LETTERS, EMNIST_FILES, preparation="digit"),
    "emnist-balanced": NamedSet(
        "EMNIST balanced", 28, 1, BALANCED, EMNIST_FILES, preparation="digit"
    ),
    "qmnist": NamedSet("QMNIST", 28, 1, DIGITS, QMNIST_FILES, preparation="digit"),
    "usps": NamedSet("USPS", 16, 1, DIGITS, USPS_FILES),
    "svhn": NamedSet("SVHN", 32, 3, DIGITS, SVHN_FILES),
    "cifar10": NamedSet("CIFAR-10", 32, 3, CIFAR10, CIFAR10_FILES, mirrors=True, settings=PHOTOS),
    "cifar100": NamedSet(
        "CIFAR-100", 32, 3, CIFAR100, CIFAR100_FILES, mirrors=True, settings=PHOTOS
    ),
}
