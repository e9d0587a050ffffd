"""A folder of pictures is a data set: what is odd is named, what is used is known, files are read
once."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_error_line, history, launch, posix, read
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, VERY_FEW, bounded, edited
from picture_folders import CLASSES, draw_odd_folder, draw_shapes
from PIL import Image

import inference
import train
from common.distributed import World
from common.errors import UserError
from data import cache, decode
from data.dataset import Dataset, Split
from data.folder import load_folder, load_labelled
from data.load import load_on_all_processes
from data.pictures import prepare, read_picture
from training.resolve import check_data_flags

TRAIN = "--device cpu --dataset folder --depth 1 --embed_dim 16 --num_heads 2".split()


def file_hash(path: Path) -> int:
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sizes(data: Dataset) -> list[int]:
    return [len(part) for part in (data.train, data.val, data.test)]


def same_images(a: Dataset, b: Dataset) -> bool:
    pairs = ((getattr(a, part), getattr(b, part)) for part in ("train", "val", "test"))
    same = all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs
    )
    return same and torch.equal(a.trained_on, b.trained_on)


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if "vit-cache" in path.name)


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Six pictures of each of three classes."""
    return draw_shapes(tmp_path / "shapes")


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    return draw_odd_folder(tmp_path_factory.mktemp("odd") / "pictures")


# ----------------------------------------------------------------------------------- from the flags


def test_a_folder_of_odd_pictures_is_trained_on_and_resumed_with_the_same(
    complete, run, odd, tmp_path
):
    folder = Path(shutil.copytree(odd, tmp_path / "my shapes"))
    flags = [*TRAIN, "--data_dir", folder]
    result = complete(*flags, "--epochs", 6, "--batch_size", 16, "--lr", 4e-3)
    damaged = "cannot be read: damaged, or none of PNG"
    for line in (
        "note: left out, files that are not images of a class: empty/README.txt",
        "note: 3 of 300 images left out:",
        f"  cross/cut.jpg {damaged}",
        f"  disc/text.png {damaged}",
        "  square/dot.png is too small: 1x1 pixels, expected at least 2 a side",
        "note: class 'empty' has no image in train that can be used: it is left out",
    ):
        assert f"{line}\n" in result.err or f"{line}, " in result.err
    assert "data:     my shapes, 237 / 30 / 30 images" in result.out
    assert "__MACOSX" not in result.err and ".DS_Store" not in result.err
    about = read("checkpoints/best_model.pt")
    assert about["class_names"] == list(CLASSES) and about["dataset"] == "my shapes"
    assert about["preparation"] == "crop" and about["source"] == "folder"
    assert about["model_config"]["in_chans"] == 3 and about["model_config"]["img_size"] == 64
    assert history()["test"]["top1"] > 50  # of three classes

    assert "\nEpoch  7/7 " in complete("--resume", "--epochs", 7).out
    (folder / "disc" / "0.png").rename(folder / "disc" / "another name.png")
    complete("--resume", "--epochs", 8)  # the same pictures
    (folder / "disc").rename(folder / "zdisc")  # the last of the classes now
    for gone in (None, folder / "disc" / "2.png"):
        if gone:
            (folder / "zdisc").rename(folder / "disc")
            gone.unlink()
        result = run(train.main, "--resume", "--epochs", 9)
        assert result.status == 2
        *notes, last = result.err.splitlines()
        assert last.startswith("error: the images in my shapes are not those that the run in ")
        assert any(note.startswith("note: the cache in ") for note in notes)


def test_a_run_of_one_epoch_goes_on_with_its_cache_and_its_split_is_known(complete, run, tmp_path):
    folder = draw_shapes(tmp_path / "shapes", count=20)
    flags = "--recipe cifar --epochs 1 --batch_size 6 --val_split 0.2 --test_split 0.3".split()
    flags += ["--ema_decay", 0.995]
    result = complete(*TRAIN, *flags, "--data_dir", folder, "--cache_dir", ".")
    assert "note: 98% of the averaged weights" in result.err  # 0.995^5
    result = complete("--resume", "--epochs", 2)
    assert "reading" not in result.err and not caches(folder)
    infer = ("--mode", "onnx", "--data_dir", folder)
    result = run(inference.main, *infer)
    assert result.status == 0 and "not measured" not in result.err, result.err
    assert not caches(folder)  # nor does an export leave one
    (folder / "disc" / "0.png").unlink()
    result = run(inference.main, *infer)
    assert "nothing is measured on validation images: the images in" in result.err


