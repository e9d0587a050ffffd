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

import confidence
from cli import UserError
from digit_image import FORMATS as PICTURES
from digit_image import read_digit
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


def read_images(names: list[str]) -> list[np.ndarray | UserError]:
    """Each picture in MNIST's form, uint8 (28, 28), or why it could not be read."""
    results = []
    for name in tqdm(names, desc="reading", unit="image", leave=False, disable=None):
        try:
            results.append(_read_stdin() if name == STDIN else read_digit(name))
        except UserError as error:
            results.append(error)
    return results


def _read_stdin() -> np.ndarray:
    content = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(content) > MAX_STDIN:
        raise UserError(f"image on stdin is larger than {MAX_STDIN // 2**20} MB: scale it down")
    return read_digit(io.BytesIO(content), "on stdin")


def answer(
    model: ViT, checkpoint: dict[str, Any], names: list[str], images: list[np.ndarray | UserError]
) -> list[dict[str, Any]]:
    """What each picture shows: `image` with `prediction` and `probabilities`, or with `error`."""
    read = [image for image in images if not isinstance(image, UserError)]
    stacked = np.stack(read) if read else np.empty((0, 28, 28), dtype=np.uint8)
    rows = iter(predict(model, stacked, checkpoint).probabilities)
    class_names, answers = checkpoint["class_names"], []
    for name, image in zip(names, images, strict=True):
        if isinstance(image, UserError):
            answers.append({"image": name, "error": " ".join(str(image).split())})
            continue
        row = next(rows)
        probabilities = dict(zip(class_names, row.tolist(), strict=True))
        prediction = class_names[int(row.argmax())]
        answers.append({"image": name, "prediction": prediction, "probabilities": probabilities})
    return answers


# ---------------------------------------------------------------------------------- the formats


def as_text(result: dict[str, Any]) -> str:
    """A line for each picture that was read."""
    lines = []
    for row in result["images"]:
        if "error" not in row:
            every = row["probabilities"].items()
            shown = "  ".join(f"{name}: {100 * p:.1f} %" for name, p in every)
            lines.append(f"{row['image']}: {row['prediction']}  ({shown})\n")
    return "".join(lines)


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def as_csv(result: dict[str, Any]) -> str:
    """A header, then a row for each picture: prediction and probabilities, or the error alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    class_names = result["class_names"]
    writer.writerow(["image", "prediction", *class_names, "error"])
    for row in result["images"]:
        every = row.get("probabilities", {})
        cells = [f"{every[name]:.6f}" if every else "" for name in class_names]
        writer.writerow([row["image"], row.get("prediction", ""), *cells, row.get("error", "")])
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
