"""Pictures and the report: readable, made from every kind of checkpoint, safe to open."""

import html.parser
import json
import re

import numpy as np
import pytest
import torch
from conftest import MNIST, assert_one_error_line, needs_mnist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

import inference
from analysis import explain, figures, report
from common.errors import UserError
from data.digits import load_digits
from deploy.flags import FLAGS_OF_MODES
from saving.checkpoint import PUBLISHED, load_checkpoint, save_checkpoint
from utils import BatchLoader
from vit_model import ViT

HOSTILE = (
    '<img src="http://example.com/x" onerror=alert(1)>|](http://example.com/y) $\\frac$ \ud800'
)
PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ["visualize", "attention", "embeddings", "confusion", "calibration"]


def save(path, model: ViT, **more) -> None:
    state = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    save_checkpoint(path, {**state, "best_acc": 12.5, **more})


def small(**config) -> dict:
    return {"depth": 2, "embed_dim": 16, "num_heads": 2, **config}


@pytest.fixture
def mean_checkpoint(tmp_path) -> str:
    """Mean pooling, fixed position embeddings, 49 patches; nothing beside it."""
    config = small(pool="mean", pos_embed="sincos2d", patch_size=4)
    about = {**PUBLISHED, "dataset": "digits", "model_config": config}
    (tmp_path / "alone").mkdir()
    path = tmp_path / "alone" / "mean.pt"
    torch.manual_seed(0)
    save(path, ViT(**config), **about)
    return str(path)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are written, in turn. The 2-D maps have few points, to be quick."""
    figures_drawn = []
    save, png = figures.save, figures.png
    monkeypatch.setattr(figures, "save", lambda f, path: (figures_drawn.append(f), save(f, path)))
    monkeypatch.setattr(figures, "png", lambda f: (figures_drawn.append(f), png(f))[1])
    monkeypatch.setattr(inference, "MAPPED_IMAGES", 60)
    return figures_drawn


# --------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", PICTURES)
def test_a_mode_writes_its_picture(run, tmp_path, mean_checkpoint, mode, drawn):
    flags = ["--mode", mode, "--checkpoint", mean_checkpoint, "--output", "p.png"]
    if mode in FLAGS_OF_MODES["seed"][0]:
        flags += ["--seed", 1]
    result = run(inference.main, *flags)
    assert result.status == 0 and "Written: p.png" in result.out, result.err
    picture = imread(tmp_path / "p.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.05
    assert_readable(drawn[0])


def assert_readable(figure) -> None:
    """In a figure that was written all lies within the page, and no two titles touch."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn, page = figure.get_tightbbox(renderer), figure.get_size_inches() + 0.02
    assert min(drawn.min) > -0.02 and (drawn.max < page).all(), drawn
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    boxes = [title.get_window_extent(renderer) for title in [*titles, figure._suptitle]]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), box


