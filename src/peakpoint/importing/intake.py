"""The writing side of an import: which sources are there already, and each of the others through ``writer.commit``."""

import errno
import mmap
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from peakpoint import journal as journals
from peakpoint import layout, names
from peakpoint.audit import clean_run
from peakpoint.capture import FromElsewhere, StateEncoder, capture
from peakpoint.clock import Clock
from peakpoint.copying import NOTHING
from peakpoint.errors import ConflictError, CorruptError, StoreError
from peakpoint.importing.foreign import EXTRA, Foreign, Reading, keepable
from peakpoint.importing.placing import COUNTED, OutOfPlaceError, Placed, placed
from peakpoint.importing.sources import Source, read
from peakpoint.importing.timeline import Moment
from peakpoint.journal import Journal
from peakpoint.manifest import FileRecord, Manifest
from peakpoint.notes import notes as notes_of
from peakpoint.position import Position
from peakpoint.reader import shelf
from peakpoint.report import written_by
from peakpoint.repository import Run, ensure_repository, ensure_run
from peakpoint.rules import Rule, check_watched, watched
from peakpoint.store import LocalStore, Store, holder_note
from peakpoint.tensors import Staging
from peakpoint.tree import Encoder
from peakpoint.writer import Span, WholeImage, commit, unused_name

DIGEST, PLACE = "source_blake3", "imported_from"  # in a manifest's written_by
_MODEL = "model.safetensors"
_SLACK = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of one source.

    Attributes:
        path: the file or folder.
        tool: what wrote it, as far as can be told; its kind when it cannot be read.
        epoch: the epoch's index from 0, None when nothing tells it.
        step: steps completed; see ``peakpoint.importing.timeline`` for those that do not tell it.
        step_counted: whether no file tells the step.
        metrics: of the moment, those of logs included.
        parts: names of the parts.
        size_bytes: of the source.
        notes: what became of what, a sentence each.
        name: of the checkpoint; None when there is none: dry run, or unreadable.
        status: ``"imported"``, ``"linked"``, ``"there"`` (imported earlier), ``"removed"`` (imported earlier,
            and gone since), ``"twin"`` (the same bytes as another source), ``"planned"`` or ``"unreadable"``.
        error: why it is unreadable.
    """

    path: Path
    tool: str
    epoch: int | None = None
    step: int | None = None
    step_counted: bool = False
    metrics: Mapping[str, float]
    parts: tuple[str, ...] = ()
    size_bytes: int = 0
    notes: tuple[str, ...] = ()
    name: str | None = None
    status: str = "planned"
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A source that has been read once, without its tensors."""

    source: Source
    stamp: tuple[tuple[int, int], ...]
    digest: str
    found: Foreign  # its parts are emptied
    epoch: int | None
    step: int | None
    metrics: Mapping[str, float]


