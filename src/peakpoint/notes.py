"""What is known of checkpoints besides their manifests: measured later, pinned, smoothed over the history.

A manifest never changes. What is said of a checkpoint after its commit is in the journal, and what rules look at is the
two together.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from peakpoint.format.events import Event, Measured, Pinned, Promoted, Promoting, Reported, Saved, Started, Unpinned
from peakpoint.format.manifest import Manifest
from peakpoint.rules import Best, Rule, smoothed

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


@dataclass(slots=True)
class Notes:
    """What the journal says about checkpoints, by their ids.

    Attributes:
        metrics: measured after the commit; of several values of one metric the last counts.
        pinned: why each is pinned.
        promoting: what was said of aliases that are about to point at a checkpoint, by its token.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    promoting: dict[str, Promoting] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take the next event into account."""
        match event:
            case Measured():
                self.metrics.setdefault(event.checkpoint, {}).update(event.metrics)
            case Pinned():
                self.pinned[event.checkpoint] = event.why
            case Unpinned():
                self.pinned.pop(event.checkpoint, None)
            case Promoting():
                self.promoting[event.token] = event
            case Promoted():
                self.promoting.pop(event.token, None)
            case _:
                pass


def notes(events: Iterable[Event]) -> Notes:
    """Everything that a journal notes."""
    found = Notes()
    for event in events:
        found.take(event)
    return found


def known(manifest: Manifest, noted: Notes, derived: Derived) -> Manifest:
    """A manifest with all that is known of its metrics, for rules; never to be written."""
    late = noted.metrics.get(manifest.id, {})
    return replace(manifest, metrics={**manifest.metrics, **late, **derived}) if late or derived else manifest


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


def all_known(manifests: Sequence[Manifest], events: Sequence[Event], rules: Iterable[Rule]) -> tuple[Manifest, ...]:
    """Every manifest as rules must see it."""
    noted, derived = notes(events), derive(manifests, events, windows(rules))
    return tuple(known(manifest, noted, derived.get(manifest.id, {})) for manifest in manifests)
