r"""The journal of a run: what was reported and what was done, append-only.

Every process that changes a run creates one segment, ``<number>.jsonl``, numbered one above the highest that exists,
and appends sealed lines to it. Readers take the segments in the order of their numbers. A last line without its newline
was torn by a crash; it was never acknowledged, and is skipped.

Reports are written at once, which a killed process survives, and made durable with the next commit, so that the
history of a checkpoint is durable before the checkpoint exists. A power cut can lose only reports after the newest
checkpoint, and a resumed run makes those again.
"""

import io
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from peakpoint.errors import CorruptError, PeakpointWarning, StoreError
from peakpoint.format.events import CLOSED_LINE, OPENED_LINE, REPORTED_LINE, Event, decode, decode_report, encode
from peakpoint.format.layout import journal_prefix, writer_lock
from peakpoint.format.layout import number as number_in
from peakpoint.format.sealed import gc_paused
from peakpoint.repository.provenance import Clock
from peakpoint.store import LARGE, Hold, Log, Store, create_numbered


@dataclass(frozen=True, slots=True)
class JournalContents:
    """The events of a journal, in order.

    Attributes:
        damage: one sentence for each line that could not be read; torn last lines are not damage.
        segments: name of each segment to the number of its events.
    """

    events: tuple[Event, ...]
    damage: tuple[str, ...]
    segments: Mapping[str, int]

    def by_segment(self) -> Iterator[tuple[str, tuple[Event, ...]]]:
        """Yield each segment with its events."""
        begin = 0
        for name, count in self.segments.items():
            yield name, self.events[begin : begin + count]
            begin += count


def segments_of(store: Store, run: str) -> list[str]:
    """Return the names of a journal's segments, in the order of their numbers."""
    names = [name for name in store.children(journal_prefix(run)) if name.endswith(".jsonl")]
    return sorted(names, key=lambda name: (len(name), name))


def gap(store: Store, run: str) -> str | None:
    """Return the first segment that is missing although a later one exists; None when there is none."""
    children = store.children(journal_prefix(run))
    numbers = sorted({number_in(child, "", ".jsonl") for child in children} - {0})
    return next((f"{due:06d}.jsonl" for due, number in enumerate(numbers, 1) if number != due), None)


def read(store: Store, run: str, only: Collection[str] | None = None, *, with_reports: bool = True) -> JournalContents:
    """Read the journal of a run, or some of its segments; empty when the run has none.

    Args:
        store: holds the run.
        run: its name.
        only: the segments to read; all by default.
        with_reports: whether to read reports, too, which are nearly all lines of a long run; damage of them is not
            noticed otherwise.
    """
    prefix = journal_prefix(run)
    events: list[Event] = []
    damage: list[str] = []
    segments: dict[str, int] = {}
    with gc_paused():
        for segment in segments_of(store, run):
            if only is None or segment in only:
                first = len(events)
                data = store.get(f"{prefix}/{segment}", max_size=LARGE)
                _read_segment(data, f"{prefix}/{segment}", events, damage, with_reports=with_reports)
                segments[segment] = len(events) - first
    return JournalContents(tuple(events), tuple(damage), segments)


_TAIL = 4096  # bytes; an event that closes a segment is shorter


def live_segments(store: Store, run: str, *, held: bool = False) -> list[str]:
    """Return the segments that somebody else may still be writing; reads a few bytes of each.

    A segment that ends with ``Closed`` is complete, and so is one whose writer has died. Of the writers that hold the
    run, only the newest may be alive, and only while somebody holds the run: this works where locks of files do not,
    and data-loader workers that outlive a killed training do not hold the run.

    Args:
        store: holds the run.
        run: its name.
        held: whether the caller holds the run: then no earlier holder is alive.
    """
    segments = segments_of(store, run)
    live = []
    for number, segment in enumerate(segments):
        key = f"{journal_prefix(run)}/{segment}"
        size = store.size(key) or 0
        last = store.get(key, max(0, size - _TAIL)).rstrip(b"\n").rpartition(b"\n")[2]
        if last.startswith(CLOSED_LINE):
            continue
        if _opens(store, run, segment):
            superseded = held or any(_opens(store, run, later) for later in segments[number + 1 :])
            alive = not superseded and store.holder(writer_lock(run)) is not None
        else:
            alive = store.is_read(key)
        if alive:
            live.append(segment)
    return live


