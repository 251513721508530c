"""What there is to evaluate of one run: its reports, its abandoned branches, its checkpoints."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peakpoint.format.events import STOPPED, Closed, Event, Measured, Opened, Reported, Saved, Started
from peakpoint.format.manifest import Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository import packs, reader
from peakpoint.repository.annotations import all_with_annotations
from peakpoint.repository.run import Run, rules_of
from peakpoint.rules import Rule, lineage
from peakpoint.rules import history as histories

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run, read once.

    Attributes:
        run: the run.
        history: the reports that count, earliest first, with what was measured of their checkpoints later.
        abandoned: the branches that do not count, each in its order.
        checkpoints: those that exist, earliest first, with all that is known of their metrics.
        packed: id to the bytes of the pack, of those that are archived.
        rules: those in force.
        state: part to the class of what was given for it.
        saved: numbers of the reports of the history that became checkpoints.
        kept: report number to the checkpoint of it that exists now.
        ended: how the last training ended: ``"closed"``, a signal or an error; None when nothing says so.
        writer: who is writing the run at present; None when nobody is.
        remarks: what a reader should know, a sentence each.
    """

    run: Run
    history: tuple[Reported, ...]
    abandoned: tuple[tuple[Reported, ...], ...]
    checkpoints: tuple[Manifest, ...]
    packed: Mapping[str, int]
    rules: tuple[Rule, ...]
    state: Mapping[str, str]
    saved: frozenset[int]
    kept: Mapping[int, Manifest]
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
        """Every metric of a report or a checkpoint, by name."""
        reported = {name for report in self.history for name in report.metrics}
        return tuple(sorted(reported.union(*(manifest.metrics for manifest in self.checkpoints))))

    def counts_epochs(self) -> bool:
        """Whether the epochs of the reports say where they are: each has one, and none has that of another."""
        epochs = [report.epoch for report in self.history]
        return all(
            later is not None and earlier is not None and later > earlier
            for earlier, later in itertools.pairwise(epochs)
        ) and all(epoch is not None for epoch in epochs)

    def series(self, metric: str) -> list[float]:
        """The finite values of a metric, earliest first."""
        values = (report.metrics.get(metric, math.nan) for report in self.history)
        return [value for value in values if math.isfinite(value)]

    def rows(self) -> Iterator[tuple[str, int, int, int | None, str, float, bool, bool, str | None]]:
        """The long table: run, report, step, epoch, metric, value, saved, kept, ref of the checkpoint."""
        for report in self.history:
            manifest = self.kept.get(report.report)
            saved = report.report in self.saved
            ref = None if manifest is None else ref_of(manifest)
            for metric, value in report.metrics.items():
                place = (self.name, report.report, report.step, report.epoch)
                yield *place, metric, value, saved, manifest is not None, ref


def ref_of(manifest: Manifest) -> str:
    """The ref that names this checkpoint and no other."""
    return f"{manifest.run}/{manifest.name}"


def read_run_data(run: Run) -> RunData:
    """Read a run: its journal and its manifests, no weights."""
    reading = journals.read(run.store, run.name)
    shelf = reader.list_run(run.store, run.name)
    history, abandoned, at = _branches(reading.events)
    saved = {moment: report for moment, report in at.items() if report is not None}
    # the process of the newest may have been killed before it could say that it was saved
    current = {record.id for record in lineage(shelf.manifests)}
    numbers = {report.report: report for report in history}
    rules = rules_of(reading.events)
    known = all_with_annotations(shelf.manifests, reading.events, ())
    unsaid = [one for one in known if one.id in current and one.id not in at and one.report in numbers]
    kept = {one.report: one for one in unsaid if numbers[one.report].step == one.step}
    kept |= {saved[manifest.id].report: manifest for manifest in known if manifest.id in saved}
    damage = [*reading.damage, *(str(damaged.error) for damaged in shelf.damaged)]
    opened = [event for event in reading.events if isinstance(event, Opened) and event.state]
    return RunData(
        run=run,
        history=tuple(_measured(history, reading.events, saved)),
        abandoned=abandoned,
        checkpoints=known,
        packed=packs.packed_bytes(run.store, run.name, known),
        rules=rules,
        state=opened[-1].state if opened else {},
        saved=frozenset(kept) | {report.report for report in saved.values()},
        kept=kept,
        ended=_ended(reading),
        writer=run.holder(),
        remarks=tuple(f"left out, because it is damaged: {text}" for text in damage),
    )


def _branches(
    events: Sequence[Event],
) -> tuple[list[Reported], tuple[tuple[Reported, ...], ...], dict[str, Reported | None]]:
    """The history, the branches that were abandoned, and the report of each saved checkpoint (None in a branch)."""
    history = histories.history(events)
    counts = {id(report) for report in history}
    branches: list[list[Reported]] = [[]]
    newest: dict[int, Reported] = {}
    at: dict[str, Reported | None] = {}
    for event in events:
        match event:
            case Started():
                branches.append([])
            case Reported():
                newest[event.report] = event
                if id(event) not in counts:
                    branches[-1].append(event)
            case Saved():
                report = newest.get(event.report)
                at[event.checkpoint] = report if report is not None and id(report) in counts else None
            case _:
                pass
    return history, tuple(tuple(branch) for branch in branches if branch), at


def _measured(
    history: Sequence[Reported], events: Iterable[Event], saved: Mapping[str, Reported]
) -> Iterator[Reported]:
    later: dict[int, dict[str, float]] = {}
    for event in events:
        if isinstance(event, Measured) and event.checkpoint in saved:
            later.setdefault(saved[event.checkpoint].report, {}).update(event.metrics)
    for report in history:
        more = later.get(report.report)
        yield replace(report, metrics={**report.metrics, **more}) if more else report


def _ended(reading: journals.JournalContents) -> str | None:
    """What the last process that trained said at its end."""
    for _, events in reversed(list(reading.by_segment())):
        if any(isinstance(event, Reported | Started) for event in events):
            return events[-1].why if isinstance(events[-1], Closed) else None
    return None
