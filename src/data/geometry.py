"""What moves, mirrors or covers the pixels of a batch of images, for amounts drawn elsewhere."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def hflip(images: Tensor, whether: Tensor) -> Tensor:
    """Mirror the images (B, C, S, S) for which bool (B,) holds, left to right."""
    return torch.where(whether.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: Tensor, corner: Tensor, pad: int) -> Tensor:
    """Widen images by `pad` pixels on every side, as a mirror there would show them, and cut their
    own size out of that.

    Args:
        images: (B, C, S, S), with S above `pad`.
        corner: int64 (B, 2), the window's top and left in the widened image, 0 to 2 pad.
    """
    side = images.shape[-1]
    # Views of all windows, (B, C, 2 pad + 1, 2 pad + 1, S, S), of which one an image is copied.
    windows = F.pad(images, (pad,) * 4, mode="reflect").unfold(2, side, 1).unfold(3, side, 1)
    number = torch.arange(len(images), device=images.device)
    return windows[number, :, corner[:, 0], corner[:, 1]]


def resample(
    images: Tensor,
    angle: Tensor,
    shift: Tensor,
    factor: Tensor | None = None,
    slant: Tensor | None = None,
    field: Tensor | None = None,
    slant_y: Tensor | None = None,
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
        slant_y: (B,), how far a line of width 1 sinks towards its right end; None is 0.
    """
    # affine_grid wants the inverse, from a point of the result to its source:
    # (rotation slant slant_y factor)^-1 (point - shift).
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack((cos, -sin, sin, cos), dim=1).view(-1, 2, 2)
    if slant is not None:
        one, zero = torch.ones_like(slant), torch.zeros_like(slant)
        back = torch.stack((one, -slant, zero, one), dim=1).view(-1, 2, 2) @ back
    if slant_y is not None:
        one, zero = torch.ones_like(slant_y), torch.zeros_like(slant_y)
        back = torch.stack((one, zero, -slant_y, one), dim=1).view(-1, 2, 2) @ back
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


def erase(
    images: Tensor, uniform: Tensor, probability: float, fill: Tensor | float = 0.0
) -> Tensor:
    """Fill a rectangle in a share of `probability` of the images.

    Its area is 2 to 20 % of the image, its height over its width 0.3 to 1 / 0.3, in log scale, as
    far as that fits into the image, and it lies anywhere in it.

    Args:
        images: (B, C, S, S).
        uniform: (B, 5), random in [0, 1): whether, area, ratio, position in y and x.
        fill: the value that it gets, or one for each image and channel, (B, C, 1, 1).
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
    return torch.where(hit.unsqueeze(1), fill, images)
