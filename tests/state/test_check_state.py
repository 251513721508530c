"""What cannot be saved is refused by the constructor, before an epoch is lost; what is only not ready yet is not."""

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, same


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Holder:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"inner": [self.value]}

    def load_state_dict(self, state):
        self.value = state["inner"][0]


def quantized():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


class WithExtra(nn.Linear):
    def get_extra_state(self):
        return {"who": object()}

    def set_extra_state(self, state):
        raise NotImplementedError


def with_odd_setting():
    return torch.optim.SGD([{"params": [torch.ones(1, requires_grad=True)], "note": object()}], 0.1)


UNSAVABLE = {
    "object": object,
    "function": lambda: len,
    "lambda": lambda: lambda: None,
    "dataclass": Settings,
    "generator": lambda: (number for number in range(3)),
    "class": lambda: Settings,
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.empty(2, device="meta"),
    "objects": lambda: np.array([object()]),
    "nested": lambda: {"a": [(1, {2: object()})]},
    "state dict": lambda: Holder(object()),
    "extra state": lambda: WithExtra(2, 2),
    "meta module": lambda: nn.Linear(2, 2, device="meta"),
    "odd setting": with_odd_setting,
}


@pytest.mark.parametrize("make", UNSAVABLE.values(), ids=UNSAVABLE)
def test_it_is_refused_by_the_constructor_and_nothing_is_written(make):
    root = MemoryStore()
    with pytest.raises(pp.errors.ConfigError, match=r'^state\["thing"\]'):
        checkpointer(root, state={"model": nn.Linear(1, 1), "thing": make()})
    with pytest.raises(pp.errors.NotFoundError):
        pp.open(root)


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantiz:UserWarning")
def test_quantized_tensors_are_refused_by_the_constructor():
    with pytest.raises(pp.errors.ConfigError, match=r'^state\["thing"\] .* save their components'):
        checkpointer(MemoryStore(), state={"thing": quantized()})


class NotReady:
    """Has a state from the first epoch on."""

    def state_dict(self):
        return {"order": self.order}

    def load_state_dict(self, state):
        self.order = state["order"]


def test_an_object_that_has_no_state_yet_is_asked_again():
    live = NotReady()
    root = MemoryStore()
    with checkpointer(root, state={"sampler": live}) as ckpt:
        for _ in ckpt.epochs(1):
            live.order = [2, 1]
            ckpt.report(loss=1.0)
    assert pp.load("r@latest", root=root)["sampler"] == {"order": [2, 1]}


def test_what_becomes_unsavable_later_is_refused_by_the_report():
    table = {}
    with checkpointer(MemoryStore(), state={"table": table}) as ckpt:
        table["bad"] = object()
        with pytest.raises(pp.errors.ConfigError, match=r'state\["table"\]\["bad"\]'):
            ckpt.report(loss=1.0)


@pytest.mark.filterwarnings("ignore:.*set_vital:UserWarning")
def test_a_loader_is_not_asked_for_its_place_before_it_has_one():
    loader = StatefulDataLoader(list(range(8)), batch_size=2, shuffle=True)
    torch.manual_seed(3)
    numbers = torch.get_rng_state()
    with checkpointer(MemoryStore(), state={"loader": loader}):
        assert torch.equal(torch.get_rng_state(), numbers)


# --- lazy modules ---------------------------------------------------------------------------------------------------


def lazy(*, initialized=False, order=("model", "optimizer")):
    torch.manual_seed(1)
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    if initialized:
        model(torch.ones(2, 3))
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    return {name: state[name] for name in order}


def step(state):
    state["optimizer"].zero_grad()
    state["model"](torch.ones(2, 3)).sum().backward()
    state["optimizer"].step()


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")], ids=" ".join)
def test_lazy_modules_and_their_moments_come_back_before_the_first_batch(order):
    saved, root = lazy(order=order), MemoryStore()
    with checkpointer(root, state=saved) as ckpt:
        step(saved)
        ckpt.report(loss=1.0)
    live = lazy(order=order)
    with checkpointer(root, state=live) as ckpt:
        report = ckpt.resume()
    assert report.missing == ()
    for state in (saved, live):
        step(state)
    for name in order:
        assert same(dict(live[name].state_dict()), dict(saved[name].state_dict()))


def test_moments_without_their_lazy_module_are_refused_with_the_way():
    saved, root = lazy(), MemoryStore()
    with checkpointer(root, state=saved) as ckpt:
        step(saved)
        ckpt.report(loss=1.0)
    with pytest.raises(pp.errors.MismatchError, match="not initialized yet: run one batch through the model before"):
        pp.load("r@latest", root=root, into=lazy()["optimizer"], part="optimizer")
    live = lazy(initialized=True)
    pp.load("r@latest", root=root, into=live["optimizer"], part="optimizer")
    assert same(live["optimizer"].state_dict(), saved["optimizer"].state_dict())


def test_a_save_before_the_first_batch_says_so():
    ckpt = checkpointer(MemoryStore(), state={"model": lazy()["model"]})
    with pytest.raises(pp.errors.ConfigError, match="run one batch through the model before it is saved"):
        ckpt.report(loss=1.0)
    ckpt.close()


# --- sharded parameters ---------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo needs a file system with locks")
@pytest.mark.parametrize("parts", [("model",), ("model", "optimizer"), ("optimizer",)], ids=" ".join)
def test_sharded_parameters_are_saved_whole(process_group, tmp_path, parts):
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    weight = model.weight.detach().clone()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    moment = model.weight.grad.full_tensor() * 0.1
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(tmp_path, state={name: state[name] for name in parts}) as ckpt:
        ckpt.report(step=1)
    loaded = pp.load("r@latest", root=tmp_path)
    assert list(loaded) == list(parts)
    if "model" in parts:
        assert loaded["model"]["weight"].shape == (4, 4)
        assert not torch.equal(loaded["model"]["weight"], weight)
        assert torch.equal(loaded["model"]["weight"], model.weight.full_tensor())
    if "optimizer" in parts:
        assert torch.allclose(loaded["optimizer"]["state"][0]["exp_avg"], moment)


@pytest.mark.skipif(os.name == "nt", reason="gloo needs a file system with locks")
def test_an_addend_of_a_tensor_is_refused_with_its_place(process_group):
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    addend = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,)), [Partial()])
    with pytest.raises(pp.errors.ConfigError, match=r'^state\["sums"\]\["a"\].*each rank has an addend of it'):
        checkpointer(MemoryStore(), state={"sums": {"a": addend}})