class Intake:
    """Brings sources into a run, or says what it would do.

    Args:
        store: where.
        run: the run.
        seen: the sources.
        moments: their moments in order, and those of logs.
        rules: put these in force; None leaves those that are, and pins what comes in.
        how: how sources are read.
        link: whether to link files that can serve as they are.

    Raises:
        ConflictError: the run holds something that these sources do not fit to.
        ConfigError: a rule ranks by a metric that none of them has.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        seen: Sequence[Seen],
        moments: Sequence[Moment],
        rules: tuple[Rule, ...] | None,
        how: Reading,
        *,
        link: bool,
    ) -> None:
        self._store, self._run, self._seen, self._moments = store, run, seen, moments
        self._rules, self._how, self._link = rules, how, link
        self._in_force = rules or ()
        self._look()
        known = (*(moment.metrics for moment in moments), *(one.metrics for one in journals.history(self._events)))
        check_watched(self._in_force, {name for metrics in known for name in metrics})

    def _look(self) -> None:
        there = shelf(self._store, self._run)
        self._manifests = there.manifests
        self._events = journals.read(self._store, self._run).events
        own = [one for one in there.manifests if DIGEST not in one.written_by]
        if own or there.damaged:
            which = own[0].name if own else there.damaged[0].name
            raise ConflictError(
                f"run {self._run!r} holds {which}, which was not imported: give another name with --run"
            )
        self._there = {one.written_by[DIGEST]: one for one in there.manifests}
        reasons = [reason for event in self._events if isinstance(event, journals.Saved) for reason in event.reasons]
        self._gone = {
            one.digest
            for one in self._seen
            if one.digest not in self._there and any(one.digest[:_SHORT] in reason for reason in reasons)
        }
        self._placed = self._places()

    def _places(self) -> list[Placed]:
        newest = self._manifests[-1] if self._manifests else None
        digests = dict(enumerate(one.digest for one in self._seen))
        try:
            return placed(
                self._moments,
                {number: self._there[digest] for number, digest in digests.items() if digest in self._there},
                frozenset(number for number, digest in digests.items() if digest in self._gone),
                newest,
                [] if newest is None else journals.history(self._events, newest.id),
                [] if newest is None else [one for one in journals.history(self._events) if one.report > newest.report],
            )
        except OutOfPlaceError as error:
            which = "a row of the metrics" if error.number is None else str(self._seen[error.number].source.path)
            raise ConflictError(f"{which} does not go into run {self._run!r}: {error}") from error

    def _is_new(self, number: int) -> bool:
        return self._seen[number].digest not in {*self._there, *self._gone}

    @property
    def complete(self) -> bool:
        """Whether there is nothing to do."""
        new = any(self._is_new(number) for number in range(len(self._seen)))
        untold = any(place.new for place in self._placed)
        enough = len(journals.history(self._events)) >= max((place.report for place in self._placed), default=0)
        return not new and self._rules is None and (enough or not untold)

    @property
    def reports(self) -> int:
        """How many moments the run has when it is done."""
        there = self._manifests[-1].report if self._manifests else 0
        return max([there, *(place.report for place in self._placed)])

    def _told(self, number: int, moment: Moment, name: str | None, status: str, *more: str) -> Imported:
        one = self._seen[number]
        return Imported(
            path=one.source.path,
            tool=one.found.tool,
            epoch=moment.epoch,
            step=moment.step,
            step_counted=moment.counted,
            metrics=moment.metrics,
            parts=(*one.found.parts, *([EXTRA] if one.found.extra else ())),
            size_bytes=one.source.size_bytes,
            notes=(*one.found.notes, *more),
            name=name,
            status=status,
        )

    def _each(self) -> Iterator[tuple[int, int, Moment]]:
        """Number of the report, number of the source, moment."""
        for place in self._placed:
            for number in place.moment.taken:
                yield place.report, number, place.moment

    def preview(self) -> dict[int, Imported]:
        """What would be done."""
        done = {}
        for _, number, moment in self._each():
            old = self._there.get(self._seen[number].digest)
            status = "planned" if self._is_new(number) else "removed" if old is None else "there"
            done[number] = self._told(number, moment, None if old is None else old.name, status)
        return done

    def write(self, clock: Clock, progress: Callable[[int], None]) -> dict[int, Imported]:
        """Do it, holding the run."""
        now = clock()
        ensure_repository(self._store, now)
        hold = self._store.hold(layout.writer_lock(self._run), holder_note(now))
        try:
            self._look()  # somebody may have written since
            by = written_by(trains=False) | {
                "tool": "peakpoint import",
                "source": str(self._seen[0].source.path.parent.absolute()),
            }
            ensure_run(self._store, self._run, now, by, self._rules or ())
            clean_run(self._store, self._run, now)
            there = Run(self._store, self._run)
            self._in_force = there.rules() if self._rules is None else self._rules
            journal = Journal(self._store, self._run, clock)
            try:
                done = self._write(journal, by, progress)
                journal.append(journals.Closed(at=clock(), why="peakpoint import"))
            finally:
                journal.close()
            return done
        finally:
            hold.release()

    def _write(self, journal: Journal, by: Mapping[str, str], progress: Callable[[int], None]) -> dict[int, Imported]:
        self._check_room()
        texts = tuple(rule.text for rule in self._in_force)
        optimizer = next((one.found.optimizer for one in self._seen if one.found.optimizer), "")
        state = {"optimizer": f"{optimizer} (as the imported files name it)"} if optimizer else {}
        journal.append(journals.Opened(at=journal.now(), by=by, rules=texts, state=state))
        parent = self._manifests[-1] if self._manifests else None
        origin = (None, 0) if parent is None else (parent.id, parent.report)
        journal.append(journals.Started(at=journal.now(), checkpoint=origin[0], report=origin[1]))
        self._unpin(journal)
        used = [event.sequence for event in self._events if isinstance(event, journals.Saved)]
        sequence = max([*used, *(one.sequence for one in self._manifests)], default=0)
        buffer = Staging()
        done: dict[int, Imported] = {}
        for place in self._placed:
            report, moment = place.report, place.moment
            if place.new:
                at = journal.now()
                journal.append(
                    journals.Reported(
                        at=at, report=report, step=moment.step, epoch=moment.epoch, metrics=moment.metrics
                    )
                )
            for number in moment.taken:
                old = self._there.get(self._seen[number].digest)
                if old is not None:
                    done[number] = self._told(number, moment, old.name, "there")
                elif self._seen[number].digest in self._gone:
                    done[number] = self._told(number, moment, None, "removed")
                else:
                    sequence += 1
                    parent, linked = self._save(journal, buffer, number, report, moment, sequence, parent)
                    self._there[self._seen[number].digest] = parent
                    how = ("linked" if linked else "imported", *self._why_copied(number, linked=linked))
                    done[number] = self._told(number, moment, parent.name, *how)
                progress(self._seen[number].source.size_bytes)
        return done

    def _check_room(self) -> None:
        needed = sum(one.source.size_bytes for number, one in enumerate(self._seen) if self._is_new(number))
        free = self._store.free()
        if free is not None and not self._link and free < needed + _SLACK:
            raise StoreError(
                errno.ENOSPC,
                f"no space in {self._store.location}: the import needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB "
                "are free; free some space. Nothing was imported",
            )

    def _unpin(self, journal: Journal) -> None:
        """With rules, checkpoints are theirs: also those that an earlier import has pinned."""
        for id_, why in notes_of(self._events).pinned.items() if self._rules is not None else ():
            if why.startswith(_PINNED):
                journal.append(journals.Unpinned(at=journal.now(), checkpoint=id_, by="peakpoint import --rules"))

    def _why_copied(self, number: int, *, linked: bool) -> tuple[str, ...]:
        if not self._link or linked:
            return ()
        if self._seen[number].found.linkable is None:
            return ("copied, not linked: it is no safetensors file that is one whole model",)
        return ("copied, not linked: another file system, a header that is not aligned, or a store without links",)

    def _save(
        self,
        journal: Journal,
        buffer: Staging,
        number: int,
        report: int,
        moment: Moment,
        sequence: int,
        parent: Manifest | None,
    ) -> tuple[Manifest, bool]:
        """Commit one checkpoint; whether its model was linked."""
        one = self._seen[number]
        found, _ = keepable(read(one.source, self._how))
        state = dict(found.parts) | ({EXTRA: dict(found.extra)} if found.extra else {})
        linked: list[bool] = []
        origin, images = self._linkable(found)
        captured = capture(
            state,
            _position(report, moment, complete=found.complete).as_plain(),
            StateEncoder(shares=False),
            buffer,
            NOTHING,
            NOTHING,
            FromElsewhere(optional=(EXTRA,), images=images),
        )
        if one.source.stamp() != one.stamp:
            raise CorruptError(f"{one.source.path} was changed during the import; import again when it is at rest")
        draft = self._draft(one, moment, report, sequence, parent, captured.parts)

        def adopt(name: str, key: str) -> bool:
            if name != _MODEL or origin is None or not isinstance(self._store, LocalStore):
                return False
            linked.append(self._store.adopt(origin, key))
            return linked[-1]

        if self._rules is None:
            why = f"{_PINNED}{one.source.path.name}"
            journal.append(journals.Pinned(at=journal.now(), checkpoint=draft.id, why=why, by="peakpoint import"))
        manifest = commit(self._store, draft, captured.images, first=journal.sync, adopt=adopt)
        journal.append(
            journals.Saved(
                at=journal.now(),
                checkpoint=manifest.id,
                name=manifest.name,
                sequence=sequence,
                report=report,
                reasons=manifest.reasons,
                size_bytes=manifest.size_bytes,
            )
        )
        return manifest, any(linked)

    def _linkable(self, found: Foreign) -> tuple[Path | None, Mapping[str, WholeImage]]:
        """A file that may serve as it is: where it is, and its image."""
        if not self._link or found.linkable is None:
            return None, {}
        origin, record = found.linkable
        encoder = Encoder()
        encoder.encode(found.parts["model"], "model")
        if record.header % _ALIGNED or list(encoder.tensors) != list(found.parts["model"]):
            return None, {}  # tensors that cannot be read in place, or whose names are changed for our files
        with origin.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return origin, {_MODEL: WholeImage(_MODEL, data, record.header, _spans(record))}

    def _draft(
        self,
        one: Seen,
        moment: Moment,
        report: int,
        sequence: int,
        parent: Manifest | None,
        parts: Mapping[str, tuple[str, ...]],
    ) -> Manifest:
        id_ = secrets.token_hex(8)
        path = one.source.path
        name = names.checkpoint_name(
            names.DEFAULT_TEMPLATE,
            run=self._run,
            id=id_,
            step=moment.step,
            epoch=moment.epoch,
            metric=next((name for name, _ in watched(self._in_force) if name in moment.metrics), None),
            metrics=moment.metrics,
        )
        return Manifest(
            id=id_,
            run=self._run,
            name=unused_name(self._store, self._run, name),
            sequence=sequence,
            report=report,
            step=moment.step,
            epoch=moment.epoch,
            metrics=moment.metrics,
            reasons=(f"imported from {path.name} ({one.found.tool}, BLAKE3 {one.digest[:_SHORT]})",),
            asked=None,
            parts=parts,
            files=(),
            parent=None if parent is None else parent.id,
            forks=() if parent is None else parent.forks,
            created_at=datetime.fromtimestamp(max(time for _, time in one.stamp) / 1e9, UTC),
            written_by={
                **written_by(trains=False),
                PLACE: str(path.absolute()),
                DIGEST: one.digest,
                **({COUNTED: "no file tells it"} if moment.counted else {}),
            },
            timing={},
        )


_PINNED = "imported from "
_ALIGNED = 8  # bytes: what tensors of every element type need
_SHORT = 16


def _spans(record: FileRecord) -> tuple[Span, ...]:
    return tuple(
        Span(name=row.name, dtype=row.dtype, shape=row.shape, begin=row.begin, end=row.end) for row in record.tensors
    )


def _position(report: int, moment: Moment, *, complete: bool) -> Position:
    following = 0 if moment.epoch is None else moment.epoch + complete
    return Position(
        report=report, step=moment.step, epoch=moment.epoch, next_epoch=following, next_step=moment.step, batches=None
    )
