"""launch.py as a user meets it: run for real, on a small copy of the project.

PyTorch is played by stand-in packages of a few lines in real virtual environments, and uv by a
script that unpacks stand-in wheels, so nothing here needs the network or more than seconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, posix

pytestmark = posix

LAUNCHER = ROOT / "launch.py"
PYPROJECT = """
[project]
dependencies = ["torch >= 2.10", "torchvision>=0.25.0", "numpy", "tinydep>=1.2"]
[project.optional-dependencies]
dev = ["pytest"]
"""
SHOW = '''"""Show what a script is given.

More words."""
import json, os, sys
if __name__ == "__main__":
    import torch, tinydep
    print(json.dumps([sys.argv, os.getcwd(), sys.executable, torch.__file__]))
    sys.exit(int(sys.argv[-1]) if sys.argv[-1].isdigit() else 0)
'''
WAIT = '''"""Wait for a signal; as process 1 of several, end."""
import os, signal, sys, time
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE".split()
    end = sys.argv[-1]
    try:
        print("ready", *filter(None, map(os.environ.get, names)), flush=True)
        if end == "0" or (end.isdigit() and os.environ.get("RANK") == "1"):
            os.kill(os.getpid(), 9) if end == "9" else sys.exit(int(end))
        time.sleep(60)
    except KeyboardInterrupt:
        if "--catch" in sys.argv:
            sys.exit(130)
        raise
'''
TORCH = """
from types import SimpleNamespace
version = SimpleNamespace(cuda=None)
cuda = SimpleNamespace(is_available=lambda: False)
"""
BROKEN = "raise OSError('libcudart.so.13: cannot open shared object file')"
PARALLEL = ["-n", "auto", "--dist", "worksteal"]
PYTEST = "if __name__ == '__main__': import os, sys; print(os.getcwd(), sys.argv[1:])"
# As torch 2.10 is newer than 2.9 only when versions are compared as numbers.
TORCHES = {"torch": ("2.10.0+cu130", TORCH), "torchvision": ("0.25.0", "")}
SMALL = {"numpy": ("2.1", ""), "tinydep": ("1.2", ""), "pytest": ("9.0", "")}
FAKE_UV = """
import os, pathlib, sys, time, zipfile
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
time.sleep(float(os.environ.get("UV_SLEEP", 0)))
if "UV_FAIL" in os.environ:
    sys.exit(os.environ["UV_FAIL"])
python = pathlib.Path(sys.argv[sys.argv.index("--python") + 1])
target = next(python.parent.parent.rglob("site-packages"))
for wheel in here.parent.joinpath("wheels").glob("*.whl"):
    zipfile.ZipFile(wheel).extractall(target)
"""


def write_package(folder, name, version, code, requires=()):
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    info = f"{name}-{version}.dist-info"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        f"{name}/__init__.py": code,
        f"{name}/__main__.py": PYTEST,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": wheel,
        f"{info}/RECORD": "",
    }
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def make_python(folder, packages):
    """A virtual environment with stand-in packages; returns its interpreter."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    for name, (version, code) in packages.items():
        write_package(next(folder.rglob("site-packages")), name, version, code)
    return folder / "bin" / "python"


