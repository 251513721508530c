"""What a validation finds out, check by check; nothing that a check does makes it more than a failed one."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.utils import prune

import peakpoint as pp
import validated
from peakpoint.cli.main import cli
from peakpoint.format import layout
from peakpoint.format.sealed import digest, seal
from peakpoint.production import validation
from peakpoint.production.checks.candidate import classes_of, named_tensors
from peakpoint.production.checks.model import described
from peakpoint.production.checks.weights import zeros_of
from peakpoint.production.proposal import propose
from peakpoint.repository import audit, maintenance, validations
from peakpoint.repository.validations import ValidationSpec
from peakpoint.store import LocalStore, MemoryStore
from validated import build, crown, save

pytestmark = pytest.mark.usefixtures("processes_have_torch")


def found(validation, check):
    """The finding of one check."""
    return next(one for one in validation.findings if one.check == check)


def kept(store, validation):
    predictions = validations.predictions_of(store, validation)
    return list(predictions.predicted), list(predictions.labels)


def outcome(root, ref, check, **options):
    """What one check of a validation came to; none before it may have failed otherwise than expected."""
    return found(pp.validate(ref, root=root, **options), check)


def golden(path, inputs=None, **tensors):
    inputs = torch.randn(7, 2) if inputs is None else inputs
    save_file({"inputs": inputs, **tensors}, path)
    return path


def tensor_file(root, ref):
    manifest = pp.open(root).find_manifest(ref)
    return Path(root) / layout.file_key(manifest.run, manifest.name, manifest.parts["model"][0]), manifest


# --- weights ------------------------------------------------------------------------------------------------------


def test_everything_in_order_passes_and_is_recorded(tmp_path):
    ref = save(tmp_path, accuracy=0.5)
    file = golden(tmp_path / "golden.safetensors", labels=torch.zeros(7, dtype=torch.int64))
    result = pp.validate(
        ref,
        root=tmp_path,
        evaluate=validated.evaluated,
        model=build,
        golden=file,
        signature={"output": "F32[*, 3]"},
        budgets={"size_mb": 1, "parameters": 9, "latency_ms": 1e9},
        checks=[validated.fine],
    )
    assert result.passed, result.failures
    assert {one.check: one.outcome for one in result.findings} == {
        "integrity": "passed",
        "finite": "passed",
        "sparsity": "skipped",
        "loads": "passed",
        "signature": "passed",
        "metrics": "passed",
        "golden": "passed",
        "budget size_mb": "passed",
        "budget parameters": "passed",
        "budget latency_ms": "passed",
        "validated:fine": "passed",
    }
    assert result.metrics == {"accuracy": 0.5}
    assert result.against is None
    assert result.environment.keys() >= {"python", "torch", "numpy", "platform", "cpu", "threads", "device"}
    assert found(result, "validated:fine").evidence["classes"] == 3
    assert found(result, "budget latency_ms").evidence["passes"] >= 20
    store = LocalStore(tmp_path)
    assert validations.newest(store, "r", result.checkpoint) == result
    assert kept(store, result) == ([0, 1, 2], [0, 1, 1])
    assert validations.read(store, "r", result.checkpoint, 1).wanted.digest == result.wanted.digest
    assert audit.audit(pp.open(tmp_path), deep=True).clean


def test_a_flipped_bit_fails_and_nothing_else_is_looked_at(tmp_path):
    ref = save(tmp_path)
    path, _ = tensor_file(tmp_path, ref)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = pp.validate(ref, root=tmp_path, model=build, evaluate=validated.metrics)
    assert [one.check for one in result.failures] == ["integrity"]
    assert "tensor" in result.failures[0].said
    assert all(one.said.startswith("not reached") for one in result.findings[1:])


def test_a_missing_file_fails(tmp_path):
    ref = save(tmp_path)
    tensor_file(tmp_path, ref)[0].unlink()
    assert "missing" in outcome(tmp_path, ref, "integrity").said


def test_an_archived_checkpoint_is_validated_as_it_would_be_loaded(tmp_path):
    ref = save(tmp_path)
    maintenance.archive(pp.open(tmp_path).run("r"))
    assert not tensor_file(tmp_path, ref)[0].exists()
    assert pp.validate(ref, root=tmp_path, model=build).passed


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, *(
        getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))
    ], ids=str
)  # fmt: skip
def test_what_is_not_finite_is_found_in_every_type(tmp_path, dtype):
    values = torch.tensor([0.0, math.nan, 1.0, math.nan, 2.0]).to(dtype)
    state = {"sound": torch.ones(3).to(dtype), "count": torch.tensor([1]), "ill": values}
    finding = outcome(tmp_path, save(tmp_path, state), "finite")
    assert finding.outcome == "failed"
    assert finding.evidence["not_finite"] == {"ill": 2}
    assert finding.said == "ill has 2 elements that are NaN or infinite"
    sound = {"sound": state["sound"], "count": state["count"]}
    assert outcome(tmp_path, save(tmp_path, sound), "finite").evidence == {"elements": 3, "tensors": 1}


def test_infinities_count_too_and_views_are_looked_at_as_what_they_are(tmp_path):
    whole = torch.ones(4)
    whole[3] = -math.inf
    state = {"a": whole[:3], "b": whole[1:]}  # they overlap: stored once, as bytes
    assert outcome(tmp_path, save(tmp_path, state), "finite").evidence["not_finite"] == {"b": 1}


def test_a_part_without_floating_point_numbers_has_nothing_to_be_finite(tmp_path):
    assert outcome(tmp_path, save(tmp_path, {"n": torch.tensor([1])}), "finite").outcome == "skipped"


# --- sparsity -----------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 3), min_size=0, max_size=3)


@st.composite
def states(draw):
    """State dicts with zeros of both signs, some of them pruned by masks."""
    state = {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(SHAPES)
        count = math.prod(shape)
        values = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0]), min_size=count, max_size=count))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]))
        tensor = torch.tensor(values).reshape(shape).to(dtype)
        if dtype == torch.float32 and draw(st.booleans()):
            bits = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=count, max_size=count))
            pair = [(f"{number}.weight_orig", tensor), (f"{number}.weight_mask", torch.tensor(bits).reshape(shape))]
            state |= dict(pair[:: draw(st.sampled_from([1, -1]))])
        else:
            state[f"{number}.weight"] = tensor
    return state


@settings(max_examples=150, deadline=None)
@given(states())
def test_zeros_are_counted_by_every_convention(state):
    def count(arrays):
        arrays = list(arrays)
        return sum(int((a == 0).sum()) for a in arrays), sum(a.size for a in arrays)

    floats = {name: one.float().numpy() for name, one in state.items() if one.is_floating_point()}
    pruned = {
        name.removesuffix("_orig"): one * floats[name.removesuffix("_orig") + "_mask"]
        for name, one in floats.items()
        if name.endswith("_orig")
    }
    effective = {  # of pruned tensors only the product
        name: one for name, one in floats.items() if not name.endswith(("_orig", "_mask"))
    } | pruned  # fmt: skip
    expected = [count(effective.values()), count(one for one in effective.values() if one.ndim >= 2)]
    if pruned:
        expected.append(count(pruned.values()))
        expected += [count(floats.values()), count(one for one in floats.values() if one.ndim >= 2)]
    assert list(zeros_of(iter(state.items())).values()) == expected


@pytest.mark.parametrize(
    ("recorded", "passes", "convention"),
    [
        (0.5, True, "elements of tensors of 2 or more dimensions"),
        (0.4, True, "elements of all floating-point tensors"),
        (0.4004, True, "elements of all floating-point tensors"),
        (40, True, "elements of all floating-point tensors"),  # percent
        (0.9, False, None),
        (math.nan, False, None),
    ],
)
@pytest.mark.filterwarnings("ignore:sparsity is nan")
def test_a_sparsity_that_is_recorded_must_be_there(tmp_path, recorded, passes, convention):
    state = {"weight": torch.tensor([[0.0, 0.0, 1.0, 1.0]]), "bias": torch.ones(1)}
    finding = outcome(tmp_path, save(tmp_path, state, sparsity=recorded), "sparsity")
    assert (finding.outcome == "passed") == passes
    assert finding.evidence.get("convention") == convention
    assert finding.evidence["counted"]["elements of all floating-point tensors"]["zeros"] == 2


def test_pruned_modules_are_counted_with_their_masks(tmp_path):
    module = torch.nn.Linear(4, 5)
    prune.random_unstructured(module, "weight", amount=10)
    finding = outcome(tmp_path, save(tmp_path, module, pruned=0.5), "sparsity", sparsity="pruned")
    assert (finding.outcome, finding.evidence["counted"]["elements that have a mask"]["zeros"]) == ("passed", 10)


# --- models -------------------------------------------------------------------------------------------------------


def test_a_model_of_another_shape_does_not_load_and_is_not_asked(tmp_path):
    ref = save(tmp_path)
    file = golden(tmp_path / "g")
    result = pp.validate(
        ref, root=tmp_path, model=lambda: torch.nn.Linear(2, 4), golden=file, budgets={"latency_ms": 1, "memory_mb": 9}
    )
    loads = found(result, "loads")
    assert (loads.outcome, len(loads.evidence["differences"])) == ("failed", 2)
    assert "float32[3, 2] in the checkpoint, float32[4, 2] in the model" in loads.said
    assert found(result, "golden").outcome == "skipped"
    for name in ("latency_ms", "memory_mb"):
        budget = found(result, f"budget {name}")
        assert (budget.outcome, "could not be loaded" in budget.said) == ("failed", True)


@pytest.mark.parametrize("made", [None, 3, torch.nn.Linear, lambda: torch.ones(1)])
def test_what_makes_no_model_fails(tmp_path, made):
    ref = save(tmp_path)
    finding = outcome(tmp_path, ref, "loads", model=lambda: made)
    assert finding.outcome == "failed"
    with pytest.raises(pp.errors.ConfigError, match="give a function"):
        pp.validate(ref, root=tmp_path, model=3)


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"model": "no_such_module:f"}, "--model 'no_such_module:f': the module 'no_such_module' cannot be imported"),
        ({"evaluate": "validated:biuld"}, "--with 'validated:biuld': the module 'validated' has no 'biuld'; did you"),
        ({"evaluate": "lib/checks.py:f"}, "names a file; give the module as Python imports it: lib.checks:f"),
        ({"checks": ["validated:__name__"]}, "--check 'validated:__name__' is a str, and cannot be called"),
        ({"model": lambda size: size}, "it is called without arguments: missing a required argument: 'size'"),
        ({"evaluate": lambda: 1}, "it is called with one argument, the state: too many positional arguments"),
        ({"checks": [lambda a, b: None]}, "it is called with one argument, the candidate: missing"),
        ({"budgets": {"latency_ms": 1.0}}, "the budget latency_ms needs a model to run; name the function that makes"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_and_nothing_is_recorded(tmp_path, functions, words):
    ref = save(tmp_path)
    with pytest.raises(pp.errors.ConfigError, match=re.escape(words)):
        pp.validate(ref, root=tmp_path, **functions)
    named = {name: value for name, value in functions.items() if isinstance(value, str)}
    if named:
        spec = ValidationSpec(**named)
        with pytest.raises(pp.errors.ConfigError, match=re.escape(words)):
            validation.validate(pp.open(tmp_path), ref, spec)
    run, manifest = pp.open(tmp_path).locate(ref)
    assert not validations.survey(run.store, run.name, manifest.id).validations


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("F32[*, 3]", True),
        ("F32[*,*]", True),
        ("F32[7, 3]", True),
        ("F32[*, 4]", False),
        ("F16[*, 3]", False),
        ("F32[*]", False),
    ],
)
def test_outputs_must_have_the_signature_that_is_wanted(tmp_path, text, passes):
    file = golden(tmp_path / "g")
    finding = outcome(tmp_path, save(tmp_path), "signature", model=build, golden=file, signature={"output": text})
    assert (finding.outcome == "passed") == passes
    assert finding.evidence["outputs"] == {"output": "F32[*, 3]"}


def test_a_signature_that_cannot_be_seen_fails(tmp_path):
    result = pp.validate(save(tmp_path), root=tmp_path, model=build, signature={"output": "F32[*, 3]"})
    assert "no golden inputs" in found(result, "signature").said
    assert not result.passed


def test_outputs_that_are_not_finite_fail(tmp_path):
    file = golden(tmp_path / "g", torch.tensor([[math.inf, 1.0], [1.0, 1.0]]))
    finding = outcome(tmp_path, save(tmp_path), "signature", model=build, golden=file)
    assert (finding.outcome, "3 elements" in finding.said) == ("failed", True)


def test_an_architecture_other_than_the_champions_is_said_and_passes(tmp_path):
    crown(tmp_path, save(tmp_path, torch.nn.Linear(2, 4)))
    finding = outcome(tmp_path, save(tmp_path), "signature")
    assert finding.outcome == "passed"
    assert finding.evidence["different"] == ["weight", "bias"]
    assert "0 tensors added, 0 missing, 2 of another dtype or shape" in finding.said


class WithCodes(torch.nn.Linear):
    """Gives scores, and a table that is as long as a batch."""

    def forward(self, inputs):
        return {"scores": super().forward(inputs), "codes": torch.zeros(256, 4)}


def test_a_table_that_is_as_long_as_a_batch_is_no_output(tmp_path):
    ref = save(tmp_path, WithCodes(2, 3))
    given = golden(tmp_path / "g", torch.randn(300, 2))
    finding = outcome(tmp_path, ref, "signature", model=lambda: WithCodes(2, 3), golden=given)
    assert (finding.outcome, list(finding.evidence["outputs"])) == ("passed", ["scores"])


def test_outputs_are_named_as_the_model_gives_them():
    one, other = torch.ones(1), torch.ones(2)
    assert named_tensors(one) == {"output": one}
    assert list(named_tensors({"logits": one, "hidden": (one, other), "none": None})) == [
        "logits",
        "hidden.0",
        "hidden.1",
    ]
    assert described(torch.ones(4, 2, 3, dtype=torch.bfloat16)) == "BF16[*, 2, 3]"
    assert classes_of({"a": torch.tensor([[0.1, 0.9], [1, 0]])}).tolist() == [1, 0]
    assert classes_of({"a": torch.tensor([3, 1])}).tolist() == [3, 1]
    assert classes_of({"a": torch.ones(3, 1)}) is None


# --- golden -------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """Gives out what it was told for each of its inputs."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.as_tensor(scores, dtype=torch.float32))

    def forward(self, inputs):
        return self.scores[inputs]


