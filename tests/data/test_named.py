"""The named data sets, each from small files in its own format."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from conftest import TINY_DIGITS, assert_one_error_line, history, read
from mutations import bounded, result_or_error
from PIL import Image, ImageDraw
from scipy.io import savemat
from small_sets import FILES, Part, parts_of, write_files

import inference
import train
from common.errors import UserError
from data import idx, usps
from data.catalog import NAMED_SETS
from data.dataset import Split, divide
from data.load import load_dataset
from saving.checkpoint import save_checkpoint
from training.resolve import resolve
from vit_model import ViT

EACH = pytest.mark.parametrize("name", FILES)
PARTS = ("train", "test")
TINY = [flag for flag in TINY_DIGITS if flag not in ("--dataset", "digits")]
TINY += "--epochs 1 --batch_size 100".split()


@pytest.fixture
def publish(monkeypatch):
    """publish(name, data_dir, contents): write a set's files, by default small and whole ones."""

    def write(name: str, data_dir: Path, contents: list[bytes] | None = None) -> tuple[Part, Part]:
        parts = parts_of(name)
        contents = contents or FILES[name](*parts)
        monkeypatch.setitem(NAMED_SETS, name, write_files(NAMED_SETS[name], contents, data_dir))
        return parts

    return write


# ----------------------------------------------------------------------------------------- table


def test_every_set_with_files_is_tested_here():
    assert set(FILES) == {name for name, row in NAMED_SETS.items() if row.files}
    assert len(NAMED_SETS) == 11


def test_files_and_their_md5s_are_those_of_torchvision():
    known = torchvision.datasets
    of_usps, of_svhn = ([of.split_list[part] for part in PARTS] for of in (known.USPS, known.SVHN))
    tables = {
        "mnist": known.MNIST.resources,
        "fashionmnist": known.FashionMNIST.resources,
        "kmnist": known.KMNIST.resources,
        "emnist-letters": [(known.EMNIST.url, known.EMNIST.md5)],
        "emnist-balanced": [(known.EMNIST.url, known.EMNIST.md5)],
        "qmnist": [file for part in PARTS for file in known.QMNIST.resources[part]],
        "usps": [(url, md5) for url, _, md5 in of_usps],
        "svhn": [(url, md5) for url, _, md5 in of_svhn],
    }
    for name, table in tables.items():
        expected = [(url.rpartition("/")[2], md5) for url, md5 in table]
        assert [(Path(file.path).name, file.md5) for file in NAMED_SETS[name].files] == expected
    for row in NAMED_SETS.values():
        for file in row.files:
            assert all(url.endswith("/" + Path(file.path).name) for url in file.urls)
            assert file.urls[0].startswith("https://")


def test_class_names_are_the_published_ones():
    known, emnist = torchvision.datasets, torchvision.datasets.EMNIST.classes_split_dict
    names = {name: list(row.class_names) for name, row in NAMED_SETS.items()}
    assert " ".join(names["fashionmnist"]).lower() == " ".join(known.FashionMNIST.classes).lower()
    assert names["kmnist"] == known.KMNIST.classes
    assert names["emnist-balanced"] == emnist["balanced"]
    assert "".join(names["emnist-letters"]).lower() == "".join(emnist["letters"][1:])
    for name, count in (("cifar10", 10), ("cifar100", 100)):
        assert names[name] == sorted(set(names[name])) and len(names[name]) == count


@pytest.mark.parametrize("name", NAMED_SETS)
def test_only_what_may_be_mirrored_is(name):
    mirrored = ("fashionmnist", "cifar10", "cifar100")
    assert resolve("article", name, {}).hflip == (0.5 if name in mirrored else 0.0)
    if name not in mirrored:
        with pytest.raises(UserError, match="--hflip"):
            resolve("article", name, {"hflip": 0.5})


# --------------------------------------------------------------------------------------- reading


def assert_holds(split: Split, part: Part) -> None:
    assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert np.array_equal(split.images, part[0]) and np.array_equal(split.labels, part[1])


