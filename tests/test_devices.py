"""Every tensor on the device that computes, seen without a GPU: on fake ones, which have a
device, a type and a shape, but no values.

The backward pass would need a GPU. The tests marked needs_cuda have one.
"""

from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
import train
import utils
from analysis import confidence
from data import mix
from data.augment import Augment
from data.dataset import Dataset, Split
from data.rand_augment import COLOURS, move
from training import epoch_sums
from training.epoch_sums import EpochSums
from utils import Batch
from vit_model import ViT

STRENGTHS = {"scale": 0.1, "shear": 10.0, "elastic": 0.6, "erase": 0.2, "hflip": 0.5}
STRENGTHS |= {"random_crop": 4, "color_jitter": 0.4}
IMAGES = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
SPLIT = Split(IMAGES, torch.arange(40) % 10)
DATASET = Dataset("photos", tuple("abcdefghij"), (0.5,) * 3, (0.2,) * 3, *[SPLIT] * 3, "", "crop")


class NoFloat64(TorchDispatchMode):
    """Refuses what an Apple GPU lacks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                assert tensor.dtype != torch.float64, func
        return result


@pytest.fixture
def model(monkeypatch):
    """A small network on a GPU without float64. Tensors have no values: a number of one is 0."""
    for module in (utils, epoch_sums):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    generator = utils.BatchLoader._generator
    on_cpu = partialmethod(lambda *args: generator(*args[:-1], "cpu"))
    monkeypatch.setattr(utils.BatchLoader, "_generator", on_cpu)
    monkeypatch.setattr(mix, "draw_share", lambda alpha: 0.7)
    monkeypatch.setattr(mix, "draw_rectangle", lambda *_: (slice(4), slice(4), 0.9))
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [0.0] * len(self))
    monkeypatch.setattr(Tensor, "__bool__", lambda self: False)
    monkeypatch.setattr(Tensor, "backward", lambda self: None)
    model = ViT(16, 4, 3, embed_dim=16, depth=2, num_heads=2, pos_embed="sincos2d", patch_drop=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        for module in model.modules():  # fakes can't be moved by `to`
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(p, device="cuda")))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cuda"))
        yield model


def test_all_changes_of_images_stay_on_the_gpu(model):
    device = model.pos_embed.device
    loader, _, _ = utils.make_loaders(DATASET, 16, device=device, augment=Augment(**STRENGTHS))
    images, labels = next(iter(loader))
    assert images.device == labels.device == device and images.shape == (16, 3, 16, 16)
    strength, which = torch.rand(16, device=device), torch.zeros(16, device=device)
    for change in COLOURS.values():
        assert change(images, strength).device == device
    assert move(images, which, strength).device == device


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_training_step_stays_on_the_gpu(model, monkeypatch, optimizer):
    device = model.pos_embed.device
    loader, _, _ = utils.make_loaders(DATASET, 16, device=device)
    monkeypatch.setattr(optim, "_rehearse", lambda *_: None)  # a backward pass
    steps = optim.build_optimizer(optimizer, model, lr=1e-3, weight_decay=0.1)
    sums = EpochSums.zeros(steps, device)
    criterion = nn.CrossEntropyLoss(torch.ones(10, device=device), reduction="sum")
    images, labels = next(iter(loader))
    batch = mix.Mix(10, mixup=0.2, cutmix=1.0)(Batch(images, labels, labels, 16))
    loss, hits = train.forward_backward(model, criterion, steps, batch, grad_accum_steps=2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    grad_norm = optim.clip_gradients(steps, 1.0)
    steps.step()
    sums.add_images(batch, loss, hits, grad_norm)
    sums.note(torch.isfinite(loss) & torch.isfinite(grad_norm))
    numbers = loss, hits, grad_norm, sums.loss_and_hits, sums.first_bad
    assert {number.device for number in numbers} == {device}


def test_evaluation_stays_on_the_gpu(model):
    device = model.pos_embed.device
    _, loader, _ = utils.make_loaders(DATASET, device=device)
    model.eval()
    metrics = utils.evaluate(model, loader, nn.CrossEntropyLoss(), device)
    assert metrics == (0.0, 0.0, 0.0)
    read = confidence.read(model, loader.split.images.float())
    assert {result.device for result in read} == {device}
