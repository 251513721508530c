"""Soups: the means beside exact arithmetic, the greedy choice beside brute force, and nothing left when one fails."""

import copy
import gc
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode

import peakpoint as pp
from failing import Failing
from peakpoint.cli.main import cli
from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    MismatchError,
    NotFoundError,
    StoreError,
)
from peakpoint.exchange.exports.files import export
from peakpoint.models.average import rounded
from peakpoint.repository import audit, maintenance
from peakpoint.store import LocalStore, MemoryStore
from training import checkpointer, same

ROOT = Path(__file__).parents[2]
REPEATED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saved(root, states, *, run="r", part="model"):
    """A run with a checkpoint of each state; returns their refs."""
    for number, state in enumerate(states):
        with checkpointer(root, run=run, state={part: state}, resume="never") as ckpt:
            ckpt.report(step=number + 1, loss=1 / (number + 1))
    return [f"{run}:{number + 1}" for number in range(len(states))]


def soup_of(root, states, **options):
    made = pp.soup(saved(root, states), root=root, **options)
    return made, pp.load(made.checkpoint.ref, root=root)["model"]


def everything(root):
    return {str(path): path.stat().st_size for path in Path(root).rglob("*") if path.name != "writer.lock"}


# --- values -------------------------------------------------------------------------------------------------------

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def exact(value):
    return Fraction(value.to(torch.float64).item())


def neighbours(value):
    """The values of the same type on both sides, as far as they are finite."""
    bits = value.view(BITS[value.dtype.itemsize])
    near = [(bits + change).view(value.dtype) for change in (1, -1)]
    if value.to(torch.float64).item() == 0:
        smallest = torch.ones_like(bits).view(value.dtype)
        near = [smallest, (-smallest.to(torch.float64)).to(value.dtype)]
    return [one for one in near if math.isfinite(one.to(torch.float64).item())]


@st.composite
def tensors(draw, dtype, count, members):
    """The same tensor of several members: any bits that are finite numbers."""
    size = count * dtype.itemsize
    made = []
    for data in draw(st.lists(st.binary(min_size=size, max_size=size), min_size=members, max_size=members)):
        values = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        finite = torch.isfinite(values.to(torch.float64))
        made.append(torch.where(finite, values.to(torch.float64), 0.5).to(dtype))
    return made


@given(data=st.data())
@REPEATED
def test_means_are_those_of_exact_arithmetic_rounded_once(data):
    members, count = data.draw(st.integers(2, 5)), data.draw(st.integers(0, 4))
    given_ = {str(dtype): data.draw(tensors(dtype, count, members)) for dtype in FLOATS}
    states = [{name: several[number] for name, several in given_.items()} for number in range(members)]
    _, found = soup_of(MemoryStore(), states)
    for name, several in given_.items():
        assert found[name].dtype == several[0].dtype
        for at in range(count):
            values = [exact(one[at]) for one in several]
            mean, got = sum(values) / members, found[name][at]
            slack = sum(map(abs, values)) * Fraction(members, 2**52)  # of sums in double precision
            error = abs(exact(got) - mean)
            if several[0].dtype is torch.float64:
                assert error <= slack + Fraction(5e-324)
            for other in neighbours(got):
                assert error <= abs(exact(other) - mean) + 2 * slack + Fraction(5e-324)


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]),
    bits=st.integers(0, 2**15),
    off=st.integers(-(2**6), 2**6),
    exponent=st.integers(20, 40),
    sign=st.sampled_from([1, -1]),
)
@settings(max_examples=200, deadline=None)
def test_rounding_is_to_the_nearest_and_ties_to_even(dtype, bits, off, exponent, sign):
    width = dtype.itemsize * 8 - 1
    low = torch.tensor([bits % 2**width], dtype=torch.int64).to(BITS[dtype.itemsize]).view(dtype)
    high = (low.view(BITS[dtype.itemsize]) + 1).view(dtype)
    ends = [one.to(torch.float64).item() for one in (low, high)]
    if not all(map(math.isfinite, ends)):
        return
    value = (ends[0] + ends[1]) / 2 + off * (ends[1] - ends[0]) * 2.0**-exponent  # at the middle, or very near it
    distances = [abs(Fraction(value) - Fraction(end)) for end in ends]
    even = low if bits % 2 == 0 else high
    nearest = even if distances[0] == distances[1] else low if distances[0] < distances[1] else high
    got = rounded(torch.tensor([sign * value], dtype=torch.float64), dtype)
    assert got.to(torch.float64).item() == sign * nearest.to(torch.float64).item()


def test_complex_numbers_have_means_too(tmp_path):
    _, found = soup_of(tmp_path, [{"c": torch.tensor([1 + 2j])}, {"c": torch.tensor([3 - 4j])}])
    assert same(found, {"c": torch.tensor([2 - 1j])})