def test_the_model_of_a_run_with_other_images_or_flags_of_the_folder_is_kept(complete, shapes):
    flags = [*TRAIN, "--data_dir", shapes, "--epochs", 1]
    complete(*flags, "--img_size", 16, "--resize", "pad")
    assert "kept: " in complete(*flags, "--img_size", 16).out
    assert "kept: " in complete(*flags, "--img_size", 24).out
    assert "kept: " in complete(*flags, "--img_size", 24, "--in_chans", 1).out
    assert "kept: " not in complete(*flags, "--img_size", 24, "--in_chans", 1).out
    (shapes / "disc" / "0.png").unlink()
    assert "kept: " in complete(*flags, "--img_size", 24, "--in_chans", 1).out
    assert len(list(Path("checkpoints").glob("*/best_model.pt"))) == 4


def test_what_a_model_to_start_from_was_trained_on_is_never_tested_on(complete, run, tmp_path):
    folder = draw_shapes(tmp_path / "shapes", count=20)
    flags = [*TRAIN, "--data_dir", folder, "--epochs"]
    complete(*flags, 1, "--save_dir", "earlier")
    start = ["--init_from", "earlier/best_model.pt"]
    told = "note: 18 of 24 images to test left out: training began with a model that knew them\n"
    result = complete(*flags, 1, *start, "--test_split", 0.4)
    assert told in result.err and " 30 / 6 / 6 images " in result.out
    ours, theirs = read("checkpoints/best_model.pt"), read("earlier/best_model.pt")
    assert torch.equal(theirs["trained_on"], ours["trained_before"])
    assert told in complete("--resume", "--epochs", 2).err
    result = run(inference.main, "--mode", "evaluate", "--data_dir", folder, "--device", "cpu")
    assert "note: 54 of 60 images left out: the model was trained on the same\n" in result.err
    scored = json.loads(Path("outputs/evaluation.json").read_text())
    assert scored["images"] == 6 and scored["data_dir"] == str(folder)
    # Another folder's evaluation keeps this one.
    other = draw_shapes(tmp_path / "other", count=2, seed=5)
    run(inference.main, "--mode", "evaluate", "--data_dir", other, "--device", "cpu")
    assert json.loads(Path("outputs/evaluation.1.json").read_text()) == scored
    # A start from a start knows the first one's images, too, over other data and another format.
    between = [*TRAIN, "--dataset", "digits", "--epochs", 1, "--train_samples", 50, *start]
    complete(*between, "--save_dir", "between")
    complete("--resume", "between", "--epochs", 2)
    export = ("--mode", "safetensors", "--checkpoint", "between/best_model.pt")
    assert run(inference.main, *export, "--output", "between.safetensors").status == 0
    again = ["--init_from", "between.safetensors", "--save_dir", "again"]
    assert told in complete(*flags, 1, *again, "--test_split", 0.4).err
    # With the same parts nothing needs to be left out; where nothing is left, it is said.
    assert "to test left out" not in complete(*flags, 1, *start, "--save_dir", "same").err
    for path in folder.glob("*/*.png"):
        if file_hash(path) not in theirs["trained_on"].tolist():
            path.unlink()
    result = run(train.main, *flags, 1, *start, "--save_dir", "none")
    assert result.status == 2 and "was trained on all images to test of shapes" in result.err


def test_each_odd_picture_is_used_as_what_it_shows(odd):
    data = load_folder(odd, cache_dir=odd.parent)
    hashes = dict(
        zip(data.trained_on.tolist(), [*data.train.images, *data.val.images], strict=True)
    )
    disc = {path.name: file_hash(path) for path in (odd / "disc").iterdir() if path.is_file()}
    found = [name for name, known in disc.items() if known in hashes]
    labels = torch.cat((data.train.labels, data.val.labels, data.test.labels))
    assert labels.bincount().tolist() == [97, 103, 97]  # six odd ones beside 97
    for name in found:
        picture, _ = read_picture(odd / "disc" / name, name, decode.DRAFT * 64)
        assert np.array_equal(hashes[disc[name]], prepare(picture, 64, 3, "crop")), name
    assert len(set(found) & {"deep.png", "alpha.png", "cmyk.jpg", "palette.gif", "grey.bmp"}) >= 3


