"""Pictures and the report: readable, made from every kind of checkpoint, safe to open."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, assert_one_error_line, needs_mnist
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from PIL import Image

import inference
from analysis import explain, figures, report, run_files
from data.digits import load_digits
from deploy.flags import FLAGS_OF_MODES
from saving.checkpoint import PUBLISHED, load_checkpoint, save_checkpoint
from vit_model import ViT

HOSTILE = (
    '\x1b{{7*7}}<img src="http://example.com/x" onerror=alert(1)>|](http://example.com/y) $\\frac$ '
    "\ud800"
)
PNG = b"\x89PNG\r\n\x1a\n"
# What each picture's title says.
PICTURES = {
    "visualize": "of 16 test images right",
    "attention": "attention to each patch",
    "embeddings": "Embeddings of positions",
    "confusion": "% of 180 test images right",
    "calibration": "Expected calibration error",
}


def save(path, about=None, **config) -> str:
    """A small network that was not trained, for the digits unless `about` says else."""
    config = {"depth": 2, "embed_dim": 16, "num_heads": 4, **config}
    if about is None:
        about = {**PUBLISHED, "dataset": "digits", "model_config": config}
    torch.manual_seed(0)
    state = {"model_state_dict": ViT(**config).state_dict(), "optimizer_state_dict": {}}
    save_checkpoint(path, {"epoch": 1, **state, "best_acc": 12.5, **about})
    return str(path)


@pytest.fixture
def mean_checkpoint(tmp_path) -> str:
    """Mean pooling, fixed position embeddings, 49 patches; nothing beside it."""
    (tmp_path / "alone").mkdir()
    config = {"pool": "mean", "pos_embed": "sincos2d", "patch_size": 4}
    return save(tmp_path / "alone" / "mean.pt", **config)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are written, in turn. The 2-D maps have few points, to be quick."""
    seen = []
    save, png = figures.save, figures.png
    monkeypatch.setattr(figures, "save", lambda f, path: (seen.append(f), save(f, path)))
    monkeypatch.setattr(figures, "png", lambda f: (seen.append(f), png(f))[1])
    monkeypatch.setattr(inference, "MAPPED_IMAGES", 60)
    return seen


