"""Files that run elsewhere: what they hold, that they do as well as PyTorch, and that they run."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist
from PIL import Image

import inference
from data.digits import load_digits
from data.mnist import load_mnist
from deploy import export, predict
from saving.checkpoint import PRETRAINED, load_checkpoint
from vit_model import ViT

BATCHES = (1, 3, 200)
ONNX = ["", "--half", "--quantize int8"]
ONNX += [f"{flags} --raw_input".strip() for flags in ONNX]
PROGRAMS = ["--mode torch_export", "--mode torch_export --raw_input"]
needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model")


def call(folder: Path, flags: str, *more: str) -> SimpleNamespace:
    """The file that `inference.py` writes with `flags` in `folder`, and what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["inference.py", *f"--mode onnx {flags}".split(), *more])
        inference.main()
    (path,) = (folder / "outputs").iterdir()
    return SimpleNamespace(path=path, printed=printed.getvalue())


@pytest.fixture(scope="session")
def checkpoint(trained) -> str:
    return str(trained / "checkpoints" / "best_model.pt")


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """exported(flags): `call` on the digits' model, once for each set of flags."""
    return cache(
        lambda flags: call(tmp_path_factory.mktemp("e"), flags, "--checkpoint", checkpoint)
    )


def images_for(flags: str, pixels: np.ndarray, normalization: dict[str, float]) -> np.ndarray:
    """What the file made with `flags` takes, from uint8 (n, 28, 28)."""
    if "--raw_input" in flags:
        return pixels[:, None]
    scaled = pixels[:, None].astype(np.float32) / 255
    return (scaled - np.float32(normalization["mean"])) / np.float32(normalization["std"])


# ----------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("flags", ONNX)
def test_onnx_is_one_file_with_a_free_batch_axis(exported, flags):
    path = exported(flags).path
    assert path.name == "vit_mnist.onnx"
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    raw = "--raw_input" in flags
    assert (given.name, given.type) == ("input", "tensor(uint8)" if raw else "tensor(float)")
    assert (output.name, output.type) == ("output", "tensor(float)")
    pixels = np.random.default_rng(0).integers(256, size=(200, 28, 28), dtype=np.uint8)
    images = images_for(flags, pixels, {"mean": 0.1593, "std": 0.2986})
    for batch in BATCHES:
        (outputs,) = session.run(None, {"input": images[:batch]})
        assert outputs.shape == (batch, 10)
        if raw:
            assert outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1, atol=2e-3)


@pytest.mark.parametrize("flags", [*ONNX, *PROGRAMS])
def test_a_file_tells_how_to_use_it_and_not_where_it_was_made(exported, checkpoint, flags):
    path = exported(flags).path
    if flags in PROGRAMS:
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        metadata = json.loads(files["metadata.json"])
    else:
        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert metadata["dataset"] == "digits"
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert (float(metadata["mean"]), float(metadata["std"])) == (0.1593, 0.2986)
    raw = "--raw_input" in flags
    assert metadata["input"].startswith(f"{'uint8' if raw else 'float32'} (batch, 1, 28, 28)")
    assert ("mean" in metadata["input"]) != raw
    assert metadata["output"].startswith("probabilities" if raw else "logits")
    temperature = load_checkpoint(checkpoint)[1]["calibration"]["temperature"]
    assert float(metadata["temperature"]) == temperature != 1
    kind = {"--half": "fp16", "int8": "int8"}
    assert metadata["precision"] == next((kind[word] for word in kind if word in flags), "fp32")
    assert str(ROOT).encode() not in path.read_bytes()


def test_fp16_halves_the_weights_and_int8_quarters_them(exported):
    size = {flags: exported(flags).path.stat().st_size for flags in ONNX}
    weights = sum(4 * p.numel() for p in ViT(depth=2, embed_dim=48).parameters())
    assert size[""] - size["--half"] > 0.45 * weights
    assert size[""] - size["--quantize int8"] > 0.5 * weights  # scales and graph take some


