"""The peak of memory that some work takes, in the process that does it."""

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The peak of memory that some work took.

    Attributes:
        bytes: the peak above what there was before; None when it could not be measured.
        how: how it was measured, or why it could not be.
    """

    bytes: int | None
    how: str


def measure_peak(work: Callable[[], torch.device]) -> MemoryPeak:
    """Measure how much more memory than before some work takes at its peak.

    On the CPU this is resident memory, measured by the high-water mark that Linux keeps for each process, set back
    before (Source: proc(5), ``clear_refs`` and ``VmHWM``); on CUDA what torch's allocator gave out.

    Args:
        work: returns the device that it was done on.
    """
    _give_back()
    allocated = []
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
        allocated.append(torch.cuda.memory_allocated(index))
    resident = _reset()
    device = work()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        peak = torch.cuda.max_memory_allocated(device) - allocated[index]
        return MemoryPeak(peak, "given out by torch's allocator on the GPU")
    if isinstance(resident, str):
        return MemoryPeak(None, resident)
    growth = max(_field("VmHWM") - resident, 0)
    return MemoryPeak(growth, "resident memory of the process, peak less what it had before")


def _reset() -> int | str:
    """Set the high-water mark back; the resident bytes now, or why that cannot be done."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} keeps no high-water mark that can be set back"
    try:
        _CLEAR.write_text("5")
        return _field("VmRSS")
    except OSError as error:
        return f"the system does not let the high-water mark be set back: {error}"


def _field(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(match[1]) * 1024


def _give_back() -> None:
    """Let the system have what is free, so that it is not counted as there already."""
    gc.collect()
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what torch sets up once does not belong to the model
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
