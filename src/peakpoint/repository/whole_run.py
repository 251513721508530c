"""Whole runs: their removal, for good."""

from collections.abc import Iterator
from contextlib import contextmanager

from peakpoint.errors import ConflictError, CorruptError, FormatError
from peakpoint.format import layout
from peakpoint.format.names import listing
from peakpoint.repository import aliases, maintenance, reader, remains
from peakpoint.repository import journal as journals
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.lost import damaged_checkpoints
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.run import Run
from peakpoint.repository.run_audit import delete_directory
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
        **{checkpoint: f"is pinned: {why}" for checkpoint, why in annotations_of(events).pinned.items()},
        **run.aliased(existing.manifests, events),
    }
    sentences = [f"{manifest.name} {reasons[manifest.id]}" for manifest in existing.manifests if manifest.id in reasons]
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
