"""Which device a script computes on, in which precision, and what they are called."""

import platform
import re

import torch

from common.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that `--device` names. Raises UserError if it is none or not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d{0,3}))?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"--device mps: PyTorch {torch.__version__} finds no Apple GPU here; use --device cpu"
        )
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} finds no CUDA GPU here; "
            "use --device cpu, or check the driver"
        )
    device = torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count() and device.type == "cuda":
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, from cuda:0")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in convolutions as in products
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16": what `--precision` names; for "auto" bf16 if `device` computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _cpu_computes_bf16()
    return "bf16" if fast else "fp32"


def widest_float(device: torch.device) -> torch.dtype:
    """What sums over many images are kept in: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def _cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for it; without, bf16 is emulated and slower than fp32."""
    try:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    except AttributeError:  # PyTorch for another architecture than x86
        return False


def describe_device(device: torch.device) -> str:
    """The device in words, for printed and written results."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return f"mps ({platform.machine()})"
    return f"cpu ({platform.machine()}, {describe_threads()})"


def describe_threads() -> str:
    """How many threads PyTorch computes with on a CPU, in words."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"
