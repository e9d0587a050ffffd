"""Reads one's own digits: pictures in, class probabilities out, as text, JSON or CSV."""

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from analysis import confidence
from common.errors import UserError
from deploy.digit_image import FORMATS as PICTURES
from deploy.digit_image import Reading, read_digits
from vit_model import ViT

BATCH_SIZE = 256
STDIN = "-"
MAX_STDIN = 2**28  # bytes; a picture of a size that is read takes less


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
    mean, std = checkpoint["normalization"].values()
    parts = []
    for batch in torch.from_numpy(images).split(BATCH_SIZE):
        pixels = batch.to(device).unsqueeze(1).float() / 255
        logits, vectors = confidence.read(model, (pixels - mean) / std)
        probabilities = (logits / calibration["temperature"]).softmax(dim=1)
        parts.append((probabilities.cpu(), confidence.is_strange(vectors, calibration)))
    return Predictions(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def list_images(names: list[str]) -> list[str]:
    """The names with each folder replaced by the pictures right in it, sorted by name.

    Raises:
        UserError: a folder can't be read or holds no picture, or "-" is named twice.
    """
    if names.count(STDIN) > 1:
        raise UserError(f"--image {STDIN} given {names.count(STDIN)} times: stdin is one image")
    images = []
    for name in names:
        if name == STDIN or not Path(name).is_dir():
            images.append(name)
            continue
        try:
            inside = [path for path in sorted(Path(name).iterdir()) if _looks_like_image(path)]
        except OSError as error:
            raise UserError(f"folder {name} cannot be read: {error.strerror}") from None
        if not inside:
            raise UserError(
                f"folder {name} has no images in it (folders in it are not searched): "
                "name one that has, or the files"
            )
        images += map(str, inside)
    return images


def _looks_like_image(path: Path) -> bool:
    """Whether it is no hidden file, and named as those that are read."""
    form = Image.registered_extensions().get(path.suffix.lower())
    return form in PICTURES and not path.name.startswith(".") and path.is_file()


def read_images(names: list[str], single: bool = False) -> list[Reading | UserError]:
    """The digits of each picture, or why it could not be read.

    Args:
        single: each picture is known to hold one digit.
    """
    results = []
    for name in tqdm(names, desc="reading", unit="image", leave=False, disable=None):
        try:
            source, shown = (_read_stdin(), "on stdin") if name == STDIN else (name, name)
            results.append(read_digits(source, shown, single=single))
        except UserError as error:
            results.append(error)
    return results


def _read_stdin() -> io.BytesIO:
    content = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(content) > MAX_STDIN:
        raise UserError(f"image on stdin is larger than {MAX_STDIN // 2**20} MB: scale it down")
    return io.BytesIO(content)


def answer(
    model: ViT, checkpoint: dict[str, Any], names: list[str], readings: list[Reading | UserError]
) -> list[dict[str, Any]]:
    """What each picture shows, by one call of `predict` for the digits of all.

    Returns:
        For each picture `image`, its name, with `error`, or with `prediction`, its digits as they
        are written, `size`, its width and height in pixels, and `digits`: of each `prediction`,
        `confidence`, `box` (left, top, right, bottom), `may_be_no_digit`, `probabilities`.
    """
    read = [reading for reading in readings if not isinstance(reading, UserError)]
    pixels = [digit.pixels for reading in read for digit in reading.digits]
    stacked = np.stack(pixels) if pixels else np.empty((0, 28, 28), dtype=np.uint8)
    rows = zip(*predict(model, stacked, checkpoint), strict=True)
    class_names, answers = checkpoint["class_names"], []
    for name, reading in zip(names, readings, strict=True):
        if isinstance(reading, UserError):
            answers.append({"image": name, "error": " ".join(str(reading).split())})
            continue
        digits = []
        for digit, (probabilities, strange) in zip(reading.digits, rows, strict=False):
            digits.append(
                {
                    "prediction": class_names[int(probabilities.argmax())],
                    "confidence": float(probabilities.max()),
                    "box": list(digit.box),
                    "may_be_no_digit": bool(strange),
                    "probabilities": dict(zip(class_names, probabilities.tolist(), strict=True)),
                }
            )
        prediction = "".join(digit["prediction"] for digit in digits)
        about = {"image": name, "prediction": prediction, "size": list(reading.size)}
        answers.append({**about, "digits": digits})
    return answers


# ---------------------------------------------------------------------------------- the formats


def as_text(result: dict[str, Any]) -> str:
    """A line for each picture that was read: `42.jpg: 42: 4 (99.1 %) 2 (98.0 %)`."""
    lines = []
    for row in result["images"]:
        if "error" not in row:
            shown = []
            for digit in row["digits"]:
                note = " (may be no digit)" if digit["may_be_no_digit"] else ""
                shown.append(f"{digit['prediction']} ({100 * digit['confidence']:.1f} %){note}")
            lines.append(f"{row['image']}: {row['prediction']}: {' '.join(shown)}\n")
    return "".join(lines)


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def as_csv(result: dict[str, Any]) -> str:
    """A header, then a row for each digit, counted from 1, or for a picture with an error."""
    text = io.StringIO()
    class_names = result["class_names"]
    place = ["left", "top", "right", "bottom"]
    columns = ["image", "digit", "prediction", *place, "may_be_no_digit", *class_names, "error"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in result["images"]:
        if "error" in row:
            writer.writerow([row["image"], *[""] * (len(columns) - 2), row["error"]])
        for i, digit in enumerate(row.get("digits", ()), start=1):
            strange = str(digit["may_be_no_digit"]).lower()
            cells = [f"{probability:.6f}" for probability in digit["probabilities"].values()]
            known = [i, digit["prediction"], *digit["box"], strange, *cells]
            writer.writerow([row["image"], *known, ""])
    return text.getvalue()


FORMATS = {"text": as_text, "json": as_json, "csv": as_csv}


def show(result: dict[str, Any], form: str) -> bool:
    """Print the answers to stdout and the errors to stderr. Returns whether all were read."""
    text = FORMATS[form](result)
    # A file's name may have bytes that are no text.
    sys.stdout.write(os.fsencode(text).decode(errors="replace"))
    sys.stdout.flush()
    errors = [row["error"] for row in result["images"] if "error" in row]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return not errors
