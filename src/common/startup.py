"""What has to happen before PyTorch is imported: the scripts import this first.

Importing it sets, by environment variables, how the threads of a process wait for each other and
how many cores it takes; and where one of this project's scripts is run, Ctrl-C during its imports
ends it in one line. It needs the standard library alone, so that nothing large comes before it.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

# Rounds that a thread of libgomp spins at a barrier before it sleeps. With its own 300,000 the
# threads of a step compete for the cores with the one that they wait for, where another program
# has taken one; 1,500 are enough while all cores are free.
SPIN_COUNT = 1500
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
STAT = Path("/proc/stat")
SCRIPTS = [Path(__file__).resolve().parents[2] / name for name in ("src", "benchmarks")]


def cores() -> int:
    """How many cores this process may use: by its affinity and, in a container, by its quota."""
    count = _allowed()
    with suppress(OSError, ValueError):  # no such file, or no quota: "max 100000"
        quota, period = map(int, CPU_MAX.read_text().split())
        count = min(count, max(1, quota // period))
    return count


def _allowed() -> int:
    """How many cores this process may use by its affinity, which is all that PyTorch asks."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def free_cores(seconds: float = 0.2) -> int | None:
    """How many of the cores that this process may use idle in the next `seconds`; None: unknown."""
    try:
        before = STAT.read_text()
        time.sleep(seconds)
        return count_free(before, STAT.read_text(), os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not on Linux
        return None


def count_free(before: str, after: str, numbers: Collection[int]) -> int:
    """How many of the cores with these `numbers` idled between two contents of /proc/stat."""
    first, last = _ticks(before), _ticks(after)
    busy = 0.0
    for number in numbers:
        if number in first and number in last:
            idle, ticks = (b - a for a, b in zip(first[number], last[number], strict=True))
            busy += 1 - idle / ticks if ticks > 0 else 0
    return round(len(numbers) - busy)


def _ticks(stat: str) -> dict[int, tuple[int, int]]:
    """Of each core the ticks it has idled, and all its ticks."""
    ticks = {}
    for number, row in re.findall(r"^cpu(\d+) (.*)", stat, re.MULTILINE):
        # user nice system idle iowait irq softirq steal; what follows is in user already
        times = [int(value) for value in row.split()[:8]]
        ticks[int(number)] = times[3] + times[4], sum(times)
    return ticks


def note_busy_cores(threads: int) -> None:
    """Say on stderr if other programs leave fewer cores free than `threads`, and what helps."""
    free = free_cores() if threads > 1 else None
    if free is None:
        return
    total = len(os.sched_getaffinity(0))
    if max(1, free) >= min(threads, total):
        return
    are = "is" if total - free == 1 else "are"
    print(
        f"note: {total - free} of {total} cores {are} busy with other work: "
        f"OMP_NUM_THREADS={max(1, free)} in front of the command may be faster",
        file=sys.stderr,
    )


def _interrupted(*_) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")
    os._exit(130)  # an exception could be caught by what is being imported


def imports_are_done() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def runs_a_script() -> bool:
    """Whether this process was started as one of this project's scripts."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent in SCRIPTS


if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
# Several processes of one machine should use every core once, and a container its quota.
_processes = os.environ.get("LOCAL_WORLD_SIZE", "")
_threads = max(1, cores() // max(1, int(_processes) if _processes.isdecimal() else 1))
if _threads < _allowed():
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
# Not where Ctrl-C is ignored, as in a shell's background jobs.
if runs_a_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
