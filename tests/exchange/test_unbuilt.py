"""Import: a value of a class that is not built is left out and named, nothing of the file is run, the rest comes in."""

import argparse
import datetime as dt
import decimal
import io
import operator
import types
import typing

import numpy as np
import pytest
import torch

import peakpoint as pp
from foreign_files import Call, Net, hostile, objects
from peakpoint.exchange import pickles
from peakpoint.exchange.pickle_builder import Unbuilt
from peakpoint.exchange.sources import find, read
from peakpoint.exchange.state_dicts import ReadOptions, storable
from training import same


class Node(dict):
    """As the nodes of configuration libraries."""


class Items(list):
    pass


class Angles(np.ndarray):
    pass


class Config:
    class Inner:
        pass

    def __init__(self):
        self.kind, self.lr = typing.Any, 0.1


class History:
    """Pickles bound methods of its own class, as MMEngine's does."""

    def __init__(self):
        self.values, self.methods = [1.0, 2.0], {"mean": self.mean}

    def mean(self):
        return sum(self.values) / len(self.values)


HERE = __name__


def kept(tmp_path, content, **options):
    """Save and read a file; returns what would be imported, and the notes."""
    torch.save(content, tmp_path / "a.pth")
    [source], _ = find(tmp_path / "a.pth")
    checkpoint, notes = storable(read(source, ReadOptions(**options)))
    return {**checkpoint.parts, "extra": checkpoint.extra}, [*checkpoint.notes, *notes]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Config(), f"{HERE}.Config"),
        (History(), f"{HERE}.History"),
        (Config.Inner(), f"{HERE}.Config.Inner"),
        (Node(lr=0.1), f"{HERE}.Node"),
        (Items([1]), f"{HERE}.Items"),
        (typing.Any, "typing.Any"),
        (int, "builtins.int"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (operator.attrgetter("a"), "operator.attrgetter"),
        (io.BytesIO(b"a"), "_io.BytesIO"),
        (np.array(["cat", None], dtype=object), "numpy.ndarray of O8"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "numpy.ndarray of M8"),
        (np.zeros(2, dtype=[("a", "<i4"), ("b", "<f4")]), "numpy.ndarray of V8"),
        (np.ones(2).view(Angles), f"{HERE}.Angles of f8"),
        (Call(getattr, Net, "mro"), "foreign_files.Net.mro"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_one_value_does_not_bar_the_others(value, name, tmp_path):
    model, optimizer, _ = objects()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "config": {"a": 1, "value": value, "listed": [1, [value]], "after": 2},
    }
    loaded, notes = kept(tmp_path, content)
    assert same(dict(loaded["model"]), dict(model.state_dict()))
    assert same(loaded["optimizer"], optimizer.state_dict())
    assert loaded["extra"] == {"epoch": 3, "config": {"a": 1, "after": 2}}
    said = [note for note in notes if note.startswith('LEFT OUT: extra["config"]["value"]') and name in note]
    assert said, notes
    assert 'extra["config"]["listed"] (because of its [1][0])' in said[0]
    assert ("--inert" in said[0]) == name.startswith(HERE)


def test_what_is_left_out_is_in_the_report_of_an_import(tmp_path):
    torch.save({"state_dict": Net().state_dict(), "hyper_parameters": {"lr": 0.1, "cfg": Config()}}, tmp_path / "a.pth")
    [source] = pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "root", run="r").checkpoints
    assert any(note.startswith('LEFT OUT: extra["hyper_parameters"]["cfg"]: ') for note in source.notes)
    loaded = pp.load("r@latest", root=tmp_path / "root")
    assert loaded["extra"] == {"hyper_parameters": {"lr": 0.1}}
    assert loaded["model"].keys() == Net().state_dict().keys()


def test_many_values_of_a_class_are_one_note(tmp_path):
    _, notes = kept(tmp_path, {"model": Net().state_dict(), "log": {f"a{n}": History() for n in range(50)}})
    [note] = [note for note in notes if note.startswith("LEFT OUT")]
    assert 'extra["log"]["a0"]' in note
    assert "and 47 more" in note


def test_a_namespace_of_the_standard_library_is_kept(tmp_path):
    inner = types.SimpleNamespace(lr=0.1, inner=types.SimpleNamespace(x=[1]))
    loaded, notes = kept(tmp_path, {"model": Net().state_dict(), "cfg": inner})
    assert loaded["extra"] == {"cfg": argparse.Namespace(lr=0.1, inner=argparse.Namespace(x=[1]))}
    assert not [note for note in notes if "LEFT OUT" in note]


