"""Training from the command line: what it writes, what it repeats, how it stops and refuses."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import MNIST, QUICK, ROOT, assert_one_error_line, needs_cuda, needs_mnist
from matplotlib.image import imread

import optim
import train
from data.digits import load_digits
from recipes import DATASET_SETTINGS, DEFAULTS, RECIPES
from saving.checkpoint import load_checkpoint
from utils import evaluate, make_loaders

TINY = "--device cpu --dataset digits --train_samples 100 --batch_size 50".split()
TINY += "--depth 1 --embed_dim 16".split()


def todo_rows(folder) -> list[str]:
    text = (folder / "TODO.md").read_text()
    return [line for line in text.splitlines() if re.match(r"\| \d", line)]


def test_a_run_writes_all_that_it_promises(trained):
    model, checkpoint = load_checkpoint(trained / "checkpoints" / "best_model.pt")
    published = {"epoch", "model_state_dict", "optimizer_state_dict", "best_acc"}
    ours = {"model_config", "normalization", "dataset", "class_names", "settings", "versions"}
    ours |= {"scheduler_state_dict", "fingerprint", "calibration"}
    assert set(checkpoint) == published | ours
    assert checkpoint["dataset"] == "digits"
    assert checkpoint["model_config"]["depth"] == len(model.blocks) == 2

    history = json.loads((trained / "checkpoints" / "history.json").read_text())
    assert [row["epoch"] for row in history["epochs"]] == list(range(1, 16))
    for row in history["epochs"]:
        assert row["train_loss"] > 0 and row["val_loss"] > 0 and row["images_per_second"] > 0
    best = max(history["epochs"], key=lambda row: row["val_acc"])
    assert (checkpoint["epoch"], checkpoint["best_acc"]) == (best["epoch"], best["val_acc"])
    assert history["test"]["best_epoch"] == best["epoch"]
    assert history["epochs"][-1]["train_loss"] < history["epochs"][0]["train_loss"]
    cosine = [3e-3 * (1 + math.cos(math.pi * epoch / 15)) / 2 for epoch in range(15)]
    rates = [row["lr"]["all parameters"] for row in history["epochs"]]
    assert rates == pytest.approx(cosine)
    assert all(row["grad_norm"] > 0 for row in history["epochs"])
    marked = [row["epoch"] for row in history["epochs"] if row["is_best"]]
    assert marked[0] == 1 and marked[-1] == best["epoch"]
    fingerprints = {history["fingerprint"], checkpoint["fingerprint"]}
    assert len(fingerprints) == 1 and len(history["fingerprint"]) == 12

    timing = (trained / "checkpoints" / "timing_cpu.txt").read_text().splitlines()
    keys = "device epochs batch_size total_train_time avg_time_per_epoch best_val_acc test_acc "
    keys += "test_top5 dataset fingerprint"
    assert [line.split(": ")[0] for line in timing] == keys.split()
    assert timing[-4] == f"test_acc: {history['test']['top1']:.2f}"

    rows = todo_rows(trained)
    assert len(rows) == 15
    for row, epoch in zip(rows, history["epochs"], strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:4] == ["done", f"{epoch['train_loss']:.4f}", f"{epoch['val_acc']:.2f}"]
    assert imread(trained / "outputs" / "training_curves.png").shape[1] > 1000


def test_the_digits_are_learned(trained):
    """Far above the 10 % of chance after a few passes of a small network."""
    history = json.loads((trained / "checkpoints" / "history.json").read_text())
    assert history["test"]["top1"] > 60


def test_output_names_the_data_and_ends_with_the_test_result(run):
    result = run(train.main, *TINY, "--epochs", 2)
    assert result.status == 0 and result.err == ""
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
def test_a_recipe_is_printed_and_stored_and_flags_win_over_it(run, tmp_path, recipe):
    flags = ["--recipe", recipe, "--epochs", 1, "--label_smoothing", 0.25, "--elastic", 0.5]
    result = run(train.main, *TINY, *flags)
    assert result.status == 0 and result.err == ""
    history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
    stored = history["settings"]
    assert stored["recipe"] == recipe
    for given, value in {"label_smoothing": 0.25, "elastic": 0.5, "depth": 1}.items():
        assert stored[given] == value
        assert re.search(rf"^recipe:   {recipe}: .*{given} {value}", result.out, re.MULTILINE)
    texts = {"optimizer", "scheduler", "scheduler_interval"}  # stored as resolved
    given = {"epochs", "label_smoothing", "elastic", "depth", "embed_dim", "batch_size"}
    for name, value in (RECIPES[recipe] | DATASET_SETTINGS["digits"]).items():
        if name not in texts | given:
            assert stored[name] == value
    assert load_checkpoint(tmp_path / "checkpoints" / "best_model.pt")[1]["settings"] == stored


def test_recipes_say_only_what_flags_can_say():
    for settings in RECIPES.values():
        assert settings.keys() <= DEFAULTS.keys()


def test_strong_augmentation_reaches_the_training_images(run, tmp_path):
    """The same run but for a strength ends with other weights."""
    seen = []
    for flags in ([], ["--elastic", "1.5"], ["--erase", "0.9"], ["--scale=0.3"], ["--shear", "20"]):
        assert run(train.main, *TINY, "--epochs=1", *flags).status == 0
        seen.append(weights(tmp_path)["head.weight"])
    for i, a in enumerate(seen):
        assert all(not torch.equal(a, b) for b in seen[i + 1 :])


def test_mean_pooling_and_fixed_positions_from_training_to_a_loaded_model(run, tmp_path):
    flags = ["--pool", "mean", "--pos_embed", "sincos2d"]
    assert run(train.main, *TINY, "--epochs=1", *flags).status == 0
    model, checkpoint = load_checkpoint(tmp_path / "checkpoints" / "best_model.pt")
    assert (model.pool, checkpoint["model_config"]["pos_embed"]) == ("mean", "sincos2d")
    _, _, loader = make_loaders(load_digits())
    history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
    assert evaluate(model, loader, torch.nn.CrossEntropyLoss(), "cpu")[1] == history["test"]["top1"]


def test_compiling_counts_as_time_of_the_run_but_not_in_the_rate(run, tmp_path, monkeypatch):
    def compile_slowly(model, *_):
        time.sleep(2)
        return model

    monkeypatch.setattr(train, "compile_network", compile_slowly)
    assert run(train.main, *TINY, "--epochs", 1).status == 0
    [row] = json.loads((tmp_path / "checkpoints" / "history.json").read_text())["epochs"]
    timing = (tmp_path / "checkpoints" / "timing_cpu.txt").read_text()
    assert row["seconds"] >= 2 and f"total_train_time: {row['seconds']:.2f}" in timing
    assert 100 / row["images_per_second"] <= row["seconds"] - 2


def test_compiled_training_learns_the_same(run, tmp_path):
    """In fp32 and without dropout, where the order of sums is all that may differ."""
    losses = []
    for mode in ("off", "on"):
        flags = ["--epochs=2", "--dropout=0", "--precision=fp32", "--compile", mode]
        result = run(train.main, *TINY, *flags)
        assert result.status == 0
        history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
        losses.append(history["epochs"][-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_where_compiling_fails_training_goes_on_with_a_note(run, tmp_path, monkeypatch):
    def broken(model, **_):
        def forward(images):
            raise RuntimeError("no C++ compiler\nfound")

        return forward

    expected = run(train.main, *TINY, "--epochs=1", "--compile", "off")
    reference = weights(tmp_path)
    monkeypatch.setattr(torch, "compile", broken)
    result = run(train.main, *TINY, "--epochs=1", "--compile", "on")
    assert expected.status == result.status == 0
    assert result.err.startswith("note: torch.compile failed") and result.err.count("\n") == 1
    assert "no C++ compiler found" in result.err
    assert all(torch.equal(reference[name], value) for name, value in weights(tmp_path).items())


def weights(folder) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / "best_model.pt"
    return torch.load(path, weights_only=True)["model_state_dict"]


def test_one_seed_gives_bit_identical_weights_and_another_does_not(run, tmp_path):
    seen = []
    for seed, workers in ((1, 0), (1, 2), (2, 0)):
        assert (
            run(train.main, *TINY, "--seed", seed, "--num_workers", workers, "--epochs=2").status
            == 0
        )
        seen.append(weights(tmp_path))
    first, same, other = seen
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_fp32_and_bf16_learn_alike(run, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        assert run(train.main, *TINY, "--epochs=3", "--precision", precision).status == 0
        history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
        assert history["precision"] == precision
        losses.append(history["epochs"][-1]["train_loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def an_epoch(model, loader, *hooks, **options) -> dict:
    """The row of an epoch in which nothing is learned."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for hook in hooks:
        optimizer.register_step_pre_hook(hook)
    settings = {"epochs": 5, "steps_per_epoch": len(loader)}
    schedule = optim.build_scheduler("ConstantLR(factor=1)", optimizer, **settings)
    totals = train.Totals.of_nothing(optimizer, torch.device("cpu"))
    parts = optimizer, schedule, optim.WeightAverage(model), totals
    criterion = torch.nn.CrossEntropyLoss()
    for _ in train.train_steps(model, loader, criterion, *parts, precision="fp32", **options):
        pass
    return totals.row(optimizer, train.ALONE)


