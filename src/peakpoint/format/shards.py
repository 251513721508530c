"""Tensors as the files of a part hold them: whole, or in shards that several files have."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peakpoint.errors import CorruptError
from peakpoint.format.manifest import FileRecord, Manifest, TensorRecord
from peakpoint.format.sealed import digest


class Shard(NamedTuple):
    """A box of a tensor in one file.

    Attributes:
        file: the file.
        record: its row there: the shape is that of the box.
        offsets: the place of its first element in the whole tensor.
    """

    file: FileRecord
    record: TensorRecord
    offsets: tuple[int, ...]

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """First index and one past the last along each dimension; of a scalar as if it had one dimension."""
        return tuple((begin, begin + size) for begin, size in zip(self.offsets, self.record.shape, strict=True)) or (
            (0, 1),
        )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a part; one that is whole in one file has one shard.

    Attributes:
        name: its key in the files.
        dtype: safetensors' name of the element type.
        shape: of the whole tensor.
        digest: of one shard its own, of several a digest of theirs with their places. The same digest means the same
            bytes; the same bytes have another one when they were saved in other shards.
        shards: what it consists of, without gaps and overlaps.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    shards: tuple[Shard, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.record.end - shard.record.begin for shard in self.shards)


def stored_tensors(manifest: Manifest, part: str) -> dict[str, StoredTensor]:
    """Return the tensors that the files of a part hold, by name.

    Raises:
        CorruptError: the shards of a tensor leave a gap, overlap, or have different element types or dimensions; the
            message names the tensor and the files.
    """
    files = {file.name: file for file in manifest.files}
    try:
        return tensors_of_files([files[name] for name in manifest.parts.get(part, ())])
    except CorruptError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: in part {part!r} {error}") from error


def tensors_of_files(files: Sequence[FileRecord]) -> dict[str, StoredTensor]:
    """Return the tensors that files hold together, by name; see ``stored_tensors``."""
    shards: dict[str, list[Shard]] = {}
    for file in files:
        offsets = file.offsets or itertools.repeat(())
        for record, begins in zip(file.tensors, offsets, strict=False):
            shards.setdefault(record.name, []).append(Shard(file, record, begins or (0,) * len(record.shape)))
    return {name: _joined(name, tuple(pieces)) for name, pieces in shards.items()}


def _joined(name: str, shards: tuple[Shard, ...]) -> StoredTensor:
    first = shards[0].record
    if len(shards) == 1 and not any(shards[0].offsets):
        return StoredTensor(name, first.dtype, first.shape, first.digest, shards)
    for file, record, _ in shards:
        if (record.dtype, len(record.shape)) != (first.dtype, len(first.shape)):
            kinds = [f"{row.dtype} of {len(row.shape)} dimensions" for row in (record, first)]
            raise CorruptError(f"tensor {name!r} is {kinds[0]} in {file.name} and {kinds[1]} in {shards[0].file.name}")
    for earlier, later in _overlaps(shards):
        raise CorruptError(f"the shards of tensor {name!r} in {earlier.file.name} and {later.file.name} overlap")
    ends = zip(*(map(sum, zip(offsets, record.shape, strict=True)) for _, record, offsets in shards), strict=True)
    shape = tuple(map(max, ends))
    count = sum(math.prod(record.shape) for _, record, _ in shards)
    if count != math.prod(shape):
        listed = ", ".join(sorted(file.name for file, _, _ in shards)[:5])
        raise CorruptError(
            f"the shards of tensor {name!r} leave a gap: {count} of {math.prod(shape)} elements in {listed}"
        )
    ordered = sorted(shards, key=lambda shard: shard.offsets)
    pieces = [f"{list(offsets)} {list(record.shape)} {record.digest}" for _, record, offsets in ordered]
    return StoredTensor(name, first.dtype, shape, digest("\n".join(pieces).encode()), shards)


def _overlaps(shards: Sequence[Shard]) -> list[tuple[Shard, Shard]]:
    """Return two shards that have an element in common, if there are any.

    They are gone through along the dimension with the most different offsets, so that few are compared with each.
    """
    solid = [shard for shard in shards if all(shard.record.shape)]
    axis = max(range(len(shards[0].box)), key=lambda axis: len({shard.box[axis] for shard in solid}))
    begun: list[Shard] = []
    for shard in sorted(solid, key=lambda shard: shard.box[axis]):
        begun = [earlier for earlier in begun if earlier.box[axis][1] > shard.box[axis][0]]
        for earlier in begun:
            if common_box(earlier.box, shard.box) is not None:
                return [(earlier, shard)]
        begun.append(shard)
    return []


def common_box(
    first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...] | None:
    """Return what two boxes have in common; None when that is nothing.

    Example:
        >>> common_box([(0, 4), (2, 6)], [(3, 8), (0, 5)])
        ((3, 4), (2, 5))
    """
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return common if all(begin < end for begin, end in common) else None
