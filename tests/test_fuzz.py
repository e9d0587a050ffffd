"""Input from strangers and from careless hands: each is used rightly or refused in one line.

Files, texts and flags are drawn at random with Hypothesis, mostly by damaging real ones. Whatever
comes, the answer is a right result or one `UserError`, within bounded time and memory, and nothing
that the input carries is run.

The suite draws few and the same each time. To search for hours, one target at a time:

    pytest tests/test_fuzz.py -k loader -s --hypothesis-profile long --hypothesis-show-statistics

What once broke something stands beside each target as an example of its own.
"""

import gzip
import inspect
import io
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import mutations
import numpy as np
import pytest
import torch
from conftest import MNIST, assert_one_error_line, needs_mnist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from mutations import EDITS, STRUCTURE_EDITS, ZIP_EDITS, bounded, edited, restructured, rezipped
from PIL import Image

import inference
import optim
import train
from common.errors import UserError
from common.progress import TODO_HEADER, TODO_HEADING, reset_todo_md, update_todo_md
from data.mnist import MNIST_FILES, load_mnist
from deploy import digit_image
from optimizers import calls, gallery
from optimizers.calls import OPTIMIZERS, SCHEDULERS, parse_call
from saving.checkpoint import load_checkpoint
from vit_model import ViT

RARELY = settings(max_examples=max(8, settings.default.max_examples // 10))  # slow targets


def assert_one_line(error: UserError) -> None:
    assert str(error).strip() and len(str(error)) < 2000, str(error)[:3000]


# ----------------------------------------------------------------------------- checkpoint loader


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small real checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    flags = "--device cpu --dataset digits --epochs 1 --train_samples 64 --depth 2 --embed_dim 8"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *flags.split(), "--num_heads", "2"])
        train.main()
    return folder / "checkpoints" / "best_model.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("canary")


def check_loader(folder: Path, content: bytes) -> str | None:
    """Load it: the error's text, or None for a model that computes."""
    path = folder / "hostile.pt"
    path.write_bytes(content)
    try:
        with bounded(memory=200 << 20):
            try:
                model, checkpoint = load_checkpoint(path)
            except UserError as error:
                assert_one_line(error)
                return str(error)
            config = checkpoint["model_config"]
            side = config["img_size"]
            logits = model(torch.rand(2, config["in_chans"], side, side))
            assert logits.shape == (2, config["num_classes"]) == (2, len(checkpoint["class_names"]))
            assert checkpoint["normalization"]["std"] > 0
            assert 0 <= checkpoint["settings"]["label_smoothing"] <= 1
            assert 0 < checkpoint["calibration"]["temperature"] < 1000
            assert len(str({k: checkpoint[k] for k in ("epoch", "dataset", "class_names")})) < 10**6
            assert all(map(str.isprintable, [checkpoint["dataset"], *checkpoint["class_names"]]))
            assert all(p.isfinite().all() for p in model.state_dict().values())
    finally:
        assert os.listdir(folder) == ["hostile.pt"], "it ran code"
    return None


def test_the_loader_loads_what_was_not_damaged(whole, folder):
    assert check_loader(folder, whole.read_bytes()) is None
    assert check_loader(folder, rezipped(whole.read_bytes(), [("edit", 0, [])])) is None


@given(edits=EDITS, sealed=st.booleans())
def test_loader_on_damaged_bytes(whole, folder, edits, sealed):
    content = whole.read_bytes() if sealed else rezipped(whole.read_bytes(), [])  # no checksum
    check_loader(folder, edited(content, edits))


@given(plan=ZIP_EDITS)
def test_loader_on_a_damaged_archive(whole, folder, plan):
    check_loader(folder, rezipped(whole.read_bytes(), plan))


@given(plan=STRUCTURE_EDITS)
def test_loader_on_other_structures(whole, folder, plan):
    content = mutations.saved(restructured(torch.load(whole), plan))
    assume(content is not None)
    check_loader(folder, content)


