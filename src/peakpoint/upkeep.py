"""Upkeep of runs that are not being trained: apply rules, remove, archive, restore, take back.

Every function but ``remove`` holds the run while it works, so that it and a training cannot come into each other's way.
Each records who did what in the journal, and can be repeated when it was cut short.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from peakpoint import archiving, dropping, journal, layout, retention, trash
from peakpoint.actor import present_user
from peakpoint.archiving import Packed
from peakpoint.audit import clean_run
from peakpoint.clock import Clock, utc_now
from peakpoint.errors import NotFoundError
from peakpoint.journal import Journal
from peakpoint.manifest import Manifest
from peakpoint.notes import notes
from peakpoint.reader import being_read
from peakpoint.refs import near
from peakpoint.repository import Run
from peakpoint.retention import Plan, Removal
from peakpoint.rules import Rule
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
            events.append(journal.Closed(at=clock(), why=why))
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
        ConflictError: somebody is writing the run.
    """
    with writing(run, "peakpoint keep", clock) as events:
        if rules is not None:
            texts = tuple(rule.text for rule in rules)
            events.append(journal.Opened(at=clock(), by={"user": present_user()}, rules=texts))
        until, by = _until(clock(), undo_for), present_user()

        def pinned() -> dict[str, str]:
            return _protected(run)

        failures = retention.apply(run.store, events, plan.remove, by=by, pinned=pinned, until=until)
        return failures + retention.thin(run.store, events, plan.drop, by=by, pinned=pinned, until=until)[1]


def _protected(run: Run) -> dict[str, str]:
    """What is pinned or aliased now."""
    now = run.events()
    return {**notes(now).pinned, **run.aliased(run.manifests(), now)}


def remove(
    run: Run, manifests: Sequence[Manifest], why: str, *, undo_for: timedelta = NOTHING, clock: Clock = utc_now
) -> list[str]:
    """Remove checkpoints, whatever rule claims them; works beside a training, which forgets them at its next save.

    What an alias points at, or did lately, stays: it can be gone back to.

    Args:
        run: which.
        manifests: what goes.
        why: the reason, for the journal.
        undo_for: how long they can be brought back; 0 frees the space at once.
        clock: tells the time.

    Returns:
        One sentence for each removal that failed.
    """
    events = Journal(run.store, run.name, clock)
    try:
        read = being_read(run.store, manifests)
        aliased = run.aliased(manifests, run.events())
        free = [manifest for manifest in manifests if manifest.id not in read and manifest.id not in aliased]
        until = _until(clock(), undo_for)
        failures = [f"{one.name} stays: somebody is reading it; try again later" for one in manifests if one.id in read]
        failures += [f"{one.name} stays: {aliased[one.id]}" for one in manifests if one.id in aliased]

        def aliased_now() -> Mapping[str, str]:
            return run.aliased(manifests, run.events())

        removals = [Removal(manifest, why) for manifest in free]
        failures += retention.apply(run.store, events, removals, by=present_user(), pinned=aliased_now, until=until)
        events.append(journal.Closed(at=clock(), why="peakpoint rm"))
        return failures
    finally:
        events.close()


@dataclass(frozen=True, slots=True)
class InTrash:
    """Something that can be brought back.

    Attributes:
        manifest: of the checkpoint.
        parts: the parts that are in the trash; none when the whole checkpoint is.
        size_bytes: what it takes.
        until: when it goes.
        why: why it was removed.
        by: who decided.
    """

    manifest: Manifest
    parts: tuple[str, ...]
    size_bytes: int
    until: datetime
    why: str
    by: str


def in_trash(run: Run, *, clock: Clock = utc_now) -> list[InTrash]:
    """What can be brought back, the first that goes first."""
    now, found = clock(), []
    for record, manifest in trash.contents(run.store, run.name):
        if record.until > now:
            found.append(InTrash(manifest, (), manifest.size_bytes, record.until, record.why, record.by))
    for manifest in run.manifests():
        for dropped in dropping.records(run.store, run.name, manifest.name):
            if dropped.until is not None and dropped.until > now:
                keys = [layout.file_key(run.name, manifest.name, file) for file in dropped.files]
                size = sum(run.store.size(key) or 0 for key in keys)
                found.append(InTrash(manifest, dropped.parts, size, dropped.until, dropped.why, dropped.by))
    return sorted(found, key=lambda one: (one.until, one.manifest.sequence))


