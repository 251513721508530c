"""A part that saves nothing is warned of once, where something would have to be saved."""

import warnings

import pytest
import torch
from torch import nn

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer


class Stateless:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def reports(part, count=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with checkpointer(MemoryStore(), state={"model": nn.Linear(1, 1), "part": part}) as ckpt:
            for _ in range(count):
                ckpt.report(loss=1.0)
    return [str(warning.message) for warning in caught if issubclass(warning.category, pp.PeakpointWarning)]


@pytest.mark.parametrize("part", [Stateless({}), Stateless(None), Stateless([])])
def test_it_is_warned_of_once(part):
    (text,) = reports(part)
    assert f"state['part'] saves nothing: the state_dict() of {type(part).__name__} is empty" in text


@pytest.mark.slow
def test_a_metric_of_torchmetrics_is_warned_of():
    torchmetrics = pytest.importorskip("torchmetrics", reason="comes with lightning: make slow")
    (text,) = reports(torchmetrics.MeanMetric())
    assert "the state_dict() of MeanMetric is empty" in text


@pytest.mark.parametrize(
    "part",
    [
        Stateless({"a": 0}),
        Stateless(0),
        Stateless(torch.zeros(1)),
        torch.amp.GradScaler("cpu", enabled=False),
        nn.CrossEntropyLoss(),
        nn.Identity(),
        {},
        [],
        None,
        torch.Generator(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_has_nothing_to_save_is_not(part):
    assert reports(part) == []
