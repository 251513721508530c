"""Lost checkpoints: the journal says that they were saved and never removed, and they have no manifest.

Whoever removes a checkpoint says so in the journal before the manifest goes. So a directory without a manifest is an
incomplete save or removal only if the journal knows it as neither: everything else is damage, and nobody deletes it
unasked. Only a removal that was cut short on a full disk, before there was space for its record, looks the same.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Removed, Saved, Undone
from peakpoint.format.manifest import MANIFEST
from peakpoint.format.names import listing as listing_of
from peakpoint.repository import journal as journals
from peakpoint.repository import reader, trash
from peakpoint.repository.reader import Damaged, FoundCheckpoint, RunListing
from peakpoint.store import Store


def damaged_checkpoints(store: Store, run: str, listing: RunListing, *, exclusive: bool = False) -> tuple[Damaged, ...]:
    """Find the checkpoints of a run that cannot be read, and those that are lost, each with its commit if it is known.

    A directory without a manifest, of which a damaged journal cannot tell whether it was a checkpoint, counts as one.

    Args:
        store: holds the run.
        run: its name.
        listing: of its directories, which were read before this call.
        exclusive: whether the caller holds the run: then no directory without a manifest is a save under way.
    """
    commits, is_whole = _commits(store, run)
    saves = {saved.name: saved for saved in commits.values()}
    damaged = [replace(damage, saved=saves.get(damage.name)) for damage in listing.damaged]
    damaged += _lost_among(store, run, commits, {manifest.id for manifest in listing.manifests})
    if not is_whole and (exclusive or store.holder(layout.writer_lock(run)) is None):
        decided = {damage.name for damage in damaged}
        undecided = [name for name in listing.without_manifest if not _in_trash(store, run, name)]
        damaged += [Damaged(name, _undecided(store, run, name)) for name in undecided if name not in decided]
    return tuple(damaged)


def damage_sentence(store: Store, damaged: Sequence[Damaged]) -> str:
    """Return why checkpoints cannot be read; of several, which they are and what says why."""
    if len(damaged) == 1:
        return str(damaged[0].error)
    names = listing_of(sorted(damage.name for damage in damaged))
    return f"{len(damaged)} checkpoints cannot be read ({names}); peakpoint audit {store.location} says why"


def damaged_in_trash(store: Store, run: str, listing: RunListing) -> list[Damaged]:
    """Find the checkpoints in the trash that cannot be restored, since the record of the trash cannot be read."""
    damaged = []
    for name in listing.without_manifest:
        try:
            record = trash.read_trashed(store, run, name)
            if record is not None:
                trash.trashed_manifest(store, run, name, record)
        except (CorruptError, FormatError) as error:
            damaged.append(Damaged(name, error))
    return damaged


def lost_checkpoints(store: Store, run: str, existing: Collection[str]) -> list[Damaged]:
    """Find the checkpoints of a run that are lost.

    Args:
        store: holds the run.
        run: its name.
        existing: the ids of those whose manifests were read before this call.
    """
    return _lost_among(store, run, _commits(store, run)[0], existing)


def _lost_among(store: Store, run: str, commits: Mapping[str, Saved], existing: Collection[str]) -> list[Damaged]:
    absent = [saved for checkpoint, saved in commits.items() if checkpoint not in existing]
    errors = {saved.checkpoint: _absence(store, run, saved) for saved in absent}
    if any(errors.values()):  # unless it was removed a moment ago
        commits, _ = _commits(store, run)
    return [
        Damaged(saved.name, error, saved)
        for saved in absent
        if (error := errors[saved.checkpoint]) is not None and saved.checkpoint in commits
    ]


def _commits(store: Store, run: str) -> tuple[Mapping[str, Saved], bool]:
    """Return what was saved and never removed, by id, and whether the journal is whole, reports aside."""
    try:
        journal = journals.read(store, run, with_reports=False)
        is_whole = not journal.damage and journals.gap(store, run) is None and bool(journal.segments)
    except (FormatError, NotFoundError, StoreError):  # audit names it
        return {}, False
    removed = set[str]()
    # whoever removes or restores beside a training writes to another segment
    for event in sorted(journal.events, key=lambda event: event.at):
        match event:
            case Removed():
                removed.add(event.checkpoint)
            case Undone(parts=()):
                removed.discard(event.checkpoint)
            case _:
                pass
    saves = {event.checkpoint: event for event in journal.events if isinstance(event, Saved)}
    return {checkpoint: saved for checkpoint, saved in saves.items() if checkpoint not in removed}, is_whole


def _absence(store: Store, run: str, saved: Saved) -> CorruptError | None:
    """Return the error that a checkpoint is lost; None when it is there, damaged, or in the trash."""
    directory = f"{store.location}/{layout.checkpoint_prefix(run, saved.name)}"
    evidence = f"although the journal says that it was saved at {saved.at:%Y-%m-%d %H:%M} UTC and never removed"
    kind = store.foreign(layout.checkpoints_prefix(run)).get(saved.name)
    if kind is not None:
        return CorruptError(f"{directory} is {kind}, {evidence}; put the directory in its place")
    match reader.inspect(store, run, saved.name):
        case FoundCheckpoint(manifest=manifest) if manifest.id != saved.checkpoint:
            way = f"to record that it is gone: {reader.rm_command(store, run, saved.checkpoint)}"
            return CorruptError(
                f"{directory} is another checkpoint, and {saved.checkpoint} is missing, {evidence}; {way}"
            )
        case None if not _in_trash(store, run, saved.name):
            command = reader.rm_command(store, run, saved.name)
            if f"{saved.name}/" in store.children(layout.checkpoints_prefix(run)):
                way = f"copy {MANIFEST} from a backup, or remove what is left: {command}"
                return CorruptError(f"{directory} has lost its {MANIFEST}, {evidence}; {way}")
            way = f"copy it from a backup, or record that it is gone: {command}"
            return CorruptError(f"{directory} is missing, {evidence}; {way}")
        case _:
            return None


def _in_trash(store: Store, run: str, name: str) -> bool:
    return store.size(layout.trashed_key(run, name)) is not None


def _undecided(store: Store, run: str, name: str) -> CorruptError:
    return CorruptError(
        f"{store.location}/{layout.checkpoint_prefix(run, name)} has no {MANIFEST}, and the journal, which is "
        "damaged, cannot tell whether it was a checkpoint; copy what is missing from a backup, or remove what is left: "
        f"{reader.rm_command(store, run, name)}"
    )
