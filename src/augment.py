"""Random changes to training images, for a whole batch at once on the device it lies on."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RandomAffine:
    """Rotate about the centre, then shift, each image by its own random amounts.

    Both are one bilinear resampling; what comes in from outside the image is 0. Nothing is ever
    mirrored: a flipped 6 or 9 is not a digit of its class.

    Args:
        degrees: rotation is uniform in [-degrees, degrees].
        translate: the shift along each side is uniform in [-translate, translate] of its length.
    """

    degrees: float = 7.0
    translate: float = 0.1

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shape: float (B, C, S, S) -> the same, with the background at 0."""
        uniform = torch.rand(images.shape[0], 3, device=images.device, generator=generator) * 2 - 1
        angle = uniform[:, 0] * math.radians(self.degrees)
        shift = uniform[:, 1:] * 2 * self.translate  # an image is 2 wide in affine_grid's units
        return resample(images, angle, shift)


def resample(images: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Rotate images counter-clockwise by `angle`, then move them right and down by `shift`.

    Args:
        images: (B, C, S, S).
        angle: (B,), in radians.
        shift: (B, 2), x and y, in half image sides.
    """
    # affine_grid wants the way back, from a place in the result to its source: R^T (place - shift).
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack((cos, -sin, sin, cos), dim=1).view(-1, 2, 2)
    matrix = torch.cat((back, -back @ shift.unsqueeze(-1)), dim=2)  # (B, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)
