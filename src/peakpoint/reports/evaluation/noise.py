"""How much of a difference chance alone explains.

The best of many noisy values is too good: it was chosen for being high. Everything here is about the standard normal
distribution and short integrals, so that no package is needed.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, mean, median, variance

CONFIDENCE = 0.95
LEAST_VALUES = 12
"""Fewer values than these say nothing about their own scatter."""

_LEAST_TAIL = 6
_GRAINS = 2  # a scatter of so many of the smallest steps between values may be rounding
_FAR = 2.5  # times smaller than before: another kind of training, such as one with an annealed learning rate
_ROUNDING = 1e-9  # of the largest value: nearer ones are the same

_NORMAL = NormalDist()
_QUARTILE = _NORMAL.inv_cdf(0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The standard error of one value of a metric.

    Attributes:
        se: in the metric's unit, at least 0.
        source: where it comes from, in words.
        freedom: degrees of freedom of the standard error itself, when it is an estimate.
    """

    se: float
    source: str
    freedom: float = math.inf

    def margin(self, count: int) -> float:
        """What chance explains of the difference between the best of ``count`` values and the last, in 19 of 20 cases.

        An estimated standard error widens it, in the proportion of Student's quantile to the normal one.
        """
        wider = 1.0
        if math.isfinite(self.freedom):
            wider = student(CONFIDENCE, self.freedom) / _NORMAL.inv_cdf(CONFIDENCE)
        return self.se * wider * margin_of_best(count)


def _integral(function: Callable[[float], float], begin: float, end: float, steps: int = 400) -> float:
    """Simpson's rule; ``steps`` is even."""
    width = (end - begin) / steps
    inner = math.fsum((4 if at % 2 else 2) * function(begin + at * width) for at in range(1, steps))
    return (function(begin) + inner + function(end)) * width / 3


@lru_cache(maxsize=256)
def expected_best(count: int) -> float:
    """How far the best of ``count`` equal evaluations lies above their common mean, on average, in standard errors.

    Source: the mean of the largest order statistic of a normal sample, the integral of 1 - F(x)^k - F(-x)^k over
    positive x; David & Nagaraja, "Order Statistics", 3rd edition, 2003, section 3.1. Harter, Biometrika 48, 1961, has
    the table that the tests compare with.

    Args:
        count: at least 1.

    Example:
        >>> round(expected_best(2), 4), round(expected_best(100), 4)
        (0.5642, 2.5076)
    """

    def beyond(x: float) -> float:
        return 1 - _NORMAL.cdf(x) ** count - _NORMAL.cdf(-x) ** count

    return _integral(beyond, 0, 12) if count > 1 else 0.0


@lru_cache(maxsize=256)
def margin_of_best(count: int, confidence: float = CONFIDENCE) -> float:
    """How far below the best of ``count`` evaluations a truly equal one still lies by chance, in standard errors.

    One that is named beforehand, such as the last, lies within this margin with the probability ``confidence`` when all
    are equal in truth; when they are not, those that are best lie within it more often.

    Source: the constant of subset selection, Gupta, "On some multiple decision (selection and ranking) rules",
    Technometrics 7, 1965, equation 9: the d at which the integral of F(x + d)^(k - 1) f(x) is ``confidence``.

    Args:
        count: at least 1.
        confidence: between 0 and 1.

    Example:
        >>> round(margin_of_best(2), 3), round(margin_of_best(10), 3)
        (2.326, 3.418)
    """
    if count < 2:
        return 0.0

    def within(margin: float) -> float:
        return _integral(lambda x: _NORMAL.pdf(x) * _NORMAL.cdf(x + margin) ** (count - 1), -8, 8, 200)

    return _where(within, confidence, 0, 20)


