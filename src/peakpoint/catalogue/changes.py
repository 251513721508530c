"""What the files of a run say that the catalogue does not know yet. Reads files only, knows of no database.

A run is compared with what was read of it last: the stamps of two directories, and the lengths of the journal's
segments that may still grow (a segment whose last event is ``closed`` never does). For a run where one of these
differs, new lines of the journal and new directories are read, and nothing else. A run of the same name with another
identity, or a journal with another past (a backup that was put back), is read from the beginning.

A directory that was seen in the middle of something is unsettled: its own stamp is compared, too, until what the
journal has announced is there to be seen. So a crash at any instant leaves nothing unseen.
"""

from collections.abc import Mapping, Sequence
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
)
from peakpoint.format.sealed import digest
from peakpoint.repository import journal as journals
from peakpoint.repository import reader
from peakpoint.repository.packs import readable_run_archive
from peakpoint.store import Store

Rows = Mapping[str, tuple[int, str]]
"""The checkpoints of a run in the catalogue: name to key and id."""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A directory to look at again.

    Attributes:
        stamp: of the directory, before it was read; None when that could not be told.
        damage: what is wrong with its manifest.
        awaits: what the journal has announced and was not there to be seen: ``"gone"``, ``"restored"``, ``"without"``
            and a part, or ``"word"`` of what came of a change.
        resting: it is in the trash; whoever takes it out says so in the journal first.
    """

    stamp: str | None
    damage: str | None = None
    awaits: tuple[str, ...] = ()
    resting: bool = False


@dataclass(frozen=True, slots=True)
class Growing:
    """A segment of the journal that may still grow.

    Attributes:
        read: bytes that were read, in whole lines.
        seen: bytes that were there, with a line that was torn.
    """

    read: int
    seen: int


@dataclass(frozen=True, slots=True)
class ReadPosition:
    """How far the files of a run are read.

    Attributes:
        identity: digest of ``run.json``.
        journal: the stamp of its journal when it was listed; None when that could not be told.
        checkpoints: the same of its checkpoints.
        last: the newest segment; those before it are known, as numbers only rise.
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
    growing: Mapping[str, Growing] = field(default_factory=dict)
    unsettled: Mapping[str, Unsettled] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunChanges:
    """What is new of a run.

    Attributes:
        known: how far it is read now.
        whole: all of it was read, and what was known before is to be forgotten.
        events: the new lines of the journal.
        past: all lines, where the new ones change what counts of the earlier; None elsewhere.
        found: checkpoints that are new or were looked at again.
        gone: names that the catalogue has, and that are there no more or are among ``found``.
    """

    known: ReadPosition
    whole: bool
    events: Sequence[Event]
    past: Sequence[Event] | None
    found: Sequence[reader.FoundCheckpoint]
    gone: frozenset[str]

    @property
    def is_empty(self) -> bool:
        """Whether the catalogue has all of it."""
        return not (self.whole or self.events or self.found or self.gone)


NOTES = (Measured, Pinned, Unpinned)
_TAIL = 64


def is_current(store: Store, run: str, known: ReadPosition, *, by_hand: bool = True) -> bool:
    """Whether a run's files are as they were when they were read.

    Args:
        store: where.
        run: which.
        known: what was read.
        by_hand: also look for directories that were deleted, or copied there, without Peakpoint. Everything that it
            does itself begins with a line in the journal; where no segment can grow, that is a new segment.
    """
    journal = layout.journal_prefix(run)
    return (
        is_same(store, journal, known.journal)
        and (not (by_hand or known.growing) or is_same(store, layout.checkpoints_prefix(run), known.checkpoints))
        and all(store.size(f"{journal}/{segment}") == one.seen for segment, one in known.growing.items())
        and all(
            one.resting or is_same(store, layout.checkpoint_prefix(run, name), one.stamp)
            for name, one in known.unsettled.items()
        )
    )


