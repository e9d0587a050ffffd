"""Random changes to training images, for a whole batch at once on the device it lies on."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ELASTIC_SIGMA = 4.0  # pixels; Simard et al. found 4 the best for 29x29 images of digits


@dataclass(frozen=True)
class Augment:
    """Turn, move, scale, shear, bend and erase parts of each image by its own random amounts.

    All that moves pixels is one bilinear resampling; what comes in from outside the image is 0.
    Nothing is ever mirrored: a flipped 6 or 9 is not a digit of its class. Every strength may be 0,
    which leaves that change out; the defaults are the published ones.

    Args:
        rotate: rotation is uniform in [-rotate, rotate] degrees.
        translate: the shift along each side is uniform in [-translate, translate] of its length.
        scale: the factor is uniform in [1 - scale, 1 + scale]; below 1.
        shear: the slant of the vertical lines is uniform in [-shear, shear] degrees; below 90.
        elastic: each pixel moves by a smooth random field with this standard deviation along each
            axis, in pixels (Simard et al., "Best Practices for Convolutional Neural Networks
            Applied to Visual Document Analysis", 2003).
        erase: the probability that a rectangle of 2 to 20 % of the image becomes 0 (Zhong et al.,
            "Random Erasing Data Augmentation", 2020).
    """

    rotate: float = 7.0
    translate: float = 0.1
    scale: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    erase: float = 0.0
    hflip: float = 0.0
    random_crop: int = 0
    color_jitter: float = 0.0
    rand_augment: int = 0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shape: float (B, C, S, S) -> the same, with the background at 0."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(len(images), *shape, device=images.device, generator=generator)

        def symmetric(*shape: int) -> Tensor:
            return uniform(*shape) * 2 - 1

        drawn = symmetric(3)  # angle, shift in x and y
        angle = drawn[:, 0] * math.radians(self.rotate)
        shift = drawn[:, 1:] * 2 * self.translate  # an image is 2 wide in affine_grid's units
        factor = 1 + symmetric() * self.scale if self.scale else None
        slant = (symmetric() * math.radians(self.shear)).tan() if self.shear else None
        field = None
        if self.elastic:
            side = images.shape[-1]
            noise = torch.randn(
                (len(images), 2, side, side), device=images.device, generator=generator
            )
            field = smooth(noise, ELASTIC_SIGMA) * (self.elastic * 2 / side)
        if self.rotate or self.translate or self.scale or self.shear or self.elastic:
            images = resample(images, angle, shift, factor, slant, field)
        return erase(images, uniform(5), self.erase) if self.erase else images


def resample(
    images: Tensor,
    angle: Tensor,
    shift: Tensor,
    factor: Tensor | None = None,
    slant: Tensor | None = None,
    field: Tensor | None = None,
) -> Tensor:
    """Scale images about their centre, slant and turn them, move them, then bend them, all at once.

    Args:
        images: (B, C, S, S).
        angle: (B,), counter-clockwise, in radians.
        shift: (B, 2), to the right and down, in half image sides.
        factor: (B,), above 1 enlarges; None is 1.
        slant: (B,), how far a line of height 1 leans to the left at its top; None is 0.
        field: (B, 2, S, S), x and y, in half image sides: a pixel is read from so far to the right
            and below of where it would be; None is 0.
    """
    # affine_grid wants the inverse, from a point of the result to its source:
    # (rotation slant factor)^-1 (point - shift).
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack((cos, -sin, sin, cos), dim=1).view(-1, 2, 2)
    if slant is not None:
        one, zero = torch.ones_like(slant), torch.zeros_like(slant)
        back = torch.stack((one, -slant, zero, one), dim=1).view(-1, 2, 2) @ back
    if factor is not None:
        back = back / factor.view(-1, 1, 1)
    matrix = torch.cat((back, -back @ shift.unsqueeze(-1)), dim=2)  # (B, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)  # (B, S, S, 2)
    if field is not None:
        grid = grid + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def smooth(noise: Tensor, sigma: float) -> Tensor:
    """Blur (..., S, S) noise with a Gaussian of `sigma` pixels, taken as 0 outside.

    The weights are scaled so that independent values of variance 1 keep it, at the border as well.
    """
    pixels = torch.arange(noise.shape[-1], dtype=noise.dtype, device=noise.device)
    weights = torch.exp(-((pixels - pixels.unsqueeze(1)) ** 2) / (2 * sigma**2))  # (S, S)
    weights = weights / weights.norm(dim=1, keepdim=True)
    return weights @ noise @ weights.T


def erase(images: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Set a rectangle to 0 in a share of `probability` of the images.

    Its area is 2 to 20 % of the image, its height over its width 0.3 to 1 / 0.3, in log scale, as
    far as that fits into the image, and it lies anywhere in it.

    Args:
        images: (B, C, S, S).
        uniform: (B, 5), random in [0, 1): whether, area, ratio, position in y and x.
    """
    side = images.shape[-1]
    whether, area, ratio, y, x = uniform.unbind(dim=1)
    area = (0.02 + 0.18 * area) * side**2
    ratio = torch.exp((2 * ratio - 1) * math.log(1 / 0.3))
    height = (area * ratio).sqrt().round().clamp(1, side)
    width = (area / ratio).sqrt().round().clamp(1, side)
    top, left = (y * (side - height + 1)).floor(), (x * (side - width + 1)).floor()
    pixels = torch.arange(side, device=images.device)

    def inside(start: Tensor, length: Tensor) -> Tensor:  # (B, S)
        return (pixels >= start.unsqueeze(1)) & (pixels < (start + length).unsqueeze(1))

    hit = inside(top, height).unsqueeze(2) & inside(left, width).unsqueeze(1)  # (B, S, S)
    hit &= (whether < probability).view(-1, 1, 1)
    return images.masked_fill(hit.unsqueeze(1), 0.0)
