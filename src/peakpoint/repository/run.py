"""One run of a repository: its checkpoints, with their annotations, and its journal."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from peakpoint.errors import ConfigError, ConflictError, CorruptError, NotFoundError, PeakpointWarning
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
    Withdrawn,
)
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.members import Name, Time
from peakpoint.format.metrics import read_metrics
from peakpoint.format.names import check_text, did_you_mean, no_part
from peakpoint.format.sealed import decode_record
from peakpoint.format.settings import Settings, settings_of
from peakpoint.repository import journal as journals
from peakpoint.repository import reader, refs
from peakpoint.repository.alias_protection import protected_by_aliases
from peakpoint.repository.annotations import all_with_annotations, annotations_of, with_annotations
from peakpoint.repository.lost import damage_sentence, damaged_checkpoints
from peakpoint.repository.provenance import present_user, utc_now
from peakpoint.repository.reader import Damaged
from peakpoint.repository.run_names import is_name_of
from peakpoint.rules import Claim, Mode, Rule, parse
from peakpoint.rules import history as histories
from peakpoint.rules.history import newest_event
from peakpoint.rules.retention import RetentionPlan, plan
from peakpoint.store import SMALL, LocalStore, Store


def rules_of(events: Sequence[Event]) -> tuple[Rule, ...]:
    """Return the rules in force: those of the process that opened the run last."""
    opened = newest_event(events, Opened)
    return tuple(parse(text) for text in opened.rules) if opened else ()


def _may_be_removing(events: Sequence[Event], checkpoint: str, parts: AbstractSet[str]) -> bool:
    """Return whether a segment ends with the announcement of a removal, also of parts, that may not be over."""
    removing = False
    for event in events:
        match event:
            case Removed():
                removing = removing or event.checkpoint == checkpoint
            case PartsDropped() if not parts.isdisjoint(event.parts):
                removing = removing or event.checkpoint == checkpoint
            case Saved() | Closed():  # written by the thread that removes, when it is done
                removing = False
            case Undone():  # it was kept after all, or restored
                removing = removing and event.checkpoint != checkpoint
            case _:
                pass
    return removing


def _checkpoint(store: Store, manifest: Manifest) -> Checkpoint:
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    path = store.path(prefix) if isinstance(store, LocalStore) else None
    members = {field.name: getattr(manifest, field.name) for field in fields(Checkpoint) if field.name != "path"}
    return Checkpoint(path=path, **members)


def _refuse_damaged(name: str, manifests: Sequence[Manifest], damaged: Sequence[Damaged]) -> None:
    """Raise the error of a damaged checkpoint of a name or an id, unless an undamaged one has it."""
    if not any(name in (manifest.name, manifest.id) for manifest in manifests):
        for damage in damaged:
            if damage.is_named(name):
                raise damage.error


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a repository. Every call reads what is there now.

    Attributes:
        store: of the repository.
        name: the run's name.
    """

    store: Store
    name: str

    def manifests(self) -> tuple[Manifest, ...]:
        """Read the manifest of every checkpoint, earliest commit first."""
        return reader.list_run(self.store, self.name).manifests

    def annotated(self, rules: Sequence[Rule] | None = None) -> tuple[Manifest, ...]:
        """Return ``manifests`` with metrics that were measured later, and smoothed ones.

        Args:
            rules: the rules that say what to smooth; those in force by default.
        """
        events = self.events()
        return all_with_annotations(self.manifests(), events, rules_of(events) if rules is None else rules)

    def checkpoints(self) -> list[Checkpoint]:
        """Return every checkpoint, earliest commit first."""
        annotations = annotations_of(self.events())
        return [_checkpoint(self.store, with_annotations(manifest, annotations, {})) for manifest in self.manifests()]

    def events(self) -> tuple[Event, ...]:
        """Read the journal: what was reported and done."""
        return journals.read(self.store, self.name).events

    def history(self) -> list[Reported]:
        """Return the reports that count, earliest first; those of abandoned branches are left out."""
        return histories.history(self.events())

    def table(self) -> list[dict[str, Any]]:
        """Return ``history`` as rows, for ``pandas.DataFrame``: ``report``, ``at``, ``step``, ``epoch`` and metrics.

        A metric of such a name stands under ``metric.NAME``.
        """
        rows = []
        for report in self.history():
            row: dict[str, Any] = {name: getattr(report, name) for name in ("report", "at", "step", "epoch")}
            rows.append(
                row | {f"metric.{name}" if name in row else name: value for name, value in report.metrics.items()}
            )
        return rows

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules in force: those of the process that opened the run last."""
        return rules_of(self.events())

    def settings(self) -> Settings:
        """Return what the training was started with last: its ``config`` and ``tags``."""
        return settings_of(self.events())

    def pinned(self) -> Mapping[str, str]:
        """Return the ids of pinned checkpoints, with the reasons."""
        return annotations_of(self.events()).pinned

    def plan(self, rules: Sequence[Rule] | None = None, events: Sequence[Event] | None = None) -> RetentionPlan:
        """Return which checkpoints rules keep, and which they would remove; nothing is changed.

        Checkpoints with files that are missing or of another size are neither removed nor counted.

        Args:
            rules: any rules; those in force by default.
            events: the journal, when it has been read already.
        """
        events = self.events() if events is None else events
        rules = rules_of(events) if rules is None else rules
        listing = reader.list_run(self.store, self.name)
        return plan(
            all_with_annotations(listing.manifests, events, rules),
            rules,
            annotations_of(events).pinned,
            aliased=self.aliased(listing.manifests, events),
            damaged=reader.find_damage(self.store, listing.manifests),
            cut=listing.incomplete,
            read=reader.being_read(self.store, listing.manifests),
        )

    def aliased(self, manifests: Sequence[Manifest], events: Sequence[Event]) -> Mapping[str, str]:
        """Return the ids that aliases protect, with the reasons; see ``protected_by_aliases``."""
        ids = [manifest.id for manifest in manifests]
        return protected_by_aliases(self.store, ids, annotations_of(events).promoting.values())

    def kept(self) -> Mapping[str, tuple[Claim, ...]]:
        """Return the ids of the checkpoints that are kept, with the claims and protections on each."""
        return self.plan().keep

    def latest(self) -> Checkpoint:
        """Return the newest checkpoint.

        Raises:
            NotFoundError: the run has no checkpoints.
        """
        return self.find(f"{self.name}@latest")

    def best(self, metric: str | None = None, *, mode: Mode | None = None) -> Checkpoint:
        """Return the best checkpoint by one metric; ties go to the earlier, NaN and infinities never win.

        Args:
            metric: the metric's name; by default that of the first rule that ranks.
            mode: the direction; by default the one that the run's rules give.

        Raises:
            NotFoundError: no checkpoint has a finite value of it.
            ConfigError: no mode is given, and no rule gives one.
        """
        if metric is None and mode is not None:
            raise ConfigError(f"mode={mode!r} of which metric? give best(METRIC, mode={mode!r})")
        return self.find(f"{self.name}@best" + (f":{metric}" if metric else "") + (f":{mode}" if mode else ""))

    def find(self, ref: str) -> Checkpoint:
        """Return the checkpoint that ``ref`` names; see ``peakpoint.repository.refs``."""
        return _checkpoint(self.store, with_annotations(self.find_manifest(ref), annotations_of(self.events()), {}))

    def find_manifest(self, ref: str) -> Manifest:
        """Return the manifest of the checkpoint that ``ref`` names.

        Raises:
            NotFoundError: there is no such checkpoint.
            ConfigError: ``ref`` has none of the forms of refs, or names another run.
        """
        parsed = refs.parse(ref)
        if parsed.run != self.name:
            raise ConfigError(f"{ref!r} names run {parsed.run!r}, and this is run {self.name!r}")
        listing = reader.list_run(self.store, self.name)
        damaged = damaged_checkpoints(self.store, self.name, listing)
        if isinstance(parsed, refs.ByName):
            _refuse_damaged(parsed.name, listing.manifests, damaged)
        elif damaged and not listing.manifests:
            raise damaged[0].error
        elif damaged:
            sentence = damage_sentence(self.store, damaged)
            warnings.warn(f"not considered for {ref}: {sentence}", PeakpointWarning, stacklevel=2)
        if not isinstance(parsed, refs.BestOf):
            return refs.resolve(parsed, listing.manifests, ())
        events = self.events()
        annotations = annotations_of(events)
        annotated = [with_annotations(manifest, annotations, {}) for manifest in listing.manifests]
        best = refs.resolve(parsed, annotated, rules_of(events) if parsed.mode is None else ())
        return next(manifest for manifest in listing.manifests if manifest.id == best.id)

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
        for name, value in metrics.items():
            if isinstance(value, bool):
                raise ConfigError(f"metric {name!r} is {value!r}, a bool; record a number")
            if name in ("epoch", "step"):
                raise ConfigError(
                    f"{name} is what a checkpoint was saved at, and cannot be recorded as a metric; give another name"
                )
        values = read_metrics(metrics)
        check_text("source", source)
        if not values:
            raise ConfigError("nothing to record: give at least one metric")
        if part is not None and part not in manifest.parts:
            raise no_part(part, manifest.parts, where=manifest.name)
        self._note(
            lambda now, by: Measured(
                at=now, checkpoint=manifest.id, step=manifest.step, metrics=values, part=part, source=source, by=by
            )
        )
        return self.find(f"{manifest.run}/{manifest.name}")

    def withdraw(self, ref: str, *metrics: str) -> Checkpoint:
        """Take back what was recorded of a checkpoint by mistake: all values of some metrics.

        What the training reported counts again. Rules see it at once, also those of a training that is running; the
        journal keeps both.

        Raises:
            NotFoundError: there is no such checkpoint, or nothing of that name was recorded of it.
            ConfigError: no metric is given.
        """
        manifest = self.find_manifest(ref)
        recorded = list(annotations_of(self.events()).metrics.get(manifest.id, {}))
        if not metrics:
            raise ConfigError("nothing to take back: give at least one metric")
        for name in metrics:
            if name not in recorded:
                raise NotFoundError(
                    f"no value of {name!r} was recorded of {manifest.name} later{did_you_mean(name, recorded)}; "
                    f"recorded: {', '.join(recorded) or 'nothing'}. What the training itself reported stays"
                )
        self._note(lambda now, by: Withdrawn(at=now, checkpoint=manifest.id, metrics=metrics, by=by))
        return self.find(f"{manifest.run}/{manifest.name}")

    def pin(self, ref: str, why: str) -> None:
        """Protect a checkpoint from the rules until it is unpinned.

        Raises:
            NotFoundError: there is no such checkpoint.
            ConflictError: a rule is removing it at this moment.
            ConfigError: no reason is given.
        """
        if not check_text("the reason of pin", why).strip():
            raise ConfigError("pin needs a reason, which says later why this checkpoint is kept")
        manifest = self.find_manifest(ref)
        self._note(lambda now, by: Pinned(at=now, checkpoint=manifest.id, why=why, by=by))
        if self.is_being_removed(manifest) or self.store.size(layout.manifest_key(self.name, manifest.name)) is None:
            raise ConflictError(
                f"{manifest.name} was being removed at this moment; peakpoint ls shows whether it still exists"
            )

    def is_being_removed(self, manifest: Manifest, *, held: bool = False) -> bool:
        """Return whether somebody may be removing a checkpoint, or parts of it, at this moment.

        Whoever removes one announces it first, in the journal, and then looks at what is protected: a caller who has
        protected it before the call either gets True, or is heeded. A removal that is over by now is not noticed: look
        after the call whether the checkpoint still exists.

        Args:
            manifest: of the checkpoint, as it is after it was protected.
            held: whether the caller holds the run: then a training that was killed in the middle of a removal is over.
        """
        return any(
            _may_be_removing(
                journals.read(self.store, self.name, {segment}, with_reports=False).events,
                manifest.id,
                manifest.parts.keys(),
            )
            for segment in journals.live_segments(self.store, self.name, held=held)
        )

    def unpin(self, ref: str) -> None:
        """Let rules remove a checkpoint again; nothing happens when it was not pinned.

        Raises:
            NotFoundError: there is no such checkpoint.
        """
        manifest = self.find_manifest(ref)
        self._note(lambda now, by: Unpinned(at=now, checkpoint=manifest.id, by=by))

    def _note(self, event: Callable[[datetime, str], Event]) -> None:
        """Append one event, durably, in a segment of its own."""
        journal = journals.Journal(self.store, self.name, utc_now)
        try:
            journal.append(event(journal.now(), present_user()))
            journal.append(Closed(at=journal.now(), why="noted"))
        finally:
            journal.close()

    def holder(self) -> str | None:
        """Return who is writing the run, in words; None when nobody is."""
        return self.store.holder(layout.writer_lock(self.name))


def read_run_record(store: Store, run: str) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
        NotFoundError: the run does not exist.
    """
    key = layout.run_record(run)
    data, where = store.get(key, max_size=SMALL), f"{store.location}/{key}"
    record = decode_record(RunRecord, data, where=where)
    if not is_name_of(store, run, record.run):
        raise CorruptError(f"{where} is that of the run {record.run}: its directory was renamed or copied")
    return decode_record(dict, data, where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What ``run.json`` has at least."""

    run: Name
    created_at: Time
    by: Mapping[str, str]
    rules: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
