"""Training from the command line: what it writes, what it repeats, how it stops and refuses."""

import errno
import math
import os
import re
import signal
import socket
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import (
    MNIST,
    QUICK,
    TINY,
    assert_one_error_line,
    history,
    needs_cuda,
    needs_mnist,
    posix,
    read,
)
from matplotlib.image import imread

import train
from data.digits import load_digits
from recipes import DATASET_SETTINGS, RECIPES
from saving.checkpoint import load_checkpoint
from saving.run_state import read_run_state
from settings import FLAGS
from training import speed
from utils import evaluate, make_loaders
from vit_model import ViT

BEST, LAST = Path("checkpoints/best_model.pt"), Path("checkpoints/last.pt")
NO_CUDA = not torch.cuda.is_available()
# Gradient descent whose every step is the gradient itself, in full precision.
DESCENT = [*TINY, *"--dropout 0 --precision fp32 --scheduler ConstantLR(factor=1)".split()]


def todo_rows(folder: str | Path = "") -> list[list[str]]:
    text = Path(folder, "TODO.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in row] for row in rows]


def weights(path: Path = BEST) -> dict[str, torch.Tensor]:
    return read(path)["model_state_dict"]


def identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(theirs[name], value) for name, value in ours.items())


def scores(model, loader) -> tuple[float, ...]:
    """Mean loss, top-1 and top-5."""
    return evaluate(model, loader, torch.nn.CrossEntropyLoss(), "cpu")


# -------------------------------------------------------------------------- what a run leaves


