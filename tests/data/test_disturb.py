"""Which disturbances images meet: as image by image, in the shares that are asked for."""

import math

import pytest
import torch
from conftest import MNIST, needs_mnist
from sklearn.datasets import load_sample_image
from torch import Tensor

import data.disturb
from data.digits import load_digits
from data.disturb import CHAINS, FAMILIES, STRAIGHT, Draw, disturb, flag
from data.load import load_dataset
from data.pen import draw_strokes, path, straight_stroke
from training.resolve import DISTURBANCES

KINDS = {name: change for kinds in FAMILIES.values() for name, change in kinds.items()}
SHARES = dict.fromkeys(FAMILIES, 0.5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["digits", "photos"])
def images(request) -> Tensor:
    """60 images in grey, or in colour."""
    if request.param == "digits":
        return load_digits().train.images[:60].float() / 255
    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    pieces = photo.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return pieces[:60].float() / 255


def straight_strokes(count: int, channels: int) -> Tensor:
    """A stroke in each image, leaning by up to 30 degrees: (count, channels, 28, 28)."""
    draw = Draw(count, seeded(0))
    angle, length = math.pi / 2 + draw(-0.5, 0.5, 1), draw(14, 22, 1)
    none = torch.zeros_like(length)
    points = path(draw(12, 15, 1, 2), angle, length, none, none, none + 1, 40)
    black = torch.zeros(count, channels, 28, 28)
    return draw_strokes(black, points, none.unsqueeze(2) + 0.5, none + 1, none.unsqueeze(2) + 1)


def test_each_family_has_a_flag():
    assert tuple(FAMILIES) == DISTURBANCES


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_draws_for_each_image_and_keeps_to_its_range(images, name):
    if name == "flag":  # it leaves other images alone
        images = straight_strokes(60, images.shape[1])
    before = images.clone()
    changed = KINDS[name](images, Draw(60, seeded(1)))
    assert torch.equal(images, before) and changed.shape == images.shape
    assert changed.isfinite().all() and changed.min() >= 0 and changed.max() <= 1
    assert (changed != images).flatten(1).any(dim=1).float().mean() > 0.8
    assert torch.equal(KINDS[name](images, Draw(60, seeded(1))), changed)
    alike = KINDS[name](images[:1].repeat(60, 1, 1, 1), Draw(60, seeded(1)))
    assert len(alike.unique(dim=0)) > 50


def test_a_straight_stroke_gets_a_flag_down_to_the_left():
    images = straight_strokes(300, 1)
    width, end, way = straight_stroke(images)
    assert (width < STRAIGHT).all()
    added = flag(images, Draw(300, seeded(2))) - images
    assert added.min() > -1e-5
    added = added[:, 0] * (added[:, 0] > 0.1)
    pixels = torch.arange(28.0)
    weight = added.sum(dim=(1, 2))
    x = (added.sum(dim=1) @ pixels) / weight - end[:, 0]
    y = (added.sum(dim=2) @ pixels) / weight - end[:, 1]
    clear = weight > 4  # what a short flag adds beside a wide stroke says little about its angle
    angle = torch.rad2deg(torch.atan2(y, x) - way)[clear]
    assert clear.sum() > 150 and angle.min() > 25 and angle.max() < 90
    assert 40 < angle.mean() < 65


@needs_mnist
def test_of_mnist_the_ones_get_flags_and_hardly_any_other_digit():
    split = load_dataset("mnist", MNIST).train[:5000]
    images = split.images.float() / 255
    changed = (flag(images, Draw(len(images), seeded(2))) != images).flatten(1).any(dim=1).float()
    ones = split.labels == 1
    assert changed[ones].mean() > 0.9 and changed[~ones].mean() < 0.01


