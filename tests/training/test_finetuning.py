"""Training that starts from a file, or trains the head alone: what is taken, what stays, how it
goes on.
"""

from pathlib import Path

import pytest
import torch
from conftest import TINY_DIGITS, assert_one_error_line, history, read
from torch import Tensor

import train
from vit_model import ViT

LAST, BEST = Path("checkpoints/last.pt"), Path("checkpoints/best_model.pt")
START = "--device cpu --dataset digits --train_samples 100 --batch_size 50".split()
START += "--scheduler ConstantLR(factor=1) --epochs 2".split()
PROBE = [*START, "--freeze", "backbone"]
NEVER_MOVES = ["--optimizer", "SGD(lr=1e-30)"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Weights of ours alone, of 4 classes, as any script may have saved them."""
    torch.manual_seed(3)
    model = ViT(patch_size=14, depth=2, embed_dim=32, num_classes=4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    path = tmp_path_factory.mktemp("start") / "start.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def weights(name: str = "raw_model_state_dict") -> dict[str, Tensor]:
    return read(LAST)[name]


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}


def test_a_run_starts_from_the_file_whose_sizes_win_over_the_recipe(complete, file):
    result = complete(*START, "--recipe", "fast", "--init_from", file, *NEVER_MOVES)
    line = "started from: start.pt (this project): 28 tensors taken; positions 2x2 -> 4x4, patch "
    assert result.out.startswith(f"{line}filters 14 -> 7 pixels resampled; head new\n")
    changed = {"pos_embed", "patch_embed.proj.weight", "head.weight"}
    theirs = torch.load(file)["state_dict"]
    found = weights()
    assert {n for n in found if found[n].shape != theirs[n].shape} == {*changed, "head.bias"}
    same = {name: tensor for name, tensor in found.items() if name not in (*changed, "head.bias")}
    assert differing(same, theirs) == set()
    config = read(BEST)["model_config"]
    assert (config["pool"], config["embed_dim"], config["depth"]) == ("cls", 32, 2)
    assert history()["settings"]["init_from"] == str(file)
    plain = complete(*START, "--depth", 2, "--embed_dim", 32)
    assert "started from" not in plain.out and read(LAST)["run"]["settings"]["init_from"] is None


def test_a_run_goes_on_without_the_file(complete, run, file, tmp_path):
    here = tmp_path / "start.pt"
    flags = [*START, "--init_from", here, "--layer_decay", 0.5]
    here.write_bytes(file.read_bytes())
    complete(*flags)
    expected = weights()
    complete(*flags, "--epochs", 1)
    here.unlink()
    refused = run(train.main, "--resume", "--init_from", "other.pt")
    assert_one_error_line(refused, "--init_from other.pt contradicts the run in", f"has {here}")
    result = complete("--resume", "--epochs", 2, "--init_from", here)
    assert "resumed: " in result.out and "started from" not in result.out
    assert differing(weights(), expected) == set()
    assert list(history()["epochs"][0]["lr"].values()) == [1e-3 * 0.5**n for n in range(4)]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--ema_decay", 0.9],
        ["--swa_start", 1, "--no_decay"],
        ["--optimizer", "SGD(lr=0.1, momentum=0.9, weight_decay=0.1)"],
        ["--optimizer", "LBFGS(max_iter=2, history_size=3)", "--precision", "fp32"],
        ["--head_lr", 0.1, "--grad_accum_steps", 2],
    ],
)
def test_with_a_frozen_backbone_only_the_head_learns_and_a_run_goes_on(complete, file, flags):
    flags = [*PROBE, "--init_from", file, *flags]
    complete(*flags, "--epochs", 1)
    after_one = weights()
    result = complete("--resume", "--epochs", 2)
    found, average = weights(), weights("model_state_dict")
    assert "parameters, 330 of them learn" in result.out  # 32 x 10 and 10
    assert differing(found, after_one) == {"head.weight", "head.bias"}
    assert differing(average, after_one) == {"head.weight", "head.bias"}
    complete(*flags)
    assert differing(weights(), found) == set() == differing(weights("model_state_dict"), average)
    theirs = torch.load(file)["state_dict"]
    blocks = {name: tensor for name, tensor in found.items() if "norm" in name or "blocks" in name}
    assert len(blocks) == 26 and differing(blocks, theirs) == set()
    assert read(LAST)["model_config"]["dropout"] == 0.0


def test_a_linear_probe_learns(complete, file):
    flags = [*TINY_DIGITS[:4], "--init_from", file, "--freeze", "backbone", "--lr", 0.03]
    complete(*flags, "--epochs", 3)
    losses = [row["train_loss"] for row in history()["epochs"]]
    assert losses[2] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--embed_dim 96", "--embed_dim 96 contradicts FILE, whose embed_dim is 32: give that"),
        ("--num_heads 3", "--num_heads 3 does not divide the 32 numbers of a token in FILE"),
        ("--freeze backbone --recipe fast", "leaves as they are: give --optimizer AdamW"),
        ("--freeze backbone --dropout 0.1", "--dropout 0.1 has no effect"),
        ("--freeze backbone --layer_decay 0.9", "--layer_decay 0.9 has no effect"),
        ("--layer_decay 1.1", "'1.1' given, expected a number above 0 and at most 1"),
        ("--patch_size 5", "--patch_size 5 does not divide the image's side of 28"),
        ("--init_from nothing.pt", "--init_from: nothing.pt cannot be read: No such file"),
        ("--init_from .", "--init_from: . cannot be read: it is a folder or a device"),
    ],
)
def test_flags_that_contradict_the_file_or_have_no_effect_are_refused(run, file, flags, words):
    result = run(train.main, *START, "--init_from", file, *flags.split())
    assert_one_error_line(result, words.replace("FILE", str(file)))
    assert result.out == "" and not Path("checkpoints/last.pt").exists()