def test_a_run_writes_all_that_it_promises(trained):
    model, checkpoint = load_checkpoint(trained / BEST)
    published = {"epoch", "model_state_dict", "optimizer_state_dict", "best_acc"}
    ours = {"model_config", "normalization", "dataset", "class_names", "settings", "versions"}
    ours |= {
        "scheduler_state_dict",
        "fingerprint",
        "calibration",
        "format",
        "source",
        "preparation",
    }
    assert set(checkpoint) == published | ours
    assert checkpoint["dataset"] == "digits"
    assert checkpoint["model_config"]["depth"] == len(model.blocks) == 2

    told = history(trained / "checkpoints")
    assert [row["epoch"] for row in told["epochs"]] == list(range(1, 9))
    for row in told["epochs"]:
        for name in ("train_loss", "val_loss", "images_per_second", "grad_norm"):
            assert row[name] > 0
    best = max(told["epochs"], key=lambda row: row["val_acc"])
    assert (checkpoint["epoch"], checkpoint["best_acc"]) == (best["epoch"], best["val_acc"])
    assert told["test"]["best_epoch"] == best["epoch"]
    assert told["epochs"][-1]["train_loss"] < told["epochs"][0]["train_loss"]
    cosine = [4e-3 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    rates = [row["lr"]["all parameters"] for row in told["epochs"]]
    assert rates == pytest.approx(cosine)
    marked = [row["epoch"] for row in told["epochs"] if row["is_best"]]
    assert marked[0] == 1 and marked[-1] == best["epoch"]
    fingerprints = {told["fingerprint"], checkpoint["fingerprint"]}
    assert len(fingerprints) == 1 and len(told["fingerprint"]) == 12

    timing = (trained / "checkpoints" / "timing_cpu.txt").read_text().splitlines()
    keys = "device epochs batch_size total_train_time avg_time_per_epoch best_val_acc test_acc "
    keys += "test_top5 dataset fingerprint"
    assert [line.split(": ")[0] for line in timing] == keys.split()
    assert timing[-4] == f"test_acc: {told['test']['top1']:.2f}"

    expected = [
        ["done", f"{row['train_loss']:.4f}", f"{row['val_acc']:.2f}"] for row in told["epochs"]
    ]
    assert [row[1:4] for row in todo_rows(trained)] == expected
    assert imread(trained / "outputs" / "training_curves.png").shape[1] > 1000
    # Far above the 10 % of chance; that of the model which is saved.
    assert told["test"]["top1"] > 60
    assert scores(model, make_loaders(load_digits())[2])[1] == told["test"]["top1"]


def test_output_names_the_data_and_ends_with_the_test_result(complete):
    result = complete(*TINY, "--epochs", 2)
    assert result.err == ""
    for pattern in (
        r"^data: +digits, 100 / 180 / 180 images",
        r"^recipe:   article: epochs 2, batch_size 50, .*depth 1,",
        r"^steps: +AdamW\(lr=0.001, weight_decay=0.0001\); "
        r"CosineAnnealingLR\(T_max=2\), every epoch$",
        r"^Epoch +2/2  Train Loss: [\d.]+  Acc: [\d.]+ %  \|  Val Loss: .*Top-5: [\d.]+ %",
        r"best so far, saved to checkpoints/best_model.pt",
        r"^Test Loss: [\d.]+\nTest Acc: [\d.]+ %\nTest Top-5: [\d.]+ %  \(digits\)\nBest Val Acc: "
        r"[\d.]+ % @ Epoch [12]\n",
    ):
        assert re.search(pattern, result.out, re.MULTILINE), pattern


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_printed_stored_and_trained_and_flags_win_over_it(complete, recipe):
    flags = ["--recipe", recipe, "--epochs", 1, "--label_smoothing", 0.25, "--elastic", 0.5]
    result = complete(*TINY, *flags)
    assert result.err == ""
    stored = history()["settings"]
    assert stored["recipe"] == recipe
    by_hand = {"label_smoothing": 0.25, "elastic": 0.5, "depth": 1}
    for name, value in by_hand.items():
        assert re.search(rf"^recipe:   {recipe}: .*{name} {value}", result.out, re.MULTILINE)
    by_hand |= {"epochs": 1, "embed_dim": 16, "batch_size": 50, "num_heads": 2, "patch_drop": 0.0}
    by_hand |= {"ema_decay": None}  # two steps are too few for an average
    expected = RECIPES[recipe] | DATASET_SETTINGS["digits"] | by_hand
    expected.pop("hflip", None)  # a mirrored digit may be another one
    for name in ("optimizer", "scheduler"):  # stored as resolved
        expected.pop(name, None)
    assert stored | expected == stored
    # What was stored is what was trained.
    model, checkpoint = load_checkpoint(BEST)
    assert checkpoint["settings"] == stored and model.pool == stored["pool"]
    assert ("pos_embed" in dict(model.named_parameters())) == (stored["pos_embed"] == "learned")
    assert scores(model, make_loaders(load_digits())[2])[1] == history()["test"]["top1"]


def test_one_seed_gives_bit_identical_weights_and_another_does_not(complete):
    """Nor does another strength of augmentation."""
    seen = []
    for flags in ("", "--num_workers 2", "--seed 2", "--elastic 1.5", "--erase 0.9", "--shear 20"):
        complete(*TINY, "--epochs=2", *flags.split())
        seen.append(weights())
    assert identical(seen[0], seen[1])
    for i, other in enumerate(seen[1:]):
        assert not any(identical(other, another) for another in seen[i + 2 :])


# ------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize(
    ("one", "another", "tolerance"),
    [
        ("--precision fp32", "--precision bf16", 0.02),
        # Where the order of sums is all that may differ.
        pytest.param("--compile off", "--compile on", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_faster_arithmetic_learns_alike(complete, one, another, tolerance):
    losses = []
    for flag in (one, another):
        complete(*TINY, *f"--epochs=3 --dropout=0 --precision=fp32 {flag}".split())
        losses.append(history()["epochs"][-1]["train_loss"])
        assert history()["precision"] in flag or "compile" in flag
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0] != losses[1] or "compile" in one


def test_an_epochs_averages_are_exact_over_its_images(complete):
    """Of a network that learns nothing, whose batches are uneven and pass it in three parts."""
    flags = "--optimizer SGD(lr=1e-30) --label_smoothing 0 --batch_size 40 --grad_accum_steps 3"
    complete(*DESCENT, *flags.split(), "--epochs", 1)
    loader = make_loaders(load_digits(), 40, train_samples=100)[0]
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    logits = load_checkpoint(BEST)[0](images)
    [row] = history()["epochs"]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert row["train_acc"] == pytest.approx(top1, rel=1e-5)


def test_gradients_are_clipped_to_the_norm_asked_for_and_reported_as_they_were(complete):
    seen = {}
    for name, lr, clip in (("start", 1e-30, 0), ("free", 1, 0), ("clipped", 1, 0.05)):
        optimizer = ["--optimizer", f"SGD(lr={lr})", "--grad_clip", clip]
        complete(*DESCENT, *optimizer, "--batch_size", 100, "--epochs", 1)
        seen[name] = torch.cat([value.flatten() for value in weights(LAST).values()])
    norms = {name: (seen[name] - seen["start"]).norm().item() for name in seen}
    assert norms["clipped"] == pytest.approx(0.05, rel=1e-3) and norms["free"] > 0.5
    assert history()["epochs"][0]["grad_norm"] == pytest.approx(norms["free"], rel=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "SGD(lr=0.05, momentum=0.9, nesterov=True)", "--scheduler", "onecycle"],
        ["--optimizer", "Muon", "--head_lr", "1e-3", "--no_decay", "--warmup_epochs", "1"],
        # Its curvature needs batches that agree: all images at once, no dropout, fp32.
        [
            *("--optimizer", "LBFGS(lr=0.3, max_iter=5)", "--scheduler", "plateau"),
            *("--batch_size=500", "--dropout=0", "--precision=fp32"),
        ],
        # At this rate it learns less in four epochs than dropout masks change the loss.
        [
            *("--optimizer", "lamb(adam_w_mode=False)", "--scheduler", "CosineDecayLR"),
            "--dropout=0",
        ],
    ],
)
def test_optimizers_and_schedules_train_from_the_command_line(complete, flags):
    result = complete(*TINY, "--epochs", 4, "--train_samples", 300, *flags)
    losses = [row["train_loss"] for row in history()["epochs"]]
    assert losses[-1] < losses[0]
    settings, name = history()["settings"], flags[1].split("(")[0]
    assert settings["lr"] == {"SGD": 0.05, "LBFGS": 0.3}.get(name, 1e-3)
    assert settings["optimizer"].lower().startswith(name.lower())
    assert settings["optimizer"] in result.out and settings["scheduler"] in result.out
    assert read(BEST)["settings"] == settings


