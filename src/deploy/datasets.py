"""What a trained model is scored on: its own data set, or a folder of pictures by class."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.words import words_for
from common.errors import UserError
from data.catalog import NAMED_SETS
from data.dataset import Dataset, Split
from data.folder import load_labelled, without_known
from data.listing import list_labelled, refuse_unknown, some
from data.load import load_dataset
from data.published import has_files
from deploy.digit_image import read_digits
from deploy.picture_files import read_each
from deploy.predict import check_image_shape
from saving.checkpoint import image_shape, known_images

SHOWN = 20  # pictures that are named, of those that can't be read


def load_test_images(
    checkpoint: dict[str, Any], path: str | Path, data_dir: str | None
) -> tuple[str, Split]:
    """The images that a model is scored on, and what their set is called. Raises UserError if they
    can't be had, or don't suit the model.

    Args:
        checkpoint: the model's, which is from `path`.
        data_dir: a folder with a folder of pictures for each class, in its `test`, else `train`,
            else right in it; or where the model's own data set is. Pictures are prepared as
            `predict` does it; those that the model was trained on are left out.
    """
    class_names = checkpoint["class_names"]
    of_folder = checkpoint["source"] == "folder"
    if data_dir is None or not (of_folder or is_labelled(data_dir, checkpoint)):
        dataset = load_own_set(checkpoint, path, data_dir)
        return dataset.name, dataset.test
    name = Path(data_dir).resolve().name
    if checkpoint["preparation"] == "digit":
        return name, _read_labelled_digits(data_dir, checkpoint)
    in_chans, img_size, _ = image_shape(checkpoint)
    how = {"img_size": img_size, "in_chans": in_chans, "resize": checkpoint["preparation"]}
    known = known_images(checkpoint)
    return name, load_labelled(data_dir, class_names, **how, exclude=known)


def load_own_set(
    checkpoint: dict[str, Any], path: str | Path, data_dir: str | None = None
) -> Dataset:
    """The data set that a model was trained on. Raises UserError if it can't be had, or is another
    one.

    Args:
        checkpoint: the model's, which is from `path`.
        data_dir: where the data set is; None: where its table says.
    """
    source, class_names, folder = checkpoint["source"], checkpoint["class_names"], None
    check_image_shape(checkpoint, path)
    if source == "folder":
        if data_dir is None:
            raise UserError(
                f"{path} is of a folder of images: name one with --data_dir, with a folder for "
                f"each of {some(class_names, 10)}"
            )
        in_chans, img_size, _ = image_shape(checkpoint)
        folder = {"img_size": img_size, "in_chans": in_chans, "resize": checkpoint["preparation"]}
        for name in ("val_split", "test_split"):  # as in training, so that the parts are the same
            share = checkpoint["settings"].get(name)
            folder[name] = share if isinstance(share, float) and 0 < share < 1 else None
        folder["keep"] = False  # the cache of training may be elsewhere
    elif data_dir and (row := NAMED_SETS.get(source)) and not has_files(row, data_dir):
        files = f"{row.title} need no files" if row.data_dir is None else f"no file of {row.title}"
        raise UserError(
            f"--data_dir {data_dir} has no folder of pictures for any of {some(class_names, 10)}, "
            f"and {files}: leave it out, or name one that has"
        )
    dataset = load_dataset(source, data_dir, folder)
    found = list(dataset.class_names)
    if len(found) != len(class_names) or (source == "folder" and found != class_names):
        raise UserError(
            f"{path} tells {some(class_names, 10)} apart, but {data_dir or dataset.name} has "
            f"{some(found, 10)}"
        )
    known = checkpoint.get("trained_on")
    if source == "folder" and known is not None and not torch.equal(known, dataset.trained_on):
        raise UserError(f"the images in {data_dir} are not those that {path} was trained on")
    return without_known(dataset, checkpoint.get("trained_before"))


def is_labelled(data_dir: str | Path, checkpoint: dict[str, Any]) -> bool:
    """Whether a folder has folders of pictures by class, of the model's classes or of others where
    the files of its own data set are not.
    """
    try:
        listing = list_labelled(data_dir)
    except UserError:  # whoever reads the data set there says what is wrong
        return False
    named = NAMED_SETS.get(checkpoint["source"])
    is_own = named is not None and has_files(named, data_dir)
    known = not set(listing.classes["test"]).isdisjoint(checkpoint["class_names"])
    return known or (bool(listing.files) and not is_own)


def _read_labelled_digits(data_dir: str | Path, checkpoint: dict[str, Any]) -> Split:
    """The pictures of a labelled folder, each of one digit, as the digit reader brings them to
    MNIST's form. Raises UserError if none can be read, or one is of another class.
    """
    class_names, words = checkpoint["class_names"], words_for(checkpoint)
    listing = list_labelled(data_dir)
    refuse_unknown(listing, class_names)
    files = listing.files
    read = partial(read_digits, single=True, things=words.many)
    readings = list(read_each([str(Path(data_dir, file.path)) for file in files], read))
    errors = [str(reading) for reading in readings if isinstance(reading, UserError)]
    for error in errors[:SHOWN]:
        print(f"note: {error}; it is left out", file=sys.stderr)
    if len(errors) > SHOWN:
        print(f"note: {len(errors) - SHOWN} more are left out", file=sys.stderr)
    found = [
        (reading.digits[0].pixels, class_names.index(file.class_name))
        for file, reading in zip(files, readings, strict=True)
        if not isinstance(reading, UserError)
    ]
    if not found:
        raise UserError(f"{data_dir} has no picture of a {words.one} that can be read")
    pixels, labels = zip(*found, strict=True)
    return Split(torch.from_numpy(np.stack(pixels)).unsqueeze(1), torch.tensor(labels))
