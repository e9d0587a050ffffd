"""The recipes: what `--recipe` names, and what a data set changes in them, as data.

settings.py has every flag with its default, and refuses a value here that a flag would refuse.
"""

from typing import Any

from data.catalog import NAMED_SETS, PHOTOS

# Settings in place of the defaults, chosen by validation accuracy; a flag given by hand wins.
RECIPES: dict[str, dict[str, Any]] = {
    # As published.
    "article": {},
    # The least time to 99 % on a CPU: three blocks, Muon, and at first a quarter of the patches.
    "fast": {
        "epochs": 6,
        "label_smoothing": 0.0,
        "optimizer": "Muon(lr=0.02, weight_decay=0.1)",
        "lr": 1.5e-3,
        "scheduler": "OneCycleLR(pct_start=0.05, anneal_strategy='linear', cycle_momentum=False)",
        "ema_decay": 0.99,
        "depth": 3,
        "num_heads": 8,
        "dropout": 0.0,
        "pool": "mean",
        "pos_embed": "sincos2d",
        "patch_drop": 0.75,
        "rotate": 6.0,
        "translate": 0.06,
    },
    # The highest accuracy within half an hour on two CPU cores.
    "best": {
        "epochs": 58,
        "batch_size": 256,
        "optimizer": "Muon(lr=0.015, weight_decay=0.1)",
        "lr": 1e-3,
        "scheduler": "OneCycleLR(pct_start=0.1, cycle_momentum=False)",
        "ema_decay": 0.999,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 8,
        "dropout": 0.0,
        "pool": "mean",
        "pos_embed": "sincos2d",
        "patch_drop": 0.5,
        "rotate": 12.0,
        "translate": 0.1,
        "scale": 0.2,
        "shear": 12.0,
        "elastic": 0.8,
        "stroke": 0.2,
        "marks": 0.25,
    },
    # Small colour photos, such as CIFAR-10's.
    "cifar": {
        "epochs": 28,
        "optimizer": "Muon(lr=0.02, weight_decay=0.1)",
        "lr": 2e-3,
        "scheduler": "OneCycleLR(pct_start=0.1, anneal_strategy='linear', cycle_momentum=False)",
        "ema_decay": 0.995,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "dropout": 0.0,
        "pool": "mean",
        "pos_embed": "sincos2d",
        "patch_drop": 0.5,
        **PHOTOS,
        "rand_augment": 1,
    },
}

# `best` for longer, and for images that differ: in light, stroke and place, by noise and marks.
RECIPES["robust"] = RECIPES["best"] | {
    "epochs": 84,
    "rotate": 15.0,
    "translate": 0.12,
    "scale": 0.35,
    "stroke": 0.25,
    "serif": 0.2,
    "marks": 0.4,
    "background": 0.35,
    "light": 0.4,
    "invert": 0.25,
    "rand_conv": 0.15,
    "blur": 0.3,
    "noise": 0.35,
    "keep_clean": 0.3,
    "augmix": 0.15,
}

# What replaces a recipe's setting where a data set asks for it.
DATASET_SETTINGS = {name: row.settings for name, row in NAMED_SETS.items()} | {"folder": {}}
