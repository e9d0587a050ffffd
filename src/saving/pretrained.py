"""A trained Vision Transformer to start from: read from a file, ours or another's, and fitted.

Names are translated by parameter_names.py, sizes are read off the tensors. The file may be a
stranger's: it is checked as checkpoint.py checks ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.files import read_bytes
from saving.checkpoint import (
    PUBLISHED_NUM_HEADS,
    check_tensors,
    check_weights,
    decoded,
    known_images,
    load_checkpoint,
    refusal,
    validated_config,
)
from saving.parameter_names import HEAD, OURS, check_complete, translate
from vit_model import ViT

HEAD_DIM = 64  # of all published ViTs, from tiny to large
POSITIONS, FILTERS = "pos_embed", "patch_embed.proj.weight"
WHAT = "a Vision Transformer to start from"
ADVICE = "name one of this project, timm or torchvision, as .pt, .pth or .safetensors"


@dataclass(frozen=True)
class Pretrained:
    """A trained model, all checked.

    Attributes:
        file: its name, to be printed.
        kind: whose: one of parameter_names.KINDS.
        config: the arguments of `ViT` that make such a model; `num_classes` is 0 without a head.
        state: its weights by our names, float32.
        class_names: None if the file tells none.
        trained_on: all images of folders that it was trained on, as in `Dataset`; None: unknown.
    """

    file: str
    kind: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    trained_on: Tensor | None = None

    def load_into(self, model: ViT, class_names: Sequence[str]) -> str:
        """Put the weights into a model of the same width and depth.

        Where the model has other patches, channels or another grid, what is learned of them is
        resampled. The head stays the model's own unless both have the same classes: the same names
        or, where the file tells none, as many.

        Args:
            class_names: of the model.

        Returns:
            What was taken, what was resampled and what is new, in one line.
        """
        own, state, notes, resampled = model.state_dict(), dict(self.state), [], set()
        (_, channels, side, _), old = own[FILTERS].shape, self.config
        grid, old_grid = isqrt(model.patch_embed.num_patches), old["img_size"] // old["patch_size"]
        if old["pos_embed"] == "sincos2d":
            del state[POSITIONS]  # the model has made its own
        elif grid != old_grid:
            state[POSITIONS] = resample_positions(state[POSITIONS], grid)
            notes.append(f"positions {old_grid}x{old_grid} -> {grid}x{grid}")
            resampled.add(POSITIONS)
        if side != old["patch_size"]:
            state[FILTERS] = resample_filters(state[FILTERS], side)
            notes.append(f"patch filters {old['patch_size']} -> {side} pixels")
        if channels != old["in_chans"]:
            state[FILTERS] = adapt_channels(state[FILTERS], channels)
            notes.append(f"{old['in_chans']} -> {channels} channels")
        if state[FILTERS] is not self.state[FILTERS]:
            resampled.add(FILTERS)
        if self.class_names is None:
            same_classes = len(class_names) == old["num_classes"]
        else:
            same_classes = tuple(class_names) == self.class_names
        if not same_classes:
            state = {name: tensor for name, tensor in state.items() if name not in HEAD}
        kept = {name: own[name] for name in (POSITIONS, *HEAD) if name not in state}
        model.load_state_dict(state | kept)
        told = [f"{len(state) - len(resampled)} tensors taken"]
        told += [f"{', '.join(notes)} resampled"] if notes else []
        told += [f"fixed positions for {grid}x{grid}"] if POSITIONS in kept else []
        told += ["head kept" if same_classes else "head new"]
        return f"{self.file} ({self.kind}): {'; '.join(told)}"


# ------------------------------------------------------------------------------------- resampling


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Learned position embeddings for another grid of patches: interpolated by where they lie in
    the image (ViT, section 3.2), bicubically; CLS has no place in it and keeps its own.

    Shape: (1, n^2, D), or with CLS (1, 1 + n^2, D) -> the same for side^2.
    """
    old_side = isqrt(positions.shape[1])
    cls, grid = positions.split((positions.shape[1] - old_side**2, old_side**2), dim=1)
    grid = grid.unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((cls, grid.flatten(2).transpose(1, 2)), dim=1)


