"""Checkpoints from strangers: each loads rightly or is refused in one line, within bounds of time
and memory, and nothing that it carries is run."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import mutations
import pytest
import torch
from conftest import assert_one_error_line
from hypothesis import assume, given
from hypothesis import strategies as st
from mutations import EDITS, FEW, STRUCTURE_EDITS, ZIP_EDITS, bounded, edited, rezipped, zipped
from PIL import Image

import inference
from saving import archive
from saving.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small real checkpoint, and a picture of a 1 beside it."""
    flags = "--epochs 1 --train_samples 64 --depth 2"
    folder = mutations.after_training(tmp_path_factory.mktemp("fuzz"), flags)
    image = Image.new("L", (20, 20), "white")
    image.paste(0, (9, 3, 11, 17))
    image.save(folder / "digit.png")
    return folder / "best_model.pt"


def is_refused(folder: Path, content: bytes) -> bool:
    """Load it: a model that computes, or an error in one line."""
    path = folder / "hostile.pt"
    path.write_bytes(content)
    with bounded(memory=200 << 20):
        loaded = mutations.result_or_error(load_checkpoint, path)
        if not isinstance(loaded, str):
            model, checkpoint = loaded
            config = checkpoint["model_config"]
            logits = model(torch.rand(2, config["in_chans"], *[config["img_size"]] * 2))
            assert logits.shape == (2, config["num_classes"]) == (2, len(checkpoint["class_names"]))
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            assert min(checkpoint["normalization"]["std"]) > 0
            assert 0 <= checkpoint["settings"]["label_smoothing"] <= 1
            assert 0 < checkpoint["calibration"]["temperature"] < 1000
            assert len(str({k: checkpoint[k] for k in ("epoch", "dataset", "class_names")})) < 10**6
            loaded = "".join([checkpoint["dataset"], *checkpoint["class_names"]])
    assert loaded.isprintable()
    assert os.listdir(folder) == ["hostile.pt"], "it ran code"
    return str(path) in loaded


def test_the_loader_loads_what_was_not_damaged(whole, tmp_path):
    assert not is_refused(tmp_path, whole.read_bytes())
    assert not is_refused(tmp_path, rezipped(whole.read_bytes(), []))


@FEW
@given(edits=EDITS, sealed=st.booleans())
def test_loader_on_damaged_bytes(whole, tmp_path, edits, sealed):
    content = whole.read_bytes() if sealed else rezipped(whole.read_bytes(), [])  # no checksum
    is_refused(tmp_path, edited(content, edits))


@FEW
@given(plan=ZIP_EDITS)
def test_loader_on_a_damaged_archive(whole, tmp_path, plan):
    is_refused(tmp_path, rezipped(whole.read_bytes(), plan))


@FEW
@given(plan=STRUCTURE_EDITS)
def test_other_structures(whole, run, tmp_path, plan):
    """Loaded, and then used by a command, which prints names and numbers of it."""
    content = mutations.restructured(whole, plan)
    assume(content is not None)
    is_refused(tmp_path, content)
    flags = "--mode predict --device cpu --checkpoint hostile.pt --image".split()
    with bounded():
        result = run(inference.main, *flags, whole.with_name("digit.png"))
    assert result.status == 0 or assert_one_error_line(result) is None
    assert result.out.replace("\n", "").isprintable()
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)