@pytest.mark.slow
def test_several_processes_share_one_cache(shapes, folder):
    folder("run")
    process = launch(2, *TRAIN, "--data_dir", shapes, "--epochs", 1)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "shapes, 12 / 3 / 3 images" in out and len(caches(shapes)) == 2
    written = [path.stat().st_mtime_ns for path in caches(shapes)]
    process = launch(2, "--resume", "--epochs", 2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert written == [path.stat().st_mtime_ns for path in caches(shapes)]


# ------------------------------------------------------------------------------------------ layouts


def test_parts_come_from_their_folders_and_what_is_missing_from_the_images_to_train(
    shapes, tmp_path
):
    root = tmp_path / "root"
    for part, seed in (("train", 1), ("valid", 2), ("test", 3)):
        draw_shapes(root / part, seed=seed)
    assert sizes(load_folder(root)) == [18, 18, 18]
    (root / "valid").rename(root / "val")
    data = load_folder(root)
    assert sizes(data) == [18, 18, 18] and data.name == "root"
    files = [*root.glob("train/*/*"), *root.glob("val/*/*")]
    assert sorted(data.trained_on.tolist()) == sorted(map(file_hash, files))
    assert data.trained_on[:18].tolist() != sorted(data.trained_on[:18].tolist())
    first_labels = data.train.labels[:9].unique()
    assert len(first_labels) == 3  # classes are mixed: --train_samples takes of all
    shutil.rmtree(root / "val")
    assert sizes(load_folder(root)) == [15, 3, 18]
    shutil.rmtree(root / "test")
    assert sizes(load_folder(root)) == [12, 3, 3]
    assert sizes(load_folder(root, val_split=0.5, test_split=0.3)) == [3, 9, 6]
    # A class may be called like a part.
    shutil.copytree(shapes / "disc", tmp_path / "vehicles" / "train")
    shutil.copytree(shapes / "cross", tmp_path / "vehicles" / "tram")
    assert load_folder(tmp_path / "vehicles").class_names == ("train", "tram")
    (tmp_path / "vehicles" / "Train").mkdir()
    shutil.copy(shapes / "square" / "0.png", tmp_path / "vehicles" / "Train")
    assert load_folder(tmp_path / "vehicles").class_names == ("Train", "train", "tram")


def test_the_split_is_by_class_and_keeps_images_in_their_part(tmp_path):
    root = draw_shapes(tmp_path / "many", count=40)
    for i in range(30):
        (root / "disc" / f"{i}.png").unlink()
    first = load_folder(root)
    for part, counts in (
        (first.train, [32, 8, 32]),
        (first.val, [4, 1, 4]),
        (first.test, [4, 1, 4]),
    ):
        assert part.labels.bincount().tolist() == counts
    for i, path in enumerate(sorted(root.glob("*/*.png"))):
        path.rename(path.with_name(f"renamed {97 * i % 90}.png"))
    assert same_images(first, load_folder(root))
    before = set(first.trained_on.tolist())
    draw_shapes(root, count=4, seed=9)  # 12 more than 90
    after = load_folder(root)
    everything = {file_hash(path) for path in root.glob("*/*.png")}
    tested = everything - set(after.trained_on.tolist())
    assert len(everything) == 102 and len(tested) == 9 and len(tested & before) <= 2


def test_nothing_trained_on_is_scored(tmp_path, capsys):
    root = tmp_path
    for part, seed in (("train", 1), ("val", 2), ("test", 3)):
        draw_shapes(root / part, seed=seed)
    shutil.copy(root / "train" / "disc" / "0.png", root / "val" / "disc" / "copy.png")
    shutil.copy(root / "train" / "disc" / "1.png", root / "test" / "disc" / "copy.png")
    shutil.copy(root / "train" / "disc" / "2.png", root / "test" / "square" / "copy.png")
    shutil.copy(root / "val" / "cross" / "2.png", root / "test" / "cross" / "2.png")
    data = load_folder(root)
    assert sizes(data) == [18, 18, 17]
    notes = capsys.readouterr().err
    assert "note: 1 image to validate left out: there are the same to train\n" in notes
    assert "note: 3 images to test left out: there are the same to train or validate\n" in notes
    # Of a split of our own, too: each picture is there three times.
    twice = draw_shapes(tmp_path / "twice", count=20)
    for path in list(twice.glob("*/*.png")):
        shutil.copy(path, path.with_name(f"a{path.name}"))
        shutil.copy(path, path.with_name(f"z{path.name}"))
    data = load_folder(twice)
    trained = set(data.trained_on.tolist())
    tested = {file_hash(path) for path in twice.glob("*/*.png")} - trained
    assert len(data.test) >= 9 and len(data.test) == 3 * len(tested)


def test_side_and_channels_come_from_the_images(tmp_path, capsys):
    def made(name: str, *pictures: tuple[str, tuple[int, int]]) -> Dataset:
        for i in range(8):
            for label in "ab":
                mode, size = pictures[i % len(pictures)]
                image = Image.new(mode, size, i if mode == "L" else (i, i, i))
                image.putpixel((0, 0), 90 if mode == "L" else (90, 90, 90 + ord(label)))
                (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / name / label / f"{i}.png")
        return load_folder(tmp_path / name, resize="stretch")

    own = made("own", ("L", (28, 28)))
    assert own.image_shape == (1, 28, 28)
    assert made("coloured", ("L", (28, 28)), ("RGB", (28, 28))).image_shape == (3, 28, 28)
    assert made("mixed", ("L", (28, 28)), ("L", (28, 90))).image_shape == (1, 24, 24)
    assert made("prime", ("L", (31, 31))).image_shape == (1, 24, 24)  # else one patch were all
    assert made("large", ("L", (90, 90))).image_shape == (1, 64, 64)
    assert made("small", ("L", (5, 7))).image_shape == (1, 8, 8)
    # All channels are equal: it is grey, and what was found with three is what one would give.
    grey = tmp_path / "grey"
    for path in (tmp_path / "large").glob("*/*.png"):
        (grey / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(grey / path.parent.name / path.name)
    found = load_folder(grey)
    assert found.image_shape == (1, 64, 64)
    assert same_images(found, load_folder(grey, in_chans=1, img_size=64))
    assert load_folder(grey, in_chans=3, img_size=20).image_shape == (3, 20, 20)
    # Headers that promise more than there is don't decide.
    whole = Image.effect_noise((60, 60), 50)
    for i in range(40):
        whole.save(tmp_path / "own" / "a" / f"cut{i}.png")
        content = (tmp_path / "own" / "a" / f"cut{i}.png").read_bytes()
        (tmp_path / "own" / "a" / f"cut{i}.png").write_bytes(content[:300])
    assert same_images(load_folder(tmp_path / "own", resize="stretch"), own)
    notes = capsys.readouterr().err
    assert "note: 40 of 56 images left out:\n" in notes and "\n  and 35 more\n" in notes


def test_statistics_are_of_the_images_to_train(shapes):
    data = load_folder(shapes)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert data.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())
    assert len(data.mean) == 3 and data.preparation == "crop"


# -------------------------------------------------------------------------------------------- cache


def replace_unseen(path: Path) -> None:
    """Other bytes in a file, of the same length and time."""
    about = path.stat()
    path.write_bytes(b"x" * about.st_size)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_a_second_run_reads_no_picture(shapes, capsys):
    first = load_folder(shapes)
    assert capsys.readouterr().err == ""
    array, index = sorted(caches(shapes), key=lambda path: path.suffix, reverse=True)
    assert (array.suffix, index.suffix) == (".npy", ".json")
    for path in shapes.glob("*/*.png"):
        replace_unseen(path)
    second = load_folder(shapes)
    assert same_images(first, second) and second.mean == first.mean
    assert capsys.readouterr().err == ""
    mapped = np.load(array, mmap_mode="r", allow_pickle=False)
    assert len(mapped) == 18 and np.array_equal(mapped[:12], first.train.images)
    expected = first.train.images.clone()
    second.train.images.zero_()  # in this process alone, not in the file
    assert np.array_equal(np.load(array)[:12], expected)


def test_the_cache_is_made_anew_where_anything_changes(shapes, tmp_path, capsys):
    def is_new(**how) -> bool:
        before = {path: path.stat().st_mtime_ns for path in caches(shapes)}
        load_folder(shapes, **how)
        assert len(caches(shapes)) == 2  # the old one is gone
        after = {path: path.stat().st_mtime_ns for path in caches(shapes)}
        noted = "is of other files or settings: all images are read anew" in capsys.readouterr().err
        assert noted == bool(before and after != before)
        return before != after

    assert is_new() and not is_new()
    for how in (
        *({"img_size": 16}, {"in_chans": 1}, {"resize": "pad"}, {"val_split": 0.2}),
        *({"test_split": 0.3}, {}),
    ):
        assert is_new(**how) and not is_new(**how)
    picture = shapes / "disc" / "0.png"
    os.utime(picture, ns=(1, 1))
    assert is_new() and not is_new()
    picture.rename(shapes / "disc" / "00.png")
    assert is_new() and not is_new()
    shutil.copy(shapes / "disc" / "00.png", shapes / "square" / "new.png")
    assert is_new() and not is_new()
    (shapes / "square" / "new.png").unlink()
    assert is_new() and not is_new()
    (shapes / "disc" / "notes.txt").write_text("no image")
    assert not is_new()
    # What was found, given as flags, as those who score a model do.
    assert not is_new(cache_dir=None, img_size=24, in_chans=3)
    assert is_new(img_size=24, in_chans=1) and not is_new(img_size=24, in_chans=1)
    assert is_new(in_chans=1) and not is_new(img_size=24, in_chans=1)
    assert is_new() and load_folder(shapes).image_shape == (3, 24, 24)
    # In another place, several folders have theirs.
    other = draw_shapes(tmp_path / "other", seed=5)
    for _ in range(2):
        for folder in (shapes, other):
            load_folder(folder, cache_dir=tmp_path / "kept" / "here")
        assert len(caches(tmp_path / "kept" / "here")) == 4 and not caches(other)
    assert "anew" not in capsys.readouterr().err


def test_a_large_cache_is_written_and_checked_in_steps(shapes, monkeypatch, capsys):
    expected = load_folder(shapes)
    for path in caches(shapes):
        path.unlink()
    # 18 images, 4 at a time
    monkeypatch.setattr(cache, "STEP_BYTES", 4 * expected.train.images[0].nbytes)
    assert same_images(load_folder(shapes), expected)
    assert same_images(load_folder(shapes), expected) and "note" not in capsys.readouterr().err


def test_a_cache_of_another_version_or_half_written_is_made_anew(shapes, monkeypatch, capsys):
    first = load_folder(shapes)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "VERSION", cache.VERSION + 1)
        assert same_images(load_folder(shapes), first)
        assert "is of another version of this project: all images" in capsys.readouterr().err
    load_folder(shapes)
    assert "is of another version" in capsys.readouterr().err
    array, index = sorted(caches(shapes), key=lambda path: path.suffix, reverse=True)
    halves = {
        "no index": index.unlink,
        "no array": array.unlink,
        "array cut": lambda: os.truncate(array, array.stat().st_size - 1),
        "array empty": lambda: os.truncate(array, 0),
        "index cut": lambda: os.truncate(index, index.stat().st_size - 1),
        "one pixel": lambda: array.write_bytes(array.read_bytes()[:-1] + b"\x07\xff"[:1]),
    }
    for name, damage in halves.items():
        damage()
        assert same_images(load_folder(shapes), first), name
        assert "is damaged or half written: all images" in capsys.readouterr().err, name
        assert same_images(load_folder(shapes), first) and not capsys.readouterr().err
    # What a process that was killed had begun is removed once it is old.
    for age, name in ((0, ".vit-cache-0.7.tmp.npy"), (10**6, ".vit-cache-0.8.tmp.npy")):
        (shapes / f".{name}").write_bytes(b"half")
        os.utime(shapes / f".{name}", (time.time() - age,) * 2)
    index.unlink()
    load_folder(shapes)
    assert [path.name for path in caches(shapes)][:1] == ["..vit-cache-0.7.tmp.npy"]
    assert len(caches(shapes)) == 3


