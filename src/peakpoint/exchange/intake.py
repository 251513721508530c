"""The writing side of an import: which sources are there already, and each of the others as a commit."""

import errno
import mmap
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from peakpoint.errors import ConflictError, CorruptError, StoreError
from peakpoint.exchange.moments import Moment
from peakpoint.exchange.places import COUNTED, OutOfPlaceError, Placed, placed
from peakpoint.exchange.sources import Source, read
from peakpoint.exchange.state_dicts import EXTRA, Foreign, Reading, keepable
from peakpoint.format.events import Pinned, Saved, Unpinned
from peakpoint.format.manifest import Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository.annotations import annotations_of as notes_of
from peakpoint.repository.audit import clean_run
from peakpoint.repository.commit import WholeImage, commit
from peakpoint.repository.journal import Journal
from peakpoint.repository.packs import spans_of
from peakpoint.repository.provenance import Clock
from peakpoint.repository.reader import list_run
from peakpoint.repository.root import ensure_run
from peakpoint.repository.run import Run
from peakpoint.rules import Rule, check_watched, watched
from peakpoint.rules.history import history
from peakpoint.state.capture import FromElsewhere, StateEncoder, capture
from peakpoint.state.host_copy import NOTHING
from peakpoint.state.tensor_files import Staging
from peakpoint.state.typed_json import Encoder
from peakpoint.store import Hold, LocalStore, Store
from peakpoint.training.external import held, named, opened, settled, tell_report, tell_saved
from peakpoint.training.outcome import written_by
from peakpoint.training.position import Position

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
        step: steps completed; see ``peakpoint.exchange.moments`` for those that do not tell it.
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

    def told(self, status: str, name: str | None = None, *more: str) -> Imported:
        """What became of it, with the moment that it tells itself."""
        found = self.found
        return Imported(
            path=self.source.path,
            tool=found.tool,
            epoch=found.epoch,
            step=found.step,
            metrics=found.metrics,
            parts=(*found.parts, *([EXTRA] if found.extra else ())),
            size_bytes=self.source.size_bytes,
            notes=(*found.notes, *more),
            name=name,
            status=status,
        )


