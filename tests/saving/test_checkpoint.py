"""Checkpoints: what loads, what is refused and how, and that a failed save costs nothing."""

import errno
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common.errors import UserError
from saving import checkpoint
from saving.checkpoint import FORMAT, find_checkpoint, load_checkpoint, save_checkpoint
from vit_model import ViT


def published(model: ViT) -> dict:
    """A checkpoint as the published script writes it: four keys, no configuration."""
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "epoch": 4,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "best_acc": 97.5,
    }


@pytest.fixture
def path(tmp_path) -> Path:
    """A published checkpoint of one block."""
    torch.save(published(ViT(depth=1)), tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"depth": 3, "patch_size": 4, "embed_dim": 24, "mlp_ratio": 2.7, "num_classes": 5},
        {"depth": 1, "img_size": 32, "patch_size": 8, "in_chans": 3},
    ],
)
def test_a_published_checkpoint_loads_with_its_sizes_read_off_the_tensors(tmp_path, sizes):
    model = ViT(**sizes).eval()
    content = published(model)
    if sizes.get("num_classes"):
        content["class_names"] = list("abcde")
    torch.save(content, tmp_path / "published.pt")
    before = torch.get_rng_state()
    loaded, checkpoint = load_checkpoint(tmp_path / "published.pt")
    assert torch.equal(torch.get_rng_state(), before)  # loading draws no random number
    side, channels = sizes.get("img_size", 28), sizes.get("in_chans", 1)
    images = torch.randn(2, channels, side, side)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert (checkpoint["epoch"], checkpoint["best_acc"]) == (4, 97.5)
    assert checkpoint["dataset"] == "mnist"


@pytest.mark.parametrize("told", [{}, {"format": 1}, {"format": FORMAT}])
def test_heads_are_restored_from_the_configuration_in_every_format(tmp_path, told):
    model = ViT(depth=2, num_heads=8, mlp_ratio=2.7).eval()
    config = {"depth": 2, "num_heads": 8, "mlp_ratio": 2.7}
    save_checkpoint(tmp_path / "ours.pt", {**published(model), "model_config": config, **told})
    images = torch.randn(2, 1, 28, 28)
    loaded, read = load_checkpoint(tmp_path / "ours.pt")
    assert torch.equal(loaded(images), model(images))
    assert config.items() <= read["model_config"].items()


def test_formats_before_3_have_one_mean_for_all_channels(tmp_path):
    told = {"format": 2, "normalization": {"mean": 0.2, "std": 0.3}}
    save_checkpoint(tmp_path / "old.pt", {**published(ViT(depth=1)), **told})
    pixels = load_checkpoint(tmp_path / "old.pt")[1]["normalization"]
    assert pixels == {"mean": [0.2], "std": [0.3]}


def test_a_checkpoint_of_a_later_format_asks_for_an_update(tmp_path):
    for later in (FORMAT + 1, "2"):
        save_checkpoint(tmp_path / "x.pt", {**published(ViT(depth=1)), "format": later})
        with pytest.raises(UserError, match=r"x\.pt was written by a newer version of .*: update"):
            load_checkpoint(tmp_path / "x.pt")


class Marker:
    """Runs code when unpickled without care: it would create `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_carries_code_is_refused_unrun(tmp_path):
    content = {"model_state_dict": {}, "x": Marker(tmp_path / "ran")}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"refused, since it would call io\.open"):
        load_checkpoint(tmp_path / "x.pt")
    for protocol in (2, 4):
        (tmp_path / "x.pt").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match="damaged, cut off, or in another format"):
            load_checkpoint(tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_files_that_are_no_checkpoint_are_told_apart(path):
    def message(content: bytes | dict | list) -> str:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    whole, model = path.read_bytes(), ViT(depth=1)
    assert "is empty" in message(b"")
    assert "damaged" in message(b"just some text\n" * 50)
    for keep in (10, len(whole) // 2, len(whole) - 1):
        assert "damaged" in message(whole[:keep])
    assert "it has no 'model_state_dict'" in message([1, 2])
    other = {**published(model), "model_state_dict": torch.nn.Linear(3, 3).state_dict()}
    assert "not a checkpoint of this ViT" in message(other)
    half = {**published(model), "model_state_dict": OrderedDict(model.state_dict())}
    del half["model_state_dict"]["blocks.0.attn.in_proj_bias"]
    assert "in_proj_bias" in message(half)
    wrong = {**published(model), "model_config": {"depth": 7}}
    assert "its model_config contradicts its tensors, whose depth is 1" in message(wrong)
    state = model.state_dict()
    for name, shape in {"0.weight": (9999, 96), "0.bias": (9999,), "3.weight": (96, 9999)}.items():
        state[f"blocks.0.mlp.{name}"] = torch.zeros(1).expand(shape)
    assert "larger than the file" in message({**published(model), "model_state_dict": state})
    path.unlink()
    with pytest.raises(UserError, match=r"x.pt cannot be read: No such file"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="it is a folder"):
        load_checkpoint(path.parent)


def full_disk(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "best_model.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"epoch": lambda: None})  # fails in the middle of writing
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"best_model.pt cannot be written: No space left"):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["best_model.pt"]


def test_a_file_that_memory_cannot_hold_is_named_as_such(path, monkeypatch):
    expected = r"x\.pt of \d MB needs more memory than is free: .* smaller model"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_bytes", lambda _: bytes(2**60))
        with pytest.raises(UserError, match=expected):
            load_checkpoint(path)
    monkeypatch.setattr(ViT, "to_empty", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(UserError, match=expected):
        load_checkpoint(path)


# ------------------------------------------------------------------------------ which one is used


def test_ones_own_model_goes_before_the_pretrained_one(tmp_path, monkeypatch):
    where = checkpoint.PRETRAINED.relative_to(ROOT)
    assert where.as_posix() == "checkpoints/pretrained/best_model.pt"
    monkeypatch.chdir(tmp_path)
    pretrained = tmp_path / "elsewhere" / "best_model.pt"
    monkeypatch.setattr(checkpoint, "PRETRAINED", pretrained)
    assert find_checkpoint("named.pt") == Path("named.pt")
    with pytest.raises(UserError, match=r"best_model\.pt.*train first.*--checkpoint"):
        find_checkpoint()
    for path in (pretrained, tmp_path / "checkpoints" / "best_model.pt"):
        path.parent.mkdir()
        path.write_bytes(b"a model")
        assert find_checkpoint().resolve() == path