@VERY_FEW
@given(ending=st.sampled_from([".npy", ".json"]), edits=EDITS)
def test_a_damaged_cache_is_never_trusted(tmp_path, ending, edits):
    root = tmp_path / "shapes"
    if not root.exists():
        draw_shapes(root)
    first = load_folder(root)
    path = next(path for path in caches(root) if path.suffix == ending)
    content = edited(path.read_bytes(), edits)
    path.unlink()  # `first` is mapped from it
    path.write_bytes(content)
    with bounded():
        assert same_images(load_folder(root), first)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who isn't root: then permissions count."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@posix
def test_folders_and_files_that_cannot_be_read_are_named():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        root = draw_shapes(Path(folder) / "shapes")
        os.chmod(folder, 0o755)
        file = root / "disc" / "0.png"
        for path, told in ((root / "disc", load_folder), (file, None), (root, load_folder)):
            mode = path.stat().st_mode
            os.chmod(path, 0)
            with (
                unprivileged(),
                pytest.raises(UserError, match="cannot be read: Permission denied"),
            ):
                told(root) if told else decode.decode(str(file), 8, 3, "crop")
            os.chmod(path, mode)
        with unprivileged(), pytest.raises(UserError, match="cannot be written: Permission denied"):
            load_folder(root, cache_dir=root / "here")