REFUSED = {
    "epoch": [("ODD", "10**5000"), -1],  # Python does not print the first
    "best_acc": [float("nan")],
    "format": [4, 0, 2.0, True, None, "2", ("ODD", "laughs")],
    "dataset": [("ODD", odd) for odd in ("laughs", "deep list", "escape codes", "surrogate")],
    "class_names": [
        [name, *"123456789"] for name in ("\x1b[2J", "two\nlines", "x" * 200, ("ODD", "laughs"))
    ],
    "normalization/std": [0.0, float("nan")],
    "normalization/mean": [1e300, [0.1, 0.2]],
    "preparation": ["x", None, ["crop"]],
    "settings/label_smoothing": [5.0],
    "calibration": [None, {}, ("ODD", "laughs")],
    "calibration/temperature": [0.0, -1.0, float("nan"), float("inf"), ("ODD", "10**400")],
    "calibration/threshold": [float("nan"), float("inf"), None],
    "calibration/whitening": [("ODD", "nan"), ("ODD", "huge tensor"), None],
    "calibration/centres": [
        *(("ODD", odd) for odd in ("huge tensor", "complex", "sparse", "meta")),
        torch.zeros(2, 0, 8),
        torch.zeros(2, 11, 8),
    ],
    "trained_on": [
        *([1, 2], torch.ones(3), torch.ones(2, 2, dtype=torch.int64)),
        *(torch.ones(1, dtype=torch.int64).expand(10**9), torch.ones(3).long().to_sparse()),
        torch.ones(3, dtype=torch.int64, device="meta"),
    ],
    "model_config/num_heads": [-2, 2.0],
    "model_config/embed_dim": [("ODD", "long text")],
    "model_config/img_size": ["%1000000000d"],  # which % would format
    "model_config/mlp_ratio": [("ODD", "10**400")],
    "model_config/depth": [10**9],
    "model_config/dropout": ["x"],
    "model_config/other": [("ODD", "laughs")],
    "model_config/\x1b[2J": [1],
    "model_state_dict/\x1b[2J": [torch.ones(1)],
    "model_state_dict/blocks.0.norm1.weight": [("ODD", "huge tensor")],
    "model_state_dict/head.weight": [
        ("ODD", odd) for odd in ("nan", "largest float", "complex", "bool", "meta", "sparse")
    ],
}


@pytest.mark.parametrize("place", REFUSED)
def test_a_checkpoint_with_such_a_value_is_refused(whole, tmp_path, place):
    for value in REFUSED[place]:
        assert is_refused(tmp_path, mutations.with_value(whole, place, value)), value


def test_many_blocks_without_tensors_cost_nothing(whole, tmp_path):
    content = torch.load(whole)
    state = content["model_state_dict"]
    state["patch_embed.proj.weight"] = torch.zeros(1, 1, 1, 1).expand(2000, 1, 7, 7)
    state |= {f"blocks.{i}.x": state["head.bias"] for i in range(9000)}
    del content["model_config"]
    assert is_refused(tmp_path, mutations.saved(content))


# -------------------------------------------------------------------------------- pickles by hand

# Names that PyTorch's loader knows, names that it must not know, and the codes that combine them.


def name(module: str, qualname: str) -> bytes:
    return f"c{module}\n{qualname}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    code = pickle.encode_long(value)
    return b"\x8a" + bytes([len(code)]) + code


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(numel: int, key: bytes = text("0")) -> bytes:
    parts = text("storage") + name("torch", "FloatStorage") + key + text("cpu") + number(numel)
    return b"(" + parts + b"tQ"


def tensor(size: int, stored: int, offset: int = 0) -> bytes:
    shape = b"(" + number(size) + b"t(" + number(1) + b"t"
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(stored), number(offset), shape + b"\x89}")


def checkpoint_of(value: bytes, key: bytes = text("x")) -> bytes:
    """The pickle of {"model_state_dict": {}, key: value}."""
    return b"\x80\x02}(" + text("model_state_dict") + b"}" + key + value + b"u."


