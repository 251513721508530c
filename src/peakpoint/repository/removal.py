"""Removal: what a plan of retention lets go, goes."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any

from peakpoint.errors import StoreError
from peakpoint.format.events import PartsDropped, Removed, Undone
from peakpoint.format.manifest import Manifest
from peakpoint.repository.commit import remove
from peakpoint.repository.journal import Journal
from peakpoint.repository.trash import discard, drop
from peakpoint.rules.retention import Removal, Thinning
from peakpoint.store import Store


def apply(
    store: Store,
    journal: Journal,
    removals: Sequence[Removal],
    *,
    by: str,
    pinned: Callable[[], Collection[str]] = tuple,
    until: datetime | None = None,
) -> list[str]:
    """Remove, recording each reason durably before the first file goes.

    A checkpoint that cannot be removed stays and is tried again by the next plan. On a full disk what goes at once
    makes the room for its record.

    Args:
        store: where.
        journal: receives a ``Removed`` for each.
        removals: what goes.
        by: who decided, for the record.
        pinned: what is protected now, by a pin or an alias. Asked once the removals are recorded: whoever pins or
            promotes at the same time either sees the record, or is seen here.
        until: keep the files in the trash until then; None lets them go at once.

    Returns:
        One sentence for each removal that failed.
    """
    if not removals:
        return []
    recorded = _record(journal, removals, by, until)
    spared, failures = set(pinned()), []
    for removal in removals:
        if removal.manifest.id in spared:
            failures.append(f"{removal.manifest.name} stays: {_PROTECTED}")
            journal.record([_taken_back(journal, removal.manifest, (), by)], later=not recorded)
            continue
        try:
            if until is None:
                remove(store, removal.manifest)
            else:
                discard(store, removal.manifest, until=until, at=journal.now(), why=removal.reason, by=by)
        except StoreError as error:
            hint = f"; {_FOR_GOOD}" if error.is_full and until is not None else ""
            failures.append(f"{removal.manifest.name} could not be removed: {error}{hint}")
        if not recorded:  # others do not know yet of those that follow, and may protect them
            recorded, spared = journal.record((), later=True), set(pinned())
    if not recorded and len(failures) < len(removals):
        failures.append("the journal does not tell of this removal: the disk is full all the same; free some space")
    return failures


_PROTECTED = "it is pinned, an alias points at it, or the run was archived a moment ago"
_FOR_GOOD = "removing for good, with --undo-for 0, needs no room"


def _record(journal: Journal, removals: Sequence[Removal], by: str, until: datetime | None) -> bool:
    """Record the reasons durably; where there is no room for that, as soon as a removal has made it.

    Returns:
        Whether they are recorded.
    """
    events = []
    for removal in removals:
        moment = {"step": removal.manifest.step, "epoch": removal.manifest.epoch}
        about = _about(removal.manifest, by) | moment
        events.append(Removed(at=journal.now(), **about, reason=removal.reason, until=until))
    try:
        return journal.record(events, later=until is None)
    except StoreError as error:
        if not error.is_full:
            raise
        raise StoreError(
            error.errno, f"nothing was removed, since the trash needs room: {error}; {_FOR_GOOD}"
        ) from error


def _about(manifest: Manifest, by: str) -> dict[str, Any]:
    return {"checkpoint": manifest.id, "name": manifest.name, "by": by}


def _taken_back(journal: Journal, manifest: Manifest, parts: tuple[str, ...], by: str) -> Undone:
    """Without it the journal would go on saying that the checkpoint is being removed, and it could not be pinned."""
    return Undone(at=journal.now(), **_about(manifest, by), parts=parts)


def thin(
    store: Store,
    journal: Journal,
    drops: Sequence[Thinning],
    *,
    by: str,
    pinned: Callable[[], Collection[str]] = tuple,
) -> tuple[dict[str, Manifest], list[str]]:
    """Drop parts, recording each reason durably before the first file goes; they cannot be brought back.

    Returns:
        The manifests as they are now, by id, and one sentence for each that failed.
    """
    changed: dict[str, Manifest] = {}
    failures = []
    for thinning in drops:
        about = _about(thinning.manifest, by)
        journal.append(PartsDropped(at=journal.now(), **about, parts=thinning.parts, reason=thinning.reason))
    if drops:
        journal.sync()
    spared = set(pinned()) if drops else set()
    for thinning in drops:
        if thinning.manifest.id in spared:
            failures.append(f"{thinning.manifest.name} stays whole: it is pinned, or an alias points at it")
            journal.append(_taken_back(journal, thinning.manifest, thinning.parts, by))
            continue
        try:
            changed[thinning.manifest.id] = drop(
                store, thinning.manifest, thinning.parts, at=journal.now(), why=thinning.reason, by=by
            )
        except StoreError as error:
            failures.append(f"parts of {thinning.manifest.name} could not be dropped: {error}")
    return changed, failures
