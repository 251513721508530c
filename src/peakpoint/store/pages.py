"""Large memory, on huge pages where the system gives them."""

import contextlib
import ctypes
import mmap
import os

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


def cores() -> int:
    """How many threads of work this process may have running."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
