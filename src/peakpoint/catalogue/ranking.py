"""What a selection asks for: a condition, what it ranks by, and how much better is better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from peakpoint.catalogue.query import Field, Metric, Query, parse_key
from peakpoint.errors import ConfigError
from peakpoint.format.names import check_metric
from peakpoint.rules import Mode, mode_of

_MOST = 10**9


@dataclass(frozen=True, slots=True)
class RankingKey:
    """One thing to rank by.

    Attributes:
        value: a metric, or a field with an order.
        mode: ``"max"`` puts the largest first.
    """

    value: Field | Metric
    mode: Mode


def ranking_keys(by: Mapping[str, Mode]) -> tuple[RankingKey, ...]:
    """Read keys from ``{"val_accuracy": "max", "size": "min"}``; the first counts most.

    Raises:
        ConfigError: a name or a mode that cannot be.
    """
    return tuple(RankingKey(parse_key(name), mode_of(mode)) for name, mode in by.items())


class WithinSE(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one-standard-error rule: everything that is no more than one standard error worse than the best is as good.

    Among these the further keys decide, such as the smallest or the sparsest; without further keys the earliest.
    Source: Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984, section 3.4.3.

    Args:
        n_eval: how many examples the best value is the mean of, for an accuracy ``p``: its standard error is then
            ``sqrt(p (1 - p) / n)``, that of a binomial share. A number, or the name of a metric that holds it.
        se: the name of a metric that holds the standard error itself; instead of ``n_eval``.
        percent: the accuracy is from 0 to 100, not from 0 to 1.

    Raises:
        ConfigError: both are given, or neither, or a value that cannot be.

    Example:
        >>> round(WithinSE(n_eval=10_000).error_of(0.9, {}), 6)
        0.003
    """

    n_eval: int | str | None = None
    se: str | None = None
    percent: bool = False

    def __post_init__(self) -> None:
        if (self.n_eval is None) == (self.se is None):
            raise ConfigError(
                "one standard error of what? give either the number of examples (--n-eval N), or the metric that holds "
                "the standard error (--se METRIC)"
            )
        if isinstance(self.n_eval, int) and (isinstance(self.n_eval, bool) or self.n_eval < 1):
            raise ConfigError(f"the number of examples (--n-eval) is at least 1, not {self.n_eval!r}")
        for name in (self.n_eval, self.se):
            if isinstance(name, str):
                check_metric(name)

    @property
    def needs(self) -> str | None:
        """The metric that must be there; None when a number was given."""
        return self.se if self.se is not None else self.n_eval if isinstance(self.n_eval, str) else None

    def error_of(self, best: float, metrics: Mapping[str, float]) -> float:
        """The standard error of the best value, in its unit.

        Raises:
            ConfigError: the value is no accuracy, or the metric that must be there is missing, or cannot be.
        """
        value = self.n_eval if isinstance(self.n_eval, int) else metrics.get(self.needs or "", math.nan)
        if not math.isfinite(value) or value < 0 or (self.se is None and value < 1):
            meaning = "standard error" if self.se is not None else "number of examples"
            raise ConfigError(f"the best checkpoint has no usable {meaning} in {self.needs!r}: {value}")
        if self.se is not None:
            return value
        scale = 100.0 if self.percent else 1.0
        if not 0 <= best <= scale:
            hint = "; for an accuracy in percent, add --percent" if scale == 1 and best <= 100 else ""
            raise ConfigError(
                f"the best value is {best:g}, and the standard error of an accuracy needs one from 0 to {scale:g}"
                f"{hint}; for other metrics name one that holds the standard error: --se METRIC"
            )
        share = best / scale
        return scale * math.sqrt(share * (1 - share) / value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionQuery:
    """What is to be selected.

    Attributes:
        query: which checkpoints.
        keys: by what they are ranked; the newest come first without any.
        top: how many at most; None for all.
        within: what counts as equally good.

    Raises:
        ConfigError: ``top`` is no number of checkpoints, or there is no metric that ``within`` could be about.
    """

    query: Query
    keys: tuple[RankingKey, ...] = ()
    top: int | None = None
    within: WithinSE | None = None

    def __post_init__(self) -> None:
        is_count = isinstance(self.top, int) and not isinstance(self.top, bool) and 1 <= self.top <= _MOST
        if self.top is not None and not is_count:
            raise ConfigError(f"top={str(self.top)[:50]}: give a whole number from 1 to {_MOST:,}")
        if self.within is not None and (not self.keys or not isinstance(self.keys[0].value, Metric)):
            raise ConfigError("one standard error of which metric? rank by a metric first, as in --max val_accuracy")
        if self.within is not None and self.within.n_eval is not None and self.keys[0].mode == "min":
            name = self.keys[0].value.name
            raise ConfigError(
                f"{name} is ranked smallest first, as a loss is: from a number of examples (--n-eval) follows the "
                f"standard error of an accuracy only. Name a metric that holds that of {name}: --se METRIC"
            )