def resample_filters(filters: Tensor, side: int) -> Tensor:
    """Patch filters for another patch size, which give a resized patch the same token, as nearly as
    can be: exactly where patches grow.

    Interpolating the filters would change their products with the patches. Instead, with B the
    matrix that resizes a patch x bilinearly, w becomes pinv(B^T) w, the w' with the least mean of
    (<x, w> - <B x, w'>)^2 over patches of white noise (Beyer et al., "FlexiViT: One Model for All
    Patch Sizes", 2023, section 3.4). B resizes rows and columns alike, R x R^T, so pinv(R^T) does.

    Shape: (D, C, p, p) -> (D, C, side, side).
    """
    old_side = filters.shape[-1]
    rows = torch.eye(old_side, dtype=torch.float64)[None, None]
    size = old_side, side
    resized = F.interpolate(rows, size, mode="bilinear", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resized[0, 0])  # of R^T: (side, p)
    return (inverse @ filters.double() @ inverse.T).float()


def adapt_channels(filters: Tensor, channels: int) -> Tensor:
    """Patch filters for another number of channels: their sum, spread evenly.

    To a grey picture each channel of a coloured one is the same: so both give it the same token.

    Shape: (D, C, p, p) -> (D, channels, p, p).
    """
    return filters.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels


# -------------------------------------------------------------------------------------------- read


def read_pretrained(path: str | Path, num_heads: int | None = None) -> Pretrained:
    """Read a trained ViT and check all of it. Raises UserError if there is no such file, it is
    damaged, or another model's.

    Args:
        path: a checkpoint of ours; or a state dict by our names, timm's or torchvision's, as
            `torch.save` (also as a dict's `model_state_dict`, `state_dict` or `model`) or
            safetensors writes it.
        num_heads: attention heads, where the file doesn't tell; None: as published, in timm and
            torchvision each 64 wide.
    """
    path = Path(path)
    try:
        trained = _from_state_dict(path, num_heads)
    except UserError:
        raise
    except Exception as error:  # a value of a wrong kind can raise anything
        raise refusal(path, error, what=WHAT, advice=ADVICE) from None
    return trained or _from_checkpoint(path)


def _from_checkpoint(path: Path) -> Pretrained:
    model, checkpoint = load_checkpoint(path)
    config = {"pos_embed": "learned", **checkpoint["model_config"]}
    class_names = tuple(checkpoint["class_names"])
    state, known = model.state_dict(), known_images(checkpoint)
    return Pretrained(path.name, OURS, config, state, class_names, known)


def _from_state_dict(path: Path, num_heads: int | None) -> Pretrained | None:
    """None: it is a checkpoint of ours, which holds more than a state dict."""
    content, size = _read_content(path)
    state = _state_dict(content)
    kind, names = translate(state)
    if kind == OURS and not {"model_config", "best_acc"}.isdisjoint(content):
        return None
    check_complete(kind, names)
    state = {ours: state[theirs].detach() for ours, theirs in names.items()}
    width, has_head = len(state[FILTERS]), HEAD[0] in state
    if not has_head:  # checked like the rest, and never kept
        state |= {HEAD[0]: torch.zeros(1, width), HEAD[1]: torch.zeros(1)}
    config = validated_config({"num_heads": num_heads or _usual_heads(path, kind, width)}, state)
    if width % config["num_heads"]:
        raise UserError(
            f"--num_heads {config['num_heads']} does not divide the {width} numbers of a token in "
            f"{path}: give a divisor of it"
        )
    check_tensors(state, config, size, names)
    state = {name: tensor.float() for name, tensor in state.items()}
    check_weights(state)
    config |= {"pos_embed": "learned"} | ({} if has_head else {"num_classes": 0})
    return Pretrained(path.name, kind, config, state, None)


def _usual_heads(path: Path, kind: str, width: int) -> int:
    """The attention heads of published models of this width: no tensor's shape tells them."""
    if kind == OURS:
        return PUBLISHED_NUM_HEADS
    if width % HEAD_DIM:
        raise UserError(
            f"{path} does not tell its attention heads, and its tokens of {width} numbers are no "
            f"multiple of the usual {HEAD_DIM}: give --num_heads"
        )
    return width // HEAD_DIM


def _read_content(path: Path) -> tuple[Any, int]:
    """What is stored in the file, and the file's size."""
    try:
        content = read_bytes(path)
    except UserError as error:
        raise UserError(f"--init_from: {error}; name the file of a trained model") from None
    return decoded(path, content, WHAT, ADVICE), len(content)


def _state_dict(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("it holds no state dict")
    for wrapper in ("model_state_dict", "state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            return content[wrapper]
    return content
