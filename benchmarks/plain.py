"""The plain way of training the published network on MNIST, which others are measured against.

torchvision's dataset with PIL transforms in a DataLoader, nn.MultiheadAttention and nn.Dropout, in
fp32 or under bf16 autocast, with the augmentation and the optimizer of the `article` recipe.
"""

import report  # finds src

import os
import shutil
from contextlib import suppress
from functools import partial
from itertools import islice
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from common.errors import UserError
from settings import Settings
from vit_model import TransformerBlock, ViT

DEFAULTS = Settings()
ADAMW = {"lr": DEFAULTS.lr, "weight_decay": DEFAULTS.weight_decay}


class PlainBlock(TransformerBlock):
    """The same block of PyTorch's own parts."""

    def __init__(self) -> None:
        super().__init__(dim=96, num_heads=4, dropout=0.1)
        self.attn = nn.MultiheadAttention(96, 4, dropout=0.1, batch_first=True)
        fc1, gelu, _, fc2, _ = self.mlp
        self.mlp = nn.Sequential(fc1, gelu, nn.Dropout(0.1), fc2, nn.Dropout(0.1))

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def plain_model() -> ViT:
    model = ViT()
    model.pos_drop = nn.Dropout(0.1)
    model.blocks = nn.ModuleList(PlainBlock() for _ in range(16))
    return model


def plain_loader(data_dir: str, batch_size: int, num_workers: int) -> DataLoader:
    transform = transforms.Compose(
        [
            transforms.RandomAffine(degrees=7, translate=(0.1, 0.1)),
            transforms.ToTensor(),
            transforms.Normalize((0.1307,), (0.3081,)),
        ]
    )
    # It unpacks the files, and holds the images in memory then: in a folder of its own, for others
    # who read the same files at that moment would find them half unpacked.
    with TemporaryDirectory() as folder:
        shutil.copytree(Path(data_dir, "MNIST"), Path(folder, "MNIST"))
        dataset = datasets.MNIST(folder, train=True, transform=transform, download=True)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=num_workers)


def plain_steps(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: str,
    steps: int,
) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=DEFAULTS.label_smoothing)
    model.train()
    for images, labels in islice(loader, steps):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), DEFAULTS.grad_clip)
        optimizer.step()
        loss.item()  # for the progress bar


def _serve(
    connection: Connection, data_dir: str, batch_size: int, num_workers: int, device: torch.device
) -> None:
    """Take so many steps in a precision whenever both come in, and answer with the seconds."""
    model = plain_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    loader = plain_loader(data_dir, batch_size, num_workers)
    with suppress(EOFError):  # the other process is gone
        while True:
            parts = model, loader, optimizer, device, *connection.recv()
            connection.send(report.seconds(partial(plain_steps, *parts), device))


class PlainWay:
    """A process that trains the plain way: what this project sets in its own doesn't reach it."""

    def __init__(
        self, data_dir: str, device: torch.device, batch_size: int = 128, num_workers: int = 0
    ) -> None:
        self._ours, theirs = Pipe()
        arguments = theirs, data_dir, batch_size, num_workers, device
        # CUDA does not survive a fork.
        self._process = get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
        # libgomp's own, which src/common/startup.py lowers for all that is started from here.
        with patch.dict(os.environ, GOMP_SPINCOUNT="300000"):
            self._process.start()
        theirs.close()  # so that waiting for an answer ends if the process does

    def seconds(self, precision: str, steps: int) -> float:
        """How long so many steps take. Raises UserError if the process has ended."""
        try:
            self._ours.send((precision, steps))
            return self._ours.recv()
        except (EOFError, OSError):
            raise UserError("the process of the plain way ended, see above") from None

    def close(self) -> None:
        self._ours.close()
        self._process.join()
