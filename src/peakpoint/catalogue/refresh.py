"""Bringing one run up to date in the catalogue.

Its files are read first (see ``catalogue.changes``), without holding anything up; then one short transaction writes
what is new, unless somebody else has changed the run meanwhile: then it is read again from there. A row keeps its key
as long as its checkpoint exists, and no key is used twice.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, Table, delete, func, insert, select, update

from peakpoint.catalogue import schema
from peakpoint.catalogue.changes import NOTES, ReadPosition, RunChanges, is_current, read
from peakpoint.catalogue.database import DamagedError, read_json
from peakpoint.catalogue.schema import Columns
from peakpoint.errors import ConfigError
from peakpoint.format.events import Event, Opened
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_from_json, metrics_to_json
from peakpoint.repository import reader
from peakpoint.repository.annotations import Annotations
from peakpoint.rules import Mode, parse, ranking_metrics
from peakpoint.rules import history as histories
from peakpoint.rules.peaks import Peak, extend_peaks
from peakpoint.store import Store

Rows = dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class CachedRun:
    """What a process remembers of a run that it has refreshed.

    Attributes:
        text: how far the run is read, as the catalogue has it; None for a run that it does not have.
        known: the same.
        rows: its checkpoints in the catalogue: name to key and id.
        columns: of the catalogue that was born as ``born``.
        noted: whether anything may be noted of its checkpoints.
    """

    text: str | None
    known: ReadPosition | None
    rows: Rows
    columns: Columns | None = None
    born: int = 0
    noted: bool = True


def decoded(text: str) -> ReadPosition:
    """How far a run is read, from the column of the catalogue."""
    try:
        return msgspec.json.decode(text, type=_Read).known
    except (msgspec.DecodeError, UnicodeError) as error:
        raise DamagedError(f"it does not say how far a run is read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Read:
    known: ReadPosition
    number: int  # another one with every change, so that the same text means the same rows


def known_runs(connection: Connection) -> dict[str, ReadPosition]:
    """How far every run is read."""
    rows = connection.execute(select(schema.runs.c.name, schema.runs.c.read)).all()
    return {name: decoded(text) for name, text in rows}


def remove_run(engine: Engine, name: str) -> None:
    """Forget a run whose directory is gone."""
    with engine.begin() as connection:
        lock(connection)
        connection.execute(update(schema.meta).values(tick=schema.meta.c.tick + 1))
        connection.execute(delete(schema.runs).where(schema.runs.c.name == name))


def refresh_run(
    engines: tuple[Engine, Engine], store: Store, run: str, before: CachedRun | None = None
) -> tuple[int, CachedRun]:
    """Bring one run up to date.

    Args:
        engines: one that writes, and one that reads.
        store: where the files are.
        run: which.
        before: what was returned the last time.

    Returns:
        The catalogue's tick after it, -1 when that was not asked for, and what to remember.
    """
    writing, reading = engines
    tick = -1  # not known
    while True:
        if before is None:  # what is remembered needs no question; whether it still holds is seen when it is written
            with reading.connect() as connection:
                tick, before = _recalled(connection, run)
        if before.known is not None and is_current(store, run, before.known):
            return tick, before
        news = read(store, run, before.known, before.rows)
        if news.known == before.known and news.is_empty:
            return tick, before
        with writing.begin() as connection:
            lock(connection)
            row = connection.execute(_state(run)).one()
            if row.read == before.text:
                return _Update(connection, run, row, news, before).carry_out()
        before = None  # somebody else was here; what was read is read again


def _recalled(connection: Connection, run: str) -> tuple[int, CachedRun]:
    """The catalogue's tick, and what it has of a run."""
    row = connection.execute(_state(run)).one()
    if row.read is None:
        return row.tick, CachedRun(None, None, {})
    noted = connection.execute(select(schema.noted.c.run).where(schema.noted.c.run == row.key).limit(1)).first()
    return row.tick, CachedRun(row.read, decoded(row.read), _rows(connection, row.key), noted=noted is not None)