@EACH
def test_each_set_is_read_from_its_own_format(publish, tmp_path, name):
    published, test = publish(name, tmp_path)
    data, row = load_dataset(name, tmp_path), NAMED_SETS[name]
    assert (data.source, data.class_names, data.preparation) == (
        name,
        row.class_names,
        row.preparation,
    )
    assert data.image_shape == (row.in_chans, row.img_size, row.img_size)
    assert_holds(data.test, test)
    whole = Split(torch.arange(210), torch.arange(210))
    for split, part in zip((data.train, data.val), divide(whole, 189, 21), strict=True):
        assert_holds(split, tuple(array[part.labels] for array in published))
    pixels = data.train.images.double() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    expected = [[0.1307], [0.3081]] if name == "mnist" else [mean.tolist(), std.tolist()]
    assert [*data.mean, *data.std] == pytest.approx([*expected[0], *expected[1]])


@pytest.mark.parametrize("name", [name for name in FILES if "cifar" not in name])
def test_torchvision_reads_the_same_from_the_same_files(publish, monkeypatch, tmp_path, name):
    publish(name, tmp_path)
    test = load_dataset(name, tmp_path).test
    known, row = torchvision.datasets, NAMED_SETS[name]
    for path in tmp_path.glob("*/raw/*"):  # it unpacks what it has downloaded
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    content = gzip.decompress(archive.read(member))
                    path.with_name(Path(member).stem).write_bytes(content)
        else:
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    for part, file in zip(PARTS, row.files, strict=False):
        monkeypatch.setitem(known.SVHN.split_list, part, [None, Path(file.path).name, file.md5])
    is_train = {"split": "test"} if name == "svhn" else {"train": False}
    division = {"split": name[7:]} if "emnist" in name else {}
    kind = {"mnist": "MNIST", "fashionmnist": "FashionMNIST", "svhn": "SVHN"}.get(name)
    kind = getattr(known, kind or name.partition("-")[0].upper())
    theirs = kind(tmp_path, **is_train, **division)
    for i in (0, 1, 109):
        image, label = theirs[i]
        image = np.asarray(image.convert("RGB" if row.in_chans == 3 else "L"))
        image = image.T if "emnist" in name else image  # as it lies in the file
        ours = test.images[i].permute(1, 2, 0).squeeze(-1)
        assert np.array_equal(ours, image) and test.labels[i] == label - (name == "emnist-letters")


# -------------------------------------------------------------------------- training and scoring


@EACH
def test_each_set_trains_and_scores_from_its_default_folder(publish, complete, run, tmp_path, name):
    publish(name, tmp_path / ("mnist" if name == "mnist" else "datasets"))
    result = complete(*TINY, "--dataset", name)
    assert f"data:     {name}, 189 / 21 / 110 images" in result.out
    checkpoint = read("checkpoints/best_model.pt")
    assert (checkpoint["source"], checkpoint["dataset"]) == (name, name)
    assert checkpoint["class_names"] == list(NAMED_SETS[name].class_names)
    result = run(inference.main, "--mode", "evaluate")
    assert result.status == 0 and f"Test Acc: {history()['test']['top1']:.2f} %" in result.out


# ---------------------------------------------------------------------------------------- errors


@EACH
def test_what_is_missing_is_named_after_what_to_do(run, offline, name):
    row = NAMED_SETS[name]
    result = run(train.main, "--dataset", name, "--data_dir", "none")
    folder = (Path("none") / row.files[0].path).parent
    files = [f"{Path(file.path).name} (MD5 {file.md5})" for file in row.files]
    assert_one_error_line(
        result, f"error: put what is missing of {row.title} into {folder}: ", *files
    )
    assert len(result.err) < 500 and not Path("none").exists()
    assert result.err.endswith("; it cannot be downloaded: Connection refused\n")


@EACH
def test_one_missing_file_is_named_alone(publish, run, tmp_path, offline, name):
    publish(name, tmp_path)
    *others, last = NAMED_SETS[name].files
    (tmp_path / last.path).unlink()
    result = run(train.main, "--dataset", name, "--data_dir", tmp_path)
    assert_one_error_line(result, f"{Path(last.path).name} (MD5 {last.md5}); it cannot")
    assert not any(file.md5 in result.err for file in others)


