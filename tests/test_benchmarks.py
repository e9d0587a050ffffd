"""The benchmarks run, and print a Markdown table with machine, versions and command."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import MNIST, ROOT, assert_one_error_line, needs_mnist
from picture_folders import draw_shapes
from PIL import Image

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "report.py")
SHORT = {
    "roofline.py": "--recipe fast --turns 1",
    "throughput.py": f"--steps 1 --turns 1 --batch_size 8 --data_dir {MNIST}",
    "scaling.py": f"--processes 2 --steps 1 --data_dir {MNIST}",
    "optimizers.py": f"--only sgd --train_samples 200 --data_dir {MNIST}",
    "accuracy.py": f"--seeds 2 --epochs 1 --data_dir {MNIST} "
    "'--flags=--train_samples 200 --depth 1 --embed_dim 16'",
}


@pytest.fixture
def bench(run):
    """bench(script, *flags): run a benchmark, as `run` does."""
    return lambda script, *flags: run(runpy.run_path(str(BENCHMARKS / script))["main"], *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_explains_itself_and_errs_in_one_line(bench, script):
    shown = bench(script, "--help")
    assert shown.status == 0 and "usage:" in shown.out and "--device" in shown.out
    assert_one_error_line(bench(script, "--device", "tpu"), "--device tpu", "expected auto, cpu")


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_a_benchmark_prints_its_table(script):
    command = [sys.executable, BENCHMARKS / script, *shlex.split(SHORT[script]), "--device", "cpu"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    title, command, machine, header, line, *rows = [each for each in printed.splitlines() if each]
    assert title.startswith("### ") and command.startswith(f"`python benchmarks/{script} ")
    assert re.search(r"\d{4}-\d\d-\d\d; .*, \d+ threads?; Python .*, PyTorch ", machine)
    cells = header.count("|")
    assert set(line) == {"|", "-"} and line.count("|") == cells
    table = [row for row in rows if row.startswith("|")]
    assert table and all(row.count("|") == cells for row in table)


@pytest.mark.slow
def test_a_folder_is_read_in_each_way(tmp_path):
    folder = draw_shapes(tmp_path / "shapes")
    command = [sys.executable, BENCHMARKS / "reading.py", "--data_dir", folder, "--device", "cpu"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == ["18", "18", "18", "18"]
    assert sorted(path.name for path in folder.iterdir()) == ["cross", "disc", "square"]


@needs_mnist
def test_photos_of_paper_are_counted_by_kind_and_kept_on_demand(bench, trained, tmp_path):
    flags = ["--checkpoint", trained / "checkpoints" / "best_model.pt", "--data_dir", MNIST]
    flags += ["--images", 2, "--kinds", "ruled", "16 bits", "--save", "photos", "--split", "val"]
    result = bench("paper.py", *flags)
    assert result.status == 0
    rows = [line.split(" | ")[0] for line in result.out.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| ruled", "| 16 bits", "| **over all**", "| the digits themselves"]
    photos = [p for p in (tmp_path / "photos").iterdir() if not p.stem.endswith("-read")]
    assert sorted(p.suffix for p in photos) == [".jpg", ".jpg", ".png", ".png"]
    assert all(min(Image.open(p).size) >= 300 for p in photos)
    first = {p.name: p.read_bytes() for p in photos}
    assert bench("paper.py", *flags).out == result.out
    assert {p.name: p.read_bytes() for p in photos} == first


def test_a_record_is_appended_to_what_is_there(tmp_path, monkeypatch, capsys):
    import report

    monkeypatch.setattr(report, "RECORDS", tmp_path / "RECORDS.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--flags=--a 1", "--record"])
    for number in ("1", "2"):
        report.publish(
            f"Run {number}", ["a", "b"], [["x", number]], device=torch.device("cpu"), record=True
        )
    text = (tmp_path / "RECORDS.md").read_text()
    assert text.startswith("# Records\n\n### Run 1\n") and text.endswith("| x | 2 |\n")
    assert text.count("`python benchmarks/some.py '--flags=--a 1'`") == 2
    assert capsys.readouterr().out.count("Appended to ") == 2