def archive_of(pickled: bytes, *records: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    entries = [("a/data.pkl", pickled, 0), ("a/version", b"3\n", 0), ("a/byteorder", b"little", 0)]
    return zipped([*entries, *((f"a/data/{i}", r, compression) for i, r in enumerate(records))])


CANARY = text("touch ran; echo ran > ran")
RUNS_CODE = {
    "os.system": call(name("posix", "system"), CANARY),
    "os.system by its other name": call(name("os", "system"), CANARY),
    "open": call(name("io", "open"), text("ran"), text("w")),
    "builtins.open": call(name("builtins", "open"), text("ran"), text("w")),
    "Python 2's open": call(name("__builtin__", "open"), text("ran"), text("w")),
    "eval": call(name("builtins", "eval"), text("open('ran', 'w')")),
    "exec": call(name("builtins", "exec"), text("open('ran', 'w')")),
    "subprocess": call(name("subprocess", "getoutput"), CANARY),
    "getattr": call(name("builtins", "getattr"), name("torch", "Tensor"), text("tofile")),
    "attribute of an allowed name": call(name("torch", "Tensor.tofile"), text("ran")),
    "module in a name": call(name("torch", "os.system"), CANARY),
    "escape codes": name("torch", "\x1b[2J"),
    "torch.load": call(name("torch.serialization", "load"), text("other.pt")),
    "load from bytes": call(name("torch.storage", "_load_from_bytes"), text("x")),
    "numpy": call(name("numpy", "save"), text("ran"), number(1)),
    "hub": call(name("torch.hub", "load"), text("ran"), text("ran")),
    "old INST": b"(" + CANARY + b"iposix\nsystem\n",
    "old OBJ": b"(" + name("posix", "system") + CANARY + b"o",
    "NEWOBJ": name("subprocess", "Popen") + b"(" + CANARY + b"t\x81",
    "STACK_GLOBAL": text("posix") + text("system") + b"\x93(" + CANARY + b"tR",
    "BUILD": call(name("collections", "OrderedDict")) + name("posix", "system") + b"b",
}


def in_other_wrappings(pickled: bytes) -> dict[str, bytes]:
    """The same pickle in every form of file that `torch.load` has ever read."""
    legacy = [pickle.dumps(torch.serialization.MAGIC_NUMBER, 2), pickle.dumps(1001, 2)]
    legacy.append(pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as files:
        for member in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(member)
            entry.size = len(pickled)
            files.addfile(entry, io.BytesIO(pickled))
    script = [("a/constants.pkl", pickled, 0), ("a/code/x.py", b"open('ran', 'w')", 0)]
    return {
        "zip": archive_of(pickled),
        "bare": pickled,
        "legacy": b"".join(legacy) + pickled + pickle.dumps([], 2),
        "tar": tar.getvalue(),
        "TorchScript": zipped([*script, ("a/data.pkl", pickled, 0)]),
        "twice": zipped([("a/data.pkl", b"\x80\x02}.", 0), ("a/data.pkl", pickled, 0)]),
    }


@pytest.mark.parametrize("attack", RUNS_CODE)
def test_a_pickle_with_foreign_code_is_refused_unrun(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    for content in in_other_wrappings(checkpoint_of(RUNS_CODE[attack])).values():
        assert is_refused(tmp_path, content)


REBUILD = "tensor_v2 parameter qtensor sparse_tensor wrapper_subclass device_tensor_from_numpy"
FRAGMENTS = [
    *(code.encode("latin-1") for code in "()tlded]}0.12RbQuas"),
    *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"N", b"q\0", b"q\1", b"h\0", b"h\1"),
    *RUNS_CODE.values(),
    *map(number, (0, 1, -1, 5, 2**31, 2**40, 10**100)),
    *map(text, ("", "0", "cpu", "meta", "cuda", "storage", "model_state_dict", "hex", "zlib")),
    *(name("torch", each) for each in "Tensor FloatStorage float32 Size device".split()),
    *(name("builtins", each) for each in "bytearray set complex".split()),
    *(name("collections", each) for each in "OrderedDict Counter".split()),
    *(name("torch._utils", f"_rebuild_{each}") for each in REBUILD.split()),
    name("torch._tensor", "_rebuild_from_type_v2"),
    name("_codecs", "encode"),
    tensor(2, stored=2),
    storage(2),
]


@FEW
@given(fragments=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=3), max_size=20))
def test_loader_on_pickles_put_together_at_random(tmp_path, fragments):
    pickled = checkpoint_of(b"".join(fragments))
    for content in (archive_of(pickled, b"\0" * 8), pickled):
        assert is_refused(tmp_path, content)


def chain(times: int, first: bytes, again: bytes) -> bytes:
    """A list of values, each of which `again` makes of the one before, which `h\0` brings."""
    return b"(" + first + b"q\0" + times * (again + b"q\0") + b"l"


