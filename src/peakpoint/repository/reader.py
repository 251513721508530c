"""Reading checkpoints: manifests are trusted, listings and names are not."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from blake3 import blake3

from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import MANIFEST, FileRecord, Manifest, TensorRecord
from peakpoint.format.sealed import decode_record, digest
from peakpoint.repository import packs, trash
from peakpoint.repository.commit import BLOCK, combined_digest
from peakpoint.repository.packs.reader import PackSource, open_pack
from peakpoint.repository.trash import dropped_parts, without_dropped
from peakpoint.store import Filled, Filling, Hold, Store
from peakpoint.store.pages import cores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Damaged:
    """A directory whose manifest cannot be read.

    Attributes:
        name: the directory.
        error: why.
    """

    name: str
    error: CorruptError | FormatError


@dataclass(frozen=True, slots=True)
class RunListing:
    """What the directory of a run's checkpoints holds.

    Attributes:
        manifests: of every checkpoint that exists, by sequence.
        damaged: directories whose manifest cannot be read.
        bare: directories without a manifest: a save or a removal that is at work, or was cut short.
        cut: ids of checkpoints without some of their parts: a run cannot continue from these.
    """

    manifests: tuple[Manifest, ...]
    damaged: tuple[Damaged, ...]
    without_manifest: tuple[str, ...]
    incomplete: frozenset[str] = frozenset()


def list_run(store: Store, run: str) -> RunListing:
    """Read every manifest of a run.

    A checkpoint that goes because a newer one has come is not missed together with the newer one.
    """
    looked: dict[str, FoundCheckpoint | Damaged | None] = {}
    while unseen := [name for name in _directories(store, run) if name not in looked]:
        looked |= {name: inspect(store, run, name) for name in unseen}
        if None not in looked.values():
            break  # nothing went meanwhile
    standing = [state for state in looked.values() if isinstance(state, FoundCheckpoint)]
    return RunListing(
        tuple(sorted((state.manifest for state in standing), key=lambda manifest: manifest.sequence)),
        tuple(state for state in looked.values() if isinstance(state, Damaged)),
        tuple(name for name, state in looked.items() if state is None),
        frozenset(state.manifest.id for state in standing if state.incomplete),
    )


def _directories(store: Store, run: str) -> list[str]:
    children = store.children(layout.checkpoints_prefix(run))
    return [child.removesuffix("/") for child in children if child.endswith("/")]  # audit names stray files


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint that exists, as its directory tells it.

    Attributes:
        manifest: without the parts that were dropped since.
        cut: whether there are such parts.
        archived: whether its files are in a pack.
    """

    manifest: Manifest
    incomplete: bool
    archived: bool


def inspect(
    store: Store, run: str, name: str, archive: packs.RunArchive | None = None
) -> FoundCheckpoint | Damaged | None:
    """What one directory of a run's checkpoints holds; None when it has no manifest.

    Args:
        store: where.
        run: which run.
        name: the directory.
        archive: of the run, if it is archived; only ``FoundCheckpoint.archived`` asks for it.
    """
    try:
        children = store.children(layout.checkpoint_prefix(run, name))
        manifest = whole_manifest(store, run, name)
        dropped = list(dropped_parts(store, run, name)) if any(map(layout.is_record, children)) else []
        archived = layout.ARCHIVED in children or (archive is not None and manifest.id in archive.packed_bytes)
        return FoundCheckpoint(without_dropped(manifest, dropped), bool(dropped), archived)
    except NotFoundError:
        return None
    except (CorruptError, FormatError) as error:
        where = f"{store.location}/{layout.manifest_key(run, name)}"
        return Damaged(name, type(error)(f"{where}: {error}"))


def read_manifest(store: Store, run: str, name: str) -> Manifest:
    """The manifest in one directory, without the parts that were dropped since.

    Raises:
        NotFoundError: there is none, so there is no checkpoint.
        CorruptError: it is damaged, or belongs to another directory.
        FormatError: a newer release wrote it.
    """
    return without_dropped(whole_manifest(store, run, name), list(dropped_parts(store, run, name)))


def manifest_digest(store: Store, manifest: Manifest) -> str:
    """The digest of the bytes of a checkpoint's manifest, and so of everything that it has digests of."""
    return digest(store.get(layout.manifest_key(manifest.run, manifest.name)))


def whole_manifest(store: Store, run: str, name: str) -> Manifest:
    """The manifest in one directory, with the parts that were dropped since; errors as in ``read_manifest``."""
    manifest = decode_record(Manifest, store.get(layout.manifest_key(run, name)), where=MANIFEST)
    if (manifest.run, manifest.name) != (run, name):
        raise CorruptError(
            f"{MANIFEST} says that it belongs to {manifest.run}/{manifest.name}; the directory was renamed or copied"
        )
    return manifest


