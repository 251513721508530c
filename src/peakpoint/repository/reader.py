"""Reading checkpoints: every byte is compared with the manifest; listings and names are not trusted."""

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, TypeVar

from blake3 import blake3

from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.events import Saved
from peakpoint.format.manifest import MANIFEST, FileRecord, Manifest, TensorRecord, decode_manifest
from peakpoint.format.sealed import digest
from peakpoint.repository import packs, trash
from peakpoint.repository.commit import combined_digest
from peakpoint.repository.hashed_ranges import HashedRange, first_mismatch, grouped, hashed_ranges, tensor_range
from peakpoint.repository.packs.reader import PackSource, open_pack
from peakpoint.repository.run_names import is_name_of
from peakpoint.repository.trash import dropped_parts, without_dropped
from peakpoint.store import Filled, Filling, Hold, Store
from peakpoint.store.pages import cores

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Damaged:
    """A checkpoint whose manifest cannot be read.

    Attributes:
        name: the directory.
        error: why.
        saved: its commit, where the journal was asked.
    """

    name: str
    error: CorruptError | FormatError
    saved: Saved | None = None

    def is_named(self, name: str) -> bool:
        """Return whether it has this name or, as far as that is known, this id."""
        return name == self.name or (self.saved is not None and name == self.saved.checkpoint)


@dataclass(frozen=True, slots=True)
class RunListing:
    """The checkpoints of a run, as their directories say.

    Attributes:
        manifests: of every checkpoint that exists, by sequence.
        damaged: directories whose manifest cannot be read.
        without_manifest: directories of a save or a removal that is under way, or was interrupted, and of checkpoints
            that have lost their manifest: see ``repository.lost``.
        incomplete: ids of checkpoints without some of their parts: a run cannot continue from these.
    """

    manifests: tuple[Manifest, ...]
    damaged: tuple[Damaged, ...]
    without_manifest: tuple[str, ...]
    incomplete: frozenset[str] = frozenset()


def list_run(store: Store, run: str) -> RunListing:
    """Read every manifest of a run.

    A checkpoint that is removed because a newer one has come is not missed together with the newer one.
    """
    states: dict[str, FoundCheckpoint | Damaged | None] = {}
    while new := [name for name in _directories(store, run) if name not in states]:
        states |= {name: inspect(store, run, name) for name in new}
        if None not in states.values():
            break  # nothing was removed meanwhile
    checkpoints = [state for state in states.values() if isinstance(state, FoundCheckpoint)]
    return RunListing(
        tuple(sorted((checkpoint.manifest for checkpoint in checkpoints), key=lambda manifest: manifest.sequence)),
        tuple(state for state in states.values() if isinstance(state, Damaged)),
        tuple(name for name, state in states.items() if state is None),
        frozenset(checkpoint.manifest.id for checkpoint in checkpoints if checkpoint.incomplete),
    )


