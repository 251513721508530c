"""What chance explains, against SciPy, published tables and simulations."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peakpoint.reports.evaluation.noise import (
    LEAST_VALUES,
    expected_best,
    margin_of_best,
    of_curve,
    of_proportion,
    student,
    welch,
)

stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle")


# Harter, Biometrika 48, 1961, table 1
@pytest.mark.parametrize(
    ("count", "mean"), [(1, 0), (2, 0.56419), (3, 0.84628), (10, 1.53875), (100, 2.50759), (400, 2.96818)]
)
def test_the_expected_best_is_that_of_the_table(count, mean):
    assert expected_best(count) == pytest.approx(mean, abs=6e-6)


@given(st.integers(2, 3000), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_margin_gives_the_probability_that_it_promises(count, confidence):
    margin = margin_of_best(count, confidence)
    # the same integral, on a fine grid of quantiles of x
    places = [(at + 0.5) / 4000 for at in range(4000)]
    reached = sum(stats.norm.cdf(stats.norm.ppf(places) + margin) ** (count - 1)) / 4000
    assert reached == pytest.approx(confidence, abs=1e-3)


# Bechhofer, Annals of Mathematical Statistics 25, 1954, table I (t = 1), which has the same constant
@pytest.mark.parametrize(("count", "margin"), [(2, 2.3262), (3, 2.7101), (5, 3.0552), (10, 3.4182)])
def test_the_margin_is_that_of_the_table(count, margin):
    assert margin_of_best(count) == pytest.approx(margin, abs=2e-4)


def test_a_million_values_are_no_problem():
    assert expected_best(10**6) == pytest.approx(4.8629, abs=1e-3)
    assert margin_of_best(10**6) == pytest.approx(6.561, abs=1e-2)


@given(st.floats(0.5, 0.9999), st.floats(1, 1e6))
def test_students_quantile_is_scipys(probability, freedom):
    assert stats.t.cdf(student(probability, freedom), freedom) == pytest.approx(probability, abs=5e-6)


values = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(values, values, st.sampled_from([0.9, 0.95, 0.99]))
def test_welch_is_scipys(one, other, confidence):
    found = welch(one, other, confidence)
    if len({*one}) == 1 and len({*other}) == 1:
        assert found is None
        return
    if min(max(one) - min(one), max(other) - min(other)) < 1e-3:
        return  # what SciPy itself calls a loss of precision
    theirs = stats.ttest_ind(one, other, equal_var=False).confidence_interval(confidence)
    scale = 1 + abs(theirs.low) + abs(theirs.high)
    assert found.low == pytest.approx(theirs.low, abs=1e-4 * scale)
    assert found.high == pytest.approx(theirs.high, abs=1e-4 * scale)


@pytest.mark.parametrize(
    ("one", "other"), [([1.0], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0]), ([1e308, -1e308], [1.0, 2.0])]
)
def test_what_cannot_be_told_is_not_told(one, other):
    assert welch(one, other) is None


@given(st.integers(1, 10**7), st.floats(0, 1))
def test_a_proportions_error_is_the_binomials(count, share):
    inside = min(max(share, 0.5 / count), 1 - 0.5 / count)
    assert of_proportion(share, count) == pytest.approx(stats.binom(count, inside).std() / count)
    assert of_proportion(share, count) > 0


@given(st.lists(st.floats(-1e6, 1e6), max_size=40), st.floats(-10, 10), st.floats(-10, 10), st.floats(0.1, 10))
def test_trends_are_no_noise_and_units_do_not_matter(noise, level, slope, unit):
    plain = of_curve(noise)
    moved = of_curve([unit * (value + level + slope * at) for at, value in enumerate(noise)])
    if len(noise) < LEAST_VALUES:
        assert plain is None
        assert moved is None
    elif plain is not None and moved is not None:  # a slope may hide rounding
        assert moved.se == pytest.approx(unit * plain.se, rel=1e-6, abs=1e-8)
        assert moved.source == plain.source


@pytest.mark.parametrize("count", [1000, 4000])
def test_the_scatter_of_a_curve_is_found(count):
    chance = random.Random(5)
    curve = [math.sin(at / count) + chance.gauss(0, 0.03) for at in range(count)]
    curve[-20] = 50.0  # an outlier
    assert of_curve(curve).se == pytest.approx(0.03, rel=0.15)


@pytest.mark.parametrize("count", [12, 30, 60, 300])
def test_nineteen_of_twenty_runs_without_a_peak_have_none(count):
    """With the noise estimated from the curve itself; 1500 simulated runs, so 5 % is 3.3 % to 6.7 % (3 sigma)."""
    chance = random.Random(count)
    peaks = unknown = 0
    for _ in range(1500):
        curve = [chance.gauss(0.7, 0.01) for _ in range(count)]
        noise = of_curve(curve)
        unknown += noise is None
        peaks += noise is not None and max(curve) - curve[-1] > noise.margin(count)
    assert 0.025 <= peaks / 1500 <= 0.075
    assert unknown / 1500 <= 0.18


@pytest.mark.parametrize("count", [12, 20, 40, 100])
@pytest.mark.parametrize("steps", [None, 1000])
@pytest.mark.parametrize(
    "rate", [lambda part: 0.1 ** int(4 * part), lambda part: (1 + math.cos(math.pi * part)) / 2, lambda part: 1 - part]
)
def test_a_learning_rate_that_decays_makes_no_peaks(count, steps, rate):
    """The same level all the time, and noise that shrinks with the learning rate."""
    chance = random.Random(count)
    peaks = 0
    for _ in range(1500):
        curve = [0.7 + rate(at / count) * chance.gauss(0, 0.01) for at in range(count)]
        curve = curve if steps is None else [round(value * steps) / steps for value in curve]
        noise = of_curve(curve)
        peaks += noise is not None and max(curve) - curve[-1] > noise.margin(count)
    assert peaks / 1500 <= 0.075
