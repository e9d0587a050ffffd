"""Weights for others: as safetensors, read again as the checkpoint that they were, and for timm."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_one_error_line, read
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, FEW, VALUES, bounded, edited, result_or_error

import inference
from saving.checkpoint import load_checkpoint, save_checkpoint
from saving.pretrained import read_pretrained
from saving.weights_file import KEY, write_safetensors
from vit_model import ViT

safetensors = pytest.importorskip("safetensors.torch", reason="the format needs safetensors")
timm = pytest.importorskip("timm", reason="needs the real timm")
BEST = Path("checkpoints/best_model.pt")


def randomised(**config) -> ViT:
    """Every parameter has other numbers, none is 0 or 1, so that none can be left out unseen."""
    torch.manual_seed(0)
    model = ViT(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def content_of(model: ViT, **changes: object) -> dict:
    """A checkpoint of digits with another model."""
    side, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
    content = {"epoch": 3, "best_acc": 97.5, "model_state_dict": model.state_dict()}
    content |= {"format": 3, "dataset": "mine", "source": "folder", "preparation": "pad"}
    content |= {"normalization": {"mean": [0.4] * channels, "std": [0.2] * channels}}
    content |= {"class_names": [f"class {i}" for i in range(model.head.out_features)]}
    content |= {"model_config": {"num_heads": model.blocks[0].attn.num_heads, "img_size": side}}
    return (
        content
        | {"settings": {"label_smoothing": 0.2}, "calibration": {"temperature": 0.7}}
        | changes
    )


def same_state(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())


# -------------------------------------------------------------------------------- safetensors


def test_a_safetensors_file_is_the_weights_and_how_to_use_them(run, trained, tmp_path):
    command = ["--mode", "safetensors", "--checkpoint", trained / BEST]
    path = tmp_path / "outputs" / "vit_digits.safetensors"
    assert run(inference.main, *command).out.endswith("Written: outputs/vit_digits.safetensors\n")
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[KEY])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = read(trained / BEST)
    model = ViT(**about["model_config"])
    model.load_state_dict(state)
    assert same_state(state, content["model_state_dict"])
    for name in ("class_names", "normalization", "preparation", "dataset", "settings"):
        assert about[name] == content[name], name
    assert about["calibration"] == {"temperature": content["calibration"]["temperature"]}
    assert "Replaced: outputs" in run(inference.main, *command).out


@pytest.mark.parametrize(("fixture", "data"), [("trained", None), ("photos", "photos")])
def test_a_safetensors_file_is_scored_as_the_checkpoint_that_it_was(run, request, fixture, data):
    folder = request.getfixturevalue(fixture)
    run(
        inference.main,
        "--mode",
        "safetensors",
        "--checkpoint",
        folder / BEST,
        "--output",
        "x.safetensors",
    )
    results = []
    for path in (folder / BEST, "x.safetensors"):
        flags = ["--data_dir", folder / data] if data else []
        assert run(inference.main, "--mode", "evaluate", "--checkpoint", path, *flags).status == 0
        results.append(json.loads(Path("outputs/evaluation.json").read_text()))
    for result in results:
        del result["checkpoint"], result["sha256"]
    assert results[0] == results[1]
    # Which images the model was trained on is told, too, so that they are left out.
    marks = [
        load_checkpoint(path)[1].get("trained_on") for path in (folder / BEST, "x.safetensors")
    ]
    assert (marks[0] is None) == (data is None)
    assert data is None or torch.equal(*marks)


def test_training_starts_from_a_safetensors_file_with_its_heads_and_classes(tmp_path):
    model = randomised(embed_dim=32, depth=1, num_heads=8, pool="mean", pos_embed="sincos2d")
    config = {"num_heads": 8, "pos_embed": "sincos2d"}
    save_checkpoint(tmp_path / "x.pt", content_of(model, model_config=config))
    _, checkpoint = load_checkpoint(tmp_path / "x.pt")
    write_safetensors(tmp_path / "x.safetensors", model.state_dict(), checkpoint)
    ours, theirs = (read_pretrained(tmp_path / f"x.{end}") for end in ("safetensors", "pt"))
    assert (ours.kind, ours.config, ours.class_names) == (
        theirs.kind,
        theirs.config,
        theirs.class_names,
    )
    assert ours.config["num_heads"] == 8 and same_state(ours.state, theirs.state)


def test_without_the_package_safetensors_it_is_named(run, trained, tmp_path, monkeypatch):
    command = ["--checkpoint", trained / BEST, "--mode", "safetensors"]
    run(inference.main, *command, "--output", "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    result = run(inference.main, *command)
    assert_one_error_line(result, "outputs/vit_digits.safetensors can only be written with the")
    result = run(inference.main, "--checkpoint", "x.safetensors")
    assert_one_error_line(
        result, "x.safetensors can only be read with the package safetensors: pip"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs", "x.safetensors"]


# ------------------------------------------------------------------------ files from strangers


SMALL = randomised(embed_dim=16, depth=1)


def with_metadata(text: str) -> bytes:
    return safetensors.save(SMALL.state_dict(), {KEY: text})


def is_refused(path: Path, content: bytes) -> bool:
    """Load it: a model that computes, or an error in one line."""
    path.write_bytes(content)
    with bounded(memory=200 << 20):
        loaded = result_or_error(load_checkpoint, path)
        started = result_or_error(read_pretrained, path)
    if isinstance(loaded, str):
        assert str(path) in loaded and loaded.isprintable()
        return True
    model, checkpoint = loaded
    config = checkpoint["model_config"]
    logits = model(torch.zeros(1, config["in_chans"], *[config["img_size"]] * 2))
    assert logits.isfinite().all() and len(checkpoint["class_names"]) == config["num_classes"]
    assert not isinstance(started, str), started
    return False


def about(**changes: object) -> dict:
    content = content_of(SMALL)
    del content["model_state_dict"]
    return content | changes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 10**5,
        '{"epoch": ' + "9" * 5000 + "}",
        json.dumps(about(trained_on=[[1, 2]])),
        json.dumps(about(trained_on=[2**70])),
        json.dumps(
            about(calibration={"temperature": 1, "threshold": 1, "whitening": [], "centres": []})
        ),
        json.dumps(about(class_names=["\x1b[2J"] * 10)),
        json.dumps(about(model_config={"num_heads": 4, "depth": 7})),
        json.dumps(about(format=4)),
        json.dumps(about(normalization={"mean": [float("nan")], "std": [1]})),
    ],
)
def test_odd_metadata_is_refused_in_one_line(tmp_path, text):
    assert not is_refused(tmp_path / "x.safetensors", with_metadata(json.dumps(about())))
    assert is_refused(tmp_path / "x.safetensors", with_metadata(text))


def test_weights_of_others_are_no_checkpoint(run, tmp_path):
    state = SMALL.state_dict()
    for metadata in (None, {"format": "pt", "model_config": "{}"}):
        (tmp_path / "x.safetensors").write_bytes(safetensors.save(state, metadata))
        result = run(inference.main, "--checkpoint", "x.safetensors")
        assert_one_error_line(
            result, "x.safetensors is not a checkpoint of this ViT: it has no 'mod"
        )
        assert read_pretrained("x.safetensors").kind == "this project"


@FEW
@given(edits=EDITS, name=st.sampled_from(sorted(about())), value=VALUES, odd=st.booleans())
def test_damaged_files_give_a_model_or_one_line(tmp_path, edits, name, value, odd):
    if odd:
        text = json.dumps(about(**{name: value}), default=str, skipkeys=True)
        is_refused(tmp_path / "x.safetensors", with_metadata(text))
    else:
        whole = with_metadata(json.dumps(about()))
        is_refused(tmp_path / "x.safetensors", edited(whole, edits))


def test_settings_of_strangers_are_written_as_well_as_json_can(run, tmp_path):
    odd = {(1, 2): 3, "tensor": torch.ones(2), "nan": float("nan"), "label_smoothing": 0.1}
    save_checkpoint(tmp_path / "x.pt", about(settings=odd, model_state_dict=SMALL.state_dict()))
    flags = "--mode safetensors --checkpoint x.pt --output x.safetensors".split()
    assert run(inference.main, *flags).status == 0
    found = load_checkpoint("x.safetensors")[1]["settings"]
    assert found.keys() == {"tensor", "nan", "label_smoothing"}


# ---------------------------------------------------------------------------------------- timm

SIZES = {"img_size": 24, "patch_size": 6, "num_classes": 7, "embed_dim": 48, "depth": 2}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("pos_embed", ["learned", "sincos2d"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm_loads_the_weights_by_the_printed_call(run, tmp_path, pool, pos_embed, in_chans):
    config = {"num_heads": 6, "pool": pool, "pos_embed": pos_embed, "in_chans": in_chans}
    config["mlp_ratio"] = 2.7  # 129.6 neurons, of which timm would make 129
    model = randomised(**SIZES, **config)
    save_checkpoint(tmp_path / "x.pt", content_of(model, model_config=config))
    images = torch.randn(3, in_chans, 24, 24)
    for output in ("outputs/vit_folder_timm.pth", "y.safetensors"):
        flags = [] if output.startswith("outputs") else ["--output", output]
        result = run(inference.main, "--mode", "timm", "--checkpoint", "x.pt", *flags)
        assert result.status == 0, result.err
        (call,) = (line for line in result.out.splitlines() if line.startswith("load with: "))
        theirs = eval(call.removeprefix("load with: "), {"timm": timm}).eval()
        with torch.no_grad():
            expected = model(images)
            assert (theirs(images) - expected).abs().max() < 1e-5 < expected.std()
        assert f"mean {[0.4] * in_chans}, std {[0.2] * in_chans}" in result.out
        # The way back, by the same table.
        again = read_pretrained(output, num_heads=6)
        assert again.kind in ("timm", "this project") and same_state(
            again.state, model.state_dict()
        )
