"""An optimizer's state goes to the optimizer that it belongs to, or is refused with nothing changed."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, same

optim = torch.optim


class Renamed(optim.Optimizer):
    """Sign descent with momentum, of no library."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["mean"] = state.get("mean", torch.zeros_like(parameter)) * 0.9 + parameter.grad
                parameter.sub_(group["lr"] * state["mean"].sign())


class Moved(Renamed):
    pass


class MyAdamW(optim.AdamW):
    pass


class Newer(Renamed):
    """A later version of the class, with a setting more."""

    def __init__(self, params, lr=0.1, rho=0.5):
        optim.Optimizer.__init__(self, params, {"lr": lr, "rho": rho})

    def step(self, closure=None):
        assert self.param_groups[0]["rho"] == 0.5
        super().step()


Newer.__name__ = Newer.__qualname__ = "Renamed"


def make(kind, seed=1, groups=None):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    return {"model": model, "optimizer": kind(model.parameters() if groups is None else groups(model))}


def step(state):
    state["optimizer"].zero_grad()
    x = torch.ones(2, 3)
    for number, name in enumerate("abc", 1):
        x = state["model"][name](x) * number
    x.square().mean().backward()
    state["optimizer"].step()


def save(state, steps=2, root=None, **options):
    root = MemoryStore() if root is None else root
    with checkpointer(root, state=state, **options) as ckpt:
        for _ in range(steps):
            step(state)
        ckpt.report(step=steps, loss=1.0)
    return root


def resume(root, state, **options):
    with checkpointer(root, state=state, resume="must", **options) as ckpt:
        return ckpt.resume()


def snapshot(state):
    return copy.deepcopy({name: part.state_dict() for name, part in state.items()})


def refused(root, live, *texts):
    before = snapshot(live)
    with pytest.raises(pp.errors.MismatchError) as caught:
        resume(root, live)
    for text in texts:
        assert text in str(caught.value)
    assert same(snapshot(live), before)
    step(live)


# --- another class --------------------------------------------------------------------------------------------------

KINDS = {
    "SGD": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": optim.AdamW,
    "Adam": optim.Adam,
    "Adamax": optim.Adamax,
    "Adadelta": optim.Adadelta,
    "Adagrad": optim.Adagrad,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": optim.RMSprop,
    "Rprop": optim.Rprop,
    "ASGD": optim.ASGD,
    "Adafactor": optim.Adafactor,
    "custom": Renamed,
}
PAIRS = [
    (first, second)
    for first in KINDS
    for second in KINDS
    if first != second and {first, second} not in ({"SGD", "momentum"}, {"Adam", "AdamW"})
]


@pytest.fixture(scope="module")
def by_kind():
    return {name: save(make(kind)) for name, kind in KINDS.items()}


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_the_state_of_another_class_is_refused(by_kind, first, second):
    live = make(KINDS[second])
    refused(
        by_kind[first], live, "optimizer: it was saved from another kind of optimizer", type(live["optimizer"]).__name__
    )