# ----------------------------------------------------------------------------- that it does as well


@pytest.mark.parametrize("flags", [*ONNX, *PROGRAMS])
def test_a_file_gives_the_classes_that_python_gives(exported, checkpoint, flags):
    """On all of the digits' validation images; what is printed agrees."""
    result = exported(flags)
    model, about = load_checkpoint(checkpoint)
    val = load_digits().val
    pixels, labels = val.images[:, 0].numpy(), val.labels.numpy()
    expected = predict.predict(model, pixels, about).probabilities
    images = images_for(flags, pixels, about["normalization"])
    if flags in PROGRAMS:
        run = torch.export.load(result.path).module()
        outputs = run(torch.from_numpy(images)).detach().numpy()
    else:
        (outputs,) = onnxruntime.InferenceSession(result.path).run(None, {"input": images})
    if "--raw_input" in flags:
        assert np.abs(outputs - expected).max() < (0.2 if "int8" in flags else 5e-3)
    same = (outputs.argmax(1) == expected.argmax(1)).sum()
    assert same >= (0.95 * len(labels) if "int8" in flags else len(labels))
    before, after = (100 * (o.argmax(1) == labels).mean() for o in (expected, outputs))
    size = f"{result.path.stat().st_size / 1e6:.2f} MB"
    assert re.search(rf"^size +\S+ MB +{size}$", result.printed, re.M)
    assert re.search(rf"^validation accuracy +{before:.2f} % +{after:.2f} %$", result.printed, re.M)
    assert re.search(r"^latency, one image +[\d.]+ ms +[\d.]+ ms$", result.printed, re.M)
    assert f"same class as PyTorch: {same} of 180 validation images" in result.printed
    if "int8" not in flags:
        difference = float(re.search(r"batches of 1, 7 and 128: (\S+)", result.printed)[1])
        assert difference <= (0.05 if "--half" in flags else 1e-4)


@needs_mnist
@needs_pretrained
def test_int8_and_raw_input_on_all_of_mnists_test_images(tmp_path):
    """int8 loses at most 0.1 points; the fp32 file gives the class that Python gives."""
    model, about = load_checkpoint(PRETRAINED)
    test = load_mnist(MNIST).test
    pixels, labels = test.images[:, 0].numpy(), test.labels.numpy()
    expected = np.concatenate(
        [predict.predict(model, part, about).probabilities for part in np.split(pixels, 20)]
    ).argmax(1)
    for flags, loss, different in (("", 0, 0), ("--quantize int8", 0.1, 30)):
        exporting = export.export(
            model,
            about,
            precision="int8" if flags else "fp32",
            raw_input=True,
            int8_images=load_mnist(MNIST).train.images[: export.INT8_IMAGES],
        )
        session = onnxruntime.InferenceSession(exporting.content)
        found = np.concatenate(
            [session.run(None, {"input": x[:, None]})[0].argmax(1) for x in np.split(pixels, 20)]
        )
        assert (found != expected).sum() <= different
        assert 100 * ((expected == labels).mean() - (found == labels).mean()) <= loss


# --------------------------------------------------------------------------- that it runs elsewhere


