"""Early stopping: a pure function of the history."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peakpoint.errors import ConfigError
from peakpoint.rules.stopping import EarlyStopping, StoppingState
from strategies import values

histories = st.lists(st.dictionaries(st.sampled_from(["m", "other"]), values, max_size=2), max_size=20)
rules = st.builds(
    EarlyStopping,
    st.just("m"),
    st.sampled_from(["max", "min"]),
    patience=st.integers(1, 5),
    min_delta=st.sampled_from([0.0, 0.5, 1.0, 1e-9, 1e300]),
)


def waited(rule, history):
    """How many reports of the metric stand after the last improvement: looked for from each report backwards."""
    seen = [metrics["m"] for metrics in history if "m" in metrics]
    improvements = []
    for place, value in enumerate(seen):
        if not math.isfinite(value):
            continue
        best = seen[improvements[-1]] if improvements else None
        if best is None or (value - best if rule.mode == "max" else best - value) > rule.min_delta:
            improvements.append(place)
    return len(seen) - (improvements[-1] + 1 if improvements else 0)


def losses(*found):
    return [{"loss": loss} for loss in found]


@settings(max_examples=300)
@given(rules, histories)
def test_it_stops_when_patience_reports_brought_no_improvement(rule, history):
    verdict = rule.verdict(history)
    assert (verdict is not None) == (waited(rule, history) >= rule.patience)
    if verdict is not None:
        assert verdict.startswith("m has not improved")
        assert f"for {waited(rule, history)} reports (patience {rule.patience})" in verdict


@given(rules, histories, histories)
def test_nothing_is_remembered_between_calls(rule, history, other):
    first = rule.verdict(history)
    rule.verdict(other)
    assert rule.verdict(history) == first
    assert rule.verdict(tuple(history)) == first


@given(rules, histories)
def test_reports_without_the_metric_do_not_count(rule, history):
    assert rule.verdict([metrics for metrics in history if "m" in metrics]) == rule.verdict(history)


@given(rules, histories, st.integers(1, 5))
def test_more_patience_never_stops_earlier(rule, history, more):
    patient = EarlyStopping("m", rule.mode, rule.patience + more, rule.min_delta)
    if patient.verdict(history) is not None:
        assert rule.verdict(history) is not None


@given(rules, histories)
def test_min_is_max_of_the_negated_values(rule, history):
    mirror = EarlyStopping("m", "min" if rule.mode == "max" else "max", rule.patience, rule.min_delta)
    mirrored = [{name: -value for name, value in metrics.items()} for metrics in history]
    assert (mirror.verdict(mirrored) is None) == (rule.verdict(history) is None)


def test_examples():
    rule = EarlyStopping("loss", "min", patience=2)
    assert rule.verdict([]) is None
    assert rule.verdict(losses(1.0, 1.1)) is None
    assert rule.verdict(losses(1.0, 1.1, 1.2)) == (
        "loss has not improved on 1 by more than 0 for 2 reports (patience 2)"
    )
    assert rule.verdict(losses(1.0, 1.1, 0.9, 1.0)) is None
    assert rule.verdict(losses(1.0, 1.0, 1.0)) is not None  # the same again is no improvement


def test_min_delta_is_measured_from_the_last_improvement_and_must_be_exceeded():
    rule = EarlyStopping("loss", "min", patience=2, min_delta=0.5)
    assert rule.verdict(losses(2.0, 1.5, 1.5)) is not None  # exactly min_delta is not enough
    assert rule.verdict(losses(2.0, 1.75, 1.25)) is None  # small steps add up
    best = EarlyStopping("acc", "max", patience=1, min_delta=0.5)
    assert best.verdict([{"acc": 1.0}, {"acc": 1.25}]) is not None
    assert best.verdict([{"acc": 1.0}, {"acc": 1.75}]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_values_that_are_not_finite_are_waited_through_and_never_the_best(bad, mode):
    rule = EarlyStopping("loss", mode, patience=2)
    assert rule.verdict(losses(bad)) is None
    assert rule.verdict(losses(bad, bad)) is not None
    assert rule.verdict(losses(bad, 1.0)) is None
    assert "improved on 1 by" in rule.verdict(losses(1.0, bad, bad))
    assert rule.verdict(losses(1.0, bad, 2.0 if mode == "max" else 0.5)) is None


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="'mode'; write EarlyStopping"):
        EarlyStopping("loss")
    for mode in ("Min", None, "", ["min"]):
        with pytest.raises(ConfigError, match="mode must be"):
            EarlyStopping("loss", mode)
    for patience in (0, -1, 1.5, True, None, "3"):
        with pytest.raises(ConfigError, match="patience"):
            EarlyStopping("loss", "min", patience=patience)
    for delta in (-1e-9, math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match="min_delta"):
            EarlyStopping("loss", "min", min_delta=delta)
    for metric in ("", "a b", None):
        with pytest.raises(ConfigError, match="metric"):
            EarlyStopping(metric, "min")


@given(rules, histories)
def test_report_by_report_is_the_same_as_all_at_once(rule, history):
    watch = StoppingState(rule)
    for number, metrics in enumerate(history, 1):
        watch.report(metrics)
        assert watch.why == rule.verdict(history[:number])


@given(rules, histories, st.integers(0, 6))
def test_a_warm_up_is_as_if_it_had_not_been(rule, history, warmup):
    later, seen = [], 0
    for metrics in history:
        seen += "m" in metrics
        if seen > warmup:
            later.append(metrics)
    assert replace(rule, warmup=warmup).verdict(history) == rule.verdict(later)


def test_a_relative_delta_grows_with_the_best():
    rule = EarlyStopping("loss", "min", patience=1, min_delta=0.1, relative=True)
    assert rule.verdict(losses(10.0, 8.9)) is None
    assert rule.verdict(losses(10.0, 9.1)) == (
        "loss has not improved on 10 by more than 0.1 of it for 1 reports (patience 1)"
    )
    assert rule.verdict(losses(0.10, 0.089)) is None


def test_goal_and_divergence():
    rule = EarlyStopping("loss", "min", goal=0.1, diverged=5.0)
    assert rule.verdict(losses(1.0, 0.1)) == "loss has reached its goal: 0.1 is at most 0.1"
    assert rule.verdict(losses(1.0, 5.0)) is None
    assert rule.verdict(losses(1.0, 5.1)) == "loss has diverged: 5.1 is worse than 5"
    assert EarlyStopping("acc", "max", goal=0.9).verdict([{"acc": 0.91}]) == (
        "acc has reached its goal: 0.91 is at least 0.9"
    )
    assert rule.verdict([*losses(0.05), {"other": 1.0}]) is not None, "reports without the metric change nothing"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_value_that_is_not_finite_stops_only_when_asked(bad, mode):
    assert EarlyStopping("loss", mode).verdict(losses(1.0, bad)) is None
    assert EarlyStopping("loss", mode, stop_on_nan=True).verdict(losses(1.0, bad)) == f"loss is {bad}"
    assert EarlyStopping("loss", mode, goal=0.0, diverged=None).verdict(losses(bad)) is None


@pytest.mark.parametrize("mode", ["max", "min"])
def test_an_infinity_in_the_wrong_direction_has_diverged_and_one_in_the_right_reaches_no_goal(mode):
    worst, best = (-math.inf, math.inf) if mode == "max" else (math.inf, -math.inf)
    bound = -5.0 if mode == "max" else 5.0
    rule = EarlyStopping("loss", mode, diverged=bound)
    assert rule.verdict(losses(1.0, worst)) == f"loss has diverged: {worst} is worse than {bound:g}"
    assert rule.verdict(losses(1.0, best)) is None
    assert rule.verdict(losses(1.0, math.nan)) is None
    assert EarlyStopping("loss", mode, goal=0.0).verdict(losses(best)) is None


# The same curve, worked through by hand after the documentation of each: keras.callbacks.EarlyStopping (Keras 3) and
# lightning.pytorch.callbacks.EarlyStopping (2.6). Numbers are the index of the report at which each says to stop.
# rules/test_stopping_peers.py runs them.
SHARED = [
    ({"patience": 2}, [1.0, 0.9, 0.95, 0.91, 0.8], 3),
    ({"patience": 2}, [1.0, 0.9, 0.95, 0.8, 0.85, 0.8], 5),
    ({"patience": 1, "min_delta": 0.1}, [1.0, 0.95, 0.5], 1),
    ({"patience": 3, "min_delta": 0.0}, [1.0, 1.0, 1.0, 1.0], 3),
]


@pytest.mark.parametrize(("arguments", "curve", "stops_at"), SHARED)
@pytest.mark.parametrize("sign", [1, -1])
def test_it_stops_where_keras_and_lightning_do(arguments, curve, stops_at, sign):
    rule = EarlyStopping("loss", "min" if sign == 1 else "max", **arguments)
    history = losses(*(sign * value for value in curve))
    assert [rule.verdict(history[: number + 1]) is not None for number in range(stops_at + 1)] == [False] * stops_at + [
        True
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"goal": math.nan},
        {"goal": "0.9"},
        {"diverged": math.inf},
        {"warmup": -1},
        {"warmup": 1.5},
        {"relative": 1},
        {"stop_on_nan": None},
        {"goal": 5.0, "diverged": 1.0},
        {"goal": 1.0, "diverged": 1.0},
        {"min_delta": "a"},
    ],
)
def test_arguments_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="EarlyStopping"):
        EarlyStopping("loss", "min", **wrong)
