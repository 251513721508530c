"""What is known of checkpoints besides their manifests: measured later, pinned, promoted.

A manifest never changes. What is said of a checkpoint after its commit is in the journal, and what rules look at is the
two together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from peakpoint.format.events import Event, Measured, Pinned, Promoted, Promoting, Unpinned
from peakpoint.format.manifest import Manifest
from peakpoint.rules import Rule
from peakpoint.rules.history import Derived, derive, windows


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


def all_known(manifests: Sequence[Manifest], events: Sequence[Event], rules: Iterable[Rule]) -> tuple[Manifest, ...]:
    """Every manifest as rules must see it."""
    noted, derived = notes(events), derive(manifests, events, windows(rules))
    return tuple(known(manifest, noted, derived.get(manifest.id, {})) for manifest in manifests)
