"""RandAugment: a few changes to each image, drawn from fourteen (Cubuk et al., "RandAugment:
Practical automated data augmentation with a reduced search space", 2020).
"""

import math

import torch
from torch import Tensor

from data.colour import (
    autocontrast,
    brightness,
    contrast,
    equalize,
    posterize,
    saturation,
    sharpness,
    solarize,
)
from data.geometry import resample

# The fourteen, with what a strength s between -1 and 1 means. The largest are magnitude 18 of the
# paper's 30, as torchvision scales them: so the mean strength is that of its usual magnitude 9.
MOVES = {  # at s = 1; what comes in from outside is 0
    "rotate": math.radians(18),
    "shear_x": 0.18,
    "shear_y": 0.18,
    "translate_x": 0.27,  # of the image's side
    "translate_y": 0.27,
}
COLOURS = {
    "brightness": lambda images, s: brightness(images, 1 + 0.54 * s),
    "contrast": lambda images, s: contrast(images, 1 + 0.54 * s),
    "colour": lambda images, s: saturation(images, 1 + 0.54 * s),
    "sharpness": lambda images, s: sharpness(images, 1 + 0.54 * s),
    "posterize": lambda images, s: posterize(images, 8 - (2.4 * s.abs()).round()),  # 6 to 8 bits
    "solarize": lambda images, s: solarize(images, 1 - 0.6 * s.abs()),
    "autocontrast": lambda images, s: autocontrast(images),
    "equalize": lambda images, s: equalize(images),
}
CHANGES = ("identity", *MOVES, *COLOURS)


def rand_augment(images: Tensor, which: Tensor, strength: Tensor) -> Tensor:
    """Change each image N times.

    Args:
        images: (B, C, S, S) in [0, 1].
        which: int64 (B, N), numbers of `CHANGES`.
        strength: (B, N), in [-1, 1].
    """
    images = images.clone()
    # An image goes through the changes that it drew, not through all: each round's images are
    # grouped by change. Python needs to know the groups' sizes, and waits for a GPU only here.
    groups = which.argsort(dim=0).unbind(dim=1)
    numbers = torch.arange(len(CHANGES), device=which.device)
    sizes = (which.unsqueeze(2) == numbers).sum(dim=0).tolist()  # N lists
    for n, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        moved = 1 + len(MOVES)
        _, to_move, *others = group.split([size[0], sum(size[1:moved]), *size[moved:]])
        if len(to_move):
            images[to_move] = move(images[to_move], which[to_move, n], strength[to_move, n])
        for change, rows in zip(COLOURS.values(), others, strict=True):
            if len(rows):
                images[rows] = change(images[rows], strength[rows, n])
    return images


def move(images: Tensor, which: Tensor, strength: Tensor) -> Tensor:
    """Each image through the one of `MOVES` that it drew, all by one resampling; which: (B,)."""
    amounts = [
        strength * most * (which == number) for number, most in enumerate(MOVES.values(), start=1)
    ]
    angle, slant, slant_y, right, down = amounts
    shift = 2 * torch.stack((right, down), dim=1)  # in half sides
    return resample(images, angle, shift, slant=slant, slant_y=slant_y)
