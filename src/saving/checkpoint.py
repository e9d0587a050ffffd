"""A trained model as a file: written whole, read without running what it carries, rebuilt.

A checkpoint is a dict. Four keys are the published ones: `epoch`, `model_state_dict`,
`optimizer_state_dict` and `best_acc` (percent). Ours add `model_config`, `normalization`,
`dataset`, `class_names`, `settings` and `versions`, all that it takes to use the model, and, when a
run has ended, `calibration`, what its answers are worth (confidence.py). The file is torch.save's,
a zip archive, with the SHA-256 of all before it as the archive's comment.
"""

import hashlib
import io
import math
import platform
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from analysis import confidence
from common.errors import UserError, is_out_of_memory
from common.files import replacing
from data.dataset import DIGITS
from saving.archive import RefusedError, read_archive
from vit_model import ViT

# What a published checkpoint, which has four keys only, was trained with.
PUBLISHED = {
    "normalization": {"mean": 0.1307, "std": 0.3081},
    "dataset": "mnist",
    "class_names": list(DIGITS),
    "settings": {"label_smoothing": 0.1},
    "calibration": confidence.NONE,
}
# Raised where a file holds something else than a checkpoint of ours.
WRONG_CONTENT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
CHECKSUM = b"sha256:"  # before 64 hexadecimal digits
MAX_WEIGHT = 1e6  # far above what training leads to, and no sum of products overflows
PUBLISHED_NUM_HEADS = 4  # the one size that can't be read off a tensor

OWN_CHECKPOINT = Path("checkpoints/best_model.pt")  # where train.py, run here, leaves its model
PRETRAINED = Path(__file__).resolve().parents[2] / "checkpoints" / "pretrained" / "best_model.pt"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }


def find_checkpoint(given: str | Path | None = None) -> Path:
    """The checkpoint to use: the one `given`, else the current folder's, else the pretrained one.

    Raises:
        UserError: none is given, and neither of the others is there.
    """
    if given is not None:
        return Path(given)
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
    """Write a checkpoint, whole or not at all; what stood at `path` becomes `keep` if given.

    Raises:
        UserError: it can't be written.
    """
    buffer = io.BytesIO()  # PyTorch's own error on a full disk hides the reason
    torch.save(checkpoint, buffer)
    # An archive ends with its comment and, in two bytes before that, the comment's length.
    buffer.seek(-2, io.SEEK_END)
    digest = hashlib.sha256(buffer.getbuffer()[: buffer.tell()]).hexdigest()
    comment = CHECKSUM + digest.encode()
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    with replacing(path, keep) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> tuple[ViT, dict[str, Any]]:
    """Read a checkpoint, ours or a published one.

    Returns:
        The model on the CPU, in evaluation mode, and the checkpoint with every key of ours.

    Raises:
        UserError: there is no such file, it is damaged or no checkpoint, or holds another model.
    """
    checkpoint = {**PUBLISHED, **read_checkpoint(Path(path))}
    state = checkpoint["model_state_dict"]
    advice = "name one that src/train.py wrote"
    try:
        sizes = _sizes(state)
        config = {"num_heads": PUBLISHED_NUM_HEADS, **sizes, **checkpoint.get("model_config", {})}
        # A ratio is told by whole neurons only: 2.7 x 96 are 259, which would read 2.698.
        config["mlp_ratio"] = float(config["mlp_ratio"])
        hidden_dim = round(sizes["embed_dim"] * config["mlp_ratio"])
        told = {**config, "mlp_ratio": hidden_dim / sizes["embed_dim"]}
        for name, size in sizes.items():
            if told[name] != size:
                raise ValueError(f"its configuration's {name} is not its tensors' {size}")
        if not (type(config["num_heads"]) is int and config["num_heads"] >= 1):
            raise ValueError("its configuration's num_heads is no number of heads")
        _check_state(state, config, Path(path).stat().st_size)
        with torch.device("meta"):  # no number is drawn: the caller's generators are his
            model = ViT(**config)
        model.to_empty(device="cpu").load_state_dict(state)
        if not all(tensor.abs().max() <= MAX_WEIGHT for tensor in model.state_dict().values()):
            raise ValueError("its weights are not all numbers to compute with")
        checkpoint["epoch"] = int(checkpoint["epoch"])
        checkpoint["best_acc"] = float(checkpoint["best_acc"])
        checkpoint["dataset"] = _printable(checkpoint["dataset"])
        checkpoint["class_names"] = [_printable(name) for name in list(checkpoint["class_names"])]
        checkpoint["normalization"] = {
            name: float(checkpoint["normalization"][name]) for name in ("mean", "std")
        }
        checkpoint["settings"] = {
            **checkpoint["settings"],
            "label_smoothing": float(checkpoint["settings"]["label_smoothing"]),
        }
        checkpoint["calibration"] = confidence.validated(checkpoint["calibration"], config)
        if len(checkpoint["class_names"]) != config["num_classes"]:
            raise ValueError(f"{config['num_classes']} classes, but other names for them")
        mean, std = checkpoint["normalization"].values()
        in_range = {
            "epoch": 0 <= checkpoint["epoch"] <= 10**9,
            "best_acc": math.isfinite(checkpoint["best_acc"]),
            "normalization": abs(mean) <= 10 and 1e-3 <= std <= 10,
            "label_smoothing": 0 <= checkpoint["settings"]["label_smoothing"] <= 1,
        }
        if not all(in_range.values()):
            wrong = next(name for name, right in in_range.items() if not right)
            raise ValueError(f"its {wrong} is out of range")
    except (MemoryError, RuntimeError, *WRONG_CONTENT) as e:
        _check_memory(Path(path), e)
        reason = f"no {e} in it" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this ViT ({reason}); {advice}") from None
    checkpoint["model_config"] = config
    return model.eval(), checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, as it is.

    Raises:
        UserError: as `load_checkpoint`.
    """
    advice = "name one that src/train.py wrote"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is no checkpoint: it is a device or a pipe; {advice}")
        content = path.read_bytes()
        if not content:
            raise UserError(f"{path} is no checkpoint: it is empty; {advice}")
        if not _matches_checksum(content):
            raise UserError(f"{path} is damaged: its bytes don't match its checksum; {advice}")
        checkpoint = read_archive(path)
    except OSError as error:
        hint = "train first, or name one with --checkpoint"
        raise UserError(
            f"checkpoint {path} cannot be read: {error.strerror or error}; {hint}"
        ) from None
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(f"{path} is no checkpoint: refused, since {error}; {advice}") from None
    except Exception as error:  # torch.load raises many kinds on bytes that are not its own
        _check_memory(path, error)
        reason = "truncated or damaged, or of another format, and so not loaded"
        raise UserError(f"{path} is no checkpoint: {reason}; {advice}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise UserError(f"{path} is no checkpoint: it has no model_state_dict; {advice}")
    return checkpoint


def _check_memory(path: Path, error: Exception) -> None:
    """Raise UserError if what went wrong with the file is that it doesn't fit into memory."""
    if is_out_of_memory(error):
        size = f"{path.stat().st_size / 1e6:,.0f} MB"
        raise UserError(
            f"{path} of {size} needs more memory than is free: end other programs, or name a "
            "smaller model"
        ) from None


