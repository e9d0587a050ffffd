"""What figures show stands where it belongs, and can be read, of few classes and of a hundred."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from analysis import figures, model_figures, score_figures
from analysis.explain import Outputs, Reliability

NOISE = np.random.default_rng(0).integers(256, size=(16, 8, 8, 3), dtype=np.uint8)
LONG = [f"{'wide name of a' if i % 2 else 'WWWWWW'} {i:03}".ljust(20, "m") for i in range(100)]
assert {len(name) for name in LONG} == {20}


@cache
def draw(figure: Figure) -> RendererAgg:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return renderer


def boxes(figure: Figure, texts: list) -> np.ndarray:
    """Left, bottom, right and top of texts as they are drawn, in pixels, (n, 4)."""
    renderer = draw(figure)
    return np.array([text.get_window_extent(renderer).extents for text in texts]).reshape(-1, 4)


def assert_apart(figure: Figure, texts: list) -> None:
    """No two of the texts touch, and all lie within the page."""
    found = boxes(figure, texts)
    page = figure.get_size_inches() * figure.dpi
    assert (found[:, :2] > 0).all() and (found[:, 2:] < page).all()
    for i, j in combinations(range(len(found)), 2):
        apart = (found[i, :2] >= found[j, 2:]) | (found[j, :2] >= found[i, 2:])
        assert apart.any(), (texts[i].get_text(), texts[j].get_text())


# --------------------------------------------------------------------------------------- attention


def draw_attention(images: np.ndarray, maps: np.ndarray, outlined: bool) -> Figure:
    captions = [("test image 0", "a", 0.5, "a")] * len(images)
    return model_figures.attention(images, maps, maps[:, 0, 0], captions, outlined, "title")


@pytest.mark.parametrize(
    ("layers", "heads", "across"), [(3, 2, ("layer", "head")), (2, 3, ("head", "layer"))]
)
def test_attention_tiles_are_in_the_place_of_their_layer_and_head(layers, heads, across):
    maps = np.random.default_rng(0).random((1, layers, heads, 2, 2))
    axes = draw_attention(np.zeros((1, 4, 4)), maps, outlined=True).axes[2]
    assert (axes.get_xlabel(), axes.get_ylabel()) == across
    tile = axes.images[0].get_array()[7:11, 14:18]  # row 1, column 2: 4 pixels each, and 3 between
    expected = maps[0, 2, 1] if across[0] == "layer" else maps[0, 1, 2]
    assert np.array_equal(tile, np.kron(expected, np.ones((2, 2))))


def test_attention_over_a_photo_is_bluer_where_it_is_more_and_the_photo_shines_through():
    photo = np.zeros((1, 8, 8, 3), np.uint8)
    photo[:, :, ::2] = 200, 30, 30  # red stripes on black
    maps = np.array([[0.0, 0.1], [0.2, 0.7]])[None, None, None]
    figure = draw_attention(photo, maps, outlined=False)
    image, rollout, tiles = figure.axes[:3]
    assert np.array_equal(image.images[0].get_array(), photo[0])
    for axes in (rollout, tiles):
        shown = axes.images[0].get_array()[:8, :8]  # (8, 8, 3)
        parts = [shown[row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4)]
        blueness = [(part[..., 2] - part[..., 0]).mean() for part in parts]
        darkness = [1 - part.mean() for part in parts]
        assert blueness[0] < blueness[1] < blueness[2] and np.all(np.diff(darkness) > 0)
        stripes = parts[0].mean(axis=(0, 2))  # without attention the photo is pale, and seen
        assert (parts[0] > 0.6).all() and (stripes[::2] > stripes[1::2] + 0.2).all()
        assert not axes.collections  # no outline


def test_the_bars_of_attention_tell_their_ends_with_the_same_decimals():
    maps = np.linspace(0.053, 0.097, 16).reshape(1, 1, 1, 4, 4)
    figure = draw_attention(np.zeros((1, 4, 4)), maps, outlined=True)
    figure.draw_without_rendering()
    (below,) = figure.axes[1].child_axes
    texts = [tick.get_text() for tick in below.get_xticklabels()]
    assert texts[0] == "5.3 %" and texts[-1] == "9.7 %"
    assert {len(text.partition(".")[2]) for text in texts} == {3}  # one decimal each
    assert figure.axes[-1].get_yticks()[-1] == pytest.approx(0.097)


# -------------------------------------------------------------------------------------- embeddings


def draw_embeddings(names: list[str], channels: int = 3) -> Figure:
    generator = np.random.default_rng(1)
    labels = np.arange(40 * len(names)) % len(names)
    points = generator.normal(size=(len(names), 2))[labels] * 4 + generator.normal(
        size=(len(labels), 2)
    )
    components = generator.normal(size=(9, channels, 4, 4))
    similarity = generator.random((2, 2, 2, 2))
    maps = {"PCA": points, "t-SNE": points[::-1]}
    return model_figures.embeddings(
        similarity, True, components, np.full(9, 0.1), maps, labels, names, "title"
    )


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (list("0123456789"), "0 1 2 3 4 5 6 7 8 9".split()),
        (LONG[:4], LONG[:4]),
        (LONG[:26], [str(i) for i in range(1, 27)]),
        pytest.param(LONG, [str(i) for i in range(1, 101)], marks=pytest.mark.slow),
    ],
    ids=["digits", "4 long", "26 long", "100 long"],
)
def test_class_names_in_a_map_and_its_legend_are_apart(names, shown):
    figure = draw_embeddings(names)
    for axes in figure.axes[2:4]:
        assert [text.get_text() for text in axes.texts] == shown
        assert_apart(figure, axes.texts)
        found, frame = boxes(figure, axes.texts), axes.get_window_extent()
        assert (found[:, 0] >= frame.x0).all() and (found[:, 2] <= frame.x1).all()
    (legend,) = figure.legends
    texts = legend.get_texts()
    assert [text.get_text().removeprefix(f"{i} ") for i, text in enumerate(texts, 1)] == names
    assert_apart(figure, texts)
    looks = {
        (h.get_facecolor().tobytes(), h.get_paths()[0].vertices.tobytes())
        for h in figure.axes[2].collections
    }
    assert len(looks) == len(names)  # a colour and a mark of its own for each


def test_a_name_stands_beside_a_tight_group_and_hides_none_of_it():
    group = 0.5 + 0.003 * np.random.default_rng(0).normal(size=(50, 2))
    place = model_figures.beside(group, group[0], np.array([0.06, 0.03]))
    assert not (np.abs(group - place) < (0.03, 0.015)).all(axis=1).any()
    assert np.abs(place - 0.5).max() < 0.1


def test_filters_of_colour_images_are_shown_in_colour():
    in_colour, grey = (draw_embeddings(list("ab"), channels).axes[1] for channels in (3, 1))
    tiles = np.asarray(in_colour.images[0].get_array())
    assert tiles.ndim == 3 and np.ptp(tiles, axis=2).max() > 0.5
    assert grey.images[0].get_array().ndim == 2


def test_class_names_on_one_spot_are_moved_apart():
    spots = np.array([[0.5, 0.5], [0.5, 0.5], [0.52, 0.5], [0.9, 0.9]])
    sizes = np.full((4, 2), (0.2, 0.05))
    moved = model_figures.apart(spots, sizes)
    for i, j in combinations(range(4), 2):
        assert (np.abs(moved[i] - moved[j]) >= (0.2 - 1e-9, 0.05 - 1e-9)).any()
    assert np.linalg.norm(moved[3] - 0.9) < 0.001 and np.abs(moved[:3] - 0.5).max() < 0.15
    assert model_figures.apart(np.array([[0.0, 1.0]]), sizes[:1]).tolist() == [[0.0, 1.0]]


# ---------------------------------------------------------------------- predictions and confusion


def mistakes_of(names: list[str]) -> dict:
    labels, predicted = names[: len(NOISE)], names[::-1][: len(NOISE)]
    images = NOISE[: len(labels)]
    return {"images": images, "labels": labels, "predicted": predicted, "probabilities": [1.0] * 16}


def test_captions_of_long_names_are_apart():
    figure = score_figures.predictions(*mistakes_of(LONG).values(), "title")
    titles = [axes.title for axes in figure.axes]
    assert all("100.0 %\n(true: " in title.get_text() for title in titles)
    assert_apart(figure, titles)
    short = score_figures.predictions(*mistakes_of(list("0123456789abcdef")).values(), "title")
    assert "f: 100.0 % (true: 0)" in [axes.get_title() for axes in short.axes]


def test_names_that_are_cut_to_the_same_are_numbered():
    names = ["a long name of a class, the first", "b", "a long name of a class, the second"]
    assert figures.labels(names) == ["a long name of a ... 0", "b", "a long name of a ... 2"]


def draw_confusion(names: list[str]) -> Figure:
    K = len(names)
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(K, size=(2, 30 * K))
    predicted = np.where(generator.random(len(labels)) < 0.8, labels, predicted)
    logits = np.eye(K, dtype=np.float32)[predicted]
    outputs = Outputs(logits, logits, labels)
    return score_figures.confusion(
        outputs.confusion, outputs.class_scores, names, mistakes_of(names), "title"
    )


@pytest.mark.parametrize(
    "names",
    [["cat", "dog"], LONG[:26], pytest.param(LONG, marks=pytest.mark.slow)],
    ids=["2", "26", "100"],
)
def test_a_confusion_matrix_is_legible_with_its_class_names(names):
    figure = draw_confusion(names)
    matrix, scores, *rest = figure.axes
    assert len(matrix.texts) == (len(names) ** 2 if len(names) <= 26 else 0)
    assert [axes.get_ylabel() for axes in rest].count("images; none: white") == (len(names) > 26)
    for axis in (matrix.xaxis, matrix.yaxis, scores.yaxis):
        labels = axis.get_ticklabels()
        assert [label.get_text() for label in labels] == names
        assert_apart(figure, labels)
        assert min(label.get_size() for label in labels) >= 7
    assert_apart(figure, scores.texts)
    assert_apart(figure, matrix.texts[:60])
    assert_apart(figure, [axes.title for axes in figure.axes if axes.get_title()])


def test_scores_have_bars_on_one_scale_in_all_pictures():
    widths = []
    for low in (0.2, 0.98):
        scores = np.array([[0.99, 0.99, 0.99], [low, low, low]])
        axes = score_figures.confusion(np.eye(2, dtype=int), scores, "ab", mistakes_of([]), "").axes
        bars = axes[1].patches[6:]  # over those of 100 %
        widths.append(bars[0].get_width())
        assert bars[3].get_width() / bars[0].get_width() == pytest.approx(low / 0.99)
        assert "There is no mistake" in [f.get_suptitle() for f in axes[0].figure.figure.subfigs]
    assert widths[0] == widths[1]


# ------------------------------------------------------------------------- reliability and training


def test_a_reliability_diagram_has_a_bar_and_a_point_for_each_bin_that_has_images():
    counts, correct = np.zeros(15, int), np.zeros(15, int)
    counts[[7, 13]], correct[[7, 13]] = (1, 40), (1, 36)
    confidence = np.zeros(15)
    confidence[[7, 13]] = 0.5, 0.92
    figure = score_figures.reliability(Reliability(counts, correct, confidence), "title")
    upper, lower = figure.axes
    bars = [bar for bar in upper.patches if bar.get_height()]
    assert [bar.get_height() for bar in bars] == [100, 90]
    assert [bar.get_x() for bar in bars] == pytest.approx([700 / 15, 1300 / 15])
    assert [bar.get_height() for bar in lower.patches] == [1, 40]
    assert lower.get_ylim()[0] == 0.5  # of one image a bar is seen, too
    assert [bar.get_facecolor()[3] for bar in bars] == [0.12, 0.35]  # of a few images it is pale
    (dots,) = (each for each in upper.containers if isinstance(each, ErrorbarContainer))
    points, _, (interval,) = dots
    assert points.get_xydata().tolist() == [[50, 100], [92, 90]]
    assert [segment[:, 0].tolist() for segment in interval.get_segments()] == [[50] * 2, [92] * 2]
    assert "mean confidence and accuracy of a bin" in dots.get_label()
    edges = np.linspace(0, 100, 16)
    assert set(np.round(upper.get_xticks(), 6)) <= set(np.round(edges, 6))  # ticks where bars end
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "pale: fewer than 10 images" in texts
    assert_apart(figure, figure.legends[0].get_texts())


def row(epoch: int, acc: float = 90.0, is_best: bool = False) -> dict:
    names = ("train_loss", "train_acc", "grad_norm", "val_loss", "val_top5", "seconds")
    numbers = dict.fromkeys(names, 1.0)
    return {**numbers, "epoch": epoch, "val_acc": acc, "is_best": is_best, "lr": {"all": 0.1}}


@pytest.mark.parametrize("epochs", [1, 2, 7, 20, 360])
def test_curves_tell_first_and_last_epoch_and_the_star_hides_no_point(epochs):
    rows = [row(epoch, is_best=epoch == 1) for epoch in range(1, epochs + 1)]
    history = {"dataset": "a $b$ of a rather long name", "epochs": rows, "test": None}
    figure = figures.training_curves(history)
    figure.draw_without_rendering()
    for axes in figure.axes:
        ticks = axes.get_xticks()
        assert ticks[0] == 1 and ticks[-1] == epochs and len(ticks) <= 11
        assert (ticks == ticks.round()).all()
    (star,) = (line for line in figure.axes[1].lines if line.get_marker() == "*")
    assert star.get_markerfacecolor() == "none"
    assert to_rgba(star.get_markeredgecolor()) == to_rgba(figures.GREEN)
