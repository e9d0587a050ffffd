"""A trained model on pictures of one's own: answered one by one, scored as a labelled folder."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_error_line
from PIL import Image
from shapes import CLASSES, draw_folder, draw_shape

import deploy.predict
import inference
from analysis.words import PICTURE
from data.decode import decode
from data.digits import load_digits
from data.folder import load_folder
from deploy.answers import as_csv
from deploy.predict import predict, prepare_picture
from saving.checkpoint import load_checkpoint, save_checkpoint
from vit_model import ViT

DIGITS = load_digits().test


@pytest.fixture
def checkpoint(photos) -> Path:
    return photos / "checkpoints" / "best_model.pt"


@pytest.fixture
def digits_checkpoint(trained) -> Path:
    return trained / "checkpoints" / "best_model.pt"


@pytest.fixture
def infer(run):
    """infer(mode, checkpoint, *flags) -> what inference.py did."""

    def call(mode: str, checkpoint: Path | str, *flags: object):
        return run(inference.main, "--mode", mode, "--checkpoint", checkpoint, *flags)

    return call


@pytest.fixture
def letters(tmp_path, digits_checkpoint) -> str:
    """The model of the digits, which takes them for letters."""
    content = torch.load(digits_checkpoint)
    content |= {"class_names": list("ABCDEFGHIJ"), "dataset": "letters", "source": "letters"}
    save_checkpoint(tmp_path / "letters.pt", content)
    return "letters.pt"


# -------------------------------------------------------------------------------------- one by one


def test_each_picture_is_prepared_as_the_training_images_were(photos, checkpoint):
    """All of a folder, in the parts that training divided it into."""
    _, about = load_checkpoint(checkpoint)
    data = load_folder(photos / "photos", img_size=32, in_chans=3, resize="crop")
    known = np.concatenate([part.images.numpy() for part in (data.train, data.val, data.test)])
    known = {image.tobytes() for image in known}
    files = sorted((photos / "photos").rglob("*.png"))
    assert len(files) == len(known) == 210
    assert {prepare_picture(file, "x", about).tobytes() for file in files} == known


def test_a_large_photo_is_decoded_as_in_training(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    _, about = load_checkpoint(checkpoint)
    draw_shape("circle", np.random.default_rng(0), (500, 400)).save("large.jpg")
    expected = decode("large.jpg", 32, 3, "crop").pixels
    np.testing.assert_array_equal(prepare_picture("large.jpg", "x", about), expected)


def test_a_picture_is_answered_with_the_likeliest_classes(infer, checkpoint, tmp_path):
    generator = np.random.default_rng(7)
    names = [f"{kind}.{form}" for kind in CLASSES for form in ("jpg", "png")]
    for name in names:
        draw_shape(Path(name).stem, generator, (120, 90)).save(name)
    result = infer("predict", checkpoint, "--image", *names)
    assert result.status == 0
    written = json.loads((tmp_path / "outputs" / "predictions.json").read_text())
    assert written["class_names"] == list(CLASSES)
    rows = written["images"]
    assert [row["image"] for row in rows] == names
    assert sum(row["prediction"] == Path(row["image"]).stem for row in rows) >= 5
    for row in rows:
        shares = row.pop("probabilities")
        order = sorted(shares, key=shares.get, reverse=True)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        text = ", ".join(f"{name} ({100 * shares[name]:.1f} %)" for name in order)
        text += ": may be none of these classes" * row.pop("may_be_none_of_these")
        assert f"\n{row['image']}: {text}\n" in result.out
        assert row == {
            "image": row["image"],
            "prediction": order[0],
            "confidence": shares[order[0]],
        }


def test_what_resembles_no_class_is_said_to(infer, checkpoint):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(256, size=(64, 64, 3), dtype=np.uint8)).save("noise.png")
    result = infer("predict", checkpoint, "--image", "noise.png")
    assert re.search(r"^noise.png: .* %\): may be none of these classes$", result.out, re.M)
    result = infer("predict", checkpoint, "--image", "noise.png", "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert row["may_be_none_of_these"] == "true" and "digit" not in result.out


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_a_bad_picture_leaves_the_others_answered(infer, checkpoint, tmp_path, form):
    draw_shape("circle", np.random.default_rng(0), (40, 40)).save("circle.png")
    Path("text.jpg").write_text("no image")
    flags = ("--format", form, "--image", "circle.png", "text.jpg", "none.png")
    result = infer("predict", checkpoint, *flags)
    assert result.status == 2
    text, none = result.err.splitlines()
    assert text.startswith("error: image text.jpg cannot be read") and "none.png not found" in none
    rows = json.loads((tmp_path / "outputs" / "predictions.json").read_text())["images"]
    assert [("error" in row) for row in rows] == [False, True, True]
    if form == "json":
        assert json.loads(result.out)["images"] == rows
    elif form == "csv":
        table = list(csv.DictReader(io.StringIO(result.out)))
        assert [row["error"] for row in table] == [row.get("error", "") for row in rows]
        assert table[0]["prediction"] == rows[0]["prediction"] and table[1]["circle"] == ""
        for name in CLASSES:
            assert float(table[0][name]) == pytest.approx(rows[0]["probabilities"][name], abs=1e-6)
        assert float(table[0]["confidence"]) == pytest.approx(rows[0]["confidence"], abs=1e-6)


def test_grey_models_take_colour_pictures_and_the_reverse(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    _, about = load_checkpoint(checkpoint)
    Image.new("RGB", (20, 20), (255, 0, 0)).save("red.png")
    Image.new("L", (20, 20), 7).save("grey.png")
    for channels in (1, 3):
        config = {"img_size": 16, "in_chans": channels}
        how = {**about, "model_config": config}
        red, grey = (prepare_picture(f"{name}.png", "x", how) for name in ("red", "grey"))
        assert red.shape == grey.shape == (channels, 16, 16) and (grey == 7).all()
        assert red[:, 0, 0].tolist() == ([76] if channels == 1 else [255, 0, 0])


def test_more_pictures_than_a_batch_are_answered_in_order(infer, checkpoint, photos, monkeypatch):
    monkeypatch.setattr(deploy.predict, "BATCH_SIZE", 4)
    Path("text.png").write_text("no image")
    names = [
        "text.png",
        *sorted(map(str, (photos / "photos" / "square").glob("1*.png"))),
        "text.png",
    ]
    flags = ("--format", "json", "--image", *names)
    answers = json.loads(infer("predict", checkpoint, *flags).out)["images"]
    assert [row["image"] for row in answers] == names
    assert [("error" in row) for row in answers] == [True, *[False] * (len(names) - 2), True]
    for name, row in zip(names[1:-1:3], answers[1:-1:3], strict=True):
        alone = json.loads(infer("predict", checkpoint, "--format", "json", "--image", name).out)
        assert alone["images"][0]["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


def test_a_model_of_enormous_images_is_not_asked(infer, tmp_path):
    """A picture would be brought to that size, which a small file can ask for."""
    config = {"img_size": 2400, "patch_size": 600, "depth": 1, "embed_dim": 2, "num_heads": 1}
    content = {"epoch": 1, "model_state_dict": ViT(**config).state_dict(), "best_acc": 1.0}
    about = {"model_config": config, "source": "folder", "preparation": "crop"}
    save_checkpoint("large.pt", {**content, "optimizer_state_dict": {}, **about})
    Image.new("L", (20, 20)).save("x.png")
    result = infer("predict", "large.pt", "--image", "x.png")
    assert_one_error_line(result, "large.pt", "2400 pixels a side", "at most 1024")


def test_single_is_for_digits(infer, checkpoint):
    draw_shape("circle", np.random.default_rng(0), (40, 40)).save("circle.png")
    result = infer("predict", checkpoint, "--image", "circle.png", "--single")
    assert_one_error_line(result, "--single", "digits", "whole pictures")


def test_letters_are_read_as_digits_are_and_called_so(infer, letters, tmp_path):
    image = Image.fromarray(DIGITS.images[0, 0].numpy())
    image.save("one.png")
    Image.new("L", (50, 50), 200).save("blank.png")
    result = infer("predict", letters, "--image", "one.png", "blank.png")
    assert "blank.png is blank: expected characters" in result.err
    row, _ = json.loads((tmp_path / "outputs" / "predictions.json").read_text())["images"]
    (letter,) = row["characters"]
    assert row["prediction"] == letter["prediction"] in "ABCDEFGHIJ" and len(letter["box"]) == 4
    assert "may_be_none_of_these" in letter
    result = infer("predict", letters, "--image", "one.png", "--format", "csv", "--single")
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert row["character"] == "1" and row["may_be_none_of_these"] in ("true", "false")


# ------------------------------------------------------------------------------ a labelled folder


def evaluation() -> dict:
    return json.loads(Path("outputs/evaluation.json").read_text())


def test_a_model_of_a_folder_scores_as_training_ended_and_on_nothing_it_learned(
    infer, photos, checkpoint
):
    test = json.loads((photos / "checkpoints" / "history.json").read_text())["test"]
    result = infer("evaluate", checkpoint, "--data_dir", photos / "photos")
    assert result.status == 0
    assert "189 of 210 images left out: the model was trained on the same" in result.err
    assert evaluation()["top1"] == pytest.approx(test["top1"])
    assert evaluation()["loss"] == pytest.approx(test["loss"], abs=1e-5)
    assert evaluation()["dataset"] == "photos"


def test_a_model_of_a_folder_needs_one(infer, checkpoint):
    for mode in ("evaluate", "confusion"):
        result = infer(mode, checkpoint)
        assert_one_error_line(result, "--data_dir", "circle, square, triangle")
    result = infer("evaluate", checkpoint, "--data_dir", "nowhere")
    assert_one_error_line(result, "nowhere")


@pytest.mark.parametrize("where", ["mine", "mine/test"])
def test_a_model_of_a_folder_is_scored_on_another(infer, checkpoint, where):
    """Right in it or in its `test`, and not on all classes."""
    shutil.rmtree(draw_folder(Path(where), 6, seed=5) / "square")
    result = infer("evaluate", checkpoint, "--data_dir", "mine")
    assert result.status == 0 and "left out" not in result.err and "(mine)" in result.out
    assert evaluation()["top1"] * 12 / 100 == pytest.approx(round(evaluation()["top1"] * 12 / 100))
    assert evaluation()["top1"] > 80


def test_folders_of_other_classes_are_named(infer, checkpoint, digits_checkpoint):
    draw_folder(Path("mine"), 1)
    Path("mine/circle").rename("mine/moon")
    result = infer("evaluate", checkpoint, "--data_dir", "mine")
    assert_one_error_line(result, "moon", "circle, square, triangle")
    # Also where no folder is of a class: they are not taken for the place of the digits' files.
    result = infer("evaluate", digits_checkpoint, "--data_dir", "mine")
    assert_one_error_line(result, "moon", "0, 1, 2")
    Path("mine/0").mkdir()
    shutil.copy("mine/moon/0.png", "mine/0")
    result = infer("evaluate", digits_checkpoint, "--data_dir", "mine")
    assert_one_error_line(result, "moon", "0, 1, 2")


def test_a_model_of_digits_is_scored_on_a_folder_through_the_digit_reader(infer, digits_checkpoint):
    for i in range(40):
        label = int(DIGITS.labels[i])
        Path(f"mine/{label}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(255 - DIGITS.images[i, 0].numpy())  # dark on light
        image.resize((90 + i, 90 + i)).save(f"mine/{label}/{i}.png")
    Image.new("L", (50, 50), 200).save("mine/3/blank.png")
    result = infer("evaluate", digits_checkpoint, "--data_dir", "mine")
    assert result.status == 0
    (note,) = result.err.splitlines()
    assert note.startswith("note: image mine/3/blank.png is blank") and "left out" in note
    model, about = load_checkpoint(digits_checkpoint)
    own = predict(model, DIGITS.images[:40].numpy(), about).probabilities.argmax(1)
    expected = 100 * (own == DIGITS.labels[:40].numpy()).mean()
    assert evaluation()["top1"] == pytest.approx(expected, abs=25)
    assert evaluation()["dataset"] == "mine"
    result = infer("confusion", digits_checkpoint, "--data_dir", "mine")
    assert "of 40 test images right (mine)" in result.out


def test_a_data_dir_without_such_folders_is_of_no_use_to_a_set_without_files(
    infer, digits_checkpoint
):
    Path("mine/cats").mkdir(parents=True)
    result = infer("evaluate", digits_checkpoint, "--data_dir", "mine")
    assert_one_error_line(result, "--data_dir mine", "0, 1, 2", "need no files")


def test_a_mistyped_data_dir_is_not_where_mnist_is_downloaded_to(infer, tmp_path, offline):
    content = {"epoch": 1, "model_state_dict": ViT(depth=1).state_dict()}
    torch.save({**content, "optimizer_state_dict": {}, "best_acc": 1.0}, tmp_path / "mnist.pt")
    Image.new("L", (9, 9)).save(tmp_path / "loose.png")
    (tmp_path / "one" / "too" / "0").mkdir(parents=True)
    for place in ("my_photso", ".", "one"):
        result = infer("evaluate", tmp_path / "mnist.pt", "--data_dir", place)
        words = f"--data_dir {place} has no folder of pictures for any of 0, 1", "no file of MNIST"
        assert_one_error_line(result, *words)
    assert not (tmp_path / "my_photso").exists()


def test_the_model_itself_is_not_written_over(infer, checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "own.pt")
    before = (tmp_path / "own.pt").read_bytes()
    result = infer("timm", "own.pt", "--output", tmp_path / "own.pt")
    assert_one_error_line(result, "own.pt", "replace the model itself")
    assert (tmp_path / "own.pt").read_bytes() == before


def test_a_class_may_be_called_as_a_column_of_the_table_is():
    row = {"image": "x.png", "prediction": "error", "confidence": 0.75}
    row |= {"may_be_none_of_these": False, "probabilities": {"error": 0.75, "prediction": 0.25}}
    text = as_csv({"class_names": ["error", "prediction"], "images": [row]}, PICTURE)
    (read,) = csv.DictReader(io.StringIO(text))
    assert read["prediction"] == "error" and read["error"] == ""
    assert (read["class error"], read["class prediction"]) == ("0.750000", "0.250000")


def test_a_model_of_other_classes_than_its_data_set_is_refused(infer, tmp_path):
    model = ViT(depth=1, embed_dim=16, num_classes=3)
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "best_acc": 1.0}
    about = {"class_names": list("abc"), "dataset": "digits"}
    save_checkpoint(tmp_path / "three.pt", {**content, "optimizer_state_dict": {}, **about})
    assert_one_error_line(infer("evaluate", "three.pt"), "three.pt", "a, b, c", "0, 1, 2")


def test_predict_takes_no_data_set(infer, checkpoint):
    result = infer("predict", checkpoint, "--image", "x.png", "--data_dir", "mine")
    assert_one_error_line(result, "--data_dir", "predict")
