"""Saves and loads with torch.distributed.checkpoint in one process."""

import datetime as dt
import json
import pathlib

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

import peakpoint as pp
from peakpoint.distributed import Reader, Writer
from peakpoint.errors import ConfigError, ConflictError, CorruptError, MismatchError, NotFoundError, SignatureError
from peakpoint.production.promotion import promote
from peakpoint.production.proposal import propose
from peakpoint.repository.audit import audit
from training import QuietCheckpointer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(root, state, planner=None, **options):
    dcp.save(state, storage_writer=Writer(root, run="r", **{"step": 1} | options), planner=planner)


def load(root, state, ref="r@latest", planner=None):
    dcp.load(state, storage_reader=Reader(root, ref), planner=planner)
    return state


def failure(work):
    """Return the error of the only rank."""
    with pytest.raises(dcp.api.CheckpointException) as caught:
        work()
    return caught.value.failures[0][0]


class Trained:
    """A model and an optimizer that has taken a step."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1 * seed)
        self.model(torch.rand(5, 4)).pow(2).sum().backward()
        self.optimizer.step()

    @property
    def state(self):
        return {"model": self.model, "optim": self.optimizer.state_dict()}


def tensors(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_save_is_a_checkpoint_of_the_run(tmp_path):
    trained = Trained(1)
    save(tmp_path, trained.state, step=40, epoch=3, metrics={"loss": 0.5}, reason="end of warmup")
    save(tmp_path, trained.state, step=50, epoch=4, metrics={"loss": 0.25})
    run = pp.open(tmp_path).run("r")
    first, second = run.checkpoints()
    assert (first.step, first.epoch, first.metrics) == (40, 3, {"loss": 0.5})
    assert first.reasons == ("saved on request: end of warmup",)
    assert run.find_manifest(first.ref).asked == "end of warmup"
    assert run.find_manifest(second.ref).parent == first.id
    assert [report.step for report in run.history()] == [40, 50]
    assert run.best("loss", mode="min").id == second.id
    assert [checkpoint.id for checkpoint in pp.select(tmp_path, "epoch = 3")] == [first.id]
    assert run.holder() is None
    assert audit(pp.open(tmp_path), deep=True).clean
    loaded = pp.load("r:epoch=3", root=tmp_path)
    assert list(loaded) == ["model", "optim"]
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(loaded["model"][name], tensor)


def test_a_model_and_an_optimizer_come_back(tmp_path):
    first, second = Trained(1), Trained(2)
    save(tmp_path, first.state)
    state = load(tmp_path, second.state)
    second.optimizer.load_state_dict(state["optim"])
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor)
    assert second.optimizer.param_groups[0]["lr"] == 0.1
    moments = [
        [value for state in trained.optimizer.state.values() for value in state.values()] for trained in (first, second)
    ]
    assert all(map(torch.equal, *moments))


VALUES = {
    "none": None,
    "pair": (1, float("inf")),
    "tensors": (torch.arange(3), {"inner": torch.ones(2)}),
    "array": np.arange(1000.0),
    "when": dt.datetime(2024, 5, 6, tzinfo=dt.UTC),
    "path": pathlib.PurePosixPath("a/b"),
    "bytes": b"\x80\x02",
    "lists": [torch.zeros(2), [1, {"a": torch.ones(1)}]],
    "$": 1,
    "größe": 2**70,
    "empty": [],
}


def test_values_are_kept_as_typed_json_and_never_pickled(tmp_path):
    save(tmp_path, {"values": VALUES})
    manifest = pp.open(tmp_path).find_manifest("r@latest")
    assert {file.name for file in manifest.files} == {"values.safetensors", "state.json"}
    directory = tmp_path / "runs" / "r" / "checkpoints" / manifest.name
    assert json.loads((directory / "state.json").read_text())["parts"].keys() == {"values"}
    loaded = pp.load("r@latest", root=tmp_path)["values"]
    again = load(
        tmp_path, {"values": dict.fromkeys(VALUES, 0) | {"lists": [torch.ones(2), [0, {"a": torch.zeros(1)}]]}}
    )
    for values in (loaded, again["values"]):
        assert values.keys() == VALUES.keys()
        torch.testing.assert_close(values.pop("array"), VALUES["array"], rtol=0, atol=0)
        assert repr(values) == repr({name: value for name, value in VALUES.items() if name != "array"})
        values["array"] = VALUES["array"]


def test_what_cannot_be_kept_is_refused_with_its_place_and_nothing_is_left(tmp_path):
    error = failure(lambda: save(tmp_path, {"model": {"w": torch.ones(2), "hook": {"f": object()}}}))
    assert isinstance(error, ConfigError)
    assert 'state["model"]["hook"]["f"] is a object' in str(error)
    run = pp.open(tmp_path).run("r")
    assert run.checkpoints() == []
    assert run.holder() is None
    save(tmp_path, {"model": {"w": torch.ones(2)}})
    assert audit(pp.open(tmp_path), deep=True).clean


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"rng": {"a": 1}}, "call it my_rng"),
        ({"a/b": {"a": 1}}, "a part's name is ASCII letters"),
        ({}, "the state dict is empty"),
        ({"extra": {"a": 1}, "step": 2}, "rename that dict"),
        ({"model": {"w": (torch.ones(1),), "w.0": torch.ones(1)}}, "cannot have the tensor 'w.0'"),
        ({"model": {"w": torch.ones(2).to_sparse()}}, 'state["model"]["w"] is a torch.Tensor: its layout'),
    ],
)
def test_a_state_that_has_no_place_is_refused(tmp_path, state, message):
    error = failure(lambda: save(tmp_path, state))
    assert isinstance(error, ConfigError)
    assert message in str(error)
    assert pp.open(tmp_path).run("r").checkpoints() == []


def test_what_is_no_dict_goes_into_one_part(tmp_path):
    save(tmp_path, {"step": 7, "seed": torch.tensor(5), "model": {"w": torch.ones(2)}})
    assert dict(pp.load("r@latest", root=tmp_path)["extra"]) == {"step": 7, "seed": torch.tensor(5)}
    state = load(tmp_path, {"seed": torch.tensor(0), "step": 0, "model": {"w": torch.zeros(2)}})
    assert state == {"seed": torch.tensor(5), "step": 7, "model": state["model"]}
    assert state["model"]["w"].tolist() == [1, 1]


def test_a_planner_that_keeps_levels_as_they_are(tmp_path):
    state = {"weight": torch.arange(3), "nested": {"inner": torch.ones(2), "n": 1}}
    save(tmp_path, state, planner=DefaultSavePlanner(flatten_state_dict=False))
    loaded = pp.load("r@latest", root=tmp_path)["extra"]
    assert loaded["nested"]["inner"].tolist() == [1, 1]
    assert load(tmp_path, {"weight": torch.zeros(3, dtype=int)})["weight"].tolist() == [0, 1, 2]


def test_views_and_arrays_and_generators_of_a_checkpointer_are_loaded(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "model": model,
        "views": {"all": base, "row": base[1], "columns": base[:, 1:3]},
        "image": {"w": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)},
        "noise": torch.Generator().manual_seed(3),
        "array": np.arange(500),
        "number": 3,
        "extra": {"a": 1},
    }
    with QuietCheckpointer(tmp_path, run="r", state=state, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
    wanted = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()},
        "views": {name: torch.zeros_like(view) for name, view in state["views"].items()},
        "image": {"w": torch.zeros(2, 3, 4, 4)},
        "noise": {"generator": torch.zeros_like(state["noise"].get_state())},
        "array": None,
        "number": 0,
        "extra": {"a": 0},
    }
    load(tmp_path, wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(wanted["model"][name], tensor)
    for name, view in state["views"].items():
        assert torch.equal(wanted["views"][name], view)
    assert torch.equal(wanted["image"]["w"], state["image"]["w"])
    assert torch.equal(wanted["noise"]["generator"], state["noise"].get_state())
    assert np.array_equal(wanted["array"], state["array"])
    assert (wanted["number"], wanted["extra"]) == (3, {"a": 1})


def test_a_run_of_a_checkpointer_is_continued_by_hand_and_by_the_checkpointer(tmp_path):
    trained = Trained(1)
    state, rules = {"model": trained.model}, [pp.Best("loss", "min"), pp.Last(1)]

    def train(epochs):
        with QuietCheckpointer(tmp_path, run="r", state=state, keep=rules, config={"lr": 0.1}) as ckpt:
            for epoch in ckpt.epochs(epochs):
                ckpt.report(loss=1.0 - epoch / 10)

    train(2)
    save(tmp_path, state, step=9, epoch=1, metrics={"loss": 0.9})
    run = pp.open(tmp_path).run("r")
    assert [rule.text for rule in run.rules()] == [rule.text for rule in rules]
    assert run.settings().config == {"lr": 0.1}
    with pytest.warns(pp.PeakpointWarning, match="the random generators: they are not in this checkpoint"):
        train(4)
    steps = [(checkpoint.step, checkpoint.epoch) for checkpoint in run.checkpoints()]
    assert (9, 1) in steps, "kept, whatever the rules say"
    assert [report.epoch for report in run.history()] == [0, 1, 1, 2, 3]


def test_a_save_at_an_earlier_step_begins_a_branch(tmp_path):
    for step in (10, 20, 15):
        save(tmp_path, {"a": {"x": step}}, step=step)
    run = pp.open(tmp_path).run("r")
    ten, twenty, fifteen = map(run.find_manifest, ("r:10", "r:20", "r:15"))
    assert (twenty.parent, fifteen.parent) == (ten.id, ten.id)
    assert fifteen.forks == ((1, 3),)
    assert [report.step for report in run.history()] == [10, 15]
    assert run.latest().step == 15


def test_a_run_that_is_being_written_is_refused(tmp_path):
    with QuietCheckpointer(tmp_path, run="r", state={"x": 1}, keep=[pp.Last(1)]):
        assert isinstance(failure(lambda: save(tmp_path, {"a": {"x": 1}})), ConflictError)


def test_names_shapes_and_types_that_differ_are_refused(tmp_path):
    save(tmp_path, {"model": {"w": torch.ones(2, 3), "b": torch.ones(3)}})
    assert "Missing key in checkpoint state_dict: model.c" in str(
        failure(lambda: load(tmp_path, {"model": {"c": torch.ones(1)}}))
    )
    assert "torch.Size([2, 3]) and current: torch.Size([2, 2]) for model.w" in str(
        failure(lambda: load(tmp_path, {"model": {"w": torch.ones(2, 2)}}))
    )
    state = {"model": {"w": torch.zeros(2, 3).half(), "b": torch.zeros(3)}}
    error = failure(lambda: load(tmp_path, state))
    assert isinstance(error, MismatchError)
    assert error.differences == ("model.w: torch.float32 in the checkpoint, torch.float16 in the state dict",)
    assert not state["model"]["b"].any(), "nothing was loaded"
    partial = {"model": {"b": torch.zeros(3), "c": torch.zeros(1)}}
    load(tmp_path, partial, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert partial["model"]["b"].tolist() == [1, 1, 1]


def test_a_flipped_byte_is_found(tmp_path):
    save(tmp_path, {"model": {"w": torch.ones(2, 3)}})
    path = next(tmp_path.rglob("model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    error = failure(lambda: load(tmp_path, {"model": {"w": torch.ones(2, 3)}}))
    assert isinstance(error, CorruptError)
    assert "tensor 'w' in model.safetensors" in str(error)


def test_an_alias_whose_policy_asks_for_signatures_leads_to_nothing_unsigned(tmp_path):
    save(tmp_path, {"model": {"w": torch.ones(2)}})
    promote(propose(pp.open(tmp_path), "r@latest", "champion"), "good", force=True)
    assert load(tmp_path, {"model": {"w": torch.zeros(2)}}, "@champion")["model"]["w"].tolist() == [1, 1]
    public_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "k.pub").write_bytes(pem)
    (tmp_path / "production.toml").write_text("format = 1\n[champion.signing]\npublic_key = 'k.pub'\n")
    with pytest.raises(SignatureError, match="is not signed"):
        Reader(tmp_path, "@champion")
    Reader(tmp_path, "r@latest")


def test_arguments_that_cannot_work(tmp_path):
    for options, message in (
        ({"step": -1}, "step= takes a whole number from 0 on, not -1"),
        ({"epoch": 1.5}, "epoch= takes a whole number"),
        ({"reason": " "}, "reason= is empty"),
        ({"metrics": {"a": "x"}}, "metric 'a' is 'x'"),
        ({"run": "a b"}, "cannot name a run"),
    ):
        with pytest.raises(ConfigError, match=message):
            Writer(tmp_path, **{"run": "r", "step": 1} | options)
    with pytest.raises(NotFoundError, match="is not a Peakpoint repository"):
        Reader(tmp_path, "r@latest")
    state = {"a": {"x": 1}}
    with pytest.raises(ConfigError, match="checkpoint_id='c' has no meaning"):
        dcp.save(state, storage_writer=Writer(tmp_path, run="r", step=1), checkpoint_id="c")
    save(tmp_path, state)
    with pytest.raises(ConfigError, match="checkpoint_id='c' has no meaning"):
        dcp.load(state, storage_reader=Reader(tmp_path, "r@latest"), checkpoint_id="c")


def test_plans_that_are_not_sent_are_refused(tmp_path):
    state = {"a": {"x": torch.ones(1)}}
    save(tmp_path, state, planner=DefaultSavePlanner(enable_plan_caching=True))
    error = failure(lambda: save(tmp_path, state, planner=DefaultSavePlanner(enable_plan_caching=True)))
    assert "enable_plan_caching=True" in str(error)
    assert len(pp.open(tmp_path).run("r").checkpoints()) == 1
