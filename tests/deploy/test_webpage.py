"""The page that is one file: what it holds, and that its JavaScript answers as Python does."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist
from PIL import Image, ImageDraw

import inference
from analysis import confidence
from analysis.explain import attention_weights, patch_map, rollout
from data.digits import load_digits
from data.load import load_dataset
from deploy import webpage
from deploy.digit_image import read_digits
from deploy.predict import normalize, predict
from saving.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from utils import BatchLoader
from vit_model import ViT

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node")
needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model")
KINDS = {
    "cls, learned": {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "mean, sincos2d": {
        **{"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2.5},
        **{"pool": "mean", "pos_embed": "sincos2d"},
    },
    "cls, sincos2d, wide": {
        **{"patch_size": 14, "embed_dim": 60, "depth": 1, "num_heads": 5, "mlp_ratio": 1},
        "pos_embed": "sincos2d",
    },
    "mean, one patch": {
        **{"patch_size": 28, "embed_dim": 9, "depth": 3, "num_heads": 1, "pool": "mean"},
        "num_classes": 7,
    },
    "cls, many patches": {"patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2},
}


def in_node(folder: Path, page: str, code: str, data: object) -> object:
    """What the JavaScript expression `code` gives of `data`, where the page's network is loaded."""
    scripts = re.findall(r"<script>\n(.*?)</script>", page, re.DOTALL)
    *network, of_the_page = scripts
    assert "getElementById" in of_the_page  # which needs a browser
    read = "JSON.parse(require('fs').readFileSync('data.json'))"
    program = "\n".join(
        [*network, f"const data = {read};", f"console.log(JSON.stringify({code}));"]
    )
    (folder / "program.js").write_text(program)
    (folder / "data.json").write_text(json.dumps(data))
    # Node 20 may hang as it ends, where another thread still compiles (nodejs/node issue 54918).
    command = [NODE, "--single-threaded", "program.js"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------ the network in it


def random_model(config: dict) -> tuple[ViT, dict]:
    """A model whose answers differ from image to image, and its checkpoint's values."""
    torch.manual_seed(0)
    model = ViT(**config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data.add_("norm" in name and "weight" in name)
    digits, num_classes = load_digits(), config.get("num_classes", 10)
    with torch.no_grad():  # so that each class is the likeliest at times
        features = model.features((digits.test.images[:20] / 255 - 0.16) / 0.3)
        model.head.weight /= model.head(features).std(dim=0).mean()
        model.head.bias -= model.head(features).mean(dim=0)
    known, others = (part[part.labels < num_classes][:100] for part in (digits.train, digits.val))
    some = BatchLoader(others, 50, [0.16], [0.3])
    checkpoint = {
        "model_config": {"img_size": 28, "in_chans": 1, "pool": "cls", "num_heads": 4, **config},
        "normalization": {"mean": [0.16], "std": [0.3]},
        "calibration": {**confidence.fit(model, known, some), "temperature": 2.0},
        "preparation": "digit",
        "dataset": "</script><!-- digits",
        "class_names": list("0123456789")[:num_classes],
        "best_acc": 50.0,
    }
    return model, checkpoint


@needs_node
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_in_the_page_answers_as_pytorch(tmp_path, kind):
    model, checkpoint = random_model(KINDS[kind])
    page = webpage.build_page(model, checkpoint)
    images = load_digits().test.images[:20]
    pixels = images.flatten(1).tolist()
    answers = in_node(tmp_path, page, "data.map((p) => answerImage(Uint8Array.from(p)))", pixels)
    logits = in_node(
        tmp_path, page, "data.map((p) => [...model.forward(Float32Array.from(p))])", pixels
    )
    model.half().float()  # as the page has it
    predicted = predict(model, images.numpy(), checkpoint)
    looked = patch_map(rollout(attention_weights(model, normalize(images, checkpoint))), model)
    found = np.array([answer["probabilities"] for answer in answers])
    np.testing.assert_allclose(found, predicted.probabilities, atol=1e-5)
    assert len(set(found.argmax(axis=1))) > 2
    np.testing.assert_array_equal(found.argmax(axis=1), predicted.probabilities.argmax(axis=1))
    np.testing.assert_allclose([a["attention"] for a in answers], looked, atol=1e-5)
    np.testing.assert_array_equal([a["received"] for a in answers], images[:, 0])
    assert [a["may_be_no_digit"] for a in answers] == predicted.strange.tolist()
    assert [a["prediction"] for a in answers] == [str(i) for i in found.argmax(axis=1)]
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images.float()), rtol=1e-4, atol=1e-3)