def test_sums_beyond_double_precision_have_a_mean(tmp_path):
    largest = torch.finfo(torch.float64).max
    _, found = soup_of(tmp_path, [{"w": torch.tensor([largest, 1.0], dtype=torch.float64)}] * 1 + [
        {"w": torch.tensor([largest, 2.0], dtype=torch.float64)}
    ])  # fmt: skip
    assert found["w"].tolist() == [largest, 1.5]


@given(seed=st.integers(0, 2**31), kind=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=15, deadline=None)
def test_what_shares_memory_still_does(seed, kind):
    generator = torch.Generator().manual_seed(seed)

    def state():
        table = torch.randn(6, 4, generator=generator).to(kind)
        line = torch.randn(9, generator=generator).to(kind)
        return {
            "tied": table,
            "again": table,
            "row": table[2],
            "column": table[:, 1],
            "left": line[:6],  # neither covers the other: their bytes are stored below a name of their own
            "right": line[3:],
            "turned": torch.randn(3, 5, generator=generator).to(kind).t(),
        }

    states = [state() for _ in range(3)]
    _, found = soup_of(MemoryStore(), states)
    for name in states[0]:
        wide = sum(one[name].to(torch.float64) for one in states) / 3
        assert torch.equal(found[name], rounded(wide, kind)), name
    assert found["tied"].data_ptr() == found["again"].data_ptr()
    found["tied"].zero_()
    assert not found["row"].any()
    assert not found["column"].any()
    found["left"][3:] = 7
    assert found["right"][:3].tolist() == [7] * 3


def test_the_device_and_the_strides_of_a_member_do_not_matter(tmp_path):
    plain = torch.arange(24.0).reshape(1, 2, 3, 4)
    _, found = soup_of(tmp_path, [{"w": plain}, {"w": (plain + 1).to(memory_format=torch.channels_last)}])
    assert torch.equal(found["w"], plain + 0.5)


def test_tensors_in_files_of_their_own_are_found(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 1))
    model[0].requires_grad_(False)  # stands in model+frozen.safetensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in ckpt.epochs(3):
            model(torch.randn(4, 200)).sum().backward()
            optimizer.step()
            states.append(copy.deepcopy(model.state_dict()))
            ckpt.report()
    assert len(pp.open(tmp_path).run("r").latest().parts["model"]) == 2
    made = pp.soup([f"r:epoch={number}" for number in range(3)], root=tmp_path)
    found = pp.load(made.checkpoint.ref, root=tmp_path)["model"]
    for name in states[0]:
        assert torch.equal(found[name], (sum(one[name].double() for one in states) / 3).float())


# --- what has no mean ---------------------------------------------------------------------------------------------

W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"w": W, "extra": W}, ["'extra' is in r/step2", "not in r/step1"]),
        ({"v": W}, ["'w' is in r/step1", "'v' is in r/step2"]),
        ({"w": torch.ones(3, 2)}, ["'w' is F32[2, 3] in r/step1", "F32[3, 2] in r/step2"]),
        ({"w": W.half()}, ["F32[2, 3]", "F16[2, 3]"]),
        ({"w": [W]}, ["'w.0'"]),
    ],
)
def test_members_that_differ_are_refused_and_the_differences_listed(tmp_path, other, says):
    refs = saved(tmp_path, [{"w": W}, other])
    before = everything(tmp_path)
    with pytest.raises(MismatchError) as raised:
        pp.soup(refs, root=tmp_path)
    for text in says:
        assert text in str(raised.value)
    assert raised.value.differences
    assert everything(tmp_path) == before


def test_ties_integers_and_plain_values_must_be_the_same(tmp_path):
    tied = {"a": W, "b": W}
    with pytest.raises(MismatchError, match="shares memory"):
        pp.soup(saved(tmp_path, [tied, {"a": W, "b": W.clone()}], run="ties"), root=tmp_path)
    masks = [{"w": W, "mask": torch.tensor([True, value])} for value in (True, False)]
    with pytest.raises(MismatchError, match="'mask' holds BOOL, which is not averaged, and differs"):
        pp.soup(saved(tmp_path, masks, run="masks"), root=tmp_path)
    with pytest.raises(MismatchError, match="plain values in part 'model' differ"):
        pp.soup(saved(tmp_path, [{"w": W, "n": 1}, {"w": W, "n": 2}], run="plain"), root=tmp_path)
    counts = [{"w": W, "bn.num_batches_tracked": torch.tensor(number)} for number in (7, 9)]
    made = pp.soup(saved(tmp_path, counts, run="counts"), root=tmp_path)
    assert pp.load(made.checkpoint.ref, root=tmp_path)["model"]["bn.num_batches_tracked"] == 7
    with pytest.raises(ConfigError, match="holds no tensors"):
        pp.soup(saved(tmp_path, [{"n": 1}, {"n": 1}], run="none"), root=tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused_by_tensor_and_member(tmp_path, value, dtype):
    bad = W.to(dtype).clone()
    bad[0, 1] = value
    refs = saved(tmp_path, [{"w": W.to(dtype)}, {"w": bad}])
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=r"tensor 'w' of r/step2\S* has 1 of 6 values that are NaN or infinite"):
        pp.soup(refs, root=tmp_path)
    assert everything(tmp_path) == before


