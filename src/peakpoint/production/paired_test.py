"""Whether one model is better than another, from what both said about the same examples.

Two accuracies on the same examples are not independent: what both models got right or wrong says nothing about which
is better. Only the examples on which exactly one was right do.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

from peakpoint.errors import ConfigError
from peakpoint.rules import Mode, check_mode

CONFIDENCE = 0.95

_NORMAL = NormalDist()
_NEGLIGIBLE = 1e-18  # of a sum: what it cannot hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two models on the same examples.

    Attributes:
        examples: how many, at least 1.
        champion_right: how many the champion got right.
        candidate_right: how many the candidate got right.
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
    """Compares two models by the classes that they predict for the same examples.

    The interval is Tango's score interval and the test McNemar's exact one. Exchanging the models exchanges ``gained``
    and ``lost``, mirrors the interval and leaves ``p_value`` as it is.

    The test is exact rather than mid-p: it never calls equal models different more often than its level says, which is
    what a gate is asked to promise. It asks for a little more than mid-p when few examples differ, and the two agree
    when hundreds do.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17, 1998; McNemar, Psychometrika 12, 1947, with the binomial distribution instead
    of its approximation. Fagerland, Lydersen & Laake, Statistics in Medicine 33, 2014, compare the choices.

    Args:
        champion: the class that the champion predicts for each example.
        candidate: the class that the candidate predicts, in the same order.
        labels: the true classes, in the same order.
        confidence: between 0 and 1.

    Raises:
        ConfigError: no examples, different numbers of them, classes that are no whole numbers, or such a confidence.

    Example:
        >>> found = paired([0, 1, 1, 0, 2, 2], [0, 1, 2, 1, 2, 0], [0, 1, 2, 1, 2, 2])
        >>> found.gained, found.lost, found.flips, found.p_value
        (2, 1, (5,), 1.0)
        >>> round(found.difference, 3), round(found.low, 3), round(found.high, 3)
        (0.167, -0.398, 0.63)
    """
    score = _quantile(confidence)
    truth = _classes("labels", labels)
    before = list(map(operator.eq, _classes("champion", champion, len(truth)), truth))
    after = list(map(operator.eq, _classes("candidate", candidate, len(truth)), truth))
    flips = tuple(at for at, right in enumerate(before) if right and not after[at])
    examples, champion_right, candidate_right, lost = len(truth), sum(before), sum(after), len(flips)
    gained = candidate_right - champion_right + lost
    return Paired(
        examples=examples,
        champion_right=champion_right,
        candidate_right=candidate_right,
        gained=gained,
        lost=lost,
        difference=(gained - lost) / examples,
        low=-_highest(lost, gained, examples, score),
        high=_highest(gained, lost, examples, score),
        confidence=confidence,
        p_value=_mcnemar(gained, lost),
        flips=flips,
    )


def _classes(name: str, values: Sequence[int], count: int | None = None) -> list[int]:
    try:
        found = list(map(operator.index, values))
    except TypeError as error:
        raise ConfigError(f"{name}: a class for each example, a whole number, is needed: {error}") from error
    if not found:
        raise ConfigError(f"{name}: there are no examples to compare the models on")
    if count is not None and len(found) != count:
        raise ConfigError(
            f"{name}: {len(found)} predicted classes for {count} labels; all must be of the same examples in one order"
        )
    return found


def _quantile(confidence: float) -> float:
    upper = 0.5 + confidence / 2
    if not 0.5 < upper < 1:
        raise ConfigError(f"confidence must lie between 0 and 1, not be {confidence!r}")
    return _NORMAL.inv_cdf(upper)


def _mcnemar(gained: int, lost: int) -> float:
    """Twice the smaller tail of the binomial distribution with the probability 1/2, at most 1.

    The terms fall from the largest on, by a ratio that is exact; only the largest needs logarithms of factorials, whose
    rounding leaves nine digits for a million pairs.
    """
    count, least = gained + lost, min(gained, lost)
    if 2 * least >= count - 1:  # the tails meet
        return 1.0
    term = total = 1.0
    for at in range(least, 0, -1):
        term *= at / (count - at + 1)
        total += term
        if term < total * _NEGLIGIBLE:
            break
    largest = math.lgamma(count + 1) - math.lgamma(least + 1) - math.lgamma(count - least + 1) - count * math.log(2)
    return min(1.0, math.exp(largest + math.log(2 * total)))


def _highest(gained: int, lost: int, examples: int, score: float) -> float:
    """The largest difference that the score test does not refuse: the upper end of Tango's interval.

    For a supposed difference ``at``, the variance is that of the most likely probabilities that have this difference.
    """
    found = (gained - lost) / examples

    def refused(at: float) -> bool:
        linear = (2 * examples - gained + lost) * at - gained - lost
        constant = -lost * at * (1 - at)
        root = math.sqrt(max(0.0, linear * linear - 8 * examples * constant))
        # the probability of a loss, in the form of the two that subtracts nothing large
        likely = (root - linear) / (4 * examples) if linear < 0 else -2 * constant / (root + linear or 1.0)
        return examples * (at - found) ** 2 > score * score * (2 * likely + at * (1 - at))

    low, high = found, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if refused(middle) else (middle, high)
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
        confidence: between 0 and 1.

    Raises:
        ConfigError: an argument outside its range.

    Example:
        >>> low, high = unpaired(48 / 80, 56 / 70, 80, 70)
        >>> round(low, 4), round(high, 4)
        (0.0524, 0.3339)
    """
    score = _quantile(confidence)
    low, high = _wilson("candidate", candidate, candidate_count, score)
    lower, higher = _wilson("champion", champion, champion_count, score)
    difference = candidate - champion
    return (
        max(-1.0, difference - math.hypot(candidate - low, higher - champion)),
        min(1.0, difference + math.hypot(high - candidate, champion - lower)),
    )


