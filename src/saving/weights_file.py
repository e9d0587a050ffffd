"""Weights as files of safetensors, which hold tensors and text and nothing that could run.

The metadata of ours has, as `vit_mnist`, what a checkpoint tells beside its weights, in JSON: so
they are read as checkpoints. The package safetensors is optional.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_bytes
from saving.archive import read_archive

SUFFIX, KEY = ".safetensors", "vit_mnist"
# Of a checkpoint, beside tensors. What a calibration needs to call an image strange is as large as
# a network, and is left out.
TOLD = ("format", "epoch", "best_acc", "model_config", "normalization", "preparation", "dataset")
TOLD += ("source", "class_names", "settings", "fingerprint", "versions")
KNOWN = ("trained_on", "trained_before")  # images of folders, see `known_images`


def read_weights(path: Path, content: bytes) -> Any:
    """What a model's file holds, by its name's ending. Raises UserError if that needs the package
    safetensors, and there is none; any other exception if the file is damaged.
    """
    if path.suffix.lower() != SUFFIX:
        return read_archive(content)
    tensors = _package(path, "read").load(content)  # which checks the header, too
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told = header.get("__metadata__", {})
    if KEY not in told:
        return tensors
    checkpoint = {**json.loads(told[KEY]), "model_state_dict": tensors}
    known = {name: checkpoint[name] for name in KNOWN if name in checkpoint}
    return checkpoint | {n: torch.tensor(v, dtype=torch.int64) for n, v in known.items()}


def write_safetensors(
    path: Path, state: dict[str, Tensor], checkpoint: dict[str, Any] | None = None
) -> None:
    """Write a state dict as safetensors. Raises UserError if it can't be written, or there is no
    package safetensors.

    Args:
        checkpoint: as `load_checkpoint` returns it, if the file is to be one, too.
    """
    save = _package(path, "written").save
    metadata = {"format": "pt"}  # which Hugging Face's libraries ask for
    if checkpoint is not None:
        told = {name: checkpoint[name] for name in TOLD if name in checkpoint}
        told["calibration"] = {"temperature": checkpoint["calibration"]["temperature"]}
        told |= {name: checkpoint[name].tolist() for name in KNOWN if name in checkpoint}
        metadata[KEY] = json.dumps(told, default=str, skipkeys=True)  # settings may be anything
    content = save({name: tensor.contiguous() for name, tensor in state.items()}, metadata)
    write_bytes(path, content)


def _package(path: Path, done: str) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            f"{path} can only be {done} with the package safetensors: pip install safetensors, or "
            "save the model as .pt"
        ) from None
    return safetensors.torch