def test_not_finite_in_all_members_alike_is_refused_as_well(tmp_path):
    with pytest.raises(ConfigError, match="NaN or infinite"):
        soup_of(tmp_path, [{"w": torch.tensor([math.nan])}] * 2)


def test_a_damaged_member_is_named_and_nothing_is_written(tmp_path):
    refs = saved(tmp_path, [{"w": W}, {"w": W + 1}])
    file = next(pp.open(tmp_path).run("r").latest().path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = everything(tmp_path)
    with pytest.raises(CorruptError, match="'w'"):
        pp.soup(refs, root=tmp_path)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("refs", "options", "error", "says"),
    [
        ([], {}, ConfigError, "0 refs"),
        (["r:1"], {}, ConfigError, "at least 2"),
        ("r:1", {}, ConfigError, "a list of refs"),
        (7, {}, ConfigError, "a list of refs"),
        (["r:1", 2], {}, ConfigError, "2 is not a ref"),
        (["r:1", "r:epoch=9"], {}, NotFoundError, "epoch 9"),
        (["r:1", "s:2"], {}, NotFoundError, "'s'"),
        (["r:2", "r@latest"], {}, ConfigError, "same checkpoint"),
        (["r:1", "r:2"], {"part": "modle"}, NotFoundError, "did you mean 'model'"),
        (["r:1", "r:2"], {"kind": "best"}, ConfigError, "'uniform' or 'greedy'"),
        (["r:1", "r:2"], {"batchnorm": "no"}, ConfigError, "'estimate' or 'average'"),
        (["r:1", "r:2"], {"kind": "greedy"}, ConfigError, "needs evaluate="),
        (["r:1", "r:2"], {"kind": "greedy", "evaluate": len}, ConfigError, "cannot be guessed"),
        (["r:1", "r:2"], {"kind": "greedy", "evaluate": len, "mode": "up"}, ConfigError, '"max" or "min"'),
        (["r:1", "r:2"], {"evaluate": 3}, ConfigError, "takes a function"),
        (["r:1", "r:2"], {"evaluate": lambda _: "good"}, ConfigError, "real number"),
        (["r:1", "r:2"], {"evaluate": lambda _: math.nan}, ConfigError, "must be a number"),
        (["r:1", "r:2"], {"metric": "acc"}, ConfigError, "is missing"),
        (["r:1", "r:2"], {"metric": "a b", "evaluate": len}, ConfigError, "no spaces"),
        (["r:1", "r:2"], {"build_model": torch.nn.Linear(1, 1)}, TypeError, ""),
        (["r:1", "r:2"], {"build_model": dict}, ConfigError, "returned a dict"),
        (["r:1", "r:2"], {"build_model": lambda: torch.nn.Linear(3, 2)}, MismatchError, "bias"),
        (["r:1", "r:2"], {"data": [W]}, ConfigError, "build_model="),
        (["r:1", "r:2"], {"data": iter([W]), "build_model": torch.nn.Identity}, ConfigError, "only once"),
        (["r:1", "r:2"], {"run": "../r"}, ConfigError, "cannot name a run"),
        (["r:1", "r:2"], {"run": "r"}, ConflictError, "not made from other checkpoints"),
        (["r:1", "r:2"], {"why": "\udcff"}, ConfigError, "UTF-8"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, refs, options, error, says):
    saved(tmp_path, [{"weight": W}, {"weight": W + 1}])
    before = everything(tmp_path)
    with pytest.raises(error, match=None) as raised:
        pp.soup(refs, root=tmp_path, **options)
    assert says in str(raised.value)
    assert everything(tmp_path) == before


def test_an_evaluation_that_fails_leaves_nothing(tmp_path):
    refs = saved(tmp_path, [{"w": W}, {"w": W + 1}, {"w": W + 2}])
    before, calls = everything(tmp_path), []

    def evaluate(state):
        calls.append(state)
        if len(calls) == 4:  # each alone, then the first pair
            raise ZeroDivisionError
        return 1.0

    with pytest.raises(ZeroDivisionError):
        pp.soup(refs, root=tmp_path, kind="greedy", evaluate=evaluate, mode="max")
    assert everything(tmp_path) == before
    assert len(calls) == 4


def test_a_member_that_is_damaged_after_it_was_checked_leaves_no_half_checkpoint(tmp_path):
    refs = saved(tmp_path, [{"w": W}, {"w": W + 1}])
    file = pp.open(tmp_path).run("r").latest().path / "model.safetensors"

    def evaluate(_):
        file.write_bytes(bytes(file.stat().st_size))
        return 1.0

    with pytest.raises(CorruptError, match="'w'"):
        pp.soup(refs, root=tmp_path, evaluate=evaluate)
    assert pp.open(tmp_path).run("r-soup").checkpoints() == []
    assert {finding.kind for finding in audit.audit(pp.open(tmp_path), deep=True).findings} == {"damage"}


@pytest.mark.parametrize(
    ("call", "where"), [("write", "model.safetensors"), ("fsync", "state.json"), ("link", "manifest")]
)
def test_a_disk_that_refuses_leaves_no_half_checkpoint(tmp_path, call, where):
    refs = saved(tmp_path, [{"w": W}, {"w": W + 1}])
    disk = Failing(call, where)
    disk.arm()
    with pytest.raises(StoreError):
        pp.soup(refs, root=LocalStore(tmp_path, disk))
    repository = pp.open(tmp_path)
    assert repository.run("r-soup").checkpoints() == []
    assert audit.audit(repository, deep=True).clean
    made = pp.soup(refs, root=tmp_path)
    assert torch.equal(pp.load(made.checkpoint.ref, root=tmp_path)["model"]["w"], W + 0.5)


def test_no_rule_takes_a_member_while_the_soup_is_made(tmp_path):
    refs, claims = saved(tmp_path, [{"w": W}, {"w": W + 1}]), []
    pp.soup(refs, root=tmp_path, evaluate=lambda _: claims.append(pp.open(tmp_path).run("r").kept()) or 1.0)
    for one in pp.open(tmp_path).run("r").manifests():
        assert "somebody is reading it" in str(claims[0][one.id])
    assert "somebody is reading it" not in str(pp.open(tmp_path).run("r").kept())


# --- BatchNorm ----------------------------------------------------------------------------------------------------


class Convnet(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(1, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 36, 3),
        )


@pytest.fixture(scope="module")
def convnets(tmp_path_factory):
    """Three checkpoints of a training with BatchNorm, and data."""
    root = tmp_path_factory.mktemp("convnets")
    torch.manual_seed(0)
    data = [torch.randn(16, 1, 8, 8) * 2 + 1 for _ in range(4)]
    model = Convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with checkpointer(root, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in ckpt.epochs(3):
            model.train()
            for batch in data:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(batch), torch.arange(16) % 3).backward()
                optimizer.step()
            ckpt.report()
    return root, [f"r:epoch={epoch}" for epoch in range(3)], data


def by_hand(root, refs, data):
    states = [pp.load(ref, root=root)["model"] for ref in refs]
    model = Convnet()
    mean = {name: sum(one[name].double() for one in states) / len(states) for name in states[0]}
    model.load_state_dict({name: mean[name].to(value.dtype) for name, value in states[0].items()})
    update_bn(data, model)
    return model.eval()


@pytest.mark.parametrize("form", ["list", "pairs", "loader", "function"])
def test_statistics_of_batchnorm_are_measured_anew(convnets, form):
    root, refs, data = convnets
    given_ = {
        "list": data,
        "pairs": [(batch, None) for batch in data],
        "loader": torch.utils.data.DataLoader(torch.cat(data), batch_size=16),
        "function": lambda: iter(data),
    }[form]
    made = pp.soup(refs, root=root, build_model=Convnet, data=given_, run=f"soup-{form}")
    expected = by_hand(root, refs, data)
    found = pp.load(made.checkpoint.ref, root=root)["model"]
    assert same(dict(found), dict(expected.state_dict()))
    assert found["1.num_batches_tracked"] == 4
    stale = sum(pp.load(ref, root=root)["model"]["1.running_mean"] for ref in refs) / 3
    assert not torch.allclose(stale, found["1.running_mean"], atol=1e-3)  # so it does make a difference


def test_batchnorm_without_data_is_refused_or_averaged_with_a_note(convnets):
    root, refs, _ = convnets
    for options in ({}, {"build_model": Convnet}):
        with pytest.raises(ConfigError, match=r"'1.running_mean'.*build_model= and data=.*batchnorm=\"average\""):
            pp.soup(refs, root=root, run="refused", **options)
    with pytest.raises(ConfigError, match="is empty"):
        pp.soup(refs, root=root, run="refused", build_model=Convnet, data=[])
    assert "refused" not in [run.name for run in pp.open(root).runs()]
    made = pp.soup(refs, root=root, batchnorm="average", run="averaged")
    found = pp.load(made.checkpoint.ref, root=root)["model"]
    states = [pp.load(ref, root=root)["model"] for ref in refs]
    assert torch.equal(found["1.running_var"], (sum(one["1.running_var"].double() for one in states) / 3).float())
    assert "averaged, not measured" in made.checkpoint.reasons[0]


def test_statistics_of_no_batchnorm_are_not_guessed(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(2))

    refs = saved(tmp_path, [Own(), Own()])
    with pytest.raises(ConfigError, match="not a statistic of torch's BatchNorm"):
        pp.soup(refs, root=tmp_path, build_model=Own, data=[torch.ones(1)])


def test_what_is_saved_is_what_was_scored(convnets):
    """Also when the data come in another order each time, and when the last candidate was not taken."""
    root, refs, data = convnets
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(torch.cat(data), batch_size=8, shuffle=True, drop_last=True)
    probe, seen = data[0], []

    def evaluate(model):
        assert not model.training
        with torch.no_grad():
            seen.append(model(probe))
        return [1, 3, 2, 4, 0][len(seen) - 1]  # alone: 1 3 2; the best two: 4, taken; all: 0, not taken

    made = pp.soup(
        refs, root=root, kind="greedy", evaluate=evaluate, mode="max", build_model=Convnet, data=loader, run="shuffled"
    )
    assert [one.taken for one in made.trials] == [True, True, False]
    model = Convnet().eval()
    pp.load(made.checkpoint.ref, root=root, into=model)
    with torch.no_grad():
        assert torch.equal(model(probe), seen[3])


def test_one_member_keeps_its_statistics_when_it_is_scored_and_when_it_is_saved(convnets):
    root, refs, data = convnets
    scores, seen = [1, 3, 2, 0, 0], []

    def evaluate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return scores[len(seen) - 1]

    options = {"evaluate": evaluate, "mode": "max", "build_model": Convnet, "data": data, "run": "one"}
    made = pp.soup(refs, root=root, kind="greedy", **options)
    states = [dict(pp.load(ref, root=root)["model"]) for ref in refs]
    assert all(map(same, seen[:3], states))
    assert len(made.members) == 1
    assert same(dict(pp.load(made.checkpoint.ref, root=root)["model"]), states[1])


def test_values_that_are_no_tensors_reach_the_model(tmp_path):
    class Scaled(torch.nn.Linear):
        factor = 1

        def get_extra_state(self):
            return {"factor": self.factor}

        def set_extra_state(self, state):
            self.factor = state["factor"]

    models = [Scaled(2, 1), Scaled(2, 1)]
    for model in models:
        model.factor = 3
    found = []
    pp.soup(
        saved(tmp_path, models),
        root=tmp_path,
        build_model=lambda: Scaled(2, 1),
        evaluate=lambda model: found.append(model.factor) or 0,
    )
    assert found == [3]


def test_models_whose_tensors_share_memory_or_lie_otherwise_are_filled(tmp_path):
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = torch.nn.Parameter(torch.randn(6))
            self.again = self.whole
            self.middle = torch.nn.Parameter(self.whole.data[2:4])
            self.conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    torch.manual_seed(0)
    models, seen = [Shared() for _ in range(2)], []

    def evaluate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0

    made = pp.soup(saved(tmp_path, models), root=tmp_path, build_model=Shared, evaluate=evaluate)
    states = [model.state_dict() for model in models]
    for found in (seen[0], pp.load(made.checkpoint.ref, root=tmp_path)["model"]):
        for name in states[0]:
            assert torch.equal(found[name], ((states[0][name].double() + states[1][name]) / 2).float()), name


# --- greedy -------------------------------------------------------------------------------------------------------


def oracle(weights, score, sign):
    """Recipe 1, on numbers."""
    order = sorted(range(len(weights)), key=lambda at: -sign * score([weights[at]]))
    taken = [order[0]]
    for at in order[1:]:
        if sign * score([weights[one] for one in [*taken, at]]) >= sign * score([weights[one] for one in taken]):
            taken.append(at)
    return taken


@given(
    weights=st.lists(st.integers(-20, 20), min_size=2, max_size=6),
    goal=st.integers(-20, 20),
    coarse=st.sampled_from([1, 4]),
    mode=st.sampled_from(["max", "min"]),
    model=st.booleans(),
)
@REPEATED
def test_the_greedy_soup_is_that_of_brute_force(weights, goal, coarse, mode, model):
    sign = 1 if mode == "max" else -1

    def score(several):
        return -sign * (abs(sum(several) / len(several) - goal) // coarse)  # with ties

    class One(torch.nn.Module):
        def __init__(self, value=0.0):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))

    root = MemoryStore()
    made = pp.soup(
        saved(root, [One(float(weight)) for weight in weights]),
        root=root,
        kind="greedy",
        evaluate=lambda given: score([(given if isinstance(given, dict) else given.state_dict())["w"].item()]),
        metric="score",
        mode=mode,
        build_model=One if model else None,
    )
    taken = oracle([float(weight) for weight in weights], score, sign)
    assert [int(ref.rpartition("step")[2].split("_")[0]) - 1 for ref in made.members] == taken
    assert [one.taken for one in made.trials].count(True) == len(taken)
    assert made.score == score([float(weights[at]) for at in taken]) == made.checkpoint.metrics["score"]
    assert sign * made.score >= sign * max((one.alone for one in made.trials), key=lambda value: sign * value)
    expected = sum(float(weights[at]) for at in taken) / len(taken)
    assert pp.load(made.checkpoint.ref, root=root)["model"]["w"].item() == pytest.approx(expected, rel=1e-15)


# --- memory -------------------------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Looks, after each operation of torch, how many bytes of tensors there are that were not there before."""

    def __enter__(self):
        gc.collect()
        gc.freeze()  # what is there already is not looked at any more
        self.peak = 0
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        gc.unfreeze()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        self.look()
        return made

    def look(self):
        storages = {}
        for one in gc.get_objects():
            if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(storages.values()))


