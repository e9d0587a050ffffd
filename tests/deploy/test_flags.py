"""The flags of inference.py and demo.py: answered before anything large is imported."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_one_error_line

import inference
from deploy.flags import MODES, parse_args

# Runs a script in which importing anything large ends the process with status 7.
WITHOUT_PYTORCH = """
import os, runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "matplotlib", "PIL", "scipy", "uvicorn"):
            os._exit(7)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_pytorch(script: str, *flags: str) -> SimpleNamespace:
    command = [sys.executable, "-c", WITHOUT_PYTORCH, ROOT / "src" / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.parametrize("script", ["inference.py", "demo.py"])
def test_flags_are_answered_before_pytorch_is_imported(script):
    shown = without_pytorch(script, "--help")
    assert (shown.status, shown.err) == (0, "") and f"usage: {script}" in shown.out
    assert_one_error_line(without_pytorch(script, "--chekpoint", "x"), "did you mean --checkpoint?")
    assert without_pytorch(script).status == 7  # which right flags go on to import


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode paint", "--mode paint visualize"),
        ("--mode predict", "predict --image"),
        ("--mode evaluate --image x.png", "evaluate --image --mode predict"),
        ("--mode evaluate --format json", "evaluate --format json --mode predict"),
        ("--mode onnx --format csv", "onnx --format --mode predict"),
        ("--mode predict --image x.png --format xml", "--format xml json csv"),
        ("--mode predict --image x.png --seed 3", "predict --seed at random visualize attention"),
        ("--mode evaluate --seed 0", "evaluate --seed at random visualize attention"),
        ("--seed -1", "--seed -1 at least 0"),
        ("--single", "--single for --mode predict"),
        ("--mode onnx --half --quantize int8", "--half --quantize int8 contradict"),
        ("--mode onnx --quantize int4", "--quantize int4 int8"),
        ("--mode torch_export --half", "torch_export --half --mode onnx"),
        ("--mode evaluate --quantize int8", "evaluate --quantize --mode onnx"),
        ("--mode visualize --raw_input", "visualize --raw_input onnx torch_export"),
        ("--mode safetensors --data_dir x", "safetensors --data_dir names a data set"),
        ("--mode onnx --device cpu", "onnx --device where the network computes"),
        ("--mode attention --index 3 --seed 1", "--seed --index give one"),
        ("--mode timm --half", "timm --half --mode onnx"),
        ("--mode safetensors --output x.pt", "x.pt safetensors ends in .safetensors"),
        ("--mode timm --output x.onnx", "x.onnx timm ends in .pth or .pt or .safetensors"),
        ("--mode report --output x.pdf", "x.pdf report ends in .html"),
        ("--mode webpage --half", "webpage --half --mode onnx"),
        ("--mode webpage --output page.htm", "page.htm .html"),
        ("--mode predict --image x.png --output x.png", "x.png predict ends in .json"),
    ],
)
def test_flags_that_do_not_go_together_end_in_one_line(run, flags, words):
    assert_one_error_line(run(parse_args, *flags.split()), *words.split())


def test_every_mode_of_the_flags_is_a_function():
    assert inference.MODES.keys() == MODES.keys()
