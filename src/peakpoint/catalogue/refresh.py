"""Bring one run up to date in the catalogue.

Its files are read first (see ``catalogue.changes``), without holding anything up; then one short transaction writes
what is new, unless another process has changed the run meanwhile: then it is read again from there. A row keeps its key
as long as its checkpoint exists, and no key is used twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, case, delete, func, insert, select, update

from peakpoint.catalogue import schema
from peakpoint.catalogue.changes import NOTES, Indexed, ReadPosition, RunChanges, is_current, read_changes
from peakpoint.catalogue.database import DamagedError
from peakpoint.catalogue.rows import (
    CheckpointEntry,
    RunReports,
    checkpoint_rows,
    note_rows,
    portions,
    setting_rows,
    stored_notes,
)
from peakpoint.catalogue.schema import Columns
from peakpoint.format.settings import Settings, settings_of
from peakpoint.repository import reader
from peakpoint.repository.annotations import Annotations
from peakpoint.store import Store


@dataclass(frozen=True, slots=True)
class CachedRun:
    """What a process remembers of a run that it has refreshed.

    Attributes:
        text: how far the run is read, as the catalogue has it; None for a run that it does not have.
        position: the same.
        indexed: its checkpoints in the catalogue.
        columns: of the catalogue of that birth.
        birth: see ``schema.meta``.
        has_notes: whether anything may be noted of its checkpoints.
    """

    text: str | None
    position: ReadPosition | None
    indexed: Indexed
    columns: Columns | None = None
    birth: int = 0
    has_notes: bool = True


@dataclass(frozen=True, slots=True)
class _StoredPosition:
    position: ReadPosition
    number: int  # another one with every change, so that the same text means the same rows


def decode_position(text: str) -> ReadPosition:
    """How far a run is read, from the column of the catalogue."""
    try:
        return msgspec.json.decode(text, type=_StoredPosition).position
    except (msgspec.DecodeError, UnicodeError) as error:
        raise DamagedError(f"a row of a run does not say how far the run is read: {error}") from error


def read_positions(connection: Connection) -> dict[str, ReadPosition]:
    """How far every run is read."""
    rows = connection.execute(select(schema.runs.c.name, schema.runs.c.read)).all()
    return {name: decode_position(text) for name, text in rows}


def lock(connection: Connection) -> None:
    """Let nobody else change the catalogue before this transaction ends.

    In PostgreSQL a statement of its own: one that waits for the lock still sees the other tables as they were before.
    """
    if connection.dialect.name != "sqlite":  # there, transactions that write begin with the lock
        connection.execute(select(schema.meta.c.tick).with_for_update())


def remove_run(engine: Engine, name: str) -> None:
    """Forget a run whose directory is gone."""
    with engine.begin() as connection:
        lock(connection)
        connection.execute(update(schema.meta).values(tick=schema.meta.c.tick + 1))
        connection.execute(delete(schema.runs).where(schema.runs.c.name == name))


def refresh_run(
    engines: tuple[Engine, Engine], store: Store, run: str, cached: CachedRun | None = None
) -> tuple[int, CachedRun]:
    """Bring one run up to date.

    Args:
        engines: one that writes, and one that reads.
        store: where the files are.
        run: which.
        cached: what was returned the last time; whether it still holds is seen when the run is written.

    Returns:
        The catalogue's tick after it, -1 when that was not asked for, and what to remember.
    """
    writing, reading = engines
    tick = -1
    while True:
        if cached is None:
            with reading.connect() as connection:
                tick, cached = _stored_run(connection, run)
        if cached.position is not None and is_current(store, run, cached.position):
            return tick, cached
        changes = read_changes(store, run, cached.position, cached.indexed)
        if changes.position == cached.position and changes.is_empty:
            return tick, cached
        with writing.begin() as connection:
            lock(connection)
            row = connection.execute(_row_of(run)).one()
            if row.read == cached.text:
                return _Update(connection, run, row, changes, cached).write()
        cached = None  # another process was faster


def _stored_run(connection: Connection, run: str) -> tuple[int, CachedRun]:
    """The catalogue's tick, and what it has of a run."""
    row = connection.execute(_row_of(run)).one()
    if row.read is None:
        return row.tick, CachedRun(None, None, {})
    note = connection.execute(select(schema.notes.c.run).where(schema.notes.c.run == row.key).limit(1)).first()
    narrow, details = schema.checkpoints.c, schema.details.c
    statement = select(details.name, narrow.key, details.id).where(narrow.run == row.key)
    joined = statement.join_from(schema.checkpoints, schema.details, details.checkpoint == narrow.key)
    indexed = {name: (key, identity) for name, key, identity in connection.execute(joined)}
    return row.tick, CachedRun(row.read, decode_position(row.read), indexed, has_notes=note is not None)


def _row_of(run: str) -> Any:
    """The catalogue's own state, and what it has of a run."""
    meta, table = schema.meta.c, schema.runs.c
    metrics = select(func.count()).select_from(schema.metrics).scalar_subquery().label("metrics")
    columns = (meta.tick, meta.free, meta.born, table.key, table.read, table.rules, table.peaks, table.reports, metrics)
    return select(*columns).select_from(schema.meta.outerjoin(schema.runs, table.name == run))