@pytest.mark.parametrize("way", ["uniform", "uniform with a model", "greedy"])
def test_memory_does_not_grow_with_the_number_of_members(tmp_path, way):
    def build():
        return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12)))

    refs = saved(tmp_path, [build() for _ in range(4)])
    model, tensor = sum(one.nbytes for one in build().state_dict().values()), 64 * 64 * 4
    options = {} if way == "uniform" else {"build_model": build, "evaluate": lambda _: 1.0}
    if way == "greedy":
        options |= {"kind": "greedy", "mode": "max"}
    peaks = {}
    for count in (2, 4):
        with Watching() as watching:
            made = pp.soup(refs[:count], root=tmp_path, run=f"soup{count}", **options)
        assert len(made.members) == count
        peaks[count] = watching.peak
    assert peaks[4] <= peaks[2] + tensor / 16  # a few scalars
    most = (0 if way == "uniform" else model) + 4 * 2 * tensor
    assert tensor < peaks[4] < most < 2 * model
    with Watching() as watching:
        states = [pp.load(ref, root=tmp_path)["model"] for ref in refs]
        sum(one["0.weight"] for one in states)
    assert watching.peak >= len(refs) * model  # the measure sees what there is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_rounding_takes_less_than_four_copies_of_what_is_rounded(dtype):
    wide = torch.randn(1 << 12, dtype=torch.float64)
    with Watching() as watching:
        rounded(wide, dtype)
    assert 2 * wide.nbytes < wide.nbytes + watching.peak < 4 * wide.nbytes