COMPATIBLE = {
    "derived": (optim.AdamW, MyAdamW),
    "base": (MyAdamW, optim.AdamW),
    "renamed": (Renamed, Moved),
    "newer": (Renamed, Newer),
    "decoupled decay": (optim.Adam, optim.AdamW),
    "momentum on": (KINDS["SGD"], KINDS["momentum"]),
    "momentum off": (KINDS["momentum"], KINDS["SGD"]),
    "Nesterov": (KINDS["momentum"], lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "amsgrad on": (optim.Adam, lambda p: optim.Adam(p, amsgrad=True)),
    "amsgrad off": (lambda p: optim.Adam(p, amsgrad=True), optim.Adam),
    "fused": (optim.Adam, lambda p: optim.Adam(p, fused=True)),
    "foreach": (lambda p: optim.Adam(p, foreach=True), lambda p: optim.Adam(p, foreach=False)),
}


@pytest.mark.parametrize(("first", "second"), COMPATIBLE.values(), ids=COMPATIBLE)
def test_a_class_that_can_go_on_does_so_as_the_saved_one_would(first, second):
    saved = make(first)
    root = save(saved)
    live = make(second, seed=2)
    resume(root, live)
    for state in (saved, live):
        step(state)
        step(state)
    assert same(dict(live["model"].state_dict()), dict(saved["model"].state_dict()))


@pytest.mark.usefixtures("processes_have_torch")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("AdamW", "momentum"),
        ("Adam", "RMSprop"),
        ("SGD", "AdamW"),
        ("AdamW", "Adagrad"),
        ("Adamax", "RAdam"),
        ("Adam", "Adamax"),
        ("RAdam", "Adamax"),
        ("momentum", "custom"),
        ("custom", "Adam"),
    ],
)
def test_without_a_note_of_the_class_settings_and_moments_tell(tmp_path, first, second):
    """What another tool has saved, and checkpoints of earlier releases, do not name the class."""
    saved = make(KINDS[first])
    step(saved)
    torch.save({name: part.state_dict() for name, part in saved.items()}, tmp_path / "c.pt")
    pp.import_checkpoints(tmp_path / "c.pt", tmp_path / "runs", run="r")
    live = make(KINDS[second])
    before = snapshot(live)
    with pytest.raises(pp.errors.MismatchError, match="it was saved from another kind of optimizer"):
        pp.load("r@latest", root=tmp_path / "runs", into=live)
    assert same(snapshot(live), before)
    live = make(KINDS[first], seed=2)
    pp.load("r@latest", root=tmp_path / "runs", into=live)
    assert same(snapshot(live), snapshot(saved))


SCHEDULERS = {
    "step": lambda o: sched.StepLR(o, 3),
    "exponential": lambda o: sched.ExponentialLR(o, 0.9),
    "cosine": lambda o: sched.CosineAnnealingLR(o, 9),
    "one cycle": lambda o: sched.OneCycleLR(o, 0.2, total_steps=12),
    "lambda": lambda o: sched.LambdaLR(o, lambda _: 0.5),
    "multiplicative": lambda o: sched.MultiplicativeLR(o, lambda _: 0.5),
    "plateau": sched.ReduceLROnPlateau,
    "sequence": lambda o: sched.SequentialLR(o, [sched.LinearLR(o), sched.StepLR(o, 3)], milestones=[2]),
    "another sequence": lambda o: sched.SequentialLR(o, [sched.LinearLR(o), sched.CosineAnnealingLR(o, 3)], [2]),
    "longer sequence": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o), sched.StepLR(o, 3), sched.StepLR(o, 3)], milestones=[2, 4]
    ),
}


@pytest.mark.parametrize("second", SCHEDULERS)
@pytest.mark.parametrize("first", SCHEDULERS)
def test_the_state_of_another_scheduler_is_refused(first, second):
    def with_scheduler(name):
        state = make(KINDS["momentum"])
        return {**state, "scheduler": SCHEDULERS[name](state["optimizer"])}

    root = save(with_scheduler(first))
    live = with_scheduler(second)
    if first == second:
        resume(root, live)
    else:
        refused(root, live, "scheduler")


# --- by name --------------------------------------------------------------------------------------------------------


def backwards(model):
    return reversed(list(model.parameters()))


def by_layer(*names):
    return lambda model: [{"params": list(model[name].parameters()), "lr": ord(name) / 1000} for name in names]


def named(*names):
    return lambda model: [
        (name, parameter)
        for layer in names
        for name, parameter in model.named_parameters(layer)
        if name.startswith(layer)
    ]


ORDERS = {
    "another order": (None, backwards),
    "another order of groups": (by_layer("a", "b", "c"), by_layer("c", "a", "b")),
    "named parameters": (lambda m: m.named_parameters(), lambda m: reversed(list(m.named_parameters()))),
    "named later": (None, lambda m: reversed(list(m.named_parameters()))),
}