def _directories(store: Store, run: str) -> list[str]:
    children = store.children(layout.checkpoints_prefix(run))
    return [child.removesuffix("/") for child in children if child.endswith("/")]  # audit names stray files


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint that exists, as its directory says.

    Attributes:
        manifest: without the parts that were dropped since.
        incomplete: whether there are such parts.
        archived: whether its files are in a pack.
    """

    manifest: Manifest
    incomplete: bool
    archived: bool


def inspect(
    store: Store, run: str, name: str, archive: packs.RunArchive | None = None
) -> FoundCheckpoint | Damaged | None:
    """Read one directory of a run's checkpoints; None when it has no manifest.

    Args:
        store: any store.
        run: the run's name.
        name: the directory.
        archive: of the run, if it is archived; only ``FoundCheckpoint.archived`` needs it.
    """
    try:
        children = store.children(layout.checkpoint_prefix(run, name))
        manifest = whole_manifest(store, run, name)
        dropped = list(dropped_parts(store, run, name)) if any(map(layout.is_record, children)) else []
        archived = layout.ARCHIVED in children or (archive is not None and manifest.id in archive.packed_bytes)
        return FoundCheckpoint(without_dropped(manifest, dropped), bool(dropped), archived)
    except NotFoundError:
        return None
    except CorruptError as error:
        where = f"{store.location}/{layout.manifest_key(run, name)}"
        return Damaged(name, type(error)(f"{where}: {error}, or remove the checkpoint: {rm_command(store, run, name)}"))
    except FormatError as error:
        return Damaged(name, type(error)(f"{store.location}/{layout.manifest_key(run, name)}: {error}"))


def rm_command(store: Store, run: str, name: str) -> str:
    """Return the command that removes a damaged checkpoint."""
    return f"peakpoint rm {shlex.quote(store.location)} {shlex.quote(f'{run}/{name}')} --undo-for 0"


def read_manifest(store: Store, run: str, name: str) -> Manifest:
    """Read the manifest in one directory, without the parts that were dropped since.

    Raises:
        NotFoundError: the checkpoint does not exist.
        CorruptError: it is damaged, or belongs to another directory.
        FormatError: a newer release wrote it.
    """
    return without_dropped(whole_manifest(store, run, name), list(dropped_parts(store, run, name)))


def manifest_digest(store: Store, manifest: Manifest) -> str:
    """Return the digest of the bytes of a checkpoint's manifest, and so of everything that it has digests of."""
    return digest(store.get(layout.manifest_key(manifest.run, manifest.name)))


def whole_manifest(store: Store, run: str, name: str) -> Manifest:
    """Read the manifest in one directory, with the parts that were dropped since; errors as in ``read_manifest``."""
    manifest = decode_manifest(store.get(layout.manifest_key(run, name)))
    if manifest.name != name or not is_name_of(store, run, manifest.run):
        place = f"{manifest.run}/{manifest.name}"
        raise CorruptError(f"{MANIFEST} says that it belongs to {place}; the directory was renamed or copied")
    return manifest if manifest.run == run else replace(manifest, run=run)


def _settled(
    attempt: Callable[Concatenate[Store, Manifest, FileRecord, P], T],
) -> Callable[Concatenate[Store, Manifest, FileRecord, P], T]:
    """Look at a file until its place stays the same: being removed, packed or restored meanwhile is not damage."""

    @functools.wraps(attempt)
    def look(store: Store, manifest: Manifest, file: FileRecord, /, *args: P.args, **kwargs: P.kwargs) -> T:
        place: object = manifest  # different from every place
        while True:
            try:
                return attempt(store, manifest, file, *args, **kwargs)
            except (CorruptError, NotFoundError):
                last_place, place = place, _place(store, manifest, file)
                if place == last_place:
                    raise

    return look


