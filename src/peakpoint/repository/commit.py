"""The commit and the delete: the order of writes that makes a checkpoint exist, and cease to exist.

Commit: every file of the checkpoint, durable one by one; then the history that it belongs to; then the manifest,
created atomically. Delete: the manifest first, then the files. A crash at any instant leaves a whole checkpoint or a
directory without a manifest, which is litter.

An error while the manifest is created leaves open whether it exists. It is taken away again, and as long as that cannot
be proven, the next attempt goes into the same directory: so no id is ever that of two checkpoints.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Protocol

from blake3 import blake3

from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.manifest import MANIFEST, FileRecord, Manifest, TensorRecord, encode_manifest
from peakpoint.format.sealed import decode_record, digest
from peakpoint.store import Chunk, Store
from peakpoint.store.worker import Worker

BLOCK = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where one tensor is in a file; see ``TensorRecord``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def spans_of(file: FileRecord) -> tuple[Span, ...]:
    """Return where the tensors of a file are."""
    return tuple(Span(name=t.name, dtype=t.dtype, shape=t.shape, begin=t.begin, end=t.end) for t in file.tensors)


class FileImage(Protocol):
    """The bytes of a file that is about to be written."""

    @property
    def name(self) -> str:
        """The file's name."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def header(self) -> int:
        """How many of them stand before the tensors; 0 for a file without tensors."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The tensors, in file order, counted from ``header``."""

    @property
    def transient(self) -> bool:
        """Whether a block is overwritten when the next one is asked for."""

    @property
    def stable(self) -> bool:
        """Whether these bytes are likely to be those of the checkpoint before."""

    def blocks(self) -> Iterator[memoryview]:
        """All bytes in order; each block is final when it is given out."""


@dataclass(frozen=True, slots=True)
class StreamedImage:
    """A file whose bytes are made when they are written; see ``FileImage``.

    Attributes:
        blocks: makes all of them, anew with every call.
    """

    name: str
    size: int
    header: int
    spans: tuple[Span, ...]
    blocks: Callable[[], Iterator[memoryview]]
    transient: bool = False
    stable: bool = False


@dataclass(frozen=True, slots=True)
class WholeImage:
    """A file whose bytes are all in memory; see ``FileImage``.

    Attributes:
        data: the bytes.
        ready: returns when the bytes before a position in the file are final.
    """

    name: str
    data: Chunk
    header: int = 0
    spans: tuple[Span, ...] = ()
    ready: Callable[[int], None] = field(default=lambda _: None)
    transient: bool = False
    stable: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return len(memoryview(self.data).cast("B"))

    def blocks(self) -> Iterator[memoryview]:
        """The bytes in blocks of ``BLOCK``."""
        data = memoryview(self.data).cast("B")
        for begin in range(0, len(data), BLOCK):
            end = min(begin + BLOCK, len(data))
            self.ready(end)
            yield data[begin:end]


def combined_digest(header_digest: str, tensors: Sequence[TensorRecord]) -> str:
    """The digest of a file with tensors, derived from those of its pieces so that nothing is hashed twice.

    BLAKE3 of the raw digest of the header followed by the raw digest of each tensor in file order.
    """
    return digest(b"".join(map(bytes.fromhex, (header_digest, *(tensor.digest for tensor in tensors)))))


class Hashing:
    """Hashes a file block by block: its header and each tensor, or the whole of a file without tensors.

    Args:
        image: the file.
    """

    def __init__(self, image: FileImage) -> None:
        self._image = image
        header = image.header or image.size
        self._ends = [header, *(image.header + span.end for span in image.spans)]
        self._digests: list[str] = []
        self._at = 0
        self._open: blake3 | None = blake3()

    def update(self, block: memoryview) -> None:
        """Take the next block."""
        while True:
            number = len(self._digests)
            if number == len(self._ends):
                return
            piece = block[: self._ends[number] - self._at]
            if self._at + len(piece) == self._ends[number] and self._open is None:
                self._digests.append(blake3(piece).hexdigest())  # whole in this block: the usual case
            else:
                self._open = (self._open or blake3()).update(piece)
                if self._at + len(piece) < self._ends[number]:
                    self._at += len(piece)
                    return
                self._digests.append(self._open.hexdigest())
            self._open = None
            self._at += len(piece)
            block = block[len(piece) :]

    def record(self) -> FileRecord:
        """The record of the file, after its last block."""
        image = self._image
        if not image.header:
            return FileRecord(name=image.name, size=image.size, digest=self._digests[0] if image.size else digest(b""))
        header_digest, *rest = self._digests
        tensors = tuple(
            TensorRecord(span.name, span.dtype, span.shape, span.begin, span.end, hashed)
            for span, hashed in zip(image.spans, rest, strict=True)
        )
        return FileRecord(
            name=image.name,
            size=image.size,
            digest=combined_digest(header_digest, tensors),
            header=image.header,
            header_digest=header_digest,
            tensors=tensors,
        )


def file_record(image: FileImage) -> FileRecord:
    """Hash an image, writing nothing."""
    hashing = Hashing(image)
    for block in image.blocks():
        hashing.update(block)
    return hashing.record()


