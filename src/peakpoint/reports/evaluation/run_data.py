"""What there is to evaluate of one run: its reports, its abandoned branches, its checkpoints."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from msgspec import structs

from peakpoint.format.events import STOPPED, Closed, Event, Opened, Reported, Saved, Started
from peakpoint.format.manifest import Manifest
from peakpoint.format.settings import Settings, settings_of
from peakpoint.repository import journal, packs, reader
from peakpoint.repository.annotations import all_with_annotations, annotations_of
from peakpoint.repository.lost import damaged_checkpoints
from peakpoint.repository.run import Run, rules_of
from peakpoint.rules import Mode, Rule, lineage, ranked
from peakpoint.rules.history import RunReplay


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run, read once.

    Attributes:
        run: the run.
        history: the reports that count, earliest first, with metrics that were measured later.
        abandoned: the reports of each branch that was abandoned.
        checkpoints: those that exist, earliest first, with all their metrics.
        packed: checkpoint id to the bytes of its pack, of archived checkpoints.
        rules: those in force.
        state: part to the class of its object.
        settings: what the training was started with last.
        saved: numbers of the reports of the history that became checkpoints.
        kept: report number to its checkpoint, where that still exists.
        damaged: numbers of reports whose checkpoint cannot be read, or is lost.
        ended: how the last training ended: ``"closed"``, a signal or an error; None when the journal does not tell.
        writer: who is writing the run at present; None when nobody is.
        remarks: sentences about damage.
    """

    run: Run
    history: tuple[Reported, ...]
    abandoned: tuple[tuple[Reported, ...], ...]
    checkpoints: tuple[Manifest, ...]
    packed: Mapping[str, int]
    rules: tuple[Rule, ...]
    state: Mapping[str, str]
    settings: Settings
    saved: frozenset[int]
    kept: Mapping[int, Manifest]
    damaged: frozenset[int]
    ended: str | None
    writer: str | None
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended the last training."""
        return self.ended is not None and self.ended.startswith(STOPPED)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics of reports and checkpoints, sorted."""
        reported = {name for report in self.history for name in report.metrics}
        return tuple(sorted(reported.union(*(checkpoint.metrics for checkpoint in self.checkpoints))))

    def counts_epochs(self) -> bool:
        """Return whether every report has an epoch, and each epoch is later than the one before."""
        epochs = [report.epoch for report in self.history if report.epoch is not None]
        increasing = all(earlier < later for earlier, later in itertools.pairwise(epochs))
        return increasing and len(epochs) == len(self.history)

    def series(self, metric: str) -> list[float]:
        """Return the finite values of a metric, earliest first."""
        values = (report.metrics.get(metric, math.nan) for report in self.history)
        return [value for value in values if math.isfinite(value)]

    def best_checkpoint(self, metric: str, mode: Mode) -> Manifest | None:
        """Return the best existing checkpoint by a metric; None when none has a finite value."""
        checkpoints = {checkpoint.id: checkpoint for checkpoint in self.checkpoints}
        return next((checkpoints[best.id] for best in ranked(self.checkpoints, metric, mode)), None)

    def rows(self) -> Iterator[tuple[str, int, int, int | None, str, float, bool, bool, str | None]]:
        """Yield run, report, step, epoch, metric, value, saved, kept and checkpoint ref of every value."""
        for report in self.history:
            checkpoint = self.kept.get(report.report)
            saved = report.report in self.saved
            ref = None if checkpoint is None else ref_of(checkpoint)
            for metric, value in report.metrics.items():
                place = (self.name, report.report, report.step, report.epoch)
                yield *place, metric, value, saved, checkpoint is not None, ref


def ref_of(checkpoint: Manifest) -> str:
    """Return the ref that names this checkpoint and no other."""
    return f"{checkpoint.run}/{checkpoint.name}"


def read_run_data(run: Run) -> RunData:
    """Read a run: its journal and its manifests, no weights."""
    contents = journal.read(run.store, run.name)
    listing = reader.list_run(run.store, run.name)
    checkpoints = all_with_annotations(listing.manifests, contents.events, ())
    history, abandoned, report_of = _replayed(contents.events)
    numbers = {checkpoint: report.report for checkpoint, report in report_of.items() if report is not None}
    by_number = {report.report: report for report in history}
    # the process of the newest may have been killed before it could say that it was saved
    current = {record.id for record in lineage(listing.manifests)}
    unrecorded = [checkpoint for checkpoint in checkpoints if checkpoint.id in current - report_of.keys()]
    for checkpoint in unrecorded:
        report = by_number.get(checkpoint.report)
        if report is not None and report.step == checkpoint.step:
            numbers[checkpoint.id] = report.report
    classes = [event.state for event in contents.events if isinstance(event, Opened) and event.state]
    damaged = damaged_checkpoints(run.store, run.name, listing)
    commits = [damage.saved.checkpoint for damage in damaged if damage.saved is not None]
    sentences = [*contents.damage, *(str(damage.error) for damage in damaged)]
    return RunData(
        run=run,
        history=tuple(_with_later_metrics(history, contents.events, numbers)),
        abandoned=abandoned,
        checkpoints=checkpoints,
        packed=packs.packed_bytes(run.store, run.name, checkpoints),
        rules=rules_of(contents.events),
        state=classes[-1] if classes else {},
        settings=settings_of(contents.events),
        saved=frozenset(numbers.values()),
        damaged=frozenset(numbers[checkpoint] for checkpoint in commits if checkpoint in numbers),
        kept={numbers[checkpoint.id]: checkpoint for checkpoint in checkpoints if checkpoint.id in numbers},
        ended=_ended(contents),
        writer=run.holder(),
        remarks=tuple(f"left out, because it is damaged: {sentence}" for sentence in sentences),
    )


def _replayed(
    events: Sequence[Event],
) -> tuple[list[Reported], tuple[tuple[Reported, ...], ...], dict[str, Reported | None]]:
    """Return the history, the abandoned branches, and by checkpoint its report in the history, else None."""
    replay = RunReplay(events)
    history = replay.reports()
    in_history = set(map(id, history))
    branches: list[list[Reported]] = [[]]
    report_of: dict[str, Reported | None] = {}
    for event in events:
        match event:
            case Started():
                branches.append([])
            case Reported() if id(event) not in in_history:
                branches[-1].append(event)
            case Saved():
                report = replay.report_of(event.checkpoint)
                report_of[event.checkpoint] = report if id(report) in in_history else None
            case _:
                pass
    return history, tuple(tuple(branch) for branch in branches if branch), report_of


def _with_later_metrics(
    history: Sequence[Reported], events: Sequence[Event], numbers: Mapping[str, int]
) -> Iterator[Reported]:
    """Add to each report the metrics that were measured of its checkpoint later."""
    later: dict[int, dict[str, float]] = {}
    for checkpoint, measured in annotations_of(events).metrics.items():
        if checkpoint in numbers:
            later.setdefault(numbers[checkpoint], {}).update(measured)
    for report in history:
        metrics = later.get(report.report)
        yield structs.replace(report, metrics={**report.metrics, **metrics}) if metrics else report


def _ended(contents: journal.JournalContents) -> str | None:
    """Return what the last process that trained recorded at its end."""
    for _, events in reversed(list(contents.by_segment())):
        if any(isinstance(event, Reported | Started) for event in events):
            return events[-1].why if isinstance(events[-1], Closed) else None
    return None