class _Update:
    """The transaction that writes the changes of one run."""

    def __init__(self, connection: Connection, run: str, row: Any, changes: RunChanges, cached: CachedRun) -> None:
        self._connection, self._row, self._changes = connection, row, changes
        columns = cached.columns if cached.birth == row.born else None
        self._columns = columns if columns is not None and len(columns.keys) == row.metrics else None
        self._noted_ids = {event.checkpoint for event in changes.events if isinstance(event, NOTES)}
        self._has_notes = cached.has_notes or bool(self._noted_ids)
        self._free = row.free
        self._is_new = row.read is None or changes.complete
        self._indexed = {} if self._is_new else dict(cached.indexed)
        self._keys = {identity: key for key, identity in cached.indexed.values()}  # which a checkpoint keeps
        self._key = row.key if row.key is not None else self._new_run(run)

    def _new_run(self, name: str) -> int:
        key = (self._connection.scalar(select(func.max(schema.runs.c.key))) or 0) + 1
        empty = {"checkpoints": 0, "size": 0, "read": "", **RunReports().columns(())}
        self._connection.execute(insert(schema.runs).values(key=key, name=name, **empty))
        return int(key)

    def write(self) -> tuple[int, CachedRun]:
        """Write everything, in the order in which one thing needs the other."""
        changes, row, runs = self._changes, self._row, schema.runs
        if self._is_new:
            self._forget(list(self._keys.values()))
            self._connection.execute(delete(schema.notes).where(schema.notes.c.run == self._key))
        self._write_notes()
        self._forget([self._indexed.pop(name)[0] for name in changes.removed if name in self._indexed])
        self._add(changes.checkpoints)
        tick = row.tick + 1
        text = msgspec.json.encode(_StoredPosition(changes.position, tick)).decode()
        values = {**self._run_columns(), "read": text}
        self._connection.execute(update(runs).where(runs.c.key == self._key).values(values))
        self._connection.execute(update(schema.meta).values(tick=tick, free=self._free))
        return tick, CachedRun(text, changes.position, self._indexed, self._columns, row.born, self._has_notes)

    def _write_notes(self) -> None:
        """What was measured later, and what is pinned."""
        if not self._noted_ids:
            return
        notes = stored_notes(self._connection, self._key, self._noted_ids)
        for event in self._changes.events:
            notes.take(event)
        table = schema.notes
        for ids in portions(sorted(self._noted_ids)):
            self._connection.execute(delete(table).where(table.c.run == self._key, table.c.checkpoint.in_(ids)))
        self._connection.execute(insert(table), note_rows(self._key, notes, self._noted_ids))

    def _write_settings(self, settings: Settings) -> None:
        self._connection.execute(delete(schema.settings).where(schema.settings.c.run == self._key))
        for rows in portions(setting_rows(self._key, settings)):
            self._connection.execute(insert(schema.settings), rows)

    def _forget(self, keys: Sequence[int]) -> None:
        for some_keys in portions(keys):
            self._connection.execute(delete(schema.checkpoints).where(schema.checkpoints.c.key.in_(some_keys)))

    def _add(self, checkpoints: Sequence[reader.FoundCheckpoint]) -> None:
        if not checkpoints:
            return
        ids = {checkpoint.manifest.id for checkpoint in checkpoints}
        notes = stored_notes(self._connection, self._key, ids) if self._has_notes else Annotations()
        entries = []
        for checkpoint in checkpoints:
            manifest = checkpoint.manifest
            key = self._keys.get(manifest.id)
            if key is None:
                key, self._free = self._free, self._free + 1
            self._indexed[manifest.name] = (key, manifest.id)
            entries.append(CheckpointEntry.noted(key, self._key, checkpoint, notes))
        names = [name for entry in entries for name in entry.metrics]
        columns = self._columns or Columns.read(self._connection)
        self._columns = columns.including(self._connection, names)
        for table, rows in checkpoint_rows(self._columns, entries):
            if rows:
                self._connection.execute(insert(table), rows)

    def _run_columns(self) -> dict[str, Any]:
        """What the row of the run says."""
        changes, table = self._changes, schema.checkpoints.c
        from_nothing = self._is_new or changes.past is not None
        events = changes.events if changes.past is None else changes.past
        reports = RunReports() if from_nothing else RunReports.of_row(self._row)
        reports = reports.after(events)
        if from_nothing:
            self._write_settings(settings_of(events))
        best = [func.max(case((table.step == peak.best_step, 1), else_=0)) for peak in reports.peaks]
        totals = select(func.count(), func.sum(table.size), func.max(table.created), *best)
        count, size, newest, *kept = self._connection.execute(totals.where(table.run == self._key)).one()
        columns = {"checkpoints": count, "size": int(size or 0), "newest": newest}
        return columns | reports.columns(map(bool, kept))
