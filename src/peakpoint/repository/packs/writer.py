"""Writing packs: cut the files of a checkpoint into ranges, and pack each as a difference to its neighbours."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.repository.packs.index import (
    ByteRange,
    PackedFile,
    PackedRange,
    PackIndex,
    byte_ranges,
    encode_index,
    part_of,
    read_index,
    slices_in,
)
from peakpoint.repository.packs.reader import ByteSource, FileSource, load_codec, parallel_map, same_bytes
from peakpoint.store import Store

RANGE_BYTES = 4 * 1024 * 1024
"""Longest range that is packed at once, in bytes: so much is unpacked at least to read one tensor."""


@dataclass(frozen=True, slots=True)
class PackBase:
    """A checkpoint to whose bytes a pack may hold differences.

    Attributes:
        checkpoint: its id.
        source: its bytes.
        depth: how many packs have to be read for it.
    """

    checkpoint: str
    source: ByteSource
    depth: int


class _RangeToPack(NamedTuple):
    begin: int
    end: int
    dtype: str


def _ranges_to_pack(ranges: Sequence[ByteRange]) -> Iterator[_RangeToPack]:
    """Yield ranges of one element type, of at most ``RANGE_BYTES``: neighbours together, large tensors cut."""
    for dtype, group in itertools.groupby(ranges, key=lambda byte_range: byte_range.key.dtype):
        begin = end = -1
        for byte_range in group:
            if begin < 0 or byte_range.end - begin > RANGE_BYTES:
                if begin >= 0:
                    yield _RangeToPack(begin, end, dtype)
                begin = byte_range.begin
            end = byte_range.end
            while end - begin > RANGE_BYTES:
                yield _RangeToPack(begin, begin + RANGE_BYTES, dtype)
                begin += RANGE_BYTES
        yield _RangeToPack(begin, end, dtype)


def write_pack(
    store: Store, manifest: Manifest, files: FileSource, bases: Sequence[PackBase], level: int | None
) -> PackIndex:
    """Pack a checkpoint; durable on return.

    Args:
        store: receives the pack.
        manifest: of the checkpoint.
        files: its bytes.
        bases: its neighbours, the nearest first.
        level: of zstd; None for the usual.
    """
    codec = load_codec()
    sources = [base.source for base in bases]
    packed_files: list[PackedFile] = []

    def pack(data: memoryview, ranges: Sequence[ByteRange], cut: _RangeToPack) -> tuple[str, bytes]:
        base_bytes = same_bytes(sources, slices_in(ranges, cut.begin, cut.end), {})
        packed: tuple[str, bytes] = codec.pack(data[cut.begin : cut.end], cut.dtype, base_bytes, level)
        return packed

    def chunks() -> Iterator[bytes]:
        offset = 0
        for file in manifest.files:
            part = part_of(manifest, file.name)
            ranges = byte_ranges(file, part)
            cuts, pieces = list(_ranges_to_pack(ranges)), []
            packing = parallel_map(partial(pack, files.file(file.name), ranges), cuts)
            for cut, (method, packed) in zip(cuts, packing, strict=True):
                pieces.append(PackedRange(*cut, method, offset, len(packed)))
                offset += len(packed)
                yield packed
            tensors = tuple(tensor._replace(digest="") for tensor in file.tensors)  # the manifest has them
            packed_files.append(PackedFile(replace(file, tensors=tensors), part, tuple(pieces)))
        needed = max((codec.bases_of(piece.method) for file in packed_files for piece in file.pieces), default=0)
        yield encode_index(_index(manifest.id, packed_files, bases[:needed]))

    store.put(layout.pack_key(manifest.run, manifest.id), chunks())
    return read_index(store, manifest.run, manifest.id)


def _index(checkpoint: str, files: Sequence[PackedFile], bases: Sequence[PackBase]) -> PackIndex:
    depth = 1 + max((base.depth for base in bases), default=0)
    ids = tuple(base.checkpoint for base in bases)
    return PackIndex(checkpoint=checkpoint, bases=ids, depth=depth, files=tuple(files))