@given(plan=STRUCTURE_EDITS)
def test_predict_with_other_structures(whole, run, tmp_path, plan):
    """The whole command, on what the checkpoint says: names to print, numbers to write."""
    content = mutations.saved(restructured(torch.load(whole), plan))
    assume(content is not None)
    (tmp_path / "hostile.pt").write_bytes(content)
    Image.fromarray((255 * a_digit()).astype(np.uint8)).save(tmp_path / "digit.png")
    flags = "--mode predict --device cpu --image digit.png --checkpoint hostile.pt".split()
    with bounded():
        result = run(inference.main, *flags)
    assert result.status == 0 or assert_one_error_line(result) is None
    assert result.out.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("epoch", ("ODD", "10**5000")),  # which Python does not print
        ("epoch", -1),
        ("best_acc", float("nan")),
        ("dataset", ("ODD", "laughs")),
        ("dataset", ("ODD", "escape codes")),
        ("dataset", ("ODD", "surrogate")),
        ("dataset", ("ODD", "long text")),
        ("class_names", ["\x1b[2J", *"123456789"]),
        ("class_names", ["two\nlines", *"123456789"]),
        ("class_names", [("ODD", "laughs"), *"123456789"]),
        ("normalization/std", 0.0),
        ("normalization/std", float("nan")),
        ("normalization/mean", 1e300),
        ("settings/label_smoothing", 5.0),
        ("calibration", None),
        ("calibration", {}),
        ("calibration", ("ODD", "laughs")),
        ("calibration/temperature", 0.0),
        ("calibration/temperature", -1.0),
        ("calibration/temperature", float("nan")),
        ("calibration/temperature", float("inf")),
        ("calibration/temperature", ("ODD", "10**400")),
        ("calibration/threshold", float("nan")),
        ("calibration/threshold", float("inf")),
        ("calibration/threshold", None),
        ("calibration/whitening", ("TENSORS", "nan")),
        ("calibration/whitening", ("TENSORS", "claims to be huge")),
        ("calibration/centres", ("TENSORS", "complex")),
        ("calibration/whitening", None),
        ("calibration/centres", ("TENSORS", "claims to be huge")),
        ("calibration/centres", ("TENSORS", "sparse")),
        ("calibration/centres", ("TENSORS", "meta")),
        ("calibration/centres", torch.zeros(2, 0, 8)),
        ("calibration/centres", torch.zeros(2, 11, 8)),
        ("model_config/num_heads", -2),
        ("model_config/num_heads", 2.0),
        ("model_config/embed_dim", ("ODD", "long text")),
        ("model_config/mlp_ratio", ("ODD", "10**400")),
        ("model_config/depth", 10**9),
        ("model_config/dropout", "x"),
        ("model_config/other", ("ODD", "laughs")),
        ("model_state_dict/head.weight", ("TENSORS", "nan")),
        ("model_state_dict/head.weight", ("TENSORS", "largest float")),
        ("model_state_dict/head.weight", ("TENSORS", "complex")),
        ("model_state_dict/head.weight", ("TENSORS", "bool")),
        ("model_state_dict/head.weight", ("TENSORS", "meta")),
        ("model_state_dict/head.weight", ("TENSORS", "sparse")),
        ("model_state_dict/blocks.0.norm1.weight", ("TENSORS", "claims to be huge")),
    ],
    ids=str,
)
def test_a_checkpoint_with_such_a_value_is_refused(whole, folder, place, value):
    content = torch.load(whole)
    *parents, key = place.split("/")
    target = content[parents[0]] if parents else content
    target[key] = mutations.made(value, target.get(key))
    if isinstance(value, list):
        target[key] = [mutations.made(each, None) for each in value]
    assert check_loader(folder, mutations.saved(content)) is not None


def test_many_blocks_without_tensors_cost_nothing(whole, folder):
    content = torch.load(whole)
    state = content["model_state_dict"]
    state["patch_embed.proj.weight"] = torch.zeros(1, 1, 1, 1).expand(2000, 1, 7, 7)
    state |= {f"blocks.{i}.x": state["head.bias"] for i in range(9000)}
    del content["model_config"]
    assert check_loader(folder, mutations.saved(content)) is not None


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> Path:
    """What a run has left that was stopped in the middle of its first epoch."""
    here = tmp_path_factory.mktemp("fuzz")
    flags = "--device cpu --dataset digits --epochs 2 --train_samples 40 --batch_size 20 --depth 1"
    flags += " --embed_dim 8 --num_heads 2 --save_every_steps 1 --ema_decay 0.5"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "argv", ["train.py", *flags.split()])
        train.main()
    return here / "checkpoints" / "last.prev.pt"


def check_resume(run, tmp_path, content: bytes) -> int:
    """Go on from it, to the end: 0, or 2 with one line that says why not."""
    (tmp_path / "hostile.pt").write_bytes(content)
    with bounded(memory=500 << 20):
        flags = ["--output_dir", "outputs", "--todo_path", "TODO.md", "--data_dir", "mnist"]
        result = run(train.main, "--resume", "hostile.pt", "--device", "cpu", *flags)
    warnings = [line for line in result.err.splitlines() if line.startswith(("WARNING", "note"))]
    others = [line for line in result.err.splitlines() if line not in warnings]
    assert result.status in (0, 2) and len(others) == (result.status == 2), result.err[-3000:]
    assert all(line.startswith("error: ") for line in others)
    assert not (tmp_path / "ran").exists()
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result.status


def test_a_run_goes_on_from_what_was_not_tampered_with(last, run, tmp_path):
    assert check_resume(run, tmp_path, last.read_bytes()) == 0


@RARELY
@given(plan=STRUCTURE_EDITS)
def test_resume_with_other_structures(last, run, tmp_path, plan):
    content = mutations.saved(restructured(torch.load(last), plan))
    assume(content is not None)
    check_resume(run, tmp_path, content)


