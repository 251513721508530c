"""What only a CUDA device can show: captures are exact while the training goes on, and its generator resumes."""

import copy

import pytest
import torch

import peakpoint as pp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def build(fused):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 4096), torch.nn.BatchNorm1d(4096), torch.nn.Dropout(0.1), torch.nn.Linear(4096, 512)
    ).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def step(model, optimizer):
    loss = (model(torch.randn(256, 512, device="cuda")) - 1).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_what_is_saved_is_the_moment_of_the_report(tmp_path, fused, overlap):
    model, optimizer = build(fused)
    expected = {}
    state = {"model": model, "optimizer": optimizer}
    with pp.Checkpointer(tmp_path, run="r", state=state, keep=[pp.Last(100)], overlap=overlap) as ckpt:
        for number in range(12):
            step(model, optimizer)
            expected[number] = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            ckpt.report(step=number)
    for number, moment in expected.items():
        saved = pp.load(f"r:{number}", root=tmp_path)
        assert equal(saved["model"], moment["model"]), number
        assert equal(saved["optimizer"], moment["optimizer"]), number


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def train(root, stop):
        model, optimizer = build(fused=True)
        torch.backends.cudnn.deterministic = True
        state = {"model": model, "optimizer": optimizer}
        with pp.Checkpointer(root, run="r", state=state, keep=[pp.Last(1)]) as ckpt:
            for number in ckpt.steps(stop):
                ckpt.report(loss=step(model, optimizer), step=number + 1)
        return model.state_dict()

    whole = train(tmp_path / "whole", 10)
    train(tmp_path / "stopped", 4)
    torch.rand(7, device="cuda")
    assert equal(train(tmp_path / "stopped", 10), whole)


def test_weights_and_moments_are_sent_through_pinned_blocks(tmp_path):
    model, optimizer = build(fused=True)
    step(model, optimizer)
    with pp.Checkpointer(tmp_path, run="r", state={"model": model, "optimizer": optimizer}, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
    expected = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, others = build(fused=True)
    pp.load("r@latest", root=tmp_path, into={"model": other, "optimizer": others})
    assert equal(other.state_dict(), expected["model"])
    assert equal(others.state_dict(), expected["optimizer"])
    assert all(value.is_cuda for moments in others.state.values() for value in moments.values())


def test_a_ring_takes_a_gpu_state(tmp_path):
    model, optimizer = build(fused=True)
    state = {"model": model, "optimizer": optimizer}
    with pp.Checkpointer(tmp_path, run="r", state=state, keep=[pp.Last(9)], capture_bytes="4 MiB") as ckpt:
        for number in range(5):
            step(model, optimizer)
            expected = copy.deepcopy(model.state_dict())
            ckpt.report(step=number)
    assert equal(pp.load("r:4", root=tmp_path)["model"], expected)


def test_what_is_loaded_is_put_on_the_device(tmp_path):
    model, optimizer = build(fused=False)
    step(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    with pp.Checkpointer(tmp_path, run="r", state=state, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
    checkpoint = pp.open(tmp_path).run("r").latest()
    for part in ("model", "optimizer"):
        assert equal(checkpoint.load(part, device="cuda"), state[part].state_dict())
    assert {value.device.type for value in checkpoint.load("model", device="cuda").values()} == {"cuda"}
    assert {value.device.type for value in checkpoint.load("model").values()} == {"cpu"}
