"""One's own digits: pictures, folders and stdin in; text, JSON and CSV out."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import assert_one_error_line
from PIL import Image, ImageDraw, ImageOps

import inference
from analysis.confidence import NONE
from data.digits import load_digits
from deploy.digit_image import MAX_SIDE
from deploy.predict import BATCH_SIZE, predict
from vit_model import ViT


@pytest.fixture
def checkpoint(trained) -> str:
    return str(trained / "checkpoints" / "best_model.pt")


@pytest.fixture
def test_images() -> tuple[np.ndarray, list[int]]:
    test = load_digits().test
    return test.images[:, 0].numpy(), test.labels.tolist()


def test_predict_reads_test_images_in_any_form(run, tmp_path, checkpoint, test_images):
    """Saved as files in six forms, the digits are read about as well as from memory."""
    images, labels = test_images
    names = []
    for i, pixels in enumerate(images[:60]):
        image = Image.fromarray(pixels)
        form = i % 6
        if form == 1:
            image = ImageOps.invert(image)
        elif form == 2:
            image = ImageOps.expand(ImageOps.invert(image), (40, 0, 90, 7), fill=255).convert("RGB")
        elif form == 3:
            image = image.resize((280, 280)).convert("P")
        elif form == 4:  # black ink on nothing
            ink = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
            ink.putalpha(image)
            image = ink
        elif form == 5:
            image = Image.fromarray(pixels.astype(np.uint16) * 257)
        names.append(f"{i}.png")
        image.save(names[-1])
    result = run(inference.main, "--mode", "predict", "--checkpoint", checkpoint, "--image", *names)
    assert result.status == 0
    written = json.loads((tmp_path / "outputs" / "predictions.json").read_text())
    assert written["dataset"] == "digits"
    written = written["images"]
    assert [row["image"] for row in written] == names
    for row in written:
        for digit in row["digits"]:
            probabilities = digit["probabilities"]
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert digit["prediction"] == max(probabilities, key=probabilities.get)
            assert digit["confidence"] == probabilities[digit["prediction"]]
        assert row["prediction"] == "".join(digit["prediction"] for digit in row["digits"])
        assert f"{row['image']}: {row['prediction']}: {row['prediction'][0]} (" in result.out
    right = sum(
        row["prediction"] == str(label) for row, label in zip(written, labels, strict=False)
    )
    flags = ("--mode", "evaluate", "--checkpoint", checkpoint)
    score = float(re.search(r"Test Acc: ([\d.]+)", run(inference.main, *flags).out)[1])
    assert 100 * right / 60 > score - 10


def test_batches_give_what_one_image_at_a_time_gives(test_images):
    model = ViT(depth=1, embed_dim=16).eval()
    images = np.concatenate([test_images[0], test_images[0]])[: BATCH_SIZE + 3]
    shapes = []
    model.head.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    checkpoint = {"normalization": {"mean": 0.1307, "std": 0.3081}, "calibration": NONE}
    together, strange = predict(model, images, checkpoint)
    assert shapes == [BATCH_SIZE, 3] and together.shape == (BATCH_SIZE + 3, 10)
    assert strange.shape == (BATCH_SIZE + 3,) and not strange.any()
    pixels = (torch.from_numpy(images[-1]).float() / 255 - 0.1307) / 0.3081
    alone = model(pixels[None, None]).softmax(dim=1).detach().numpy()
    assert together[-1] == pytest.approx(alone[0], abs=1e-5)
    assert predict(model, images[:0], checkpoint).probabilities.shape == (0, 10)


@pytest.fixture
def folder(tmp_path, test_images):
    """Three digits, a text and a hidden file, and a folder with one more digit."""
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    names = ("b.png", "a.PNG", "c.jpg", "deeper/d.png", ".e.png")
    for name, image in zip(names, test_images[0], strict=False):
        Image.fromarray(image).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_a_folder_stands_for_the_images_right_in_it(run, folder, checkpoint):
    flags = ("--mode", "predict", "--checkpoint", checkpoint, "--format", "json", "--image")
    result = run(inference.main, *flags, "in/b.png", "in")
    answers = json.loads(result.out)["images"]
    assert [row["image"] for row in answers] == ["in/b.png", "in/a.PNG", "in/b.png", "in/c.jpg"]
    assert answers[0]["digits"] == answers[2]["digits"]
    (folder / "empty").mkdir()
    assert_one_error_line(run(inference.main, *flags, "in/empty"), "in/empty", "no images")


def test_stdin_is_an_image(run, folder, checkpoint, monkeypatch):
    flags = ("--mode", "predict", "--checkpoint", checkpoint, "--format", "csv", "--image", "-")

    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    give((folder / "b.png").read_bytes())
    result = run(inference.main, *flags)
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert row["image"] == "-" and row["prediction"] in "0123456789" and row["error"] == ""
    give(b"")
    assert_one_error_line(run(inference.main, *flags), "image on stdin cannot be read")


def test_stdin_is_named_once(run, checkpoint):
    flags = ("--mode", "predict", "--checkpoint", checkpoint, "--image", "-", "-")
    assert_one_error_line(run(inference.main, *flags), "--image -", "2 times")


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_a_bad_image_leaves_the_others_answered(run, folder, tmp_path, checkpoint, form):
    (tmp_path / "bad, one.png").write_text("no image")
    names = ("in/a.PNG", "bad, one.png", "none.png", "in/b.png")
    flags = ("--mode", "predict", "--checkpoint", checkpoint, "--format", form, "--image", *names)
    result = run(inference.main, *flags)
    assert result.status == 2
    errors = result.err.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    assert len(errors) == 2 and "bad, one.png" in errors[0] and "none.png not found" in errors[1]
    written = json.loads((tmp_path / "outputs" / "predictions.json").read_text())["images"]
    assert [("error" in row) for row in written] == [False, True, True, False]
    if form == "text":
        assert "Written: outputs/predictions.json" in result.out
        assert re.findall(r"^(\S+): \d: \d \([\d.]+ %\)", result.out, re.M) == [
            "in/a.PNG",
            "in/b.png",
        ]
    elif form == "json":
        assert json.loads(result.out)["images"] == written
    else:
        rows = list(csv.DictReader(io.StringIO(result.out)))
        assert [row["image"] for row in rows] == list(names)
        for row, told in zip(rows, written, strict=True):
            assert row["error"] == told.get("error", "")
            assert row["prediction"] == told.get("prediction", "")
            (digit,) = told.get("digits", [None])
            shown = [row[name] for name in ("left", "top", "right", "bottom", *"0123456789")]
            if digit is None:
                assert set(shown) == {""}
                continue
            known = [*digit["box"], *digit["probabilities"].values()]
            assert [float(cell) for cell in shown] == pytest.approx(known, abs=1e-6)
            assert row["digit"] == "1"
            assert row["may_be_no_digit"] == str(digit["may_be_no_digit"]).lower()


def test_a_name_that_is_no_text_is_answered(run, folder, tmp_path, checkpoint):
    (folder / "b.png").rename(tmp_path / "caf\udce9.png")
    flags = ("--mode", "predict", "--checkpoint", checkpoint, "--image", "caf\udce9.png")
    result = run(inference.main, *flags)
    assert result.status == 0 and "caf\ufffd.png: " in result.out


def test_single_takes_all_strokes_for_one_digit(run, tmp_path, checkpoint):
    """Strokes of a 4 that lie far apart are two digits, unless it is known that they are one."""
    image = Image.new("L", (300, 300), 255)
    pen = ImageDraw.Draw(image)
    pen.line([(60, 40), (50, 180), (110, 175)], 0, 16)
    pen.line([(220, 40), (215, 260)], 0, 16)
    image.save("four.png")
    flags = ("--mode", "predict", "--checkpoint", checkpoint, "--format", "json")
    for more, count in ((), 2), (("--single",), 1):
        (row,) = json.loads(run(inference.main, *flags, *more, "--image", "four.png").out)["images"]
        assert len(row["digits"]) == count and row["size"] == [300, 300]
    assert row["digits"][0]["box"] == pytest.approx([42, 40, 228, 260], abs=4)
    assert_one_error_line(run(inference.main, "--single"), "--single", "for --mode predict")


def test_images_that_cannot_serve_end_in_one_line(run, tmp_path, checkpoint):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (20_000, 3)).save(tmp_path / "wide.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    Image.effect_noise((200, 200), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    for name, words in {
        "text.png": "text.png cannot be read",
        "empty.png": "empty.png cannot be read",
        "cut.png": "cut.png cannot be read",
        "wide.png": f"wide.png 20000x3 {MAX_SIDE:,}",
        "bomb.png": "bomb.png too large 50 million",
        "blank.png": "blank.png is blank",
        "none.png": "none.png not found",
    }.items():
        flags = ("--mode", "predict", "--checkpoint", checkpoint, "--image", name)
        assert_one_error_line(run(inference.main, *flags), *words.split())
    assert not (tmp_path / "outputs" / "predictions.json").exists()
