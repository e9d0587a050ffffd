"""Checkpoints: what loads, what is refused and how, and that a failed save costs nothing."""

import errno
import os
import pickle
import signal
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common import files
from common.errors import UserError
from common.signals import uninterrupted
from saving import checkpoint
from saving.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
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


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"depth": 3, "patch_size": 4, "embed_dim": 24, "mlp_ratio": 2.7, "num_classes": 5},
        {"depth": 1, "img_size": 32, "patch_size": 8, "in_chans": 3},
    ],
)
def test_a_published_checkpoint_loads_with_its_sizes_read_off_the_tensors(tmp_path, sizes):
    torch.manual_seed(0)
    model = ViT(**sizes).eval()
    content = published(model)
    if sizes.get("num_classes"):
        content["class_names"] = list("abcde")
    torch.save(content, tmp_path / "published.pt")
    loaded, checkpoint = load_checkpoint(tmp_path / "published.pt")
    side, channels = sizes.get("img_size", 28), sizes.get("in_chans", 1)
    images = torch.randn(2, channels, side, side)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert (checkpoint["epoch"], checkpoint["best_acc"]) == (4, 97.5)
    assert checkpoint["dataset"] == "mnist"


def test_heads_are_restored_from_the_configuration(tmp_path):
    model = ViT(depth=2, num_heads=8).eval()
    config = {"depth": 2, "num_heads": 8}
    save_checkpoint(tmp_path / "ours.pt", {**published(model), "model_config": config})
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(load_checkpoint(tmp_path / "ours.pt")[0](images), model(images))


class Marker:
    """Runs code when unpickled without care: it would create `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_carries_code_is_refused_unrun(tmp_path):
    content = {"model_state_dict": {}, "x": Marker(tmp_path / "ran")}
    torch.save(content, tmp_path / "zip.pt")
    for protocol in (2, 4):
        (tmp_path / f"pickle{protocol}.pt").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=r"refused, since it would call io\.open"):
        load_checkpoint(tmp_path / "zip.pt")
    for name in ("pickle2.pt", "pickle4.pt"):
        with pytest.raises(UserError, match="damaged, cut off, or in another format"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint_are_told_apart(tmp_path):
    model = ViT(depth=1)
    whole = tmp_path / "whole.pt"
    torch.save(published(model), whole)

    def message(name: str, content: bytes | dict | list) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load_checkpoint(path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "is empty" in message("empty.pt", b"")
    assert "damaged" in message("text.pt", b"just some text\n" * 50)
    size = whole.stat().st_size
    for keep in (10, size // 2, size - 1):
        assert "damaged" in message("cut.pt", whole.read_bytes()[:keep])
    assert "has no 'model_state_dict'" in message("list.pt", [1, 2])
    other = {**published(model), "model_state_dict": torch.nn.Linear(3, 3).state_dict()}
    assert "not a checkpoint of this ViT" in message("other.pt", other)
    half = {**published(model), "model_state_dict": OrderedDict(model.state_dict())}
    del half["model_state_dict"]["blocks.0.attn.in_proj_bias"]
    assert "in_proj_bias" in message("half.pt", half)
    wrong = {**published(model), "model_config": {"depth": 7}}
    assert "its model_config contradicts" in message("wrong.pt", wrong)
    with pytest.raises(UserError, match=r"nowhere.pt cannot be read: No such file"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="Is a directory"):
        load_checkpoint(tmp_path)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    state = ViT(depth=1).state_dict()
    huge = 10**6
    for name in list(state):
        if name.startswith("blocks.0.mlp"):
            del state[name]
    state["blocks.0.mlp.0.weight"] = torch.zeros(1, 1).expand(huge, 96)
    state["blocks.0.mlp.0.bias"] = torch.zeros(1).expand(huge)
    state["blocks.0.mlp.3.weight"] = torch.zeros(1, 1).expand(96, huge)
    state["blocks.0.mlp.3.bias"] = torch.zeros(96)
    torch.save({**published(ViT(depth=1)), "model_state_dict": state}, tmp_path / "huge.pt")
    with pytest.raises(UserError, match="larger than the file"):
        load_checkpoint(tmp_path / "huge.pt")


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
    with pytest.raises(
        UserError, match=r"best_model.pt cannot be written: No space left on device"
    ):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["best_model.pt"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.pt", tmp_path):
        for write in (files.check_writable, lambda p: files.write_text(p, "text")):
            with pytest.raises(UserError, match=f"{path} cannot be written"):
                write(path)


def test_an_interrupt_waits_for_files_that_belong_together(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            files.write_text(tmp_path / "second", "whole")
        pytest.fail("the interrupt was lost")
    assert (tmp_path / "second").read_text() == "whole"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_that_memory_cannot_hold_is_named_as_such(tmp_path, monkeypatch):
    torch.save(published(ViT(depth=1)), tmp_path / "x.pt")
    expected = r"x\.pt of \d MB needs more memory than is free: .* smaller model"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: bytes(2**60))
        with pytest.raises(UserError, match=expected):
            load_checkpoint(tmp_path / "x.pt")
    monkeypatch.setattr(ViT, "to_empty", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(UserError, match=expected):
        load_checkpoint(tmp_path / "x.pt")


# ------------------------------------------------------------------------------ which one is used


def test_ones_own_model_goes_before_the_pretrained_one(tmp_path, monkeypatch):
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


def test_the_pretrained_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = checkpoint.PRETRAINED.relative_to(ROOT)
    assert where.as_posix() == "checkpoints/pretrained/best_model.pt"


def test_loading_draws_no_random_number(tmp_path):
    torch.save(published(ViT(depth=1)), tmp_path / "x.pt")
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(torch.get_rng_state(), before)
