"""The index of a pack: which files it holds, and where their bytes are."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peakpoint.errors import CorruptError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.members import Count, Name
from peakpoint.format.sealed import decode_record, encode_record
from peakpoint.store import RECORD, Store

_MAGIC = b"PEAKPACK"
_TRAILER = 16  # bytes: the length of the index, and the magic word


class PackedRange(NamedTuple):
    """A range of bytes of a file, and where a pack holds it.

    Attributes:
        begin: first byte in the file.
        end: one past the last.
        dtype: safetensors' name of the element type; "" for bytes that are not tensors.
        method: how it is packed; see ``peakpoint.repository.packs.codec``.
        offset: first byte in the pack.
        length: bytes in the pack.
    """

    begin: Count
    end: Count
    dtype: str
    method: str
    offset: Count
    length: Count


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file in a pack.

    Attributes:
        record: as in the manifest, but without the digests of tensors.
        part: the part whose tensors it holds; "" when it holds none.
        pieces: ranges that cover the file without gaps.
    """

    record: FileRecord
    part: str
    pieces: tuple[PackedRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackIndex:
    """The content of a pack.

    Attributes:
        checkpoint: the id.
        bases: ids of the checkpoints whose bytes are needed, the nearest first.
        depth: how many packs have to be read one after the other, at most.
    """

    checkpoint: Name
    bases: tuple[Name, ...]
    depth: Count
    files: tuple[PackedFile, ...]


class TensorKey(NamedTuple):
    """The identity of bytes, whatever file holds them.

    Attributes:
        part: "" for bytes that are not tensors.
        name: of the tensor; of the file for bytes that are not tensors.
        dtype: the element type.
        size: bytes.
        offsets: of a shard, its place in the whole tensor.
    """

    part: str
    name: str
    dtype: str
    size: int
    offsets: tuple[int, ...] = ()


class ByteRange(NamedTuple):
    """The bytes of one key in a file."""

    begin: int
    end: int
    key: TensorKey


TensorSlice = tuple[TensorKey, int, int]
"""A key, and the first and one past the last of its bytes."""


def byte_ranges(file: FileRecord, part: str) -> list[ByteRange]:
    """Return everything in a file, in order and without gaps."""
    head = file.header or file.size
    ranges = [ByteRange(0, head, TensorKey("", file.name, "", head))]
    for tensor, offsets in zip(file.tensors, file.offsets or itertools.repeat(()), strict=False):
        begin, end = file.header + tensor.begin, file.header + tensor.end
        ranges.append(ByteRange(begin, end, TensorKey(part, tensor.name, tensor.dtype, end - begin, offsets)))
    return [byte_range for byte_range in ranges if byte_range.begin < byte_range.end]


def slices_in(ranges: Sequence[ByteRange], begin: int, end: int) -> list[TensorSlice]:
    """Return the slices of tensors that bytes ``[begin, end)`` of a file consist of."""
    slices = []
    for start, stop, key in ranges[bisect_right(ranges, begin, key=lambda byte_range: byte_range.begin) - 1 :]:
        if start >= end:
            break
        slices.append((key, max(begin, start) - start, min(end, stop) - start))
    return slices


def part_of(manifest: Manifest, file: str) -> str:
    """Return the part that a file belongs to; "" for files without tensors."""
    return next((part for part, files in manifest.parts.items() if file in files), "")


def encode_index(index: PackIndex) -> bytes:
    """Encode the end of a pack."""
    sealed = encode_record(index)
    return sealed + len(sealed).to_bytes(8, "little") + _MAGIC


def read_index(store: Store, run: str, checkpoint: str) -> PackIndex:
    """Read the index of a checkpoint's pack.

    Raises:
        NotFoundError: there is no such pack.
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
    """
    key = layout.pack_key(run, checkpoint)
    size = store.size(key)
    if size is None:
        raise NotFoundError(f"{store.location} has no {key}")
    trailer = store.get(key, max(0, size - _TRAILER), size)
    length = int.from_bytes(trailer[:8], "little")
    if trailer[8:] != _MAGIC or length > min(size - _TRAILER, RECORD):
        raise CorruptError(f"{key} is damaged: it does not end with an index")
    index = decode_record(
        PackIndex, store.get(key, size - _TRAILER - length, size - _TRAILER), where=key, unsealed=CorruptError
    )
    for file in index.files:
        _check_pieces(file, size, key)
    return index


def _check_pieces(file: PackedFile, pack_size: int, key: str) -> None:
    begins, ends = [piece.begin for piece in file.pieces], [piece.end for piece in file.pieces]
    inside = all(0 <= piece.offset <= piece.offset + piece.length <= pack_size for piece in file.pieces)
    if [*begins, file.record.size] != [0, *ends] or not inside or any(map(int.__ge__, begins, ends)):
        raise CorruptError(f"{key} is damaged: its pieces do not cover {file.record.name}")
