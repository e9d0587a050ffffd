"""What this project, timm and torchvision call the parameters of a Vision Transformer: one table,
read in both directions.
"""

import re
from typing import Any

from torch import Tensor

OURS, TIMM, TORCHVISION = KINDS = ("this project", "timm", "torchvision")
# What each calls its parameters, in this order. @: the N-th block; *: weight and bias; -: the row
# is the others'. The last two rows are torchvision's before 0.14.
TABLE = """
cls_token            cls_token            class_token
pos_embed            pos_embed            encoder.pos_embedding
patch_embed.proj.*   patch_embed.proj.*   conv_proj.*
@.norm1.*            @.norm1.*            @.ln_1.*
@.attn.in_proj_*     @.attn.qkv.*         @.self_attention.in_proj_*
@.attn.out_proj.*    @.attn.proj.*        @.self_attention.out_proj.*
@.norm2.*            @.norm2.*            @.ln_2.*
@.mlp.0.*            @.mlp.fc1.*          @.mlp.0.*
@.mlp.3.*            @.mlp.fc2.*          @.mlp.3.*
norm.*               norm.*               encoder.ln.*
head.*               head.*               heads.head.*
@.mlp.0.*            -                    @.mlp.linear_1.*
@.mlp.3.*            -                    @.mlp.linear_2.*
"""
BLOCK = {OURS: "blocks.N", TIMM: "blocks.N", TORCHVISION: "encoder.layers.encoder_layer_N"}
NUMBER = re.compile(r"(?<=[._])(0|[1-9]\d{0,3})(?=\.)")  # of a block
WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")  # what DDP and torch.compile put before a name
HEAD = ("head.weight", "head.bias")
PLAIN = "a plain one (no layer scale, registers, relative positions, distillation or fc_norm)"


def _translations(kind: str) -> dict[str, str]:
    """Its names -> ours, by TABLE, with N for a block's number."""
    names = {}
    for row in map(str.split, TABLE.strip().splitlines()):
        theirs, ours = row[KINDS.index(kind)], row[0]
        for part in ("weight", "bias") if "*" in theirs else ("",):
            name = theirs.replace("@", BLOCK[kind]).replace("*", part)
            names[name] = ours.replace("@", BLOCK[OURS]).replace("*", part)
    names.pop("-", None)
    return names


def translate(state: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Whose the names of a state dict are, and our names -> these. Raises ValueError if one is not
    known.
    """
    found = {}
    for kind in KINDS:
        translations = _translations(kind)
        found[kind] = {name: _renamed(name, translations) for name in state}
    kind = max(KINDS, key=lambda kind: sum(ours is not None for ours in found[kind].values()))
    for theirs, ours in found[kind].items():
        if ours is None:
            raise ValueError(f"it has {theirs[:80]}, expected {PLAIN}")
        if not isinstance(state[theirs], Tensor):
            raise ValueError(f"its {theirs} is no tensor")
    return kind, {ours: theirs for theirs, ours in found[kind].items()}


def by_timms_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours as timm has it."""
    translations = {ours: theirs for theirs, ours in _translations(TIMM).items()}
    return {_renamed(name, translations): tensor for name, tensor in state.items()}


def _renamed(name: str, translations: dict[str, str]) -> str | None:
    """What a name is translated to; None: it is not known."""
    name = WRAPPED.sub("", name)
    number = NUMBER.search(name)
    if number is None:
        return translations.get(name)
    found = translations.get(f"{name[: number.start()]}N{name[number.end() :]}")
    return None if found is None else found.replace("N", number[0])


def check_complete(kind: str, names: dict[str, str]) -> None:
    """Raise ValueError if a name is missing, but for CLS (without it the head reads the mean) and
    the head.
    """
    accounted = names.keys() | {"cls_token"}
    if accounted.isdisjoint(HEAD):
        accounted |= set(HEAD)
    depth = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    for theirs, ours in _translations(kind).items():
        for number in map(str, range(max(1, depth) if "N" in ours else 1)):
            if ours.replace("N", number) not in accounted:
                told = theirs.replace("N", number)
                raise ValueError(f"it has no {told}, which every plain one of {kind} has")