def _wilson(name: str, share: float, count: int, score: float) -> tuple[float, float]:
    if not 0 <= share <= 1:
        raise ConfigError(f"{name}: an accuracy is from 0 to 1, not {share!r}")
    if count < 1:
        raise ConfigError(f"{name}: an accuracy is of at least 1 example, not of {count!r}")
    square = score * score
    middle = (share + square / (2 * count)) / (1 + square / count)
    reach = score * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return min(share, middle - reach), max(share, middle + reach)  # rounding may miss the share itself at 0 and 1


# --- judging ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Whether an improvement was shown.

    Attributes:
        passed: it was.
        said: why, or why not, in one clause with the numbers.
    """

    passed: bool
    said: str


def judge_improvement(
    *,
    metric: str,
    mode: Mode,
    champion: float,
    candidate: float,
    paired: Paired | None = None,
    minimum: float = 0.0,
    significance: float | None = None,
) -> Judgement:
    """Judges whether a candidate is better than the champion by enough, and by more than chance.

    The values count as the decimals that they print as: from 0.2 to 0.3 is an improvement of 0.1, although the floats'
    difference is less. What is not finite never passes.

    Args:
        metric: its name, for the sentence.
        mode: ``"max"`` when more is better.
        champion: the champion's value.
        candidate: the candidate's value.
        paired: both models on the same examples; ``significance`` needs it.
        minimum: by how much the candidate must be better, in the metric's unit; just so much is enough, and 0 asks that
            it is not worse.
        significance: the largest ``p_value`` that counts as more than chance, in two-sided terms; None asks for none.

    Raises:
        ConfigError: ``minimum`` is negative or not finite, ``significance`` is not between 0 and 1, or
            ``mode`` is neither.

    Example:
        >>> judge_improvement(metric="val_accuracy", mode="max", champion=0.9, candidate=0.9012, minimum=0.005).said
        'val_accuracy rose by 0.0012, less than the 0.005 that the policy asks for'
    """
    check_mode(metric, mode)
    if not (math.isfinite(minimum) and minimum >= 0):
        raise ConfigError(f"the least improvement must be a number of at least 0, not {minimum!r}")
    if significance is not None and not 0 < significance < 1:
        raise ConfigError(f"a significance lies between 0 and 1, not {significance!r}")
    for whose, value in (("champion", champion), ("candidate", candidate)):
        if not math.isfinite(value):
            return Judgement(passed=False, said=f"{metric} of the {whose} is {value}: there is nothing to compare")
    rise = _exact(candidate) - _exact(champion)
    better = rise if mode == "max" else -rise
    moved = _movement(metric, champion, candidate)
    if better < _exact(minimum):
        return Judgement(passed=False, said=_too_little(moved, better, champion, candidate, minimum))
    if significance is None:
        return Judgement(passed=True, said=f"{moved}, {_enough(better, minimum)}")
    if paired is None:
        return Judgement(
            passed=False,
            said=f"{moved}, but only both models' predictions on the same examples say whether that is more than "
            "chance, and there are none",
        )
    return _beyond_chance(moved, _enough(better, minimum), paired, significance)


def _beyond_chance(moved: str, enough: str, paired: Paired, significance: float) -> Judgement:
    tally = f"of {paired.examples} examples {paired.gained} were gained and {paired.lost} lost"
    likely = f"p = {paired.p_value:.2g}" if paired.p_value else "p < 1e-300"
    if paired.gained <= paired.lost:
        return Judgement(passed=False, said=f"{moved}, but {tally}: the predictions are no better")
    if not paired.p_value <= significance:
        return Judgement(
            passed=False,
            said=f"{moved}, which may be chance: {tally}, {likely}, more than the {significance:g} that the policy "
            "asks for",
        )
    return Judgement(passed=True, said=f"{moved}, {enough}; {tally}, {likely}")


def _exact(value: float) -> Fraction:
    return Fraction(repr(float(value)))


def _movement(metric: str, champion: float, candidate: float) -> str:
    if candidate == champion:
        return f"{metric} stayed at {champion:.6g}"
    return f"{metric} {'rose' if candidate > champion else 'fell'} by {abs(candidate - champion):.6g}"


def _enough(better: Fraction, minimum: float) -> str:
    if minimum:
        return f"at least the {minimum:.6g} that the policy asks for"
    return "which is better" if better else "which is not worse"


def _too_little(moved: str, better: Fraction, champion: float, candidate: float, minimum: float) -> str:
    asked = f"; the policy asks for an improvement of {minimum:.6g}" if minimum else ""
    if better < 0:
        return f"{moved}, from {champion:.6g} to {candidate:.6g}, and is worse{asked}"
    if not better:
        return f"{moved}{asked}"
    if f"{abs(candidate - champion):.6g}" == f"{minimum:.6g}":
        return f"{moved}, just less than the {minimum!r} that the policy asks for"
    return f"{moved}, less than the {minimum:.6g} that the policy asks for"
