"""The commit: the order of writes that makes a checkpoint exist.

Every file of the checkpoint is written, durable one by one; then the history that it belongs to; then the manifest is
created atomically. A crash at any instant leaves a whole checkpoint or a directory without a manifest, which is an
incomplete save; ``peakpoint.repository.removal`` deletes in the opposite order.

An error while the manifest is created leaves open whether it exists. It is deleted again, and while that cannot be
proven, the next attempt writes into the same directory: so two checkpoints never have the same id.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from blake3 import blake3
from msgspec import UNSET, UnsetType

from peakpoint.errors import CorruptError, Error, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.manifest import FileRecord, Manifest, TensorRecord, decode_manifest, encode_manifest
from peakpoint.format.sealed import digest
from peakpoint.store import Chunk, Store
from peakpoint.store.threads import Worker

BLOCK = 32 * 1024 * 1024

Offsets = tuple[tuple[int, ...], ...] | UnsetType


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file that is about to be written.

    Attributes:
        size: bytes.
        blocks: yields all bytes in order, anew with every call; each block is final when it is given out.
        header: how many bytes stand before the tensors; 0 for a file without tensors.
        spans: the tensors in file order; their digests are not looked at.
        transient: whether a block is overwritten when the next one is asked for.
        stable: whether these bytes are likely to be those of the checkpoint before.
        offsets: see ``FileRecord``.
    """

    name: str
    size: int
    blocks: Callable[[], Iterator[memoryview]]
    header: int = 0
    spans: tuple[TensorRecord, ...] = ()
    transient: bool = False
    stable: bool = False
    offsets: Offsets = UNSET


@dataclass(frozen=True, slots=True)
class WholeImage(FileImage):
    """A file whose bytes are all in memory."""

    data: memoryview = field(kw_only=True)


def image_of(
    name: str,
    data: Chunk,
    header: int = 0,
    spans: tuple[TensorRecord, ...] = (),
    ready: Callable[[int], None] = lambda _: None,
    offsets: Offsets = UNSET,
) -> WholeImage:
    """Return the image of a file whose bytes are all in memory.

    Args:
        ready: returns when the bytes before a position in the file are final.
        offsets: see ``FileRecord``.
    """
    view = memoryview(data).cast("B")

    def blocks() -> Iterator[memoryview]:
        for begin in range(0, len(view), BLOCK):
            end = min(begin + BLOCK, len(view))
            ready(end)
            yield view[begin:end]

    return WholeImage(name, len(view), blocks, header, spans, data=view, offsets=offsets)


def combined_digest(header_digest: str, tensors: Sequence[TensorRecord]) -> str:
    """Return the digest of a file with tensors, derived from those of its pieces so that nothing is hashed twice.

    It is BLAKE3 of the raw digest of the header followed by the raw digest of each tensor in file order.
    """
    return digest(b"".join(map(bytes.fromhex, (header_digest, *(tensor.digest for tensor in tensors)))))


class Hashing:
    """The digests of a file, taken block by block: of its header and each tensor, or of a file without tensors."""

    def __init__(self, image: FileImage) -> None:
        self._image = image
        header = image.header or image.size
        self._ends = [header, *(image.header + span.end for span in image.spans)]
        self._digests: list[str] = []
        self._position = 0
        self._partial: blake3 | None = blake3()  # of what began in an earlier block

    def update(self, block: memoryview) -> None:
        """Take the next block."""
        while True:
            number = len(self._digests)
            if number == len(self._ends):
                return
            piece = block[: self._ends[number] - self._position]
            self._position += len(piece)
            if self._position == self._ends[number] and self._partial is None:
                self._digests.append(blake3(piece).hexdigest())  # all of it is in this block: the usual case
            else:
                self._partial = (self._partial or blake3()).update(piece)
                if self._position < self._ends[number]:
                    return
                self._digests.append(self._partial.hexdigest())
            self._partial = None
            block = block[len(piece) :]

    def record(self) -> FileRecord:
        """Return the record of the file, after its last block."""
        image = self._image
        if not image.header:
            return FileRecord(name=image.name, size=image.size, digest=self._digests[0] if image.size else digest(b""))
        header_digest, *tensor_digests = self._digests
        tensors = tuple(
            span._replace(digest=tensor_digest) for span, tensor_digest in zip(image.spans, tensor_digests, strict=True)
        )
        return FileRecord(
            name=image.name,
            size=image.size,
            digest=combined_digest(header_digest, tensors),
            header=image.header,
            header_digest=header_digest,
            tensors=tensors,
            offsets=image.offsets,
        )


def file_record(image: FileImage) -> FileRecord:
    """Hash an image, writing nothing."""
    hashing = Hashing(image)
    for block in image.blocks():
        hashing.update(block)
    return hashing.record()


