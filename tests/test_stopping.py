"""Early stopping: a pure function of the history."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peakpoint.errors import ConfigError
from peakpoint.stopping import EarlyStopping
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
    with pytest.raises(TypeError):
        EarlyStopping("loss")
    for mode in ("Min", None, "", ["min"]):
        with pytest.raises(ConfigError, match="never guessed"):
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
