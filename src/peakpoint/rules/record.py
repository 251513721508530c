"""What rules look at and what they answer."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

from peakpoint.errors import ConfigError
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.names import check_part

Mode = Literal["max", "min"]
Reasons = dict[str, str]


class ArgumentCheck(type):
    """Of rules: says how one is written when its arguments are too few, too many or unknown."""

    usage: str

    if not TYPE_CHECKING:  # type checkers know the arguments from the fields

        def __call__(cls, *arguments: Any, **options: Any) -> Any:
            """Make a rule, or say how it is written."""
            try:
                return super().__call__(*arguments, **options)
            except TypeError:
                try:
                    inspect.signature(cls).bind(*arguments, **options)
                except TypeError as error:
                    raise ConfigError(f"{cls.__name__}: {error}; write {cls.usage}") from None
                raise

        @property
        def __signature__(cls) -> inspect.Signature:
            signature = inspect.signature(cls.__init__)
            return signature.replace(parameters=list(signature.parameters.values())[1:])


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
    size_bytes: int = 0


CheckpointRecord = Manifest | Checkpoint | Moment
"""A checkpoint as rules look at it: they use what ``Moment`` has."""


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
        raise ConfigError(f'{rule}: mode must be "max" (larger is better) or "min" (smaller is), not {mode!r}')


def check_whole(rule: str, name: str, value: object, minimum: int = 1) -> None:
    """Refuse what is not a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{rule}: {name} must be a whole number of at least {minimum}, not {value!r}")


def by_sequence(records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """Earliest commit first."""
    return sorted(records, key=lambda record: record.sequence)


def ranked(records: Iterable[CheckpointRecord], metric: str, mode: Mode) -> list[CheckpointRecord]:
    """Best first; records without a finite value of ``metric`` are left out; ties go to the earlier commit."""
    sign = -1.0 if mode == "max" else 1.0
    finite = [record for record in records if math.isfinite(record.metrics.get(metric, math.nan))]
    return sorted(finite, key=lambda record: (sign * record.metrics[metric], record.sequence))


def lineage(records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """The newest record and those that it continues, earliest first: abandoned branches are left out."""
    ordered = by_sequence(records)
    if not ordered:
        return []
    forks = ordered[-1].forks
    return [record for record in ordered if not any(after < record.sequence < before for after, before in forks)]


def moment_text(record: CheckpointRecord) -> str:
    """``"epoch 3, step 400"`` or ``"step 400"``."""
    return f"step {record.step}" if record.epoch is None else f"epoch {record.epoch}, step {record.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsParts(metaclass=ArgumentCheck):
    """Which parts of a checkpoint a rule needs; this argument is common to all rules that claim.

    Args:
        parts: the names of the parts, such as ``"model"`` or ``("model", "ema")``; everything by default. When all
            rules that claim a checkpoint need only some parts, the others are dropped, once nothing protects it.
    """

    parts: tuple[str, ...] | str | None = None

    def _check_parts(self) -> None:
        given: object = (self.parts,) if isinstance(self.parts, str) else self.parts
        if given is None:
            return
        if not isinstance(given, tuple | list) or not given:
            raise ConfigError(f'{type(self).__name__}: parts are names such as ("model", "ema"), not {self.parts!r}')
        object.__setattr__(self, "parts", tuple(dict.fromkeys(check_part(name) for name in given)))

    @property
    def needs(self) -> tuple[str, ...] | None:
        """The names of the parts; None for everything."""
        return (self.parts,) if isinstance(self.parts, str) else self.parts

    @property
    def ranks_by(self) -> tuple[tuple[str, Mode], ...]:
        """The metrics that the rule ranks by, with their directions; none for most."""
        return ()

    @property
    def _parts_text(self) -> str:
        return "" if self.needs is None else f":parts={'+'.join(self.needs)}"
