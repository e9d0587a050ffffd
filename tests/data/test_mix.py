"""Mixed images, their targets and labels agree."""

import pytest
import torch
from scipy.stats import beta, kstest

from data.dataset import Batch
from data.mix import Mix, draw_rectangle, draw_share


def batch_of(side: int, labels: torch.Tensor) -> Batch:
    """Image i has the value i everywhere."""
    images = torch.arange(float(len(labels))).view(-1, 1, 1, 1).repeat(1, 3, side, side)
    return Batch(images, labels, labels, len(labels))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_hold_the_shares_that_the_images_really_have(kind):
    torch.manual_seed(0)
    labels = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5])
    own, others = torch.arange(8), torch.arange(8).roll(1)
    mix, shares = Mix(7, **{kind: 0.7}), set()
    for side in [9, 32] * 60:
        batch = batch_of(side, labels)
        mixed = mix(batch)
        share = 0.0
        for i, image in enumerate(mixed.images):
            if kind == "cutmix":
                pixels = image == own[i]
                assert torch.equal(~pixels, image == others[i])
                share = pixels.float().mean().item()  # of pixels that stay
                hit = ~pixels[0]
                rows, columns = hit.any(dim=1).sum(), hit.any(dim=0).sum()
                assert hit.sum() == rows * columns and torch.equal(pixels[0], pixels[1])
            else:
                share = ((image - others[i]) / (own[i] - others[i])).mean().item()
            expected = torch.zeros(7)
            expected[labels[i]] += share
            expected[labels[others[i]]] += 1 - share
            torch.testing.assert_close(mixed.targets[i], expected, atol=1e-5, rtol=0)
            larger = labels[i] if share > 0.5 else labels[others[i]]
            assert mixed.labels[i] == larger or share == pytest.approx(0.5, abs=1e-5)
        torch.testing.assert_close(mixed.targets.sum(dim=1), torch.ones(8))
        assert torch.equal(batch.images, batch_of(side, labels).images)  # not changed in place
        assert mixed.global_size == 8
        shares.add(round(share, 4))
    assert len(shares) > 60 and min(shares) < 0.25 and max(shares) > 0.75


def test_weights_of_labels_add_up_to_those_of_targets():
    """What training divides a weighted loss by."""
    torch.manual_seed(0)
    labels, weight = torch.randint(5, (33,)), torch.rand(5)
    for _ in range(20):
        mixed = Mix(5, mixup=1.0, cutmix=1.0)(batch_of(8, labels))
        torch.testing.assert_close(weight[mixed.labels].sum(), (mixed.targets @ weight).sum())


def test_each_batch_gets_one_kind_with_equal_chances_and_none_where_both_are_off():
    labels = torch.arange(10)
    batch = batch_of(16, labels)
    state = torch.random.get_rng_state()
    assert Mix(10)(batch) is batch
    assert Mix(10, mixup=1.0)(batch_of(16, labels[:0])).images.shape == (0, 3, 16, 16)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    torch.manual_seed(0)
    both = Mix(10, mixup=1.0, cutmix=1.0)
    cuts = sum((both(batch).images % 1 == 0).all().item() for _ in range(400))
    assert 160 < cuts < 240


def test_shares_are_drawn_from_a_beta_distribution_whatever_its_alpha():
    torch.manual_seed(0)
    for alpha in (0.2, 1.0, 8.0):
        shares = [draw_share(alpha) for _ in range(1500)]
        assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 0.01
    ends = {draw_share(alpha) for alpha in (1e-300, 1e-10) for _ in range(30)}
    assert ends == {0.0, 1.0}
    assert {draw_share(1e300) for _ in range(30)} == {0.5}


def test_a_rectangle_has_its_area_about_a_place_drawn_anywhere_and_is_cut_at_the_border():
    torch.manual_seed(0)
    tops, whole = set(), 0
    for _ in range(600):
        rows, columns, outside = draw_rectangle(0.25, 20, 40)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert 0 <= rows.start <= rows.stop <= 20 and 0 <= columns.start <= columns.stop <= 40
        assert outside == pytest.approx(1 - height * width / 800)
        assert height <= 11 and width <= 21
        tops.add(rows.start)
        if rows.start > 0 and rows.stop < 20 and columns.start > 0 and columns.stop < 40:
            whole += 1
            assert height in (10, 11) or width in (20, 21)
            assert outside == pytest.approx(0.75, abs=0.04)
    assert tops == set(range(16)) and 100 < whole < 200
    assert draw_rectangle(0.0, 20, 40)[2] == 1
