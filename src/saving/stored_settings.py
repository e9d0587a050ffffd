"""What a checkpoint tells of a run's options and settings, and what tells runs apart."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from settings import Options, Settings, validated


def to_stored(options: Options, settings: Settings, dataset: str) -> dict[str, Any]:
    """What a checkpoint tells of a run: its options, without the machine's, and `settings`.

    Args:
        dataset: the name for --dataset of the data set that was loaded.
    """
    options = {f.name: getattr(options, f.name) for f in fields(options) if f.metadata["stored"]}
    return {**options, "dataset": dataset, "settings": asdict(settings)}


# Options that checkpoints have from format 3 on.
NEW = {f.name for f in fields(Options) if f.metadata["section"] == "folder"}


def from_stored(run: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The options and the settings by name that `to_stored` stored, all checked; the default of one
    that an earlier version did not have. Raises an error if one has no such value; a `KeyError` if
    an option is missing.
    """
    stored = run["settings"]
    settings = {f.name: validated(f, stored.get(f.name, f.default)) for f in fields(Settings)}
    options = {
        f.name: validated(f, run.get(f.name, f.default) if f.name in NEW else run[f.name])
        for f in fields(Options)
        if f.metadata["stored"]
    }
    return Options(**options), settings


# What tells one run from another; the machine doesn't, so that machines can be compared.
IDENTITY = ("recipe", "dataset", "seed", "train_samples", "settings")
# Of a run on a folder also the flags that say what its images are.
OF_FOLDER = tuple(sorted(NEW - {"cache_dir"}))


def fingerprint(run: Mapping[str, Any], images: bytes = b"") -> str:
    """12 hexadecimal digits that the files of one run share, and those of its repetitions.

    Args:
        images: what tells its images from others under the same name: a folder's `trained_on`.
    """
    names = IDENTITY + OF_FOLDER if run["dataset"] == "folder" else IDENTITY
    text = json.dumps([run[name] for name in names], sort_keys=True)
    return hashlib.sha256(text.encode() + images).hexdigest()[:12]
