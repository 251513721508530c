"""Large memory: on huge pages where the system gives them, pinned for GPUs where it allows."""

import contextlib
import ctypes
import mmap
import warnings

from peakpoint.errors import PeakpointWarning

PAGE = 4096


def pages(size: int) -> int:
    """``size`` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def allocate(size: int) -> mmap.mmap:
    """Anonymous memory; direct I/O pins and maps far fewer pages when they are huge."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def address(data: mmap.mmap | memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) if len(data) else 0


def touch(data: memoryview) -> None:
    """Have the system give real pages to fresh memory now, letting other threads run; fills it with zeros."""
    ctypes.memset(address(data), 0, len(data))


def pin(data: mmap.mmap | memoryview) -> bool:
    """Lock memory for CUDA, so that copies from and to the GPU run beside the training.

    Our own pages are registered, and not CUDA's taken: direct I/O refuses memory that a driver has mapped. Where the
    system does not allow so much locked memory, copies are correct all the same, and slower.
    """
    import torch  # noqa: PLC0415 - memory without it is for everybody

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
    import torch  # noqa: PLC0415

    torch.cuda.cudart().cudaHostUnregister(address(data))  # type: ignore[no-untyped-call]