@_settled
def view(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    """Map the bytes of one file, of the size that the manifest says; nothing is read before it is used.

    Raises:
        CorruptError: the file is missing or has another size.
        FormatError: Peakpoint does not write files of this name.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    try:
        data = _get(store, manifest, file, store.view)
    except CorruptError as error:
        data = _unpacked(store, manifest, file, error)
    _check_size(manifest, file, len(data))
    return data


@_settled
def read(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    """Read one file, and compare every byte with the digests in the manifest, on every core, while they arrive.

    Raises:
        CorruptError: the file is missing, has another size or other bytes; the message names the file and the tensor.
        FormatError: Peakpoint does not write files of this name.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
        StoreError: it cannot be read.
    """
    filling: Filling
    try:
        filling = _get(store, manifest, file, store.fill)
    except CorruptError as error:
        filling = Filled(_unpacked(store, manifest, file, error))
    try:
        _check_size(manifest, file, len(filling.data))
        _check(manifest, file, filling)
    finally:
        filling.close()
    return filling.data


@_settled
def take_tensor(
    store: Store,
    manifest: Manifest,
    file: FileRecord,
    tensor: TensorRecord,
    take: Callable[[int, bytes], object],
    *,
    block: int,
    within: tuple[int, int] | None = None,
) -> None:
    """Read one tensor of a file block by block, and compare it with its digest after the last; nothing else is read.

    Args:
        take: is given the position of each block in the tensor and its bytes, which are not compared yet; everything
            anew when the file was packed or restored meanwhile.
        block: bytes of a block.
        within: only these bytes of the tensor, from the first to one past the last; nothing is compared then.

    Raises:
        CorruptError: the file is missing or too short, or the bytes are others.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    first, last = within or (0, tensor.end - tensor.begin)
    for position in range(first, last, block) or [first]:
        data = _range(store, manifest, file, tensor, position, min(position + block, last))
        if within is None:
            hasher.update(data)
        take(position, data)
    if within is None and hasher.hexdigest() != tensor.digest:
        raise _differs(manifest, file, tensor_range(file, tensor))


def _range(store: Store, manifest: Manifest, file: FileRecord, tensor: TensorRecord, first: int, last: int) -> bytes:
    """Return bytes of a tensor, as many as were asked for."""
    begin, end = (file.header + tensor.begin + position for position in (first, last))
    data = b""
    if 0 <= begin <= end <= file.size:
        try:
            with _damage_named(manifest, file, f", which holds tensor {tensor.name!r}"):
                data = store.get(layout.file_key(manifest.run, manifest.name, file.name), begin, end)
        except CorruptError as error:
            data = _unpacked_range(store, manifest, file, begin, end, error)
    if len(data) != end - begin:
        where = f"tensor {tensor.name!r} in {file.name}"
        raise CorruptError(f"checkpoint {manifest.name} is damaged: {where} is cut short (bytes {begin} to {end})")
    return data


def _unpacked(store: Store, manifest: Manifest, file: FileRecord, missing: CorruptError) -> memoryview:
    """Unpack a file of an archived checkpoint."""
    source, number = _packed(store, manifest, file, missing)
    data = bytearray(file.size)
    offset = 0
    for block in source.blocks(number):
        data[offset : offset + len(block)] = block
        offset += len(block)
    return memoryview(data)


def _unpacked_range(
    store: Store, manifest: Manifest, file: FileRecord, begin: int, end: int, missing: CorruptError
) -> bytes:
    source, number = _packed(store, manifest, file, missing)
    return source.range(number, begin, end, {})


def _packed(store: Store, manifest: Manifest, file: FileRecord, missing: CorruptError) -> tuple[PackSource, int]:
    archive = packs.readable_run_archive(store, manifest.run)
    is_archived = archive is not None and manifest.id in archive.packed_bytes
    if not is_archived and store.size(layout.pack_key(manifest.run, manifest.id)) is None:
        raise missing
    source = open_pack(store, manifest.run, manifest.id)
    for number, packed in enumerate(source.index.files):
        if packed.record.name == file.name and packed.record.size == file.size:
            return source, number
    raise CorruptError(
        f"checkpoint {manifest.name} is damaged: {file.name} is neither in its pack nor in its directory"
    )


def _place(store: Store, manifest: Manifest, file: FileRecord) -> object:
    """Return where the bytes of a file are: the record of the trash, or the archive; None in their directory."""
    try:
        manifest_now = read_manifest(store, manifest.run, manifest.name)
    except NotFoundError as error:
        record = trash.read_trashed(store, manifest.run, manifest.name)
        if record is not None:
            return record
        raise NotFoundError(f"checkpoint {manifest.name} was removed a moment ago") from error
    if manifest_now.id != manifest.id:
        raise NotFoundError(f"checkpoint {manifest.name} was removed a moment ago, and another one has its name now")
    if file.name not in {existing.name for existing in manifest_now.files}:
        raise NotFoundError(f"checkpoint {manifest.name} has just lost the part that {file.name} belongs to")
    return packs.packed_bytes(store, manifest.run, [manifest])


def _get(store: Store, manifest: Manifest, file: FileRecord, get: Callable[[str], T]) -> T:
    """Call ``get`` with the key of a file, if the file exists and has its size."""
    with _damage_named(manifest, file):
        key = layout.file_key(manifest.run, manifest.name, file.name)
        size = store.size(key)
        if size is not None:
            _check_size(manifest, file, size)
        return get(key)


@contextlib.contextmanager
def _damage_named(manifest: Manifest, file: FileRecord, holding: str = "") -> Iterator[None]:
    """Say of errors which checkpoint and file they are about."""
    try:
        yield
    except NotFoundError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: {file.name} is missing{holding}") from error
    except ConfigError as error:
        raise FormatError(f"checkpoint {manifest.name} has a file that cannot be read: {error}") from error
    except FormatError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: {error}") from error


def check_sizes(store: Store, manifest: Manifest) -> None:
    """Check the size of every file; errors as in ``check_size``."""
    for file in manifest.files:
        check_size(store, manifest, file)


@_settled
def check_size(store: Store, manifest: Manifest, file: FileRecord) -> None:
    """Check that a file exists and has its size, or the packs of an archived one; nothing is read.

    Raises:
        CorruptError: it is missing or has another size.
        FormatError: Peakpoint does not write files of this name.
        NotFoundError: the checkpoint, or this part of it, was removed a moment ago.
    """
    with _damage_named(manifest, file):
        size = store.size(layout.file_key(manifest.run, manifest.name, file.name))
    if size is None:
        missing = CorruptError(f"checkpoint {manifest.name} is damaged: {file.name} is missing")
        source, number = _packed(store, manifest, file, missing)
        size = source.index.files[number].record.size
    _check_size(manifest, file, size)


def find_damage(store: Store, manifests: Iterable[Manifest]) -> dict[str, str]:
    """Return the ids of checkpoints with files that are missing or of another size, with the errors; nothing is read.

    One that was removed a moment ago is not among them.
    """
    errors = {}
    for manifest in manifests:
        with contextlib.suppress(NotFoundError):
            try:
                check_sizes(store, manifest)
            except (CorruptError, FormatError) as error:
                errors[manifest.id] = str(error)
    return errors


def hold_for_reading(store: Store, manifest: Manifest) -> Hold | None:
    """Mark a checkpoint as being read, so that rules leave it alone; None where the store cannot mark it."""
    return store.reading(layout.manifest_key(manifest.run, manifest.name))


@contextlib.contextmanager
def hold_all(store: Store, manifests: Iterable[Manifest]) -> Iterator[None]:
    """Keep rules from removing these checkpoints meanwhile."""
    with contextlib.ExitStack() as holds:
        for manifest in manifests:
            hold = hold_for_reading(store, manifest)
            if hold is not None:
                holds.callback(hold.release)
        yield


def being_read(store: Store, manifests: Iterable[Manifest]) -> set[str]:
    """Return the ids of checkpoints that somebody is reading."""
    return {manifest.id for manifest in manifests if store.is_read(layout.manifest_key(manifest.run, manifest.name))}


def _check_size(manifest: Manifest, file: FileRecord, size: int) -> None:
    if size != file.size:
        raise CorruptError(
            f"checkpoint {manifest.name} is damaged: {file.name} has {size} bytes instead of {file.size}"
        )


def _differs(manifest: Manifest, file: FileRecord, hashed_range: HashedRange) -> CorruptError:
    return CorruptError(
        f"checkpoint {manifest.name} is damaged: {hashed_range.label} does not match its digest "
        f"(bytes {hashed_range.begin} to {hashed_range.end} of {file.name})"
    )


def _check(manifest: Manifest, file: FileRecord, filling: Filling) -> None:
    jobs = list(grouped(hashed_ranges(file)))
    with ThreadPoolExecutor(min(len(jobs), cores()), "peakpoint-verify") as pool:
        try:
            for mismatch in pool.map(lambda job: first_mismatch(job, filling), jobs):
                if mismatch is not None:
                    raise _differs(manifest, file, mismatch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if file.header and combined_digest(file.header_digest, file.tensors) != file.digest:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: the digests of {file.name} contradict one another")