@pytest.mark.parametrize(("first", "second"), ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("kind", [optim.AdamW, KINDS["momentum"]], ids=["AdamW", "momentum"])
def test_moments_go_to_their_parameters_when_the_order_is_another(kind, first, second):
    saved = make(kind, groups=first)
    root = save(saved)
    live = make(kind, seed=2, groups=second)
    report = resume(root, live)
    assert "by name" in str(report)
    for parameter, own in zip(saved["model"].parameters(), live["model"].parameters(), strict=True):
        assert same(saved["optimizer"].state[parameter], live["optimizer"].state[own])
    for state in (saved, live):
        step(state)
        step(state)
    assert same(dict(live["model"].state_dict()), dict(saved["model"].state_dict()))
    names = [group["param_names"] for group in live["optimizer"].param_groups if "param_names" in group]
    assert names in ([], [[name for name, _ in reversed(list(live["model"].named_parameters()))]])


def test_named_parameters_are_enough_without_the_model():
    saved = make(optim.Adam, groups=lambda m: m.named_parameters())
    root = save(saved)
    live = make(optim.Adam, groups=lambda m: reversed(list(m.named_parameters())))
    pp.load("r@latest", root=root, into=live["optimizer"], part="optimizer")
    for parameter, own in zip(saved["model"].parameters(), live["model"].parameters(), strict=True):
        assert same(saved["optimizer"].state[parameter], live["optimizer"].state[own])


def test_parameters_in_other_groups_are_refused():
    root = save(make(optim.Adam, groups=by_layer("a", "b")))
    live = make(
        optim.Adam,
        groups=lambda m: [{"params": [m["a"].weight, m["b"].bias]}, {"params": [m["b"].weight, m["a"].bias]}],
    )
    refused(
        root, live, "optimizer: the moments of 'model.a.bias' would go to 'model.b.bias', and 1 more would go astray"
    )


def test_lbfgs_keeps_all_in_one_vector():
    def closure(state):
        def evaluate():
            state["optimizer"].zero_grad()
            loss = state["model"]["b"](state["model"]["a"](torch.ones(2, 3))).square().mean()
            loss.backward()
            return loss

        return evaluate

    state = make(optim.LBFGS)
    state["optimizer"].step(closure(state))
    root = save(state, steps=0)
    live = make(optim.LBFGS, groups=backwards)
    with pytest.raises(pp.errors.MismatchError, match="would go to"):
        resume(root, live)


def test_renamed_layers_are_no_other_order():
    """The model says that they do not fit; for what is loaded of it, the optimizer goes by position as before."""
    saved = make(optim.Adam)
    root = save(saved)
    live = make(optim.Adam)
    live["model"] = nn.ModuleDict({"x": live["model"]["a"], "b": live["model"]["b"], "c": live["model"]["c"]})
    with pytest.warns(pp.PeakpointWarning):
        report = resume(root, live, strict=False)
    assert [part.part for part in report.restored] == ["model", "optimizer"]


class OwnMoments(optim.Adam):
    """Derived from Adam, with one moment of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("step", torch.tensor(0.0))  # which Adam looks for at a load
            moment = self.state[parameter].setdefault("only", torch.zeros_like(parameter))
            moment.add_(parameter.grad)
            parameter.sub_(moment, alpha=0.1)


def test_a_derived_class_may_have_moments_of_its_own():
    saved = make(OwnMoments)
    root = save(saved)
    live = make(OwnMoments, seed=2)
    resume(root, live)
    assert same(live["optimizer"].state_dict(), saved["optimizer"].state_dict())
    refused(root, make(optim.Adam), "optimizer: torch.optim.adam.Adam needs the moments exp_avg, exp_avg_sq")


def test_a_run_of_a_gpu_goes_on_without_one():
    """There ``capturable`` was set for CUDA graphs, with which no optimizer steps on a CPU."""
    saved = make(optim.AdamW)
    step(saved)
    saved["optimizer"].param_groups[0]["capturable"] = True
    root = save(saved, steps=0)
    live = make(optim.AdamW, seed=2)
    resume(root, live)
    saved["optimizer"].param_groups[0]["capturable"] = False
    for state in (saved, live):
        step(state)
    assert same(dict(live["model"].state_dict()), dict(saved["model"].state_dict()))
