"""Comparing two models, against SciPy, published examples, Tango's definition and exact coverage."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peakpoint.errors import ConfigError
from peakpoint.production.paired_test import Paired, paired, unpaired
from peakpoint.production.policy import Improvement
from peakpoint.production.proposal import lack_of_improvement

stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle")
optimize = pytest.importorskip("scipy.optimize")

COUNTS = st.integers(0, 60)


def of_counts(both: int, lost: int, gained: int, neither: int, confidence: float = 0.95) -> Paired:
    champion = [0] * both + [0] * lost + [1] * gained + [1] * neither
    candidate = [0] * both + [1] * lost + [0] * gained + [1] * neither
    return paired(champion, candidate, [0] * len(champion), confidence=confidence)


# --- two models on the same examples --------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=60))
def test_the_counts_are_those_of_the_examples(rows):
    champion, candidate, labels = (list(column) for column in zip(*rows, strict=True))
    found = paired(champion, candidate, labels)
    assert found.examples == len(rows)
    assert found.champion_right == sum(a == c for a, _, c in rows)
    assert found.candidate_right == sum(b == c for _, b, c in rows)
    assert found.gained == sum(a != c and b == c for a, b, c in rows)
    assert found.flips == tuple(at for at, (a, b, c) in enumerate(rows) if a == c and b != c)
    assert found.lost == len(found.flips)
    assert found.difference == pytest.approx((found.candidate_right - found.champion_right) / len(rows))


# Fagerland, Lydersen & Laake, Statistics in Medicine 33, 2014: airway hyper-responsiveness before and after stem cell
# transplantation. Cavo et al. 2012 in Fagerland, Lydersen & Laake, "Statistical Analysis of Contingency Tables", 2017,
# chapter 8. The last is what the R package PropCIs prints for scoreci.mp(25, 28, 618) at 90 %.
@pytest.mark.parametrize(
    ("cells", "confidence", "low", "high"),
    [
        ((1, 7, 1, 12), 0.95, -0.517, -0.026),
        ((59, 16, 6, 80), 0.95, -0.1240, -0.0054),
        ((500, 25, 28, 65), 0.90, -0.0148, 0.0247),
    ],
)
def test_the_interval_is_that_of_published_examples(cells, confidence, low, high):
    found = of_counts(*cells, confidence=confidence)
    digits = 3 if cells[0] == 1 else 4
    assert (round(found.low, digits), round(found.high, digits)) == (low, high)


def test_mcnemar_is_that_of_a_published_example():
    assert of_counts(59, 16, 6, 80).p_value == pytest.approx(0.0525, abs=5e-5)  # Fagerland et al. 2017, chapter 8


def by_definition(at: float, gained: int, lost: int, examples: int) -> float:
    """Tango's statistic, with the restricted likelihood maximised by search instead of by its formula."""

    def unlikely(loss):
        rest = 1 - 2 * loss - at
        return -sum(
            count * math.log(max(share, 1e-300))
            for count, share in ((gained, loss + at), (lost, loss), (examples - gained - lost, rest))
            if count
        )

    loss = optimize.minimize_scalar(
        unlikely, bounds=(max(0.0, -at), (1 - at) / 2), method="bounded", options={"xatol": 1e-12}
    ).x
    return (gained - lost - examples * at) / math.sqrt(examples * (2 * loss + at * (1 - at)))


