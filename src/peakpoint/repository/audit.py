"""Audit: everything in a repository that should not be there, or is not as it was written.

Litter is what a crash leaves behind: harmless, and removed by ``clean``. Damage is bytes that changed: reported, never
touched. Foreign files are neither: Peakpoint did not write them and does not delete them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial

from peakpoint.errors import (
    ConflictError,
    CorruptError,
    FormatError,
    NotFoundError,
    StoreError,
)
from peakpoint.format import layout
from peakpoint.format.events import Event, Promoted
from peakpoint.format.manifest import MANIFEST, Manifest
from peakpoint.format.sealed import digest
from peakpoint.repository import aliases, archive, packs, reader, trash, validations
from peakpoint.repository import journal as journals
from peakpoint.repository.commit import sweep
from peakpoint.repository.findings import Audit, AuditFinding
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.refs import is_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run, check_run_record
from peakpoint.repository.trash import leftovers, records
from peakpoint.store import Store

__all__ = ["Audit", "AuditFinding", "audit", "clean", "clean_run"]

_OURS = re.compile(r"[A-Za-z0-9_.-]+(\+frozen)?\.safetensors")
_PACK = re.compile(r"[0-9a-f]{16}\.pack")
_LOCK_NOTE = b"{}"


def audit(
    repository: Repository,
    *,
    deep: bool = False,
    progress: Callable[[Manifest], None] = lambda _: None,
    clock: Clock = utc_now,
) -> Audit:
    """Look at everything, change nothing.

    Args:
        repository: what to look at.
        deep: compare every byte of every file with its digest, not only sizes.
        progress: called with each manifest when its files have been looked at.
        clock: tells the time.
    """
    result = Audit(deep=deep)
    store = repository.store
    unseen = _in_the_way(store, "", _TOP)
    look = partial(_outside_runs, store, deeper=not unseen)
    result.findings += [*unseen, *_lasting(look(), look)]
    if unseen:
        return result
    for run in [child.removesuffix("/") for child in store.children(layout.RUNS) if child.endswith("/")]:
        result.runs += 1
        now, busy = clock(), _at_work(store, run)
        shallow = partial(_run, store, run, Audit(deep=False), now, lambda _: None)
        findings = _lasting(_run(store, run, result, now, progress), shallow)
        result.findings += _heeding(busy or _at_work(store, run), run, findings)
    foreign = {finding.where for finding in result.of_kind("foreign")}
    result.findings = [
        finding for finding in result.findings if finding.kind != "litter" or finding.where not in foreign
    ]
    return result


def _in_the_way(store: Store, prefix: str, directories: Iterable[str]) -> list[AuditFinding]:
    """What stands in the place of directories that Peakpoint would have to go through."""
    foreign = store.foreign(prefix)
    keys = {f"{prefix}/{name}" if prefix else name: foreign[name] for name in directories if name in foreign}
    return [
        AuditFinding("damage", key, f"{what} that Peakpoint does not follow: not looked at")
        for key, what in keys.items()
    ]


def _foreign(store: Store, prefix: str) -> Iterator[AuditFinding]:
    """What is neither a file nor a directory."""
    yield from _named(prefix, store.foreign(prefix))


def _named(prefix: str, foreign: Mapping[str, str]) -> Iterator[AuditFinding]:
    for name, what in foreign.items():
        yield AuditFinding(
            "foreign", f"{prefix}/{name}" if prefix else name, f"{what}; not made by Peakpoint, left alone"
        )


def _lasting(findings: Iterable[AuditFinding], look_again: Callable[[], Iterable[AuditFinding]]) -> list[AuditFinding]:
    """Findings without what comes and goes while others work; of damage the first look is sure."""
    first = list(findings)
    again = set(look_again()) if any(finding.kind != "damage" for finding in first) else set()
    return [finding for finding in first if finding.kind == "damage" or finding in again]


def _heeding(busy: str | None, run: str, findings: list[AuditFinding]) -> list[AuditFinding]:
    """Findings without the unfinished work of who writes the run."""
    if busy is None:
        return findings
    where, what = layout.run_prefix(run), f"being written by {busy}; unfinished writes are not looked at"
    return [AuditFinding("busy", where, what), *(finding for finding in findings if finding.kind != "litter")]


def _at_work(store: Store, run: str) -> str | None:
    """Who changes a run at present: who holds it, or a command beside that, such as a removal by hand."""
    try:
        return store.holder(layout.writer_lock(run)) or ("another process" if journals.written(store, run) else None)
    except (FormatError, StoreError):
        return None  # the journal is none that anybody could be writing; it is named where it is read


def _outside_runs(store: Store, *, deeper: bool) -> Iterator[AuditFinding]:
    yield from _strays(store, "", _OF_A_REPOSITORY)
    if deeper:
        yield from _aliases(store)
        yield from _releases(store)
        yield from _strays(store, layout.RUNS, None)


def _strays(store: Store, prefix: str, known: set[str] | None) -> Iterator[AuditFinding]:
    for key in store.litter(prefix):
        yield AuditFinding("litter", key, "an unfinished write")
    foreign = store.foreign(prefix)
    yield from _named(prefix, foreign)
    for child in store.children(prefix):
        if child in foreign:
            continue
        if not prefix and _SET_ASIDE.fullmatch(child):
            yield AuditFinding("foreign", child, "a catalogue that was damaged and set aside; delete it when you will")
        elif (known is not None and child not in known) or (known is None and not child.endswith("/")):
            where = f"{prefix}/{child}" if prefix else child
            yield AuditFinding("foreign", where, "not written by Peakpoint; left alone")


def _run(
    store: Store, run: str, result: Audit, now: datetime, progress: Callable[[Manifest], None]
) -> Iterator[AuditFinding]:
    prefix = layout.run_prefix(run)
    yield from _strays(store, prefix, _OF_A_RUN)
    unseen = _in_the_way(store, prefix, _DIRECTORIES)
    yield from unseen
    if unseen:
        return
    yield from _record(store, run)
    yield from _packs(store, run)
    yield from _journal(store, run)
    shelf = reader.list_run(store, run)
    yield from _validations(store, run, shelf, deep=result.deep)
    for damaged in shelf.damaged:
        yield AuditFinding("damage", layout.checkpoint_prefix(run, damaged.name), str(damaged.error))
        yield from _foreign(store, layout.checkpoint_prefix(run, damaged.name))
    for name in shelf.without_manifest:
        yield from _foreign(store, layout.checkpoint_prefix(run, name))
        yield from _bare(store, run, name, now)
    for entry in trash.contents(store, run):
        yield from _files(store, entry.manifest, deep=result.deep)
    yield from _strays(store, layout.checkpoints_prefix(run), None)
    packed = packs.packed_bytes(store, run, shelf.manifests)
    for manifest in shelf.manifests:
        result.checkpoints += 1
        result.bytes += manifest.size_bytes
        prefix = layout.checkpoint_prefix(run, manifest.name)
        over = _over(store, manifest, packed, now)
        yield from over
        known = {MANIFEST, *(file.name for file in manifest.files), *(one.where.rpartition("/")[2] for one in over)}
        known |= {child for child in store.children(prefix) if layout.is_record(child)}
        known |= {file for record in records(store, run, manifest.name) for file in record.files}
        yield from _strays(store, prefix, known)
        yield from _files(store, manifest, deep=result.deep)
        progress(manifest)


def _journal(store: Store, run: str) -> Iterator[AuditFinding]:
    prefix = layout.journal_prefix(run)
    yield from _strays(store, prefix, set(journals.segments_of(store, run)))
    try:
        journal = journals.read(store, run)
    except FormatError as error:
        yield AuditFinding("damage", prefix, str(error))
        return
    for sentence in journal.damage:
        yield AuditFinding("damage", prefix, sentence)
    yield from _promotions(store, run, journal.events)


_INDEX = "catalogue.sqlite"  # with the log and the shared memory of SQLite, and one that was damaged
_OF_A_REPOSITORY = {
    layout.REPOSITORY,
    f"{layout.RUNS}/",
    _INDEX,
    f"{_INDEX}-wal",
    f"{_INDEX}-shm",
    f"{layout.ALIASES}/",
    f"{layout.RELEASES}/",
    layout.POLICY,
}
_SET_ASIDE = re.compile(r"catalogue\.damaged-[0-9a-f]{8}\.sqlite(-wal|-shm)?")
_TOP = (layout.RUNS, layout.ALIASES, layout.RELEASES)
_DIRECTORIES = ("journal", "checkpoints", "archive", "validations")  # of a run
_OF_A_RUN = {"run.json", "writer.lock", layout.ARCHIVED, *(f"{name}/" for name in _DIRECTORIES)}


_RELEASE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.json")


def _aliases(store: Store) -> Iterator[AuditFinding]:
    """What is wrong with aliases: their records, what they point at now, and what else is in their directories."""
    families = aliases.directories(store)
    yield from _strays(store, layout.ALIASES, {f"{name}/" for name in families})
    for family in families:
        inside = [name.rpartition("/")[2] + "/" for name in aliases.directories(store, family)]
        for name in (family, *aliases.directories(store, family)):
            numbers = aliases.numbers(store, name)
            keys = {
                key for number in numbers for key in (layout.alias_key(name, number), layout.told_key(name, number))
            }
            known = {key.rpartition("/")[2] for key in keys} | set(inside if name == family else ())
            yield from _strays(store, layout.alias_prefix(name), known)
            if numbers:
                yield from _alias(store, name)


def _alias(store: Store, name: str) -> Iterator[AuditFinding]:
    for sentence in aliases.history(store, name).damage:
        yield AuditFinding("damage", layout.alias_prefix(name), sentence)
    yield from _target(store, name)


def _target(store: Store, name: str) -> Iterator[AuditFinding]:
    """What is wrong with the checkpoint that an alias points at."""
    try:
        record = aliases.head(store, name)
    except (CorruptError, FormatError):
        return  # which has been said
    target = None if record is None else record.target
    if record is None or target is None:
        return
    try:
        found = digest(store.get(layout.manifest_key(target.run, target.name)))
    except NotFoundError:
        found = None
    except (FormatError, StoreError) as error:
        yield AuditFinding(
            "damage", layout.alias_key(name, record.number), f"{name} points at what is no file: {error}"
        )
        return
    if found != target.manifest:
        latest = aliases.head(store, name)
        if latest is not None and latest.number != record.number:
            yield from _target(store, name)  # it has moved on, and what it pointed at may go
            return
        what = "does not exist" if found is None else "has another manifest than when it was promoted"
        where = layout.alias_key(name, record.number)
        yield AuditFinding("damage", where, f"{name} points at {target.run}/{target.name}, a checkpoint that {what}")


def _promotions(store: Store, run: str, events: Sequence[Event]) -> Iterator[AuditFinding]:
    """Records of aliases that the journal knows otherwise: the newest has none after it that would miss it."""
    for event in events:
        if not isinstance(event, Promoted) or event.record is None or not is_alias(event.alias):
            continue
        where = layout.alias_key(event.alias, event.record)
        told = f"the journal of {run} tells of at {event.at:%Y-%m-%d %H:%M} UTC by {event.by}"
        try:
            if digest(store.get(where)) != event.digest:
                yield AuditFinding("damage", where, f"it is not the record that {told}: it was changed")
        except NotFoundError:
            yield AuditFinding("damage", where, f"the record that {told} is missing: somebody has taken it out")
        except FormatError as error:
            yield AuditFinding("damage", where, f"the record that {told} cannot be read: {error}")


def _releases(store: Store) -> Iterator[AuditFinding]:
    there = {child for child in store.children(layout.RELEASES) if _RELEASE.fullmatch(child)}
    yield from _strays(store, layout.RELEASES, there)


def _unheld(store: Store) -> list[str]:
    """Directories outside of runs, which nobody holds."""
    families = aliases.directories(store)
    names = [*families, *(name for family in families for name in aliases.directories(store, family))]
    return ["", layout.RUNS, layout.ALIASES, *map(layout.alias_prefix, names), layout.RELEASES]


def _packs(store: Store, run: str) -> Iterator[AuditFinding]:
    prefix = layout.archive_prefix(run)
    yield from _strays(store, prefix, {child for child in store.children(prefix) if _PACK.fullmatch(child)})
    for key in archive.needless(store, run):
        yield AuditFinding("litter", key, "of an archive, and no checkpoint needs it")
    try:
        packs.run_archive(store, run)
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", layout.archived_key(run), str(error))


def _validations(store: Store, run: str, shelf: reader.RunListing, *, deep: bool) -> Iterator[AuditFinding]:
    prefix = layout.validations_of(run)
    yield from _strays(store, prefix, None)
    for checkpoint in validations.checkpoints_with(store, run):
        # a validation that is being made holds its checkpoint as being read until its record is there
        mine = [one for one in shelf.manifests if one.id == checkpoint]
        unfinished = store.litter(layout.validations_prefix(run, checkpoint))
        read = partial(reader.being_read, store, mine)
        found = validations.survey(store, run, checkpoint, read, deep=deep)
        for key in () if found.busy else unfinished:
            yield AuditFinding("litter", key, "an unfinished write")
        for key, what in found.damage:
            yield AuditFinding("damage", key, what)
        for key in found.orphans:
            yield AuditFinding("litter", key, "predictions of a validation that was cut short")
        yield from _foreign(store, layout.validations_prefix(run, checkpoint))
        for key in found.foreign:
            yield AuditFinding("foreign", key, "not written by Peakpoint; left alone")


def _over(
    store: Store, manifest: Manifest, packed: Mapping[str, int], now: datetime, *, held: bool = False
) -> list[AuditFinding]:
    """What is in the directory of a checkpoint and belongs to it no more."""
    run, name = manifest.run, manifest.name
    found = [
        AuditFinding("litter", key, "a file of a part that was dropped") for key in leftovers(store, run, name, now)
    ]
    found += [
        AuditFinding("litter", key, "a file of an archived run, which is in its pack")
        for key in archive.leftovers(store, manifest, packed)
    ]
    if store.size(layout.trashed_key(run, name)) is not None and not _is_being_removed(store, run, name, held=held):
        found.append(
            AuditFinding("litter", layout.trashed_key(run, name), "the record of a removal that was cut short")
        )
    return found


def _is_being_removed(store: Store, run: str, name: str, *, held: bool) -> bool:
    """Whether a removal by hand, which holds nothing, may be between its record in the trash and the manifest."""
    try:
        return Run(store, run).is_being_removed(reader.read_manifest(store, run, name), held=held)
    except NotFoundError:
        return True


def _record(store: Store, run: str) -> Iterator[AuditFinding]:
    key = layout.run_record(run)
    if store.size(key) is None:
        # a crash between the run's directory and its record; the next writer of that run completes it
        if reader.list_run(store, run).manifests and store.size(key) is None:  # which came before the first checkpoint
            yield AuditFinding("damage", key, "the run's record is missing although it has checkpoints")
        return
    try:
        check_run_record(store, run)
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", key, str(error))


def _bare(store: Store, run: str, name: str, now: datetime) -> Iterator[AuditFinding]:
    prefix = layout.checkpoint_prefix(run, name)
    try:
        record = trash.read(store, run, name)
        if record is not None and record.until > now:
            record.decoded()
            return
    except (CorruptError, FormatError) as error:
        yield AuditFinding("damage", prefix, f"it was in the trash and cannot be brought back: {error}")
        return
    if record is None:
        yield AuditFinding("litter", prefix, "a directory without a manifest: a save or a removal that was cut short")
    else:
        yield AuditFinding(
            "litter", prefix, f"in the trash, and its time was over at {record.until:%Y-%m-%d %H:%M} UTC"
        )
    foreign = store.foreign(prefix)
    for child in store.children(prefix):
        if not _is_ours(child) and child not in foreign:
            yield AuditFinding("foreign", f"{prefix}/{child}", "not written by Peakpoint; left alone")


def _is_ours(child: str) -> bool:
    return child == layout.STATE or layout.is_record(child) or _OURS.fullmatch(child) is not None


def _files(store: Store, manifest: Manifest, *, deep: bool) -> Iterator[AuditFinding]:
    for file in manifest.files:
        try:
            if deep:
                reader.read(store, manifest, file)
            else:
                reader.check_size(store, manifest, file)
        except (CorruptError, FormatError) as error:
            yield AuditFinding("damage", layout.file_key(manifest.run, manifest.name, file.name), str(error))
        except NotFoundError:  # removed meanwhile
            return


def clean_run(store: Store, run: str, now: datetime) -> list[AuditFinding]:
    """Remove the litter of one run, and what has been in the trash for long enough; the caller holds the run.

    Returns:
        What was removed.
    """
    removed: list[AuditFinding] = []
    shelf = reader.list_run(store, run)
    for name in shelf.without_manifest:
        found = list(_bare(store, run, name, now))
        if found and found[0].kind == "litter":
            ours = [child for child in store.children(layout.checkpoint_prefix(run, name)) if _is_ours(child)]
            sweep(store, run, name, ours)
            removed += found[:1]
    packed = packs.packed_bytes(store, run, shelf.manifests)
    over = [finding for manifest in shelf.manifests for finding in _over(store, manifest, packed, now, held=True)]
    over += [finding for finding in _validations(store, run, shelf, deep=False) if finding.kind == "litter"]
    over += [
        AuditFinding("litter", key, "of an archive, and no checkpoint needs it") for key in archive.needless(store, run)
    ]
    for finding in over:
        if store.size(finding.where) is not None:  # what has such a name and is no file stays
            store.delete(finding.where)
            removed.append(finding)
    prefixes = [layout.run_prefix(run), layout.checkpoints_prefix(run), layout.archive_prefix(run)]
    prefixes += [layout.checkpoint_prefix(run, manifest.name) for manifest in shelf.manifests]
    for prefix in prefixes:
        for key in store.litter(prefix):
            store.delete(key)
            removed.append(AuditFinding("litter", key, "an unfinished write"))
    if "archive/" in store.children(layout.run_prefix(run)) and not store.children(layout.archive_prefix(run)):
        store.prune(layout.archive_prefix(run))
    return removed


def clean(repository: Repository, *, clock: Clock = utc_now) -> list[AuditFinding]:
    """Remove all litter, but for the runs that are being written.

    Args:
        repository: where.
        clock: tells the time.

    Returns:
        What was removed.
    """
    store = repository.store
    removed: list[AuditFinding] = []
    if _in_the_way(store, "", _TOP):
        return removed
    for prefix in _unheld(store):
        for key in store.litter(prefix):
            store.delete(key)
            removed.append(AuditFinding("litter", key, "an unfinished write"))
    for run in [child.removesuffix("/") for child in store.children(layout.RUNS) if child.endswith("/")]:
        if _in_the_way(store, layout.run_prefix(run), _DIRECTORIES):
            continue
        try:
            hold = store.hold(layout.writer_lock(run), _LOCK_NOTE)
        except (ConflictError, FormatError):  # held by somebody, or what cannot be held, which the audit names
            continue
        try:
            removed += clean_run(store, run, clock())
        finally:
            hold.release()
    return removed
