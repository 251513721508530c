# ruff: noqa: NPY002 - the global generator is one of those that are restored
"""Restoring through the public API: training goes on bit for bit, and what does not fit changes nothing."""

import argparse
import copy
import enum
import random
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import peakpoint as pp
from peakpoint.state.restore import LoadReport
from peakpoint.store import MemoryStore
from training import QuietCheckpointer


def quiet(_):
    pass


@pytest.fixture
def root():
    """A repository in memory; what is in files is tested in faults/test_hostile_files.py."""
    return MemoryStore()


def checkpointer(root, state, **options):
    return QuietCheckpointer(root, run="r", state=state, keep=[pp.Last(1)], **{"resume": "must", **options})


def save(root, state, step=1):
    with checkpointer(root, state, resume="never") as ckpt:
        assert ckpt.report(step=step, loss=0.5).saved


def resume(root, state, **options):
    """Restore ``state``; returns the values that are now the parts, and the report."""
    with checkpointer(root, state, **options) as ckpt:
        report = ckpt.resume()
        return ckpt.state, report


def identical(a, b):
    """Equal in types, bits and order, through containers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return repr(a) == repr(b)


def raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def frozen(value):
    """A copy of a state that later training does not change."""
    return copy.deepcopy(value)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.outer = nn.Linear(6, 2)

    def forward(self, x):
        return self.outer(self.drop(torch.relu(self.norm(self.inner(x)))))


# --- training goes on bit for bit ---------------------------------------------------------------------------------


def train(model, optimizer, scheduler, steps, after=quiet):
    """Data and dropout come from the global generator, which a checkpoint restores too."""
    for step in steps:
        x, y = torch.randn(8, 4), torch.randn(8, 2)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if isinstance(scheduler, sched.ReduceLROnPlateau):
            scheduler.step(round(float(loss.detach()), 1))
        elif scheduler is not None:
            scheduler.step()
        after(step)


def make(make_optimizer, make_scheduler, seed):
    torch.manual_seed(seed)
    model = Net()
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    state = {"model": model, "optimizer": optimizer}
    if scheduler is not None:
        state["scheduler"] = scheduler
    return model, optimizer, scheduler, state


def assert_continues_exactly(root, make_optimizer, make_scheduler=None, *, first=5, total=11):
    model, optimizer, scheduler, state = make(make_optimizer, make_scheduler, 1)
    train(model, optimizer, scheduler, range(first))
    save(root, state, step=first)
    at_save = frozen({name: part.state_dict() for name, part in state.items()})
    train(model, optimizer, scheduler, range(first, total))
    expected = frozen({name: part.state_dict() for name, part in state.items()})
    after = torch.randn(3)
    assert not identical(at_save["model"], expected["model"])

    model, optimizer, scheduler, state = make(make_optimizer, make_scheduler, 999)
    _, report = resume(root, state)
    assert report.step == first
    assert report.missing == ()
    assert [restored.part for restored in report.restored] == list(state)
    restored = {name: part.state_dict() for name, part in state.items()}
    for name, value in at_save.items():
        assert identical(restored[name], value), name
    train(model, optimizer, scheduler, range(first, total))
    continued = {name: part.state_dict() for name, part in state.items()}
    for name, value in expected.items():
        assert identical(continued[name], value), name
    assert torch.equal(torch.randn(3), after)


def two_groups(model):
    return torch.optim.AdamW(
        [
            {"params": model.inner.parameters(), "lr": 1e-2},
            {"params": [*model.norm.parameters(), *model.outer.parameters()], "weight_decay": 0.1, "note": "mine"},
        ],
        lr=1e-3,
    )


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "SGD Nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "Adam, one by one": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, foreach=False),
    "Adam, fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
    "Adam, rate in a tensor": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "AdamW amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "two groups": two_groups,
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), centered=True, momentum=0.5),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=4),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_continues_exactly(root, make_optimizer):
    assert_continues_exactly(root, make_optimizer)


@pytest.mark.parametrize("make_optimizer", [OPTIMIZERS["Adam"], OPTIMIZERS["LBFGS"]], ids=["Adam", "LBFGS"])
def test_an_optimizer_that_has_not_stepped(root, make_optimizer):
    assert_continues_exactly(root, make_optimizer, first=0, total=4)


SCHEDULERS = {
    "StepLR": lambda o: sched.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 7, 7], gamma=0.5),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: sched.LinearLR(o, total_iters=8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, total_iters=8, power=2),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, T_max=9),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, patience=1, cooldown=1, factor=0.5),
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda _: 0.95),
    "SequentialLR": lambda o: sched.SequentialLR(
        o, [sched.ConstantLR(o, 0.1, total_iters=3), sched.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "SequentialLR, before its milestone": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1, total_iters=8), sched.CosineAnnealingLR(o, 5)], milestones=[8]
    ),
    "ChainedScheduler": lambda o: sched.ChainedScheduler([sched.ConstantLR(o, 0.5, 4), sched.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_continues_exactly(root, make_scheduler):
    assert_continues_exactly(root, OPTIMIZERS["SGD with momentum"], make_scheduler)


class Warmup:
    """A callable object: LambdaLR keeps its attributes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return min(1.0, self.calls / 7)


