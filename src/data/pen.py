"""What changes strokes, and what draws foreign ones over them, for amounts drawn elsewhere.

Images are (B, C, S, S) in [0, 1], and strokes lighter than what they are drawn on, as MNIST's are.
Every function returns new images in [0, 1]. Lengths are in pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from data.colour import per_image


def dilate(images: Tensor) -> Tensor:
    """Each pixel becomes the lightest of the 3 x 3 around it."""
    # Maxima of shifted images are fifteen times as fast as max_pool2d on a CPU.
    wide = F.pad(images, (1,) * 4, value=-math.inf)
    rows = torch.maximum(torch.maximum(wide[:, :, :-2], wide[:, :, 1:-1]), wide[:, :, 2:])
    return torch.maximum(torch.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


def erode(images: Tensor) -> Tensor:
    """Each pixel becomes the darkest of the 3 x 3 around it."""
    return -dilate(-images)


def thicken(images: Tensor, radius: Tensor) -> Tensor:
    """Strokes get wider by a radius (B,) of 0 to 2 pixels; a part of a pixel is blended in."""
    images = images.lerp(dilate(images), per_image(radius.clamp(max=1)))
    return images.lerp(dilate(images), per_image((radius - 1).clamp(min=0)))


def thin(images: Tensor, share: Tensor) -> Tensor:
    """Strokes lose a share (B,) of their outermost pixel, but not all that they are.

    What an erosion would wipe out altogether, a line of one or two pixels, stays: it is what the
    opening removes (as in the skeletons of Lantuéjoul, 1980).
    """
    core = erode(images)
    return images.lerp(torch.maximum(core, images - dilate(core)), per_image(share))


def outline(images: Tensor, share: Tensor, inside: Tensor) -> Tensor:
    """A share (B,) of the light becomes that of the strokes' contours.

    Args:
        inside: (B,), from 0 to 1: how much of a stroke's own rim belongs to its contour, which lies
            around it (the morphological gradient at 1).
    """
    core = images.lerp(erode(images), per_image(inside))
    return images.lerp(dilate(images) - core, per_image(share))


def straight_stroke(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How straight a stroke each image shows, where its upper end is, and which way it goes on.

    Returns:
        The variance (B,) of the light across its main axis as a share of that along it, 0 in a
        line and 1 in a circle; the upper end (B, 2), x and y, the first pixel of half the greatest
        light; the direction (B,) in radians from there to the middle of the light, y downwards.
    """
    side = images.shape[-1]
    light = images.amax(dim=1)  # (B, S, S)
    inked = (light >= light.amax(dim=(1, 2), keepdim=True) / 2).flatten(1)
    first = inked.byte().argmax(dim=1)
    end = torch.stack((first % side, first // side), dim=1).to(images.dtype)
    light = light / light.sum(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    in_columns, in_rows = light.sum(dim=1), light.sum(dim=2)  # (B, S) each
    pixels = torch.arange(side, device=images.device, dtype=images.dtype)
    middle = torch.stack((in_columns @ pixels, in_rows @ pixels), dim=1)  # (B, 2)
    x, y = (pixels - middle.unsqueeze(2)).unbind(dim=1)  # (B, S) each
    xx, yy = (in_columns * x**2).sum(dim=1), (in_rows * y**2).sum(dim=1)
    xy = (light * y.unsqueeze(2) * x.unsqueeze(1)).sum(dim=(1, 2))
    # The eigenvalues of the covariance [[xx, xy], [xy, yy]].
    mean, half_gap = (xx + yy) / 2, torch.hypot((xx - yy) / 2, xy)
    width = (mean - half_gap) / (mean + half_gap).clamp(min=1e-6)
    way = middle - end
    return width, end, torch.atan2(way[:, 1], way[:, 0])


def path(
    middle: Tensor,
    angle: Tensor,
    length: Tensor,
    bend: Tensor,
    zigzag: Tensor,
    period: Tensor,
    count: int,
) -> Tensor:
    """Points along strokes, evenly from end to end: (..., count, 2), x and y.

    Args:
        middle: (..., 2), x and y.
        angle: (...), of the line from one end to the other, in radians; so are all that follow.
        bend: how far the middle lies beside that line; the stroke is a part of a parabola.
        zigzag: how far teeth stand out on either side.
        period: distance from tooth to tooth.
    """
    t = torch.linspace(-0.5, 0.5, count, device=middle.device)  # (count,)
    along = t * length.unsqueeze(-1)  # (..., count)
    teeth = 4 * ((along / period.unsqueeze(-1)).remainder(1) - 0.5).abs() - 1
    beside = bend.unsqueeze(-1) * (1 - 4 * t**2) + zigzag.unsqueeze(-1) * teeth
    cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
    offset = torch.stack((cos * along - sin * beside, sin * along + cos * beside), dim=-1)
    return middle.unsqueeze(-2) + offset


def draw_strokes(
    images: Tensor, points: Tensor, ink: Tensor, spread: Tensor, shades: Tensor
) -> Tensor:
    """Draw M strokes over each image, one over the other, each a row of K soft dots.

    A pixel takes on a stroke's shade as far as the dots' ink there adds up, at most to 1.

    Args:
        points: (B, M, K, 2), x and y; (0, 0) is the middle of the first pixel.
        ink: (B, M, K), of each dot, in its middle; it falls off as a Gaussian.
        spread: (B, M), that Gaussian's standard deviation.
        shades: (B, M, C).
    """
    pixels = torch.arange(images.shape[-1], device=images.device)
    scale = -0.5 / spread.view(*spread.shape, 1, 1, 1) ** 2
    # Below -30 there is no ink to be seen, and exp gets ten times as slow where it underflows.
    depths = (scale * (points.unsqueeze(-1) - pixels).square()).clamp_(min=-30)
    columns, rows = depths.exp_().unbind(dim=3)
    # (B, M, S, K) @ (B, M, K, S): a Gaussian is the product of one in x and one in y.
    covers = (rows.transpose(2, 3) @ (ink.unsqueeze(3) * columns)).clamp_(max=1)
    for cover, shade in zip(covers.unbind(dim=1), shades.unbind(dim=1), strict=True):
        images = images.lerp(shade.unsqueeze(2).unsqueeze(3), cover.unsqueeze(1))
    return images