def test_attention_draws_the_images_asked_for(run, tmp_path, mean_checkpoint):
    flags = ("--mode", "attention", "--checkpoint", mean_checkpoint, "--output")
    for name, chosen in {"a": (7, 3), "b": (7, 3), "c": (7, 4)}.items():
        assert run(inference.main, *flags, f"{name}.png", "--index", *chosen).status == 0
    a, b, c = (imread(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.array_equal(a[200 : len(a) // 2 - 100, :400], c[200 : len(c) // 2 - 100, :400])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode attention --index 180", "--index 180 digits 0 to 179"),
        ("--mode attention --index -1", "--index at least 0"),
        ("--mode attention --index " + "1 " * 13, "--index 13 12"),
        ("--mode confusion --index 1", "--index --mode attention report confusion"),
        ("--mode calibration --output x.json", "x.json .png"),
        ("--mode report --output x.png", "x.png .html"),
        ("--mode report --output file/x.html", "file/x.html cannot be written"),
    ],
)
def test_wrong_usage_ends_in_one_line(run, tmp_path, mean_checkpoint, flags, words):
    (tmp_path / "file").write_text("kept")
    result = run(inference.main, *flags.split(), "--checkpoint", mean_checkpoint)
    assert_one_error_line(result, *words.split())
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "alone", "outputs"}


# --------------------------------------------------------------------------------------- the report


class Page(html.parser.HTMLParser):
    """What a browser would load or run, and the words it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.words = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        assert not any(k.startswith("on") for k, _ in attrs), attrs

    def handle_data(self, data):
        self.words += data


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    allowed = ("data:image/png;base64,", "#")
    assert all(link.startswith(allowed) for link in page.links), page.links
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert "url(" not in text and "@import" not in text
    return page


def test_the_report_of_a_training_run_tells_all_of_it(run, tmp_path, trained, drawn):
    path = trained / "checkpoints" / "best_model.pt"
    result = run(inference.main, "--mode", "report", "--checkpoint", path, "--seed", 0)
    assert result.status == 0 and result.err == ""
    page = assert_self_contained((tmp_path / "outputs" / "report.html").read_text())
    markdown = (tmp_path / "outputs" / "report.md").read_text()
    history = json.loads((trained / "checkpoints" / "history.json").read_text())
    assert sum(link.startswith("data:") for link in page.links) == 6  # five, and the curves
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == 6
    for name in pictures:
        assert (tmp_path / "outputs" / name).read_bytes().startswith(PNG)
    for words in (page.words, markdown.replace("\\", "")):
        for expected in (
            f"{history['test']['top1']:.2f} %",
            f"{history['test']['best_val_acc']:.2f} % in epoch {history['test']['best_epoch']}",
            f"{history['epochs'][-1]['train_loss']:.4f}",
            f"{history['parameters']:,}",
            history["settings"]["scheduler"],
            history["versions"]["torch"],
            "expected calibration error",
        ):
            assert expected in words, expected
        assert "CPU against GPU" not in words and "Left out" not in words
    for figure in drawn:
        assert_readable(figure)


def test_the_report_of_a_checkpoint_alone(run, tmp_path, mean_checkpoint, drawn):
    flags = ("--mode", "report", "--checkpoint", mean_checkpoint, "--output", "a/b.html")
    result = run(inference.main, *flags)
    assert result.status == 0 and result.err == ""
    page = assert_self_contained((tmp_path / "a" / "b.html").read_text())
    assert len([link for link in page.links if link.startswith("data:")]) == 5
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"b.html", "b.md", *(f"b_{picture}.png" for picture in PICTURES)}


@needs_mnist
def test_the_report_of_a_published_checkpoint(run, tmp_path, drawn):
    torch.manual_seed(0)
    save(tmp_path / "published.pt", ViT(depth=1, embed_dim=16))
    flags = ("--mode", "report", "--checkpoint", "published.pt", "--data_dir", MNIST)
    result = run(inference.main, *flags)
    assert result.status == 0 and result.err == ""
    page = assert_self_contained((tmp_path / "outputs" / "report.html").read_text())
    assert "of 10,000 wrong" in page.words
    for figure in drawn:
        assert_readable(figure)


# ------------------------------------------------------------ what stands beside the checkpoint


@pytest.fixture(scope="module")
def outputs(trained) -> explain.Outputs:
    model, checkpoint = load_checkpoint(trained / "checkpoints" / "best_model.pt")
    return explain.outputs(
        model, BatchLoader(load_digits().test, 500, **checkpoint["normalization"])
    )


FINGERPRINT = "0123456789ab"  # of the settings that all these files are of


@pytest.fixture
def write(tmp_path, trained, outputs):
    """write(**checkpoint) -> notes, HTML and Markdown of a report beside `tmp_path`'s files."""

    def call(**changes) -> tuple[list[str], str, str]:
        model, checkpoint = load_checkpoint(trained / "checkpoints" / "best_model.pt")
        notes = report.write_report(
            tmp_path / "report.html",
            checkpoint_path=tmp_path / "model.pt",
            checkpoint={**checkpoint, "fingerprint": FINGERPRINT, **changes},
            model=model,
            outputs=outputs,
            pictures=dict.fromkeys(PICTURES, PNG),
        )
        return notes, *((tmp_path / f"report.{end}").read_text() for end in ("html", "md"))

    return call


TIMING = {
    "device": "cpu (x86_64, 2 threads)",
    "epochs": "20",
    "batch_size": "128",
    "total_train_time": "1400.00",
    "avg_time_per_epoch": "70.00",
    "best_val_acc": "98.65",
    "test_acc": "98.97",
    "dataset": "mnist",
    "fingerprint": FINGERPRINT,
}


def write_timing(path, **changes) -> None:
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**TIMING, **changes}.items()))


