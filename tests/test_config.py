"""A run as a file: --config takes a TOML file's flags, or those of a run from its history.json."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_one_error_line, history, read
from hypothesis import given
from mutations import EDITS, FEW, bounded, edited, result_or_error

import train
from data.catalog import NAMED_SETS
from recipes import RECIPES
from saving.stored_settings import to_stored
from settings import MAX_TOML, Options, parse_args, read_config
from training.resolve import resolve
from vit_model import ViT

HISTORY = Path("checkpoints/history.json")
FEW_IMAGES = "--device cpu --dataset digits --train_samples 100 --batch_size 50".split()
SIZES = "--depth 1 --embed_dim 16"
CALLS = f"{SIZES} --optimizer SGD(lr=0.1) --scheduler OneCycleLR(max_lr=0.2) --warmup_epochs 1"
AVERAGED = f"{SIZES} --swa_start 2 --swa_lr 1e-3 --grad_accum_steps 2 --seed 7 --no_decay"
# Given by hand, as the recipe has them: the file has other patches, and other heads are usual.
STARTED = "--init_from start.pt --recipe fast --patch_size 7 --num_heads 8"
PROBE = "--init_from start.pt --freeze backbone --head_lr 0.1"
TOML = """
recipe = "fast"   # what it begins with
dataset = "digits"
device = "cpu"
epochs = 1
train-samples = 100
depth = 1
embed_dim = 16
num_heads = 2
lr = 1
no_decay = true
save_dir = "there"
"""


def tensors(content: object) -> list[torch.Tensor]:
    """All that are in a checkpoint, in order."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content
    return [
        t for part in parts if isinstance(part, dict | list | torch.Tensor) for t in tensors(part)
    ]


def told(name: str) -> list[torch.Tensor]:
    return tensors(read(f"checkpoints/{name}"))


@pytest.mark.parametrize("flags", [f"{SIZES} --recipe fast", CALLS, AVERAGED, STARTED, PROBE])
def test_a_history_gives_the_same_run_to_the_last_bit(complete, tmp_path, flags):
    torch.manual_seed(0)
    model = ViT(embed_dim=16, depth=1, patch_size=4)
    torch.save(model.state_dict(), tmp_path / "start.pt")  # which doesn't tell its heads
    complete(*FEW_IMAGES, *flags.split(), "--epochs", 2)
    first = history()
    expected = {name: told(name) for name in ("best_model.pt", "last.pt")}
    HISTORY.rename("run.json")
    complete("--device", "cpu", "--config", "run.json")
    assert history()["run"] == first["run"]
    for name, theirs in expected.items():
        ours = told(name)
        assert len(ours) == len(theirs) > 20
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_toml_file_is_flags_and_those_given_by_hand_win(complete):
    Path("run.toml").write_text(TOML)
    result = complete("--config", "run.toml", "--depth", 2, "--save-dir", "here")
    assert "recipe:   fast: epochs 1, " in result.out and not Path("there").exists()
    found = history("here")["run"]
    assert (found["train_samples"], found["recipe"], found["dataset"]) == (100, "fast", "digits")
    settings = found["settings"]
    names = ("depth", "embed_dim", "lr", "no_decay", "optimizer", "pool")
    fast = RECIPES["fast"]
    assert [settings[n] for n in names] == [2, 16, 1.0, True, fast["optimizer"], fast["pool"]]
    assert type(settings["lr"]) is float


def test_a_resumed_run_takes_a_file_as_it_takes_flags(complete, run):
    complete(*TINY, "--epochs", 2, "--lr", 0.01)
    Path("run.toml").write_text("epochs = 3\nlr = 0.01\nembed_dim = 16")
    assert "after 2 of 3 epochs" in complete("--resume", "--config", "run.toml").out
    complete("--resume", "--config", HISTORY)
    Path("run.toml").write_text("lr = 0.02")
    result = run(train.main, "--resume", "--config", "run.toml")
    assert_one_error_line(result, "--lr 0.02 contradicts the run in", "which has 0.01")


def test_what_a_run_has_from_its_recipe_and_data_set_is_not_said_again(tmp_path):
    for recipe, dataset in itertools.product(RECIPES, NAMED_SETS):
        settings = resolve(recipe, dataset, {"erase": 0.3})
        stored = to_stored(Options(recipe=recipe), settings, dataset) | {"fingerprint": "0" * 12}
        (tmp_path / "history.json").write_text(json.dumps({"run": stored}))
        flags = read_config(tmp_path / "history.json")
        fitted = {"patch_size", "hflip", "ema_decay"}  # to the images
        assert flags.keys() <= {"recipe", "dataset", "erase", *fitted}
        assert resolve(recipe, dataset, flags) == settings


