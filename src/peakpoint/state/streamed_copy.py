"""Capture through a small buffer, for states that do not fit into memory a second time.

The buffer is a ring of blocks. A thread copies the state into one block after the other, in the order of the files,
while the writer takes them; a block is free again when it has been written and hashed. The training waits until the
last block is filled.
"""

import bisect
import mmap
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch

from peakpoint.repository.commit import BLOCK, FileImage
from peakpoint.state.host_copy import pin, unpin
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.tensor_files import FileLayout, FileShards, lay_out
from peakpoint.store.pages import PAGE, allocate

SMALLEST_RING = 1024 * 1024


class RingBuffer:
    """A buffer of a fixed size, allocated at the first capture and reused by every one.

    Args:
        capacity: bytes, at least ``SMALLEST_RING``.
    """

    def __init__(self, capacity: int) -> None:
        self._block = min(BLOCK, capacity // 4 // PAGE * PAGE)
        self._count = capacity // self._block
        self._memory: mmap.mmap | None = None
        self._pinned = False

    def capture(
        self, files: Mapping[str, Mapping[str, torch.Tensor]], shards: FileShards = MappingProxyType({})
    ) -> tuple[list[FileImage], "StreamedCopy"]:
        """Prepare to copy the tensors of all files; ``StreamedCopy.run`` does it while the images are being written.

        Args:
            files: file name to its tensors by name.
            shards: see ``StagingBuffer.capture``.
        """
        if self._memory is None:
            self._memory = allocate(self._block * self._count)
        devices = {tensor.device for tensors in files.values() for tensor in tensors.values()}
        on_cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
        if on_cuda and not self._pinned:
            self._pinned = pin(self._memory)
        ring = memoryview(self._memory)
        slots = [ring[begin : begin + self._block] for begin in range(0, len(ring), self._block)]
        layouts = [lay_out(name, tensors, shards.get(name, {})) for name, tensors in files.items()]
        stream = StreamedCopy(layouts, files, slots, on_cuda)
        images = [
            FileImage(
                file.name,
                file.size,
                partial(stream.take, file.name),
                len(file.header),
                file.spans,
                transient=True,
                offsets=file.offsets,
            )
            for file in layouts
        ]
        return images, stream

    def close(self) -> None:
        """Let go of the memory, when no capture is under way."""
        if self._memory is not None and self._pinned:
            unpin(self._memory)
        self._memory, self._pinned = None, False


class StreamedCopy:
    """One capture under way through the ring; the state must not change before ``wait`` returns.

    Args:
        layouts: the files.
        files: file name to its tensors by name.
        slots: the blocks of the ring, all free.
        devices: the GPUs that tensors are on.
    """

    def __init__(
        self,
        layouts: Sequence[FileLayout],
        files: Mapping[str, Mapping[str, torch.Tensor]],
        slots: Sequence[memoryview],
        devices: Sequence[torch.device],
    ) -> None:
        self._layouts, self._files = layouts, files
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._filled: queue.SimpleQueue[memoryview | BaseException] = queue.SimpleQueue()
        self._done = threading.Event()
        self._queued_work = []
        for device in devices:  # copies come after the work that each GPU already has
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._queued_work.append((device, event))
        self.waited_seconds = 0.0

    def run(self) -> None:
        """Fill one block after the other as they become free, in a thread of its own."""
        try:
            for device, event in self._queued_work:
                torch.cuda.current_stream(device).wait_event(event)
            for layout in self._layouts:
                reader = _FileReader(layout, self._files[layout.name])
                position = 0
                while position < layout.size:
                    slot = self._free.get()
                    if slot is None:
                        return
                    size = min(len(slot), layout.size - position)
                    reader.read_into(slot[:size], position)
                    self._filled.put(slot)
                    position += size
        except BaseException as error:  # noqa: BLE001 - the end of a thread: the writer raises it
            self._filled.put(error)
        finally:
            self._files = {}
            self._done.set()

    def take(self, name: str) -> Iterator[memoryview]:
        """Iterate over the blocks of one file; files are taken in order."""
        remaining = next(layout.size for layout in self._layouts if layout.name == name)
        while remaining:
            slot = self._filled.get()
            if isinstance(slot, BaseException):
                raise slot
            size = min(len(slot), remaining)
            yield slot[:size]
            self._free.put(slot)
            remaining -= size

    def abandon(self) -> None:
        """Stop: no more blocks are taken."""
        self._free.put(None)

    def wait(self) -> None:
        """Return when the state may change: everything has been copied, or the save has been abandoned."""
        self._done.wait()

    def settle(self) -> None:
        """Do nothing: the report has waited."""

    def hold_step(self) -> None:
        """Do nothing: the report has waited."""


class _FileReader:
    """Copies any range of bytes of a file that exists only as its tensors."""

    def __init__(self, layout: FileLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        self._layout, self._tensors = layout, tensors
        self._spans = [span for span in layout.spans if span.end > span.begin]
        self._ends = [span.end for span in self._spans]

    def read_into(self, memory: memoryview, position: int) -> None:
        """Fill ``memory`` with the bytes from ``position`` on."""
        header = self._layout.header
        text = header[position : position + len(memory)]
        memory[: len(text)] = text
        begin = position - len(header)  # in the data section; negative while there is header
        end = begin + len(memory)
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for span in self._spans[bisect.bisect_right(self._ends, max(begin, 0)) :]:
            if span.begin >= end:
                break
            width = TORCH_DTYPES[span.dtype].itemsize
            first, last = max(begin, span.begin), min(end, span.end)
            offset = first - begin
            for source in elements(
                self._tensors[span.name], (first - span.begin) // width, (last - span.begin) // width
            ):
                target = torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=offset)
                targets.append(target.view(source.shape))
                sources.append(source)
                offset += source.numel() * width
        with torch.no_grad():
            if targets:
                torch._foreach_copy_(targets, sources)


def elements(tensor: torch.Tensor, begin: int, end: int) -> Iterator[torch.Tensor]:
    """Iterate over views that together are the elements ``[begin, end)`` of a tensor in row-major order."""
    if begin >= end:
        return
    if (begin, end) == (0, tensor.numel()):
        yield tensor
    elif tensor.is_contiguous():
        yield tensor.view(-1)[begin:end]
    else:
        row = tensor.numel() // len(tensor)
        first, last = -(-begin // row), end // row  # the rows that are whole
        if first > last:  # within one row
            yield from elements(tensor[last], begin - last * row, end - last * row)
            return
        if begin < first * row:
            yield from elements(tensor[first - 1], begin - (first - 1) * row, row)
        if first < last:
            yield tensor[first:last]
        yield from elements(tensor[last] if end > last * row else tensor[:0], 0, end - last * row)
