"""What a selection finds, lazily, and why."""

import difflib
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, case, func, literal, not_, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.database import DamagedError, read_json, translated
from peakpoint.catalogue.query import FIELDS, Field, Metric, Query, point
from peakpoint.catalogue.ranking import RankingKey, WithinSE
from peakpoint.catalogue.schema import Columns
from peakpoint.catalogue.search import CANDIDATE_LIMIT, Search
from peakpoint.catalogue.sql import Expression, Translator
from peakpoint.catalogue.verification import CatalogueMismatch
from peakpoint.errors import ConfigError, NotFoundError, PeakpointWarning, TransientStoreError
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.metrics import metrics_from_json

_RUNNERS_UP = 3
_CHUNK = 200
_MOST = 10**9
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
        chosen: how many were chosen.
        runners_up: the next ones in order, a few.
    """

    candidates: int
    clauses: tuple[Clause, ...]
    chosen: int
    runners_up: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionQuery:
    """What is to be selected.

    Attributes:
        query: which checkpoints.
        keys: by what they are ranked; the newest come first without any.
        top: how many at most; None for all.
        within: what counts as equally good.
    """

    query: Query
    keys: tuple[RankingKey, ...] = ()
    top: int | None = None
    within: WithinSE | None = None

    def __post_init__(self) -> None:
        good = isinstance(self.top, int) and not isinstance(self.top, bool) and 1 <= self.top <= _MOST
        if self.top is not None and not good:
            raise ConfigError(f"top={str(self.top)[:50]}: give a whole number from 1 to {_MOST:,}")
        if self.within is not None and (not self.keys or not isinstance(self.keys[0].value, Metric)):
            raise ConfigError("within one standard error of what? rank by a metric first, as in --max val_accuracy")


class SelectionSource(Protocol):
    """What a selection asks of the repository's files."""

    @property
    def unread(self) -> Mapping[str, str]:
        """What cannot be read, and why: runs, by name, and checkpoints, by ref."""

    @property
    def unread_aliases(self) -> Mapping[str, str]:
        """Aliases that cannot be read, and why."""

    def checkpoint(self, row: Any) -> Checkpoint:
        """A checkpoint, of what the catalogue holds."""

    def differences(self, connection: Connection, columns: Columns, rows: Sequence[Any]) -> list[CatalogueMismatch]:
        """What rows say otherwise than the manifests."""

    def mend(self, born: int, turn: int, differences: Sequence[CatalogueMismatch]) -> None:
        """Make the catalogue say what the files say; with each turn in vain more of it is made anew.

        Raises:
            CorruptError: nothing helps.
        """


class Selection:
    """Checkpoints that were selected; each iteration asks the catalogue anew, and reads as far as it is followed.

    Each is compared with its manifest before it is given out. Where the catalogue says otherwise, it is mended and
    asked again.

    Args:
        engine: one that reads.
        wish: what is wanted.
        files: what the catalogue is made from.
        candidate_limit: see ``Search``.
    """

    def __init__(
        self, engine: Engine, wish: SelectionQuery, files: SelectionSource, candidate_limit: int = CANDIDATE_LIMIT
    ) -> None:
        self._engine, self._wish, self._files, self._candidate_limit = engine, wish, files, candidate_limit
        with self._asked():  # which refuses names that do not exist
            pass

    @property
    def unread(self) -> Mapping[str, str]:
        """What is left out because it cannot be read, and why: runs, by name, checkpoints, by ref, and aliases, by ref.

        As of the last look at the files: ask after the checkpoints. Aliases are told where the condition is about them.
        """
        aliases = self._files.unread_aliases if self._wish.query.asks_for_aliases() else {}
        return {**self._files.unread, **{f"@{alias}": why for alias, why in aliases.items()}}

    @contextmanager
    def _asked(self) -> Iterator["_Question"]:
        """A question to the catalogue as it is now."""
        with translated(self._engine.url), self._engine.connect() as connection:
            columns = Columns.read(connection)
            _check_metrics(self._wish, columns)
            translator = Translator(columns, connection.dialect.name)
            left_out = [name for name in self._files.unread if "/" not in name]
            yield _Question(connection, translator, columns, self._wish, self._candidate_limit, left_out)

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

    def why(self) -> Explanation:
        """What each clause removed, and what would have come next; looks at every checkpoint."""
        with self._asked() as question:
            candidates, clauses = question.told()
        left, top = clauses[-1].left if clauses else candidates, self._wish.top
        chosen = left if top is None else min(left, top)
        runners = () if top is None else tuple(islice(self._ranked(top + _RUNNERS_UP), top, None))
        return Explanation(candidates=candidates, clauses=clauses, chosen=chosen, runners_up=runners)

    def _ranked(self, limit: int | None) -> Iterator[Checkpoint]:
        """The keys at once, what belongs to them as it is asked for.

        No transaction stays open meanwhile: one would keep SQLite's log from ending, and lock the table in PostgreSQL.
        """
        born, begin, turn = -1, 0, 0
        keys: array[int] | None = None
        while keys is None or begin < len(keys):
            chosen: list[Checkpoint] = []
            try:
                with self._asked() as question:
                    if keys is None:
                        born, keys = question.born(), question.keys(limit)
                    elif question.born() != born:
                        raise TransientStoreError("the catalogue was made anew while it was being read; select again")
                    rows = question.rows(keys[begin : begin + _CHUNK])
                    differences = self._differences(question, rows, len(keys) if begin == 0 else None)
                    chosen += [] if differences else map(self._files.checkpoint, rows)
            except DamagedError as error:
                differences = [CatalogueMismatch("", str(error))]
            if differences:
                self._files.mend(born, turn, differences)
                turn, keys = turn + 1, keys if begin else None
            else:
                begin, turn = begin + _CHUNK, 0
            yield from chosen

    def _differences(self, question: "_Question", rows: Sequence[Any], all_keys: int | None) -> list[CatalogueMismatch]:
        """What the rows say otherwise than the files; of the first ones also how many there are, and what is best.

        Args:
            question: that they answer.
            rows: some of them.
            all_keys: how many keys there are; None where rows may have gone since.
        """
        basis = [] if all_keys is None else question.basis()
        looked_at = list({row.key: row for row in (*basis, *rows)}.values())
        differences = self._files.differences(question.connection, question.columns, looked_at)
        if all_keys is not None and len(rows) != min(all_keys, _CHUNK):
            differences.append(CatalogueMismatch("", "a checkpoint has no name or no run"))
        return differences