def test_a_scheduler_of_a_callable_object(root):
    assert_continues_exactly(root, OPTIMIZERS["SGD"], lambda o: sched.LambdaLR(o, Warmup()))


def test_the_optimizer_uses_the_parameters_of_the_live_model(root):
    model, optimizer, _, state = make(OPTIMIZERS["Adam"], None, 1)
    train(model, optimizer, None, range(2))
    save(root, state)
    model, optimizer, _, state = make(OPTIMIZERS["Adam"], None, 2)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    resume(root, state)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert set(map(id, optimizer.state)) == {id(p) for p in model.parameters()}


class MasterAdam(torch.optim.Optimizer):
    """Moments and master weights in float32 for parameters in bfloat16, as in mixed precision training."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["master"] = parameter.float().clone()
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["count"] = torch.zeros(parameter.shape, dtype=torch.int64)
                state["step"] += 1
                state["count"] += 1
                state["exp_avg"].mul_(0.9).add_(parameter.grad.float(), alpha=0.1)
                state["master"].add_(state["exp_avg"], alpha=-group["lr"])
                parameter.copy_(state["master"])
        return loss


def test_float32_moments_of_bfloat16_parameters_stay_float32(root):
    """torch's own load_state_dict rounds them to the parameter's type; then training would continue differently."""

    def run(model, optimizer, steps):
        for _ in steps:
            loss = model(torch.randn(3, 4).bfloat16()).float().square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def build(seed):
        torch.manual_seed(seed)
        model = nn.Linear(4, 2).bfloat16()
        return model, MasterAdam(model.parameters())

    model, optimizer = build(1)
    run(model, optimizer, range(3))
    save(root, {"model": model, "optimizer": optimizer})
    run(model, optimizer, range(3))
    expected = frozen((model.state_dict(), optimizer.state_dict()))
    model, optimizer = build(2)
    resume(root, {"model": model, "optimizer": optimizer})
    for moments in optimizer.state.values():
        assert moments["exp_avg"].dtype == moments["master"].dtype == torch.float32
        assert moments["count"].dtype == torch.int64
    run(model, optimizer, range(3))
    assert identical((model.state_dict(), optimizer.state_dict()), expected)


def test_a_gradient_scaler_continues_exactly(root):
    def run(model, optimizer, scaler, steps):
        for step in steps:
            x = torch.randn(8, 4) * (float("inf") if step == 3 else 1)
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

    def build(seed):
        model, optimizer, _, state = make(OPTIMIZERS["Adam"], None, seed)
        model.norm = nn.Identity()  # statistics of infinite values would be nan for ever
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return model, optimizer, scaler, state | {"scaler": scaler}

    model, optimizer, scaler, state = build(1)
    run(model, optimizer, scaler, range(3))
    save(root, state)
    assert (scaler.get_scale(), scaler._get_growth_tracker()) == (2048.0, 1)
    run(model, optimizer, scaler, range(3, 9))
    expected = frozen([part.state_dict() for part in state.values()])
    model, optimizer, scaler, state = build(2)
    resume(root, state)
    run(model, optimizer, scaler, range(3, 9))
    assert identical([part.state_dict() for part in state.values()], expected)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averaged_models_continue_exactly(root, average):
    def build(seed):
        model, optimizer, _, state = make(OPTIMIZERS["SGD"], None, seed)
        return model, optimizer, state | {"ema": AveragedModel(model, multi_avg_fn=average, use_buffers=True)}

    model, optimizer, state = build(1)
    train(model, optimizer, None, range(4), lambda _: state["ema"].update_parameters(model))
    save(root, state)
    train(model, optimizer, None, range(4), lambda _: state["ema"].update_parameters(model))
    expected = frozen([part.state_dict() for part in state.values()])
    model, optimizer, state = build(2)
    resume(root, state)
    assert int(state["ema"].n_averaged) == 4
    assert not identical(state["ema"].module.state_dict(), model.state_dict())
    train(model, optimizer, None, range(4), lambda _: state["ema"].update_parameters(model))
    assert identical([part.state_dict() for part in state.values()], expected)


# --- modules of all kinds -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_of_live_modules_stay_tied(root):
    torch.manual_seed(1)
    saved = Tied()
    save(root, {"model": saved})
    live = Tied()
    assert not torch.equal(live.head.weight, saved.head.weight)
    resume(root, {"model": live})
    assert live.head.weight is live.embedding.weight
    assert torch.equal(live.head.weight, saved.head.weight)
    loaded = pp.load("r@latest", root=root)["model"]
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()


class WithExtra(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        ({"seen": 5, "names": ("a", {1: 2})}, {}),
        (torch.arange(7), torch.zeros(2)),
        (torch.arange(7), None),
        (None, torch.arange(7)),
        (3, {"seen": 1}),
    ],
    ids=["dict", "tensor of another shape", "tensor for nothing", "nothing for a tensor", "number for a dict"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_extra_state_of_modules(root, saved, live, nested):
    """What get_extra_state gives may change its shape from one save to the next; only the module can judge it."""
    first, second = WithExtra(saved), WithExtra(live)
    save(root, {"model": nn.Sequential(first) if nested else first})
    _, report = resume(root, {"model": nn.Sequential(second) if nested else second})
    assert identical(second.extra, saved)
    assert torch.equal(second.linear.weight, first.linear.weight)
    assert report.missing == ()


def test_lazy_modules_take_the_saved_shapes(root):
    saved = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    saved(torch.randn(4, 5))
    save(root, {"model": saved})
    live = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    resume(root, {"model": live})
    assert identical(live.state_dict(), saved.state_dict())


def test_unusual_tensors_in_modules(root):
    class Odd(nn.Module):
        def __init__(self, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.register_buffer("mask", torch.randint(0, 2, (5,), generator=generator).bool())
            self.register_buffer("f8", torch.rand(6, generator=generator).to(torch.float8_e4m3fn))
            self.register_buffer("scalar", torch.rand((), generator=generator, dtype=torch.float64))
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("transient", torch.rand(3, generator=generator), persistent=False)
            self.frozen = nn.Parameter(torch.rand(2, generator=generator).half(), requires_grad=False)

    saved, live = Odd(1), Odd(2)
    save(root, {"model": saved})
    transient = live.transient.clone()
    resume(root, {"model": live})
    assert identical(live.state_dict(), saved.state_dict())
    assert torch.equal(live.transient, transient)
    assert live.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not live.frozen.requires_grad


# --- generators and plain values ----------------------------------------------------------------------------------


def generators(seed):
    return {
        "torch": torch.Generator().manual_seed(seed),
        "pcg": np.random.Generator(np.random.PCG64(seed)),
        "mt": np.random.Generator(np.random.MT19937(seed)),
        "philox": np.random.Generator(np.random.Philox(seed)),
        "sfc": np.random.Generator(np.random.SFC64(seed)),
        "legacy": np.random.RandomState(seed),
        "python": random.Random(seed),
    }


def draw(made):
    return [
        torch.rand(5, generator=made["torch"]).tolist(),
        *[made[name].normal(size=3).tolist() for name in ("pcg", "mt", "philox", "sfc")],
        *[int(made[name].integers(100, dtype=np.uint32)) for name in ("pcg", "mt", "philox", "sfc")],
        made["legacy"].randn(3).tolist(),
        [made["python"].gauss(0, 1) for _ in range(3)],
    ]


def test_generators_continue(root):
    made = generators(1)
    draw(made)
    save(root, made)
    expected = draw(made)
    live = generators(2)
    identities = list(map(id, live.values()))
    _, report = resume(root, live)
    assert draw(live) == expected
    assert list(map(id, live.values())) == identities
    assert {restored.what for restored in report.restored} == {"generator, in place"}


def test_the_global_generators_continue(root):
    def now():
        return random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn(), random.gauss(0, 1)

    now()
    save(root, {"x": 1})
    expected = now()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    resume(root, {"x": 2})
    assert now() == expected


class Phase(enum.Enum):
    WARM = "warm"
    HOT = ("hot", 2)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def test_plain_values(root):
    saved = {
        "count": 7,
        "best": float("-inf"),
        "name": "\ud800 odd",
        "pair": (1, [2.5, None]),
        "seen": {1, "a"},
        "losses": [0.5, 0.25],
        "table": {1: "one", "two": [2], (3,): torch.ones(2)},
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter("hello"),
        "recent": deque([1, 2], maxlen=2),
        "tensor": torch.arange(6.0).reshape(2, 3),
        "leaf": torch.ones(2, requires_grad=True),
        "array": np.arange(6.0).reshape(2, 3),
        "phase": Phase.HOT,
        "level": Level.HIGH,
        "options": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "nothing": None,
    }
    save(root, saved)
    live = {
        "count": 0,
        "best": 0.0,
        "name": "",
        "pair": (),
        "seen": set(),
        "losses": [9, 9, 9],
        "table": {"old": 1},
        "ordered": OrderedDict(z=1),
        "counter": Counter("xyz"),
        "recent": deque([9]),
        "tensor": torch.zeros(2, 3),
        "leaf": torch.zeros(2, requires_grad=True),
        "array": np.zeros((2, 3)),
        "phase": Phase.WARM,
        "level": Level.LOW,
        "options": argparse.Namespace(old=1),
        "nothing": 5,
    }
    before = dict(live)
    now, report = resume(root, live)
    table = saved["table"]
    for name in saved.keys() - {"tensor", "leaf", "array", "table"}:
        assert now[name] == saved[name], name
        assert type(now[name]) is type(saved[name]), name
    assert list(now["ordered"]) == ["b", "a"]
    assert now["recent"].maxlen == 2
    assert identical(now["table"], table)
    assert torch.equal(now["tensor"], saved["tensor"])
    assert torch.equal(now["leaf"], saved["leaf"])
    assert now["leaf"].requires_grad
    assert np.array_equal(now["array"], saved["array"])
    in_place = {"losses", "table", "ordered", "counter", "tensor", "leaf", "array", "options"}
    for name in live:
        assert (now[name] is before[name]) == (name in in_place), name
    said = {restored.part: restored.what for restored in report.restored}
    assert {name for name, what in said.items() if what.endswith("in place")} == in_place
    assert all("read it from the checkpointer's state" in said[name] for name in said.keys() - in_place)


def test_a_restored_value_shares_nothing_with_the_checkpoint(root):
    save(root, {"values": [torch.zeros(3)], "array": np.zeros(3)})
    first, _ = resume(root, {"values": [], "array": np.ones(3)})
    first["values"][0].fill_(9)
    first["array"][:] = 9
    second, _ = resume(root, {"values": [], "array": np.ones(3)})
    assert second["values"][0].tolist() == second["array"].tolist() == [0, 0, 0]


class Sampler:
    def __init__(self):
        self.place = 0
        self.order = torch.empty(0)

    def state_dict(self):
        return {"place": self.place, "order": self.order}

    def load_state_dict(self, state):
        self.place, self.order = state["place"], state["order"]


def test_objects_with_a_state_dict_of_their_own(root):
    sampler = Sampler()
    sampler.place, sampler.order = 5, torch.arange(9)
    save(root, {"sampler": sampler})
    live = Sampler()
    _, report = resume(root, {"sampler": live})
    assert live.place == 5
    assert torch.equal(live.order, torch.arange(9))
    assert report.restored[0].what == "Sampler, by its load_state_dict"


def test_a_loader_that_lost_its_generator_is_a_mismatch(root):
    """The order of the batches came from the loader's generator; without it, other batches would be dropped."""
    data = torch.arange(6)

    def loader(generator):
        return torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, generator=generator)

    with checkpointer(root, {"x": [1]}, resume="never") as ckpt:
        for _ in ckpt.epochs(1):
            for _ in ckpt.batches(loader(torch.Generator().manual_seed(1))):
                ckpt.report(loss=1.0)
                break
            break
    with checkpointer(root, {"x": [1]}) as ckpt:
        for _ in ckpt.epochs(1):
            with pytest.raises(pp.errors.MismatchError, match="generator"):
                next(iter(ckpt.batches(loader(None))))
            break


