"""What happens before PyTorch is imported: flags, the environment, the cores there are, Ctrl-C."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_one_error_line, posix

from common import startup

SCRIPTS = [ROOT / "src" / f"{name}.py" for name in ("train", "inference", "demo", "optim")]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
BENCHMARKS = [path for path in BENCHMARKS if "def main(" in path.read_text(encoding="utf-8")]
NEEDED = {"optim.py": ["--list"]}  # flags without which a script does nothing
THREADS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
OURS = (*THREADS, "LOCAL_WORLD_SIZE", "RANK")
# In place of PyTorch and NumPy: it prints what these variables are, and takes a while.
HEAVY = f"""
import os, time
print(*(os.environ.get(name) for name in {THREADS}), flush=True)
try:
    time.sleep(float(os.environ.get("IMPORT_SECONDS", 0)))
except BaseException:  # as some packages do
    pass
os._exit(7)
"""


def environment(**given: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name not in OURS}, **given}


@pytest.fixture
def start_script(tmp_path):
    """start_script(path, *flags, **environment) -> its process."""

    def start(script, *flags: str, **given: str) -> subprocess.Popen:
        for name in ("torch", "numpy"):
            (tmp_path / f"{name}.py").write_text(HEAVY)
        given["PYTHONPATH"] = os.pathsep.join(map(str, (tmp_path, ROOT / "src")))
        command = [sys.executable, script, *(flags or NEEDED.get(script.name, []))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment(**given), **pipes)

    return start


def result(process: subprocess.Popen) -> SimpleNamespace:
    out, err = process.communicate(timeout=20)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_are_answered_before_pytorch_is_imported(start_script, script):
    shown = result(start_script(script, "--help"))
    assert shown.status == 0 and shown.out.startswith("usage: ") and shown.err == ""
    wrong = result(start_script(script, "--devise", "cpu"))
    assert_one_error_line(wrong, "unknown argument --devise")
    if script.name == "train.py":
        wrong = result(start_script(script, "--epochs", "0"))
        assert_one_error_line(wrong, "--epochs: '0' given", "at least 1")


@pytest.mark.parametrize(
    "script", [*SCRIPTS, *BENCHMARKS, ROOT / "tests" / "conftest.py"], ids=lambda path: path.name
)
def test_the_spin_count_is_set_before_anything_with_threads_is_imported(start_script, script):
    assert result(start_script(script)).out.split()[0] == str(startup.SPIN_COUNT)


def test_what_the_user_has_set_stays_and_processes_share_the_cores(start_script):
    ours = str(startup.SPIN_COUNT)
    for given, found in (
        ({"GOMP_SPINCOUNT": "7"}, ["7", "None", "None"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["None", "passive", "None"]),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, [ours, "None", "3"]),
        ({"LOCAL_WORLD_SIZE": "2"}, [ours, "None", str(max(1, startup.cores() // 2))]),
        ({"LOCAL_WORLD_SIZE": "1000"}, [ours, "None", "1"]),
    ):
        assert result(start_script(SCRIPTS[0], **given)).out.split() == found


def test_pytorch_takes_no_more_threads_than_a_containers_quota(tmp_path):
    code = "import os, pathlib; os.sched_getaffinity = lambda _: set(range(8));"
    code += "pathlib.Path.read_text = lambda *_: '200000 100000';"
    code += "import common.startup; print(os.environ.get('OMP_NUM_THREADS'))"
    for given, threads in (({}, "2"), ({"LOCAL_WORLD_SIZE": "2"}, "1")):
        variables = environment(PYTHONPATH=str(ROOT / "src"), **given)
        command = [sys.executable, "-c", code]
        assert subprocess.check_output(command, env=variables, text=True) == f"{threads}\n"


# ---- Ctrl-C and a reader who has gone ------------------------------------------------------------


@posix
@pytest.mark.parametrize("script", [*SCRIPTS, BENCHMARKS[0]], ids=lambda path: path.name)
def test_ctrl_c_while_pytorch_is_imported_ends_in_one_line(start_script, script):
    """Of the first, where there are several processes."""
    for rank, line in (("0", "interrupted\n"), ("1", "")):
        process = start_script(script, IMPORT_SECONDS="60", RANK=rank)
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        ended = result(process)
        assert (ended.status, ended.err) == (130, line)


@posix
def test_ctrl_c_that_is_ignored_stays_ignored(start_script):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits
    try:
        process = start_script(SCRIPTS[0], IMPORT_SECONDS="0.5")
    finally:
        signal.signal(signal.SIGINT, previous)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    ended = result(process)
    assert (ended.status, ended.err) == (7, "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the tests' own


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_gone_leaves_no_traceback(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from common import cli; cli.run(lambda: print('line'))"],
        cwd=ROOT / "src",
        env=environment(PYTHONUNBUFFERED=unbuffered),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# ---- cores --------------------------------------------------------------------------------------

BEFORE = """cpu  400 0 400 9000 200 0 0 0 0 0
cpu0 100 0 100 4000 100 0 0 0 0 0
cpu1 100 0 100 2000 100 0 0 0 0 0
cpu10 200 0 200 3000 0 0 0 0 0 0
intr 12345 0 0
"""
# Of 20 ticks each: core 0 idles for 19, core 1 computes, core 10 is some other machine's (stolen).
AFTER = """cpu  421 0 400 9019 200 0 0 20 0 0
cpu0 101 0 100 4017 102 0 0 0 0 0
cpu1 120 0 100 2000 100 0 0 0 20 0
cpu10 200 0 200 3000 0 0 0 20 0 0
intr 12399 0 0
"""


@pytest.mark.parametrize(
    ("cores", "free"), [({0}, 1), ({1}, 0), ({10}, 0), ({0, 1}, 1), ({0, 1, 10}, 1), ({0, 7}, 2)]
)
def test_free_cores_are_those_that_idle_between_two_readings(cores, free):
    assert startup.count_free(BEFORE, AFTER, cores) == free


def test_without_a_tick_between_them_no_core_is_called_busy():
    assert startup.count_free(BEFORE, BEFORE, {0, 1}) == 2


def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(startup, "STAT", tmp_path / "none")
    assert startup.free_cores(0) is None
    startup.note_busy_cores(64)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("free", "threads", "note"),
    [
        (1, 2, "note: 3 of 4 cores are busy with other work: OMP_NUM_THREADS=1 in front of "),
        (3, 4, "note: 1 of 4 cores is busy with other work: OMP_NUM_THREADS=3 in front of "),
        (0, 4, "note: 4 of 4 cores are busy with other work: OMP_NUM_THREADS=1 in front of "),
        (2, 2, ""),
        (4, 8, ""),  # more threads than there are cores
        (0, 1, ""),  # fewer than one thread there cannot be
    ],
)
def test_a_busy_machine_is_told_with_what_helps(monkeypatch, capsys, free, threads, note):
    monkeypatch.setattr(startup, "free_cores", lambda: free)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    startup.note_busy_cores(threads)
    said = capsys.readouterr().err
    assert said.startswith(note) and said.count("\n") == bool(note)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_containers_quota_limits_the_cores(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(startup, "CPU_MAX", tmp_path / "cpu.max")
    assert startup.cores() == cores
