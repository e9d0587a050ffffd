"""Reads what `torch.save` wrote, also a stranger's: no code of his is run, at a bounded cost.

`torch.load(weights_only=True)` calls none but functions of PyTorch's and Python's own that are
known to be harmless. They are not cheap, though: in a file of a hundred bytes `bytearray(10**11)`
fills the memory, tuples of tuples are hashed for years, and a compressed archive can be a thousand
times its size. So the archive is looked at before PyTorch sees it.
"""

import io
import math
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

# All that a pickle of tensors, dicts, lists, numbers and text names.
NAMES = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|bfloat16|u?int\d+|float\d+\w*|bool|Size|device)"
)
MAX_COST = 10**7  # values in a pickle, where one that is named twice counts twice
MAX_DEPTH = 100  # of lists in lists
ENDLESS = "it is nested so often that reading it would not end"


class RefusedError(ValueError):
    """What is in the file is not to be loaded."""


def read_archive(path: Path) -> Any:
    """What `torch.save` wrote to `path`, with tensors on the CPU.

    Raises:
        OSError: the file can't be read.
        RefusedError: it names code, or takes more time or memory than a file of its size should.
        Exception: of many kinds, from PyTorch, if the file is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd formats; the error that follows is enough
        checked = io.BytesIO()  # written anew: two readers need not agree on what a zip file holds
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise RefusedError("it unpacks to more than the file's size")
            for entry in entries:
                content = archive.read(entry)
                if entry.filename.lower().endswith(".pkl"):
                    _check_pickle(content)
                copy.writestr(entry.filename, content)
        checked.seek(0)
        content = torch.load(checked, map_location="cpu", weights_only=True)
    if _count(content, {}) > MAX_COST:
        raise RefusedError(ENDLESS)
    return content


def _check_pickle(pickled: bytes) -> None:
    """Follow the pickle with a stack of costs in place of values."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL" and not NAMES.fullmatch(argument):
            raise RefusedError(f"it would run code ({argument.replace(' ', '.')}) when loaded")
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "MARK":
            marks.append(len(stack))
        else:
            taken = len(code.stack_before)
            if pickletools.stackslice in code.stack_before:  # all above the mark
                taken = taken - 2 + len(stack) - marks.pop()
            cost = 1 + sum(stack.pop() for _ in range(taken))
            stack.extend([cost] * len(code.stack_after))
            if cost > MAX_COST:
                raise RefusedError(ENDLESS)


def _count(value: Any, known: dict[int, float], depth: int = 0) -> float:
    """The values that there are in `value` when it is written out; infinite if it holds itself."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if depth > MAX_DEPTH:
        return math.inf
    if id(value) not in known:
        known[id(value)] = math.inf  # where it is met again below
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(each, known, depth + 1) for each in inside)
    return known[id(value)]
