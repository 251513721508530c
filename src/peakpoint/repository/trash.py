"""Records of what was removed from a run: checkpoints in the trash, and dropped parts.

The record of a checkpoint in the trash, ``trashed.json`` beside its manifest, holds the manifest's bytes and the time
until which the files stay. Without its manifest the checkpoint does not exist: no reader, rule or resume sees it. It is
restored by creating the manifest again from the record.

Parts that no rule claims, such as the optimizer of a best model, are dropped permanently; only whole checkpoints are
put into the trash. The records ``dropped-1.json``, ``dropped-2.json``, ... beside the manifest name the dropped parts.
Readers take manifest and records together.

``peakpoint.repository.removal`` writes these records, and says in which order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import MANIFEST, Manifest, decode_manifest, without_parts
from peakpoint.format.members import Name, Time
from peakpoint.format.sealed import decode_record
from peakpoint.repository.run_names import is_name_of
from peakpoint.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalRecord:
    """The record of what was removed.

    Attributes:
        why: one sentence.
        by: who decided.
        until: the files stay until then, and can be restored; None when they were deleted at once.
    """

    at: Time
    why: str
    by: str
    until: Time | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrashedCheckpoint(RemovalRecord):
    """A removed checkpoint that can be restored.

    Attributes:
        manifest: the bytes of its manifest, as text.
    """

    manifest: str
    until: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedParts(RemovalRecord):
    """Parts that were removed from a checkpoint; earlier code kept their files for a while, ``until`` a time.

    Attributes:
        files: the files that held the tensors of the parts.
        key: of the record.
    """

    parts: tuple[str, ...]
    files: tuple[Name, ...]
    key: str = ""


@dataclass(frozen=True, slots=True)
class TrashEntry:
    """A checkpoint in the trash.

    Attributes:
        manifest: without the parts that had been dropped.
        record: until when the files stay, why and by whom the checkpoint was removed.
    """

    manifest: Manifest
    record: TrashedCheckpoint


def read_trashed(store: Store, run: str, name: str) -> TrashedCheckpoint | None:
    """Read the record of a checkpoint in the trash; None when it is not there.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
    """
    key = layout.trashed_key(run, name)
    try:
        return decode_record(TrashedCheckpoint, store.get(key), where=key)
    except NotFoundError:
        return None


def trashed_manifest(store: Store, run: str, name: str, record: TrashedCheckpoint) -> Manifest:
    """Decode the manifest in the record of a checkpoint in the trash.

    Raises:
        CorruptError: it is damaged, or that of another directory.
        FormatError: a newer release wrote it.
    """
    manifest = decode_manifest(record.manifest.encode())
    if manifest.name != name or not is_name_of(store, run, manifest.run):
        where = layout.trashed_key(run, name)
        raise CorruptError(f"{where} was moved: it is that of {manifest.run}/{manifest.name}")
    return manifest if manifest.run == run else replace(manifest, run=run)


def contents(store: Store, run: str) -> list[TrashEntry]:
    """Return the trash of a run, the first to be deleted first; damaged records are left out (audit names them)."""
    entries = []
    for child in store.children(layout.checkpoints_prefix(run)):
        name = child.removesuffix("/")
        if name == child or store.size(layout.manifest_key(run, name)) is not None:
            continue
        try:
            record = read_trashed(store, run, name)
            if record is not None:
                manifest = trashed_manifest(store, run, name, record)
                manifest = without_dropped(manifest, list(dropped_parts(store, run, name)))
                entries.append(TrashEntry(manifest, record))
        except (CorruptError, FormatError):
            continue
    return sorted(entries, key=lambda entry: (entry.record.until, entry.manifest.sequence))


def dropped_parts(store: Store, run: str, name: str) -> Iterator[DroppedParts]:
    """Yield the records of dropped parts in the directory of a checkpoint.

    Raises:
        CorruptError: one is damaged.
        FormatError: a newer release wrote it.
    """
    prefix = layout.checkpoint_prefix(run, name)
    for child in store.children(prefix):
        if layout.is_dropped(child):
            record = decode_record(DroppedParts, store.get(f"{prefix}/{child}"), where=child)
            if any(file == MANIFEST or layout.is_record(file) for file in record.files):
                raise CorruptError(f"{child} names a record of Peakpoint - at `$.files`; restore it from a backup")
            yield replace(record, key=f"{prefix}/{child}")


def without_dropped(manifest: Manifest, dropped: Sequence[DroppedParts]) -> Manifest:
    """Return a manifest without the dropped parts."""
    return without_parts(manifest, {part for record in dropped for part in record.parts}) if dropped else manifest


def files_of_dropped_parts(store: Store, run: str, name: str, now: datetime) -> list[str]:
    """Return the keys of files of dropped parts that still exist and can no longer be restored."""
    present = set(store.children(layout.checkpoint_prefix(run, name)))
    try:
        dropped = list(dropped_parts(store, run, name))
    except (CorruptError, FormatError):
        return []  # the checkpoint counts as damaged; nothing of it is touched
    files = {file for record in dropped if record.until is None or record.until <= now for file in record.files}
    return [layout.file_key(run, name, file) for file in sorted(files & present)]
