"""Data, metrics and TODO.md."""

import gzip
import re

import pytest
import sklearn.datasets
import torch
from conftest import MNIST, needs_mnist
from torch import nn

import utils
from common.errors import UserError
from common.progress import reset_todo_md, update_todo_md
from data.catalog import MNIST_FILES
from data.dataset import Split
from data.digits import load_digits
from data.load import load_dataset
from utils import BatchLoader, accuracy, evaluate


@pytest.fixture(scope="module")
def digits():
    return load_digits()


# -------------------------------------------------------------------------------------- data sets


def test_digits_are_divided_without_overlap_or_loss_in_mnists_form(digits):
    parts = (digits.train, digits.val, digits.test)
    assert [len(part) for part in parts] == [1437, 180, 180]
    target = sklearn.datasets.load_digits().target
    labels = torch.cat([part.labels for part in parts])
    assert torch.equal(labels.bincount(), torch.from_numpy(target).bincount())
    images = digits.train.images
    assert torch.equal(load_digits().train.images, images)
    assert images.shape[1:] == (1, 28, 28) and images.dtype == torch.uint8
    assert not images[:, :, :4].any() and not images[:, :, :, -4:].any()
    pixels = images.float() / 255
    assert digits.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-3)
    assert digits.std[0] == pytest.approx(pixels.std().item(), abs=1e-3)


@needs_mnist
def test_mnist_is_divided_as_published():
    data = load_dataset("mnist", MNIST)
    assert [len(part) for part in (data.train, data.val, data.test)] == [54_000, 6_000, 10_000]
    classes = torch.cat((data.train.labels, data.val.labels))
    assert classes.bincount().tolist()[:3] == [5923, 6742, 5958]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    loaders = utils.get_mnist_loaders(MNIST, batch_size=64)
    assert [len(loader.split) for loader in loaders] == [54_000, 6_000, 10_000]
    images, labels = next(iter(loaders[0]))
    assert images.shape == (64, 1, 28, 28) and labels.shape == (64,)
    pixels = torch.cat((data.train.images, data.val.images)).float() / 255
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=1e-4)


@needs_mnist
def test_unpacked_mnist_files_serve_too(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in MNIST_FILES:
        unpacked = (tmp_path / file.path).with_suffix("")
        unpacked.write_bytes(gzip.decompress((MNIST / file.path).read_bytes()))
    data, same = load_dataset("mnist", tmp_path), load_dataset("mnist", MNIST)
    assert torch.equal(data.train.images, same.train.images)
    assert torch.equal(data.test.labels, same.test.labels)

    images = raw / "t10k-images-idx3-ubyte"
    whole = images.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"\1", b""):
        images.write_bytes(damaged)
        message = rf"t10k-images-idx3-ubyte is damaged: {len(damaged)} bytes .*2646ac647ad5339dbf"
        with pytest.raises(UserError, match=message):
            load_dataset("mnist", tmp_path)