def make_wheel(folder, name, version, code="", requires=()):
    write_package(folder / "build", name, version, code, requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path in sorted((folder / "build").rglob("*")):
            if path.is_file():
                wheel.write(path, path.relative_to(folder / "build"))
    shutil.rmtree(folder / "build")


@pytest.fixture(scope="session")
def pythons(tmp_path_factory):
    """Interpreters that no test changes: name -> path."""
    folder = tmp_path_factory.mktemp("pythons")
    contents = {
        "bare": {},
        "good": {**TORCHES, **SMALL},
        "other": {**TORCHES, **SMALL},
        "broken": {**TORCHES, **SMALL, "torch": ("2.11.0", BROKEN)},
        "old": {**TORCHES, **SMALL, "torch": ("2.9.1", TORCH)},
        "lacking": {**TORCHES, "numpy": SMALL["numpy"], "tinydep": ("1.1", "")},
    }
    return {name: make_python(folder / name, packages) for name, packages in contents.items()}


class Project:
    """A copy of launch.py in a folder of its own, and a way to start it."""

    def __init__(self, folder, pythons):
        self.root, self.pythons = folder / "a project", pythons
        self.venv, self.bin, self.wheels = self.root / ".venv", folder / "bin", folder / "wheels"
        self.python = self.venv / "bin" / "python"
        for path in (self.root / "src", self.bin, self.wheels):
            path.mkdir(parents=True)
        shutil.copy(LAUNCHER, self.root)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "src" / "show.py").write_text(SHOW)
        (self.root / "src" / "wait.py").write_text(WAIT)
        (self.root / "src" / "helper.py").write_text('"""Not to be run."""\n')
        kept = {k: v for k, v in os.environ.items() if k in ("HOME", "LD_LIBRARY_PATH", "TMPDIR")}
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}
        settings = {"PATH": str(self.bin), "PIP_CONFIG_FILE": os.devnull, "PYTHONNOUSERSITE": "1"}
        self.env = {**kept, **settings, **offline}

    def popen(self, *args, by="bare", cwd=None, **env):
        command = [str(self.pythons[by]), str(self.root / "launch.py"), *map(str, args)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.root.parent,
            env={**self.env, **{name: str(value) for name, value in env.items()}},
            start_new_session=True,
        )

    def run(self, *args, **options):
        process = self.popen(*args, **options)
        process.out, process.err = process.communicate(timeout=60)
        assert "Traceback" not in process.err
        return process

    def error(self, *args, **options):
        """The one line in which a run ends."""
        process = self.run(*args, **options)
        assert process.returncode == 2, process.err
        assert process.err.count("error: ") == 1
        assert process.err.splitlines()[-1].startswith("error: ")
        return process.err.splitlines()[-1]

    def add_uv(self):
        for name, (version, code) in {**TORCHES, **SMALL}.items():
            make_wheel(self.wheels, name, version, code)
        (self.bin / "uv.py").write_text(FAKE_UV)
        script = f'#!/bin/sh\nexec "{sys.executable}" "{self.bin / "uv.py"}" "$@"\n'
        (self.bin / "uv").write_text(script)
        (self.bin / "uv").chmod(0o755)

    def need(self, package):
        text = PYPROJECT.replace('"numpy"', f'"numpy", "{package}"')
        (self.root / "pyproject.toml").write_text(text)

    def uv_calls(self):
        calls = self.bin / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def project(tmp_path, pythons):
    return Project(tmp_path, pythons)


def python_that_ran(process):
    assert process.returncode == 0, process.err
    return Path(json.loads(process.out)[2])


def wait_for(path):
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


# ---- running ------------------------------------------------------------------------------------


def test_script_gets_its_flags_directory_and_exit_status(project, tmp_path):
    flags = ["--lr", "1 e", "--python", "x", "--help", "", "3"]
    process = project.run("show.py", *flags, by="good", cwd=tmp_path)
    argv, cwd, python, _ = json.loads(process.out)  # so stdout is the script's alone
    assert argv == [str(project.root / "src" / "show.py"), *flags]
    assert (cwd, python) == (str(tmp_path), str(project.pythons["good"]))
    assert process.returncode == 3
    assert "torch 2.10.0+cu130, torchvision 0.25.0, built without CUDA" in process.err


@pytest.mark.parametrize(
    ("flags", "number", "status"),
    [
        ([], signal.SIGINT, -signal.SIGINT),  # which a shell shows as 130
        (["--catch"], signal.SIGINT, 130),
        ([], signal.SIGTERM, 7),
    ],
)
def test_signals_reach_the_script(project, flags, number, status):
    process = project.popen("wait.py", *flags, by="good")
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, number)  # the launcher alone, as `kill` does
    process.communicate(timeout=20)
    assert process.returncode == status