@given(COUNTS, COUNTS, st.integers(1, 200), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_ends_of_the_interval_are_where_the_score_test_turns(lost, gained, same, confidence):
    found = of_counts(same, lost, gained, 0, confidence)
    quantile = stats.norm.ppf(0.5 + confidence / 2)
    assert by_definition(found.low, gained, lost, found.examples) == pytest.approx(quantile, rel=1e-3)
    assert by_definition(found.high, gained, lost, found.examples) == pytest.approx(-quantile, rel=1e-3)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
@example(0, 0, 7, 0)
@example(5, 0, 0, 0)
def test_exchanging_the_models_mirrors_everything(both, lost, gained, neither):
    if not both + lost + gained + neither:
        return
    one, other = of_counts(both, lost, gained, neither), of_counts(both, gained, lost, neither)
    assert (one.low, one.high, one.p_value) == (-other.high, -other.low, other.p_value)
    assert (one.gained, one.lost, one.difference) == (other.lost, other.gained, -other.difference)
    assert -1 <= one.low <= one.difference <= one.high <= 1
    if not lost + gained:
        assert one.p_value == 1
        assert one.low < 0 < one.high


@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.1, 0.02), (0.3, 0.2), (0.02, 0.02), (0.5, 0.1)])
@pytest.mark.parametrize("examples", [20, 60])
def test_the_interval_holds_the_truth_as_often_as_it_says(shares, examples):
    """Exactly, by adding up the probabilities of all outcomes whose interval does."""
    gain, loss = shares
    covered = 0.0
    for gained in range(examples + 1):
        for lost in range(examples + 1 - gained):
            chance = stats.multinomial.pmf(
                [gained, lost, examples - gained - lost], examples, [gain, loss, 1 - gain - loss]
            )
            if chance < 1e-9:
                continue
            found = of_counts(examples - gained - lost, lost, gained, 0)
            covered += chance * (found.low <= gain - loss <= found.high)
    few = examples * (gain + loss) < 3  # a test of hardly anything is a cautious one
    assert 0.93 < covered < (1 if few else 0.98)


def test_the_interval_and_the_test_hold_in_simulated_training():
    """Equal models on ten thousand examples: one of twenty is called different, and the interval misses 0 as often."""
    draw = random.Random(7)
    missed = called = 0
    rounds = 1000
    for _ in range(rounds):
        differing = 300 + sum(draw.random() < 0.5 for _ in range(60))
        gained = draw.getrandbits(differing).bit_count()
        found = of_counts(9000, differing - gained, gained, 1000 - differing)
        missed += not found.low <= 0 <= found.high
        called += found.p_value <= 0.05
    assert 0.035 < missed / rounds < 0.065
    assert 0.025 < called / rounds < 0.055  # the exact test never exceeds its level


@given(st.integers(0, 3000), st.integers(0, 3000))
@example(0, 0)
@example(6, 0)
@example(3, 4)
@example(0, 1000)
def test_mcnemars_test_is_the_binomial_one(gained, lost):
    found = of_counts(1, lost, gained, 0)
    wanted = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.p_value == pytest.approx(wanted, rel=1e-8, abs=1e-250)  # where SciPy says 0, see below


@given(st.integers(0, 1500), st.integers(0, 1500))
@example(10, 1065)
@example(0, 1074)
@example(0, 1076)
def test_mcnemars_test_is_exact(gained, lost):
    """In whole numbers; down to the smallest floats."""
    count, term, tail = gained + lost, 1, 1
    for at in range(min(gained, lost)):
        term = term * (count - at) // (at + 1)
        tail += term
    wanted = float(min(Fraction(1), Fraction(2 * tail, 2**count)))
    assert of_counts(1, lost, gained, 0).p_value == pytest.approx(wanted, rel=1e-10, abs=1e-322)


def test_a_million_examples():
    draw = random.Random(1)
    labels = [draw.randrange(10) for _ in range(1_000_000)]
    champion = [label if draw.random() < 0.9 else 10 for label in labels]
    candidate = [label if draw.random() < 0.901 else 10 for label in labels]
    found = paired(champion, candidate, labels)
    assert found.p_value == pytest.approx(stats.binomtest(found.gained, found.gained + found.lost).pvalue, rel=1e-6)
    # so many are normal: the interval of Wald
    spread = math.sqrt((found.gained + found.lost) / 1e6 - found.difference**2) / 1e3
    assert found.low == pytest.approx(found.difference - 1.959964 * spread, abs=1e-7)
    assert found.high == pytest.approx(found.difference + 1.959964 * spread, abs=1e-7)


def test_classes_may_be_those_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert paired(numpy.array([1, 2]), numpy.array([1, 3]), numpy.array([1, 3])) == paired([1, 2], [1, 3], [1, 3])


# --- two accuracies -------------------------------------------------------------------------------------------------


# Newcombe, "Interval estimation for the difference between independent proportions", table II, method 10
@pytest.mark.parametrize(
    ("one", "of_one", "other", "of_other", "low", "high"),
    [
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_independent_accuracies_have_the_published_interval(one, of_one, other, of_other, low, high):
    found = unpaired(other / of_other, one / of_one, of_other, of_one)
    assert found == pytest.approx((low, high), abs=5.1e-5)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**7), st.integers(1, 10**7))
