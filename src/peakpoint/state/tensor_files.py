"""Tensors in the safetensors format, laid out in memory exactly as the file will be.

A file is ``8 bytes: length of the header | header, JSON, padded with spaces | data``. Ours are padded so that the data
begins on a multiple of 4096 bytes, and tensors of larger elements come first so that each is aligned to its element.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec
import torch
from msgspec import UNSET

from peakpoint.errors import CorruptError, FormatError
from peakpoint.format.manifest import FileRecord, TensorRecord
from peakpoint.repository.commit import Offsets, WholeImage, image_of
from peakpoint.state.host_copy import NO_STORAGE, CopyPlan, CopyTarget, HostCopy, Storage, pin, unpin
from peakpoint.state.shared_storage import DTYPES, TORCH_DTYPES
from peakpoint.store.pages import PAGE, allocate, pages

FileShards = Mapping[str, Mapping[str, Sequence[int]]]
"""Of files by name: of each shard by name, where it begins in the whole tensor."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of one safetensors file.

    Attributes:
        header: its first bytes, a multiple of 4096.
        spans: the tensors in file order.
        size: bytes of the whole file.
        offsets: see ``FileRecord``.
    """

    name: str
    header: bytes
    spans: tuple[TensorRecord, ...]
    size: int
    offsets: Offsets = UNSET


def lay_out(
    name: str, tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> FileLayout:
    """Lay out a file for tensors by their dtypes and shapes.

    Args:
        shards: offsets in the whole tensor of those that are shards; they also stand in the header, as
            ``HuggingFaceStorageWriter`` of torch writes them.
    """
    spans = []
    position = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # stable: order is kept
        end = position + tensor.numel() * tensor.element_size()
        shape = tuple(tensor.shape)
        spans.append(TensorRecord(key, DTYPES[tensor.dtype], shape, position, end, digest=""))
        position = end
    metadata = {"format": "pt", "written_by": "peakpoint"}
    offsets: Offsets = UNSET
    if shards:
        offsets = tuple(tuple(shards.get(span.name, (0,) * len(span.shape))) for span in spans)
        saved = {span.name: {"saved_offsets": begin} for span, begin in zip(spans, offsets, strict=True)}
        metadata |= {"DCP_SHARDING_INFO": msgspec.json.encode(saved).decode(), "DCP_VERSION": "1.0"}
    header: dict[str, object] = {"__metadata__": metadata}
    header |= {
        span.name: {"dtype": span.dtype, "shape": span.shape, "data_offsets": (span.begin, span.end)} for span in spans
    }
    text = msgspec.json.encode(header)
    padded = -(-(8 + len(text)) // PAGE) * PAGE
    prefix = (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)
    return FileLayout(name, prefix, tuple(spans), padded + position, offsets)


class StagingBuffer:
    """The one buffer that tensors are copied into, reused by every save.

    It holds the image of every tensor file, one after the other on page boundaries, so that a save writes this memory
    as it is. It grows when a state needs more, and never shrinks.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._layouts: tuple[FileLayout, ...] = ()
        self._targets: list[tuple[str, CopyTarget]] = []  # file, place
        self._pinned = False
        self._signature: object = None
        self._plan: CopyPlan | None = None
        self._placement: object = None
        self._owned = NO_STORAGE

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._memory is None else len(self._memory)

    def capture(
        self,
        files: Mapping[str, Mapping[str, torch.Tensor]],
        owned: frozenset[Storage] = NO_STORAGE,
        placement: object = None,
        shards: FileShards = MappingProxyType({}),
    ) -> tuple[list[WholeImage], HostCopy]:
        """Begin to copy the tensors of all files into the buffer, overwriting the images of the last call.

        Args:
            files: file name to its tensors by name.
            owned: memory that may be copied later, by ``HostCopy.run``; all other memory is copied on return.
            placement: the same object as long as the files, and the places of all tensors, are the same.
            shards: file name to the offsets of its shards by name; see ``lay_out``.

        Returns:
            One image for each file, and the copying, which the images wait for.
        """
        if placement is None or placement is not self._placement:
            self._lay_out(files, shards)
            self._placement, self._plan = placement, None
        assert self._memory is not None
        sources = [files[file][target.name] for file, target in self._targets]
        if self._plan is None or self._owned is not owned:
            self._plan = CopyPlan([target for _, target in self._targets], sources, owned)
            self._owned = owned
        if not self._pinned and self._plan.devices:
            self._pinned = pin(self._memory)
        copying = HostCopy(self._plan, sources, pinned=self._pinned)
        images = []
        position = 0
        buffer = memoryview(self._memory)
        for layout in self._layouts:
            data = buffer[position : position + layout.size]
            ready = _ready(copying, position)
            images.append(image_of(layout.name, data, len(layout.header), layout.spans, ready, layout.offsets))
            position += pages(layout.size)
        return images, copying

    def fill(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> list[WholeImage]:
        """Copy the tensors of all files into the buffer; see ``capture``."""
        return self.capture(files)[0]

    def _lay_out(self, files: Mapping[str, Mapping[str, torch.Tensor]], shards: FileShards) -> None:
        signature = [
            (file, list(tensors), [(tensor.dtype, tensor.shape) for tensor in tensors.values()], shards.get(file))
            for file, tensors in files.items()
        ]
        if signature == self._signature:
            return
        self._signature = None  # in case this is interrupted
        layouts = tuple(lay_out(name, tensors, shards.get(name, {})) for name, tensors in files.items())
        total = sum(pages(layout.size) for layout in layouts)
        self._targets = []
        if self._memory is None or len(self._memory) < total:
            if self._memory is not None and self._pinned:
                unpin(self._memory)
            # tensors may move into a second file of their part, with a header of its own: no new memory for that
            spare = sum(len(layout.header) + 3 * PAGE for layout in layouts)
            self._memory = allocate(max(total + spare, PAGE))
            self._pinned = False
        position = 0
        for layout in layouts:
            self._memory[position : position + len(layout.header)] = layout.header
            data = position + len(layout.header)
            for span in layout.spans:
                if span.end > span.begin:
                    dtype = TORCH_DTYPES[span.dtype]
                    count = (span.end - span.begin) // dtype.itemsize
                    flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=data + span.begin)
                    place = CopyTarget(span.name, flat.view(span.shape), data + span.begin)
                    self._targets.append((layout.name, place))
            position += pages(layout.size)
        self._layouts = layouts
        self._signature = signature


