"""What several test files share: running a script's `main`, and one small training run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli
import train

ROOT = Path(__file__).parents[1]
MNIST = ROOT / "mnist"
needs_mnist = pytest.mark.skipif(
    not (MNIST / "MNIST" / "raw").is_dir(), reason="no MNIST in ./mnist"
)
# A run of seconds: the digits, a small network, few passes.
QUICK = "--dataset digits --epochs 15 --batch_size 32 --depth 2 --embed_dim 48 --lr 3e-3".split()


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
