"""What answers are worth: confidence that means accuracy, and images that may be no digit."""

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import MNIST, TINY_DIGITS, launch, needs_mnist
from PIL import Image, ImageDraw, ImageFont

import inference
from analysis import confidence, explain
from data.digits import load_digits
from data.load import load_dataset
from deploy.digit_image import read_digits
from deploy.predict import predict
from saving.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from utils import BatchLoader
from vit_model import ViT

needs_pretrained = pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model")
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
LETTERS = "ACEFHJKLMNPRTUVWXY"  # without those that look like digits: BDGIOQSZ
SHAPES = "♥★▲■✚☺➔⌂♪✓☂♣♠☼✂✈?#@&"


@pytest.fixture(scope="module")
def digits_model(trained) -> tuple[ViT, dict, explain.Outputs]:
    """The model of the training run, its checkpoint, and its outputs on the test images."""
    model, about = load_checkpoint(trained / "checkpoints" / "best_model.pt")
    loader = BatchLoader(load_digits().test, 500, **about["normalization"])
    return model, about, explain.outputs(model, loader, about["calibration"]["temperature"])


def expected_error(outputs: explain.Outputs, **changes) -> float:
    changed = replace(outputs, **changes)
    assert np.array_equal(changed.predicted, outputs.predicted)  # no temperature changes a class
    return explain.reliability(changed.confidence, changed.correct).expected_error


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 10, generator=generator)
    drawn = (logits / temperature).softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    assert confidence.fit_temperature(logits, drawn) == pytest.approx(temperature, rel=0.02)


def test_a_temperature_stays_in_bounds_whatever_the_logits_say():
    labels = torch.arange(30) % 10
    right = 5.0 * torch.nn.functional.one_hot(labels, 10)
    found = confidence.fit_temperature(right, labels)
    # All of 30 right: as sure as if one in 32 were drawn at random, not wholly sure.
    assert (right / found).softmax(dim=1).max() == pytest.approx(1 - 0.9 / 32, abs=1e-4)
    highest = confidence.MAX_TEMPERATURE
    for nonsense in (-right, torch.zeros(30, 10), right.roll(1, 0)):
        assert 1 / highest <= confidence.fit_temperature(nonsense, labels) <= highest


def test_confidence_of_a_label_smoothed_model_means_accuracy(digits_model):
    _, about, outputs = digits_model
    assert about["settings"]["label_smoothing"] == 0.1 and outputs.temperature < 1
    assert expected_error(outputs) < expected_error(outputs, temperature=1.0)
    assert abs(outputs.confidence.mean() - outputs.correct.mean()) < 0.05


@needs_mnist
@needs_pretrained
def test_the_pretrained_models_confidence_means_accuracy_and_few_digits_are_strange():
    model, about = load_checkpoint(PRETRAINED)
    test = load_dataset("mnist", MNIST).test
    probabilities, strange = predict(model, test.images[::4].numpy(), about)
    assert strange.mean() < 0.02
    outputs = explain.Outputs(probabilities, np.log(probabilities), test.labels[::4].numpy())
    without = expected_error(outputs, temperature=1 / about["calibration"]["temperature"])
    assert expected_error(outputs) < 0.005 < 0.05 < without
    assert abs(outputs.confidence.mean() - outputs.correct.mean()) < 0.005