def test_two_timings_are_compared_in_both_files(tmp_path, write):
    write_timing(tmp_path / "timing_cpu.txt")
    assert "CPU against GPU" not in write()[1]
    gpu = {"device": "cuda (H200)", "total_train_time": "100.00", "avg_time_per_epoch": "5.00"}
    write_timing(tmp_path / "timing_cuda.txt", **gpu, test_acc="99.01", test_top5="99.99")
    notes, page, markdown = write()
    assert notes == []
    for row in (
        ["device", "cpu (x86_64, 2 threads)", "cuda (H200)", ""],
        ["batch size", "128", "128", ""],
        ["training time", "1400.00 s", "100.00 s", "14.00 times"],
        ["time per epoch", "70.00 s", "5.00 s", "14.00 times"],
        ["best validation accuracy", "98.65 %", "98.65 %", ""],
        ["test accuracy", "98.97 %", "99.01 %", ""],
        ["test accuracy, top-5", "not given", "99.99 %", ""],
    ):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
        assert f"| {' | '.join(row)} |".replace("_", "\\_") in markdown
    # Of other settings, of an older version, of a run that was given more epochs.
    for other in ({"fingerprint": "ba9876543210"}, {"fingerprint": None}, {"epochs": "30"}):
        write_timing(tmp_path / "timing_cuda.txt", **gpu, **other)
        notes, page, _ = write()
        assert "CPU against GPU" not in page and "not both are of this run" in notes[0]


def test_a_timing_without_top5_takes_it_from_its_own_runs_history(tmp_path, write):
    for kind, test_acc in {"cpu": "99.0", "cuda": "98.0"}.items():
        write_timing(tmp_path / f"timing_{kind}.txt", device=kind, test_acc=test_acc)
    (tmp_path / "history.json").write_text(json.dumps(history(device="cpu")))
    row = "<td>test accuracy, top-5</td><td>100.00 %</td><td>not given</td>"
    assert row in write(best_acc=1.0)[1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no timing",
        "total_train_time: soon",
        "".join(f"{key}: nan\n" for key in TIMING),
        "".join(f"{key}: 0\n" for key in TIMING),
        "".join(f"{key}: 1e400\n" for key in TIMING),
        b"\xff\xfe\x00",
        "x" * (report.MAX_BYTES + 1),
    ],
)
def test_a_damaged_timing_is_told_and_left_out(tmp_path, content):
    path = tmp_path / "timing_cpu.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"timing_cpu\.txt"):
        report.read_timing(path)


def history(**changes) -> dict:
    numbers = dict.fromkeys(report.EPOCH_NUMBERS, 1.0)
    row = {**numbers, "lr": {"all": 0.1}, **changes.pop("row", {})}
    test = {"loss": 0.1, "top1": 99.0, "top5": 100.0}
    told = {"dataset": "digits", "fingerprint": FINGERPRINT, "settings": {}}
    return {**told, "epochs": [row], "test": test, **changes}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"epochs": ' + "9" * 5000 + "}",
        history(epochs=[]),
        history(epochs={"a": 1}),
        history(test={"top1": "99"}),
        history(settings=[]),
        history(row={"val_acc": float("nan")}),
        history(row={"val_acc": 1e300}),
        history(row={"val_loss": None}),
        history(row={"lr": {"all": "x"}}),
        history(row={"lr": [1]}),
        history(row={"epoch": True}),
    ],
)
def test_a_damaged_history_is_told_and_left_out(tmp_path, content):
    path = tmp_path / "history.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=r"history\.json"):
        report.read_history(path)


