"""Run a script of this project with a Python that has what it needs, making one if there is none.

    python3 launch.py train.py --epochs 5      # src/train.py, with exactly these flags
    python3 launch.py test                     # the quick tests; all: test --all
    python3 launch.py --nproc 2 train.py       # as two processes that share every batch
    python3 launch.py                          # what can be run

The interpreter is the first of these that really imports PyTorch and has the other dependencies
in pyproject.toml: --python PATH or else $VIT_MNIST_PYTHON, the one running this file,
$VIRTUAL_ENV, .venv beside this file. If none has, .venv is made: on top of one that lacks only
smaller packages, which is itself left as it is, or else complete. Only the standard library is
needed, and syntax stays within Python 3.8, so that an old Python can still say that it is old.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STATE = VENV / "launch-state.txt"  # only in a .venv made here: "building", at the end "ready"
LOCK = ROOT / ".venv.lock"
MIN_PYTHON = (3, 11)
EXTRAS = {"test": "dev", "demo.py": "demo"}  # what needs an extra of pyproject.toml
WHY_TORCH = "before 2.10 loading a model can corrupt memory, CVE-2026-24747"
PINNED = ("torch", "torchvision", "numpy")  # not replaced when smaller packages are added
OFFLINE = r"connection|connect error|name resolution|timed? ?out|unreachable|from versions: none"
USAGE = "usage: python3 launch.py [--python PATH] [--nproc N] SCRIPT [flags of the script]"
PATIENCE = 5  # seconds that processes get to end by themselves once one has failed


class LaunchError(Exception):
    """What the user gets to read as one line, `error: ...`."""


def note(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


def find_scripts() -> dict[str, str]:
    """Name -> one line about it, for each file of src/ that is meant to be run, and the tests."""
    scripts = {}
    for path in sorted((ROOT / "src").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            scripts[path.name] = text.partition("\n")[0].strip('"')
    return {**scripts, "test": "Run the quick tests, --all: all of them; with the flags of pytest."}


def read_requirements(extra: str | None) -> list[str]:
    import tomllib  # Python >= 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])


# ---- which interpreters there are, and what they have -------------------------------------------


def venv_python(folder: str | Path) -> Path:
    return Path(folder).absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def one_name(python: str | Path) -> Path:
    """`python`, `python3` and `python3.12` of one virtual environment are the same interpreter."""
    folder = Path(python).absolute().parent.parent.resolve()
    return venv_python(folder) if (folder / "pyvenv.cfg").is_file() else Path(python).absolute()


def python_version(python: str | Path) -> tuple[int, ...]:
    """(major, minor) as `python -V` says, or () if that is no working Python."""
    with contextlib.suppress(OSError):
        answer = subprocess.run([str(python), "-V"], capture_output=True, stdin=subprocess.DEVNULL)
        match = re.match(rb"Python (\d+)\.(\d+)", answer.stdout)
        return tuple(map(int, match.groups())) if match else ()
    return ()


def find_candidates(origin: str, given: str | None) -> list[Path]:
    """The interpreters to look at, in order; `given`: the user's own choice, from `origin`."""
    names = [sys.executable]
    if given is not None:
        chosen = venv_python(given) if os.path.isdir(given) else shutil.which(given)
        if not chosen or python_version(chosen) < MIN_PYTHON:
            what = "is not Python 3.11 or newer" if chosen else "is not there or not a program"
            raise LaunchError(f"{origin} {given} {what}; give the path of a Python interpreter")
        names.insert(0, chosen)
    names += [venv_python(path) for path in (os.environ.get("VIRTUAL_ENV"), VENV) if path]
    return list(dict.fromkeys(map(one_name, names)))


def numbers(version: str) -> list[int]:
    """The release as numbers to compare: '2.9.0+cu130' -> [2, 9, 0, 0]."""
    release = re.match(r"[\d.]*", version).group()
    return ([int(part) for part in release.split(".") if part] + [0] * 4)[:4]