def is_same(store: Store, prefix: str, stamp: str | None) -> bool:
    """Whether a directory has the stamp that it had; False where that could not be told."""
    return stamp is not None and store.stamp(prefix) == stamp


def read(store: Store, run: str, known: ReadPosition | None, rows: Rows) -> RunChanges:
    """Read what is new.

    Args:
        store: where.
        run: which.
        known: how far it is read; None when the catalogue does not know it.
        rows: what the catalogue has of it.

    Raises:
        NotFoundError: the run is gone.
        CorruptError: ``run.json`` cannot be read.
        StoreError: a directory cannot be read.
    """
    identity = digest(store.get(layout.run_record(run)))[:16]
    journal = None
    if known is not None and known.identity == identity:
        journal = _journal(store, run, known)
    whole = journal is None
    if journal is None:
        known, rows = ReadPosition(identity), {}
        journal = _journal(store, run, known)
        assert journal is not None, "nothing was known that could be contradicted"
    assert known is not None
    now, events = journal
    past = None
    if not whole and any(isinstance(event, Opened | Started) for event in events):
        past = journals.read(store, run).events
    stamp = store.stamp(layout.checkpoints_prefix(run))
    found, gone, unsettled = _Directories(store, run, known, rows).read(events)
    now = replace(now, identity=identity, checkpoints=stamp, unsettled=unsettled)
    return RunChanges(now, whole, events, past, found, gone)


# --- the journal --------------------------------------------------------------------------------------------------


def _journal(store: Store, run: str, known: ReadPosition) -> tuple[ReadPosition, list[Event]] | None:
    """How far the journal is read after this, and what is new in it; None when it has another past than was read."""
    prefix = layout.journal_prefix(run)
    stamp, segments = store.stamp(prefix), journals.segments_of(store, run)
    before = sum((len(name), name) <= (len(known.last), known.last) for name in segments)
    if before != known.segments or not _has_that_past(store, prefix, segments[:before], known, stamp):
        return None
    events: list[Event] = []
    growing: dict[str, Growing] = {}
    closed, end = known.closed, 0
    for place, segment in enumerate(segments):
        one = known.growing.get(segment)
        if place < before and one is None:
            continue
        begin = 0 if one is None else one.read
        seen = store.size(f"{prefix}/{segment}") or 0
        more, end = journals.read_appended(store, run, segment, begin)
        # notes count in the order of segments, and segments only grow
        if seen < begin or (place < before - 1 and any(isinstance(event, NOTES) for event in more)):
            return None
        events += more
        if more and isinstance(more[-1], Closed):
            closed += end
        else:
            growing[segment] = Growing(end, max(seen, end))
    tail = known.tail
    if segments and (segments[-1] != known.last or segments[-1] in known.growing):
        tail = _tail(store, f"{prefix}/{segments[-1]}", end)
    last = segments[-1] if segments else ""
    now = ReadPosition(journal=stamp, last=last, segments=len(segments), closed=closed, tail=tail, growing=growing)
    return now, events


def _has_that_past(store: Store, prefix: str, segments: Sequence[str], known: ReadPosition, stamp: str | None) -> bool:
    """Whether the segments that were read are those that are there."""
    if not segments:
        return True
    last = segments[-1]
    one = known.growing.get(last)
    end = one.read if one is not None else store.size(f"{prefix}/{last}") or 0
    if _tail(store, f"{prefix}/{last}", end) != known.tail:
        return False
    if stamp is not None and stamp == known.journal:
        return True
    sizes = [store.size(f"{prefix}/{name}") or 0 for name in segments if name not in known.growing]
    return sum(sizes) == known.closed


def _tail(store: Store, key: str, end: int) -> str:
    return digest(store.get(key, max(0, end - _TAIL), end))[:16]


# --- directories --------------------------------------------------------------------------------------------------