@pytest.mark.parametrize("count", [2, 5])
def test_so_many_bytes_are_read(tmp_path, count):
    """Each candidate alone, each mean that is tried, and what is saved; here all are taken."""
    torch.manual_seed(0)
    refs, read = saved(tmp_path, [{"w": torch.randn(10)} for _ in range(count)]), []
    options = {"kind": "greedy", "evaluate": lambda _: 1.0, "mode": "max"}
    pp.soup(refs, root=tmp_path, progress=read.append, **options)
    tried = count + sum(range(2, count + 1))
    assert tried <= count * (count + 3) / 2
    assert sum(read) == 40 * (tried + count)
    read.clear()
    pp.soup(refs, root=tmp_path, progress=read.append)
    assert sum(read) == 40 * 2 * count


# --- a checkpoint like any other ----------------------------------------------------------------------------------


def test_a_soup_is_listed_loaded_exported_selected_archived_and_continued_from(tmp_path):
    torch.manual_seed(0)
    models = [torch.nn.Linear(2, 1) for _ in range(3)]
    refs = saved(tmp_path, models)
    made = pp.soup(refs, root=tmp_path, evaluate=lambda state: state["bias"], metric="val", why="for the demo")
    repository = pp.open(tmp_path)
    assert repository.run("r-soup").latest() == made.checkpoint
    assert made.checkpoint.step == 3
    assert made.checkpoint.epoch is None
    assert made.checkpoint.reasons[0].startswith("uniform soup of 3: r/step1")
    manifest = repository.find_manifest(made.checkpoint.ref)
    assert manifest.members == tuple(f"r/{one.id}" for one in repository.run("r").manifests())
    assert manifest.asked == "for the demo"
    assert "members" in json.loads((made.checkpoint.path / "manifest.json").read_text())
    assert "members" not in json.loads((repository.run("r").latest().path / "manifest.json").read_text())
    assert [one.metrics for one in repository.run("r-soup").history()] == [{"val": made.score}]
    assert audit.audit(repository, deep=True).clean
    assert [one.ref for one in pp.select(repository, "has(val)", by={"val": "max"})] == [made.checkpoint.ref]
    export(repository, made.checkpoint.ref, tmp_path / "soup.safetensors")
    expected = sum(model.weight.detach().double() for model in models) / 3
    assert torch.equal(load_file(tmp_path / "soup.safetensors")["weight"], expected.float())
    assert torch.equal(load_file(made.checkpoint.path / "model.safetensors")["weight"], expected.float())
    maintenance.archive(repository.run("r"))
    maintenance.archive(repository.run("r-soup"))
    with pytest.raises(pp.ConflictError, match="is archived"):
        pp.soup([*refs, made.checkpoint.ref], root=tmp_path)
    maintenance.restore(repository.run("r-soup"))
    again = pp.soup([*refs, made.checkpoint.ref], root=tmp_path)  # also of archived ones, and of soups
    assert again.checkpoint.sequence == 2
    assert again.checkpoint.step == 4
    model = torch.nn.Linear(2, 1)
    with checkpointer(tmp_path, run="fine", state={"model": model}, resume=again.checkpoint.ref) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="random generators"):
            resumed = ckpt.resume()
        assert resumed.step == 4
        assert torch.allclose(model.weight.double(), expected, atol=1e-6)
        assert list(ckpt.epochs(2)) == [0, 1]
        ckpt.report(step=5)
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    lax = {"run": "lax", "state": state, "resume": again.checkpoint.ref}
    with checkpointer(tmp_path, **lax) as ckpt, pytest.raises(MismatchError, match="optimizer"):
        ckpt.resume()
    with checkpointer(tmp_path, strict=False, **lax) as ckpt:
        with pytest.warns(pp.PeakpointWarning):
            assert ckpt.resume().step == 4
        assert torch.allclose(model.weight.double(), expected, atol=1e-6)
    assert "saved on request: for the demo" in str(repository.run("r-soup").kept())


