"""Your own digits: pictures, folders and stdin in; text, JSON and CSV out."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_error_line
from PIL import Image, ImageDraw, ImageOps

import inference
from data.digits import load_digits
from data.pictures import MAX_SIDE
from deploy.predict import BATCH_SIZE, predict
from saving.checkpoint import UNCALIBRATED, load_checkpoint
from vit_model import ViT

TEST = load_digits().test
IMAGES = TEST.images[:, 0].numpy()  # (n, 28, 28)


@pytest.fixture
def checkpoint(trained) -> Path:
    return trained / "checkpoints" / "best_model.pt"


@pytest.fixture
def read(run, checkpoint):
    """read(*images, form): what `--mode predict` does with them."""

    def call(*images: str, form: str = "text", more: tuple[str, ...] = ()):
        flags = ("--mode", "predict", "--checkpoint", checkpoint, "--format", form, *more)
        return run(inference.main, *flags, "--image", *images)

    return call


def in_form(number: int, pixels: np.ndarray) -> Image.Image:
    """A digit as people may send it, in one of six forms."""
    image = Image.fromarray(pixels)
    inverted = ImageOps.invert(image)
    ink = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    ink.putalpha(image)  # black on nothing
    sheet = ImageOps.expand(inverted, (40, 0, 90, 7), fill=255).convert("RGB")
    deep = Image.fromarray(pixels.astype(np.uint16) * 257)
    return (image, inverted, sheet, image.resize((280, 280)).convert("P"), ink, deep)[number]


def test_pictures_of_digits_are_read_in_any_form(read, tmp_path, checkpoint):
    """Saved as files in six forms, the digits are read about as well as from memory."""
    names = [f"{i}.png" for i in range(60)]
    for i, name in enumerate(names):
        in_form(i % 6, IMAGES[i]).save(name)
    result = read(*names)
    assert result.status == 0
    written = json.loads((tmp_path / "outputs" / "predictions.json").read_text())
    assert written["dataset"] == "digits" and written["checkpoint"] == str(checkpoint)
    assert [row["image"] for row in written["images"]] == names
    for row in written["images"]:
        for digit in row["digits"]:
            probabilities = digit["probabilities"]
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert digit["prediction"] == max(probabilities, key=probabilities.get)
            assert digit["confidence"] == probabilities[digit["prediction"]]
        assert row["prediction"] == "".join(digit["prediction"] for digit in row["digits"])
        assert f"{row['image']}: {row['prediction']}: {row['prediction'][0]} (" in result.out
    labels = TEST.labels.numpy()
    right = np.mean([int(row["prediction"]) for row in written["images"]] == labels[:60])
    model, about = load_checkpoint(checkpoint)
    score = np.mean(predict(model, IMAGES[:, None], about).probabilities.argmax(1) == labels)
    assert right > score - 0.3  # the small model has seen digits moved by a pixel at most


def test_batches_give_what_one_image_at_a_time_gives():
    model = ViT(depth=1, embed_dim=16).eval()
    images = np.concatenate([IMAGES, IMAGES])[: BATCH_SIZE + 3, None]
    sizes = []
    model.head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    checkpoint = {"normalization": {"mean": 0.1307, "std": 0.3081}, "calibration": UNCALIBRATED}
    together, strange = predict(model, images, checkpoint)
    assert sizes == [BATCH_SIZE, 3] and together.shape == (BATCH_SIZE + 3, 10)
    assert strange.shape == (BATCH_SIZE + 3,) and not strange.any()
    pixels = (torch.from_numpy(images[-1]).float() / 255 - 0.1307) / 0.3081
    alone = model(pixels[None]).softmax(dim=1).detach().numpy()
    assert together[-1] == pytest.approx(alone[0], abs=1e-5)
    assert predict(model, images[:0], checkpoint).probabilities.shape == (0, 10)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three digits, a text and a hidden file, and a folder with one more digit."""
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.PNG", "c.jpg", "deeper/d.png", ".e.png")):
        Image.fromarray(IMAGES[i]).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_a_folder_stands_for_the_images_right_in_it(read, folder):
    answers = json.loads(read("in/b.png", "in", form="json").out)["images"]
    assert [row["image"] for row in answers] == ["in/b.png", "in/a.PNG", "in/b.png", "in/c.jpg"]
    assert answers[0]["digits"] == answers[2]["digits"]
    (folder / "empty").mkdir()
    assert_one_error_line(read("in/empty"), "in/empty", "no images")