@settings(max_examples=12, deadline=None)
@given(data=st.data(), count=st.integers(1, 9), agreement=st.sampled_from([0.0, 0.5, 1.0]), labelled=st.booleans())
def test_golden_predictions_are_compared_as_counting_by_hand_does(tmp_path_factory, data, count, agreement, labelled):
    root = tmp_path_factory.mktemp("golden")
    scores = st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=count, max_size=count)
    ours, theirs = data.draw(scores), data.draw(scores)
    right = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    champion = crown(root, save(root, Table(theirs)))
    ref = save(root, Table(ours))
    labels = {"labels": torch.tensor(right)} if labelled else {}
    file = golden(root / "g", torch.arange(count), **labels)
    result = pp.validate(ref, root=root, model=lambda: Table(torch.zeros(count, 3)), golden=file, agreement=agreement)
    finding = found(result, "golden")
    mine, before = [row.index(max(row)) for row in ours], [row.index(max(row)) for row in theirs]
    equal = sum(a == b for a, b in zip(mine, before, strict=True))
    assert finding.evidence["equal"] == equal
    assert finding.evidence["different"] == [n for n in range(count) if mine[n] != before[n]]
    largest = max(abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))
    assert finding.evidence["largest_difference"] == largest
    assert (finding.outcome == "passed") == (equal / count >= agreement)
    assert (result.against, result.alias) == (champion, "champion")
    if labelled:
        worse = [n for n in range(count) if before[n] == right[n] != mine[n]]
        better = [n for n in range(count) if mine[n] == right[n] != before[n]]
        assert finding.evidence["flips"] == worse
        assert (finding.evidence["right_to_wrong"], finding.evidence["wrong_to_right"]) == (len(worse), len(better))
        assert finding.evidence["right"] == sum(a == b for a, b in zip(mine, right, strict=True))
        assert kept(LocalStore(root), result) == (mine, right)
    else:
        assert result.predictions is None