def test_the_same_soup_again_is_another_checkpoint(tmp_path):
    refs = saved(tmp_path, [{"w": W}, {"w": W + 1}])
    first, second = (pp.soup(refs, root=tmp_path).checkpoint for _ in range(2))
    assert (first.sequence, first.step, second.sequence, second.step) == (1, 2, 2, 3)
    assert first.name != second.name
    assert len(pp.open(tmp_path).run("r-soup").history()) == 2
    digests = {one.file("model.safetensors").digest for one in pp.open(tmp_path).run("r-soup").manifests()}
    assert len(digests) == 1


def test_other_parts_and_runs_have_soups(tmp_path):
    refs = [*saved(tmp_path, [{"w": W}], run="a", part="ema"), *saved(tmp_path, [{"w": W * 3}], run="b", part="ema")]
    made = pp.soup(refs, root=tmp_path, part="ema", run="mixed")
    assert torch.equal(pp.load("mixed@latest", root=tmp_path)["ema"]["w"], W * 2)
    assert made.checkpoint.run == "mixed"


def test_members_may_go_and_the_soup_stays(tmp_path):
    made = pp.soup(saved(tmp_path, [{"w": W}, {"w": W + 1}]), root=tmp_path)
    run = pp.open(tmp_path).run("r")
    maintenance.remove(run, [run.manifests()[0]], "no longer needed")
    shown = CliRunner().invoke(cli, ["show", str(tmp_path), made.checkpoint.ref])
    assert "(removed, renamed or damaged)" in shown.output
    assert "r/step2" in shown.output
    assert torch.equal(pp.load(made.checkpoint.ref, root=tmp_path)["model"]["w"], W + 0.5)


