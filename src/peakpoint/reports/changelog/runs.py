"""What was done in one run, from its journal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format import layout
from peakpoint.format.events import (
    STOPPED,
    Archived,
    Closed,
    Event,
    Measured,
    Opened,
    PartsDropped,
    Pinned,
    Removed,
    Restored,
    Saved,
    SaveFailed,
    Started,
    Undone,
    Unpinned,
)
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json
from peakpoint.reports.changelog.claims import Claims, Passed
from peakpoint.reports.changelog.entries import ChangelogEntry
from peakpoint.repository import reader
from peakpoint.repository.journal import JournalContents
from peakpoint.repository.run import Run
from peakpoint.rules import Moment, Rule, parse
from peakpoint.rules.history import RunReplay, smoothed_metrics, smoothing_windows

_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_IMPORT = "peakpoint import"
_ORDERLY = ("closed", "noted")  # why a segment ends, when that is nothing to tell of


def in_order(reading: JournalContents) -> list[tuple[str, Event]]:
    """The events of a journal in the order in which they happened, each with its segment.

    Those that hold a run follow one another, whatever their clocks say; what others have noted beside them is put in
    between by its time. Each segment keeps its order.
    """
    found: list[tuple[datetime, str, Event]] = []
    floor = _LONG_AGO
    for name, events in reading.by_segment():
        holds = any(isinstance(event, Opened | Started) for event in events)
        now = floor if holds else _LONG_AGO
        for event in events:
            now = max(now, aware(event.at))
            found.append((now, name, event))
        floor = now if holds else floor
    found.sort(key=lambda one: one[0])  # stable
    return [(name, event) for _, name, event in found]


@dataclass(slots=True)
class _Tale:
    """A run while it is told."""

    run: str
    spared: frozenset[int]  # removals that came to nothing, by the identity of the event
    derived: Mapping[str, Mapping[str, float]]
    begun: bool = False
    texts: tuple[str, ...] | None = None
    by: dict[str, Mapping[str, str]] = field(default_factory=dict)  # by segment
    names: dict[str, str] = field(default_factory=dict)
    trains: set[str] = field(default_factory=set)  # segments
    values: dict[str, dict[str, float]] = field(default_factory=dict)  # by checkpoint: reported and measured
    early: dict[str, dict[str, float]] = field(default_factory=dict)  # measured before the commit: clocks differ
    gone: dict[str, Moment | None] = field(default_factory=dict)  # moments of what was removed, to come back
    replay: RunReplay = field(default_factory=RunReplay)
    claims: Claims = field(default_factory=Claims)

    def ref(self, checkpoint: str) -> str:
        return f"{self.run}/{self.names.get(checkpoint, checkpoint)}"

    def entry(self, event: Event, kind: Any, checkpoint: str | None = None, **members: Any) -> ChangelogEntry:
        if checkpoint is not None:
            members["details"] = {"id": checkpoint, **members.get("details", {})}
            members["checkpoint"] = self.ref(checkpoint)
        return ChangelogEntry(at=event.at, kind=kind, run=self.run, **members)

    # --- one event after the other ------------------------------------------------------------------------------

    def tell(self, segment: str, event: Event) -> Iterator[ChangelogEntry]:
        by = _who(self.by.get(segment, {}))
        self.replay.take(event)
        match event:
            case Opened():
                yield from self._opened(segment, event)
            case Started():
                yield from self._started(segment, event, by)
            case Saved():
                yield from self._saved(event, by, imported=self.by.get(segment, {}).get("tool") == _IMPORT)
            case SaveFailed():
                self.names[event.checkpoint] = event.name
                details = {"reasons": list(event.reasons)}
                yield self.entry(event, "save failed", event.checkpoint, by=by, why=event.error, details=details)
            case Measured():
                yield from self._measured(event)
            case Closed():
                yield from self._closed(segment, event, by)
            case _:
                yield from self._kept_and_gone(event)

    def _opened(self, segment: str, event: Opened) -> Iterator[ChangelogEntry]:
        self.by[segment] = event.by
        if event.rules == self.texts:
            return
        before, self.texts = self.texts, event.rules
        self.claims.rules(_readable(event.rules))
        if before is not None:
            texts = (" ".join(before) or "none", " ".join(event.rules) or "none")
            yield self.entry(event, "rules changed", by=_who(event.by), before=texts[0], after=texts[1])

    def _started(self, segment: str, event: Started, by: str) -> Iterator[ChangelogEntry]:
        about = self.by.get(segment, {})
        if about.get("tool") == _IMPORT:
            return
        self.trains.add(segment)
        again = {"beside": "what the run had already"} if self.begun and event.checkpoint is None else {}
        self.begun = True
        details = {"report": event.report, "rules": list(self.texts or ()), "by": dict(about), **again}
        if event.checkpoint is None:
            yield self.entry(event, "begun", by=by, details=details)
        else:
            why = "" if event.requested is None else f"asked for {event.requested}"
            yield self.entry(event, "continued", event.checkpoint, by=by, why=why, details=details)

    def _saved(self, event: Saved, by: str, *, imported: bool) -> Iterator[ChangelogEntry]:
        id_ = event.checkpoint
        self.names[id_] = event.name
        moment = self.replay.moment(id_)
        reported = metrics_to_json(moment.metrics)
        self.values[id_] = {**moment.metrics, **self.early.get(id_, {})}
        moment = replace(moment, metrics={**self.values[id_], **self.derived.get(id_, {})})
        details = {
            "step": moment.step,
            "epoch": moment.epoch,
            "metrics": reported,
            "reasons": list(event.reasons),
            "size_bytes": event.size_bytes,
        }
        kind = "imported" if imported else "saved"
        yield self.entry(event, kind, id_, by=by, why="; ".join(event.reasons), details=details)
        if id_ in self.gone:  # its removal has an earlier time: clocks differ
            self.gone[id_] = moment
        else:
            yield from self._passed(event, by, self.claims.add(moment))

    def _passed(self, event: Event, by: str, passed: Iterable[Passed]) -> Iterator[ChangelogEntry]:
        for one in passed:
            after = None if one.taker is None else f"{self.ref(one.taker)}: {one.reason}"
            details = {"rule": one.rule, "ranks": one.ranks, "taker": one.taker and self.ref(one.taker)}
            yield self.entry(
                event,
                "claim lost",
                one.lost,
                by=by,
                why=f"{one.rule} claims another" if one.taker else f"{one.rule} claims it no more",
                before=f"{self.ref(one.lost)}: {one.was}",
                after=after,
                details=details,
            )

    def _measured(self, event: Measured) -> Iterator[ChangelogEntry]:
        id_ = event.checkpoint
        known = self.values.get(id_)
        before = {} if known is None else {name: known[name] for name in event.metrics if name in known}
        details = {"metrics": metrics_to_json(event.metrics), "part": event.part, "step": event.step}
        yield self.entry(
            event,
            "measured",
            id_,
            by=event.by,
            why=event.source,
            before=_values(before) or None,
            after=_values(event.metrics),
            details=details,
        )
        (self.early.setdefault(id_, {}) if known is None else known).update(event.metrics)
        if id_ in self.claims:
            yield from self._passed(event, event.by, self.claims.measure(id_, event.metrics))
        elif (old := self.gone.get(id_)) is not None:
            self.gone[id_] = replace(old, metrics={**old.metrics, **event.metrics})

    def _closed(self, segment: str, event: Closed, by: str) -> Iterator[ChangelogEntry]:
        if event.why.startswith(STOPPED):
            yield self.entry(event, "stopped early", by=by, why=event.why.removeprefix(STOPPED))
        elif segment in self.trains or not (event.why in _ORDERLY or event.why.startswith("peakpoint ")):
            yield self.entry(event, "ended", by=by, why=event.why)

    def _kept_and_gone(self, event: Event) -> Iterator[ChangelogEntry]:
        match event:
            case Removed():
                yield from self._removed(event)
            case PartsDropped():
                details = {"parts": list(event.parts), "until": _time(event.until)}
                yield self.entry(
                    event, "parts dropped", event.checkpoint, by=event.by, why=event.reason, details=details
                )
            case Undone():
                yield self.entry(event, "undone", event.checkpoint, by=event.by, details={"parts": list(event.parts)})
                moment = None if event.parts else self.gone.pop(event.checkpoint, None)
                if moment is not None:
                    yield from self._passed(event, event.by, self.claims.add(moment))
            case Archived():
                packed = {"packed_bytes": event.packed_bytes}
                yield self.entry(event, "archived", event.checkpoint, by=event.by, details=packed)
            case Restored():
                yield self.entry(event, "restored", event.checkpoint, by=event.by)
            case Pinned():
                yield self.entry(event, "pinned", event.checkpoint, by=event.by, why=event.why)
            case Unpinned():
                yield self.entry(event, "unpinned", event.checkpoint, by=event.by)
            case _:
                pass  # of Changing and Promoting others tell what came; the record of the alias tells of Promoted

    def _removed(self, event: Removed) -> Iterator[ChangelogEntry]:
        self.names.setdefault(event.checkpoint, event.name)
        spared = id(event) in self.spared
        details: dict[str, Any] = {"step": event.step, "epoch": event.epoch, "until": _time(event.until)}
        details |= {"came_to_nothing": True} if spared else {}
        yield self.entry(event, "removed", event.checkpoint, by=event.by, why=event.reason, details=details)
        if not spared:
            self.gone[event.checkpoint] = self.claims.moment(event.checkpoint)
            self.claims.remove(event.checkpoint)


def aware(moment: datetime) -> datetime:
    """A time; one without zone, which Peakpoint never writes, is taken for UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def entries(run: Run, reading: JournalContents) -> Iterator[ChangelogEntry]:
    """Everything that was done in a run, in the order in which it happened; damage first."""
    events = in_order(reading)
    for text in reading.damage:
        yield ChangelogEntry(at=None, kind="damage", run=run.name, why=text)
    names = {event.checkpoint: event.name for _, event in events if isinstance(event, Saved)}
    tale = _Tale(run.name, _spared(run, events), _derived(events), names=names)
    for segment, event in events:
        yield from tale.tell(segment, event)
    yield from _unrecorded(run, tale)


