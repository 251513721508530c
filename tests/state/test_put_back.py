"""A resume that is refused late, by an object that takes no foreign state, leaves everything as it was."""

import argparse
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, same


class Meter:
    """Counts, in an attribute and in a list."""

    def __init__(self, count):
        self.count, self.values, self.mean = count, [count], torch.full((2,), float(count))

    def state_dict(self):
        return {"count": self.count, "values": list(self.values), "mean": self.mean.clone()}

    def load_state_dict(self, state):
        self.count, self.values[:] = state["count"], state["values"]
        self.mean.copy_(state["mean"])


class Refusing(Meter):
    """Takes half of a foreign state before it refuses the rest."""

    error = RuntimeError

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if state["count"] == 1:
            raise self.error("not mine")


class Extra(nn.Linear):
    def __init__(self, extra):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra.update(state)


class InPlaceSGD(torch.optim.SGD):
    """Writes into the moments that it has, where torch replaces them."""

    def load_state_dict(self, state_dict):
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["lr"] = saved["lr"]
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                self.state[parameter]["momentum_buffer"].copy_(state_dict["state"][index]["momentum_buffer"])


def everything(number):
    torch.manual_seed(number)
    model = nn.Sequential(Extra({"of": number}), nn.BatchNorm1d(2))
    adam = torch.optim.AdamW(model.parameters(), lr=0.1 * number)
    sgd = InPlaceSGD(model[0].parameters(), lr=0.1 * number, momentum=0.9)
    for _ in range(number):
        model(torch.randn(4, 2)).square().sum().backward()
        adam.step()
        sgd.step()
    schedulers = torch.optim.lr_scheduler.SequentialLR(
        adam,
        [torch.optim.lr_scheduler.LinearLR(adam), torch.optim.lr_scheduler.ExponentialLR(adam, 0.1 * number)],
        milestones=[number],
    )
    return {
        "model": model,
        "adam": adam,
        "sgd": sgd,
        "scheduler": schedulers,
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**number),
        "meter": Meter(number),
        "tensor": torch.full((3,), float(number)),
        "array": np.full(3, float(number)),
        "options": argparse.Namespace(n=number),
        "table": {"n": number},
        "list": [number] * number,
        "count": number,
        "torch": torch.Generator().manual_seed(number),
        "numpy": np.random.default_rng(number),
        "legacy": np.random.RandomState(number),
        "python": random.Random(number),
    }


def snapshot(state):
    def of(value):
        if hasattr(value, "state_dict"):
            return value.state_dict()
        if isinstance(value, torch.Generator):
            return value.get_state()
        if isinstance(value, np.random.Generator):
            return value.bit_generator.state
        if isinstance(value, np.random.RandomState):
            return value.get_state(legacy=False)
        if isinstance(value, random.Random):
            return value.getstate()
        return vars(value) if isinstance(value, argparse.Namespace) else value

    return copy.deepcopy({name: of(value) for name, value in state.items()})


def plain(tree):
    """A tree with arrays as bytes, which can be compared."""
    if isinstance(tree, np.ndarray):
        return tree.tobytes()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def saved(state):
    root = MemoryStore()
    with checkpointer(root, state=state) as ckpt:
        ckpt.report(step=1, loss=1.0)
    return root


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError, KeyboardInterrupt])
def test_everything_is_what_it_was_when_the_last_part_refuses(error):
    root = saved({**everything(1), "last": Meter(1)})
    live = {**everything(3), "last": Refusing(3)}
    live["last"].error = error
    before, values = snapshot(live), dict(live)
    with checkpointer(root, state=live) as ckpt:
        expected = pp.errors.MismatchError if error in (RuntimeError, KeyError) else error
        with pytest.raises(expected, match="not mine"):
            ckpt.resume()
        assert all(ckpt.state[name] is value for name, value in values.items())
    assert same(plain(snapshot(live)), plain(before))
    assert live["last"].count == 3


def test_so_it_is_for_a_load_by_ref():
    root = saved({**everything(1), "last": Meter(1)})
    live = {**everything(3), "last": Refusing(3)}
    before = snapshot(live)
    with pytest.raises(pp.errors.MismatchError, match="Refusing refused its state: not mine"):
        pp.load("r@latest", root=root, into=live)
    assert same(plain(snapshot(live)), plain(before))


def test_without_strict_only_the_part_that_refuses_stays_as_it_was():
    first = everything(1)
    root = saved({"refusing": Meter(1), "model": first["model"]})
    live = {"refusing": Refusing(3), "model": everything(3)["model"]}
    before = snapshot({"refusing": live["refusing"]})
    with (
        pytest.warns(pp.PeakpointWarning, match="not restored: refusing: Refusing refused its state: not mine"),
        checkpointer(root, state=live, strict=False) as ckpt,
    ):
        report = ckpt.resume()
    assert [part.part for part in report.restored] == ["model"]
    assert same(plain(snapshot({"refusing": live["refusing"]})), plain(before))
    assert same(plain(snapshot({"model": live["model"]})), plain(snapshot({"model": first["model"]})))


def test_training_after_a_refusal_is_as_if_nothing_had_been_tried():
    def two_steps(state):
        for _ in range(2):
            state["model"](torch.randn(4, 2)).square().sum().backward()
            state["adam"].step()
            state["scheduler"].step()
        return snapshot({name: state[name] for name in ("model", "adam", "scheduler")})

    root = saved({**everything(1), "last": Meter(1)})
    expected = two_steps(everything(3))
    live = {**everything(3), "last": Refusing(3)}
    numbers = torch.get_rng_state()
    with checkpointer(root, state=live) as ckpt, pytest.raises(pp.errors.MismatchError):
        ckpt.resume()
    torch.set_rng_state(numbers)
    assert same(two_steps(live), expected)


class NeverAgain(Meter):
    def load_state_dict(self, state):
        self.values.append(5)
        raise IndexError("takes nothing")


def test_an_object_that_refuses_its_own_state_too_is_named_and_has_its_attributes():
    root = saved({"meter": Meter(1)})
    live = NeverAgain(3)
    with checkpointer(root, state={"meter": live}) as ckpt, pytest.raises(pp.errors.MismatchError) as caught:
        ckpt.resume()
    assert (live.count, live.values) == (3, [3])
    assert caught.value.__notes__ == [
        "peakpoint: meter refused its own earlier state, too: make it anew before you go on"
    ]


def test_lazy_parameters_are_lazy_again():
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    model(torch.randn(4, 3))
    root = saved({"model": model, "last": Meter(1)})
    live = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with (
        checkpointer(root, state={"model": live, "last": Refusing(3)}) as ckpt,
        pytest.raises(pp.errors.MismatchError),
    ):
        ckpt.resume()
    assert all(map(nn.parameter.is_lazy, live.parameters()))
    live(torch.randn(4, 5))
    assert live[0].weight.shape == (2, 5)