def test_outputs_without_classes_agree_when_they_are_close(tmp_path):
    crown(tmp_path, save(tmp_path, Table([[1.0], [2.0], [3.0]])))
    ref = save(tmp_path, Table([[1.0], [2.05], [4.0]]))
    file = golden(tmp_path / "g", torch.arange(3))
    options = {"model": lambda: Table([[0.0]] * 3), "golden": file, "tolerance": 0.1}
    assert outcome(tmp_path, ref, "golden", **options).evidence["equal"] == 2
    assert outcome(tmp_path, ref, "golden", **options, agreement=0.7).outcome == "failed"
    assert outcome(tmp_path, ref, "golden", **options, agreement=2 / 3).outcome == "passed"


def test_the_first_champion_has_nothing_to_agree_with(tmp_path):
    file = golden(tmp_path / "g")
    finding = outcome(tmp_path, save(tmp_path), "golden", model=build, golden=file, agreement=1.0)
    assert finding.outcome == "passed"
    assert "no champion yet" in finding.said


@pytest.mark.parametrize("agreement", [0.0, 0.5])
def test_a_champion_that_the_model_does_not_take_cannot_be_agreed_with(tmp_path, agreement):
    crown(tmp_path, save(tmp_path, torch.nn.Linear(2, 4)))
    file = golden(tmp_path / "g")
    result = pp.validate(save(tmp_path), root=tmp_path, model=build, golden=file, agreement=agreement)
    finding = found(result, "golden")
    assert finding.outcome == ("failed" if agreement else "passed")
    assert "cannot be compared with" in finding.said
    assert result.against is None