def test_a_part_without_classes_is_left_out_and_told(shapes, capsys):
    """As competitions give images to test: without labels."""
    for name in CLASSES:
        (shapes / "train").mkdir(exist_ok=True)
        (shapes / name).rename(shapes / "train" / name)
    (shapes / "test").mkdir()
    Image.new("RGB", (9, 9)).save(shapes / "test" / "0.png")
    assert sum(sizes(load_folder(shapes))) == 18
    assert "folders that are not a class's: test/\n" in capsys.readouterr().err


def test_one_name_written_in_two_ways_is_one_class(shapes):
    (shapes / "disc").rename(shapes / "caf\u00e9")
    in_parts(shapes)
    for part, name in (("train", "caf\u00e9"), ("val", "cafe\u0301"), ("test", "cafe\u0301")):
        (shapes / part / "disc").rename(shapes / part / name)
    data = load_folder(shapes)
    assert data.class_names == ("caf\u00e9", "cross", "square") and sizes(data) == [9, 9, 9]


def test_a_cache_stands_while_what_it_lacks_cannot_be_read(tmp_path, capsys):
    place = cache.find_place(tmp_path, None, [])
    files = ["there.png", "gone.png"]
    (tmp_path / files[0]).touch()
    images = np.zeros((1, 1, 8, 8), np.uint8)
    answers = [7, "cannot be read: Permission denied"]
    assert cache.save(place, answers, images, np.arange(1), 8, 1)
    assert cache.load(place, tmp_path, files, 8, 1).answers == answers
    assert capsys.readouterr().err == ""
    (tmp_path / files[1]).touch()
    assert cache.load(place, tmp_path, files, 8, 1) is None
    assert "lacks images that could not be read" in capsys.readouterr().err