def look_inside(requirements: list[str], thorough: bool) -> dict:
    """What this interpreter has; runs inside each candidate (`--probe`).

    `failure` says why it is of no use for PyTorch, `missing` lists the requirements it does not
    meet. PyTorch takes seconds to import: an interpreter that lacks something is asked to only
    when `thorough`, since nothing can be run with it as it is.
    """
    python, missing, versions = platform.python_version(), [], {}
    report = {"python": python, "failure": "", "missing": missing, "versions": versions}
    if sys.version_info < MIN_PYTHON:
        return {**report, "failure": f"Python {python} is too old"}
    from importlib import metadata

    for requirement in requirements:  # "name" or "name >= version"; the rest is for the installer
        name, minimum = re.match(r"([\w.-]+)[^>;]*(?:>=\s*([\d.]+))?", requirement).groups("")
        try:
            found = metadata.version(name) or ""
        except (metadata.PackageNotFoundError, KeyError):  # KeyError: metadata of half a package
            found = ""
        if found and numbers(found) >= numbers(minimum):
            versions[name] = found
            continue
        missing.append(requirement)
        if name in ("torch", "torchvision"):
            old = f"{name} {found} is too old, the project needs {requirement}"
            old += f" ({WHY_TORCH})" if name == "torch" else ""
            return {**report, "failure": old if found else f"no {name}"}
    if missing and not thorough:
        return report
    try:
        import torch
    except Exception as error:  # a library that does not fit raises anything: OSError, RuntimeError
        reason = " ".join(str(error).split())[:200]
        return {**report, "failure": f"torch {versions['torch']} cannot be imported ({reason})"}
    cuda = torch.version.cuda
    device = f"no GPU found (built for CUDA {cuda})" if cuda else "built without CUDA"
    if torch.cuda.is_available():
        try:
            device = f"CUDA {cuda} on {torch.cuda.get_device_name(0)}"
        except Exception:  # the GPU is another process's alone, or failing
            device = f"CUDA {cuda} on a GPU that gives no answer"
    packages = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    is_venv = sys.prefix != sys.base_prefix
    return {**report, "device": device, "packages": packages, "is_venv": is_venv}


def probe(python: Path, requirements: list[str], thorough: bool = False) -> dict:
    """Ask an interpreter what it has, in a process of its own: see `look_inside`."""
    command = [str(python), str(ROOT / "launch.py"), "--probe", str(int(thorough)), *requirements]
    try:
        answer = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        report = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, IndexError, ValueError):
        report = {"failure": "it breaks off before it can say what it has"}
    return {**report, "path": python}


def search(candidates: list[Path], requirements: list[str]) -> tuple[dict | None, list[Path]]:
    """The first interpreter that has everything, or else those that only lack smaller packages."""
    incomplete = []
    for python in candidates:
        unfinished = python == one_name(venv_python(VENV)) and state() == "building"
        if unfinished or not os.path.exists(python):
            continue  # an interrupted install may import and still miss files
        report = probe(python, requirements)
        lacking = report["failure"] or ", ".join(report["missing"])
        if not lacking:
            return report, []
        if not report["failure"]:
            incomplete.append(python)
        if lacking != "no torch" or python != one_name(sys.executable):  # so are most Pythons
            note(f"skipping {python}: {report['failure'] or 'it lacks ' + lacking}")
    return None, incomplete


# ---- making .venv -------------------------------------------------------------------------------


def state() -> str:
    return STATE.read_text().strip() if STATE.is_file() else ""


