"""Images of one's own: a folder with a folder of images for each class."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from data import cache
from data.dataset import SPLIT_SEED, Dataset, Split, pixel_statistics
from data.decode import decode_files
from data.listing import (
    MAX_NAME,
    PARTS,
    Listing,
    list_images,
    list_labelled,
    refuse_unknown,
    some,
)
from data.pictures import stored_size

SHARE = 0.1  # of the images, to validate and to test each, where no folder says which
LARGEST_SIDE = 64  # pixels, that images get unless a flag asks for more
SAMPLE = 500  # headers that are read to guess the side
SHOWN = 5  # names in a note


class Arrangement(NamedTuple):
    """Which files are used for what. Of each listed file:

    Attributes:
        labels: its class's number, int64 (n,).
        hashes: what tells its bytes from others', uint64 (n,); 0 if it isn't used.
        parts: numbers of the files to train, to validate and to test.
        copies: how many images to validate and to test were left out, because an earlier part has
            a copy of each.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    hashes: np.ndarray
    parts: list[np.ndarray]
    copies: list[int]


def load_folder(
    data_dir: str | Path,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
    resize: str = "crop",
    val_split: float | None = None,
    test_split: float | None = None,
    cache_dir: str | Path | None = None,
    keep: bool = True,
) -> Dataset:
    """The images in `data_dir`, in `train/<class>/`, with `val` (or `valid`) and `test` beside it
    or, where one is not there, a share of the training images of each class in its place; or in
    `<class>/`. What is left out of it is told on stderr.

    Each part is ordered by a hash of the files' bytes: classes are mixed, and neither another name
    nor another file changes the order. So when images are added, most stay in their part. The
    prepared images are kept in a cache. Raises UserError if the folder can't be read, or its
    images don't suffice: at least two classes, and an image to train, to validate and to test.

    Args:
        img_size: side of the images in pixels; None: the images' own if all are squares of one size
            of at most 64 that can be cut into 4 to 16 patches a side; else the median of their
            shorter sides, at most 64, rounded down to a multiple of 8.
        in_chans: 1: grey, 3: colour; None: 3 if any image has colour in it.
        resize: "crop", "pad" or "stretch", see `prepare`.
        val_split: share of the images to validate; None: 0.1 if there is no folder of them.
        test_split: the same of those to test.
        cache_dir: where the cache is; None: in `data_dir`.
        keep: write a cache where there is none.
    """
    listing = list_images(data_dir)
    shares = _shares(listing, val_split, test_split)
    _class_names(listing, [True] * len(listing.files))
    how = {"img_size": img_size, "in_chans": in_chans, "resize": resize}
    files = [(file.path, file.size, file.mtime_ns) for file in listing.files]
    place = cache.find_place(listing.folder, cache_dir, [resize, shares, files])
    names = [file.path for file in listing.files]
    cached = cache.load(place, listing.folder, names, img_size, in_chans)
    if cached is None:
        kept = keep and cache.can_write(place)
        cached = _read_all(listing, place if kept else None, shares, how)
    else:
        _tell_refused(listing, cached.answers)
    arrangement = _arrange(listing, cached.answers, shares)
    _tell_left_out(listing, arrangement)
    class_names, labels, hashes, parts, _ = arrangement
    sizes = [len(part) for part in parts]
    if sum(sizes) != len(cached.images):
        raise UserError(f"{place.array} is not of the images in {data_dir}: delete it")
    images = torch.from_numpy(cached.images).split(sizes)
    splits = list(map(Split, images, (torch.from_numpy(labels[part]) for part in parts)))
    name = listing.folder.resolve().name
    return Dataset(
        name if 0 < len(name) <= MAX_NAME and name.isprintable() else "folder",
        class_names,
        *pixel_statistics(splits[0].images),
        *splits,
        source="folder",
        preparation=resize,
        trained_on=_to_tensor(hashes[np.concatenate(parts[:2])]),
        tested_on=_to_tensor(hashes[parts[2]]),
    )


