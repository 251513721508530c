"""History: the reports that count, and what followed from what."""

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from peakpoint.format.events import Event, Reported, Saved, Started
from peakpoint.format.manifest import Forks
from peakpoint.rules import Best, Moment, Rule, smoothed


def history(events: Iterable[Event], checkpoint: str | None = None) -> list[Reported]:
    """The reports that count, earliest first; those of abandoned branches are left out.

    Args:
        events: the journal.
        checkpoint: the history that belongs to this checkpoint (its id), and ends with it; the present one by default.
            Empty when the journal has no record of the checkpoint.
    """
    reports: list[Reported] = []
    # A branch gets a list of its own, so that the place of a checkpoint is a list and a report number, never a copy.
    places: dict[str | None, tuple[list[Reported], int]] = {None: ([], 0)}
    for event in events:
        match event:
            case Started(checkpoint=origin, report=last):
                reports = _until(*places.get(origin, (reports, last)))
            case Reported():
                reports.append(event)
            case Saved():
                places[event.checkpoint] = (reports, event.report)
            case _:
                pass
    return reports if checkpoint is None else _until(*places.get(checkpoint, places[None]))


def _until(reports: list[Reported], last: int) -> list[Reported]:
    return [report for report in reports if report.report <= last]


E = TypeVar("E")


def newest(events: Sequence[Event], kind: type[E]) -> E | None:
    """The last event of a kind."""
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


@dataclass(frozen=True, slots=True)
class Branch:
    """The history that a checkpoint belongs to.

    Attributes:
        reports: by their numbers.
        forks: see ``Manifest``.
    """

    reports: dict[int, Reported]
    forks: Forks

    def continued(self, start: Started, saved: Saved | None, newest: int) -> "Branch":
        """What goes on from a checkpoint of this branch, or from nothing (see ``Manifest.forks``)."""
        last = start.report if saved is None else saved.report
        reports = {number: report for number, report in self.reports.items() if number <= last}
        if saved is not None:
            fork = ((saved.sequence, newest + 1),) if newest > saved.sequence else ()
            return Branch(reports, (*self.forks, *fork))
        if start.checkpoint is None:
            return Branch(reports, ((0, newest + 1),) if newest else ())
        return Branch(reports, () if start.report == 0 else self.forks)


def moment_of(saved: Saved, branch: Branch) -> Moment:
    """What rules look at, of a checkpoint that was committed on a branch."""
    report = branch.reports.get(saved.report)
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


Windows = frozenset[tuple[str, int]]

Derived = Mapping[str, float]


def windows(rules: Iterable[Rule]) -> Windows:
    """The metrics that rules smooth, and over how many reports."""
    return frozenset((rule.metric, rule.smooth) for rule in rules if isinstance(rule, Best) and rule.smooth > 1)


class Smoothing:
    """The means of the last values of some metrics, in constant time for each report.

    Values that are not finite are left out. Before there are enough the mean is NaN, which never wins.

    Args:
        wanted: metrics and numbers of values.
        history: what was reported so far, earliest first.
    """

    def __init__(self, wanted: Windows, history: Iterable[Mapping[str, float]] = ()) -> None:
        self._last = {(metric, window): deque[float](maxlen=window) for metric, window in wanted}
        for metrics in history:
            self.report(metrics)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Take the next report into account."""
        for (metric, _), last in self._last.items():
            value = metrics.get(metric, math.nan)
            if math.isfinite(value):
                last.append(value)

    def derived(self) -> Derived:
        """The means after the last report, by the names that ``rules.smoothed`` gives."""
        return {
            smoothed(metric, window): _mean(last, window) if len(last) == window else math.nan
            for (metric, window), last in self._last.items()
        }


def _mean(values: Iterable[float], count: int) -> float:
    shares = [value / count for value in values]
    try:
        return math.fsum(shares)
    except OverflowError:  # a rounding step beyond the largest number
        return math.copysign(sys.float_info.max, shares[0])


class Placed(Protocol):
    """What has a place in a history: a manifest, for example."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def report(self) -> int: ...  # noqa: D102


def derive(manifests: Iterable[Placed], events: Sequence[Event], wanted: Windows) -> dict[str, Derived]:
    """The smoothed metrics at the moment of each checkpoint, along the history that it belongs to."""
    if not wanted:
        return {}
    branch: list[Reported] = []
    places: dict[str | None, tuple[list[Reported], int]] = {None: ([], 0)}
    for event in events:
        match event:
            case Started():
                reports, last = places.get(event.checkpoint, (branch, event.report))
                branch = [report for report in reports if report.report <= last]
            case Reported():
                branch.append(event)
            case Saved():
                places[event.checkpoint] = (branch, event.report)
            case _:
                pass
    found = {}
    for manifest in manifests:
        # one whose process was killed before it could say so is the newest of the present history
        reports, last = places.get(manifest.id, (branch, manifest.report))
        found[manifest.id] = _at(reports, last, wanted)
    return found


def _at(reports: Sequence[Reported], last: int, wanted: Windows) -> Derived:
    needed = {pair: pair[1] for pair in wanted}
    tail: list[Reported] = []
    for report in reversed(reports):
        if report.report > last:
            continue
        tail.append(report)
        for metric, window in wanted:
            if math.isfinite(report.metrics.get(metric, math.nan)):
                needed[metric, window] -= 1
        if all(left <= 0 for left in needed.values()):
            break
    return Smoothing(wanted, [report.metrics for report in reversed(tail)]).derived()