# --- what does not fit --------------------------------------------------------------------------------------------


def small(seed=1, **layers):
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1), **layers})


def with_optimizer(model, kind=torch.optim.Adam, groups=None):
    optimizer = kind(groups or model.parameters())
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def snapshot(state):
    parts = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    return frozen(parts), torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def assert_refused(root, state, *lines):
    """Resuming lists exactly these differences and changes nothing; so does loading by ref."""
    before = snapshot(state)
    with pytest.raises(pp.errors.MismatchError) as caught:
        resume(root, state)
    assert caught.value.differences == lines
    for line in lines:
        assert line in str(caught.value)
    assert "r/" in str(caught.value).splitlines()[0]
    assert "strict=False" in str(caught.value)
    assert identical(snapshot(state), before)


def test_a_key_that_the_checkpoint_has_not(root):
    save(root, {"model": small()})
    assert_refused(
        root,
        {"model": small(2, extra=nn.Linear(4, 5))},
        "model: the checkpoint has no 'extra.weight' (float32[5, 4])",
        "model: the checkpoint has no 'extra.bias' (float32[5])",
    )


def test_a_key_that_the_model_has_not(root):
    save(root, {"model": small(extra=nn.Embedding(4, 5, dtype=torch.float16))})
    assert_refused(
        root, {"model": small(2)}, "model: the checkpoint has 'extra.weight' (float16[4, 5]), the model does not"
    )


