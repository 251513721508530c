"""Reading tensors by their bytes alone: whole, or a box of one, whatever shards the files have.

Nothing here needs ``torch.distributed``: a process reads what it wants of what any number of processes have written.
"""

from collections.abc import Mapping, Sequence

import torch

from peakpoint.errors import ConfigError, FormatError
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.shards import Shard, StoredTensor, common_box
from peakpoint.repository import reader
from peakpoint.repository.commit import BLOCK
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.tensor_files import checked_dtype, is_possible
from peakpoint.store import Store


def read_tensor(store: Store, manifest: Manifest, tensor: StoredTensor) -> torch.Tensor:
    """Read a whole tensor and compare it with its digests, in its memory and that of two blocks; see ``read_box``.

    Raises:
        CorruptError: it is damaged; the message names the file and the tensor.
        FormatError: its elements need a newer release, or its record contradicts itself.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    return read_box(store, manifest, tensor, (0,) * len(tensor.shape), tensor.shape)


def read_box(
    store: Store,
    manifest: Manifest,
    tensor: StoredTensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    *,
    target: torch.Tensor | None = None,
    verify: bool = True,
) -> torch.Tensor:
    """Read a box of a tensor from the shards that have some of it, and from no others.

    Takes the memory of the box and of two blocks of a shard, each of 32 MiB or of one row (what has the same index in
    its first dimension), whichever is larger.

    Args:
        tensor: as ``format.shards.stored_tensors`` returns it.
        offsets: where the box begins in the tensor.
        sizes: of the box.
        target: receives the box instead of new memory; of this shape and the stored element type, on any device.
        verify: read each of these shards as a whole and compare it with its digest. Without, the rows that have some
            of the box are read, and nothing is compared.

    Returns:
        The box: ``target``, or a new tensor on the CPU.

    Raises:
        ConfigError: the box is not inside of the tensor, or ``target`` does not fit it.
        CorruptError: a shard is missing or damaged; the message names the file and the tensor. The values of ``target``
            do not count then.
        FormatError: its elements need a newer release, or its record contradicts itself.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    dtype = dtype_of(tensor)
    shape = tuple(sizes)
    ends = tuple(map(sum, zip(offsets, shape, strict=False)))
    if not len(offsets) == len(shape) == len(tensor.shape) or not all(
        0 <= begin <= end <= size for begin, end, size in zip(offsets, ends, tensor.shape, strict=True)
    ):
        raise ConfigError(
            f"tensor {tensor.name!r} of shape {list(tensor.shape)} has no box of {list(shape)} at {list(offsets)}"
        )
    if target is not None and (target.dtype, tuple(target.shape)) != (dtype, shape):
        raise ConfigError(
            f"target= is {target.dtype} {list(target.shape)}; the box of {tensor.name!r} is {dtype} {list(shape)}"
        )
    requested = tuple(zip(offsets, ends, strict=True)) or ((0, 1),)
    common = [(shard, part) for shard in tensor.shards if (part := common_box(shard.box, requested)) is not None]
    if tensor.size_bytes > BLOCK:  # before memory is taken
        for shard, _ in common:
            reader.check_size(store, manifest, shard.file)
    box = torch.empty(shape, dtype=dtype) if target is None else target
    indexed = box.detach() if shape else box.detach().unsqueeze(0)
    for shard, part in common:
        _fill(store, manifest, shard, part, indexed[_slices(part, requested)], verify=verify)
    return box


def _slices(box: Sequence[tuple[int, int]], around: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """Return where a box is in another one around it."""
    return tuple(slice(begin - origin, end - origin) for (begin, end), (origin, _) in zip(box, around, strict=True))


def _fill(
    store: Store,
    manifest: Manifest,
    shard: Shard,
    box: tuple[tuple[int, int], ...],
    target: torch.Tensor,
    *,
    verify: bool,
) -> None:
    """Read a box of a shard that is inside of it."""
    record, dtype = shard.record, TORCH_DTYPES[shard.record.dtype]
    size = record.end - record.begin
    (top, bottom), *inner = shard.box
    row = size // (bottom - top)
    first, last = box[0]

    def take(position: int, data: bytes) -> None:
        begin = top + position // row
        end = begin + len(data) // row
        rows = torch.frombuffer(bytearray(data), dtype=dtype).view(-1, *(stop - start for start, stop in inner))
        begin_common, end_common = max(begin, first), min(end, last)
        if begin_common < end_common:
            source = rows[_slices(((begin_common, end_common), *box[1:]), ((begin, end), *inner))]
            target[begin_common - first : end_common - first].copy_(source)

    within = None if verify else ((first - top) * row, (last - top) * row)
    block = max(BLOCK // row, 1) * row
    reader.take_tensor(store, manifest, shard.file, record, take, block=block, within=within)


def joined(
    stored: Mapping[str, StoredTensor],
    file: FileRecord,
    shards: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Put the shards of one file into the whole tensors that they belong to.

    Args:
        stored: the tensors of the part.
        file: the record of the file.
        shards: its content.
        tensors: what the files before have begun to fill.

    Returns:
        The tensors that have a shard in this file, filled so far; one with no other shard shares the file's memory.
    """
    filled = {}
    for record, offsets in zip(file.tensors, file.offsets or (), strict=True):
        tensor, shard = stored[record.name], shards[record.name]
        if len(tensor.shards) == 1:
            filled[record.name] = shard
            continue
        target = tensors.get(record.name)
        if target is None:
            target = torch.empty(tensor.shape, dtype=dtype_of(tensor))
        slices = tuple(slice(begin, begin + size) for begin, size in zip(offsets, shard.shape, strict=True))
        target[slices] = shard
        filled[record.name] = target
    return filled


def dtype_of(tensor: StoredTensor) -> torch.dtype:
    """Return the element type of a tensor, whose records are checked.

    Raises:
        FormatError: see ``checked_dtype``.
    """
    dtype, *_ = [checked_dtype(file, record) for file, record, _ in tensor.shards]
    if not is_possible(tensor.shape):
        raise FormatError(f"tensor {tensor.name!r} has the shape {list(tensor.shape)}, which is too large")
    return dtype
