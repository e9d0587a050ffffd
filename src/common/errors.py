"""The ways in which a script ends early, each with its message."""


class UserError(Exception):
    """Wrong usage or input, in one line: what was given, what was expected, what to do."""


class PeerLostError(Exception):
    """Another process of the run has ended, so this one can't go on."""


class Stopped(Exception):  # noqa: N818 not an error: all is saved
    """A signal ended the work in good order; the message says what was saved, how to continue."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number  # the exit status, as shells have it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the CPU or GPU is out of memory; PyTorch has a RuntimeError for it but on CUDA."""
    names = {kind.__name__ for kind in type(error).__mro__}  # without importing PyTorch
    words = "DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED"  # the last: cuBLAS
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(w in str(error) for w in words)
