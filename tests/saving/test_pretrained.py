"""Models to start from: timm's, torchvision's and ours compute the same here, fit other images, and
what is none of them is refused in one line.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from mutations import EDITS, FEW, bounded, edited, result_or_error
from safetensors.torch import save, save_file
from torch import Tensor, nn

from common.errors import UserError
from saving.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from saving.pretrained import (
    Pretrained,
    adapt_channels,
    read_pretrained,
    resample_filters,
    resample_positions,
)
from vit_model import ViT

SIZES = {"img_size": 32, "patch_size": 8, "in_chans": 3, "num_classes": 7, "embed_dim": 128}
SIZES |= {"depth": 2, "num_heads": 2, "mlp_ratio": 3.0}
CLASSES = tuple("abcdefg")


def randomised(model: nn.Module) -> nn.Module:
    """With every parameter drawn anew, so that none is 0 or 1 and none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model.eval()


def timms(**changes) -> nn.Module:
    return randomised(timm.models.VisionTransformer(**{**SIZES, **changes}))


def torchvisions() -> nn.Module:
    names = "image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim"
    model = torchvision.models.VisionTransformer(
        **dict(zip(names, (32, 8, 2, 2, 128, 384), strict=True)), num_classes=7
    )
    return randomised(model)


def vit(trained: Pretrained, class_names: tuple[str, ...] = CLASSES, **changes) -> tuple[ViT, str]:
    """A model of ours that starts from `trained`, and the line that is printed."""
    torch.manual_seed(1)
    config = {**trained.config, "num_classes": len(class_names), **changes}
    model = ViT(**config).eval()
    return model, trained.load_into(model, class_names)


def saved(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def images(model: ViT, count: int = 3) -> Tensor:
    side, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(2))


def assert_same_logits(ours: ViT, theirs: nn.Module) -> None:
    with torch.no_grad():
        found, expected = ours(images(ours)), theirs(images(ours))
    assert expected.std() > 0.1  # the images make a difference
    assert (found - expected).abs().max() < 1e-4


# ---------------------------------------------------------------------------- the same functions

WRAPPERS: dict[str, Callable[[dict], dict]] = {
    "bare.pt": dict,
    "bare.safetensors": dict,
    "wrapped.pth": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model.pth": lambda state: {"model": state},
    "published.pt": lambda state: {"model_state_dict": state, "best_acc": 97.0, "epoch": 3},
    "ddp.pt": lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
    "compiled.pt": lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
}


@pytest.mark.parametrize("file", WRAPPERS)
@pytest.mark.parametrize(("kind", "make"), [("timm", timms), ("torchvision", torchvisions)])
def test_logits_are_those_of_the_other_library(tmp_path, kind, make, file):
    theirs = make()
    trained = read_pretrained(saved(tmp_path / file, WRAPPERS[file](theirs.state_dict())))
    assert (trained.kind, trained.class_names) == (kind, None)
    assert trained.config == SIZES | {"pool": "cls", "pos_embed": "learned"}
    ours, line = vit(trained)
    assert line == f"{file} ({kind}): 32 tensors taken; head kept"
    assert_same_logits(ours, theirs)


def test_logits_are_those_of_timm_with_mean_pooling_and_without_cls(tmp_path):
    theirs = timms(class_token=False, global_pool="avg", fc_norm=False)
    ours, _ = vit(read_pretrained(saved(tmp_path / "x.pt", theirs.state_dict())))
    assert ours.pool == "mean"
    assert_same_logits(ours, theirs)


def test_torchvision_before_0_14_has_other_names(tmp_path):
    theirs = torchvisions()
    old = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert_same_logits(vit(read_pretrained(saved(tmp_path / "old.pth", old)))[0], theirs)


def test_logits_are_those_of_timms_vit_tiny(tmp_path):
    theirs = randomised(timm.create_model("vit_tiny_patch16_224"))
    trained = read_pretrained(saved(tmp_path / "tiny.safetensors", theirs.state_dict()))
    ours, line = vit(trained, tuple(map(str, range(1000))))
    assert line.endswith(": 152 tensors taken; head kept")
    assert_same_logits(ours, theirs)


@pytest.mark.slow
def test_logits_are_those_of_torchvisions_vit_b_16(tmp_path):
    theirs = randomised(torchvision.models.vit_b_16())
    trained = read_pretrained(saved(tmp_path / "base.pth", theirs.state_dict()))
    assert trained.config["num_heads"] == 12
    ours, _ = vit(trained, tuple(map(str, range(1000))))
    assert_same_logits(ours, theirs)


