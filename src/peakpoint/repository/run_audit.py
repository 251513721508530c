"""The audit of one run: what does not belong there, what is not as it was written, and the deletion of the former."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial

from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Event, Promoted
from peakpoint.format.manifest import MANIFEST, Manifest
from peakpoint.format.sealed import digest
from peakpoint.format.shards import stored_tensors
from peakpoint.repository import archive, lost, packs, reader, remains, trash, validations
from peakpoint.repository import journal as journals
from peakpoint.repository.commit import sweep
from peakpoint.repository.findings import Audit, AuditFinding
from peakpoint.repository.refs import is_alias
from peakpoint.repository.run import Run, read_run_record
from peakpoint.repository.run_names import former_names
from peakpoint.store import Store

DIRECTORIES = ("journal", "checkpoints", "archive", "validations")
_OF_A_RUN = {
    "run.json",
    "renamed.json",
    "removed.json",
    "writer.lock",
    layout.ARCHIVED,
    *(f"{name}/" for name in DIRECTORIES),
}
_TENSOR_FILE = re.compile(r"[A-Za-z0-9_.-]+(\+frozen)?(\+rank[0-9]+)?\.safetensors")
_PACK = re.compile(r"[0-9a-f]{16}\.pack")


def blocked_directories(store: Store, prefix: str, names: Iterable[str]) -> list[AuditFinding]:
    """Find what stands in the place of directories that Peakpoint would have to go through."""
    foreign = store.foreign(prefix)
    return [
        AuditFinding("damage", _key(prefix, name), f"{foreign[name]} that Peakpoint does not follow: not checked")
        for name in names
        if name in foreign
    ]


def _key(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def foreign_objects(store: Store, prefix: str) -> list[AuditFinding]:
    """Find what is neither a file nor a directory."""
    return [
        AuditFinding("foreign", _key(prefix, name), f"{what}; not written by Peakpoint, and left alone")
        for name, what in store.foreign(prefix).items()
    ]


def unfinished_writes(store: Store, prefix: str) -> list[AuditFinding]:
    """Find temporary files of writes that were interrupted, or are under way."""
    return [AuditFinding("litter", key, "an unfinished write") for key in store.litter(prefix)]


def strays(store: Store, prefix: str, expected: set[str] | None) -> Iterator[AuditFinding]:
    """Find what does not belong into a directory; with ``expected`` None only subdirectories do."""
    yield from unfinished_writes(store, prefix)
    objects = foreign_objects(store, prefix)
    yield from objects
    keys = {finding.where for finding in objects}
    for child in store.children(prefix):
        belongs = child.endswith("/") if expected is None else child in expected
        if not belongs and _key(prefix, child) not in keys:
            yield _stray(prefix, child)


def _stray(prefix: str, child: str) -> AuditFinding:
    return AuditFinding("foreign", _key(prefix, child), "not written by Peakpoint, and left alone")


def until_refused(store: Store, findings: Iterable[AuditFinding], where: str) -> Iterator[AuditFinding]:
    """Yield findings until something cannot be read, and then that, so that it hides nothing else.

    Args:
        store: any store.
        findings: of one thing.
        where: its key; what was removed meanwhile is passed over.
    """
    try:
        yield from findings
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", where, f"not checked to the end: {error}")
    except (NotFoundError, StoreError) as error:
        if isinstance(error, StoreError) or store.children(where):
            yield AuditFinding("unread", where, f"not checked to the end: {error}")


def findings_of_run(
    store: Store, run: str, audit: Audit, now: datetime, progress: Callable[[Manifest], None]
) -> Iterator[AuditFinding]:
    """Audit one run.

    Args:
        store: holds the run.
        run: its name.
        audit: receives the numbers of checkpoints and bytes, and says whether every byte is compared.
        now: when the trash of this time is due for deletion.
        progress: called with each manifest when its files have been checked.
    """
    prefix = layout.run_prefix(run)
    yield from strays(store, prefix, _OF_A_RUN)
    blocked = blocked_directories(store, prefix, DIRECTORIES)
    yield from blocked
    if blocked:
        return
    if remains.are_remains(store, run):
        yield _remains(run)
        return
    checkpoints = partial(_checkpoints, audit=audit, now=now, progress=progress)
    for look in (_run_record, _archive, _journal, partial(_validations_of_run, deep=audit.deep), checkpoints):
        yield from until_refused(store, look(store, run), prefix)


def _validations_of_run(store: Store, run: str, *, deep: bool) -> Iterator[AuditFinding]:
    return _validations(store, run, reader.list_run(store, run), deep=deep)


def _checkpoints(
    store: Store, run: str, *, audit: Audit, now: datetime, progress: Callable[[Manifest], None]
) -> Iterator[AuditFinding]:
    listing = reader.list_run(store, run)
    damaged = lost.damaged_checkpoints(store, run, listing)
    links = store.foreign(layout.checkpoints_prefix(run))
    names = {manifest.name for manifest in listing.manifests}
    for damage in damaged:
        prefix = layout.checkpoint_prefix(run, damage.name)
        # of a name that another checkpoint has now, only the journal tells
        yield AuditFinding("damage", layout.journal_prefix(run) if damage.name in names else prefix, str(damage.error))
        if damage.name not in links and damage.name not in names:
            yield from foreign_objects(store, prefix)
    for name in _unfinished(listing, damaged):
        yield from foreign_objects(store, layout.checkpoint_prefix(run, name))
        yield from _without_manifest(store, run, name, now)
    for entry in trash.contents(store, run):
        yield from _files(store, entry.manifest, deep=audit.deep)
    yield from strays(store, layout.checkpoints_prefix(run), None)
    packed = packs.packed_bytes(store, run, listing.manifests)
    for manifest in listing.manifests:
        audit.checkpoints += 1
        audit.bytes += manifest.size_bytes
        findings = _checkpoint(store, manifest, packed, now, deep=audit.deep)
        yield from until_refused(store, findings, layout.checkpoint_prefix(run, manifest.name))
        progress(manifest)


def _unfinished(listing: reader.RunListing, damaged: Iterable[reader.Damaged]) -> list[str]:
    """Return the directories of incomplete saves and removals, and those in the trash."""
    names = {damage.name for damage in damaged}
    return [name for name in listing.without_manifest if name not in names]


def _remains(run: str) -> AuditFinding:
    return AuditFinding("litter", layout.run_prefix(run), "what an interrupted removal of the whole run has left")


def _run_record(store: Store, run: str) -> Iterator[AuditFinding]:
    try:
        former_names(store, run)
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", layout.renamed_key(run), str(error))
    key = layout.run_record(run)
    if store.size(key) is None:
        # a crash between the run's directory and its record; the next writer of that run completes it
        if reader.list_run(store, run).manifests and store.size(key) is None:  # which came before the first checkpoint
            yield AuditFinding("damage", key, "the run's record is missing although it has checkpoints")
        return
    try:
        read_run_record(store, run)
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", key, str(error))


def _archive(store: Store, run: str) -> Iterator[AuditFinding]:
    prefix = layout.archive_prefix(run)
    yield from strays(store, prefix, {child for child in store.children(prefix) if _PACK.fullmatch(child)})
    yield from _superfluous_packs(store, run)
    try:
        packs.run_archive(store, run)
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", layout.archived_key(run), str(error))


def _superfluous_packs(store: Store, run: str) -> list[AuditFinding]:
    keys = archive.superfluous_packs(store, run)
    return [AuditFinding("litter", key, "a file of an archive that no checkpoint needs") for key in keys]


def _journal(store: Store, run: str) -> Iterator[AuditFinding]:
    prefix = layout.journal_prefix(run)
    yield from strays(store, prefix, set(journals.segments_of(store, run)))
    try:
        journal = journals.read(store, run)
    except FormatError as error:
        yield AuditFinding("damage", prefix, str(error))
        return
    for sentence in journal.damage:
        yield AuditFinding("damage", prefix, sentence)
    if absent := journals.gap(store, run):
        yield AuditFinding("damage", prefix, f"the segment {absent} is missing")
    if not journals.segments_of(store, run) and reader.list_run(store, run).manifests:
        yield AuditFinding("damage", prefix, "the journal is missing although the run has checkpoints")
    yield from _promotions(store, run, journal.events)


def _promotions(store: Store, run: str, events: Sequence[Event]) -> Iterator[AuditFinding]:
    """Compare records of aliases with the journal: no later record would show that the newest was changed."""
    for event in events:
        if not isinstance(event, Promoted) or event.record is None or not is_alias(event.alias):
            continue
        key = layout.alias_key(event.alias, event.record)
        promotion = f"the promotion at {event.at:%Y-%m-%d %H:%M} UTC by {event.by} (journal of {run})"
        try:
            if digest(store.get(key)) != event.digest:
                yield AuditFinding("damage", key, f"changed since {promotion}")
        except NotFoundError:
            yield AuditFinding("damage", key, f"the record of {promotion} is missing")
        except FormatError as error:
            yield AuditFinding("damage", key, f"the record of {promotion} cannot be read: {error}")
        except StoreError:
            continue  # the audit of the alias says so


def _validations(store: Store, run: str, listing: reader.RunListing, *, deep: bool) -> Iterator[AuditFinding]:
    yield from strays(store, layout.validations_of(run), None)
    for checkpoint in validations.checkpoints_with(store, run):
        # a running validation holds its checkpoint as being read until its record exists
        manifests = [manifest for manifest in listing.manifests if manifest.id == checkpoint]
        prefix = layout.validations_prefix(run, checkpoint)
        unfinished = unfinished_writes(store, prefix)
        being_read = partial(reader.being_read, store, manifests)
        survey = validations.survey(store, run, checkpoint, being_read, deep=deep)
        yield from () if survey.busy else unfinished
        for key, what in survey.damage:
            yield AuditFinding("damage", key, what)
        for key in survey.orphans:
            yield AuditFinding("litter", key, "predictions of an interrupted validation")
        yield from foreign_objects(store, prefix)
        for key in survey.foreign:
            yield _stray("", key)


def _without_manifest(store: Store, run: str, name: str, now: datetime) -> Iterator[AuditFinding]:
    prefix = layout.checkpoint_prefix(run, name)
    try:
        record = trash.read_trashed(store, run, name)
        if record is not None and record.until > now:
            trash.trashed_manifest(store, run, name, record)
            return
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", prefix, f"in the trash, and cannot be restored: {error}")
        return
    if record is None:
        yield AuditFinding("litter", prefix, "a directory without a manifest: an incomplete save or removal")
    else:
        yield AuditFinding(
            "litter", prefix, f"in the trash, and could be restored until {record.until:%Y-%m-%d %H:%M} UTC"
        )
    foreign = store.foreign(prefix)
    for child in store.children(prefix):
        if not _is_of_checkpoint(child) and child not in foreign:
            yield _stray(prefix, child)


def _is_of_checkpoint(child: str) -> bool:
    return child == layout.STATE or layout.is_record(child) or _TENSOR_FILE.fullmatch(child) is not None


def _checkpoint(
    store: Store, manifest: Manifest, packed: Mapping[str, int], now: datetime, *, deep: bool
) -> Iterator[AuditFinding]:
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    superfluous = _superfluous(store, manifest, packed, now)
    yield from superfluous
    expected = {MANIFEST, *(file.name for file in manifest.files)}
    expected |= {finding.where.rpartition("/")[2] for finding in superfluous}
    expected |= {child for child in store.children(prefix) if layout.is_record(child)}
    expected |= {file for record in trash.dropped_parts(store, manifest.run, manifest.name) for file in record.files}
    yield from strays(store, prefix, expected)
    yield from _files(store, manifest, deep=deep)


def _superfluous(
    store: Store, manifest: Manifest, packed: Mapping[str, int], now: datetime, *, held: bool = False
) -> list[AuditFinding]:
    """Find what is in the directory of a checkpoint and does not belong to it any more."""
    run, name = manifest.run, manifest.name
    dropped = trash.files_of_dropped_parts(store, run, name, now)
    findings = [AuditFinding("litter", key, "a file of a part that was dropped") for key in dropped]
    unpacked = archive.superfluous_files(store, manifest, packed)
    findings += [
        AuditFinding("litter", key, "a file of an archived run, which is also in its pack") for key in unpacked
    ]
    key = layout.trashed_key(run, name)
    if store.size(key) is not None and not _is_being_removed(store, run, name, held=held):
        findings.append(AuditFinding("litter", key, "the record of an interrupted removal"))
    return findings


def _is_being_removed(store: Store, run: str, name: str, *, held: bool) -> bool:
    """Tell whether a removal by hand, which holds nothing, may be between its record in the trash and the manifest."""
    try:
        return Run(store, run).is_being_removed(reader.read_manifest(store, run, name), held=held)
    except NotFoundError:
        return True


def _files(store: Store, manifest: Manifest, *, deep: bool) -> Iterator[AuditFinding]:
    check = reader.read if deep else reader.check_size
    for file in manifest.files:
        try:
            check(store, manifest, file)
        except (CorruptError, FormatError) as error:
            yield AuditFinding("damage", layout.file_key(manifest.run, manifest.name, file.name), str(error))
        except NotFoundError:  # removed meanwhile
            return
    for part in manifest.parts if any(file.offsets for file in manifest.files) else ():
        try:
            stored_tensors(manifest, part)
        except CorruptError as error:
            yield AuditFinding("damage", layout.manifest_key(manifest.run, manifest.name), str(error))


def writer(store: Store, run: str) -> str | None:
    """Return who changes a run at present: who holds it, or a command beside that, such as a removal by hand."""
    try:
        return store.holder(layout.writer_lock(run)) or (
            "another process" if journals.live_segments(store, run) else None
        )
    except (FormatError, StoreError):
        return None  # nobody could be writing such a journal; it is found where it is read


def clean_run(store: Store, run: str, now: datetime) -> list[AuditFinding]:
    """Delete incomplete saves of a run, and what has been in the trash for long enough; the caller holds the run.

    Returns:
        What was deleted.
    """
    if remains.are_remains(store, run):
        remains.delete_remains(store, run)
        return [_remains(run)]
    listing = reader.list_run(store, run)
    damaged = lost.damaged_checkpoints(store, run, listing, exclusive=True)
    deleted = _delete_without_manifest(store, run, _unfinished(listing, damaged), now)
    packed = packs.packed_bytes(store, run, listing.manifests)
    superfluous = [
        *(
            finding
            for manifest in listing.manifests
            for finding in _superfluous(store, manifest, packed, now, held=True)
        ),
        *(finding for finding in _validations(store, run, listing, deep=False) if finding.kind == "litter"),
        *_superfluous_packs(store, run),
    ]
    # what has such a name and is no file stays
    deleted += delete(store, [finding for finding in superfluous if store.size(finding.where) is not None])
    prefixes = [layout.run_prefix(run), layout.checkpoints_prefix(run), layout.archive_prefix(run)]
    prefixes += [layout.checkpoint_prefix(run, manifest.name) for manifest in listing.manifests]
    for prefix in prefixes:
        deleted += delete(store, unfinished_writes(store, prefix))
    if "archive/" in store.children(layout.run_prefix(run)) and not store.children(layout.archive_prefix(run)):
        store.prune(layout.archive_prefix(run))
    return deleted


def _delete_without_manifest(store: Store, run: str, names: Iterable[str], now: datetime) -> list[AuditFinding]:
    deleted = []
    for name in names:
        findings = list(_without_manifest(store, run, name, now))
        if findings and findings[0].kind == "litter":
            delete_directory(store, run, name)
            deleted.append(findings[0])
    return deleted


def delete_directory(store: Store, run: str, name: str) -> None:
    """Delete the directory of a checkpoint, its manifest first; what Peakpoint has not written stays."""
    store.delete(layout.manifest_key(run, name))
    children = store.children(layout.checkpoint_prefix(run, name))
    sweep(store, run, name, [child for child in children if _is_of_checkpoint(child)])


def delete(store: Store, findings: Iterable[AuditFinding]) -> list[AuditFinding]:
    """Delete the files that were found, and return the findings."""
    deleted = []
    for finding in findings:
        store.delete(finding.where)
        deleted.append(finding)
    return deleted
