"""Settings: one field a flag; what a file says of them is checked as the command line is."""

import importlib
import math
import re
import sys
from dataclasses import asdict, replace
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from common.errors import UserError
from recipes import DATASET_SETTINGS, RECIPES
from saving.stored_settings import fingerprint, from_stored, to_stored
from settings import FLAGS, Options, Settings, parse_args
from training.resolve import resolve

SETTINGS = asdict(Settings())
STORED = [name for name, flag in FLAGS.items() if flag.metadata["stored"]]
# Whole numbers from, to; then others from (or, with a round bracket, above), below.
BOUNDS = """
epochs [1, 1000000] batch_size [1, 2147483648] warmup_epochs [0, 2147483648]
swa_start [1, 2147483648] swa_anneal_epochs [0, 2147483648] patch_size [1, 2147483648]
embed_dim [1, 100000] depth [1, 10000] num_heads [1, 2147483648] train_samples [1, 2147483648]
num_workers [0, 256] seed [0, 2147483648] grad_accum_steps [1, 1000000]
save_every_steps [1, 2147483648] img_size [4, 1024] random_crop [0, 64] rand_augment [0, 14]
label_smoothing [0, 1) lr (0, inf) head_lr (0, inf) swa_lr (0, inf) weight_decay [0, inf)
grad_clip [0, inf) ema_decay [0, 1) mlp_ratio (0, 1000) dropout [0, 1) rotate [0, 181)
translate [0, 1) scale [0, 1) shear [0, 90) elastic [0, 28) erase [0, 1)
layer_decay (0, 1.0]
hflip [0, 1) patch_drop [0, 1) color_jitter [0, 1)
stroke [0, 1) serif [0, 1) marks [0, 1) background [0, 1) light [0, 1) invert [0, 1)
rand_conv [0, 1) blur [0, 1) noise [0, 1) keep_clean [0, 1) augmix [0, 1)
mixup [0, inf) cutmix [0, inf) val_split (0, 1) test_split (0, 1)
"""
NOTHING = object()


def stored(**changes) -> dict:
    """What a checkpoint tells of a run, with changes by name; NOTHING: left out."""
    run = to_stored(Options(), Settings(), "mnist")
    for name, value in changes.items():
        place = run["settings"] if name in SETTINGS else run
        place[name] = value
        if value is NOTHING:
            del place[name]
    return run


def outcome(read) -> object:
    try:
        return read()
    except (UserError, ValueError):
        return "refused"


def test_what_is_stored_is_read_again():
    options = Options(seed=7, train_samples=50, precision="fp32")
    settings = resolve("best", "digits", {"swa_lr": 1e-3, "swa_start": 3})
    run = to_stored(options, settings, "digits")
    assert from_stored(run) == (replace(options, dataset="digits"), asdict(settings))
    assert not {"device", "save_dir", "resume"} & run.keys()  # a machine's, not the run's


@pytest.mark.parametrize("name", STORED)
def test_a_stored_value_is_checked_like_its_flag(name):
    def from_file(value: object) -> object:
        options, settings = from_stored(stored(**{name: value}))
        return {**vars(options), **settings}[name]

    for value in ([], {}, (1,), b"1", 1j, torch.ones(1), object()):
        assert outcome(lambda value=value: from_file(value)) == "refused", value
    default = FLAGS[name].default
    assert (
        from_file(True) is True
        if default is False
        else outcome(lambda: from_file(True)) == "refused"
    )
    assert outcome(lambda: from_file(None)) == (None if default is None else "refused")
    for text in "0 1 3 -1 0.5 1e-3 nan inf 1e999 9999999999 mnist best step max x".split():
        found = outcome(lambda text=text: from_file(text))
        if default is False:
            assert found == "refused"
        else:
            expected = outcome(lambda text=text: parse_args([f"--{name}={text}"])[1][name])
            assert found == expected and type(found) is type(expected), text