def unused_name(store: Store, run: str, name: str) -> str:
    """Return ``name``, or ``name-2``, ``name-3``, ... when directories of those names exist (in any capitals)."""
    existing_names = {child.rstrip("/").casefold() for child in store.children(layout.checkpoints_prefix(run))}
    candidate, number = name, 1
    while candidate.casefold() in existing_names:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def commit(
    store: Store,
    draft: Manifest,
    images: Sequence[FileImage],
    *,
    first: Callable[[], None],
    previous: Manifest | None = None,
    written: Callable[[], Mapping[str, Sequence[FileRecord]]] = dict,
    timing: Callable[[], Mapping[str, float]] = dict,
    adopt: Callable[[str, str], bool] = lambda *_: False,
) -> Manifest:
    """Make a checkpoint exist.

    Durable on return. When it raises, the checkpoint does not exist and every other one is as it was, unless the store
    refuses also to delete its manifest; see ``withdraw``.

    Args:
        store: receives the checkpoint.
        draft: the manifest but for its files.
        images: the files.
        previous: a checkpoint of the same run; its files are shared where bytes are the same.
        written: returns, part by part, the files that ``put_files`` has written in other processes, when these are
            done; called on an error, too, perhaps for the second time, and then all of them are deleted.
        first: makes durable what must be so before the manifest is: the journal up to this moment.
        timing: seconds that other work on the save took, called when all files are durable.
        adopt: puts a file that exists already under a key, durably, and says whether it could; takes the name of the
            image and the key. Such a file is only hashed.

    Raises:
        ConflictError: a checkpoint of that name exists.
        StoreError: the store refused; what had been written is deleted as far as the store allows.
    """
    try:
        begin = time.perf_counter()
        own_files = put_files(store, draft, images, previous, adopt)
        elsewhere = {part: records for part, records in written().items() if records}
        files = (*own_files, *(file for records in elsewhere.values() for file in records))
        added = {part: (*draft.parts.get(part, ()), *(file.name for file in elsewhere[part])) for part in elsewhere}
        seconds = time.perf_counter() - begin
        shared = sum(file.size for file in files if file.shared)
        size = sum(file.size for file in files) - shared
        rates = {"shared_bytes": float(shared), "write_seconds": seconds, "bytes_per_second": size / seconds}
        parts, rates = {**draft.parts, **added}, {**draft.timing, **rates, **timing()}
        manifest = replace(draft, files=files, parts=parts, timing=rates)
        first()
        store.create(layout.manifest_key(draft.run, draft.name), encode_manifest(manifest))
    except BaseException:
        with contextlib.suppress(Error):
            written()
        _abandon(store, draft, [image.name for image in images])
        raise
    return manifest


def put_files(
    store: Store,
    draft: Manifest,
    images: Sequence[FileImage],
    previous: Manifest | None = None,
    adopt: Callable[[str, str], bool] = lambda *_: False,
) -> tuple[FileRecord, ...]:
    """Write files of a checkpoint that does not exist yet, durably, each while it is being hashed; see ``commit``.

    Several processes may do so for one checkpoint; one of them gives the records of all to ``commit``.
    """
    # hashing lets go of the interpreter and keeps ahead of the disk, from the same memory
    with Worker("peakpoint-hash") as hashing:
        records = [
            _share(store, draft, image, previous)
            or _adopt(draft, image, adopt)
            or _write(store, layout.file_key(draft.run, draft.name, image.name), image, hashing)
            for image in images
        ]
        return tuple(record() for record in records)


def _abandon(store: Store, draft: Manifest, files: Sequence[str]) -> None:
    """Delete what a failed commit has written; its files stay while its manifest may exist."""
    with contextlib.suppress(StoreError):  # the error that brought us here is the one to report; audit finds the rest
        withdraw(store, draft)
        if store.size(layout.manifest_key(draft.run, draft.name)) is None:
            entries = store.children(layout.checkpoint_prefix(draft.run, draft.name))
            of_ranks = [name for name in entries if layout.rank_of(name) is not None]
            sweep(store, draft.run, draft.name, list({*files, *of_ranks}))


def withdraw(store: Store, draft: Manifest) -> None:
    """Delete the manifest of a failed commit, which may exist all the same; a manifest of another id stays.

    Raises:
        StoreError: the store refused; the checkpoint may exist.
    """
    key = layout.manifest_key(draft.run, draft.name)
    try:
        present = decode_manifest(store.get(key))
    except (NotFoundError, CorruptError, FormatError):
        return
    if present.id == draft.id:
        store.delete(key)


def _share(
    store: Store, draft: Manifest, image: FileImage, previous: Manifest | None
) -> Callable[[], FileRecord] | None:
    """Share a file with another checkpoint, if its bytes are the same and the store can."""
    if previous is None or not image.stable or image.transient:
        return None
    file = next((file for file in previous.files if file.name == image.name and file.size == image.size), None)
    if file is None or [record[:-1] for record in file.tensors] != [span[:-1] for span in image.spans]:
        return None
    record = file_record(image)
    source = layout.file_key(previous.run, previous.name, file.name)
    if replace(file, shared="") != record or not store.link(source, layout.file_key(draft.run, draft.name, image.name)):
        return None
    return lambda: replace(record, shared=file.shared or previous.id)


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
    """Delete ``files`` and unfinished writes from a directory without a manifest, then the directory if it is empty.

    The record of the trash is deleted first: without one of its files the checkpoint cannot be restored.
    """
    for file in sorted(files, key=lambda file: file != layout.TRASHED):
        store.delete(layout.file_key(run, name, file))
    for key in store.litter(layout.checkpoint_prefix(run, name)):
        store.delete(key)
    store.prune(layout.checkpoint_prefix(run, name))
