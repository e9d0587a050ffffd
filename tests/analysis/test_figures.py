"""What figures show stands where it belongs."""

import numpy as np
import pytest

from analysis import model_figures
from analysis.explain import Reliability


@pytest.mark.parametrize(
    ("layers", "heads", "across"), [(3, 2, ("layer", "head")), (2, 3, ("head", "layer"))]
)
def test_attention_tiles_are_in_the_place_of_their_layer_and_head(layers, heads, across):
    maps = np.random.default_rng(0).random((1, layers, heads, 2, 2))
    figure = model_figures.attention(np.zeros((1, 4, 4)), maps, maps[:, 0, 0], "t", [True], "title")
    axes = figure.axes[2]
    assert (axes.get_xlabel(), axes.get_ylabel()) == across
    tile = axes.images[0].get_array()[7:11, 14:18]  # row 1, column 2: 4 pixels each, and 3 between
    expected = maps[0, 2, 1] if across[0] == "layer" else maps[0, 1, 2]
    assert np.array_equal(tile, np.kron(expected, np.ones((2, 2))))


def test_a_reliability_diagram_has_a_bar_and_a_point_for_each_bin_that_has_images():
    bins = Reliability(np.array([0, 4, 2]), np.array([0, 3, 2]), np.array([0, 0.5, 0.9]))
    upper, lower = model_figures.reliability(bins, "title").axes
    assert [bar.get_height() for bar in upper.patches] == [75, 100]
    assert [bar.get_height() for bar in lower.patches] == [4, 2]
    points = next(line for line in upper.lines if "mean confidence" in line.get_label())
    assert points.get_xydata().tolist() == [[50, 75], [90, 100]]


def test_class_names_on_one_spot_are_moved_apart():
    spots = np.array([[0.5, 0.5], [0.5, 0.5], [0.52, 0.5], [0.9, 0.9]])
    moved = model_figures._apart(spots, 0.06)
    gaps = np.linalg.norm(moved[:, None] - moved, axis=2) + np.eye(4)
    assert gaps.min() > 0.055 and np.linalg.norm(moved[3] - 0.9) < 0.001
    assert np.abs(moved[:3] - 0.5).max() < 0.1
