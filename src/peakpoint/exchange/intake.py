"""The writing side of an import: which sources a run holds already, and each of the others as a commit."""

import errno
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from peakpoint.errors import ConflictError, CorruptError, StoreError
from peakpoint.exchange.moments import ImportMoment
from peakpoint.exchange.sources import CheckpointSource, read
from peakpoint.exchange.state_dicts import ForeignCheckpoint, ReadOptions, storable
from peakpoint.format.events import Pinned, Reported, Saved, Unpinned
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json
from peakpoint.format.names import EXTRA
from peakpoint.repository import journal as journals
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.commit import FileImage, image_of
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import Clock
from peakpoint.repository.reader import list_run
from peakpoint.repository.root import ensure_run
from peakpoint.repository.run import Run
from peakpoint.repository.run_audit import clean_run
from peakpoint.rules import Rule, check_ranking_metrics, ranking_metrics
from peakpoint.rules.history import history
from peakpoint.state.capture import ForeignState, StateEncoder, capture
from peakpoint.state.host_copy import NO_STORAGE
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.state.typed_json import Encoder
from peakpoint.store import Hold, LocalStore, Store
from peakpoint.training.external import commit_external, hold_run, open_journal, record_report
from peakpoint.training.position import Position
from peakpoint.training.records import draft_manifest, last_sequence, with_free_name, written_by
from peakpoint.training.saver import RESERVE

# in a manifest's written_by
DIGEST, PATH = "source_blake3", "imported_from"
COUNTED = "counted_step"  # no file has the step

