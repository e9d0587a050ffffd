"""Brings the data set in, as batches, and the metrics out.

MNIST is small: it is read once, kept in memory as bytes on the device that trains, and cut into
whole batches there. No image passes through Python on its own.
"""

import gzip
import hashlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from augment import Augment
from cli import UserError
from distributed import ALONE, World
from files import write_text


class MnistFile(NamedTuple):
    """One of Yann LeCun's four files: MD5 as published (.gz), MD5 unpacked, shape of its array."""

    packed_md5: str
    md5: str
    shape: tuple[int, ...]


MNIST_FILES = {
    "train-images-idx3-ubyte": MnistFile(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb", (60000, 28, 28)
    ),
    "train-labels-idx1-ubyte": MnistFile(
        "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624", (60000,)
    ),
    "t10k-images-idx3-ubyte": MnistFile(
        "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea", (10000, 28, 28)
    ),
    "t10k-labels-idx1-ubyte": MnistFile(
        "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637", (10000,)
    ),
}
MAX_IDX_BYTES = 50_000_000  # the largest file has 47,040,016
SPLIT_SEED = 42  # the split is part of the task, not of the run: `--seed` leaves it alone
DIGITS = tuple("0123456789")
PUBLISHED_AUGMENT = Augment()


@dataclass(frozen=True)
class Split:
    """Images with their classes: uint8 (n, 1, 28, 28) and int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set in memory; `mean` and `std` are of its training pixels scaled to [0, 1]."""

    name: str
    class_names: tuple[str, ...]
    mean: float
    std: float
    train: Split
    val: Split
    test: Split


class DataMissingError(UserError):
    """The data set is neither on this machine nor to be fetched."""


# ------------------------------------------------------------------------------------- data sets


def load_dataset(name: str, data_dir: str | Path = "./mnist") -> Dataset:
    """Load a data set by name: "mnist" or "digits".

    Raises:
        DataMissingError: MNIST is not in `data_dir` and can't be downloaded.
        UserError: a file of it is damaged.
    """
    if name == "mnist":
        return load_mnist(data_dir)
    if name == "digits":
        return load_digits()
    raise UserError(f"data set {name!r} is not known: expected mnist or digits")


def load_mnist(data_dir: str | Path = "./mnist") -> Dataset:
    """MNIST from `<data_dir>/MNIST/raw`, fetched with torchvision if not there: 54,000 / 6,000 /
    10,000 images for training, validation and test.

    Raises:
        DataMissingError, UserError: as `load_dataset`.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    missing = [n for n in MNIST_FILES if not any(map(os.path.exists, _variants(raw, n)))]
    if missing:
        _download_mnist(Path(data_dir), missing)
    train_images, train_labels, test_images, test_labels = (_read_idx(raw, n) for n in MNIST_FILES)
    train, val = _divide(_to_split(train_images, train_labels), 54_000, 6_000)
    test = _to_split(test_images, test_labels)
    return Dataset("mnist", DIGITS, 0.1307, 0.3081, train, val, test)


def load_digits() -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn carries, in MNIST's form: enlarged to
    20x20 in the middle of 28x28. 1,437 / 180 / 180 images; no network is needed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    images, labels = load_sklearn_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)  # 16 grey levels
    pixels = nn.functional.interpolate(pixels, size=20, mode="bicubic", align_corners=False)
    pixels = nn.functional.pad(pixels, (4, 4, 4, 4)).round().clamp(0, 255).byte()
    whole = Split(pixels, torch.from_numpy(labels).long())
    train, val, test = _divide(whole, 1437, 180, 180)
    return Dataset("digits", DIGITS, 0.1593, 0.2986, train, val, test)


def _variants(raw: Path, name: str) -> tuple[Path, Path]:
    return raw / name, raw / f"{name}.gz"


def _download_mnist(data_dir: Path, missing: list[str]) -> None:
    from torchvision.datasets import MNIST

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none: a silent mirror would hang for ever
    raw = data_dir / "MNIST" / "raw"
    made = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        MNIST(data_dir, download=True)
    except Exception as error:  # whatever a mirror, a proxy or the disk comes up with
        with suppress(OSError):  # made before the first byte came; of use only if one did
            for folder in made:
                folder.rmdir()
        needed = ", ".join(f"{name}.gz (MD5 {f.packed_md5})" for name, f in MNIST_FILES.items())
        raise DataMissingError(
            f"MNIST is not in {raw} ({', '.join(missing)} missing) and cannot be downloaded "
            f"({str(error).strip() or type(error).__name__}); put there the four files {needed}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _read_idx(raw: Path, name: str) -> np.ndarray:
    """Read one of MNIST's files, packed or not. Raises UserError if it is damaged."""
    expected = MNIST_FILES[name]
    plain, packed = _variants(raw, name)
    path, md5 = (plain, expected.md5) if os.path.exists(plain) else (packed, expected.packed_md5)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError(None, "it is a folder or a device")
        size = path.stat().st_size
        with open(path, "rb") as file:
            content = file.read(MAX_IDX_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if (found := hashlib.md5(content).hexdigest()) != md5:
        raise UserError(
            f"{path} is damaged: {size} bytes with MD5 {found}, expected MD5 {md5}; "
            "delete it to have it downloaded again, or put a good copy there"
        )
    content = gzip.decompress(content) if path == packed else content
    # IDX: a magic number and one big-endian int32 per axis, then the bytes.
    header = 4 * (1 + len(expected.shape))
    return np.frombuffer(content, np.uint8, offset=header).reshape(expected.shape).copy()


def _to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())


