"""The settings of a run: what is kept of them, what is refused before the run begins, and what a resume says."""

import argparse
import dataclasses
import enum
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import peakpoint as pp
from peakpoint.format.settings import Settings, settings_of
from peakpoint.repository import maintenance
from training import checkpointer


class Mode(enum.Enum):
    FAST = "fast"


@dataclasses.dataclass
class Optimizer:
    name: str = "adamw"
    betas: tuple = (0.9, 0.99)


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)


def settings_after(root, **given):
    """Open a run with settings, and read them again."""
    with checkpointer(root, state={"x": 1}, **given) as ckpt:
        ckpt.report(step=1)
    return pp.open(root).run("r").settings()


def record(root):
    return json.loads((root / "runs" / "r" / "run.json").read_bytes())


NESTED = {"lr": 0.1, "optimizer": {"name": "adamw", "betas": [0.9, 0.99]}}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"lr": 0.1, "amp": True, "seed": 2**63 - 1, "none": None, "list": [1, [2]]},) * 2,
        (argparse.Namespace(lr=0.1, out=Path("a/b"), n=[1, 2]), {"lr": 0.1, "out": "a/b", "n": [1, 2]}),
        (Config(), NESTED),
        (argparse.Namespace(optimizer=Optimizer(), lr=0.1), {"optimizer": NESTED["optimizer"], "lr": 0.1}),
        (types.MappingProxyType({"a": types.MappingProxyType({"b": 1})}), {"a": {"b": 1}}),
        ({"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), "t": torch.tensor(2)}, None),
        ({"mode": Mode.FAST}, {"mode": "fast"}),
        ({"dots.are": {"names": 1}, "ünï": "ü\n"}, {"dots.are": {"names": 1}, "ünï": "ü\n"}),
    ],
)
def test_settings_are_kept_as_they_were_given(tmp_path, given, kept):
    kept = {"f": 0.5, "i": 3, "b": True, "t": 2} if kept is None else kept
    assert settings_after(tmp_path, config=given, tags=["b", "a", "b"]) == Settings(kept, ("b", "a"))
    assert (record(tmp_path)["config"], record(tmp_path)["tags"]) == (kept, ["b", "a"])


CYCLE = {}
CYCLE["again"] = CYCLE


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"config": [("lr", 1)]}, "not a list"),
        ({"config": Config}, "not a type"),
        ({"config": "lr=1"}, "not a str"),
        ({"config": {1: 2}}, "config has the key 1"),
        ({"config": {float("nan"): 2}}, "config has the key nan"),
        ({"config": {"a": {None: 2}}}, r"config\.a has the key None"),
        ({"config": {"": 2}}, "the key ''"),
        ({"config": {"a": {"b": [object()]}}}, r"config\.a\.b\[0\] is a object"),
        ({"config": {"a": {1, 2}}}, r"config\.a is a set"),
        ({"config": {"a": b"x"}}, r"config\.a is a bytes"),
        ({"config": {"a": np.zeros(2)}}, r"config\.a is a numpy\.ndarray"),
        ({"config": argparse.Namespace(run=print)}, r"config\.run is a builtin_function"),
        ({"config": {"a": float("nan")}}, r"config\.a is nan"),
        ({"config": {"a": -float("inf")}}, r"config\.a is -inf"),
        ({"config": {"a": 2**63}}, "64 bits"),
        ({"config": {"a": "\ud800"}}, "UTF-8"),
        ({"config": {"\ud800": 1}}, "UTF-8"),
        ({"config": {"a.b": 1, "a": {"b": 2}}}, r"two settings 'a\.b'"),
        ({"config": {"a": "x" * 70_000}}, "65,536 are kept at most"),
        ({"config": {"a" * 201: 1}}, "more than 200 characters"),
        ({"config": CYCLE}, "nested more than 20 deep"),
        ({"tags": "ablation"}, r"give tags=\['ablation'\]"),
        ({"tags": 3}, r"give tags=\[3\]"),
        ({"tags": [3]}, "must be a text, not 3"),
        ({"tags": [["a"]]}, "must be a text"),
        ({"tags": [" "]}, "is no tag"),
        ({"tags": ["a" * 201]}, "is no tag"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_run_begins(tmp_path, given, words):
    with pytest.raises(pp.errors.ConfigError, match=words) as caught:
        checkpointer(tmp_path / "runs", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_resume_says_what_has_changed_and_the_newest_counts(tmp_path):
    def resumed(**given):
        said = []
        with checkpointer(tmp_path, state={"x": 1}, announce=said.append, **given) as ckpt:
            ckpt.resume()
            ckpt.report(step=1)
        return [line for line in said if "settings" in line]

    assert resumed(config={"lr": 0.1, "wd": 0, "same": [1]}, tags=["a"]) == []
    assert resumed(config={"lr": 0.1, "wd": 0.0, "same": (1,)}, tags=["a"]) == [], "0 and 0.0 are the same number"
    assert resumed() == [], "a training that gives none leaves them"
    assert pp.open(tmp_path).run("r").settings() == Settings({"lr": 0.1, "wd": 0.0, "same": [1]}, ("a",))
    [line] = resumed(config={"lr": 0.2, "same": [1], "new": True}, tags=["a", "b"])
    assert line == (
        "run 'r' goes on with other settings: config.lr 0.1 -> 0.2, config.wd 0 -> not set, "
        "config.new not set -> true, tags a -> a, b"
    )
    events = pp.open(tmp_path).run("r").events()
    assert settings_of(events).config["lr"] == 0.2
    assert settings_of(events[:6]).config["lr"] == 0.1, "what each start was given stays on record"
    assert record(tmp_path)["config"]["lr"] == 0.1, "what the run began with"
    [line] = resumed(config={f"n{number}": 1 for number in range(99)})
    assert line.endswith("and 92 more")


def test_rules_that_are_changed_by_hand_leave_the_settings(tmp_path):
    settings_after(tmp_path, config={"lr": 1}, tags=["a"])
    run, rules = pp.open(tmp_path).run("r"), (pp.Last(1),)
    maintenance.apply_plan(run, run.plan(rules), rules)
    assert run.settings() == Settings({"lr": 1}, ("a",))


def test_a_run_without_settings_says_nothing_of_them(tmp_path):
    assert settings_after(tmp_path) == Settings()
    assert not {"config", "tags"} & record(tmp_path).keys()