@pytest.mark.parametrize("shared", [False, True])
def test_a_function_that_makes_one_model_for_ever_is_found_out(tmp_path, shared):
    def made():
        if not shared:
            return model
        another = build()
        another.weight, another.bias = model.weight, model.bias
        return another

    crown(tmp_path, save(tmp_path))
    ref, model = save(tmp_path), build()
    finding = outcome(tmp_path, ref, "golden", model=made, golden=golden(tmp_path / "g"), agreement=0.1)
    assert "same object, or parts of it, twice" in finding.said
    assert torch.equal(model.weight, pp.load(ref, root=tmp_path)["model"]["weight"]), "its weights are the candidate's"


@pytest.mark.parametrize("agreement", [0.0, 0.9])
def test_an_alias_that_cannot_be_read_cannot_be_agreed_with_and_stops_nothing_else(tmp_path, agreement):
    ref = save(tmp_path)
    crown(tmp_path, ref)
    path = tmp_path / layout.alias_key("champion", 1)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-30])
    given = golden(tmp_path / "g")
    finding = outcome(tmp_path, ref, "golden", model=build, golden=given, agreement=agreement)
    assert finding.outcome == ("failed" if agreement else "passed")
    assert "cannot be read" in finding.said


def test_the_champion_agrees_with_itself(tmp_path):
    ref = save(tmp_path)
    crown(tmp_path, ref)
    result = pp.validate("@champion", root=tmp_path, model=build, golden=golden(tmp_path / "g"), agreement=1.0)
    assert (result.passed, f"r/{result.against}") == (True, ref)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"inputs": torch.ones(4, 5)}, "raised RuntimeError"),
        ({"inputs": torch.ones(())}, "with n of at least 1"),
        ({"inputs": torch.ones(0, 2)}, "with n of at least 1"),
        ({"input": torch.ones(4, 2)}, "no tensor 'inputs'. Tensors: input"),
        ({"inputs": torch.ones(4, 2), "labels": torch.ones(4)}, "give integers of the shape"),
        ({"inputs": torch.ones(4, 2), "labels": torch.zeros(5, dtype=torch.int64)}, "give integers of the shape"),
        (b"", "not a safetensors file"),
        (b"not at all", "not a safetensors file"),
        ((1 << 62).to_bytes(8, "little") + b"{}" * 20, "not a safetensors file"),
        (b"\x02" + b"\0" * 7 + b"[]" + b"\0" * 9, "header cannot be read"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_golden_files_that_are_none_fail(tmp_path, content, says):
    file = tmp_path / "g"
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    result = pp.validate(save(tmp_path), root=tmp_path, model=build, golden=file)
    assert says in found(result, "golden").said
    assert not result.passed
    assert found(result, "metrics").outcome == "skipped", "the others went on"


def test_other_golden_inputs_are_another_question(tmp_path):
    wanted = ValidationSpec(model="validated:build", golden=str(golden(tmp_path / "g")))
    from peakpoint.production.validation import with_golden

    known = with_golden(wanted)
    assert known.golden_digest is not None
    assert known.digest != wanted.digest
    golden(tmp_path / "g")
    with pytest.raises(pp.errors.ConfigError, match="other golden inputs"):
        with_golden(known)
    with pytest.raises(pp.errors.NotFoundError, match="no file"):
        with_golden(replace(wanted, golden=str(tmp_path / "none")))


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted", "result", "says"),
    [
        ({"accuracy": 0.9}, {}, "passed", "accuracy 0.9 (recorded 0.9)"),
        ({"accuracy": 0.901}, {}, "passed", "confirmed within 0.001"),  # the tolerance itself, in decimal
        ({"accuracy": np.float32(0.8995)}, {}, "passed", "confirmed"),
        ({"accuracy": 0.88}, {}, "failed", "0.88 now and was recorded as 0.9: 0.02 apart"),
        ({"accuracy": 0.88}, {"tolerance": 0.05}, "passed", "confirmed within 0.05"),
        ({"accuracy": math.nan}, {}, "failed", "accuracy is nan"),
        ({"other": math.inf}, {}, "failed", "other is inf"),
        ({"other": 1}, {}, "skipped", "nothing to confirm: evaluated other; recorded accuracy"),
        ({"other": 1, "accuracy": 0.9}, {"metrics": ["other"]}, "failed", "other is not recorded"),
        ({"accuracy": 0.9}, {"metrics": ["loss"]}, "failed", "loss was not evaluated"),
        ({"accuracy": 0.9, "loss": 9.0}, {"metrics": ["accuracy"]}, "passed", "accuracy 0.9"),
        ({}, {}, "skipped", "evaluated nothing"),
        (0.9, {}, "failed", "return metrics by name"),
        (None, {}, "failed", "return metrics by name"),
        ({"accuracy": "high"}, {}, "failed", "return a number"),
        ({"accuracy": True}, {}, "failed", "return a number"),
        ({"accuracy": torch.ones(2)}, {}, "failed", "return a number"),
        ({3: 0.9}, {}, "failed", "3"),
    ],
)
def test_what_is_recorded_must_be_confirmed(tmp_path, answer, wanted, result, says):
    ref = save(tmp_path, accuracy=0.9)
    validation = pp.validate(ref, root=tmp_path, evaluate=lambda _: answer, **wanted)
    finding = found(validation, "metrics")
    assert (finding.outcome, says in finding.said) == (result, True), finding.said
    assert validations.newest(LocalStore(tmp_path), "r", validation.checkpoint).metrics.keys() == (
        validation.metrics.keys()
    )


