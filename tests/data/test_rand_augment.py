"""RandAugment in groups equals each image on its own, change by change, with torchvision."""

import math

import pytest
import torch
import torchvision.transforms.functional as slow
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from data.rand_augment import CHANGES, rand_augment

BILINEAR = InterpolationMode.BILINEAR


def photos(channels: int, count: int) -> Tensor:
    """32x32 pieces of a photo."""
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    pieces = photo[:channels].unfold(1, 32, 32).unfold(2, 32, 32)
    return pieces.permute(1, 2, 0, 3, 4).flatten(0, 1)[:count].float() / 255


def moved(image: Tensor, degrees=0.0, right=0.0, down=0.0, shear=(0.0, 0.0)) -> Tensor:
    """By torchvision, which turns clockwise and slants the other way."""
    shear = [math.degrees(math.atan(value)) for value in shear]
    return slow.affine(image, -degrees, [right, down], 1.0, shear, BILINEAR)


def levels(image: Tensor) -> Tensor:
    return (image * 255).round().byte()


EXACT = {
    "identity": lambda image, s: image,
    "rotate": lambda image, s: slow.rotate(image, 18 * s, BILINEAR),
    "shear_x": lambda image, s: moved(image, shear=(-0.18 * s, 0.0)),
    "shear_y": lambda image, s: moved(image, shear=(0.0, -0.18 * s)),
    "translate_x": lambda image, s: moved(image, right=0.27 * 32 * s),
    "translate_y": lambda image, s: moved(image, down=0.27 * 32 * s),
    "brightness": lambda image, s: slow.adjust_brightness(image, 1 + 0.54 * s),
    "contrast": lambda image, s: slow.adjust_contrast(image, 1 + 0.54 * s),
    "colour": lambda image, s: slow.adjust_saturation(image, 1 + 0.54 * s),
    "sharpness": lambda image, s: slow.adjust_sharpness(image, 1 + 0.54 * s),
    "posterize": lambda image, s: slow.posterize(levels(image), 8 - round(2.4 * abs(s))) / 255,
    "solarize": lambda image, s: slow.solarize(image, 1 - 0.6 * abs(s)),
    "autocontrast": lambda image, s: slow.autocontrast(image),
    "equalize": lambda image, s: slow.equalize(levels(image)) / 255,
}


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_groups_come_out_as_one_by_one_with_torchvision(channels):
    torch.manual_seed(0)
    images = photos(channels, 200)
    which = torch.randint(14, (200, 3))
    which[:14] = torch.arange(14).view(14, 1)  # each thrice in a row, too
    strength = torch.rand(200, 3) * 2 - 1
    strength[:5] = torch.tensor([-1.0, 0.0, 1.0])
    # torchvision shifts by whole pixels, 8.64 at most.
    shifts = (which == CHANGES.index("translate_x")) | (which == CHANGES.index("translate_y"))
    strength = torch.where(shifts, (8.64 * strength).round() / 8.64, strength).clamp(-1, 1)
    before = images.clone()
    changed = rand_augment(images, which, strength)
    assert torch.equal(images, before)
    for image, numbers, strengths, result in zip(images, which, strength, changed, strict=True):
        for number, s in zip(numbers.tolist(), strengths.tolist(), strict=True):
            image = EXACT[CHANGES[number]](image, s)
        # A value at the edge between two levels falls to either side.
        apart = (result - image).abs()
        assert apart.mean() < 1e-3 and apart.median() < 1e-4


@pytest.mark.parametrize("name", EXACT)
def test_one_change_is_torchvisions(name):
    images = photos(3, 60)
    strength = torch.linspace(-1, 1, 60)
    if name.startswith("translate"):
        strength = (8 * strength).round() / 8.64
    which = torch.full((60, 1), CHANGES.index(name))
    for image, s, result in zip(
        images, strength.tolist(), rand_augment(images, which, strength[:, None]), strict=True
    ):
        torch.testing.assert_close(result, EXACT[name](image, s), atol=1e-5, rtol=0)
