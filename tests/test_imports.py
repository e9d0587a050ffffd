"""Who imports whom: the rooms of src/ one way, and what reads the flags nothing that is large."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

from conftest import ROOT

SRC = ROOT / "src"
# Each imports only what stands before it, or its own room.
ROOMS = (
    "vit_model common data recipes settings utils optimizers saving analysis deploy training optim"
)
ROOMS = [*ROOMS.split(), "train", "inference", "demo"]
ALONE = {"vit_model": set(), "common": {"common"}, "recipes": {"data"}}
LIGHT = "recipes settings training.resolve saving.stored_settings common.cli".split()
LIGHT += "common.errors common.files common.progress common.signals common.version".split()
LIGHT += ["common.startup", *(f"{path.parent.name}.flags" for path in SRC.glob("*/flags.py"))]


def imports_of_ours() -> dict[str, set[str]]:
    """Module -> the modules of src/ that it imports anywhere."""
    paths = {
        ".".join(path.relative_to(SRC).with_suffix("").parts): path for path in SRC.rglob("*.py")
    }
    found = {}
    for module, path in paths.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):  # from training import resume, or of a module
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names & paths.keys()
    return found


def test_imports_go_one_way_and_in_no_circle():
    found = imports_of_ours()
    for module, names in found.items():
        room = module.partition(".")[0]
        allowed = ALONE.get(room, set(ROOMS[: ROOMS.index(room) + 1]))
        assert {name.partition(".")[0] for name in names} <= allowed, module
    TopologicalSorter(found).prepare()


def test_what_reads_the_flags_imports_nothing_large():
    code = f"import sys, {', '.join(LIGHT)}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SRC, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_inference_imports_nothing_large_that_it_may_not_need():
    large = {"torchvision", "torch._dynamo", "sklearn", "scipy.stats"}  # each takes seconds
    code = f"import sys, inference; print({large} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SRC, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "set()\n"