def test_gradients_are_clipped_to_the_norm_asked_for(digits_loader):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    norms = []

    def note_norm(*_) -> None:
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        norms.append(gradients.norm().item())

    for clip in (0.05, 0):
        an_epoch(model, digits_loader, note_norm, grad_clip=clip)
    clipped, free = norms[: len(digits_loader)], norms[len(digits_loader) :]
    assert clipped == pytest.approx([0.05] * len(clipped), rel=1e-3)
    assert min(free) > 0.5


@pytest.fixture
def digits_loader():
    return make_loaders(load_digits(), 200)[0]


def test_training_averages_are_exact_over_samples(digits_loader):
    """With no learning, the epoch's loss and accuracy are those of all its images at once."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    criterion = torch.nn.CrossEntropyLoss()
    batches = list(digits_loader)
    digits_loader.epoch = 0
    row = an_epoch(model, digits_loader, grad_clip=0, grad_accum_steps=3)
    logits = model(torch.cat([images for images, _ in batches]))
    labels = torch.cat([labels for _, labels in batches])
    assert row["train_loss"] == pytest.approx(criterion(logits, labels).item(), rel=1e-5)
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert row["train_acc"] == pytest.approx(top1, rel=1e-5)


# -------------------------------------------------------------- optimizers, schedules, averages


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
        ["--optimizer", "lamb(adam_w_mode=False)", "--scheduler", "CosineDecayLR"],
    ],
)
def test_optimizers_and_schedules_train_from_the_command_line(run, tmp_path, flags):
    result = run(train.main, *TINY, "--epochs", 4, "--train_samples", 500, *flags)
    assert result.status == 0, result.err
    history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
    losses = [row["train_loss"] for row in history["epochs"]]
    assert losses[-1] < losses[0]
    call = history["settings"]["optimizer"]
    assert history["settings"]["lr"] == {"SGD": 0.05, "LBFGS": 0.3}.get(
        flags[1].split("(")[0], 1e-3
    )
    assert call.lower().startswith(flags[1].split("(")[0].lower()) and call in result.out
    assert history["settings"]["scheduler"] in result.out
    _, checkpoint = load_checkpoint(tmp_path / "checkpoints" / "best_model.pt")
    assert checkpoint["settings"]["optimizer"] == call


def test_the_average_is_validated_and_saved_beside_the_raw_weights(run, tmp_path):
    for flags in (("--ema_decay", 0.9), ("--swa_start", 1)):
        assert run(train.main, *TINY, "--epochs", 6, "--lr", 1e-2, *flags).status == 0
        model, checkpoint = load_checkpoint(tmp_path / "checkpoints" / "best_model.pt")
        raw = checkpoint["raw_model_state_dict"]
        assert set(raw) == set(model.state_dict())
        if checkpoint["epoch"] > 1:  # SWA's mean of one epoch is that epoch
            assert not torch.equal(raw["head.weight"], model.head.weight)
        # The accuracy it was saved with is that of the averaged weights.
        loader = make_loaders(load_digits())[1]
        top1 = evaluate(model, loader, torch.nn.CrossEntropyLoss(), "cpu")[1]
        assert top1 == pytest.approx(checkpoint["best_acc"])


# --------------------------------------------------------------------------------------- settings


def resolved(run, tmp_path, *flags) -> dict:
    assert run(train.main, *flags, "--train_samples", 30).status == 0
    return json.loads((tmp_path / "checkpoints" / "history.json").read_text())["settings"]


def test_a_flag_wins_over_the_data_sets_setting_and_that_over_the_recipe(run, tmp_path):
    flags = "--dataset digits --epochs 1 --batch-size 10 --embed_dim=16".split()
    settings = resolved(run, tmp_path, *flags)
    assert (settings["epochs"], settings["batch_size"], settings["embed_dim"]) == (1, 10, 16)
    assert settings["depth"] == DATASET_SETTINGS["digits"]["depth"] != DEFAULTS["depth"]
    assert settings["lr"] == DEFAULTS["lr"]


@needs_mnist
def test_auto_takes_mnist_where_it_is(run, tmp_path):
    flags = f"--epochs 1 --depth 1 --embed_dim 16 --data_dir {MNIST} --train_samples 64"
    result = run(train.main, *flags.split())
    assert result.status == 0 and "(mnist)" in result.out
    assert load_checkpoint(tmp_path / "checkpoints" / "best_model.pt")[1]["dataset"] == "mnist"


def test_auto_without_mnist_or_network_warns_and_trains_on_the_digits(run, tmp_path, offline):
    flags = "--epochs 1 --depth 1 --embed_dim 16 --train_samples 64".split()
    result = run(train.main, *flags)
    assert result.status == 0
    assert "WARNING: training on scikit-learn's 8x8 digits, NOT on MNIST" in result.err
    assert "t10k-labels-idx1-ubyte.gz (MD5 ec29112dd5afa0611ce80d1b7f02629c)" in result.err
    assert "(digits)" in result.out
    assert_one_error_line(run(train.main, *flags, "--dataset", "mnist"), "cannot be downloaded")
    assert not (tmp_path / "mnist").exists()
    # Settings that don't fit are told before a download is tried.
    assert_one_error_line(run(train.main, "--patch_size", "5"), "--patch_size 5")


def test_who_names_a_folder_gets_no_other_data_set_than_what_is_in_it(run, tmp_path, offline):
    result = run(train.main, *"--data_dir mnits --epochs 1 --train_samples 64".split())
    assert_one_error_line(result, "mnits/MNIST/raw", "cannot be downloaded")
    assert "WARNING" not in result.err and not (tmp_path / "mnits").exists()


def test_help_groups_the_flags_and_gives_every_default(run):
    text = " ".join(run(train.main, "--help").out.split())
    for heading in ("data:", "recipe", "model:", "machine:", "what is written:"):
        assert heading in text
    for name, value in DEFAULTS.items():
        assert re.search(rf"--{name} .*?\(default: {re.escape(str(value))}\)", text), name


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_a_closed_terminal_costs_nothing(tmp_path):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "src" / "train.py", *QUICK, "--epochs", "5000"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    printed = b""
    while b"Epoch  2/" not in printed:
        printed += os.read(ours, 10_000)
    os.close(ours)
    assert process.wait(60) == 129
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
    assert state["position"]["epoch"] == len(history["epochs"]) >= 2
    command = [sys.executable, "-u", ROOT / "src" / "train.py", "--resume"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("resumed: ") for line in lines)
    process.kill()
    process.communicate()


def test_a_reader_who_has_gone_costs_nothing(tmp_path):
    """As in `train.py | head`."""
    command = [sys.executable, ROOT / "src" / "train.py", *QUICK, "--epochs", "5000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("Epoch  1/"):
            break
    process.stdout.close()
    assert process.wait(60) == 141 and "Traceback" not in process.stderr.read()
    process.stderr.close()
    last = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert last["position"]["epoch"] >= 1


def test_a_failing_disk_is_not_taken_for_a_closed_terminal(run):
    def main() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        run(main)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", "--epochs '0' whole number of at least 1"),
        ("--epochs 1.5", "--epochs '1.5'"),
        ("--epochs 99999999999999999999", "--epochs"),
        ("--batch_size -1", "--batch_size '-1'"),
        ("--lr nan", "--lr 'nan' above 0"),
        ("--optimizer SparseAdam", "SparseAdam sparse"),
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
        ("--optimizer SGD(momentun=0.9)", "momentun SGD("),
        ("--scheduler StepLR", "StepLR step_size"),
        ("--scheduler OneCycleLR(total_steps=5)", "OneCycleLR"),
        ("--ema_decay 0.9 --swa_start 2", "--ema_decay --swa_start"),
        ("--swa_start 999", "--swa_start 999"),
        ("--warmup_epochs 100", "--warmup_epochs 100"),
        ("--optimizer LBFGS --head_lr 0.1", "--head_lr LBFGS"),
        ("--optimizer Rprop --no_decay", "--no_decay Rprop"),
        ("--optimizer LBFGS(history_size=0)", "history_size"),
        ("--optimizer LBFGS(clip_grad_max_norm=1.0)", "LBFGS clipped"),
        ("--lr inf", "--lr 'inf'"),
        ("--lr 0", "--lr '0'"),
        ("--weight_decay -1", "--weight_decay '-1'"),
        ("--dropout 1", "--dropout '1' below 1"),
        ("--label_smoothing 2", "--label_smoothing"),
        ("--embed_dim 96 --num_heads 5", "--embed_dim 96 not divisible --num_heads 5"),
        ("--patch_size 5", "--patch_size 5 28"),
        ("--device foo", "--device foo expected cpu cuda"),
        ("--device cuda:x", "--device cuda:x"),
        ("--device cpu:", "--device cpu: expected"),
        ("--mlp_ratio 0.001", "--mlp_ratio 0.001 neuron"),
        ("--embed_dim 1000000000", "--embed_dim '1000000000' at most"),
        ("--num_workers 9999999", "--num_workers"),
        ("--dataset imagenet", "--dataset imagenet mnist digits"),
        ("--epcohs 3", "--epcohs did you mean --epochs?"),
        ("--epochs", "--epochs expected one argument"),
        ("stray", "stray --help"),
        ("--save_dir file/x", "file/x cannot be written"),
        ("--output_dir file", "file/training_curves.png cannot be written"),
        ("--todo_path .", "cannot be written folder"),
        ("--todo_path /dev/null", "/dev/null cannot be written device"),
        pytest.param(
            "--device cuda",
            "--device cuda no CUDA --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here"),
        ),
    ],
)
def test_wrong_usage_ends_in_one_line_before_anything_is_written(run, tmp_path, flags, words):
    (tmp_path / "file").write_text("kept")
    result = run(train.main, "--dataset", "digits", *flags.split(" "))
    assert_one_error_line(result, *words.split())
    assert (tmp_path / "file").read_text() == "kept"
    assert not list(tmp_path.rglob("history.json")) and not list(tmp_path.rglob("*.tmp*"))


@needs_mnist
def test_a_truncated_mnist_file_is_an_error_not_a_reason_for_the_digits(run, tmp_path):
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (MNIST / "MNIST" / "raw").glob("*.gz"):
        content = path.read_bytes()
        (raw / path.name).write_bytes(content[:-100] if "t10k-images" in path.name else content)
    result = run(train.main)
    assert_one_error_line(result, "t10k-images-idx3-ubyte.gz is damaged", "delete it")


def test_a_loss_that_explodes_ends_the_run_and_keeps_the_best_model(run, tmp_path):
    assert run(train.main, *TINY, "--epochs", 1).status == 0
    before = weights(tmp_path)
    flags = "--lr 1e30 --weight_decay 1e30 --grad_clip 0 --epochs 3".split()
    assert_one_error_line(
        run(train.main, *TINY, *flags), "of epoch 1 is not finite", "lower learning rate"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


def test_out_of_memory_is_one_line(run):
    assert_one_error_line(run(lambda: torch.empty(2**50)), "out of memory", "--batch_size")


@needs_cuda
def test_a_run_on_a_gpu(run, tmp_path):
    result = run(train.main, *QUICK, "--device", "cuda")
    assert result.status == 0
    assert (tmp_path / "checkpoints" / "timing_cuda.txt").exists()
    history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
    assert history["test"]["top1"] > 60


# ------------------------------------------------------------------------ what was there before


def best(folder) -> dict:
    return torch.load(folder / "best_model.pt", weights_only=True)


def test_a_finished_model_of_other_settings_is_kept_with_its_files(run, tmp_path):
    here = tmp_path / "checkpoints"
    assert run(train.main, *TINY, "--epochs", 2).status == 0
    names = ("best_model.pt", "history.json", "timing_cpu.txt")
    before = {name: (here / name).read_bytes() for name in names}
    result = run(train.main, *TINY, "--epochs", 1)
    assert result.status == 0
    (aside,) = (path for path in here.iterdir() if path.is_dir())
    assert {name: (aside / name).read_bytes() for name in names} == before
    (line,) = (line for line in result.out.splitlines() if line.startswith("kept: "))
    assert f"{aside.name}/best_model.pt" in line and f"{best(aside)['best_acc']:.2f} %" in line
    assert len(json.loads((here / "history.json").read_text())["epochs"]) == 1
    # The same settings once more: that model comes out again.
    assert "kept: " not in run(train.main, *TINY, "--epochs", 1).out
    # A second one, made in the same second, and one that isn't ours.
    result = run(train.main, *TINY, "--epochs", 2)
    assert "kept: " in result.out
    (here / "best_model.pt").write_bytes(b"mine")
    result = run(train.main, *TINY, "--epochs", 1)
    assert "kept:     a best model of unknown settings" in result.out
    assert sorted(len(list(p.iterdir())) for p in here.iterdir() if p.is_dir()) == [3, 3, 3]
    assert b"mine" in [path.read_bytes() for path in here.rglob("best_model.pt")]


def test_a_run_that_moves_to_another_folder_keeps_the_model_there(run, tmp_path):
    for name, epochs in (("here", 1), ("there", 2)):
        assert run(train.main, *TINY, "--epochs", epochs, "--save_dir", name).status == 0
    flags = ["--resume", "here/last.pt", "--save_dir", "there", "--epochs", 3]
    result = run(train.main, *flags)
    assert result.status == 0 and "kept: " in result.out
    (aside,) = (path for path in (tmp_path / "there").iterdir() if path.is_dir())
    assert best(aside)["settings"]["epochs"] == 2
    told = [json.loads((tmp_path / p / "history.json").read_text()) for p in ("here", "there")]
    # A run that is extended stays the same run, for the report.
    assert told[0]["fingerprint"] == told[1]["fingerprint"] != best(aside)["fingerprint"]


def test_from_swa_start_on_only_averages_compete(run, tmp_path):
    """The raw model of an earlier epoch is better than all averages, and is kept."""
    wild = "LambdaLR('1 if epoch < 4 else 100')"
    flags = [*TINY, "--epochs", 6, "--swa_start", 5, "--scheduler", wild, "--lr", 1e-2]
    assert run(train.main, *flags).status == 0
    rows = json.loads((tmp_path / "checkpoints" / "history.json").read_text())["epochs"]
    raw, averages = [row["val_acc"] for row in rows[:4]], [row["val_acc"] for row in rows[4:]]
    assert max(raw) > max(averages)
    assert rows[4]["is_best"] and rows[5]["is_best"] == (averages[1] > averages[0])
    checkpoint = best(tmp_path / "checkpoints")
    assert checkpoint["best_acc"] == max(averages) and checkpoint["epoch"] >= 5
    kept = torch.load(tmp_path / "checkpoints" / "best_model.raw.pt", weights_only=True)
    assert kept["best_acc"] == max(raw) and "raw_model_state_dict" not in kept
    stars = [row.split("|")[5].strip() for row in todo_rows(tmp_path)]
    assert stars == ["yes" if row["is_best"] else "no" for row in rows]
    # It goes with its run where another takes the place.
    assert run(train.main, *TINY, "--epochs", 1).status == 0
    (aside,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert (aside / "best_model.raw.pt").exists()
    assert not (tmp_path / "checkpoints" / "best_model.raw.pt").exists()


def test_the_schedule_moves_with_every_step(run, tmp_path):
    """A run's rates are those of PyTorch's own OneCycleLR, called once a step."""
    flags = [*TINY, "--epochs", 3, "--batch_size", 20, "--scheduler", "onecycle", "--lr", 0.01]
    assert run(train.main, *flags, "--optimizer", "SGD(momentum=0.9)").status == 0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=15)
    expected = []
    for _ in range(15):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step() if len(expected) < 15 else None
    rows = json.loads((tmp_path / "checkpoints" / "history.json").read_text())["epochs"]
    found = [row["lr"]["all parameters"] for row in rows]
    assert found == pytest.approx([sum(expected[i : i + 5]) / 5 for i in (0, 5, 10)])


# ----------------------------------------------------------------------------------------- stopping


def test_ctrl_c_in_the_first_epoch_leaves_an_earlier_runs_results(run, tmp_path, monkeypatch):
    assert run(train.main, *TINY, "--epochs", 1).status == 0
    names = ("best_model.pt", "history.json", "training_curves.png", "TODO.md")
    before = {path: path.read_bytes() for name in names for path in tmp_path.rglob(name)}

    def interrupted(*_) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.optim.WeightAverage, "step_batch", interrupted)
    result = run(train.main, *TINY, "--epochs", 9)
    assert result.status == 130 and "after 0 of 9 epochs and 1 steps, all saved" in result.err
    assert len(before) == 4 and {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_leaves_model_history_and_todo_consistent(tmp_path):
    command = [sys.executable, "-u", ROOT / "src" / "train.py", *QUICK, "--epochs", "500"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("Epoch  2/"):
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            break
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert re.fullmatch(r"stopped by SIGINT after (\d+) of 500 epochs .*--resume.*\n", err), err
    history = json.loads((tmp_path / "checkpoints" / "history.json").read_text())
    finished = len(history["epochs"])
    assert finished >= 2 and f"after {finished} of" in err and history["test"] is None
    assert sum("done" in row for row in todo_rows(tmp_path)) == finished
    best = max(history["epochs"], key=lambda row: row["val_acc"])
    _, checkpoint = load_checkpoint(tmp_path / "checkpoints" / "best_model.pt")
    assert (checkpoint["epoch"], checkpoint["best_acc"]) == (best["epoch"], best["val_acc"])
    assert not list(tmp_path.rglob("*.tmp*"))
