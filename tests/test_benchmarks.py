"""The benchmarks run, and print a Markdown table with machine, versions and command."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist, read
from picture_folders import draw_shapes
from PIL import Image

from data.augment import Augment
from data.digits import load_digits
from data.disturb import FAMILIES
from data.load import load_dataset
from saving.checkpoint import save_checkpoint

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from report import training_flops  # noqa: E402

import disturbances  # noqa: E402
from corruptions import KINDS, corrupt  # noqa: E402
from robustness import MNIST_C, load_readers  # noqa: E402

# What these make of an image at strength 0 is not quite that image.
NEVER_THE_SAME = "dark on light, motion, thin, thick, JPEG, dithered, posterised, fax".split(", ")
SCRIPTS = sorted(p.name for p in BENCHMARKS.glob("*.py") if "def main(" in p.read_text("utf-8"))
SHORT = {
    "roofline.py": "--recipe fast --turns 1",
    "epoch.py": f"--images 100 --turns 1 --data_dir {MNIST}",
    "disturbances.py": f"--turns 1 --data_dir {MNIST}",
    "throughput.py": "--steps 1 --turns 1 --batch_size 8",  # in ./mnist
    "scaling.py": f"--processes 2 --steps 1 --data_dir {MNIST}",
    "optimizers.py": "--only sgd --train_samples 200",
    "accuracy.py": f"--seeds 2 --epochs 1 --data_dir {MNIST} "
    "'--flags=--train_samples 200 --depth 1 --embed_dim 16'",
}


@pytest.fixture
def bench(run):
    """bench(script, *flags): run a benchmark, as `run` does."""
    return lambda script, *flags: run(runpy.run_path(str(BENCHMARKS / script))["main"], *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_explains_itself_and_errs_in_one_line(bench, script):
    shown = bench(script, "--help")
    assert shown.status == 0 and "usage:" in shown.out and "--device" in shown.out
    assert_one_error_line(bench(script, "--device", "tpu"), "--device tpu", "expected auto, cpu")


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_a_benchmark_prints_its_table(script):
    command = [sys.executable, BENCHMARKS / script, *shlex.split(SHORT[script]), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    printed = done.stdout
    title, command, machine, header, line, *rows = [each for each in printed.splitlines() if each]
    assert title.startswith("### ") and command.startswith(f"`python benchmarks/{script} ")
    assert re.search(r"\d{4}-\d\d-\d\d; .*commit.*, \d+ threads?; Python .*, PyTorch ", machine)
    cells = header.count("|")
    assert set(line) == {"|", "-"} and line.count("|") == cells
    table = [row for row in rows if row.startswith("|")]
    assert table and all(row.count("|") == cells for row in table)


@pytest.mark.slow
def test_a_folder_is_read_in_each_way(tmp_path):
    folder = draw_shapes(tmp_path / "shapes")
    command = [sys.executable, BENCHMARKS / "reading.py", "--data_dir", folder, "--device", "cpu"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == ["18", "18", "18", "18"]
    assert sorted(path.name for path in folder.iterdir()) == ["cross", "disc", "square"]


@pytest.mark.slow
def test_accuracy_is_measured_on_any_set_for_as_long_as_it_asks(bench):
    flags = "--dataset digits --seeds 1 --device cpu --recipe fast".split()
    result = bench("accuracy.py", *flags, "--flags=--train_samples 64 --depth 1 --embed_dim 16")
    assert result.status == 0, result.err
    assert result.out.startswith("### Accuracy of `fast` on digits, 1 seed\n")
    assert "\n| 100 | " in result.out and "Reached" not in result.out  # MNIST's marks
    result = bench("accuracy.py", "--dataset", "folder", "--seeds", 1, "--device", "cpu")
    assert_one_error_line(result, "--dataset folder", "--data_dir")


def test_training_is_counted_in_flops():
    def forward(tokens, depth=3, dim=8):
        products = 4 * dim * dim + 2 * tokens * dim + 8 * dim * dim  # of a token, in a block
        return 2 * (16 * 49 * dim + depth * tokens * products + 10 * dim)

    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 8, "num_heads": 2}
    told = {"model_config": {**sizes, "depth": 3, "pool": "mean", "patch_drop": 0.5}}
    told |= {"settings": {"epochs": 4}, "train_images": 100}
    assert training_flops(told) == 3 * 100 * (2 * forward(8) + 2 * forward(16))


@needs_mnist
def test_photos_of_paper_are_counted_by_kind_and_kept_on_demand(bench, trained, tmp_path):
    flags = ["--checkpoint", trained / "checkpoints" / "best_model.pt", "--data_dir", MNIST]
    flags += ["--images", 2, "--kinds", "ruled", "16 bits", "--save", "photos", "--split", "val"]
    result = bench("paper.py", *flags)
    assert result.status == 0
    rows = [line.split(" | ")[0] for line in result.out.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| ruled", "| 16 bits", "| **over all**", "| the digits themselves"]
    photos = [p for p in (tmp_path / "photos").iterdir() if not p.stem.endswith("-read")]
    assert sorted(p.suffix for p in photos) == [".jpg", ".jpg", ".png", ".png"]
    assert all(min(Image.open(p).size) >= 300 for p in photos)
    first = {p.name: p.read_bytes() for p in photos}
    assert bench("paper.py", *flags).out == result.out
    assert {p.name: p.read_bytes() for p in photos} == first


def test_every_change_of_light_and_stroke_is_in_the_picture(bench, tmp_path):
    digits = load_digits().test.images[:3].float() / 255
    augment = Augment(noise=0.5, blur=0.5)
    rows = disturbances.examples(digits, augment, torch.Generator().manual_seed(0))
    kinds = [f"{family}: {kind}" for family, kinds in FAMILIES.items() for kind in kinds]
    together = ["the recipe's shares", "the same again", "mixed (AugMix)"]
    (axes,) = disturbances.draw_picture(rows, "a title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "unchanged",
        *kinds,
        *together,
    ]
    (drawn,) = axes.images
    assert drawn.get_array().shape == (30 * len(rows), 90)
    result = bench("disturbances.py", "--recipe", "fast", "--picture", tmp_path / "kinds.png")
    assert_one_error_line(result, "--recipe fast", "neither light nor stroke")


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_change_is_drawn_by_seed_and_leaves_images_of_digits(name):
    images = load_digits().test.images[:30, 0].numpy()
    changed = corrupt(images, name, seed=1)
    assert changed.shape == images.shape and changed.dtype == np.uint8
    assert (changed != images).any(axis=(1, 2)).mean() > 0.9
    assert changed.std(axis=(1, 2)).min() > 5  # none is blank
    assert (corrupt(images, name, seed=1) == changed).all()
    assert (corrupt(images, name, seed=2) != changed).any()
    alike = np.repeat(images[:1], 30, axis=0)
    assert len(np.unique(corrupt(alike, name), axis=0)) > 5  # each by its own amounts
    assert (corrupt(images, name, strength=0) == images).all() == (name not in NEVER_THE_SAME)


def test_each_family_of_changes_is_divided_into_halves():
    halves = [(kind.family, kind.half) for kind in KINDS.values()]
    assert len(halves) >= 20
    for family, half in halves:
        other = {"choosing": "held-out", "held-out": "choosing"}[half]
        assert halves.count((family, half)) == halves.count((family, other))


def table(printed: str) -> dict[str, list[str]]:
    """The rows of a printed table: first cell -> the others."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in (line[2:-2].split(" | ") for line in lines)}