def _state(run: str) -> Any:
    """The catalogue's own state, and what it has of a run."""
    table = schema.runs.c
    metrics = select(func.count()).select_from(schema.metrics).scalar_subquery().label("metrics")
    totals = (table.checkpoints, table.size, table.newest)
    own = (schema.meta.c.tick, schema.meta.c.free, schema.meta.c.born)
    columns = (*own, table.key, table.read, table.rules, table.peaks, table.reports, *totals)
    return select(*columns, metrics).select_from(schema.meta.outerjoin(schema.runs, table.name == run))


def _rows(connection: Connection, run: int) -> Rows:
    a, b = schema.checkpoints.c, schema.details.c
    joined = select(b.name, a.key, b.id).join_from(schema.checkpoints, schema.details, b.checkpoint == a.key)
    return {name: (key, identity) for name, key, identity in connection.execute(joined.where(a.run == run)).all()}


def lock(connection: Connection) -> None:
    """Let nobody else change the catalogue before this transaction ends.

    In PostgreSQL a statement of its own: one that waits for the lock still sees the other tables as they were before.
    """
    if connection.dialect.name != "sqlite":  # there, transactions that write begin with the lock
        connection.execute(select(schema.meta.c.tick).with_for_update())


class _Update:
    """One run on its way into the catalogue."""

    def __init__(self, connection: Connection, run: str, row: Any, news: RunChanges, before: CachedRun) -> None:
        self._connection, self._run, self._row, self._news = connection, run, row, news
        known = before.columns if before.born == row.born else None
        self._columns = known if known is not None and len(known.keys) == row.metrics else None
        self._noted = before.noted or any(isinstance(event, NOTES) for event in news.events)
        self._free = row.free
        self._new = row.read is None or news.whole
        self._rows: Rows = {} if self._new else dict(before.rows)
        self._keys = {identity: key for key, identity in before.rows.values()}  # which a checkpoint keeps
        self._key = row.key if row.key is not None else self._new_run()

    def _new_run(self) -> int:
        key = (self._connection.scalar(select(func.max(schema.runs.c.key))) or 0) + 1
        empty = {"rules": "[]", "peaks": "{}", "reports": 0, "checkpoints": 0, "size": 0, "read": ""}
        self._connection.execute(insert(schema.runs).values(key=key, name=self._run, **empty))
        return int(key)

    def carry_out(self) -> tuple[int, CachedRun]:
        """Everything, in the order in which one thing needs the other."""
        news, row = self._news, self._row
        if self._new:
            self._forget(list(self._keys.values()))
            self._connection.execute(delete(schema.noted).where(schema.noted.c.run == self._key))
        self._note()
        self._forget([self._rows.pop(name)[0] for name in news.gone if name in self._rows])
        self._add(news.found)
        values: dict[str, Any] = {}
        if news.events or self._new:
            values |= self._reported()
        if news.found or news.gone or self._new:
            values |= self._totals()
        values["peaks"] = self._with_kept(values.get("peaks", row.peaks or "{}"))
        tick = row.tick + 1
        text = msgspec.json.encode(_Read(news.known, tick)).decode()
        self._connection.execute(update(schema.runs).where(schema.runs.c.key == self._key).values(**values, read=text))
        self._connection.execute(update(schema.meta).values(tick=tick, free=self._free))
        return tick, CachedRun(text, news.known, self._rows, self._columns, row.born, self._noted)

    # --- measured later, pinned

    def _note(self) -> None:
        fresh = Annotations()
        named = {event.checkpoint for event in self._news.events if isinstance(event, NOTES)}
        if not named:
            return
        for identity, (metrics, pinned) in _noted(self._connection, self._key, named).items():
            fresh.metrics[identity] = dict(metrics)
            if pinned is not None:
                fresh.pinned[identity] = pinned
        for event in self._news.events:
            fresh.take(event)
        table = schema.noted
        for some in portions(sorted(named)):
            self._connection.execute(delete(table).where(table.c.run == self._key, table.c.checkpoint.in_(some)))
        rows = [
            {
                "run": self._key,
                "checkpoint": identity,
                "metrics": json.dumps(metrics_to_json(fresh.metrics.get(identity, {}))),
                "pinned": plain_text(fresh.pinned.get(identity)),
            }
            for identity in named
        ]
        self._connection.execute(insert(table), rows)

    # --- checkpoints

    def _forget(self, keys: Sequence[int]) -> None:
        for some in portions(keys):
            self._connection.execute(delete(schema.checkpoints).where(schema.checkpoints.c.key.in_(some)))

    def _add(self, found: Sequence[reader.FoundCheckpoint]) -> None:
        if not found:
            return
        ids = {standing.manifest.id for standing in found}
        noted = _noted(self._connection, self._key, ids) if self._noted else {}
        entries = []
        for standing in found:
            one = standing.manifest
            key = self._keys.get(one.id)
            if key is None:
                key, self._free = self._free, self._free + 1
            self._rows[one.name] = (key, one.id)
            late, pinned = noted.get(one.id, ({}, None))
            entries.append(CheckpointEntry(key, self._key, standing, {**one.metrics, **late}, pinned is not None))
        names = [name for entry in entries for name in entry.metrics]
        known = self._columns or Columns.read(self._connection)
        self._columns = known.including(self._connection, names)
        for table, rows in rows_of(self._columns, entries):
            if rows:
                self._connection.execute(insert(table), rows)

    # --- the run as a whole

    def _reported(self) -> dict[str, Any]:
        """Rules, peaks and the number of reports."""
        news, row = self._news, self._row
        events: Sequence[Event] = news.events
        opened = histories.newest_event(events, Opened)
        texts = list(opened.rules) if opened is not None else [] if self._new else _texts(row.rules)
        if self._new or news.past is not None:
            before: Sequence[Peak] = ()
            missing: Mapping[str, int] = {}
            reports = 0
            events = events if news.past is None else news.past
        else:
            before, missing, reports = read_peaks(row.peaks), read_json(row.peaks).get("missing", {}), row.reports
        history = histories.history(events)
        found, missing = extend_peaks(before, missing, history, watched_by(texts))
        return {
            "rules": json.dumps(texts),
            "peaks": json.dumps({"peaks": [asdict(peak) for peak in found], "missing": missing}),
            "reports": reports + len(history),
        }

    def _with_kept(self, text: str) -> str:
        """The peaks, and whether there is a checkpoint of that step."""
        said = read_json(text)
        steps = {peak["metric"]: peak["best_step"] for peak in said.get("peaks", [])}
        table = schema.checkpoints.c
        # a sum has no index: those of this run are few, those of this step many
        found = select(table.step).where(table.run == self._key, (table.step + 0).in_(steps.values()))
        there = set(self._connection.scalars(found)) if steps else set()
        return json.dumps(said | {"kept": {metric: step in there for metric, step in steps.items()}})

    def _totals(self) -> dict[str, Any]:
        if not (self._new or self._news.gone):
            row, found = self._row, [standing.manifest for standing in self._news.found]
            newest = max(one.created_at.timestamp() for one in found)
            newest = newest if row.newest is None else max(newest, row.newest)
            size = row.size + sum(one.size_bytes for one in found)
            return {"checkpoints": row.checkpoints + len(found), "size": size, "newest": newest}
        table = schema.checkpoints.c
        count, size, newest = self._connection.execute(
            select(func.count(), func.sum(table.size), func.max(table.created)).where(table.run == self._key)
        ).one()
        return {"checkpoints": count, "size": int(size or 0), "newest": newest}


