"""What the fuzzing tests share: damage to real files, and bounds on what an answer may cost.

Damage is drawn as a plan, plain data that Hypothesis prints and shrinks, and then applied to a real
file: so a finding can be written down as an example. What once broke something stands beside each
test as a case of its own.

The suite draws few examples and the same each time. To search for hours, one test at a time:

    pytest tests/saving/test_fuzz_files.py -k damaged --hypothesis-profile long
"""

import faulthandler
import functools
import io
import operator
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import optim
import train
from common.errors import UserError

CPU_SECONDS = 20  # far above what any input needs, so that a busy machine fails no test
MEMORY = 2**30  # bytes above what the process has before
FEW = settings(max_examples=max(20, settings.default.max_examples * 2 // 5))
VERY_FEW = settings(max_examples=max(5, settings.default.max_examples // 10))  # slow targets


class TooLongError(BaseException):
    """No `except Exception` on the way keeps it."""


@contextmanager
def bounded(memory: int = MEMORY, seconds: int = CPU_SECONDS) -> Iterator[None]:
    """Fail where the block takes more CPU time or, on Linux, more memory at its peak."""

    def stop(*_) -> None:
        raise TooLongError

    clear, before = Path("/proc/self/clear_refs"), 0
    if clear.exists():
        clear.write_text("5")  # the peak is measured from here
        before = _peak()
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(30 * seconds, exit=True, file=sys.__stderr__)  # hangs in C
    try:
        yield
    except TooLongError:
        raise AssertionError(f"more than {seconds} s of CPU time") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    if clear.exists():
        assert _peak() - before < memory, f"{_peak() - before:,} bytes"


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def result_or_error(function: Callable[..., Any], *arguments: Any, **flags: Any) -> Any:
    """What the function returns, or the text of its `UserError`, which must be one line."""
    try:
        return function(*arguments, **flags)
    except UserError as error:
        text = str(error)
        assert text.strip() and len(text) < 2000, text[:3000]
        return text


# ----------------------------------------------------------------------------------------- bytes

# Near the ends of a file stand its headers and directories.
POSITIONS = st.integers(-300, 300) | st.integers(0, 2**30)
CHUNKS = st.binary(min_size=1, max_size=12) | st.sampled_from(
    [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 100, b"\r\n"]
)
EDIT = {
    "overwrite": lambda head, old, rest, chunk: head + chunk + rest,
    "flip": lambda head, old, rest, chunk: head + bytes(map(operator.xor, old, chunk)) + rest,
    "insert": lambda head, old, rest, chunk: head + chunk + old + rest,
    "delete": lambda head, old, rest, chunk: head + rest,
    "cut": lambda head, old, rest, chunk: head,
    "repeat": lambda head, old, rest, chunk: head + 51 * old + rest,
    "turn": lambda head, old, rest, chunk: old + rest + head,
}
EDITS = st.lists(
    st.tuples(st.sampled_from(sorted(EDIT)), POSITIONS, CHUNKS), min_size=1, max_size=6
)
Edits = list[tuple[str, int, bytes]]


def edited(data: bytes, edits: Edits) -> bytes:
    for kind, position, chunk in edits:
        at = position % (len(data) + 1)
        end = at + len(chunk)
        data = EDIT[kind](data[:at], data[at:end], data[end:], chunk)
    return data


# ------------------------------------------------------------------------------------------ texts

NUMBERS = "0 1 -1 2 0.5 1e-3 1e400 -1e-400 nan inf -inf 1_0 10**9 9**9**9 9**9**9**9 1j 0x10 True"
NUMBERS = [*NUMBERS.split(), "None", "1" + 22 * "0"]
CALLS = st.sampled_from([text for text, _ in optim.GALLERY])
FREE_TEXTS = (
    st.text(alphabet="()[]{}'\"\\,=*-+/%~@.: \n\0019eAxλ", max_size=60)
    | CALLS
    | st.tuples(CALLS, EDITS).map(lambda p: edited(p[0].encode(), p[1]).decode("latin-1"))
    | st.tuples(
        st.sampled_from("( [ - ~ 1+ 1** x. 9 max( 'a' , lambda: # \\".split()),
        st.sampled_from([30, 1000, 4000, 10**5]),
    ).map(lambda pair: pair[0] * pair[1])
)

# ------------------------------------------------------------------------------------------- zip

ENTRY_KINDS = st.sampled_from(["edit", "drop", "empty", "other", "twice", "rename", "deflate"])
ZIP_EDITS = st.lists(st.tuples(ENTRY_KINDS, st.integers(0, 50), EDITS), min_size=1, max_size=4)


def rezipped(whole: bytes, plan: list[tuple[str, int, Edits]]) -> bytes:
    """The archive written anew with some of its entries changed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [[name, archive.read(name), zipfile.ZIP_STORED] for name in archive.namelist()]
    for kind, number, edits in plan:
        number %= len(entries)
        entry = entries[number]
        match kind:
            case "edit":
                entry[1] = edited(entry[1], edits)
            case "drop" if len(entries) > 1:
                del entries[number]
            case "empty":
                entry[1] = b""
            case "other":
                entry[1] = entries[edits[0][1] % len(entries)][1]
            case "twice":
                entries.append([entry[0], edited(entry[1], edits), entry[2]])
            case "rename":
                entry[0] = edited(entry[0].encode(), edits).decode("latin-1").replace("\0", "x")
            case "deflate":
                entry[2] = zipfile.ZIP_DEFLATED
    return zipped(entries)


def zipped(entries: list[tuple[str, bytes, int]]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are there twice are the point
        for name, data, compression in entries:
            archive.writestr(name or "x", data, compression)
    return content.getvalue()


# ------------------------------------------------------------------------------------ structures


def _nested(times: int, width: int) -> list:
    """Of a few hundred bytes in a file; with a width of 2, its text would fill every disk."""
    return functools.reduce(lambda inner, _: [inner] * width, range(times), ["ha"])


def _with_attribute(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.numel = 5
    return tensor


# What takes the place of a value, made of it when the plan is applied: all print badly.
ODD: dict[str, Callable[[Any], Any]] = {
    "10**400": lambda _: 10**400,
    "10**5000": lambda _: 10**5000,
    "many names": lambda _: ["x"] * 10**5,
    "long text": lambda _: "x" * 10**6,
    "laughs": lambda _: _nested(60, 2),
    "deep list": lambda _: _nested(200, 1),
    "scalar tensor": lambda _: torch.tensor(3.0),
    "tensor": lambda _: torch.ones(3),
    "huge tensor": lambda _: torch.zeros(1).expand(10**12),
    "escape codes": lambda _: "\x1b[2J\x1b]0;title\x07",
    "two lines": lambda _: "one\ntwo",
    "surrogate": lambda _: "\ud800",
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "one value expanded": lambda t: torch.zeros(1).expand(t.shape),
    "first axis claims to be huge": lambda t: torch.zeros(1).expand((10**9, *t.shape[1:])),
    "one row less": lambda t: t[:-1].clone(),
    "last axis doubled": lambda t: torch.cat([t, t], dim=-1),
    "transposed": lambda t: t.transpose(0, -1),
    "axis more": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t.new_empty(0),
    "nan": lambda t: torch.full_like(t, torch.nan),
    "inf": lambda t: torch.full_like(t, torch.inf),
    "largest float": lambda t: torch.full_like(t, 3e38),
    "float64": lambda t: t.double(),
    "bf16": lambda t: t.bfloat16(),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t + 1j,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse csr": lambda t: t.to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "needs gradient": lambda t: torch.nn.Parameter(t.float()),
    "with an attribute": _with_attribute,
    "conjugate": lambda t: torch.conj(t + 1j),
    "nested list": lambda t: t.tolist(),
}
ODD |= TENSORS
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-2, 10)
    | st.sampled_from([10**9, -(10**9), 2**31, 2**63, 2**64, -(2**63)])
    | st.floats()
    | st.sampled_from(["", "x", "mnist", "digits", "auto", "cls", "mean", "sincos2d", "learned"])
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.complex_numbers()
)
VALUES = (
    PLAIN
    | st.lists(PLAIN, max_size=3)
    | st.dictionaries(PLAIN, PLAIN, max_size=3)
    | st.sampled_from(sorted(ODD)).map(lambda name: ("ODD", name))
)
STRUCTURE_EDITS = st.lists(
    st.tuples(st.just("rename"), POSITIONS, PLAIN)
    | st.tuples(st.sampled_from(["drop", "replace", "replace"]), POSITIONS, VALUES),
    min_size=1,
    max_size=3,
)


def restructured(path: Path, plan: list[tuple[str, int, Any]]) -> bytes | None:
    """The checkpoint with some values gone, renamed or replaced; None if it can't be saved."""
    content = torch.load(path)
    for kind, number, value in plan:
        places = list(_places(content))
        # Half of them at the top, where most of the values are that a loader reads.
        top = [place for place in places if place[0] is content]
        places = top if number % 2 and top else places
        if places:
            parent, key = places[number // 2 % len(places)]
            if kind == "replace":
                parent[key] = _made(value, parent[key])
            elif kind == "drop":
                del parent[key]
            elif isinstance(parent, dict):
                parent[value] = parent.pop(key)
    return saved(content)


def with_value(path: Path, place: str, value: Any) -> bytes | None:
    """The checkpoint with another value at a place such as "run/settings/depth"."""
    content = torch.load(path)
    *parents, key = (int(part) if part.isdigit() else part for part in place.split("/"))
    target = functools.reduce(operator.getitem, parents, content)
    target[key] = _made(value, target.get(key) if isinstance(target, dict) else target[key])
    return saved(content)


def _made(value: Any, old: Any) -> Any:
    """What `value` stands for, in the place of `old`."""
    match value:
        case list():
            return [_made(each, None) for each in value]
        case ("ODD", name):
            with suppress(AttributeError, RuntimeError, TypeError, IndexError):  # no such tensor
                return old if name in TENSORS and old.numel() > 10**6 else ODD[name](old)
            return old
    return value


def _places(content: Any, depth: int = 4) -> Iterator[tuple[Any, Any]]:
    """Containers and their keys, of long lists the first."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:5])
    for key, value in items:
        yield content, key
        if isinstance(value, (dict, list)) and depth:
            yield from _places(value, depth - 1)


def saved(content: Any) -> bytes | None:
    """As `torch.save` writes it; None if it doesn't."""
    file = io.BytesIO()
    with suppress(Exception):  # whatever pickling such values brings up
        torch.save(content, file)
        return file.getvalue()
    return None


def after_training(folder: Path, flags: str) -> Path:
    """The checkpoints of a small run in the folder."""
    tiny = "--device cpu --dataset digits --embed_dim 8 --num_heads 2".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *tiny, *flags.split()])
        train.main()
    return folder / "checkpoints"
