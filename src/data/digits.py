"""scikit-learn's handwritten digits, in MNIST's form."""

import torch
from torch import nn

from data.catalog import NAMED_SETS
from data.dataset import Dataset, Split, divide


def load_digits() -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn carries, in MNIST's form: enlarged to
    20x20 in the middle of 28x28. 1,437 / 180 / 180 images; no network is needed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    images, labels = load_sklearn_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)  # 16 grey levels
    pixels = nn.functional.interpolate(pixels, size=20, mode="bicubic", align_corners=False)
    pixels = nn.functional.pad(pixels, (4, 4, 4, 4)).round().clamp(0, 255).byte()
    whole = Split(pixels, torch.from_numpy(labels).long())
    parts = divide(whole, 1437, 180, 180)
    row = NAMED_SETS["digits"]
    return Dataset("digits", row.class_names, *row.statistics, *parts, "digits", row.preparation)