BYTEARRAY = call(name("builtins", "bytearray"), number(1 << 29))
ENCODE = name("_codecs", "encode")
TUPLES = chain(40, b")", b"h\0\x86")[:-1]  # with 2^40 values in the last; a mark is still open
IN_EACH_OTHER = b"(]q\0" + b"".join(b"]h%caq%c" % (i, i + 1) for i in range(110))
COSTLY = {  # to load, to print or to compare: half a gigabyte, 2^40 steps, or without an end
    "bytearray": BYTEARRAY,
    "tensor": call(name("torch", "Tensor"), number(1 << 27)),
    "hex of hex of hex": chain(
        26, call(ENCODE, text("a" * 16), text("latin1")), ENCODE + b"h\0" + text("hex") + b"\x86R"
    ),
    "tuples in tuples": TUPLES + b"l",
    "tuples as a key": TUPLES + b"}h\0Nsl",
    "tuples as a key, thrown away": TUPLES + b"}h\0Nsl0N",
    "tuples as a key, left behind": TUPLES + b"}h\0Nsl}",
    "tuples in a Counter": TUPLES + call(name("collections", "Counter"), b"h\0") + b"l",
    "tuples in a storage's key": TUPLES + storage(1, b"h\0") + b"l",
    "a tuple as a key again and again": chain(14, b")", b"h\0\x86")[:-1] + b"}" + 5000 * b"h\0Ns",
    "tuple in tuple": b")" + 10**4 * b"\x85",
    "lists in lists": chain(30, b"]", b"]h\0ah\0a"),
    "a list in itself": b"]q\0h\0ah\0a",
    "deep lists": chain(110, b"]", b"]h\0a"),
    "deep lists, seen from inside": IN_EACH_OTHER
    + b"".join(b"h%c" % i for i in reversed(range(111)))
    + b"l",
    "many codes": b"]" + 10**5 * b"q\0",
}


@pytest.mark.parametrize("value", COSTLY)
def test_a_pickle_that_costs_more_than_its_size_is_refused(monkeypatch, value):
    monkeypatch.setattr(archive, "MAX_VALUES", 10**5)  # a hundredth of what it is
    with bounded(memory=200 << 20), pytest.raises(archive.RefusedError):
        archive.read_archive(archive_of(checkpoint_of(COSTLY[value])))


def that_claims(whole: bytes, size: int) -> bytes:
    """The archive, whose directory says that its last entry unpacks to so many bytes."""
    at = whole.rindex(b"PK\1\2") + 24
    return whole[:at] + struct.pack("<I", size) + whole[at + 4 :]


def shared(record: bytes, times: int) -> bytes:
    """An archive in which so many entries are the same bytes of the file."""
    whole = archive_of(HARMLESS, record)
    start, end = whole.rindex(b"PK\1\2"), whole.rindex(b"PK\5\6")
    entries, tail = whole[start:end] * times, bytearray(whole[end:])
    struct.pack_into("<2H2I", tail, 8, times, times, len(entries), start)
    return whole[:start] + entries + tail


HARMLESS, HOSTILE = checkpoint_of(b"N"), checkpoint_of(BYTEARRAY)
DEFLATED = archive_of(HARMLESS, bytes(1 << 29), compression=zipfile.ZIP_DEFLATED)
BOMBS = {  # files that want half a gigabyte
    "zip bomb": DEFLATED,
    "zip bomb that denies it": that_claims(DEFLATED, 9),
    "entries that share their bytes": shared(bytes(1 << 20), times=500),
    "an old format": in_other_wrappings(HOSTILE)["legacy"],
    "a name in capitals": zipped([("a/data.PKL", HOSTILE, 0), ("a/version", b"3\n", 0)]),
    # Python reads the second of these archives, PyTorch the first.
    "another archive before it": archive_of(HOSTILE)[:-22]
    + archive_of(HARMLESS.ljust(len(HOSTILE), b"\0")),
    "storage larger than its record": archive_of(
        checkpoint_of(tensor(10**8, stored=10**8)), bytes(4)
    ),
    "tensor larger than its storage": archive_of(checkpoint_of(tensor(10**8, stored=1)), bytes(4)),
    "tensor before its storage": archive_of(
        checkpoint_of(tensor(1, stored=1, offset=-(10**6))), bytes(4)
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_wants_much_memory_is_refused(tmp_path, bomb):
    assert is_refused(tmp_path, BOMBS[bomb])
