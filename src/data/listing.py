"""What a folder of images has in it, by the names alone."""

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.text import composed, printable
from data.pictures import has_image_name

PARTS = ("train", "val", "test")
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "test": "test"}  # of folders
MAX_NAME = 100  # characters of a class's name; a checkpoint takes no longer ones
# Left by systems in any folder; so are hidden files, such as .DS_Store.
LITTER = {"__macosx", "thumbs.db", "desktop.ini"}
LITTER |= {"lost+found", "system volume information", "$recycle.bin"}  # in the root of a volume


class ImageFile(NamedTuple):
    """A file that its name calls an image."""

    path: str  # from the folder on, with "/"
    part: str  # one of PARTS
    class_name: str  # see `composed`
    size: int  # bytes
    mtime_ns: int


@dataclass
class Listing:
    """The images of a folder: of each part, of each class, in the order of their names."""

    folder: Path
    files: list[ImageFile] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)  # of each part that there is
    others: list[str] = field(default_factory=list)  # paths of what is no image of a class


def list_images(folder: str | Path) -> Listing:
    """The parts of a folder: its train, val (or valid) and test with a folder for each class in
    them; or one part, "train", whose classes are right in it. Raises UserError if it can't be read,
    has both val and valid, no classes in train, classes both right in it and in val or test, or a
    class name that can't be printed.
    """
    listing = Listing(Path(folder))
    inside, files = _look_into(listing.folder)
    parts = _with_classes(listing.folder, inside, PART_NAMES)
    if "train" not in parts:
        _add_part(listing, "train", "")
        mistaken = {file.class_name for file in listing.files} & PART_NAMES.keys()
        # A train beside other classes may be a vehicle.
        if mistaken - {"train"} or (mistaken and set(inside) <= PART_NAMES.keys()):
            raise UserError(
                f"{folder} has images right in its {', '.join(sorted(mistaken))}: expected a "
                "folder for each class there"
            )
        if parts and listing.files:
            raise UserError(
                f"{folder} has folders of classes right in it and in its {', '.join(parts)}: move "
                "the former into a folder named train"
            )
        return listing
    if "val" in inside and "valid" in inside:
        raise UserError(f"{folder} has both val and valid: rename one of them")
    for name in parts:
        _add_part(listing, PART_NAMES[name], f"{name}/")
    listing.others += [*files, *(f"{name}/" for name in inside if name not in parts)]
    return listing


def list_labelled(folder: str | Path) -> Listing:
    """One part, "test": what is to be scored of a folder, its test, or else its train, or else the
    classes right in it. Raises UserError as `list_images`.
    """
    listing = Listing(Path(folder))
    inside, _ = _look_into(listing.folder)
    parts = _with_classes(listing.folder, inside, ("test", "train"))
    _add_part(listing, "test", f"{parts[0]}/" if parts else "")
    return listing


def _with_classes(folder: Path, inside: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that are folders with folders in them; `inside` are all folders there."""
    return [name for name in names if name in inside and _look_into(folder / name)[0]]


def _add_part(listing: Listing, part: str, prefix: str) -> None:
    """Add the classes in the folder's `prefix`, a path that ends with "/" or is empty."""
    root = listing.folder / prefix
    inside, loose = _look_into(root)
    listing.classes[part] = sorted(set(map(composed, inside)))
    listing.others += [prefix + name for name in loose]
    for class_name in inside:
        if len(class_name) > MAX_NAME or not class_name.isprintable():
            raise UserError(
                f"the folder {class_name!r} in {root} cannot name a class: rename it, with at most "
                f"{MAX_NAME} printable characters"
            )
        folders, files = _look_into(root / class_name)
        path = f"{prefix}{class_name}/"
        listing.others += [f"{path}{name}/" for name in folders]
        for name, about in files.items():
            if about is None or not has_image_name(name):
                listing.others.append(path + name)
                continue
            facts = about.st_size, about.st_mtime_ns
            listing.files.append(ImageFile(path + name, part, composed(class_name), *facts))


def _look_into(path: Path) -> tuple[list[str], dict[str, os.stat_result | None]]:
    """The folders in a folder and, by name, all else that isn't hidden: None if it is no file.
    Raises UserError if it can't be read.
    """
    folders, files = [], {}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in LITTER:
                    continue
                about = None
                with suppress(OSError):  # a link to nothing, or to itself
                    about = entry.stat()
                if about and stat.S_ISDIR(about.st_mode):
                    folders.append(entry.name)
                else:  # a pipe or a device may never end
                    is_file = about and stat.S_ISREG(about.st_mode)
                    files[entry.name] = about if is_file else None
    except FileNotFoundError:
        raise UserError(f"there is no folder {path}: name the one that has your images") from None
    except NotADirectoryError:
        raise UserError(f"{path} is no folder: name the one that has your images") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return sorted(folders), dict(sorted(files.items()))


def refuse_unknown(listing: Listing, class_names: Sequence[str]) -> None:
    """Raise UserError if images are of a class that a model doesn't know."""
    for name in sorted({file.class_name for file in listing.files} - set(class_names)):
        raise UserError(
            f"{listing.folder} has images of a class {name!r}, which the model doesn't know: it "
            f"knows {some(class_names, 20)}; rename or remove that folder"
        )


def some(names: Sequence[str], count: int, between: str = ", ") -> str:
    """The first names, and how many more there are, without codes that control a terminal."""
    shown = [printable(name) for name in names[:count]]
    if len(names) > count:
        shown.append(f"and {len(names) - count} more")
    return between.join(shown)