def undo(run: Run, names: Sequence[str], *, clock: Clock = utc_now) -> list[tuple[Manifest, tuple[str, ...]]]:
    """Bring removed checkpoints and dropped parts back, and pin the checkpoints: rules would take them again.

    Args:
        run: which.
        names: names or ids of checkpoints, or the beginning of an id.
        clock: tells the time.

    Returns:
        What is back: manifests, with the names of parts where only they had gone.

    Raises:
        NotFoundError: something of that name is not in the trash; nothing was brought back.
        ConflictError: somebody is writing the run.
    """
    with writing(run, "peakpoint undo", clock) as events:
        there = in_trash(run, clock=clock)
        chosen = {one.manifest.id: one for name in names for one in _named(there, name)}
        removed = {manifest.id: record for record, manifest in trash.contents(run.store, run.name)}
        back = []
        for checkpoint, one in chosen.items():
            name = one.manifest.name
            events.append(journal.Changing(at=clock(), checkpoint=checkpoint, name=name, by=present_user()))
            events.sync()
            if one.parts:
                parts = dropping.bring_back(run.store, one.manifest)
            else:
                trash.bring_back(run.store, removed[checkpoint])
                parts = ()
            event = journal.Undone(
                at=clock(), checkpoint=checkpoint, name=one.manifest.name, parts=parts, by=present_user()
            )
            events.append(event)
            events.append(
                journal.Pinned(at=clock(), checkpoint=checkpoint, why="brought back with undo", by=present_user())
            )
            back.append((one.manifest, parts))
        return back


def _named(there: Sequence[InTrash], name: str) -> list[InTrash]:
    found = [one for one in there if one.manifest.name == name or one.manifest.id.startswith(name)]
    if not found:
        names = [one.manifest.name for one in there]
        raise NotFoundError(f"the trash has no {name!r}{near(name, names)}; peakpoint trash lists what it has")
    return found


def empty_trash(run: Run, *, clock: Clock = utc_now) -> list[InTrash]:
    """Let everything in the trash go now.

    Returns:
        What went.

    Raises:
        ConflictError: somebody is writing the run.
    """
    there = in_trash(run, clock=clock)
    if there:
        latest = max(one.until for one in there)
        with writing(run, "peakpoint trash --empty", clock):
            clean_run(run.store, run.name, latest)
    return there


def archive(
    run: Run,
    manifests: Sequence[Manifest] | None = None,
    *,
    level: int | None = None,
    progress: Callable[[Packed], None] = lambda _: None,
    clock: Clock = utc_now,
) -> tuple[list[Packed], list[str]]:
    """Pack checkpoints of a run; see ``peakpoint.archiving``.

    Args:
        run: which.
        manifests: which checkpoints; all by default.
        level: of zstd, 1 to 19; None for the usual.
        progress: called with each that is done.
        clock: tells the time.

    Returns:
        What was done, and one sentence for each checkpoint that is damaged and stays as it is.

    Raises:
        ConflictError: somebody is writing the run.
        MissingExtraError: NumPy or zstandard is not installed.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"model": torch.nn.Linear(99, 99)}, keep=[pp.Last(2)]) as ckpt:
        ...     _ = ckpt.report(step=1), ckpt.report(step=2)
        >>> done, damaged = pp.upkeep.archive(pp.open(root).run("r"))
        >>> [packed.bases for packed in done], damaged
        ([0, 1], [])
        >>> pp.load("r@latest", root=root)["model"]["weight"].shape
        torch.Size([99, 99])
    """
    with writing(run, "peakpoint archive", clock) as events:
        everything = run.manifests()
        chosen = everything if manifests is None else manifests
        return archiving.archive(
            run.store, events, everything, chosen, by=present_user(), level=level, progress=progress
        )


def restore(
    run: Run,
    manifests: Sequence[Manifest] | None = None,
    *,
    progress: Callable[[Manifest], None] = lambda _: None,
    clock: Clock = utc_now,
) -> list[Manifest]:
    """Put the files of archived checkpoints back, bit for bit.

    Args:
        run: which.
        manifests: which checkpoints; all by default.
        progress: called with each that is done.
        clock: tells the time.

    Returns:
        Those that were archived.

    Raises:
        ConflictError: somebody is writing the run.
        CorruptError: a pack is damaged; the checkpoint stays archived.
        MissingExtraError: NumPy or zstandard is not installed.
    """
    with writing(run, "peakpoint restore", clock) as events:
        chosen = run.manifests() if manifests is None else manifests
        ordered = sorted(chosen, key=lambda manifest: manifest.sequence)
        return archiving.restore(run.store, events, ordered, by=present_user(), progress=progress)
