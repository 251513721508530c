"""The archive: finished runs in a fraction of their space, and back again bit for bit.

A checkpoint is packed as differences to the ones before it, and the pack is unpacked and compared with every digest
before the files go. The manifest stays where it is: an archived checkpoint is listed, chosen, explained and loaded like
any other, only more slowly. Restoring writes the files again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from peakpoint import layout, packs
from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.journal import Archived as ArchivedEvent
from peakpoint.journal import Changing, Journal, Restored
from peakpoint.manifest import FileRecord, Manifest
from peakpoint.packs import Base, Index, PlainSource, Source
from peakpoint.store import Store
from peakpoint.writer import file_record, put_file

CHAIN = 16
"""A checkpoint is read through at most so many packs; the next one stands on its own."""

_NEIGHBOURS = 2


@dataclass(frozen=True, slots=True)
class Packed:
    """A checkpoint that has been archived.

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


def unarchived(store: Store, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Those whose files are where the manifest says, earliest first."""
    return [manifest for manifest in manifests if packs.archived(store, manifest.run, manifest.name) is None]


def archive(
    store: Store,
    journal: Journal,
    manifests: Sequence[Manifest],
    chosen: Sequence[Manifest],
    *,
    by: str,
    level: int | None = None,
    progress: Callable[[Packed], None] = lambda _: None,
) -> tuple[list[Packed], list[str]]:
    """Archive checkpoints; the caller holds the run.

    Each is safe on its own: the pack is durable and has been compared with every digest before the first file goes, and
    what was cut short is taken up by the next call.

    Args:
        store: where.
        journal: receives an ``Archived`` for each.
        manifests: every checkpoint of the run, earliest first; the neighbours are found among them.
        chosen: which are to be archived; those that are already are passed over.
        by: who decided, for the record.
        level: of zstd; None for the usual.
        progress: called with each that is done.

    Returns:
        What was done, earliest first, and one sentence for each checkpoint that is damaged and stays as it is.

    Raises:
        MissingExtraError: NumPy or zstandard is not installed.
        StoreError: the store refused.
    """
    packs.load_codec()
    wanted = {manifest.id for manifest in chosen}
    near: list[Base] = []  # the nearest first
    done: list[Packed] = []
    failures: list[str] = []
    for manifest in manifests:
        if packs.archived(store, manifest.run, manifest.name) is not None:
            known = {base.checkpoint: base.source for base in near}
            found = packs.source_of(store, manifest.run, manifest.id, known)
            base = Base(manifest.id, found, found.index.depth)
        elif manifest.id in wanted:
            try:
                plain = PlainSource(store, manifest)
                index = _pack(store, manifest, plain, near, level)
            except (CorruptError, FormatError, NotFoundError) as error:
                failures.append(str(error))
                continue
            size = store.size(layout.pack_key(manifest.run, manifest.id)) or 0
            journal.append(Changing(at=journal.now(), checkpoint=manifest.id, name=manifest.name, by=by))
            journal.sync()
            packs.note_archived(store, manifest, size, at=journal.now(), by=by)
            journal.append(
                ArchivedEvent(at=journal.now(), checkpoint=manifest.id, name=manifest.name, packed_bytes=size, by=by)
            )
            journal.sync()
            for file in manifest.files:
                store.delete(layout.file_key(manifest.run, manifest.name, file.name))
            done.append(Packed(manifest, manifest.size_bytes, size, len(index.bases)))
            progress(done[-1])
            base = Base(manifest.id, plain, index.depth)
        else:
            continue
        near = [base, *near][:_NEIGHBOURS] if base.depth < CHAIN else []
    return done, failures


def _pack(store: Store, manifest: Manifest, plain: PlainSource, near: Sequence[Base], level: int | None) -> Index:
    """Write the pack, and prove that it gives the files back."""
    index = packs.write_pack(store, manifest, plain, near, level)
    sources = {base.checkpoint: base.source for base in near}
    try:
        for image in packs.unpacked(packs.source_of(store, manifest.run, manifest.id, sources)):
            _compare(manifest, image.name, file_record(image))
    except (CorruptError, FormatError):
        store.delete(layout.pack_key(manifest.run, manifest.id))
        raise
    return index


def _compare(manifest: Manifest, name: str, found: FileRecord) -> None:
    if found != replace(manifest.file(name), shared=""):
        raise CorruptError(
            f"checkpoint {manifest.name} is damaged: the bytes of {name} do not match its digests; "
            "peakpoint audit --deep says where"
        )


def restore(
    store: Store,
    journal: Journal,
    manifests: Sequence[Manifest],
    *,
    by: str,
    progress: Callable[[Manifest], None] = lambda _: None,
) -> list[Manifest]:
    """Put the files of archived checkpoints back, bit for bit; the caller holds the run.

    Args:
        store: where.
        journal: receives a ``Restored`` for each.
        manifests: which, earliest first: each is unpacked with the help of the files of the ones before.
        by: who decided, for the record.
        progress: called with each that is done.

    Returns:
        Those that were archived.

    Raises:
        CorruptError: a pack is damaged; the checkpoint stays archived, and so do those after it.
        MissingExtraError: NumPy or zstandard is not installed.
        StoreError: the store refused; the checkpoint stays archived.
    """
    near: list[tuple[Manifest, Source]] = []
    done: list[Manifest] = []
    for manifest in manifests:
        if packs.archived(store, manifest.run, manifest.name) is None:
            continue
        _restore(store, manifest, near)
        journal.append(Restored(at=journal.now(), checkpoint=manifest.id, name=manifest.name, by=by))
        journal.sync()
        store.delete(layout.archived_key(manifest.run, manifest.name))
        near = [*near, (manifest, PlainSource(store, manifest))][-_NEIGHBOURS:]
        done.append(manifest)
        progress(manifest)
    return done


def _restore(store: Store, manifest: Manifest, near: Sequence[tuple[Manifest, Source]]) -> None:
    wanted = {file.name for file in manifest.files}
    sources = {other.id: source for other, source in near}
    images = packs.unpacked(packs.source_of(store, manifest.run, manifest.id, sources))
    lacking = wanted - {image.name for image in images}
    if lacking:
        raise CorruptError(f"the pack of {manifest.name} lacks {', '.join(sorted(lacking))}")
    for image in images:
        if image.name in wanted and not _share(store, manifest, image.name, [other for other, _ in near]):
            key = layout.file_key(manifest.run, manifest.name, image.name)
            try:
                _compare(manifest, image.name, put_file(store, key, image))
            except CorruptError:
                store.delete(key)
                raise


def _share(store: Store, manifest: Manifest, name: str, others: Sequence[Manifest]) -> bool:
    """Use the file of a checkpoint that has just been restored once more, where they had one in common."""
    file = manifest.file(name)
    for other in others:
        if any(replace(there, shared="") == replace(file, shared="") for there in other.files):
            source = layout.file_key(other.run, other.name, name)
            return store.link(source, layout.file_key(manifest.run, manifest.name, name))
    return False


def leftovers(store: Store, run: str, name: str) -> list[str]:
    """Keys of files of an archived checkpoint that are still, or again, where the manifest says."""
    try:
        record = packs.archived(store, run, name)
    except (CorruptError, FormatError):
        return []  # the checkpoint counts as damaged; nothing of it is touched
    if record is None:
        return []
    present = set(store.children(layout.checkpoint_prefix(run, name)))
    return [layout.file_key(run, name, file) for file in sorted(present & set(record.files))]


def needless(store: Store, run: str) -> list[str]:
    """Keys of packs that no archived checkpoint needs: what a crash, a removal or a restoration has left.

    When a record or a pack that is needed cannot be read, nobody can say what it needs, and nothing is returned.
    """
    there = {
        child.removesuffix(layout.PACK)
        for child in store.children(layout.archive_prefix(run))
        if child.endswith(layout.PACK)
    }
    if not there:
        return []
    try:
        names = [child.removesuffix("/") for child in store.children(layout.checkpoints_prefix(run))]
        records = [packs.archived(store, run, name) for name in names]
        needed: set[str] = set()
        new = {record.checkpoint for record in records if record is not None}
        while new:
            needed |= new
            new = {base for one in new & there for base in packs.read_index(store, run, one).bases} - needed
    except (CorruptError, FormatError):
        return []
    return [layout.pack_key(run, checkpoint) for checkpoint in sorted(there - needed)]
