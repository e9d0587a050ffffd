"""Using a trained model: scoring, pictures, one's own images."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist
from matplotlib.image import imread
from PIL import Image, ImageOps

import figures
import inference
from digit_image import MAX_SIDE, read_digit
from utils import load_digits, load_mnist
from vit_model import ViT


@pytest.fixture
def checkpoint(trained) -> str:
    return str(trained / "checkpoints" / "best_model.pt")


@pytest.fixture
def test_images() -> tuple[np.ndarray, list[int]]:
    test = load_digits().test
    return test.images[:, 0].numpy(), test.labels.tolist()


# ------------------------------------------------------------------------------- modes that score


def test_evaluate_gives_what_training_ended_with(run, tmp_path, trained, checkpoint):
    result = run(inference.main, "--mode", "evaluate", "--checkpoint", checkpoint)
    assert result.status == 0
    test = json.loads((trained / "checkpoints" / "history.json").read_text())["test"]
    assert f"Test Loss: {test['loss']:.4f}\nTest Acc: {test['top1']:.2f} %" in result.out
    written = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert written["top1"] == pytest.approx(test["top1"]) and written["dataset"] == "digits"


@needs_mnist
def test_a_published_checkpoint_scores_as_it_did(run, tmp_path):
    torch.manual_seed(0)
    model = ViT(depth=1).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    data = load_mnist(MNIST)
    for start in range(0, 12_800, 128):
        images = (data.train.images[start : start + 128].float() / 255 - 0.1307) / 0.3081
        loss = torch.nn.functional.cross_entropy(
            model(images), data.train.labels[start : start + 128]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        images = (data.test.images.float() / 255 - 0.1307) / 0.3081
        hits = sum(
            (model(x).argmax(1) == y).sum().item()
            for x, y in zip(images.split(500), data.test.labels.split(500), strict=True)
        )
    torch.save(
        {
            "epoch": 1,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "best_acc": hits / 100,
        },
        tmp_path / "published.pt",
    )
    flags = f"--mode evaluate --checkpoint published.pt --data_dir {MNIST}".split()
    result = run(inference.main, *flags)
    assert hits > 5000 and f"Test Acc: {hits / 100:.2f} %" in result.out


# ----------------------------------------------------------------------------------------- pictures


def test_visualize_draws_sixteen_test_images(run, tmp_path, checkpoint):
    outputs = []
    for seed in (1, 1, 2):
        flags = ("--checkpoint", checkpoint, "--seed", seed, "--output", "p.png")
        result = run(inference.main, *flags)
        assert result.status == 0 and re.search(r"of 16 test images right \(digits\)", result.out)
        outputs.append(imread(tmp_path / "p.png"))
    assert np.array_equal(outputs[0], outputs[1]) and not np.array_equal(outputs[0], outputs[2])
    assert min(outputs[0].shape[:2]) > 800
    assert (outputs[0][..., :3].max(axis=2) < 0.1).mean() > 0.3  # the digits' black background


def test_titles_are_green_where_right_and_red_where_wrong():
    figure = figures.predictions(np.zeros((2, 28, 28)), ["3", "5"], ["3", "6"], "two")
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    assert [title.get_text() for title in titles] == ["3 (true: 3)", "6 (true: 5)"]
    assert [title.get_color() for title in titles] == [figures.GREEN, figures.RED]


def test_the_chain_of_commands_from_training_to_export(tmp_path):
    """As a user types them, each a process of its own."""

    def command(*arguments) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    tiny = "train.py --dataset digits --epochs 1 --depth 1 --embed-dim 16".split()
    assert "Test Acc: " in command(ROOT / "launch.py", "--python", sys.executable, *tiny)
    inference = ROOT / "src" / "inference.py"
    assert "of 16 test images right" in command(inference)
    assert "largest difference" in command(inference, "--mode", "onnx")
    picture = "outputs/predictions.png"
    assert f"{picture}: " in command(inference, "--mode=predict", "--image", picture)
    written = {path.name for path in (tmp_path / "outputs").iterdir()}
    pictures = {"training_curves.png", "predictions.png"}
    assert written == pictures | {"vit_mnist.onnx", "predictions.json"}


# --------------------------------------------------------------------------------- one's own images


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
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
        assert f"{row['image']}: {row['prediction']}  (0: " in result.out
    right = sum(
        row["prediction"] == str(label) for row, label in zip(written, labels, strict=False)
    )
    flags = ("--mode", "evaluate", "--checkpoint", checkpoint)
    score = float(re.search(r"Test Acc: ([\d.]+)", run(inference.main, *flags).out)[1])
    assert 100 * right / 60 > score - 10


def disc(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    return ((y - row) ** 2 + (x - column) ** 2 < radius**2).astype(np.uint8) * 255


@pytest.mark.parametrize("size", [(28, 28), (300, 200), (40, 900)])
def test_a_digit_is_scaled_into_its_box_and_centred_by_mass(tmp_path, size):
    height, width = size
    picture = disc(height, width, height * 0.4, width * 0.6, 11)
    for name, pixels in (("light.png", picture), ("dark.png", 255 - picture)):
        Image.fromarray(pixels).save(tmp_path / name)
        digit = read_digit(tmp_path / name)
        assert digit.shape == (28, 28) and digit.dtype == np.uint8 and digit.max() == 255
        rows, columns = np.nonzero(digit > 100)
        assert np.ptp(rows) in (18, 19) and np.ptp(columns) in (18, 19)
        mass = digit / digit.sum()
        assert (mass.sum(1) @ np.arange(28)) == pytest.approx(14, abs=0.6)
        assert (mass.sum(0) @ np.arange(28)) == pytest.approx(14, abs=0.6)


def test_proportions_are_kept(tmp_path):
    bar = np.zeros((100, 100), dtype=np.uint8)
    bar[10:90, 48:56] = 255  # 80 high, 8 wide
    Image.fromarray(bar).save(tmp_path / "one.png")
    rows, columns = np.nonzero(read_digit(tmp_path / "one.png") > 127)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 2)


def test_faint_and_thin_marks_on_a_large_page_survive(tmp_path):
    page = np.zeros((3000, 3000), dtype=np.uint8)
    page[500, 500] = page[2500, 2400] = 255
    Image.fromarray(page).save(tmp_path / "dust.png")
    assert read_digit(tmp_path / "dust.png").max() == 255
    page[500:2500, 1200] = 255  # one pixel wide
    Image.fromarray(page).save(tmp_path / "line.png")
    assert (read_digit(tmp_path / "line.png") > 200).any(axis=1).sum() >= 18


def test_a_turned_photo_is_set_upright(tmp_path):
    bar = np.full((60, 60), 255, dtype=np.uint8)
    bar[28:32, 5:55] = 0  # lies; its EXIF says: turn by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(bar).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    rows, columns = np.nonzero(read_digit(tmp_path / "photo.jpg") > 127)
    assert np.ptp(rows) > np.ptp(columns)


@needs_mnist
def test_mnists_own_images_come_out_as_they_are(tmp_path):
    same = 0
    for image in load_mnist(MNIST).test.images[:100, 0].numpy():
        Image.fromarray(image).save(tmp_path / "digit.png")
        difference = read_digit(tmp_path / "digit.png").astype(int) - image
        same += np.abs(difference).mean() < 0.5  # of 255: a faint edge may be taken for paper
    assert same >= 97


# ----------------------------------------------------------------------------------------- errors


def test_images_that_cannot_serve_end_in_one_line(run, tmp_path, checkpoint):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (20_000, 3)).save(tmp_path / "wide.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    Image.fromarray(disc(200, 200, 99, 99, 50)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    for name, words in {
        "text.png": "text.png cannot be read",
        "empty.png": "empty.png cannot be read",
        "cut.png": "cut.png cannot be read",
        "wide.png": f"wide.png 20000x3 {MAX_SIDE}",
        "bomb.png": f"bomb.png too large {MAX_SIDE}",
        "blank.png": "blank.png is blank",
        "none.png": "none.png not found",
        ".": "cannot be read",
    }.items():
        flags = ("--mode", "predict", "--checkpoint", checkpoint, "--image", "good.png", name)
        assert_one_error_line(run(inference.main, *flags), *words.split())
    assert not (tmp_path / "outputs" / "predictions.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode paint", "--mode paint visualize"),
        ("--mode predict", "--image"),
        ("--mode evaluate --image x.png", "--mode predict --image"),
        ("--checkpoint none.pt", "none.pt No such file train first"),
        ("--output file/x.png", "file/x.png cannot be written"),
        ("--output picture", "picture .png"),
        ("--output picture.json", "picture.json .png"),
        ("--device foo", "--device foo"),
        ("--seed -1", "--seed"),
    ],
)
def test_wrong_usage_ends_in_one_line(run, tmp_path, checkpoint, flags, words):
    (tmp_path / "file").write_text("kept")
    if "--checkpoint" not in flags:
        flags += f" --checkpoint {checkpoint}"
    assert_one_error_line(run(inference.main, *flags.split()), *words.split())


def test_a_model_for_other_images_is_refused_except_for_export(run, tmp_path):
    model = ViT(img_size=32, patch_size=8, in_chans=3, depth=1, embed_dim=16)
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    torch.save({**content, "best_acc": 1.0}, tmp_path / "other.pt")
    flags = ("--checkpoint", "other.pt", "--mode")
    assert_one_error_line(run(inference.main, *flags, "evaluate"), "3x32x32", "1x28x28")
    assert run(inference.main, *flags, "onnx").status == 0