@needs_mnist
@pytest.mark.slow
def test_robustness_compares_models_on_one_half_and_draws_it(bench, trained, tmp_path):
    model = trained / "checkpoints" / "best_model.pt"
    flags = ["--checkpoint", model, ROOT / "checkpoints" / "pretrained" / "best_model.pt"]
    flags += ["--images", 30, "--data_dir", MNIST, "--device", "cpu"]
    result = bench("robustness.py", *flags, "--picture", "kinds.png")
    assert result.status == 0, result.err
    assert "30 of MNIST's val split" in result.out and f"what {model} was trained on" in result.out
    rows = table(result.out)
    assert rows.pop("what")[2] == str(model)
    chosen = [name for name, kind in KINDS.items() if kind.half == "choosing"]
    assert [*rows] == [*chosen, "**mean, choosing**", "unchanged", "other handwriting"]
    own, pretrained = ([float(row[i][:-2]) for row in rows.values()] for i in (2, 4))
    *kinds, mean, clean, other = pretrained
    assert mean == pytest.approx(np.mean(kinds), abs=0.01) and mean < clean > 90 and other > 80
    assert own[-2] < clean  # trained on other digits
    assert min(Image.open(tmp_path / "kinds.png").size) > 800
    assert table(bench("robustness.py", *flags).out) == {**table(result.out)}
    held_out = table(bench("robustness.py", *flags, "--kinds", "held-out").out)
    assert not held_out.keys() & set(chosen) and "**mean, held-out**" in held_out


