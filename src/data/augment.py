"""Random changes to training images, for a whole batch at once on the device it lies on.

Here the amounts are drawn; what they do to the images is in geometry.py, colour.py and
rand_augment.py. Changes of light and stroke, of which an image meets few, are drawn in disturb.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.colour import color_jitter
from data.disturb import FAMILIES, disturb
from data.geometry import erase, hflip, random_crop, resample, smooth
from data.rand_augment import CHANGES, rand_augment

ELASTIC_SIGMA = 4.0  # pixels; Simard et al. found 4 the best for 29x29 images of digits


@dataclass(frozen=True)
class Augment:
    """Change each image by its own random amounts.

    In this order: it is mirrored and cropped; turned, moved, scaled, sheared and bent, all of that
    by one bilinear resampling, where 0 comes in from outside; its colours vary; RandAugment; light
    and strokes change; a rectangle is erased. A strength of 0 leaves its change out, which then
    draws nothing (but for `rotate` and `translate`), so that a seed gives the same batches as
    before there was this change. The defaults are the published recipe's.

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
        hflip: the probability that an image is mirrored left to right. Not for digits: a mirrored
            2 is not a digit.
        random_crop: an image is widened by so many reflected pixels on every side, and a window of
            its own size cut out anywhere in that; below the image's side.
        color_jitter: the factors of brightness, contrast and saturation, applied in this order, are
            each uniform in [1 - color_jitter, 1 + color_jitter]; below 1.
        rand_augment: so many changes to each image, drawn from those of rand_augment.py.
        stroke, serif, marks, background, light, invert, rand_conv, blur, noise: the probability
            that an image meets one of this family's changes, of a strength that is drawn; see
            disturb.py.
        keep_clean: the share of images that meets none of these nine.
        augmix: the share of the others that are mixtures of versions, which meet them each on its
            own.
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
    stroke: float = 0.0
    serif: float = 0.0
    marks: float = 0.0
    background: float = 0.0
    light: float = 0.0
    invert: float = 0.0
    rand_conv: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    keep_clean: float = 0.0
    augmix: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Of the families of disturb.py, those that are on."""
        return {name: share for name in FAMILIES if (share := getattr(self, name))}

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shape: float (B, C, S, S) in [0, 1] -> the same. The generator is on their device."""
        on_device = {"device": images.device, "generator": generator}

        def uniform(*shape: int) -> Tensor:
            return torch.rand(len(images), *shape, **on_device)

        def symmetric(*shape: int) -> Tensor:
            return uniform(*shape) * 2 - 1

        def below(end: int, *shape: int) -> Tensor:
            return torch.randint(end, (len(images), *shape), **on_device)

        if self.hflip:
            images = hflip(images, uniform() < self.hflip)
        if self.random_crop:
            images = random_crop(images, below(2 * self.random_crop + 1, 2), self.random_crop)
        drawn = symmetric(3)  # angle, shift in x and y: drawn even where they are off, as ever
        angle = drawn[:, 0] * math.radians(self.rotate)
        shift = drawn[:, 1:] * 2 * self.translate  # an image is 2 wide in affine_grid's units
        factor = 1 + symmetric() * self.scale if self.scale else None
        slant = (symmetric() * math.radians(self.shear)).tan() if self.shear else None
        field = None
        if self.elastic:
            side = images.shape[-1]
            noise = torch.randn((len(images), 2, side, side), **on_device)
            field = smooth(noise, ELASTIC_SIGMA) * (self.elastic * 2 / side)
        if self.rotate or self.translate or self.scale or self.shear or self.elastic:
            images = resample(images, angle, shift, factor, slant, field)
        if self.color_jitter:
            images = color_jitter(images, 1 + symmetric(3) * self.color_jitter)
        if self.rand_augment:
            which = below(len(CHANGES), self.rand_augment)
            images = rand_augment(images, which, symmetric(self.rand_augment))
        if shares := self.shares:
            images = disturb(images, shares, generator, self.keep_clean, self.augmix)
        return erase(images, uniform(5), self.erase) if self.erase else images
