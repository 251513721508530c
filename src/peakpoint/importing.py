"""Import: checkpoints of other tools become committed checkpoints of a run, through the writer of every other save."""

import errno
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peakpoint import foreign, layout, logs, names
from peakpoint import journal as journals
from peakpoint.audit import clean_run
from peakpoint.capture import FromElsewhere, StateEncoder, capture
from peakpoint.clock import Clock, utc_now
from peakpoint.copying import NOTHING
from peakpoint.errors import ConfigError, ConflictError, CorruptError, Error, FormatError, StoreError
from peakpoint.foreign import EXTRA, Foreign, Reading, Source
from peakpoint.journal import Journal
from peakpoint.manifest import FileRecord, Manifest
from peakpoint.notes import notes as notes_of
from peakpoint.position import Position
from peakpoint.reader import shelf
from peakpoint.report import written_by
from peakpoint.repository import Run, ensure_repository, ensure_run
from peakpoint.rules import Rule, check_rules, watched
from peakpoint.store import LocalStore, Store, holder_note, open_store
from peakpoint.tensors import Staging
from peakpoint.timeline import Moment, timeline
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
        step: steps completed; see ``peakpoint.timeline`` for those that do not tell it.
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
    metrics: Mapping[str, float]
    parts: tuple[str, ...] = ()
    size_bytes: int = 0
    notes: tuple[str, ...] = ()
    name: str | None = None
    status: str = "planned"
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did, or would do.

    Attributes:
        run: the run.
        checkpoints: each source, in the order of the moments.
        reports: how many moments the history has, also those without a checkpoint.
        others: files that were not looked at.
        notes: what people should know.
    """

    run: str
    checkpoints: tuple[Imported, ...]
    reports: int
    others: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A source that has been read once, without its tensors."""

    source: Source
    stamp: tuple[tuple[int, int], ...]
    digest: str
    found: Foreign  # its parts are emptied
    epoch: int | None
    step: int | None
    metrics: Mapping[str, float]


def import_checkpoints(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | Store,
    *,
    run: str,
    metrics: str | os.PathLike[str] | None = None,
    join: str = "auto",
    parts: Mapping[str, str] | None = None,
    strip_prefix: str = "",
    epochs_from: int = 0,
    inert: Iterable[str] = (),
    rules: Iterable[Rule] | None = None,
    link: bool = False,
    skip_unreadable: bool = False,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = utc_now,
) -> ImportReport:
    """Bring checkpoints of other tools into a run, as if they had been saved there.

    Reads files of ``torch.save`` (also Lightning's), safetensors files, folders of Hugging Face and of
    ``torch.distributed.checkpoint``. Runs no code of a file's; changes no source. Each checkpoint comes in whole or not
    at all. An import that was cut short goes on when it is repeated: what is there is known by its digest.

    Without ``rules`` every imported checkpoint is pinned, so that no later training removes it.

    Args:
        path: a file, or a folder that is searched with all folders below it.
        root: the repository, created when it does not exist.
        run: the run: a new one, or one that holds nothing but what was imported.
        metrics: a log to be joined; see ``peakpoint.logs.read``.
        join: what its rows are joined by: ``"epoch"``, ``"step"``, or ``"auto"``.
        parts: names in the files to names of parts, besides those that are known.
        strip_prefix: taken from the names of a model's tensors, such as ``"module."``.
        epochs_from: what the files and the log call the first epoch: 0 or 1.
        inert: full names of classes to be kept as records of their values; see ``peakpoint.unpickling``.
        rules: put these in force, and pin nothing.
        link: give safetensors files that can serve as they are a second name instead of copying them. Whoever writes
            into one of the two afterwards changes both.
        skip_unreadable: leave out what cannot be read; by default nothing is imported then.
        dry_run: write nothing.
        progress: called with the bytes of each source that is done.
        clock: tells the time.

    Raises:
        NotFoundError: there is nothing of that name.
        FormatError: no checkpoint, or one that names what is not built from files.
        CorruptError: a file is cut short, or was changed during the import.
        ConflictError: the run holds checkpoints of a training, or newer ones than those to be imported.
        StoreError: the repository cannot be written.

    Example:
        >>> import tempfile, pathlib, torch, peakpoint as pp
        >>> here = pathlib.Path(tempfile.mkdtemp())
        >>> model = torch.nn.Linear(2, 1)
        >>> torch.save({"model_state_dict": model.state_dict(), "epoch": 4, "val_acc": 0.7}, here / "epoch_4.pth")
        >>> done = pp.import_checkpoints(here / "epoch_4.pth", here / "runs", run="old")
        >>> dict(pp.open(here / "runs").run("old").latest().metrics)
        {'val_acc': 0.7}
    """
    names.check_run(run)
    how = Reading(
        parts=_checked(parts or {}), strip_prefix=strip_prefix, inert=frozenset(inert), epochs_from=epochs_from
    )
    if epochs_from not in (0, 1):
        raise ConfigError(f"epochs_from={epochs_from!r}: the first epoch is called 0 or 1")
    logs.check_how(join)
    given = None if rules is None else check_rules(rules)
    sources, others = foreign.find(Path(path))
    seen, unreadable = _look(sources, how, skip=skip_unreadable or dry_run)
    rows = [] if metrics is None else _shifted(logs.read(Path(metrics)), epochs_from)
    own = max((one.found.rows for one in seen), key=len, default=())
    moments, notes = timeline(seen, [*rows, *own], "step" if own and not rows else join)
    store = open_store(root)
    plan = _Plan(store, run, seen, moments, given, how, link=link)
    done = plan.preview() if dry_run or plan.complete else plan.write(clock, progress)
    order = [number for moment in moments for number in moment.taken]
    known = sum(moment.known for moment in moments)
    if known < len(moments):
        notes.append(f"{len(moments) - known} say neither epoch nor step: they come before all others")
    return ImportReport(
        run=run,
        checkpoints=(*(done[number] for number in order), *unreadable),
        reports=len(moments),
        others=tuple(others),
        notes=tuple(notes),
    )