def test_other_shapes_and_types(root):
    save(root, {"model": small()})
    live = small(2)
    live["a"] = nn.Linear(2, 4)
    live["b"] = nn.Linear(3, 1, dtype=torch.bfloat16)
    assert_refused(
        root,
        {"model": live},
        "model: 'a.weight' is float32[3, 2] in the checkpoint, float32[4, 2] in the model",
        "model: 'a.bias' is float32[3] in the checkpoint, float32[4] in the model",
        "model: 'b.weight' is float32[1, 3] in the checkpoint, bfloat16[1, 3] in the model",
        "model: 'b.bias' is float32[1] in the checkpoint, bfloat16[1] in the model",
    )


def test_everything_that_differs_is_listed_at_once(root):
    save(root, {"model": small(gone=nn.Linear(1, 1, bias=False)), "count": 1, "tensor": torch.zeros(2)})
    live = small(2, new=nn.Linear(1, 1, bias=False))
    live["a"] = nn.Linear(5, 3)
    assert_refused(
        root,
        {"first": [1], "model": live, "tensor": torch.zeros(3)},
        "first: the checkpoint has no part of this name; it has model, count, tensor",
        "model: the checkpoint has no 'new.weight' (float32[1, 1])",
        "model: the checkpoint has 'gone.weight' (float32[1, 1]), the model does not",
        "model: 'a.weight' is float32[3, 2] in the checkpoint, float32[3, 5] in the model",
        "tensor: float32[2] in the checkpoint and float32[3] in the state",
        "count: it is in the checkpoint, but state= names no part 'count' to restore it into",
    )


