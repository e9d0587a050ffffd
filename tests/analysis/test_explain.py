"""The numbers behind the pictures: attention, rollout, scores by class, reliability, embeddings."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from analysis import explain
from data.digits import load_digits
from utils import BatchLoader
from vit_model import ViT

KINDS = {
    "cls": {"pool": "cls", "pos_embed": "learned"},
    "mean": {"pool": "mean", "pos_embed": "sincos2d"},
}


@pytest.fixture(params=KINDS)
def model(request) -> ViT:
    """Small, with weights large enough for attention that is far from uniform."""
    torch.manual_seed(0)
    model = ViT(depth=3, embed_dim=24, num_heads=4, patch_size=7, **KINDS[request.param])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.in_proj_weight.mul_(3)
            block.attn.in_proj_bias.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return next(iter(BatchLoader(load_digits().test, 8, 0.1593, 0.2986)))[0]


def test_attention_weights_are_those_of_multihead_attention_called_by_hand(model, images):
    found = explain.attention_weights(model, images)
    tokens = 16 + (model.pool == "cls")
    assert found.shape == (8, 3, 4, tokens, tokens) and found.dtype == torch.float32
    assert torch.allclose(found.sum(dim=-1), torch.ones(()), atol=1e-6)
    assert found.max() > 0.5  # not the near-uniform weights that any formula would give

    model.eval()
    inputs = []  # what each block's attention really reads in a forward pass
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(images)
        for layer, (block, x) in enumerate(zip(model.blocks, inputs, strict=True)):
            reference = nn.MultiheadAttention(24, 4, batch_first=True).eval()
            reference.load_state_dict(block.attn.state_dict())
            _, expected = reference(x, x, x, need_weights=True, average_attn_weights=False)
            assert torch.allclose(found[:, layer], expected, atol=1e-6)


def test_asking_for_attention_and_outputs_leaves_the_model_as_it_was(model, images):
    torch.manual_seed(1)
    with torch.no_grad():
        before = model(images)
    explain.attention_weights(model, images)
    explain.outputs(model, BatchLoader(load_digits().test[:9], 5, 0.0, 1.0))
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rollout_is_the_papers_formula(model, images):
    attention = explain.attention_weights(model, images)
    found = explain.rollout(attention).numpy()
    tokens = attention.shape[-1]
    for image, weights in enumerate(attention.double().numpy()):
        expected = np.eye(tokens)
        for layer in weights:  # from the first block on
            residual = 0.5 * sum(layer) / len(layer) + 0.5 * np.eye(tokens)
            expected = (residual / residual.sum(axis=1, keepdims=True)) @ expected
        np.testing.assert_allclose(found[image], expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


def test_a_patch_map_is_what_the_head_reads_of_each_patch(model, images):
    attention = explain.attention_weights(model, images)
    maps = explain.patch_map(attention, model)
    assert maps.shape == (8, 3, 4, 4, 4)
    assert explain.patch_map(explain.rollout(attention), model).shape == (8, 4, 4)
    one = attention[5, 2, 1]
    if model.pool == "cls":  # the patch in row 2, column 3 is number 11, after CLS
        assert maps[5, 2, 1, 2, 3] == one[0, 1 + 11]
    else:
        assert maps[5, 2, 1, 2, 3] == pytest.approx(one[:, 11].mean().item())
        assert maps[5, 2, 1].sum() == pytest.approx(1, abs=1e-5)


def test_outputs_are_the_models_own_on_every_image(model):
    test = load_digits().test
    outputs = explain.outputs(model, BatchLoader(test, 50, 0.1593, 0.2986))
    with torch.no_grad():
        logits = model.eval()((test.images / 255 - 0.1593) / 0.2986)
        from_features = model.head(torch.from_numpy(outputs.features))
    np.testing.assert_allclose(outputs.probabilities, logits.softmax(1).numpy(), atol=1e-6)
    np.testing.assert_allclose(outputs.logits, from_features, atol=1e-6)
    assert outputs.labels.tolist() == test.labels.tolist()
    assert outputs.correct.sum() == (logits.argmax(1) == test.labels).sum()


def test_scores_by_class_of_a_case_by_hand():
    labels, predicted = np.array([0, 0, 0, 1, 1, 4]), np.array([0, 0, 1, 1, 2, 0])
    logits = np.eye(5, dtype=np.float32)[predicted]
    outputs = explain.Outputs(features=logits, logits=logits, labels=labels)
    assert outputs.confusion.tolist() == [
        [2, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],  # never there, and predicted once
        [0, 0, 0, 0, 0],  # neither
        [1, 0, 0, 0, 0],  # there once, and never predicted
    ]
    nan = np.nan  # no image of the class, or none that was taken for it
    expected = [[2 / 3, 2 / 3, 2 / 3], [1 / 2, 1 / 2, 1 / 2], [0, nan, 0], [nan] * 3, [nan, 0, 0]]
    np.testing.assert_allclose(outputs.class_scores, expected)
    skewed = explain.Outputs(logits, logits, np.array([0, 0, 1, 1, 1, 1]))
    np.testing.assert_allclose(skewed.class_scores[0], [2 / 3, 1, 4 / 5])  # precision, recall, F1


def test_reliability_of_a_case_by_hand():
    confidence = np.array([0.55, 0.6, 0.8, 0.9, 0.95, 1.0])
    correct = np.array([True, False, True, True, False, True])
    found = explain.reliability(confidence, correct, bins=5)
    # ]0.4, 0.6]: 0.55 right, 0.6 wrong.  ]0.6, 0.8]: 0.8 right.  ]0.8, 1]: two of three right.
    assert found.counts.tolist() == [0, 0, 2, 1, 3]
    np.testing.assert_allclose(found.confidence, [0, 0, 0.575, 0.8, 0.95])
    np.testing.assert_allclose(found.accuracy, [0, 0, 0.5, 1, 2 / 3])
    by_hand = (2 * 0.075 + 1 * 0.2 + 3 * (0.95 - 2 / 3)) / 6
    assert found.expected_error == pytest.approx(by_hand)
    always_right = explain.reliability(np.ones(10), np.ones(10, bool))
    assert len(always_right.counts) == 15 and always_right.expected_error == 0
    assert explain.reliability(np.zeros(4), np.zeros(4, bool)).counts[0] == 4


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (3, 7), (9897, 10_000), (5, 5)])
def test_the_interval_of_an_accuracy_is_wilsons(correct, count):
    z, p = 1.959964, correct / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    expected = (middle - half, middle + half)
    assert explain.accuracy_interval(correct, count) == pytest.approx(expected, abs=1e-6)


def test_position_similarity_is_the_cosine_between_patches(model):
    found = explain.position_similarity(model)
    assert found.shape == (4, 4, 4, 4)
    vectors = model.pos_embed[0, -16:].detach().numpy()  # without CLS
    a, b = vectors[6], vectors[11]  # row 1, column 2 and row 2, column 3
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found[1, 2, 2, 3] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(found.reshape(16, 16).diagonal(), 1, atol=1e-6)


def test_filter_components_are_the_principal_ones_of_the_filters():
    model = ViT(depth=1, embed_dim=24, patch_size=7)
    components, shares = explain.filter_components(model, 5)
    reference = PCA(5).fit(model.patch_embed.proj.weight.detach().numpy().reshape(24, 49))
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-4)
    cosines = (components.reshape(5, 49) * reference.components_).sum(axis=1)  # the sign is free
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)


def test_filter_components_are_of_all_channels():
    model = ViT(depth=1, embed_dim=24, patch_size=4, img_size=16, in_chans=3)
    components, shares = explain.filter_components(model, 5)
    assert components.shape == (5, 3, 4, 4)
    reference = PCA(5).fit(model.patch_embed.proj.weight.detach().numpy().reshape(24, 48))
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-4)


def test_projections_keep_classes_apart_and_repeat():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(60, 8)) + 20 * np.repeat(np.eye(3, 8), 20, axis=0)
    maps, again = explain.project(vectors, seed=3), explain.project(vectors, seed=3)
    for name, points in maps.items():
        groups = points.reshape(3, 20, 2)
        centres = groups.mean(axis=1, keepdims=True)
        spread = np.abs(groups - centres).max()
        assert min(np.linalg.norm(centres[i] - centres[i - 1]) for i in range(3)) > spread, name
        assert np.array_equal(again[name], points), name
    for points in explain.project(np.ones((60, 8))).values():  # a network that tells nothing apart
        assert points.shape == (60, 2) and not points.any()
