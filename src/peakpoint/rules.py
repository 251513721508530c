"""Rules say which checkpoints are worth having, and why.

A rule is a frozen value with one pure method: ``claims(records)`` names, among the records that exist, those that it
wants, each with a reason. It keeps no state, so "save this moment?", "keep this checkpoint?", "what would happen under
other rules?" and "what after a restart?" are one calculation:

- a moment is saved if and only if a rule would claim it among the checkpoints that exist (``wanted``);
- a checkpoint is kept while a rule claims it (``claims``).

Laws that every rule obeys (tests/test_rules.py proves them): the answer does not depend on the order of the records;
what was claimed stays claimed after everything else but the newest is removed; adding a rule never removes a claim; a
value that is not finite never wins; ties go to the earlier record.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol, get_args

from peakpoint.errors import ConfigError
from peakpoint.names import check_metric

Mode = Literal["max", "min"]
Reasons = dict[str, str]


class Record(Protocol):
    """What rules look at; ``Manifest``, ``Checkpoint`` and ``Moment`` all are records."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def sequence(self) -> int: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def epoch(self) -> int | None: ...  # noqa: D102
    @property
    def metrics(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def created_at(self) -> datetime: ...  # noqa: D102
    @property
    def forks(self) -> tuple[tuple[int, int], ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment of training that could become a checkpoint; see ``Manifest`` for the attributes."""

    id: str
    sequence: int
    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    created_at: datetime
    forks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """One rule's wish to have one checkpoint.

    Attributes:
        rule: the rule in its text form, such as ``"best:val_accuracy:max"``.
        reason: one sentence with the numbers that decided.
    """

    rule: str
    reason: str


def check_mode(rule: str, mode: object) -> None:
    """Refuse a mode that is neither ``"max"`` nor ``"min"``."""
    if mode not in get_args(Mode):
        raise ConfigError(f'{rule}: mode must be "max" or "min", not {mode!r}; it is never guessed')


def _check_positive(rule: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{rule}: {name} must be a whole number of at least 1, not {value!r}")


def by_sequence(records: Iterable[Record]) -> list[Record]:
    """Earliest commit first."""
    return sorted(records, key=lambda record: record.sequence)


def ranked(records: Iterable[Record], metric: str, mode: Mode) -> list[Record]:
    """Best first; records without a finite value of ``metric`` are left out; ties go to the earlier commit."""
    sign = -1.0 if mode == "max" else 1.0
    having = [record for record in records if math.isfinite(record.metrics.get(metric, math.nan))]
    return sorted(having, key=lambda record: (sign * record.metrics[metric], record.sequence))


def lineage(records: Iterable[Record]) -> list[Record]:
    """The newest record and those that it continues, earliest first: abandoned branches are left out."""
    ordered = by_sequence(records)
    if not ordered:
        return []
    forks = ordered[-1].forks
    return [record for record in ordered if not any(after < record.sequence < before for after, before in forks)]


def moment_text(record: Record) -> str:
    """``"epoch 3, step 400"`` or ``"step 400"``."""
    return f"step {record.step}" if record.epoch is None else f"epoch {record.epoch}, step {record.step}"


@dataclass(frozen=True, slots=True)
class Best:
    """Claims the checkpoint with the best value of one metric.

    Args:
        metric: the metric's name, as reported.
        mode: ``"max"`` when larger is better, ``"min"`` when smaller is. Required.

    Raises:
        ConfigError: a mode or a name that cannot be.

    Example:
        >>> Best("val_accuracy", "max").text
        'best:val_accuracy:max'
    """

    metric: str
    mode: Mode

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_mode("Best", self.mode)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"best:{self.metric}:{self.mode}"

    def claims(self, records: Sequence[Record]) -> Reasons:
        """The best record and its margin."""
        ranking = ranked(records, self.metric, self.mode)
        if not ranking:
            return {}
        best = ranking[0]
        reason = f"best {self.metric} ({self.mode}): {best.metrics[self.metric]:.6g}"
        if len(ranking) > 1:
            reason += f", next {ranking[1].metrics[self.metric]:.6g} at {moment_text(ranking[1])}"
        return {best.id: reason}


@dataclass(frozen=True, slots=True)
class TopK:
    """Claims the ``k`` checkpoints with the best values of one metric.

    Args:
        metric: the metric's name, as reported.
        mode: ``"max"`` or ``"min"``. Required.
        k: how many, at least 1.

    Raises:
        ConfigError: an argument that cannot be.

    Example:
        >>> TopK("val_loss", "min", 3).text
        'topk:val_loss:min:3'
    """

    metric: str
    mode: Mode
    k: int

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_mode("TopK", self.mode)
        _check_positive("TopK", "k", self.k)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"topk:{self.metric}:{self.mode}:{self.k}"

    def claims(self, records: Sequence[Record]) -> Reasons:
        """The first ``k`` of the ranking, each with its rank."""
        ranking = ranked(records, self.metric, self.mode)[: self.k]
        return {
            record.id: f"rank {rank} of the best {self.k} by {self.metric} ({self.mode}): "
            f"{record.metrics[self.metric]:.6g}"
            for rank, record in enumerate(ranking, 1)
        }


_SHORTEST_MINUTES, _LONGEST_MINUTES = 1e-9, 1e15  # what clocks and calendars can still tell apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """Claims one checkpoint in every interval: of epochs, of steps or of minutes.

    The first record in each interval is claimed. With ``epochs=10`` intervals begin when 10, 20, 30, ... epochs are
    complete (epoch indices 9, 19, 29, ...); with ``steps=1000`` at steps 1000, 2000, ..., so that a loop that reports
    every 391 steps still gets one checkpoint a thousand; with ``minutes=60`` at every full hour of UTC. When a run was
    resumed from an older checkpoint, the newest branch goes before abandoned ones.

    Args:
        epochs: interval in epochs. Give exactly one of the three.
        steps: interval in optimizer steps.
        minutes: interval in minutes of wall time; may be a fraction.
        keep: claim only in the newest ``keep`` intervals that have a checkpoint; all by default.

    Raises:
        ConfigError: none or several intervals, or one that is not positive.

    Example:
        >>> Every(minutes=60, keep=24).text
        'every:60min:24'
    """

    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("epochs", "steps", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("Every takes exactly one of epochs=, steps= and minutes=")
        if self.minutes is not None:
            number = isinstance(self.minutes, int | float) and not isinstance(self.minutes, bool)
            if not (number and _SHORTEST_MINUTES <= self.minutes <= _LONGEST_MINUTES):
                raise ConfigError(
                    f"Every: minutes must be a number from {_SHORTEST_MINUTES} to {_LONGEST_MINUTES}, "
                    f"not {str(self.minutes)[:40]}"
                )
        else:
            _check_positive("Every", given[0], getattr(self, given[0]))
        if self.keep is not None:
            _check_positive("Every", "keep", self.keep)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        suffix = "" if self.keep is None else f":{self.keep}"
        if self.epochs is not None:
            return f"every:{self.epochs}ep{suffix}"
        if self.steps is not None:
            return f"every:{self.steps}st{suffix}"
        return f"every:{self.minutes!r}min{suffix}"

    def interval(self, record: Record) -> int:
        """The number of the interval that ``record`` falls into; 0 is before the first boundary, and claims nothing."""
        if self.epochs is not None:
            return 0 if record.epoch is None else (record.epoch + 1) // self.epochs
        if self.steps is not None:
            return record.step // self.steps
        assert self.minutes is not None
        return int(record.created_at.timestamp() // (60 * self.minutes))

    def claims(self, records: Sequence[Record]) -> Reasons:
        """The first record of each of the newest ``keep`` intervals."""
        current = {record.id for record in lineage(records)}
        first: dict[int, Record] = {}
        for record in sorted(records, key=lambda record: (record.id not in current, record.sequence)):
            number = self.interval(record)
            if number > 0:
                first.setdefault(number, record)
        numbers = sorted(first)[-self.keep :] if self.keep is not None else sorted(first)
        return {first[number].id: self._reason(number) for number in numbers}

    def _reason(self, number: int) -> str:
        newest = "" if self.keep is None else f", among the newest {self.keep}"
        if self.epochs is not None:
            return f"every {self.epochs} epochs: first with {number * self.epochs} complete{newest}"
        if self.steps is not None:
            return f"every {self.steps} steps: first from step {number * self.steps}{newest}"
        assert self.minutes is not None
        start = datetime.fromtimestamp(number * 60 * self.minutes, UTC)
        return f"every {self.minutes:g} minutes: first from {start:%Y-%m-%d %H:%M:%S} UTC{newest}"


@dataclass(frozen=True, slots=True)
class Last:
    """Claims the ``n`` checkpoints committed last: to continue from.

    Every report is newer than the ones before it, so with ``Last`` among the rules every report is saved.

    Args:
        n: how many, at least 1.

    Raises:
        ConfigError: ``n`` is not a whole number of at least 1.

    Example:
        >>> Last(3).text
        'last:3'
    """

    n: int

    def __post_init__(self) -> None:
        _check_positive("Last", "n", self.n)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"last:{self.n}"

    def claims(self, records: Sequence[Record]) -> Reasons:
        """The newest ``n`` in the order of commits."""
        newest = by_sequence(records)[-self.n :]
        return {
            record.id: "the newest" if back == 0 else f"number {back + 1} from the newest, of {self.n}"
            for back, record in enumerate(reversed(newest))
        }


Rule = Best | TopK | Every | Last

_EVERY = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?)(?P<unit>ep|st|min)")


def parse(text: str) -> Rule:
    """Read one rule in its compact form, the inverse of ``rule.text``.

    Raises:
        ConfigError: the text is not a rule; the message shows the forms.

    Example:
        >>> parse("every:10ep")
        Every(epochs=10, steps=None, minutes=None, keep=None)
    """
    kind, *rest = text.split(":")
    try:
        match kind, rest:
            case "best", [metric, mode]:
                return Best(metric, mode_of(mode))
            case "topk", [metric, mode, k]:
                return TopK(metric, mode_of(mode), _whole(k))
            case "last", [n]:
                return Last(_whole(n))
            case "every", [interval, *keep] if len(keep) < 2 and (found := _EVERY.fullmatch(interval)):
                count = _whole(keep[0]) if keep else None
                number = found["number"]
                match found["unit"]:
                    case "ep":
                        return Every(epochs=int(number), keep=count)
                    case "st":
                        return Every(steps=int(number), keep=count)
                    case _:
                        return Every(minutes=int(number) if number.isdigit() else float(number), keep=count)
            case _:
                pass
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"rule {text[:200]!r}: {error}") from error
    raise ConfigError(
        f"{text!r} is not a rule. Forms: best:METRIC:max topk:METRIC:min:K every:10ep every:500st every:60min:24 last:N"
    )


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{text!r} is not a whole number")
    return int(text)


def mode_of(text: str) -> Mode:
    """Read a mode; ConfigError when it is none."""
    if text == "max":
        return "max"
    if text == "min":
        return "min"
    raise ConfigError(f'mode must be "max" or "min", not {text!r}; it is never guessed')


def check_rules(keep: object) -> tuple[Rule, ...]:
    """Return ``keep`` as a tuple if it is a list of rules.

    Raises:
        ConfigError: something in it is not a rule.
    """
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise ConfigError(f'keep= takes a list of rules, such as [Best("val_loss", "min"), Last(3)], not {keep!r}')
    rules = tuple(keep)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ConfigError(f"keep= takes rules (Best, TopK, Every, Last), not {rule!r}")
    return rules


def claims(rules: Iterable[Rule], records: Sequence[Record]) -> dict[str, tuple[Claim, ...]]:
    """Who wants what: id of each claimed record, with its claims in the order of the rules.

    Pure; the answer does not depend on the order of ``records``.

    Args:
        rules: the rules in force.
        records: every checkpoint that exists.
    """
    found: dict[str, list[Claim]] = {}
    for rule in rules:
        for id, reason in rule.claims(records).items():  # noqa: A001 - the vocabulary's word
            found.setdefault(id, []).append(Claim(rule.text, reason))
    return {id: tuple(claimed) for id, claimed in found.items()}  # noqa: A001


def wanted(rules: Iterable[Rule], existing: Sequence[Record], moment: Record) -> tuple[Claim, ...]:
    """The claims that ``moment`` would have among ``existing``: it is saved if and only if there is one."""
    return claims(rules, [*existing, moment]).get(moment.id, ())


def watched(rules: Iterable[Rule]) -> tuple[tuple[str, Mode], ...]:
    """The metrics that rules rank by, with their directions, in the order of the rules, once each."""
    return tuple(dict.fromkeys((rule.metric, rule.mode) for rule in rules if isinstance(rule, Best | TopK)))
