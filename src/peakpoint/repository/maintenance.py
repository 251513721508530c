"""Upkeep of runs that are not being trained: apply rules, remove, archive, restore, take back.

Every function but ``remove`` holds the run while it works, so that it and a training cannot come into each other's way.
Each records who did what in the journal, and can be repeated when it was cut short.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial

from peakpoint.errors import ConflictError, CorruptError, Error, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Changing, Closed, Opened, Pinned, Undone
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import near
from peakpoint.repository import archive as archives
from peakpoint.repository import packs, reader, removal, trash
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.archive import Packed
from peakpoint.repository.audit import clean_run
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.reader import being_read
from peakpoint.repository.run import Run
from peakpoint.repository.trash import InTrash
from peakpoint.rules import Rule
from peakpoint.rules.retention import Plan, Removal
from peakpoint.store import holder_note

NOTHING = timedelta(0)


@contextmanager
def writing(run: Run, why: str, clock: Clock = utc_now) -> Iterator[Journal]:
    """Hold a run and its journal, and leave it without litter.

    Args:
        run: which.
        why: what for, for the journal.
        clock: tells the time.

    Raises:
        ConflictError: somebody is writing the run; the message says who.
    """
    hold = run.store.hold(layout.writer_lock(run.name), holder_note(clock()))
    try:
        events = Journal(run.store, run.name, clock)
        try:
            yield events
            clean_run(run.store, run.name, clock())
            events.record([Closed(at=clock(), why=why)], later=True)
        finally:
            events.close()
    finally:
        hold.release()


def _until(now: datetime, undo_for: timedelta) -> datetime | None:
    return now + undo_for if undo_for > NOTHING else None


def apply_plan(
    run: Run, plan: Plan, rules: Sequence[Rule] | None, *, undo_for: timedelta = NOTHING, clock: Clock = utc_now
) -> list[str]:
    """Carry out a plan of retention.

    Args:
        run: which.
        plan: what goes.
        rules: put these in force; None leaves those that are.
        undo_for: how long what goes can be brought back; 0 frees the space at once.
        clock: tells the time.

    Returns:
        One sentence for each removal that failed.

    Raises:
        ConflictError: somebody is writing the run, or it is archived.
    """
    with writing(run, "peakpoint keep", clock) as events:
        packs.check_not_archived(run.store, run.name, run.manifests())
        if rules is not None:
            texts = tuple(rule.text for rule in rules)
            opened = Opened(at=clock(), by={"user": present_user()}, rules=texts)
            events.record([opened], later=undo_for <= NOTHING)  # what goes for good may have to make the room first
        until, by = _until(clock(), undo_for), present_user()

        def pinned() -> dict[str, str]:
            return _protected(run)

        failures = removal.apply(run.store, events, plan.remove, by=by, pinned=pinned, until=until)
        return failures + removal.thin(run.store, events, plan.drop, by=by, pinned=pinned)[1]


def _protected(run: Run) -> dict[str, str]:
    """What is pinned or aliased now."""
    now = run.events()
    return {**annotations_of(now).pinned, **run.aliased(run.manifests(), now)}


def remove(
    run: Run, manifests: Sequence[Manifest], why: str, *, undo_for: timedelta = NOTHING, clock: Clock = utc_now
) -> list[str]:
    """Remove checkpoints, whatever rule claims them; works beside a training, which forgets them at its next save.

    What an alias points at, or did lately, stays: it can be gone back to. An archived run goes as a whole, and at once;
    checkpoints of it that are damaged may go alone.

    Args:
        run: which.
        manifests: what goes.
        why: the reason, for the journal.
        undo_for: how long they can be brought back; 0 frees the space at once.
        clock: tells the time.

    Returns:
        One sentence for each removal that failed.

    Raises:
        ConflictError: the run is archived, and it is not the whole of it that goes for good.
    """
    packed = packs.packed_bytes(run.store, run.name, manifests)
    if packed:
        others = {manifest.id for manifest in run.manifests()} - {manifest.id for manifest in manifests}
        if others and any(manifest.id in packed and _damage(run, manifest) is None for manifest in manifests):
            packs.check_not_archived(run.store, run.name, manifests)
        if undo_for > NOTHING:
            raise ConflictError(f"run {run.name!r} is archived, so this can only go for good: give --undo-for 0")
        with writing(run, "peakpoint rm", clock):  # nothing trains it, and the packs go with it
            return _remove(run, manifests, why, undo_for, clock)
    return _remove(run, manifests, why, undo_for, clock)


def _damage(run: Run, manifest: Manifest) -> CorruptError | None:
    """What is wrong with a checkpoint, every byte compared with its digest; None when nothing is."""
    try:
        for file in manifest.files:
            reader.read(run.store, manifest, file)
    except CorruptError as error:
        return error
    return None


def _remove(run: Run, manifests: Sequence[Manifest], why: str, undo_for: timedelta, clock: Clock) -> list[str]:
    events = Journal(run.store, run.name, clock)
    try:
        read = being_read(run.store, manifests)
        aliased = run.aliased(manifests, run.events())
        free = [manifest for manifest in manifests if manifest.id not in read and manifest.id not in aliased]
        until = _until(clock(), undo_for)
        failures = [f"{one.name} stays: somebody is reading it; try again later" for one in manifests if one.id in read]
        failures += [f"{one.name} stays: {aliased[one.id]}" for one in manifests if one.id in aliased]

        def protected_now() -> Collection[str]:
            if until is not None and run.store.size(layout.archived_key(run.name)) is not None:
                return {manifest.id for manifest in manifests}  # archived since: its files go to no trash
            return run.aliased(manifests, run.events())

        removals = [Removal(manifest, why) for manifest in free]
        failures += removal.apply(run.store, events, removals, by=present_user(), pinned=protected_now, until=until)
        events.record([Closed(at=clock(), why="peakpoint rm")], later=True)
        return failures
    finally:
        events.close()


def in_trash(run: Run, *, clock: Clock = utc_now) -> list[InTrash]:
    """What can be brought back, the first that goes first."""
    now = clock()
    return [entry for entry in trash.contents(run.store, run.name) if entry.record.until > now]


def undo(run: Run, names: Sequence[str], *, clock: Clock = utc_now) -> list[Manifest]:
    """Bring removed checkpoints back, bit for bit, and pin them: rules would take them again.

    Args:
        run: which.
        names: names or ids of checkpoints, or the beginning of an id.
        clock: tells the time.

    Returns:
        What is back. Every byte of it has been compared with its digest.

    Raises:
        NotFoundError: something of that name is not in the trash; nothing was brought back.
        CorruptError: something is damaged; nothing was brought back.
        ConflictError: somebody is writing the run, or it is archived.
    """
    with writing(run, "peakpoint undo", clock) as events:
        packs.check_not_archived(run.store, run.name, run.manifests())
        removed = in_trash(run, clock=clock)
        chosen = {entry.manifest.id: entry for name in names for entry in _named(removed, name)}
        for entry in chosen.values():
            damage = _damage(run, entry.manifest)
            if damage is not None:
                raise CorruptError(
                    f"{entry.manifest.name} cannot be brought back bit for bit: {damage}. Nothing was brought back; "
                    "restore its files from a copy, or let it go with peakpoint trash --empty"
                ) from damage
        for checkpoint, entry in chosen.items():
            name, by = entry.manifest.name, present_user()
            events.append(Changing(at=clock(), checkpoint=checkpoint, name=name, by=by))
            events.sync()
            trash.bring_back(run.store, entry.record)
            events.append(Undone(at=clock(), checkpoint=checkpoint, name=name, parts=(), by=by))
            events.append(Pinned(at=clock(), checkpoint=checkpoint, why="brought back with undo", by=by))
        return [entry.manifest for entry in chosen.values()]


def _named(removed: Sequence[InTrash], name: str) -> list[InTrash]:
    entries = [entry for entry in removed if entry.manifest.name == name or entry.manifest.id.startswith(name)]
    if not entries:
        names = [entry.manifest.name for entry in removed]
        raise NotFoundError(f"the trash has no {name!r}{near(name, names)}; peakpoint trash lists what it has")
    return entries


def empty_trash(run: Run, *, clock: Clock = utc_now) -> list[InTrash]:
    """Let everything in the trash go now.

    Returns:
        What went.

    Raises:
        ConflictError: somebody is writing the run.
    """
    removed = in_trash(run, clock=clock)
    if removed:
        latest = max(entry.record.until for entry in removed)
        with writing(run, "peakpoint trash --empty", clock):
            clean_run(run.store, run.name, latest)
    return removed


def archive(
    run: Run,
    *,
    level: int | None = None,
    progress: Callable[[Packed], None] = lambda _: None,
    clock: Clock = utc_now,
) -> list[Packed]:
    """Pack all checkpoints of a run that nothing trains; see ``peakpoint.repository.archive``.

    Until ``restore`` the run is read like any other, and nothing changes, adds or removes single checkpoints of it.
    Needs room for the packs beside the files, which go when every pack has been proven.

    Args:
        run: which.
        level: of zstd, 1 to 19; None for the usual.
        progress: called with each checkpoint that is packed.
        clock: tells the time.

    Returns:
        What was packed; nothing when the run is archived, or has no checkpoints.

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
        >>> pp.load("r@latest", root=root)["model"]["weight"].shape
        torch.Size([99, 99])
    """
    with writing(run, "peakpoint archive", clock) as events:
        shelf = reader.list_run(run.store, run.name)
        if shelf.damaged:
            raise shelf.damaged[0].error
        if not shelf.manifests or packs.known_archive(run.store, run.name) is not None:
            return []
        packs.check_not_archived(run.store, run.name, shelf.manifests)  # not even one of them, as earlier code could
        try:
            return archives.archive(
                run.store,
                events,
                run.name,
                shelf.manifests,
                by=present_user(),
                being_removed=partial(run.is_being_removed, held=True),
                level=level,
                progress=progress,
            )
        except Error:
            with contextlib.suppress(StoreError):  # the error that brought us here is the one to report
                for key in archives.needless(run.store, run.name):
                    run.store.delete(key)
            raise


def restore(
    run: Run, *, progress: Callable[[Manifest], None] = lambda _: None, clock: Clock = utc_now
) -> list[Manifest]:
    """Put the files of an archived run back, bit for bit.

    Also brings back what earlier code put away by pieces; see ``peakpoint.repository.archive``.

    Args:
        run: which.
        progress: called with each checkpoint that is done.
        clock: tells the time.

    Returns:
        What is back; nothing when the run was not archived.

    Raises:
        ConflictError: somebody is writing the run.
        CorruptError: packs are damaged; the message names the checkpoints, and all others are back.
        MissingExtraError: NumPy or zstandard is not installed.
    """
    with writing(run, "peakpoint archive --restore", clock) as events:
        return archives.restore(run.store, events, run.name, run.manifests(), by=present_user(), progress=progress)