def _matches_checksum(content: bytes) -> bool:
    """Whether the checksum is right; also if there is none, as in files of other origin."""
    prefix, digest = content[-64 - len(CHECKSUM) : -64], content[-64:]
    if prefix != CHECKSUM:
        return True
    covered = memoryview(content)[: -2 - len(prefix) - len(digest)]
    return hashlib.sha256(covered).hexdigest().encode() == digest


def _sizes(state: dict[str, Tensor]) -> dict[str, int | float | str]:
    """The arguments of `ViT` that its tensors' shapes tell."""
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    pool = "cls" if "cls_token" in state else "mean"
    num_patches = state["pos_embed"].shape[1] - (pool == "cls")
    return {
        "img_size": isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": embed_dim,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "mlp_ratio": state["blocks.0.mlp.0.weight"].shape[0] / embed_dim,
        "pool": pool,
    }


def _check_state(state: dict[str, Tensor], config: dict[str, Any], file_size: int) -> None:
    """Raise ValueError unless these are the model's tensors, before any memory is taken for it."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in ViT(**{**config, "depth": 1}).state_dict().items()}
    expected = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.")}
    for name in shapes.keys() - expected.keys():
        rest = name.removeprefix("blocks.0.")
        expected |= {f"blocks.{i}.{rest}": shapes[name] for i in range(config["depth"])}
    for name in expected | state:
        if name not in expected or name not in state or state[name].shape != expected[name]:
            raise ValueError(f"its {name} is missing, superfluous or of another shape")
        if not state[name].is_floating_point() or state[name].layout is not torch.strided:
            raise ValueError(f"its {name} is no array of real numbers")
    # Tensors may claim to be larger than what is stored of them.
    if sum(tensor.numel() for tensor in state.values()) > file_size:
        raise ValueError("its tensors are larger than the file")


def _printable(value: str | int) -> str:
    """A short name, without the codes by which a file could control a terminal."""
    text = str(value) if isinstance(value, (str, int)) else ""
    if not 0 < len(text) <= 100 or not text.isprintable():
        raise ValueError("a name in it is no short printable text")
    return text
