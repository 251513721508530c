"""Translate the tree of a query to SQL: every value is a parameter, every name one of ours."""

import operator
import sys
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.operators import custom_op

from peakpoint.catalogue import schema
from peakpoint.catalogue.query import tree
from peakpoint.catalogue.query.tree import Field, Metric, Setting
from peakpoint.catalogue.schema import Columns

Expression = sa.ColumnElement[Any]
_PLUS: custom_op[Any] = custom_op("+")
_COMPARED: dict[str, Callable[[Any, Any], Expression]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_COMPUTED: dict[str, Callable[[Any, Any], Expression]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: sa.cast(a, sa.Double) / sa.func.nullif(sa.cast(b, sa.Double), 0.0),
    "%": lambda a, b: a % sa.func.nullif(b, 0),
}
_EXACT = 2**53  # whole numbers below are the same as a float


class Translator:
    """Translates for one database, as of one moment.

    Args:
        columns: which metric is where.
        dialect: the database's.
        indexed: whether the database may use its indexes.
        of_runs: whether conditions are about runs instead of checkpoints.

    Attributes:
        sqlite: whether the database is SQLite.
        table: the columns of checkpoints.
    """

    def __init__(self, columns: Columns, dialect: str, *, indexed: bool = True, of_runs: bool = False) -> None:
        self._columns, self.table = columns, columns.table.c
        self.sqlite = dialect == "sqlite"
        self._dialect, self._indexed, self._of_runs = dialect, indexed, of_runs

    def without_indexes(self) -> "Translator":
        """The same, but so that SQLite passes over all rows."""
        return Translator(self._columns, self._dialect, indexed=False)

    def _column(self, name: str) -> Expression:
        """A column; with a sign before it SQLite uses no index of it (https://sqlite.org/optoverview.html, 2)."""
        column: Expression = self.table[name]
        return column if self._indexed else sa.UnaryExpression(column, operator=_PLUS, type_=column.type)

    def holds(self, condition: tree.Condition) -> Expression:
        """A condition for a WHERE: unknown is false there, so that what is about settings alone need ask few runs."""
        match condition:
            case _ if tree.is_of_run(condition):
                return self._of_run_where(condition)
            case tree.All(conditions=conditions):
                return sa.and_(*map(self.holds, conditions))
            case tree.Any(conditions=conditions):
                return sa.or_(*map(self.holds, conditions))
            case _:
                return self.where(condition)

    def _of_run_where(self, condition: tree.Condition) -> Expression:
        """Whether a checkpoint is of a run of which a condition about settings holds."""
        runs = Translator(self._columns, self._dialect, of_runs=True).where(condition)
        return self._column("run").in_(sa.select(schema.runs.c.key).where(runs))

    def where(self, condition: tree.Condition) -> Expression:
        """A condition: true, false or unknown."""
        if not self._of_runs and tree.is_of_run(condition):
            negated = tree.Not(condition, condition.span)
            return sa.case((self._of_run_where(condition), sa.true()), (self._of_run_where(negated), sa.false()))
        return self._of_rows(condition)

    def _of_rows(self, condition: tree.Condition) -> Expression:
        """A condition that each row is asked."""
        match condition:
            case tree.All(conditions=conditions):
                return sa.and_(*map(self.where, conditions))
            case tree.Any(conditions=conditions):
                return sa.or_(*map(self.where, conditions))
            case tree.Not(condition=inner):
                return sa.not_(self.where(inner))
            case tree.Flag(field=field):
                return self._column(field.name).is_(True) if isinstance(field, Field) else self.value(field) != 0
            case tree.Has(value=value):
                return self._has(value)
            case tree.Like(field=field, pattern=pattern):
                return self._texts(field, lambda column: self._like(column, pattern))
            case tree.Among(value=Field() | Setting() as field, options=options) if isinstance(options[0].value, str):
                return self._texts(field, lambda column: column.in_([option.value for option in options]))
            case tree.Among(value=value, options=options):
                numbers: Expression = sa.bindparam(
                    None, [option.value for option in options], expanding=True, type_=sa.Double()
                )
                return self.value(value).in_(numbers)
            case tree.Compare():
                return self._compare(condition)

    def _has(self, value: Field | Metric | Setting) -> Expression:
        if isinstance(value, Setting):
            return self._setting(value, "text").is_not(None)
        if isinstance(value, Field) and value.name in ("alias", "tag"):
            return self._texts(value, lambda _: sa.true())
        return sa.true() if _is_text(value) else self.value(value).is_not(None)

    def _compare(self, condition: tree.Compare) -> Expression:
        field, constant = condition.left, condition.right
        if isinstance(field, tree.Constant):
            field, constant = constant, field
        if isinstance(constant, tree.Constant) and isinstance(constant.value, str):  # only equality comes with a text
            assert isinstance(field, Field | Setting)
            equal = self._texts(field, lambda column: column == constant.value)
            return equal if condition.op == "==" else sa.not_(equal)
        return _COMPARED[condition.op](self.value(condition.left), self.value(condition.right))

    def _setting(self, setting: Setting, column: str) -> Expression:
        """The text or the value of a setting; NULL where the run has none."""
        rows = schema.settings.c
        run = schema.runs.c.key if self._of_runs else self.table.run
        is_setting = (rows.run == run) & (rows.name == setting.name) & (rows.number == 0)
        return sa.select(rows[column]).where(is_setting).scalar_subquery()

    def _texts(self, field: Field | Setting, test: Any) -> Expression:
        """Whether a text of a checkpoint, which is in another table, passes a test."""
        if isinstance(field, Setting):
            passes: Expression = test(self._setting(field, "text"))
            return passes
        if field.name == "run":
            return self._column("run").in_(sa.select(schema.runs.c.key).where(test(schema.runs.c.name)))
        if field.name == "reason":
            return self.table.key.in_(sa.select(schema.reasons.c.checkpoint).where(test(schema.reasons.c.reason)))
        if field.name == "alias":
            return self.table.key.in_(self._pointed_at(test))
        if field.name == "tag":
            rows = schema.settings.c
            return self._column("run").in_(sa.select(rows.run).where(rows.name == "tag", test(rows.text)))
        column = schema.details.c[field.name]
        return self.table.key.in_(sa.select(schema.details.c.checkpoint).where(test(column)))

    def _pointed_at(self, test: Any) -> sa.Select[Any]:
        """The keys of what aliases point at whose names pass a test; an id alone may be that of a copied run, too."""
        checkpoints, details, runs, aliases = schema.checkpoints, schema.details, schema.runs, schema.aliases
        joined = aliases.join(details, details.c.id == aliases.c.checkpoint)
        joined = joined.join(checkpoints, checkpoints.c.key == details.c.checkpoint)
        joined = joined.join(runs, (runs.c.key == checkpoints.c.run) & (runs.c.name == aliases.c.run))
        return sa.select(checkpoints.c.key).select_from(joined).where(test(aliases.c.name))

    def _like(self, column: Expression, pattern: str) -> Expression:
        if self.sqlite:  # GLOB, as LIKE does not tell cases apart there
            return column.op("GLOB", is_comparison=True)(pattern.replace("[", "[[]"))
        for character in "\\%_":
            pattern = pattern.replace(character, f"\\{character}")
        return column.like(pattern.replace("*", "%").replace("?", "_"), escape="\\")

    def value(self, value: tree.Value) -> Expression:
        """A number."""
        match value:
            case tree.Constant():
                return _literal(value.value)
            case Field(name=name):
                return self._column(name)
            case Setting():
                return self._setting(value, "value")
            case Metric(name=name):
                column = self._columns.column(name)
                if column is not None:
                    return self._column(column.name)
                rare = schema.rarities.c
                is_value = (rare.checkpoint == self.table.key) & (rare.metric == self._columns.keys[name])
                return sa.select(rare.value).where(is_value).scalar_subquery()
            case tree.Arithmetic(op="neg", left=operand):
                return -self.value(operand)
            case tree.Arithmetic(op="abs", left=operand):
                return sa.func.abs(self.value(operand))
            case tree.Arithmetic(op=op, left=first, right=second):
                assert second is not None
                return self._not_nan(_COMPUTED[op](self.value(first), self.value(second)))

    def _not_nan(self, value: Expression) -> Expression:
        """NaN is missing; SQLite sees it so by itself, PostgreSQL takes it for the largest number."""
        if self.sqlite:
            return value
        return sa.func.nullif(sa.cast(value, sa.Double), sa.cast(sa.literal("NaN"), sa.Double))

    def finite(self, value: Field | Metric) -> Expression:
        """Whether something can be ranked by: NaN and infinities never win."""
        column = self.value(value)
        if isinstance(value, Field):
            return column.is_not(None)
        return column.between(-sys.float_info.max, sys.float_info.max)


def _is_text(value: tree.Value) -> bool:
    return isinstance(value, Field) and tree.FIELDS[value.name] == "text"


def _literal(value: float | str) -> Expression:
    """A number as a parameter; a whole one as such, since indexes of PostgreSQL tell integers from others."""
    if isinstance(value, float) and abs(value) < _EXACT and value.is_integer():
        return sa.literal(int(value), sa.BigInteger())
    return sa.literal(value, sa.Double())
