"""Keeping the catalogue in step with the files.

The files are the truth, and nobody who writes them knows of the catalogue. Before it is asked, each run is compared
with what was read of it last: the stamps of two directories, and the lengths of the journal's segments that may still
grow (a segment whose last event is ``closed`` never does). For a run where one of these differs, new lines of the
journal and new directories are read, and nothing else.

A directory that was seen in the middle of something (a save before its manifest, a removal after its event) is noted
with a stamp of its own, and read again when that differs. So a crash at any instant leaves nothing unseen.

Every run is one transaction, and its files are read inside of it: of two that refresh the same run at the same time,
the second waits, and then finds nothing to do.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, and_, delete, func, insert, select, update

from peakpoint import journal as journals
from peakpoint import layout, reader
from peakpoint.catalogue import schema
from peakpoint.catalogue.schema import Columns
from peakpoint.journal import Event
from peakpoint.manifest import Manifest, metrics_from_json, metrics_to_json
from peakpoint.notes import Notes
from peakpoint.peaks import Peak, go_on
from peakpoint.rules import parse, watched
from peakpoint.store import Store


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A directory that was seen in the middle of something, or is damaged.

    Attributes:
        stamp: of the directory, before it was read; None when that could not be told.
        damage: what is wrong with its manifest.
    """

    stamp: str | None
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class Growing:
    """A segment of the journal that may still grow.

    Attributes:
        read: bytes that were read, in whole lines.
        seen: bytes that were there, with a line that was torn.
    """

    read: int
    seen: int


@dataclass(frozen=True, slots=True)
class Known:
    """How far the files of a run are read.

    Attributes:
        key: of the run in the catalogue.
        journal: the stamp of its journal when it was listed; None when that could not be told.
        checkpoints: the same of its checkpoints.
        last: the newest segment; those before it are known, as numbers only rise.
        segments: how many there are up to that one.
        growing: those that may still grow.
        unsettled: directories to look at again when they change.
        changed: the catalogue's tick when the run was changed last.
    """

    key: int
    journal: str | None = None
    checkpoints: str | None = None
    last: str = ""
    segments: int = 0
    growing: Mapping[str, Growing] = field(default_factory=dict)
    unsettled: Mapping[str, Unsettled] = field(default_factory=dict)
    changed: int = 0


Rows = dict[str, tuple[int, str]]
"""The checkpoints of a run in the catalogue: name to key and id."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a process remembers of a run that it has refreshed."""

    known: Known
    rows: Rows
    columns: Columns


def _known(key: int, text: str) -> Known:
    return msgspec.convert(msgspec.json.decode(text) | {"key": key}, Known)


def known_runs(connection: Connection) -> dict[str, Known]:
    """How far every run is read."""
    table = schema.runs.c
    rows = connection.execute(select(table.name, table.key, table.read)).all()
    return {name: _known(key, text) for name, key, text in rows}


def is_current(store: Store, run: str, known: Known, *, by_hand: bool = True) -> bool:
    """Whether a run's files are as they were when they were read.

    Args:
        store: where.
        run: which.
        known: what was read.
        by_hand: also look for directories that were deleted, or copied there, without Peakpoint. Everything that it
            does itself begins with a line in the journal; where no segment can grow, that is a new segment.
    """
    journal = layout.journal_prefix(run)
    return (
        _same(store, journal, known.journal)
        and (not (by_hand or known.growing) or _same(store, layout.checkpoints_prefix(run), known.checkpoints))
        and all(store.size(f"{journal}/{segment}") == one.seen for segment, one in known.growing.items())
        and all(_same(store, layout.checkpoint_prefix(run, name), one.stamp) for name, one in known.unsettled.items())
    )


def _same(store: Store, prefix: str, stamp: str | None) -> bool:
    return stamp is not None and store.stamp(prefix) == stamp


def remove_run(engine: Engine, name: str) -> None:
    """Forget a run whose directory is gone."""
    with engine.begin() as connection:
        _lock(connection)
        _count(connection)
        connection.execute(delete(schema.runs).where(schema.runs.c.name == name))


