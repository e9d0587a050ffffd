"""What the training loop asks of the machine: memory that stays, and a compiled network."""

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.distributed import World
from common.errors import UserError
from utils import BatchLoader
from vit_model import ViT


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, where the C library is glibc.

    A training step allocates the same hundred megabytes as the one before. By default glibc gives
    large blocks back to the kernel at once, and each comes again as untouched pages, thousands of
    page faults a step.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    # Older releases take no more than 32 MiB. Either threshold turns off the other's adjusting.
    if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def prepare(
    model: ViT,
    mode: str,
    loader: BatchLoader,
    *,
    precision: str,
    grad_accum_steps: int,
    world: World,
) -> Callable[[Tensor], Tensor]:
    """What to call in training: `model` itself, compiled, or wrapped for several processes.

    Raises UserError if compiling is asked for where batches are divided.
    """
    can_compile = world.size == 1 and grad_accum_steps == 1
    if mode == "on" and not can_compile:
        raise UserError(
            "--compile on works only in one process without --grad_accum_steps: leave it out"
        )
    if not can_compile:
        return world.wrap(model)
    images = loader.split.images
    shape = min(loader.batch_size, len(images)), *images.shape[1:]
    return compile_network(model, mode, torch.zeros(shape, device=images.device), precision)


def compile_network(
    model: nn.Module, mode: str, sample: Tensor, precision: str
) -> Callable[[Tensor], Tensor]:
    """What to call in training: `model` itself, or it compiled by `torch.compile`.

    Compiling happens here, not in the first step: with the model's `patch_drop` and without, as a
    run has both. Where it fails, there is a note on stderr and the model runs as it is. A batch of
    another shape than `sample`, the last of an epoch, goes through the model as it is too:
    compiling once more would take longer.

    Args:
        mode: "on", "off", or "auto", which compiles for CUDA: there a step of small kernels waits
            for Python; on CPUs the matrix products set the pace.
        sample: a batch (B, C, S, S) of the size to come, on the model's device.
    """
    device = sample.device
    cuda = device.type == "cuda"
    if mode == "off" or (mode == "auto" and not cuda):
        return model
    # reduce-overhead: CUDA graphs, so that Python launches a step at once.
    compiled = torch.compile(model, mode="reduce-overhead" if cuda else None, dynamic=False)
    share = model.patch_drop if isinstance(model, ViT) else 0.0  # benchmarks have other networks
    try:
        with torch.random.fork_rng([device] if cuda else []):
            for number in range(6 if share else 3):  # CUDA graphs are recorded after a first pass
                if share:
                    model.patch_drop = share if number < 3 else 0.0
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = compiled(sample)
                logits.float().sum().backward()
                model.zero_grad()
    except Exception as error:  # the compiler's own, or a C++ compiler's that is missing
        reason = " ".join(str(error).split())[:200]
        print(f"note: torch.compile failed, training goes on without it: {reason}", file=sys.stderr)
        return model
    finally:
        if share:
            model.patch_drop = share
    return lambda images: (compiled if images.shape == sample.shape else model)(images)
