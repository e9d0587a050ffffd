"""What the command lines share: flags, checked values, one-line errors, signals, exit statuses."""

import argparse
import difflib
import errno
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from common import startup
from common.errors import PeerLostError, Stopped, UserError, is_out_of_memory
from common.version import VERSION

MAX_MESSAGE = 3000  # characters


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes flags with underscores or hyphens and errs in one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(
            **kwargs, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.add_argument("--version", action="version", version=f"vit-mnist {VERSION}")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        # --batch-size=64 -> --batch_size=64; values are left as they are.
        args = [re.sub("^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in args]
        for before, arg in zip(("", *args), args, strict=False):
            if arg == "":  # as an unset variable of a shell gives it
                raise UserError(f"{before} got an empty value: give one, or leave it out".strip())
            if re.fullmatch(r"--\w+=--", arg):  # which argparse takes for no value at all
                raise UserError(f"{arg[:-3]} needs a value, -- given: see --help")
        defaults = {a.dest: a.default for a in self._actions if a.default != argparse.SUPPRESS}
        absent: list = []  # stands for what is not given: argparse sets no default where a value is
        namespace = argparse.Namespace(**dict.fromkeys(defaults, absent))
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            if unknown[0].startswith(("--nproc", "--python")):
                hint = "it stands before the script, as in python3 launch.py --nproc 2 train.py"
            raise UserError(f"unknown argument {unknown[0]}: {hint}")
        # What the command line names.
        self.given = {name: v for name, v in vars(parsed).items() if v is not absent}
        return argparse.Namespace(**{**defaults, **self.given})

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of --help and --version one copy will do
            super()._print_message(message, file)


def integer(minimum: int, maximum: int = 2**31) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= maximum:
            limit = f" and at most {maximum}" if value is not None and value > maximum else ""
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} given, expected a whole number of at least {minimum}{limit}"
            )
        return value

    return parse


def number(
    minimum: float, maximum: float = math.inf, *, above: bool = False, closed: bool = False
) -> Callable[[str], float]:
    """An argparse type: a finite number from `minimum` (or `above` it) to below `maximum` (or, if
    `closed`, to it).
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        high_enough = minimum < value if above else minimum <= value
        if not high_enough or not (value < maximum or (closed and value == maximum)):
            expected = f"{'above' if above else 'of at least'} {minimum:g}"
            limit = "at most" if closed else "below"
            expected += f" and {limit} {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} given, expected a number {expected}")
        return value

    return parse


def path_text(text: str) -> str:
    """An argparse type: a path that may be printed, also one that a file from a stranger names."""
    if not 0 < len(text) <= 1000 or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} given, expected a path of at most 1000 printable characters"
        )
    return text


def print_test_result(dataset: str, loss: float, top1: float, top5: float) -> None:
    """Print a result on a test set, in the lines of training's end."""
    print(f"Test Loss: {loss:.4f}\nTest Acc: {top1:.2f} %\nTest Top-5: {top5:.2f} %  ({dataset})")


def _fail(message: str, status: int = 2, *, alone: bool = False) -> None:
    message = "".join(filter(str.isprintable, " ".join(message.split())))  # it may quote a file
    if len(message) > MAX_MESSAGE:  # it quotes what was given
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    # Processes that train together fail alike: the first of each machine says so. What happens to
    # one process `alone`, it says itself.
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def check_flags(parse_args: Callable[[], object]) -> None:
    """Answer `--help` or a wrong flag, and end the process, before PyTorch is imported.

    The import takes seconds. A script calls this above it, and parses again in its `main`.
    """
    _run_to_exit(parse_args)
    if importlib.util.find_spec("torch") is None:
        _fail("this Python has no PyTorch; start the script with python3 launch.py SCRIPT")


def run(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process.

    The status is 0, 2 after a `UserError` or out of memory, 1 where the machine failed, 130 after
    Ctrl-C, 141 where nobody reads the output any more, 129 where the terminal was closed.
    """
    startup.imports_are_done()
    if hasattr(sys.stdout, "reconfigure"):
        # A pipe's reader sees each line at once; its encoding may lack letters of a name.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    together = os.environ.get("WORLD_SIZE", "1") != "1" and startup.runs_a_script()
    try:
        _run_to_exit(main)
    except SystemExit as end:
        if together:
            end_at_once(end.code)
        raise
    if together:
        end_at_once()


def end_at_once(status: int = 0) -> None:
    """End a process that has computed with others, leaving out what Python does at its end: a
    thread of gloo that then asks for Python's lock aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_to_exit(main: Callable[[], object]) -> None:
    try:
        try:
            _run(main)
        finally:
            print(end="", flush=True)  # fails here rather than while Python ends
    except OSError as error:
        if error.errno != errno.EPIPE and not _terminal_is_closed():
            raise
        for stream in (1, 2):  # so that what is flushed at exit goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        # As from SIGPIPE, which Python ignores, and from SIGHUP.
        sys.exit(141 if error.errno == errno.EPIPE else 129)


def _terminal_is_closed() -> bool:
    """Whether stdout or stderr is a terminal that is gone; a failing disk raises EIO as well."""
    try:
        for stream in (1, 2):
            os.write(stream, b"")
    except OSError as error:
        return error.errno == errno.EIO
    return False


def _run(main: Callable[[], object]) -> None:
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except PeerLostError as error:
        _fail(str(error), 1)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            advice = "use a smaller network or, in training, a smaller --batch_size"
            _fail(f"out of memory; {advice}", alone=True)
        of_library = str(error).startswith(("CUDA error", "cuDNN error"))
        if type(error).__name__ != "AcceleratorError" and not of_library:  # PyTorch's
            raise
        advice = "all saves of a training run are intact: continue it with --resume"
        _fail(f"the GPU failed ({error}); {advice}", 1, alone=True)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