def test_patches_are_left_out_in_the_first_two_thirds_of_the_epochs(complete, monkeypatch):
    tokens = []  # per step

    def embed(model, x):
        tokens.append(original(model, x).shape[1])
        return original(model, x)

    original = ViT.embed
    monkeypatch.setattr(ViT, "embed", embed)
    complete(*TINY, "--epochs", 4, "--patch_drop", 0.5, "--pool", "mean", "--patch_size", 7)
    assert [n for n, _ in groupby(tokens)] == [8, 16, 8, 16]


def test_the_schedule_moves_with_every_step(complete):
    """A run's rates are those of PyTorch's own OneCycleLR, called once a step."""
    flags = ["--epochs", 3, "--batch_size", 20, "--scheduler", "onecycle", "--lr", 0.01]
    complete(*TINY, *flags, "--optimizer", "SGD(momentum=0.9)")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=15)
    expected = []
    for _ in range(15):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step() if len(expected) < 15 else None
    found = [row["lr"]["all parameters"] for row in history()["epochs"]]
    assert found == pytest.approx([sum(expected[i : i + 5]) / 5 for i in (0, 5, 10)])


def test_the_average_is_validated_and_saved_beside_the_raw_weights(complete):
    for flags in (("--ema_decay", 0.9), ("--swa_start", 1)):
        complete(*TINY, "--epochs", 6, "--lr", 1e-2, *flags)
        model, checkpoint = load_checkpoint(BEST)
        raw = checkpoint["raw_model_state_dict"]
        assert set(raw) == set(model.state_dict())
        if checkpoint["epoch"] > 1:  # SWA's mean of one epoch is that epoch
            assert not torch.equal(raw["head.weight"], model.head.weight)
        # The accuracy it was saved with is that of the averaged weights.
        top1 = scores(model, make_loaders(load_digits())[1])[1]
        assert top1 == pytest.approx(checkpoint["best_acc"])


