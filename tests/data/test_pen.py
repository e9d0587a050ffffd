"""What changes strokes and draws foreign ones, pixel by pixel against slow exact versions."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from data.digits import load_digits
from data.geometry import erase
from data.pen import dilate, draw_strokes, erode, outline, path, straight_stroke, thicken, thin


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def images(request) -> Tensor:
    """12 digits; in colour each channel is another digit."""
    digits = load_digits().train.images[: 12 * request.param].float() / 255
    return digits.view(12, request.param, 28, 28)


def of_neighbours(image: Tensor, choose) -> Tensor:
    """`choose`, max or min, of the up to 9 pixels around each: (S, S) -> (S, S)."""
    side, result = len(image), torch.empty_like(image)
    for row, column in product(range(side), repeat=2):
        top, left = max(row - 1, 0), max(column - 1, 0)
        result[row, column] = choose(image[top : row + 2, left : column + 2].flatten().tolist())
    return result


def blended(start: Tensor, end: Tensor, share: float) -> Tensor:
    return (1 - share) * start + share * end


def slow_thicken(image: Tensor, radius: float) -> Tensor:
    image = blended(image, of_neighbours(image, max), min(radius, 1))
    return blended(image, of_neighbours(image, max), max(radius - 1, 0))


def slow_thin(image: Tensor, share: float) -> Tensor:
    core = of_neighbours(image, min)
    kept = torch.maximum(core, image - of_neighbours(core, max))
    return blended(image, kept, share)


def slow_outline(image: Tensor, share: float, inside: float) -> Tensor:
    core = blended(image, of_neighbours(image, min), inside)
    return blended(image, of_neighbours(image, max) - core, share)


@pytest.mark.parametrize(
    ("fast", "slow", "most"),
    [
        (dilate, lambda image: of_neighbours(image, max), []),
        (erode, lambda image: of_neighbours(image, min), []),
        (thicken, slow_thicken, [2]),
        (thin, slow_thin, [1]),
        (outline, slow_outline, [1, 1]),
    ],
)
def test_strokes_change_as_in_a_slow_exact_version(images, fast, slow, most):
    amounts = [torch.linspace(0, end, 12) for end in most]
    if len(amounts) == 2:
        amounts[1] = amounts[1].roll(5)
    before = images.clone()
    changed = fast(images, *amounts)
    assert torch.equal(images, before)
    for i, image in enumerate(images):
        for channel, result in zip(image, changed[i], strict=True):
            exact = slow(channel, *(each[i].item() for each in amounts))
            torch.testing.assert_close(result, exact, atol=1e-6, rtol=0)


def test_a_thin_line_stays_when_strokes_get_thinner():
    image = torch.zeros(1, 1, 12, 12)
    image[..., 2, 1:11] = image[..., 5:7, 1:11] = image[..., 8:11, 1:11] = 1  # 1, 2, 3 pixels wide
    thinner = thin(image, torch.ones(1))[0, 0, :, 5]
    assert thinner.tolist() == [0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0]


def test_how_straight_a_stroke_is_is_as_pixel_by_pixel(images):
    images = torch.cat((images, torch.zeros_like(images[:1])))
    width, end, way = straight_stroke(images)
    for i, image in enumerate(images[:-1].amax(dim=1).double().numpy()):
        rows, columns = np.indices(image.shape)
        covariance = np.cov(np.stack((columns.ravel(), rows.ravel())), aweights=image.ravel())
        across, along = np.linalg.eigvalsh(covariance)
        assert width[i].item() == pytest.approx(across / along, abs=1e-4)
        row, column = np.argwhere(image >= image.max() / 2)[0]
        assert end[i].tolist() == [column, row]
        middle = np.average(
            np.stack((columns, rows), axis=-1), axis=(0, 1), weights=image[..., None] * [1, 1]
        )
        x, y = middle - (column, row)
        assert way[i].item() == pytest.approx(math.atan2(y, x), abs=1e-4)
    assert all(each[-1].isfinite().all() for each in (width, end, way))  # of a black image


def test_paths_are_as_point_by_point():
    torch.manual_seed(0)
    middle, (angle, length, bend, zigzag) = torch.rand(5, 2, 2) * 20, torch.rand(4, 5, 2) * 6
    period = 1 + 3 * torch.rand(5, 2)
    points = path(middle, angle, length, bend, zigzag, period, 9)
    assert points.shape == (5, 2, 9, 2)
    for i, j, k in product(range(5), range(2), range(9)):
        t = k / 8 - 0.5
        along = t * length[i, j].item()
        phase = (along / period[i, j].item()) % 1
        teeth = 1 - 4 * phase if phase < 0.5 else 4 * phase - 3  # down from 1 to -1, up again
        beside = (1 - 4 * t**2) * bend[i, j].item() + teeth * zigzag[i, j].item()
        cos, sin = math.cos(angle[i, j].item()), math.sin(angle[i, j].item())
        x = middle[i, j, 0].item() + cos * along - sin * beside
        y = middle[i, j, 1].item() + sin * along + cos * beside
        assert points[i, j, k].tolist() == pytest.approx((x, y), abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_foreign_strokes_are_drawn_as_dot_by_dot(channels):
    torch.manual_seed(0)
    images = torch.rand(3, channels, 9, 9)
    points, ink = torch.rand(3, 2, 5, 2) * 12 - 2, torch.rand(3, 2, 5)  # beyond the border, too
    spread, shades = 0.4 + torch.rand(3, 2), torch.rand(3, 2, channels)
    drawn = draw_strokes(images, points, ink, spread, shades)
    for i, row, column in product(range(3), range(9), range(9)):
        pixel = images[i, :, row, column]
        for stroke in range(2):
            total = 0.0
            for (x, y), amount in zip(points[i, stroke].tolist(), ink[i, stroke], strict=True):
                square = (x - column) ** 2 + (y - row) ** 2
                total += amount.item() * math.exp(-square / (2 * spread[i, stroke].item() ** 2))
            pixel = blended(pixel, shades[i, stroke], min(total, 1))
        torch.testing.assert_close(drawn[i, :, row, column], pixel, atol=1e-5, rtol=0)


def test_an_erased_rectangle_gets_the_colour_that_is_given():
    torch.manual_seed(0)
    images, uniform, fill = torch.rand(20, 3, 16, 16), torch.rand(20, 5), torch.rand(20, 3, 1, 1)
    black, filled = erase(images, uniform, 0.7), erase(images, uniform, 0.7, fill)
    hit = (black == 0) & (images > 0)
    assert hit.any() and torch.equal(filled, torch.where(hit, fill.expand_as(images), images))