def test_processes_that_train_together_know_their_places_and_end_together(project):
    (project.root / "src" / "train.py").write_text(WAIT)
    text = LAUNCHER.read_text().replace("PATIENCE = 5 ", "PATIENCE = 0.1 ")
    (project.root / "launch.py").write_text(text)
    together = ("--nproc", 3, "train.py")
    process = project.run(*together, 0, by="good")
    assert process.returncode == 0
    assert sorted(process.out.splitlines()) == [f"ready {rank} {rank} 3 3" for rank in "012"]
    # Process 1 fails, and the others would wait for a minute.
    for end, status, error in (
        (2, 2, ""),
        (1, 1, ""),
        (9, 2, "process 1 of 3 was ended by SIGKILL"),
    ):
        process = project.run(*together, end, by="good")
        assert process.returncode == status and error in process.err
        assert process.err.count("error: ") == bool(error)  # the others have told of theirs
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
    process = project.popen(*together, by="good")
    signal.signal(signal.SIGHUP, previous)
    assert [process.stdout.readline()[:5] for _ in range(3)] == ["ready"] * 3
    process.send_signal(signal.SIGHUP)  # which stays ignored
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 7 and "error" not in err


def test_without_a_script_it_lists_what_can_be_run(project):
    for args in ([], ["--help"], ["--python", "/anything"]):
        process = project.run(*args)
        assert process.returncode == 0
        lines = [line.split(maxsplit=1) for line in process.out.splitlines()]
        assert ["show.py", "Show what a script is given."] in lines
        assert "test" in [line[0] for line in lines]
        assert "usage:" in process.out and "helper.py" not in process.out


def test_script_with_a_syntax_error_shows_pythons_own_message(project):
    (project.root / "src" / "show.py").write_text(SHOW + "def broken(:\n")
    process = project.run("show.py", by="good")
    assert process.returncode == 1 and "SyntaxError" in process.err


def test_tests_run_in_the_project_with_the_dev_extra_on_all_cores(project):
    process = project.run("test", "--all", "-k", "a b", by="good")
    assert process.out == f"{project.root} {[*PARALLEL, '--all', '-k', 'a b']}\n"
    process = project.popen("test", by="lacking")
    assert "it lacks tinydep>=1.2, pytest" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_what_cannot_be_understood_is_one_error_line(project, tmp_path):
    assert "'wiat.py' to run, there is: show.py, wait.py, test" in project.error("wiat.py")
    assert "helper.py" not in project.error("helper.py").split("there is:")[1]
    absent = f"{tmp_path}/no"
    assert f"--python {absent} is not there" in project.error(f"--python={absent}", "show.py")
    assert "--python /bin/sh is not Python" in project.error("--python", "/bin/sh", "show.py")
    assert "$VIT_MNIST_PYTHON /no" in project.error("show.py", VIT_MNIST_PYTHON="/no")
    assert "--gpu" in project.error("--gpu", "show.py")
    assert "--python" in project.error("--python")
    alone = "--nproc 2 {}: only train.py runs as several processes"
    assert alone.format("test") in project.error("--nproc", "2", "test", by="good")
    assert alone.format("show.py") in project.error("--nproc=2", "show.py")
    assert not project.venv.exists()


# ---- which interpreter --------------------------------------------------------------------------


def test_interpreters_are_tried_in_order(project):
    good, other = project.pythons["good"], project.pythons["other"]
    make_python(project.venv, {**TORCHES, **SMALL})
    before = sorted(project.venv.rglob("*"))

    def chosen(*args, **options):
        return python_that_ran(project.run(*args, "show.py", **options))

    assert chosen("--python", other, by="good", VIT_MNIST_PYTHON="/no") == other
    assert chosen("--python", other.parent.parent, by="good") == other
    assert chosen(by="good", VIT_MNIST_PYTHON=other) == other
    assert chosen(by="good", VIRTUAL_ENV=other.parent.parent) == good
    assert chosen(VIRTUAL_ENV=other.parent.parent) == other
    assert chosen() == project.python
    assert sorted(p for p in project.venv.rglob("*") if "__pycache__" not in p.parts) == before