def refresh_run(
    engine: Engine, store: Store, run: str, before: Remembered | None = None
) -> tuple[int, Remembered | None]:
    """Bring one run up to date, in one transaction.

    Args:
        engine: one that writes.
        store: where the files are.
        run: which.
        before: what was returned the last time.

    Returns:
        The catalogue's tick after it, and what to remember; None when another process was faster.
    """
    with engine.begin() as connection:
        _lock(connection)
        table = schema.runs.c
        free = select(func.coalesce(func.max(schema.checkpoints.c.key), 0) + 1).scalar_subquery().label("free")
        metrics = select(func.count()).select_from(schema.metrics).scalar_subquery().label("metrics")
        columns = (schema.meta.c.tick, table.key, table.read, table.rules, table.peaks, table.reports, free, metrics)
        joined = schema.meta.outerjoin(schema.runs, table.name == run)
        row = connection.execute(select(*columns).select_from(joined)).one()
        known = None if row.key is None else _known(row.key, row.read)
        if known is not None and is_current(store, run, known):
            return row.tick, None
        news = _news(store, run, known)
        if known is not None and news is None:
            connection.execute(delete(schema.runs).where(table.key == known.key))
            known, news = None, _news(store, run, None)
        assert news is not None
        said = _Said()
        if known is not None:
            missing = json.loads(row.peaks).get("missing", {})
            said = _Said(json.loads(row.rules), read_peaks(row.peaks), missing, row.reports)
        if known is None or before is None or before.known.changed != known.changed:
            before = None
        work = _Update(connection, store, run, known, news, said, before, row.free)
        if before is not None and len(before.columns.keys) == row.metrics:
            work.columns = before.columns
        changed = work.carry_out(row.tick + 1)
        if changed is not None:
            return row.tick + 1, Remembered(changed, work.rows, work.columns)
        assert known is not None
        return row.tick, Remembered(known, work.rows, work.columns)


def _lock(connection: Connection) -> None:
    """Let nobody else change the catalogue before this transaction ends.

    In PostgreSQL a statement of its own: one that waits for the lock still sees the other tables as they were before.
    """
    if connection.dialect.name != "sqlite":  # there, transactions that write begin with the lock
        connection.execute(select(schema.meta.c.tick).with_for_update())


def _count(connection: Connection) -> None:
    connection.execute(update(schema.meta).values(tick=schema.meta.c.tick + 1))


# --- what is new --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _News:
    """What the journal says that was not read before.

    Attributes:
        stamp: of the journal, before it was listed.
        segments: all of them, in order.
        growing: those that may still grow.
        events: what is new.
    """

    stamp: str | None
    segments: list[str]
    growing: dict[str, Growing] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Said:
    """What the journal has said before."""

    rules: Sequence[str] = ()
    peaks: Sequence[Peak] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    reports: int = 0


_NOTES = (journals.Measured, journals.Pinned, journals.Unpinned)


def _news(store: Store, run: str, known: Known | None) -> _News | None:
    """What the journal says that was not read before; None when all of it must be read again."""
    prefix = layout.journal_prefix(run)
    news = _News(store.stamp(prefix), journals.segments_of(store, run))
    last = (0, "") if known is None else (len(known.last), known.last)
    before = sum((len(name), name) <= last for name in news.segments)
    if known is not None and before != known.segments:
        return None
    for place, segment in enumerate(news.segments):
        one = known.growing.get(segment) if known is not None else None
        if place < before and one is None:
            continue
        begin = 0 if one is None else one.read
        seen = store.size(f"{prefix}/{segment}") or 0
        events, end = journals.read_on(store, run, segment, begin)
        # notes count in the order of segments, and segments only grow
        if seen < begin or (place < before - 1 and any(isinstance(event, _NOTES) for event in events)):
            return None
        news.events += events
        if not (events and isinstance(events[-1], journals.Closed)):
            news.growing[segment] = Growing(end, max(seen, end))
    return news


