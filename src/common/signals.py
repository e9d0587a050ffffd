"""Ctrl-C, a request to stop and a closed terminal, taken at a moment that suits."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done, so that files which belong together agree."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    held = []
    previous = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        signal.raise_signal(signal.SIGINT)  # for whom it was meant