def test_interpreters_of_no_use_are_skipped_with_the_reason(project):
    good, old = project.pythons["good"], "torch 2.9.1 is too old, the project needs torch >= 2.10"
    broken = "torch 2.11.0 cannot be imported (libcudart.so.13"
    for name, reason in (
        ("broken", broken),
        ("old", f"{old} (before 2.10 loading a "),
        ("lacking", "it lacks tinydep>=1.2"),
    ):
        process = project.run("show.py", by=name, VIRTUAL_ENV=good.parent.parent)
        assert python_that_ran(process) == good
        assert f"skipping {project.pythons[name]}: {reason}" in process.err


def test_crashing_and_broken_interpreters_are_skipped(project, tmp_path):
    crash = {**TORCHES, **SMALL, "torch": ("2.10", "import os; os.abort()")}
    crashing = make_python(tmp_path / "crashing", crash)
    (tmp_path / "v" / "bin").mkdir(parents=True)
    (tmp_path / "v" / "bin" / "python").write_text("no program")
    make_python(project.venv, {**TORCHES, **SMALL})
    process = project.run("--python", crashing, "show.py", VIRTUAL_ENV=tmp_path / "v")
    assert python_that_ran(process) == project.python
    assert process.err.count("it breaks off") == 2


def test_old_python_hands_over_to_a_newer_one_or_says_so(project):
    text = LAUNCHER.read_text().replace("MIN_PYTHON = (3, 11)", "MIN_PYTHON = (9, 0)")
    (project.root / "launch.py").write_text(text)
    assert "Python 3.11 or newer is needed, this is" in project.error("show.py")
    newer = project.bin / "python3.12"
    newer.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 9.1 || echo "$@"\n')
    newer.chmod(0o755)
    assert project.run("show.py", "--lr", "1").out == f"{project.root}/launch.py show.py --lr 1\n"


# ---- making .venv -------------------------------------------------------------------------------


def files_below(python):
    files = (path for path in python.parent.parent.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.lstat().st_mtime_ns for path in files if not path.is_dir()}


def test_missing_package_goes_into_a_venv_on_top_and_the_base_stays(project):
    make_wheel(project.wheels, "tinydep", "1.2", requires=["torch"])
    make_wheel(project.wheels, "tinydep", "1.3", requires=["torch>=3"])  # would replace torch
    make_wheel(project.wheels, "torch", "3.0", code=TORCH)
    base = project.pythons["lacking"]
    before = files_below(base)
    process = project.run("show.py", by="lacking")
    assert python_that_ran(process) == project.python
    torch = json.loads(process.out)[3]
    assert torch.startswith(str(base.parent.parent)), "the base's own torch, not another one"
    assert files_below(base) == before

    again = project.run("show.py", by="lacking")
    assert python_that_ran(again) == project.python and "installing" not in again.err

    # What comes to be missing later is added to the .venv that is there.
    make_wheel(project.wheels, "later", "1.0")
    project.need("later")
    third = project.run("show.py", by="lacking")
    assert python_that_ran(third) == project.python
    assert "launch: installing later\n" in third.err


