"""Disturbances: what a pen, other pens, light, a lens and a sensor do to training images.

Here it is drawn which of them an image meets, and how strongly; pen.py and light.py do it.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from data.colour import per_image, sharpness
from data.geometry import erase
from data.light import (
    add_light,
    add_noise,
    convolve,
    gaussian_kernels,
    invert,
    random_convolution,
    relight,
    replace_pixels,
    stripe,
    uneven,
)
from data.pen import draw_strokes, outline, path, straight_stroke, thicken, thin

STRAIGHT = 0.08  # below it straight_stroke's answer means a straight stroke: 95 % of MNIST's 1s are
CHAINS = 3  # that --augmix mixes
STROKES, POINTS = 6, 40  # foreign strokes drawn over an image at most; dots that make up one


class Draw(NamedTuple):
    """Random numbers for `count` images."""

    count: int
    generator: torch.Generator

    def __call__(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        """Uniform in [low, high): (count, *shape)."""
        device = self.generator.device
        drawn = torch.rand(self.count, *shape, generator=self.generator, device=device)
        return low + (high - low) * drawn

    def normal(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.randn(self.count, *shape, generator=self.generator, device=device)


# ----------------------------------------------------------------------- a kind with its strengths


def _dense_ink(length: Tensor, spread: Tensor) -> Tensor:
    """Each dot's ink in strokes (n, M): (n, M, POINTS). Where the dots lie dense, each has less, so
    that a stroke is as wide as its pen.
    """
    return ((length / spread + 2.5) / POINTS).unsqueeze(2).expand(-1, -1, POINTS)


def flag(images: Tensor, draw: Draw) -> Tensor:
    """A stroke from the upper end down to the left, of 10 to 35 % of the image's side, where the
    image shows one straight stroke: so many hands write a 1. Both are 25 to 60 degrees apart; more
    would make a 7. Other images stay.
    """
    width, end, way = straight_stroke(images)
    spread, length = draw(0.6, 1.1, 1), images.shape[-1] * draw(0.1, 0.35, 1)
    angle = way.unsqueeze(1) + draw(math.radians(25), math.radians(60), 1)
    middle = end.unsqueeze(1) + length.unsqueeze(2) / 2 * torch.stack((angle.cos(), angle.sin()), 2)
    none, period = torch.zeros_like(length), torch.ones_like(length)
    points = path(middle, angle, length, draw(-0.1, 0.1, 1) * length, none, period, POINTS)
    ink = _dense_ink(length, spread) * (width < STRAIGHT).view(-1, 1, 1)
    return draw_strokes(images, points, ink, spread, images.amax(dim=(2, 3)).unsqueeze(1))


def scribble(images: Tensor, draw: Draw) -> Tensor:
    """One to six foreign strokes of any shade: spots, lines, arcs and zigzags, a half of them
    dashed or dotted, anywhere.
    """
    channels, side = images.shape[1:3]
    length = 1.3 * side * draw(0, 1, STROKES) ** 2
    spread = draw(0.4, 1.1, STROKES)
    bend = draw(-0.3, 0.3, STROKES) * length
    zigzag = draw(-8, 4, STROKES).clamp(min=0)  # none in two of three
    where = draw(0, side - 1, STROKES, 2), draw(0, 2 * math.pi, STROKES)
    points = path(*where, length, bend, zigzag, draw(3, 9, STROKES), POINTS)
    ink = _dense_ink(length, spread)
    along = torch.linspace(0, 1, POINTS, device=images.device) * length.unsqueeze(2)
    dash, gap = draw(3, 9, STROKES, 1), draw(0.2, 1.8, STROKES, 1)
    ink = ink * ((along / dash).remainder(1) < gap)
    number = torch.arange(STROKES, device=images.device)
    ink = ink * (number < draw(1, STROKES + 1, 1).floor()).unsqueeze(2)
    return draw_strokes(images, points, ink, spread, 1 - draw(0, 1, STROKES, channels) ** 2)


def cover(images: Tensor, draw: Draw) -> Tensor:
    """A rectangle of 2 to 20 % of the image becomes one colour, any."""
    return erase(images, draw(0, 1, 5), 1.0, fill=draw(0, 1, images.shape[1], 1, 1))


def dim(images: Tensor, draw: Draw) -> Tensor:
    """Gamma, then a share of the contrast, anywhere between black and white."""
    gain = draw(0.12, 1)
    return relight(images, draw(-1, 1).exp(), gain, (1 - gain) * draw())


def lit(cells: int) -> Callable[[Tensor, Draw], Tensor]:
    """Uneven light, drawn independently at `cells` x `cells` places."""

    def change(images: Tensor, draw: Draw) -> Tensor:
        values = draw(0, 1, 1, cells, cells) * per_image(draw(0.2, 0.95))
        return add_light(images, uneven(values, images.shape[-1]))

    return change


def invert_part(images: Tensor, draw: Draw) -> Tensor:
    """Light becomes dark in a straight stripe of any direction, which may reach beyond the image on
    one side.
    """
    side = images.shape[-1]
    middle, width = draw(-0.6, 0.6) * side, draw(0.15, 1) * side
    return invert(images, stripe(side, draw(0, 2 * math.pi), middle, width))


def blur(images: Tensor, draw: Draw) -> Tensor:
    """A Gaussian, longer in one direction."""
    along = draw(0.4, 2.2)
    kernels = gaussian_kernels(draw(0, math.pi), along, (along * draw(0.2, 1)).clamp(min=0.3), 9)
    each = kernels.view(-1, 1, 1, 9, 9).expand(-1, images.shape[1], -1, -1, -1)
    return convolve(images, each).clamp_(0, 1)


def random_conv(images: Tensor, draw: Draw) -> Tensor:
    channels = images.shape[1]
    return random_convolution(images, draw.normal(channels, channels, 3, 3), draw())


def even_noise(images: Tensor, draw: Draw) -> Tensor:
    deviation = draw(0.02, 0.4)
    return add_noise(images, draw.normal(*images.shape[1:]), deviation, torch.zeros_like(deviation))


def shot_noise(images: Tensor, draw: Draw) -> Tensor:
    return add_noise(images, draw.normal(*images.shape[1:]), draw(0.1, 0.7), draw(0.5, 1))


def impulses(images: Tensor, draw: Draw) -> Tensor:
    return replace_pixels(images, draw(0, 1, 2, *images.shape[2:]), draw(0.01, 0.25))


# The families, each a flag, in the order in which a picture comes about: pen, paper, light, lens,
# sensor. An image that meets a family meets one of its kinds, each as often.
FAMILIES: dict[str, dict[str, Callable[[Tensor, Draw], Tensor]]] = {
    "stroke": {
        "thicker": lambda images, draw: thicken(images, draw(0.2, 2)),
        "thinner": lambda images, draw: thin(images, draw(0.2, 1)),
        "outline": lambda images, draw: outline(images, draw(0.3, 1), draw()),
    },
    "serif": {"flag": flag},
    "marks": {"scribble": scribble, "cover": cover},
    "background": {"slope": lit(2), "clouds": lit(3), "small clouds": lit(6)},
    "light": {"dim": dim},
    "invert": {
        "inverted": lambda images, draw: invert(images, per_image(draw(0.8, 1))),
        "part": invert_part,
    },
    "rand_conv": {"mixed in": random_conv},
    "blur": {
        "blurred": blur,
        "sharpened": lambda images, draw: sharpness(images, draw(1.5, 6)),
    },
    "noise": {"even": even_noise, "shot": shot_noise, "impulses": impulses},
}


# ---------------------------------------------------------------------------------- which of them


def disturb(
    images: Tensor,
    shares: Mapping[str, float],
    generator: torch.Generator,
    keep_clean: float = 0.0,
    augmix: float = 0.0,
) -> Tensor:
    """Disturb each image by what it draws.

    Args:
        images: (B, C, S, S) in [0, 1].
        shares: above 0: the probability with which a version of an image meets each family.
        keep_clean: the share of images that none of it touches.
        augmix: the share of the others that are mixed from several versions; see `mixture`.
    """
    place = Draw(len(images), generator)()
    ends = keep_clean, keep_clean + (1 - keep_clean) * augmix
    clean, before = torch.stack([(place < end).sum() for end in ends]).tolist()
    _, mixed, plain = place.argsort().split([clean, before - clean, len(images) - before])
    versions = images[torch.cat((plain, mixed.repeat(CHAINS)))]
    disturb_all(versions, shares, generator)
    changed = images.clone()
    changed[plain] = versions[: len(plain)]
    if len(mixed):
        several = versions[len(plain) :].unflatten(0, (CHAINS, -1))
        changed[mixed] = mixture(images[mixed], several, Draw(len(mixed), generator))
    return changed


def disturb_all(images: Tensor, shares: Mapping[str, float], generator: torch.Generator) -> None:
    """Take each image, in place, through one kind of each family that it meets."""
    kinds = [list(FAMILIES[name].values()) for name in shares]
    scale = [len(own) / share for own, share in zip(kinds, shares.values(), strict=True)]
    drawn = Draw(len(images), generator)(0, 1, len(kinds))
    # (families, n): the number of the kind; where it is beyond the last, the image meets none.
    number = (drawn.T * torch.tensor(scale, device=images.device).unsqueeze(1)).long()
    # Only the images of a kind go through it. Python needs to know how many they are, and waits for
    # a GPU only here and in `disturb`.
    numbers = torch.arange(max(map(len, kinds)), device=images.device)
    sizes = (number.unsqueeze(2) == numbers).sum(dim=1).tolist()
    orders = number.argsort(dim=1, stable=True)
    for own, order, counts in zip(kinds, orders, sizes, strict=True):
        counts = counts[: len(own)]
        for change, rows in zip(own, order[: sum(counts)].split(counts), strict=True):
            if len(rows):
                images[rows] = change(images[rows], Draw(len(rows), generator))


def mixture(images: Tensor, versions: Tensor, draw: Draw) -> Tensor:
    """Each image and the mean of its versions, in a share that is uniform; so are the weights in
    that mean, among all that add up to 1.

    Source: Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and
    Uncertainty" (2020), algorithm 1, without its loss on the versions' agreement.

    Args:
        images: (n, C, S, S).
        versions: (V, n, C, S, S).
    """
    weights = -torch.log1p(-draw(0, 1, len(versions)))  # as of Dirichlet(1, ..., 1), not yet to 1
    weights = (weights / weights.sum(dim=1, keepdim=True)).T
    mean = (weights.reshape(*weights.shape, 1, 1, 1) * versions).sum(dim=0)
    return mean.lerp(images, per_image(draw()))
