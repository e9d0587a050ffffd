"""Reads what `torch.save` wrote, also a stranger's file, at the cost that `saving` promises.

`torch.load(weights_only=True)` runs no code that a file brings along, and refuses storages and
tensors that are larger than their records. Each check here is for something that it lets pass.
"""

import io
import math
import pickletools
import re
import warnings
import zipfile
from typing import Any

import torch

# PyTorch allows other names, too, and calls them with any argument: bytearray(10**11) is one.
NAMES = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|bfloat16|u?int\d+|float\d+\w*|bool|Size|device)"
)
MAX_VALUES = 10**7  # in a pickle; a value that is used twice counts twice
MAX_DEPTH = 100  # of lists in lists
FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # opcodes: they change a value


class RefusedError(ValueError):
    """The archive must not be loaded; the message says why."""


def read_archive(content: bytes) -> Any:
    """Load an archive of `torch.save`, with tensors on the CPU.

    Raises:
        RefusedError: it would cost more time or memory than a file of its size should.
        Exception: of many kinds, from zipfile and PyTorch, if it is damaged or in another format.
    """
    copy = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd files: the error that follows is enough
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            # A compressed entry may be a thousand times as large as it is in the file, and entries
            # may share their bytes.
            is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not is_stored or sum(entry.file_size for entry in entries) > len(content):
                raise RefusedError("it unpacks to more than the file's size")
            # PyTorch has a zip reader of its own, and might see other entries than these: it gets
            # an archive with what was checked.
            with zipfile.ZipFile(copy, "w") as checked:
                for entry in entries:
                    data = archive.read(entry)
                    if entry.filename.lower().endswith(".pkl"):
                        _check_pickle(data)
                    checked.writestr(entry.filename, data)
        copy.seek(0)
        return torch.load(copy, map_location="cpu", weights_only=True)


def _check_pickle(pickled: bytes) -> None:
    """Raise RefusedError if the pickle calls other functions, or stands for too many values.

    A few hundred bytes can stand for 2^40 values, as lists of lists each of which is used twice, or
    for a list that contains itself. Printing or comparing them would not end; nor would loading, if
    they are tuples that serve as keys and so are hashed.

    The opcodes are followed with lists in place of values: each has in it what it was made of.
    """
    stack: list[list] = []
    marks: list[int] = []
    memo: dict[int, list] = {}
    dropped: list[list] = []
    for number, (code, argument, _) in enumerate(pickletools.genops(pickled)):
        if number > MAX_VALUES:
            raise RefusedError("it has too many values")
        if code.name == "GLOBAL" and not NAMES.fullmatch(argument):
            raise RefusedError(f"it would call {argument.replace(' ', '.')}, as no checkpoint does")
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "MARK":
            marks.append(len(stack))
        else:
            size = len(code.stack_before)
            if pickletools.stackslice in code.stack_before:  # all above the mark
                size += len(stack) - marks.pop() - 2
            parts = [stack.pop() for _ in range(size)]
            if code.name in FILLING:
                parts[-1].extend(parts[:-1])
                stack.append(parts[-1])
            else:
                (stack if code.stack_after else dropped).append(parts)
    size, depth = _measure([*stack, *dropped], {})
    if size > MAX_VALUES or depth > MAX_DEPTH:
        raise RefusedError("it is nested so often that reading it would not end")


def _measure(value: list, known: dict[int, tuple[float, int]], level: int = 0) -> tuple[float, int]:
    """The lists in `value`, itself included, and how deep they are nested.

    Infinitely many where they are nested too deep, as in a list that contains itself.
    """
    if not value:
        return 1, 1
    if level > MAX_DEPTH:
        return math.inf, 0
    if id(value) not in known:
        sizes, depths = zip(*(_measure(part, known, level + 1) for part in value), strict=True)
        known[id(value)] = 1 + sum(sizes), 1 + max(depths)
    return known[id(value)]
