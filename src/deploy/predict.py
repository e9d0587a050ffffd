"""Answers your own pictures: for each, or each of its digits, the class probabilities."""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from analysis import confidence
from analysis.words import words_for
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.dataset import per_channel
from data.decode import DRAFT
from data.pictures import prepare, read_picture
from deploy.digit_image import Reading, read_digits
from deploy.picture_files import read_each
from saving.checkpoint import image_shape
from utils import images_at_once
from vit_model import ViT

BATCH_SIZE = 256
MAX_SIDE = 1024  # pixels of a prepared picture, as for --img_size: a file's model may want more


class Predictions(NamedTuple):
    """What a model makes of n images."""

    probabilities: np.ndarray  # float32 (n, num_classes); each row sums to 1
    strange: np.ndarray  # bool (n,): may be of no class


@torch.no_grad()
def predict(model: ViT, images: np.ndarray, checkpoint: dict[str, Any]) -> Predictions:
    """Classify images in the form of the data set's.

    Args:
        model: in evaluation mode; the images go to the device where it is.
        images: uint8 (n, C, S, S), prepared as the data set's are; n may be 0.
        checkpoint: what `load_checkpoint` gave with the model: its normalization and calibration.
    """
    device, calibration = next(model.parameters()).device, checkpoint["calibration"]
    parts = []
    size = min(BATCH_SIZE, images_at_once(images.shape[-1]))
    for batch in torch.from_numpy(images).split(size):
        logits, vectors = confidence.read(model, normalize(batch.to(device), checkpoint))
        probabilities = (logits / calibration["temperature"]).softmax(dim=1)
        parts.append((probabilities.cpu(), confidence.is_strange(vectors, calibration)))
    return Predictions(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def normalize(images: torch.Tensor, checkpoint: dict[str, Any]) -> torch.Tensor:
    """Images uint8 (n, C, S, S) as the checkpoint's model takes them."""
    mean, std = (per_channel(v, images.device) for v in checkpoint["normalization"].values())
    return (images.float() / 255 - mean) / std


def check_image_shape(checkpoint: dict[str, Any], path: str | Path, advice: str = "") -> None:
    """Raise UserError unless the model, which is from `path`, takes images of the shape that its
    data set has, or that a picture can be brought to.
    """
    shape, named = image_shape(checkpoint), NAMED_SETS.get(checkpoint["source"])
    if checkpoint["preparation"] == "digit":
        possible = [(1, 28, 28)]
    elif named:
        possible = [(named.in_chans, named.img_size, named.img_size)]
    else:
        possible = [(channels, *shape[1:]) for channels in (1, 3)]
    if shape not in possible:
        given, *expected = ("x".join(map(str, each)) for each in (shape, *possible))
        raise UserError(f"{path} takes images of {given}, expected {' or '.join(expected)}{advice}")
    if shape[1] > MAX_SIDE:
        raise UserError(
            f"{path} takes images of {shape[1]} pixels a side, expected at most {MAX_SIDE}{advice}"
        )


def prepare_picture(
    source: str | Path | BinaryIO, what: str, checkpoint: dict[str, Any]
) -> np.ndarray:
    """A picture as the training images were prepared, uint8 (C, S, S). Raises UserError if it
    can't be read.
    """
    in_chans, img_size, _ = image_shape(checkpoint)
    picture, _ = read_picture(source, what, DRAFT * img_size)
    return np.array(prepare(picture, img_size, in_chans, checkpoint["preparation"]))


def answer_files(
    model: ViT, checkpoint: dict[str, Any], names: list[str], single: bool = False
) -> list[dict[str, Any]]:
    """What each picture shows, as `answer_digits` or `answer_pictures` tells it.

    Args:
        names: of files, or "-" for stdin.
        single: each picture is known to hold one digit.
    """
    if checkpoint["preparation"] == "digit":
        things = words_for(checkpoint).many
        readings = read_each(names, partial(read_digits, single=single, things=things))
        return answer_digits(model, checkpoint, names, list(readings))
    return answer_pictures(model, checkpoint, names)


# ----------------------------------------------------------------------------------------- answers


def describe(
    probabilities: np.ndarray, strange: bool, checkpoint: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """One row of `Predictions`, as it is answered.

    Returns:
        `prediction`, `confidence`, `more`, whether it may be of no class under the key of
        words.py, and `probabilities` by class name.
    """
    class_names = checkpoint["class_names"]
    return {
        "prediction": class_names[int(probabilities.argmax())],
        "confidence": float(probabilities.max()),
        **more,
        words_for(checkpoint).strange_key: bool(strange),
        "probabilities": dict(zip(class_names, probabilities.tolist(), strict=True)),
    }


def answer_digits(
    model: ViT,
    checkpoint: dict[str, Any],
    names: Iterable[str],
    readings: list[Reading | UserError],
) -> list[dict[str, Any]]:
    """What digits each picture shows, by one call of `predict` for the digits of all.

    Returns:
        For each picture `image`, its name, with `error`, or with `prediction`, its digits as they
        are written, `size`, its width and height in pixels, and `digits` (of letters
        `characters`), as `describe` gives them, with `box`: left, top, right and bottom.
    """
    found = [digit for r in readings if isinstance(r, Reading) for digit in r.digits]
    pixels = np.array([digit.pixels for digit in found], dtype=np.uint8).reshape(-1, 1, 28, 28)
    predicted = zip(*predict(model, pixels, checkpoint), strict=True)
    answers, things = [], words_for(checkpoint).many
    for name, reading in zip(names, readings, strict=True):
        if isinstance(reading, UserError):
            answers.append(_error(name, reading))
            continue
        digits = [  # each takes the next row
            describe(*next(predicted), checkpoint, box=list(digit.box)) for digit in reading.digits
        ]
        prediction = "".join(digit["prediction"] for digit in digits)
        about = {"image": name, "prediction": prediction, "size": list(reading.size)}
        answers.append({**about, things: digits})
    return answers


def answer_pictures(
    model: ViT, checkpoint: dict[str, Any], names: list[str]
) -> list[dict[str, Any]]:
    """What class each picture is of: `image`, its name, with `error`, or with what `describe`
    gives."""
    answers, pictures = [], read_each(names, partial(prepare_picture, checkpoint=checkpoint))
    while part := list(islice(pictures, BATCH_SIZE)):
        images = [image for image in part if not isinstance(image, UserError)]
        pixels = np.array(images, dtype=np.uint8).reshape(-1, *image_shape(checkpoint))
        predicted = zip(*predict(model, pixels, checkpoint), strict=True)
        for image in part:
            name = names[len(answers)]
            if isinstance(image, UserError):
                answers.append(_error(name, image))
            else:  # takes the next row
                answers.append({"image": name, **describe(*next(predicted), checkpoint)})
    return answers


def _error(name: str, error: UserError) -> dict[str, Any]:
    return {"image": name, "error": str(error)}
