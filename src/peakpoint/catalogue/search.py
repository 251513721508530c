"""Find the first few of many quickly in SQLite, whose own planner knows nothing of how values are distributed.

The best rows by the first key, a few thousand, are looked at first: where as many of them match as are asked for, they
are the answer, since every other row ranks lower. If not, and one clause alone leaves few rows, these are looked at
through its index. Otherwise one pass over the whole table is the fastest there is. Left to itself SQLite goes through
an index with a look into the table for every row, which takes ten times as long when hardly anything matches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, func, select

from peakpoint.catalogue.query import Condition, Field
from peakpoint.catalogue.ranking import RankingKey
from peakpoint.catalogue.sql import Expression, Translator

CANDIDATE_LIMIT = 4000  # rows that take a few milliseconds
_NEWEST = RankingKey(Field("created", (0, 0)), "max")


@dataclass(frozen=True, slots=True)
class Search:
    """Rows in order.

    Attributes:
        connection: where.
        sql: translates.
        clauses: what must hold.
        further: conditions in SQL that must hold, too.
        keys: by what rows are ranked; the newest first without any.
        candidate_limit: how many rows are few.
    """

    connection: Connection
    sql: Translator
    clauses: Sequence[Condition]
    further: Sequence[Expression]
    keys: Sequence[RankingKey]
    candidate_limit: int

    def conditions(self) -> list[Expression]:
        """All that must hold."""
        return [*map(self.sql.holds, self.clauses), *(self.sql.finite(key.value) for key in self.keys), *self.further]

    def rows(self, columns: Sequence[Expression], limit: int | None) -> Sequence[Any]:
        """The rows in order."""
        return self.connection.execute(self._statement(columns, limit)).all()

    def _statement(self, columns: Sequence[Expression], limit: int | None) -> Select[Any]:
        ranked = select(*columns).order_by(*self._order(self.sql)).limit(limit)
        if limit is None or limit > self.candidate_limit // 4 or not self.sql.sqlite:
            return ranked.where(*self.conditions())
        scan = self.sql.without_indexes()
        clauses = [scan.holds(clause) for clause in self.clauses]
        further = [*(scan.finite(key.value) for key in self.keys), *self.further]
        best = self._best()
        if best is not None:
            among_best = ranked.where(best, *clauses, *further)
            count = select(func.count()).select_from(among_best.subquery())
            if self.connection.scalar(count) == limit:
                return among_best
        fewest = self._fewest()
        if fewest is not None:
            clauses[fewest] = self.sql.holds(self.clauses[fewest])
        return select(*columns).order_by(*self._order(scan)).limit(limit).where(*clauses, *further)

    def _order(self, sql: Translator) -> list[Expression]:
        keys = self.keys or (_NEWEST,)
        order = [sql.value(key.value).desc() if key.mode == "max" else sql.value(key.value).asc() for key in keys]
        table = sql.table
        return [*order, table.key.desc()] if not self.keys else [*order, table.created.asc(), table.key.asc()]

    def _best(self) -> Expression | None:
        """What the candidates, the best rows by the first key, have in common; None when there are not that many."""
        key = (*self.keys, _NEWEST)[0]
        value = self.sql.value(key.value)
        statement = select(value).where(self.sql.finite(key.value))
        ordered = statement.order_by(value.desc() if key.mode == "max" else value.asc())
        edge = self.connection.scalar(ordered.offset(self.candidate_limit - 1).limit(1))
        if edge is None:
            return None
        inside: Expression = value >= edge if key.mode == "max" else value <= edge
        return inside

    def _fewest(self) -> int | None:
        """The number of the clause that leaves the fewest rows, if these are few."""
        counts = {}
        for number, clause in enumerate(self.clauses):
            rows = select(self.sql.table.key).where(self.sql.holds(clause)).limit(self.candidate_limit).subquery()
            counts[number] = self.connection.scalar(select(func.count()).select_from(rows)) or 0
        fewest = min(counts, key=lambda number: counts[number], default=None)
        return fewest if fewest is not None and counts[fewest] < self.candidate_limit else None
