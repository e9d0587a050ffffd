"""What the command lines share: flags, checked values, one-line errors, signals, exit statuses."""

import startup

import argparse
import difflib
import errno
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

MAX_MESSAGE = 3000  # characters


class UserError(Exception):
    """Wrong usage or input, in one line: what was given, what was expected, what to do."""


class PeerLostError(Exception):
    """Another process of the run is gone, and with it this one's work."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the work in good order: what was kept, and how to go on.

    Args:
        signal_number: of the signal; the exit status is 128 more, as shells have it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class StopSignals:
    """While the block lasts, SIGINT, SIGTERM and SIGHUP (a closed terminal) are a wish to stop.

    A second SIGINT is Ctrl-C.

    Attributes:
        received: the signal's number; 0 if there was none.

    Args:
        repeats_within: seconds in which another SIGINT is the same one: launchers hand on what the
            terminal has sent to all.
    """

    def __init__(self, repeats_within: float = 0.0) -> None:
        self.received = 0
        self._repeats_within = repeats_within
        self._time = -math.inf
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                # One that is ignored was meant to be, by nohup or a shell's &.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.received:
            if time.monotonic() - self._time >= self._repeats_within:
                raise KeyboardInterrupt
        elif not self.received:
            self.received, self._time = number, time.monotonic()


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes flags with underscores or hyphens and errs in one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(
            **kwargs, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        args = [_with_underscores(arg) for arg in (sys.argv[1:] if args is None else args)]
        for arg in args:
            if re.fullmatch(r"--\w+=--", arg):  # which argparse takes for no value at all
                raise UserError(f"{arg[:-3]} needs a value, -- given: see --help")
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise UserError(f"unknown argument {unknown[0]}: {hint}")
        return parsed

    def given(self, args: Sequence[str] | None = None) -> dict[str, Any]:
        """The arguments that the command line names, without those that have a default only."""
        defaults = [action.default for action in self._actions]
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            return vars(self.parse_args(args))
        finally:
            for action, default in zip(self._actions, defaults, strict=True):
                action.default = default

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))


def _with_underscores(arg: str) -> str:
    """`--batch-size=64` -> `--batch_size=64`; values are left as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


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


def number(minimum: float, maximum: float = math.inf, *, above: bool = False) -> Callable:
    """An argparse type: a finite number from `minimum` (or `above` it) to below `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (minimum < value if above else minimum <= value) or not value < maximum:
            expected = f"{'above' if above else 'of at least'} {minimum:g}"
            expected += f" and below {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} given, expected a number {expected}")
        return value

    return parse


def add_data_dir(group: argparse._ArgumentGroup) -> None:
    """The flag `--data_dir`."""
    group.add_argument("--data_dir", default="./mnist", help="folder with MNIST, or to fetch it to")


def add_device(group: argparse._ArgumentGroup) -> None:
    """The flag `--device`; `choose_device` reads it."""
    group.add_argument(
        "--device", default="auto", help="auto (CUDA, else CPU), cpu, cuda or cuda:N"
    )


def choose_device(name: str) -> torch.device:
    """The device that `--device` names. Raises UserError if it is none or not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,3}))?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} finds no CUDA GPU here; "
            "use --device cpu, or check the driver"
        )
    device = torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count() and device.type == "cuda":
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, from cuda:0")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16": what `--precision` names; for "auto" bf16 if `device` computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _cpu_computes_bf16()
    return "bf16" if fast else "fp32"


def _cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for it; without, bf16 is emulated and slower than fp32."""
    try:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    except AttributeError:  # PyTorch for another architecture than x86
        return False


def describe_device(device: torch.device) -> str:
    """The device in words, for printed and written results."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {describe_threads()})"


def describe_threads() -> str:
    """How many threads PyTorch computes with on a CPU, in words."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def print_test_result(dataset: str, loss: float, top1: float, top5: float) -> None:
    """Print a result on a test set, in the lines of training's end."""
    print(f"Test Loss: {loss:.4f}\nTest Acc: {top1:.2f} %\nTest Top-5: {top5:.2f} %  ({dataset})")


def _fail(message: str, status: int = 2, *, alone: bool = False) -> None:
    message = " ".join(message.split())
    if len(message) > MAX_MESSAGE:  # it quotes what was given
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    # Processes that train together stumble over the same thing: one of each machine says it, but
    # for what happens to one `alone`.
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the CPU or the GPU has no more; the CPU's allocator has no exception of its own."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process.

    The status is 0, 2 after a `UserError`, 1 where the machine failed, 130 after Ctrl-C, 141 where
    nobody reads the output any more, 129 where the terminal was closed.
    """
    startup.imports_are_done()
    if hasattr(sys.stdout, "reconfigure"):  # a pipe's reader sees each line at once
        sys.stdout.reconfigure(line_buffering=True)
    try:
        try:
            _run(main)
        finally:
            print(end="", flush=True)  # fails here rather than while Python ends
    except OSError as error:
        if error.errno != errno.EPIPE and not _terminal_is_closed():
            raise
        for stream in (1, 2):  # for what is still to be written at the end
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


def _run(main: Callable[[], None]) -> None:
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
            advice = "take a smaller network, or to train one a smaller --batch_size"
            _fail(f"out of memory; {advice}", alone=True)
        if not isinstance(error, torch.AcceleratorError):
            raise
        advice = "what was saved is whole, go on from it with --resume"
        _fail(f"the GPU failed ({error}); {advice}", 1, alone=True)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