def test_from_swa_start_on_only_averages_compete(complete):
    """The raw model of an earlier epoch is better than all averages, and is kept."""
    flags = "--train_samples 400 --batch_size 25 --dropout 0 --translate 0 --lr 1e-2 --epochs 6"
    wild = "LambdaLR('1 if epoch < 4 else 100')"
    complete(*TINY, *flags.split(), "--swa_start", 5, "--scheduler", wild)
    rows = history()["epochs"]
    raw, averages = [row["val_acc"] for row in rows[:4]], [row["val_acc"] for row in rows[4:]]
    assert max(raw) > max(averages)
    assert rows[4]["is_best"] and rows[5]["is_best"] == (averages[1] > averages[0])
    checkpoint, kept = read(BEST), read(BEST.with_name("best_model.raw.pt"))
    assert checkpoint["best_acc"] == max(averages) and checkpoint["epoch"] >= 5
    assert kept["best_acc"] == max(raw) and "raw_model_state_dict" not in kept
    stars = ["yes" if row["is_best"] else "no" for row in rows]
    assert [row[4] for row in todo_rows()] == stars
    # It goes with its run where another takes the place.
    complete(*TINY, "--epochs", 1)
    (aside,) = (path for path in BEST.parent.iterdir() if path.is_dir())
    assert (aside / "best_model.raw.pt").exists()
    assert not BEST.with_name("best_model.raw.pt").exists()


# ------------------------------------------------------------------------------------- compiling


def test_compiling_counts_as_time_of_the_run_but_not_in_the_rate(complete, monkeypatch):
    def compile_slowly(model, *_):
        time.sleep(1)
        return model

    monkeypatch.setattr(speed, "compile_network", compile_slowly)
    complete(*TINY, "--epochs", 1)
    [row] = history()["epochs"]
    timing = Path("checkpoints/timing_cpu.txt").read_text()
    assert row["seconds"] >= 1 and f"total_train_time: {row['seconds']:.2f}" in timing
    assert 100 / row["images_per_second"] <= row["seconds"] - 1


def test_where_compiling_fails_training_goes_on_with_a_note(complete, monkeypatch):
    def broken(model, **_):
        def forward(images):
            raise RuntimeError("no C++ compiler\nfound")

        return forward

    complete(*TINY, "--epochs=1", "--compile", "off")
    reference = weights()
    monkeypatch.setattr(torch, "compile", broken)
    result = complete(*TINY, "--epochs=1", "--compile", "on")
    assert result.err.startswith("note: torch.compile failed") and result.err.count("\n") == 1
    assert "no C++ compiler found" in result.err
    assert identical(weights(), reference)


@needs_cuda
def test_a_run_on_a_gpu(complete):
    complete(*QUICK, "--device", "cuda")
    assert Path("checkpoints/timing_cuda.txt").exists()
    assert history()["test"]["top1"] > 60


# -------------------------------------------------------------------------------------- the data


@needs_mnist
def test_auto_takes_mnist_where_it_is(complete):
    flags = f"--epochs 1 --depth 1 --embed_dim 16 --data_dir {MNIST} --train_samples 64"
    assert "(mnist)" in complete(*flags.split()).out
    assert read(BEST)["dataset"] == "mnist"


def test_auto_without_mnist_or_network_warns_and_trains_on_the_digits(run, complete, offline):
    flags = "--epochs 1 --depth 1 --embed_dim 16 --train_samples 64".split()
    result = complete(*flags)
    assert "WARNING: training on scikit-learn's 8x8 digits, NOT on MNIST" in result.err
    assert "t10k-labels-idx1-ubyte.gz (MD5 ec29112dd5afa0611ce80d1b7f02629c)" in result.err
    assert "(digits)" in result.out
    assert_one_error_line(run(train.main, *flags, "--dataset", "mnist"), "cannot be downloaded")
    assert not Path("mnist").exists()
    # Who names a folder gets no other data set than what is in it.
    assert_one_error_line(
        run(train.main, *flags, "--data_dir", "mnits"), "mnits/MNIST/raw", "cannot be downloaded"
    )
    assert not Path("mnits").exists()
    assert socket.getdefaulttimeout() is None  # the download's own limit ends with it
    # Settings that don't fit are told before a download is tried.
    assert_one_error_line(run(train.main, "--patch_size", "5"), "--patch_size 5")