def _ready(copying: HostCopy, offset: int) -> Callable[[int], None]:
    return lambda position: copying.wait(offset + position)


def is_possible(shape: Sequence[int]) -> bool:
    """Whether torch can count the elements of a tensor, and has strides for it, also around a length of 0.

    Example:
        >>> is_possible((0, 2**62)), is_possible((0, 2**62, 8))
        (True, False)
    """
    return math.prod(max(length, 1) for length in shape) < 2**63


def checked_dtype(file: FileRecord, record: TensorRecord) -> torch.dtype:
    """Return the element type of a tensor in a file.

    Raises:
        FormatError: one that this release does not know, or a record that contradicts itself.
    """
    dtype = TORCH_DTYPES.get(record.dtype)
    if dtype is None:
        raise FormatError(f"tensor {record.name!r} in {file.name} has elements {record.dtype!r}: update Peakpoint")
    if (
        not is_possible(record.shape)
        or min(record.shape, default=0) < 0
        or record.begin < 0
        or record.end - record.begin != math.prod(record.shape) * dtype.itemsize
    ):
        raise FormatError(f"tensor {record.name!r} in {file.name} has a shape that contradicts its bytes")
    return dtype


def tensors_of(file: FileRecord, data: memoryview) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, sharing memory with ``data``; nothing is copied.

    Args:
        file: its record, which gives names, dtypes, shapes and offsets.
        data: all bytes of the file, writable.

    Raises:
        FormatError: an element type that this release does not know, or a record that contradicts itself.
    """
    tensors = {}
    for record in file.tensors:
        dtype, count = checked_dtype(file, record), math.prod(record.shape)
        if not count:
            tensors[record.name] = torch.empty(record.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=file.header + record.begin)
        tensors[record.name] = flat.view(record.shape)
    return tensors


_LARGEST_HEADER = 100 * 1024**2


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], FileRecord]:
    """Return the tensors of a file, mapped privately, its metadata, and its record without digests.

    Raises:
        FormatError: it is not a safetensors file, or one that this release does not read.
        CorruptError: it is cut short.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(_LARGEST_HEADER, size - 8):
            raise FormatError(f"{path} is not a safetensors file: its header does not fit into its {size} bytes")
        try:
            header = msgspec.json.decode(file.read(length))
            metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
            rows = [(name, row["dtype"], row["shape"], *row["data_offsets"], "") for name, row in header.items()]
            records = msgspec.convert(rows, list[TensorRecord])
            records.sort(key=lambda record: (record.begin, record.end))
        except (msgspec.MsgspecError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not a safetensors file: its header cannot be read: {error}") from error
        end = 0
        for tensor in records:
            if tensor.begin != end:
                raise FormatError(f"{path} has tensors that overlap or leave gaps at {tensor.name!r}")
            end = tensor.end
        if 8 + length + end != size:
            raise CorruptError(f"{path} has {size} bytes, and its header says {8 + length + end}: cut short or damaged")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    record = FileRecord(name=path.name, size=size, digest="", header=8 + length, tensors=tuple(records))
    return tensors_of(record, mapped), metadata, record
