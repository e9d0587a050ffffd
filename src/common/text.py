"""Text that others wrote, such as the names of files, made fit to be shown or typed."""

import os
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text with "?" in place of line breaks, of codes that control a terminal, and the like."""
    return "".join(c if c.isprintable() else "?" for c in text)


def without_surrogates(text: str) -> str:
    """The text with "\ufffd" for the bytes of a file's name that aren't valid."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def composed(name: str) -> str:
    """A name in the one of its ways to be written (NFC) that most systems have."""
    return unicodedata.normalize("NFC", name)


def shell_command(words: Sequence[str]) -> str:
    """A command as it is typed in the system's shell, with quotes where a word needs them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
