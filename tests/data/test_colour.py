"""What changes the values of pixels, image by image against Pillow and torchvision."""

import pytest
import torch
import torchvision.transforms.functional as slow
from PIL import ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data import colour


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def images(request) -> torch.Tensor:
    """32x32 pieces of a photo, 70 in all, the last three odd: even, almost even, of two values."""
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    pieces = photo[: request.param, ::2, ::2].unfold(1, 32, 32).unfold(2, 32, 32)
    pieces = pieces.permute(1, 2, 0, 3, 4).flatten(0, 1)[:67]
    odd = torch.full((3, *pieces.shape[1:]), 200, dtype=torch.uint8)
    odd[1, :, 3, 4:9] = 90
    odd[2, :, ::2] = 0
    return torch.cat((pieces, odd)).float() / 255


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2), ("sharpness", 0, 3)],
)
def test_a_factor_for_each_image_does_what_torchvision_does_with_one(images, name, low, high):
    torch.manual_seed(0)
    factors = low + (high - low) * torch.rand(len(images))
    factors[:3] = torch.tensor([0.0, 1.0, high])
    changed = getattr(colour, name)(images, factors)
    adjust = getattr(slow, f"adjust_{name}")
    for image, factor, result in zip(images, factors.tolist(), changed, strict=True):
        torch.testing.assert_close(result, adjust(image, factor), atol=2e-6, rtol=0)
    assert torch.equal(changed[1], images[1])
    assert torch.equal(changed, images) == (name == "saturation" and images.shape[1] == 1)


def test_jitter_is_brightness_then_contrast_then_saturation(images):
    torch.manual_seed(0)
    factors = 0.4 + 1.2 * torch.rand(len(images), 3)
    for image, (bright, contrast, colourful), result in zip(
        images, factors.tolist(), colour.color_jitter(images, factors), strict=True
    ):
        image = slow.adjust_contrast(slow.adjust_brightness(image, bright), contrast)
        image = slow.adjust_saturation(image, colourful)
        torch.testing.assert_close(result, image, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["posterize", "solarize", "autocontrast", "equalize"])
def test_levels_are_changed_as_by_pillow(images, name):
    strengths = {"posterize": [1, 4, 6, 7, 8], "solarize": [0, 1, 100, 178, 255]}.get(name)
    for strength in strengths or [None]:
        arguments = () if strength is None else (strength,)
        given = [torch.tensor([float(s)] * len(images)) for s in arguments]
        if name == "solarize":
            given = [given[0] / 255]
        changed = getattr(colour, name)(images, *given) * 255
        for image, result in zip(images, changed, strict=True):
            exact = pil_to_tensor(getattr(ImageOps, name)(to_pil_image(image), *arguments))
            # Pillow cuts off what autocontrast leaves behind the point.
            tolerance = 1.001 if name == "autocontrast" else 1e-4
            torch.testing.assert_close(result, exact.float(), atol=tolerance, rtol=0)
            if name == "autocontrast":
                exact = slow.autocontrast(image) * 255
                torch.testing.assert_close(result, exact, atol=1e-3, rtol=0)


def test_each_image_has_a_strength_of_its_own(images):
    bits = torch.arange(len(images)) % 9.0
    posterized = colour.posterize(images, bits)
    thresholds = torch.linspace(0, 1, len(images))
    solarized = colour.solarize(images, thresholds)
    for i, image in enumerate(images):
        assert torch.equal(posterized[i], colour.posterize(image[None], bits[i : i + 1])[0])
        assert torch.equal(solarized[i], colour.solarize(image[None], thresholds[i : i + 1])[0])


def test_values_between_the_bytes_are_taken_as_the_nearest(images):
    near = (images - 0.3 / 255).clamp(0, 1)
    # An image that is left as it is keeps what lies between.
    torch.testing.assert_close(
        colour.equalize(near), colour.equalize(images), atol=0.31 / 255, rtol=0
    )
    four = torch.full((len(images),), 4.0)
    assert torch.equal(colour.posterize(near, four), colour.posterize(images, four))


def test_colours_of_other_numbers_of_channels_stay_in_bounds():
    torch.manual_seed(0)
    images = torch.rand(8, 5, 16, 16)
    even = colour.saturation(images, torch.zeros(8))
    torch.testing.assert_close(even, images.mean(dim=1, keepdim=True).expand_as(images))
    for name in ("brightness", "contrast", "saturation", "sharpness"):
        changed = getattr(colour, name)(images, torch.full((8,), 3.0))
        assert changed.min() >= 0 and changed.max() <= 1 and not torch.equal(changed, images)