def unused_name(store: Store, run: str, name: str) -> str:
    """``name``, or ``name-2``, ``name-3``, ... when directories of those names exist."""
    taken = {child.rstrip("/") for child in store.children(layout.checkpoints_prefix(run))}
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def commit(
    store: Store,
    draft: Manifest,
    images: Sequence[FileImage],
    *,
    first: Callable[[], None],
    before: Manifest | None = None,
    timing: Callable[[], Mapping[str, float]] = dict,
    adopt: Callable[[str, str], bool] = lambda *_: False,
) -> Manifest:
    """Make a checkpoint exist.

    Durable on return. When it raises, the checkpoint does not exist and every other one is as it was, unless the store
    refuses also to take its manifest away; see ``withdraw``.

    Args:
        store: where.
        draft: the manifest but for its files.
        images: the files.
        before: a checkpoint of the same run whose files may be shared, where bytes are the same.
        first: makes durable what must be so before the manifest is: the journal up to this moment.
        timing: what is known about the time it took, asked for when all files are durable.
        adopt: puts a file that exists already under a key, durably, and says whether it could; takes the name of the
            image and the key. What it has put there is only hashed.

    Raises:
        ConflictError: a checkpoint of that name exists.
        StoreError: the store refused; what had been written is cleaned away as far as the store allows.
    """
    try:
        # hashing lets go of the interpreter and keeps ahead of the disk, from the same memory
        with Worker("peakpoint-hash") as hashing:
            begin = time.perf_counter()
            records = [
                _share(store, draft, image, before)
                or _adopt(draft, image, adopt)
                or _write(store, layout.file_key(draft.run, draft.name, image.name), image, hashing)
                for image in images
            ]
            files = tuple(record() for record in records)
            seconds = time.perf_counter() - begin
        shared = sum(file.size for file in files if file.shared)
        rate = (sum(file.size for file in files) - shared) / seconds
        known = {
            **draft.timing,
            "shared_bytes": float(shared),
            "write_seconds": seconds,
            "bytes_per_second": rate,
            **timing(),
        }
        manifest = replace(draft, files=files, timing=known)
        first()
        store.create(layout.manifest_key(draft.run, draft.name), encode_manifest(manifest))
    except BaseException:
        _abandon(store, draft, images)
        raise
    return manifest


def _abandon(store: Store, draft: Manifest, images: Sequence[FileImage]) -> None:
    """Remove what a failed commit has written; its files stay as long as its manifest may exist."""
    with contextlib.suppress(StoreError):  # the error that brought us here is the one to report; audit finds the rest
        withdraw(store, draft)
        if store.size(layout.manifest_key(draft.run, draft.name)) is None:
            sweep(store, draft.run, draft.name, [image.name for image in images])


def withdraw(store: Store, draft: Manifest) -> None:
    """Take away the manifest of a failed commit, which may have come to exist all the same; that of others stays.

    Raises:
        StoreError: the store refused; the checkpoint may exist.
    """
    key = layout.manifest_key(draft.run, draft.name)
    try:
        present = decode_record(Manifest, store.get(key), where=MANIFEST)
    except (NotFoundError, CorruptError, FormatError):
        return
    if present.id == draft.id:
        store.delete(key)


def _share(store: Store, draft: Manifest, image: FileImage, before: Manifest | None) -> Callable[[], FileRecord] | None:
    """Use a file of another checkpoint once more, if its bytes are the same and the store can."""
    if before is None or not image.stable or image.transient:
        return None
    other = next((file for file in before.files if file.name == image.name and file.size == image.size), None)
    if other is None or [record[:-1] for record in other.tensors] != [astuple(span) for span in image.spans]:
        return None
    mine = file_record(image)
    if replace(other, shared="") != mine:
        return None
    source = layout.file_key(before.run, before.name, other.name)
    if not store.link(source, layout.file_key(draft.run, draft.name, image.name)):
        return None
    return lambda: replace(mine, shared=other.shared or before.id)


def _adopt(draft: Manifest, image: FileImage, adopt: Callable[[str, str], bool]) -> Callable[[], FileRecord] | None:
    if not adopt(image.name, layout.file_key(draft.run, draft.name, image.name)):
        return None
    return lambda: file_record(image)


def put_file(store: Store, key: str, image: FileImage) -> FileRecord:
    """Write one file while it is being hashed."""
    with Worker("peakpoint-hash") as hashing:
        return _write(store, key, image, hashing)()


def _write(store: Store, key: str, image: FileImage, hashing: Worker) -> Callable[[], FileRecord]:
    """Write one file while it is being hashed; the result waits for the hash."""
    hashes = Hashing(image)

    def blocks() -> Iterator[memoryview]:
        for block in image.blocks():
            hashing.do(partial(hashes.update, block))
            yield block
            if image.transient:
                hashing.wait()

    store.put(key, blocks(), image.size)

    def record() -> FileRecord:
        hashing.wait()
        return hashes.record()

    return record


def sweep(store: Store, run: str, name: str, files: Sequence[str]) -> None:
    """Remove ``files`` and unfinished writes from a directory without a manifest, then the directory if it is empty.

    The record that it is in the trash goes first: once a file is gone, the checkpoint cannot be brought back.
    """
    for file in sorted(files, key=lambda file: file != layout.TRASHED):
        store.delete(layout.file_key(run, name, file))
    for key in store.litter(layout.checkpoint_prefix(run, name)):
        store.delete(key)
    store.prune(layout.checkpoint_prefix(run, name))
