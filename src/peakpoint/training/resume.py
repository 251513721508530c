"""Which checkpoint a run continues from, and the history that belongs to it.

``Resumption`` takes the newest manifest whose files all match their digests. ``state.restore.restore_into`` compares
names, shapes and dtypes of every part with the live objects before it changes the first. The history is the one that
belongs to the checkpoint, ``forks`` note what was abandoned, and the random generators are set last, again right before
the loop begins.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peakpoint.errors import CorruptError, FormatError, NotFoundError, PeakpointWarning
from peakpoint.format.events import Event, Reported, Saved, Started
from peakpoint.format.manifest import Forks, Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository import reader, refs
from peakpoint.repository.packs import check_not_archived
from peakpoint.repository.root import Repository
from peakpoint.repository.trash import dropped_parts
from peakpoint.rules import history as histories
from peakpoint.state import rng
from peakpoint.state.restore import LoadReport, restore_into
from peakpoint.state.saved import SavedState, read_state
from peakpoint.state.typed_json import Decoder
from peakpoint.store import Store
from peakpoint.training.position import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPoint:
    """Where a run starts.

    Attributes:
        report: what was restored, None for a start from nothing.
        why: for a start from nothing: why.
        position: the loop's position.
        history: the reports that still count.
        generators: the states of the random generators, None for a start from nothing and when they were not saved.
        parent: id of the checkpoint, None for a start from nothing.
        forks: the abandoned branches, as in ``Manifest``.
        sequence: the highest sequence number that was ever used in this run.
        kept_report: number of the last report that still counts.
        requested: the ref that was followed, None when there was none.
        damaged: ids of newer checkpoints that were passed over.
    """

    report: LoadReport | None
    why: str
    position: Position
    history: Sequence[Reported]
    generators: Mapping[str, Any] | None
    parent: str | None
    forks: Forks
    sequence: int
    kept_report: int
    requested: str | None
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resumption:
    """What there is to continue from.

    Attributes:
        store: where.
        run: which run.
        shelf: its checkpoints.
        journal: what it reported and did.
    """

    store: Store
    run: str
    shelf: reader.RunListing
    journal: journals.JournalContents

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The checkpoints that exist."""
        return self.shelf.manifests

    @property
    def events(self) -> tuple[Event, ...]:
        """What the journal holds, in order."""
        return self.journal.events

    @property
    def exists(self) -> bool:
        """Whether there is anything to continue from, were it damaged."""
        return bool(self.shelf.manifests or self.shelf.damaged)

    def restore(self, how: str, live: dict[str, Any], *, strict: bool) -> StartPoint:
        """Restore ``live`` from the checkpoint that ``how`` means; see ``Checkpointer.resume`` for the errors."""
        if how == "never":
            return self._nothing('resume="never"')
        if how not in ("auto", "must"):
            parsed = refs.parse_any(how)
            elsewhere = isinstance(parsed, refs.AliasRef) or parsed.run != self.run
            followed = bool(self.shelf.manifests) if elsewhere else self._followed(how)
            if not followed:
                manifest = Repository(self.store).find_manifest(how)
                return self._from(read_state(self.store, manifest), live, strict=strict, requested=how)
        elif not self.exists:
            if how == "must":
                raise NotFoundError(
                    f'resume="must", but run {self.run!r} in {self.store.location} has no checkpoint; check the root '
                    'and the name of the run, or start it with resume="auto"'
                )
            return self._nothing("no checkpoints yet")
        return self._newest_good(live, strict=strict)

    def _followed(self, ref: str) -> bool:
        """Whether this run has been started from ``ref`` before and has saved something since."""
        last = None
        for number, event in enumerate(self.events):
            if isinstance(event, Started) and event.requested is not None:
                last = number if event.requested == ref else None
        return last is not None and any(isinstance(event, Saved) for event in self.events[last:])

    def _newest_good(self, live: dict[str, Any], *, strict: bool) -> StartPoint:
        skipped = [str(damaged.error) for damaged in self.shelf.damaged]
        passed: list[str] = []
        for manifest in reversed(self.shelf.manifests):
            gone = [part for record in dropped_parts(self.store, self.run, manifest.name) for part in record.parts]
            if gone:
                skipped.append(f"{manifest.name} cannot be continued from: its parts {', '.join(gone)} were dropped")
                continue
            try:
                saved = read_state(self.store, manifest)
            except (CorruptError, FormatError, NotFoundError) as error:
                skipped.append(str(error))
                passed.append(manifest.id)
                continue
            found = self._from(saved, live, strict=strict, requested=None)
            assert found.report is not None
            return replace(found, report=replace(found.report, skipped=tuple(skipped)), damaged=tuple(passed))
        lines = "\n  ".join(skipped)
        raise CorruptError(
            f"no checkpoint of run {self.run!r} is whole:\n  {lines}\nrestore one from a copy, or start again "
            'with resume="never"; peakpoint audit --deep lists the damage'
        )

    @property
    def _sequence(self) -> int:
        used = [manifest.sequence for manifest in self.shelf.manifests]
        used += [event.sequence for event in self.events if isinstance(event, Saved)]
        return max(used, default=0)

    def _nothing(self, why: str) -> StartPoint:
        sequence = self._sequence
        return StartPoint(
            report=None,
            why=why,
            position=Position(),
            history=(),
            generators=None,
            parent=None,
            forks=((0, sequence + 1),) if sequence else (),
            sequence=sequence,
            kept_report=0,
            requested=None,
            damaged=(),
        )

    def _from(self, saved: SavedState, live: dict[str, Any], *, strict: bool, requested: str | None) -> StartPoint:
        manifest = saved.manifest
        plain = Decoder({})
        position = Position.from_plain(plain.decode(saved.loop))
        generators = plain.decode(saved.rng)
        restored, missing = restore_into(saved, live, strict=strict)
        elsewhere = not generators and "rng" in saved.optional
        if elsewhere:
            missing = (*missing, "the random generators: they are not in this checkpoint, and stay as they are")
        report = LoadReport(f"{manifest.run}/{manifest.name}", manifest.step, manifest.epoch, restored, missing)
        sequence = self._sequence
        if manifest.run == self.run:
            history = histories.history(self.events, manifest.id) or [
                # killed between the manifest and its record: it is the newest, so the present history is its own
                report
                for report in histories.history(self.events)
                if report.report <= manifest.report
            ]
            newer = sequence > manifest.sequence
            forks = (*manifest.forks, (manifest.sequence, sequence + 1)) if newer else manifest.forks
        else:
            history, forks = [], ()
            position.report = 0
        return StartPoint(
            report=report,
            why="",
            position=position,
            history=history,
            generators=None if elsewhere else generators,
            parent=manifest.id,
            forks=forks,
            sequence=sequence,
            kept_report=position.report,
            requested=requested,
            damaged=(),
        )


def resumption(store: Store, run: str) -> Resumption:
    """Look at what there is to continue from.

    Raises:
        ConflictError: the run is archived.
    """
    shelf = reader.list_run(store, run)
    check_not_archived(store, run, shelf.manifests)
    return Resumption(store, run, shelf, journals.read(store, run))


def restore_generators(generators: Mapping[str, Any]) -> None:
    """Set the random generators; warns of those whose device is not here."""
    for line in rng.restore(dict(generators)):
        warnings.warn(f"not restored: {line}", PeakpointWarning, stacklevel=4)