def test_a_checkpoint_of_ours_brings_heads_positions_and_classes(tmp_path):
    config = {**SIZES, "num_heads": 8, "pool": "mean", "pos_embed": "sincos2d"}
    model = randomised(ViT(**config))
    content = {**torch.load(PRETRAINED, weights_only=True), "model_config": config}
    content |= {"model_state_dict": model.state_dict(), "class_names": CLASSES}
    content |= {"normalization": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    content["calibration"] = {"temperature": 1.0}
    save_checkpoint(tmp_path / "best_model.pt", content)
    trained = read_pretrained(tmp_path / "best_model.pt")
    assert (trained.kind, trained.class_names) == ("this project", CLASSES)
    assert config.items() <= trained.config.items()
    ours, line = vit(trained)
    assert line.endswith("; fixed positions for 4x4; head kept")
    assert torch.equal(ours(images(ours)), model(images(ours)))
    other, line = vit(trained, img_size=48)
    assert line.endswith("; fixed positions for 6x6; head kept")
    assert torch.equal(other.pos_embed, ViT(**{**config, "img_size": 48}).pos_embed)


@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_of_ours_alone_have_the_published_heads(tmp_path, wrapped):
    model = randomised(ViT(depth=1))
    content = {"epoch": 4, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}
    content = {**content, "best_acc": 97.5} if wrapped else model.state_dict()
    trained = read_pretrained(saved(tmp_path / "x.pt", content))
    assert trained.class_names == (tuple("0123456789") if wrapped else None)
    ours, line = vit(trained, tuple("0123456789"))
    assert line == "x.pt (this project): 20 tensors taken; head kept"
    assert torch.equal(ours(images(ours)), model(images(ours)))


def test_heads_are_given_by_hand_where_they_are_not_64_wide(tmp_path):
    theirs = timms(num_heads=8)
    path = saved(tmp_path / "x.pt", theirs.state_dict())
    assert_same_logits(vit(read_pretrained(path, num_heads=8))[0], theirs)
    with pytest.raises(UserError, match="--num_heads 5 does not divide the 128 numbers"):
        read_pretrained(path, num_heads=5)
    narrow = saved(tmp_path / "y.pt", timms(embed_dim=96).state_dict())
    with pytest.raises(
        UserError, match="of 96 numbers are no multiple of the usual 64: give --num"
    ):
        read_pretrained(narrow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    theirs = timms().to(dtype)
    trained = read_pretrained(saved(tmp_path / "x.safetensors", theirs.state_dict()))
    assert {tensor.dtype for tensor in trained.state.values()} == {torch.float32}
    assert_same_logits(vit(trained)[0], theirs.float())


# --------------------------------------------------------------------------- fitting other images


@pytest.fixture
def trained(tmp_path) -> Pretrained:
    return read_pretrained(saved(tmp_path / "vit.pt", timms().state_dict()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 9, 11, 16, 24])
def test_resampled_filters_give_a_larger_patch_the_same_token(side, channels):
    torch.manual_seed(0)
    filters, patches = torch.randn(5, channels, 8, 8), torch.randn(7, channels, 8, 8)
    resized = F.interpolate(patches, (side, side), mode="bilinear", antialias=True)
    expected = torch.einsum("dcij,ncij->nd", filters, patches)
    found = torch.einsum("dcij,ncij->nd", resample_filters(filters, side), resized)
    assert (found - expected).abs().max() < 1e-4


def test_filters_for_smaller_patches_are_flexivits_pseudo_inverse():
    torch.manual_seed(0)
    filters = torch.randn(2, 3, 8, 8)
    basis = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    resized = F.interpolate(basis, (5, 5), mode="bilinear", antialias=True)  # rows: B's columns
    expected = torch.linalg.pinv(resized.view(64, 25)) @ filters.double().flatten(2).mT
    found = resample_filters(filters, 5).flatten(2).mT
    assert (found - expected).abs().max() < 1e-5
    # No other filters of that size come nearer to the same tokens, over all patches.
    products = resized.view(64, 25) @ found.double() - filters.double().flatten(2).mT
    interpolated = F.interpolate(filters, (5, 5), mode="bilinear", antialias=True).flatten(2).mT
    others = resized.view(64, 25) @ interpolated.double() - filters.double().flatten(2).mT
    assert products.square().sum() < others.square().sum()


@pytest.mark.parametrize("cls", [0, 1])
def test_positions_are_resampled_where_they_lie_and_cls_keeps_its_own(cls):
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    places = torch.stack((rows, columns), dim=-1).view(1, 64, 2) + 0.5  # of 8 patches' sides
    positions = torch.cat((torch.full((1, cls, 2), 100.0), places), dim=1)
    assert (resample_positions(positions, 8) - positions).abs().max() < 1e-5
    for side in (4, 16):
        found = resample_positions(positions, side)
        assert torch.equal(found[:, :cls], positions[:, :cls])
        grid = found[0, cls:].view(side, side, 2)
        inner = slice(side // 4, -side // 4)  # outside, the border is repeated
        expected = ((torch.arange(side) + 0.5) * 8 / side)[inner]
        assert (grid[inner, inner, 0] - expected[:, None]).abs().max() < 0.05
        assert (grid[inner, inner, 1] - expected[None]).abs().max() < 0.05


def test_a_grey_picture_gives_the_same_token_in_one_channel_and_in_three():
    filters, patch = torch.randn(5, 3, 8, 8), torch.randn(1, 1, 8, 8)
    token = F.conv2d(patch.expand(-1, 3, -1, -1), filters)
    assert (F.conv2d(patch, adapt_channels(filters, 1)) - token).abs().max() < 1e-4
    again = adapt_channels(adapt_channels(filters, 1), 3)
    assert (F.conv2d(patch.expand(-1, 3, -1, -1), again) - token).abs().max() < 1e-4


def test_what_fits_is_taken_and_what_does_not_is_resampled_and_named(trained):
    ours, line = vit(trained, tuple("xy"), img_size=24, patch_size=4, in_chans=1)
    assert line == (
        "vit.pt (timm): 28 tensors taken; positions 4x4 -> 6x6, patch filters 8 -> 4 pixels, "
        "3 -> 1 channels resampled; head new"
    )
    state = ours.state_dict()
    for name, tensor in trained.state.items():
        if name not in ("pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias"):
            assert torch.equal(state[name], tensor), name
    assert torch.equal(state["pos_embed"], resample_positions(trained.state["pos_embed"], 6))
    filters = adapt_channels(resample_filters(trained.state["patch_embed.proj.weight"], 4), 1)
    assert torch.equal(state["patch_embed.proj.weight"], filters)
    torch.manual_seed(1)
    new = ViT(
        **{**trained.config, "img_size": 24, "patch_size": 4, "in_chans": 1} | {"num_classes": 2}
    )
    assert torch.equal(ours.head.weight, new.head.weight) and not ours.head.bias.any()


def test_larger_images_in_larger_patches_give_nearly_the_same_logits(trained):
    small, _ = vit(trained)
    large, line = vit(trained, img_size=64, patch_size=16)
    assert line.endswith("31 tensors taken; patch filters 8 -> 16 pixels resampled; head kept")
    pictures = images(small)
    pieces = pictures.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, 4, 4, 8, 8): each grows by itself
    grown = F.interpolate(pieces.reshape(-1, 3, 8, 8), (16, 16), mode="bilinear")
    pieces = grown.view(3, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5)
    assert (large(pieces.reshape(3, 3, 64, 64)) - small(pictures)).abs().max() < 1e-4


def test_the_head_is_kept_only_for_the_same_classes(trained, tmp_path):
    assert vit(trained, tuple("tuvwxyz"))[1].endswith("head kept")  # as many; no names to compare
    assert vit(trained, tuple("tuvwxy"))[1].endswith("head new")
    digits = read_pretrained(PRETRAINED)
    assert vit(digits, tuple("0123456789"))[1].endswith("head kept")
    assert vit(digits, tuple("0123456798"))[1].endswith("head new")
    no_head = timms(num_classes=0)
    trained = read_pretrained(saved(tmp_path / "x.pt", no_head.state_dict()))
    assert trained.config["num_classes"] == 0
    assert vit(trained)[1] == "x.pt (timm): 30 tensors taken; head new"


# ----------------------------------------------------------------------------- what is no such file


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "ResNet": (
        lambda: torchvision.models.resnet18().state_dict(),
        r"it has conv1.weight, expected a plain one \(no layer scale, registers, ",
    ),
    "layer scale": (lambda: timms(init_values=0.1).state_dict(), "it has blocks.0.ls1.gamma, "),
    "registers": (lambda: timms(reg_tokens=2).state_dict(), "it has reg_token, expected"),
    "norm after pooling": (
        lambda: timms(global_pool="avg").state_dict(),
        "it has fc_norm.weight, expected",
    ),
    "distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1).state_dict(),
        "it has dist_token, expected",
    ),
    "relative positions": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1).state_dict(),
        "it has blocks.0.",
    ),
    "convolutions before": (
        lambda: {"conv_proj.0.weight": torch.ones(1), **without(torchvisions().state_dict(), "x")},
        "it has conv_proj.0.weight, expected",
    ),
    "no bias": (
        lambda: timms(qkv_bias=False).state_dict(),
        "it has no blocks.0.attn.qkv.bias, which every plain one of timm has",
    ),
    "no block 0": (
        lambda: {n: t for n, t in torchvisions().state_dict().items() if "layer_0" not in n},
        "it has no encoder.layers.encoder_layer_0.ln_1.weight, which",
    ),
    "half a head": (
        lambda: without(torchvisions().state_dict(), "heads.head.bias"),
        "it has no heads.head.bias, which every plain one of torchvision has",
    ),
    "oblong images": (
        lambda: timms(img_size=(32, 64)).state_dict(),
        r"its pos_embed has the shape \(1, 33, 128\), expected \(1, 26, 128\)",
    ),
    "another width": (
        lambda: {**torchvisions().state_dict(), "encoder.ln.bias": torch.ones(64)},
        r"its encoder.ln.bias has the shape \(64,\), expected \(128,\)",
    ),
    "not finite": (
        lambda: {**timms().state_dict(), "norm.bias": torch.full((128,), torch.nan)},
        "its weights are not all numbers between -1e",
    ),
    "whole numbers": (
        lambda: {**timms().state_dict(), "norm.bias": torch.ones(128, dtype=torch.int64)},
        "its norm.bias is not a dense tensor of real numbers",
    ),
    "no tensor": (lambda: {**timms().state_dict(), "norm.bias": [0.0]}, "its norm.bias is no tens"),
    "one number repeated": (
        lambda: {
            **timms(depth=1).state_dict(),
            "blocks.0.mlp.fc1.weight": torch.zeros(1).expand(10**7, 128),
            "blocks.0.mlp.fc1.bias": torch.zeros(1).expand(10**7),
            "blocks.0.mlp.fc2.weight": torch.zeros(1).expand(128, 10**7),
        },
        "its tensors are larger than the file",
    ),
    "pickled model": (timms, "it is refused, since it would call timm.models.vision_transformer"),
    "list": (lambda: [1, 2], "it holds no state dict"),
    "nothing": (dict, "it has no "),
    "numbers for names": (lambda: {1: torch.ones(1)}, "is not a Vision Transformer to start from"),
}


