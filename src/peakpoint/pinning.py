"""Memory that a GPU reads and writes by itself."""

import mmap
import warnings

import torch

from peakpoint.errors import PeakpointWarning
from peakpoint.store.pages import address


def pin(data: mmap.mmap | memoryview) -> bool:
    """Lock memory for CUDA, so that copies from and to the GPU run beside the training.

    Our own pages are registered, and not CUDA's taken: direct I/O refuses memory that a driver has mapped. Where the
    system does not allow so much locked memory, copies are correct all the same, and slower.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(address(data), len(data), 0))
    if code != 0:
        warnings.warn(
            f"CUDA could not pin {len(data) / 1e6:.0f} MB (error {code}; see ulimit -l): copies are slower",
            PeakpointWarning,
            stacklevel=2,
        )
    return code == 0


def unpin(data: mmap.mmap | memoryview) -> None:
    """Undo ``pin``, which is due before the memory is let go of."""
    torch.cuda.cudart().cudaHostUnregister(address(data))  # type: ignore[no-untyped-call]