def _divide(split: Split, *sizes: int) -> list[Split]:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return [split[part] for part in order.split(list(sizes))]


# --------------------------------------------------------------------------------------- batches


class BatchLoader:
    """Iterates over (images, labels) batches: float (B, 1, 28, 28), normalised, and int64 (B,).

    Order and augmentation of a batch depend on `seed`, the pass and the batch's number alone, so a
    run repeats exactly, whatever else draws random numbers and however many workers prepare; and it
    can go on from any batch. Of several processes each gets its own part of every batch.

    Args:
        split: the images; batches lie on the device where they lie.
        batch_size: images in a batch; the last may have fewer.
        mean, std: of the training pixels scaled to [0, 1]; subtracted and divided by.
        augment: applied to each batch, scaled to [0, 1], before it is normalised.
        shuffle: draw another order for each pass.
        seed: of order and augmentation.
        num_workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
        world: the processes that share every batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mean: float,
        std: float,
        *,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        shuffle: bool = False,
        seed: int = 42,
        num_workers: int = 0,
        world: World = ALONE,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.mean, self.std = mean, std
        self.augment = augment
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.world = world
        # Passes begun, and batches that the next one leaves out: set to go on where a loader was.
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        skip, self.skip = self.skip, 0
        batches = enumerate(self._order(epoch).split(self.batch_size), 1)
        tasks = ((epoch, number, self.world.rank, batch) for number, batch in batches)
        tasks = islice(tasks, skip, None)
        if self.num_workers == 0:
            yield from (self._batch(*task) for task in tasks)
            return
        with ThreadPoolExecutor(self.num_workers) as pool:
            ahead = deque(
                pool.submit(self._batch, *task) for task in islice(tasks, 2 * self.num_workers)
            )
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self._batch, *task) for task in islice(tasks, 1))
                yield batch

    def numbered(self, first: int, step: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Every `step`th batch from number `first` on, unshuffled, with its number from 0."""
        batches = torch.arange(len(self.split)).split(self.batch_size)
        for i in range(first, len(batches), step):
            yield i, self._batch(0, i + 1, 0, batches[i])

    def batch_of_all(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """What a step's batch was, or will be, in all processes together; both counted from 0."""
        batch = self._order(epoch).split(self.batch_size)[step]
        parts = [self._batch(epoch, step + 1, rank, batch) for rank in range(self.world.size)]
        images, labels = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(labels)

    def size_of(self, step: int) -> int:
        """How many images a step's batch has in all processes together; counted from 0."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.split))
        # Batches are numbered from 1: number 0 is the order's. It is drawn on the CPU: a run that
        # moves to another device in mid-epoch leaves no image out.
        generator = self._generator(epoch, 0, 0, "cpu")
        order = torch.randperm(len(self.split), generator=generator)
        return order.to(self.split.labels.device)

    def _generator(
        self, epoch: int, number: int, rank: int, device: str | torch.device
    ) -> torch.Generator:
        mixed = np.random.SeedSequence((self.seed, epoch, number, rank))
        # 63 bits: what manual_seed takes on every device.
        seed = int(mixed.generate_state(1, np.uint64)[0]) >> 1
        return torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def _batch(self, epoch: int, number: int, rank: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        part = self.split[batch.tensor_split(self.world.size)[rank]]
        images = part.images.float().div_(255)
        if self.augment is not None and len(images):
            generator = self._generator(epoch, number, rank, images.device)
            images = self.augment(images, generator)
        return images.sub_(self.mean).div_(self.std), part.labels


def make_loaders(
    dataset: Dataset,
    batch_size: int = 128,
    num_workers: int = 0,
    *,
    device: str | torch.device = "cpu",
    seed: int = 42,
    train_samples: int | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = PUBLISHED_AUGMENT,
    world: World = ALONE,
) -> tuple[BatchLoader, BatchLoader, BatchLoader]:
    """Loaders of a data set's training, validation and test images, in memory on `device`.

    Training batches are shuffled and augmented, the two others never.

    Args:
        train_samples: train on the first so many images only; None is all of them.
        augment: of the training batches, see `BatchLoader`.
        world: the processes that share the training batches; see `evaluate` for the others.
    """

    def loader(split: Split, size: int, **kwargs) -> BatchLoader:
        return BatchLoader(split.to(device), size, dataset.mean, dataset.std, **kwargs)

    return (
        loader(
            dataset.train[: train_samples or len(dataset.train)],
            batch_size,
            augment=augment,
            shuffle=True,
            seed=seed,
            num_workers=num_workers,
            world=world,
        ),
        loader(dataset.val, 500),  # no gradient is kept: the batch needn't be the training's
        loader(dataset.test, 500),
    )


def get_mnist_loaders(
    data_dir: str | Path = "./mnist", batch_size: int = 128, num_workers: int = 0, **kwargs
) -> tuple[BatchLoader, BatchLoader, BatchLoader]:
    """MNIST's training, validation and test loaders; see `load_mnist` and `make_loaders`."""
    return make_loaders(load_mnist(data_dir), batch_size, num_workers, **kwargs)


# --------------------------------------------------------------------------------------- metrics


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Percentage of samples whose target is among the k highest logits, for each k of `topk`.

    Args:
        output: logits (B, num_classes).
        target: classes (B,).
    """
    hits = _top_hits(output, target, max(topk))
    return [100.0 * hits[:, :k].any(dim=1).float().mean().item() for k in topk]


def _top_hits(output: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether the target is the class of rank 1, 2, ... k: bool (B, k), fewer of fewer classes."""
    ranks = output.topk(min(k, output.shape[1]), dim=1).indices
    return ranks == target.unsqueeze(1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: BatchLoader,
    criterion: nn.Module,
    device: str | torch.device,
    world: World = ALONE,
) -> tuple[float, float, float]:
    """Mean loss, top-1 % and top-5 % over all samples, in fp32 and with dropout off.

    The means are exact: a smaller last batch weighs less. Of several processes each takes whole
    batches in turn, and all get the result that one alone would get.
    """
    training = model.training
    model.eval()
    # A row for each batch, summed at the end, on the device: Python waits for a GPU only there, and
    # the sum has one order, however many processes there are.
    rows = torch.zeros(len(loader), 3, dtype=torch.float64, device=device)
    for i, (images, labels) in loader.numbered(world.rank, world.size):
        logits, labels = model(images.to(device)), labels.to(device)
        hits = _top_hits(logits, labels, 5)
        batch = criterion(logits, labels) * len(labels), 100 * hits[:, 0].sum(), 100 * hits.sum()
        rows[i] = torch.stack([value.double() for value in batch])
    model.train(training)
    loss, top1, top5 = (world.sum(rows).sum(dim=0) / len(loader.split)).tolist()
    return loss, top1, top5


# --------------------------------------------------------------------------------------- TODO.md

TODO_HEADING = "## Training progress"
TODO_HEADER = [
    "| Epoch | State | Train loss | Val top-1 (%) | Best so far | Finished |",
    "|---|---|---|---|---|---|",
]


def reset_todo_md(
    epochs: int,
    todo_path: str | Path = "./TODO.md",
    dataset: str | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Give TODO.md's progress table a row for each epoch of a run; other text stays.

    Args:
        history: rows of history.json, of the epochs that are done; the others are not started.
    """
    before, _, after, newline = _split_todo(todo_path)
    caption = f"Data set: {dataset}"
    if len(before) > 1 and before[-2].startswith("Data set: ") and not before[-1]:
        before = before[:-2]
    rows = [
        _todo_row(n, row["train_loss"], row["val_acc"], row["is_best"], row.get("finished", ""))
        for n, row in enumerate(history, 1)
    ]
    rows += [f"| {n} | not started | | | | |" for n in range(len(rows) + 1, epochs + 1)]
    before += [caption, ""] if dataset else []
    write_text(todo_path, newline.join([*before, *TODO_HEADER, *rows, *after]))


def update_todo_md(
    epoch: int,
    train_loss: float,
    val_acc: float,
    is_best: bool,
    todo_path: str | Path = "./TODO.md",
) -> None:
    """Fill in an epoch's row of TODO.md's progress table, adding the row or table if it is gone."""
    before, rows, after, newline = _split_todo(todo_path)
    row = _todo_row(epoch, train_loss, val_acc, is_best, timestamp())
    same = [i for i, r in enumerate(rows) if r.split("|")[1].strip() == str(epoch)]
    first = same[0] if same else len(rows)
    others = [r for i, r in enumerate(rows) if i > first and i not in same]
    rows = [*rows[:first], row, *others]
    write_text(todo_path, newline.join([*before, *TODO_HEADER, *rows, *after]))


def _todo_row(epoch: int, train_loss: float, val_acc: float, is_best: bool, finished: str) -> str:
    best = "yes" if is_best else "no"
    return f"| {epoch} | done | {train_loss:.4f} | {val_acc:.2f} | {best} | {finished} |"


def timestamp() -> str:
    """The local time, to the second."""
    return datetime.now().isoformat(" ", "seconds")


def _split_todo(todo_path: str | Path) -> tuple[list[str], list[str], list[str], str]:
    """TODO.md's lines before, in (rows only) and after the progress table, and what ends a line."""
    try:
        text = Path(todo_path).read_bytes().decode("utf-8", errors="surrogateescape")
    except FileNotFoundError:
        text = "# TODO\n"
    except OSError as error:
        raise UserError(f"{todo_path} cannot be read: {error.strerror or error}") from None
    newline = "\r\n" if 0 < text.count("\n") == text.count("\r\n") else "\n"
    lines = text.split(newline)
    bare = [line.rstrip("\r") for line in lines]  # where the ends of lines are mixed
    if TODO_HEADER[0] not in bare:
        heading = "" if TODO_HEADING in bare else TODO_HEADING
        return [*lines, heading, ""], [], [""], newline
    start = end = bare.index(TODO_HEADER[0]) + 1
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    ruled = start < end and not bare[start].strip("|-: ")
    return lines[: start - 1], bare[start + ruled : end], lines[end:] or [""], newline