class _Directories:
    """The checkpoints of a run, read again where that is needed."""

    def __init__(self, store: Store, run: str, known: ReadPosition, rows: Rows) -> None:
        self._store, self._run, self._rows = store, run, rows
        self._before = known.unsettled
        self._awaits = {name: set(one.awaits) for name, one in known.unsettled.items()}
        self._archive = readable_run_archive(store, run)

    def read(
        self, events: Sequence[Event]
    ) -> tuple[list[reader.FoundCheckpoint], frozenset[str], dict[str, Unsettled]]:
        """What was found, what is gone, and what is unsettled."""
        touched = self._heed(events)
        children = self._store.children(layout.checkpoints_prefix(self._run))
        # names of ours are ASCII; no other directory can have a manifest that names it
        present = {child[:-1] for child in children if child.endswith("/") and child.isascii()}
        touched |= {name for name, one in self._before.items() if not (one.resting or self._is_same(name, one.stamp))}
        calm = {name: one for name, one in self._before.items() if name in present and name not in touched}
        fresh = {name for name in present if name in touched or (name not in self._rows and name not in calm)}
        found: list[reader.FoundCheckpoint] = []
        unsettled = dict(calm)
        for name in sorted(fresh):
            self._look(name, found, unsettled)
        gone = frozenset(name for name in self._rows if name not in present or name in touched)
        return found, gone, unsettled

    def _is_same(self, name: str, stamp: str | None) -> bool:
        return is_same(self._store, layout.checkpoint_prefix(self._run, name), stamp)

    def _look(self, name: str, found: list[reader.FoundCheckpoint], unsettled: dict[str, Unsettled]) -> None:
        stamp = self._store.stamp(layout.checkpoint_prefix(self._run, name))
        awaits = self._awaits.get(name, set())
        match reader.inspect(self._store, self._run, name, self._archive):
            case reader.FoundCheckpoint(manifest=manifest, archived=archived) as standing:
                found.append(standing)
                seen = {"restored"} if not archived else set()
                there = {_WITHOUT + part for part in manifest.parts}
                seen |= {one for one in awaits if one.startswith(_WITHOUT)} - there
                awaits -= seen
                if awaits:
                    if not awaits.isdisjoint({"word", "restored"}):
                        stamp = None  # the record of an archive is that of the run: no directory tells of it
                    unsettled[name] = Unsettled(stamp, awaits=tuple(sorted(awaits)))
            case reader.Damaged(error=error):
                # bytes that are put back in place leave no trace in the directory: looked at again every time
                unsettled[name] = Unsettled(None, str(error), tuple(sorted(awaits)))
            case None:
                trashed = self._store.size(layout.trashed_key(self._run, name)) is not None
                awaits -= {"gone"}
                unsettled[name] = Unsettled(
                    stamp, awaits=tuple(sorted(awaits)), resting=trashed and "word" not in awaits
                )

    def _heed(self, events: Sequence[Event]) -> set[str]:
        """Note what the events announce; the names that they are about."""
        touched = set()
        noted = any(isinstance(event, NOTES) for event in events)
        ids = {identity: name for name, (_, identity) in self._rows.items()} if noted else {}
        for event in events:
            if isinstance(event, NOTES):
                touched |= {ids[event.checkpoint]} if event.checkpoint in ids else set()
            elif isinstance(event, _ABOUT):
                touched.add(event.name)
                self._announce(event, self._awaits.setdefault(event.name, set()))
        return touched

    @staticmethod
    def _announce(event: Event, awaits: set[str]) -> None:
        match event:
            case Saved():
                awaits.clear()
            case Removed():
                awaits.add("gone")
            case PartsDropped(parts=parts):
                awaits.update(_WITHOUT + part for part in parts)
            case Changing():
                awaits.add("word")
            case Restored():
                awaits.add("restored")
            case Archived():
                awaits -= {"word", "restored"}
            case Undone(parts=parts):
                awaits -= {"word", "gone", *(_WITHOUT + part for part in parts)}
            case _:
                pass


_WITHOUT = "without "
_ABOUT = (
    Saved,
    Removed,
    PartsDropped,
    Changing,
    Restored,
    Archived,
    Undone,
)