def load_labelled(
    data_dir: str | Path,
    class_names: Sequence[str],
    img_size: int,
    in_chans: int,
    resize: str,
    exclude: Tensor | None = None,
) -> Split:
    """All images of a folder, to score a model on them: those in `test/<class>/` if it has such a
    folder, else in `train/<class>/`, else in `<class>/`. Raises UserError if it can't be read, has
    a class that the model doesn't know, or no image is left.

    Args:
        class_names: what the model knows, in the order of its labels.
        img_size, in_chans, resize: as the model's training images were prepared.
        exclude: images that are left out, as in `Dataset.trained_on`.
    """
    listing = list_labelled(data_dir)
    refuse_unknown(listing, class_names)
    how = {"img_size": img_size, "in_chans": in_chans, "resize": resize}
    with cache.Spool(None) as spool:
        answers, _, _ = _decode(listing, spool, **how)
        images = spool.images(in_chans, img_size, img_size)
    _tell_refused(listing, answers)
    used = [i for i, answer in enumerate(answers) if isinstance(answer, int)]
    labels = np.array([class_names.index(listing.files[i].class_name) for i in used], np.int64)
    hashes = _to_tensor(np.array([answers[i] for i in used], np.uint64))
    new = torch.ones(len(used), dtype=torch.bool)
    if exclude is not None:
        new = ~torch.isin(hashes, exclude)
        if count := int((~new).sum()):
            _note(f"{count} of {_images(len(used))} left out: the model was trained on the same")
    if not new.any():
        raise UserError(f"{data_dir} has no image left to score: name another folder of images")
    new = new.numpy()  # what it chooses is copied, and so may be written to
    return Split(torch.from_numpy(images[new]), torch.from_numpy(labels[new]))


def without_known(dataset: Dataset, earlier: Tensor | None) -> Dataset:
    """A data set for a model that starts from a trained one: without the test images that one was
    trained on, which is told on stderr. Raises UserError if none is left.

    Images to validate stay: those of its own validation are among what it knows, too.

    Args:
        earlier: all images that the model to start from was trained on, as in `Dataset`.
    """
    if earlier is None:
        return dataset
    dataset = replace(dataset, trained_before=earlier)
    if dataset.tested_on is None:  # no folder: its parts are fixed
        return dataset
    new = ~torch.isin(dataset.tested_on, earlier)
    if new.all():
        return dataset
    if not new.any():
        raise UserError(
            f"the model to start from was trained on all images to test of {dataset.name}: give "
            "the --val_split and --test_split that it was trained with, or add images to test"
        )
    count, total = int((~new).sum()), _images(len(new))
    _note(f"{count:,} of {total} to test left out: training began with a model that knew them")
    return replace(dataset, test=dataset.test[new], tested_on=dataset.tested_on[new])


def _to_tensor(hashes: np.ndarray) -> Tensor:
    return torch.from_numpy(hashes.view(np.int64))


# ----------------------------------------------------------------------------------- what for what


def _shares(listing: Listing, *given: float | None) -> list[float]:
    """Shares of the training images that are to validate and to test; 0 where a folder has them."""
    shares = []
    for part, share in zip(PARTS[1:], given, strict=True):
        there = part in listing.classes
        if there and share is not None:
            raise UserError(
                f"--{part}_split {share:g} has no effect: {listing.folder} has a folder of images "
                f"to {WORDS[part]}; leave it out"
            )
        shares.append(0.0 if there else SHARE if share is None else share)
    if sum(shares) >= 1:
        raise UserError(
            f"--val_split and --test_split take {sum(shares):g} of the images, which leaves none "
            "to train: lower them"
        )
    return shares


WORDS = {"train": "train", "val": "validate", "test": "test"}


