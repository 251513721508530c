"""History: the reports that count, and what followed from what."""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from peakpoint.format.events import Event, Reported, Saved, Started
from peakpoint.format.manifest import Forks
from peakpoint.rules import Best, Moment, Rule, smoothed_name


@dataclass(frozen=True, slots=True)
class Branch:
    """The reports that followed one another up to a moment.

    Attributes:
        reports: earliest first.
        forks: see ``Manifest``.
    """

    reports: list[Reported]
    forks: Forks

    def until(self, report: int) -> list[Reported]:
        """Return the reports up to a number."""
        return [reported for reported in self.reports if reported.report <= report]

    def report(self, number: int) -> Reported | None:
        """Return one of the latest reports; None when it is not there."""
        newest = next((reported for reported in reversed(self.reports) if reported.report <= number), None)
        return None if newest is None or newest.report != number else newest


class RunReplay:
    """The branches of a run, replayed event by event: what continued what.

    Args:
        events: the journal, or its beginning; ``take`` adds further events.

    Attributes:
        branch: the present branch.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.branch = Branch([], ())
        # a branch is shared and grows: the place of a checkpoint in it is the number of its report, never a copy
        self._commits: dict[str | None, tuple[Branch, Saved, Reported | None]] = {}
        self._newest_sequence = 0
        reports = self.branch.reports
        for event in events:
            if isinstance(event, Reported):  # nearly all are, up to a million: without a call they take half the time
                reports.append(event)
            else:
                self.take(event)
                reports = self.branch.reports

    def take(self, event: Event) -> None:
        """Take the next event into account."""
        match event:
            case Reported():
                self.branch.reports.append(event)
            case Saved():
                self._commits[event.checkpoint] = (self.branch, event, self.branch.report(event.report))
                self._newest_sequence = max(self._newest_sequence, event.sequence)
            case Started():
                self.branch = self._continued(event)
            case _:
                pass

    def _continued(self, start: Started) -> Branch:
        branch, saved, _ = self._commits.get(start.checkpoint, (self.branch, None, None))
        newest = self._newest_sequence
        if saved is not None:
            fork = ((saved.sequence, newest + 1),) if newest > saved.sequence else ()
            return Branch(branch.until(saved.report), (*branch.forks, *fork))
        if start.checkpoint is None:
            return Branch(branch.until(start.report), ((0, newest + 1),) if newest else ())
        # a commit that the journal does not tell of: its process was killed before it could
        return Branch(branch.until(start.report), branch.forks if start.report else ())

    def reports(self, checkpoint: str | None = None) -> list[Reported]:
        """Return the reports that count, earliest first; those of abandoned branches are left out.

        Args:
            checkpoint: the id of the checkpoint with which they end; None for the present history. Empty when the
                journal has no record of the checkpoint.
        """
        if checkpoint is None:
            return list(self.branch.reports)
        if checkpoint not in self._commits:
            return []
        branch, saved, _ = self._commits[checkpoint]
        return branch.until(saved.report)

    def reports_backwards(self, checkpoint: str, report: int) -> Iterator[Reported]:
        """Yield the reports that belong to a checkpoint, latest first.

        Args:
            checkpoint: its id.
            report: the number of its report: a checkpoint whose process was killed before the journal told of it is
                the newest of the present branch.
        """
        branch, saved, _ = self._commits.get(checkpoint, (self.branch, None, None))
        last = report if saved is None else saved.report
        return (reported for reported in reversed(branch.reports) if reported.report <= last)

    def report_of(self, checkpoint: str) -> Reported | None:
        """Return the report of a committed checkpoint; None when the journal does not have it."""
        return self._commits[checkpoint][2]

    def moment(self, checkpoint: str) -> Moment:
        """Return what rules look at, of a committed checkpoint."""
        branch, saved, report = self._commits[checkpoint]
        return Moment(
            id=saved.checkpoint,
            sequence=saved.sequence,
            step=0 if report is None else report.step,
            epoch=None if report is None else report.epoch,
            metrics={} if report is None else report.metrics,
            created_at=saved.at,
            forks=branch.forks,
            size_bytes=saved.size_bytes,
        )


def history(events: Iterable[Event], checkpoint: str | None = None) -> list[Reported]:
    """Return the reports that count, earliest first; see ``RunReplay.reports``."""
    return RunReplay(events).reports(checkpoint)


E = TypeVar("E")


def newest_event(events: Sequence[Event], kind: type[E]) -> E | None:
    """Return the last event of a kind."""
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


SmoothingWindows = frozenset[tuple[str, int]]
SmoothedMetrics = Mapping[str, float]


def smoothing_windows(rules: Iterable[Rule]) -> SmoothingWindows:
    """Return the metrics that rules smooth, and over how many reports."""
    return frozenset((rule.metric, rule.smooth) for rule in rules if isinstance(rule, Best) and rule.smooth > 1)


class Smoothing:
    """The means of the last values of some metrics, in constant time for each report.

    Values that are not finite are left out. Before there are enough the mean is NaN, which never wins.

    Args:
        windows: the metrics, each with its number of values.
        history: what was reported so far, earliest first.
    """

    def __init__(self, windows: SmoothingWindows, history: Iterable[Mapping[str, float]] = ()) -> None:
        self._last = {(metric, window): deque[float](maxlen=window) for metric, window in windows}
        for metrics in history:
            self.report(metrics)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Take the next report into account."""
        for (metric, _), last in self._last.items():
            value = metrics.get(metric, math.nan)
            if math.isfinite(value):
                last.append(value)

    def means(self) -> SmoothedMetrics:
        """The means after the last report, by the names that ``rules.smoothed_name`` gives."""
        return {
            smoothed_name(metric, window): _mean(last, window) if len(last) == window else math.nan
            for (metric, window), last in self._last.items()
        }


def _mean(values: Iterable[float], count: int) -> float:
    shares = [value / count for value in values]
    try:
        return math.fsum(shares)
    except OverflowError:  # a rounding step beyond the largest number
        return math.copysign(sys.float_info.max, shares[0])


def smoothed_metrics(
    checkpoints: Mapping[str, int], events: Iterable[Event], windows: SmoothingWindows
) -> dict[str, SmoothedMetrics]:
    """Return the smoothed metrics at the moment of each checkpoint, along the history that it belongs to.

    Args:
        checkpoints: the ids, each with the number of its report.
        events: the journal.
        windows: what is smoothed.
    """
    if not windows:
        return {}
    replay = RunReplay(events)
    return {
        checkpoint: _means_at(replay.reports_backwards(checkpoint, report), windows)
        for checkpoint, report in checkpoints.items()
    }


def _means_at(reports: Iterable[Reported], windows: SmoothingWindows) -> SmoothedMetrics:
    """Return the means at the first of some reports, latest first, and look at no more reports than needed."""
    missing = {(metric, window): window for metric, window in windows}
    tail: list[Reported] = []
    for report in reports:
        tail.append(report)
        for metric, window in windows:
            if math.isfinite(report.metrics.get(metric, math.nan)):
                missing[metric, window] -= 1
        if all(count <= 0 for count in missing.values()):
            break
    return Smoothing(windows, [report.metrics for report in reversed(tail)]).means()
