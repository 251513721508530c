"""Removal: delete checkpoints, put them into the trash and restore them, and drop parts.

A removal is durable in the journal before the first file is deleted. Then the manifest is deleted, and the files after
it, so that a crash at any instant leaves a whole checkpoint or a directory without a manifest, which is an incomplete
save to every reader. On the way to the trash, ``trashed.json`` is durable before the manifest is deleted: a crash in
between leaves the checkpoint. ``dropped-N.json`` is durable before the first file of a dropped part is deleted.
"""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any

from peakpoint.errors import NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Event, PartsDropped, Removed, Undone
from peakpoint.format.manifest import Manifest, without_parts
from peakpoint.format.sealed import FORMAT, seal
from peakpoint.repository.commit import sweep
from peakpoint.repository.journal import Journal
from peakpoint.repository.trash import TrashEntry
from peakpoint.rules.retention import Removal
from peakpoint.store import Store, establish

Protected = Callable[[], Collection[str]]
"""Returns the ids that a pin or an alias protects at this moment."""

_PROTECTED = "it is pinned, an alias points at it, or the run was archived a moment ago"


def delete(store: Store, manifest: Manifest) -> None:
    """Delete a checkpoint permanently; idempotent, and to be repeated when it was interrupted.

    Raises:
        StoreError: the store refused. If the manifest is deleted, the checkpoint does not exist, and audit finds the
            rest.
    """
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    records = [child for child in store.children(prefix) if layout.is_record(child)]
    if layout.TRASHED in records:  # of a removal that was cut short: without the manifest it would count
        store.delete(layout.trashed_key(manifest.run, manifest.name))
    store.delete(layout.manifest_key(manifest.run, manifest.name))
    sweep(store, manifest.run, manifest.name, [*(file.name for file in manifest.files), *records])


def move_to_trash(store: Store, manifest: Manifest, *, until: datetime, at: datetime, why: str, by: str) -> None:
    """Remove a checkpoint, keeping its files; idempotent, and to be repeated when it was interrupted.

    Raises:
        StoreError: the store refused. If the manifest is deleted, the checkpoint is in the trash.
    """
    key = layout.manifest_key(manifest.run, manifest.name)
    try:
        text = store.get(key).decode()
    except NotFoundError:
        return  # somebody else has removed it
    content = {"format": FORMAT, "manifest": text, "until": until, "at": at, "why": why, "by": by}
    # replaces the record of an attempt that was cut short, or of one at this moment
    store.put(layout.trashed_key(manifest.run, manifest.name), [seal(content)])
    store.delete(key)


def restore_from_trash(store: Store, entry: TrashEntry) -> None:
    """Make a checkpoint exist again; the caller knows that its files are intact."""
    manifest = entry.manifest
    establish(store, layout.manifest_key(manifest.run, manifest.name), entry.record.manifest.encode())
    store.delete(layout.trashed_key(manifest.run, manifest.name))


def drop_parts(store: Store, manifest: Manifest, parts: Sequence[str], *, at: datetime, why: str, by: str) -> Manifest:
    """Drop parts of a checkpoint permanently; idempotent, and to be repeated when it was interrupted.

    Args:
        store: holds the checkpoint.
        manifest: without the parts that were dropped before.
        parts: names of parts.
        at: the time for the record.
        why: one sentence.
        by: who decides.

    Returns:
        The manifest without them.

    Raises:
        StoreError: the store refused. If the record exists, the parts are dropped, and audit finds the rest.
    """
    remaining = without_parts(manifest, parts)
    files = [file.name for file in manifest.files if file not in remaining.files]
    dropped = [part for part in parts if part in manifest.parts]
    content = {"format": FORMAT, "parts": dropped, "files": files, "at": at, "why": why, "by": by}
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    number = 1 + max((layout.number(child, layout.DROPPED, ".json") for child in store.children(prefix)), default=0)
    establish(store, f"{prefix}/{layout.DROPPED}{number}.json", seal(content))
    for name in files:
        store.delete(layout.file_key(manifest.run, manifest.name, name))
    return remaining


def remove(
    store: Store,
    journal: Journal,
    removals: Sequence[Removal],
    *,
    by: str,
    protected: Protected = tuple,
    until: datetime | None = None,
) -> dict[str, str]:
    """Remove checkpoints, or parts of them, recording each reason durably before the first file is deleted.

    A checkpoint that cannot be removed stays and is tried again by the next plan. On a full disk the permanent removal
    of a checkpoint frees the space for its own record.

    Args:
        store: holds the run.
        journal: receives a ``Removed`` or ``PartsDropped`` for each.
        removals: the checkpoints, with the reasons.
        by: who decided, for the record.
        protected: called once the removals are recorded: whoever pins or promotes at the same time either sees the
            record, or is seen here.
        until: keep the files of checkpoints in the trash until then; None deletes them at once, like those of parts.

    Returns:
        Id of each checkpoint whose removal failed, with one sentence; under "" that the journal could not follow.
    """
    if not removals:
        return {}
    recorded = _record(journal, removals, by, until)
    protected_ids, failures = set(protected()), {}
    for removal in removals:
        manifest, parts = removal.manifest, removal.parts
        what = f"{', '.join(parts)} of {manifest.name}" if parts else manifest.name
        if manifest.id in protected_ids:
            failures[manifest.id] = f"{what} was not removed: {_PROTECTED}"
            # else the journal would go on saying that it is being removed, and it could not be pinned
            journal.record([Undone(at=journal.now(), **_about(removal, by), parts=parts)], later=not recorded)
            continue
        try:
            _carry_out(store, removal, until, at=journal.now(), why=removal.reason, by=by)
        except StoreError as error:
            failures[manifest.id] = f"{what} could not be removed: {error}{_hint(error, until)}"
        if not recorded:  # others do not know yet of those that follow, and may protect them
            recorded, protected_ids = journal.record((), later=True), set(protected())
    if not recorded and len(failures) < len(removals):
        failures[""] = "the removal is not recorded in the journal: the disk is still full; free some space"
    return failures


def _carry_out(store: Store, removal: Removal, until: datetime | None, **record: Any) -> None:
    if removal.parts:
        drop_parts(store, removal.manifest, removal.parts, **record)
    elif until is None:
        delete(store, removal.manifest)
    else:
        move_to_trash(store, removal.manifest, until=until, **record)


def _record(journal: Journal, removals: Sequence[Removal], by: str, until: datetime | None) -> bool:
    """Record the reasons durably; where there is no space for that, as soon as a removal has freed it."""
    events: list[Event] = []
    for removal in removals:
        about = _about(removal, by) | {"at": journal.now(), "reason": removal.reason}
        if removal.parts:
            events.append(PartsDropped(**about, parts=removal.parts))
        else:
            about |= {"step": removal.manifest.step, "epoch": removal.manifest.epoch}
            events.append(Removed(**about, until=until))
    frees_space = until is None and not removals[0].parts
    try:
        return journal.record(events, later=frees_space)
    except StoreError as error:
        if not error.is_full:
            raise
        hint = _hint(error, until)
        raise StoreError(error.errno, f"nothing was removed, since recording it needs space: {error}{hint}") from error


def _hint(error: StoreError, until: datetime | None) -> str:
    return "; removing permanently, with --undo-for 0, needs no free space" if error.is_full and until else ""


def _about(removal: Removal, by: str) -> dict[str, Any]:
    return {"checkpoint": removal.manifest.id, "name": removal.manifest.name, "by": by}