def test_what_is_left_out_of_a_report_is_noted(tmp_path, write):
    (tmp_path / "history.json").write_text("{")
    (tmp_path / "timing_cpu.txt").mkdir()
    write_timing(tmp_path / "timing_cuda.txt")
    notes, page, markdown = write()
    assert len(notes) == 2 and "history.json" in notes[0] and "timing_cpu.txt" in notes[1]
    for text in (page, markdown):
        assert "Left out" in text and "CPU against GPU" not in text
    (tmp_path / "history.json").write_text(json.dumps(history(row={"val_acc": 1.5})))
    assert any("not of this checkpoint" in note for note in write()[0])
    assert not any("history" in note for note in write(best_acc=1.5)[0])
    assert any("not of this checkpoint" in n for n in write(best_acc=1.5, fingerprint="another")[0])


def test_curve_and_table_star_the_epoch_that_left_the_best_model(tmp_path, write):
    """Not the highest accuracy: averages compete among themselves."""
    rows = [
        history(row={"epoch": epoch, "val_acc": acc, "is_best": is_best})["epochs"][0]
        for epoch, (acc, is_best) in enumerate([(97, True), (99, True), (98, True), (97.5, False)])
    ]
    (tmp_path / "history.json").write_text(json.dumps(history(epochs=rows)))
    notes, page, markdown = write(best_acc=98)
    assert notes == [] and "<td>2 ★</td>" in page and page.count("★") == 1
    assert "| 2 ★ |" in markdown and markdown.count("★") == 1
    figure = figures.training_curves({**history(epochs=rows), "test": None})
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    assert "best: 98.00 % in epoch 2" in labels
    for row in rows:  # as older files are
        del row["is_best"]
    assert figures.best_row({"epochs": rows})["epoch"] == 1


def test_an_unfinished_runs_history_is_drawn(tmp_path, write):
    (tmp_path / "history.json").write_text(json.dumps(history(test=None, row={"lr": {}})))
    notes, page, _ = write(best_acc=1.0)
    assert notes == [] and page.count("data:image/png") == 6


def test_text_from_files_is_shown_and_never_taken_for_markup(tmp_path, write):
    names = [HOSTILE, *"123456789"]
    written = history(dataset="digits", device=HOSTILE, settings={HOSTILE: HOSTILE})
    written["epochs"][0]["lr"] = {HOSTILE: 0.1, "_x": 0.2}
    (tmp_path / "history.json").write_text(json.dumps(written))
    for kind in ("cpu", "cuda"):
        write_timing(tmp_path / f"timing_{kind}.txt", device=HOSTILE.encode(errors="replace"))
    odd = {HOSTILE: torch.zeros(3), "n": 10**5000, 1: [[]]}
    notes, page, markdown = write(
        class_names=names, best_acc=1.0, settings=odd, versions={HOSTILE: HOSTILE}
    )
    assert notes == []
    assert "<img src=" in assert_self_contained(page).words  # as words
    assert "<img" not in markdown and not re.search(r"(?<!\\)\]\(http", markdown)
    cells = [line for line in markdown.splitlines() if "example.com" in line]
    assert cells and all(re.sub(r"\\.", "", line).count("|") in (3, 5, 6) for line in cells)


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no Chinese
def test_class_names_from_a_stranger_can_be_drawn(run, tmp_path, drawn):
    config = small(depth=1)
    about = {**PUBLISHED, "dataset": "digits", "model_config": config}
    hostile = "<img src=x onerror=alert(1)> | [a](http://example.com) $"
    about["class_names"] = [hostile, "_2", " ", "$a_b_c$", "x" * 100, "漢", *"6789"]
    save(tmp_path / "odd.pt", ViT(**config), **about)
    for mode in ("confusion", "embeddings"):
        assert run(inference.main, "--mode", mode, "--checkpoint", "odd.pt").status == 0


def test_class_names_on_one_spot_are_moved_apart():
    places = figures._apart(np.array([[0.5, 0.5], [0.5, 0.5], [0.52, 0.5], [0.9, 0.9]]), 0.06)
    gaps = np.linalg.norm(places[:, None] - places, axis=2) + np.eye(4)
    assert gaps.min() > 0.055 and np.linalg.norm(places[3] - 0.9) < 0.001
    assert np.abs(places[:3] - 0.5).max() < 0.1
