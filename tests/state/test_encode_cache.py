"""A state that is encoded again gives what it would give if it were encoded for the first time."""

import copy
import enum
import math
from collections import OrderedDict

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.state.capture import StateEncoder
from peakpoint.state.encode_cache import EncodeCache
from peakpoint.state.typed_json import Encoder
from training import checkpointer, parts, same, train

BASE = torch.arange(64.0)
TENSORS = [
    torch.ones(3),
    torch.zeros(3),
    torch.zeros(0),
    torch.nn.Parameter(torch.ones(2, 2)),
    torch.eye(3).T,
    BASE[:8],
    BASE[8:16],
    BASE[4:12],
    torch.ones(3, dtype=torch.complex64),
    torch.tensor(1.5, requires_grad=True),
]
TENSORS += [TENSORS[0], torch.ones(4, dtype=torch.complex64).conj(), BASE[:8].view(2, 4)]


class Colour(enum.Enum):
    RED = 1


PLAIN = [None, True, 1, 1.0, -0.0, 0.0, math.nan, math.inf, 2**70, "text", "$", b"x", Colour.RED, {1, 2}, np.float32(1)]
leaves = st.sampled_from([*range(len(TENSORS))]).map(lambda n: TENSORS[n]) | st.sampled_from(PLAIN)
keys = st.sampled_from(["a", "b", "$", 0, 1, True, ("t", 1), None])
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(st.tuples(keys, inner), max_size=4).map(dict)
        | st.lists(st.tuples(keys, inner), max_size=4).map(OrderedDict)
        | st.lists(st.integers(0, 3), max_size=3).map(np.array)
        | st.just(np.arange(200.0))  # large enough to become a tensor
    ),
    max_leaves=12,
)


def place(tensor):
    """Where a tensor is; for bytes, which may be an array that has become a tensor for the occasion, what it is."""
    return bytes(tensor) if tensor.dtype == torch.uint8 else tensor.data_ptr()


def looks(tree, tensors):
    """Everything that an encoding says, for comparison."""
    found = {
        name: (place(t), t.dtype, t.shape, t.stride(), t.is_conj(), t.requires_grad) for name, t in tensors.items()
    }
    return msgspec.json.encode(tree), found


def fresh(value):
    encoder = Encoder()
    return looks(encoder.encode(value, "x"), encoder.tensors)


@given(st.lists(states, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_states_in_any_order(values, order):
    cache = EncodeCache()
    for number in order:
        value = values[number % len(values)]
        cache.encode(value, "x", attributes=False)
        assert looks(cache.tree, cache.tensors) == fresh(value)


@given(states, st.data())
def test_small_changes_are_seen(value, data):
    cache = EncodeCache()
    value = [value, TENSORS[0], {"k": 1, "t": TENSORS[1]}]
    for _ in range(3):
        cache.encode(value, "x", attributes=False)
        assert looks(cache.tree, cache.tensors) == fresh(value)
        where = data.draw(st.sampled_from(["leaf", "key", "tensor", "order", "whole"]))
        if where == "leaf":
            value[2]["k"] = data.draw(leaves)
        elif where == "key":
            value[2][data.draw(keys)] = data.draw(leaves)
        elif where == "tensor":
            value[1] = data.draw(leaves)
        elif where == "order":
            value[2] = dict(reversed(value[2].items()))
        else:
            value[0] = data.draw(states)


def test_an_unchanged_state_is_followed():
    model, optimizer = parts()
    train(model, optimizer)
    for part in (model, optimizer):
        cache = EncodeCache()
        assert not cache.encode(part.state_dict(), "x", attributes=True)
        for _ in range(3):
            train(model, optimizer)
            assert cache.encode(part.state_dict(), "x", attributes=True)
            assert looks(cache.tree, cache.tensors) == fresh(part.state_dict())
    optimizer.param_groups[0]["lr"] = 7.0
    assert cache.encode(optimizer.state_dict(), "x", attributes=True), "values that are no tensors may change"
    assert b"7.0" in msgspec.json.encode(cache.tree)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "data", torch.ones(3)),
        lambda t: t.requires_grad_(False),
        lambda t: setattr(t, "data", t.data[:2]),
        lambda t: setattr(t, "data", t.data.double()),
    ],
)
def test_a_tensor_that_has_moved_or_changed_is_seen(change):
    parameter = torch.nn.Parameter(torch.zeros(3))
    cache = EncodeCache()
    cache.encode([parameter], "x", attributes=False)
    assert cache.encode([parameter], "x", attributes=False)
    change(parameter)
    assert not cache.encode([parameter], "x", attributes=False)
    assert looks(cache.tree, cache.tensors) == fresh([parameter])


def test_what_cannot_be_kept_is_refused_the_second_time_too():
    cache = EncodeCache()
    state = {"t": torch.ones(3), "deep": {"x": 1}}
    cache.encode(state, 'state["m"]', attributes=False)
    state["deep"]["x"] = object()
    with pytest.raises(pp.errors.ConfigError, match=r'state\["m"\]\["deep"\]\["x"\] is a object'):
        cache.encode(state, 'state["m"]', attributes=False)
    state["deep"]["x"] = 2
    state["t"] = torch.ones(3).to_sparse()
    with pytest.raises(pp.errors.ConfigError, match=r"to_dense"):
        cache.encode(state, 'state["m"]', attributes=False)
    state["t"] = torch.ones(4)
    cache.encode(state, 'state["m"]', attributes=False)
    assert looks(cache.tree, cache.tensors) == fresh(state)


def test_large_arrays_beside_tensors_come_back(tmp_path):
    state = {"extra": {"t": torch.ones(3), "array": np.arange(2000.0)}}
    with checkpointer(tmp_path, state=state) as ckpt:
        for step in (1, 2, 3):
            state["extra"]["array"][step] = -1
            ckpt.report(step=step)
            ckpt.wait()
            saved = pp.load(f"r:{step}", root=tmp_path)["extra"]
            assert np.array_equal(saved["array"], state["extra"]["array"])
            assert same(saved["t"], torch.ones(3))


def test_the_placement_of_a_state_with_other_parts_is_another():
    encoder = StateEncoder()
    state = {"a": {"x": torch.ones(2)}, "plain": 5}

    def placement(state):
        encoder.encode(state)
        return encoder.placement

    before = placement(state)
    assert placement(state) is before
    assert placement({**state, "plain": 6}) is before
    assert placement({"a": state["a"]}) is not before
    trees, files = encoder.encode({"b": state["a"]})
    assert list(trees) == list(files) == ["b"]


def test_a_run_whose_state_changes_shape_saves_what_there_is(tmp_path):
    model, optimizer = parts()
    state = {"model": model, "optimizer": optimizer, "extra": {"x": torch.ones(2)}}
    expected = []
    with checkpointer(tmp_path, state=state) as ckpt:
        for step in range(8):
            train(model, optimizer)
            if step == 3:
                ckpt.state["extra"]["y"] = torch.arange(1000.0)
            if step == 4:
                model[0].weight.data = model[0].weight.data.clone()
            if step == 5:
                optimizer = torch.optim.Adam(model.parameters())
                ckpt.state["optimizer"] = optimizer
            if step == 6:
                del ckpt.state["extra"]["x"]
            expected.append(
                copy.deepcopy({name: getattr(v, "state_dict", lambda v=v: v)() for name, v in ckpt.state.items()})
            )
            ckpt.report(step=step + 1)
    for step, moment in enumerate(expected):
        saved = pp.load(f"r:{step + 1}", root=tmp_path)
        assert same({k: dict(v) for k, v in saved.items()}, {k: dict(v) for k, v in moment.items()}), step
