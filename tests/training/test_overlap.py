"""Training goes on while a save is copied and written; what is saved is the moment of the report, to the bit."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peakpoint as pp
from peakpoint.state.host_copy import ChangedError, storage_of
from peakpoint.state.step_guard import StepGuard, wait_for_copies
from peakpoint.state.tensor_files import StagingBuffer
from training import checkpointer, kept, same


class Ema:
    """A running mean of the weights, kept by hand and changed in place."""

    def __init__(self, model):
        self.mean = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model):
        for mean, parameter in zip(self.mean, model.parameters(), strict=True):
            mean.lerp_(parameter, 0.1)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 512), torch.nn.BatchNorm1d(512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU()
    )


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]


def adam_foreach(model):
    return [torch.optim.Adam(model.parameters(), foreach=True)]


def adam_fused(model):
    return [torch.optim.Adam(model.parameters(), fused=True)]


def several(model):
    return [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[1:].parameters(), lr=0.1, momentum=0.5)]


KINDS = [sgd, adam_foreach, adam_fused, several]


def run(root, kind, *, accumulate=1, overlap=True, reports=6):
    """Train; returns the final state, and the state at each report."""
    model = network()
    optimizers, mean = kind(model), Ema(model)
    state = {"model": model, "mean": mean, **{f"optimizer{i}": given for i, given in enumerate(optimizers)}}
    states = []
    with checkpointer(root, state=state, overlap=overlap) as ckpt:
        for step in range(reports * accumulate):
            model(torch.randn(8, 16)).pow(2).mean().backward()
            if (step + 1) % accumulate:
                continue
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            mean.update(model)
            states.append(copy.deepcopy({name: part.state_dict() for name, part in state.items()}))
            ckpt.report(step=len(states))
    return copy.deepcopy({name: part.state_dict() for name, part in state.items()}), states


def plain(tree):
    return {key: plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_saved_is_the_moment_of_the_report(tmp_path, kind, accumulate):
    final, states = run(tmp_path / "a", kind, accumulate=accumulate)
    for number, expected in enumerate(states, 1):
        assert same(plain(dict(pp.load(f"r:{number}", root=tmp_path / "a"))), plain(expected)), number
    other, others = run(tmp_path / "b", kind, accumulate=accumulate, overlap=False)
    assert same(plain(final), plain(other))
    assert same(plain(states), plain(others))
    for number, expected in enumerate(others, 1):
        assert same(plain(dict(pp.load(f"r:{number}", root=tmp_path / "b"))), plain(expected)), number


def change_after_report(root, overlap):
    model = torch.nn.Linear(4096, 4096, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(root, state=state, overlap=overlap) as ckpt:
        before = model.weight.detach().clone()
        ckpt.report()
        with torch.no_grad():
            model.weight.add_(1)
        refused = None
        try:
            ckpt.wait()
        except pp.SaveFailedError as caught:
            refused = caught
        if refused is not None:  # one of two right outcomes
            assert overlap
            assert isinstance(refused.__cause__, ChangedError)
            assert "overlap=False" in str(refused)
            assert kept(root) == []
        else:
            assert same(pp.load("r@latest", root=root)["model"]["weight"], before)
        assert ckpt.report().saved
        ckpt.wait()
    assert same(pp.load("r@latest", root=root)["model"]["weight"], model.weight)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_change_outside_step_is_captured_rightly_or_refused(tmp_path, overlap):
    change_after_report(tmp_path, overlap)


def test_weights_without_an_optimizer_in_the_state_may_change_at_once(tmp_path):
    model = torch.nn.Linear(2048, 2048)
    before = copy.deepcopy(model.state_dict())
    with checkpointer(tmp_path, state={"model": model}) as ckpt:
        ckpt.report()
        with torch.no_grad():
            model.weight.zero_()
    assert same(dict(pp.load("r@latest", root=tmp_path)["model"]), dict(before))


def test_the_hooks_are_taken_away(tmp_path):
    model = network()
    optimizer = sgd(model)[0]
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}):
        assert optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


THOUSAND_SAVES = """
import gc, os, sys, threading
from pathlib import Path
import torch
import peakpoint as pp
from training import checkpointer

def used():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

model = torch.nn.Linear(500, 200)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
before = used()
state, capture_bytes = {"model": model, "optimizer": optimizer}, sys.argv[2] or None
with checkpointer(sys.argv[1], state=state, keep=[pp.Last(2)], capture_bytes=capture_bytes) as ckpt:
    for number in range(1000):
        if number == 100:  # allocators have what they want by now
            ckpt.wait()
            first, memory_first = used(), memory()
        model(torch.ones(500)).sum().backward()
        optimizer.step()
        ckpt.report()
    ckpt.wait()
    assert used() == first, (used(), first)
    # 900 states are 720 MB; a leak of a hundredth of each would be seen
    assert memory() < memory_first + 8e6, (memory(), memory_first)
