"""The archive: finished runs in a fraction of their space, and back again bit for bit.

Archived is a state of a run. Each of its checkpoints is packed as differences to the ones before it, and each pack is
unpacked and compared with every digest; then one record makes the run archived, and the files are deleted. The
manifests stay where they are: checkpoints of an archived run are listed, chosen, explained and loaded like any other,
only more slowly. Restoring writes all files again, and then deletes the record. After a crash either the packs or the
files are superfluous, depending on whether the record exists.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from peakpoint.errors import ConflictError, CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.events import Archived, Changing, Restored, Undone
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.repository import packs, reader, trash
from peakpoint.repository.commit import file_record, put_file
from peakpoint.repository.journal import Journal
from peakpoint.repository.packs import RunArchive
from peakpoint.repository.packs.index import PackIndex, read_index
from peakpoint.repository.packs.reader import ByteSource, FileSource, load_codec, open_pack
from peakpoint.repository.packs.writer import PackBase, write_pack
from peakpoint.repository.provenance import present_user
from peakpoint.repository.run import Run
from peakpoint.store import Store

LONGEST_CHAIN = 16
"""A checkpoint is read through at most so many packs; the next one stands on its own."""

_NEIGHBOURS = 2  # a straight line through two checkpoints predicts the next; see ``packs.codec``


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """A checkpoint that has been packed.

    Attributes:
        size_bytes: of its files, including those that other checkpoints share.
        packed_bytes: of its pack.
        bases: how many other checkpoints the pack needs.
    """

    manifest: Manifest
    size_bytes: int
    packed_bytes: int
    bases: int


Progress = Callable[[PackedCheckpoint], None]


def archive_held(
    run: Run, journal: Journal, manifests: Sequence[Manifest], level: int | None, progress: Progress
) -> list[PackedCheckpoint]:
    """Archive a run that the caller holds.

    Nothing is deleted before every pack is durable and has been compared with every digest. When it raises, the run is
    as it was, and its packs are superfluous.

    Args:
        run: to be archived.
        journal: receives an ``Archived`` for each checkpoint.
        manifests: its checkpoints, earliest first.
        level: of zstd; None for the usual.
        progress: called with each checkpoint that is packed.

    Raises:
        ConflictError: a checkpoint is being removed at this moment.
        CorruptError: a checkpoint is damaged; the message says which, and how.
        MissingExtraError: NumPy or zstandard is not installed.
        StoreError: the store refused.
    """
    load_codec()
    store, by = run.store, present_user()
    packed = _pack_all(store, manifests, level, progress)
    journal.record(
        Changing(at=journal.now(), checkpoint=manifest.id, name=manifest.name, by=by) for manifest in manifests
    )
    sizes = {checkpoint.manifest.id: checkpoint.packed_bytes for checkpoint in packed}
    packs.mark_archived(store, run.name, RunArchive(packed_bytes=sizes, at=journal.now(), by=by))
    # once the record exists, so that whoever begins a removal later sees it
    if any(run.is_being_removed(manifest, held=True) for manifest in manifests):
        store.delete(layout.archived_key(run.name))
        raise ConflictError(
            f"a checkpoint of run {run.name!r} is being removed; archive the run again when that is done"
        )
    for manifest in manifests:
        about = {"checkpoint": manifest.id, "name": manifest.name, "by": by}
        journal.append(Archived(at=journal.now(), packed_bytes=sizes[manifest.id], **about))
    journal.sync()
    for manifest in manifests:
        # one that was removed meanwhile may have put its files into the trash
        if store.size(layout.manifest_key(run.name, manifest.name)) is not None:
            for file in manifest.files:
                store.delete(layout.file_key(run.name, manifest.name, file.name))
    return packed


def _pack_all(
    store: Store, manifests: Sequence[Manifest], level: int | None, progress: Progress
) -> list[PackedCheckpoint]:
    bases: list[PackBase] = []  # the nearest first
    packed: list[PackedCheckpoint] = []
    for manifest in manifests:
        try:
            files = FileSource(store, manifest)
        except NotFoundError as error:
            raise CorruptError(f"{manifest.name} is damaged, or was removed a moment ago: {error}") from error
        index = _pack(store, manifest, files, bases, level)
        size = store.size(layout.pack_key(manifest.run, manifest.id)) or 0
        packed.append(PackedCheckpoint(manifest, manifest.size_bytes, size, len(index.bases)))
        progress(packed[-1])
        bases = [PackBase(manifest.id, files, index.depth), *bases][:_NEIGHBOURS] if index.depth < LONGEST_CHAIN else []
    return packed


def _pack(
    store: Store, manifest: Manifest, files: FileSource, bases: Sequence[PackBase], level: int | None
) -> PackIndex:
    """Write the pack, and prove that it gives the files back."""
    index = write_pack(store, manifest, files, bases, level)
    sources = {base.checkpoint: base.source for base in bases}
    for image in open_pack(store, manifest.run, manifest.id, sources).images():
        _compare(manifest, image.name, file_record(image))
    return index


def _compare(manifest: Manifest, name: str, written: FileRecord) -> None:
    if written != replace(manifest.file(name), shared=""):
        raise CorruptError(
            f"checkpoint {manifest.name} is damaged: the bytes of {name} do not match its digests; "
            "to see where: peakpoint audit --deep"
        )


def restore_held(run: Run, journal: Journal, progress: Callable[[Manifest], None]) -> list[Manifest]:
    """Restore the files of an archived run that the caller holds, bit for bit.

    What earlier code archived piece by piece is restored, too: single checkpoints, and dropped parts whose files are
    still intact.

    Args:
        run: the archived run.
        journal: receives a ``Restored`` for each checkpoint.
        progress: called with each checkpoint that is done.

    Raises:
        CorruptError: packs are damaged; the message names the checkpoints, and all others are restored.
        MissingExtraError: NumPy or zstandard is not installed.
        StoreError: the store refused; the run stays archived.
    """
    store, by = run.store, present_user()
    completed = {manifest.id for manifest in run.manifests() if _restore_parts(store, journal, manifest, by)}
    manifests = run.manifests()  # earliest first: each is unpacked with the help of the files of the ones before
    restored, damage = _unpack_all(run, manifests, progress)
    journal.record(
        Restored(at=journal.now(), checkpoint=manifest.id, name=manifest.name, by=by) for manifest in restored
    )
    store.delete(layout.archived_key(run.name))
    for manifest in restored:
        store.delete(layout.singly_archived_key(run.name, manifest.name))
    if damage:
        raise CorruptError(
            f"run {run.name!r} is restored, except for damaged checkpoints: {'; '.join(damage)}. Copy the packs in "
            f"{layout.archive_prefix(run.name)} from a backup, or remove these checkpoints: peakpoint rm --undo-for 0"
        )
    return [manifest for manifest in manifests if manifest in restored or manifest.id in completed]


def _unpack_all(
    run: Run, manifests: Sequence[Manifest], progress: Callable[[Manifest], None]
) -> tuple[list[Manifest], list[str]]:
    """Unpack what is packed; returns the restored checkpoints, and a sentence for each that is damaged."""
    store = run.store
    packed = packs.packed_bytes(store, run.name, manifests)
    neighbours: list[tuple[Manifest, ByteSource]] = []
    restored: list[Manifest] = []
    damage: list[str] = []
    for manifest in [manifest for manifest in manifests if manifest.id in packed]:
        try:
            _unpack(store, manifest, neighbours)
        except (CorruptError, FormatError, NotFoundError) as error:
            damage.append(str(error))
            continue
        # of one that lacks parts the pack stays the source: later packs may need these parts
        if not any(trash.dropped_parts(store, run.name, manifest.name)):
            neighbours = [*neighbours, (manifest, FileSource(store, manifest))][-_NEIGHBOURS:]
        progress(manifest)
        restored.append(manifest)
    return restored, damage


def _unpack(store: Store, manifest: Manifest, neighbours: Sequence[tuple[Manifest, ByteSource]]) -> None:
    sources = {neighbour.id: source for neighbour, source in neighbours}
    images = {image.name: image for image in open_pack(store, manifest.run, manifest.id, sources).images()}
    for file in manifest.files:
        if file.name not in images:
            reader.read(store, manifest, file)  # of a part that was restored before the checkpoint was
        elif not _share(store, manifest, file, [neighbour for neighbour, _ in neighbours]):
            key = layout.file_key(manifest.run, manifest.name, file.name)
            try:
                _compare(manifest, file.name, put_file(store, key, images[file.name]))
            except CorruptError:
                store.delete(key)
                raise


def _share(store: Store, manifest: Manifest, file: FileRecord, neighbours: Sequence[Manifest]) -> bool:
    """Share the file with a checkpoint that has just been restored, where both have the same."""
    for neighbour in neighbours:
        if any(replace(other, shared="") == replace(file, shared="") for other in neighbour.files):
            source = layout.file_key(neighbour.run, neighbour.name, file.name)
            return store.link(source, layout.file_key(manifest.run, manifest.name, file.name))
    return False


def _restore_parts(store: Store, journal: Journal, manifest: Manifest, by: str) -> bool:
    """Restore parts that earlier code dropped for a while, where every byte of them still exists."""
    parts: list[str] = []
    whole = reader.whole_manifest(store, manifest.run, manifest.name)
    records = list(trash.dropped_parts(store, manifest.run, manifest.name))
    for record in [record for record in records if record.until is not None]:
        try:
            for name in record.files:
                reader.read(store, whole, whole.file(name))
        except (CorruptError, NotFoundError):
            continue  # deleted, or damaged: the part stays dropped, and the checkpoint is intact without it
        store.delete(record.key)
        parts += record.parts
    if parts:
        journal.append(Undone(at=journal.now(), checkpoint=manifest.id, name=manifest.name, parts=tuple(parts), by=by))
    return bool(parts)


def superfluous_files(store: Store, manifest: Manifest, packed: Mapping[str, int]) -> list[str]:
    """Return the keys of files of an archived checkpoint that exist beside its pack.

    Args:
        store: holds the run.
        manifest: of the checkpoint.
        packed: of its run; see ``packs.packed_bytes``.
    """
    if manifest.id not in packed:
        return []
    present = set(store.children(layout.checkpoint_prefix(manifest.run, manifest.name)))
    names = sorted(present & {file.name for file in manifest.files})
    return [layout.file_key(manifest.run, manifest.name, name) for name in names]


def superfluous_packs(store: Store, run: str) -> list[str]:
    """Return the keys of packs, and of the record of an archive, that no checkpoint needs, after a crash or a removal.

    A checkpoint needs its pack when it is archived, or lacks files, even if no record says why. When a manifest, a
    record or a needed pack cannot be read, nobody can say what it needs, and nothing is returned.
    """
    children = store.children(layout.archive_prefix(run))
    stored = {child.removesuffix(layout.PACK) for child in children if child.endswith(layout.PACK)}
    archived = store.size(layout.archived_key(run)) is not None
    if not stored and not archived:
        return []
    listing = reader.list_run(store, run)
    removed = [entry.manifest for entry in trash.contents(store, run)]  # earlier code put packed ones there
    in_trash = [name for name in listing.without_manifest if store.size(layout.trashed_key(run, name)) is not None]
    if listing.damaged or len(in_trash) > len(removed):
        return []
    try:
        needed = _with_bases(store, run, stored, set(packs.packed_bytes(store, run, [*listing.manifests, *removed])))
    except (CorruptError, FormatError, NotFoundError):
        return []
    keys = [layout.pack_key(run, checkpoint) for checkpoint in sorted(stored - needed)]
    return keys if listing.manifests or not archived else [*keys, layout.archived_key(run)]


def _with_bases(store: Store, run: str, stored: set[str], packed: set[str]) -> set[str]:
    """Add the checkpoints that packs need, and those that theirs need."""
    needed = unread = packed
    while unread:
        unread = {base for name in unread & stored for base in read_index(store, run, name).bases} - needed
        needed = needed | unread
    return needed
