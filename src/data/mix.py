"""Mixes the images of a batch with each other, and their targets in the same shares."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data.dataset import Batch


@dataclass(frozen=True)
class Mix:
    """Each image becomes a mixture with the next one of its batch, in a share drawn anew each time.

    The draws come from PyTorch's generator for the CPU, which a saved run keeps. With both kinds
    on, each batch gets one of them, with equal chances. With neither, a batch stays as it is, and
    nothing is drawn.

    Args:
        num_classes: K.
        mixup: alpha of Beta(alpha, alpha), from which the share is drawn; images are added up
            pixel by pixel (Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018).
        cutmix: the same; a rectangle of this share is replaced (Yun et al., "CutMix", 2019).
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, batch: Batch) -> Batch:
        """The batch with images mixed, and targets (B, K) of shares that sum to 1."""
        if not (self.mixup or self.cutmix) or len(batch.labels) == 0:
            return batch
        cuts = torch.rand(()) < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if cuts else self.mixup
        share = torch.distributions.Beta(alpha, alpha).sample().item()  # of the image itself
        others = batch.images.roll(1, dims=0)
        if cuts:
            images = batch.images.clone()
            rows, columns, share = draw_rectangle(1 - share, *images.shape[-2:])
            images[..., rows, columns] = others[..., rows, columns]
        else:
            images = others.lerp(batch.images, share)
        own = F.one_hot(batch.labels, self.num_classes).to(images.dtype)
        targets = own.roll(1, dims=0).lerp(own, share)
        labels = batch.labels if share >= 0.5 else batch.labels.roll(1)
        return batch._replace(images=images, targets=targets, labels=labels)


def draw_rectangle(area: float, height: int, width: int) -> tuple[slice, slice, float]:
    """Rows and columns of a rectangle, and the share of the image that lies outside of it.

    It has the image's proportions and `area` of its area, about a centre drawn anywhere in it; what
    would lie outside the image is cut off (CutMix, section 3.1).
    """
    centre = torch.rand(2).numpy() * (height, width)
    half = math.sqrt(area) * np.array((height, width)) / 2
    low = np.clip(np.rint(centre - half), 0, (height, width)).astype(int)
    high = np.clip(np.rint(centre + half), 0, (height, width)).astype(int)
    (top, left), (bottom, right) = low, high
    inside = (bottom - top) * (right - left) / (height * width)
    return slice(top, bottom), slice(left, right), 1 - float(inside)
