"""Ctrl-C, SIGTERM and a closed terminal, handled at a moment that suits the work."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopSignals:
    """Within the block, SIGINT, SIGTERM and SIGHUP (a closed terminal) only ask to stop.

    A second SIGINT raises KeyboardInterrupt, but not within `repeats_within` seconds: a terminal
    sends it to all processes, and launchers pass it on to them once more.
    """

    def __init__(self, repeats_within: float = 0.0) -> None:
        self.received = 0  # the number of the first signal
        self._repeats_within = repeats_within
        self._time = -math.inf
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                # What nohup or a shell's & has set to be ignored stays so.
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
    """Delay signals to the end of the block, so that files which belong together agree."""
    with StopSignals(repeats_within=math.inf) as signals:
        yield
    if signals.received:
        signal.raise_signal(signals.received)  # the handler from before the block is back