def slow_disturb(images: Tensor, shares: dict, seed: int, keep_clean: float, augmix: float):
    """Each image on its own, with the same random numbers."""
    generator = seeded(seed)
    place = torch.rand(len(images), generator=generator).tolist()
    border = keep_clean + (1 - keep_clean) * augmix
    by_place = sorted(range(len(images)), key=place.__getitem__)
    mixed = [i for i in by_place if keep_clean <= place[i] < border]
    plain = [i for i in by_place if place[i] >= border]
    versions = [images[i] for i in plain + CHAINS * mixed]

    drawn = torch.rand(len(versions), len(shares), generator=generator).tolist()
    for column, (family, share) in enumerate(shares.items()):
        kinds = list(FAMILIES[family].values())
        for number, change in enumerate(kinds):
            low, high = share * number / len(kinds), share * (number + 1) / len(kinds)
            rows = [i for i, u in enumerate(drawn) if low <= u[column] < high]
            if rows:
                group = torch.stack([versions[i] for i in rows])
                changed = change(group, Draw(len(rows), generator))
                for i, image in zip(rows, changed, strict=True):
                    versions[i] = image

    result = list(images)
    for position, i in enumerate(plain):
        result[i] = versions[position]
    if mixed:
        weights = torch.rand(len(mixed), CHAINS, generator=generator).tolist()
        shares_of_own = torch.rand(len(mixed), generator=generator).tolist()
        for position, i in enumerate(mixed):
            logs = [-math.log(1 - u) for u in weights[position]]
            mean = sum(
                weight / sum(logs) * versions[len(plain) + chain * len(mixed) + position]
                for chain, weight in enumerate(logs)
            )
            own = shares_of_own[position]
            result[i] = own * images[i] + (1 - own) * mean
    return torch.stack(result)


@pytest.mark.parametrize(("keep_clean", "augmix"), [(0.0, 0.0), (0.3, 0.0), (0.2, 0.4), (0.0, 0.9)])
def test_images_in_groups_come_out_as_one_by_one(images, keep_clean, augmix):
    before = images.clone()
    fast = disturb(images, SHARES, seeded(5), keep_clean, augmix)
    assert torch.equal(images, before)
    exact = slow_disturb(images, SHARES, 5, keep_clean, augmix)
    torch.testing.assert_close(fast, exact, atol=1e-5, rtol=0)
    few = images[:1]  # a batch may have one image, or none that anything happens to
    assert disturb(few, {"noise": 1e-9}, seeded(0), keep_clean, augmix).shape == few.shape


def test_an_image_meets_each_family_and_each_of_its_kinds_as_often_as_asked(monkeypatch):
    met = {}

    def counting(name: str):
        return lambda images, draw: met.update({name: len(images)}) or images

    for kinds in FAMILIES.values():
        for name in kinds:
            monkeypatch.setitem(kinds, name, counting(name))
    shares = {name: 0.1 * number for number, name in enumerate(FAMILIES, start=1)}
    disturb(torch.rand(20_000, 1, 2, 2), shares, seeded(0), keep_clean=0.25)
    for family, kinds in FAMILIES.items():
        for name in kinds:
            expected = 0.75 * shares[family] / len(kinds)
            assert met[name] / 20_000 == pytest.approx(expected, abs=0.012), name


def test_a_share_of_the_images_stays_clean_and_a_share_of_the_others_is_mixed():
    images = torch.full((10_000, 1, 4, 4), 0.2)
    white = {"white": lambda images, draw: torch.ones_like(images)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.disturb.FAMILIES, "light", white)
        changed = disturb(images, {"light": 0.999999}, seeded(0), keep_clean=0.3, augmix=0.4)
    values = changed[:, 0, 0, 0]
    assert torch.equal(changed, values.view(-1, 1, 1, 1).expand_as(changed))
    clean, white = (values == 0.2).float().mean().item(), (values == 1).float().mean().item()
    assert clean == pytest.approx(0.3, abs=0.02)
    assert white == pytest.approx(0.7 * 0.6, abs=0.02)
    mixed = values[(values != 0.2) & (values != 1)]  # own share uniform
    assert ((mixed - 0.2) / 0.8).mean().item() == pytest.approx(0.5, abs=0.02)