@contextlib.contextmanager
def lock():
    """One launcher at a time makes .venv. Yields whether this one had to wait for another."""
    if os.name == "nt":  # no flock, but a file that another launcher holds open cannot be deleted
        LOCK.unlink(missing_ok=True)
    waited = False
    with LOCK.open("w") as file:
        # An installer that outlives a killed launcher inherits the lock: nobody cuts in on it.
        os.set_inheritable(file.fileno(), True)
        if os.name != "nt":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                note(f"another launcher is making {VENV}, waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield waited


def call(*command: object) -> None:
    """Run a tool with all its output on our stderr, or raise LaunchError."""
    arguments, output = [str(part) for part in command], ""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": sys.stderr, "stderr": subprocess.PIPE}
    # Not in the user's folder, which may have a pip.py or a uv.toml in it.
    tool = subprocess.Popen(arguments, **pipes, cwd=ROOT, close_fds=False, errors="replace")
    try:
        for line in tool.stderr:
            sys.stderr.write(line)
            output += line
        status = tool.wait()
    except BaseException:
        tool.kill()
        raise
    if status and "No space left" in output:
        raise LaunchError("the disk is full; free some space and try again")
    if status and re.search(OFFLINE, output, re.IGNORECASE):
        reason = "no connection to the package index, or it has nothing for this Python"
        raise LaunchError(f"{reason}; check the network and try again")
    if status:
        raise LaunchError(f"{arguments[0]} ended with status {status}, its message is above")


def create(base: Path, below: dict | None) -> None:
    """Make an empty .venv with the Python `base`; below: report of `base` if its packages show."""
    VENV.mkdir()
    STATE.write_text("building\n")
    flags = ["--without-pip", *(["--system-site-packages"] if below else [])]
    call(base, "-I", "-m", "venv", *flags, VENV)
    if below and below["is_venv"]:
        # System packages are those of the Python that made the base, not those of the base itself.
        target = next(VENV.rglob("site-packages")) / "launch-base.pth"
        target.write_text("\n".join(below["packages"]) + "\n")


def install(requirements: list[str], pins: list[str], repair: bool) -> None:
    """Install into .venv, leaving the `pins` as they are, or `repair` what is there but broken."""
    python, uv = venv_python(VENV), shutil.which("uv")
    note(f"installing {', '.join(requirements)}")
    constraints = VENV / "launch-constraints.txt"
    constraints.write_text("\n".join(pins))
    what = [*requirements, *(["--constraint", constraints] if pins else [])]
    what += ["--upgrade", "--force-reinstall"] if repair else []
    # uv does not see the packages of a Python below, and would install them again.
    if uv and "packages = true" not in (VENV / "pyvenv.cfg").read_text():
        return call(uv, "pip", "install", "--python", python, *what)
    pip = [python, "-P", "-m", "pip"]  # not -I, which would hide the user's packages below
    if subprocess.run([*map(str, pip), "-V"], capture_output=True, cwd=ROOT).returncode:
        note("adding pip; if that fails, install uv or the system's package python3-venv")
        call(python, "-I", "-m", "ensurepip")
    call(*pip, "install", "--disable-pip-version-check", *what)


def make_venv(incomplete: list[Path], builder: Path, requirements: list[str]) -> dict:
    """Make, repair or complete .venv and return its report. The caller holds the lock."""
    python, ours = venv_python(VENV), bool(state())
    runs = python_version(python)
    if state() == "building" or (ours and not runs):
        note(f"removing {VENV}, which is unfinished or broken")
        shutil.rmtree(VENV)
    elif os.path.lexists(VENV) and not runs:  # not made here, so not ours to delete
        aside = VENV.rename(ROOT / f".venv.broken-{int(time.time())}")
        note(f"{VENV} has no working Python, it is now {aside.name}")

    fresh = not VENV.exists()
    if not fresh and runs < MIN_PYTHON:
        raise LaunchError(f"the Python of {VENV} is too old; delete it and run this again")
    below, wanted, pins, repair = None, requirements, [], False
    for path in incomplete if fresh else [python]:
        report = probe(path, requirements, thorough=True)
        if not report["failure"]:
            below, wanted, versions = report, report["missing"], report["versions"]
            pins = [f"{name}=={versions[name]}" for name in PINNED if name in versions]
            break
        note(f"cannot build on {path}: {report['failure']}")
        repair = not fresh and not re.search(r"^no |too old", report["failure"])
    if fresh:
        on = f"on top of {below['path']}" if below else "with PyTorch: several GB, but only once"
        note(f"making {VENV} {on}")
    try:
        if fresh:
            create(below["path"] if below else builder, below)
        elif ours:
            STATE.write_text("building\n")
        install(wanted, pins, repair)
    except LaunchError as error:  # the tool gave up by itself: an older .venv is as good as before
        if fresh:
            shutil.rmtree(VENV, ignore_errors=True)
        elif ours:
            STATE.write_text("ready\n")
        raise LaunchError(f"cannot install into {VENV}: {error}") from None
    if fresh or ours:
        STATE.write_text("ready\n")
    report = probe(python, requirements)
    lacking = report["failure"] or ", ".join(report["missing"])
    if lacking:
        raise LaunchError(f"{VENV} still does not work: {lacking}; delete it and run this again")
    return report


# ---- running ------------------------------------------------------------------------------------


def become(*command: object) -> None:
    """Go on as `command`: its signals, terminal and exit status are then simply its own."""
    arguments = [str(part) for part in command]
    if os.name != "nt":
        os.execv(arguments[0], arguments)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches both; the status is the child's
    sys.exit(subprocess.call(arguments))


def run_together(count: int, folder: str, *command: object) -> int:
    """Run `command` as processes that train together, and return the status of the first to fail.

    Each learns its place from the variables that torchrun sets, too. They meet in `folder`, which
    is this user's alone, and talk on the loopback interface, so that nobody else reaches them. When
    one fails, the others are ended; a signal goes to all. For several machines there is torchrun
    itself.
    """
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    shared["VIT_MNIST_STORE"] = os.path.join(folder, "store")  # src/common/distributed.py reads it
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):  # on Linux, on macOS
            shared |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    processes, failed, deadline = [], [], None

    def hand_on(number: int, _: object) -> None:
        for process in processes if os.name != "nt" else ():  # there Ctrl-C reaches each by itself
            process.send_signal(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, hand_on)
    try:
        for rank in range(count):
            place = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
            arguments = [str(part) for part in command]
            processes.append(subprocess.Popen(arguments, env=environment))
        while None in [process.poll() for process in processes]:
            time.sleep(0.05)
            failed = failed or [rank for rank in range(count) if processes[rank].returncode]
            if failed and deadline is None:
                deadline = time.monotonic() + PATIENCE
            said = processes[0].returncode == 2  # why; the others may wait for it
            if said or (deadline and time.monotonic() > deadline):
                break
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = failed or [rank for rank in range(count) if processes[rank].returncode]
    if not failed:
        return 0
    # Of several that ended at once: a signal is a cause, status 1 is what others have from it.
    statuses = {processes[rank].returncode: rank for rank in failed}
    status = min(statuses) if min(statuses) < 0 else max(statuses)
    rank = statuses[status]
    if status < 0:
        raise LaunchError(
            f"process {rank} of {count} was ended by {signal.Signals(-status).name}, and so the "
            "others have been; all saves are intact; continue with --resume"
        )
    return status


