"""The settings of a run: put together from recipe, data set, trained model and flags, and checked.

Needs no PyTorch.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from math import ceil
from typing import Any

from common.errors import UserError
from data.catalog import NAMED_SETS
from recipes import DATASET_SETTINGS, RECIPES
from settings import Options, Settings, section_of

# Sizes of the network that a trained model to start from fixes; its patches can be resampled.
FIXED = ("embed_dim", "depth", "num_heads", "mlp_ratio", "pool", "pos_embed")
MANY = 16  # patches a side; a recipe's patches that would be more are made larger
LEAST_STEPS = 4  # in an epoch of a small folder: a recipe's batches are made smaller for it
# A run's average of weights spans at most this share of its steps, as the start must not be in it.
SPAN = 0.25
# The families of data/disturb.py, which --keep_clean and --augmix are about.
DISTURBANCES = ("stroke", "serif", "marks", "background", "light", "invert", "rand_conv")
DISTURBANCES += ("blur", "noise")


def check_data_flags(dataset: str, given: Mapping[str, Any]) -> None:
    """Raise UserError if a data set misses a flag, or one that is given has no effect on it.

    Args:
        dataset: the name for --dataset.
        given: flags by name.
    """
    if dataset == "folder":
        if "data_dir" not in given:
            raise UserError(
                "--dataset folder: name the folder, which has a folder of images for each class, "
                "with --data_dir"
            )
        return
    if "dataset" not in given and "data_dir" in given and _has_classes(given["data_dir"]):
        raise UserError(
            f"--data_dir {given['data_dir']} has a folder of images for each class: give --dataset "
            "folder to train on them"
        )
    idle = dict.fromkeys(section_of(Options(), "folder"), "it is for --dataset folder")
    if NAMED_SETS[dataset].data_dir is None:
        idle["data_dir"] = f"{NAMED_SETS[dataset].title} need no files"
    for name, reason in idle.items():
        if name in given:
            raise UserError(f"--{name} {given[name]} has no effect: {reason}; leave it out")


def _has_classes(folder: str) -> bool:
    from data.listing import list_images  # slow: it imports NumPy

    try:
        return not os.path.isdir(os.path.join(folder, "MNIST")) and bool(list_images(folder).files)
    except UserError:  # whoever reads the data set there says what is wrong
        return False


def resolve(
    recipe: str,
    dataset: str,
    given: Mapping[str, Any],
    trained: Mapping[str, Any] | None = None,
    img_size: int | None = None,
    images: int | None = None,
) -> Settings:
    """The settings of a run: the defaults, what replaces them in the recipe, what the data set asks
    for, the sizes of a model to start from, what was given by hand. Raises UserError if the
    settings don't fit together.

    Args:
        dataset: the name for --dataset.
        given: flags by name; those that are no settings are left out.
        trained: arguments of `ViT` of the model that --init_from names.
        img_size: side of the images; None: that of a named set, not yet known of a folder.
        images: how many there are to train; None: not yet known.
    """
    names = {f.name for f in fields(Settings)}
    given = {name: value for name, value in given.items() if name in names}
    s = Settings(**{**RECIPES[recipe], **DATASET_SETTINGS[dataset], **given})
    if dataset in NAMED_SETS:
        img_size = NAMED_SETS[dataset].img_size
        if not NAMED_SETS[dataset].mirrors:
            why = f"gives mirrored images, and one of {dataset} may be of another class"
            s = _without(s, "hflip", given, why)
    if not any(getattr(s, name) for name in DISTURBANCES):
        for name in ("keep_clean", "augmix"):
            why = f"has no effect, as --{', --'.join(DISTURBANCES)} are all off"
            s = _without(s, name, given, why)
    of_trained = _sizes_of_trained(trained, given, img_size) if trained else {}
    s = replace(s, **of_trained)
    if s.freeze == "backbone":
        s = _for_linear_probe(s, given)
    if img_size is not None:
        s = _fit_to_images(s, img_size, {**of_trained, **given})
    if round(s.embed_dim * s.mlp_ratio) < 1:
        raise UserError(
            f"--mlp_ratio {s.mlp_ratio} is too small for --embed_dim {s.embed_dim}: an MLP would "
            "have no neuron; raise one of them"
        )
    if images and dataset == "folder" and "batch_size" not in given:
        s = replace(s, batch_size=min(s.batch_size, max(8, images // LEAST_STEPS)))
    if images and s.ema_decay and "ema_decay" not in given:
        s = replace(s, ema_decay=_short_enough(s.ema_decay, s.epochs * ceil(images / s.batch_size)))
    if s.epochs == 1:
        why = "has no effect unless there are more epochs, as the last third sees whole images"
        s = _without(s, "patch_drop", given, why)
    if s.pos_embed == "sincos2d" and s.embed_dim % 4 != 0:
        raise UserError(
            f"--embed_dim {s.embed_dim} is not divisible by 4, as --pos_embed sincos2d wants it: "
            "change one of them"
        )
    if s.embed_dim % s.num_heads != 0:
        raise UserError(
            f"--embed_dim {s.embed_dim} is not divisible by --num_heads {s.num_heads}: change one "
            "of them"
        )
    return s


def _without(s: Settings, name: str, given: Mapping[str, Any], why: str) -> Settings:
    """The settings with a recipe's `name` off. Raises UserError if it was given by hand."""
    if given.get(name):
        raise UserError(f"--{name} {given[name]} {why}: leave it out")
    return replace(s, **{name: 0.0})