@needs_mnist
def test_a_truncated_mnist_file_is_an_error_not_a_reason_for_the_digits(run, tmp_path):
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (MNIST / "MNIST" / "raw").glob("*.gz"):
        content = path.read_bytes()
        (raw / path.name).write_bytes(content[:-100] if "t10k-images" in path.name else content)
    result = run(train.main)
    assert_one_error_line(result, "t10k-images-idx3-ubyte.gz is damaged", "delete it")


# ----------------------------------------------------------------------------------------- errors


def test_help_groups_the_flags_and_gives_every_default(run):
    sections = re.split(r"\n(?=\w[^\n]*:\n)", run(train.main, "--help").out)
    for heading, names in (
        ("recipe", "label_smoothing class_weights"),
        ("augmentation", "rotate erase hflip random_crop rand_augment marks augmix"),
        ("mixing", "mixup cutmix"),
    ):
        section = next(text for text in sections if text.startswith(heading))
        assert set(names.split()) <= set(re.findall(r"\n  --(\w+)", section))
    text = " ".join(" ".join(sections).split())
    for heading in ("data:", "recipe", "model:", "machine:", "what is written:"):
        assert heading in text
    for name, flag in FLAGS.items():
        assert re.search(rf"--{name} .*?\(default: {re.escape(str(flag.default))}\)", text), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", "--epochs '0' whole number of at least 1"),
        ("--lr nan", "--lr 'nan' above 0"),
        ("--optimizer SGD(lr=0.1) --lr 1e-5", "--lr 1e-05 SGD(lr=0.1) sets its own"),
        ("--optimizer SGD(lr=0.1,weight_decay=0.1) --weight_decay 1", "--weight_decay 1.0 own"),
        ("--optimizer Rprop --weight_decay 5", "--weight_decay 5.0 Rprop has none"),
        ("--scheduler OneCycleLR(max_lr=0.5) --lr 0.1", "--lr 0.1 sets all rates itself"),
        ("--scheduler OneCycleLR(max_lr=0.5) --head_lr 0.1", "--head_lr 0.1 rates itself"),
        ("--scheduler CyclicLR(base_lr=0.1,max_lr=0.5) --lr 0.1", "--lr 0.1 rates itself"),
        ("--data_dir there", "--data_dir there scikit-learn"),
        ("--swa_anneal_epochs 7", "--swa_anneal_epochs 7 no --swa_lr"),
        ("--swa_start 1 --swa_anneal_strategy linear", "--swa_anneal_strategy no --swa_lr"),
        ("--optimizer LBFGS --grad_clip 2", "--grad_clip 2.0 LBFGS not clipped"),
        ("--optimizer AdamW(clip_grad_max_norm=1) --grad_clip 2", "--grad_clip clips by its own"),
        ("--optimizer AdmaW", "AdmaW AdamW"),
        ("--warmup_epochs 100", "--warmup_epochs 100"),
        ("--optimizer LBFGS --head_lr 0.1", "--head_lr LBFGS"),
        ("--optimizer Rprop --no_decay", "--no_decay Rprop"),
        ("--dropout 1", "--dropout '1' below 1"),
        ("--hflip", "--hflip mirrored digits another class leave it out"),
        ("--hflip 0.2", "--hflip mirrored digits another class leave it out"),
        ("--random_crop 28", "--random_crop 28 side of 28 at most 27"),
        ("--color_jitter 1", "--color_jitter '1' below 1"),
        ("--rand_augment -1", "--rand_augment '-1' at least 0"),
        ("--marks 1", "--marks '1' below 1"),
        ("--keep_clean 0.2", "--keep_clean 0.2 no effect --stroke --noise are all off"),
        ("--augmix 0.2", "--augmix 0.2 no effect --stroke --noise are all off"),
        ("--mixup -1", "--mixup '-1' at least 0"),
        ("--cutmix inf", "--cutmix 'inf' number of at least 0"),
        ("--class_weights on", "--class_weights 'on' none auto"),
        ("--embed_dim 96 --num_heads 5", "--embed_dim 96 not divisible --num_heads 5"),
        ("--patch_size 5", "--patch_size 5 28"),
        ("--patch_drop 0.5 --epochs 1", "--patch_drop 0.5 has no effect more epochs"),
        ("--device foo", "--device foo expected cpu cuda mps"),
        ("--device mps", "--device mps Apple cpu"),
        ("--device cuda:x", "--device cuda:x"),
        ("--device cpu:", "--device cpu: expected"),
        ("--mlp_ratio 0.001", "--mlp_ratio 0.001 neuron"),
        ("--embed_dim 1000000000", "--embed_dim '1000000000' at most"),
        ("--compile on --grad_accum_steps 2", "--compile on --grad_accum_steps"),
        ("--dataset imagenet", "--dataset imagenet mnist digits"),
        ("--epcohs 3", "--epcohs did you mean --epochs?"),
        ("--epochs", "--epochs expected one argument"),
        ("stray", "stray --help"),
        ("--save_dir file/x", "file/x cannot be written"),
        ("--output_dir file", "file/training_curves.png cannot be written"),
        ("--todo_path .", "cannot be written folder"),
        ("--todo_path /dev/null", "/dev/null cannot be written device"),
        ("--device cuda:9999", "--device cuda:9999 CUDA" if NO_CUDA else "--device cuda:9999 GPUs"),
    ],
)
def test_wrong_usage_ends_in_one_line_before_anything_is_written(run, tmp_path, flags, words):
    (tmp_path / "file").write_text("kept")
    result = run(train.main, "--dataset", "digits", *flags.split(" "))
    assert_one_error_line(result, *words.split())
    assert (tmp_path / "file").read_text() == "kept"
    assert not list(tmp_path.rglob("history.json")) and not list(tmp_path.rglob("*.tmp*"))


