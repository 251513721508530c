"""What a selection finds, lazily, and why."""

import difflib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, case, func, literal, not_, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.database import translated
from peakpoint.catalogue.schema import Columns
from peakpoint.catalogue.search import WINDOW, Search
from peakpoint.catalogue.sql import Expression, Translator
from peakpoint.checkpoint import Checkpoint
from peakpoint.errors import ConfigError, NotFoundError, TransientStoreError
from peakpoint.manifest import metrics_from_json
from peakpoint.query import FIELDS, Field, Metric, Query, point
from peakpoint.ranking import Key, WithinSE

_RUNNERS_UP = 3
_CHUNK = 200
_MOST = 10**9
_EARLIEST = (Key(Field("step", (0, 0)), "min"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """What one clause of a selection did to the candidates that the clauses before it had left.

    Attributes:
        text: the clause.
        removed: how many did not match.
        missing: how many of these had no value for it.
        left: how many did.
    """

    text: str
    removed: int
    missing: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """How a selection came about.

    Attributes:
        candidates: all checkpoints that there are.
        clauses: what each removed, in order; the last ones are those of ranking.
        chosen: how many were chosen.
        runners_up: the next ones in order, a few.
    """

    candidates: int
    clauses: tuple[Clause, ...]
    chosen: int
    runners_up: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be selected.

    Attributes:
        query: which checkpoints.
        keys: by what they are ranked; the newest come first without any.
        top: how many at most; None for all.
        within: what counts as equally good.
    """

    query: Query
    keys: tuple[Key, ...] = ()
    top: int | None = None
    within: WithinSE | None = None

    def __post_init__(self) -> None:
        good = isinstance(self.top, int) and not isinstance(self.top, bool) and 1 <= self.top <= _MOST
        if self.top is not None and not good:
            raise ConfigError(f"top={str(self.top)[:50]}: give a whole number from 1 to {_MOST:,}")
        if self.within is not None and (not self.keys or not isinstance(self.keys[0].value, Metric)):
            raise ConfigError("within one standard error of what? rank by a metric first, as in --max val_accuracy")


class Selection:
    """Checkpoints that were selected; each iteration asks the catalogue anew, and reads as far as it is followed.

    Args:
        engine: one that reads.
        wish: what is wanted.
        make: makes a checkpoint of a row of the catalogue.
        window: see ``Search``.
    """

    def __init__(self, engine: Engine, wish: Wish, make: Callable[[Any], Checkpoint], window: int = WINDOW) -> None:
        self._engine, self._wish, self._make, self._window = engine, wish, make, window
        with self._asked():  # which refuses names that do not exist
            pass

    @contextmanager
    def _asked(self) -> Iterator["_Question"]:
        """A question to the catalogue as it is now."""
        with translated(self._engine.url), self._engine.connect() as connection:
            columns = Columns.read(connection)
            _check_metrics(self._wish, columns)
            yield _Question(connection, Translator(columns, connection.dialect.name), columns, self._wish, self._window)

    def __iter__(self) -> Iterator[Checkpoint]:
        yield from self._ranked(self._wish.top)

    def first(self) -> Checkpoint:
        """The first checkpoint.

        Raises:
            NotFoundError: there is none.
        """
        for checkpoint in self._ranked(1):
            return checkpoint
        raise NotFoundError(f"no checkpoint matches {self._wish.query.text or 'this'}")

    def count(self) -> int:
        """How many checkpoints there are in the selection; counts them all."""
        with self._asked() as question:
            found = question.count()
        return found if self._wish.top is None else min(found, self._wish.top)

    def why(self) -> Why:
        """What each clause removed, and what would have come next; looks at every checkpoint."""
        with self._asked() as question:
            candidates, clauses = question.told()
        left, top = clauses[-1].left if clauses else candidates, self._wish.top
        chosen = left if top is None else min(left, top)
        runners = () if top is None else tuple(islice(self._ranked(top + _RUNNERS_UP), top, None))
        return Why(candidates=candidates, clauses=clauses, chosen=chosen, runners_up=runners)

    def _ranked(self, limit: int | None) -> Iterator[Checkpoint]:
        """The keys at once, what belongs to them as it is asked for.

        No transaction stays open meanwhile: one would keep SQLite's log from ending, and lock the table in PostgreSQL.
        """
        with self._asked() as question:
            born, keys = question.born(), question.keys(limit)
        for begin in range(0, len(keys), _CHUNK):
            with self._asked() as question:
                if question.born() != born:
                    raise TransientStoreError("the catalogue was made anew while it was being read; select again")
                rows = question.rows(keys[begin : begin + _CHUNK])
            yield from map(self._make, rows)


@dataclass(frozen=True, slots=True)
class _Question:
    """One transaction that reads; see ``Selection``."""

    connection: Connection
    sql: Translator
    columns: Columns
    wish: Wish
    window: int

    def born(self) -> int:
        """Another number when keys mean something else."""
        return int(self.connection.execute(select(schema.meta.c.born)).scalar_one())

    def count(self) -> int:
        """How many match."""
        conditions = self._search().conditions()
        return self.connection.scalar(select(func.count()).select_from(self.columns.table).where(*conditions)) or 0

    def keys(self, limit: int | None) -> "array[int]":
        """The keys of what matches, in order."""
        return array("q", (row[0] for row in self._search().rows((self.sql.table.key,), limit)))

    def rows(self, keys: Sequence[int]) -> list[Any]:
        """What belongs to those of the keys that still exist, in their order."""
        table, details, runs = self.columns.table, schema.details, schema.runs
        moment = (table.c.sequence, table.c.epoch, table.c.step, table.c.size)
        columns = (table.c.key, runs.c.name.label("run"), *moment, details.c.id, details.c.name, details.c.record)
        joined = table.join(details, details.c.checkpoint == table.c.key).join(runs, runs.c.key == table.c.run)
        rows = self.connection.execute(select(*columns).select_from(joined).where(table.c.key.in_(list(keys))))
        known = {row.key: row for row in rows}
        return [known[key] for key in keys if key in known]

    def told(self) -> tuple[int, tuple[Clause, ...]]:
        """How many checkpoints there are, and what each clause does to them."""
        clauses = [(self.wish.query.quote(clause), self.sql.where(clause)) for clause in self.wish.query.clauses]
        clauses += [(f"{key.value.name} has a finite value", self.sql.finite(key.value)) for key in self.wish.keys]
        within = self._within()
        clauses += [] if within is None else [within]
        # for each row the first clause that does not hold, in one pass
        first: list[tuple[Expression, Any]] = []
        for number, (_, condition) in enumerate(clauses):
            first += [(condition.is_(None), literal(2 * number)), (not_(condition), literal(2 * number + 1))]
        place = case(*first, else_=literal(-1)) if first else literal(-1)
        grouped = select(place.label("place"), func.count()).select_from(self.columns.table).group_by("place")
        counts = {number: count for number, count in self.connection.execute(grouped).all()}  # noqa: C416 - rows
        left = candidates = sum(counts.values())
        told = []
        for number, (text, _) in enumerate(clauses):
            missing, wrong = counts.get(2 * number, 0), counts.get(2 * number + 1, 0)
            left -= missing + wrong
            told.append(Clause(text=text, removed=missing + wrong, missing=missing, left=left))
        return candidates, tuple(told)

    def _search(self) -> Search:
        within = self._within()
        keys = self.wish.keys if within is None else self.wish.keys[1:] or _EARLIEST
        more = () if within is None else (within[1],)
        return self._ranked(keys, more)

    def _ranked(self, keys: Sequence[Key], more: Sequence[Expression]) -> Search:
        return Search(self.connection, self.sql, self.wish.query.clauses, more, keys, self.window)

    def _within(self) -> tuple[str, Expression] | None:
        """What is as good as the best."""
        if self.wish.within is None:
            return None
        key = self.wish.keys[0]
        finite = [self.sql.finite(other.value) for other in self.wish.keys[1:]]
        value = self.sql.value(key.value)
        for best in self._ranked((key,), finite).rows((self.sql.table.key, value), 1):
            details = schema.details.c
            record = self.connection.scalar(select(details.record).where(details.checkpoint == best[0]))
            metrics = metrics_from_json(json.loads(record or "{}").get("metrics", {}))
            error = self.wish.within.error_of(best[1], metrics)
            text = f"{key.value.name} within one standard error ({error:.3g}) of the best ({best[1]:.6g})"
            return text, (value >= best[1] - error if key.mode == "max" else value <= best[1] + error)
        return None


def make_checkpoint(row: Any, path: Path | None) -> Checkpoint:
    """A checkpoint from what the catalogue holds."""
    record = json.loads(row.record)
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
        forks=tuple((after, before) for after, before in record["forks"]),
    )


def _check_metrics(wish: Wish, columns: Columns) -> None:
    """Refuse names that no checkpoint has, with near ones.

    Raises:
        NotFoundError: there is such a name.
    """
    for metric in wish.query.metrics():
        if metric.name not in columns.keys:
            raise NotFoundError(point(wish.query.text, metric.at, _unknown(metric.name, columns)))
    wanted = [key.value.name for key in wish.keys if isinstance(key.value, Metric)]
    if wish.within is not None and wish.within.needs is not None:
        wanted.append(wish.within.needs)
    for name in wanted:
        if name not in columns.keys:
            raise NotFoundError(_unknown(name, columns))


def _unknown(name: str, columns: Columns) -> str:
    names = [*columns.keys, *FIELDS]
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    found = [one for one in names if one.casefold() == name.casefold()] or found
    odd = [one for one in found if not one.replace(".", "_").isidentifier()]
    how = f" (write metric('{odd[0]}'))" if odd else ""
    some = ", ".join(sorted(columns.keys)[:20]) or "none"
    meant = f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
    return f"no checkpoint has a metric {name!r}{meant}{how}; metrics: {some}"