def test_stdin_is_an_image(read, folder, monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    give((folder / "b.png").read_bytes())
    (row,) = csv.DictReader(io.StringIO(read("-", form="csv").out))
    assert row["image"] == "-" and row["prediction"] in "0123456789" and row["error"] == ""
    give(b"")
    assert_one_error_line(read("-", form="csv"), "image on stdin cannot be read")
    assert_one_error_line(read("-", "-"), "--image -", "2 times")


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_a_bad_image_leaves_the_others_answered(read, folder, tmp_path, form):
    (tmp_path / "bad, one.png").write_text("no image")
    names = ["in/a.PNG", "bad, one.png", "none.png", "in/b.png"]
    result = read(*names, form=form)
    assert result.status == 2
    bad, none = result.err.splitlines()
    assert bad.startswith("error: image bad, one.png cannot be read")
    assert none.startswith("error: image none.png not found")
    written = json.loads((tmp_path / "outputs" / "predictions.json").read_text())["images"]
    assert [("error" in row) for row in written] == [False, True, True, False]
    if form == "text":
        assert "Written: outputs/predictions.json" in result.out
        read_names = re.findall(r"^(\S+): \d: \d \([\d.]+ %\)", result.out, re.MULTILINE)
        assert read_names == ["in/a.PNG", "in/b.png"]
    elif form == "json":
        assert json.loads(result.out)["images"] == written
    else:
        rows = list(csv.DictReader(io.StringIO(result.out)))
        assert [row["image"] for row in rows] == names
        assert [row["error"] for row in rows] == [row.get("error", "") for row in written]
        for row, told in ((rows[0], written[0]), (rows[3], written[3])):
            (digit,) = told["digits"]
            assert row["prediction"] == told["prediction"] and row["digit"] == "1"
            assert row["may_be_no_digit"] == str(digit["may_be_no_digit"]).lower()
            cells = [row[name] for name in ("left", "top", "right", "bottom", *"0123456789")]
            numbers = [*digit["box"], *digit["probabilities"].values()]
            assert [float(cell) for cell in cells] == pytest.approx(numbers, abs=1e-6)
        assert set(rows[1].values()) == {"bad, one.png", rows[1]["error"], ""}


def test_a_name_that_is_no_text_is_answered(read, folder, tmp_path):
    (folder / "b.png").rename(tmp_path / "caf\udce9.png")
    result = read("caf\udce9.png")
    assert result.status == 0 and "caf\ufffd.png: " in result.out
    Path("\x1b[2J.png").write_text("no image")
    assert "image ?[2J.png" in read("\x1b[2J.png").err


def test_single_takes_all_strokes_for_one_digit(read):
    """Strokes of a 4 that lie far apart are two digits, unless it is known that they are one."""
    image = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(image).line([(60, 40), (50, 180), (110, 175)], 0, 16)
    ImageDraw.Draw(image).line([(220, 40), (215, 260)], 0, 16)
    image.save("four.png")
    for more, count in ((), 2), (("--single",), 1):
        (row,) = json.loads(read("four.png", form="json", more=more).out)["images"]
        assert len(row["digits"]) == count and row["size"] == [300, 300]
    assert row["digits"][0]["box"] == pytest.approx([42, 40, 228, 260], abs=4)


def test_images_that_cannot_serve_end_in_one_line(read, tmp_path):
    Path("text.png").write_text("no image")
    Path("empty.png").write_bytes(b"")
    Image.new("L", (20_000, 3)).save("wide.png")
    Image.new("1", (13_500, 13_500)).save("bomb.png")  # more than Pillow opens
    Image.new("L", (50, 50), 200).save("blank.png")
    Image.effect_noise((200, 200), 50).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:300])
    for words in (
        "text.png cannot be read",
        "empty.png cannot be read",
        "cut.png cannot be read",
        f"wide.png 20000x3 {MAX_SIDE:,}",
        "bomb.png too large 50 million",
        "blank.png is blank",
        "none.png not found",
    ):
        assert_one_error_line(read(words.split()[0]), *words.split())
    assert not (tmp_path / "outputs" / "predictions.json").exists()