@RARELY
@given(plan=ZIP_EDITS)
def test_resume_from_a_damaged_archive(last, run, tmp_path, plan):
    check_resume(run, tmp_path, rezipped(last.read_bytes(), plan))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("random/0/numpy/2", 10**7),  # NumPy reads there
        ("random/0/numpy/1", ("ODD", "laughs")),
        ("run/settings/optimizer", ("ODD", "laughs")),
        ("run/settings/depth", ("ODD", "laughs")),
        ("run/seed", ("ODD", "10**5000")),
        ("position/epoch", ("ODD", "laughs")),
        ("position/totals/steps", -5),
        ("position/totals/steps", 10**9),
        ("position/totals/seconds", float("nan")),
        ("position/totals/skipped", ("ODD", "laughs")),
        ("position/totals/lrs/0", float("nan")),
        ("best/acc", float("nan")),
        ("history/0/other", ("ODD", "tensor")),
        ("history/0/skipped_steps", ("ODD", "laughs")),
        ("history/0/lr", {(1, 2): 0.1}),
        ("best/epoch", ("ODD", "laughs")),
        ("scheduler_state_dict/val_losses", ("ODD", "many names")),
        ("scheduler_state_dict/batch", 10**9),
        ("average_state_dict/n_averaged", ("ODD", "scalar tensor")),
        ("optimizer_state_dict/param_groups/0/lr", ("ODD", "laughs")),
        ("optimizer_state_dict/state/0/exp_avg", ("TENSORS", "meta")),
        ("optimizer_state_dict/state/8/step", 0),
        ("optimizer_state_dict/state/8/exp_avg_sq", None),
        ("optimizer_state_dict/state/8/exp_avg", [1.0]),
        ("raw_model_state_dict/head.weight", ("TENSORS", "nan")),
    ],
    ids=str,
)
def test_a_run_does_not_fall_over_such_a_value(last, run, tmp_path, place, value):
    content = torch.load(last)
    *parents, key = (int(part) if part.isdigit() else part for part in place.split("/"))
    target = content
    for parent in parents:
        target = target[parent]
    old = target[key] if isinstance(key, int) else target.get(key)
    target[key] = mutations.made(value, old)
    check_resume(run, tmp_path, mutations.saved(content))


# Pickles by hand. Names that PyTorch's loader knows, names that it must not know, and the codes
# that combine them.


def name(module: str, qualname: str) -> bytes:
    return f"c{module}\n{qualname}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    code = pickle.encode_long(value)
    return b"\x8a" + bytes([len(code)]) + code


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel)
    return b"(" + parts + b"tQ"


def tensor(shape: list[int], stride: list[int], stored: int, key: str = "0", offset: int = 0):
    sizes = (b"(" + b"".join(map(number, each)) + b"t" for each in (shape, stride))
    rest = b"".join(sizes) + b"\x89}"
    return call(
        name("torch._utils", "_rebuild_tensor_v2"), storage(stored, key), number(offset), rest
    )


def checkpoint_of(value: bytes, key: bytes = text("x")) -> bytes:
    """The pickle of {"model_state_dict": {}, key: value}."""
    return b"\x80\x02}(" + text("model_state_dict") + b"}" + key + value + b"u."


def archive_of(pickled: bytes, *records: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    entries = [("a/data.pkl", pickled, zipfile.ZIP_STORED), ("a/version", b"3\n", 0)]
    entries.append(("a/byteorder", b"little", 0))
    entries += [(f"a/data/{i}", record, compression) for i, record in enumerate(records)]
    return mutations.zipped(entries)


CANARY = "touch ran; echo ran > ran"
RUNS_CODE = {
    "os.system": call(name("posix", "system"), text(CANARY)),
    "os.system by its other name": call(name("os", "system"), text(CANARY)),
    "open": call(name("io", "open"), text("ran"), text("w")),
    "builtins.open": call(name("builtins", "open"), text("ran"), text("w")),
    "Python 2's open": call(name("__builtin__", "open"), text("ran"), text("w")),
    "eval": call(name("builtins", "eval"), text("open('ran', 'w')")),
    "exec": call(name("builtins", "exec"), text("open('ran', 'w')")),
    "subprocess": call(name("subprocess", "getoutput"), text(CANARY)),
    "getattr": call(name("builtins", "getattr"), name("torch", "Tensor"), text("tofile")),
    "attribute of an allowed name": call(name("torch", "Tensor.tofile"), text("ran")),
    "module in a name": call(name("torch", "os.system"), text(CANARY)),
    "torch.load": call(name("torch.serialization", "load"), text("other.pt")),
    "load from bytes": call(name("torch.storage", "_load_from_bytes"), text("x")),
    "numpy": call(name("numpy", "save"), text("ran"), number(1)),
    "hub": call(name("torch.hub", "load"), text("ran"), text("ran")),
    "old INST": b"(" + text(CANARY) + b"iposix\nsystem\n",
    "old OBJ": b"(" + name("posix", "system") + text(CANARY) + b"o",
    "NEWOBJ": name("subprocess", "Popen") + b"(" + text(CANARY) + b"t\x81",
    "STACK_GLOBAL": text("posix") + text("system") + b"\x93(" + text(CANARY) + b"tR",
    "BUILD": call(name("collections", "OrderedDict")) + name("posix", "system") + b"b",
}


def in_other_wrappings(pickled: bytes) -> dict[str, bytes]:
    """The same pickle in every form of file that `torch.load` has ever read."""
    legacy = [pickle.dumps(torch.serialization.MAGIC_NUMBER, 2), pickle.dumps(1001, 2)]
    legacy.append(pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for member in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(member)
            entry.size = len(pickled)
            archive.addfile(entry, io.BytesIO(pickled))
    script = [("a/constants.pkl", pickled, 0), ("a/code/x.py", b"open('ran', 'w')", 0)]
    return {
        "zip": archive_of(pickled),
        "bare": pickled,
        "legacy": b"".join(legacy) + pickled + pickle.dumps([], 2),
        "tar": tar.getvalue(),
        "TorchScript": mutations.zipped([*script, ("a/data.pkl", pickled, 0)]),
        "twice": mutations.zipped([("a/data.pkl", b"\x80\x02}.", 0), ("a/data.pkl", pickled, 0)]),
    }


@pytest.mark.parametrize("attack", RUNS_CODE)
def test_a_pickle_with_foreign_code_is_refused_unrun(folder, monkeypatch, attack):
    monkeypatch.chdir(folder)
    for content in in_other_wrappings(checkpoint_of(RUNS_CODE[attack])).values():
        assert check_loader(folder, content) is not None


FRAGMENTS = [
    *(code.encode("latin-1") for code in "()tlded]}0.12RbQuas"),
    *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"N", b"q\0", b"q\1", b"h\0", b"h\1"),
    *RUNS_CODE.values(),
    *map(number, (0, 1, -1, 5, 2**31, 2**40, 10**100)),
    *map(text, ("", "0", "cpu", "meta", "cuda", "storage", "model_state_dict", "hex", "zlib")),
    *(name("torch", each) for each in ("Tensor", "FloatStorage", "float32", "Size", "device")),
    *(name("builtins", each) for each in ("bytearray", "set", "complex")),
    *(name("collections", each) for each in ("OrderedDict", "Counter")),
    *(name("torch._utils", f"_rebuild_{each}") for each in ("tensor_v2", "parameter", "qtensor")),
    *(name("torch._utils", f"_rebuild_{each}") for each in ("sparse_tensor", "wrapper_subclass")),
    name("torch._utils", "_rebuild_device_tensor_from_numpy"),
    name("torch._tensor", "_rebuild_from_type_v2"),
    name("_codecs", "encode"),
    tensor([2], [1], 2),
    storage(2),
]


@given(fragments=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=20))
def test_loader_on_pickles_put_together_at_random(folder, fragments):
    pickled = checkpoint_of(b"".join(fragments))
    for content in (archive_of(pickled, b"\0" * 8), pickled):
        assert check_loader(folder, content) is not None