def _texts(text: str) -> list[str]:
    texts = read_json(text)
    if not isinstance(texts, list):
        raise DamagedError(f"the rules of a run are none: {text[:80]}")
    return texts


def watched_by(texts: Iterable[str]) -> list[tuple[str, Mode]]:
    """The metrics that rules rank by; a rule of a newer release is passed over here."""
    known = []
    for text in texts:
        try:
            known.append(parse(text))
        except ConfigError:
            continue
    return list(ranking_metrics(known))


def read_peaks(text: str) -> list[Peak]:
    """The peaks of a run, as the catalogue keeps them."""
    try:
        return [Peak(**peak) for peak in read_json(text).get("peaks", [])]
    except (AttributeError, TypeError) as error:
        raise DamagedError(f"the peaks of a run are none: {error}") from error


_MANY = 500  # parameters of one statement; PostgreSQL takes 65,535, some builds of SQLite 32,766


def portions(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """The values in parts that one statement takes."""
    for begin in range(0, len(values), _MANY):
        yield values[begin : begin + _MANY]


def _noted(connection: Connection, run: int, ids: Collection[str]) -> dict[str, tuple[dict[str, float], str | None]]:
    table = schema.noted.c
    statement = select(table.checkpoint, table.metrics, table.pinned).where(table.run == run)
    if len(ids) <= _MANY:
        statement = statement.where(table.checkpoint.in_(ids))
    rows = connection.execute(statement).all()
    return {identity: (metrics_from_json(read_json(metrics)), pinned) for identity, metrics, pinned in rows}


# --- rows ---------------------------------------------------------------------------------------------------------


class CheckpointEntry(NamedTuple):
    """A checkpoint and what is known of it.

    Attributes:
        key: of its row.
        run: the key of its run.
        standing: what its directory tells.
        metrics: all of them.
        pinned: whether it is pinned.
    """

    key: int
    run: int
    standing: reader.FoundCheckpoint
    metrics: dict[str, float]
    pinned: bool


def plain_text(text: str | None) -> str | None:
    """A text that PostgreSQL takes: it has no NUL."""
    return None if text is None else text.replace("\x00", "\ufffd")


def record_of(manifest: Manifest, metrics: dict[str, float]) -> str:
    """What a ``Checkpoint`` needs and no selection asks for."""
    record = {
        "metrics": metrics_to_json(metrics),
        "reasons": manifest.reasons,
        "parts": manifest.parts,
        "forks": manifest.forks,
        "created_at": manifest.created_at,
    }
    return msgspec.json.encode(record).decode()


def rows_of(columns: Columns, entries: Sequence[CheckpointEntry]) -> list[tuple[Table, list[dict[str, Any]]]]:
    """The rows of some checkpoints, by table."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("checkpoints", "rarities", "details", "reasons")}
    used = {name: f"m{columns.keys[name]}" for entry in entries for name in entry.metrics}
    wide = {name for name in used.values() if name in columns.table.columns}
    for key, run, standing, metrics, pinned in entries:
        one = standing.manifest
        row: dict[str, Any] = dict.fromkeys(wide)
        for name, value in metrics.items():
            if value == value:  # noqa: PLR0124 - not NaN
                if used[name] in row:
                    row[used[name]] = value
                else:
                    rows["rarities"].append({"checkpoint": key, "metric": columns.keys[name], "value": value})
        row |= {"key": key, "run": run, "sequence": one.sequence, "epoch": one.epoch, "step": one.step}
        row |= {"size": one.size_bytes, "created": one.created_at.timestamp(), "pinned": pinned}
        row |= {"archived": standing.archived, "whole": not standing.incomplete}
        rows["checkpoints"].append(row)
        detail = {"checkpoint": key, "id": one.id, "name": one.name, "record": record_of(one, metrics)}
        rows["details"].append(detail)
        rows["reasons"] += [
            {"checkpoint": key, "number": number, "reason": plain_text(reason)}
            for number, reason in enumerate(one.reasons)
        ]
    tables = (columns.table, schema.rarities, schema.details, schema.reasons)
    return list(zip(tables, rows.values(), strict=True))
