"""The archive: finished runs in a fraction of their space, and back again bit for bit.

Archived is a state of a run. Each of its checkpoints is packed as differences to the ones before it, and each pack is
unpacked and compared with every digest; then one record makes the run archived, and the files go. The manifests stay
where they are: checkpoints of an archived run are listed, chosen, explained and loaded like any other, only more
slowly. Restoring writes all files again, and then takes the record away. What a crash leaves is litter on one side of
the record or on the other.
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
from peakpoint.repository.packs import Base, Index, PlainSource, RunArchive, Source
from peakpoint.repository.trash import records
from peakpoint.store import Store

CHAIN = 16
"""A checkpoint is read through at most so many packs; the next one stands on its own."""

_NEIGHBOURS = 2


@dataclass(frozen=True, slots=True)
class Packed:
    """A checkpoint that has been packed.

    Attributes:
        manifest: which.
        size_bytes: of its files, what other checkpoints share included.
        packed_bytes: of its pack.
        bases: how many other checkpoints the pack needs.
    """

    manifest: Manifest
    size_bytes: int
    packed_bytes: int
    bases: int


def archive(
    store: Store,
    journal: Journal,
    run: str,
    manifests: Sequence[Manifest],
    *,
    by: str,
    being_removed: Callable[[Manifest], bool],
    level: int | None = None,
    progress: Callable[[Packed], None] = lambda _: None,
) -> list[Packed]:
    """Archive a run; the caller holds it.

    Nothing goes before every pack is durable and has been compared with every digest. When it raises, the run is as it
    was, and its packs are litter.

    Args:
        store: where.
        journal: receives an ``Archived`` for each checkpoint.
        run: which run.
        manifests: its checkpoints, earliest first.
        by: who decided, for the record.
        being_removed: whether somebody may be removing a checkpoint; asked once the record is there, so that whoever
            begins later sees it.
        level: of zstd; None for the usual.
        progress: called with each checkpoint that is packed.

    Returns:
        What was packed, earliest first.

    Raises:
        ConflictError: a checkpoint is being removed at this moment.
        CorruptError: a checkpoint is damaged; the message says which, and how.
        MissingExtraError: NumPy or zstandard is not installed.
        StoreError: the store refused.
    """
    packs.load_codec()
    near: list[Base] = []  # the nearest first
    packed: list[Packed] = []
    for manifest in manifests:
        try:
            plain = PlainSource(store, manifest)
        except NotFoundError as error:
            raise CorruptError(f"{manifest.name} is damaged, or was removed a moment ago: {error}") from error
        index = _pack(store, manifest, plain, near, level)
        size = store.size(layout.pack_key(run, manifest.id)) or 0
        packed.append(Packed(manifest, manifest.size_bytes, size, len(index.bases)))
        progress(packed[-1])
        near = [Base(manifest.id, plain, index.depth), *near][:_NEIGHBOURS] if index.depth < CHAIN else []
    for manifest in manifests:
        journal.append(Changing(at=journal.now(), checkpoint=manifest.id, name=manifest.name, by=by))
    journal.sync()
    sizes = {done.manifest.id: done.packed_bytes for done in packed}
    packs.note_archived(store, run, RunArchive(packed_bytes=sizes, at=journal.now(), by=by))
    if any(map(being_removed, manifests)):
        store.delete(layout.archived_key(run))
        raise ConflictError(f"a checkpoint of run {run!r} is being removed; archive the run again when that is done")
    for manifest in manifests:
        known = {"checkpoint": manifest.id, "name": manifest.name, "by": by}
        journal.append(Archived(at=journal.now(), packed_bytes=sizes[manifest.id], **known))
    journal.sync()
    for manifest in manifests:
        # one that was removed meanwhile may have put its files into the trash
        if store.size(layout.manifest_key(run, manifest.name)) is not None:
            for file in manifest.files:
                store.delete(layout.file_key(run, manifest.name, file.name))
    return packed


def _pack(store: Store, manifest: Manifest, plain: PlainSource, near: Sequence[Base], level: int | None) -> Index:
    """Write the pack, and prove that it gives the files back."""
    index = packs.write_pack(store, manifest, plain, near, level)
    sources = {base.checkpoint: base.source for base in near}
    for image in packs.unpacked(packs.source_of(store, manifest.run, manifest.id, sources)):
        _compare(manifest, image.name, file_record(image))
    return index


def _compare(manifest: Manifest, name: str, written: FileRecord) -> None:
    if written != replace(manifest.file(name), shared=""):
        raise CorruptError(
            f"checkpoint {manifest.name} is damaged: the bytes of {name} do not match its digests; "
            "peakpoint audit --deep says where"
        )


def restore(
    store: Store,
    journal: Journal,
    run: str,
    manifests: Sequence[Manifest],
    *,
    by: str,
    progress: Callable[[Manifest], None] = lambda _: None,
) -> list[Manifest]:
    """Put the files of an archived run back, bit for bit; the caller holds the run.

    What earlier code put away by pieces comes back, too: single archived checkpoints, and dropped parts whose files are
    still whole.

    Args:
        store: where.
        journal: receives a ``Restored`` for each checkpoint.
        run: which run.
        manifests: its checkpoints, earliest first: each is unpacked with the help of the files of the ones before.
        by: who decided, for the record.
        progress: called with each that is done.

    Returns:
        What is back.

    Raises:
        CorruptError: packs are damaged; the message names the checkpoints, and all others are back.
        MissingExtraError: NumPy or zstandard is not installed.
        StoreError: the store refused; the run stays archived.
    """
    completed = {manifest.id for manifest in manifests if _bring_parts_back(store, journal, manifest, by)}
    manifests = [reader.read_manifest(store, run, manifest.name) for manifest in manifests]
    packed = packs.packed_bytes(store, run, manifests)
    near: list[tuple[Manifest, Source]] = []
    back: list[Manifest] = []
    damage: list[str] = []
    for manifest in [manifest for manifest in manifests if manifest.id in packed]:
        try:
            _restore(store, manifest, near)
        except (CorruptError, FormatError, NotFoundError) as error:
            damage.append(str(error))
            continue
        if not any(records(store, run, manifest.name)):  # else later packs may need parts that only its pack has
            near = [*near, (manifest, PlainSource(store, manifest))][-_NEIGHBOURS:]
        progress(manifest)
        back.append(manifest)
    for manifest in back:
        journal.append(Restored(at=journal.now(), checkpoint=manifest.id, name=manifest.name, by=by))
    journal.sync()
    store.delete(layout.archived_key(run))
    for manifest in back:
        store.delete(layout.singly_archived_key(run, manifest.name))
    if damage:
        raise CorruptError(
            f"all of run {run!r} is back but what is damaged: {'; '.join(damage)}. Restore the packs in "
            f"{layout.archive_prefix(run)} from a copy, or give these checkpoints up with peakpoint rm --undo-for 0"
        )
    return [manifest for manifest in manifests if manifest in back or manifest.id in completed]


def _restore(store: Store, manifest: Manifest, near: Sequence[tuple[Manifest, Source]]) -> None:
    sources = {other.id: source for other, source in near}
    images = {image.name: image for image in packs.unpacked(packs.source_of(store, manifest.run, manifest.id, sources))}
    for file in manifest.files:
        if file.name not in images:
            reader.read(store, manifest, file)  # of a part that was back before the checkpoint was
        elif not _share(store, manifest, file.name, [other for other, _ in near]):
            key = layout.file_key(manifest.run, manifest.name, file.name)
            try:
                _compare(manifest, file.name, put_file(store, key, images[file.name]))
            except CorruptError:
                store.delete(key)
                raise


def _share(store: Store, manifest: Manifest, name: str, others: Sequence[Manifest]) -> bool:
    """Use the file of a checkpoint that has just been restored once more, where they had one in common."""
    file = manifest.file(name)
    for other in others:
        if any(replace(theirs, shared="") == replace(file, shared="") for theirs in other.files):
            source = layout.file_key(other.run, other.name, name)
            return store.link(source, layout.file_key(manifest.run, manifest.name, name))
    return False


def _bring_parts_back(store: Store, journal: Journal, manifest: Manifest, by: str) -> bool:
    """Take back what earlier code dropped with time to change one's mind, where every byte of it is still there."""
    back: list[str] = []
    whole = reader.whole_manifest(store, manifest.run, manifest.name)
    for dropped in [record for record in records(store, manifest.run, manifest.name) if record.until is not None]:
        try:
            for name in dropped.files:
                reader.read(store, whole, whole.file(name))
        except (CorruptError, NotFoundError):
            continue  # gone, or damaged: the part stays dropped, and the checkpoint is whole without it
        store.delete(dropped.key)
        back += dropped.parts
    if back:
        journal.append(Undone(at=journal.now(), checkpoint=manifest.id, name=manifest.name, parts=tuple(back), by=by))
    return bool(back)