def test_what_was_recorded_as_infinite_is_confirmed_by_nothing(tmp_path):
    ref = save(tmp_path)
    pp.open(tmp_path).run("r").record(ref, {"loss": math.inf})
    assert outcome(tmp_path, ref, "metrics", evaluate=lambda _: {"loss": 0.5}).outcome == "failed"


@pytest.mark.parametrize(("evaluated", "recorded"), [(math.nan, 0.6), (math.inf, 0.6), (0.5, math.nan), (0.5, 0.6)])
def test_what_is_recorded_after_a_validation_is_compared_with_what_it_found(tmp_path, evaluated, recorded):
    ref = save(tmp_path, loss=0.5)
    validation = pp.validate(ref, root=tmp_path, evaluate=lambda _: {"loss": evaluated})
    repository = pp.open(tmp_path)
    repository.run("r").record(ref, {"loss": recorded})
    said = propose(repository, ref, "champion").objections
    assert f"loss was recorded as {recorded:g} after the validation, which had found {evaluated:g}" in said
    assert validation.passed == (evaluated == 0.5)


def test_what_was_measured_later_is_recorded_too(tmp_path):
    ref = save(tmp_path)
    pp.open(tmp_path).run("r").record(ref, {"accuracy": 0.9})
    assert outcome(tmp_path, ref, "metrics", evaluate=lambda _: {"accuracy": 0.9}).outcome == "passed"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_predictions_are_kept_and_read_back(tmp_path, kind):
    scores, labels = [[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]], [1, 1, 0]
    for given_as in (scores, [1, 0, 0]):
        answer = pp.Evaluated(metrics={}, predictions=kind(given_as), labels=kind(labels))
        result = pp.validate(save(tmp_path), root=tmp_path, evaluate=lambda _, answer=answer: answer)
        assert kept(LocalStore(tmp_path), result) == ([1, 0, 0], labels)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([1, 2], None),
        (None, [1, 2]),
        ([1, 2], [1]),
        (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
        ([0.5, 0.2], [1, 0]),
        ([[1, 2]], [1]),
        ([[math.nan, 1.0]], [1]),
        ([1, [2]], [1, 2]),
        (["cat"], [1]),
        (np.array([1 << 63], dtype=np.uint64), [1]),
    ],
)
def test_predictions_that_are_none_fail(tmp_path, predictions, labels):
    answer = pp.Evaluated(metrics={"accuracy": 1.0}, predictions=predictions, labels=labels)
    result = pp.validate(save(tmp_path), root=tmp_path, evaluate=lambda _: answer)
    assert [one.check for one in result.failures] == ["metrics"]
    assert result.predictions is None


class Odd(BaseException):
    """Not even an Exception."""


class Mute(Exception):
    """One that cannot say what it is."""

    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    "error", [ValueError("no data"), SystemExit(3), Odd("odd"), Mute(), RecursionError(), MemoryError()]
)
def test_whatever_an_evaluation_raises_fails_it_and_stops_nothing(tmp_path, error):
    def evaluate(_):
        raise error

    result = pp.validate(save(tmp_path), root=tmp_path, evaluate=evaluate, checks=[evaluate, lambda _: None])
    finding = found(result, "metrics")
    assert finding.said.startswith("raised ")
    assert type(error).__name__ in finding.said
    assert finding.evidence["traceback"].splitlines()[1].endswith("in evaluate"), "the first line is the user's"
    assert [one.outcome for one in result.findings[-2:]] == ["failed", "passed"]