@dataclass(frozen=True, slots=True)
class _Question:
    """One transaction that reads; see ``Selection``."""

    connection: Connection
    sql: Translator
    columns: Columns
    wish: SelectionQuery
    candidate_limit: int
    left_out: Sequence[str]  # runs

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
        table, details, runs, noted = self.columns.table, schema.details, schema.runs, schema.noted
        owner = (runs.c.key.label("owner"), runs.c.name.label("run"))
        moment = (table.c.sequence, table.c.epoch, table.c.step, table.c.size)
        columns = (table.c.key, *owner, *moment, details.c.id, details.c.name, details.c.record)
        joined = table.join(details, details.c.checkpoint == table.c.key).join(runs, runs.c.key == table.c.run)
        joined = joined.outerjoin(noted, (noted.c.run == table.c.run) & (noted.c.checkpoint == details.c.id))
        wanted = select(*columns, noted.c.metrics, noted.c.pinned).select_from(joined)
        rows = self.connection.execute(wanted.where(table.c.key.in_(list(keys))))
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

    def basis(self) -> list[Any]:
        """The best, from which it follows what is as good."""
        return [] if self.wish.within is None else self.rows([row[0] for row in self._best()])

    def _best(self) -> Sequence[Any]:
        """The key and the value of the best."""
        key = self.wish.keys[0]
        finite = [self.sql.finite(other.value) for other in self.wish.keys[1:]]
        return self._ranked((key,), finite).rows((self.sql.table.key, self.sql.value(key.value)), 1)

    def _search(self) -> Search:
        within = self._within()
        keys = self.wish.keys if within is None else self.wish.keys[1:] or _EARLIEST
        more = () if within is None else (within[1],)
        return self._ranked(keys, more)

    def _ranked(self, keys: Sequence[RankingKey], more: Sequence[Expression]) -> Search:
        if self.left_out:
            unread = select(schema.runs.c.key).where(schema.runs.c.name.in_(self.left_out))
            more = (*more, self.columns.table.c.run.not_in(unread))
        return Search(self.connection, self.sql, self.wish.query.clauses, more, keys, self.candidate_limit)

    def _within(self) -> tuple[str, Expression] | None:
        """What is as good as the best."""
        if self.wish.within is None:
            return None
        key = self.wish.keys[0]
        value = self.sql.value(key.value)
        for best in self._best():
            details = schema.details.c
            record = self.connection.scalar(select(details.record).where(details.checkpoint == best[0]))
            metrics = metrics_from_json(read_json(record or "{}").get("metrics", {}))
            error = self.wish.within.error_of(best[1], metrics)
            text = f"{key.value.name} within one standard error ({error:.3g}) of the best ({best[1]:.6g})"
            return text, (value >= best[1] - error if key.mode == "max" else value <= best[1] + error)
        return None


def make_checkpoint(row: Any, path: Path | None) -> Checkpoint:
    """A checkpoint from what the catalogue holds."""
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
        forks=tuple((after, before) for after, before in record["forks"]),
    )


def _check_metrics(wish: SelectionQuery, columns: Columns) -> None:
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


def warn_of_unread(unread: Mapping[str, str]) -> None:
    """Warn of what is left out of selections."""
    for name, why in unread.items():
        kind = "checkpoint" if "/" in name else "run"
        warnings.warn(f"{kind} {name!r} is not considered: {why}", PeakpointWarning, stacklevel=4)
