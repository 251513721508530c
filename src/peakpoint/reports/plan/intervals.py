"""How often to save: the interval that loses least when a training is killed now and then.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17(9),
1974; J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
Computer Systems 22(3), 2006.
"""

import math
from dataclasses import dataclass

from peakpoint.errors import ConfigError


def young(cost: float, mtbf: float) -> float:
    """Seconds of work between two saves, to first order: ``sqrt(2 C M)``.

    Args:
        cost: ``C``, the seconds that the training stands still for a save.
        mtbf: ``M``, the mean seconds between two failures.

    Raises:
        ConfigError: a cost below 0, or a time between failures that is not above 0.

    Source: Young 1974.

    Example:
        >>> round(young(10, 8 * 3600))
        759
    """
    _check(cost, mtbf)
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Seconds of work between two saves, to higher order.

    ``sqrt(2 C M) (1 + sqrt(C / 2 M) / 3 + (C / 2 M) / 9) - C`` for ``C < 2 M``, otherwise ``M``.

    Args:
        cost: ``C``, as in ``young``.
        mtbf: ``M``, as in ``young``.

    Raises:
        ConfigError: as ``young``.

    Source: Daly 2006.

    Example:
        >>> round(daly(10, 8 * 3600))
        752
    """
    _check(cost, mtbf)
    if cost >= 2 * mtbf:
        return mtbf
    share = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """What a save and a failure cost; all in seconds.

    A save stalls the loop and is then written in the background. Until it is durable it is of no use: a failure before
    that throws the training back to the save before. With failures that come at random (exponentially distributed), the
    time until a save is durable costs exactly as much as if every restart took that much longer. It moves the best
    interval only where it is longer than the interval, because the next save waits for the one before.

    Args:
        mtbf: mean time between two failures.
        stall: how long the loop stands still for a save.
        durable: from the beginning of a save until it is durable; at least ``stall``, which is the default.
        restart: from a failure until the loop runs again.

    Raises:
        ConfigError: a time that cannot be.
    """

    mtbf: float
    stall: float
    durable: float = 0.0
    restart: float = 0.0

    def __post_init__(self) -> None:
        _check(self.stall, self.mtbf)
        for name, value in (("durable", self.durable), ("restart", self.restart)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value!r} must be seconds, at least 0")
        object.__setattr__(self, "durable", max(self.durable, self.stall))

    @property
    def best(self) -> float:
        """The interval by Daly's formula, but not below what the disk needs for a save."""
        return max(daly(self.stall, self.mtbf), self.durable - self.stall)

    def overhead(self, interval: float) -> float:
        """The expected time spent beyond the work itself, as a fraction of the work; infinite when nothing gets done.

        ``E[T] / T - 1`` with ``E[T] = M exp((R + D - C) / M) (exp((tau + C) / M) - 1) T / tau``, where ``D`` is the
        time until a save is durable. For ``D = C`` it is Daly's equation. A save waits for the one before, so
        ``tau + C`` is never less than ``D``.

        Args:
            interval: ``tau``, seconds of work between two saves.

        Raises:
            ConfigError: an interval that is not above 0.

        Source: Daly 2006, for ``D = C``.

        Example:
            >>> every = Failures(mtbf=8 * 3600, stall=10)
            >>> f"{every.overhead(every.best):.4f} {every.overhead(3600):.4f}"
            '0.0268 0.0683'
        """
        if not 0 < interval < math.inf:
            raise ConfigError(f"interval={interval!r} must be seconds, above 0")
        cycle = max(interval + self.stall, self.durable)
        try:
            grown = math.exp((self.restart + self.durable - self.stall) / self.mtbf) * math.expm1(cycle / self.mtbf)
        except OverflowError:
            return math.inf
        return self.mtbf * grown / interval - 1


def _check(cost: float, mtbf: float) -> None:
    if not 0 <= cost < math.inf:
        raise ConfigError(f"the cost of a save is {cost!r}; it must be seconds, at least 0")
    if not 0 < mtbf < math.inf:
        raise ConfigError(f"the mean time between failures is {mtbf!r}; it must be seconds, above 0")