@pytest.fixture
def mnist_c(tmp_path):
    """mnist_c(corruption, images, labels): a folder in MNIST-C's layout with one more corruption;
    MNIST's form, of zeros, unless given."""

    def add(name: str, images=None, labels=None) -> Path:
        folder = tmp_path / "mnist_c" / name
        folder.mkdir(parents=True)
        images = np.zeros((10_000, 28, 28, 1), np.uint8) if images is None else images
        labels = np.zeros(10_000, np.int64) if labels is None else labels
        np.save(folder / "test_images.npy", images)
        np.save(folder / "test_labels.npy", labels)
        return folder.parent

    return add


@needs_mnist
def test_mnist_c_is_scored_where_its_files_are(bench, trained, mnist_c):
    model = trained / "checkpoints" / "best_model.pt"
    test = load_dataset("mnist", MNIST).test
    images, labels = test.images.permute(0, 2, 3, 1).numpy(), test.labels.numpy()
    folder = mnist_c("identity", images, labels)
    mnist_c("fog", 255 - images, labels)
    for name in {*MNIST_C} - {"fog"}:  # the others without a copy of 8 MB
        (folder / name).mkdir()
        for file in (folder / "identity").iterdir():
            (folder / name / file.name).hardlink_to(file)
    flags = ["--checkpoint", model, "--mnist_c", folder, "--images", 50, "--data_dir", MNIST]
    result = bench("robustness.py", *flags, "--device", "cpu")
    assert result.status == 0, result.err
    rows = {name: row[2] for name, row in table(result.out).items() if row[1] == "MNIST-C"}
    (reader,) = load_readers([model], torch.device("cpu"))
    some = images[:50, ..., 0]
    plain, fog = (100 * reader.is_right(x, labels[:50]).mean() for x in (some, 255 - some))
    assert plain != fog and rows == {
        **{name: f"{fog if name == 'fog' else plain:.2f} %" for name in MNIST_C},
        "identity": f"{plain:.2f} %",
    }
    mean = table(result.out)["**mean, MNIST-C**"][2]
    assert mean == f"{(14 * plain + fog) / 15:.2f} %"


class Touch:
    """What a pickle can do: it makes a file as it is read."""

    def __reduce__(self):
        return open, ("touched", "w")


@pytest.mark.parametrize(
    "damage, words",
    [
        ({"images": np.zeros((10, 28, 28, 1), np.uint8)}, "shape (10000, 28, 28, 1)"),
        ({"images": np.zeros((10_000, 28, 28, 1), np.int8)}, "int8, expected uint8"),
        ({"images": np.array([Touch()])}, "not a NumPy array of numbers"),
        ({"labels": np.full(10_000, 10)}, "numbers from 0 to 9"),
        ({"labels": np.zeros(10_000)}, "numbers from 0 to 9"),
        ({"labels": np.zeros(9_999, np.int64)}, "shape (10000,)"),
    ],
)
def test_mnist_c_of_another_form_is_refused(bench, mnist_c, tmp_path, damage, words):
    folder = mnist_c("shot_noise", **damage)
    file = f"test_{next(iter(damage))}.npy"
    assert_one_error_line(bench("robustness.py", "--mnist_c", folder), file, words)
    assert not (tmp_path / "touched").exists()


def test_mnist_c_that_is_missing_or_cut_off_is_refused(bench, mnist_c):
    folder = mnist_c("shot_noise")
    result = bench("robustness.py", "--mnist_c", folder)  # without the other fourteen
    assert_one_error_line(result, "impulse_noise", "--mnist_c wants MNIST-C's folder")
    file = folder / "shot_noise" / "test_images.npy"
    for content in (b"", b"PK", file.read_bytes()[:-1]):
        file.write_bytes(content)
        assert_one_error_line(bench("robustness.py", "--mnist_c", folder), str(file), "not a NumPy")


def test_robustness_refuses_a_model_of_other_classes(bench, trained, tmp_path):
    checkpoint = read(trained / "checkpoints" / "best_model.pt")
    names = [f"class {i}" for i in range(10)]
    save_checkpoint(tmp_path / "other.pt", {**checkpoint, "class_names": names})
    result = bench("robustness.py", "--checkpoint", tmp_path / "other.pt")
    assert_one_error_line(result, "other.pt", "ten digits")


def test_a_record_is_appended_to_what_is_there(tmp_path, monkeypatch, capsys):
    import report

    monkeypatch.setattr(report, "RECORDS", tmp_path / "RECORDS.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--flags=--a 1", "--record"])
    for number in ("1", "2"):
        report.publish(
            f"Run {number}", ["a", "b"], [["x", number]], device=torch.device("cpu"), record=True
        )
    text = (tmp_path / "RECORDS.md").read_text()
    assert text.startswith("# Records\n\n### Run 1\n") and text.endswith("| x | 2 |\n")
    assert text.count("`python benchmarks/some.py '--flags=--a 1'`") == 2
    assert capsys.readouterr().out.count("Appended to ") == 2