@pytest.mark.parametrize(
    ("dataset", "given", "images"),
    [
        ("mnist", {"recipe": "fast", "ema_decay": 0.99, "epochs": 1}, 512),
        ("folder", {"batch_size": 128}, 100),
        ("folder", {"patch_size": 7}, 100),
    ],
)
def test_what_was_given_is_given_again_where_the_images_would_change_it(
    tmp_path, dataset, given, images
):
    recipe = given.get("recipe", "article")
    settings = resolve(recipe, dataset, given, img_size=140, images=images)
    assert settings != resolve(recipe, dataset, {}, img_size=140, images=images)
    stored = to_stored(Options(recipe=recipe), settings, dataset) | {"fingerprint": "0" * 12}
    (tmp_path / "history.json").write_text(json.dumps({"run": stored}))
    flags = read_config(tmp_path / "history.json")
    assert resolve(recipe, dataset, flags, img_size=140, images=images) == settings


def run_with(**changes: object) -> str:
    stored = to_stored(Options(), resolve("article", "digits", {}), "digits")
    return json.dumps({"run": stored | changes})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.toml", "epochs = 0", "--config x.toml: its epochs: '0' given, expected a whole number"),
        ("x.toml", "epochs = 1.5", "its epochs: '1.5' given, expected a whole number of at least"),
        ("x.toml", "lr = nan", "its lr: 'nan' given, expected a number above 0"),
        ("x.toml", "pool = 'max'", "its pool is none of cls, mean"),
        ("x.toml", "epochs = true", "its epochs is no value for --epochs"),
        ("x.toml", "no_decay = 1", "its no_decay is no value for --no_decay"),
        ("x.toml", 'save_dir = "a\\u0000b"', "its save_dir is no value for --save_dir"),
        ("x.toml", "lr = [0.1]", "its lr is no value for --lr"),
        ("x.toml", "[model]\ndepth = 1", "unknown flags: model; see --help"),
        ("x.toml", "epohcs = 1\nfoo = 2", "unknown flags: epohcs, foo; did you mean epochs?"),
        ("x.toml", "config = 'y.toml'", "unknown flags: config; "),
        ("x.toml", "epochs 3", "--config x.toml: Expected '=' after a key"),
        ("x.toml", "#" * (MAX_TOML + 1), f"expected at most {MAX_TOML:,}"),
        ("x.toml", "swa_anneal_epochs = 3", "--swa_anneal_epochs 3 has no effect"),
        ("x.toml", "in_chans = 'grey'", "its in_chans: 'grey' given, expected a whole number"),
        ("x.toml", "hflip = 0.5", "--hflip 0.5 gives mirrored images"),
        ("x.json", "{}", "x.json is neither a TOML file, whose name ends in .toml, nor the"),
        ("x.json", "[" * 10**5, "x.json is neither"),
        ("x.json", '{"run": {"settings": 3}}', "x.json is neither"),
        ("x.json", "epochs = 3", "--config x.json is neither a TOML file"),
        ("x.json", run_with(seed=-1), "--config x.json: its seed: '-1' given, expected a whole"),
        ("x.json", run_with(recipe="slow"), "x.json is neither"),
        ("x.json", run_with(save_dir="/etc"), "unknown flags: save_dir; "),
        ("x.json", run_with(next_years=3), "unknown flags: next_years; see --help"),
        ("none.toml", None, "--config: none.toml cannot be read: No such file"),
    ],
)
def test_a_file_with_other_things_in_it_is_refused_in_one_line(run, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    result = run(train.main, "--dataset", "digits", "--config", name)
    assert_one_error_line(result, words)
    assert result.out == "" and not HISTORY.exists()


@FEW
@given(edits=EDITS)
@pytest.mark.parametrize("name", ["x.toml", "x.json"])
def test_damaged_bytes_give_flags_or_one_line(tmp_path, name, edits):
    text = TOML if name == "x.toml" else run_with(seed=3)
    (tmp_path / name).write_bytes(edited(text.encode(), edits))
    with bounded(memory=200 << 20):
        result_or_error(lambda: parse_args(["--config", str(tmp_path / name)]))
