"""The changelog of one run, from its journal."""

import contextlib
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
    Withdrawn,
)
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json
from peakpoint.reports.changelog.claims import ClaimTracker, LostClaim, changed_metrics
from peakpoint.reports.changelog.entries import ChangelogEntry, Kind
from peakpoint.repository import reader
from peakpoint.repository.journal import JournalContents
from peakpoint.repository.run import Run
from peakpoint.rules import Moment, Rule, parse
from peakpoint.rules.history import RunReplay, smoothed_metrics, smoothing_windows

_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_IMPORT = "peakpoint import"
_ORDERLY = ("closed", "noted")  # the ends of segments that need no entry


def in_order(journal: JournalContents) -> list[tuple[str, Event]]:
    """Return the events of a journal in the order in which they happened, each with its segment.

    The segments of processes that held the run follow one another, whatever their clocks say; what others noted beside
    them is put in between by its time. Each segment keeps its order.
    """
    timed: list[tuple[datetime, str, Event]] = []
    floor = _LONG_AGO
    for segment, events in journal.by_segment():
        holds_run = any(isinstance(event, Opened | Started) for event in events)
        now = floor if holds_run else _LONG_AGO
        for event in events:
            now = max(now, aware(event.at))
            timed.append((now, segment, event))
        floor = now if holds_run else floor
    timed.sort(key=lambda timed_event: timed_event[0])  # stable
    return [(segment, event) for _, segment, event in timed]


