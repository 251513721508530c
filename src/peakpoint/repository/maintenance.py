"""Maintenance of runs that are not being trained: apply rules, remove, undo, archive, restore.

Every function but ``remove`` holds the run while it works, so that it and a training cannot interfere. Each records in
the journal who did what, and can be repeated when it was interrupted.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

from peakpoint.errors import ConflictError, CorruptError, Error, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Changing, Closed, Opened, Pinned, Removed, Undone
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import did_you_mean
from peakpoint.repository import archive as archives
from peakpoint.repository import packs, reader, removal, trash
from peakpoint.repository.alias_holders import newest_of_all
from peakpoint.repository.alias_protection import protected_by_aliases
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.archive import PackedCheckpoint
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.reader import Damaged
from peakpoint.repository.run import Run
from peakpoint.repository.run_audit import clean_run, delete_directory
from peakpoint.repository.trash import TrashEntry
from peakpoint.rules import Rule
from peakpoint.rules.history import RunReplay
from peakpoint.rules.retention import Removal, RetentionPlan
from peakpoint.store import holder_note

_NO_ID = "0" * 16  # of a checkpoint whose manifest cannot be read, and that the journal does not know
PERMANENTLY = timedelta(0)
"""Time to undo a removal: none, and the space is free at once."""


@contextmanager
def writing(run: Run, why: str, clock: Clock = utc_now) -> Iterator[Journal]:
    """Hold a run and its journal, and delete incomplete saves at the end.

    Args:
        run: to be held.
        why: the purpose, for the journal.
        clock: gives the times of events.

    Raises:
        ConflictError: somebody is writing the run; the message says who.
    """
    hold = run.store.hold(layout.writer_lock(run.name), holder_note(clock()))
    try:
        with contextlib.closing(Journal(run.store, run.name, clock)) as journal:
            yield journal
            clean_run(run.store, run.name, clock())
            journal.record([Closed(at=clock(), why=why)], later=True)
    finally:
        hold.release()


def apply_plan(
    run: Run,
    plan: RetentionPlan,
    rules: Sequence[Rule] | None,
    *,
    undo_for: timedelta = PERMANENTLY,
    clock: Clock = utc_now,
) -> list[str]:
    """Carry out a plan of retention.

    Args:
        run: the run of the plan.
        plan: the checkpoints and parts to remove.
        rules: put these in force; None leaves those that are.
        undo_for: how long a removed checkpoint can be restored; 0 frees the space at once.
        clock: gives the times of events.

    Returns:
        One sentence for each removal that failed.

    Raises:
        ConflictError: somebody is writing the run, or it is archived.
    """
    with writing(run, "peakpoint keep", clock) as journal:
        packs.check_not_archived(run.store, run.name, run.manifests())
        if rules is not None:
            texts = tuple(rule.text for rule in rules)
            opened = Opened(at=clock(), by={"user": present_user()}, rules=texts)
            journal.record([opened], later=undo_for <= PERMANENTLY)  # a removal may have to free the space first

        def protected() -> dict[str, str]:
            events = run.events()
            return {**annotations_of(events).pinned, **run.aliased(run.manifests(), events)}

        until, by = _until(clock(), undo_for), present_user()
        failures = removal.remove(run.store, journal, plan.remove, by=by, protected=protected, until=until)
        failures |= removal.remove(run.store, journal, plan.drop, by=by, protected=protected)
        return list(failures.values())


def _until(now: datetime, undo_for: timedelta) -> datetime | None:
    return now + undo_for if undo_for > PERMANENTLY else None


def remove(
    run: Run, manifests: Sequence[Manifest], why: str, *, undo_for: timedelta = PERMANENTLY, clock: Clock = utc_now
) -> list[str]:
    """Remove checkpoints, whatever rule claims them; works beside a training, which forgets them at its next save.

    A checkpoint that an alias points at, or did lately, is kept: a rollback may need it. An archived run is removed as
    a whole, and permanently; damaged checkpoints of it may be removed alone.

    Args:
        run: the run of the checkpoints.
        manifests: the checkpoints.
        why: the reason, for the journal.
        undo_for: how long they can be restored; 0 frees the space at once.
        clock: gives the times of events.

    Returns:
        One sentence for each removal that failed.

    Raises:
        ConflictError: the run is archived, and the removal is not a permanent one of all of it.
    """
    packed = packs.packed_bytes(run.store, run.name, manifests)
    if not packed:
        return remove_unpacked(run, manifests, why, undo_for, clock)
    remaining = {manifest.id for manifest in run.manifests()} - {manifest.id for manifest in manifests}
    if remaining and any(manifest.id in packed and _damage(run, manifest) is None for manifest in manifests):
        packs.check_not_archived(run.store, run.name, manifests)
    if undo_for > PERMANENTLY:
        raise ConflictError(
            f"run {run.name!r} is archived, so its checkpoints can only be removed permanently: add --undo-for 0"
        )
    with writing(run, "peakpoint rm", clock):  # nothing trains it, and the packs are deleted with it
        return remove_unpacked(run, manifests, why, undo_for, clock)


def _damage(run: Run, manifest: Manifest) -> CorruptError | None:
    """Compare every byte of a checkpoint with its digest; None when all match."""
    try:
        for file in manifest.files:
            reader.read(run.store, manifest, file)
    except CorruptError as error:
        return error
    return None


def remove_unpacked(run: Run, manifests: Sequence[Manifest], why: str, undo_for: timedelta, clock: Clock) -> list[str]:
    """Remove checkpoints of a run that is not archived, or that the caller holds; see ``remove``."""
    with contextlib.closing(Journal(run.store, run.name, clock)) as journal:
        in_use = dict.fromkeys(reader.being_read(run.store, manifests), "somebody is reading it; try again later")
        in_use = {**run.aliased(manifests, run.events()), **in_use}
        until = _until(clock(), undo_for)

        def protected() -> Collection[str]:
            if until is not None and run.store.size(layout.archived_key(run.name)) is not None:
                return {manifest.id for manifest in manifests}  # archived since: its files go to no trash
            return run.aliased(manifests, run.events())

        removals = [Removal(manifest, why) for manifest in manifests if manifest.id not in in_use]
        failures = [
            f"{manifest.name} was not removed: {in_use[manifest.id]}" for manifest in manifests if manifest.id in in_use
        ]
        failed = removal.remove(run.store, journal, removals, by=present_user(), protected=protected, until=until)
        journal.record([Closed(at=clock(), why="peakpoint rm")], later=True)
        return [*failures, *failed.values()]


def remove_damaged(run: Run, damaged: Sequence[Damaged], why: str, *, clock: Clock = utc_now) -> list[str]:
    """Remove checkpoints whose manifest cannot be read, permanently, and record that lost ones are gone.

    A checkpoint that an alias points at is kept.

    Args:
        run: the run of the checkpoints.
        damaged: as ``damaged_checkpoints`` finds them.
        why: the reason, for the journal.
        clock: gives the times of events.

    Returns:
        One sentence for each removal that failed.
    """
    events = run.events()
    replay, promoting = RunReplay(events), annotations_of(events).promoting.values()
    targets = [record.target for record in newest_of_all(run.store)[0].values() if record.target is not None]
    aliased = {target.name: "an alias points at it" for target in targets if target.run == run.name}
    failures: list[str] = []
    with contextlib.closing(Journal(run.store, run.name, clock)) as journal:
        for damage in damaged:
            moment = None if damage.saved is None else replay.moment(damage.saved.checkpoint)
            checkpoint = _NO_ID if moment is None else moment.id
            protected = protected_by_aliases(run.store, [checkpoint], promoting).get(checkpoint)
            if reason := protected or aliased.get(damage.name):
                failures.append(f"{damage.name} was not removed: {reason}")
                continue
            removed = Removed(
                at=clock(),
                checkpoint=checkpoint,
                name=damage.name,
                step=0 if moment is None else moment.step,
                epoch=None if moment is None else moment.epoch,
                reason=why,
                by=present_user(),
            )
            journal.record([removed], later=True)
            if not isinstance(reader.inspect(run.store, run.name, damage.name), reader.FoundCheckpoint):
                delete_directory(run.store, run.name, damage.name)
        journal.record([Closed(at=clock(), why="peakpoint rm")], later=True)
    return failures


def in_trash(run: Run, *, clock: Clock = utc_now) -> list[TrashEntry]:
    """Return what can be restored, the first to be deleted first."""
    now = clock()
    return [entry for entry in trash.contents(run.store, run.name) if entry.record.until > now]


def undo(run: Run, names: Sequence[str], *, clock: Clock = utc_now) -> list[Manifest]:
    """Restore removed checkpoints, bit for bit, and pin them: rules would remove them again.

    Args:
        run: the run of the checkpoints.
        names: names or ids of checkpoints, or the beginning of an id.
        clock: gives the times of events.

    Returns:
        The restored checkpoints, every byte compared with its digest.

    Raises:
        NotFoundError: something of that name is not in the trash; nothing was restored.
        CorruptError: something is damaged; nothing was restored.
        ConflictError: somebody is writing the run, or it is archived.
    """
    with writing(run, "peakpoint undo", clock) as journal:
        packs.check_not_archived(run.store, run.name, run.manifests())
        removed = in_trash(run, clock=clock)
        entries = {entry.manifest.id: entry for name in names for entry in _entries_of(removed, name)}
        for entry in entries.values():
            damage = _damage(run, entry.manifest)
            if damage is not None:
                raise CorruptError(
                    f"{entry.manifest.name} cannot be restored: {damage}. Nothing was restored; copy its files from a "
                    "backup, or delete it with peakpoint undo --empty"
                ) from damage
        for checkpoint, entry in entries.items():
            name, by = entry.manifest.name, present_user()
            journal.record([Changing(at=clock(), checkpoint=checkpoint, name=name, by=by)])
            removal.restore_from_trash(run.store, entry)
            journal.append(Undone(at=clock(), checkpoint=checkpoint, name=name, parts=(), by=by))
            journal.append(Pinned(at=clock(), checkpoint=checkpoint, why="brought back with undo", by=by))
        return [entry.manifest for entry in entries.values()]


def _entries_of(removed: Sequence[TrashEntry], name: str) -> list[TrashEntry]:
    entries = [entry for entry in removed if entry.manifest.name == name or entry.manifest.id.startswith(name)]
    if not entries:
        names = [entry.manifest.name for entry in removed]
        raise NotFoundError(
            f"{name!r} is not in the trash{did_you_mean(name, names)}; to list the trash: peakpoint undo ROOT --list"
        )
    return entries


def empty_trash(run: Run, *, clock: Clock = utc_now) -> list[TrashEntry]:
    """Delete everything in the trash permanently.

    Returns:
        The deleted checkpoints.

    Raises:
        ConflictError: somebody is writing the run.
    """
    removed = in_trash(run, clock=clock)
    if removed:
        latest = max(entry.record.until for entry in removed)
        with writing(run, "peakpoint undo --empty", clock):
            clean_run(run.store, run.name, latest)
    return removed


def archive(
    run: Run,
    *,
    level: int | None = None,
    progress: Callable[[PackedCheckpoint], None] = lambda _: None,
    clock: Clock = utc_now,
) -> list[PackedCheckpoint]:
    """Pack all checkpoints of a run that nothing trains; see ``peakpoint.repository.archive``.

    Until ``restore`` the run is read like any other, and nothing changes, adds or removes single checkpoints of it.
    Needs space for the packs beside the files, which are deleted when every pack has been proven.

    Args:
        run: to be archived.
        level: of zstd, 1 to 19; None for the usual.
        progress: called with each checkpoint that is packed.
        clock: gives the times of events.

    Returns:
        The packed checkpoints; none when the run is archived, or has no checkpoints.

    Raises:
        ConflictError: somebody is writing the run, or removing a checkpoint of it.
        CorruptError: a checkpoint is damaged; the message says which, and how. The run is as it was.
        MissingExtraError: NumPy or zstandard is not installed.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"model": torch.nn.Linear(99, 99)}, keep=[pp.Last(2)]) as ckpt:
        ...     _ = ckpt.report(step=1), ckpt.report(step=2)
        >>> [packed.bases for packed in archive(pp.open(root).run("r"))]
        [0, 1]
    """
    with writing(run, "peakpoint archive", clock) as journal:
        listing = reader.list_run(run.store, run.name)
        if listing.damaged:
            raise listing.damaged[0].error
        if not listing.manifests or packs.readable_run_archive(run.store, run.name) is not None:
            return []
        packs.check_not_archived(run.store, run.name, listing.manifests)  # not even one of them, as earlier code could
        try:
            return archives.archive_held(run, journal, listing.manifests, level, progress)
        except Error:
            with contextlib.suppress(StoreError):  # the error that brought us here is the one to report
                for key in archives.superfluous_packs(run.store, run.name):
                    run.store.delete(key)
            raise


def restore(
    run: Run, *, progress: Callable[[Manifest], None] = lambda _: None, clock: Clock = utc_now
) -> list[Manifest]:
    """Restore the files of an archived run, bit for bit; see ``peakpoint.repository.archive``.

    Args:
        run: the archived run.
        progress: called with each checkpoint that is done.
        clock: gives the times of events.

    Returns:
        The restored checkpoints; none when the run was not archived.

    Raises:
        ConflictError: somebody is writing the run.
        CorruptError: packs are damaged; the message names the checkpoints, and all others are restored.
        MissingExtraError: NumPy or zstandard is not installed.
    """
    with writing(run, "peakpoint archive --restore", clock) as journal:
        return archives.restore_held(run, journal, progress)