def doubled(times: int, first: bytes, again: bytes) -> bytes:
    return first + b"q\0" + times * (again + b"q\0")


BOMBS = {  # of half a gigabyte, or of 2 to the 40 steps
    "bytearray": archive_of(checkpoint_of(call(name("builtins", "bytearray"), number(1 << 29)))),
    "hex of hex of hex": archive_of(
        checkpoint_of(
            doubled(
                28,
                call(name("_codecs", "encode"), text("a" * 16), text("latin1")),
                b"0" + name("_codecs", "encode") + b"h\0" + text("hex") + b"\x86R",
            )
        )
    ),
    "hash of tuples of tuples": archive_of(checkpoint_of(b"N", doubled(40, b")", b"h\0\x86"))),
    "tuples in a storage's key": archive_of(
        checkpoint_of(
            doubled(40, b")", b"h\0\x86")
            + b"("
            + text("storage")
            + name("torch", "FloatStorage")
            + b"h\0"
            + text("cpu")
            + number(1)
            + b"tQ0"
        )
    ),
    "zip bomb": archive_of(
        checkpoint_of(tensor([1 << 26], [1], 1 << 26)),
        bytes(1 << 28),
        compression=zipfile.ZIP_DEFLATED,
    ),
    "storage larger than its record": archive_of(
        checkpoint_of(tensor([10**6], [1], 10**6)), bytes(4)
    ),
    "tensor larger than its storage": archive_of(checkpoint_of(tensor([10**6], [1], 1)), bytes(4)),
    "tensor before its storage": archive_of(
        checkpoint_of(tensor([1], [1], 1, offset=-(10**6))), bytes(4)
    ),
    "legacy bytearray": in_other_wrappings(
        checkpoint_of(call(name("builtins", "bytearray"), number(1 << 29)))
    )["legacy"],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_wants_much_memory_or_time_is_refused(folder, bomb):
    assert check_loader(folder, BOMBS[bomb]) is not None


# ---------------------------------------------------------------------------------- MNIST's files

BOTH = {"": gzip.decompress, ".gz": bytes}  # how a file may lie there


def folder_with(raw: Path, target: str, content: bytes | None) -> None:
    """MNIST's real files in `raw`, but for `target`, which gets another content or is no file."""
    raw.mkdir(parents=True, exist_ok=True)
    for entry in list(raw.iterdir()):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    for file in MNIST_FILES:
        if not target.startswith(file):
            (raw / f"{file}.gz").symlink_to(MNIST / "MNIST" / "raw" / f"{file}.gz")
    if content is not None:
        (raw / target).write_bytes(content)


def check_mnist(data_dir: Path) -> None:
    with bounded(memory=600 << 20):
        try:
            data = load_mnist(data_dir)
        except UserError as error:
            assert_one_line(error)
            return
    # There is one MNIST: what was not refused is that.
    assert [len(part) for part in (data.train, data.val, data.test)] == [54_000, 6_000, 10_000]
    assert data.test.labels.bincount()[:3].tolist() == [980, 1135, 1032]


@needs_mnist
@RARELY
@given(
    file=st.sampled_from(sorted(MNIST_FILES)),
    ending=st.sampled_from(sorted(BOTH)),
    edits=EDITS,
    inside=st.booleans(),
)
def test_mnist_with_a_damaged_file(tmp_path, offline, file, ending, edits, inside):
    packed = (MNIST / "MNIST" / "raw" / f"{file}.gz").read_bytes()
    if inside and "labels" in file and ending:
        content = gzip.compress(edited(gzip.decompress(packed), edits))
    else:
        content = edited(BOTH[ending](packed), edits)
    folder_with(tmp_path / "MNIST" / "raw", file + ending, content)
    check_mnist(tmp_path)


@needs_mnist
@pytest.mark.parametrize("ending", BOTH)
def test_what_stands_in_a_file_of_mnists_place_is_refused_at_once(tmp_path, offline, ending):
    target = "train-images-idx3-ubyte" + ending
    raw = tmp_path / "MNIST" / "raw"
    places = {
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "link to itself": lambda path: path.symlink_to(path),
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "bomb": lambda path: path.write_bytes(gzip.compress(bytes(1 << 28), 1)),
        "large": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    }
    for place in places.values():
        folder_with(raw, target, None)
        place(raw / target)
        with bounded(memory=200 << 20), pytest.raises(UserError) as caught:
            load_mnist(tmp_path)
        assert_one_line(caught.value)
        assert target.removesuffix(".gz") in str(caught.value)


# ------------------------------------------------------------------------------------ image files


def a_digit() -> np.ndarray:
    """A 3, dark on light, float32 (20, 20) in [0, 1]."""
    image = np.ones((20, 20), dtype=np.float32)
    image[3:5, 5:14] = image[9:11, 6:14] = image[15:17, 5:14] = image[3:17, 13:15] = 0
    return image


def pictures() -> dict[str, bytes]:
    """One picture in every mode and format that is read."""
    grey = Image.fromarray((255 * a_digit()).astype(np.uint8))
    modes = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
    images = {mode: grey.convert("RGB").convert(mode) for mode in modes if mode != "LAB"}
    images["I;16"] = Image.fromarray((65535 * a_digit()).astype(np.uint16))
    holes = a_digit()
    holes[0, :4] = [np.nan, np.inf, -np.inf, 1e38]
    images["F"] = Image.fromarray(holes)
    images["one pixel"] = Image.new("L", (1, 1))
    images["one row"] = Image.new("RGB", (50, 1), "red")
    made = {}
    for kind in digit_image.FORMATS:
        for mode, image in images.items():
            options = {"save_all": True, "append_images": [image] * 3} if mode == "P" else {}
            exif = Image.Exif()
            exif[0x0112] = 6
            for extra in ({"exif": exif, **options}, options):
                content = io.BytesIO()
                try:
                    image.save(content, kind, **extra)
                except Exception:  # most formats know few modes
                    continue
                made[f"{kind} {mode}"] = content.getvalue()
                break
    for compression in ("tiff_deflate", "tiff_lzw", "packbits", "group4", "jpeg"):
        content = io.BytesIO()
        mode = "1" if compression == "group4" else "L"
        images[mode].save(content, "TIFF", compression=compression)
        made[f"TIFF {compression}"] = content.getvalue()
    return made


PICTURES = pictures()


def check_image(content: bytes, path: Path) -> str | None:
    """Read it: the error's text, or None for a digit."""
    path.write_bytes(content)
    with bounded(memory=800 << 20):
        try:
            digit = digit_image.read_digit(path)
        except UserError as error:
            assert_one_line(error)
            return str(error)
    assert digit.shape == (28, 28) and digit.dtype == np.uint8 and digit.max() > 100
    return None


@given(kind=st.sampled_from(sorted(PICTURES)), edits=EDITS)
def test_image_files_with_damaged_bytes(folder, kind, edits):
    check_image(edited(PICTURES[kind], edits), folder.parent / "image")


def test_image_files_as_they_are(folder):
    answers = {k: check_image(v, folder.parent / "image") for k, v in PICTURES.items()}
    for kind in ("PNG L", "PNG RGBA", "PNG I;16", "JPEG CMYK", "TIFF F", "TIFF group4", "GIF P"):
        assert answers[kind] is None, answers[kind]
    assert "blank" in answers["PNG one pixel"]


def png(width: int, height: int, depth: int, color: int, pixels: bytes, *chunks: bytes) -> bytes:
    """A PNG whose header may say what it likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(each[:4], each[4:]) for each in chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def zeros(size: int) -> bytes:
    """`size` zeros, deflated."""
    packer, block = zlib.compressobj(1), bytes(1 << 20)
    parts = [packer.compress(block[: min(len(block), size - at)]) for at in range(0, size, 1 << 20)]
    return b"".join([*parts, packer.flush()])


def saved(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def tiff_that_claims(tag: int, value: int) -> bytes:
    """A small TIFF in which one entry of the directory says another number."""
    content = bytearray(saved(Image.new("L", (20, 20)), "TIFF"))
    (at,) = struct.unpack_from("<I", content, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", content, at)[0], 12):
        if struct.unpack_from("<H", content, entry)[0] == tag:
            struct.pack_into("<HII", content, entry + 2, 4, 1, value)
    return bytes(content)


IMAGE_BOMBS = {
    "claims 10^9 a side": lambda: png(10**9, 10**9, 8, 0, zeros(100)),
    "claims 10,000 a side": lambda: png(10_000, 10_000, 8, 2, zeros(100)),
    "claims 2^31 - 1 by 1": lambda: png(2**31 - 1, 1, 8, 0, zeros(100)),
    "no pixels": lambda: png(0, 0, 8, 0, zeros(100)),
    "largest, 16 bits": lambda: png(10_000, 5_000, 16, 0, zeros(5_000 * 20_001)),
    "largest, colours and alpha": lambda: png(10_000, 5_000, 8, 6, zeros(5_000 * 40_001)),
    "largest, 16-bit colours": lambda: png(10_000, 5_000, 16, 2, zeros(5_000 * 60_001)),
    "pixels past the end": lambda: png(28, 28, 8, 0, zeros(1 << 28)),
    "text": lambda: png(28, 28, 8, 0, zeros(28 * 29), b"zTXtx\0\0" + zeros(1 << 28)),
    "texts": lambda: png(28, 28, 8, 0, zeros(784 + 28), *[b"zTXtx\0\0" + zeros(1 << 20)] * 100),
    "profile": lambda: png(28, 28, 8, 0, zeros(28 * 29), b"iCCPx\0\0" + zeros(1 << 28)),
    "exif": lambda: png(28, 28, 8, 0, zeros(28 * 29), b"eXIf" + b"II*\0\x08\0\0\0\xff\xff" * 9),
    "many frames": lambda: saved(
        Image.new("P", (20, 20)), "GIF", save_all=True, append_images=[Image.new("P", (9, 9))] * 100
    ),
    "float, largest": lambda: saved(
        Image.fromarray(np.zeros((10_000, 5_000), np.float32)), "TIFF", compression="tiff_deflate"
    ),
    "TIFF's width": lambda: tiff_that_claims(256, 2**31 - 1),
    "TIFF's rows": lambda: tiff_that_claims(257, 9_999),
    "TIFF's strip": lambda: tiff_that_claims(278, 2**32 - 1),
    "TIFF's samples": lambda: tiff_that_claims(277, 2**16),
    "TIFF's strip length": lambda: tiff_that_claims(279, 2**32 - 1),
}


@pytest.mark.parametrize("bomb", IMAGE_BOMBS)
def test_small_image_files_that_want_much_memory(folder, bomb):
    content = IMAGE_BOMBS[bomb]()
    assert check_image(content, folder.parent / "image") is not None or "past" in bomb


def test_an_image_that_is_a_program_is_not_run(folder, monkeypatch):
    """Pillow hands EPS to Ghostscript, which runs it."""
    for program in ("gs", "gswin64c"):
        (folder.parent / program).write_text(f"#!/bin/sh\necho ran > {folder}/ran\n")
        (folder.parent / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder.parent), prepend=os.pathsep)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n{} loop\n%%EOF\n"
    assert "cannot be read" in check_image(program, folder.parent / "image")
    assert not (folder / "ran").exists()


# ----------------------------------------------------------------------------- TODO.md, by hand

HEADER = TODO_HEADER
LINES = st.sampled_from(
    [
        *HEADER,
        "| 1 | not started | | | | |",
        "| 2 | done | 0.1 | 99.0 | yes | 2020-01-01 00:00:00 |",
        "|2|",
        "| 2",
        "|  | 2 |",
        "|",
        "||||||||",
        TODO_HEADING,
        "Data set: mnist",
        "# Notes",
        "",
        " ",
        "my own words | with a bar",
    ]
) | st.text(max_size=20)
TODOS = st.lists(
    st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\n", "\r", ""])), max_size=12
).map(lambda lines: "".join(map("".join, lines)).encode(errors="surrogatepass")) | st.binary(
    max_size=60
)


def around_the_table(content: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the first progress table, which is ours; all, if there is none.

    The table is the header's line and those after it that begin with a bar.
    """
    lines = (
        content.splitlines(keepends=True) if False else re.findall(rb"[^\n]*\n|[^\n]+$", content)
    )
    header = [line.rstrip(b"\r\n").decode(errors="replace") for line in lines]
    if HEADER[0] not in header:
        return content, b""
    start = header.index(HEADER[0])
    end = start + 1
    while end < len(lines) and lines[end].startswith(b"|"):
        end += 1
    return b"".join(lines[:start]), b"".join(lines[end:])


def rows_of(content: bytes) -> list[list[str]]:
    before, after = around_the_table(content)
    table = content[len(before) : len(content) - len(after)].decode(errors="replace")
    return [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


@given(content=TODOS, epoch=st.integers(1, 4), epochs=st.integers(1, 4), reset=st.booleans())
@example(content=b"## Training progress\n\nData set: mnist", epoch=1, epochs=1, reset=True)
@example(content=b"# Mine\r\n\r\ntext\r\n", epoch=1, epochs=2, reset=True)
def test_todo_files_keep_what_is_not_ours(folder, content, epoch, epochs, reset):
    path = folder.parent / "TODO.md"
    path.write_bytes(content)
    before, after = around_the_table(content)
    with bounded():
        if reset:
            reset_todo_md(epochs, path, "mnist")
            # The line above the table that names the data set is ours too.
            before = re.sub(rb"(\A|\n)Data set: [^\n]*\n\r?\n\Z", rb"\1", before)
            rows = rows_of(path.read_bytes())
            assert [row[:2] for row in rows] == [[str(i + 1), "not started"] for i in range(epochs)]
            again = path.read_bytes()
            reset_todo_md(epochs, path, "mnist")
            assert path.read_bytes() == again
        update_todo_md(epoch, 0.5, 97.0, True, path)
        once = path.read_bytes()
        update_todo_md(epoch, 0.5, 97.0, True, path)
        update_todo_md(epoch, 0.25, 98.0, False, path)
    now = path.read_bytes()
    assert once.startswith(before) and now.startswith(before)
    assert once.endswith(after) and now.endswith(after)
    assert len(rows_of(once)) == len(rows_of(now))
    filled = [row[1:5] for row in rows_of(now) if row[:1] == [str(epoch)]]
    assert filled == [["done", "0.2500", "98.00", "no"]]


def test_a_long_todo_file_is_quick(folder):
    path = folder.parent / "TODO.md"
    path.write_bytes(b"x" * 10**7 + b"\n" * 10**6 + HEADER[0].encode() + b"\n|" * 10**5)
    with bounded(seconds=10):
        update_todo_md(1, 0.5, 97.0, True, path)
        reset_todo_md(10, path)


# -------------------------------------------------------------------------------- flags and calls

SCALARS = st.sampled_from(
    "0 1 -1 2 0.5 1e-3 1e400 -1e-400 nan inf -inf 1_0 10**9 9**9**9 9**9**9**9 1j 0x10 True None "
    "10000000000000000000000 epoch step x pi e -x 1/0 0**-1 (-1)**0.5 'a' 'min' 'linear' 'cos' "
    "'inf' 'triangular2' '0.9**epoch' '9**9**epoch' '1/epoch' 'epoch' [] [1] [1,2] (0.9,0.999) () "
    "[0.1]*10 {} {1:2} lambda:1 lambda\tx:x lambda\tepoch:1/epoch (yield) *[1] f'{x}' b'a'".split()
)
USUAL = ["1", "3", "0.5", "1e-3", "[1, 2]", "[2]", "'0.9 ** epoch'", "[StepLR(2), LinearLR(0.5)]"]
PARAMETERS = sorted(
    {
        parameter
        for classes in (OPTIMIZERS, SCHEDULERS)
        for candidates in classes.values()
        for cls in candidates
        for parameter in calls.signature_of(cls).parameters
    }
)
NAMES = [
    *OPTIMIZERS,
    *SCHEDULERS,
    *calls.SHORT_NAMES,
    "step",
    "exp",
    "max",
    "nothing",
    "__import__",
]


def one_call(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    value = inner | st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
    named = st.tuples(st.sampled_from(PARAMETERS), value).map("=".join)
    arguments = st.lists(value | named | named, max_size=4).map(", ".join)
    return st.tuples(st.sampled_from(NAMES), arguments).map(lambda parts: f"{parts[0]}({parts[1]})")


def fitting_call(classes: calls.Classes) -> st.SearchStrategy[str]:
    """Names with parameters that they have, most of them with values that serve."""

    def value(parameter: inspect.Parameter) -> st.SearchStrategy[str]:
        default = parameter.default
        usual = st.sampled_from(USUAL) if default is parameter.empty else st.just(repr(default))
        return st.integers(0, 9).flatmap(lambda n: SCALARS if n == 0 else usual)

    def of(cls: type) -> st.SearchStrategy[str]:
        known = calls.signature_of(cls).parameters.items()
        needed = {name: value(p) for name, p in known if p.default is p.empty}
        others = {name: value(p) for name, p in known if name not in needed}
        return st.fixed_dictionaries(needed, optional=others).map(
            lambda given: f"{cls.__name__}({', '.join(map('='.join, given.items()))})"
        )

    return st.sampled_from([cls for each in classes.values() for cls in each]).flatmap(of)


SYMBOLS = st.text(alphabet="()[]{}'\"\\,=*-+/%~@.: \n\0019eAxλ", max_size=60)
GALLERY = st.sampled_from([text for text, _ in gallery.GALLERY])
TEXTS = (
    fitting_call(OPTIMIZERS)
    | fitting_call(SCHEDULERS)
    | st.recursive(SCALARS | st.sampled_from(NAMES), one_call, max_leaves=6)
    | SYMBOLS
    | st.tuples(GALLERY, EDITS).map(
        lambda pair: edited(pair[0].encode(), pair[1]).decode("latin-1")
    )
)
LONG = st.tuples(
    st.sampled_from("( [ - ~ 1+ 1** x. 9 max( 'a' , lambda: # \\".split()),
    st.sampled_from([30, 1000, 4000, 10**5]),
).map(lambda pair: pair[0] * pair[1])


@pytest.fixture(scope="module")
def network() -> ViT:
    torch.manual_seed(0)
    return ViT(embed_dim=8, depth=1, num_heads=2, dropout=0.0)


def check_call(text: str, network: ViT, **flags) -> None:
    """Build what the text calls for, and take the steps of a short run."""
    groups = {"lr": 1e-3, "weight_decay": 1e-4, **flags.pop("groups", {})}
    try:
        for classes in (OPTIMIZERS, SCHEDULERS):
            try:
                parsed = parse_call(text, classes)
            except UserError as error:
                assert_one_line(error)
            else:
                assert repr(parse_call(repr(parsed), classes)) == repr(parsed)
        try:
            optimizer = optim.build_optimizer(text, network, **groups)
        except UserError as error:
            assert_one_line(error)
            optimizer = optim.build_optimizer("SGD(momentum=0.9)", network, **groups)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optim.clip_gradients(optimizer, 1.0)
        schedule = optim.build_scheduler(text, optimizer, epochs=4, steps_per_epoch=5, **flags)
        for _ in range(4):
            for _ in range(5):
                assert all(0 <= group["lr"] < float("inf") for group in optimizer.param_groups)
                schedule.step_batch()
            schedule.step_epoch(1.0)
    except UserError as error:
        assert_one_line(error)


@given(
    text=TEXTS | LONG,
    interval=st.sampled_from([None, "epoch", "step"]),
    warmup=st.integers(0, 2),
    head_lr=st.sampled_from([None, 1e-3]),
    swa_lr=st.sampled_from([None, 1e-4]),
)
def test_calls_of_optimizers_and_schedules(text, interval, warmup, head_lr, swa_lr, network):
    flags = {"interval": interval, "warmup_epochs": warmup}
    flags |= {"swa_lr": swa_lr, "swa_start": 3} if swa_lr else {}
    with bounded():
        check_call(text, network, groups={"head_lr": head_lr}, **flags)


@pytest.mark.parametrize(
    "text",
    [
        "LambdaLR('9**9**9')",
        f"LambdaLR('max({'epoch,' * 1200}1)')",
        f"ChainedScheduler([{'ExponentialLR(0.9),' * 200}])",
        f"LambdaLR({'[' * 19}'1'{']' * 19})",
        "Muon(ns_steps=1000000000)",
        "LBFGS(max_iter=1000000000)",
        "CosineAnnealingWarmRestarts(T_0=1, T_mult=10000000000)",
        "MultiStepLR([9999999999999999999])",
    ],
)
def test_calls_that_ask_for_much_are_answered_at_once(text, network):
    with bounded(seconds=5):
        optimizer = optim.build_optimizer("SGD", network, lr=0.1, weight_decay=0.0)
        for build in (
            lambda: optim.build_optimizer(text, network, lr=0.1, weight_decay=0.0),
            lambda: optim.build_scheduler(
                text, optimizer, epochs=1000, steps_per_epoch=1000, interval="step"
            ),
        ):
            try:
                build()
            except UserError as error:
                assert_one_line(error)


def flags_of(main, run) -> list[str]:
    return sorted(set(re.findall(r"--\w+", run(main, "--help").out)))


VALUES = st.sampled_from(
    "0 1 2 -1 7 28 1e-3 1e9 nan inf 10**9 2147483648 1_000 ٣ mnist digits auto cpu cuda cuda:99 "
    "cuda:-1 fast best article on off bf16 None True SGD Muon StepLR(5) - -- -h @x %s %(prog)s {} "
    "x.png x.json /dev/null . .. /".split()
) | (TEXTS | LONG).filter(lambda text: "\0" not in text)


def random_arguments(flags: list[str]) -> st.SearchStrategy[list[str]]:
    known = st.sampled_from(flags)
    flag = known | known.map(lambda f: f.replace("_", "-")) | known.map(lambda f: f[:-1]) | VALUES
    single = (
        st.tuples(flag)
        | st.tuples(known, VALUES)
        | st.tuples(known, VALUES).map("=".join).map(lambda joined: (joined,))
    )
    return st.lists(single, max_size=5).map(lambda parts: [each for part in parts for each in part])


def parse_training_flags() -> None:
    args, given = train.parse_args()
    for dataset in ("mnist", "digits"):
        chosen = train.settings_for(args.recipe, dataset, given)
        assert chosen.keys() == train.DEFAULTS.keys()


def check_flags(run, main, arguments: list[str]) -> None:
    with bounded():
        result = run(main, *arguments)
    if result.status == 0:
        assert not result.err
    else:
        assert_one_error_line(result)
        assert len(result.err) < 10_000


@pytest.mark.parametrize(
    "arguments",
    [["--mode=--"], ["--device=--"], ["--output", "(" * 10**6], ["--help=" + "x" * 10**6]],
)
def test_flags_that_once_broke_the_parser(run, arguments):
    for main in (parse_training_flags, inference.parse_args):
        check_flags(run, main, arguments)


@pytest.mark.parametrize("main", [parse_training_flags, inference.parse_args])
@given(data=st.data())
def test_flags_in_any_order_with_any_values(run, main, data):
    arguments = data.draw(random_arguments(flags_of(main, run)))
    check_flags(run, main, arguments)