@dataclass(kw_only=True)
class Intake:
    """Brings sources into a run, or says what it would do.

    Attributes:
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

    store: Store
    run: str
    seen: Sequence[Seen]
    moments: Sequence[Moment]
    rules: tuple[Rule, ...] | None
    how: Reading
    link: bool

    def __post_init__(self) -> None:
        self._in_force = self.rules or ()
        self._look()
        known = (*(moment.metrics for moment in self.moments), *(one.metrics for one in history(self._events)))
        check_watched(self._in_force, {name for metrics in known for name in metrics})

    def _look(self) -> None:
        there = list_run(self.store, self.run)
        self._events = journals.read(self.store, self.run).events
        own = [one.name for one in there.manifests if DIGEST not in one.written_by]
        own += [one.name for one in there.damaged]
        if own:
            raise ConflictError(
                f"run {self.run!r} holds {own[0]}, which was not imported: give another name with --run"
            )
        self._there = {one.written_by[DIGEST]: one for one in there.manifests}
        saved = [event for event in self._events if isinstance(event, Saved)]
        reasons = " ".join(reason for event in saved for reason in event.reasons)
        missing = [one.digest for one in self.seen if one.digest not in self._there]
        self._gone = {digest for digest in missing if digest[:_SHORT] in reasons}
        known = {*self._there, *self._gone}
        self._new = [one for one in self.seen if one.digest not in known]
        self._parent = there.manifests[-1] if there.manifests else None
        self._sequence = max([event.sequence for event in saved] + [one.sequence for one in there.manifests], default=0)
        self._placed = self._places()

    def _places(self) -> list[Placed]:
        newest, told = self._parent, history(self._events)
        digests = dict(enumerate(one.digest for one in self.seen))
        there = {number: self._there[digest] for number, digest in digests.items() if digest in self._there}
        gone = frozenset(number for number, digest in digests.items() if digest in self._gone)
        before = [] if newest is None else history(self._events, newest.id)
        rest = [] if newest is None else [one for one in told if one.report > newest.report]
        try:
            return placed(self.moments, there, gone, newest, before, rest)
        except OutOfPlaceError as error:
            which = "a row of the metrics" if error.number is None else str(self.seen[error.number].source.path)
            raise ConflictError(f"{which} does not go into run {self.run!r}: {error}") from error

    @property
    def complete(self) -> bool:
        """Whether there is nothing to do."""
        untold = any(place.new for place in self._placed)
        enough = len(history(self._events)) >= max((place.report for place in self._placed), default=0)
        return not self._new and self.rules is None and (enough or not untold)

    @property
    def reports(self) -> int:
        """How many moments the run has when it is done."""
        there = 0 if self._parent is None else self._parent.report
        return max([there, *(place.report for place in self._placed)])

    def _told(self, number: int, moment: Moment, status: str, name: str | None = None, *more: str) -> Imported:
        told = self.seen[number].told(status, name, *more)
        return replace(told, epoch=moment.epoch, step=moment.step, step_counted=moment.counted, metrics=moment.metrics)

    def _earlier(self, number: int, moment: Moment) -> Imported | None:
        """What is said of a source that was imported earlier; None of a new one."""
        digest = self.seen[number].digest
        if digest in self._there:
            return self._told(number, moment, "there", self._there[digest].name)
        return self._told(number, moment, "removed") if digest in self._gone else None

    def preview(self) -> dict[int, Imported]:
        """What would be done."""
        taken = [(number, place.moment) for place in self._placed for number in place.moment.taken]
        return {
            number: self._earlier(number, moment) or self._told(number, moment, "planned") for number, moment in taken
        }

    def write(self, clock: Clock, progress: Callable[[int], None]) -> dict[int, Imported]:
        """Do it, holding the run."""
        with held(self.store, self.run, clock) as (now, hold):
            self._look()  # somebody may have written since
            source = str(self.seen[0].source.path.parent.absolute())
            by = written_by(trains=False) | {"tool": "peakpoint import", "source": source}
            ensure_run(self.store, self.run, now, by, self.rules or ())
            clean_run(self.store, self.run, now)
            if self.rules is None:
                self._in_force = Run(self.store, self.run).rules()
            self._check_room()
            texts = tuple(rule.text for rule in self._in_force)
            optimizer = next((one.found.optimizer for one in self.seen if one.found.optimizer), "")
            state = {"optimizer": f"{optimizer} (as the imported files name it)"} if optimizer else {}
            with opened(self.store, self.run, clock, by, texts, self._parent, state) as journal:
                self._unpin(journal)
                return self._write(journal, hold, progress)

    def _write(self, journal: Journal, hold: Hold, progress: Callable[[int], None]) -> dict[int, Imported]:
        buffer = Staging()
        done: dict[int, Imported] = {}
        for place in self._placed:
            moment = place.moment
            if place.new:
                tell_report(journal, place.report, moment.step, moment.epoch, moment.metrics)
            for number in moment.taken:
                done[number] = self._earlier(number, moment) or self._save(journal, hold, buffer, number, place)
                progress(self.seen[number].source.size_bytes)
        return done

    def _check_room(self) -> None:
        needed = sum(one.source.size_bytes for one in self._new)
        free = self.store.free()
        if free is not None and not self.link and free < needed + _SLACK:
            raise StoreError(
                errno.ENOSPC,
                f"no space in {self.store.location}: the import needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB "
                "are free; free some space. Nothing was imported",
            )

    def _unpin(self, journal: Journal) -> None:
        """With rules, checkpoints are theirs: also those that an earlier import has pinned."""
        for id_, why in notes_of(self._events).pinned.items() if self.rules is not None else ():
            if why.startswith(_PINNED):
                journal.append(Unpinned(at=journal.now(), checkpoint=id_, by="peakpoint import --rules"))

    def _why_copied(self, number: int, *, linked: bool) -> tuple[str, ...]:
        if not self.link or linked:
            return ()
        if self.seen[number].found.linkable is None:
            return ("copied, not linked: it is no safetensors file that is one whole model",)
        return ("copied, not linked: another file system, a header that is not aligned, or a store without links",)

    def _save(self, journal: Journal, hold: Hold, buffer: Staging, number: int, place: Placed) -> Imported:
        """Commit one checkpoint."""
        one, moment = self.seen[number], place.moment
        found, _ = keepable(read(one.source, self.how))
        state = dict(found.parts) | ({EXTRA: dict(found.extra)} if found.extra else {})
        origin, images = self._linkable(found)
        position = _position(place, complete=found.complete).as_plain()
        foreign = FromElsewhere(optional=(EXTRA,), images=images)
        captured = capture(state, position, StateEncoder(shares=False), buffer, NOTHING, NOTHING, foreign)
        if one.source.stamp() != one.stamp:
            raise CorruptError(f"{one.source.path} was changed during the import; import again when it is at rest")
        draft = self._draft(one, place, captured.parts)
        linked: list[bool] = []

        def adopt(name: str, key: str) -> bool:
            if name != _MODEL or origin is None or not isinstance(self.store, LocalStore):
                return False
            linked.append(self.store.adopt(origin, key))
            return linked[-1]

        if self.rules is None:
            why = f"{_PINNED}{one.source.path.name}"
            journal.append(Pinned(at=journal.now(), checkpoint=draft.id, why=why, by="peakpoint import"))
        manifest = commit(self.store, draft, captured.images, first=lambda: settled(journal, hold), adopt=adopt)
        tell_saved(journal, manifest)
        self._parent, self._sequence = manifest, manifest.sequence
        more = self._why_copied(number, linked=any(linked))
        return self._told(number, moment, "linked" if any(linked) else "imported", manifest.name, *more)

    def _linkable(self, found: Foreign) -> tuple[Path | None, Mapping[str, WholeImage]]:
        """A file that may serve as it is: where it is, and its image."""
        if not self.link or found.linkable is None:
            return None, {}
        origin, record = found.linkable
        encoder = Encoder()
        encoder.encode(found.parts["model"], "model")
        if record.header % _ALIGNED or list(encoder.tensors) != list(found.parts["model"]):
            return None, {}  # tensors that cannot be read in place, or whose names are changed for our files
        with origin.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return origin, {_MODEL: WholeImage(_MODEL, data, record.header, spans_of(record))}

    def _draft(self, one: Seen, place: Placed, parts: Mapping[str, tuple[str, ...]]) -> Manifest:
        moment, path = place.moment, one.source.path
        told = {PLACE: str(path.absolute()), DIGEST: one.digest}
        told |= {COUNTED: "no file tells it"} if moment.counted else {}
        draft = Manifest(
            id=secrets.token_hex(8),
            run=self.run,
            name="",
            sequence=self._sequence + 1,
            report=place.report,
            step=moment.step,
            epoch=moment.epoch,
            metrics=moment.metrics,
            reasons=(f"imported from {path.name} ({one.found.tool}, BLAKE3 {one.digest[:_SHORT]})",),
            asked=None,
            parts=parts,
            files=(),
            parent=None if self._parent is None else self._parent.id,
            forks=() if self._parent is None else self._parent.forks,
            created_at=datetime.fromtimestamp(max(time for _, time in one.stamp) / 1e9, UTC),
            written_by={**written_by(trains=False), **told},
            timing={},
        )
        metric = next((name for name, _ in watched(self._in_force) if name in moment.metrics), None)
        return named(self.store, draft, metric)


_PINNED = "imported from "
_ALIGNED = 8  # bytes: what tensors of every element type need
_SHORT = 16


def _position(place: Placed, *, complete: bool) -> Position:
    epoch, step = place.moment.epoch, place.moment.step
    following = 0 if epoch is None else epoch + complete
    return Position(report=place.report, step=step, epoch=epoch, next_epoch=following, next_step=step, batches=None)