class _Update:
    """One run on its way into the catalogue."""

    def __init__(
        self,
        connection: Connection,
        store: Store,
        run: str,
        known: Known | None,
        news: _News,
        said: _Said,
        before: Remembered | None,
        free: int,
    ) -> None:
        self._connection, self._store, self._run, self._news = connection, store, run, news
        self._known, self._said, self._free = known, said, free
        self._stamp = store.stamp(layout.checkpoints_prefix(run))
        self._key = self._new_run() if known is None else known.key
        self.rows = self._read_rows() if before is None else dict(before.rows)
        self.columns = Columns({})

    def _new_run(self) -> int:
        key = _next(self._connection, schema.runs.c.key)
        empty = {"rules": "[]", "peaks": "{}", "reports": 0, "checkpoints": 0, "size": 0, "read": "{}"}
        self._connection.execute(insert(schema.runs).values(key=key, name=self._run, **empty))
        return key

    def carry_out(self, tick: int) -> Known | None:
        """Everything, in the order in which one thing needs the other.

        Args:
            tick: the catalogue's, once it is done.

        Returns:
            How far the run is read now; None when nothing has changed.
        """
        self._note()
        changed, unsettled = self._directories()
        values: dict[str, Any] = {}
        if self._news.events or self._known is None:
            values |= self._reported()
        if changed or self._known is None:
            values |= self._totals()
        segments = self._news.segments
        known = Known(
            key=self._key,
            journal=self._news.stamp,
            checkpoints=self._stamp,
            last=segments[-1] if segments else "",
            segments=len(segments),
            growing=self._news.growing,
            unsettled=unsettled,
        )
        if not values and self._known is not None and known == replace(self._known, changed=0):
            return None
        known = replace(known, changed=tick)
        values["read"] = msgspec.json.encode(known).decode()
        self._connection.execute(update(schema.runs).where(schema.runs.c.key == self._key).values(**values))
        _count(self._connection)
        return known

    def _put(self, table: Any, where: dict[str, Any], values: dict[str, Any]) -> None:
        """Change a row, or add it."""
        found = and_(*(table.c[name] == value for name, value in where.items()))
        if self._connection.execute(update(table).where(found).values(**values)).rowcount == 0:
            self._connection.execute(insert(table).values(**where, **values))

    # --- measured later, pinned

    def _note(self) -> None:
        fresh = Notes()
        named = {event.checkpoint for event in self._news.events if isinstance(event, _NOTES)}
        before = _noted(self._connection, self._key, named) if named else {}
        for id, (metrics, pinned) in before.items():  # noqa: A001 - the vocabulary's word
            fresh.metrics[id] = dict(metrics)
            if pinned is not None:
                fresh.pinned[id] = pinned
        for event in self._news.events:
            fresh.take(event)
        for id in named:  # noqa: A001
            values = {
                "metrics": json.dumps(metrics_to_json(fresh.metrics.get(id, {}))),
                "pinned": fresh.pinned.get(id),
            }
            self._put(schema.noted, {"run": self._key, "checkpoint": id}, values)

    # --- directories

    def _touched(self) -> tuple[set[str], set[str], set[str]]:
        """Names to read again; those of them that may still be changing; ids that were noted."""
        again, moving, ids = set(), set(), set()
        for event in self._news.events:
            if isinstance(event, journals.Removed | journals.PartsDropped):
                moving.add(event.name)
            elif isinstance(event, journals.Saved | journals.Undone | journals.Archived | journals.Restored):
                again.add(event.name)
            elif isinstance(event, _NOTES):
                ids.add(event.checkpoint)
        return again | moving, moving, ids

    def _directories(self) -> tuple[bool, dict[str, Unsettled]]:
        """Read what is new or was touched.

        Returns:
            Whether a checkpoint came, went or changed, and what is unsettled now.
        """
        touched, moving, ids = self._touched()
        waiting = dict(self._known.unsettled) if self._known else {}
        rows = self.rows
        prefix = layout.checkpoints_prefix(self._run)
        present = {child.removesuffix("/") for child in self._store.children(prefix) if child.endswith("/")}
        touched |= {name for name, (_, id) in rows.items() if id in ids}  # noqa: A001 - the vocabulary's word
        touched |= {name for name, one in waiting.items() if not self._is_same(name, one.stamp)}
        unsettled = {name: known for name, known in waiting.items() if name in present - touched}
        found: list[reader.Standing] = []
        for name in sorted(name for name in present if name in touched or (name not in rows and name not in unsettled)):
            stamp = self._store.stamp(layout.checkpoint_prefix(self._run, name))
            match reader.look(self._store, self._run, name):
                case reader.Standing() as standing:
                    found.append(standing)
                    if name in moving:
                        unsettled[name] = Unsettled(stamp)
                case reader.Damaged(error=error):
                    unsettled[name] = Unsettled(stamp, str(error))
                case None:
                    unsettled[name] = Unsettled(stamp)
        stale = [rows.pop(name)[0] for name in list(rows) if name not in present or name in touched]
        self._forget(stale)
        self._add(found)
        return bool(stale or found), unsettled

    def _is_same(self, name: str, stamp: str | None) -> bool:
        return _same(self._store, layout.checkpoint_prefix(self._run, name), stamp)

    def _read_rows(self) -> Rows:
        if self._known is None:
            return {}
        a, b = schema.checkpoints.c, schema.details.c
        joined = select(b.name, a.key, b.id).join_from(schema.checkpoints, schema.details, b.checkpoint == a.key)
        found = self._connection.execute(joined.where(a.run == self._key)).all()
        return {name: (key, identity) for name, key, identity in found}

    def _forget(self, keys: Sequence[int]) -> None:
        if keys:
            for begin in range(0, len(keys), 500):
                some = keys[begin : begin + 500]
                self._connection.execute(delete(schema.checkpoints).where(schema.checkpoints.c.key.in_(some)))

    def _add(self, found: Sequence[reader.Standing]) -> None:
        if not found:
            return
        ids = {standing.manifest.id for standing in found}
        noted = _noted(self._connection, self._key, ids if len(ids) <= 500 else None)
        entries = []
        for standing in found:
            late, pinned = noted.get(standing.manifest.id, ({}, None))
            entries.append((standing, {**standing.manifest.metrics, **late}, pinned))
        names = [name for _, metrics, _ in entries for name in metrics]
        if not self.columns.keys:
            self.columns = Columns.read(self._connection)
        self.columns = self.columns.including(self._connection, names)
        _insert(self._connection, self.columns, self._key, self._free, entries)
        for place, standing in enumerate(found, self._free):
            self.rows[standing.manifest.name] = (place, standing.manifest.id)

    # --- the run as a whole

    def _reported(self) -> dict[str, Any]:
        """Rules, peaks and the number of reports."""
        events: Sequence[Event] = self._news.events
        said = self._said
        texts = said.rules
        opened = journals.newest(events, journals.Opened)
        if opened is not None:
            texts = opened.rules
        if self._known is not None and any(isinstance(e, journals.Opened | journals.Started) for e in events):
            events, said = journals.read(self._store, self._run).events, _Said()
        history = journals.history(events)
        found, missing = go_on(said.peaks, said.missing, history, watched([parse(text) for text in texts]))
        return {
            "rules": json.dumps(texts),
            "peaks": json.dumps({"peaks": [asdict(peak) for peak in found], "missing": missing}),
            "reports": said.reports + len(history),
        }

    def _totals(self) -> dict[str, Any]:
        table = schema.checkpoints.c
        count, size, newest = self._connection.execute(
            select(func.count(), func.sum(table.size), func.max(table.created)).where(table.run == self._key)
        ).one()
        return {"checkpoints": count, "size": int(size or 0), "newest": newest}


