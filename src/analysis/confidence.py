"""What a model's answers are worth: how sure it is, and whether an image is of any class at all.

When training has ended, `fit` finds a temperature for the first and a measure of strangeness for
the second. The checkpoint holds both as `calibration`. In the comments on shapes, beside the
letters of vit_model.py,

    L: blocks that are looked at, up to three     K: classes     n: images
"""

from typing import Any

import torch
from torch import Tensor

from data.dataset import Split
from saving.checkpoint import MAX_TEMPERATURE
from utils import BatchLoader
from vit_model import ViT

TRAINING_IMAGES = 6000  # that tell how images of a class differ: more make no difference
SHRINKAGE = 0.01  # of the mean variance, added to all: some directions have next to none
LEAST_IMAGES = 100  # of validation, that tell a temperature
FALSE_ALARMS = 0.01  # share of the validation images that are called strange


@torch.no_grad()
def fit(model: ViT, train: Split, val: BatchLoader) -> dict[str, Any]:
    """Find a model's temperature and its measure of strangeness.

    Args:
        model: in evaluation mode.
        train: the training images, on the model's device; the first `TRAINING_IMAGES` are used.
        val: the validation images, normalised for the model and not shuffled.

    Returns:
        `temperature`, which `fit_temperature` finds on the validation images, 1 if they are fewer
        than `LEAST_IMAGES`; `whitening` (L, D, D)
        and `centres` (L, K, D), which `strangeness` needs, from the training images; `threshold`,
        the strangeness that `FALSE_ALARMS` of the validation images exceed. Tensors are on the CPU.
    """
    logits, vectors, labels = _read_all(model, val)
    plain = BatchLoader(train[:TRAINING_IMAGES], val.batch_size, val.mean, val.std)
    _, known, classes = _read_all(model, plain)
    present, index = classes.unique(return_inverse=True)
    means = torch.stack([known[index == k].mean(dim=0) for k in range(len(present))])  # (K, L, D)
    spread = (known - means[index]).transpose(0, 1)  # (L, n, D)
    covariance = spread.mT @ spread / len(known)  # (L, D, D)
    variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    covariance += (SHRINKAGE * variance + 1e-8) * torch.eye(covariance.shape[1])
    # bf16 takes half of the bytes and serves as well; what follows is computed with it as rounded.
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).bfloat16()
    centres = means.transpose(0, 1) @ whitening.double().mT
    calibration = {"whitening": whitening, "centres": centres.float()}
    limit = strangeness(vectors.float(), calibration).quantile(1 - FALSE_ALARMS)
    temperature = fit_temperature(logits, labels) if len(labels) >= LEAST_IMAGES else 1.0
    return {"temperature": temperature, "threshold": limit.item(), **calibration}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T with which softmax(logits / T) makes the labels most likely.

    Of few images all may be classified correctly, and T would be 0. So the labels are smoothed as
    if one in n + 2 were drawn at random, much as in Platt, "Probabilistic Outputs for Support
    Vector Machines" (1999), section 2.2.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2.

    Shape: (n, K), (n,) -> T in [1 / MAX_TEMPERATURE, MAX_TEMPERATURE].
    """
    n, num_classes = logits.shape
    logits, drawn = logits.double(), 1 / (n + 2)
    targets = (1 - drawn) * torch.nn.functional.one_hot(labels, num_classes) + drawn / num_classes
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE  # of 1 / T, in which the loss is convex
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = (((logits * middle).softmax(dim=1) - targets) * logits).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / middle


def read(model: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (B, K), and the vectors (B, L, D) that `strangeness` looks at: the mean of the
    tokens after a third, two thirds and all of the blocks.

    Args:
        images: normalised, (B, in_chans, img_size, img_size), on the model's device.
    """
    depth, vectors = len(model.blocks), []
    chosen = {-(-depth * part // 3) for part in (1, 2, 3)}  # blocks, counted from 1
    x = model.embed(images)
    for number, block in enumerate(model.blocks, 1):
        x = block(x)
        if number in chosen:
            vectors.append(x.mean(dim=1))
    return model.head(model.pooled(x)), torch.stack(vectors, dim=1)


def strangeness(vectors: Tensor, calibration: dict[str, Any]) -> Tensor:
    """How far images are from all classes: the squared Mahalanobis distance to the nearest class
    mean, with one covariance for all classes, summed over blocks.

        sum over blocks of min over classes c of (x - m_c)^T C^-1 (x - m_c)

    The last block is not enough: there, a trained network places strange images beside those of a
    class. Earlier blocks still tell them apart.

    Source: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks" (2018), equations 1 and 2 and "feature ensemble", with equal weights.

    Shape: (B, L, D) -> (B,), on the CPU, where the calibration is.
    """
    white = vectors.cpu().transpose(0, 1) @ calibration["whitening"].float().mT  # (L, B, D)
    # By differences: matrix products, taken above 25 images, would round an image's otherwise.
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(white, calibration["centres"], compute_mode=exact)
    return distances.square().amin(dim=2).sum(dim=0)


def is_strange(vectors: Tensor, calibration: dict[str, Any]) -> Tensor:
    """Whether an image may be of no class, bool (B,): stranger than nearly all validation images
    are."""
    if "threshold" not in calibration:
        return torch.zeros(len(vectors), dtype=torch.bool)
    return strangeness(vectors, calibration) > calibration["threshold"]


def _read_all(model: ViT, loader: BatchLoader) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, K), vectors (n, L, D) and labels (n,) of all images, on the CPU, in fp64."""
    parts = [(*read(model, images), labels) for images, labels in loader]
    logits, vectors, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return logits.double(), vectors.double(), labels