@needs_node
def test_what_is_like_no_digit_is_told_as_by_python(tmp_path):
    model, checkpoint = random_model(KINDS["cls, learned"])
    page = webpage.build_page(model, checkpoint)
    images = np.random.default_rng(0).integers(256, size=(20, 1, 28, 28), dtype=np.uint8)
    images[::2] = load_digits().test.images[:10]
    code = "data.map((p) => answerImage(Uint8Array.from(p)).may_be_no_digit)"
    expected = predict(model, images, checkpoint).strange.tolist()
    assert in_node(tmp_path, page, code, images.reshape(20, -1).tolist()) == expected
    assert True in expected and False in expected
    del checkpoint["calibration"]["threshold"]
    page = webpage.build_page(model, checkpoint)
    assert not any(in_node(tmp_path, page, code, images.reshape(20, -1).tolist()))


@needs_node
@needs_mnist
@needs_pretrained
@pytest.mark.slow
def test_a_thousand_test_images_get_the_class_that_pytorch_gives(tmp_path):
    model, checkpoint = load_checkpoint(PRETRAINED)
    images = load_dataset("mnist", MNIST, None).test.images[:1000]
    code = "data.map((p) => answerImage(Uint8Array.from(p)).probabilities)"
    page = webpage.build_page(model, checkpoint)
    found = np.array(in_node(tmp_path, page, code, images.flatten(1).tolist()))
    expected = predict(model, images.numpy(), checkpoint).probabilities
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(found, expected, atol=5e-3)  # the page's weights are fp16


# ---------------------------------------------------------------------------- a drawing's digits


