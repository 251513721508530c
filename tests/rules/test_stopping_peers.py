"""Early stopping beside the packages that people come from: Keras and Lightning run on the same curves.

What the guide's table calls the same is compared on curves of every kind; what it calls a difference is shown to be
one. Values and deltas are quarters, which single and double precision hold alike.
"""

import inspect
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peakpoint.errors import ConfigError
from peakpoint.rules.stopping import EarlyStopping, StoppingState

pytestmark = pytest.mark.slow

NAN, INF = math.nan, math.inf
quarters = st.integers(-12, 12).map(lambda number: number / 4)
deltas = st.sampled_from([0.0, 0.25, 0.5, 1.0])
modes = st.sampled_from(["min", "max"])
both_modes = pytest.mark.parametrize("mode", ["min", "max"])
SETTINGS = settings(max_examples=400, deadline=None)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # or it writes to the user's
        found = pytest.importorskip("keras", reason="needs the extra peers: make slow, or pip install -e '.[peers]'")
    return found.callbacks.EarlyStopping


@pytest.fixture(scope="module")
def lightning():
    found = pytest.importorskip(
        "lightning.pytorch.callbacks", reason="needs the extra peers: make slow, or pip install -e '.[peers]'"
    )
    return found.EarlyStopping


def here(curve, mode, **arguments):
    """The index of the report at which Peakpoint says to stop; None is a report without the metric."""
    watch = StoppingState(EarlyStopping("m", mode, **arguments))
    for index, value in enumerate(curve):
        watch.report({} if value is None else {"m": value})
        if watch.why is not None:
            return index
    return None


def in_keras(callback, curve, first=0):
    """The index of the epoch at which Keras says to stop; ``first`` is where a training goes on."""
    model = SimpleNamespace(stop_training=False)
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(curve, first):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Early stopping conditioned on metric `m` which is not available")
            callback.on_epoch_end(epoch, {} if value is None else {"m": value})
        if model.stop_training:
            return epoch
    return None


def in_lightning(callback, curve, first=0):
    """The index of the validation at which Lightning says to stop; ``first`` is where a training goes on."""
    from lightning.pytorch.trainer.states import TrainerFn

    trainer = SimpleNamespace(
        should_stop=False,
        fast_dev_run=False,
        sanity_checking=False,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, **_: decision),
    )
    for index, value in enumerate(curve, first):
        trainer.current_epoch = index
        trainer.callback_metrics = {} if value is None else {"m": torch.tensor(value)}
        callback.on_validation_end(trainer, None)
        if trainer.should_stop:
            return index
    return None


def curve_for(mode, losses):
    """Losses as they are, or turned around for a metric that grows."""
    return [loss if mode == "min" or loss is None else -loss for loss in losses]


# --- the same ------------------------------------------------------------------------------------------------------


@st.composite
def losses(draw, odd):
    """Steps up and down by quarters, so that improvements below, at and above the delta occur, and odd values."""
    values = [draw(quarters)]
    for step in draw(st.lists(st.integers(-4, 4), max_size=15)):
        values.append(values[-1] + step / 4)
    places = draw(st.lists(st.sampled_from(odd), max_size=len(values)))
    places += [0.0] * (len(values) - len(places))
    shuffled = draw(st.permutations(places))
    return [value if place == 0 else place for value, place in zip(values, shuffled, strict=True)]


@SETTINGS
@given(losses((0.0, 0.0, NAN, INF, None)), modes, st.integers(0, 5), deltas)
def test_keras_patience_and_delta(keras, losses, mode, patience, delta):
    first = next((loss for loss in losses if loss is not None), 0.0)
    assume(math.isfinite(first))
    curve = curve_for(mode, losses)
    theirs = in_keras(keras("m", min_delta=delta, patience=patience, mode=mode), curve)
    assert here(curve, mode, min_delta=delta, patience=max(patience, 1)) == theirs


@SETTINGS
@given(losses((0.0, 0.0, NAN, INF)), modes, st.integers(1, 5), deltas, st.integers(0, 6))
def test_keras_warm_up(keras, losses, mode, patience, delta, warmup):
    assume(len(losses) <= warmup or math.isfinite(losses[warmup]))
    curve = curve_for(mode, losses)
    theirs = in_keras(keras("m", min_delta=delta, patience=patience, mode=mode, start_from_epoch=warmup), curve)
    assert here(curve, mode, min_delta=delta, patience=patience, warmup=warmup) == theirs