def test_the_interval_of_two_accuracies_holds_their_difference(one, other, of_one, of_other):
    low, high = unpaired(one, other, of_one, of_other)
    assert -1 <= low <= other - one <= high <= 1
    assert unpaired(other, one, of_other, of_one) == pytest.approx((-high, -low), abs=1e-12)


# --- judging --------------------------------------------------------------------------------------------------------


def objection_to(champion, candidate, minimum=0.0, *, mode="max", evidence=None, significance=None):
    improvement = Improvement(metric="val_accuracy", mode=mode, minimum=minimum, significance=significance)
    return lack_of_improvement(improvement, champion, candidate, evidence)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 300), st.sampled_from(["max", "min"]))
def test_just_enough_is_enough(champion, candidate, minimum, mode):
    """In thousandths, for which floats have no exact values."""
    objection = objection_to(champion / 1000, candidate / 1000, minimum / 1000, mode=mode)
    better = candidate - champion if mode == "max" else champion - candidate
    assert (objection is None) == (better >= minimum), objection


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(), st.booleans(), st.sampled_from(["max", "min"]))
def test_what_is_not_finite_never_passes(wrong, value, first, mode):
    pair = (wrong, value) if first else (value, wrong)
    assert "there is nothing to compare" in objection_to(*pair, mode=mode)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_any_two_numbers_are_judged(champion, candidate):
    assert (objection_to(champion, candidate) is None) == (candidate >= champion)
    assert (objection_to(champion, candidate, mode="min") is None) == (candidate <= champion)


def test_the_sentences_carry_the_numbers():
    assert objection_to(0.9, 0.9012, 0.005) == (
        "val_accuracy rose by 0.0012, less than the 0.005 that the policy asks for"
    )
    assert objection_to(0.9, 0.91, 0.005) is None
    assert objection_to(0.9, 0.89) == "val_accuracy fell by 0.01, from 0.9 to 0.89, and is worse"
    assert objection_to(0.9, 0.89, 0.005) == (
        "val_accuracy fell by 0.01, from 0.9 to 0.89, and is worse; the policy asks for an improvement of 0.005"
    )
    assert objection_to(0.9, 0.9, 0.005) == "val_accuracy stayed at 0.9; the policy asks for an improvement of 0.005"
    assert objection_to(0.9, 0.9) is None
    assert objection_to(0.9, 0.9049999999, 0.005).endswith("just less than the 0.005 that the policy asks for")
    assert objection_to(0.9, 0.95) is None
    assert objection_to(2.0, 1.5, 0.25, mode="min") is None


def test_a_significance_needs_evidence_in_the_right_direction():
    better, worse, little = of_counts(800, 5, 40, 155), of_counts(800, 40, 5, 155), of_counts(800, 8, 14, 178)
    assert objection_to(0.9, 0.935, evidence=better, significance=0.05) is None
    assert "on the same examples" in objection_to(0.9, 0.935, significance=0.05)
    chance = objection_to(0.9, 0.906, evidence=little, significance=0.05)
    assert "which may be chance: of 1000 examples 14 were gained and 8 lost" in chance
    assert "p = 0.29, more than the 0.05 that the policy asks for" in chance
    assert "the predictions are no better" in objection_to(0.9, 0.935, evidence=worse, significance=0.05)
    # too little is too little, however sure
    assert "less than the 0.05" in objection_to(0.9, 0.935, 0.05, evidence=better, significance=0.05)
    # without a significance the evidence does not matter
    assert objection_to(0.9, 0.935, evidence=worse) is None


@given(COUNTS, COUNTS, st.sampled_from([0.001, 0.05, 0.5]))
def test_significance_is_judged_by_the_test(lost, gained, significance):
    evidence = of_counts(10, lost, gained, 0)
    objection = objection_to(0.5, 0.6, evidence=evidence, significance=significance)
    assert (objection is None) == (gained > lost and evidence.p_value <= significance)


def test_settings_that_cannot_be_are_refused():
    for minimum in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="minimum"):
            objection_to(0.5, 0.6, minimum)
    for significance in (0, 1, math.nan, 5):
        with pytest.raises(ConfigError, match="significance"):
            objection_to(0.5, 0.6, significance=significance)
    with pytest.raises(ConfigError):
        objection_to(0.5, 0.6, mode="maximum")
