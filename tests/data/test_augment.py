"""What changes of training images are drawn: each within its limits, none that is off."""

import math

import pytest
import torch
from sklearn.datasets import load_sample_image

import data.augment
from data.augment import ELASTIC_SIGMA, Augment
from data.digits import load_digits
from data.disturb import FAMILIES, disturb
from data.geometry import erase, resample, smooth
from data.rand_augment import CHANGES

OFF = {"rotate": 0.0, "translate": 0.0}
STRENGTHS = {"rotate": 15.0, "translate": 0.2, "scale": 0.2, "shear": 15.0, "elastic": 1.0}
STRENGTHS |= {"erase": 0.2, "hflip": 0.5, "random_crop": 4, "color_jitter": 0.4, "rand_augment": 2}
STRENGTHS |= dict.fromkeys(FAMILIES, 0.5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["digits", "photos"])
def images(request) -> torch.Tensor:
    """64 images in grey, or in colour; the last 8 are straight strokes, for --serif."""
    if request.param == "digits":
        images = load_digits().train.images[:64].float() / 255
    else:
        photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
        pieces = photo.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
        images = pieces[:64].float() / 255
    images[-8:] = 0
    images[-8:, :, 4:24, 13:15] = 1
    return images


@pytest.mark.parametrize("name", [*STRENGTHS, "all"])
def test_each_strength_changes_images_on_its_own_and_0_leaves_them(images, name):
    assert torch.equal(Augment(**OFF)(images, torch.Generator()), images)
    strengths = STRENGTHS if name == "all" else {name: STRENGTHS[name]}
    augment = Augment(**OFF | strengths)
    before = images.clone()
    first, same, other = (augment(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(images, before)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first, images) and first.shape == images.shape
    assert first.min() >= 0 and first.max() <= 1
    one = augment(images[:1], seeded(1))  # a batch may have one image
    assert one.shape == images[:1].shape and one.isfinite().all()


def test_what_is_off_draws_nothing(images):
    """A seed gives the batches that it gave before there were mirrors, crops and colours."""
    for name in (None, "hflip", "random_crop", "color_jitter", "rand_augment", *FAMILIES):
        generator = seeded(3)
        Augment(**OFF | ({name: STRENGTHS[name]} if name else {}))(images, generator)
        plain = seeded(3)
        torch.rand(64, 3, generator=plain)  # rotate and translate, as ever
        assert torch.equal(generator.get_state(), plain.get_state()) == (name is None)
    old = {name: STRENGTHS[name] for name in ("rotate", "translate", "scale", "shear", "elastic")}
    generator, side = seeded(4), images.shape[-1]

    def symmetric(*shape: int) -> torch.Tensor:
        return torch.rand(64, *shape, generator=generator) * 2 - 1

    drawn, factor, slant = symmetric(3), symmetric() * 0.2 + 1, symmetric()
    noise = torch.randn(64, 2, side, side, generator=generator)
    expected = resample(
        images,
        drawn[:, 0] * math.radians(15),
        drawn[:, 1:] * 2 * 0.2,
        factor,
        (slant * math.radians(15)).tan(),
        smooth(noise, ELASTIC_SIGMA) * (2 / side),
    )
    expected = erase(expected, torch.rand(64, 5, generator=generator), 0.2)
    assert torch.equal(Augment(**old, erase=0.2)(images, seeded(4)), expected)


def test_light_and_strokes_change_by_the_shares_that_are_given(images):
    generator = seeded(4)
    torch.rand(64, 3, generator=generator)
    expected = disturb(images, {"stroke": 0.3, "noise": 0.4}, generator, 0.2, 0.3)
    augment = Augment(**OFF, stroke=0.3, noise=0.4, keep_clean=0.2, augmix=0.3)
    assert torch.equal(augment(images, seeded(4)), expected)


def test_augment_turns_and_moves_within_its_limits_and_never_flips():
    # Each image is a plane, x or y; where it is read from in the middle tells the whole map.
    line = torch.arange(28.0) - 13.5
    x = line.expand(500, 1, 28, 28) + 100  # + 100: far from the 0 that comes in from outside
    y = line.view(28, 1).expand(500, 1, 28, 28) + 100
    augment = Augment(rotate=7.0, translate=0.1)
    x, y = (augment(p, torch.Generator().manual_seed(3))[:, 0] - 100 for p in (x, y))
    dx, dy = (
        torch.stack((p[:, 13, 14] - p[:, 13, 13], p[:, 14, 13] - p[:, 13, 13])) for p in (x, y)
    )
    determinant = dx[0] * dy[1] - dx[1] * dy[0]
    torch.testing.assert_close(determinant, torch.ones(500), atol=1e-3, rtol=0)  # a flip has -1
    angles = torch.atan2(dy[0], dx[0]).rad2deg()
    assert angles.abs().max() <= 7.01 and angles.min() < -6.5 and angles.max() > 6.5
    for p in (x, y):
        centre = p[:, 13:15, 13:15].mean(dim=(1, 2))  # turning it back leaves its length
        assert 2.0 < centre.abs().max() <= 2.8 * math.sqrt(2)
    radius = (
        x[:, 13:15, 13:15].mean(dim=(1, 2)) ** 2 + y[:, 13:15, 13:15].mean(dim=(1, 2)) ** 2
    ).sqrt()
    assert radius.max() <= 2.8 * math.sqrt(2) + 1e-3


def test_a_share_of_the_images_is_mirrored():
    line = torch.arange(8.0).expand(4000, 1, 8, 8) / 7
    mirrored = Augment(**OFF, hflip=0.3)(line, seeded(0))
    is_mirrored = (mirrored == line.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(~is_mirrored, (mirrored == line).flatten(1).all(dim=1))
    assert is_mirrored.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_crops_are_cut_out_at_every_place_equally_often():
    numbers = torch.arange(64.0).view(1, 1, 8, 8).expand(4900, 1, 8, 8)
    first = Augment(**OFF, random_crop=3)(numbers, seeded(0))[:, 0, 3, 3]  # 0 to 6 right and down
    counts = first.long().bincount(minlength=64).view(8, 8)
    assert counts[:7, :7].min() > 60 and counts[:7, :7].max() < 145 and counts.sum() == 4900
    assert counts[7].sum() == counts[:, 7].sum() == 0


def test_colours_vary_evenly_within_their_limits_and_each_on_its_own():
    # Two colours, a step of brightness apart: what they become tells all three factors.
    images = torch.tensor([0.45, 0.5, 0.5]).view(1, 3, 1, 1).repeat(3000, 1, 8, 8)
    images[..., 4:] += 0.1
    one, two = Augment(**OFF, color_jitter=0.3)(images, seeded(0))[..., [0, 7]].unbind(-1)
    luma = torch.tensor([0.2989, 0.587, 0.114])
    dark, light = one[..., 0] @ luma, two[..., 0] @ luma
    dark_before, light_before = images[0, :, 0, [0, 7]].T @ luma
    bright = (dark + light) / (dark_before + light_before)
    contrast = (light - dark) / (0.1 * luma.sum()) / bright
    colourful = (one[:, 1, 0] - one[:, 0, 0]) / 0.05 / bright / contrast
    factors = torch.stack((bright, contrast, colourful))
    assert (factors.amin(dim=1) - 0.7).abs().max() < 0.005
    assert (factors.amax(dim=1) - 1.3).abs().max() < 0.005
    assert (factors.mean(dim=1) - 1).abs().max() < 0.01
    assert (factors.corrcoef() - torch.eye(3)).abs().max() < 0.06


def test_rand_augment_draws_changes_and_strengths_evenly(monkeypatch):
    drawn, original = [], data.augment.rand_augment

    def watched(*arguments) -> torch.Tensor:
        drawn.extend(arguments[1:])
        return original(*arguments)

    monkeypatch.setattr(data.augment, "rand_augment", watched)
    Augment(**OFF, rand_augment=2)(torch.rand(2800, 1, 8, 8), seeded(0))
    which, strength = drawn
    assert which.shape == strength.shape == (2800, 2)
    for column in which.T:
        counts = column.bincount(minlength=14)
        assert len(counts) == len(CHANGES) == 14 and counts.min() > 140 and counts.max() < 270
    again = (which[:, 0] == which[:, 1]).float().mean().item()
    assert again == pytest.approx(1 / 14, abs=0.02)  # with replacement
    assert strength.min() < -0.99 and strength.max() > 0.99 and strength.mean().abs() < 0.03
    assert strength.T.corrcoef()[0, 1].abs() < 0.06