def test_numbers_out_of_all_bounds_end_the_run_and_keep_the_best_model(run, complete):
    """In one step, of which nothing is saved, or in many small ones."""
    complete(*TINY, "--epochs", 1)
    before = BEST.read_bytes()
    for flags, words in (
        ("--lr 1e30 --weight_decay 1e30 --grad_clip 0", "of epoch 1 is not finite"),
        ("--optimizer SGD(lr=1e30) --batch_size 100", "out of all bounds after epoch 1"),
    ):
        result = run(train.main, *DESCENT, *flags.split(), "--epochs", 3)
        assert_one_error_line(result, words, "lower learning rate")
        assert "--resume" not in result.err  # it would continue the run before
        assert BEST.read_bytes() == before


def run_out_of_an_apples_memory():
    raise RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)")


def test_out_of_memory_is_one_line(run):
    assert_one_error_line(run(run_out_of_an_apples_memory), "out of memory", "--batch_size")
    assert_one_error_line(run(lambda: torch.empty(2**50)), "out of memory", "--batch_size")


# ------------------------------------------------------------------------ what was there before


def test_a_finished_model_of_other_settings_is_kept_with_its_files(complete):
    here = BEST.parent
    complete(*TINY, "--epochs", 2)
    names = ("best_model.pt", "history.json", "timing_cpu.txt")
    before = {name: (here / name).read_bytes() for name in names}
    result = complete(*TINY, "--epochs", 1)
    (aside,) = (path for path in here.iterdir() if path.is_dir())
    assert {name: (aside / name).read_bytes() for name in names} == before
    (line,) = (line for line in result.out.splitlines() if line.startswith("kept: "))
    assert f"{aside.name}/best_model.pt" in line
    assert f"{read(aside / 'best_model.pt')['best_acc']:.2f} %" in line
    assert len(history()["epochs"]) == 1
    # The same settings once more: that model comes out again.
    assert "kept: " not in complete(*TINY, "--epochs", 1).out
    # A second one, made in the same second, and one that isn't ours.
    assert "kept: " in complete(*TINY, "--epochs", 2).out
    BEST.write_bytes(b"mine")
    assert "kept:     a best model of unknown settings" in complete(*TINY, "--epochs", 1).out
    assert sorted(len(list(p.iterdir())) for p in here.iterdir() if p.is_dir()) == [3, 3, 3]
    assert b"mine" in [path.read_bytes() for path in here.rglob("best_model.pt")]


