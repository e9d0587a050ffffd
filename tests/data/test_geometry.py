"""What moves, mirrors or covers pixels, against slow exact versions."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from data.geometry import erase, hflip, random_crop, resample, smooth


def test_hflip_and_random_crop_equal_numpys_image_by_image():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 9, 9)
    whether = torch.rand(40) < 0.5
    for image, flipped, mirrored in zip(hflip(images, whether), whether, images, strict=True):
        np.testing.assert_array_equal(image, np.flip(mirrored.numpy(), 2) if flipped else mirrored)
    for pad in (1, 4, 8):  # as far as one reflection reaches
        corner = torch.randint(2 * pad + 1, (40, 2))
        crops = random_crop(images, corner, pad)
        for crop, image, (top, left) in zip(crops, images, corner.tolist(), strict=True):
            wide = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
            np.testing.assert_array_equal(crop, wide[:, top : top + 9, left : left + 9])


def test_resample_equals_a_slow_exact_version():
    """All geometric changes at once, point by point, against one matrix and one grid."""
    torch.manual_seed(0)
    image = torch.rand(9, 9, dtype=torch.float64)
    angle, (dx, dy), factor = 0.3, (1.25, -0.5), 1.2  # shift in pixels
    slant, slant_y = 0.25, -0.15
    field = torch.randn(2, 9, 9, dtype=torch.float64)  # pixels
    one = torch.ones(1, dtype=torch.float64)
    shift = torch.tensor([[dx, dy]], dtype=torch.float64) * 2 / 9
    bend = {"slant": one * slant, "slant_y": one * slant_y, "field": field[None] * 2 / 9}
    fast = resample(image[None, None], one * angle, shift, one * factor, **bend)[0, 0]
    sources = np.empty((2, 9, 9))
    for row in range(9):
        for column in range(9):
            # Back: undo the shift, the turn about the centre (y grows downwards), both
            # slants, the scaling; then what the field adds.
            x, y = column - 4 - dx, row - 4 - dy
            x, y = (
                math.cos(angle) * x - math.sin(angle) * y,
                math.sin(angle) * x + math.cos(angle) * y,
            )
            x = x - slant * y
            x, y = x / factor, (y - slant_y * x) / factor
            sources[:, row, column] = y + 4 + field[1, row, column], x + 4 + field[0, row, column]
    # Between the outermost pixels and 0 beyond them, too.
    exact = map_coordinates(np.pad(image, 1), sources + 1, order=1, mode="constant")
    np.testing.assert_allclose(fast, exact, atol=1e-9)


def test_smooth_noise_is_a_gaussian_blur_of_unit_variance():
    torch.manual_seed(0)
    field = smooth(torch.randn(4000, 28, 28), sigma=4.0)
    torch.testing.assert_close(field.std(dim=0), torch.ones(28, 28), atol=0.06, rtol=0)
    # Neighbours d pixels apart correlate by exp(-d^2 / (4 sigma^2)) away from the border.
    for d in (1, 4, 8):
        correlation = (field[:, 14, 8] * field[:, 14, 8 + d]).mean().item()
        assert correlation == pytest.approx(math.exp(-(d**2) / 64), abs=0.06)
    noise = torch.randn(9, 9, dtype=torch.float64)
    i = torch.arange(9, dtype=torch.float64)
    weights = (-((i[:, None] - i) ** 2) / (2 * 2.0**2)).exp()
    weights /= weights.norm(dim=1, keepdim=True)
    torch.testing.assert_close(smooth(noise[None], sigma=2.0)[0], weights @ noise @ weights.T)


def test_erase_sets_one_rectangle_of_the_stated_size_to_0():
    torch.manual_seed(0)
    hit = erase(torch.ones(3000, 1, 28, 28), torch.rand(3000, 5), probability=0.4)[:, 0] == 0
    touched = hit.any(dim=2).any(dim=1)
    assert touched.float().mean().item() == pytest.approx(0.4, abs=0.04)
    height, width = (hit.any(dim=d).sum(dim=1)[touched] for d in (2, 1))
    area = hit.sum(dim=(1, 2))[touched]
    assert torch.equal(area, height * width)  # full, and with no second one
    assert 0.012 * 784 < area.min() < 0.04 * 784 and 0.17 * 784 < area.max() < 0.23 * 784
    assert hit[:, 0].any() and hit[:, -1].any() and hit[:, :, 0].any() and hit[:, :, -1].any()
    assert not (erase(torch.ones(50, 1, 28, 28), torch.rand(50, 5), probability=0.0) == 0).any()
