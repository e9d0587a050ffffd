"""Using a trained model: scoring and pictures."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist
from matplotlib.image import imread
from PIL import Image

import inference
from analysis import figures, score_figures
from data.digits import load_digits
from data.load import load_dataset
from vit_model import ViT


@pytest.fixture
def checkpoint(trained) -> str:
    return str(trained / "checkpoints" / "best_model.pt")


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
    data = load_dataset("mnist", MNIST)
    for part in (data.train[start : start + 128] for start in range(0, 6400, 128)):
        optimizer.zero_grad()
        images = (part.images / 255 - 0.1307) / 0.3081
        torch.nn.functional.cross_entropy(model(images), part.labels).backward()
        optimizer.step()
    with torch.no_grad():
        images = (data.test.images / 255 - 0.1307) / 0.3081
        guesses = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    hits = int((guesses == data.test.labels).sum())
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    torch.save({"epoch": 1, **content, "best_acc": hits / 100}, "published.pt")
    flags = f"--mode evaluate --checkpoint published.pt --data_dir {MNIST}".split()
    result = run(inference.main, *flags)
    assert hits > 3000 and f"Test Acc: {hits / 100:.2f} %" in result.out


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
    figure = score_figures.predictions(
        np.zeros((2, 28, 28)), ["3", "5"], ["3", "6"], [0.996, 0.51], "two"
    )
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    assert [title.get_text() for title in titles] == ["3: 99.6 % (true: 3)", "6: 51.0 % (true: 5)"]
    assert [title.get_color() for title in titles] == [figures.GREEN, figures.RED]


@pytest.mark.slow
def test_the_chain_of_commands_from_training_to_export(tmp_path):
    """As a user types them, each a process of its own."""

    def command(*arguments) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    tiny = "train.py --dataset digits --epochs 1 --depth 1 --embed-dim 16".split()
    assert "Test Acc: " in command(ROOT / "launch.py", "--python", sys.executable, *tiny)
    inference = ROOT / "src" / "inference.py"
    assert "of 16 test images right" in command(inference)
    assert "largest difference" in command(inference, "--mode", "onnx")
    Image.fromarray(load_digits().test.images[0, 0].numpy()).save(tmp_path / "digit.png")
    assert "digit.png: " in command(inference, "--mode=predict", "--image", "digit.png")
    written = {path.name for path in (tmp_path / "outputs").iterdir()}
    pictures = {"training_curves.png", "predictions.png"}
    assert written == pictures | {"vit_digits.onnx", "predictions.json"}


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--checkpoint none.pt", "none.pt No such file train first"),
        ("--output file/x.png", "file/x.png cannot be written"),
        ("--output picture", "picture .png"),
        ("--output picture.json", "picture.json .png"),
        ("--output picture.eps", "picture.eps .png .pdf .svg"),
        ("--device foo", "--device foo"),
    ],
)
def test_wrong_usage_ends_in_one_line(run, tmp_path, checkpoint, flags, words):
    (tmp_path / "file").write_text("kept")
    arguments = ["--checkpoint", checkpoint, *flags.split()]
    assert_one_error_line(run(inference.main, *arguments), *words.split())


def test_a_model_for_other_images_is_refused_except_for_export(run, tmp_path):
    model = ViT(img_size=32, patch_size=8, in_chans=3, depth=1, embed_dim=16)
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    torch.save({**content, "best_acc": 1.0}, tmp_path / "other.pt")
    result = run(inference.main, "--mode", "evaluate", "--checkpoint", "other.pt")
    assert_one_error_line(
        result, "3x32x32", "1x28x28", "onnx, torch_export, safetensors, timm serve"
    )