@pytest.mark.slow
def test_nothing_of_the_current_folder_is_run(project, tmp_path):
    """Each of these would be imported by `python -m` in place of the tool of that name."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("venv", "pip", "ensurepip", "json", "pytest"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    make_wheel(project.wheels, "tinydep", "1.2")
    assert python_that_ran(project.run("show.py", by="lacking", cwd=folder))
    assert project.run("test", by="good", cwd=folder).out == f"{project.root} {PARALLEL}\n"
    project.add_uv()
    shutil.rmtree(project.venv)
    (project.bin / "uv.py").write_text("import os, sys; sys.exit(os.getcwd())")
    # It would read a uv.toml there.
    assert str(project.root) in project.run("show.py", cwd=folder).err.splitlines()
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_on_top_of_a_python_that_is_no_virtual_environment(project, tmp_path):
    make_wheel(project.wheels, "tinydep", "1.2")
    base = getattr(sys, "_base_executable", sys.executable)
    user = {"PYTHONUSERBASE": str(tmp_path / "user"), "PYTHONNOUSERSITE": ""}
    command = [base, "-m", "site", "--user-site"]
    answer = subprocess.run(command, env={**project.env, **user}, capture_output=True, text=True)
    for name, (version, code) in {**TORCHES, "numpy": SMALL["numpy"]}.items():
        write_package(Path(answer.stdout.strip()), name, version, code)
    process = project.run("--python", base, "show.py", **user)
    assert python_that_ran(process) == project.python
    assert json.loads(process.out)[3].startswith(str(tmp_path / "user"))


@pytest.mark.slow
def test_no_network_is_one_error_line_and_leaves_no_half_venv(project):
    env = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": 0, "PIP_NO_INDEX": 0}
    error = project.error("show.py", by="lacking", **env)
    assert "no connection" in error and "check the network" in error
    assert not project.venv.exists()


def test_failing_install_says_why(project):
    project.add_uv()
    for message, reason in (
        ("No space left on device (os error 28)", "the disk is full"),
        ("error sending request\n  tcp connect error", "no connection"),
        ("no wheel for this machine", "ended with status 1, its message is above"),
    ):
        assert reason in project.error("show.py", UV_FAIL=message)
        assert not project.venv.exists()
    assert python_that_ran(project.run("show.py")) == project.python


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_install_that_was_interrupted_is_started_over(project, number):
    project.add_uv()
    process = project.popen("show.py", UV_SLEEP=60)
    wait_for(project.bin / "calls")
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.endswith("launch: interrupted\n") and "Traceback" not in err
    # As far as one can see complete, yet nobody knows which files of it are.
    for name, (version, code) in {**TORCHES, **SMALL}.items():
        write_package(next(project.venv.rglob("site-packages")), name, version, code)
    (project.venv / "half-written").touch()
    assert python_that_ran(project.run("show.py")) == project.python
    assert not (project.venv / "half-written").exists()


@pytest.mark.parametrize("kill", [False, True])
def test_two_launchers_at_once_install_once(project, kill):
    """An installer that outlives its killed launcher is waited for, too."""
    project.add_uv()
    first = project.popen("show.py", UV_SLEEP=2)
    wait_for(project.bin / "calls")
    if kill:
        first.kill()
    second = project.run("show.py")
    first.communicate(timeout=20)
    assert python_that_ran(second) == project.python
    assert "another launcher is making" in second.err
    assert kill or (first.returncode == 0 and len(project.uv_calls()) == 1)


def test_venv_without_a_python_is_replaced_but_what_was_not_made_here_is_kept(project):
    project.add_uv()
    (project.venv / "bin").mkdir(parents=True)
    project.python.symlink_to("/gone/python3")
    (project.venv / "mine.txt").touch()
    assert python_that_ran(project.run("show.py")) == project.python
    assert len(list(project.root.glob(".venv.broken-*/mine.txt"))) == 1
    # The one made here is ours to delete.
    project.python.unlink()
    assert python_that_ran(project.run("show.py")) == project.python
    assert len(list(project.root.glob(".venv.broken-*"))) == 1


def test_users_own_venv_without_torch_is_installed_into(project):
    project.add_uv()
    make_python(project.venv, {})
    (project.venv / "mine.txt").touch()
    assert python_that_ran(project.run("show.py")) == project.python
    assert (project.venv / "mine.txt").exists()
    call = project.uv_calls()[0]
    assert call.endswith("torch >= 2.10 torchvision>=0.25.0 numpy tinydep>=1.2")


def test_a_broken_pytorch_in_the_projects_own_venv_is_repaired(project):
    project.add_uv()
    make_python(project.venv, {**TORCHES, "torch": ("2.10.0", BROKEN)})
    assert python_that_ran(project.run("show.py")) == project.python
    assert "--force-reinstall" in project.uv_calls()[0]


def test_failing_install_leaves_the_venv_of_before(project):
    project.add_uv()
    project.run("show.py")
    (project.venv / "mine.txt").touch()
    project.need("later")
    assert "cannot install into" in project.error("show.py", UV_FAIL="no such package")
    (project.root / "pyproject.toml").write_text(PYPROJECT)
    assert python_that_ran(project.run("show.py")) == project.python
    assert (project.venv / "mine.txt").exists()
    assert "--constraint" in project.uv_calls()[1] and "later" in project.uv_calls()[1]