@EACH
def test_a_damaged_file_is_refused_before_it_is_parsed(publish, run, tmp_path, name):
    publish(name, tmp_path)
    for file in NAMED_SETS[name].files:
        path = tmp_path / file.path
        whole = path.read_bytes()
        for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b"", b"not the file"):
            path.write_bytes(damaged)
            result = run(train.main, "--dataset", name, "--data_dir", tmp_path)
            assert_one_error_line(result, f"{path} is damaged: {len(damaged)} bytes", file.md5)
            assert path.read_bytes() == damaged
        path.write_bytes(whole)


def endless(name: str) -> list[bytes]:
    """A set's files, of which the first unpacks, or claims to unpack, to more than it may."""
    contents = FILES[name](*parts_of(name))
    if name.startswith("emnist"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for kind in ("images-idx3", "labels-idx1"):
                member = f"gzip/{name}-train-{kind}-ubyte.gz"
                archive.writestr(member, gzip.compress(bytes(idx.MAX_BYTES + 1), 1))
        first = file.getvalue()
    elif name.startswith("cifar"):
        member = tarfile.TarInfo("x/train.bin" if name == "cifar100" else "x/test_batch.bin")
        member.size = 10**10
        first = gzip.compress(member.tobuf())
    elif name == "svhn":
        file, shape = io.BytesIO(), np.array([32, 32, 3, 10], "<i4")
        savemat(file, {"X": np.zeros(shape, np.uint8), "y": np.ones((10, 1))})
        shape_as_stated = np.array([32, 32, 3, 10**9], "<i4")
        first = file.getvalue().replace(shape.tobytes(), shape_as_stated.tobytes())
    elif name == "usps":
        first = bz2.compress(bytes(usps.MAX_BYTES + 1))
    else:
        first = gzip.compress(bytes(idx.MAX_BYTES + 1), 1)
    return [first, *contents[1:]]


@EACH
def test_a_file_that_unpacks_to_more_than_it_may_is_refused(publish, tmp_path, name):
    publish(name, tmp_path, endless(name))
    with bounded(memory=400 << 20):
        answer = result_or_error(load_dataset, name, tmp_path)
    assert "is no published file" in answer


# ------------------------------------------------------------------------------- after training

THINGS = {"mnist": "digits", "qmnist": "digits"}
THINGS |= {"emnist-letters": "characters", "emnist-balanced": "characters"}
QUICK = ("usps", "emnist-letters", "svhn")  # 16x16, letters, in colour


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES],
)
def test_a_model_of_any_set_is_pictured_scored_and_asked(run, publish, tmp_path, name):
    """It was not trained. What it tells apart is called digits only where it is digits."""
    publish(name, tmp_path / "files")
    row = NAMED_SETS[name]
    config = {"img_size": row.img_size, "in_chans": row.in_chans, "depth": 1, "embed_dim": 16}
    config |= {"num_classes": len(row.class_names), "patch_size": row.img_size // 4}
    content = {"epoch": 1, "model_state_dict": ViT(**config).state_dict(), "best_acc": 1.0}
    content |= {"model_config": config, "class_names": list(row.class_names), "dataset": name}
    content |= {"normalization": {"mean": [0.5] * row.in_chans, "std": [0.3] * row.in_chans}}
    content |= {"preparation": row.preparation, "source": name, "optimizer_state_dict": {}}
    save_checkpoint("model.pt", content)
    flags = ("--checkpoint", "model.pt", "--mode")
    for mode in ("attention", "confusion", "evaluate"):
        result = run(inference.main, *flags, mode, "--data_dir", "files")
        assert result.status == 0 and f"({name})" in result.out, result.err
    image = Image.new("RGB", (60, 80), "white")
    ImageDraw.Draw(image).line([(30, 10), (30, 70)], "black", 8)
    image.save("one.png")
    result = run(inference.main, *flags, "predict", "--image", "one.png", "--format", "json")
    (answer,) = json.loads(result.out)["images"]
    things = THINGS.get(name, "pictures")
    answer = answer if things == "pictures" else answer[things][0]
    assert answer["prediction"] in row.class_names
    assert ("may_be_no_digit" in answer) == (things == "digits")
    assert ("may_be_none_of_these" in answer) == (things != "digits")