_MODEL = "model.safetensors"
_PINNED = "imported from "  # how the reason of a pin begins that an import made
_DIGEST_DIGITS = 16  # of a source's digest, in the reason of its checkpoint
_ALIGNMENT = 8  # bytes: tensors of every element type can be read in place there


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedSource:
    """What became of one source.

    Attributes:
        path: the file or folder.
        tool: what wrote it, as far as can be told; its kind when it cannot be read.
        epoch: the epoch's index from 0, None when no file has it.
        step: steps completed; see ``peakpoint.exchange.moments`` for sources without it.
        step_counted: whether no file has the step.
        metrics: of the moment, those of logs included.
        parts: names of the parts.
        size_bytes: of the source.
        notes: what became of its contents, a sentence each.
        name: of the checkpoint; None when there is none: dry run, or unreadable.
        status: ``"imported"``, ``"linked"``, ``"there"`` (imported earlier), ``"removed"`` (imported earlier, and
            removed since), ``"twin"`` (the same bytes as another source), ``"planned"`` or ``"unreadable"``.
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
class SourceSummary:
    """A source that has been read once; its tensors are not kept in memory."""

    source: CheckpointSource
    stamp: tuple[tuple[int, int, int], ...]
    digest: str
    checkpoint: ForeignCheckpoint  # its parts are emptied

    def outcome(self, status: str, name: str | None = None, *notes: str) -> ImportedSource:
        """Return what became of it, with the moment in its own files."""
        checkpoint = self.checkpoint
        return ImportedSource(
            path=self.source.path,
            tool=checkpoint.tool,
            epoch=checkpoint.epoch,
            step=checkpoint.step,
            metrics=checkpoint.metrics,
            parts=(*checkpoint.parts, *([EXTRA] if checkpoint.extra else ())),
            size_bytes=self.source.size_bytes,
            notes=(*checkpoint.notes, *notes),
            name=name,
            status=status,
        )


@dataclass(kw_only=True)
class Intake:
    """Brings sources into a run, or says what it would do.

    The run is new, or holds the beginning of this same import: one that was cut short, or whose folder has grown since.

    Attributes:
        moments: of the sources in order, and those of logs.
        rules: put these in force; None leaves the run's own in force, and pins the imported checkpoints.
        link: whether to link files that can serve as they are.

    Raises:
        ConflictError: the run holds something else.
        ConfigError: a rule ranks by a metric that no source has.
    """

    store: Store
    run: str
    summaries: Sequence[SourceSummary]
    moments: Sequence[ImportMoment]
    rules: tuple[Rule, ...] | None
    options: ReadOptions
    link: bool

    def __post_init__(self) -> None:
        self._in_force = self.rules or ()
        self._read_run()
        metrics = [*(moment.metrics for moment in self.moments), *(report.metrics for report in self._history)]
        check_ranking_metrics(self._in_force, {name for values in metrics for name in values})

    def _read_run(self) -> None:
        listing = list_run(self.store, self.run)
        self._events = journals.read(self.store, self.run).events
        trained = [manifest.name for manifest in listing.manifests if DIGEST not in manifest.written_by]
        trained += [checkpoint.name for checkpoint in listing.damaged]
        if trained:
            raise ConflictError(
                f"run {self.run!r} holds {trained[0]}, which was not imported: give another name with --run"
            )
        self._present = {manifest.written_by[DIGEST]: manifest for manifest in listing.manifests}
        saved = [event for event in self._events if isinstance(event, Saved)]
        reasons = " ".join(reason for event in saved for reason in event.reasons)
        absent = [summary.digest for summary in self.summaries if summary.digest not in self._present]
        self._removed = {digest for digest in absent if digest[:_DIGEST_DIGITS] in reasons}
        self._new = [summary for summary in self.summaries if summary.digest in set(absent) - self._removed]
        self._parent = listing.manifests[-1] if listing.manifests else None
        self._sequence = last_sequence(listing.manifests, saved)
        self._history = history(self._events)
        self._check_beginning()

    def _check_beginning(self) -> None:
        """Refuse a run that does not hold the beginning of this import: nothing may come before what it holds."""
        newest = 0 if self._parent is None else self._parent.report
        places = {self.summaries[number].digest: report for report, number in self._numbered_sources()}
        agrees = len(self.moments) >= len(self._history) and all(
            _agrees(moment, report, final=report.report <= newest)
            for moment, report in zip(self.moments, self._history, strict=False)
        )
        if not agrees or any(places.get(digest) != present.report for digest, present in self._present.items()):
            raise self._conflict("other files, metrics or options")
        early = [summary.source.path.name for summary in self._new if places[summary.digest] < newest]
        if early:
            raise self._conflict(f"later moments than that of {early[0]}")

    def _conflict(self, what: str) -> ConflictError:
        return ConflictError(
            f"run {self.run!r} holds an import of {what}: an import goes on with the same files, metrics and options, "
            "and files that are new come last; otherwise import all into another run with --run"
        )

    def _numbered_sources(self) -> Iterator[tuple[int, int]]:
        """Number of the report and of the source, for every source in order."""
        for report, moment in enumerate(self.moments, 1):
            for number in moment.checkpoints:
                yield report, number

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return not self._new and self.rules is None and len(self._history) >= len(self.moments)

    def _outcome(self, number: int, moment: ImportMoment, status: str, *notes: str, name: str | None) -> ImportedSource:
        outcome = self.summaries[number].outcome(status, name, *notes)
        step, counted = moment.step, moment.counted
        return replace(outcome, epoch=moment.epoch, step=step, step_counted=counted, metrics=moment.metrics)

    def _earlier(self, number: int, moment: ImportMoment) -> ImportedSource | None:
        """Return the outcome of a source that was imported earlier; None of a new one."""
        digest = self.summaries[number].digest
        if digest in self._present:
            return self._outcome(number, moment, "there", name=self._present[digest].name)
        return self._outcome(number, moment, "removed", name=None) if digest in self._removed else None

    def preview(self) -> dict[int, ImportedSource]:
        """Return what would be done, by number of the source."""
        return {
            number: self._earlier(number, moment) or self._outcome(number, moment, "planned", name=None)
            for moment in self.moments
            for number in moment.checkpoints
        }

    def write(self, clock: Clock, progress: Callable[[int], None]) -> dict[int, ImportedSource]:
        """Do it, holding the run."""
        with hold_run(self.store, self.run, clock) as (now, hold):
            self._read_run()  # another process may have written since
            source = str(self.summaries[0].source.path.parent.absolute())
            by = written_by(trains=False) | {"tool": "peakpoint import", "source": source}
            ensure_run(self.store, self.run, now, by, self.rules or ())
            clean_run(self.store, self.run, now)
            if self.rules is None:
                self._in_force = Run(self.store, self.run).rules()
            self._check_space()
            texts = tuple(rule.text for rule in self._in_force)
            optimizers = (summary.checkpoint.optimizer for summary in self.summaries)
            optimizer = next((name for name in optimizers if name), "")
            state = {"optimizer": f"{optimizer} (as the imported files name it)"} if optimizer else {}
            with open_journal(self.store, self.run, clock, by, texts, self._parent, state) as journal:
                self._unpin(journal)
                return self._write(journal, hold, progress)

    def _write(self, journal: Journal, hold: Hold, progress: Callable[[int], None]) -> dict[int, ImportedSource]:
        buffer = StagingBuffer()
        outcomes: dict[int, ImportedSource] = {}
        newest = 0 if self._parent is None else self._parent.report  # what follows it is not in the history any more
        for report, moment in enumerate(self.moments, 1):
            if report > newest:
                record_report(journal, report, moment.step, moment.epoch, moment.metrics)
            for number in moment.checkpoints:
                earlier = self._earlier(number, moment)
                outcomes[number] = earlier or self._save(journal, hold, buffer, number, report, moment)
                progress(self.summaries[number].source.size_bytes)
        return outcomes

    def _check_space(self) -> None:
        required = sum(summary.source.size_bytes for summary in self._new)
        free = self.store.free()
        if free is not None and not self.link and free < required + RESERVE:
            raise StoreError(
                errno.ENOSPC,
                f"no space in {self.store.location}: the import needs {required / 1e6:.1f} MB and {free / 1e6:.1f} MB "
                "are free; free some space. Nothing was imported",
            )

    def _unpin(self, journal: Journal) -> None:
        """With rules, checkpoints are theirs: also those that an earlier import has pinned."""
        for checkpoint, why in annotations_of(self._events).pinned.items() if self.rules is not None else ():
            if why.startswith(_PINNED):
                journal.append(Unpinned(at=journal.now(), checkpoint=checkpoint, by="peakpoint import --rules"))

    def _why_copied(self, number: int) -> str:
        if self.summaries[number].checkpoint.linkable is None:
            return "copied, not linked: it is not a safetensors file that is one whole model"
        return "copied, not linked: another file system, a header that is not aligned, or a store without links"

    def _save(
        self, journal: Journal, hold: Hold, buffer: StagingBuffer, number: int, report: int, moment: ImportMoment
    ) -> ImportedSource:
        """Commit one checkpoint."""
        summary = self.summaries[number]
        path = summary.source.path
        self._check_unchanged(summary)  # what was inspected is what is read
        checkpoint, _ = storable(read(summary.source, self.options))
        state = dict(checkpoint.parts) | ({EXTRA: dict(checkpoint.extra)} if checkpoint.extra else {})
        origin, images = self._linkable(checkpoint)
        next_epoch = 0 if moment.epoch is None else moment.epoch + checkpoint.complete
        position = Position(report, moment.step, moment.epoch, next_epoch, next_step=moment.step)
        plain = position.as_plain()
        foreign = ForeignState(generators=checkpoint.generators, optional=(EXTRA,), images=images)
        captured = capture(state, plain, StateEncoder(shares=False), buffer, NO_STORAGE, NO_STORAGE, foreign)
        self._check_unchanged(summary)
        draft = self._draft(summary, position, moment, captured.parts)
        linked: list[bool] = []

        def adopt(name: str, key: str) -> bool:
            if name != _MODEL or origin is None or not isinstance(self.store, LocalStore):
                return False
            linked.append(self.store.adopt(origin, key))
            return linked[-1]

        if self.rules is None:
            why = f"{_PINNED}{path.name}"
            journal.append(Pinned(at=journal.now(), checkpoint=draft.id, why=why, by="peakpoint import"))
        manifest = commit_external(self.store, journal, hold, draft, captured.images, adopt)
        self._parent, self._sequence = manifest, manifest.sequence
        notes = [self._why_copied(number)] if self.link and not any(linked) else []
        return self._outcome(number, moment, "linked" if any(linked) else "imported", *notes, name=manifest.name)

    @staticmethod
    def _check_unchanged(summary: SourceSummary) -> None:
        if summary.source.stamp() != summary.stamp:
            path = summary.source.path
            raise CorruptError(f"{path} was changed during the import; import again when nothing writes to it")

    def _linkable(self, checkpoint: ForeignCheckpoint) -> tuple[Path | None, Mapping[str, FileImage]]:
        """Return the path and the image of a file that may serve as it is."""
        if not self.link or checkpoint.linkable is None:
            return None, {}
        origin, record = checkpoint.linkable
        encoder = Encoder()
        encoder.encode(checkpoint.parts["model"], "model")
        if record.header % _ALIGNMENT or list(encoder.tensors) != list(checkpoint.parts["model"]):
            return None, {}  # tensors that cannot be read in place, or whose names are changed for our files
        with origin.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return origin, {_MODEL: image_of(_MODEL, data, record.header, record.tensors)}

    def _draft(
        self, summary: SourceSummary, position: Position, moment: ImportMoment, parts: Mapping[str, tuple[str, ...]]
    ) -> Manifest:
        path, tool, digest = summary.source.path, summary.checkpoint.tool, summary.digest
        origin = {PATH: str(path.absolute()), DIGEST: digest}
        origin |= {COUNTED: "no file tells it"} if moment.counted else {}
        at = datetime.fromtimestamp(max(time for _, time, _ in summary.stamp) / 1e9, UTC)
        by = {**written_by(trains=False), **origin}
        draft = draft_manifest(self.run, self._sequence + 1, position, moment.metrics, at, by)
        reason = f"imported from {path.name} ({tool}, BLAKE3 {digest[:_DIGEST_DIGITS]})"
        draft = replace(draft, reasons=(reason,), parts=parts)
        if self._parent is not None:
            draft = replace(draft, parent=self._parent.id, forks=self._parent.forks)
        return with_free_name(self.store, draft, [metric for metric, _ in ranking_metrics(self._in_force)])


def _agrees(moment: ImportMoment, report: Reported, *, final: bool) -> bool:
    """Whether a moment is that of a report.

    Nothing of the moment may be missing in a final report. Reports after the newest checkpoint are written again: a
    moment may add to them, and must not lack anything of them. NaN equals NaN.
    """
    of_moment, of_report = metrics_to_json(moment.metrics).items(), metrics_to_json(report.metrics).items()
    at_step = moment.counted or moment.step == report.step or (not final and moment.epoch is not None)
    return moment.epoch == report.epoch and at_step and (of_moment <= of_report if final else of_report <= of_moment)
