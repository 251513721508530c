"""What is new in the files of a run since they were read last. Reads files only, knows of no database.

A run is compared with its read position: the stamps of two directories, and the lengths of the journal's segments that
may still grow (a segment whose last event is ``closed`` never does). Where one of these differs, new lines of the
journal and new directories are read, and nothing else. A run of the same name with another identity, or a journal with
another past (a backup that was put back), is read from the beginning.

A directory that was seen in the middle of a change is unsettled: its own stamp is compared, too, until what the journal
has announced is there to be seen. So a crash at any instant leaves nothing unseen.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from peakpoint.format import layout
from peakpoint.format.events import (
    Archived,
    Changing,
    Closed,
    Event,
    Measured,
    Opened,
    PartsDropped,
    Pinned,
    Removed,
    Restored,
    Saved,
    Started,
    Undone,
    Unpinned,
    Withdrawn,
)
from peakpoint.format.sealed import digest
from peakpoint.repository import journal as journals
from peakpoint.repository import reader
from peakpoint.repository.lost import lost_checkpoints
from peakpoint.repository.packs import readable_run_archive
from peakpoint.store import Store

Indexed = Mapping[str, tuple[int, str]]
"""The checkpoints of a run in the catalogue: name to key and id."""


@dataclass(frozen=True, slots=True)
class UnsettledDirectory:
    """A directory to look at again.

    Attributes:
        stamp: of the directory, before it was read; None when that could not be told.
        damage: what is wrong with its manifest.
        expected: what the journal has announced and was not there to be seen: ``"gone"``, ``"restored"``, ``"without"``
            and a part, or ``"outcome"`` of a change.
        in_trash: whoever takes it out says so in the journal first.
    """

    stamp: str | None
    damage: str | None = None
    expected: tuple[str, ...] = ()
    in_trash: bool = False


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """A segment of the journal that may still grow.

    Attributes:
        read: bytes that were read, in whole lines.
        size: bytes of the file then, with a line that was torn.
    """

    read: int
    size: int


@dataclass(frozen=True, slots=True)
class ReadPosition:
    """How far the files of a run are read.

    Attributes:
        identity: digest of ``run.json``.
        journal: the stamp of its journal when it was listed; None when that could not be told.
        checkpoints: the same of its checkpoints.
        last: the newest segment; those before it are read, as numbers only rise.
        segments: how many there are up to that one.
        closed: bytes of those that cannot grow.
        tail: digest of the last bytes that were read of the newest segment.
        growing: those that may still grow.
        unsettled: directories to look at again when they change.
    """

    identity: str = ""
    journal: str | None = None
    checkpoints: str | None = None
    last: str = ""
    segments: int = 0
    closed: int = 0
    tail: str = ""
    growing: Mapping[str, OpenSegment] = field(default_factory=dict)
    unsettled: Mapping[str, UnsettledDirectory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunChanges:
    """What is new of a run.

    Attributes:
        position: how far it is read now.
        complete: all of it was read, and what the catalogue has of it is to be forgotten.
        events: the new lines of the journal.
        past: all lines, where the new ones change what counts of the earlier; None elsewhere.
        checkpoints: those that are new or were looked at again.
        removed: names that the catalogue has, and that exist no more or are among ``checkpoints``.
    """

    position: ReadPosition
    complete: bool
    events: Sequence[Event]
    past: Sequence[Event] | None
    checkpoints: Sequence[reader.FoundCheckpoint]
    removed: frozenset[str]

    @property
    def is_empty(self) -> bool:
        """Whether the catalogue has all of it."""
        return not (self.complete or self.events or self.checkpoints or self.removed)


NOTES = (Measured, Withdrawn, Pinned, Unpinned)
_TAIL = 64


def is_current(store: Store, run: str, position: ReadPosition, *, by_hand: bool = True) -> bool:
    """Whether a run's files are as they were when they were read.

    Args:
        store: where.
        run: which.
        position: how far they were read.
        by_hand: also look for directories that were deleted, or copied there, without Peakpoint. Everything that it
            does itself begins with a line in the journal; where no segment can grow, that is a new segment.
    """
    journal = layout.journal_prefix(run)
    return (
        is_same(store, journal, position.journal)
        and (not (by_hand or position.growing) or is_same(store, layout.checkpoints_prefix(run), position.checkpoints))
        and all(store.size(f"{journal}/{name}") == segment.size for name, segment in position.growing.items())
        and all(
            directory.in_trash or is_same(store, layout.checkpoint_prefix(run, name), directory.stamp)
            for name, directory in position.unsettled.items()
        )
    )


def is_same(store: Store, prefix: str, stamp: str | None) -> bool:
    """Whether a directory has the stamp that it had; False where that could not be told."""
    return stamp is not None and store.stamp(prefix) == stamp


def read_changes(store: Store, run: str, position: ReadPosition | None, indexed: Indexed) -> RunChanges:
    """Read what is new of a run.

    Args:
        store: where.
        run: which.
        position: how far it is read; None when the catalogue does not have it.
        indexed: its checkpoints in the catalogue.

    Raises:
        NotFoundError: the run is gone.
        CorruptError: ``run.json`` cannot be read.
        StoreError: a directory cannot be read.
    """
    identity = digest(store.get(layout.run_record(run)))[:16]
    beginning = ReadPosition(identity)
    earlier = position if position is not None and position.identity == identity else beginning
    journal = _read_journal(store, run, earlier)
    complete = earlier is beginning or journal is None
    if journal is None:  # with another past
        earlier = beginning
        journal = _read_journal(store, run, earlier)
        assert journal is not None, "nothing was read that could be contradicted"
    now, events = journal
    past = None
    if not complete and any(isinstance(event, Opened | Started) for event in events):
        past = journals.read(store, run).events
    stamp = store.stamp(layout.checkpoints_prefix(run))
    directories = _Directories(store, run, earlier.unsettled, {} if complete else indexed)
    checkpoints, removed = directories.read(events)
    now = replace(now, identity=identity, checkpoints=stamp, unsettled=directories.unsettled)
    return RunChanges(now, complete, events, past, checkpoints, removed)


# --- the journal --------------------------------------------------------------------------------------------------


def _read_journal(store: Store, run: str, position: ReadPosition) -> tuple[ReadPosition, list[Event]] | None:
    """How far the journal is read after this, and what is new in it; None when it has another past than was read."""
    prefix = layout.journal_prefix(run)
    stamp, segments = store.stamp(prefix), journals.segments_of(store, run)
    earlier = sum((len(name), name) <= (len(position.last), position.last) for name in segments)
    if earlier != position.segments or not _has_that_past(store, prefix, segments[:earlier], position, stamp):
        return None
    events: list[Event] = []
    growing: dict[str, OpenSegment] = {}
    closed, end = position.closed, 0
    for number, name in enumerate(segments):
        segment = position.growing.get(name)
        if number < earlier and segment is None:
            continue  # closed, and read
        begin = 0 if segment is None else segment.read
        size = store.size(f"{prefix}/{name}") or 0
        new_events, end = journals.read_appended(store, run, name, begin)
        # notes count in the order of segments, and segments only grow
        if size < begin or (number < earlier - 1 and any(isinstance(event, NOTES) for event in new_events)):
            return None
        events += new_events
        if new_events and isinstance(new_events[-1], Closed):
            closed += end
        else:
            growing[name] = OpenSegment(end, max(size, end))
    last, tail = segments[-1] if segments else "", position.tail
    if segments and (last != position.last or last in position.growing):
        tail = _tail(store, f"{prefix}/{last}", end)
    now = ReadPosition(journal=stamp, last=last, segments=len(segments), closed=closed, tail=tail, growing=growing)
    return now, events


def _has_that_past(
    store: Store, prefix: str, segments: Sequence[str], position: ReadPosition, stamp: str | None
) -> bool:
    """Whether the segments that were read are those that are there."""
    if not segments:
        return True
    last = segments[-1]
    segment = position.growing.get(last)
    end = segment.read if segment is not None else store.size(f"{prefix}/{last}") or 0
    if _tail(store, f"{prefix}/{last}", end) != position.tail:
        return False
    if stamp is not None and stamp == position.journal:
        return True
    closed = (store.size(f"{prefix}/{name}") or 0 for name in segments if name not in position.growing)
    return sum(closed) == position.closed


def _tail(store: Store, key: str, end: int) -> str:
    return digest(store.get(key, max(0, end - _TAIL), end))[:16]


# --- directories --------------------------------------------------------------------------------------------------

_WITHOUT = "without "


class _Directories:
    """The checkpoints of a run, read again where that is needed.

    Attributes:
        unsettled: directories to look at again when they change.
    """

    def __init__(self, store: Store, run: str, unsettled: Mapping[str, UnsettledDirectory], indexed: Indexed) -> None:
        self._store, self._run, self._indexed = store, run, indexed
        self.unsettled = dict(unsettled)
        self._expected = {name: set(directory.expected) for name, directory in unsettled.items()}
        self._archive = readable_run_archive(store, run)

    def read(self, events: Sequence[Event]) -> tuple[list[reader.FoundCheckpoint], frozenset[str]]:
        """The checkpoints that are new or have changed, and the names that are gone or among them."""
        touched = self._announced(events)
        children = self._store.children(layout.checkpoints_prefix(self._run))
        # names of ours are ASCII; no other directory can have a manifest that names it
        names = {child[:-1] for child in children if child.endswith("/") and child.isascii()}
        touched |= {name for name, directory in self.unsettled.items() if not self._is_settled(name, directory)}
        self.unsettled = {
            name: directory
            for name, directory in self.unsettled.items()
            if name not in touched and (name in names or directory.damage is not None)
        }
        unread = (names & touched) | (names - self._indexed.keys() - self.unsettled.keys())
        looked_at = [self._look(name) for name in sorted(unread)]
        removed = frozenset(name for name in self._indexed if name not in names or name in touched)
        checkpoints = [checkpoint for checkpoint in looked_at if checkpoint is not None]
        if not self._indexed or None in looked_at or not removed <= touched:
            ids = {identity for name, (_, identity) in self._indexed.items() if name not in removed}
            self._note_lost(ids | {checkpoint.manifest.id for checkpoint in checkpoints})
        return checkpoints, removed

    def _note_lost(self, ids: AbstractSet[str]) -> None:
        """Note the checkpoints that were never removed and are not there; they are looked at when they come back."""
        for damage in lost_checkpoints(self._store, self._run, ids):
            stamp = self._store.stamp(layout.checkpoint_prefix(self._run, damage.name))
            self.unsettled.setdefault(damage.name, UnsettledDirectory(stamp))
            self.unsettled[damage.name] = replace(self.unsettled[damage.name], damage=str(damage.error))

    def _is_settled(self, name: str, directory: UnsettledDirectory) -> bool:
        prefix = layout.checkpoint_prefix(self._run, name)
        return directory.in_trash or is_same(self._store, prefix, directory.stamp)

    def _look(self, name: str) -> reader.FoundCheckpoint | None:
        """Read one directory, and note whether it is settled; its checkpoint, if it has one."""
        stamp = self._store.stamp(layout.checkpoint_prefix(self._run, name))
        expected = self._expected.get(name, set())
        match reader.inspect(self._store, self._run, name, self._archive):
            case reader.FoundCheckpoint(manifest=manifest, archived=archived) as checkpoint:
                expected -= set() if archived else {"restored"}
                parts = {_WITHOUT + part for part in manifest.parts}
                expected -= {change for change in expected if change.startswith(_WITHOUT)} - parts
                if expected:
                    # the record of an archive is that of the run: no directory tells of it
                    stamp = None if expected & {"outcome", "restored"} else stamp
                    self.unsettled[name] = UnsettledDirectory(stamp, expected=tuple(sorted(expected)))
                return checkpoint
            case reader.Damaged(error=error):
                # bytes that are put back in place leave no trace in the directory: looked at again every time
                self.unsettled[name] = UnsettledDirectory(None, str(error), tuple(sorted(expected)))
            case None:
                trashed = self._store.size(layout.trashed_key(self._run, name)) is not None
                expected -= {"gone"}
                in_trash = trashed and "outcome" not in expected
                self.unsettled[name] = UnsettledDirectory(stamp, expected=tuple(sorted(expected)), in_trash=in_trash)
        return None

    def _announced(self, events: Sequence[Event]) -> set[str]:
        """Note what the events announce; the names that they are about."""
        touched = set()
        has_notes = any(isinstance(event, NOTES) for event in events)
        names = {identity: name for name, (_, identity) in self._indexed.items()} if has_notes else {}
        for event in events:
            if isinstance(event, NOTES):
                touched |= {names[event.checkpoint]} if event.checkpoint in names else set()
            elif isinstance(event, Saved | Removed | PartsDropped | Changing | Restored | Archived | Undone):
                touched.add(event.name)
                _expect(event, self._expected.setdefault(event.name, set()))
        return touched


def _expect(event: Event, expected: set[str]) -> None:
    """Change what is expected of a directory by what an event announces."""
    match event:
        case Saved():
            expected.clear()
        case Removed():
            expected.add("gone")
        case PartsDropped(parts=parts):
            expected.update(_WITHOUT + part for part in parts)
        case Changing():
            expected.add("outcome")
        case Restored():
            expected.add("restored")
        case Archived():
            expected -= {"outcome", "restored"}
        case Undone(parts=parts):
            expected -= {"outcome", "gone", *(_WITHOUT + part for part in parts)}
        case _:
            pass
