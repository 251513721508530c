"""What the writer of a run knows of its checkpoints besides their manifests, kept up to date.

Others may measure and pin checkpoints while the run is being written: each of them appends to a segment of the journal
of its own, which is read here as soon as it is there.
"""

import threading
from collections.abc import Iterable, Mapping

from peakpoint import journal as journals
from peakpoint.journal import Reading
from peakpoint.manifest import Manifest
from peakpoint.notes import Derived, Notes, derive, known, notes, windows
from peakpoint.rules import Rule
from peakpoint.store import Store


class Ledger:
    """Notes on the checkpoints of one run; safe to use from several threads.

    Args:
        store: where.
        run: which run; the caller holds it.
        own: the caller's segment of the journal, which notes nothing on checkpoints.
        journal: the journal as the caller has read it.
        manifests: the checkpoints that existed then.
        rules: the rules in force.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        own: str,
        journal: Reading,
        manifests: Iterable[Manifest],
        rules: Iterable[Rule],
    ) -> None:
        self._store, self._run = store, run
        self._lock = threading.Lock()
        self._notes: Notes = notes(journal.events)
        self._derived = derive(manifests, journal.events, windows(rules))
        self._done = {own}
        self._taken: dict[str, int] = {}  # events of a segment that may still grow
        for name, found in journal.by_segment():
            # trainers that ended without a word are dead: their lock is the caller's now
            if any(isinstance(event, journals.Closed | journals.Opened) for event in found):
                self._done.add(name)
            else:
                self._taken[name] = len(found)

    def refresh(self) -> None:
        """Take in what others have noted."""
        with self._lock:
            for name in journals.segments_of(self._store, self._run):
                if name not in self._done:
                    found = journals.read(self._store, self._run, {name}).events
                    for event in found[self._taken.get(name, 0) :]:
                        self._notes.take(event)
                    self._taken[name] = len(found)
                    if any(isinstance(event, journals.Closed) for event in found):
                        self._done.add(name)

    def add(self, checkpoint: str, derived: Derived) -> None:
        """Remember the smoothed metrics of a new checkpoint."""
        if derived:
            with self._lock:
                self._derived[checkpoint] = derived

    @property
    def pinned(self) -> Mapping[str, str]:
        """The ids that are pinned, with the reasons."""
        with self._lock:
            return dict(self._notes.pinned)

    def view(self, manifests: Iterable[Manifest]) -> list[Manifest]:
        """The manifests with all that is known of their metrics, for rules."""
        with self._lock:
            return [known(manifest, self._notes, self._derived.get(manifest.id, {})) for manifest in manifests]