@dataclass(slots=True)
class _RunAccount:
    """Turns the events of a run into entries, one after the other."""

    run: str
    undone_removals: frozenset[int]  # removals that came to nothing, by the identity of the event
    smoothed: Mapping[str, Mapping[str, float]]
    names: dict[str, str]  # by checkpoint
    has_begun: bool = False
    rules: tuple[str, ...] | None = None
    writers: dict[str, Mapping[str, str]] = field(default_factory=dict)  # by segment
    training_segments: set[str] = field(default_factory=set)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # by checkpoint: reported and measured
    early_metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # before the commit: clocks differ
    removed: dict[str, Moment | None] = field(default_factory=dict)  # to come back
    replay: RunReplay = field(default_factory=RunReplay)
    claims: ClaimTracker = field(default_factory=ClaimTracker)

    def ref(self, checkpoint: str) -> str:
        return f"{self.run}/{self.names.get(checkpoint, checkpoint)}"

    def entry(self, event: Event, kind: Kind, checkpoint: str | None = None, **members: Any) -> ChangelogEntry:
        if checkpoint is not None:
            members["details"] = {"id": checkpoint, **members.get("details", {})}
            members["checkpoint"] = self.ref(checkpoint)
        return ChangelogEntry(at=event.at, kind=kind, run=self.run, **members)

    # --- one event after the other ------------------------------------------------------------------------------

    def take(self, segment: str, event: Event) -> Iterator[ChangelogEntry]:
        self.replay.take(event)
        match event:
            case Opened():
                yield from self._opened(segment, event)
            case Started():
                yield from self._started(segment, event)
            case Saved():
                yield from self._saved(segment, event)
            case SaveFailed():
                self.names[event.checkpoint] = event.name
                by, details = self._writer(segment), {"reasons": list(event.reasons)}
                yield self.entry(event, "save failed", event.checkpoint, by=by, why=event.error, details=details)
            case Measured():
                yield from self._measured(event)
            case Withdrawn():
                yield from self._withdrawn(event)
            case Closed():
                yield from self._closed(segment, event)
            case Removed():
                yield self._removed(event)
            case Undone():
                yield from self._undone(event)
            case _:
                yield from self._changed(event)

    def _writer(self, segment: str) -> str:
        return _who(self.writers.get(segment, {}))

    def _is_import(self, segment: str) -> bool:
        return self.writers.get(segment, {}).get("tool") == _IMPORT

    def _opened(self, segment: str, event: Opened) -> Iterator[ChangelogEntry]:
        self.writers[segment] = event.by
        if event.rules == self.rules:
            return
        old_rules, self.rules = self.rules, event.rules
        self.claims.set_rules(_readable_rules(event.rules))
        if old_rules is not None:
            before_text, after_text = " ".join(old_rules) or "none", " ".join(event.rules) or "none"
            yield self.entry(event, "rules changed", by=_who(event.by), before=before_text, after=after_text)

    def _started(self, segment: str, event: Started) -> Iterator[ChangelogEntry]:
        if self._is_import(segment):
            return
        self.training_segments.add(segment)
        writer = dict(self.writers.get(segment, {}))
        details: dict[str, Any] = {"report": event.report, "rules": list(self.rules or ()), "by": writer}
        if self.has_begun and event.checkpoint is None:
            details["beside"] = "what the run had already"
        self.has_begun = True
        if event.checkpoint is None:
            yield self.entry(event, "begun", by=_who(writer), details=details)
        else:
            why = "" if event.requested is None else f"asked for {event.requested}"
            yield self.entry(event, "continued", event.checkpoint, by=_who(writer), why=why, details=details)

    def _saved(self, segment: str, event: Saved) -> Iterator[ChangelogEntry]:
        checkpoint, by = event.checkpoint, self._writer(segment)
        self.names[checkpoint] = event.name
        moment = self.replay.moment(checkpoint)
        details = _saved_details(moment, event.reasons)
        kind: Kind = "imported" if self._is_import(segment) else "saved"
        yield self.entry(event, kind, checkpoint, by=by, why="; ".join(event.reasons), details=details)
        self.metrics[checkpoint] = {**moment.metrics, **self.early_metrics.get(checkpoint, {})}
        moment = replace(moment, metrics={**self.metrics[checkpoint], **self.smoothed.get(checkpoint, {})})
        if checkpoint in self.removed:  # its removal has an earlier time: clocks differ
            self.removed[checkpoint] = moment
        else:
            yield from self._lost_claims(event, by, self.claims.add(moment))

    def _lost_claims(self, event: Event, by: str, lost_claims: Iterable[LostClaim]) -> Iterator[ChangelogEntry]:
        for lost_claim in lost_claims:
            successor = lost_claim.successor and self.ref(lost_claim.successor)
            yield self.entry(
                event,
                "claim lost",
                lost_claim.checkpoint,
                by=by,
                why=f"{lost_claim.rule} claims another" if successor else f"{lost_claim.rule} no longer claims it",
                before=f"{self.ref(lost_claim.checkpoint)}: {lost_claim.reason}",
                after=successor and f"{successor}: {lost_claim.successor_reason}",
                details={"rule": lost_claim.rule, "ranks": lost_claim.ranks, "taker": successor},
            )

    def _measured(self, event: Measured) -> Iterator[ChangelogEntry]:
        checkpoint = event.checkpoint
        metrics = self.metrics.get(checkpoint)
        old_values = {name: metrics[name] for name in event.metrics if name in metrics} if metrics else {}
        yield self.entry(
            event,
            "measured",
            checkpoint,
            by=event.by,
            why=event.source,
            before=_values(old_values) or None,
            after=_values(event.metrics),
            details={"metrics": metrics_to_json(event.metrics), "part": event.part, "step": event.step},
        )
        (self.early_metrics.setdefault(checkpoint, {}) if metrics is None else metrics).update(event.metrics)
        yield from self._changed_metrics(event, event.metrics)

    def _withdrawn(self, event: Withdrawn) -> Iterator[ChangelogEntry]:
        checkpoint = event.checkpoint
        metrics = self.metrics.get(checkpoint)
        reported = {} if metrics is None else self.replay.moment(checkpoint).metrics
        changes = {name: reported.get(name) for name in event.metrics}
        current = self.early_metrics.get(checkpoint, {}) if metrics is None else metrics
        old_values = {name: current[name] for name in event.metrics if name in current}
        details = {"metrics": list(event.metrics)}
        yield self.entry(
            event, "withdrawn", checkpoint, by=event.by, before=_values(old_values) or None, details=details
        )
        (self.early_metrics if metrics is None else self.metrics)[checkpoint] = changed_metrics(current, changes)
        yield from self._changed_metrics(event, changes)

    def _changed_metrics(
        self, event: Measured | Withdrawn, metrics: Mapping[str, float | None]
    ) -> Iterator[ChangelogEntry]:
        checkpoint = event.checkpoint
        removed = self.removed.get(checkpoint)
        if self.claims.moment(checkpoint) is not None:
            yield from self._lost_claims(event, event.by, self.claims.measure(checkpoint, metrics))
        elif removed is not None:
            self.removed[checkpoint] = replace(removed, metrics=changed_metrics(removed.metrics, metrics))

    def _closed(self, segment: str, event: Closed) -> Iterator[ChangelogEntry]:
        by = self._writer(segment)
        if event.why.startswith(STOPPED):
            yield self.entry(event, "stopped early", by=by, why=event.why.removeprefix(STOPPED))
        elif segment in self.training_segments or not (event.why in _ORDERLY or event.why.startswith("peakpoint ")):
            yield self.entry(event, "ended", by=by, why=event.why)

    def _removed(self, event: Removed) -> ChangelogEntry:
        self.names.setdefault(event.checkpoint, event.name)
        details: dict[str, Any] = {"step": event.step, "epoch": event.epoch, "until": _time(event.until)}
        if id(event) in self.undone_removals:
            details["came_to_nothing"] = True
        else:
            self.removed[event.checkpoint] = self.claims.moment(event.checkpoint)
            self.claims.remove(event.checkpoint)
        return self.entry(event, "removed", event.checkpoint, by=event.by, why=event.reason, details=details)

    def _undone(self, event: Undone) -> Iterator[ChangelogEntry]:
        yield self.entry(event, "undone", event.checkpoint, by=event.by, details={"parts": list(event.parts)})
        moment = None if event.parts else self.removed.pop(event.checkpoint, None)
        if moment is not None:
            yield from self._lost_claims(event, event.by, self.claims.add(moment))

    def _changed(self, event: Event) -> Iterator[ChangelogEntry]:
        match event:
            case PartsDropped(by=by, reason=why):
                details = {"parts": list(event.parts), "until": _time(event.until)}
                yield self.entry(event, "parts dropped", event.checkpoint, by=by, why=why, details=details)
            case Archived(by=by, packed_bytes=packed_bytes):
                yield self.entry(event, "archived", event.checkpoint, by=by, details={"packed_bytes": packed_bytes})
            case Restored(by=by):
                yield self.entry(event, "restored", event.checkpoint, by=by)
            case Pinned(by=by, why=why):
                yield self.entry(event, "pinned", event.checkpoint, by=by, why=why)
            case Unpinned(by=by):
                yield self.entry(event, "unpinned", event.checkpoint, by=by)
            case _:
                pass  # other events tell what came of Changing and Promoting, the record of the alias of Promoted