def test_long_lists_are_cut_in_the_message_only(root):
    save(root, {"model": small()})
    live = small(2, many=nn.ModuleList(nn.Linear(1, 1) for _ in range(40)))
    with pytest.raises(pp.errors.MismatchError) as caught:
        resume(root, {"model": live})
    assert len(caught.value.differences) == 80
    assert "... and 50 more" in str(caught.value)


def test_parts_that_only_one_side_has(root):
    save(root, {"model": small()})
    assert_refused(root, with_optimizer(small(2)), "optimizer: the checkpoint has no part of this name; it has model")
    save(root, with_optimizer(small()))
    line = "it is in the checkpoint, but state= names no part 'optimizer' to restore it into"
    assert_refused(root, {"model": small(2)}, f"optimizer: {line}")


def test_another_number_of_groups(root):
    save(root, with_optimizer(small()))
    model = small(2)
    groups = [{"params": model["a"].parameters()}, {"params": model["b"].parameters()}]
    assert_refused(
        root,
        with_optimizer(model, groups=groups),
        "optimizer: 1 parameter groups in the checkpoint and 2 in the optimizer",
    )


def test_another_number_of_parameters(root):
    save(root, with_optimizer(small()))
    model = small(2)
    assert_refused(
        root,
        with_optimizer(model, groups=model["a"].parameters()),
        "optimizer: group 0 has 4 parameters in the checkpoint and 2 in the optimizer",
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (torch.optim.Adam, ["exp_avg", "exp_avg_sq"]),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), ["momentum_buffer"]),
        (torch.optim.Adagrad, ["sum"]),
        (lambda p: torch.optim.RMSprop(p, centered=True), ["square_avg", "grad_avg"]),
        (torch.optim.Adadelta, ["square_avg", "acc_delta"]),
        (torch.optim.Adamax, ["exp_avg", "exp_inf"]),
    ],
    ids=["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "Adadelta", "Adamax"],
)
def test_moments_of_other_shapes(root, kind, names):
    """Such moments load without complaint in torch, and fail at the next step, or broadcast."""
    save(root, {"optimizer": with_optimizer(small(), kind)["optimizer"]})
    live = small(2)
    live["b"] = nn.Linear(4, 1)
    assert_refused(
        root,
        {"optimizer": with_optimizer(live, kind)["optimizer"]},
        *(
            f"optimizer: {name} of parameter 2 is float32[1, 3] in the checkpoint for a parameter of [1, 4]"
            for name in names
        ),
    )