@SETTINGS
@given(losses((0.0, 0.0, NAN, INF, None)), modes, st.integers(0, 5), deltas)
def test_lightning_patience_and_delta(lightning, losses, mode, patience, delta):
    curve = curve_for(mode, losses)
    callback = lightning("m", delta, patience, mode=mode, check_finite=False, strict=False)
    assert here(curve, mode, min_delta=delta, patience=max(patience, 1)) == in_lightning(callback, curve)


@SETTINGS
@given(losses((0.0, 0.0, 0.0, 0.0, NAN, INF, -INF)), modes, st.integers(1, 5), deltas)
def test_lightning_stops_at_what_is_not_finite(lightning, losses, mode, patience, delta):
    curve = curve_for(mode, losses)
    theirs = in_lightning(lightning("m", delta, patience, mode=mode, check_finite=True), curve)
    assert here(curve, mode, min_delta=delta, patience=patience, stop_on_nan=True) == theirs


@SETTINGS
@given(losses((0.0, 0.0, NAN, INF)), modes, st.integers(1, 5), deltas, quarters, quarters, st.booleans())
def test_lightning_goal_and_divergence(lightning, losses, mode, patience, delta, goal, diverged, finite):
    goal -= 0.125  # between the values: at the goal itself the two differ
    assume(goal < diverged)
    curve = curve_for(mode, losses)
    goal, diverged = curve_for(mode, [goal, diverged])
    theirs = in_lightning(
        lightning(
            "m",
            delta,
            patience,
            mode=mode,
            check_finite=finite,
            stopping_threshold=goal,
            divergence_threshold=diverged,
        ),
        curve,
    )
    arguments = {"min_delta": delta, "patience": patience, "stop_on_nan": finite}
    assert here(curve, mode, goal=goal, diverged=diverged, **arguments) == theirs


@SETTINGS
@given(losses((0.0, 0.0, NAN, INF)), modes, st.integers(1, 5), deltas, st.data())
def test_lightning_goes_on_from_its_state_as_the_history_does(lightning, losses, mode, patience, delta, data):
    curve = curve_for(mode, losses)
    cut = data.draw(st.integers(0, len(curve)))
    callback = lightning("m", delta, patience, mode=mode, check_finite=False)
    stopped = in_lightning(callback, curve[:cut])
    if stopped is None:
        later = lightning("m", delta, patience, mode=mode, check_finite=False)
        later.load_state_dict(callback.state_dict())
        stopped = in_lightning(later, curve[cut:], first=cut)
    assert here(curve, mode, min_delta=delta, patience=patience) == stopped


# --- the differences that the guide lists --------------------------------------------------------------------------


@both_modes
def test_patience_0_is_1_there_and_refused_here(keras, lightning, mode):
    curve = curve_for(mode, [2.0, 1.0, 1.0, 1.0])
    for patience in (0, 1):
        assert in_keras(keras("m", patience=patience, mode=mode), curve) == 2
        assert in_lightning(lightning("m", patience=patience, mode=mode), curve) == 2
    assert here(curve, mode, patience=1) == 2
    with pytest.raises(ConfigError, match="patience"):
        EarlyStopping("m", mode, patience=0)


def test_defaults(keras, lightning):
    def default(callback, name):
        return inspect.signature(callback).parameters[name].default

    assert (EarlyStopping("m", "min").patience, default(keras, "patience"), default(lightning, "patience")) == (
        10,
        0,
        3,
    )
    assert (default(keras, "mode"), default(lightning, "mode")) == ("auto", "min")
    assert default(EarlyStopping, "mode") is inspect.Parameter.empty
    assert default(lightning, "check_finite") is True
    assert EarlyStopping("m", "min").stop_on_nan is False
    # what the others do not have
    assert "start_from_epoch" not in inspect.signature(lightning).parameters
    assert (
        not {"stopping_threshold", "divergence_threshold", "check_finite"} & inspect.signature(keras).parameters.keys()
    )
    assert "baseline" not in inspect.signature(lightning).parameters


def test_keras_guesses_the_direction_from_the_name(keras):
    callback = keras("val_loss", patience=1)
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.on_train_begin()
    callback.on_epoch_end(0, {"val_loss": 1.0})
    callback.on_epoch_end(1, {"val_loss": 2.0})
    assert callback.model.stop_training
    with pytest.raises(ConfigError, match="mode"):
        EarlyStopping("val_loss")


@both_modes
def test_a_first_nan_stays_the_best_in_keras(keras, lightning, mode):
    curve = curve_for(mode, [NAN, 3.0, 2.0, 1.0])
    assert in_keras(keras("m", patience=2, mode=mode), curve) == 2
    assert in_lightning(lightning("m", patience=2, mode=mode, check_finite=False), curve) is None
    assert here(curve, mode, patience=2) is None


