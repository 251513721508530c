"""Reading packs: the bytes of a checkpoint, from its files or from its pack and the checkpoints that this needs."""

import importlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Protocol, TypeVar

from peakpoint.errors import CorruptError, NotFoundError, needing
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.repository.commit import FileImage
from peakpoint.repository.packs.index import TensorKey, TensorSlice, byte_ranges, part_of, read_index, slices_in
from peakpoint.store import Store
from peakpoint.store.pages import cores

T = TypeVar("T")
R = TypeVar("R")

UnpackedRanges = dict[tuple[str, int, int], bytes]
"""Ranges unpacked so far on the way to a requested one: checkpoint, number of the file, number of the range."""


class ByteSource(Protocol):
    """The bytes of a checkpoint, by their keys."""

    def take(self, key: TensorKey, begin: int, end: int, unpacked: UnpackedRanges) -> bytes | memoryview | None:
        """Return bytes ``[begin, end)`` of a key; None when this checkpoint has no such key.

        Raises:
            CorruptError: they should be there and are not.
        """


class FileSource:
    """A checkpoint whose files are where its manifest says; mapped, and not verified."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._views = {}
        self._places: dict[TensorKey, tuple[str, int]] = {}
        for file in manifest.files:
            view = store.view(layout.file_key(manifest.run, manifest.name, file.name))
            if len(view) != file.size:
                raise CorruptError(
                    f"checkpoint {manifest.name} is damaged: {file.name} has {len(view)} bytes instead of {file.size}"
                )
            self._views[file.name] = view
            for byte_range in byte_ranges(file, part_of(manifest, file.name)):
                self._places[byte_range.key] = file.name, byte_range.begin

    def take(self, key: TensorKey, begin: int, end: int, unpacked: UnpackedRanges) -> memoryview | None:  # noqa: ARG002 - of the protocol
        """See ``ByteSource.take``."""
        place = self._places.get(key)
        return None if place is None else self._views[place[0]][place[1] + begin : place[1] + end]

    def file(self, name: str) -> memoryview:
        """Return all bytes of a file."""
        return self._views[name]


class PackSource:
    """A checkpoint in a pack.

    Args:
        store: holds the pack.
        run: the run of the checkpoint.
        checkpoint: the id.
        base_source: gives the sources of the checkpoints that this one needs.

    Attributes:
        index: the content of the pack.

    Raises:
        NotFoundError: there is no such pack.
        CorruptError: it is damaged.
    """

    def __init__(self, store: Store, run: str, checkpoint: str, base_source: Callable[[str], ByteSource]) -> None:
        self._store, self._key = store, layout.pack_key(run, checkpoint)
        self.index = read_index(store, run, checkpoint)
        if self.index.checkpoint != checkpoint:
            raise CorruptError(f"{self._key} is the pack of another checkpoint, {self.index.checkpoint}")
        self._bases = [base_source(base) for base in self.index.bases]
        self._ranges = [byte_ranges(file.record, file.part) for file in self.index.files]
        self._places = {
            byte_range.key: (number, byte_range.begin)
            for number, ranges in enumerate(self._ranges)
            for byte_range in ranges
        }

    def take(self, key: TensorKey, begin: int, end: int, unpacked: UnpackedRanges) -> bytes | None:
        """See ``ByteSource.take``."""
        place = self._places.get(key)
        if place is None:
            return None
        number, offset = place
        return self.range(number, offset + begin, offset + end, unpacked)

    def range(self, number: int, begin: int, end: int, unpacked: UnpackedRanges) -> bytes:
        """Return bytes ``[begin, end)`` of the file of that number."""
        pieces = self.index.files[number].pieces
        position = bisect_right(pieces, begin, key=lambda piece: piece.begin) - 1
        chunks = []
        while begin < end:
            piece = pieces[position]
            chunks.append(self._unpack(number, position, unpacked)[begin - piece.begin : end - piece.begin])
            begin, position = piece.end, position + 1
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _unpack(self, number: int, position: int, unpacked: UnpackedRanges) -> bytes:
        place = (self.index.checkpoint, number, position)
        if place not in unpacked:
            piece = self.index.files[number].pieces[position]
            packed = self._store.get(self._key, piece.offset, piece.offset + piece.length)
            codec = load_codec()
            slices = slices_in(self._ranges[number], piece.begin, piece.end)
            base_bytes = same_bytes(self._bases[: codec.bases_of(piece.method)], slices, unpacked)
            try:
                data = codec.unpack(packed, piece.dtype, piece.method, piece.end - piece.begin, base_bytes)
            except CorruptError as error:
                raise CorruptError(f"{self._key}: {error}") from error
            unpacked[place] = data
        return unpacked[place]

    def blocks(self, number: int) -> Iterator[memoryview]:
        """Yield all bytes of the file of that number in order, unpacked on every core."""
        positions = range(len(self.index.files[number].pieces))
        for data in parallel_map(lambda position: self._unpack(number, position, {}), positions):
            yield memoryview(data)

    def images(self) -> list[FileImage]:
        """Return the files of the pack."""
        return [
            FileImage(
                file.name, file.size, partial(self.blocks, number), file.header, file.tensors, offsets=file.offsets
            )
            for number, file in enumerate(packed.record for packed in self.index.files)
        ]


def same_bytes(
    sources: Iterable[ByteSource], slices: Sequence[TensorSlice], unpacked: UnpackedRanges
) -> list[bytes | memoryview]:
    """Return the same bytes of several checkpoints, up to the first that does not have all of them."""
    copies: list[bytes | memoryview] = []
    for source in sources:
        chunks = []
        for key, begin, end in slices:
            data = source.take(key, begin, end, unpacked)
            if data is None:
                return copies
            chunks.append(data)
        copies.append(chunks[0] if len(chunks) == 1 else b"".join(chunks))
    return copies


def parallel_map(work: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
    """``map`` on every core, in order; as many results are held as there are cores, and a few more."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(cores(), "peakpoint-pack") as pool:
        try:
            for argument in arguments:
                waiting.append(pool.submit(work, argument))
                if len(waiting) > cores() + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def load_codec() -> ModuleType:
    """Import the codec when it is used: the command line starts without NumPy.

    Raises:
        MissingExtraError: what it needs is not installed.
    """
    with needing("archive", "archives need"):
        return importlib.import_module("peakpoint.repository.packs.codec")


def open_pack(
    store: Store, run: str, checkpoint: str, open_sources: Mapping[str, ByteSource] | None = None
) -> PackSource:
    """Open the pack of a checkpoint, with all that it needs.

    Args:
        store: holds the packs.
        run: the run of the checkpoint.
        checkpoint: the id.
        open_sources: sources of other checkpoints that are at hand, and better than packs.

    Raises:
        CorruptError: a pack is missing or damaged.
    """
    sources = dict(open_sources or {})
    opening: set[str] = set()

    def base_source(base: str) -> ByteSource:
        if base not in sources:
            sources[base] = pack_source(base)
        return sources[base]

    def pack_source(packed: str) -> PackSource:
        key = layout.pack_key(run, packed)
        if packed in opening:
            raise CorruptError(f"{key} is damaged: it needs itself")
        opening.add(packed)
        try:
            return PackSource(store, run, packed, base_source)
        except NotFoundError as error:
            raise CorruptError(f"{key} is missing: {error}") from error

    sources.pop(checkpoint, None)
    return pack_source(checkpoint)