@pytest.mark.parametrize(("mode", "words"), PICTURES.items())
def test_a_mode_writes_its_picture(run, tmp_path, mean_checkpoint, mode, words, drawn):
    flags = ["--mode", mode, "--checkpoint", mean_checkpoint, "--output", "p.png"]
    if mode in FLAGS_OF_MODES["seed"][0]:
        flags += ["--seed", 1]
    result = run(inference.main, *flags)
    assert words in result.out and "Written: p.png" in result.out, result.err
    picture = imread(tmp_path / "p.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.05
    assert_readable(drawn[0])


def assert_readable(figure) -> None:
    """In a figure that was written all lies within the page, no two titles touch, and predictions
    are marked as right or wrong."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn, page = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert min(drawn.min) > 0.02 and (drawn.max < page - 0.02).all(), drawn
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    boxes = [title.get_window_extent(renderer) for title in [*titles, figure._suptitle]]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), box
    for title in titles:
        if match := re.search(r"(\S+): [\d.]+ %\s\(true: (\S+)\)", title.get_text()):
            right = match[1] == match[2]
            assert title.get_color() == (figures.GREEN if right else figures.RED)
            assert (title.get_weight() == "bold") == (not right)


def test_attention_draws_the_images_asked_for(run, mean_checkpoint, drawn):
    flags = ("--mode", "attention", "--checkpoint", mean_checkpoint, "--index", 7, 4)
    assert run(inference.main, *flags).status == 0
    shown = [axes for axes in drawn[0].axes if "test image" in axes.get_title()]
    for index, axes in zip((7, 4), shown, strict=True):
        assert axes.get_title().startswith(f"test image {index}\n")
        assert np.array_equal(axes.images[0].get_array(), load_digits().test.images[index, 0])


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


def test_photos_are_drawn_in_colour_in_every_picture(run, photos, drawn):
    """The outline of a digit says nothing of a photo: the maps tint a pale version of it."""
    path = photos / "checkpoints" / "best_model.pt"
    shown = {}
    for mode in PICTURES:
        flags = ("--checkpoint", path, "--data_dir", photos / "photos", "--output", f"{mode}.png")
        result = run(inference.main, "--mode", mode, *flags)
        assert result.status == 0 and "(photos)" in result.out, result.err
        assert "left out: the model was trained on the same" in result.err
        assert_readable(drawn[-1])
        shown[mode] = [axes.images[0].get_array() for axes in drawn[-1].axes if axes.images]
    in_colour = {mode: sum(image.ndim == 3 for image in shown[mode]) for mode in shown}
    assert in_colour["visualize"] == 16 and in_colour["attention"] == 9  # three for each image
    assert in_colour["embeddings"] == 1  # the filters
    for image in (shown["visualize"][0], shown["attention"][0]):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert np.ptp(image.astype(int), axis=2).max() > 100  # a coloured shape


def test_one_picture_is_enough_for_every_figure(run, photos, drawn):
    Path("one/circle").mkdir(parents=True)
    shutil.copy(photos / "photos" / "circle" / "0.png", "one/circle/other.png")
    Image.open("one/circle/other.png").rotate(90).save("one/circle/other.png")  # not trained on
    path = photos / "checkpoints" / "best_model.pt"
    for mode in PICTURES:
        flags = ("--checkpoint", path, "--data_dir", "one", "--output", "p.png")
        result = run(inference.main, "--mode", mode, *flags)
        assert result.status == 0, result.err
        assert_readable(drawn[-1])


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
    assert not run(inference.main, "--mode", "report", "--checkpoint", path, "--seed", 0).err
    page = assert_self_contained((tmp_path / "outputs" / "report.html").read_text())
    markdown = (tmp_path / "outputs" / "report.md").read_text()
    history = json.loads((trained / "checkpoints" / "history.json").read_text())
    low, high = explain.accuracy_interval(round(1.8 * history["test"]["top1"]), 180)
    assert sum(link.startswith("data:") for link in page.links) == 6  # five, and the curves
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == 6
    for name in pictures:
        assert (tmp_path / "outputs" / name).read_bytes().startswith(PNG)
    for words in (page.words, markdown.replace("\\", "")):
        for expected in (
            f"{history['test']['top1']:.2f} % (",
            f" of 180 wrong; 95 % interval {100 * low:.2f} to {100 * high:.2f} %)",
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
    assert not run(inference.main, *flags).err
    page = assert_self_contained((tmp_path / "a" / "b.html").read_text())
    assert "alone/mean.pt" in page.words and str(tmp_path) not in page.words
    assert sum(link.startswith("data:") for link in page.links) == 5
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"b.html", "b.md", *(f"b_{picture}.png" for picture in PICTURES)}


def test_a_report_speaks_of_what_the_model_is_and_was_trained_on(
    run, photos, mean_checkpoint, monkeypatch
):
    monkeypatch.setattr(inference, "PICTURES", {"attention": inference.draw_attention})
    path = photos / "checkpoints" / "best_model.pt"
    flags = ("--mode", "report", "--output", "r.html", "--checkpoint")
    assert run(inference.main, *flags, path, "--data_dir", photos / "photos").status == 0
    of_photos = Page(Path("r.html").read_text()).words
    assert run(inference.main, *flags, mean_checkpoint).status == 0
    of_digits = Page(Path("r.html").read_text()).words
    for words, its_own, anothers in (
        (of_photos, ("the CLS token takes", "a pale grey version of the image"), "all patches on"),
        (of_digits, ("all patches on average take", "the outline of the digit"), "CLS token takes"),
    ):
        assert all(text in words for text in its_own) and anothers not in words
    assert "digit" not in of_photos
    assert "test accuracy, top-5" not in of_photos  # of three classes
    assert "3: circle, square, triangle" in of_photos
    assert "32x32 pixels, colour; a picture is its middle square" in of_photos
    assert "10: 0, 1, 2, 3" in of_digits and "28x28 pixels, grey" in of_digits
    assert "test accuracy, top-5" in of_digits


@needs_mnist
def test_the_report_of_a_published_checkpoint(run, tmp_path, drawn):
    save(tmp_path / "published.pt", about={}, depth=1)  # four keys, no more
    flags = ("--mode", "report", "--checkpoint", "published.pt", "--data_dir", MNIST)
    assert not run(inference.main, *flags).err
    page = assert_self_contained((tmp_path / "outputs" / "report.html").read_text())
    assert "of 10,000 wrong" in page.words


# ------------------------------------------------------------ what stands beside the checkpoint

FINGERPRINT = "0123456789ab"  # of the settings that all these files are of
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


def timing(**changes) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {**TIMING, **changes}.items())


def history(row=None, **changes) -> str:
    numbers = dict.fromkeys(run_files.EPOCH_NUMBERS, 1.0)
    rows = [{**numbers, "lr": {"all": 0.1}, "is_best": True, **(row or {})}]
    test = {"loss": 0.1, "top1": 99.0, "top5": 100.0}
    about = {"dataset": "digits", "fingerprint": FINGERPRINT, "settings": {}}
    return json.dumps({**about, "epochs": rows, "test": test, **changes})


@pytest.fixture
def write(tmp_path):
    """write(files, **checkpoint) -> notes, HTML and Markdown of a report beside these files."""
    model, checkpoint = load_checkpoint(save(tmp_path / "model.pt"))
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).numpy()

    def call(files: dict[str, str], **changes) -> tuple[list[str], str, str]:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        notes = report.write_report(
            tmp_path / "report.html",
            checkpoint_path=tmp_path / "model.pt",
            checkpoint={**checkpoint, "fingerprint": FINGERPRINT, **changes},
            model=model,
            outputs=explain.Outputs(logits, logits, np.arange(40) % 10),
            dataset="digits",
            pictures=dict.fromkeys(PICTURES, PNG),
        )
        return notes, *((tmp_path / f"report.{end}").read_text() for end in ("html", "md"))

    return call


def test_two_timings_are_compared_in_both_files(write):
    assert "CPU against GPU" not in write({"timing_cpu.txt": timing()})[1]
    gpu = {"device": "cuda (H200)", "total_train_time": "100.00", "avg_time_per_epoch": "5.00"}
    better = {"test_acc": "99.01", "test_top5": "99.99"}
    notes, page, markdown = write({"timing_cuda.txt": timing(**gpu, **better)})
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
        notes, page, _ = write({"timing_cuda.txt": timing(**gpu, **other)})
        assert "CPU against GPU" not in page and "not both are of this run" in notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("timing_cpu.txt", ""),
        ("timing_cpu.txt", "no timing"),
        ("timing_cpu.txt", "total_train_time: soon"),
        *(("timing_cpu.txt", timing(**dict.fromkeys(TIMING, n))) for n in ("nan", "0", "1e400")),
        ("timing_cpu.txt", b"\xff\xfe\x00"),
        ("timing_cpu.txt", "x" * (run_files.MAX_BYTES + 1)),
        ("history.json", ""),
        ("history.json", "[]"),
        ("history.json", "null"),
        ("history.json", "[" * 100_000),
        ("history.json", '{"epochs": ' + "9" * 5000 + "}"),
        ("history.json", history(epochs=[])),
        ("history.json", history(epochs={"a": 1})),
        ("history.json", history(test={"top1": "99"})),
        ("history.json", history(settings=[])),
        ("history.json", history({"val_acc": float("nan")})),
        ("history.json", history({"val_acc": 1e300})),
        ("history.json", history({"val_loss": None})),
        ("history.json", history({"lr": {"all": "x"}})),
        ("history.json", history({"lr": [1]})),
        ("history.json", history({"epoch": True})),
    ],
)
def test_a_damaged_file_is_named_in_a_note(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    checkpoint = {"best_acc": 1.0, "dataset": "digits", "fingerprint": FINGERPRINT}
    read, timings, notes = run_files.read_run_files(tmp_path, checkpoint)
    assert read is None and timings == [] and len(notes) == 1
    assert name in notes[0] and len(notes[0].splitlines()) == 1
    assert ("over 20 MB" in notes[0]) == (len(content) > run_files.MAX_BYTES)


def test_what_is_left_out_of_a_report_is_noted(tmp_path, write):
    (tmp_path / "timing_cpu.txt").mkdir()
    notes, *texts = write({"history.json": "{", "timing_cuda.txt": timing()})
    assert len(notes) == 2 and "history.json" in notes[0] and "timing_cpu.txt" in notes[1]
    assert "it is a folder or a device" in notes[1]
    assert all("Left out" in text and "CPU against GPU" not in text for text in texts)
    for other in ({}, {"best_acc": 1.5, "fingerprint": "another"}, {"best_acc": 1.5}):
        is_of_run = other == {"best_acc": 1.5}
        notes, page, _ = write({"history.json": history({"val_acc": 1.5})}, **other)
        assert ("not of this checkpoint" in " ".join(notes)) == (not is_of_run)
        assert page.count("data:image/png") == 5 + is_of_run


def test_curve_and_table_star_the_epoch_that_left_the_best_model(write):
    """Not the highest accuracy: averages compete among themselves."""
    marks = [(97, True), (99, True), (98, True), (97.5, False)]
    rows = [
        json.loads(history({"epoch": epoch, "val_acc": acc, "is_best": is_best}))["epochs"][0]
        for epoch, (acc, is_best) in enumerate(marks)
    ]
    notes, page, markdown = write({"history.json": history(epochs=rows)}, best_acc=98)
    assert notes == [] and "<td>2 ★</td>" in page and page.count("★") == 1
    assert "| 2 ★ |" in markdown and markdown.count("★") == 1
    figure = figures.training_curves({"dataset": "digits", "epochs": rows, "test": None})
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    assert "best: 98.00 % in epoch 2" in labels


def test_an_unfinished_runs_history_is_drawn(write):
    notes, page, _ = write({"history.json": history({"lr": {}}, test=None)}, best_acc=1.0)
    assert notes == [] and page.count("data:image/png") == 6


def test_a_long_table_is_cut(write):
    _, page, markdown = write({}, settings={f"setting {i}": i for i in range(report.MAX_ROWS + 7)})
    assert "| setting 5 | 5 |" in markdown and "<td>setting 5</td><td>5</td>" in page
    for text in (page, markdown):
        assert "(7 more rows are not shown)" in text
        assert f"setting {report.MAX_ROWS - 1}" in text and f"setting {report.MAX_ROWS}" not in text


def test_text_from_files_is_shown_and_never_taken_for_markup(write):
    device = HOSTILE.encode(errors="replace").decode()
    files = {
        "history.json": history(
            {"lr": {HOSTILE: 0.1, "_x": 0.2}}, device=HOSTILE, settings={HOSTILE: HOSTILE}
        ),
        "timing_cpu.txt": timing(device=device),
        "timing_cuda.txt": timing(device=device),
    }
    odd = {HOSTILE: torch.zeros(3), "n": 10**5000, 1: [[]]}
    about = {
        "class_names": [HOSTILE, *"123456789"],
        "settings": odd,
        "versions": {HOSTILE: HOSTILE},
    }
    for given in (files, {"history.json": "{"}):  # the settings: first the history's, then `odd`
        notes, page, markdown = write(given, best_acc=1.0, **about)
        assert len(notes) == (given is not files)
        words = assert_self_contained(page).words
        assert "<img src=" in words and "{{7*7}}" in words  # as words
        assert "\x1b" not in page + markdown
        assert "<img" not in markdown and not re.search(r"(?<!\\)\]\(http", markdown)
        cells = [line for line in markdown.splitlines() if "example.com" in line]
        assert cells and all(re.sub(r"\\.", "", line).count("|") in (3, 5, 6) for line in cells)


def test_class_names_from_a_stranger_can_be_drawn(run, tmp_path, drawn):
    hostile = "<img src=x onerror=alert(1)> | [a](http://example.com) $"
    names = [hostile, "_2", " ", "$a_b_c$", "x" * 100, "漢", *"6789"]
    config = {"depth": 1, "embed_dim": 16}
    about = {"dataset": "digits", "class_names": names, "model_config": config}
    save(tmp_path / "odd.pt", about, **config)
    for mode in ("confusion", "embeddings"):
        result = run(inference.main, "--mode", mode, "--checkpoint", "odd.pt")
        assert result.status == 0 and "Glyph" not in result.err
        assert ("no font here has 漢" in result.err) == (len(rcParams["font.family"]) == 1)
