"""Reads your own digits: pictures in, for each of their digits the class probabilities out."""

import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from analysis import confidence
from common.errors import UserError
from data.dataset import per_channel
from data.pictures import has_image_name
from deploy.digit_image import Digit, Reading, read_digits
from vit_model import ViT

BATCH_SIZE = 256
STDIN = "-"
MAX_STDIN = 2**28  # bytes; no picture that is small enough to be read takes more


class Predictions(NamedTuple):
    """What a model makes of n images."""

    probabilities: np.ndarray  # float32 (n, num_classes); each row sums to 1
    strange: np.ndarray  # bool (n,): may be no digit


@torch.no_grad()
def predict(model: ViT, images: np.ndarray, checkpoint: dict[str, Any]) -> Predictions:
    """Read images in MNIST's form, in batches of 256.

    Args:
        model: in evaluation mode; the images go to the device where it is.
        images: uint8 (n, 28, 28), light on black; n may be 0.
        checkpoint: what `load_checkpoint` gave with the model: its normalization and calibration.
    """
    device, calibration = next(model.parameters()).device, checkpoint["calibration"]
    mean, std = (per_channel(v, device) for v in checkpoint["normalization"].values())
    parts = []
    for batch in torch.from_numpy(images).split(BATCH_SIZE):
        pixels = batch.to(device).unsqueeze(1).float() / 255
        logits, vectors = confidence.read(model, (pixels - mean) / std)
        probabilities = (logits / calibration["temperature"]).softmax(dim=1)
        parts.append((probabilities.cpu(), confidence.is_strange(vectors, calibration)))
    return Predictions(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def check_image_shape(checkpoint: dict[str, Any], path: str | Path, advice: str = "") -> None:
    """Raise UserError unless the model, which is from `path`, takes images of 1x28x28."""
    config = checkpoint["model_config"]
    channels, side = config["in_chans"], config["img_size"]
    if (channels, side) != (1, 28):
        shape = f"{channels}x{side}x{side}"
        raise UserError(f"{path} takes images of {shape}, expected 1x28x28{advice}")


def list_images(names: list[str]) -> list[str]:
    """The names, with each folder replaced by the pictures directly in it, sorted by name. Raises
    UserError if a folder can't be read or holds no picture, or "-" is named twice.
    """
    if names.count(STDIN) > 1:
        raise UserError(f"--image {STDIN} given {names.count(STDIN)} times: stdin is one image")
    images = []
    for name in names:
        if name == STDIN or not Path(name).is_dir():
            images.append(name)
            continue
        try:
            inside = [str(path) for path in sorted(Path(name).iterdir()) if _is_image(path)]
        except OSError as error:
            raise UserError(f"folder {name} cannot be read: {error.strerror}") from None
        if not inside:
            raise UserError(
                f"folder {name} has no images in it (folders in it are not searched): "
                "name one that has, or the files"
            )
        images += inside
    return images


def _is_image(path: Path) -> bool:
    """Whether the name is that of a picture in a format that is read, and the file not hidden."""
    return has_image_name(path.name) and not path.name.startswith(".") and path.is_file()


def read_images(names: list[str], single: bool = False) -> list[Reading | UserError]:
    """The digits of each picture, or why it could not be read.

    Args:
        single: each picture is known to hold one digit.
    """
    results = []
    for name in tqdm(names, desc="reading", unit="image", leave=False, disable=None):
        try:
            source, what = (_read_stdin(), "on stdin") if name == STDIN else (name, name)
            results.append(read_digits(source, f"image {what}", single=single))
        except UserError as error:
            results.append(error)
    return results


def _read_stdin() -> io.BytesIO:
    content = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(content) > MAX_STDIN:
        raise UserError(f"image on stdin is larger than {MAX_STDIN // 2**20} MB: scale it down")
    return io.BytesIO(content)


def describe_digit(
    digit: Digit, probabilities: np.ndarray, strange: bool, class_names: list[str]
) -> dict[str, Any]:
    """A digit of a picture and one row of `Predictions`, as they are answered.

    Returns:
        `prediction`, `confidence`, `box` (left, top, right, bottom), `may_be_no_digit` and
        `probabilities` by class name.
    """
    return {
        "prediction": class_names[int(probabilities.argmax())],
        "confidence": float(probabilities.max()),
        "box": list(digit.box),
        "may_be_no_digit": bool(strange),
        "probabilities": dict(zip(class_names, probabilities.tolist(), strict=True)),
    }


def answer(
    model: ViT, checkpoint: dict[str, Any], names: list[str], readings: list[Reading | UserError]
) -> list[dict[str, Any]]:
    """What each picture shows, by one call of `predict` for the digits of all.

    Returns:
        For each picture `image`, its name, with `error`, or with `prediction`, its digits as they
        are written, `size`, its width and height in pixels, and `digits`, as `describe_digit`
        gives them.
    """
    found = [digit for r in readings if isinstance(r, Reading) for digit in r.digits]
    pixels = np.array([digit.pixels for digit in found], dtype=np.uint8).reshape(-1, 28, 28)
    predicted = zip(*predict(model, pixels, checkpoint), strict=True)
    class_names, answers = checkpoint["class_names"], []
    for name, reading in zip(names, readings, strict=True):
        if isinstance(reading, UserError):
            answers.append({"image": name, "error": " ".join(str(reading).split())})
            continue
        digits = [  # each takes the next row
            describe_digit(digit, *next(predicted), class_names) for digit in reading.digits
        ]
        prediction = "".join(digit["prediction"] for digit in digits)
        about = {"image": name, "prediction": prediction, "size": list(reading.size)}
        answers.append({**about, "digits": digits})
    return answers