def _checked(parts: Mapping[str, str]) -> dict[str, str]:
    for part in parts.values():
        names.check_part(part)
    if len({part for part in parts.values() if part != EXTRA}) < sum(part != EXTRA for part in parts.values()):
        raise ConfigError(f"two names become one part: {', '.join(parts.values())}")
    return dict(parts)


def _shifted(rows: Sequence[logs.Row], first: int) -> list[logs.Row]:
    if any(row.epoch is not None and row.epoch < first for row in rows):
        raise ConfigError(f"the log has an epoch before {first}, which was said to be the first")
    return [row if row.epoch is None else replace(row, epoch=row.epoch - first) for row in rows]


def _look(sources: Sequence[Source], how: Reading, *, skip: bool) -> tuple[list[_Seen], list[Imported]]:
    """Read every source once, so that what cannot be read is found before anything is written."""
    seen, unreadable = [], []
    for source in sorted(sources, key=lambda source: _natural(source.path)):
        try:
            seen.append(_see(source, how))
        except (FormatError, CorruptError, ConfigError) as error:
            if not skip:
                raise _with_hint(error, len(sources)) from error
            unreadable.append(
                Imported(
                    path=source.path,
                    tool=source.kind,
                    metrics={},
                    status="unreadable",
                    error=str(error),
                    size_bytes=source.size_bytes,
                )
            )
    return seen, unreadable


def _with_hint(error: Error, count: int) -> Error:
    hint = "; --skip-unreadable imports the others" if count > 1 else ""
    return type(error)(f"{error}{hint}. Nothing was imported")


def _natural(path: Path) -> list[Any]:
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", str(path))]


def _see(source: Source, how: Reading) -> _Seen:
    names.check_text("the name of the source", str(source.path.absolute()))
    stamp = source.stamp()
    found, dropped = _keepable(foreign.read(source, how))
    summary = replace(found, parts=dict.fromkeys(found.parts), extra=dict.fromkeys(found.extra))
    return _Seen(
        source=source,
        stamp=stamp,
        digest=source.digest(),
        found=replace(summary, notes=(*found.notes, *dropped)),
        epoch=found.epoch,
        step=found.step,
        metrics=found.metrics,
    )


