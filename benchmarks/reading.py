"""Reading a folder of images: the first time, from the cache, and torchvision's way of doing it.

torchvision's is an ImageFolder in a DataLoader, which decodes every image anew in each epoch. All
files are read once before, so that none waits for the disk. Each way has a process of its own.
"""

import report  # finds src

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from common import cli
from common.device import choose_device
from common.errors import UserError
from common.files import read_bytes
from data.folder import load_folder
from data.listing import list_images
from settings import add_flags
from utils import make_loaders


def load(args: argparse.Namespace, cache_dir: str) -> Callable[[], int]:
    """Read the folder; the number of its images."""
    how = {name: getattr(args, name) for name in ("img_size", "in_chans", "resize")}

    def read() -> int:
        dataset = load_folder(args.data_dir, **how, cache_dir=cache_dir)
        return sum(map(len, (dataset.train, dataset.val, dataset.test)))

    return read


def one_pass(args: argparse.Namespace, cache_dir: str) -> Callable[[], int]:
    """All images once, in batches, once the folder is read."""
    how = {name: getattr(args, name) for name in ("img_size", "in_chans", "resize")}
    dataset = load_folder(args.data_dir, **how, cache_dir=cache_dir)
    loaders = make_loaders(
        dataset, args.batch_size, device=choose_device(args.device), augment=None
    )
    return lambda: sum(len(labels) for loader in loaders for _, labels in loader)


def theirs(args: argparse.Namespace, cache_dir: str) -> Callable[[], int]:
    """All images once, in batches, from torchvision's ImageFolder, in the size that ours have."""
    how = {name: getattr(args, name) for name in ("img_size", "in_chans", "resize")}
    side = load_folder(args.data_dir, **how, cache_dir=cache_dir).image_shape[-1]
    transform = transforms.Compose(
        [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    )
    root = Path(args.data_dir)
    parts = [root / part for part in ("train", "val", "valid", "test") if (root / part).is_dir()]

    def read() -> int:
        count = 0
        for part in parts or [root]:
            images = datasets.ImageFolder(str(part), transform)
            for batch, _ in DataLoader(images, args.batch_size, num_workers=args.num_workers):
                count += len(batch)
        return count

    return read


WAYS = {
    "this project, the first time": load,
    "this project, from its cache": load,
    "then a pass over all images": one_pass,
    "torchvision, a pass over all images": theirs,
}


def cpu_seconds() -> float:
    """Of this process and those that it has started and that have ended."""
    return sum(os.times()[:4])


def megabytes(field: str) -> int:
    """Of this process's memory, as Linux calls it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) // 1024


def measure(connection: Connection, way: str, args: argparse.Namespace, cache_dir: str) -> None:
    """Send images, seconds, CPU seconds, and, on Linux, the MB that it takes at its peak."""
    run = WAYS[way](args, cache_dir)
    linux = Path("/proc/self/clear_refs").exists()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        before = megabytes("VmRSS")
    cpu, start = cpu_seconds(), time.perf_counter()
    count = run()
    wall = time.perf_counter() - start
    memory = f"{megabytes('VmHWM') - before:,}" if linux else ""
    connection.send((count, wall, cpu_seconds() - cpu, memory))


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--batch_size", default=128, type=cli.integer(1), help="images in a batch")
    parser.add_argument(
        "--num_workers", default=2, type=cli.integer(0), help="processes of torchvision's way"
    )
    add_flags(parser, ("data_dir", "img_size", "in_chans", "resize", "device"))
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.data_dir is None:
        raise UserError(
            "--data_dir is missing: name a folder with a folder of images for each class"
        )
    for file in list_images(args.data_dir).files:
        read_bytes(Path(args.data_dir, file.path))
    rows = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for way in WAYS:
            ours, child = get_context("spawn").Pipe()
            parts = child, way, args, cache_dir
            process = get_context("spawn").Process(target=measure, args=parts)
            process.start()
            child.close()
            try:
                count, wall, cpu, memory = ours.recv()
            except EOFError:
                raise UserError(f"{way}: its process has ended, see above") from None
            process.join()
            numbers = f"{count:,}", f"{wall:.1f}", f"{cpu:.1f}", f"{count / wall:,.0f}"
            rows.append([way, *numbers, memory])
    report.publish(
        f"Reading a folder of {rows[0][1]} images",
        ["way", "images", "seconds", "CPU seconds", "images/s", "MB more at the peak"],
        rows,
        device=device,
        record=args.record,
        notes="CPU seconds are of all processes; memory is of the first alone.",
    )


if __name__ == "__main__":
    cli.run(main)
