"""What light, lens and sensor do, pixel by pixel against slow exact versions."""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import Tensor

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

SIDE = 8


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def images(request) -> Tensor:
    """Ten images: noise, the last black."""
    torch.manual_seed(0)
    images = torch.rand(10, request.param, SIDE, SIDE, dtype=torch.float64)
    images[9] = 0
    return images


def assert_as_pixel_by_pixel(changed: Tensor, images: Tensor, exact) -> None:
    """`exact(pixel, image, channel, row, column)` is each pixel of the result."""
    expected = torch.empty_like(images)
    for place in product(*map(range, images.shape)):
        expected[place] = exact(images[place].item(), *place)
    torch.testing.assert_close(changed, expected, atol=2e-6, rtol=0)


def test_light_changes_as_pixel_by_pixel(images):
    exponent, gain, light = torch.rand(10) * 2 + 0.2, torch.rand(10), torch.rand(10, 1, SIDE, SIDE)
    offset = (1 - gain) * torch.rand(10)
    assert_as_pixel_by_pixel(
        relight(images, exponent, gain, offset),
        images,
        lambda pixel, i, *_: offset[i].item() + gain[i].item() * pixel ** exponent[i].item(),
    )
    assert_as_pixel_by_pixel(
        add_light(images, light),
        images,
        lambda pixel, i, _, row, column: 1 - (1 - light[i, 0, row, column].item()) * (1 - pixel),
    )

    def inverted(pixel: float, i: int, _: int, row: int, column: int) -> float:
        share = light[i, 0, row, column].item()
        return share * (1 - pixel) + (1 - share) * pixel

    assert_as_pixel_by_pixel(invert(images, light), images, inverted)


def test_uneven_light_is_bilinear_between_its_values():
    torch.manual_seed(0)
    values = torch.rand(4, 1, 3, 3)
    field = uneven(values, SIDE)
    assert field.shape == (4, 1, SIDE, SIDE)
    for i, row, column in product(range(4), range(SIDE), range(SIDE)):
        y, x = row * 2 / (SIDE - 1), column * 2 / (SIDE - 1)
        top, left = min(int(y), 1), min(int(x), 1)
        (a, b), (c, d) = values[i, 0, top : top + 2, left : left + 2].tolist()
        down, right = y - top, x - left
        upper, lower = a + (b - a) * right, c + (d - c) * right
        expected = upper + (lower - upper) * down
        assert field[i, 0, row, column].item() == pytest.approx(expected, abs=1e-6)


def test_a_stripe_is_as_pixel_by_pixel():
    torch.manual_seed(0)
    angle, middle, width = torch.rand(9) * 7, torch.rand(9) * 8 - 4, torch.rand(9) * 6
    found = stripe(SIDE, angle, middle, width)
    for i, row, column in product(range(9), range(SIDE), range(SIDE)):
        x, y = column - 3.5, row - 3.5
        across = math.cos(angle[i].item()) * x + math.sin(angle[i].item()) * y
        beyond = abs(across - middle[i].item()) - width[i].item() / 2  # the stripe's edge
        expected = min(max(0.5 - beyond, 0), 1)
        assert found[i, 0, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_blurs_are_gaussians_along_a_direction():
    torch.manual_seed(0)
    angle, along, across = torch.rand(6) * math.pi, 0.5 + torch.rand(6) * 2, 0.4 + torch.rand(6)
    kernels = gaussian_kernels(angle, along, across, 7)
    for kernel, turn, a, b in zip(kernels, angle.tolist(), along, across, strict=True):
        exact = np.empty((7, 7))
        for row, column in product(range(7), range(7)):
            # Back by the angle (y grows downwards): the direction lies along x.
            z = complex(column - 3, row - 3) * complex(math.cos(turn), -math.sin(turn))
            exact[row, column] = math.exp(-((z.real / a) ** 2 + (z.imag / b) ** 2) / 2)
        np.testing.assert_allclose(kernel, exact / exact.sum(), atol=1e-6)


def slow_convolution(image: Tensor, kernels: Tensor) -> np.ndarray:
    """By SciPy, channel by channel; kernels (C, C, k, k)."""
    channels = [sum(map(partial(correlate, mode="nearest"), image, row)) for row in kernels.numpy()]
    return np.stack(channels)


@pytest.mark.parametrize("size", [3, 9])
def test_convolutions_are_scipys_image_by_image(images, size):
    torch.manual_seed(0)
    channels = images.shape[1]
    kernels = torch.randn(10, channels, channels, size, size, dtype=images.dtype)
    for image, own, result in zip(images, kernels, convolve(images, kernels), strict=True):
        np.testing.assert_allclose(result, slow_convolution(image.numpy(), own), atol=1e-9)
    alone = kernels[:, :, :1]  # each channel from itself
    for image, own, result in zip(images, alone, convolve(images, alone), strict=True):
        for plane, kernel, changed in zip(image, own, result, strict=True):
            exact = slow_convolution(plane[None].numpy(), kernel[None])[0]
            np.testing.assert_allclose(changed, exact, atol=1e-9)


def test_a_random_convolution_is_stretched_and_mixed_in(images):
    torch.manual_seed(0)
    channels = images.shape[1]
    kernels = torch.randn(10, channels, channels, 3, 3, dtype=images.dtype)
    share = torch.linspace(0, 1, 10, dtype=images.dtype)
    changed = random_convolution(images, kernels, share)
    for image, own, part, result in zip(images, kernels, share.tolist(), changed, strict=True):
        planes = slow_convolution(image.numpy(), own)
        for plane in planes:
            low, high = plane.min(), plane.max()
            if high - low > 1e-6:
                plane[:] = (plane - low) / (high - low)
        exact = np.clip((1 - part) * image.numpy() + part * planes, 0, 1)
        np.testing.assert_allclose(result, exact, atol=1e-9)


def test_noise_on_a_value_that_rounding_left_below_0_is_a_number():
    image, ones = torch.full((1, 1, 2, 2), -1e-7), torch.ones(1)
    assert add_noise(image, torch.ones_like(image), ones, ones / 2).isfinite().all()


def test_noise_is_as_pixel_by_pixel(images):
    torch.manual_seed(0)
    noise, deviation = torch.randn(images.shape), torch.rand(10)
    power = torch.linspace(0, 1, 10).roll(1)  # 0 where the image is black, too
    power[9] = 0

    def noisy(pixel: float, i: int, *place: int) -> float:
        spread = deviation[i].item() * pixel ** power[i].item()
        return min(max(pixel + spread * noise[(i, *place)].item(), 0), 1)

    assert_as_pixel_by_pixel(add_noise(images, noise, deviation, power), images, noisy)
    uniform = torch.rand(10, 2, SIDE, SIDE)

    def replaced(pixel: float, i: int, _: int, row: int, column: int) -> float:
        whether, value = uniform[i, :, row, column].tolist()
        if whether >= deviation[i].item():
            return pixel
        return 0.0 if value < 0.25 else 1.0 if value > 0.75 else 2 * value - 0.5

    assert_as_pixel_by_pixel(replace_pixels(images, uniform, deviation), images, replaced)