def main(argv: list[str]) -> None:
    flags, scripts = list(argv), find_scripts()
    count = 1
    origin, given = "$VIT_MNIST_PYTHON", os.environ.get("VIT_MNIST_PYTHON") or None
    while flags and flags[0].startswith("-"):
        option, equals, value = flags.pop(0).partition("=")
        if option in ("-h", "--help"):
            flags = []
        elif option == "--python" and (equals or flags):
            origin, given = option, value if equals else flags.pop(0)
        elif option == "--nproc" and (equals or flags):
            value = value if equals else flags.pop(0)
            if not re.fullmatch("[1-9][0-9]{0,3}", value):
                raise LaunchError(f"--nproc {value}: expected a number of processes, from 1")
            count = int(value)
        else:
            raise LaunchError(f"{option} is no option here, or lacks its value; {USAGE}")
    if not flags:
        return print(USAGE, *(f"  {name:<18} {line}" for name, line in scripts.items()), sep="\n")
    script = flags.pop(0)
    if script not in scripts:
        raise LaunchError(f"there is no {script!r} to run, there is: {', '.join(scripts)}")
    if count > 1 and script != "train.py":
        raise LaunchError(f"--nproc {count} {script}: only train.py runs as several processes")

    candidates = find_candidates(origin, given)
    if sys.version_info < MIN_PYTHON:
        others = (shutil.which(f"python3.{minor}") for minor in (14, 13, 12, 11))
        for python in (*candidates, *filter(None, others)):
            if python_version(python) >= MIN_PYTHON:
                become(python, ROOT / "launch.py", *argv)
        raise LaunchError(
            f"Python 3.11 or newer is needed, this is {platform.python_version()} and no other was "
            "found; install one and start launch.py with it, or give its path after --python"
        )
    requirements = read_requirements(EXTRAS.get(script))
    report, incomplete = search(candidates, requirements)
    if not report:
        builder = candidates[0]  # the chosen one or the running one
        if builder == one_name(venv_python(VENV)):  # which may be removed while it is at work
            builder = Path(getattr(sys, "_base_executable", sys.executable))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the installer
        with lock() as waited:
            if waited:
                report, incomplete = search(candidates, requirements)
            report = report or make_venv(incomplete, builder, requirements)
    versions = report["versions"]
    note(f"Python {report['python']}, {report['path']}")
    note(f"torch {versions['torch']}, torchvision {versions['torchvision']}, {report['device']}")
    if script == "test":
        os.chdir(ROOT)
        parallel = ["-n", "auto", "--dist", "worksteal"]  # of pytest-xdist; a later -n wins
        become(report["path"], "-m", "pytest", *parallel, *flags)
    if count > 1:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(run_together(count, folder, report["path"], ROOT / "src" / script, *flags))
    become(report["path"], ROOT / "src" / script, *flags)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:  # only ever given by `probe`
        print(json.dumps(look_inside(sys.argv[3:], thorough=sys.argv[2] == "1")))
        sys.exit()
    try:
        main(sys.argv[1:])
    except (LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