def _derived(events: Sequence[tuple[str, Event]]) -> Mapping[str, Mapping[str, float]]:
    """The smoothed metrics of each commit, for every rule that ever was in force."""
    plain = [event for _, event in events]
    texts = {text for event in plain if isinstance(event, Opened) for text in event.rules}
    reports = {event.checkpoint: event.report for event in plain if isinstance(event, Saved)}
    return smoothed_metrics(reports, plain, smoothing_windows(_readable(sorted(texts))))


def _readable(texts: Iterable[str]) -> list[Rule]:
    """Rules; those that this release cannot read claim nothing here."""
    found = []
    for text in texts:
        try:
            found.append(parse(text))
        except ConfigError:
            continue
    return found


def _spared(run: Run, events: Sequence[tuple[str, Event]]) -> frozenset[int]:
    """Removals that came to nothing: said again later, or the last word on a checkpoint that exists."""
    last: dict[str, Removed] = {}
    found = set()
    for _, event in events:
        match event:
            case Removed():
                if event.checkpoint in last:
                    found.add(id(last[event.checkpoint]))
                last[event.checkpoint] = event
            case Undone(parts=()):
                last.pop(event.checkpoint, None)
            case _:
                pass
    there = {child.removesuffix("/") for child in run.store.children(layout.checkpoints_prefix(run.name))}
    for checkpoint, removed in last.items():
        if removed.name in there and _id(run, removed.name) == checkpoint:
            found.add(id(removed))
    return frozenset(found)


