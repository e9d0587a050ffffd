"""What the documents say of files is so."""

import re
import shutil

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


def test_contributing_names_files_that_exist_and_what_is_in_them():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    _, how_to = text.split("## How to add a data set")
    named = re.split(r"`((?:src|tests)/[\w./]+)`", how_to)
    paths = [ROOT / path for path in named[1::2]]
    assert len(paths) > 10
    for path, said in zip(paths, named[2::2], strict=True):
        assert path.exists(), path
        content = path.read_text() if path.is_file() else ""
        for name in re.findall(r"`(\w+)`", said):
            assert re.search(rf"\b{name}\b", content), (path, name)


def outputs(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_committed_tour_is_small_and_knows_no_machine():
    path = ROOT / "docs" / "tour.ipynb"
    tour = nbformat.read(path, as_version=4)
    assert len(tour.cells) == 10 and path.stat().st_size < 150_000
    for cell in tour.cells:
        assert not re.search(r"(?<![\w.])(/|[A-Z]:\\)\w+[/\\]\w", cell.source), cell.source
        if cell.cell_type == "code":
            assert cell.outputs
            assert not re.search(r"(?<![\w.])(/|[A-Z]:\\)\w", outputs(cell)), outputs(cell)


@pytest.mark.slow
def test_the_tour_runs_in_a_clone(tmp_path):
    for name in ("src", "docs", "checkpoints/pretrained"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    tour = nbformat.read(tmp_path / "docs" / "tour.ipynb", as_version=4)
    folder = {"metadata": {"path": str(tmp_path / "docs")}}  # where Jupyter starts a notebook
    NotebookClient(tour, timeout=600, resources=folder).execute()
    texts = [outputs(cell) for cell in tour.cells if cell.cell_type == "code"]
    promised = ["vit-mnist ", "Best Val Acc: ", "", "Written: ", "Test Acc: ", "42.png: 42: 4 ("]
    for text, words in zip(texts, promised, strict=True):
        assert words in text and "error: " not in text, text
    assert "same class as PyTorch: 180 of 180" in texts[-1]
    pictures = [out for cell in tour.cells for out in cell.get("outputs", []) if "data" in out]
    assert len(pictures) == 2 and all("image/png" in out.data for out in pictures)
