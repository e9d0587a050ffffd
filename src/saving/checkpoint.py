"""A trained model as a file: written whole, read without running what it carries, rebuilt.

`torch.save` writes a checkpoint, a dict, as a zip archive. The archive's comment is the SHA-256 of
all bytes before it. The keys, by the value of `format`:

    none    `epoch`, `model_state_dict`, `optimizer_state_dict` and `best_acc` (percent): published
            checkpoints have these four. Ours add `model_config` (the arguments of `ViT`),
            `normalization` (mean and std of pixels), `dataset`, `class_names`, `settings` (of the
            recipe), `versions`, and, once training has ended, `calibration` (confidence.py). Some
            have more, for --resume; run_state.py describes it. This is format 1.
    2       the same keys, and `format`.
    3       also `source` (the data set's name for --dataset), `preparation` (how a picture becomes
            an image of it) and, of a folder of images, `trained_on` (which files they were) and
            `trained_before` (those of the model that training began with). Mean and std are lists
            with a number for each channel, or with one for all.
"""

import hashlib
import io
import os
import platform
import sys
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, is_out_of_memory
from common.files import read_bytes, write_bytes
from common.text import composed
from common.version import VERSION
from data.catalog import DIGITS, PREPARATIONS
from saving.archive import RefusedError
from saving.weights_file import KNOWN, read_weights
from vit_model import ViT

FORMAT = 3  # of what is written now; every earlier one is read, too
UNCALIBRATED = {"temperature": 1.0}  # answers stay as they are, and no image is strange
# What a published checkpoint, which has four keys only, was trained with.
PUBLISHED = {
    "normalization": {"mean": [0.1307], "std": [0.3081]},
    "preparation": "digit",
    "dataset": "mnist",
    "class_names": list(DIGITS),
    "settings": {"label_smoothing": 0.1},
    "calibration": UNCALIBRATED,
}
PUBLISHED_NUM_HEADS = 4  # the one size that no tensor's shape tells
CHECKSUM = b"sha256:"  # before 64 hexadecimal digits
MAX_WEIGHT = 1e6  # far more than training leads to, and no sum of products overflows
MAX_TEMPERATURE = 100.0  # of a calibration; its inverse is the least
CALIBRATED_BLOCKS = 3  # at most so many blocks are looked at (confidence.py)

OWN_CHECKPOINT = Path("checkpoints/best_model.pt")  # where train.py, started here, puts its model
PRETRAINED = Path(__file__).resolve().parents[2] / "checkpoints" / "pretrained" / "best_model.pt"
WHAT, ADVICE = "a checkpoint of this ViT", "name one that src/train.py wrote"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "vit-mnist": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def find_checkpoint(given: str | Path | None = None) -> Path:
    """The checkpoint to use: the one `given`, by its own name or that of a run's folder, else the
    current folder's, else the pretrained one. Raises UserError if none is given, and neither of the
    others exists.
    """
    if given is not None:
        return Path(given, OWN_CHECKPOINT.name) if os.path.isdir(given) else Path(given)
    for path in (OWN_CHECKPOINT, PRETRAINED):
        if path.is_file():
            return path
    raise UserError(
        f"there is no checkpoint, neither {OWN_CHECKPOINT} here nor the pretrained {PRETRAINED}: "
        "train first, or name one with --checkpoint"
    )


def save_checkpoint(
    path: str | Path, checkpoint: dict[str, Any], keep: str | Path | None = None
) -> None:
    """Write a checkpoint, whole or not at all; an older file is renamed to `keep` if given. Raises
    UserError if it can't be written.
    """
    buffer = io.BytesIO()  # on a full disk, PyTorch's own error hides the reason
    torch.save(checkpoint, buffer)
    # An archive ends with its comment and, in two bytes before that, the comment's length.
    buffer.seek(-2, io.SEEK_END)
    digest = hashlib.sha256(buffer.getbuffer()[: buffer.tell()]).hexdigest()
    comment = CHECKSUM + digest.encode()
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    write_bytes(path, buffer.getbuffer(), keep)


def load_checkpoint(path: str | Path) -> tuple[ViT, dict[str, Any]]:
    """Read a checkpoint, ours or a published one, check all that is used of it, rebuild the model.
    Raises UserError if there is no such file, it is damaged, no checkpoint, or another model's.

    Returns:
        The model on the CPU, in evaluation mode, and the checkpoint with every key of ours.
    """
    path = Path(path)
    checkpoint = {**PUBLISHED, **read_checkpoint(path)}
    state = checkpoint["model_state_dict"]
    try:
        config = validated_config(checkpoint.get("model_config", {}), state)
        check_tensors(state, config, path.stat().st_size)
        checkpoint |= _validated_description(checkpoint, config)
        for name in KNOWN:
            if name in checkpoint:
                _check_known(name, checkpoint[name], path.stat().st_size)
        model = _rebuild(state, config)
    except Exception as error:  # a value of a wrong kind can raise anything
        raise refusal(path, error) from None
    return model, {**checkpoint, "model_config": config}


