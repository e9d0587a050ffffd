"""A trained model as a web page that is one file: demo_page/ with the network in it, as JavaScript.

The page opens from the disk, asks nobody for anything, and answers drawings as demo.py does. It
holds the weights in fp16. The server's page shares all but one file: in place of server.js, which
asks demo.py, this one has the scripts of `NETWORK`.
"""

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.words import DIGIT, PREPARED, words_for
from common.errors import UserError
from data.dataset import Split
from deploy.predict import predict
from saving.checkpoint import image_shape
from vit_model import ViT, count_parameters

PAGE = Path(__file__).with_name("demo_page")
# In the order in which they need each other; each does the work of the Python file of its name.
NETWORK = ("vit_model.js", "explain.js", "confidence.js", "digit_pieces.js", "digit_image.js")
# With it the browser itself keeps the page from asking anybody for anything.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
POLICY += "img-src data:; base-uri 'none'; form-action 'none'"
TOLERANCE = 0.02  # largest difference of a probability that the weights' rounding may make
RANDOM_IMAGES = 128  # that are compared where there are no validation images


def describe_model(model: ViT, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a model, here and where demo.py serves it."""
    return {
        "dataset": checkpoint["dataset"],
        "validation": checkpoint["best_acc"],
        "class_names": checkpoint["class_names"],
        "words": words_for(checkpoint)._asdict(),
        "image_size": image_shape(checkpoint)[1],
        "preparation": PREPARED[checkpoint["preparation"]],
        "parameters": count_parameters(model),
    }


def check_digits(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Raise UserError unless the model, which is from `path`, tells digits apart."""
    if words_for(checkpoint) is not DIGIT:
        raise UserError(
            f"{path} is a model of {checkpoint['dataset']}, and --mode webpage writes a page to "
            "draw digits on: name a model of digits, or serve this one with demo.py"
        )


def build_page(model: ViT, checkpoint: dict[str, Any]) -> str:
    """The page of a model of digits, as HTML."""
    scripts = "".join(_script(_read(name)) for name in NETWORK)
    data = f"const MODEL = {_as_javascript(model_data(model, checkpoint))};\n"
    icon = base64.b64encode((PAGE / "icon.svg").read_bytes()).decode()
    replaced = {
        '<meta charset="utf-8">': '<meta charset="utf-8">\n'
        f'  <meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        'href="icon.svg"': f'href="data:image/svg+xml;base64,{icon}"',
        '<link rel="stylesheet" href="style.css">': f"<style>\n{_read('style.css')}</style>",
        '<script src="server.js"></script>': scripts + _script(data) + _script(_read("in_page.js")),
        '<script src="script.js"></script>': _script(_read("script.js")),
    }
    places = re.compile("|".join(map(re.escape, replaced)))
    return places.sub(lambda found: replaced[found[0]], _read("index.html"))


def model_data(model: ViT, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What in_page.js takes: tensors as base64 of little-endian numbers."""
    calibration = checkpoint["calibration"]
    measures = {"temperature": calibration["temperature"]}
    if "threshold" in calibration:
        whitening = calibration["whitening"].bfloat16().view(torch.int16)
        measures["threshold"] = calibration["threshold"]
        measures["whitening"] = _base64(whitening, "<i2")
        measures["centres"] = _base64(calibration["centres"], "<f4")
    return {
        "about": describe_model(model, checkpoint),
        "config": checkpoint["model_config"],
        "normalization": checkpoint["normalization"],
        "calibration": measures,
        "state": {name: _base64(tensor, "<f2") for name, tensor in model.state_dict().items()},
    }


def compare(model: ViT, checkpoint: dict[str, Any], val: Split | None) -> str:
    """Compare the model with its weights in fp16, as the page has them. Raises UserError if a
    probability differs by more than `TOLERANCE`.

    Args:
        val: validation images; None: random pixels are compared.
    """
    shape = RANDOM_IMAGES, *image_shape(checkpoint)
    images = torch.randint(256, shape, dtype=torch.uint8) if val is None else val.images
    rounded = copy.deepcopy(model).half().float()
    before, after = (
        predict(each, images.numpy(), checkpoint).probabilities for each in (model, rounded)
    )
    difference = float(np.abs(after - before).max())  # NaN where a weight is too large for fp16
    if not difference <= TOLERANCE:
        raise UserError(
            f"with weights in fp16 a probability differs by {difference:.1e}, expected at most "
            f"{TOLERANCE}: not written; serve this model with demo.py"
        )
    same = int((before.argmax(axis=1) == after.argmax(axis=1)).sum())
    kind = "random images" if val is None else "validation images"
    return (
        f"weights in fp16, compared with fp32: same class on {same:,} of {len(images):,} {kind}, "
        f"largest difference of a probability {difference:.1e}"
    )


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _script(source: str) -> str:
    return f"<script>\n{source}</script>\n"


def _as_javascript(value: Any) -> str:
    """JSON, a tensor a line; a name in it can't end the script."""
    return json.dumps(value, indent=0, allow_nan=False).replace("<", "\\u003c")


def _base64(tensor: Tensor, dtype: str) -> str:
    return base64.b64encode(tensor.detach().cpu().numpy().astype(dtype).tobytes()).decode()