@pytest.mark.parametrize(
    ("value", "record"),
    [
        (
            Node(lr=0.1, solver=Node(steps=3)),
            {"items": {"lr": 0.1, "solver": {"class": f"{HERE}.Node", "items": {"steps": 3}}}},
        ),
        (Items([1, 2]), {"items": [1, 2]}),
        (Config(), {"state": {"lr": 0.1}}),
        (History(), {"state": {"values": [1.0, 2.0], "methods": {}}}),
    ],
)
def test_records_of_inert_classes_hold_the_values(value, record, tmp_path):
    name = f"{HERE}.{type(value).__name__}"
    loaded, _ = kept(tmp_path, {"model": Net().state_dict(), "cfg": value}, inert=[name])
    assert loaded["extra"]["cfg"] == {"class": name, **record}


def test_an_optimizer_that_is_not_whole_is_left_out_as_a_whole(tmp_path):
    model, optimizer, _ = objects()
    state = optimizer.state_dict()
    state["param_groups"][0]["betas"] = Items([0.9, 0.99])
    loaded, notes = kept(tmp_path, {"model": model.state_dict(), "optimizer": state})
    assert list(loaded) == ["model", "extra"]
    [note] = [note for note in notes if note.startswith("LEFT OUT: the part optimizer: ")]
    assert f'optimizer["param_groups"][0]["betas"]: {HERE}.Items' in note


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), Config(), [Config()]])
def test_a_model_that_is_not_whole_is_refused(value, tmp_path):
    with pytest.raises(pp.errors.FormatError, match=r'model\["odd"\].*is not built from a file'):
        kept(tmp_path, {"model": {**Net().state_dict(), "odd": value}})


def test_what_modules_add_to_their_state_is_left_out_alone(tmp_path):
    state = {**Net().state_dict(), "a._extra_state": io.BytesIO(b"a"), "b._extra_state": {"scale": 2}}
    for content in ({"model": state}, state):
        loaded, notes = kept(tmp_path, content)
        assert loaded["model"]["b._extra_state"] == {"scale": 2}
        assert "a._extra_state" not in loaded["model"]
        assert 'LEFT OUT: model["a._extra_state"]: _io.BytesIO is not built from a file' in notes


def test_a_whole_module_is_refused_and_the_way_is_told(tmp_path):
    for content in (Net(), {"model": Net(), "epoch": 1}):
        with pytest.raises(pp.errors.FormatError, match=r"a whole foreign_files\.Net, .*state_dict\(\)"):
            kept(tmp_path, content)


def test_nothing_that_a_file_names_is_called(tmp_path):
    class Loud:
        def __init__(self, *_):
            raise AssertionError("it was called")

    operator.loud = Loud
    Loud.__module__, Loud.__qualname__ = "operator", "loud"
    torch.save({"x": Call(Loud, 1)}, tmp_path / "a.pth")
    del operator.loud
    loaded = pickles.load(tmp_path / "a.pth")
    assert isinstance(loaded["x"], Unbuilt)
    hostile("getattr", tmp_path / "b.pth", tmp_path / "PWNED")
    assert isinstance(pickles.load(tmp_path / "b.pth")["x"], Unbuilt)


@pytest.mark.parametrize("options", [{"_use_new_zipfile_serialization": False}, {}])
def test_tensors_of_every_kind_come_as_torch_reads_them(options, tmp_path):
    base = torch.arange(24.0)
    content = {
        "strided": base.reshape(4, 6).T[1:3],
        "view": base[3:7],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "conj": torch.complex(torch.ones(2), torch.ones(2)).conj(),
        **{
            str(kind): torch.ones(3, dtype=kind)
            for kind in (torch.bfloat16, torch.int8, torch.bool, *([] if options else [torch.float8_e4m3fn]))
        },
        "storage": torch.nn.Parameter(base[:2]),
    }
    torch.save(content, tmp_path / "a.pth", **options)
    for source in (tmp_path / "a.pth", (tmp_path / "a.pth").read_bytes()):
        loaded = pickles.load(source)
        wanted = torch.load(tmp_path / "a.pth")
        assert loaded.keys() == wanted.keys()
        for name, tensor in wanted.items():
            read = loaded[name]
            assert (type(read), read.dtype, read.stride()) == (type(tensor), tensor.dtype, tensor.stride())
            assert read.requires_grad == tensor.requires_grad
            assert torch.equal(
                read.float() if "float8" in name else read, tensor.float() if "float8" in name else tensor
            )
        assert loaded["view"].untyped_storage().data_ptr() == loaded["strided"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (dt.datetime, b"\x07\xe9\x01\x01\x00\x00\x00\xff\xff\xff"),
        (dt.datetime, b"\x07\xe9\x0c\xff\x00\x00\x00\x00\x00\x00"),
        (dt.date, b"\x07\xe9\x0c\xff"),
        (dt.time, b"\x07\xff\x00\x00\x00\x00"),
    ],
)
def test_a_time_that_is_none_is_refused(kind, content, tmp_path):
    """The classes believe the bytes of a pickle: what is stored could not be read back."""
    torch.save({"model": {"w": torch.ones(1)}, "when": Call(kind, content)}, tmp_path / "a.pth")
    with pytest.raises(pp.errors.CorruptError, match="cannot be built"):
        pickles.load(tmp_path / "a.pth")