def _keepable(found: Foreign) -> tuple[Foreign, list[str]]:
    """What can be kept exactly; a part that cannot is refused, an extra that cannot is left out and named."""
    for part, value in found.parts.items():
        Encoder().encode(value, f'state["{names.check_part(part)}"]')
    extra, dropped = dict(found.extra), []
    for key, value in found.extra.items():
        try:
            Encoder().encode(value, f'{EXTRA}["{key}"]')
        except ConfigError as error:
            del extra[key]
            dropped.append(f"LEFT OUT: {error}")
    return replace(found, extra=extra), dropped


class _Plan:
    """Which sources are there already, which come in, and in which order."""

    def __init__(
        self,
        store: Store,
        run: str,
        seen: Sequence[_Seen],
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
        newest = self._manifests[-1].report if self._manifests else 0
        for report, number, moment in self._each():
            old = self._there.get(self._seen[number].digest)
            moved = old is not None and (old.report, old.step, old.epoch) != (report, moment.step, moment.epoch)
            if moved if old is not None else self._is_new(number) and report < newest:
                raise ConflictError(
                    f"run {self._run!r} was imported with other files, metrics or options, and "
                    f"{self._seen[number].source.path} is not where it would be now: import all into another run"
                )

    def _is_new(self, number: int) -> bool:
        return self._seen[number].digest not in {*self._there, *self._gone}

    @property
    def complete(self) -> bool:
        """Whether there is nothing to do."""
        new = any(self._is_new(number) for number in range(len(self._seen)))
        return not new and self._rules is None and len(journals.history(self._events)) >= len(self._moments)

    def _twin(self, number: int) -> str | None:
        """Which earlier source has the very same bytes, in words."""
        first = next(place for place, one in enumerate(self._seen) if one.digest == self._seen[number].digest)
        mine, other = self._seen[number].source.path.name, self._seen[first].source.path.name
        return None if first == number else f"{mine} has the same bytes as {other}, and comes in once"

    def _told(self, number: int, moment: Moment, name: str | None, status: str, *more: str) -> Imported:
        one = self._seen[number]
        return Imported(
            path=one.source.path,
            tool=one.found.tool,
            epoch=moment.epoch,
            step=moment.step,
            metrics=moment.metrics,
            parts=(*one.found.parts, *([EXTRA] if one.found.extra else ())),
            size_bytes=one.source.size_bytes,
            notes=(*one.found.notes, *more),
            name=name,
            status=status,
        )

    def _each(self) -> Iterator[tuple[int, int, Moment]]:
        """Number of the report, number of the source, moment."""
        for report, moment in enumerate(self._moments, 1):
            for number in moment.taken:
                yield report, number, moment

    def preview(self) -> dict[int, Imported]:
        """What would be done."""
        done = {}
        for _, number, moment in self._each():
            old = self._there.get(self._seen[number].digest)
            if (twin := self._twin(number)) is not None:
                done[number] = self._told(number, moment, None, "twin", twin)
                continue
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
            by = written_by() | {"tool": "peakpoint import", "source": str(self._seen[0].source.path.parent.absolute())}
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
        told = 0 if parent is None else parent.report
        journal.append(
            journals.Started(at=journal.now(), checkpoint=None if parent is None else parent.id, report=told)
        )
        self._unpin(journal)
        used = [event.sequence for event in self._events if isinstance(event, journals.Saved)]
        sequence = max([*used, *(one.sequence for one in self._manifests)], default=0)
        buffer = Staging()
        done: dict[int, Imported] = {}
        for report, moment in enumerate(self._moments, 1):
            if report > told:
                at = journal.now()
                journal.append(
                    journals.Reported(
                        at=at, report=report, step=moment.step, epoch=moment.epoch, metrics=moment.metrics
                    )
                )
            for number in moment.taken:
                old = self._there.get(self._seen[number].digest)
                if (twin := self._twin(number)) is not None:
                    done[number] = self._told(number, moment, None, "twin", twin)
                elif old is not None:
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
        found, _ = _keepable(foreign.read(one.source, self._how))
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
        one: _Seen,
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
            written_by={**written_by(), PLACE: str(path.absolute()), DIGEST: one.digest},
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
