"""The rows of the catalogue: what is made of files, and what is made of a row again."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Table, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.database import DamagedError, read_json
from peakpoint.catalogue.schema import Columns
from peakpoint.errors import ConfigError
from peakpoint.format.events import Event, Opened
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.metrics import metrics_from_json, metrics_to_json
from peakpoint.format.settings import SETTING, Settings, setting_text
from peakpoint.repository import reader
from peakpoint.repository.annotations import Annotations
from peakpoint.rules import Mode, parse, ranking_metrics
from peakpoint.rules import history as histories
from peakpoint.rules.peaks import Peak, extend_peaks

_MANY = 500  # parameters of one statement; PostgreSQL takes 65,535, some builds of SQLite 32,766


def portions(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Cut values into parts that one statement takes."""
    for begin in range(0, len(values), _MANY):
        yield values[begin : begin + _MANY]


def _plain_text(text: str | None) -> str | None:
    """A text that PostgreSQL takes: it has no NUL."""
    return None if text is None else text.replace("\x00", "\ufffd")


# --- runs ---------------------------------------------------------------------------------------------------------


class RunReports(NamedTuple):
    """What the row of a run says of its journal.

    Attributes:
        rules: those in force, as texts.
        peaks: best against last of the metrics that the rules watch.
        missing: how many values were not finite of metrics without a peak.
        reports: how many reports count.
    """

    rules: Sequence[str] = ()
    peaks: Sequence[Peak] = ()
    missing: Mapping[str, int] = {}
    reports: int = 0

    @classmethod
    def of_row(cls, row: Any) -> "RunReports":
        """Read it from the row of a run.

        Raises:
            DamagedError: the row holds something else.
        """
        rules, state = read_json(row.rules), read_json(row.peaks)
        try:
            peaks = tuple(Peak(**peak) for peak in state["peaks"])
            reports = cls(tuple(rules), peaks, dict(state["missing"]), int(row.reports))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"the rules or the peaks of a run cannot be read: {error}") from error
        if not isinstance(rules, list):
            raise DamagedError(f"the rules of a run are no list: {str(rules)[:80]}")
        return reports

    def after(self, events: Sequence[Event]) -> "RunReports":
        """The same after further lines of the journal."""
        opening = histories.newest_event(events, Opened)
        rules = self.rules if opening is None else tuple(opening.rules)
        history = histories.history(events)
        peaks, missing = extend_peaks(self.peaks, self.missing, history, _watched_by(rules))
        return RunReports(rules, peaks, missing, self.reports + len(history))

    def columns(self, kept: Iterable[bool]) -> dict[str, Any]:
        """The columns that hold it.

        Args:
            kept: for each peak, whether a checkpoint of its best exists.
        """
        state = {
            "peaks": [asdict(peak) for peak in self.peaks],
            "missing": self.missing,
            "kept": {peak.metric: exists for peak, exists in zip(self.peaks, kept, strict=True)},
        }
        return {"rules": json.dumps(self.rules), "peaks": json.dumps(state), "reports": self.reports}


def _watched_by(texts: Iterable[str]) -> list[tuple[str, Mode]]:
    """The metrics that rules rank by; a rule of a newer release is passed over."""
    rules = []
    for text in texts:
        try:
            rules.append(parse(text))
        except ConfigError:
            continue
    return list(ranking_metrics(rules))


def setting_rows(run: int, settings: Settings) -> list[dict[str, Any]]:
    """The rows of the settings and the tags of a run; what is None is missing."""
    entries = [(SETTING + name, 0, value) for name, value in settings.flat().items() if value is not None]
    entries += [("tag", number, tag) for number, tag in enumerate(settings.tags)]
    return [
        {
            "run": run,
            "name": _plain_text(name),
            "number": number,
            "text": _plain_text(setting_text(value)),
            "value": float(value) if isinstance(value, int | float) else None,
        }
        for name, number, value in entries
    ]


# --- notes --------------------------------------------------------------------------------------------------------


