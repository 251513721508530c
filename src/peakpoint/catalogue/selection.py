"""What a selection finds, lazily, and why."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, case, func, literal, not_, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.database import DamagedError, read_json, translated
from peakpoint.catalogue.query import FIELDS, Field, Metric, point
from peakpoint.catalogue.ranking import RankingKey, SelectionQuery
from peakpoint.catalogue.schema import Columns
from peakpoint.catalogue.search import Search
from peakpoint.catalogue.sql import Expression, Translator
from peakpoint.catalogue.verification import CatalogueMismatch
from peakpoint.errors import NotFoundError, TransientStoreError
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.metrics import metrics_from_json
from peakpoint.format.names import did_you_mean, listing, near_names_of
from peakpoint.format.settings import SETTING

_RUNNERS_UP = 3
_CHUNK = 200
_EARLIEST = (RankingKey(Field("step", (0, 0)), "min"),)


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
class Explanation:
    """How a selection came about.

    Attributes:
        candidates: all checkpoints that there are.
        clauses: what each removed, in order; the last ones are those of ranking.
        chosen: how many were selected.
        runners_up: the next ones in order, a few.
    """

    candidates: int
    clauses: tuple[Clause, ...]
    chosen: int
    runners_up: tuple[Checkpoint, ...]


class SelectionSource(Protocol):
    """The ``Catalogue``, as far as a selection needs it."""

    candidate_limit: int

    @property
    def unread(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def unread_aliases(self) -> Mapping[str, str]: ...  # noqa: D102
    def checkpoint(self, row: Any) -> Checkpoint: ...  # noqa: D102
    def compare_rows(  # noqa: D102
        self, connection: Connection, columns: Columns, rows: Sequence[Any]
    ) -> list[CatalogueMismatch]: ...
    def repair(self, birth: int, attempt: int, mismatches: Sequence[CatalogueMismatch]) -> None: ...  # noqa: D102


class Selection:
    """Checkpoints that were selected; each iteration asks the catalogue anew, and reads as far as it is followed.

    Each is compared with its manifest before it is given out. Where the catalogue says otherwise, it is repaired and
    asked again.

    Args:
        engine: one that reads.
        request: what is to be selected.
        catalogue: which.
    """

    def __init__(self, engine: Engine, request: SelectionQuery, catalogue: SelectionSource) -> None:
        self._engine, self._request, self._catalogue = engine, request, catalogue
        with self._reader():  # which refuses names that do not exist
            pass

    @property
    def unread(self) -> Mapping[str, str]:
        """What is left out because it cannot be read, and why: runs, by name, checkpoints, by ref, and aliases, by ref.

        As of the last look at the files: ask after the checkpoints. Aliases are told where the condition is about them.
        """
        aliases = self._catalogue.unread_aliases if self._request.query.asks_for_aliases() else {}
        return {**self._catalogue.unread, **{f"@{alias}": why for alias, why in aliases.items()}}

    @contextmanager
    def _reader(self) -> Iterator["_SelectionReader"]:
        """A transaction that reads the catalogue as it is now."""
        with translated(self._engine.url), self._engine.connect() as connection:
            columns = Columns.read(connection)
            _check_metrics(self._request, columns, connection)
            _check_settings(self._request, connection)
            translator = Translator(columns, connection.dialect.name)
            left_out = [name for name in self._catalogue.unread if "/" not in name]
            yield _SelectionReader(
                connection, translator, columns, self._request, self._catalogue.candidate_limit, left_out
            )

    def __iter__(self) -> Iterator[Checkpoint]:
        yield from self._ranked(self._request.top)

    def first(self) -> Checkpoint:
        """The first checkpoint.

        Raises:
            NotFoundError: there is none.
        """
        for checkpoint in self._ranked(1):
            return checkpoint
        condition = self._request.query.text
        raise NotFoundError(f"no checkpoint matches {condition}" if condition else "there is no checkpoint to select")

    def count(self) -> int:
        """How many checkpoints there are in the selection; counts them all."""
        with self._reader() as reader:
            count = reader.count()
        return count if self._request.top is None else min(count, self._request.top)

    def why(self) -> Explanation:
        """What each clause removed, and what would have come next; looks at every checkpoint."""
        with self._reader() as reader:
            candidates, clauses = reader.clauses()
        matching, top = clauses[-1].left if clauses else candidates, self._request.top
        count = matching if top is None else min(matching, top)
        runners_up = () if top is None else tuple(islice(self._ranked(top + _RUNNERS_UP), top, None))
        return Explanation(candidates=candidates, clauses=clauses, chosen=count, runners_up=runners_up)

    def _ranked(self, limit: int | None) -> Iterator[Checkpoint]:
        """The keys at once, what belongs to them as it is asked for.

        No transaction stays open meanwhile: one would keep SQLite's log from ending, and lock the table in PostgreSQL.
        """
        birth, begin, attempt = -1, 0, 0
        keys: array[int] | None = None
        while keys is None or begin < len(keys):
            checkpoints: list[Checkpoint] = []
            try:
                with self._reader() as reader:
                    if keys is None:
                        birth, keys = reader.birth(), reader.keys(limit)
                    elif reader.birth() != birth:
                        raise TransientStoreError("the catalogue was made anew while it was being read; select again")
                    rows = reader.rows(keys[begin : begin + _CHUNK])
                    mismatches = self._mismatches(reader, rows, len(keys) if begin == 0 else None)
                    checkpoints += [] if mismatches else map(self._catalogue.checkpoint, rows)
            except DamagedError as error:
                mismatches = [CatalogueMismatch("", str(error))]
            if mismatches:
                self._catalogue.repair(birth, attempt, mismatches)
                attempt, keys = attempt + 1, keys if begin else None
            else:
                begin, attempt = begin + _CHUNK, 0
            yield from checkpoints

    def _mismatches(
        self, reader: "_SelectionReader", rows: Sequence[Any], all_keys: int | None
    ) -> list[CatalogueMismatch]:
        """What the rows say otherwise than the files; of the first ones also how many there are, and what is best.

        Args:
            reader: that has read them.
            rows: some of them.
            all_keys: how many keys there are; None where rows may have gone since.
        """
        basis = [] if all_keys is None else reader.basis()
        compared = list({row.key: row for row in (*basis, *rows)}.values())
        mismatches = self._catalogue.compare_rows(reader.connection, reader.columns, compared)
        if all_keys is not None and len(rows) != min(all_keys, _CHUNK):
            mismatches.append(CatalogueMismatch("", "a checkpoint has no name or no run"))
        return mismatches


@dataclass(frozen=True, slots=True)
class _SelectionReader:
    """One transaction that reads; see ``Selection``."""

    connection: Connection
    sql: Translator
    columns: Columns
    request: SelectionQuery
    candidate_limit: int
    left_out: Sequence[str]  # runs

    def birth(self) -> int:
        """Another number when keys mean something else."""
        return int(self.connection.execute(select(schema.meta.c.born)).scalar_one())

    def count(self) -> int:
        """How many match."""
        conditions = self._search().conditions()
        return self.connection.scalar(select(func.count()).select_from(self.columns.table).where(*conditions)) or 0

    def keys(self, limit: int | None) -> "array[int]":
        """The keys of what matches, in order."""
        try:
            return array("q", (row[0] for row in self._search().rows((self.sql.table.key,), limit)))
        except (OverflowError, TypeError) as error:  # of an index with a flipped bit
            raise DamagedError(f"the key of a checkpoint is no number: {error}") from error

    def rows(self, keys: Sequence[int]) -> list[Any]:
        """What belongs to those of the keys that still exist, in their order."""
        table, details, runs, notes = self.columns.table, schema.details, schema.runs, schema.notes
        owner = (runs.c.key.label("owner"), runs.c.name.label("run"))
        moment = (table.c.sequence, table.c.epoch, table.c.step, table.c.size)
        columns = (table.c.key, *owner, *moment, details.c.id, details.c.name, details.c.record)
        joined = table.join(details, details.c.checkpoint == table.c.key).join(runs, runs.c.key == table.c.run)
        joined = joined.outerjoin(notes, (notes.c.run == table.c.run) & (notes.c.checkpoint == details.c.id))
        statement = select(*columns, notes.c.metrics, notes.c.pinned).select_from(joined)
        rows = {row.key: row for row in self.connection.execute(statement.where(table.c.key.in_(list(keys))))}
        return [rows[key] for key in keys if key in rows]

    def clauses(self) -> tuple[int, tuple[Clause, ...]]:
        """How many checkpoints there are, and what each clause does to them."""
        query, within = self.request.query, self._within()
        conditions = [(query.quote(clause), self.sql.where(clause)) for clause in query.clauses]
        finite = [(f"{key.value.name} has a finite value", self.sql.finite(key.value)) for key in self.request.keys]
        conditions += finite if within is None else [*finite, within]
        # for each row the first clause that does not hold, in one pass
        cases: list[tuple[Expression, Any]] = []
        for number, (_, condition) in enumerate(conditions):
            cases += [(condition.is_(None), literal(2 * number)), (not_(condition), literal(2 * number + 1))]
        failed = (case(*cases, else_=literal(-1)) if cases else literal(-1)).label("failed")
        grouped = select(failed, func.count()).select_from(self.columns.table).group_by("failed")
        counts = {number: count for number, count in self.connection.execute(grouped).all()}  # noqa: C416 - rows
        remaining = candidates = sum(counts.values())
        clauses = []
        for number, (text, _) in enumerate(conditions):
            missing = counts.get(2 * number, 0)
            removed = missing + counts.get(2 * number + 1, 0)
            remaining -= removed
            clauses.append(Clause(text=text, removed=removed, missing=missing, left=remaining))
        return candidates, tuple(clauses)

    def basis(self) -> list[Any]:
        """The best, from which it follows what is as good."""
        return [] if self.request.within is None else self.rows([row[0] for row in self._best()])

    def _best(self) -> Sequence[Any]:
        """The key and the value of the best."""
        first, *further = self.request.keys
        finite = [self.sql.finite(key.value) for key in further]
        return self._ranked((first,), finite).rows((self.sql.table.key, self.sql.value(first.value)), 1)

    def _search(self) -> Search:
        within, keys = self._within(), self.request.keys
        return self._ranked(keys, ()) if within is None else self._ranked(keys[1:] or _EARLIEST, (within[1],))

    def _ranked(self, keys: Sequence[RankingKey], conditions: Sequence[Expression]) -> Search:
        if self.left_out:
            unread = select(schema.runs.c.key).where(schema.runs.c.name.in_(self.left_out))
            conditions = (*conditions, self.columns.table.c.run.not_in(unread))
        return Search(self.connection, self.sql, self.request.query.clauses, conditions, keys, self.candidate_limit)

    def _within(self) -> tuple[str, Expression] | None:
        """What is as good as the best."""
        if self.request.within is None:
            return None
        key = self.request.keys[0]
        value = self.sql.value(key.value)
        for best_key, best in self._best():
            details = schema.details.c
            record = self.connection.scalar(select(details.record).where(details.checkpoint == best_key))
            metrics = metrics_from_json(read_json(record or "{}").get("metrics", {}))
            error = self.request.within.error_of(best, metrics)
            text = f"{key.value.name} within one standard error ({error:.3g}) of the best ({best:.6g})"
            return text, (value >= best - error if key.mode == "max" else value <= best + error)
        return None


def _check_metrics(request: SelectionQuery, columns: Columns, connection: Connection) -> None:
    """Refuse names that no checkpoint has, with near ones.

    Raises:
        NotFoundError: there is such a name.
    """
    for metric in request.query.metrics():
        if metric.name not in columns.keys:
            message = _unknown(metric.name, columns)
            if SETTING + metric.name in _setting_names(connection):
                message = f"no checkpoint has a metric {metric.name!r}; did you mean '{SETTING}{metric.name}'?"
            raise NotFoundError(point(request.query.text, metric.span, message))
    names = [key.value.name for key in request.keys if isinstance(key.value, Metric)]
    if request.within is not None and request.within.needs is not None:
        names.append(request.within.needs)
    for name in names:
        if name not in columns.keys:
            raise NotFoundError(_unknown(name, columns))


def _check_settings(request: SelectionQuery, connection: Connection) -> None:
    """Refuse settings that no run has, with near ones.

    Raises:
        NotFoundError: there is such a setting.
    """
    for setting in request.query.settings():
        names = _setting_names(connection)
        if setting.name not in names:
            settings = [name for name in names if name.startswith(SETTING)]
            message = f"no run has a setting {setting.name}{did_you_mean(setting.name, settings)}"
            existing = f"; settings: {listing(sorted(settings), 20) or 'none'}"
            raise NotFoundError(point(request.query.text, setting.span, message + existing))


def _setting_names(connection: Connection) -> Sequence[str]:
    return connection.execute(select(schema.settings.c.name).distinct()).scalars().all()


def _unknown(name: str, columns: Columns) -> str:
    names = [*columns.keys, *FIELDS]
    equal = [near for near in names if near.casefold() == name.casefold()]
    near_names = equal or near_names_of(name, names)
    quoted = [near for near in near_names if not near.replace(".", "_").isidentifier()]
    how = f" (write metric('{quoted[0]}'))" if quoted else ""
    metrics = ", ".join(sorted(columns.keys)[:20]) or "none"
    hint = f"; did you mean {' or '.join(map(repr, near_names))}?{how}" if near_names else f"; metrics: {metrics}"
    return f"no checkpoint has a metric {name!r}{hint}"
