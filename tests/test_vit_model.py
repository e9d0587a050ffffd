"""The network: sizes and names as published, parts that do what their papers say."""

import math
import runpy

import pytest
import torch
from conftest import ROOT, needs_cuda
from torch import nn

import vit_model
from vit_model import (
    Attention,
    Dropout,
    PatchEmbed,
    TransformerBlock,
    ViT,
    count_parameters,
    random_words,
)

BLOCK = {
    "norm1.weight": (96,),
    "norm1.bias": (96,),
    "norm2.weight": (96,),
    "norm2.bias": (96,),
    "attn.in_proj_weight": (288, 96),
    "attn.in_proj_bias": (288,),
    "attn.out_proj.weight": (96, 96),
    "attn.out_proj.bias": (96,),
    "mlp.0.weight": (384, 96),
    "mlp.0.bias": (384,),
    "mlp.3.weight": (96, 384),
    "mlp.3.bias": (96,),
}
PUBLISHED = {
    "cls_token": (1, 1, 96),
    "pos_embed": (1, 17, 96),
    "patch_embed.proj.weight": (96, 1, 7, 7),
    "patch_embed.proj.bias": (96,),
    "norm.weight": (96,),
    "norm.bias": (96,),
    "head.weight": (10, 96),
    "head.bias": (10,),
    **{f"blocks.{i}.{name}": shape for i in range(16) for name, shape in BLOCK.items()},
}


def test_default_network_has_the_published_parameters():
    model = ViT()
    assert count_parameters(model) == 1_797_130
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == PUBLISHED
    model.head.requires_grad_(False)
    assert count_parameters(model) == 1_797_130 - 970


def test_running_the_file_prints_shape_and_count(capsys):
    runpy.run_path(str(ROOT / "src" / "vit_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "(2, 10)" in printed and "1,797,130" in printed


def test_patches_are_projected_one_by_one_in_reading_order():
    embed = PatchEmbed(img_size=28, patch_size=7, in_chans=1, embed_dim=8)
    image = torch.randn(1, 1, 28, 28)
    tokens = embed(image)
    assert tokens.shape == (1, 16, 8) and tokens.is_contiguous()
    patch = image[0, 0, 7:14, 14:21]  # second row, third column: number 6
    expected = embed.proj.weight.view(8, 49) @ patch.flatten() + embed.proj.bias
    torch.testing.assert_close(tokens[0, 6], expected)


def test_attention_equals_pytorchs_with_the_same_weights():
    ours, theirs = Attention(96, 4).eval(), nn.MultiheadAttention(96, 4, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 17, 96)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


@needs_cuda
def test_attention_on_a_gpu_equals_that_on_the_cpu():
    attention, x = Attention(96, 4, dropout=0.1).eval(), torch.randn(3, 17, 96)
    expected = attention(x)
    result = attention.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


def test_block_is_pre_norm_with_two_residuals():
    block = TransformerBlock(48, 4).eval()
    x = torch.randn(2, 17, 48)
    middle = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))
    assert block.norm1.eps == block.norm2.eps == 1e-6
    assert isinstance(block.mlp[1], nn.GELU) and block.mlp[1].approximate == "none"


def test_only_the_cls_token_is_read():
    model = ViT(depth=1).eval()
    seen = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.randn(2, 1, 28, 28))
    assert seen[0].shape == (2, 96)


def test_where_cls_is_read_the_last_block_computes_nothing_else():
    torch.manual_seed(0)
    model = ViT(depth=2, dropout=0.0)
    images, seen = torch.randn(3, 1, 28, 28), []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    ours = model(images)
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    whole = model.head(model.pooled(x))
    torch.testing.assert_close(ours, whole)
    gradients = (
        torch.autograd.grad(out.square().sum(), model.parameters()) for out in (ours, whole)
    )
    torch.testing.assert_close(*gradients)
    assert seen == [(3, 1, 96), (3, 17, 96)]


def test_mean_pooling_averages_the_patches_and_has_no_cls_token():
    torch.manual_seed(0)
    model = ViT(depth=2, pool="mean").eval()
    assert "cls_token" not in model.state_dict() and model.pos_embed.shape == (1, 16, 96)
    x = torch.randn(2, 1, 28, 28)
    tokens = model.patch_embed(x) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model(x), model.head(model.norm(tokens).mean(dim=1)))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_fixed_positions_are_saved_and_not_learned(pool):
    model = ViT(depth=1, pool=pool, pos_embed="sincos2d")
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())
    assert torch.equal(model.pos_embed[:, -16:], vit_model.sincos2d(4, 96))
    if pool == "cls":
        assert not model.pos_embed[:, 0].any()


