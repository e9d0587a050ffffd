"""Mixes the images of a batch with each other, and their targets in the same shares."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributions import Gamma

from data.dataset import Batch


@dataclass(frozen=True)
class Mix:
    """Each image becomes a mixture with its neighbour in the batch, all in one share, drawn anew
    for each batch.

    The draws come from PyTorch's generator for the CPU, which a saved run keeps. With both kinds
    on, each batch gets one of them, with equal chances. With neither, a batch stays as it is, and
    nothing is drawn. Of several processes each mixes its own part of a batch.

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
        share = draw_share(self.cutmix if cuts else self.mixup)  # of the image itself
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


def draw_share(alpha: float) -> float:
    """From Beta(alpha, alpha): how much the first of two gamma variables is of their sum.

    In logarithms, since for a small alpha both are nearly 0: there PyTorch's own Beta, which
    should be near 0 or 1, is 0.5.
    """
    one = torch.ones(2, dtype=torch.float64)
    # Gamma(alpha) is Gamma(alpha + 1) times U^(1 / alpha) (Marsaglia and Tsang, 2000, section 6).
    logs = Gamma(1 + alpha * one, one).sample().log() + torch.rand_like(one).log() / alpha
    return (logs[0] - logs[1]).sigmoid().item()


def draw_rectangle(area: float, height: int, width: int) -> tuple[slice, slice, float]:
    """Rows and columns of a rectangle, and the share of the image that lies outside of it.

    It has the image's proportions and `area` of its area, about a centre drawn anywhere in it; what
    would lie outside the image is cut off (CutMix, section 3.1).
    """

    def extent(length: int) -> slice:
        centre, half = torch.rand(()).item() * length, math.sqrt(area) * length / 2
        return slice(max(0, round(centre - half)), min(length, round(centre + half)))

    rows, columns = extent(height), extent(width)
    replaced = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, 1 - replaced / (height * width)