def known_images(checkpoint: dict[str, Any]) -> Tensor | None:
    """All images of folders that a model was trained on, as in `Dataset.trained_on`, those of the
    model that it started from included; None: unknown.
    """
    known = [checkpoint[name] for name in KNOWN if name in checkpoint]
    return torch.cat(known) if known else None


def image_shape(checkpoint: dict[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of the images that a loaded checkpoint's model takes."""
    config = checkpoint["model_config"]
    return config["in_chans"], config["img_size"], config["img_size"]


# -------------------------------------------------------------------------------------------- read


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as it is: of its values only `format` is checked. Raises UserError if there
    is no such file, it is damaged, no checkpoint, or of a later format.
    """
    checkpoint = decoded(path, _read_whole(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise refusal(path, KeyError("model_state_dict"))
    written_as = checkpoint.get("format", 1)
    if type(written_as) is not int or not 1 <= written_as <= FORMAT:
        raise UserError(
            f"{path} was written by a newer version of this project: update the project to use it"
        )
    return checkpoint


def _read_whole(path: Path) -> bytes:
    """The bytes of a file that is not empty, and whose checksum is right if it has one."""
    try:
        content = read_bytes(path)
    except UserError as error:
        hint = "train first, or name one with --checkpoint"
        raise UserError(f"checkpoint {error}; {hint}") from None
    except MemoryError as error:
        raise refusal(path, error) from None
    if not content:
        raise refusal(path, ValueError("it is empty"))
    prefix, digest = content[-64 - len(CHECKSUM) : -64], content[-64:]
    covered = memoryview(content)[: -2 - len(prefix) - len(digest)]
    if prefix == CHECKSUM and hashlib.sha256(covered).hexdigest().encode() != digest:
        raise UserError(f"{path} is damaged: its bytes don't match its checksum; {ADVICE}")
    return content


def decoded(path: Path, content: bytes, what: str = WHAT, advice: str = ADVICE) -> Any:
    """What a model's file holds, unchecked. Raises UserError if it can't be read."""
    try:
        return read_weights(path, content)
    except UserError:
        raise
    except Exception as error:  # zipfile, PyTorch and safetensors raise many kinds
        reason = "it is damaged, cut off, or in another format"
        if isinstance(error, RefusedError):
            reason = f"it is refused, since {error}"
        raise refusal(path, error, reason, what, advice) from None


def refusal(
    path: Path,
    error: Exception,
    reason: str = "",
    what: str = WHAT,
    advice: str = ADVICE,
) -> UserError:
    """One line that says why a file is not used: the `reason`, else what the `error` says."""
    if is_out_of_memory(error):
        size = f"{path.stat().st_size / 1e6:,.0f} MB"
        return UserError(
            f"{path} of {size} needs more memory than is free: end other programs, or name a "
            "smaller model"
        )
    reason = reason or (f"it has no {error}" if isinstance(error, KeyError) else str(error))
    reason = "".join(filter(str.isprintable, " ".join(reason.split())))[:200]  # it may quote names
    return UserError(f"{path} is not {what}: {reason}; {advice}")


# ------------------------------------------------------------------------------------------- check


def validated_config(stated: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `ViT`: the sizes that the tensors' shapes tell, and what is `stated`."""
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    pool = "cls" if "cls_token" in state else "mean"
    num_patches = state["pos_embed"].shape[1] - (pool == "cls")
    sizes = {
        "img_size": isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": embed_dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "pool": pool,
    }
    for name, size in sizes.items():
        if stated.get(name, size) != size:
            raise ValueError(f"its model_config contradicts its tensors, whose {name} is {size}")
    mlp_ratio = state["blocks.0.mlp.0.weight"].shape[0] / embed_dim
    config = {"num_heads": PUBLISHED_NUM_HEADS, "mlp_ratio": mlp_ratio, **stated, **sizes}
    if type(config["num_heads"]) is not int or config["num_heads"] < 1:
        raise ValueError("its num_heads is not a whole number of at least 1")
    return {**config, "mlp_ratio": float(config["mlp_ratio"])}


def check_tensors(
    state: dict[str, Tensor],
    config: dict[str, Any],
    file_size: int,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise ValueError unless these are the model's tensors, before any memory is taken for it.

    Args:
        names: what the file calls them, where not by our names.
    """
    with torch.device("meta"):
        one_block = ViT(**{**config, "depth": 1}).state_dict()
    shapes = {
        name.replace("blocks.0.", f"blocks.{i}.", 1): tensor.shape
        for i in range(config["depth"])
        for name, tensor in one_block.items()
    }
    for name in shapes | state:
        told = names.get(name, name)
        if name not in shapes or name not in state:
            raise ValueError(f"its {told} is {'unknown' if name in state else 'missing'}")
        if state[name].shape != shapes[name]:
            found, expected = tuple(state[name].shape), tuple(shapes[name])
            raise ValueError(f"its {told} has the shape {found}, expected {expected}")
        if not state[name].is_floating_point() or state[name].layout is not torch.strided:
            raise ValueError(f"its {told} is not a dense tensor of real numbers")
    # A tensor may repeat one stored number a million times.
    if sum(tensor.numel() for tensor in state.values()) > file_size:
        raise ValueError("its tensors are larger than the file")


def _check_known(name: str, marks: Any, file_size: int) -> None:
    """Raise ValueError unless these are whole numbers in a row, which all stand in the file."""
    if not isinstance(marks, Tensor) or marks.dtype != torch.int64 or marks.dim() != 1:
        raise ValueError(f"its {name} is not a row of whole numbers")
    if marks.layout is not torch.strided or marks.is_meta:
        raise ValueError(f"its {name} is not a dense tensor")
    if marks.numel() * marks.element_size() > file_size:
        raise ValueError(f"its {name} is larger than the file")


def _validated_description(checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says beside its tensors, as far as it is used."""
    class_names = [composed(_printable(name)) for name in list(checkpoint["class_names"])]
    if checkpoint["preparation"] not in PREPARATIONS:
        raise ValueError(f"its preparation is none of {', '.join(PREPARATIONS)}")
    if len(class_names) != config["num_classes"]:
        raise ValueError(f"it names {len(class_names)} of {config['num_classes']} classes")
    pixels, settings = checkpoint["normalization"], checkpoint["settings"]
    label_smoothing = _number("label_smoothing", settings["label_smoothing"], 0, 1)
    return {
        "epoch": int(_number("epoch", checkpoint["epoch"], 0, 1e9)),
        "best_acc": _number("best_acc", checkpoint["best_acc"], -1, 100),  # -1: no epoch has ended
        "dataset": _printable(checkpoint["dataset"]),
        "source": _printable(checkpoint.get("source", checkpoint["dataset"])),
        "preparation": checkpoint["preparation"],
        "class_names": class_names,
        "normalization": {
            "mean": _numbers("mean", pixels["mean"], config["in_chans"], -10, 10),
            "std": _numbers("std", pixels["std"], config["in_chans"], 1e-3, 10),
        },
        "settings": {**settings, "label_smoothing": label_smoothing},
        "calibration": _validated_calibration(checkpoint["calibration"], config),
    }


def _validated_calibration(calibration: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What `confidence.fit` has set, as far as it is used."""
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    validated = {"temperature": _number("temperature", calibration["temperature"], low, high)}
    if "threshold" not in calibration:
        return validated
    largest = sys.float_info.max
    validated["threshold"] = _number("threshold", calibration["threshold"], 0, largest)
    dim, num_blocks = config["embed_dim"], min(config["depth"], CALIBRATED_BLOCKS)
    whitening, centres = calibration["whitening"], calibration["centres"]
    num_classes = min(max(1, centres.shape[1]), config["num_classes"])  # of those in the images
    shapes = {"whitening": (num_blocks, dim, dim), "centres": (num_blocks, num_classes, dim)}
    for name, shape in shapes.items():
        tensor = calibration[name]
        if tensor.shape != shape or tensor.layout is not torch.strided:
            raise ValueError(f"its {name} is of another shape")
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise ValueError(f"its {name} is not made of finite numbers")
    return {**validated, "whitening": whitening, "centres": centres.float()}


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = float(value)
    if not low <= number <= high:
        raise ValueError(f"its {name} is not between {low:g} and {high:g}")
    return number


def _numbers(name: str, values: Any, count: int, low: float, high: float) -> list[float]:
    """A number for each of `count` channels, or one for all, as formats before 3 have it."""
    values = list(values) if isinstance(values, list | tuple) else [values]
    if len(values) not in (1, count):
        raise ValueError(f"its {name} has {len(values)} numbers for {count} channels")
    return [_number(name, value, low, high) for value in values]


def _printable(name: str | int) -> str:
    """A short name without the codes by which a file could control a terminal."""
    text = str(name) if isinstance(name, (str, int)) else ""
    if not 0 < len(text) <= 100 or not text.isprintable():
        raise ValueError("a name in it is empty, longer than 100 characters, or not printable")
    return text


# ----------------------------------------------------------------------------------------- rebuild


def _rebuild(state: dict[str, Tensor], config: dict[str, Any]) -> ViT:
    """The model with the weights of `state`, in evaluation mode."""
    with torch.device("meta"):  # draws no random number: the caller's generators stay as they are
        model = ViT(**config)
    model.to_empty(device="cpu").load_state_dict(state)
    check_weights(model.state_dict())
    return model.eval()


def check_weights(state: dict[str, Tensor]) -> None:
    """Raise ValueError unless all are numbers with which a model computes."""
    if not all(tensor.abs().max() <= MAX_WEIGHT for tensor in state.values()):
        raise ValueError(
            f"its weights are not all numbers between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}"
        )
