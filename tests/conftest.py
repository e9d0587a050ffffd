"""What several test files share: running a script's `main`, and one small training run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

import cli
import train
from utils import MNIST_FILES

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "mnist"
needs_mnist = pytest.mark.skipif(
    not all((MNIST / "MNIST" / "raw" / f"{name}.gz").is_file() for name in MNIST_FILES),
    reason="no MNIST in ./mnist",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
# A run of seconds: the digits, a small network, few passes.
QUICK = "--device cpu --dataset digits --epochs 15 --batch_size 32 --lr 3e-3".split()
QUICK += "--depth 2 --embed_dim 48".split()

# Fuzzing: few examples and always the same, or many and always others (--hypothesis-profile long).
# Fixtures are shared by a test's examples on purpose; how long one takes, the tests look at.
settings.register_profile(
    "ci", max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile(
    "long", settings.get_profile("ci"), max_examples=10_000, derandomize=False, print_blob=True
)
settings.load_profile("ci")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(main, *flags) -> its exit status and what it printed; in an empty folder."""
    monkeypatch.chdir(tmp_path)

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
def offline(monkeypatch):
    """Every download fails at once: the proxy is a port where nothing listens."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of one finished training run on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *QUICK])
        train.main()
    return folder


def assert_one_error_line(result: SimpleNamespace, *words: str) -> None:
    """Status 2 and one line on stderr that has all of `words`."""
    assert result.status == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], (word, lines[0])
