"""The kinds of change that benchmarks/robustness.py scores a model on: one table.

The strengths were set by eye, so that a person still reads nearly every digit, and on training and
validation images, so that each kind costs the first pretrained model something. Its accuracy on
held-out kinds was looked at for nothing else.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import changes

CHUNK = 500  # images changed at once; each chunk has random numbers of its own


class Kind(NamedTuple):
    """A kind of change: what it is akin to, which half of the suite it is in, and how strong."""

    family: str
    half: str  # "choosing": to choose a recipe with; "held-out": to score the chosen one once
    change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    strength: float  # in the unit that the function's docstring names


KINDS = {
    "low contrast": Kind("light", "choosing", changes.low_contrast, 0.85),
    "dark on light": Kind("light", "choosing", changes.dark_on_light, 0.5),
    "light from a side": Kind("light", "choosing", changes.side_light, 0.8),
    "vignette": Kind("light", "choosing", changes.vignette, 0.75),
    "gamma": Kind("light", "held-out", changes.gamma, 1.3),
    "part inverted": Kind("light", "held-out", changes.part_inverted, 1.0),
    "blotches": Kind("light", "held-out", changes.blotches, 0.8),
    "blinds": Kind("light", "held-out", changes.blinds, 0.7),
    "Gaussian noise": Kind("noise", "choosing", changes.gaussian_noise, 0.45),
    "speckle": Kind("noise", "choosing", changes.speckle, 0.8),
    "salt and pepper": Kind("noise", "held-out", changes.salt_and_pepper, 0.25),
    "grain": Kind("noise", "held-out", changes.grain, 0.4),
    "defocus": Kind("blur", "choosing", changes.defocus, 3.2),
    "ghost": Kind("blur", "choosing", changes.ghost, 0.8),
    "motion": Kind("blur", "held-out", changes.motion, 6.5),
    "coarse": Kind("blur", "held-out", changes.coarse, 2.9),
    "thin": Kind("stroke", "choosing", changes.thin, 0.65),
    "broken": Kind("stroke", "choosing", changes.broken, 2.4),
    "thick": Kind("stroke", "held-out", changes.thick, 1.8),
    "outline": Kind("stroke", "held-out", changes.outline, 1.0),
    "rotated": Kind("geometry", "choosing", changes.rotated, 45.0),
    "perspective": Kind("geometry", "choosing", changes.perspective, 0.65),
    "small": Kind("geometry", "choosing", changes.small, 0.6),
    "wave": Kind("geometry", "held-out", changes.wave, 3.0),
    "shifted": Kind("geometry", "held-out", changes.shifted, 7.0),
    "lens": Kind("geometry", "held-out", changes.lens, 1.5),
    "lines": Kind("marks", "choosing", changes.lines, 1.0),
    "dots": Kind("marks", "choosing", changes.dots, 1.0),
    "creases": Kind("marks", "choosing", changes.creases, 0.7),
    "frame": Kind("marks", "held-out", changes.frame, 1.0),
    "second digit": Kind("marks", "held-out", changes.second_digit, 0.5),
    "squared paper": Kind("marks", "held-out", changes.squared_paper, 0.8),
    "patches": Kind("occlusion", "choosing", changes.patches, 8.0),
    "erased stripes": Kind("occlusion", "held-out", changes.erased_stripes, 3.6),
    "JPEG": Kind("quantisation", "choosing", changes.jpeg, 0.85),
    "dithered": Kind("quantisation", "choosing", changes.dithered, 0.45),
    "posterised": Kind("quantisation", "held-out", changes.posterised, 0.7),
    "fax": Kind("quantisation", "held-out", changes.fax, 0.28),
}


def corrupt(images: np.ndarray, name: str, seed: int = 0, strength: float = 1.0) -> np.ndarray:
    """Images changed in the way of the kind `name`, uint8 (n, 28, 28) -> the same.

    A kind draws the same whatever other kinds there are.

    Args:
        strength: of the kind's own.
    """
    kind, parts = KINDS[name], []
    for start in range(0, len(images), CHUNK):
        rng = np.random.default_rng((seed, zlib.crc32(name.encode()), start))
        pixels = images[start : start + CHUNK] / np.float32(255)
        changed = kind.change(pixels, strength * kind.strength, rng)
        parts.append(np.rint(255 * np.clip(changed, 0, 1)).astype(np.uint8))
    return np.concatenate(parts)