def test_strangeness_is_the_distance_to_the_nearest_class_summed_over_blocks():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 2, 4, generator=generator)
    means = torch.randn(2, 3, 4, generator=generator)
    factors = torch.randn(2, 4, 4, generator=generator).tril()
    calibration = {"whitening": factors, "centres": means @ factors.mT}
    for vector, found in zip(vectors, confidence.strangeness(vectors, calibration), strict=True):
        distances = [
            min((x - m) @ factor.T @ factor @ (x - m) for m in centres)  # C^-1 = W^T W
            for x, centres, factor in zip(vector, means, factors, strict=True)
        ]
        assert found == pytest.approx(float(sum(distances)), rel=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_one_pass_gives_the_models_own_logits(pool):
    model = ViT(depth=7, embed_dim=16, pool=pool).eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        logits, vectors = confidence.read(model, images)
        # With "cls" the model itself spares the last block's other tokens: sums in another order.
        tolerance = {"cls": None, "mean": 0.0}[pool]
        torch.testing.assert_close(logits, model(images), rtol=tolerance, atol=tolerance)
        after_three = model.embed(images)
        for block in model.blocks[:3]:  # a third of 7, and two, are 2.33 and 4.67
            after_three = block(after_three)
    assert vectors.shape == (3, 3, 16) and torch.equal(vectors[:, 0], after_three.mean(dim=1))


def test_a_hundredth_of_the_validation_images_is_strange_and_noise_is(digits_model):
    model, about, _ = digits_model
    data = load_digits()
    assert predict(model, data.val.images.numpy(), about).strange.sum() in (1, 2)  # of 180
    assert predict(model, data.test.images.numpy(), about).strange.mean() < 0.08
    noise = np.random.default_rng(0).integers(256, size=(50, 1, 28, 28), dtype=np.uint8)
    assert predict(model, noise, about).strange.all()


def written(text: str, font: str) -> np.ndarray:
    """A character, dark on light, as `read_digits` brings it to the model."""
    image, file = Image.new("L", (280, 280), 255), io.BytesIO()
    font = ImageFont.truetype(FONTS / font, 160)
    ImageDraw.Draw(image).text((140, 140), text, fill=0, font=font, anchor="mm")
    image.save(file, "PNG")
    return read_digits(io.BytesIO(file.getvalue()), text, single=True).digits[0].pixels


@needs_pretrained
@pytest.mark.parametrize(
    ("text", "fonts"),
    [
        (LETTERS, ["DejaVuSans.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneral.ttf"]),
        (SHAPES, ["DejaVuSans.ttf"]),
    ],
)
def test_letters_and_shapes_may_be_no_digits(text, fonts):
    model, about = load_checkpoint(PRETRAINED)
    images = np.stack([[written(character, font)] for font in fonts for character in text])
    assert predict(model, images, about).strange.mean() > 0.7


@pytest.mark.slow
def test_a_run_of_two_processes_and_a_resumed_one_are_calibrated(tmp_path):
    flags = [*TINY_DIGITS, "--train_samples", 70, "--save_dir", tmp_path, "--output_dir", tmp_path]
    flags += ["--todo_path", tmp_path / "TODO.md", "--epochs"]
    for more in ([1], [2, "--resume"]):
        process = launch(2, *flags, *more)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        content = torch.load(tmp_path / "best_model.pt")
        expected = {"temperature", "threshold", "whitening", "centres"}
        assert content.pop("calibration").keys() == expected
        save_checkpoint(tmp_path / "best_model.pt", content)  # as it was before the run's end


def test_a_model_without_is_taken_as_it_is(run, trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best_model.pt")
    del content["calibration"]
    torch.save(content, tmp_path / "without.pt")
    model, about = load_checkpoint("without.pt")
    assert about["calibration"] == {"temperature": 1.0}
    images = load_digits().test.images
    noise = np.full((1, 1, 28, 28), 255, dtype=np.uint8)
    probabilities, strange = predict(model, np.concatenate((images[:9], noise)), about)
    assert not strange.any()
    with torch.no_grad():
        expected = model((images[:9] / 255 - 0.1593) / 0.2986).softmax(dim=1)
    np.testing.assert_allclose(probabilities[:9], expected, atol=1e-6)


def test_evaluate_names_both_losses_and_keeps_anothers_evaluation(
    run, trained, tmp_path, digits_model
):
    path = trained / "checkpoints" / "best_model.pt"
    history = json.loads((path.parent / "history.json").read_text())
    flags = ("--mode", "evaluate", "--checkpoint")
    printed = run(inference.main, *flags, path).out
    result = json.loads((tmp_path / "outputs" / "evaluation.json").read_text())
    assert result["loss"] == pytest.approx(history["test"]["loss"], abs=1e-5)
    outputs = digits_model[2]
    cross_entropy = -np.log(outputs.probabilities[np.arange(180), outputs.labels]).mean()
    assert result["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert f"Cross-entropy: {cross_entropy:.4f}  (labels not smoothed, " in printed
    assert "Test Loss: labels smoothed by 0.1" in printed
    assert run(inference.main, *flags, path).out == printed  # the same again takes its place
    (tmp_path / "copy.pt").write_bytes(path.read_bytes())
    assert "Kept: " not in run(inference.main, *flags, "copy.pt").out  # the same model
    save_checkpoint("copy.pt", {**torch.load("copy.pt"), "epoch": 1})  # another one by that name
    printed = run(inference.main, *flags, "copy.pt").out
    assert (
        "Kept: outputs/evaluation.json, which is of another checkpoint or other images, as "
        in printed
    )
    files = {p.name: json.loads(p.read_text()) for p in (tmp_path / "outputs").iterdir()}
    assert files.keys() == {"evaluation.json", "evaluation.1.json"}
    assert files["evaluation.1.json"] == {**result, "checkpoint": "copy.pt"}
    assert files["evaluation.json"]["sha256"] != result["sha256"]