def view(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    """The bytes of one file, of the size that the manifest says; nothing is read before it is used.

    Raises:
        CorruptError: the file is missing or has another size.
        FormatError: its name is none that Peakpoint writes.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    return _settled(store, manifest, file, _view)


def _view(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    try:
        data = _opened(store, manifest, file, store.view)
    except CorruptError as error:
        data = _unpacked(store, manifest, file, error)
    _check_size(manifest, file, len(data))
    return data


def read(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    """The bytes of one file, all of them compared with the digests in the manifest, on every core, while they arrive.

    Raises:
        CorruptError: the file is missing, has another size or other bytes; the message names the file and the tensor.
        FormatError: its name is none that Peakpoint writes.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
        StoreError: it cannot be read.
    """
    return _settled(store, manifest, file, _read)


def _read(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    filling: Filling
    try:
        filling = _opened(store, manifest, file, store.fill)
    except CorruptError as error:
        filling = Filled(_unpacked(store, manifest, file, error))
    try:
        _check_size(manifest, file, len(filling.data))
        _check(manifest, file, filling)
    finally:
        filling.close()
    return filling.data


def read_tensor(store: Store, manifest: Manifest, file: FileRecord, tensor: TensorRecord) -> bytearray:
    """``tensor_bytes`` in memory that may be written to."""
    return bytearray(tensor_bytes(store, manifest, file, tensor))


def tensor_bytes(store: Store, manifest: Manifest, file: FileRecord, tensor: TensorRecord) -> bytes:
    """The bytes of one tensor, compared with its digest; nothing else is read.

    Raises:
        CorruptError: the file is missing or too short, or the bytes are others.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    return _settled(store, manifest, file, partial(_tensor_bytes, tensor=tensor))


def _tensor_bytes(store: Store, manifest: Manifest, file: FileRecord, *, tensor: TensorRecord) -> bytes:
    begin, end = file.header + tensor.begin, file.header + tensor.end
    data = b""
    if 0 <= begin <= end <= file.size:
        try:
            with _found(manifest, file):
                data = store.get(layout.file_key(manifest.run, manifest.name, file.name), begin, end)
        except CorruptError as error:
            data = _unpacked_range(store, manifest, file, begin, end, error)
    if len(data) != end - begin or blake3(data, max_threads=blake3.AUTO).hexdigest() != tensor.digest:
        raise _differs(manifest, file, _Piece(f"tensor {tensor.name!r} in {file.name}", begin, end, tensor.digest))
    return data


def _unpacked(store: Store, manifest: Manifest, file: FileRecord, missing: CorruptError) -> memoryview:
    """A file that is not where the manifest says, because the checkpoint is archived."""
    source, number = _packed(store, manifest, file, missing)
    data = bytearray(file.size)
    at = 0
    for block in source.blocks(number):
        data[at : at + len(block)] = block
        at += len(block)
    return memoryview(data)


def _unpacked_range(
    store: Store, manifest: Manifest, file: FileRecord, begin: int, end: int, missing: CorruptError
) -> bytes:
    source, number = _packed(store, manifest, file, missing)
    return source.range(number, begin, end, {})


def _packed(store: Store, manifest: Manifest, file: FileRecord, missing: CorruptError) -> tuple[PackSource, int]:
    archive = packs.readable_run_archive(store, manifest.run)
    named = archive is not None and manifest.id in archive.packed_bytes
    if not named and store.size(layout.pack_key(manifest.run, manifest.id)) is None:
        raise missing
    source = open_pack(store, manifest.run, manifest.id)
    for number, packed in enumerate(source.index.files):
        if packed.record.name == file.name and packed.record.size == file.size:
            return source, number
    raise CorruptError(f"checkpoint {manifest.name} is damaged: {file.name} is in its pack no more than on its own")


def _settled(store: Store, manifest: Manifest, file: FileRecord, look: Callable[[Store, Manifest, FileRecord], T]) -> T:
    """Look at a file until nothing changes under the look: what is removed, packed or restored meanwhile is no damage.

    Raises:
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    place: object = manifest  # of which no place is one
    while True:
        try:
            return look(store, manifest, file)
        except (CorruptError, NotFoundError):
            before, place = place, _place(store, manifest, file)
            if place == before:
                raise


def _place(store: Store, manifest: Manifest, file: FileRecord) -> object:
    """Where the bytes of a file are now: the record of the trash, that of the archive, or None on their own."""
    try:
        present = read_manifest(store, manifest.run, manifest.name)
    except NotFoundError as error:
        record = trash.read_trashed(store, manifest.run, manifest.name)
        if record is not None:
            return record
        raise NotFoundError(f"checkpoint {manifest.name} was removed a moment ago") from error
    if present.id != manifest.id:
        raise NotFoundError(f"checkpoint {manifest.name} was removed a moment ago, and another one has its name now")
    if all(other.name != file.name for other in present.files):
        raise NotFoundError(f"checkpoint {manifest.name} has just lost the part that {file.name} belongs to")
    return packs.packed_bytes(store, manifest.run, [manifest])


def _opened(store: Store, manifest: Manifest, file: FileRecord, get: Callable[[str], T]) -> T:
    """What ``get`` makes of the key of a file, if the file is there and of its size."""
    with _found(manifest, file):
        key = layout.file_key(manifest.run, manifest.name, file.name)
        size = store.size(key)
        if size is not None:
            _check_size(manifest, file, size)
        return get(key)


@contextlib.contextmanager
def _found(manifest: Manifest, file: FileRecord) -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: {file.name} is missing") from error
    except ConfigError as error:
        raise FormatError(f"checkpoint {manifest.name} has a file that cannot be read: {error}") from error
    except FormatError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: {error}") from error


def check_sizes(store: Store, manifest: Manifest) -> None:
    """``check_size`` for every file."""
    for file in manifest.files:
        check_size(store, manifest, file)


def check_size(store: Store, manifest: Manifest, file: FileRecord) -> None:
    """Look whether a file is there and of its size; reads nothing. Of an archived one, whether its packs are there.

    Raises:
        CorruptError: it is missing or has another size.
        FormatError: its name is none that Peakpoint writes.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    _settled(store, manifest, file, _look_at_size)


def _look_at_size(store: Store, manifest: Manifest, file: FileRecord) -> None:
    with _found(manifest, file):
        size = store.size(layout.file_key(manifest.run, manifest.name, file.name))
    if size is None:
        missing = CorruptError(f"checkpoint {manifest.name} is damaged: {file.name} is missing")
        source, number = _packed(store, manifest, file, missing)
        size = source.index.files[number].record.size
    _check_size(manifest, file, size)


def find_damage(store: Store, manifests: Iterable[Manifest]) -> dict[str, str]:
    """The checkpoints with files that are missing or of another size: id to what is wrong; reads nothing.

    One that was removed a moment ago is not among them.
    """
    found = {}
    for manifest in manifests:
        with contextlib.suppress(NotFoundError):
            try:
                check_sizes(store, manifest)
            except (CorruptError, FormatError) as error:
                found[manifest.id] = str(error)
    return found


def hold_for_reading(store: Store, manifest: Manifest) -> Hold | None:
    """Say that a checkpoint is being read, so that rules leave it alone; None where that cannot be said."""
    return store.reading(layout.manifest_key(manifest.run, manifest.name))


def being_read(store: Store, manifests: Iterable[Manifest]) -> set[str]:
    """The ids of checkpoints that somebody is reading."""
    return {one.id for one in manifests if store.is_read(layout.manifest_key(one.run, one.name))}


def _check_size(manifest: Manifest, file: FileRecord, size: int) -> None:
    if size != file.size:
        raise CorruptError(
            f"checkpoint {manifest.name} is damaged: {file.name} has {size} bytes instead of {file.size}"
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    what: str
    begin: int
    end: int
    digest: str


def _differs(manifest: Manifest, file: FileRecord, piece: _Piece) -> CorruptError:
    return CorruptError(
        f"checkpoint {manifest.name} is damaged: {piece.what} does not match its digest "
        f"(bytes {piece.begin} to {piece.end} of {file.name})"
    )


def _check(manifest: Manifest, file: FileRecord, filling: Filling) -> None:
    jobs = list(_jobs(_pieces(file)))
    with ThreadPoolExecutor(min(len(jobs), cores()), "peakpoint-verify") as pool:
        try:
            for wrong in pool.map(lambda job: _first_wrong(job, filling), jobs):
                if wrong is not None:
                    raise _differs(manifest, file, wrong)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if file.header and combined_digest(file.header_digest, file.tensors) != file.digest:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: the digests of {file.name} contradict one another")


def _jobs(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in groups that are worth a thread's while."""
    job: list[_Piece] = []
    for piece in pieces:
        if job and piece.end - job[0].begin > BLOCK:
            yield job
            job = []
        job.append(piece)
    yield job


def _first_wrong(job: Iterable[_Piece], filling: Filling) -> _Piece | None:
    for piece in job:
        if not 0 <= piece.begin <= piece.end <= len(filling.data):
            return piece
        large = piece.end - piece.begin > BLOCK
        hashed = blake3(max_threads=blake3.AUTO if large else 1)
        for begin in range(piece.begin, piece.end, BLOCK):
            end = min(begin + BLOCK, piece.end)
            filling.wait(end)
            hashed.update(filling.data[begin:end])
        if hashed.hexdigest() != piece.digest:
            return piece
    return None


def _pieces(file: FileRecord) -> Iterator[_Piece]:
    if not file.header:
        yield _Piece(file.name, 0, file.size, file.digest)
        return
    yield _Piece(f"the header of {file.name}", 0, file.header, file.header_digest)
    for tensor in file.tensors:
        begin, end = file.header + tensor.begin, file.header + tensor.end
        yield _Piece(f"tensor {tensor.name!r} in {file.name}", begin, end, tensor.digest)
