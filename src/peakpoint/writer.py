"""The commit and the delete: the order of writes that makes a checkpoint exist, and cease to exist.

Commit: every file of the checkpoint, durable one by one; then the history that it belongs to; then the manifest,
created atomically. Delete: the manifest first, then the files. A crash at any instant leaves a whole checkpoint or a
directory without a manifest, which is litter.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from blake3 import blake3

from peakpoint import layout
from peakpoint.manifest import FileRecord, Manifest, TensorRecord, encode
from peakpoint.seal import digest
from peakpoint.store import Chunk, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where one tensor is in a file; see ``TensorRecord``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileImage:
    """The bytes of a file to be.

    Attributes:
        name: the file's name.
        data: all of its bytes.
        header: how many of them stand before the tensors; 0 for a file without tensors.
        spans: the tensors, in file order, counted from ``header``.
    """

    name: str
    data: Chunk
    header: int = 0
    spans: tuple[Span, ...] = ()


def combined_digest(header_digest: str, tensors: Sequence[TensorRecord]) -> str:
    """The digest of a file with tensors, derived from those of its pieces so that nothing is hashed twice.

    BLAKE3 of the raw digest of the header followed by the raw digest of each tensor in file order.
    """
    hasher = blake3(bytes.fromhex(header_digest))
    for tensor in tensors:
        hasher.update(bytes.fromhex(tensor.digest))
    return hasher.hexdigest()


def file_record(image: FileImage) -> FileRecord:
    """Hash an image."""
    data = memoryview(image.data).cast("B")
    if not image.header:
        return FileRecord(name=image.name, size=len(data), digest=digest(data))
    tensors = tuple(
        TensorRecord(
            span.name,
            span.dtype,
            span.shape,
            span.begin,
            span.end,
            digest(data[image.header + span.begin : image.header + span.end]),
        )
        for span in image.spans
    )
    header_digest = digest(data[: image.header])
    return FileRecord(
        name=image.name,
        size=len(data),
        digest=combined_digest(header_digest, tensors),
        header=image.header,
        header_digest=header_digest,
        tensors=tensors,
    )


def unused_name(store: Store, run: str, name: str) -> str:
    """``name``, or ``name-2``, ``name-3``, ... when directories of those names exist."""
    taken = {child.rstrip("/") for child in store.children(layout.checkpoints_prefix(run))}
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def commit(store: Store, draft: Manifest, images: Sequence[FileImage], *, first: Callable[[], None]) -> Manifest:
    """Make a checkpoint exist.

    Durable on return. When it raises, the checkpoint does not exist and every other one is as it was.

    Args:
        store: where.
        draft: the manifest but for its files.
        images: the files.
        first: makes durable what must be so before the manifest is: the journal up to this moment.

    Raises:
        ConflictError: a checkpoint of that name exists.
        StoreError: the store refused; what had been written is cleaned away as far as the store allows.
    """
    # hashing lets go of the interpreter and keeps ahead of the disk, from the same memory
    with ThreadPoolExecutor(1, "peakpoint-hash") as hashing:
        hashes = [hashing.submit(file_record, image) for image in images]
        for image in images:
            key = layout.file_key(draft.run, draft.name, image.name)
            store.put(key, [image.data], len(memoryview(image.data).cast("B")))
        manifest = replace(draft, files=tuple(hashed.result() for hashed in hashes))
    first()
    store.create(layout.manifest_key(draft.run, draft.name), encode(manifest))
    return manifest


def remove(store: Store, manifest: Manifest) -> None:
    """Make a checkpoint cease to exist; idempotent, and to be repeated when it was interrupted.

    Raises:
        StoreError: the store refused. If the manifest is gone, the rest is litter.
    """
    store.delete(layout.manifest_key(manifest.run, manifest.name))
    sweep(store, manifest.run, manifest.name, [file.name for file in manifest.files])


def sweep(store: Store, run: str, name: str, files: Sequence[str]) -> None:
    """Remove ``files`` and unfinished writes from a directory without a manifest, then the directory if it is empty."""
    for file in files:
        store.delete(layout.file_key(run, name, file))
    for key in store.litter(layout.checkpoint_prefix(run, name)):
        store.delete(key)
    store.prune(layout.checkpoint_prefix(run, name))