# --- the command line ---------------------------------------------------------------------------------------------

MODULE = """
import torch

def build():
    return torch.nn.Linear(3, 2)

def score(model):
    return -(model.weight - 1).abs().sum().item()

def fails(model):
    return {}["key"]
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    refs = saved(tmp_path / "runs", models)
    (tmp_path / f"scoring_{tmp_path.name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return ["runs", *refs], f"scoring_{tmp_path.name}"


def command(*words):
    done = CliRunner().invoke(cli, ["soup", *words])
    return done, done.exception


def test_the_command_makes_a_soup(trained):
    arguments, module = trained
    done, _ = command(*arguments)
    assert done.exit_code == 0
    assert "is the mean of 3 checkpoints" in done.output
    greedy = [
        "--kind",
        "greedy",
        "--with",
        f"{module}:score",
        "--metric",
        "closeness:max",
        "--model",
        f"{module}:build",
    ]
    done, _ = command(*arguments, *greedy, "--run", "picked", "--why", "figure 4", "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["checkpoint"]["metrics"] == {"closeness": told["score"]}
    assert told["checkpoint"]["run"] == "picked"
    assert [one["taken"] for one in told["tasted"]].count(True) == len(told["members"])
    done, _ = command(*arguments, *greedy)
    assert "in the soup" in done.output
    shown = json.loads(CliRunner().invoke(cli, ["show", "runs", "picked@latest", "--json"]).stdout)
    assert len(shown["members"]) == len(told["members"])
    assert shown["asked"] == "figure 4"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--with", "nocolon"], "--with 'nocolon' does not name a function; give MODULE:FUNCTION"),
        (["--with", "no_such_module:score"], "the module 'no_such_module' cannot be imported from"),
        (["--with", "{}:scroe"], "did you mean 'score'"),
        (["--with", "{}:__name__"], "cannot be called"),
        (["--with", "{}:fails", "--model", "{}:build"], "raised KeyError: 'key' ("),
        (["--with", "{}:score"], "without --model it is given the state"),
        (["--with", "{}:score", "--model", "{}:build", "--metric", "acc"], "say --metric acc:max or --metric acc:min"),
        (["--kind", "greedy"], "--with at the command line"),
        (["--run", "r"], "give another name with --run"),
        (["--device", "abacus", "--model", "{}:build"], "device"),
    ],
)
def test_the_command_says_what_is_wrong(trained, words, says):
    arguments, module = trained
    _, error = command(*arguments, *(word.format(module) for word in words))
    assert isinstance(error, pp.Error), error
    assert says in str(error)


# --- the digits ---------------------------------------------------------------------------------------------------


def digits(to, seeds):
    """The table of the example: for each seed three members, their mean, ensemble, uniform and greedy soup."""
    script = [sys.executable, "-W", "error", str(ROOT / "examples" / "soup_digits.py"), str(to), str(seeds)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-2] for line in done.stdout.splitlines() if line.startswith("| ")]
    return [list(map(float, row[1:])) for row in rows if row[0].strip().isdecimal()]


@pytest.mark.slow
def test_on_the_digits_ensembles_and_soups_beat_their_members(tmp_path):
    """Nearly always: another processor trains other models, of which docs/ensembles.md tells."""
    rows = digits(tmp_path, 10)
    assert len(rows) == 10
    assert all(mean == pytest.approx(sum(members) / 3, abs=0.01) for *members, mean, _, _, _ in rows)
    assert sum(ensemble > max(members) for *members, _, ensemble, _, _ in rows) >= 9
    assert sum(uniform > max(members) for *members, _, _, uniform, _ in rows) >= 8
    assert sum(greedy >= members[0] for *members, _, _, _, greedy in rows) >= 9


def test_metrics_by_name_are_a_score_too(tmp_path):
    for run, value in (("a", 1.0), ("b", 2.0)):
        with checkpointer(tmp_path, run=run, state={"model": {"w": torch.tensor([value])}}) as ckpt:
            ckpt.report(step=1)

    def evaluate(state):
        return pp.Evaluated(metrics={"loss": abs(state["w"].item() - 1.4), "other": 7.0})

    made = pp.soup(["a@latest", "b@latest"], root=tmp_path, kind="greedy", evaluate=evaluate, metric="loss", mode="min")
    assert made.score == pytest.approx(0.1)
    assert len(made.members) == 2


def test_a_soup_whose_run_is_not_held_any_more_is_not_committed():
    class Losing(MemoryStore):
        def hold(self, key, note):
            hold = super().hold(key, note)
            if "-soup" in key:
                hold.release()
            return hold

    store = Losing()
    refs = saved(store, [{"w": torch.ones(2)}, {"w": torch.zeros(2)}])
    with pytest.raises(ConflictError, match="not held any more"):
        pp.soup(refs, root=store)
    assert pp.open(store).run("r-soup").checkpoints() == []


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_a_score_among_several_metrics_is_named(tmp_path, metric):
    with checkpointer(tmp_path, state={"model": torch.nn.Linear(2, 1)}, keep=[pp.Last(3)]) as ckpt:
        for step in (1, 2):
            ckpt.report(step=step)
    with pytest.raises(ConfigError, match=r"returned acc, loss: name the one that is the score \(metric=, at the"):
        pp.soup(["r:1", "r:2"], root=tmp_path, evaluate=lambda _: {"acc": 1.0, "loss": 0.1}, metric=metric)
