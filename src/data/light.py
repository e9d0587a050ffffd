"""What light, a lens and a sensor make of images, for amounts drawn elsewhere.

Images are (B, C, S, S) in [0, 1]; every function returns new ones in [0, 1] but `convolve`, whose
kernels decide that. Lengths are in pixels. colour.py has more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.colour import autocontrast, per_image


def relight(images: Tensor, exponent: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """offset + gain pixel^exponent, with (B,) of each; gain and offset add up to at most 1."""
    return per_image(offset) + per_image(gain) * images ** per_image(exponent)


def add_light(images: Tensor, light: Tensor) -> Tensor:
    """Images with a share of white put over them, (B, 1, S, S): what is white stays white."""
    return images + light * (1 - images)


def uneven(values: Tensor, side: int) -> Tensor:
    """A smooth field of `side` x `side` pixels through values (B, 1, G, G), from corner to corner,
    by bilinear interpolation: (B, 1, side, side).
    """
    return F.interpolate(values, size=side, mode="bilinear", align_corners=True)


def invert(images: Tensor, where: Tensor) -> Tensor:
    """Light becomes dark in the shares `where`, (B, 1, S, S) in [0, 1]."""
    return images + where * (1 - 2 * images)


def stripe(side: int, angle: Tensor, middle: Tensor, width: Tensor) -> Tensor:
    """How much of each pixel lies in a straight stripe: (B, 1, side, side) in [0, 1].

    Args:
        angle: (B,), of the direction across the stripe, in radians.
        middle: (B,), how far in that direction its middle is from the image's.
        width: (B,).
    """
    pixels = torch.arange(side, device=angle.device) - (side - 1) / 2
    across = per_image(angle.cos()) * pixels + per_image(angle.sin()) * pixels.unsqueeze(1)
    return (per_image(width / 2) + 0.5 - (across - per_image(middle)).abs()).clamp_(0, 1)


def gaussian_kernels(angle: Tensor, along: Tensor, across: Tensor, size: int) -> Tensor:
    """Gaussians with a standard deviation `along` a direction and another `across` it, each (B,),
    in an odd number of pixels: (B, size, size), each adding up to 1.
    """
    pixels = torch.arange(size, device=angle.device) - size // 2
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    x, y = pixels, pixels.unsqueeze(1)
    squares = ((cos * x + sin * y) / along.view(-1, 1, 1)) ** 2
    squares = squares + ((cos * y - sin * x) / across.view(-1, 1, 1)) ** 2
    kernels = torch.exp(-0.5 * squares)
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image by its own kernels; beyond the border stands the outermost pixel.

    Args:
        kernels: (B, C, C, k, k), with odd k: from which channels each is made; or (B, C, 1, k, k),
            where each is made from itself.
    """
    B, C = images.shape[:2]
    padded = F.pad(images, (kernels.shape[-1] // 2,) * 4, mode="replicate")
    # All images as the channels of one, in groups that see only each other.
    weight, groups = kernels.flatten(0, 1), B * C // kernels.shape[2]
    return F.conv2d(padded.view(1, B * C, *padded.shape[2:]), weight, groups=groups).view_as(images)


def random_convolution(images: Tensor, kernels: Tensor, share: Tensor) -> Tensor:
    """A share (B,) of each image replaced by its convolution with kernels (B, C, C, k, k), whose
    channels are stretched to [0, 1].

    Source: Xu et al., "Robust and Generalizable Visual Representation Learning via Random
    Convolutions" (2021), who leave the range as it comes out.
    """
    return images.lerp(autocontrast(convolve(images, kernels)), per_image(share)).clamp_(0, 1)


def add_noise(images: Tensor, noise: Tensor, deviation: Tensor, power: Tensor) -> Tensor:
    """Noise of deviation (B,) times pixel^power (B,): 0 the same everywhere, 0.5 as of counted
    photons, 1 in proportion to the light.

    Args:
        noise: (B, C, S, S), of mean 0 and variance 1.
    """
    light = images.clamp(min=0) ** per_image(power)  # rounding may have left a little below 0
    return (images + per_image(deviation) * light * noise).clamp_(0, 1)


def replace_pixels(images: Tensor, uniform: Tensor, share: Tensor) -> Tensor:
    """Impulses: a share (B,) of the pixels become another grey, a quarter of them black and a
    quarter white.

    Args:
        uniform: (B, 2, S, S), random in [0, 1): whether, and the value.
    """
    whether, value = uniform.split(1, dim=1)
    return torch.where(whether < per_image(share), (2 * value - 0.5).clamp(0, 1), images)