def _fit_to_images(s: Settings, img_size: int, given: Mapping[str, Any]) -> Settings:
    """The settings with patches that divide the images, unless others were given by hand."""
    if s.random_crop >= img_size:
        raise UserError(
            f"--random_crop {s.random_crop} reflects more pixels than the image's side of "
            f"{img_size} has: give at most {img_size - 1}"
        )
    fits = img_size % s.patch_size == 0
    divisors = [n for n in range(1, img_size + 1) if img_size % n == 0]
    if "patch_size" in given:
        if fits:
            return s
        raise UserError(
            f"--patch_size {s.patch_size} does not divide the image's side of {img_size}: "
            f"give {', '.join(map(str, divisors[:-1]))} or {img_size}"
        )
    if fits and img_size <= MANY * s.patch_size:
        return s
    # Of those that fit the nearest to 8 x 8 patches; to 16 x 16 where those of the recipe are more:
    # the cost of attention grows with the fourth power of the patches a side.
    wanted = MANY if fits else 8
    patch_size = min(divisors, key=lambda n: abs(img_size / n - wanted))
    if patch_size > img_size / 4 and img_size > 8:
        raise UserError(
            f"--img_size {img_size} cannot be cut into 4 to {MANY} patches a side: give another, "
            f"such as {8 * ceil(img_size / 8)}, or a --patch_size that divides it"
        )
    return replace(s, patch_size=patch_size)


def _short_enough(ema_decay: float, steps: int) -> float | None:
    """A recipe's decay, lowered for a run of few steps; None if they are too few for an average.

    An average of decay d spans 1 / (1 - d) steps, and keeps d^n of the start after n.
    """
    longest = SPAN * steps
    return min(ema_decay, round(1 - 1 / longest, 4)) if longest > 2 else None


def _sizes_of_trained(
    trained: Mapping[str, Any], given: Mapping[str, Any], img_size: int | None
) -> dict[str, Any]:
    """The settings that a model to start from fixes; its patch size where the image has 4 x 4 such
    patches or more, and no other was given by hand.
    """
    for name in FIXED:
        if given.get(name, trained[name]) != trained[name]:
            raise UserError(
                f"--{name} {given[name]} contradicts {given['init_from']}, whose {name} is "
                f"{trained[name]}: give that, or leave it out"
            )
    sizes = {name: trained[name] for name in FIXED}
    side = trained["patch_size"]
    fits = img_size is None or (img_size % side == 0 and img_size // side >= 4)
    return sizes | ({"patch_size": side} if fits and "patch_size" not in given else {})


def _for_linear_probe(s: Settings, given: Mapping[str, Any]) -> Settings:
    """The settings where only the head learns: a linear probe, without dropout before it."""
    if s.init_from is None:
        raise UserError(
            "--freeze backbone: of a new model only the head would learn; name a trained one with "
            "--init_from"
        )
    return _without(s, "dropout", given, "has no effect with --freeze backbone")