def note_rows(run: int, notes: Annotations, ids: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of what is noted of some checkpoints of a run."""
    return [
        {
            "run": run,
            "checkpoint": identity,
            "metrics": json.dumps(metrics_to_json(notes.metrics.get(identity, {}))),
            "pinned": _plain_text(notes.pinned.get(identity)),
        }
        for identity in ids
    ]


def stored_notes(connection: Connection, run: int, ids: Collection[str]) -> Annotations:
    """What the catalogue has noted of some checkpoints of a run, by their ids."""
    table = schema.notes.c
    statement = select(table.checkpoint, table.metrics, table.pinned).where(table.run == run)
    if len(ids) <= _MANY:
        statement = statement.where(table.checkpoint.in_(ids))
    notes = Annotations()
    for identity, metrics, pinned in connection.execute(statement).all():
        notes.metrics[identity] = metrics_from_json(read_json(metrics))
        if pinned is not None:
            notes.pinned[identity] = pinned
    return notes


# --- checkpoints --------------------------------------------------------------------------------------------------


class CheckpointEntry(NamedTuple):
    """A checkpoint on its way into the catalogue.

    Attributes:
        key: of its row.
        run: the key of its run.
        checkpoint: as its directory tells it.
        metrics: all of them.
        pinned: whether it is pinned.
    """

    key: int
    run: int
    checkpoint: reader.FoundCheckpoint
    metrics: dict[str, float]
    pinned: bool

    @classmethod
    def noted(cls, key: int, run: int, checkpoint: reader.FoundCheckpoint, notes: Annotations) -> "CheckpointEntry":
        """An entry with what is noted of the checkpoint."""
        manifest = checkpoint.manifest
        metrics = {**manifest.metrics, **notes.metrics.get(manifest.id, {})}
        return cls(key, run, checkpoint, metrics, manifest.id in notes.pinned)

    def row(self) -> dict[str, Any]:
        """What selections look at, without metrics."""
        manifest = self.checkpoint.manifest
        return {
            "key": self.key,
            "run": self.run,
            "sequence": manifest.sequence,
            "epoch": manifest.epoch,
            "step": manifest.step,
            "size": manifest.size_bytes,
            "created": manifest.created_at.timestamp(),
            "pinned": self.pinned,
            "archived": self.checkpoint.archived,
            "whole": not self.checkpoint.incomplete,
        }

    def detail(self) -> dict[str, Any]:
        """What a ``Checkpoint`` needs and no selection asks for."""
        manifest = self.checkpoint.manifest
        record = {
            "metrics": metrics_to_json(self.metrics),
            "reasons": manifest.reasons,
            "parts": manifest.parts,
            "forks": manifest.forks,
            "created_at": manifest.created_at,
        }
        text = msgspec.json.encode(record).decode()
        return {"checkpoint": self.key, "id": manifest.id, "name": manifest.name, "record": text}

    def reasons(self) -> list[dict[str, Any]]:
        """Why it was saved."""
        return [
            {"checkpoint": self.key, "number": number, "reason": _plain_text(reason)}
            for number, reason in enumerate(self.checkpoint.manifest.reasons)
        ]


def checkpoint_rows(columns: Columns, entries: Sequence[CheckpointEntry]) -> list[tuple[Table, list[dict[str, Any]]]]:
    """The rows of some checkpoints, by table."""
    places = {name: f"m{columns.keys[name]}" for entry in entries for name in entry.metrics}
    empty = dict.fromkeys(place for place in places.values() if place in columns.table.columns)
    narrow: list[dict[str, Any]] = []
    rarities: list[dict[str, Any]] = []
    for entry in entries:
        row: dict[str, Any] = {**empty, **entry.row()}
        for name, value in entry.metrics.items():
            if value != value:  # noqa: PLR0124 - NaN
                continue
            if places[name] in empty:
                row[places[name]] = value
            else:
                rarities.append({"checkpoint": entry.key, "metric": columns.keys[name], "value": value})
        narrow.append(row)
    details = [entry.detail() for entry in entries]
    reasons = [reason for entry in entries for reason in entry.reasons()]
    return [
        (columns.table, narrow),
        (schema.rarities, rarities),
        (schema.details, details),
        (schema.reasons, reasons),
    ]


def checkpoint_of(row: Any, path: Path | None) -> Checkpoint:
    """Make a checkpoint of what the catalogue holds."""
    record = read_json(row.record)
    return Checkpoint(
        run=row.run,
        name=row.name,
        id=row.id,
        sequence=row.sequence,
        step=row.step,
        epoch=row.epoch,
        metrics=metrics_from_json(record["metrics"]),
        reasons=tuple(record["reasons"]),
        parts={part: tuple(files) for part, files in record["parts"].items()},
        size_bytes=row.size,
        path=path,
        created_at=datetime.fromisoformat(record["created_at"]),
        forks=tuple((begin, end) for begin, end in record["forks"]),
    )