def drawing(*lines: list[tuple[float, float]], width: float = 8.4) -> np.ndarray:
    """A page's drawing, uint8 (300, 300): lines with round ends, smooth at their edges."""
    image = Image.new("L", (1200, 1200), 255)
    pen, radius = ImageDraw.Draw(image), 2 * width
    for line in lines:
        corners = [(4 * x, 4 * y) for x, y in line]
        pen.line(corners, fill=0, width=round(4 * width), joint="curve")
        for x, y in (corners[0], corners[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return np.asarray(image.resize((300, 300), Image.Resampling.BOX))


SEVEN, ONE = [(80, 60), (200, 70), (120, 230)], [(232, 40), (225, 260)]
FOUR, STEM = [(90, 60), (40, 160), (110, 155)], [(155, 100), (148, 230)]
FIVE, BAR = [(60, 50), (55, 120), (110, 150), (60, 220)], [(138, 52), (190, 42)]
DRAWINGS = {
    "one digit": [SEVEN],
    "a broad one": [[(30, 150), (270, 140)]],
    "a dot": [[(150, 150), (150, 150)]],
    "an open four and a one": [FOUR, STEM, [(220, 60), (215, 230)]],
    "a five and its bar, which lies apart, two ones": [FIVE, BAR, ONE, [(270, 55), (262, 230)]],
    "two lines and a colon": [
        *([(x, y), (x - 5, y + 90)] for x, y in ((50, 30), (90, 44), (250, 22))),
        *([(140, y), (141, y + 22)] for y in (42, 88)),
        *([(x, 170), (x - 50, 175), (x - 30, 270)] for x in (120, 260)),
    ],
    **{
        f"edges {gap} apart": [[(60 + i * gap, 100), (61 + i * gap, 130)] for i in range(5)]
        for gap in (9.4, 9.6, 10.2)  # which just touch
    },
    "small ones": [*([(x, 100), (x - 3, 118)] for x in range(40, 240, 25))],
}


@needs_node
def test_a_drawing_is_read_as_by_python(tmp_path):
    page = webpage.build_page(*random_model(KINDS["mean, one patch"]))
    drawings = [drawing(*lines) for lines in DRAWINGS.values()]
    code = "data.map((p) => readDigits(Uint8Array.from(p), 300).map("
    code += "({ box, pixels }) => ({ box, pixels: [...pixels] })))"
    readings = in_node(tmp_path, page, code, [each.ravel().tolist() for each in drawings])
    counts = []
    for name, each, found in zip(DRAWINGS, drawings, readings, strict=True):
        file = io.BytesIO()
        Image.fromarray(each).save(file, "PNG")
        expected = read_digits(file).digits
        assert [digit["box"] for digit in found] == [list(digit.box) for digit in expected], name
        for digit, right in zip(found, expected, strict=True):
            pixels = np.array(digit["pixels"]).reshape(28, 28)
            assert np.abs(pixels - right.pixels.astype(int)).max() <= 1, name  # rounding
        counts.append(len(found))
    assert counts == [1, 1, 1, 2, 3, 5, 3, 5, 2, 8]


@needs_node
def test_a_drawing_without_digits_gets_a_message(tmp_path):
    page = webpage.build_page(*random_model(KINDS["mean, one patch"]))
    code = "data.map((p) => { try { readDigits(Uint8Array.from(p), 300); } "
    code += "catch (error) { return error.message; } })"
    marks = [[(x, y), (x, y + 6)] for x in range(15, 290, 13) for y in range(15, 280, 20)]
    drawings = drawing(), drawing(*marks, width=4)
    messages = in_node(tmp_path, page, code, [each.ravel().tolist() for each in drawings])
    assert "blank" in messages[0] and f"{len(marks)} marks, expected at most 200" in messages[1]


# ------------------------------------------------------------------------------------- the file


def assert_alone(page: str) -> None:
    """It refers to nothing outside, and the browser is told so."""
    assert re.findall(r'\b(?:src|href)="(?!data:)', page) == []
    text = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|[\"'(]//|@import|cookie|localStorage|fetch\(", text)
    assert "default-src 'none'" in page and "connect-src" not in page


def test_the_command_writes_one_file_that_refers_to_nothing_outside(run, trained):
    checkpoint = trained / "checkpoints" / "best_model.pt"
    result = run(inference.main, *f"--mode webpage --checkpoint {checkpoint}".split())
    assert result.status == 0, result.err
    assert "vit_digits.html: 0." in result.out and "of 180 validation images" in result.out
    page = Path("outputs", "vit_digits.html").read_text()
    assert_alone(page)
    assert str(trained) not in page and str(ROOT) not in page
    assert page == webpage.build_page(*load_checkpoint(checkpoint))
    compared = webpage.compare(*load_checkpoint(checkpoint), None)
    assert "same class on 128 of 128 random images" in compared


def test_a_name_in_the_model_cannot_end_the_script():
    page = webpage.build_page(*random_model(KINDS["mean, one patch"]))
    assert "</script><!--" not in page and "\\u003c/script>\\u003c!-- digits" in page


@needs_pretrained
def test_the_pretrained_model_takes_at_most_3_5_mb_and_its_page_is_in_docs():
    model, checkpoint = load_checkpoint(PRETRAINED)
    page = webpage.build_page(model, checkpoint)
    assert len(page.encode()) <= 3_500_000
    published = (ROOT / "docs" / "vit_mnist.html").read_text(encoding="utf-8")
    assert_alone(published)
    advice = "python3 launch.py inference.py --mode webpage --output docs/vit_mnist.html"
    assert published == page, f"make it anew: {advice}"


def test_other_images_than_digits_are_refused(run, photos, trained, tmp_path):
    path = photos / "checkpoints" / "best_model.pt"
    result = run(inference.main, "--mode", "webpage", "--checkpoint", path)
    assert_one_error_line(result, str(path), "photos", "digits", "demo.py")
    letters = {"class_names": list("ABCDEFGHIJ"), "dataset": "letters", "source": "letters"}
    stored = torch.load(trained / "checkpoints" / "best_model.pt")
    save_checkpoint(tmp_path / "letters.pt", {**stored, **letters})
    result = run(inference.main, "--mode", "webpage", "--checkpoint", "letters.pt")
    assert_one_error_line(result, "letters.pt", "letters", "digits")
    assert not Path("outputs", "vit_letters.html").exists()


def test_a_model_that_fp16_cannot_hold_is_not_written(run, trained, tmp_path):
    stored = torch.load(trained / "checkpoints" / "best_model.pt")
    stored["model_state_dict"]["blocks.0.norm1.bias"] += 1e5
    save_checkpoint(tmp_path / "large.pt", stored)
    result = run(inference.main, "--mode", "webpage", "--checkpoint", "large.pt")
    assert_one_error_line(result, "fp16", "not written")
    assert not Path("outputs", "vit_digits.html").exists()
