"""Whole runs: their removal, for good, and another name."""

from collections.abc import Iterator
from contextlib import contextmanager

from peakpoint.errors import ConfigError, ConflictError, CorruptError, FormatError
from peakpoint.format import layout
from peakpoint.format.names import check_run, listing
from peakpoint.repository import aliases, maintenance, reader, remains
from peakpoint.repository import journal as journals
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.lost import damaged_checkpoints
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.root import check_capitals
from peakpoint.repository.run import Run
from peakpoint.repository.run_audit import delete_directory
from peakpoint.repository.run_names import note_name
from peakpoint.store import Store, holder_note

_REASONS = 3  # in one message


@contextmanager
def _held_alone(run: Run, clock: Clock) -> Iterator[None]:
    """Hold a run that nobody else changes or reads.

    Raises:
        ConflictError: somebody does.
    """
    hold = run.store.hold(layout.writer_lock(run.name), holder_note(clock()))
    try:
        if journals.live_segments(run.store, run.name, held=True):
            raise ConflictError(f"another process is changing run {run.name!r} at this moment; try again when it ends")
        manifests = run.manifests()
        in_use = reader.being_read(run.store, manifests)
        names = [manifest.name for manifest in manifests if manifest.id in in_use]
        if names:
            raise ConflictError(f"somebody is reading {listing(names)} of run {run.name!r}; try again later")
        yield
    finally:
        hold.release()


def check_unprotected(run: Run) -> None:
    """Refuse to go on where a pin or an alias protects a checkpoint of a run.

    Raises:
        ConflictError: says which, and what can be done about it.
    """
    events, existing = run.events(), reader.list_run(run.store, run.name)
    reasons = {
        **{checkpoint: f"pinned: {why}" for checkpoint, why in annotations_of(events).pinned.items()},
        **run.aliased(existing.manifests, events),
    }
    sentences = [
        f"{manifest.name} ({reasons[manifest.id]})" for manifest in existing.manifests if manifest.id in reasons
    ]
    for damage in damaged_checkpoints(run.store, run.name, existing):  # of which it is not known what aliases keep
        names = aliases_naming(run.store, run.name)
        sentences += [f"{damage.name} is damaged, and may be what {name} points at or did" for name in names[:1]]
    if sentences:
        raise ConflictError(
            f"run {run.name!r} stays: {'; '.join(sentences[:_REASONS])}. To clear a pin: peakpoint unpin ROOT REF; an "
            "alias: promote another checkpoint, or peakpoint promote ROOT --retire ALIAS"
        )


def aliases_naming(store: Store, run: str) -> list[str]:
    """Return the aliases that have a record of a checkpoint of a run, or one that cannot be read."""
    return [alias for alias in aliases.names(store) if _names_run(store, alias, run)]


def _names_run(store: Store, alias: str, run: str) -> bool:
    try:
        targets = [aliases.read(store, alias, number).target for number in aliases.numbers(store, alias)]
    except (CorruptError, FormatError):
        return True
    return any(target is not None and target.run == run for target in targets)


def remove_run(run: Run, *, clock: Clock = utc_now) -> list[str]:
    """Remove a run for good: checkpoints and trash, journal, validations, and its name.

    Its checkpoints go first, one by one, and its record last: killed in between it is a run with fewer checkpoints,
    and the same call removes the rest.

    Args:
        run: to be removed.
        clock: gives the times of events.

    Returns:
        The names in its directory that Peakpoint has not written: they stay.

    Raises:
        ConflictError: somebody is writing, changing or reading the run, or a pin or an alias protects a checkpoint.
    """
    store, name = run.store, run.name
    with _held_alone(run, clock):
        check_unprotected(run)
        failures = maintenance.remove_unpacked(
            run, run.manifests(), "the run is removed", maintenance.PERMANENTLY, clock
        )
        if failures:
            raise ConflictError(f"run {name!r} is not removed as a whole: {listing(failures)}")
        for child in store.children(layout.checkpoints_prefix(name)):  # trash, what is damaged, and incomplete saves
            delete_directory(store, name, child.rstrip("/"))
        remains.delete_records(store, name, clock())
        store.delete(layout.writer_lock(name))
    store.prune(layout.run_prefix(name))
    return store.children(layout.run_prefix(name))


def rename_run(run: Run, new: str, *, clock: Clock = utc_now) -> Run:
    """Give a run another name; what it holds stays as it is, to the byte.

    One rename of its directory does it: killed anywhere, the run has the old name or the new one.

    Args:
        run: to be renamed.
        new: its new name.
        clock: gives the time for the record.

    Returns:
        The run under its new name.

    Raises:
        ConfigError: ``new`` cannot name a run, or the store cannot rename.
        ConflictError: there is something of that name; somebody is writing, changing or reading the run; or an alias
            points at a checkpoint of it or ever did: the records of aliases hold the old name, and never change.
    """
    store = run.store
    check_run(new)
    check_capitals(store, new)
    if new == run.name or store.children(layout.run_prefix(new)):
        raise ConflictError(f"{store.location} has a run {new!r}; give another name")
    with _held_alone(run, clock):
        names = aliases_naming(store, run.name)
        if names:
            raise ConflictError(
                f"run {run.name!r} keeps its name: records of the alias {listing(names)} say it, and they never change"
            )
        note_name(store, run.name, clock(), present_user())
        if not store.rename(layout.run_prefix(run.name), layout.run_prefix(new)):
            raise ConfigError(f"{store.location} cannot rename a run in one step, so run {run.name!r} keeps its name")
    store.hold(layout.writer_lock(new), holder_note(clock())).release()  # where there are no locks, its note remained
    return Run(store, new)