def aware(moment: datetime) -> datetime:
    """Return a time with its zone; one without, which Peakpoint never writes, is taken for UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def entries(run: Run, journal: JournalContents) -> Iterator[ChangelogEntry]:
    """Yield everything that was done in a run, in the order in which it happened; damage first."""
    events = in_order(journal)
    for text in journal.damage:
        yield ChangelogEntry(at=None, kind="damage", run=run.name, why=text)
    names = {event.checkpoint: event.name for _, event in events if isinstance(event, Saved)}
    account = _RunAccount(run.name, _undone_removals(run, events), _smoothed(events), names)
    for segment, event in events:
        yield from account.take(segment, event)
    yield from _unrecorded(run, account)


def _smoothed(events: Sequence[tuple[str, Event]]) -> Mapping[str, Mapping[str, float]]:
    """The smoothed metrics of each commit, for every rule that ever was in force."""
    plain = [event for _, event in events]
    texts = {text for event in plain if isinstance(event, Opened) for text in event.rules}
    reports = {event.checkpoint: event.report for event in plain if isinstance(event, Saved)}
    return smoothed_metrics(reports, plain, smoothing_windows(_readable_rules(sorted(texts))))


def _readable_rules(texts: Iterable[str]) -> list[Rule]:
    """Rules of a later release, which cannot be read, claim nothing here."""
    rules = []
    for text in texts:
        with contextlib.suppress(ConfigError):
            rules.append(parse(text))
    return rules


def _undone_removals(run: Run, events: Sequence[tuple[str, Event]]) -> frozenset[int]:
    """Removals that came to nothing: repeated later, or the last of a checkpoint that exists."""
    removals: dict[str, Removed] = {}
    undone = set()
    for _, event in events:
        match event:
            case Removed():
                if event.checkpoint in removals:
                    undone.add(id(removals[event.checkpoint]))
                removals[event.checkpoint] = event
            case Undone(parts=()):
                removals.pop(event.checkpoint, None)
            case _:
                pass
    names = _directories(run)
    for checkpoint, removal in removals.items():
        if removal.name in names:
            directory = reader.inspect(run.store, run.name, removal.name)
            if isinstance(directory, reader.FoundCheckpoint) and directory.manifest.id == checkpoint:
                undone.add(id(removal))
    return frozenset(undone)


def _directories(run: Run) -> list[str]:
    """The names of the directories of checkpoints."""
    children = run.store.children(layout.checkpoints_prefix(run.name))
    return [child.removesuffix("/") for child in children if child.endswith("/")]


def _unrecorded(run: Run, account: _RunAccount) -> Iterator[ChangelogEntry]:
    """Checkpoints that exist and were never recorded: their process was killed in between."""
    recorded = {account.names[checkpoint] for checkpoint in account.metrics.keys() - account.removed.keys()}
    for name in _directories(run):
        if name in recorded:
            continue
        match reader.inspect(run.store, run.name, name):
            case reader.FoundCheckpoint(manifest=manifest) if manifest.id not in account.metrics:
                yield ChangelogEntry(
                    at=manifest.created_at,
                    kind="saved",
                    run=run.name,
                    checkpoint=f"{run.name}/{manifest.name}",
                    by=_who(manifest.written_by),
                    why="; ".join(manifest.reasons),
                    details={"id": manifest.id, **_saved_details(manifest, manifest.reasons), "recorded": False},
                )
            case reader.Damaged(error=error):
                ref = f"{run.name}/{name}"
                yield ChangelogEntry(at=None, kind="damage", run=run.name, checkpoint=ref, why=str(error))
            case _:
                pass


def _saved_details(checkpoint: Manifest | Moment, reasons: Iterable[str]) -> dict[str, Any]:
    return {
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "metrics": metrics_to_json(checkpoint.metrics),
        "reasons": list(reasons),
        "size_bytes": checkpoint.size_bytes,
    }


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