def _class_names(listing: Listing, used: Sequence[bool]) -> tuple[str, ...]:
    """The classes of the training images. Raises UserError if there are fewer than two, or another
    part has more.

    Args:
        used: of each listed file.
    """
    of_part = {
        part: {
            f.class_name
            for f, use in zip(listing.files, used, strict=True)
            if use and f.part == part
        }
        for part in listing.classes
    }
    names = of_part.pop("train")
    for part, others in of_part.items():
        for name in sorted(others - names):
            raise UserError(
                f"class {name!r} of {listing.folder} has images to {WORDS[part]} but none to "
                "train: add some, or remove that folder"
            )
    if len(names) < 2:
        found = "in no folder of a class" if not listing.files else "none of which can be used"
        found = f"of one class only, {min(names)!r}" if names else found
        raise UserError(
            f"{listing.folder} has images {found}: expected at least two folders with images in "
            f"them, one for each class, right in it or in a folder train"
        )
    return tuple(sorted(names))


def _arrange(listing: Listing, answers: list[int | str], shares: list[float]) -> Arrangement:
    """Say which files are used for what. Raises UserError if there are too few for it.

    Args:
        answers: of each listed file its hash, or why it isn't used.
        shares: of the training images that are to validate and to test.
    """
    used = np.array([isinstance(answer, int) for answer in answers])
    hashes = np.array([a if isinstance(a, int) else 0 for a in answers], np.uint64)
    class_names = _class_names(listing, used)
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = np.array([numbers.get(file.class_name, -1) for file in listing.files], np.int64)
    part_of = np.array([PARTS.index(file.part) for file in listing.files])
    part_of[~used] = -1
    salt = np.random.SeedSequence(SPLIT_SEED).generate_state(1, np.uint64)
    drawn = np.argsort(hashes ^ salt, kind="stable")
    for label in range(len(class_names)):
        members = drawn[(labels[drawn] == label) & (part_of[drawn] == 0)]
        to_val, to_test = _counts(len(members), shares)
        part_of[members[:to_test]] = 2
        part_of[members[to_test : to_test + to_val]] = 1
    # By the hash's other end: the smallest hashes of each class went to validation and test.
    order = np.argsort(hashes.byteswap(), kind="stable")
    parts, copies = [order[part_of[order] == 0]], []
    for number in (1, 2):
        part = order[part_of[order] == number]
        known = np.isin(hashes[part], hashes[np.concatenate(parts)])
        parts.append(part[~known])
        copies.append(int(known.sum()))
    for name, part in zip(PARTS, parts, strict=True):
        if not len(part):
            raise UserError(
                f"{listing.folder} has {_images(int(used.sum()))}, and none is left to "
                f"{WORDS[name]}: add some; of a class with at least 3 images, one each is taken to "
                "validate and to test"
            )
    return Arrangement(class_names, labels, hashes, parts, copies)


def _counts(total: int, shares: list[float]) -> list[int]:
    """How many of a class's images go where: of 3 or more at least one to each, and one stays."""
    counts = [max(round(total * share), int(total >= 3)) if share else 0 for share in shares]
    while sum(counts) >= max(total, 1):
        counts[counts.index(max(counts))] -= 1
    return counts


# ------------------------------------------------------------------------------------------ reading


