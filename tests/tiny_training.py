"""A network of a few thousand weights and its steps, for the tests of optimizers and schedules."""

import io

import torch
from torch import Tensor, nn

from optim import clip_gradients
from vit_model import ViT

RUN = {"lr": 1e-2, "weight_decay": 1e-2}


def tiny_vit() -> ViT:
    """Always the same."""
    torch.manual_seed(0)
    return ViT(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, dropout=0.0)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """The loss on 16 images of noise, after `backward`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (16,), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(lambda: loss_of(model, seed)).item()
    loss = loss_of(model, seed)
    clip_gradients(optimizer, 1.0)
    optimizer.step()
    return loss.item()


def saved(state: object) -> object:
    """`state` through a file, as the scripts load it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def one_weight(values: list[float], grad: list[float] | None = None) -> nn.Parameter:
    p = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    p.grad = torch.tensor(grad or values, dtype=torch.float64)
    return p