def _id(run: Run, name: str) -> str | None:
    """The id of the checkpoint in a directory; None when there is none, or none that can be read."""
    standing = reader.inspect(run.store, run.name, name)
    return standing.manifest.id if isinstance(standing, reader.FoundCheckpoint) else None


def _unrecorded(run: Run, tale: _Tale) -> Iterator[ChangelogEntry]:
    """Checkpoints that exist and were never recorded: their process was killed in between."""
    told = {tale.names[checkpoint] for checkpoint in tale.values.keys() - tale.gone.keys()}
    for child in run.store.children(layout.checkpoints_prefix(run.name)):
        name = child.removesuffix("/")
        if name == child or name in told:
            continue
        match reader.inspect(run.store, run.name, name):
            case reader.FoundCheckpoint(manifest=manifest) if manifest.id not in tale.values:
                yield _of_manifest(manifest)
            case reader.Damaged(error=error):
                yield ChangelogEntry(
                    at=None, kind="damage", run=run.name, checkpoint=f"{run.name}/{name}", why=str(error)
                )
            case _:
                pass


def _of_manifest(manifest: Manifest) -> ChangelogEntry:
    return ChangelogEntry(
        at=manifest.created_at,
        kind="saved",
        run=manifest.run,
        checkpoint=f"{manifest.run}/{manifest.name}",
        by=_who(manifest.written_by),
        why="; ".join(manifest.reasons),
        details={
            "id": manifest.id,
            "step": manifest.step,
            "epoch": manifest.epoch,
            "metrics": metrics_to_json(manifest.metrics),
            "reasons": list(manifest.reasons),
            "size_bytes": manifest.size_bytes,
            "recorded": False,
        },
    )


def _who(by: Mapping[str, str]) -> str:
    if "user" in by:
        return by["user"]
    process = f"process {by['pid']}" if "pid" in by else "a process"
    tool = f"{by['tool']}, " if "tool" in by else ""
    return f"{tool}{process} on {by['host']}" if "host" in by else ""


def _values(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
