"""One run of a repository: its checkpoints, its journal, and what is known of them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from peakpoint.errors import ConfigError, ConflictError, PeakpointWarning
from peakpoint.format import layout
from peakpoint.format.events import (
    Closed,
    Event,
    Measured,
    Opened,
    PartsDropped,
    Pinned,
    Removed,
    Reported,
    Saved,
    Undone,
    Unpinned,
)
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.names import check_metric, check_text, no_part
from peakpoint.format.sealed import check_format, unseal
from peakpoint.repository import journal as journals
from peakpoint.repository import reader, refs
from peakpoint.repository.alias_protection import protected_by_aliases
from peakpoint.repository.annotations import all_with_annotations, annotations_of, with_annotations
from peakpoint.repository.provenance import present_user, utc_now
from peakpoint.rules import Claim, Mode, Rule, parse
from peakpoint.rules import history as histories
from peakpoint.rules.history import newest_event
from peakpoint.rules.retention import RetentionPlan, plan
from peakpoint.store import SMALL, LocalStore, Store


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"metric {name!r} is {value!r}, a {type(value).__name__}; record a number")
    return float(value)


def rules_of(events: Sequence[Event]) -> tuple[Rule, ...]:
    """The rules in force: those of the process that opened the run last."""
    opened = newest_event(events, Opened)
    return tuple(parse(text) for text in opened.rules) if opened else ()


def _may_be_removing(events: Sequence[Event], checkpoint: str, parts: AbstractSet[str]) -> bool:
    """Whether a segment ends with a word of removal, also of parts, that nothing shows to be over."""
    removing = False
    for event in events:
        match event:
            case Removed():
                removing = removing or event.checkpoint == checkpoint
            case PartsDropped() if not parts.isdisjoint(event.parts):
                removing = removing or event.checkpoint == checkpoint
            case Saved() | Closed():  # said by the thread that removes, when it is done
                removing = False
            case Undone():  # it stays after all, or whole
                removing = removing and event.checkpoint != checkpoint
            case _:
                pass
    return removing


def _checkpoint(store: Store, manifest: Manifest) -> Checkpoint:
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    return Checkpoint(
        run=manifest.run,
        name=manifest.name,
        id=manifest.id,
        sequence=manifest.sequence,
        step=manifest.step,
        epoch=manifest.epoch,
        metrics=manifest.metrics,
        reasons=manifest.reasons,
        parts=manifest.parts,
        size_bytes=manifest.size_bytes,
        path=store.path(prefix) if isinstance(store, LocalStore) else None,
        created_at=manifest.created_at,
        forks=manifest.forks,
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a repository. Every call reads what is there now.

    Attributes:
        store: where it is.
        name: its name.
    """

    store: Store
    name: str

    def manifests(self) -> tuple[Manifest, ...]:
        """The manifest of every checkpoint that exists, earliest commit first."""
        return reader.list_run(self.store, self.name).manifests

    def known(self, rules: Sequence[Rule] | None = None) -> tuple[Manifest, ...]:
        """``manifests`` with all that is known of their metrics: also what was measured later, and smoothed values.

        Args:
            rules: the rules that say what to smooth; those in force by default.
        """
        events = self.events()
        return all_with_annotations(self.manifests(), events, rules_of(events) if rules is None else rules)

    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint that exists, earliest commit first."""
        noted = annotations_of(self.events())
        return [_checkpoint(self.store, with_annotations(manifest, noted, {})) for manifest in self.manifests()]

    def events(self) -> tuple[Event, ...]:
        """The journal: what was reported and done."""
        return journals.read(self.store, self.name).events

    def history(self) -> list[Reported]:
        """Every report that counts, earliest first; reports of abandoned branches are left out."""
        return histories.history(self.events())

    def rules(self) -> tuple[Rule, ...]:
        """The rules in force: those of the process that opened the run last."""
        return rules_of(self.events())

    def pinned(self) -> Mapping[str, str]:
        """The ids of pinned checkpoints, with the reasons."""
        return annotations_of(self.events()).pinned

    def plan(self, rules: Sequence[Rule] | None = None, events: Sequence[Event] | None = None) -> RetentionPlan:
        """What rules keep of what is there, and what would go; nothing is changed.

        Checkpoints with files that are missing or of another size neither go nor count.

        Args:
            rules: any rules; those in force by default.
            events: the journal, when it has been read already.
        """
        events = self.events() if events is None else events
        asked = rules_of(events) if rules is None else rules
        shelf = reader.list_run(self.store, self.name)
        return plan(
            all_with_annotations(shelf.manifests, events, asked),
            asked,
            annotations_of(events).pinned,
            aliased=self.aliased(shelf.manifests, events),
            damaged=reader.find_damage(self.store, shelf.manifests),
            cut=shelf.incomplete,
            read=reader.being_read(self.store, shelf.manifests),
        )

    def aliased(self, manifests: Sequence[Manifest], events: Sequence[Event]) -> Mapping[str, str]:
        """The ids that aliases protect: what they point at, or did lately, or are about to; with the reasons."""
        ids = [manifest.id for manifest in manifests]
        return protected_by_aliases(self.store, ids, annotations_of(events).promoting.values())

    def kept(self) -> Mapping[str, tuple[Claim, ...]]:
        """Why each checkpoint is kept: its id, with the claims and protections on it."""
        return self.plan().keep

    def latest(self) -> Checkpoint:
        """The newest checkpoint.

        Raises:
            NotFoundError: there is none.
        """
        return self.find(f"{self.name}@latest")

    def best(self, metric: str, *, mode: Mode | None = None) -> Checkpoint:
        """The best checkpoint by one metric; ties go to the earlier, NaN and infinities never win.

        Args:
            metric: the metric's name.
            mode: the direction; by default the one that the run's rules give.

        Raises:
            NotFoundError: no checkpoint has a finite value of it.
            ConfigError: no mode is given, and no rule gives one.
        """
        return self.find(f"{self.name}@best:{metric}" + (f":{mode}" if mode else ""))

    def find(self, ref: str) -> Checkpoint:
        """The checkpoint that ``ref`` names; see ``peakpoint.repository.refs``."""
        return _checkpoint(self.store, with_annotations(self.find_manifest(ref), annotations_of(self.events()), {}))

    def find_manifest(self, ref: str) -> Manifest:
        """The manifest of the checkpoint that ``ref`` names.

        Raises:
            NotFoundError: there is no such checkpoint.
            ConfigError: ``ref`` is none of the forms of refs.
        """
        parsed = refs.parse(ref)
        shelf = reader.list_run(self.store, self.name)
        damaged = {damage.name: damage.error for damage in shelf.damaged}
        if isinstance(parsed, refs.ByName) and parsed.name in damaged:
            raise damaged[parsed.name]
        if damaged and not shelf.manifests:
            raise shelf.damaged[0].error
        for error in () if isinstance(parsed, refs.ByName) else damaged.values():
            warnings.warn(f"not considered for {ref}: {error}", PeakpointWarning, stacklevel=2)
        if not isinstance(parsed, refs.BestOf):
            return refs.resolve(parsed, shelf.manifests, ())
        events = self.events()
        noted = annotations_of(events)
        seen = [with_annotations(manifest, noted, {}) for manifest in shelf.manifests]
        best = refs.resolve(parsed, seen, rules_of(events) if parsed.mode is None else ())
        return next(manifest for manifest in shelf.manifests if manifest.id == best.id)

    def record(
        self, ref: str, metrics: Mapping[str, float], *, part: str | None = None, source: str = ""
    ) -> Checkpoint:
        """Append measurements to a checkpoint that exists; its manifest does not change.

        Rules see them at once, also those of a training that is running. Of several values of one metric the last
        counts.

        Args:
            ref: which checkpoint.
            metrics: the values, by name.
            part: the part that was measured, such as ``"ema"``, when the state has several kinds of weights.
            source: what measured it, for people.

        Raises:
            NotFoundError: there is no such checkpoint or part.
            ConfigError: no metric is given, or one that cannot be.

        Example:
            >>> import tempfile, peakpoint as pp
            >>> root = tempfile.mkdtemp()
            >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Last(1)]) as ckpt:
            ...     _ = ckpt.report(step=1)
            >>> dict(pp.open(root).run("r").record("r@latest", {"accuracy": 0.74}, source="evaluate.py").metrics)
            {'accuracy': 0.74}
        """
        manifest = self.find_manifest(ref)
        values = {check_metric(name): _number(name, value) for name, value in metrics.items()}
        check_text("source", source)
        if not values:
            raise ConfigError("nothing to record: give at least one metric")
        if part is not None and part not in manifest.parts:
            raise no_part(part, manifest.parts, where=manifest.name)
        self._note(
            lambda at, by: Measured(
                at=at, checkpoint=manifest.id, step=manifest.step, metrics=values, part=part, source=source, by=by
            )
        )
        return self.find(f"{manifest.run}/{manifest.name}")

    def pin(self, ref: str, why: str) -> None:
        """Protect a checkpoint from the rules until it is unpinned.

        Raises:
            NotFoundError: there is no such checkpoint, or a rule is removing it at this moment.
            ConfigError: no reason is given.
        """
        if not check_text("the reason of pin", why).strip():
            raise ConfigError("pin needs a reason: it is what tells you later why this checkpoint is here")
        manifest = self.find_manifest(ref)
        self._note(lambda at, by: Pinned(at=at, checkpoint=manifest.id, why=why, by=by))
        if self.is_being_removed(manifest) or self.store.size(layout.manifest_key(self.name, manifest.name)) is None:
            raise ConflictError(
                f"{manifest.name} was just being removed; see with peakpoint ls whether it is still there"
            )

    def is_being_removed(self, manifest: Manifest, *, held: bool = False) -> bool:
        """Whether somebody may be removing a checkpoint, or parts of it, at this moment.

        Whoever removes one has said so first, in the journal, and looks at what is protected after that: one who has
        protected it and then asks here either finds that word, or is heeded. A removal that was over by now is not
        found: look after that whether the checkpoint is still there.

        Args:
            manifest: of the checkpoint, as it is after it was protected.
            held: whether the caller holds the run: then a training that was killed in the middle of a removal is over.
        """
        return any(
            _may_be_removing(
                journals.removal_events(self.store, self.name, segment), manifest.id, manifest.parts.keys()
            )
            for segment in journals.live_segments(self.store, self.name, held=held)
        )

    def unpin(self, ref: str) -> None:
        """Let the rules have a checkpoint again; nothing happens when it was not pinned.

        Raises:
            NotFoundError: there is no such checkpoint.
        """
        manifest = self.find_manifest(ref)
        self._note(lambda at, by: Unpinned(at=at, checkpoint=manifest.id, by=by))

    def _note(self, event: Callable[[datetime, str], Event]) -> None:
        """Append one event, durably, in a segment of its own."""
        journal = journals.Journal(self.store, self.name, utc_now)
        try:
            journal.append(event(journal.now(), present_user()))
            journal.append(Closed(at=journal.now(), why="noted"))
        finally:
            journal.close()

    def holder(self) -> str | None:
        """Who is writing the run at present, in words; None when nobody is."""
        return self.store.holder(layout.writer_lock(self.name))

    def about(self) -> dict[str, Any]:
        """``run.json``: who began the run, when, with which versions and rules."""
        return check_run_record(self.store, self.name)


def check_run_record(store: Store, run: str) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
        NotFoundError: there is none.
    """
    key = layout.run_record(run)
    record = unseal(store.get(key, max_size=SMALL), where=f"{store.location}/{key}")
    check_format(record, where=f"{store.location}/{key}")
    return record