def _where(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that rises takes a value, by bisection."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def of_proportion(share: float, count: int) -> float:
    """The standard error of a proportion of ``count`` independent examples.

    Source: the binomial distribution, sqrt(p (1 - p) / n). A share of 0 or 1 is taken as half an example away from it:
    that no example was wrong does not mean that none can be.

    Args:
        share: between 0 and 1.
        count: examples, at least 1.

    Example:
        >>> round(of_proportion(0.75, 10_000), 5)
        0.00433
    """
    inside = min(max(share, 0.5 / count), 1 - 0.5 / count)
    return math.sqrt(inside * (1 - inside) / count)


def of_curve(values: Sequence[float]) -> Noise | None:
    """The noise in a curve: how far each value of its second half is from the line between its neighbours.

    A straight trend does not count as noise, and a few outliers hardly change it. Values that are averages over time
    themselves, such as a running loss, look steadier than they are.

    None when there are fewer than 12 values, and when the end is too quiet to say anything about the best, which may
    stem from a less quiet time: the scatter of the second half or of the last quarter is 0, no more than two of the
    smallest steps between the values, or, as a mean, less than two fifths of that of the values before the last
    quarter. So it is where a learning rate decays.

    Source: pseudo-residuals, (x[i-1] + x[i+1]) / 2 - x[i], whose variance is 3/2 of the noise's; Gasser, Sroka &
    Jennen-Steinmetz, Biometrika 73, 1986. The median of their absolute values over the normal distribution's third
    quartile instead of the root of their mean square: Hampel, JASA 69, 1974. The degrees of freedom, a third of the
    number of values, are what makes ``Noise.margin`` right in simulations (tests/reports/test_noise.py).

    Args:
        values: finite, earliest first.

    Example:
        >>> of_curve([0.7, 0.71, 0.698, 0.7043] * 5).source
        'the scatter of the last 12 values'
        >>> of_curve([0.7, 0.71, 0.698, 0.7043] * 5 + [0.706] * 20) is None
        True
    """
    if len(values) < LEAST_VALUES:
        return None
    late = values[-max(LEAST_VALUES, len(values) // 2) :]
    se = _scatter(late)
    end = max(_LEAST_TAIL, len(values) // 4)
    quiet = min(_scatter(late), _scatter(values[-end:])) <= _GRAINS * _grain(values)
    # the mean of a few varies less than their median, and few curves of equal noise are taken for quiet ones
    if quiet or _FAR * min(_mean_scatter(late), _mean_scatter(values[-end:])) < _scatter(values[:-end]):
        return None
    return Noise(se=se, source=f"the scatter of the last {len(late)} values", freedom=len(late) / 3)


def _residuals(values: Sequence[float]) -> list[float]:
    """How far each value is from the line between its neighbours; of at least 3 values."""
    return [abs(before / 2 + after / 2 - at) for before, at, after in zip(values, values[1:], values[2:], strict=False)]


def _scatter(values: Sequence[float]) -> float:
    return median(_residuals(values)) / _QUARTILE / math.sqrt(1.5)


def _mean_scatter(values: Sequence[float]) -> float:
    """As ``_scatter``, from the mean: that of a normal distribution's absolute values is sqrt(2 / pi)."""
    return mean(_residuals(values)) / math.sqrt(2 / math.pi) / math.sqrt(1.5)


def _grain(values: Sequence[float]) -> float:
    """The smallest step between different values; 0 when there is none."""
    same = _ROUNDING * max(map(abs, values))
    ordered = sorted(values)
    steps = [high - low for low, high in itertools.pairwise(ordered) if high - low > same]
    return min(steps, default=0.0)


# --- groups of runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference of two means, with the interval that holds the true one.

    Attributes:
        difference: the first mean less the second.
        low: the interval's lower end.
        high: its upper end.
        confidence: the probability that the interval is right.
    """

    difference: float
    low: float
    high: float
    confidence: float


def welch(one: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The difference of the means of two groups that may scatter differently; None without two values in each, or
    when no value differs from its group.

    Source: Welch, Biometrika 34, 1947, with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946).

    Example:
        >>> found = welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        >>> round(found.low, 2), round(found.high, 2)
        (-6.16, 2.16)
    """  # noqa: D205 - the sentence needs two lines
    if min(len(one), len(other)) < 2:
        return None
    try:
        shares = [variance(group) / len(group) for group in (one, other)]
    except OverflowError:  # values near the largest numbers
        return None
    squared = math.fsum(shares)
    if not squared or not math.isfinite(squared):
        return None
    freedom = 1 / math.fsum(
        (share / squared) ** 2 / (len(group) - 1) for share, group in zip(shares, (one, other), strict=True)
    )
    reach = student(0.5 + confidence / 2, freedom) * math.sqrt(squared)
    difference = mean(one) - mean(other)
    return Interval(difference=difference, low=difference - reach, high=difference + reach, confidence=confidence)


@lru_cache(maxsize=256)
def student(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution.

    Source: with t = sqrt(freedom) * tan(angle) the density becomes cos(angle)^(freedom - 1) over a constant, which
    Simpson's rule integrates.

    Args:
        probability: from 0.5 up to, not including, 1.
        freedom: degrees of freedom, at least 1; need not be whole.

    Example:
        >>> round(student(0.975, 10), 3), round(student(0.975, 1), 3)
        (2.228, 12.706)
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def below(angle: float) -> float:
        return 0.5 + scale * _integral(lambda at: math.cos(at) ** (freedom - 1), 0, angle, 800)

    return math.sqrt(freedom) * math.tan(
        _where(below, probability, 0, min(math.pi / 2, 40 / math.sqrt(freedom)))
    )  # t beyond 40 needs few degrees