def test_a_program_runs_where_this_project_is_not(exported, checkpoint, tmp_path):
    path = exported(PROGRAMS[1]).path
    pixels = load_digits().test.images[:, 0].numpy()
    np.save(tmp_path / "pixels.npy", pixels)
    script = f"""
import importlib.util, numpy as np, torch
assert not any(importlib.util.find_spec(name) for name in ("vit_model", "export", "checkpoint"))
run = torch.export.load({str(path)!r}).module()
pixels = torch.from_numpy(np.load("pixels.npy"))[:, None]
for batch in {BATCHES}:
    assert run(pixels[:1].expand(batch, -1, -1, -1)).shape == (batch, 10)
np.save("outputs.npy", run(pixels).detach().numpy())
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    model, about = load_checkpoint(checkpoint)
    expected = predict.predict(model, pixels, about).probabilities
    assert np.allclose(np.load(tmp_path / "outputs.npy"), expected, atol=1e-6)


def readme_snippet() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "inference.md").read_text(), re.S)
    (snippet,) = [block for block in blocks if "onnxruntime" in block]
    return snippet


def test_the_readme_shows_how_to_run_a_raw_input_file(exported, checkpoint, tmp_path):
    snippet = readme_snippet()
    assert len(snippet.splitlines()) <= 10
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "vit_mnist.onnx").write_bytes(exported("--raw_input").path.read_bytes())

    def run(code: str) -> str:
        command = [sys.executable, "-I", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    assert re.fullmatch(r"\d: \d+\.\d %\n", run(snippet))  # as it stands
    # What its comment says, with an image that is light on dark and one that is dark on light.
    own = re.sub(r"image = .*# or: (.*)\nImageDraw.*", r"image = \1", snippet)
    assert 'image = Image.open("digit.png")' in own
    image = load_digits().test.images[0].numpy()
    model, about = load_checkpoint(checkpoint)
    (expected,) = predict.predict(model, image, about).probabilities
    for pixels in (image[0], 255 - image[0]):
        Image.fromarray(pixels).save(tmp_path / "digit.png")
        assert run(own) == f"{expected.argmax()}: {100 * expected.max():.1f} %\n"


@needs_pretrained
def test_the_readmes_drawing_is_read_as_what_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").mkdir()
    file = export.export(*load_checkpoint(PRETRAINED), raw_input=True)
    (tmp_path / "outputs" / "vit_mnist.onnx").write_bytes(file.content)
    monkeypatch.chdir(tmp_path)
    exec(readme_snippet(), {})
    assert capsys.readouterr().out.startswith("7: ")


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("", {}),
        ("--half --raw_input", {"pool": "mean"}),
        ("--mode torch_export", {"img_size": 32, "patch_size": 8, "in_chans": 3}),
    ],
)
def test_any_checkpoint_is_exported_without_its_data_set(run, tmp_path, offline, flags, sizes):
    """Published checkpoints, with four keys alone, and others; the accuracy is not measured."""
    model = ViT(embed_dim=16, depth=1, **sizes)
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    torch.save({**content, "best_acc": 1.0}, tmp_path / "published.pt")
    flags = f"--mode onnx {flags} --checkpoint published.pt".split()
    result = run(inference.main, *flags)
    assert result.status == 0, result.err
    assert result.err.startswith("note: the validation accuracy is not measured: ")
    assert "latency" in result.out and "accuracy" not in result.out
    (path,) = (tmp_path / "outputs").iterdir()
    assert f"Written: outputs/{path.name}" in result.out


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode onnx --half --quantize int8", "--half --quantize int8 contradict"),
        ("--mode onnx --quantize int4", "--quantize int4 int8"),
        ("--mode torch_export --half", "torch_export --half --mode onnx"),
        ("--mode evaluate --quantize int8", "evaluate --quantize --mode onnx"),
        ("--mode visualize --raw_input", "visualize --raw_input onnx torch_export"),
    ],
)
def test_flags_that_do_not_go_together_end_in_one_line(run, tmp_path, checkpoint, flags, words):
    result = run(inference.main, *flags.split(), "--checkpoint", checkpoint)
    assert_one_error_line(result, *words.split())
    assert not list(tmp_path.iterdir())


def test_int8_without_training_images_ends_in_one_line(run, tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "dataset": "letters"}, tmp_path / "letters.pt")
    result = run(
        inference.main,
        *"--mode onnx --quantize int8 --checkpoint letters.pt --output o.onnx".split(),
    )
    assert_one_error_line(result, "--quantize int8", "training images", "letters")
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize(
    ("flags", "name", "limit", "words"),
    [
        ("", "TOLERANCE", {"fp32": 0.0}, "fp32 differs"),
        ("--quantize int8", "MAX_LOSS", -100.0, "int8 validation accuracy"),
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
