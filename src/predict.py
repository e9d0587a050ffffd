"""Reads one's own digits: pictures in, class probabilities out, as text, JSON or CSV."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cli import UserError
from digit_image import read_digit
from vit_model import ViT

BATCH_SIZE = 256
MAX_STDIN = 2**28  # bytes; no picture of a size that is read takes more
FORMATS = ("text", "json", "csv")


@torch.no_grad()
def predict(model: ViT, images: np.ndarray, normalization: dict[str, float]) -> np.ndarray:
    """Class probabilities of images in MNIST's form, computed in batches.

    Args:
        model: in evaluation mode; images go to the device where it is.
        images: uint8 (n, 28, 28), light on black.
        normalization: `mean` and `std` of the pixels scaled to [0, 1], as the checkpoint has them.

    Returns:
        float32 (n, num_classes); each row sums to 1.
    """
    device = next(model.parameters()).device
    parts = [np.empty((0, model.head.out_features), dtype=np.float32)]
    for batch in torch.from_numpy(images).split(BATCH_SIZE):
        pixels = batch.to(device).unsqueeze(1).float() / 255
        logits = model((pixels - normalization["mean"]) / normalization["std"])
        parts.append(logits.softmax(dim=1).cpu().numpy())
    return np.concatenate(parts)