def read_peaks(text: str) -> list[Peak]:
    """The peaks of a run, as the catalogue keeps them."""
    return [Peak(**peak) for peak in json.loads(text).get("peaks", [])]


def damage_of(text: str) -> tuple[str, ...]:
    """What is damaged in a run, of what is known of it."""
    return tuple(one.damage for one in _known(0, text).unsettled.values() if one.damage is not None)


def _next(connection: Connection, column: Any) -> int:
    return (connection.scalar(select(func.max(column))) or 0) + 1


def _noted(
    connection: Connection, run: int, ids: Collection[str] | None
) -> dict[str, tuple[dict[str, float], str | None]]:
    table = schema.noted.c
    statement = select(table.checkpoint, table.metrics, table.pinned).where(table.run == run)
    if ids is not None:
        statement = statement.where(table.checkpoint.in_(ids))
    return {
        id: (metrics_from_json(json.loads(metrics)), pinned)
        for id, metrics, pinned in connection.execute(statement)  # noqa: A001
    }


# --- rows ---------------------------------------------------------------------------------------------------------

Entry = tuple[reader.Standing, dict[str, float], str | None]  # with all its metrics, and why it is pinned


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


def _insert(connection: Connection, columns: Columns, run: int, first: int, entries: Sequence[Entry]) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("checkpoints", "rarities", "details", "reasons", "files")
    }
    wide = [column.name for column in columns.table.columns if column.name not in schema.checkpoints.columns]
    used = {name: f"m{columns.keys[name]}" for _, metrics, _ in entries for name in metrics}
    wide = [name for name in wide if name in set(used.values())]
    for key, (standing, metrics, pinned) in enumerate(entries, first):
        one = standing.manifest
        row: dict[str, Any] = dict.fromkeys(wide)
        for name, value in metrics.items():
            if value == value:  # noqa: PLR0124 - not NaN
                if used[name] in row:
                    row[used[name]] = value
                else:
                    rows["rarities"].append({"checkpoint": key, "metric": columns.keys[name], "value": value})
        row |= {"key": key, "run": run, "sequence": one.sequence, "epoch": one.epoch, "step": one.step}
        row |= {"size": one.size_bytes, "created": one.created_at.timestamp(), "pinned": pinned is not None}
        row |= {"archived": standing.archived, "whole": not standing.cut}
        rows["checkpoints"].append(row)
        detail = {"checkpoint": key, "id": one.id, "name": one.name, "record": record_of(one, metrics)}
        rows["details"].append(detail)
        rows["reasons"] += [
            {"checkpoint": key, "number": number, "reason": reason.replace("\x00", "\ufffd")}
            for number, reason in enumerate(one.reasons)
        ]
        rows["files"] += [
            {"checkpoint": key, "name": file.name, "size": file.size, "digest": file.digest, "shared": file.shared}
            for file in one.files
        ]
    for name, table in (
        ("checkpoints", columns.table),
        ("rarities", schema.rarities),
        ("details", schema.details),
        ("reasons", schema.reasons),
        ("files", schema.files),
    ):
        if rows[name]:
            connection.execute(insert(table), rows[name])
