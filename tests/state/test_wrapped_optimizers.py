"""Optimizers that wrap another and never ran ``Optimizer.__init__``: the inner one is counted, held and restored."""

from collections import defaultdict

import pytest
import torch
from torch import nn

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, same


class Wrapped(torch.optim.Optimizer):
    """As Accelerate's: everything is the inner optimizer's."""

    def __init__(self, inner):
        self.optimizer = inner

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lookahead(torch.optim.Optimizer):
    """As its early implementations: slow weights of its own, under the number of their parameter."""

    def __init__(self, inner):
        self.optimizer, self.param_groups, self.steps = inner, inner.param_groups, 0
        self.state = defaultdict(dict)

    def parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self):
        slow = {number: self.state[parameter] for number, parameter in enumerate(self.parameters())}
        return {"fast": self.optimizer.state_dict(), "slow": slow, "steps": self.steps}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["fast"])
        self.steps = state["steps"]
        for number, parameter in enumerate(self.parameters()):
            self.state[parameter] = dict(state["slow"][number])

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.steps += 1
        for parameter in self.parameters():
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            if self.steps % 3 == 0:
                slow += (parameter - slow) * 0.5
                parameter.copy_(slow)


class Hidden(Wrapped):
    """Its inner optimizer is where nobody finds it."""

    def __init__(self, inner):
        self.inner = [inner]

    optimizer = property(lambda self: self.inner[0])


class Delegating(torch.optim.Optimizer):
    """It has nothing of its own, and inherits how torch loads."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(vars(self)["inner"], name)

    def step(self, closure=None):
        return self.inner.step(closure)


class Both(torch.optim.Optimizer):
    """Two optimizers in one, with a state of its own form."""

    def __init__(self, inner):
        first, *rest = [parameter for group in inner.param_groups for parameter in group["params"]]
        self.first, self.second = torch.optim.SGD([first], 0.1, momentum=0.9), torch.optim.AdamW(rest)

    def state_dict(self):
        return {"first": self.first.state_dict(), "second": self.second.state_dict()}

    def load_state_dict(self, state):
        self.first.load_state_dict(state["first"])
        self.second.load_state_dict(state["second"])

    def zero_grad(self, set_to_none=True):
        self.first.zero_grad()
        self.second.zero_grad()

    def step(self, closure=None):
        self.first.step()
        self.second.step()


class NoOptimizer:
    """Not even derived from torch's."""

    def __init__(self, inner):
        self.inner = inner

    def step(self):
        self.inner.step()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def zero_grad(self):
        self.inner.zero_grad()


BY_REPORTS = {"hidden": Hidden, "both": Both, "no optimizer": NoOptimizer}
WRAPPERS = {
    "delegating": Delegating,
    "wrapped": Wrapped,
    "twice": lambda inner: Wrapped(Wrapped(inner)),
    "Lookahead": Lookahead,
}


def make(wrap, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1))
    return {"model": model, "optimizer": wrap(torch.optim.AdamW(model.parameters(), 0.01))}


def step(state):
    state["optimizer"].zero_grad()
    state["model"](torch.randn(8, 3)).square().mean().backward()
    state["optimizer"].step()


def weights(state):
    return dict(state["model"].state_dict())


@pytest.mark.parametrize("wrap", [*WRAPPERS.values(), *BY_REPORTS.values()], ids=[*WRAPPERS, *BY_REPORTS])
def test_a_resumed_run_goes_on_exactly(wrap):
    whole = make(wrap, 1)
    for _ in range(8):
        step(whole)
    root, state, outcomes = MemoryStore(), make(wrap, 1), []
    for total in (1, 2):
        with checkpointer(root, state=state) as ckpt:
            for _ in ckpt.epochs(total):
                for _ in range(4):
                    step(state)
                outcomes.append(ckpt.report(loss=1.0).step)
        expected, state = state, make(wrap, 2)
    assert same(weights(expected), weights(whole))
    assert outcomes == (
        [1, 2] if wrap in BY_REPORTS.values() else [4, 8]
    )  # by reports, where no optimizer can be counted


def test_with_and_without_the_wrapper():
    for first, second in ((Wrapped, lambda inner: inner), (lambda inner: inner, Wrapped)):
        root, state = MemoryStore(), make(first, 1)
        with checkpointer(root, state=state) as ckpt:
            step(state)
            ckpt.report(loss=1.0)
        live = make(second, 2)
        with checkpointer(root, state=live) as ckpt:
            ckpt.resume()
        assert same(live["optimizer"].state_dict(), state["optimizer"].state_dict())


@pytest.mark.parametrize("wrap", [Wrapped, Delegating, NoOptimizer])
def test_another_class_inside_is_refused(wrap):
    root, state = MemoryStore(), make(wrap, 1)
    with checkpointer(root, state=state) as ckpt:
        step(state)
        ckpt.report(loss=1.0)
    live = make(lambda inner: wrap(torch.optim.SGD([p for g in inner.param_groups for p in g["params"]], 0.1)), 2)
    with (
        checkpointer(root, state=live) as ckpt,
        pytest.raises(pp.errors.MismatchError, match="another kind of optimizer"),
    ):
        ckpt.resume()


def test_a_step_after_the_report_is_noticed():
    state = make(Wrapped, 1)
    with checkpointer(MemoryStore(), state=state) as ckpt:
        epochs = ckpt.epochs(2)
        next(epochs)
        step(state)
        ckpt.report(loss=1.0)
        step(state)
        with pytest.raises(pp.errors.ConfigError, match=r"state\['optimizer'\] was stepped after ckpt\.report"):
            next(epochs)


def test_a_step_waits_for_the_copy():
    """Every save is what it was at the report, although the next steps follow at once."""
    state, reported = make(Wrapped, 1), []
    root = MemoryStore()
    with checkpointer(root, state=state) as ckpt:
        for _ in range(5):
            step(state)
            ckpt.report(loss=1.0)
            reported.append({name: value.clone() for name, value in weights(state).items()})
    saved = [pp.load(f"r/{checkpoint.name}", root=root)["model"] for checkpoint in pp.open(root).run("r").checkpoints()]
    assert all(same(dict(one), dict(other)) for one, other in zip(saved, reported, strict=True))


@pytest.mark.slow
def test_accelerate():
    accelerate = pytest.importorskip("accelerate")

    def prepared(seed):
        torch.manual_seed(seed)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        return accelerator, {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def run(root, total, seed):
        accelerator, state = prepared(seed)
        with checkpointer(root, state=state) as ckpt:
            for _ in ckpt.epochs(total):
                for _ in range(4):
                    with accelerator.accumulate(state["model"]):
                        accelerator.backward(state["model"](torch.randn(4, 3)).square().mean())
                        state["optimizer"].step()
                        state["scheduler"].step()
                        state["optimizer"].zero_grad()
                outcome = ckpt.report(loss=1.0)
        return state, outcome.step

    assert "accelerate" in type(prepared(1)[1]["optimizer"]).__module__
    whole, _ = run(MemoryStore(), 3, 1)
    root = MemoryStore()
    run(root, 1, 1)
    state, steps = run(root, 3, 2)
    assert steps == 6  # of the optimizer; batches are twice as many
    assert same(weights(state), weights(whole))
    assert same(state["optimizer"].state_dict(), whole["optimizer"].state_dict())
    assert state["scheduler"].state_dict() == whole["scheduler"].state_dict()