def _read_all(
    listing: Listing, place: cache.Place | None, shares: list[float], how: Mapping[str, Any]
) -> cache.Cached:
    """Decode all images, into a cache or, without a place for it, into memory."""
    sample = listing.files[:: 1 + len(listing.files) // SAMPLE]
    paths = [listing.folder / file.path for file in sample]
    guess = how["img_size"] or _choose_side([size for size in map(stored_size, paths) if size])
    with cache.Spool(place) as spool:
        answers, sizes, in_chans = _decode(listing, spool, **{**how, "img_size": guess})
        side = how["img_size"] or _choose_side(sizes)
        if side != guess:  # some differ from those that were asked
            answers, sizes, in_chans = _decode(listing, spool, **{**how, "img_size": side})
        _tell_refused(listing, answers)  # now, as these may be why the images don't suffice
        order = np.concatenate(_arrange(listing, answers, shares).parts)
        # In the spool are only the files that are used.
        order = np.cumsum([isinstance(answer, int) for answer in answers])[order] - 1
        images = spool.images(how["in_chans"] or 3, side, side)[:, :in_chans]
        asked = how["img_size"], how["in_chans"]
        if place is None or not cache.save(place, answers, images, order, *asked):
            return cache.Cached(answers, np.ascontiguousarray(images[order]))
    try:
        images = np.lib.format.open_memmap(place.array, mode="c")
    except FileNotFoundError:
        images = None
    if images is None or images.shape != (len(order), in_chans, side, side):
        raise UserError(f"{place.array} was replaced by another run: give each its --cache_dir")
    return cache.Cached(answers, images)


def _decode(
    listing: Listing, spool: cache.Spool, **how: Any
) -> tuple[list[int | str], list[tuple[int, int]], int]:
    """Decode all images into a spool, grey ones with three channels if their number is not given.

    Returns:
        Of each file its hash, or why it isn't used; the pictures' sizes; and how many channels the
        images need.
    """
    spool.clear()
    paths = [os.path.join(listing.folder, file.path) for file in listing.files]
    answers, sizes, in_chans = [], [], how["in_chans"] or 1
    with closing(decode_files(paths, **how)) as pictures:
        about = {"desc": "reading", "unit": "image", "leave": False, "disable": None}
        for picture in tqdm(pictures, total=len(paths), **about):
            if isinstance(picture, str):
                answers.append(picture)
                continue
            answers.append(picture.hash)
            sizes.append(picture.size)
            pixels, channels = picture.pixels, len(picture.pixels)
            in_chans = max(in_chans, channels)
            spool.add(pixels if how["in_chans"] else pixels.repeat(3 // channels, axis=0))
    return answers, sizes, in_chans


def _choose_side(sizes: list[tuple[int, int]]) -> int:
    """The side for images of these sizes, see `load_folder`."""
    if not sizes:
        return LARGEST_SIDE
    width, height = sizes[0]
    fits = any(width % patches == 0 for patches in range(4, 17)) and width <= LARGEST_SIDE
    if fits and width == height and len(set(sizes)) == 1:
        return width
    shorter = min(LARGEST_SIDE, int(np.median([min(size) for size in sizes])))
    return max(8, shorter // 8 * 8)


# -------------------------------------------------------------------------------------------- notes


def _tell_left_out(listing: Listing, arrangement: Arrangement) -> None:
    """Say on stderr which classes and copies are not used."""
    for part, names in listing.classes.items():
        for name in names:
            if name not in arrangement.class_names:
                _note(f"class {name!r} has no image in {part} that can be used: it is left out")
    tested = set(arrangement.labels[arrangement.parts[2]].tolist())
    untested = [name for i, name in enumerate(arrangement.class_names) if i not in tested]
    if untested:
        _note(f"no image to test of: {some(untested, SHOWN)}")
    for name, count in zip(PARTS[1:], arrangement.copies, strict=True):
        if count:
            earlier = "train" if name == "val" else "train or validate"
            _note(f"{_images(count)} to {WORDS[name]} left out: there are the same to {earlier}")


def _tell_refused(listing: Listing, answers: list[int | str]) -> None:
    if listing.others:
        folders = [name for name in listing.others if name.endswith("/")]
        files = [name for name in listing.others if not name.endswith("/")]
        if folders:
            _note(f"left out, folders that are not a class's: {some(folders, SHOWN)}")
        if files:
            phones = any(name.lower().endswith((".heic", ".heif")) for name in files)
            advice = " (save HEIC files as JPEG)" if phones else ""
            _note(f"left out, files that are not images of a class{advice}: {some(files, SHOWN)}")
    pairs = zip(listing.files, answers, strict=True)
    refused = [f"{file.path} {answer}" for file, answer in pairs if isinstance(answer, str)]
    if refused:
        shown = some(refused, SHOWN, "\n  ")
        _note(f"{len(refused)} of {_images(len(answers))} left out:\n  {shown}")


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