def test_a_part_of_another_kind(root):
    save(root, {"model": [1, 2], "optimizer": {"a": 1}, "tensor": 3, "array": np.zeros(3), "options": 5})
    model = small()
    assert_refused(
        root,
        {
            "model": model,
            "optimizer": torch.optim.Adam(model.parameters()),
            "tensor": torch.zeros(1),
            "array": np.zeros(3, dtype=np.float32),
            "options": argparse.Namespace(a=1),
        },
        "model: the checkpoint has a list under this name, not the state of a module",
        "optimizer: the checkpoint has no optimizer state under this name",
        "tensor: int in the checkpoint and float32[1] in the state",
        "array: the saved array differs in shape or dtype from the one in the state",
        "options: the checkpoint has a int under this name, not a namespace",
    )


def test_nothing_changes_when_the_last_part_does_not_fit(root):
    save(root, {"count": [1], **with_optimizer(small()), "generator": generators(1)["torch"], "last": torch.zeros(3)})
    generator = torch.Generator().manual_seed(2)
    state = generator.get_state()
    live = {"count": [5], **with_optimizer(small(2)), "last": torch.zeros(4)}
    before = snapshot(live)
    with pytest.raises(pp.errors.MismatchError, match="float32"):
        resume(root, {"generator": generator, **live})
    assert identical(snapshot(live), before)
    assert torch.equal(generator.get_state(), state)