def leftovers(store: Store, manifest: Manifest, packed: Mapping[str, int]) -> list[str]:
    """Keys of files of an archived checkpoint that are still, or again, where the manifest says.

    Args:
        store: where.
        manifest: which checkpoint.
        packed: of its run; see ``packs.packed_bytes``.
    """
    if manifest.id not in packed:
        return []
    present = set(store.children(layout.checkpoint_prefix(manifest.run, manifest.name)))
    names = sorted(present & {file.name for file in manifest.files})
    return [layout.file_key(manifest.run, manifest.name, name) for name in names]


def needless(store: Store, run: str) -> list[str]:
    """Keys of packs, and of the record of an archive, that no checkpoint needs: a crash or a removal has left them.

    A checkpoint needs its pack when it is archived, or lacks files, even if no record says why. When a manifest, a
    record or a pack that is needed cannot be read, nobody can say what it needs, and nothing is returned.
    """
    stored = {
        child.removesuffix(layout.PACK)
        for child in store.children(layout.archive_prefix(run))
        if child.endswith(layout.PACK)
    }
    archived = store.size(layout.archived_key(run)) is not None
    if not stored and not archived:
        return []
    shelf = reader.list_run(store, run)
    removed = [entry.manifest for entry in trash.contents(store, run)]  # earlier code put packed ones there
    in_trash = [name for name in shelf.without_manifest if store.size(layout.trashed_key(run, name)) is not None]
    if shelf.damaged or len(in_trash) > len(removed):
        return []
    try:
        new = needed = set(packs.packed_bytes(store, run, [*shelf.manifests, *removed]))
        while new:
            new = {base for name in new & stored for base in packs.read_index(store, run, name).bases} - needed
            needed |= new
    except (CorruptError, FormatError, NotFoundError):
        return []
    keys = [layout.pack_key(run, checkpoint) for checkpoint in sorted(stored - needed)]
    return keys if shelf.manifests or not archived else [*keys, layout.archived_key(run)]
