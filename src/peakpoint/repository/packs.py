"""Packs: the bytes of one checkpoint, packed as differences to the checkpoints before it.

::

    runs/<run>/archived.json         says that the run is archived
    runs/<run>/archive/<id>.pack     the pieces of one checkpoint, one after the other, then the index

A pack names the checkpoints whose bytes its differences need. They may be packed themselves, whether their checkpoints
still exist or not, so a pack is only removed when no other needs it.
"""

import importlib
import itertools
import shlex
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from peakpoint.errors import ConflictError, CorruptError, FormatError, NotFoundError, needing
from peakpoint.format import layout
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.sealed import FORMAT, check_format, seal, unseal
from peakpoint.repository.commit import Span, StreamedImage
from peakpoint.store import RECORD, Store, establish
from peakpoint.store.pages import cores

PIECE = 4 * 1024 * 1024  # bytes
_MAGIC = b"PEAKPACK"
_TRAILER = 16  # bytes: the length of the index, and the magic word


class Piece(NamedTuple):
    """A range of bytes of a file, as it is packed.

    Attributes:
        begin: first byte in the file.
        end: one past the last.
        dtype: safetensors' name of the element type; "" for bytes that are no tensors.
        method: how it is packed; see ``peakpoint.repository.codec``.
        at: first byte in the pack.
        length: bytes in the pack.
    """

    begin: int
    end: int
    dtype: str
    method: str
    at: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file in a pack.

    Attributes:
        record: as in the manifest.
        part: the part whose tensors it holds; "" when it holds none.
        pieces: cover the file without gaps.
    """

    record: FileRecord
    part: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a pack holds.

    Attributes:
        checkpoint: the id.
        bases: ids of the checkpoints whose bytes are needed, the nearest first.
        depth: how many packs have to be read one after the other, at most.
        files: the files.
    """

    checkpoint: str
    bases: tuple[str, ...]
    depth: int
    files: tuple[PackedFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArchive:
    """The record that a run is archived.

    Attributes:
        packed_bytes: the id of each checkpoint, with the bytes of its pack.
        at: when.
        by: who decided.
    """

    packed_bytes: Mapping[str, int]
    at: datetime
    by: str


def run_archive(store: Store, run: str) -> RunArchive | None:
    """The record that a run is archived; None when it is not.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
    """
    key = layout.archived_key(run)
    try:
        content = unseal(store.get(key), where=key)
    except NotFoundError:
        return None
    check_format(content, where=key)
    try:
        return msgspec.convert(content, RunArchive)
    except msgspec.ValidationError as error:
        raise FormatError(f"{key} is not a record of an archive that this release reads") from error


def known_archive(store: Store, run: str) -> RunArchive | None:
    """``run_archive``, and None for a record that cannot be read: audit names it, and the packs tell the rest."""
    try:
        return run_archive(store, run)
    except (CorruptError, FormatError):
        return None


def note_archived(store: Store, run: str, archive: RunArchive) -> None:
    """Say durably that a run is archived."""
    establish(store, layout.archived_key(run), seal({"format": FORMAT, **msgspec.to_builtins(archive)}))


def packed_bytes(store: Store, run: str, manifests: Iterable[Manifest]) -> dict[str, int]:
    """The checkpoints of a run whose bytes are in packs: id to the bytes of the pack.

    Those are the ones that the record of the run names, and those that lack files and have a pack, whatever the records
    say: a record may be lost, and earlier code wrote one for each checkpoint.
    """
    stored = set(store.children(layout.archive_prefix(run)))
    archive = known_archive(store, run) if stored else None
    named = {} if archive is None else archive.packed_bytes
    packed = {}
    for manifest in manifests:
        if f"{manifest.id}{layout.PACK}" in stored and (manifest.id in named or not _is_plain(store, manifest)):
            packed[manifest.id] = store.size(layout.pack_key(run, manifest.id)) or 0
    return packed


def _is_plain(store: Store, manifest: Manifest) -> bool:
    children = set(store.children(layout.checkpoint_prefix(manifest.run, manifest.name)))
    return layout.ARCHIVED not in children and {file.name for file in manifest.files} <= children


def check_not_archived(store: Store, run: str, manifests: Iterable[Manifest]) -> None:
    """Refuse to change single checkpoints of an archived run.

    Raises:
        ConflictError: the run is archived.
    """
    if store.size(layout.archived_key(run)) is not None or packed_bytes(store, run, manifests):
        raise ConflictError(
            f"run {run!r} is archived, and its checkpoints stay as they are; "
            f"peakpoint archive {shlex.quote(store.location)} {shlex.quote(run)} --restore brings its files back first"
        )


# --- what tensors are in a range of a file ------------------------------------------------------------------------


class Key(NamedTuple):
    """What bytes are, whatever file they stand in.

    Attributes:
        part: the part; "" for bytes that are no tensors.
        name: of the tensor; of the file for bytes that are none.
        dtype: the element type.
        size: bytes.
    """

    part: str
    name: str
    dtype: str
    size: int


class Spot(NamedTuple):
    """Where the bytes of a key are in a file."""

    begin: int
    end: int
    key: Key


def _spots(file: FileRecord, part: str) -> list[Spot]:
    """Everything in a file, in order and without gaps."""
    head = file.header or file.size
    spots = [Spot(0, head, Key("", file.name, "", head))]
    for tensor in file.tensors:
        begin, end = file.header + tensor.begin, file.header + tensor.end
        spots.append(Spot(begin, end, Key(part, tensor.name, tensor.dtype, end - begin)))
    return [spot for spot in spots if spot.begin < spot.end]


def _cut(spots: Sequence[Spot]) -> Iterator[tuple[int, int, str]]:
    """Ranges of one element type, of at most ``PIECE`` bytes: neighbours together, large tensors in pieces."""
    for dtype, group in itertools.groupby(spots, key=lambda spot: spot.key.dtype):
        begin = end = -1
        for spot in group:
            if begin < 0 or spot.end - begin > PIECE:
                if begin >= 0:
                    yield begin, end, dtype
                begin = spot.begin
            end = spot.end
            while end - begin > PIECE:
                yield begin, begin + PIECE, dtype
                begin += PIECE
        yield begin, end, dtype


def part_of(manifest: Manifest, file: str) -> str:
    """The part that a file belongs to; "" for files without tensors."""
    return next((part for part, files in manifest.parts.items() if file in files), "")


# --- where bytes come from ----------------------------------------------------------------------------------------


Memo = dict[tuple[str, int, int], bytes]
"""Pieces that were unpacked on the way to the one that is wanted."""


class Source(Protocol):
    """The bytes of a checkpoint, by what they are."""

    def take(self, key: Key, begin: int, end: int, memo: Memo) -> bytes | memoryview | None:
        """Bytes ``[begin, end)`` of what ``key`` names; None when this checkpoint has no such bytes.

        Raises:
            CorruptError: they should be there and are not.
        """


class PlainSource:
    """A checkpoint whose files are where its manifest says; mapped, and not verified.

    Args:
        store: where.
        manifest: which.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._views = {}
        self._places: dict[Key, tuple[str, int]] = {}
        for file in manifest.files:
            view = store.view(layout.file_key(manifest.run, manifest.name, file.name))
            if len(view) != file.size:
                raise CorruptError(
                    f"checkpoint {manifest.name} is damaged: {file.name} has {len(view)} bytes instead of {file.size}"
                )
            self._views[file.name] = view
            for spot in _spots(file, part_of(manifest, file.name)):
                self._places[spot.key] = file.name, spot.begin

    def take(self, key: Key, begin: int, end: int, memo: Memo) -> memoryview | None:  # noqa: ARG002 - of the protocol
        """See ``Source.take``."""
        place = self._places.get(key)
        return None if place is None else self._views[place[0]][place[1] + begin : place[1] + end]

    def file(self, name: str) -> memoryview:
        """All bytes of a file."""
        return self._views[name]


class PackSource:
    """A checkpoint in a pack.

    Args:
        store: where.
        run: which run.
        checkpoint: the id.
        source: gives the sources of the checkpoints that this one needs.

    Attributes:
        index: what the pack holds.

    Raises:
        NotFoundError: there is no such pack.
        CorruptError: it is damaged.
    """

    def __init__(self, store: Store, run: str, checkpoint: str, source: Callable[[str], Source]) -> None:
        self._store, self._key = store, layout.pack_key(run, checkpoint)
        self.index = read_index(store, run, checkpoint)
        if self.index.checkpoint != checkpoint:
            raise CorruptError(f"{self._key} is the pack of another checkpoint, {self.index.checkpoint}")
        self._bases = [source(base) for base in self.index.bases]
        self._spots = [_spots(file.record, file.part) for file in self.index.files]
        self._places = {spot.key: (number, spot.begin) for number, spots in enumerate(self._spots) for spot in spots}

    def take(self, key: Key, begin: int, end: int, memo: Memo) -> bytes | None:
        """See ``Source.take``."""
        place = self._places.get(key)
        if place is None:
            return None
        number, offset = place
        return self.range(number, offset + begin, offset + end, memo)

    def range(self, number: int, begin: int, end: int, memo: Memo) -> bytes:
        """Bytes ``[begin, end)`` of the file of that number."""
        pieces = self.index.files[number].pieces
        at = bisect_right(pieces, begin, key=lambda piece: piece.begin) - 1
        found = []
        while begin < end:
            piece = pieces[at]
            data = self.unpack(number, at, memo)
            found.append(data[begin - piece.begin : end - piece.begin])
            begin, at = piece.end, at + 1
        return found[0] if len(found) == 1 else b"".join(found)

    def unpack(self, number: int, at: int, memo: Memo) -> bytes:
        """One piece.

        Raises:
            CorruptError: it cannot be unpacked.
        """
        mark = (self.index.checkpoint, number, at)
        if mark not in memo:
            piece = self.index.files[number].pieces[at]
            packed = self._store.get(self._key, piece.at, piece.at + piece.length)
            codec = load_codec()
            wanted = spots_in(self._spots[number], piece.begin, piece.end)
            others = gather(self._bases[: codec.bases_of(piece.method)], wanted, memo)
            try:
                memo[mark] = codec.unpack(packed, piece.dtype, piece.method, piece.end - piece.begin, others)
            except CorruptError as error:
                raise CorruptError(f"{self._key}: {error}") from error
        return memo[mark]


def spots_in(spots: Sequence[Spot], begin: int, end: int) -> list[tuple[Key, int, int]]:
    """What is in a range: keys, and which of their bytes."""
    at = bisect_right(spots, begin, key=lambda spot: spot.begin) - 1
    found = []
    while at < len(spots) and spots[at].begin < end:
        spot = spots[at]
        found.append((spot.key, max(begin, spot.begin) - spot.begin, min(end, spot.end) - spot.begin))
        at += 1
    return found


def gather(sources: Iterable[Source], wanted: Sequence[tuple[Key, int, int]], memo: Memo) -> list[bytes | memoryview]:
    """The same bytes of several checkpoints, up to the first that does not have all of them."""
    found: list[bytes | memoryview] = []
    for source in sources:
        taken = []
        for key, begin, end in wanted:
            data = source.take(key, begin, end, memo)
            if data is None:
                return found
            taken.append(data)
        found.append(taken[0] if len(taken) == 1 else b"".join(taken))
    return found


# --- work on every core -------------------------------------------------------------------------------------------


T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``map`` on every core; as many results are held as there are cores, and a few more."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(cores(), "peakpoint-pack") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > cores() + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def load_codec() -> ModuleType:
    """The codec, imported when it is used: the command line starts without NumPy.

    Raises:
        MissingExtraError: what it needs is not installed.
    """
    with needing("archive", "archives need"):
        return importlib.import_module("peakpoint.repository.codec")


# --- files out of packs -------------------------------------------------------------------------------------------


def spans_of(file: FileRecord) -> tuple[Span, ...]:
    """Where the tensors of a file are."""
    return tuple(Span(name=t.name, dtype=t.dtype, shape=t.shape, begin=t.begin, end=t.end) for t in file.tensors)


def blocks_of(source: PackSource, number: int) -> Iterator[memoryview]:
    """All bytes of the file of that number in order, unpacked on every core."""
    pieces = range(len(source.index.files[number].pieces))
    for data in in_order(lambda at: source.unpack(number, at, {}), pieces):
        yield memoryview(data)


def unpacked(source: PackSource) -> list[StreamedImage]:
    """The files of a pack."""
    records = [file.record for file in source.index.files]
    return [
        StreamedImage(one.name, one.size, one.header, spans_of(one), partial(blocks_of, source, number))
        for number, one in enumerate(records)
    ]


def source_of(store: Store, run: str, checkpoint: str, known: Mapping[str, Source] | None = None) -> PackSource:
    """The pack of a checkpoint, with all that it needs.

    Args:
        store: where.
        run: which run.
        checkpoint: the id.
        known: sources that are at hand, and better than packs.

    Raises:
        CorruptError: a pack is missing or damaged.
    """
    sources: dict[str, Source] = dict(known or {})
    opening: set[str] = set()

    def find(wanted: str) -> Source:
        if wanted not in sources:
            if wanted in opening:
                raise CorruptError(f"{layout.pack_key(run, wanted)} is damaged: it needs itself")
            opening.add(wanted)
            try:
                sources[wanted] = PackSource(store, run, wanted, find)
            except NotFoundError as error:
                raise CorruptError(f"{layout.pack_key(run, wanted)} is missing: {error}") from error
        return sources[wanted]

    sources.pop(checkpoint, None)
    found = find(checkpoint)
    assert isinstance(found, PackSource)
    return found


def read_index(store: Store, run: str, checkpoint: str) -> Index:
    """What a pack holds.

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
    record = unseal(store.get(key, size - _TRAILER - length, size - _TRAILER), where=key)
    check_format(record, where=key)
    try:
        index = msgspec.convert(record, Index)
    except msgspec.ValidationError as error:
        raise FormatError(f"{key} is not a pack that this release reads: {error}") from error
    for file in index.files:
        ends = [piece.end for piece in file.pieces]
        begins = [piece.begin for piece in file.pieces]
        inside = all(0 <= piece.at <= piece.at + piece.length <= size for piece in file.pieces)
        if [*begins, file.record.size] != [0, *ends] or not inside or any(map(int.__ge__, begins, ends)):
            raise CorruptError(f"{key} is damaged: its pieces do not cover {file.record.name}")
    return index


@dataclass(frozen=True, slots=True)
class Base:
    """A neighbour.

    Attributes:
        checkpoint: its id.
        source: its bytes.
        depth: how many packs have to be read for it.
    """

    checkpoint: str
    source: Source
    depth: int


def write_pack(store: Store, manifest: Manifest, plain: PlainSource, bases: Sequence[Base], level: int | None) -> Index:
    """Pack a checkpoint; durable on return.

    Args:
        store: where.
        manifest: which checkpoint.
        plain: its bytes.
        bases: its neighbours, the nearest first.
        level: of zstd; None for the usual.

    Returns:
        What was written.
    """
    codec = load_codec()
    sources = [base.source for base in bases]
    files: list[PackedFile] = []

    def pack(data: memoryview, spots: Sequence[Spot], cut: tuple[int, int, str]) -> tuple[str, bytes]:
        begin, end, dtype = cut
        packed: tuple[str, bytes] = codec.pack(
            data[begin:end], dtype, gather(sources, spots_in(spots, begin, end), {}), level
        )
        return packed

    def chunks() -> Iterator[bytes]:
        at = 0
        for file in manifest.files:
            part = part_of(manifest, file.name)
            spots = _spots(file, part)
            cuts = list(_cut(spots))
            packing = in_order(partial(pack, plain.file(file.name), spots), cuts)
            pieces = []
            for (begin, end, dtype), (method, packed) in zip(cuts, packing, strict=True):
                pieces.append(Piece(begin, end, dtype, method, at, len(packed)))
                at += len(packed)
                yield packed
            tensors = tuple(tensor._replace(digest="") for tensor in file.tensors)  # the manifest has them
            files.append(PackedFile(replace(file, tensors=tensors), part, tuple(pieces)))
        needed = max((codec.bases_of(piece.method) for file in files for piece in file.pieces), default=0)
        used = bases[:needed]
        depth = 1 + max((base.depth for base in used), default=0)
        ids = tuple(base.checkpoint for base in used)
        index = Index(checkpoint=manifest.id, bases=ids, depth=depth, files=tuple(files))
        sealed = seal({"format": FORMAT, **msgspec.to_builtins(index)})
        yield sealed + len(sealed).to_bytes(8, "little") + _MAGIC

    store.put(layout.pack_key(manifest.run, manifest.id), chunks())
    return read_index(store, manifest.run, manifest.id)
