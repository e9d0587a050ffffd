"""A trained model's weights for others: as safetensors, and by timm's names."""

from pathlib import Path
from typing import Any

from saving.checkpoint import save_checkpoint
from saving.parameter_names import by_timms_names
from saving.weights_file import SUFFIX, write_safetensors
from vit_model import ViT


def write_for_timm(path: Path, model: ViT, config: dict[str, Any]) -> str:
    """Write the state dict of timm's model that computes the same. Raises UserError if it can't be
    written.

    Args:
        path: if it ends in .safetensors, such a file is written, else one of `torch.save`.
        model: on the CPU.
        config: the arguments of `ViT`.

    Returns:
        The call that makes and loads timm's model.
    """
    write = write_safetensors if path.suffix.lower() == SUFFIX else save_checkpoint
    write(path, by_timms_names(model.state_dict()))
    arguments = {"checkpoint_path": str(path)} | timms_arguments(config)
    told = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return f"timm.create_model('vit_tiny_patch16_224'{told})"


def timms_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What makes timm's Vision Transformer of any name one of ours; all of ours can be told.

    Fixed position embeddings are there learned ones that never moved; dropout is left out.
    """
    names = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads")
    width, ratio = config["embed_dim"], config["mlp_ratio"]
    hidden = round(width * ratio)
    if int(width * ratio) != hidden:  # as timm rounds
        ratio = (hidden + 0.5) / width
    mean = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    sizes = {name: config[name] for name in names} | {"mlp_ratio": ratio}
    return sizes | (mean if config["pool"] == "mean" else {})