def _opens(store: Store, run: str, segment: str) -> bool:
    """Tell whether the writer of a segment holds the run."""
    return store.get(f"{journal_prefix(run)}/{segment}", 0, len(OPENED_LINE)) == OPENED_LINE


def read_appended(store: Store, run: str, segment: str, begin: int) -> tuple[list[Event], int]:
    """Read what was appended to a segment after byte ``begin``; damaged lines are left out.

    Returns:
        The events, and the byte to go on from: a last line without its newline is not read yet.
    """
    key = f"{journal_prefix(run)}/{segment}"
    data = store.get(key, begin, max_size=LARGE)
    lines = data[: data.rfind(b"\n") + 1]
    events: list[Event] = []
    with gc_paused():
        _read_segment(lines, key, events, [])
    return events, begin + len(lines)


def _read_segment(
    data: bytes, where: str, events: list[Event], damage: list[str], *, with_reports: bool = True
) -> None:
    for number, line in enumerate(io.BytesIO(data), 1):
        if line == b"\n" or not line.endswith(b"\n"):
            continue  # empty, or torn: the last
        if not with_reports and line.startswith(REPORTED_LINE):
            continue
        event: Event | None = decode_report(line)
        if event is None:
            try:
                event = decode(line, where=f"{where} line {number}")
            except CorruptError as error:
                damage.append(str(error))
        if event is not None:
            events.append(event)


class Journal:
    """The segment of this process, created now or, on a full disk, with the first event; safe for several threads.

    Args:
        store: holds the run.
        run: its name.
        clock: gives the times of events.

    Attributes:
        segment: the name of the segment; empty while the disk is too full to create it.

    Raises:
        StoreError: the segment cannot be created for another reason.
    """

    def __init__(self, store: Store, run: str, clock: Clock) -> None:
        self._store, self._prefix, self._clock = store, journal_prefix(run), clock
        self._lock = threading.Lock()
        self._unwritten: list[Event] = []  # while the disk is full
        self._log: Log | None = None
        self._alive: Hold | None = None
        self.segment = ""
        try:
            self._opened()
        except StoreError as error:
            if not error.is_full:
                raise

    def _opened(self) -> Log:
        if self._log is None:
            self.segment, self._log = self._create()
            # lets others see whether the writer of a segment that was never closed is alive
            self._alive = self._store.reading(f"{self._prefix}/{self.segment}")
        return self._log

    def _create(self) -> tuple[str, Log]:
        def create(number: int) -> tuple[str, Log]:
            name = f"{number:06d}.jsonl"
            return name, self._store.log(f"{self._prefix}/{name}")

        numbers = (number_in(child, "", ".jsonl") for child in self._store.children(self._prefix))
        return create_numbered(1 + max(numbers, default=0), create)

    def now(self) -> datetime:
        """Return the time of an event that happens now."""
        return self._clock()

    def append(self, event: Event) -> None:
        """Write one event; a killed process survives it, a power cut only after ``sync``.

        Raises:
            StoreError: the store refused.
        """
        with self._lock:
            self._catch_up()
            self._opened().append(encode(event))

    def _catch_up(self) -> None:
        while self._unwritten:
            self._opened().append(encode(self._unwritten[0]))
            self._unwritten.pop(0)

    def record(self, events: Iterable[Event], *, later: bool = False) -> bool:
        """Write events, durably.

        Args:
            events: in order.
            later: whether they may wait while the disk is full: they are written before the next event, by the next
                ``record`` or when the journal is closed, if there is space by then.

        Returns:
            Whether they, and those that were waiting, are durable.

        Raises:
            StoreError: the store refused.
        """
        with self._lock:
            self._unwritten += events
            try:
                self._catch_up()
                self.sync()
            except StoreError as error:
                if later and error.is_full:
                    return False
                self._unwritten.clear()
                raise
        return True

    def sync(self) -> None:
        """Make all events durable."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Make all events durable and close the segment."""
        try:
            if self._unwritten:
                self.record((), later=True)
        finally:
            if self._log is not None:
                self._log.close()
            if self._alive is not None:
                self._alive.release()
        warn_remarks(self._store)


def warn_remarks(store: Store) -> None:
    """Warn of what people should know of how a store works here, once."""
    for remark in store.remarks():
        warnings.warn(remark, PeakpointWarning, stacklevel=2)
