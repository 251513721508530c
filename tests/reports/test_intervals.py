"""The intervals by Young and Daly beside the true optimum, and the expected loss beside trainings that fail."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from peakpoint.errors import ConfigError
from peakpoint.reports.plan.intervals import Failures, daly, young

minutes = st.floats(1, 1e5)


def optimum(failures):
    """The interval with the least loss, found numerically."""
    found = minimize_scalar(
        lambda log: failures.overhead(math.exp(log)),
        bounds=(math.log(failures.stall / 1e3), math.log(failures.mtbf * 10)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return math.exp(found.x)


@given(minutes, st.floats(1e-5, 0.3))
@example(28800.0, 1e-5)
def test_dalys_interval_is_near_the_true_optimum(mtbf, share):
    failures = Failures(mtbf=mtbf, stall=share * mtbf)
    best = optimum(failures)
    assert daly(failures.stall, mtbf) == pytest.approx(best, rel=0.02)
    assert failures.overhead(daly(failures.stall, mtbf)) == pytest.approx(failures.overhead(best), rel=1e-3)
    # to first order only, and further away
    assert abs(daly(failures.stall, mtbf) - best) <= abs(young(failures.stall, mtbf) - best) + 1e-3 * best


@given(minutes, st.floats(1e-4, 0.3), st.floats(0, 1), st.floats(0, 2))
def test_the_optimum_does_not_depend_on_restarts_and_durability(mtbf, share, durable, restart):
    bare = Failures(mtbf=mtbf, stall=share * mtbf)
    interval = daly(bare.stall, mtbf)
    later = Failures(mtbf=mtbf, stall=bare.stall, durable=bare.stall + durable * interval, restart=restart * mtbf)
    assert later.best == interval
    assert optimum(later) >= later.durable - later.stall - 1e-3 * interval
    if later.durable - later.stall < 0.9 * interval:
        assert optimum(later) == pytest.approx(optimum(bare), rel=1e-3)


def simulated(failures, interval, saves, seed):
    """Seconds that a training takes for so much work, with random failures, played event by event."""
    draw = random.Random(seed)
    now, failure = 0.0, draw.expovariate(1 / failures.mtbf)
    durable = 0  # segments that are safe
    cycle = max(interval + failures.stall, failures.durable)
    late = failures.durable - failures.stall
    while durable < saves:
        begin, first = now, durable
        # uninterrupted from here, segment k is durable at begin + k * cycle + late
        while durable < saves and begin + (durable - first + 1) * cycle + late <= failure:
            durable += 1
        if durable == saves:
            return begin + (saves - first) * cycle  # the training goes on while the last is written
        now = failure
        while True:  # a restart can fail as well
            failure = now + draw.expovariate(1 / failures.mtbf)
            if failure - now >= failures.restart:
                now += failures.restart
                break
            now = failure
    raise AssertionError


@pytest.mark.parametrize(
    ("failures", "interval"),
    [
        (Failures(mtbf=100, stall=2), 20),
        (Failures(mtbf=100, stall=2, durable=12, restart=15), 20),
        (Failures(mtbf=50, stall=1, durable=30), 30),
        (Failures(mtbf=100, stall=1, durable=40), 10),  # the next save waits for the one before
    ],
)
def test_the_expected_loss_is_that_of_trainings_that_fail(failures, interval):
    saves, runs = 400, 60
    taken = sum(simulated(failures, interval, saves, seed) for seed in range(runs)) / runs
    assert taken / (saves * interval) - 1 == pytest.approx(failures.overhead(interval), rel=0.05)


def test_where_a_save_costs_more_than_failures_leave():
    assert daly(200, 100) == 100
    assert daly(1000, 100) == 100
    assert Failures(mtbf=1, stall=1e4).overhead(1) == math.inf
    assert Failures(mtbf=1000, stall=0.01, durable=60).best == pytest.approx(59.99)


@pytest.mark.parametrize(
    "times", [{"mtbf": 0, "stall": 1}, {"mtbf": 1, "stall": -1}, {"mtbf": 1, "stall": 1, "durable": math.nan}]
)
def test_times_that_cannot_be(times):
    with pytest.raises(ConfigError, match="must be seconds"):
        Failures(**times)


def test_an_interval_that_cannot_be():
    with pytest.raises(ConfigError, match="interval=0"):
        Failures(mtbf=1, stall=1).overhead(0)