@both_modes
def test_a_first_infinity_is_an_improvement_in_keras(keras, lightning, mode):
    curve = curve_for(mode, [INF, INF])
    assert in_keras(keras("m", patience=1, mode=mode), curve) == 1
    assert in_lightning(lightning("m", patience=1, mode=mode, check_finite=False), curve) == 0
    assert here(curve, mode, patience=1) == 0


@both_modes
def test_the_infinity_that_is_better_than_everything_is_an_improvement_there(keras, lightning, mode):
    curve = curve_for(mode, [3.0, -INF, 2.0, 1.0])
    assert in_keras(keras("m", patience=2, mode=mode), curve) == 3
    assert in_lightning(lightning("m", patience=2, mode=mode, check_finite=False), curve) == 3
    assert here(curve, mode, patience=2) is None


@both_modes
def test_lightning_stops_at_nan_by_default(lightning, mode):
    for odd in (NAN, INF, -INF):
        curve = curve_for(mode, [1.0, odd, 0.5])
        assert in_lightning(lightning("m", mode=mode), curve) == 1
        assert here(curve, mode) is None
        assert here(curve, mode, stop_on_nan=True) == 1


@both_modes
def test_the_goal_itself_is_enough_here(lightning, mode):
    curve = curve_for(mode, [3.0, 2.0, 1.0])
    goal = curve[1]
    assert in_lightning(lightning("m", mode=mode, stopping_threshold=goal), curve) == 2
    assert here(curve, mode, goal=goal) == 1


@both_modes
def test_an_infinity_reaches_no_goal_here(lightning, mode):
    curve = curve_for(mode, [3.0, -INF, 2.0])
    goal = curve_for(mode, [1.0])[0]
    assert in_lightning(lightning("m", mode=mode, stopping_threshold=goal, check_finite=False), curve) == 1
    assert here(curve, mode, goal=goal) is None


@both_modes
def test_the_baseline_of_keras_is_no_goal(keras, mode):
    # it does not end a training that is good enough, but one that does not become good enough
    curve = curve_for(mode, [5.0, 4.0, 3.0, 3.0])
    baseline = curve_for(mode, [1.0])[0]
    assert in_keras(keras("m", patience=2, mode=mode, baseline=baseline), curve) == 3
    assert here(curve, mode, patience=2) is None
    assert here(curve, mode, patience=2, goal=baseline) is None
    good = curve_for(mode, [0.5, 0.25, 0.0])
    assert in_keras(keras("m", patience=2, mode=mode, baseline=baseline), good) is None
    assert here(good, mode, patience=2, goal=baseline) == 0


@both_modes
def test_a_warm_up_counts_epochs_in_keras_and_values_here(keras, mode):
    curve = curve_for(mode, [None, 1.0, 2.0, 2.0])
    assert in_keras(keras("m", patience=1, mode=mode, start_from_epoch=1), curve) == 2
    assert here(curve, mode, patience=1, warmup=1) == 3


def test_a_report_without_the_metric(keras, lightning):
    callback = keras("m", mode="min")
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.on_train_begin()
    with pytest.warns(UserWarning, match="not available"):
        callback.on_epoch_end(0, {"other": 1.0})
    with pytest.raises(RuntimeError, match="not available"):
        in_lightning(lightning("m"), [None])
    assert here([None], "min") is None


@both_modes
def test_the_others_compare_in_single_precision(keras, lightning, mode):
    curve = curve_for(mode, [1.0, 1.0 - 1e-9])
    assert in_keras(keras("m", patience=1, mode=mode), curve) == 1
    assert in_lightning(lightning("m", patience=1, mode=mode), curve) == 1
    assert here(curve, mode, patience=1) is None


@both_modes
def test_after_a_restart(keras, lightning, mode):
    curve = curve_for(mode, [1.0, 2.0, 2.0, 2.0])
    assert here(curve, mode, patience=2) == 2

    callback = keras("m", patience=2, mode=mode)
    assert in_keras(callback, curve[:2]) is None
    assert in_keras(callback, curve[2:], first=2) is None, (
        "two is the best of the new training, and was waited for once"
    )

    callback = lightning("m", patience=2, mode=mode)
    assert in_lightning(callback, curve[:2]) is None
    later = lightning("m", patience=9, mode=mode)
    later.load_state_dict(callback.state_dict())
    assert in_lightning(later, curve[2:], first=2) == 2, "the patience of the state, not the changed one"
    assert here(curve, mode, patience=9) is None
