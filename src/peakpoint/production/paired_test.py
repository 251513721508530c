"""Test whether one model is better than another, by their predictions for the same examples.

Two accuracies on the same examples are not independent: what both models got right or wrong says nothing about which
is better. Only the examples on which exactly one was right do.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95

_NORMAL = NormalDist()
_NEGLIGIBLE = 1e-18  # of a sum: what it cannot hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two models on the same examples, and the test of their difference.

    Attributes:
        gained: how many were wrong and are right with the candidate.
        lost: how many were right and are wrong with the candidate.
        difference: the candidate's accuracy less the champion's, from -1 to 1.
        low: the lower end of the interval for the difference.
        high: its upper end.
        confidence: the probability that the interval holds the true difference, about.
        p_value: how probable at least so uneven a split of ``gained`` and ``lost`` is if the models are equally
            good; 1 when there are none, 0.0 only when it is below the smallest float.
        flips: indices of the examples that were lost, all of them, in their order.
    """

    examples: int
    champion_right: int
    candidate_right: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    confidence: float
    p_value: float
    flips: tuple[int, ...]


def paired(
    champion: Sequence[int], candidate: Sequence[int], labels: Sequence[int], *, confidence: float = CONFIDENCE
) -> Paired:
    """Compare two models by the classes that they predict for the same examples.

    The interval is Tango's score interval and the test McNemar's exact one. Exchanging the models exchanges ``gained``
    and ``lost``, mirrors the interval and leaves ``p_value`` as it is.

    The test is exact rather than mid-p: it never calls equal models different more often than its level says, which is
    what a gate is asked to promise. It asks for a little more than mid-p when few examples differ, and the two agree
    when hundreds do.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17, 1998; McNemar, Psychometrika 12, 1947, with the binomial distribution instead
    of its approximation. Fagerland, Lydersen & Laake, Statistics in Medicine 33, 2014, compare the choices.

    The three sequences are of the same examples in one order, at least one.

    Example:
        >>> found = paired([0, 1, 1, 0, 2, 2], [0, 1, 2, 1, 2, 0], [0, 1, 2, 1, 2, 2])
        >>> found.gained, found.lost, found.flips, found.p_value
        (2, 1, (5,), 1.0)
        >>> round(found.difference, 3), round(found.low, 3), round(found.high, 3)
        (0.167, -0.398, 0.63)
    """
    score = _NORMAL.inv_cdf(0.5 + confidence / 2)
    champion_hits = list(map(operator.eq, champion, labels))
    candidate_hits = list(map(operator.eq, candidate, labels))
    flips = tuple(row for row, right in enumerate(champion_hits) if right and not candidate_hits[row])
    examples, champion_right, candidate_right = len(labels), sum(champion_hits), sum(candidate_hits)
    losses = len(flips)
    gains = candidate_right - champion_right + losses
    return Paired(
        examples=examples,
        champion_right=champion_right,
        candidate_right=candidate_right,
        gained=gains,
        lost=losses,
        difference=(gains - losses) / examples,
        low=-_highest(losses, gains, examples, score),
        high=_highest(gains, losses, examples, score),
        confidence=confidence,
        p_value=_mcnemar(gains, losses),
        flips=flips,
    )


def _mcnemar(gains: int, losses: int) -> float:
    """Twice the smaller tail of the binomial distribution with the probability 1/2, at most 1.

    The terms fall from the largest on, by a ratio that is exact; only the largest needs logarithms of factorials, whose
    rounding leaves nine digits for a million pairs. SciPy's ``binomtest`` says 0.0 where the p-value is 2.7e-300 (10
    gains, 1065 losses), and takes a second to import.
    """
    count, smaller = gains + losses, min(gains, losses)
    if 2 * smaller >= count - 1:  # the tails meet
        return 1.0
    term = total = 1.0
    for number in range(smaller, 0, -1):
        term *= number / (count - number + 1)
        total += term
        if term < total * _NEGLIGIBLE:
            break
    largest = math.lgamma(count + 1) - math.lgamma(smaller + 1) - math.lgamma(count - smaller + 1)
    return min(1.0, math.exp(largest - count * math.log(2) + math.log(2 * total)))


def _highest(gains: int, losses: int, examples: int, score: float) -> float:
    """The largest difference that the score test does not refuse: the upper end of Tango's interval.

    For a supposed ``difference``, the variance is that of the most likely probabilities that have this difference.
    """
    measured = (gains - losses) / examples

    def is_refused(difference: float) -> bool:
        linear = (2 * examples - gains + losses) * difference - gains - losses
        constant = -losses * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear * linear - 8 * examples * constant))
        # the probability of a loss, in the form of the two that subtracts nothing large
        loss = (root - linear) / (4 * examples) if linear < 0 else -2 * constant / (root + linear or 1.0)
        variance = 2 * loss + difference * (1 - difference)
        return examples * (difference - measured) ** 2 > score * score * variance

    low, high = measured, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_refused(middle) else (middle, high)
    return high


def unpaired(
    champion: float, candidate: float, champion_count: int, candidate_count: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of the candidate's accuracy less the champion's, each on examples of its own.

    Wider than what ``paired`` finds on the same examples; for when only the two accuracies are known.

    Source: Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine
    17, 1998, method 10, from Wilson's intervals of each.

    Args:
        champion: an accuracy, from 0 to 1.
        candidate: the other one.
        champion_count: of how many examples the champion's is, at least 1.
        candidate_count: of how many the candidate's is.

    Example:
        >>> low, high = unpaired(48 / 80, 56 / 70, 80, 70)
        >>> round(low, 4), round(high, 4)
        (0.0524, 0.3339)
    """
    score = _NORMAL.inv_cdf(0.5 + confidence / 2)
    low, high = _wilson(candidate, candidate_count, score)
    lower, higher = _wilson(champion, champion_count, score)
    difference = candidate - champion
    return (
        max(-1.0, difference - math.hypot(candidate - low, higher - champion)),
        min(1.0, difference + math.hypot(high - candidate, champion - lower)),
    )


def _wilson(share: float, count: int, score: float) -> tuple[float, float]:
    square = score * score
    middle = (share + square / (2 * count)) / (1 + square / count)
    reach = score * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return min(share, middle - reach), max(share, middle + reach)  # rounding may miss the share itself at 0 and 1