def test_a_run_that_moves_to_another_folder_keeps_the_model_there(complete):
    for name, epochs in (("here", 1), ("there", 2)):
        complete(*TINY, "--epochs", epochs, "--save_dir", name)
    result = complete("--resume", "here/last.pt", "--save_dir", "there", "--epochs", 3)
    assert "kept: " in result.out
    (aside,) = (path for path in Path("there").iterdir() if path.is_dir())
    other = read(aside / "best_model.pt")
    assert other["settings"]["epochs"] == 2
    # A run that is extended stays the same run, for the report.
    fingerprint = history("there")["fingerprint"]
    assert history("here")["fingerprint"] == fingerprint != other["fingerprint"]


# ----------------------------------------------------------------------------------------- stopping


def test_ctrl_c_in_the_first_epoch_leaves_an_earlier_runs_results(run, complete, monkeypatch):
    complete(*TINY, "--epochs", 1)
    names = ("best_model.pt", "history.json", "training_curves.png", "TODO.md")
    before = {path: path.read_bytes() for name in names for path in Path().rglob(name)}

    def interrupted(*_) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.WeightAverage, "step_batch", interrupted)
    result = run(train.main, *TINY, "--epochs", 9)
    assert result.status == 130 and "after 0 of 9 epochs and 1 steps, all saved" in result.err
    assert len(before) == 4 and {path: path.read_bytes() for path in before} == before


@posix
@pytest.mark.parametrize("closed", [False, True])
def test_ctrl_c_or_a_closed_terminal_leave_model_history_and_todo_consistent(start, folder, closed):
    import pty

    here = folder("run")
    ours, theirs = pty.openpty()
    process = start(here, [*TINY, "--epochs", 5000], output=os.ttyname(theirs))
    printed = b""
    while b"Epoch  2/" not in printed:
        printed += os.read(ours, 10_000)
    os.close(theirs)
    if closed:
        os.close(ours)
    else:
        os.write(ours, b"\x03")
        while b"--resume" not in printed:
            printed += os.read(ours, 10_000)
    process.join(60)
    assert process.exitcode == (129 if closed else 130)
    told, state = history(), read_run_state(LAST)
    finished = len(told["epochs"])
    assert state["position"]["epoch"] == finished >= 2 and told["test"] is None
    assert closed or f"stopped by SIGINT after {finished} of 5000 epochs".encode() in printed
    assert sum("done" in row for row in todo_rows()) == finished
    best = max(told["epochs"], key=lambda row: row["val_acc"])
    checkpoint = load_checkpoint(BEST)[1]
    assert (checkpoint["epoch"], checkpoint["best_acc"]) == (best["epoch"], best["val_acc"])
    assert not list(here.rglob("*.tmp*"))


@posix
def test_a_reader_who_has_gone_costs_nothing(start, folder):
    """As in `train.py | head`."""
    here = folder("run")
    os.mkfifo("pipe")
    process = start(here, [*TINY, "--epochs", 5000], output=str(here / "pipe"))
    with open("pipe") as reader:
        while not reader.readline().startswith("Epoch  1/"):
            assert process.is_alive()
    process.join(60)
    assert process.exitcode == 141 and Path("err.txt").read_text() == ""
    assert read(LAST)["position"]["epoch"] >= 1


def test_a_failing_disk_is_not_taken_for_a_closed_terminal(run):
    def main() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        run(main)
