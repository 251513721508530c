"""What is known of checkpoints besides their manifests: measured later, pinned, promoted.

A manifest never changes. What is said of a checkpoint after its commit is in the journal, and what rules look at is the
two together. Others may measure, pin and remove checkpoints while the run is being written: each of them appends to a
segment of the journal of its own, which ``LiveAnnotations`` reads as soon as it is there.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import UnionType

from peakpoint.format.events import Closed, Event, Measured, Opened, Pinned, Promoted, Promoting, Removed, Unpinned
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


def annotations_of(events: Iterable[Event]) -> Annotations:
    """Everything that a journal notes."""
    found = Annotations()
    for event in events:
        found.take(event)
    return found


def with_annotations(manifest: Manifest, noted: Annotations, derived: SmoothedMetrics) -> Manifest:
    """A manifest with all that is known of its metrics, for rules; never to be written."""
    late = noted.metrics.get(manifest.id, {})
    return replace(manifest, metrics={**manifest.metrics, **late, **derived}) if late or derived else manifest


def all_with_annotations(
    manifests: Sequence[Manifest], events: Sequence[Event], rules: Iterable[Rule]
) -> tuple[Manifest, ...]:
    """Every manifest as rules must see it."""
    noted, derived = (
        annotations_of(events),
        smoothed_metrics({manifest.id: manifest.report for manifest in manifests}, events, smoothing_windows(rules)),
    )
    return tuple(with_annotations(manifest, noted, derived.get(manifest.id, {})) for manifest in manifests)


_SAID = Measured | Pinned | Unpinned | Promoting | Promoted | Removed


class LiveAnnotations:
    """Notes on the checkpoints of one run; safe to use from several threads.

    Args:
        store: where.
        run: which run; the caller holds it.
        own: the caller's segment of the journal, which notes nothing on checkpoints.
        journal: the journal as the caller has read it; what was noted since is read here.
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
        self._derived = smoothed_metrics(
            {manifest.id: manifest.report for manifest in manifests}, journal.events, smoothing_windows(rules)
        )
        self._notes = Annotations()
        self._removed: frozenset[str] = frozenset()
        self._said: dict[str, Sequence[Event]] = {}  # by each segment, about checkpoints
        self._done = {own}
        for name, found in journal.by_segment():
            # trainers that ended without a word are dead: their lock is the caller's now
            self._hear(name, found, Closed | Opened)
        self._settle(journals.segments_of(store, run))

    def refresh(self) -> None:
        """Take in what others have noted."""
        with self._lock:
            segments = journals.segments_of(self._store, self._run)
            new = [name for name in segments if name not in self._done]
            grown = [self._hear(name, journals.read(self._store, self._run, {name}).events, Closed) for name in new]
            if any(grown):
                self._settle(segments)

    def _hear(self, name: str, found: Sequence[Event], last: type[Event] | UnionType) -> bool:
        """Take in one segment; with an event of the kind ``last`` it will not be read again. Whether it said more."""
        said = [event for event in found if isinstance(event, _SAID)]
        more = len(said) > len(self._said.get(name, ()))
        self._said[name] = said
        if any(isinstance(event, last) for event in found):
            self._done.add(name)
        return more

    def _settle(self, segments: Sequence[str]) -> None:
        """Know what was said, in the order of the segments, as after a restart."""
        events = [event for name in segments for event in self._said.get(name, ())]
        self._notes = annotations_of(events)
        self._removed = frozenset(event.checkpoint for event in events if isinstance(event, Removed))

    def add(self, checkpoint: str, derived: SmoothedMetrics) -> None:
        """Remember the smoothed metrics of a new checkpoint."""
        if derived:
            with self._lock:
                self._derived[checkpoint] = derived

    @property
    def pinned(self) -> Mapping[str, str]:
        """The ids that are pinned, with the reasons."""
        with self._lock:
            return dict(self._notes.pinned)

    @property
    def promoting(self) -> Sequence[Promoting]:
        """What was said of aliases that are about to point at checkpoints."""
        with self._lock:
            return list(self._notes.promoting.values())

    @property
    def removed(self) -> AbstractSet[str]:
        """The ids that others have said to remove; those that they could not remove still exist."""
        with self._lock:
            return self._removed

    def view(self, manifests: Iterable[Manifest]) -> list[Manifest]:
        """The manifests with all that is known of their metrics, for rules."""
        with self._lock:
            return [
                with_annotations(manifest, self._notes, self._derived.get(manifest.id, {})) for manifest in manifests
            ]

    def aliased(self, manifests: Iterable[Manifest]) -> Mapping[str, str]:
        """The ids that aliases protect, with the reasons."""
        return protected_by_aliases(self._store, [manifest.id for manifest in manifests], self.promoting)

    def planner(self, existing: Sequence[Manifest]) -> Callable[[Sequence[Manifest], Sequence[Rule]], RetentionPlan]:
        """What rules make of checkpoints, with what protects those that exist at this moment."""
        self.refresh()
        aliased, read, pinned = self.aliased(existing), being_read(self._store, existing), self.pinned

        def plan(manifests: Sequence[Manifest], rules: Sequence[Rule]) -> RetentionPlan:
            return retention.plan(self.view(manifests), rules, pinned, read=read, aliased=aliased)

        return plan