def test_a_damaged_file_is_named_with_what_was_expected(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in MNIST_FILES:
        (tmp_path / file.path).write_bytes(b"not the published file")
    with pytest.raises(UserError) as caught:
        load_dataset("mnist", tmp_path)
    message = str(caught.value)
    assert "train-images-idx3-ubyte.gz is damaged" in message
    assert "f68b3c2dcbeaaa9fbdd348bbdeb94873" in message and "delete it" in message
    assert (raw / "train-images-idx3-ubyte.gz").read_bytes() == b"not the published file"


# ---------------------------------------------------------------------------------------- batches


def batches(loader: BatchLoader) -> torch.Tensor:
    return torch.cat([images for images, _ in loader])


def test_training_images_change_from_pass_to_pass_and_the_others_never(digits):
    train, val, test = utils.make_loaders(digits, batch_size=100)
    first, second = batches(train), batches(train)
    assert first.shape == second.shape == (1437, 1, 28, 28)
    # Neither pass has an image as it lies in the data set, nor one of the other pass.
    raw = (digits.train.images.float() / 255 - digits.mean[0]) / digits.std[0]
    for other in (second, raw):
        assert torch.cdist(first[:200].flatten(1), other.flatten(1)).min() > 1e-3
    for loader, split in ((val, digits.val), (test, digits.test)):
        expected = (split.images.float() / 255 - digits.mean[0]) / digits.std[0]
        for _ in range(2):
            torch.testing.assert_close(batches(loader), expected)


def test_every_training_image_comes_once_a_pass_in_another_order():
    marked = Split(torch.zeros(1000, 1, 28, 28, dtype=torch.uint8), torch.arange(1000))
    loader = BatchLoader(marked, 128, 0.0, 1.0, shuffle=True)
    order = [torch.cat([labels for _, labels in loader]) for _ in range(2)]
    assert len(loader) == 8 and not torch.equal(*order)
    assert all(torch.equal(labels.sort().values, torch.arange(1000)) for labels in order)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_depend_on_the_seed_alone(digits, num_workers):
    def one(seed, workers=0):
        return utils.make_loaders(digits, 64, workers, seed=seed)[0]

    expected, loader = one(7), one(7, num_workers)
    torch.manual_seed(num_workers)  # the global generator has no part in it
    for _ in range(2):
        for (a, x), (b, y) in zip(expected, loader, strict=True):
            assert torch.equal(a, b) and torch.equal(x, y)
    assert not torch.equal(batches(one(7)), batches(one(8)))


def test_a_loader_left_early_stops_its_workers(digits):
    loader = utils.make_loaders(digits, 16, 2)[0]
    for _ in loader:
        break
    assert len(batches(loader)) == 1437


# ---------------------------------------------------------------------------------------- metrics


def test_accuracy_by_hand():
    output = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    target = torch.tensor([0, 2, 2, 1])
    assert accuracy(output, target, topk=(1, 2, 3)) == [50.0, 75.0, 100.0]
    assert accuracy(output, target) == [50.0]
    assert accuracy(output, target, topk=(1, 5))[1] == 100.0  # fewer classes than k


def test_evaluate_weighs_a_smaller_last_batch_less_and_leaves_the_mode():
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (10, 1, 28, 28), dtype=torch.uint8), torch.arange(10) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 6)).train()
    criterion = nn.CrossEntropyLoss()
    whole = evaluate(model, BatchLoader(split, 10, 0.5, 0.5), criterion, "cpu")
    for batch_size in (1, 3, 4, 7):
        parts = evaluate(model, BatchLoader(split, batch_size, 0.5, 0.5), criterion, "cpu")
        assert parts == pytest.approx(whole, rel=1e-6)
    assert model.training
    logits = model.eval()((split.images.float() / 255 - 0.5) / 0.5)
    assert whole[0] == pytest.approx(criterion(logits, split.labels).item(), rel=1e-6)
    assert whole[1:] == pytest.approx(accuracy(logits, split.labels, (1, 5)))


# ---------------------------------------------------------------------------------------- TODO.md


def rows(path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_todo_rows_are_filled_in_and_other_text_stays(tmp_path):
    path = tmp_path / "TODO.md"
    path.write_text("# Plans\n\n- [ ] read this\n\n## Training progress\n\nbefore\n")
    reset_todo_md(3, path, "mnist")
    path.write_text(path.read_text() + "\nafter | the | table\n")
    update_todo_md(1, 1.23456, 87.654, True, path)
    update_todo_md(2, 0.5, 87.0, False, path)
    first, second, third = rows(path)
    assert first[:5] == ["1", "done", "1.2346", "87.65", "yes"] and first[5].startswith("20")
    assert second[:5] == ["2", "done", "0.5000", "87.00", "no"]
    assert third == ["3", "not started", "", "", "", ""]
    for kept in ("- [ ] read this", "before", "after | the | table", "Data set: mnist"):
        assert path.read_text().count(kept) == 1
    assert path.read_text().count("## Training progress") == 1


def test_a_new_run_resets_the_table_to_its_epochs(tmp_path):
    path = tmp_path / "new" / "TODO.md"
    for epochs in (5, 2, 12):
        reset_todo_md(epochs, path, f"set {epochs}")
        update_todo_md(1, 1.0, 50.0, True, path)
        assert len(rows(path)) == epochs
        assert path.read_text().count("Training progress") == 1
        assert re.findall("Data set: .*", path.read_text()) == [f"Data set: set {epochs}"]


def test_a_table_edited_by_hand_does_not_stop_a_run(tmp_path):
    path = tmp_path / "TODO.md"
    path.write_bytes(b"caf\xe9\n")  # not UTF-8
    update_todo_md(7, 0.1, 99.0, True, path)
    update_todo_md(8, 0.1, 99.0, True, path)
    assert path.read_bytes().startswith(b"caf\xe9\n")
    path.write_text(path.read_text("latin-1"))
    assert [row[0] for row in rows(path)] == ["7", "8"]