def test_sincos2d_by_hand():
    fixed = vit_model.sincos2d(side=3, embed_dim=8)
    assert fixed.shape == (1, 9, 8)
    for row in range(3):
        for column in range(3):
            # Frequencies 1 and 1/10,000; first the column's sines and cosines, then the row's.
            expected = [
                f(place * frequency)
                for place in (column, row)
                for f in (math.sin, math.cos)
                for frequency in (1, 1e-4)
            ]
            assert fixed[0, 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_initialisation():
    torch.manual_seed(0)
    model = ViT()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 16 * 3 + 1
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()
    conv = model.patch_embed.proj
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (96 * 49)), rel=0.05)
    assert not conv.bias.any()
    bound = math.sqrt(6 / (96 + 288))  # Xavier uniform, as nn.MultiheadAttention starts
    packed = model.blocks[3].attn.in_proj_weight
    assert bound * 0.99 < packed.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("p", "exact"), [(0.1, 26 / 256), (0.5, 0.5), (0.9, 230 / 256), (0.01, 655 / 65536)]
)
def test_dropout_drops_p_of_the_values_and_scales_the_rest(p, exact):
    torch.manual_seed(0)
    dropout = Dropout(p)
    dropped = torch.stack([dropout(torch.ones(1001, 999)) for _ in range(3)]) == 0
    assert dropped.float().mean().item() == pytest.approx(exact, abs=deviation(dropped))
    # Each value is drawn by itself: its neighbours and the other masks tell nothing about it.
    for other in (dropped[:, 1:], dropped[:, :, 1:], dropped[:, 8:], dropped[1:]):
        same = dropped[: len(other), : other.shape[1], : other.shape[2]] & other
        assert same.float().mean().item() == pytest.approx(exact**2, abs=deviation(same))
    out = dropout(torch.ones(3, 5, 7, dtype=torch.float64))
    assert set(out.unique().tolist()) <= {0.0, 1 / (1 - exact)}


def deviation(values: torch.Tensor) -> float:
    """Four standard deviations of the mean of so many values that are 0 or 1."""
    return 4 * values.float().std().item() / math.sqrt(values.numel())


def test_random_words_are_spread_evenly_and_the_same_with_any_number_of_threads():
    torch.manual_seed(0)
    draws = [random_words(200_000) for _ in range(40)]
    for byte in torch.cat(draws).view(torch.uint8).view(-1, 4).unbind(1):
        counts, expected = byte.long().bincount(minlength=256), len(byte) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        torch.manual_seed(0)
        assert torch.equal(random_words(200_000), draws[0])
    finally:
        torch.set_num_threads(threads)


def test_random_words_around_0_are_no_mirror_image(monkeypatch):
    drawn = torch.tensor([-500, 1], dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *_: self.copy_(drawn))
    assert len(random_words(1000).unique()) == 1000


def test_dropout_is_unbiased_in_bf16_too():
    torch.manual_seed(0)
    x = torch.rand(1000, 1000).add(0.5).bfloat16()
    out = Dropout(0.1)(x).float()
    factor = out.sum() / x.float()[out != 0].sum()
    assert factor.item() == pytest.approx(256 / 230, rel=1e-4)


def test_dropout_repeats_with_the_seed_and_sends_gradients_through_what_it_kept():
    dropout, x = Dropout(0.5), torch.ones(64, 64, requires_grad=True)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    first.sum().backward()
    assert torch.equal(x.grad, first.detach())


def test_the_mlp_equals_its_layers_one_by_one_with_the_same_masks():
    torch.manual_seed(0)
    mlp, x = TransformerBlock(8, 2, dropout=0.3).mlp.double(), torch.randn(4, 5, 8).double()
    x.requires_grad_()

    def in_training(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return mlp(x)

    def layer_by_layer(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        for layer in mlp:
            x = layer(x)
        return x

    results = []
    for function in (in_training, layer_by_layer):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *mlp.parameters()))))
    assert (in_training(x) != mlp.eval()(x)).all()
    mlp.train()
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    assert torch.autograd.gradcheck(in_training, x)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.9999999])
def test_dropout_takes_extreme_p(p):
    assert Dropout(p)(torch.ones(100)).isfinite().all()
    assert torch.equal(Dropout(p).eval()(torch.ones(100)), torch.ones(100))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"patch_size": 5}, "28 is not divisible by patch_size 5"),
        ({"num_heads": 5}, "96 is not divisible by num_heads 5"),
        ({"pool": "max"}, "'max'"),
        ({"pos_embed": "rope"}, "'rope'"),
        ({"pos_embed": "sincos2d", "embed_dim": 6, "num_heads": 1}, "by 4, got 6"),
    ],
)
def test_what_does_not_fit_is_told(arguments, error):
    with pytest.raises(ValueError, match=error):
        ViT(depth=1, **arguments)
    with pytest.raises(ValueError, match="28x28"):
        ViT(depth=1)(torch.zeros(1, 1, 27, 28))


def test_other_sizes_work():
    model = ViT(32, 8, 3, 7, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_patches_are_left_out_in_training_only_and_others_for_each_image(pool):
    torch.manual_seed(0)
    model = ViT(embed_dim=8, depth=1, num_heads=2, dropout=0.0, pool=pool, patch_drop=0.25)
    images, first = torch.randn(50, 1, 28, 28), int(pool == "cls")
    whole = model.eval().embed(images)
    assert whole.shape[1] == 16 + first
    some = model.train().embed(images)
    assert some.shape == (50, 12 + first, 8)
    if first:
        assert torch.equal(some[:, 0], whole[:, 0])
    # Each token that is left is one of the image's own, with its own position, none twice.
    same = (some[:, first:, None] == whole[:, None, first:]).all(dim=-1)  # (50, 12, 16)
    assert torch.equal(same.sum(dim=2), torch.ones(50, 12, dtype=torch.long))
    kept = same.any(dim=1)
    assert torch.equal(kept.sum(dim=1), torch.full((50,), 12))
    assert kept.float().mean(dim=0).min() > 0.5 and len(kept.unique(dim=0)) > 40
    model(images).sum().backward()