assert used() == before, (used(), before)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.slow
@pytest.mark.parametrize("capture_bytes", ["", "1 MiB"])
def test_a_thousand_saves_leave_no_files_open_no_threads_and_no_memory(tmp_path, capture_bytes):
    """In a process of its own, whose memory no other test has left in pieces."""
    command = [sys.executable, "-c", THOUSAND_SAVES, str(tmp_path), capture_bytes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(kept(tmp_path)) == 2


def compiled():
    """Whether torch.compile works here; it needs a C++ compiler, or Triton."""
    try:
        model = torch.compile(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
    except Exception as error:  # noqa: BLE001 - whatever the platform lacks
        return f"{type(error).__name__}"
    return ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_modules(tmp_path):
    lacking = compiled()
    if lacking:
        pytest.skip(f"torch.compile does not work here: {lacking}")
    torch.manual_seed(0)
    inner = network()
    model = torch.compile(inner)
    optimizer = torch.optim.AdamW(model.parameters())
    states = []
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for step in range(4):
            model(torch.randn(8, 16)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            states.append(copy.deepcopy({"model": inner.state_dict(), "optimizer": optimizer.state_dict()}))
            ckpt.report(step=step + 1)
    for number, expected in enumerate(states, 1):
        saved = pp.load(f"r:{number}", root=tmp_path)
        weights = {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
        assert same(weights, dict(expected["model"]))
        assert same(plain(saved["optimizer"]), plain(expected["optimizer"]))


@pytest.mark.parametrize("how", ["settle", "hold_step"])
def test_a_change_that_is_only_seen_after_the_copy_has_ended_is_refused(how):
    weight = torch.zeros(5000)
    _, copying = StagingBuffer().capture({"model.safetensors": {"w": weight}}, frozenset([storage_of(weight)]))
    copying.run()
    copying.wait()  # it looked right when it ended
    weight.add_(1)
    if how == "hold_step":
        copying.hold_step()
    with pytest.raises(ChangedError, match="changed outside"):
        copying.settle()


def large():
    model = torch.nn.Sequential(*[torch.nn.Linear(1500, 1500) for _ in range(4)])
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_loading_into_what_is_being_copied_waits_for_the_copy(tmp_path):
    model, optimizer = large()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for epoch in range(3):
            with torch.no_grad():
                model[0].weight.fill_(epoch)
            ckpt.report(epoch=epoch, acc=-abs(epoch - 1))
            if epoch:
                pp.load("r@best:acc:max" if epoch == 2 else "r:epoch=0", root=tmp_path, into=model)
            ckpt.wait()
    for epoch in range(3):
        assert (pp.load(f"r:epoch={epoch}", root=tmp_path)["model"]["0.weight"] == epoch).all()


def test_resuming_another_run_into_the_same_model_waits_for_the_copy(tmp_path):
    model, optimizer = large()
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(tmp_path, run="other", state=state) as ckpt:
        ckpt.report()
    with torch.no_grad():
        model[0].weight.fill_(7)
    with checkpointer(tmp_path, state=state) as ckpt, checkpointer(tmp_path, run="other", state=state) as other:
        ckpt.report()
        other.resume()
    assert (pp.load("r@latest", root=tmp_path)["model"]["0.weight"] == 7).all()


@pytest.mark.parametrize("kind", ["epochs", "steps"])
@pytest.mark.parametrize("leaving", ["the end", "break"])
def test_after_a_loop_weights_may_change_at_once(tmp_path, kind, leaving):
    model, optimizer = large()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for number in getattr(ckpt, kind)(3):
            with torch.no_grad():
                model[0].weight.fill_(number)
            ckpt.report()
            if leaving == "break":
                break
            ckpt.wait()
        for parameter in model.parameters():
            parameter.data.zero_()
    last = 0 if leaving == "break" else 2
    assert (pp.load("r@latest", root=tmp_path)["model"]["0.weight"] == last).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_waits_for_no_copy_of_its_parent():
    weight = torch.zeros(5000)
    _, copying = StagingBuffer().capture({"model.safetensors": {"w": weight}}, frozenset([storage_of(weight)]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(weight)], lr=0.1)
    guard = StepGuard({"optimizer": optimizer})
    guard.watch(copying)  # and nobody runs it
    child = os.fork()
    if not child:
        wait_for_copies()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    guard.stop()