def test_a_cache_that_cannot_be_kept_after_all_ends_only_a_run_that_asked_for_it(
    shapes, tmp_path, monkeypatch, capsys
):
    expected = load_folder(shapes)
    for path in caches(shapes):
        path.unlink()

    def fail(place, *_):  # as in a folder with the sticky bit, whose cache is another user's
        raise UserError(f"{place.array} cannot be written: Operation not permitted; try another")

    monkeypatch.setattr(cache, "_write", fail)
    assert same_images(load_folder(shapes), expected)
    assert "Operation not permitted: the images are read anew by each" in capsys.readouterr().err
    with pytest.raises(UserError, match="Operation not permitted"):
        load_folder(shapes, cache_dir=tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("differs", [None, "fails", *range(7)])
def test_processes_that_find_different_images_do_not_start(shapes, differs, rank):
    class Pair(World):
        """This process, and what another one says: the same but at one place, or an error."""

        def share(self, value):
            return "folder"

        def gather(self, value):
            theirs = value and tuple(None if i == differs else v for i, v in enumerate(value))
            theirs = "a file cannot be read" if value and differs == "fails" else theirs
            return [value, theirs][:: 1 - 2 * rank]

    world = Pair(rank, 2, rank)
    if differs is None:
        dataset = load_on_all_processes("folder", shapes, {}, world)
        assert same_images(dataset, load_folder(shapes))
        return
    told = "a file cannot be read" if differs == "fails" else "found different images in "
    with pytest.raises(UserError, match=told):
        load_on_all_processes("folder", shapes, {}, world)


def test_without_a_place_for_a_cache_the_images_stay_in_memory(shapes, tmp_path, capsys):
    expected = load_folder(shapes)
    array = next(path for path in caches(shapes) if path.suffix == ".npy")
    array.unlink()
    array.mkdir()  # also root cannot write there
    capsys.readouterr()
    data = load_folder(shapes)
    notes = capsys.readouterr().err
    assert (
        "cannot be written: it is a folder or a device: the images are read anew by each" in notes
    )
    assert same_images(data, expected) and data.mean == expected.mean
    data.train.images.zero_()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        load_folder(shapes, cache_dir=tmp_path / "file")


@posix
@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line(start, folder, shapes):
    here = folder("run")
    process = start(here, [*TRAIN, "--data_dir", shapes], limit=10_000)
    process.join(60)
    lines = (here / "err.txt").read_text().splitlines()
    assert process.exitcode == 2 and "cannot be written: File too large; free some" in lines[-1]
    assert lines[-1].startswith("error: ") and not caches(shapes)


# ---------------------------------------------------------------------------------------- processes


@posix
def test_a_file_that_kills_its_reader_is_left_out(shapes, monkeypatch, capsys):
    program = "import os, signal; from data import decode as d; whole = d.decode\n"
    program += "d.decode = lambda path, **how: (\n"
    program += "  os.kill(os.getpid(), 9) if path.endswith('disc/3.png') else whole(path, **how))\n"
    before, serve = decode.PROGRAM.rsplit(";", 1)
    with monkeypatch.context() as patched:
        patched.setattr(decode, "PROGRAM", f"{before}\n{program}{serve.strip()}")
        data = load_folder(shapes)
    assert sum(sizes(data)) == 17
    assert "  disc/3.png ended the process that read it (status -9)\n" in capsys.readouterr().err
    assert sum(sizes(load_folder(shapes))) == 18  # memory may have been short
    monkeypatch.setattr(decode, "PROGRAM", "raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="a process that reads images has ended"):
        load_folder(shapes, img_size=16)


def test_readers_start_where_a_site_prints_or_limits_processes(shapes, tmp_path, monkeypatch):
    expected = load_folder(shapes, keep=False)
    assert not caches(shapes)
    (tmp_path / "sitecustomize.py").write_text(
        "print('Welcome to the cluster', end='', flush=True)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started, start = [], subprocess.Popen

    def limited(*args, **kwargs):
        if len(started) == allowed:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(decode.startup, "cores", lambda: 4)
    monkeypatch.setattr(decode, "MAX_TOGETHER", 3)
    monkeypatch.setattr(decode.subprocess, "Popen", limited)
    allowed = 2
    assert same_images(load_folder(shapes, keep=False), expected)
    allowed = len(started)
    with pytest.raises(UserError, match="no process to read images can be started: Resource"):
        load_folder(shapes, keep=False)


def test_a_file_that_could_not_be_opened_is_tried_again(shapes, monkeypatch, capsys):
    program = "from data import decode as d; whole = d.decode\n"
    program += "def tried(path, **how):\n"
    program += "  if path.endswith('disc/3.png'): raise d.UserError('cannot be read: Stale')\n"
    program += "  return whole(path, **how)\nd.decode = tried\n"
    before, serve = decode.PROGRAM.rsplit(";", 1)
    with monkeypatch.context() as patched:
        patched.setattr(decode, "PROGRAM", f"{before}\n{program}{serve.strip()}")
        assert sum(sizes(load_folder(shapes))) == 17
    assert "  disc/3.png cannot be read: Stale\n" in capsys.readouterr().err
    assert sum(sizes(load_folder(shapes))) == 18
    assert "lacks images that could not be read when it was made" in capsys.readouterr().err
    assert sum(sizes(load_folder(shapes))) == 18 and capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks Linux for the processes")
@pytest.mark.slow
def test_no_process_is_left_when_reading_is_stopped(tmp_path):
    root = draw_shapes(tmp_path / "shapes", count=150, side=(900, 1000))
    command = [sys.executable, ROOT / "src" / "train.py", *TRAIN, "--data_dir", root]
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.05)
        time.sleep(0.5)
        readers = children.read_text().split()
        process.send_signal(how)
        errors = process.communicate(timeout=10)[1]
        assert process.returncode == (130 if how == signal.SIGINT else -how)
        assert errors.count("\n") == (how == signal.SIGINT) and not caches(root)
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in readers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


# ------------------------------------------------------------------------------------- to be scored


def test_a_labelled_folder_is_scored_without_what_was_trained_on(shapes, tmp_path, capsys):
    how = {"img_size": 24, "in_chans": 3, "resize": "pad"}
    data = load_folder(shapes, **how)
    every = load_labelled(shapes, CLASSES, **how)
    assert len(every) == 18 and every.images.shape[1:] == (3, 24, 24)
    left = load_labelled(shapes, CLASSES, **how, exclude=data.trained_on)
    assert (
        "note: 15 of 18 images left out: the model was trained on the same\n"
        in capsys.readouterr().err
    )
    assert {image.numpy().tobytes() for image in left.images} == {
        image.numpy().tobytes() for image in data.test.images
    }
    assert sorted(left.labels.tolist()) == [0, 1, 2]
    # Labels are the model's; a class may have no images.
    shutil.rmtree(shapes / "cross")
    some = load_labelled(shapes, ("square", "extra", "disc", "cross"), **how)
    assert some.labels.bincount().tolist() == [6, 0, 6]
    images = {name: some.images[some.labels == i] for i, name in ((0, "square"), (2, "disc"))}
    assert torch.equal(images["disc"], every.images[every.labels == 1])
    assert torch.equal(images["square"], every.images[every.labels == 2])
    # A folder's test images, where it has a folder for them.
    whole = tmp_path / "whole"
    draw_shapes(whole / "train", count=7, seed=1)
    assert len(load_labelled(whole, CLASSES, **how)) == 21
    draw_shapes(whole / "test", count=2, seed=2)
    assert len(load_labelled(whole, CLASSES, **how)) == 6


def test_what_cannot_be_scored_is_said_in_one_line(shapes, tmp_path):
    def refused(folder: Path, names: tuple[str, ...] = CLASSES, exclude=None) -> str:
        with pytest.raises(UserError) as caught:
            load_labelled(folder, names, 24, 3, "crop", exclude)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    names = tuple(f"class {i}" for i in range(30))
    told = refused(shapes, names)
    assert "a class 'cross', which the model doesn't know: it knows class 0, class 1" in told
    assert "class 19, and 10 more" in told and "class 20" not in told
    assert "a class 'square'" in refused(shapes, ("cross", "disc"))
    every = torch.tensor([file_hash(path) for path in shapes.glob("*/*.png")])
    assert "no image left to score" in refused(shapes, exclude=every)
    (tmp_path / "nothing").mkdir()
    assert "no image left to score" in refused(tmp_path / "nothing")
    assert "there is no folder" in refused(tmp_path / "missing")


# ------------------------------------------------------------------------------------------- errors


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path)


def keep_first(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        if path.stem != "0":
            path.unlink()


def dots(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        Image.new("RGB", (1, 1), "red").save(path)


def in_parts(folder: Path, *, without: str = "", more: str = "") -> None:
    only(folder)
    for seed, part in enumerate(("train", "val", "test")):
        draw_shapes(folder / part, count=3, seed=seed)
    if without:
        for path in (folder / without).glob("*/*"):
            path.unlink()
    if more:
        (folder / more / "zebra").mkdir()
        shutil.copy(folder / "train" / "disc" / "0.png", folder / more / "zebra")


def in_parts_alone(folder: Path) -> None:
    (folder / "disc").rename(folder / "train")
    (folder / "cross").rename(folder / "test")
    shutil.rmtree(folder / "square")


def in_test_too(folder: Path) -> None:
    shutil.copytree(folder / "disc", folder / "test" / "disc")


ERRORS = {
    "empty": (lambda f: only(f), "", "has images in no folder of a class: expected at least two"),
    "one class": (lambda f: only(f, "disc"), "", "has images of one class only, 'disc'"),
    "two images": (
        lambda f: (only(f, "disc", "cross"), keep_first(f)),
        "",
        "has 2 images, and none is left to validate",
    ),
    "all of 1x1": (dots, "", "has images none of which can be used"),
    "classes right in it, too": (
        in_test_too,
        "",
        "has folders of classes right in it and in its test: move the former into a folder named",
    ),
    "parts without classes": (in_parts_alone, "", "has images right in its test, train: expected"),
    "images to test beside classes": (
        lambda f: (f / "disc").rename(f / "test"),
        "",
        "has images right in its test: expected a folder for each class",
    ),
    "class only in test": (
        lambda f: in_parts(f, more="test"),
        "",
        "class 'zebra' of {folder} has images to test but none to train",
    ),
    "class only in val": (
        lambda f: in_parts(f, more="val"),
        "",
        "class 'zebra' of {folder} has images to validate but none to train",
    ),
    "no image to test": (lambda f: in_parts(f, without="test"), "", "none is left to test"),
    "no image to train": (lambda f: in_parts(f, without="train"), "", "none to train"),
    "val and valid": (
        lambda f: (in_parts(f), (f / "valid").mkdir()),
        "",
        "has both val and valid: rename one",
    ),
    "share of what is there": (in_parts, "--val_split 0.2", "--val_split 0.2 has no effect"),
    "share of test that is there": (in_parts, "--test_split 0.2", "--test_split 0.2 has no effect"),
    "shares of all": (
        lambda f: None,
        "--val_split 0.5 --test_split 0.5",
        "--val_split and --test_split take 1 of the images, which leaves none to train",
    ),
    "control codes": (
        lambda f: (f / "disc").rename(f / "\x1b[2Jdisc"),
        "",
        r"the folder '\x1b[2Jdisc' in {folder} cannot name a class",
    ),
    "long name": (lambda f: (f / "disc").rename(f / ("d" * 101)), "", "at most 100 printable"),
    "not there": (shutil.rmtree, "", "there is no folder {folder}: name the one"),
    "a file": (
        lambda f: (shutil.rmtree(f), f.write_text("x")),
        "",
        "{folder} is no folder: name the one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_folders_that_do_not_suffice_end_in_one_error_line(run, tmp_path, case):
    root = draw_shapes(tmp_path / "shapes", count=3)
    prepare_case, flags, words = ERRORS[case]
    prepare_case(root)
    result = run(train.main, *TRAIN, "--data_dir", root, *flags.split())
    notes = [line for line in result.err.splitlines() if not line.startswith("error: ")]
    assert all(line.startswith(("note: ", "  ")) for line in notes)
    result.err = result.err.splitlines()[-1]
    assert_one_error_line(result, words.format(folder=root))
    if case == "all of 1x1":
        assert "disc/0.png is too small" in "".join(notes)


def test_a_folder_of_classes_is_not_taken_for_mnists(run, shapes):
    result = run(train.main, "--data_dir", shapes)
    assert_one_error_line(result, f"--data_dir {shapes} has a folder of images", "--dataset folder")
    assert not (shapes / "MNIST").exists()
    (shapes / "MNIST").mkdir()  # then they only lie beside it
    check_data_flags("mnist", {"data_dir": str(shapes)})


@posix
def test_what_stands_in_a_pictures_place_stops_nothing(shapes, capsys):
    (shapes / "disc" / "more discs").mkdir()
    (shapes / "disc" / "folder.png").mkdir()
    os.mkfifo(shapes / "disc" / "pipe.png")
    (shapes / "disc" / "endless.png").symlink_to("/dev/zero")
    (shapes / "disc" / "self.png").symlink_to("self.png")
    (shapes / "disc" / "nothing.png").symlink_to("nothing")
    (shapes / "disc" / "link.png").symlink_to(shapes / "disc" / "0.png")
    (shapes / "disc" / "empty.png").touch()
    (shapes / "disc" / "huge.png").touch()
    os.truncate(shapes / "disc" / "huge.png", 1 << 40)
    (shapes / "disc" / "\x1b[2Jname\udcff.png").write_bytes(b"x")
    with bounded():
        data = load_folder(shapes)
    assert sum(sizes(data)) in (18, 19)  # the link's picture is there twice
    notes = capsys.readouterr().err
    assert notes.isprintable() or set(filter(lambda c: not c.isprintable(), notes)) == {"\n"}
    folders = "note: left out, folders that are not a class's: disc/folder.png/, disc/more discs/"
    assert folders in notes and "disc/endless.png" in notes and "disc/pipe.png" in notes
    assert "  disc/huge.png is too large: expected at most 256 MB\n" in notes
    assert "  disc/?[2Jname?.png cannot be read: damaged" in notes
    assert isinstance(data.train, Split)
