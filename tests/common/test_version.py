"""The version stands in one place, and everything that tells it has it from there."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, history, read

from common.version import VERSION


@pytest.mark.parametrize("script", ["train.py", "inference.py", "demo.py", "optim.py"])
def test_scripts_print_it_without_any_package(script):
    # -S: no site-packages, so neither PyTorch nor NumPy
    command = [sys.executable, "-S", ROOT / "src" / script, "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vit-mnist {VERSION}\n", "")
    other = {**os.environ, "LOCAL_RANK": "1"}  # of several processes one prints
    assert subprocess.run(command, capture_output=True, text=True, env=other).stdout == ""


def test_a_run_tells_it(trained):
    for told in (
        history(trained / "checkpoints"),
        read(trained / "checkpoints" / "best_model.pt"),
        read(trained / "checkpoints" / "last.pt"),
    ):
        assert told["versions"]["vit-mnist"] == VERSION


def test_files_of_the_project_have_no_other():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    dynamic = project["tool"]["setuptools"]["dynamic"]["version"]
    assert dynamic == {"attr": "src.common.version.VERSION"}
    latest = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest[1] == VERSION
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search("^version:", citation, re.MULTILINE) is None
