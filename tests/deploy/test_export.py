"""Files that run elsewhere: what they hold, that they do as well as PyTorch, and that they run."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist
from PIL import Image
from shapes import draw_shape

import inference
from common.errors import UserError
from data.digits import load_digits
from data.folder import load_folder
from data.load import load_dataset
from deploy import export, predict
from saving.checkpoint import PRETRAINED, load_checkpoint
from vit_model import ViT

needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model")
slow = partial(pytest.param, marks=pytest.mark.slow)
# What a user may do with a program: it runs where this project is not.
USER_SCRIPT = """
import importlib.util, json, sys, numpy as np, torch
assert not any(importlib.util.find_spec(name) for name in ("vit_model", "deploy", "saving"))
files = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files).module()
images = torch.from_numpy(np.load("images.npy"))
assert program(images[:1]).shape == (1, 10)
np.save("outputs.npy", program(images).detach().numpy())
print(files["metadata.json"])
"""


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """Latency is measured, but not exactly."""
    monkeypatch.setattr(export, "LATENCY_CALLS", 3)


@pytest.fixture
def checkpoint(trained) -> Path:
    return trained / "checkpoints" / "best_model.pt"


# ---------------------------------------------------------------- what a file holds, what it does


def run_onnx(
    path: Path, images: np.ndarray, num_classes: int = 10
) -> tuple[np.ndarray, dict[str, str]]:
    """Outputs and metadata of a valid file, which takes batches of any size."""
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, output.name, output.type) == ("input", "output", "tensor(float)")
    assert session.run(None, {"input": images[:1]})[0].shape == (1, num_classes)
    metadata = session.get_modelmeta().custom_metadata_map
    return session.run(None, {"input": images})[0], metadata


def run_program(path: Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    np.save(path.with_name("images.npy"), images)
    command = [sys.executable, "-I", "-c", USER_SCRIPT, path]
    done = subprocess.run(command, cwd=path.parent, stdout=subprocess.PIPE, check=True)
    return np.load(path.with_name("outputs.npy")), json.loads(done.stdout)


@pytest.mark.parametrize(
    ("flags", "precision", "most"),  # bytes, of the fp32 weights'; int8's scales take some
    [
        ("--raw_input", "fp32", 1.1),
        ("--quantize int8", "int8", 0.5),
        ("--mode torch_export --raw_input", "fp32", 1.5),
        slow("", "fp32", 1.1),
        slow("--half", "fp16", 0.6),
        slow("--half --raw_input", "fp16", 0.6),
        slow("--quantize int8 --raw_input", "int8", 0.5),
        slow("--mode torch_export", "fp32", 1.5),
    ],
)
def test_a_file_says_how_to_use_it_and_gives_the_classes_that_python_gives(
    run, tmp_path, checkpoint, flags, precision, most
):
    raw, program = "--raw_input" in flags, "torch_export" in flags
    result = run(inference.main, *f"--mode onnx {flags} --checkpoint {checkpoint}".split())
    (path,) = (tmp_path / "outputs").iterdir()
    model, about = load_checkpoint(checkpoint)
    size = path.stat().st_size
    assert size < most * sum(4 * p.numel() for p in model.parameters())
    assert str(ROOT).encode() not in path.read_bytes()

    images, labels = (part.numpy() for part in (load_digits().val.images, load_digits().val.labels))
    expected = predict.predict(model, images, about).probabilities
    if not raw:
        images = (images / np.float32(255) - np.float32(0.1593)) / np.float32(0.2986)
    outputs, metadata = (run_program if program else run_onnx)(path, images)
    same = (outputs.argmax(1) == expected.argmax(1)).sum()
    assert same >= (0.95 if precision == "int8" else 1) * len(labels)
    if raw:
        assert np.abs(outputs - expected).max() < (0.2 if precision == "int8" else 5e-3)
        assert np.allclose(outputs.sum(axis=1), 1, atol=2e-3)

    wanted = "uint8 (batch, 1, 28, 28): pixels" if raw else "float32 (batch, 1, 28, 28): (pixel / 2"
    assert metadata.pop("input").startswith(wanted)
    assert metadata.pop("output").startswith("probabilities" if raw else "logits")
    assert metadata == {
        "dataset": "digits",
        "class_names": json.dumps(list("0123456789")),
        "mean": "0.1593",
        "std": "0.2986",
        "image_size": "28",
        "channels": "grey",
        "preparation": "scaled to fit 20x20, centred by mass in 28x28, light on black",
        "temperature": str(about["calibration"]["temperature"]),
        "precision": precision,
    }

    before, after = (100 * (o.argmax(1) == labels).mean() for o in (expected, outputs))
    for row in (
        rf"size +\S+ MB +{size / 1e6:.2f} MB",
        rf"validation accuracy +{before:.2f} % +{after:.2f} %",
        r"latency, one image +[\d.]+ ms +[\d.]+ ms",
        f"same class as PyTorch: {same} of 180 validation images",
    ):
        assert re.search(f"^{row}$", result.out, re.MULTILINE), row
    if precision != "int8":
        difference = float(re.search(r"batches of 1, 7 and 128: (\S+)", result.out)[1])
        assert difference <= (0.05 if precision == "fp16" else 1e-4)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("--raw_input", "fp32"),
        ("--raw_input --quantize int8", "int8"),
        slow("", "fp32"),
        slow("--half", "fp16"),
    ],
)
def test_a_model_of_photos_is_exported_with_all_that_it_takes_to_use_it(
    run, tmp_path, photos, flags, precision
):
    path = photos / "checkpoints" / "best_model.pt"
    command = f"--mode onnx {flags} --data_dir {photos / 'photos'} --checkpoint".split()
    result = run(inference.main, *command, path)
    assert result.status == 0, result.err
    model, about = load_checkpoint(path)
    data = load_folder(photos / "photos", img_size=32, in_chans=3)
    images, labels = data.val.images.numpy(), data.val.labels.numpy()
    expected = predict.predict(model, images, about).probabilities
    mean, std = (np.array(about["normalization"][name]) for name in ("mean", "std"))
    raw = "--raw_input" in flags
    if not raw:
        images = (images / 255 - mean[:, None, None]) / std[:, None, None]
        images = images.astype(np.float32)
    outputs, metadata = run_onnx(tmp_path / "outputs" / "vit_folder.onnx", images, 3)
    same = (outputs.argmax(1) == expected.argmax(1)).sum()
    assert same >= (0.9 if precision == "int8" else 1) * len(labels)
    if raw:
        assert np.abs(outputs - expected).max() < (0.2 if precision == "int8" else 5e-3)
    assert metadata.pop("input").startswith(f"{'uint8' if raw else 'float32'} (batch, 3, 32, 32): ")
    assert json.loads(metadata.pop("class_names")) == ["circle", "square", "triangle"]
    for name, values in (("mean", mean), ("std", std)):
        assert [float(value) for value in metadata.pop(name).split(", ")] == values.tolist()
    assert (
        metadata["preparation"].startswith("its middle square") and metadata["image_size"] == "32"
    )
    assert metadata["channels"] == "red, green, blue" and metadata["precision"] == precision
    assert "light on black" not in str(metadata)
    right = 100 * (outputs.argmax(1) == labels).mean()
    assert re.search(rf"^validation accuracy .* {right:.2f} %$", result.out, re.MULTILINE)


def test_a_model_of_photos_is_exported_without_them_but_for_int8(run, photos):
    flags = "--mode onnx --raw_input --checkpoint".split()
    path = photos / "checkpoints" / "best_model.pt"
    result = run(inference.main, *flags, path)
    assert result.status == 0 and "nothing is measured" in result.err and "--data_dir" in result.err
    result = run(inference.main, *flags, path, "--quantize", "int8")
    assert_one_error_line(result, "--quantize int8", "training images", "--data_dir")
    assert_one_error_line(run(inference.main, *flags, path, "--data_dir", "mine"), "mine")
    Path("mine/circle").mkdir(parents=True)
    for kind in ("circle", "star"):
        shutil.copytree(photos / "photos" / "circle", f"mine/{kind}", dirs_exist_ok=True)
    result = run(inference.main, *flags, path, "--quantize", "int8", "--data_dir", "mine")
    assert_one_error_line(result, "--quantize int8", "circle, square, triangle", "circle, star")


@pytest.mark.slow
@needs_mnist
@needs_pretrained
def test_files_do_as_well_on_all_of_mnists_test_images():
    """int8 loses at most 0.1 points; fp32 gives the class that Python gives."""
    model, about = load_checkpoint(PRETRAINED)
    data = load_dataset("mnist", MNIST)
    images, labels = data.test.images.numpy(), data.test.labels.numpy()
    expected = predict.predict(model, images, about).probabilities.argmax(1)
    options = {"raw_input": True, "int8_images": data.train.images[: export.INT8_IMAGES]}
    for precision, loss, different in (("fp32", 0, 0), ("int8", 0.1, 30)):
        content = export.export(model, about, precision=precision, **options).content
        session = onnxruntime.InferenceSession(content)
        found = [session.run(None, {"input": part})[0].argmax(1) for part in np.split(images, 20)]
        found = np.concatenate(found)
        assert (found != expected).sum() <= different
        assert 100 * ((expected == labels).mean() - (found == labels).mean()) <= loss


# --------------------------------------------------------------------------- that it runs elsewhere


@pytest.mark.slow
@needs_pretrained
def test_the_documentation_shows_how_to_run_a_file(tmp_path, monkeypatch, capsys):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = re.findall(r"```python\n(.*?)```", "".join(page.read_text() for page in pages), re.S)
    (snippet,) = (block for block in blocks if "onnxruntime" in block and "Draw" in block)
    assert len(snippet.splitlines()) <= 10
    assert not re.search("vit_model|deploy|torch", snippet)
    model, about = load_checkpoint(PRETRAINED)
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    content = export.export(model, about, raw_input=True).content
    Path("outputs", "vit_mnist.onnx").write_bytes(content)
    exec(snippet, {})
    assert re.fullmatch(r"7: \d+\.\d %\n", capsys.readouterr().out)
    # What its comment says, with an image that is light on dark and one that is dark on light.
    own = re.sub(r"image = .*# or: (.*)\nImageDraw.*", r"image = \1", snippet)
    assert 'image = Image.open("digit.png")' in own
    image = load_digits().test.images[0].numpy()
    (expected,) = predict.predict(model, image[None], about).probabilities
    for pixels in (image[0], 255 - image[0]):
        Image.fromarray(pixels).save("digit.png")
        exec(own, {})
        printed = f"{expected.argmax()}: {100 * expected.max():.1f} %\n"
        assert capsys.readouterr().out == printed


def test_the_documentation_shows_how_to_ask_a_file_of_a_photo(
    tmp_path, monkeypatch, capsys, photos
):
    text = (ROOT / "docs" / "inference.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (snippet,) = (block for block in blocks if "photo.jpg" in block)
    assert len(snippet.splitlines()) <= 14
    model, about = load_checkpoint(photos / "checkpoints" / "best_model.pt")
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    content = export.export(model, about, raw_input=True).content
    Path("outputs", "vit_folder.onnx").write_bytes(content)
    draw_shape("square", np.random.default_rng(0), (333, 250)).save("photo.jpg", quality=95)
    exec(snippet, {})
    answers = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    (expected,) = predict.answer_pictures(model, about, ["photo.jpg"])
    assert len(answers) == 3 and answers[0][0] == expected["prediction"] == "square"
    for name, share in answers:
        share = float(share.removesuffix(" %"))
        assert share == pytest.approx(100 * expected["probabilities"][name], abs=2)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--half --raw_input", {"pool": "mean"}),
        slow("", {}),
        ("--mode torch_export", {"img_size": 32, "patch_size": 8, "in_chans": 3}),
    ],
)
def test_any_checkpoint_is_exported_without_its_data_set(run, tmp_path, offline, flags, sizes):
    """Published checkpoints, with four keys alone, and others; the accuracy is not measured."""
    model = ViT(embed_dim=16, depth=1, **sizes)
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    torch.save({**content, "best_acc": 1.0}, tmp_path / "published.pt")
    name = "file.pt2" if "torch_export" in flags else "file.onnx"
    (tmp_path / name).write_text("old")
    arguments = f"--mode onnx {flags} --checkpoint published.pt --output {name}".split()
    result = run(inference.main, *arguments)
    assert result.status == 0, result.err
    (note,) = result.err.splitlines()
    assert note.startswith("note: nothing is measured on validation images: ")
    assert "latency" in result.out and "accuracy" not in result.out
    assert f"Replaced: {name}, which was there" in result.out and f"Written: {name}" in result.out


# ----------------------------------------------------------------------------------------- errors


def test_int8_without_training_images_ends_in_one_line(run, tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "source": "letters"}, tmp_path / "letters.pt")
    flags = "--mode onnx --quantize int8 --checkpoint letters.pt --output file.onnx".split()
    result = run(inference.main, *flags)
    assert_one_error_line(result, "--quantize int8", "training images", "letters")
    assert [path.name for path in tmp_path.iterdir()] == ["letters.pt"]


@pytest.mark.parametrize(
    ("flags", "name", "limit", "words"),
    [
        ("", "TOLERANCE", {"fp32": 0.0}, "fp32 differs"),
        slow("--quantize int8", "MAX_LOSS", -100.0, "int8 validation accuracy"),
    ],
)
def test_a_file_that_does_worse_is_not_written(
    run, tmp_path, checkpoint, monkeypatch, flags, name, limit, words
):
    monkeypatch.setattr(export, name, limit)
    (tmp_path / "old.onnx").write_text("old")
    flags = f"--mode onnx {flags} --output old.onnx".split()
    result = run(inference.main, *flags, "--checkpoint", checkpoint)
    assert_one_error_line(result, "old.onnx", "not written", *words.split())
    assert (tmp_path / "old.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]


def test_an_int8_file_may_do_better_than_pytorch_but_not_much_worse(checkpoint, monkeypatch):
    monkeypatch.setattr(export, "LATENCY_CALLS", 1)
    exported, val = export.export(*load_checkpoint(checkpoint)), load_digits().val
    better = replace(exported, network=lambda x: -exported.file(x))
    better.network.state_dict = exported.network.state_dict
    assert "validation accuracy" in export.compare(better, "int8", "better.onnx", val)
    worse = replace(exported, file=lambda x: -exported.file(x))
    with pytest.raises(UserError, match=r"worse\.onnx in int8 has a validation accuracy of "):
        export.compare(worse, "int8", "worse.onnx", val)


def test_a_network_too_large_for_fp16_is_not_written(run, tmp_path, offline):
    """Two biases, each within fp16's bounds, have a sum beyond, which gives NaN."""
    model = ViT(embed_dim=16, depth=1)
    with torch.no_grad():
        for bias in (model.blocks[0].attn.out_proj.bias, model.blocks[0].mlp[3].bias):
            bias.fill_(6e4)
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    torch.save({**content, "best_acc": 1.0}, tmp_path / "large.pt")
    result = run(inference.main, *"--mode onnx --half --checkpoint large.pt".split())
    assert result.status == 2 and "differs from PyTorch by nan" in result.err
    assert not list(tmp_path.rglob("*.onnx"))