@pytest.mark.parametrize("name", STORED)
def test_a_setting_from_before_there_was_one_has_its_default_and_an_option_must_be_there(name):
    if name in SETTINGS:
        _, settings = from_stored(stored(**{name: NOTHING}))
        assert settings == SETTINGS
    elif FLAGS[name].metadata["section"] == "folder":
        assert from_stored(stored(**{name: NOTHING}))[0] == replace(Options(), dataset="mnist")
    else:
        with pytest.raises(KeyError):
            from_stored(stored(**{name: NOTHING}))


TRAINED = {"img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "num_heads": 3}
TRAINED |= {"embed_dim": 192, "depth": 12, "mlp_ratio": 4.0, "pool": "cls", "pos_embed": "learned"}
FROM = {"init_from": "vit.pt"}


def test_the_sizes_of_a_model_to_start_from_win_over_the_recipe():
    settings = resolve("fast", "digits", FROM | {"lr": 0.5}, trained=TRAINED)
    found = asdict(settings)
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio", "pool", "pos_embed")
    assert {name: found[name] for name in names} == {name: TRAINED[name] for name in names}
    assert (settings.lr, settings.epochs, settings.dropout) == (
        0.5,
        100,
        RECIPES["fast"]["dropout"],
    )
    assert resolve("fast", "digits", FROM | {"depth": 12}, trained=TRAINED).depth == 12


@pytest.mark.parametrize(
    ("name", "value"),
    [("embed_dim", 96), ("depth", 4), ("num_heads", 4), ("mlp_ratio", 2.0), ("pool", "mean")],
)
def test_a_size_that_contradicts_a_model_to_start_from_is_refused(name, value):
    message = f"--{name} {value} contradicts vit.pt, whose {name} is {TRAINED[name]}: give that"
    with pytest.raises(UserError, match=re.escape(message)):
        resolve("article", "mnist", FROM | {name: value}, trained=TRAINED)


@pytest.mark.parametrize(
    ("img_size", "of_file", "by_hand", "expected"),
    [
        (64, 16, {}, 16),  # 4 x 4
        (48, 16, {}, 6),  # 3 x 3 only: 8 x 8 as without a file
        (28, 16, {}, 7),  # does not divide: the recipe's
        (32, 7, {}, 4),
        (32, 8, {"patch_size": 2}, 2),
        (None, 16, {}, 16),  # a folder, not yet read
        (210, 16, {}, 14),  # does not divide: the recipe's 30 x 30 patches made larger
        (448, 16, {}, 16),  # 28 x 28 of the file's
    ],
)
def test_patches_are_the_files_where_they_fit_the_image(img_size, of_file, by_hand, expected):
    trained = TRAINED | {"patch_size": of_file}
    settings = resolve("article", "folder", FROM | by_hand, trained, img_size)
    assert settings.patch_size == expected


@pytest.mark.parametrize(
    ("img_size", "by_hand", "expected"),
    [
        (32, {}, 4),
        (64, {}, 4),
        (68, {}, 4),
        (96, {}, 6),
        (224, {}, 14),
        (224, {"patch_size": 4}, 4),
    ],
)
def test_a_large_image_has_about_16_patches_a_side(img_size, by_hand, expected):
    assert resolve("cifar", "folder", by_hand, None, img_size).patch_size == expected


def test_a_side_that_few_patches_fit_is_refused():
    for side in (61, 62):
        with pytest.raises(UserError, match=rf"^--img_size {side} cannot be cut .*such as 64, or"):
            resolve("cifar", "folder", {}, None, side)
    assert resolve("cifar", "folder", {"patch_size": 61}, None, 61).patch_size == 61


@pytest.mark.parametrize(
    ("recipe", "images", "by_hand", "expected"),
    [
        ("cifar", 45_000, {}, 0.995),
        ("best", 54_000, {}, 0.999),
        ("fast", 54_000, {}, 0.99),
        ("cifar", 500, {"batch_size": 128}, 0.9643),  # 112 steps, of which it spans 28
        ("cifar", 100, {}, 0.9643),  # 4 steps an epoch
        ("cifar", 500, {"ema_decay": 0.995}, 0.995),
        ("cifar", 20, {"epochs": 2}, None),
        ("article", 500, {}, None),
    ],
)
def test_a_short_run_has_a_short_average(recipe, images, by_hand, expected):
    settings = resolve(recipe, "folder", by_hand, None, 32, images)
    assert settings.ema_decay == expected
    again = resolve(recipe, "folder", asdict(settings), None, 32, images)  # as by --config
    assert again == settings


def test_a_linear_probe_needs_a_trained_model_and_drops_nothing():
    probe = FROM | {"freeze": "backbone"}
    settings = resolve("article", "mnist", probe, trained=TRAINED)
    assert settings.dropout == 0.0
    assert resolve("article", "mnist", asdict(settings)) == settings  # as a run is resumed
    with pytest.raises(
        UserError, match=r"--freeze backbone: .*name a trained one with --init_from"
    ):
        resolve("article", "mnist", {"freeze": "backbone"})
    with pytest.raises(UserError, match=r"--dropout 0\.2 has no effect"):
        resolve("article", "mnist", probe | {"dropout": 0.2}, trained=TRAINED)


def test_a_path_is_stored_only_if_it_can_be_printed():
    assert from_stored(stored(init_from="a b/ä.pt"))[1]["init_from"] == "a b/ä.pt"
    for odd in ("", "\x1b[2J", "two\nlines", "\udcff", "x" * 2000):
        with pytest.raises(ValueError, match=r"its init_from: .* of at most 1000 printable"):
            from_stored(stored(init_from=odd))


def test_every_number_has_its_bounds():
    bounds = re.findall(r"(\w+) ([\[(])(\S+), (\S+)([\])])", BOUNDS)
    about = {name: flag.metadata for name, flag in FLAGS.items() if "choices" not in flag.metadata}
    numbers = {name for name, each in about.items() if "." in each["type"].__qualname__}
    assert {name for name, *_ in bounds} == numbers
    for name, start, low, high, end in bounds:
        kind, step = (int, 1) if end == "]" and "." not in high else (float, 1e-9)
        low, high = kind(low), min(kind(high), 1e300)
        for value in (low + step * (start == "("), high - step * (end == ")")):
            assert parse_args([f"--{name}={value}"])[1][name] == value
        above = math.inf if high == 1e300 else high + step * (end == "]")
        for value in (low - step * (start == "["), above, math.nan):
            with pytest.raises(UserError, match=f"--{name}: '{value}' given, expected "):
                parse_args([f"--{name}={value}"])


def test_flags_win_over_the_data_set_that_over_the_recipe_and_that_over_the_defaults():
    settings = resolve("fast", "digits", {"depth": 3, "seed": 1})
    assert (settings.depth, settings.batch_size, settings.num_heads, settings.patch_size) == (
        3,
        DATASET_SETTINGS["digits"]["batch_size"],
        RECIPES["fast"]["num_heads"],
        Settings.patch_size,
    )


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"epochs": 6,', '"epochs": 0,', "its epochs: '0' given, expected a whole number"),
        ('"epochs": 6,', '"epohcs": 6,', "epohcs"),
        ('"pool": "mean",', '"pool": "max",', "its pool is none of cls, mean"),
    ],
)
def test_a_recipe_that_flags_could_not_say_is_refused_on_import(old, new, error, monkeypatch):
    source, edited = (ROOT / "src" / "recipes.py").read_text(), ModuleType("recipes")
    assert old in source
    exec(source.replace(old, new), edited.__dict__)
    monkeypatch.setitem(sys.modules, "recipes", edited)
    monkeypatch.delitem(sys.modules, "settings")
    with pytest.raises((ValueError, KeyError), match=error):
        importlib.import_module("settings")


def test_runs_have_one_fingerprint_whatever_machine_they_are_on():
    ours = fingerprint(stored())
    assert fingerprint(stored(num_workers=2, precision="fp32", save_every_steps=3)) == ours
    others = {"seed": 1, "lr": 0.5, "train_samples": 9, "dataset": "digits", "recipe": "best"}
    different = {fingerprint(stored(**{name: value})) for name, value in others.items()}
    assert len(different | {ours, fingerprint(stored(), b"other images")}) == 7
