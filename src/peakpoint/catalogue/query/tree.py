"""The meaning of a selection: a tree of frozen values."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, TypeVar

Kind = Literal["number", "text", "truth", "bytes", "time", "setting"]
Span = tuple[int, int]

FIELDS: dict[str, Kind] = {
    "run": "text",
    "name": "text",
    "id": "text",
    "reason": "text",
    "alias": "text",
    "tag": "text",
    "epoch": "number",
    "step": "number",
    "sequence": "number",
    "size": "bytes",
    "created": "time",
    "pinned": "truth",
    "archived": "truth",
    "whole": "truth",
}
"""What every checkpoint has; every other name is a setting or a metric. ``whole``: no part was dropped. ``reason``: any
of them; ``alias``: any that points at it now; ``tag``: any of its run."""
WHOLE_NUMBERS = frozenset({"epoch", "step", "sequence", "size"})


@dataclass(frozen=True, slots=True)
class Constant:
    """A number, a text or a time (seconds since 1970)."""

    value: float | str
    span: Span


@dataclass(frozen=True, slots=True)
class Field:
    """One of ``FIELDS``."""

    name: str
    span: Span


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, by its name."""

    name: str
    span: Span


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the run, by its name with ``config.`` before it: a text that may be a number, too."""

    name: str
    span: Span


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``left op right``; ``op`` is one of ``+ - * / %``. ``abs(x)`` and ``-x`` have no ``right``."""

    op: Literal["+", "-", "*", "/", "%", "abs", "neg"]
    left: "Value"
    right: "Value | None"
    span: Span


Value = Constant | Field | Metric | Setting | Arithmetic


@dataclass(frozen=True, slots=True)
class Compare:
    """``left op right``."""

    op: Literal["<", "<=", ">", ">=", "==", "!="]
    left: Value
    right: Value
    span: Span


@dataclass(frozen=True, slots=True)
class Among:
    """``value in (...)``."""

    value: Value
    options: tuple[Constant, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Like:
    """``field ~ pattern``: ``*`` stands for any characters, ``?`` for one; case counts."""

    field: Field | Setting
    pattern: str
    span: Span


@dataclass(frozen=True, slots=True)
class Has:
    """``has(name)``: whether there is a value that is not NaN."""

    value: Field | Metric | Setting
    span: Span


@dataclass(frozen=True, slots=True)
class Flag:
    """A field that is true or false by itself, or a setting: the number 0 is false."""

    field: Field | Setting
    span: Span


@dataclass(frozen=True, slots=True)
class Not:
    """``not condition``."""

    condition: "Condition"
    span: Span


@dataclass(frozen=True, slots=True)
class All:
    """Conditions joined by ``and``."""

    conditions: tuple["Condition", ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Any:
    """Conditions joined by ``or``."""

    conditions: tuple["Condition", ...]
    span: Span


Condition = Compare | Among | Like | Has | Flag | Not | All | Any


@dataclass(frozen=True, slots=True)
class Query:
    """A text that was read.

    Attributes:
        text: as it was given.
        condition: its meaning; None for an empty text, which every checkpoint matches.
    """

    text: str
    condition: Condition | None

    @property
    def clauses(self) -> tuple[Condition, ...]:
        """The conditions that must all hold, in their order."""
        if self.condition is None:
            return ()
        return self.condition.conditions if isinstance(self.condition, All) else (self.condition,)

    def quote(self, condition: Condition) -> str:
        """The part of the text that a condition was read from."""
        return " ".join(self.text[slice(*condition.span)].split())

    def metrics(self) -> Iterator[Metric]:
        """Every mention of a metric, in order."""
        yield from _mentions(self.condition, Metric)

    def settings(self) -> Iterator[Setting]:
        """Every mention of a setting, in order."""
        yield from _mentions(self.condition, Setting)

    def asks_for_aliases(self) -> bool:
        """Whether the answer depends on what aliases point at."""
        return any(field.name == "alias" for field in _mentions(self.condition, Field))


N = TypeVar("N", Field, Metric, Setting)


def _mentions(node: object, kind: type[N]) -> Iterator[N]:
    """Those of a kind in a node, or in anything that a node holds."""
    if isinstance(node, kind):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from _mentions(part, kind)
    elif is_dataclass(node):
        for field in fields(node):
            yield from _mentions(getattr(node, field.name), kind)


def is_of_run(condition: Condition) -> bool:
    """Whether it is about settings alone: then it holds for all checkpoints of a run, or for none."""
    names: list[object] = [*_mentions(condition, Field), *_mentions(condition, Metric)]
    return not names and any(True for _ in _mentions(condition, Setting))


def point(text: str, span: Span, message: str) -> str:
    """A message under the text, with a mark below the place that it is about.

    Example:
        >>> print(point("acc >> 1", (4, 6), "not understood"))
        not understood
          acc >> 1
              ^^
    """
    line = re.sub(r"\s", " ", text)
    return f"{message}\n  {line}\n  {' ' * span[0]}{'^' * max(1, span[1] - span[0])}"
