"""Weights that are tied in the live model, and stored under one of their names: as writers of safetensors do."""

import pytest
import torch
from safetensors.torch import save_file

import peakpoint as pp
from peakpoint.state.modules import load_module, loading_differences
from training import QuietCheckpointer


class Tied(torch.nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, *, tied=True):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def without_head(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}


@pytest.mark.usefixtures("processes_have_torch")
def test_a_name_that_is_tied_to_one_that_is_there_is_not_missing(tmp_path):
    first, live = Tied(), Tied()
    save_file(without_head(first), tmp_path / "model.safetensors")
    pp.import_checkpoints(tmp_path / "model.safetensors", tmp_path / "root", run="r")
    report = pp.load("r@latest", root=tmp_path / "root", into=live)
    assert "1 of them tied to others" in report.restored[0].what
    assert torch.equal(live.embed.weight, first.embed.weight)
    assert live.head.weight is live.embed.weight
    options = {"run": "s", "state": {"model": live}, "keep": [pp.Last(1)], "resume": "r@latest"}
    with (
        QuietCheckpointer(tmp_path / "root", **options) as ckpt,
        pytest.warns(pp.PeakpointWarning, match="random generators"),
    ):
        ckpt.resume()
    assert torch.equal(live.head.weight, first.embed.weight)


def test_either_name_will_do():
    first, live = Tied(), Tied()
    state = {name: tensor for name, tensor in first.state_dict().items() if name != "embed.weight"}
    assert not loading_differences("model", live.state_dict(), state)
    assert load_module(live, state, []).startswith("7 of 7 tensors")
    assert torch.equal(live.embed.weight, first.head.weight)


def test_a_name_that_is_not_tied_is_missing():
    untied = Tied(tied=False)
    [line] = loading_differences("model", untied.state_dict(), without_head(Tied()))
    assert "the checkpoint has no 'head.weight'" in line
    state = {name: tensor for name, tensor in Tied().state_dict().items() if "weight" not in name or "norm" in name}
    assert len(loading_differences("model", Tied().state_dict(), state)) == 2, (
        "nothing that it could be tied to is there"
    )


@pytest.mark.parametrize("change", [lambda weight: weight[:4], lambda weight: weight.double()])
def test_what_is_there_must_fit(change):
    state = without_head(Tied())
    state["embed.weight"] = change(state["embed.weight"])
    [line] = loading_differences("model", Tied().state_dict(), state)
    assert "'embed.weight' is" in line


def test_a_part_of_the_same_memory_is_not_the_same():
    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = torch.nn.Parameter(torch.zeros(4))
            self.register_buffer("first", self.whole.detach()[:2])

    assert loading_differences("model", Halves().state_dict(), {"whole": torch.ones(4)})


def test_empty_tensors_and_those_without_memory_are_not_tied():
    for device, size in (("cpu", 0), ("meta", 3)):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(size, device=device)) for _ in range(2)])
        assert loading_differences("model", model.state_dict(), {"0": torch.empty(size)}), device