def test_an_object_that_refuses_its_state(root):
    class Picky(Sampler):
        def load_state_dict(self, state):
            raise IndexError("not mine")

    save(root, {"sampler": Sampler()})
    with pytest.raises(pp.errors.MismatchError, match="sampler: Picky refused its state: not mine") as caught:
        resume(root, {"sampler": Picky()})
    assert isinstance(caught.value.__cause__, IndexError)


def test_the_run_can_be_continued_after_a_mismatch(root):
    saved = small()
    save(root, {"model": saved})
    with pytest.raises(pp.errors.MismatchError):
        resume(root, {"model": nn.Linear(1, 1)})
    live = small(2)
    resume(root, {"model": live})
    assert identical(live.state_dict(), saved.state_dict())


def test_not_strict_loads_what_fits_and_says_what_does_not(root):
    saved = with_optimizer(small(gone=nn.Linear(1, 1, bias=False)))
    save(root, saved | {"count": 7, "extra": [1]})
    model = small(2, new=nn.Linear(1, 1, bias=False))
    model["b"] = nn.Linear(4, 1)
    live = with_optimizer(model) | {"count": 0, "own": [3]}
    optimizer = frozen(live["optimizer"].state_dict())
    kept = frozen(model["b"].state_dict()), model["new"].weight.detach().clone()
    with pytest.warns(pp.PeakpointWarning) as caught:
        now, report = resume(root, live, strict=False)
    assert torch.equal(model["a"].weight, saved["model"]["a"].weight)
    assert torch.equal(model["b"].bias, saved["model"]["b"].bias)
    assert torch.equal(model["b"].weight, kept[0]["weight"])
    assert torch.equal(model["new"].weight, kept[1])
    assert identical(live["optimizer"].state_dict(), optimizer)
    assert now["count"] == 7
    assert now["own"] == [3]
    assert report.missing[:3] == (
        "model: the checkpoint has no 'new.weight' (float32[1, 1])",
        "model: the checkpoint has 'gone.weight' (float32[1, 1]), the model does not",
        "model: 'b.weight' is float32[1, 3] in the checkpoint, float32[1, 4] in the model",
    )
    assert [line.split(":")[0] for line in report.missing[3:]] == ["optimizer", "optimizer", "own", "extra"]
    assert [str(warning.message) for warning in caught] == [f"not restored: {line}" for line in report.missing]
    assert {restored.part: restored.what for restored in report.restored}["model"] == "3 of 5 tensors"
    assert "NOT restored: own:" in str(report)


# --- by ref -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(root):
    state = with_optimizer(small()) | {"count": 7, "table": {1: "one"}}
    save(root, state, step=12)
    return state


def test_load_gives_every_part(root, trained):
    loaded = pp.load("r@latest", root=root)
    assert list(loaded) == ["model", "optimizer", "count", "table"]
    assert identical(loaded["model"], trained["model"].state_dict())
    assert loaded["model"]._metadata == trained["model"].state_dict()._metadata
    assert identical(loaded["optimizer"], trained["optimizer"].state_dict())
    assert loaded["count"] == 7
    assert loaded["table"] == {1: "one"}


def test_what_load_gives_can_be_changed(root, trained):
    pp.load("r@latest", root=root)["model"]["a.weight"].fill_(5)
    again = pp.load("r@latest", root=root)["model"]["a.weight"]
    assert torch.equal(again, trained["model"]["a"].weight)


def test_load_into_a_model(root, trained):
    live = small(2)
    report = pp.load("r@latest", root=root, into=live)
    assert identical(live.state_dict(), trained["model"].state_dict())
    assert isinstance(report, LoadReport)
    assert (report.step, report.missing, report.skipped) == (12, (), ())
    assert [(r.part, r.what) for r in report.restored] == [("model", "4 of 4 tensors")]
    assert report.ref.startswith("r/")
    assert pp.load(report.ref, root=root)["count"] == 7


