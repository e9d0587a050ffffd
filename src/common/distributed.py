"""Several processes that train one model together, each on its share of every batch.

torchrun, or `launch.py --nproc`, starts them and tells each its place in environment variables.
They talk by gloo between CPUs and by NCCL between GPUs. One process alone needs none of that, and
for it all of this does nothing.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import PeerLostError, Stopped, UserError

STORE = "VIT_MNIST_STORE"  # names a file where the processes of one machine find each other
PATIENCE = timedelta(hours=3)  # one may read a large folder, or download, while the others wait


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Every method is a meeting: all processes must call it, in the same order.
    """

    rank: int = 0  # this process's number
    size: int = 1  # how many there are
    local_rank: int = 0  # its number on its machine
    local_size: int = 1  # how many there are on its machine

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, put into `values` itself."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all(self, condition: Tensor) -> Tensor:
        """Whether a bool () holds in all processes; stays on its device."""
        if self.size == 1:
            return condition
        holds = condition.int()
        dist.all_reduce(holds, dist.ReduceOp.MIN)
        return holds.bool()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in each of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """What the first process gives, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that each backward pass averages gradients over all processes."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


SINGLE_PROCESS = World()


class StopBroadcast:
    """A number above 0 that one process gives becomes known to all after the same step.

    The processes learn in step n + 1 what one of them gave in step n, so that they needn't wait.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._numbers = torch.zeros((), dtype=torch.int64)  # on the CPU: no GPU waits for it
        self._work = None

    def after_step(self, number: int) -> int:
        """The largest number that a process gave a step earlier, or, of one process, gives now."""
        if self._world.size == 1:
            return number
        known = 0
        if self._work is not None:
            self._work.wait()
            known = int(self._numbers)
        self._numbers.fill_(number)
        self._work = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, async_op=True)
        return known


def find_world() -> World:
    """This process's place, from the variables that torchrun sets. Raises UserError if they make no
    sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ.get(name, "") for name in names}
    if not given["WORLD_SIZE"] or not given["RANK"]:
        return SINGLE_PROCESS
    numbers = [int(value) if value.isdecimal() else -1 for value in given.values()]
    rank, size, local_rank, local_size = numbers
    reachable = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    reachable = reachable or os.environ.get(STORE)
    if not (0 <= rank < size and 0 <= local_rank < local_size and (reachable or size == 1)):
        given |= {name: os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(
            f"{shown} in the environment: expected what torchrun sets; unset RANK and WORLD_SIZE "
            "to train in one process"
        )
    return World(rank, size, local_rank, local_size)


def device_of(world: World, device: torch.device) -> torch.device:
    """The process's own device: the GPU of its number, where `device` is CUDA and names none.
    Raises UserError if there are more processes than GPUs, or one GPU is named for several
    processes.
    """
    if world.size == 1 or device.type == "cpu":
        return device
    if device.type == "mps":
        raise UserError(f"--device mps with {world.size} processes: it is one GPU, start one")
    if device.index is not None:
        raise UserError(
            f"--device {device} with {world.size} processes: give --device cuda, each takes a GPU "
            "of its own"
        )
    if world.local_size > torch.cuda.device_count():
        raise UserError(
            f"{world.local_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
            "start at most as many, or give --device cpu"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Connect the processes for as long as the block lasts; only the first prints. Raises
    PeerLostError if another process ended, or couldn't be reached.
    """
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stopped = None
    try:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        file = os.environ.get(STORE)
        store = dist.FileStore(file, world.size) if file else None  # None: a server, as torchrun's
        dist.init_process_group(
            backends, timeout=PATIENCE, store=store, rank=world.rank, world_size=world.size
        )
        try:
            if world.leads:
                yield
            else:
                with (
                    open(os.devnull, "w", errors="replace") as null,
                    redirect_stdout(null),
                    redirect_stderr(null),
                ):
                    yield
        except Stopped as stop:  # all of them, after the same step
            stopped = stop
        dist.barrier()  # none leaves while another still needs it
    except RuntimeError as error:
        if not _is_of_network(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise PeerLostError(
            f"process {world.rank} of {world.size} lost touch with the others, so this run has "
            f"ended ({reason}); all saves are intact; continue with --resume"
        ) from None
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
    if stopped:
        raise stopped


def _is_of_network(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed", "NCCL", "connectFullMesh")
    )
