"""Settings of a training run, as data."""

from typing import Any

# The published recipe: what a flag is worth if it is not given. None is off, or derived.
DEFAULTS: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 128,
    "label_smoothing": 0.1,
    "optimizer": "AdamW",
    "lr": 1e-3,
    "head_lr": None,
    "weight_decay": 1e-4,
    "no_decay": False,
    "grad_clip": 1.0,
    "scheduler": "CosineAnnealingLR",
    "scheduler_interval": None,
    "warmup_epochs": 0,
    "ema_decay": None,
    "swa_start": None,
    "swa_lr": None,
    "swa_anneal_epochs": 10,
    "swa_anneal_strategy": "cos",
    "patch_size": 7,
    "embed_dim": 96,
    "depth": 16,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "dropout": 0.1,
}

# What replaces a default where a data set asks for it.
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {},
    # 20 passes over 1,437 images are too few steps for 16 blocks: fewer blocks, more passes.
    "digits": {"epochs": 100, "batch_size": 64, "depth": 4},
}
