"""Annotations of checkpoints: measured later, pinned, about to be promoted.

A manifest never changes. What is said of a checkpoint after its commit is in the journal, and rules look at the two
together. Others may measure, pin and remove checkpoints while the run is being written: each of them appends to a
segment of the journal of its own, which ``LiveAnnotations`` reads as soon as it exists.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import UnionType

from msgspec import structs

from peakpoint.format.events import (
    Closed,
    Event,
    Measured,
    Opened,
    Pinned,
    Promoted,
    Promoting,
    Removed,
    Unpinned,
    Withdrawn,
)
from peakpoint.format.manifest import Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository.alias_protection import protected_by_aliases
from peakpoint.repository.journal import JournalContents
from peakpoint.repository.reader import being_read
from peakpoint.rules import Rule, retention
from peakpoint.rules.history import SmoothedMetrics, smoothed_metrics, smoothing_windows
from peakpoint.rules.retention import RetentionPlan
from peakpoint.store import Store


@dataclass(slots=True)
class Annotations:
    """The annotations of checkpoints in a journal, by their ids.

    Attributes:
        metrics: measured after the commit; of several values of one metric the last counts.
        pinned: the reason of each pin.
        promoting: promotions under way, by their tokens.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    promoting: dict[str, Promoting] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take the next event into account."""
        match event:
            case Measured():
                self.metrics.setdefault(event.checkpoint, {}).update(event.metrics)
            case Withdrawn():
                for name in event.metrics:
                    self.metrics.get(event.checkpoint, {}).pop(name, None)
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


def annotations_of(events: Iterable[Event]) -> Annotations:
    """Return the annotations that a journal holds."""
    annotations = Annotations()
    for event in events:
        annotations.take(event)
    return annotations


def measurements_of(events: Iterable[Event], checkpoint: str) -> tuple[Measured, ...]:
    """Return the measurements of a checkpoint, without what was taken back of them."""
    measurements: list[Measured] = []
    for event in events:
        match event:
            case Measured() if event.checkpoint == checkpoint:
                measurements.append(event)
            case Withdrawn(metrics=names) if event.checkpoint == checkpoint:
                measurements = [_without(measurement, names) for measurement in measurements]
            case _:
                pass
    return tuple(measurement for measurement in measurements if measurement.metrics)


def _without(measurement: Measured, names: Iterable[str]) -> Measured:
    metrics = {name: value for name, value in measurement.metrics.items() if name not in names}
    return structs.replace(measurement, metrics=metrics)


def with_annotations(manifest: Manifest, annotations: Annotations, smoothed: SmoothedMetrics) -> Manifest:
    """Return a manifest with metrics measured later and smoothed ones, for rules; never to be written."""
    measured = annotations.metrics.get(manifest.id, {})
    if not measured and not smoothed:
        return manifest
    return replace(manifest, metrics={**manifest.metrics, **measured, **smoothed})


def all_with_annotations(
    manifests: Sequence[Manifest], events: Sequence[Event], rules: Iterable[Rule]
) -> tuple[Manifest, ...]:
    """Return every manifest as rules must see it."""
    annotations, smoothed = annotations_of(events), _smoothed(manifests, events, rules)
    return tuple(with_annotations(manifest, annotations, smoothed.get(manifest.id, {})) for manifest in manifests)


def _smoothed(
    manifests: Iterable[Manifest], events: Sequence[Event], rules: Iterable[Rule]
) -> dict[str, SmoothedMetrics]:
    reports = {manifest.id: manifest.report for manifest in manifests}
    return smoothed_metrics(reports, events, smoothing_windows(rules))


_ANNOTATING = Measured | Withdrawn | Pinned | Unpinned | Promoting | Promoted | Removed


class LiveAnnotations:
    """Annotations of the checkpoints of a run that is being written; safe to use from several threads.

    Args:
        store: any store.
        run: the run, which the caller holds.
        own: the caller's segment of the journal, which has no annotations.
        journal: the journal as the caller has read it; later segments are read here.
        manifests: the checkpoints that existed then.
        rules: the rules in force.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        own: str,
        journal: JournalContents,
        manifests: Iterable[Manifest],
        rules: Iterable[Rule],
    ) -> None:
        self._store, self._run = store, run
        self._lock = threading.Lock()
        self._smoothed = _smoothed(manifests, journal.events, rules)
        self._annotations = Annotations()  # replaced, never changed, so that it can be read without the lock
        self._removed: frozenset[str] = frozenset()
        self._events: dict[str, Sequence[Event]] = {}  # by segment, only those that annotate
        self._finished = {own}  # segments that will not be read again
        for segment, events in journal.by_segment():
            # trainers that ended without a word are dead: their lock is the caller's now
            self._take_segment(segment, events, Closed | Opened)
        self._replay(journals.segments_of(store, run))

    def refresh(self) -> None:
        """Read the annotations of others since."""
        with self._lock:
            segments = journals.segments_of(self._store, self._run)
            unfinished = [segment for segment in segments if segment not in self._finished]
            grown = [
                self._take_segment(segment, journals.read(self._store, self._run, {segment}).events, Closed)
                for segment in unfinished
            ]
            if any(grown):
                self._replay(segments)

    def _take_segment(self, segment: str, events: Sequence[Event], last: type[Event] | UnionType) -> bool:
        """Keep the annotations of one segment, finished if it has an event of the kind ``last``.

        Returns:
            Whether there are more than before.
        """
        annotating = [event for event in events if isinstance(event, _ANNOTATING)]
        is_longer = len(annotating) > len(self._events.get(segment, ()))
        self._events[segment] = annotating
        if any(isinstance(event, last) for event in events):
            self._finished.add(segment)
        return is_longer

    def _replay(self, segments: Sequence[str]) -> None:
        """Take all events in the order of the segments, as after a restart."""
        events = [event for segment in segments for event in self._events.get(segment, ())]
        self._annotations = annotations_of(events)
        self._removed = frozenset(event.checkpoint for event in events if isinstance(event, Removed))

    def add(self, checkpoint: str, smoothed: SmoothedMetrics) -> None:
        """Remember the smoothed metrics of a new checkpoint."""
        self._smoothed[checkpoint] = smoothed

    @property
    def pinned(self) -> Mapping[str, str]:
        """The ids that are pinned, with the reasons."""
        return self._annotations.pinned

    @property
    def removed(self) -> AbstractSet[str]:
        """The ids whose removal others have announced; those that they could not remove still exist."""
        return self._removed

    def view(self, manifests: Iterable[Manifest]) -> list[Manifest]:
        """Return the manifests as rules must see them."""
        annotations = self._annotations
        return [with_annotations(manifest, annotations, self._smoothed.get(manifest.id, {})) for manifest in manifests]

    def aliased(self, manifests: Iterable[Manifest]) -> Mapping[str, str]:
        """Return the ids that aliases protect, with the reasons."""
        return protected_by_aliases(
            self._store, [manifest.id for manifest in manifests], self._annotations.promoting.values()
        )

    def planner(self, existing: Sequence[Manifest]) -> Callable[[Sequence[Manifest], Sequence[Rule]], RetentionPlan]:
        """Return a function that plans retention with the protections of the existing checkpoints at this moment."""
        self.refresh()
        aliased, read, pinned = self.aliased(existing), being_read(self._store, existing), self.pinned

        def plan(manifests: Sequence[Manifest], rules: Sequence[Rule]) -> RetentionPlan:
            return retention.plan(self.view(manifests), rules, pinned, read=read, aliased=aliased)

        return plan
