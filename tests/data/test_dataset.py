"""What is measured of a data set's images."""

import pytest
import torch

from data.dataset import pixel_statistics


def test_statistics_of_pixels_are_those_of_each_channel_over_all_parts():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2300, 3, 4, 5), dtype=torch.uint8)
    images[:, 1] //= 3
    images[:, 2] = 51
    images[2000:, 0] = 255  # the last part differs from the others
    mean, std = pixel_statistics(images)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), rel=1e-9)
    assert std[:2] == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist()[:2], rel=1e-9)
    assert std[2] == 1e-3  # not 0: pixels are divided by it