@pytest.mark.parametrize("what", MODELS)
def test_another_model_is_refused_with_the_first_thing_that_is_odd(tmp_path, what):
    make, message = MODELS[what]
    path = tmp_path / "x.pth"
    torch.save(make(), path)
    expected = f"^{path} is not a Vision Transformer to start from: "
    with bounded(), pytest.raises(UserError, match=message) as refused:
        read_pretrained(path)
    assert refused.match(expected) and "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_another_kind_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    whole = saved(path, timms().state_dict()).read_bytes()
    for content in (b"", b"just some text\n" * 50, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"x\{suffix} is not .*damaged, cut off, or in another"
        ):
            read_pretrained(path)
    for odd in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(UserError, match=f"--init_from: {odd} cannot be read: "):
            read_pretrained(odd)


def test_a_damaged_checkpoint_of_ours_is_refused(tmp_path):
    content = bytearray(PRETRAINED.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt is .*damaged"):
        read_pretrained(tmp_path / "x.pt")


def test_without_the_package_safetensors_it_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.safetensors", timms().state_dict())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"pip install safetensors, or save the model as \.pt"):
        read_pretrained(path)


SMALL = {"embed_dim": 64, "depth": 1, "num_heads": 1, "mlp_ratio": 1.0, "in_chans": 1}


@FEW
@given(edits=EDITS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_bytes_give_a_model_or_one_line(tmp_path, suffix, edits):
    path = tmp_path / f"x{suffix}"
    state = timms(**SMALL).state_dict()
    whole = save(state) if suffix == ".safetensors" else saved(path, state).read_bytes()
    path.write_bytes(edited(whole, edits))
    with bounded(memory=200 << 20):
        found = result_or_error(read_pretrained, path)
        if not isinstance(found, str):
            assert vit(found)[0](torch.zeros(1, 1, 32, 32)).isfinite().all()


def test_a_header_of_many_names_costs_little(tmp_path):
    path = tmp_path / "x.safetensors"
    state = {f"blocks.{i}.norm1.bias": torch.zeros(0) for i in range(20_000)}
    path.write_bytes(save(state))
    with bounded(), pytest.raises(UserError, match="is not a Vision Transformer to start from"):
        read_pretrained(path)


def test_a_model_is_read_at_a_few_times_its_size(tmp_path):
    theirs = timms(embed_dim=512, depth=3)  # 33 MB
    for suffix in (".pt", ".safetensors"):
        path = saved(tmp_path / f"x{suffix}", theirs.state_dict())
        with bounded(memory=4 * path.stat().st_size):
            read_pretrained(path)


def test_reading_and_loading_draw_no_random_number(trained, tmp_path):
    model = ViT(**trained.config)
    before = torch.get_rng_state()
    read_pretrained(tmp_path / "vit.pt").load_into(model, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pretrained_model_starts_as_it_is():
    model, _ = load_checkpoint(PRETRAINED)
    ours, line = vit(read_pretrained(PRETRAINED), tuple("0123456789"))
    assert torch.equal(ours(images(ours)), model(images(ours)))
    assert line.startswith("best_model.pt (this project): ")
