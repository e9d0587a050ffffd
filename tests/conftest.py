"""What several test files share: running a script's `main`, in this process or in others, and one
small training run.

Tests marked `slow` are left out, but with --all, with -m, or where a test is named by its id.
"""

import common.startup  # noqa: F401 before PyTorch

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core; read while PyTorch is imported

import json
import multiprocessing.forkserver
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.datasets  # noqa: F401 what a run would import: forked processes find it there
import torch
import torch._dynamo
from filelock import FileLock
from hypothesis import HealthCheck, settings
from shapes import draw_folder

import train
from common import cli, startup
from data.catalog import MNIST_FILES
from training import run_files

# A shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # under nohup the same
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "mnist"
needs_mnist = pytest.mark.skipif(
    not all((MNIST / file.path).is_file() for file in MNIST_FILES),
    reason="no MNIST in ./mnist",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, pipes and terminals")

# A run of seconds: the digits, a small network, few passes.
QUICK = "--device cpu --dataset digits --epochs 8 --batch_size 32 --lr 4e-3".split()
QUICK += "--depth 2 --embed_dim 48 --translate 0.02".split()
# The same on photos of shapes, of which a crop keeps all.
PHOTOS = "--device cpu --dataset folder --data_dir photos --img_size 32 --in_chans 3".split()
PHOTOS += "--epochs 5 --batch_size 16 --lr 3e-3 --patch_size 8 --depth 2 --embed_dim 48".split()
PHOTOS += "--rotate 0 --translate 0.02".split()
# One of a second, and one of less.
TINY_DIGITS = "--device cpu --dataset digits --depth 1 --embed_dim 16 --num_heads 2".split()
TINY = [*TINY_DIGITS, *"--train_samples 100 --batch_size 50".split()]

# Drawing takes longer than a small run: only `trained` draws its curves.
FIGURES = run_files.figures
NO_FIGURES = SimpleNamespace(
    training_curves=lambda history: None, save=lambda _, path: path.write_bytes(b"drawn")
)

# Fuzzing: few examples and always the same, or many and always others (--hypothesis-profile long).
# Fixtures are shared by a test's examples on purpose; how long one takes, the tests look at.
settings.register_profile(
    "ci", max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile(
    "long", settings.get_profile("ci"), max_examples=10_000, derandomize=False, print_blob=True
)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    named = config.option.markexpr or any("::" in argument for argument in config.args)
    if not named and not config.getoption("--all"):
        config.option.markexpr = "not slow"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means; each worker takes seconds to import PyTorch, so more are no faster."""
    return min(8, startup.cores())


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run_files, "figures", NO_FIGURES)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(main, *flags) -> its exit status and what it printed; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(startup, "free_cores", lambda: None)  # it would speak of a busy machine

    def call(main, *flags) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        status = 0
        try:
            cli.run(main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


@pytest.fixture
def complete(run):
    """complete(*flags) -> what a training run printed, which must come to its end."""

    def call(*flags) -> SimpleNamespace:
        result = run(train.main, *flags)
        assert result.status == 0, result.err
        return result

    return call


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): do `action` while step n from now, counted from 1, is under way."""
    original = train.clip_gradients

    def arrange(number: int, action) -> None:
        steps = iter(range(1, 10**9))

        def clip_gradients(*args):
            if next(steps) == number:
                action()
            return original(*args)

        monkeypatch.setattr(train, "clip_gradients", clip_gradients)

    return arrange


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """folder(name): an empty folder, from now on the current one."""

    def enter(name: str) -> Path:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return enter


def read(path: str | Path) -> dict:
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def history(folder: str | Path = "checkpoints") -> dict:
    return json.loads(Path(folder, "history.json").read_text())


def comparable(value):
    """What a checkpoint holds, to the last bit; times aside."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        times = ("seconds", "images_per_second", "finished")
        return {key: comparable(each) for key, each in value.items() if key not in times}
    return [comparable(each) for each in value] if isinstance(value, (list, tuple)) else value


def work(folder, flags, environment, die_at=None, limit=None, output=None) -> None:
    """What a process of `start` does."""
    import resource

    os.chdir(folder)
    os.environ |= environment
    sys.argv = ["train.py", *flags]
    rank = environment.get("RANK", "")
    sys.stdout = open(f"out{rank}.txt", "w")  # noqa: SIM115
    sys.stderr = open(f"err{rank}.txt", "w")  # noqa: SIM115
    if output:
        os.setsid()  # so that a terminal that it opens to read becomes its own
        mode = os.O_WRONLY if Path(output).is_fifo() else os.O_RDWR
        for stream in (1, 2):
            os.dup2(os.open(output, mode), stream)
        sys.stdout = open(1, "w")  # noqa: SIM115
        sys.stderr = open(2, "w") if os.isatty(2) else sys.stderr  # noqa: SIM115
    run_files.figures = NO_FIGURES
    events = iter(range(1, 10**9))

    def watch(event: str, args: tuple) -> None:
        is_ours = event in ("open", "os.rename") and "checkpoints" in str(args[0])
        if is_ours and next(events) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if die_at:
        sys.addaudithook(watch)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cli.run(train.main)


@pytest.fixture(scope="session")
def start():
    """start(folder, flags) -> a process that trains there, its output in out.txt and err.txt.

    It is forked from one that knows PyTorch. `environment`: variables to set, `die_at`: it is
    killed at its n-th opening or renaming of a file in checkpoints/, `limit`: no file may grow
    beyond so many bytes, `output`: a terminal or a pipe in place of out.txt.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests"))))
        multiprocessing.forkserver.ensure_running()

    def begin(folder, flags, environment=None, **how):
        arguments = str(folder), [str(flag) for flag in flags], environment or {}
        process = context.Process(target=work, args=arguments, kwargs=how)
        process.start()
        return process

    return begin


def launch(count: int, *flags: object) -> subprocess.Popen:
    """Train as `count` processes."""
    command = [sys.executable, ROOT / "launch.py", "--python", sys.executable]
    command += ["--nproc", count, "train.py", *flags]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def offline(monkeypatch):
    """Every download fails at once: the proxy is a port where nothing listens."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of one finished training run on the digits, made once for all workers."""
    return train_once(tmp_path_factory, "trained", QUICK)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """The folder of one finished training run on photos of shapes, which are in its `photos`."""
    return train_once(tmp_path_factory, "shapes", PHOTOS, lambda: draw_folder(Path("photos"), 70))


def train_once(
    factory: pytest.TempPathFactory, name: str, flags: list[str], prepare: Callable = lambda: None
) -> Path:
    """The folder of a finished training run, made once for all workers."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not (folder / "outputs" / "training_curves.png").exists():  # the last that is written
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                prepare()
                patch.setattr(sys, "argv", ["train.py", *flags])
                patch.setattr(run_files, "figures", FIGURES)
                train.main()
    return folder


def assert_one_error_line(result: SimpleNamespace, *words: str) -> None:
    """Status 2 and one line on stderr that has all of `words`."""
    assert result.status == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], (word, lines[0])