def test_an_interrupt_ends_it_all_and_records_nothing(tmp_path):
    def evaluate(_):
        raise KeyboardInterrupt

    ref = save(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pp.validate(ref, root=tmp_path, evaluate=evaluate)
    assert validations.newest(LocalStore(tmp_path), *ref.split("/")) is None
    assert not audit.audit(pp.open(tmp_path)).findings


# --- budgets and further checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latency_ms", "memory_mb", "size_mb", "parameters"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux")
def test_budgets_hold(tmp_path, name):
    ref = save(tmp_path, torch.nn.Linear(2000, 1000))

    def make():
        return torch.nn.Linear(2000, 1000), torch.ones(1, 2000)

    tight = outcome(tmp_path, ref, f"budget {name}", model=make, budgets={name: 1e-6})
    assert (tight.outcome, "over the budget" in tight.said) == ("failed", True)
    assert tight.evidence["value"] > 0
    if name == "memory_mb":
        assert tight.evidence["value"] > 7.5, "the model alone has 8 MB"
    assert outcome(tmp_path, ref, f"budget {name}", model=make, budgets={name: 1e9}).outcome == "passed"


def test_what_cannot_be_measured_is_over_budget(tmp_path):
    result = pp.validate(save(tmp_path), root=tmp_path, model=build, budgets={"latency_ms": 1e9, "memory_mb": 1e9})
    assert [one.check for one in result.failures] == ["budget latency_ms", "budget memory_mb"]
    assert all("no inputs" in one.said for one in result.failures)


def test_without_a_model_parameters_are_the_tensors_elements(tmp_path):
    finding = outcome(tmp_path, save(tmp_path), "budget parameters", budgets={"parameters": 9})
    assert (finding.outcome, finding.evidence["value"]) == ("passed", 9)


@pytest.mark.parametrize("model", [None, lambda: prune.identity(torch.nn.Linear(4, 5), "weight")])
def test_a_mask_is_no_parameter(tmp_path, model):
    module = torch.nn.Linear(4, 5)
    prune.random_unstructured(module, "weight", amount=10)
    ref = save(tmp_path, module)
    finding = outcome(tmp_path, ref, "budget parameters", model=model, budgets={"parameters": 25})
    assert (finding.outcome, finding.evidence["value"]) == ("passed", 25)


@pytest.mark.parametrize("answer", [True, False, "no", 0.5, [1]])
def test_a_check_that_returns_something_else_fails(tmp_path, answer):
    result = pp.validate(save(tmp_path), root=tmp_path, checks=[lambda _: answer])
    assert "raises to fail" in result.failures[0].said


class Unprintable:
    """Evidence that raises when it is looked at."""

    def __repr__(self):
        raise SystemExit


def test_evidence_that_raises_fails_its_check(tmp_path):
    result = pp.validate(save(tmp_path), root=tmp_path, checks=[lambda _: {"a": Unprintable()}, lambda _: None])
    assert [one.outcome for one in result.findings[-2:]] == ["failed", "passed"]


def test_a_model_that_does_not_run_loads_all_the_same(tmp_path):
    file = golden(tmp_path / "g", torch.ones(4, 5))
    result = pp.validate(
        save(tmp_path), root=tmp_path, model=build, golden=file, budgets={"memory_mb": 1e9, "latency_ms": 1e9}
    )
    assert [one.check for one in result.failures] == ["signature", "golden", "budget memory_mb", "budget latency_ms"]
    assert "the model does not run: RuntimeError" in found(result, "budget memory_mb").said


def test_any_evidence_can_be_kept(tmp_path):
    evidence = {
        "nan": math.nan,
        "large": 1 << 70,
        "tensor": torch.ones(2),
        "scalar": np.float32(1.5),
        "object": object(),
        "text": "\ud800",
        4: {"deep": [(1, {2})]},
    }
    finding = pp.validate(save(tmp_path), root=tmp_path, checks=[lambda _: evidence]).findings[-1]
    assert finding.outcome == "passed"
    kept = dict(finding.evidence)
    assert kept.pop("object").startswith("<object object")
    assert kept == {
        "nan": "nan",
        "large": str(1 << 70),
        "tensor": [1.0, 1.0],
        "scalar": 1.5,
        "text": "\\ud800",
        "4": {"deep": [[1, [2]]]},
    }
    large = pp.validate(save(tmp_path), root=tmp_path, checks=[lambda _: {"all": list(range(100_000))}]).findings[-1]
    assert list(large.evidence) == ["left_out"]


# --- what cannot be asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"budgets": {"latency": 1}}, "did you mean 'latency_ms'"),
        ({"budgets": {"size_mb": 0}}, "not a number above 0"),
        ({"budgets": {"size_mb": math.nan}}, "not a number above 0"),
        ({"budgets": {"size_mb": "1"}}, "not a number above 0"),
        ({"budgets": {"size_mb": True}}, "not a number above 0"),
        ({"tolerance": "small"}, "at least 0"),
        ({"metrics": "accuracy"}, "give a list"),
        ({"checks": validated.fine}, "give a list"),
        ({"checks": [3]}, "give a function"),
        ({"tolerance": -1}, "at least 0"),
        ({"tolerance": math.inf}, "at least 0"),
        ({"agreement": 2}, "share"),
        ({"agreement": 0.5}, "--golden"),
        ({"metrics": ["accuracy"]}, "--with"),
        ({"golden": "g"}, "--model"),
        ({"signature": {"output": "F32[*, 3]"}}, "--model"),
        ({"signature": {"output": "float"}, "model": build}, "F32"),
        ({"evaluate": "nothing"}, "module:function"),
        ({"against": "no/such/alias"}, "cannot name an alias"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(tmp_path, wanted, says):
    ref = save(tmp_path)
    with pytest.raises(pp.errors.ConfigError, match=says):
        pp.validate(ref, root=tmp_path, **wanted)
    assert validations.newest(LocalStore(tmp_path), *ref.split("/")) is None


def test_what_is_not_there_is_said(tmp_path):
    ref = save(tmp_path)
    with pytest.raises(pp.errors.NotFoundError, match="did you mean 'model'"):
        pp.validate(ref, root=tmp_path, part="modle")
    with pytest.raises(pp.errors.NotFoundError, match="no checkpoint named"):
        pp.validate("r/none", root=tmp_path)


# --- at rest ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_goes_meanwhile_leaves_no_record(tmp_path):
    ref = save(tmp_path)

    def remove(candidate):
        (tmp_path / layout.manifest_key("r", candidate.manifest.name)).unlink()

    with pytest.raises(pp.errors.NotFoundError, match="was removed while it was being validated"):
        pp.validate(ref, root=tmp_path, checks=[remove])
    assert validations.checkpoints_with(LocalStore(tmp_path), "r") == []


def test_rules_leave_it_alone_meanwhile(tmp_path):
    ref = save(tmp_path)
    seen = []

    def look(candidate):
        seen.append(pp.open(tmp_path).store.is_read(layout.manifest_key("r", candidate.manifest.name)))

    pp.validate(ref, root=tmp_path, checks=[look])
    assert seen == [True]
    assert not pp.open(tmp_path).store.is_read(layout.manifest_key("r", pp.open(tmp_path).find(ref).name))


@pytest.mark.parametrize("store", [LocalStore, lambda _: MemoryStore()], ids=["disk", "memory"])
def test_of_several_at_once_each_gets_a_number(tmp_path, store):
    store = store(tmp_path)
    one = pp.validate(save(store), root=store)
    begin = threading.Barrier(4)
    got = []

    def work(by):
        begin.wait()
        got.append(validations.record(store, replace(one, by=by)).number)

    threads = [threading.Thread(target=work, args=(f"number {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [2, 3, 4, 5]
    assert [found.number for found in validations.readable(store, "r", one.checkpoint)[0]] == [1, 2, 3, 4, 5]


@settings(max_examples=50)
@given(limit=st.integers(1, 100), tolerance=st.integers(0, 3))
def test_how_a_number_is_written_does_not_make_it_another_question(limit, tolerance):
    one = ValidationSpec(budgets={"size_mb": limit}, tolerance=tolerance)
    assert one.digest == ValidationSpec(budgets={"size_mb": float(limit)}, tolerance=float(tolerance)).digest
    assert one.digest != ValidationSpec(budgets={"size_mb": limit + 1}, tolerance=tolerance).digest


CUT_SHORT = """
import os, sys
import peakpoint as pp
import validated
from peakpoint.store import LocalStore

class Dying(LocalStore):
    def create(self, key, data):
        if "/validations/" in key:
            os._exit(9)
        super().create(key, data)

pp.validate("r@latest", root=Dying(__import__("pathlib").Path(sys.argv[1])), evaluate=validated.evaluated)
"""


def test_the_last_number_there_is_hangs_nothing(tmp_path):
    ref = save(tmp_path)
    first = pp.validate(ref, root=tmp_path)
    folder = (tmp_path / layout.validation_key(first.run, first.checkpoint, 1)).parent
    (folder / f"{10**18 - 1}.json").write_bytes(b"{}")
    with pytest.raises(pp.errors.CorruptError, match="leaves no number"):
        pp.validate(ref, root=tmp_path)


def test_a_death_between_predictions_and_record_leaves_litter_and_no_validation(tmp_path):
    ref = save(tmp_path)
    path = os.pathsep.join([*sys.path])
    command = [sys.executable, "-c", CUT_SHORT, str(tmp_path)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode == 9
    repository = pp.open(tmp_path)
    assert validations.readable(repository.store, *ref.split("/"))[0] == []
    litter = audit.audit(repository).of_kind("litter")
    assert [one.what for one in litter] == ["predictions of an interrupted validation"]
    hold = repository.store.reading(layout.manifest_key("r", repository.find(ref).name))
    assert audit.audit(repository).clean, "while somebody may be about to write the record, it is no litter"
    hold.release()
    assert [one.where for one in audit.clean(repository)] == [litter[0].where]
    result = pp.validate(ref, root=tmp_path, evaluate=validated.evaluated)
    assert result.number == 1
    assert audit.clean(repository) == []
    assert audit.audit(repository, deep=True).clean


def test_damage_to_validations_is_damage(tmp_path):
    ref = save(tmp_path)
    one = pp.validate(ref, root=tmp_path, evaluate=validated.evaluated)
    repository = pp.open(tmp_path)
    predictions = tmp_path / layout.predictions_key("r", one.checkpoint, one.predictions)
    record = tmp_path / layout.validation_key("r", one.checkpoint, 1)
    stray = record.parent / "notes.txt"
    stray.write_text("mine")
    data = bytearray(predictions.read_bytes())
    data[20] ^= 1
    predictions.write_bytes(data)
    assert audit.audit(repository).clean
    result = audit.audit(repository, deep=True)
    assert [(one.kind, one.where.rpartition("/")[2]) for one in result.findings] == [
        ("damage", predictions.name),
        ("foreign", "notes.txt"),
    ]
    predictions.unlink()
    assert "are missing" in audit.audit(repository).of_kind("damage")[0].what
    data = bytearray(record.read_bytes())
    data[20] ^= 1
    record.write_bytes(data)
    assert [one.where for one in audit.audit(repository).of_kind("damage")] == [
        layout.validation_key(*ref.split("/"), 1)
    ]
    shown = CliRunner().invoke(cli, ["show", str(tmp_path), ref, "--json"], catch_exceptions=False)
    told = json.loads(shown.output)
    assert (told["validations"], len(told["damaged_validations"])) == ([], 1)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"number": 2},
        {"checkpoint": "0" * 16},
        {"run": 3},
        {"metrics": {"accuracy": "high"}},
        {"metrics": None},
        {"findings": [{"check": "finite", "outcome": "maybe", "said": ""}]},
        {"wanted": {"budgets": {"size_mb": "small"}}},
        {"at": "yesterday"},
    ],
)
def test_records_that_say_nonsense_are_refused(tmp_path, change):
    one = pp.validate(save(tmp_path), root=tmp_path)
    record = tmp_path / layout.validation_key("r", one.checkpoint, 1)
    content = json.loads(record.read_bytes())
    content.pop("seal")
    record.write_bytes(seal(content))
    assert validations.read(LocalStore(tmp_path), "r", one.checkpoint, 1) == one
    record.write_bytes(seal(content | change))
    with pytest.raises((pp.errors.FormatError, pp.errors.CorruptError)):
        validations.read(LocalStore(tmp_path), "r", one.checkpoint, 1)


@pytest.mark.parametrize(
    "change", [{"labels": "AAAA"}, {"predicted": 3}, {"labels": ""}, {"labels": "ä"}, {"format": 2}]
)
def test_predictions_that_say_nonsense_are_refused(tmp_path, change):
    one = pp.validate(save(tmp_path), root=tmp_path, evaluate=validated.evaluated)
    store = LocalStore(tmp_path)
    content = json.loads(store.get(layout.predictions_key("r", one.checkpoint, one.predictions)))
    content.pop("seal")
    data = seal(content | change)
    store.put(layout.predictions_key("r", one.checkpoint, digest(data)), [data])
    with pytest.raises(pp.errors.FormatError):
        validations.predictions_of(store, replace(one, predictions=digest(data)))


def test_the_validations_of_a_checkpoint_outlive_it(tmp_path):
    ref = save(tmp_path)
    save(tmp_path)
    one = pp.validate(ref, root=tmp_path)
    run = pp.open(tmp_path).run("r")
    maintenance.remove(run, [run.find_manifest(ref)], "a test")
    assert validations.newest(run.store, "r", one.checkpoint) == one
    assert audit.audit(pp.open(tmp_path)).clean


# --- in a process apart -------------------------------------------------------------------------------------------


def apart(root, ref, **wanted):
    return validation.validate(pp.open(root), ref, ValidationSpec(**wanted), timeout=120)


def test_a_process_apart_finds_the_same(tmp_path):
    ref = save(tmp_path, accuracy=0.5)
    crown(tmp_path, ref)
    file = str(golden(tmp_path / "g"))
    names = []
    wanted = ValidationSpec(
        evaluate="validated:evaluated", model="validated:build", golden=file, checks=("validated:fine",)
    )
    there = validation.validate(pp.open(tmp_path), ref, wanted, progress=names.append)
    here = pp.validate(
        ref, root=tmp_path, evaluate=validated.evaluated, model=build, golden=file, checks=[validated.fine]
    )
    assert names == ["the import of functions", *(one.check for one in there.findings)]
    assert [replace(one, seconds=0) for one in there.findings] == [replace(one, seconds=0) for one in here.findings]
    assert (there.metrics, there.predictions, there.wanted) == (here.metrics, here.predictions, here.wanted)
    assert (there.against, there.number, here.number) == (here.against, 1, 2)


@pytest.mark.parametrize(
    ("function", "says", "printed"),
    [
        ("segfault", "the process died with signal 11 (SIGSEGV) during metrics", "a last word"),
        ("leave", "the process ended by itself, with exit code 0, during metrics", ""),
    ],
)
def test_a_death_is_a_failed_check(tmp_path, function, says, printed):
    ref = save(tmp_path, accuracy=0.5)
    result = apart(tmp_path, ref, evaluate=f"validated:{function}")
    outcomes = {one.check: one.outcome for one in result.findings}
    assert outcomes["finite"] == "passed", "what was found before is kept"
    assert outcomes["golden"] == "skipped"
    assert result.failures[0].said == says
    assert printed in result.failures[0].evidence.get("output", "")
    assert validations.newest(LocalStore(tmp_path), "r", result.checkpoint) == result


def test_what_is_written_to_descriptors_of_others_confuses_nobody(tmp_path):
    validation = apart(tmp_path, save(tmp_path, accuracy=0.5), evaluate="validated:scribble")
    assert validation.passed
    assert validation.metrics == {"accuracy": 0.5}


def test_the_command_prints_records_and_leaves_with_16(tmp_path):
    ref = save(tmp_path, accuracy=0.5)
    command = [sys.executable, "-m", "peakpoint", "validate", str(tmp_path), ref]
    where = {
        "cwd": Path(__file__).parents[1] / "support",
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    }
    options = ["--with", "validated:metrics", "--metric", "accuracy"]
    done = subprocess.run([*command, *options, "--json"], **where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["passed"], told["number"]) == (True, 1)
    metrics = next(one for one in told["findings"] if one["check"] == "metrics")
    assert metrics["evidence"]["output"] == "evaluating now\n", "what is printed disturbs no JSON"
    assert "checking metrics\n" in done.stderr
    options = ["--with", "validated:leave_politely", "--budget", "size_mb=1e-9"]
    done = subprocess.run([*command, *options], **where, capture_output=True, text=True, check=False)
    assert done.returncode == 16
    assert "did not pass: metrics, budget size_mb" in done.stderr
    assert "raised SystemExit: 3" in done.stdout
    assert "validation 2 of" in done.stdout
    shown = CliRunner().invoke(cli, ["show", str(tmp_path), ref], catch_exceptions=False).output
    assert "1: " in shown
    assert "failed: metrics, budget size_mb" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "latency"], "write NAME=VALUE"),
        (["--budget", "latency_ms=fast"], "write NAME=VALUE"),
        (["--budget", "latency_ms=nan"], "write NAME=VALUE"),
        (["--budget", "speed=1"], "there is no budget 'speed'"),
        (["--signature", "output"], "write NAME=VALUE"),
        (["--timeout", "soon"], "--timeout"),
        (["--timeout", "0"], "above 0"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, says):
    ref = save(tmp_path)
    done = CliRunner().invoke(cli, ["validate", str(tmp_path), ref, *options])
    assert isinstance(done.exception, pp.errors.ConfigError)
    assert says in str(done.exception)


def test_a_store_that_only_this_process_has_cannot_be_examined_elsewhere():
    store = MemoryStore()
    ref = save(store)
    with pytest.raises(pp.errors.ConfigError, match="another process"):
        validation.validate(pp.open(store), ref, ValidationSpec())


def test_a_hang_is_stopped(tmp_path):
    ref = save(tmp_path, accuracy=0.5)
    wanted = ValidationSpec(evaluate="validated:hang")
    result = validation.validate(pp.open(tmp_path), ref, wanted, timeout=1.0)
    (failure,) = result.failures
    assert failure.said.startswith("it took longer than 1 s, and was stopped during "), "as far as it came"
    later = result.findings[result.findings.index(failure) + 1 :]
    assert {finding.outcome for finding in later} == {"skipped"}
