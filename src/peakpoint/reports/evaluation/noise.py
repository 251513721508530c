"""How much of a difference chance alone explains.

The best of many noisy values is too good: it was selected for being high. SciPy, of the extra ``report``, brings the
distributions and integrals, and is imported when a noise is known.
"""

import importlib
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, mean, median
from typing import Any

from peakpoint.errors import needing

CONFIDENCE = 0.95
LEAST_VALUES = 12
"""Fewer values than these do not show how much they vary."""

_LEAST_TAIL = 6  # values
_COARSE_STEPS = 2  # values that vary by no more of their smallest steps may only be rounded
_ANNEALED = 2.5  # times smaller than before: the learning rate may have been annealed
_ROUNDING = 1e-9  # of the largest value: values nearer to each other are equal

_NORMAL = NormalDist()
_QUARTILE = _NORMAL.inv_cdf(0.75)


def _scipy(module: str) -> Any:
    """Return a module of SciPy.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    with needing("report", "noise estimates need"):
        return importlib.import_module(f"scipy.{module}")


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
        """Return the difference between best and last that chance alone explains, in 19 of 20 cases.

        An estimated standard error widens it, in the proportion of Student's quantile to the normal one.
        """
        widening = 1.0
        if math.isfinite(self.freedom):
            widening = student(CONFIDENCE, self.freedom) / _NORMAL.inv_cdf(CONFIDENCE)
        return self.se * widening * margin_of_best(count)


@lru_cache(maxsize=256)
def expected_best(count: int) -> float:
    """Return how far the best of ``count`` equal evaluations lies above their common mean, on average.

    In standard errors. Source: the mean of the largest order statistic of a normal sample, the integral of
    1 - F(x)^k - F(-x)^k over positive x; David & Nagaraja, "Order Statistics", 3rd edition, 2003, section 3.1. Harter,
    Biometrika 48, 1961, has the table that the tests compare with.

    Args:
        count: at least 1.

    Example:
        >>> round(expected_best(2), 4), round(expected_best(100), 4)
        (0.5642, 2.5076)
    """
    cdf = _scipy("special").ndtr
    return float(_scipy("integrate").quad(lambda x: 1 - cdf(x) ** count - cdf(-x) ** count, 0, 12)[0])


@lru_cache(maxsize=256)
def margin_of_best(count: int, confidence: float = CONFIDENCE) -> float:
    """Return how far below the best of ``count`` evaluations an equally good one still lies by chance.

    In standard errors. One that is named beforehand, such as the last, lies within this margin with the probability
    ``confidence`` when all are equal in truth; when they are not, those that are best lie within it more often.

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
    cdf, quad = _scipy("special").ndtr, _scipy("integrate").quad

    def excess(margin: float) -> float:
        return float(quad(lambda x: _NORMAL.pdf(x) * cdf(x + margin) ** (count - 1), -8, 8)[0] - confidence)

    return float(_scipy("optimize").brentq(excess, -20, 20))


def of_proportion(share: float, count: int) -> float:
    """Return the standard error of a proportion of ``count`` independent examples.

    Source: the binomial distribution, sqrt(p (1 - p) / n). A share of 0 or 1 is taken as half an example away from it:
    that no example was wrong does not mean that none can be.

    Args:
        share: between 0 and 1.
        count: examples, at least 1.

    Example:
        >>> round(of_proportion(0.75, 10_000), 5)
        0.00433
    """
    moderated = min(max(share, 0.5 / count), 1 - 0.5 / count)
    return math.sqrt(moderated * (1 - moderated) / count)


def of_curve(values: Sequence[float]) -> Noise | None:
    """Estimate the noise in a curve from how far each value of its second half is from the line between its neighbours.

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
    second_half = values[-max(LEAST_VALUES, len(values) // 2) :]
    tail_length = max(_LEAST_TAIL, len(values) // 4)
    tail, earlier = values[-tail_length:], values[:-tail_length]
    se = _scatter(second_half)
    if min(se, _scatter(tail)) <= _COARSE_STEPS * _smallest_step(values):
        return None
    # the mean of a few residuals varies less than their median: fewer curves of equal noise are taken for annealed ones
    if _ANNEALED * min(_mean_scatter(second_half), _mean_scatter(tail)) < _scatter(earlier):
        return None
    return Noise(se=se, source=f"the scatter of the last {len(second_half)} values", freedom=len(second_half) / 3)


def _residuals(values: Sequence[float]) -> list[float]:
    """Return how far each value is from the line between its neighbours; of at least 3 values."""
    triples = zip(values, values[1:], values[2:], strict=False)
    return [abs(previous / 2 + following / 2 - value) for previous, value, following in triples]


def _scatter(values: Sequence[float]) -> float:
    return median(_residuals(values)) / _QUARTILE / math.sqrt(1.5)


def _mean_scatter(values: Sequence[float]) -> float:
    """Estimate the scatter from the mean: that of a normal distribution's absolute values is sqrt(2 / pi)."""
    return mean(_residuals(values)) / math.sqrt(2 / math.pi) / math.sqrt(1.5)


def _smallest_step(values: Sequence[float]) -> float:
    """Return the smallest step between different values; 0 when there is none."""
    rounding = _ROUNDING * max(map(abs, values))
    steps = [high - low for low, high in itertools.pairwise(sorted(values)) if high - low > rounding]
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


def welch(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return the difference of the means of two groups, whose variances may differ, with its interval.

    None without two values in each, when no value differs from its group, and when the values overflow.

    Source: Welch, Biometrika 34, 1947, with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946).

    Example:
        >>> interval = welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        >>> round(interval.low, 2), round(interval.high, 2)
        (-6.16, 2.16)
    """
    if min(len(first), len(second)) < 2 or len(set(first)) == len(set(second)) == 1:
        return None
    with warnings.catch_warnings():  # about values that hardly differ, or overflow
        warnings.simplefilter("ignore")
        test = _scipy("stats").ttest_ind(first, second, equal_var=False)
        low, high = map(float, test.confidence_interval(confidence))
    if not math.isfinite(high - low):
        return None
    return Interval(difference=mean(first) - mean(second), low=low, high=high, confidence=confidence)


def student(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: from 0 to 1.
        freedom: degrees of freedom, at least 1; need not be whole.

    Example:
        >>> round(student(0.975, 10), 3), round(student(0.975, 1), 3)
        (2.228, 12.706)
    """
    return float(_scipy("special").stdtrit(freedom, probability))