def test_load_into_several(root, trained):
    model = small(2)
    optimizer = torch.optim.Adam(model.parameters())
    report = pp.load("r@latest", root=root, into={"optimizer": optimizer, "model": model})
    assert identical(model.state_dict(), trained["model"].state_dict())
    assert identical(optimizer.state_dict(), trained["optimizer"].state_dict())
    assert [(r.part, r.what) for r in report.restored] == [
        ("optimizer", "1 groups, moments of 4 of 4 parameters"),
        ("model", "4 of 4 tensors"),
    ]


def test_load_one_part(root, trained):
    optimizer = torch.optim.Adam(small(2).parameters())
    report = pp.load("r@latest", root=root, into=optimizer, part="optimizer")
    assert identical(optimizer.state_dict(), trained["optimizer"].state_dict())
    assert [r.part for r in report.restored] == ["optimizer"]


@pytest.mark.parametrize("part", ["modle", "models", "rng", "loop", ""])
def test_unknown_parts(root, trained, part):
    live = small(2)
    before = frozen(live.state_dict())
    with pytest.raises(pp.errors.NotFoundError, match=f"no part '{part}'") as caught:
        pp.load("r@latest", root=root, into=live, part=part)
    hint = "; did you mean 'model'?" if part.startswith("mod") else ""
    assert str(caught.value).endswith(
        f"{hint}; parts: model, optimizer, count, table; write part='model' (in the shell --part model)"
    )
    with pytest.raises(pp.errors.NotFoundError):
        pp.load("r@latest", root=root, into={"model": live, part: small(3)})
    assert identical(live.state_dict(), before)


@pytest.mark.parametrize("into", [5, [1], "model", torch.zeros(1), object()], ids=lambda value: type(value).__name__)
def test_load_into_what_takes_no_state(root, trained, into):
    with pytest.raises(pp.errors.ConfigError, match="into= takes an object with load_state_dict"):
        pp.load("r@latest", root=root, into=into)


def test_load_refuses_what_does_not_fit(root, trained):
    live = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(7, 1)})
    before = frozen(live.state_dict())
    line = "model: 'b.weight' is float32[1, 3] in the checkpoint, float32[1, 7] in the model"
    with pytest.raises(pp.errors.MismatchError) as caught:
        pp.load("r@latest", root=root, into=live)
    assert caught.value.differences == (line,)
    assert identical(live.state_dict(), before)
    report = pp.load("r@latest", root=root, into=live, strict=False)
    assert report.missing == (line,)
    assert torch.equal(live["a"].weight, trained["model"]["a"].weight)
    assert torch.equal(live["b"].weight, before["b.weight"])


def test_a_damaged_file_is_named_with_its_tensor(tmp_path):
    save(tmp_path, with_optimizer(small()))
    (path,) = tmp_path.rglob("model.safetensors")
    (record,) = (f for f in pp.open(tmp_path).find_manifest("r@latest").files if f.name == path.name)
    for tensor in record.tensors:
        data = bytearray(path.read_bytes())
        data[record.header + tensor.begin] ^= 1
        path.write_bytes(data)
        live = small(2)
        before = frozen(live.state_dict())
        with pytest.raises(pp.errors.CorruptError, match=f"tensor '{tensor.name}' in model.safetensors"):
            pp.load("r@latest", root=tmp_path, into=live)
        loaded = pp.load("r@latest", root=tmp_path)
        for use in (lambda: loaded["model"], loaded.verify, lambda: loaded.tensor("model", tensor.name)):  # noqa: B023
            with pytest.raises(pp.errors.CorruptError, match=f"tensor '{tensor.name}' in model.safetensors"):
                use()
        assert loaded["optimizer"]["param_groups"]
        assert pp.load("r@latest", root=tmp_path, verify=False)["model"].keys() == live.state_dict().keys()
        assert identical(live.state_dict(), before)
        # another part does not need this file
        pp.load("r@latest", root=tmp_path, into=torch.optim.Adam(live.parameters()), part="optimizer")
        data[record.header + tensor.begin] ^= 1
        path.write_bytes(data)
    pp.load("r@latest", root=tmp_path, into=small(2))
