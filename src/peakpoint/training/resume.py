"""The checkpoint that a run continues from, and the history that belongs to it.

``Resumption`` offers the newest manifest, then the one before, until one is whose files all match their digests.
``state.restore.restore_into`` compares names, shapes and dtypes of every part with the live objects before it changes
the first. The history is the one that
belongs to the checkpoint, ``forks`` note what was abandoned, and the random generators are set last, again right before
the loop begins.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peakpoint.errors import CorruptError, Error, NotFoundError
from peakpoint.format.events import Reported, Saved, Started
from peakpoint.format.manifest import Forks, Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository import reader, refs
from peakpoint.repository.lost import damage_sentence, damaged_checkpoints
from peakpoint.repository.packs import check_not_archived
from peakpoint.repository.root import Repository
from peakpoint.repository.trash import dropped_parts
from peakpoint.rules import history as histories
from peakpoint.state import rng
from peakpoint.state.origin import noted_settings, overruled_settings, script_settings
from peakpoint.state.restore import LoadReport, restore_into
from peakpoint.state.saved import SavedState
from peakpoint.state.typed_json import Decoder
from peakpoint.store import Store
from peakpoint.training.position import Position
from peakpoint.training.rank_states import for_rank
from peakpoint.training.ranks import Ranks
from peakpoint.training.records import last_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPoint:
    """The checkpoint and the position that a run starts from.

    Attributes:
        report: the restored parts, None for a start from nothing.
        why: the reason for a start from nothing.
        history: the reports up to the checkpoint.
        generators: the states of the random generators, None for a start from nothing and when they were not saved.
        parent: id of the checkpoint, None for a start from nothing.
        forks: the abandoned branches, as in ``Manifest``.
        sequence: the highest sequence number that was ever used in this run.
        requested: the ref that was followed, None without one.
        damaged: ids of newer checkpoints that were skipped.
        settings: of optimizers and schedulers by part, as the script that began this had made them.
    """

    sequence: int
    report: LoadReport | None = None
    why: str = ""
    position: Position = field(default_factory=Position)
    history: Sequence[Reported] = ()
    generators: Mapping[str, Any] | None = None
    parent: str | None = None
    forks: Forks = ()
    requested: str | None = None
    damaged: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Resumption:
    """The past of a run, and the search in it for the checkpoint that the run continues from.

    Attributes:
        skipped: a sentence for each newer checkpoint that could not be taken, or may have been damaged.
    """

    store: Store
    run: str
    listing: reader.RunListing
    journal: journals.JournalContents
    skipped: tuple[str, ...] = ()
    _requested: str | None = None
    _why: str = ""
    _damaged: tuple[str, ...] = ()
    _candidates: Generator[Manifest, Error | None] | None = None

    @property
    def exists(self) -> bool:
        """Whether the run has checkpoints, damaged ones included."""
        return bool(self.listing.manifests or self.listing.damaged)

    @property
    def _sequence(self) -> int:
        """The highest sequence number that was ever used in this run."""
        return last_sequence(self.listing.manifests, self.journal.events)

    def candidate(self, choice: str, failure: Error | None) -> Manifest | StartPoint:
        """Return the next checkpoint to try: the one that is asked for, or the newest, then the one before.

        Args:
            choice: see the argument ``resume`` of ``Checkpointer``.
            failure: why the one before could not be read; None at first.

        Returns:
            The start itself when the run begins from nothing.

        Raises:
            NotFoundError: the checkpoint that is asked for does not exist.
            CorruptError: no checkpoint is whole.
        """
        if self._candidates is None:
            self._candidates = self._choose(choice)
        try:
            return self._candidates.send(failure)
        except StopIteration:
            sequence = self._sequence
            return StartPoint(sequence=sequence, why=self._why, forks=((0, sequence + 1),) if sequence else ())

    def _choose(self, choice: str) -> Generator[Manifest, Error | None]:
        if choice == "never":
            self._why = 'resume="never"'
            return
        if choice not in ("auto", "must"):
            parsed = refs.parse_any(choice)
            elsewhere = isinstance(parsed, refs.AliasRef) or parsed.run != self.run
            followed = bool(self.listing.manifests) if elsewhere else self._followed(choice)
            if not followed:
                self._requested = choice
                failure = yield Repository(self.store).find_manifest(choice)
                assert failure is not None
                raise failure
        elif not self.exists:
            if choice == "must":
                raise NotFoundError(
                    f'resume="must", but run {self.run!r} in {self.store.location} has no checkpoint; check the root '
                    'and the name of the run, or start it with resume="auto"'
                )
            self._why = "no checkpoints yet"
            return
        yield from self._newest()

    def _followed(self, ref: str) -> bool:
        """Whether this run has been started from ``ref`` before and has saved something since."""
        events = self.journal.events
        last = None
        for number, event in enumerate(events):
            if isinstance(event, Started) and event.requested is not None:
                last = number if event.requested == ref else None
        return last is not None and any(isinstance(event, Saved) for event in events[last:])

    def _newest(self) -> Generator[Manifest, Error | None]:
        skipped: list[str] = []
        for manifest in reversed(self.listing.manifests):
            dropped = [part for record in dropped_parts(self.store, self.run, manifest.name) for part in record.parts]
            if dropped:
                skipped.append(f"{manifest.name} cannot be continued from: its parts {', '.join(dropped)} were dropped")
                continue
            self.skipped = (*self._damage_beside(manifest), *skipped)
            failure = yield manifest
            assert failure is not None
            skipped.append(str(failure))
            self._damaged = (*self._damaged, manifest.id)
        lines = "\n  ".join([*(str(checkpoint.error) for checkpoint in self.listing.damaged), *skipped])
        raise CorruptError(
            f"no checkpoint of run {self.run!r} is whole:\n  {lines}\nrestore one from a copy, or start again "
            'with resume="never"; peakpoint audit --deep lists the damage'
        )

    def _damage_beside(self, newest: Manifest) -> list[str]:
        """Return a sentence for each damaged checkpoint that may be newer, and one for all older ones together."""
        saves = [(damage, damage.saved) for damage in self.listing.damaged]
        older = [damage for damage, saved in saves if saved is not None and saved.sequence < newest.sequence]
        newer = [str(damage.error) for damage, _ in saves if damage not in older]
        return [*newer, *([damage_sentence(self.store, older)] if older else [])]

    def complete(self, start: StartPoint, manifest: Manifest) -> StartPoint:
        """Add to the start from a checkpoint the history that belongs to it."""
        sequence = self._sequence
        if manifest.run == self.run:
            history = histories.history(self.journal.events, manifest.id) or [
                # killed between the manifest and its record: it is the newest, so the present history is its own
                report
                for report in histories.history(self.journal.events)
                if report.report <= manifest.report
            ]
            newer = sequence > manifest.sequence
            forks = (*manifest.forks, (manifest.sequence, sequence + 1)) if newer else manifest.forks
        else:
            history, forks = [], ()
        return replace(
            start,
            history=history,
            forks=forks,
            sequence=sequence,
            requested=self._requested,
            damaged=self._damaged,
        )


def restore_rank(saved: SavedState, run: str, live: dict[str, Any], ranks: Ranks, *, strict: bool) -> StartPoint:
    """Restore the state of one rank; see ``Resumption`` for the rest of a start."""
    share = for_rank(saved, live, ranks.rank, ranks.size, strict=strict)
    saved, manifest = share.saved, saved.manifest
    decoder = Decoder({})
    position = Position.from_plain(decoder.decode(saved.trees.loop))
    generators = decoder.decode(saved.trees.rng)
    restored = {name: value for name, value in live.items() if name not in share.left_out}
    script = {name: script_settings(value) for name, value in restored.items()}
    report = restore_into(saved, restored, strict=strict)
    live |= restored
    settings = {}
    for part in (part.part for part in report.restored if script[part.part]):
        settings_now = script_settings(live[part])
        settings[part] = noted_settings(saved.trees.origin(part), live[part], settings_now)
        overruled = overruled_settings(part, script[part], settings_now, settings[part])
        report = replace(report, overruled=(*report.overruled, *filter(None, [overruled])))
    for part, seed in share.seeds.items():
        rng.seed_anew(live[part], seed)
    without_generators = not generators and "rng" in saved.trees.optional
    if without_generators:
        sentence = "the random generators: they are not in this checkpoint, and stay as they are"
        report = replace(report, missing=(*report.missing, sentence))
    report = replace(report, missing=(*report.missing, *share.missing))
    if manifest.run != run:
        position.report = 0
    return StartPoint(
        sequence=0,
        report=report,
        position=position,
        generators=None if without_generators else share.generators or generators,
        parent=manifest.id,
        settings=settings,
    )


def resumption(store: Store, run: str) -> Resumption:
    """Read the past of a run.

    Raises:
        ConflictError: the run is archived.
    """
    listing = reader.list_run(store, run)
    listing = replace(listing, damaged=damaged_checkpoints(store, run, listing, exclusive=True))
    check_not_archived(store, run, listing.manifests)
    return Resumption(store, run, listing, journals.read(store, run))
