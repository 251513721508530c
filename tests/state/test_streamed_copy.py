"""Capture through a buffer that is smaller than the state."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peakpoint as pp
from failing import Failing
from peakpoint.state.streamed_copy import SMALLEST_RING, RingBuffer, elements
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.store import LocalStore
from training import checkpointer, kept, same


@st.composite
def strided(draw):
    """A tensor of any strides, and a range of its elements."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    tensor = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()) and len(shape):
        tensor = tensor[::2]
    begin = draw(st.integers(0, tensor.numel()))
    return tensor, begin, draw(st.integers(begin, tensor.numel()))


@given(strided())
def test_elements_are_the_row_major_range(case):
    tensor, begin, end = case
    views = list(elements(tensor, begin, end))
    expected = tensor.reshape(-1)[begin:end]
    assert torch.equal(torch.cat([view.reshape(-1) for view in views]) if views else expected[:0], expected)
    assert all(view._base is not None or view is tensor for view in views)
    assert all(view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for view in views)


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.safetensors": {
            "large": torch.rand(1_300_001, generator=generator),
            "turned": torch.rand(700, 900, generator=generator).T,
            "conjugate": torch.view_as_complex(torch.rand(200_000, 2, generator=generator)).conj(),
            "half": torch.rand(333, 3, generator=generator).half(),
            "none": torch.empty(0, 3),
            "one": torch.tensor(7),
            "expanded": torch.rand(5, 1, generator=generator).expand(5, 70_000),
        },
        "b.safetensors": {f"t{number}": torch.full((number % 7,), float(number)) for number in range(3000)},
        "c.safetensors": {"flags": torch.rand(1_000_000, generator=generator) > 0.5},
    }


def bytes_of(image):
    return b"".join(bytes(block) for block in image.blocks())


def test_the_bytes_are_those_of_the_large_buffer():
    ring = RingBuffer(SMALLEST_RING)
    for _ in range(2):
        images, stream = ring.capture(state())
        thread = threading.Thread(target=stream.run)
        thread.start()
        found = [bytes_of(image) for image in images]
        thread.join()
        expected = StagingBuffer().fill(state())
        assert [image.name for image in images] == [image.name for image in expected]
        assert [image.size for image in images] == [image.size for image in expected]
        for mine, whole in zip(found, expected, strict=True):
            assert mine == bytes(whole.data), whole.name


def test_a_stream_that_is_abandoned_ends():
    images, stream = RingBuffer(SMALLEST_RING).capture(state())
    thread = threading.Thread(target=stream.run)
    thread.start()
    next(images[0].blocks())
    stream.abandon()
    stream.wait()
    thread.join()


def train(root, steps=3, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 900), torch.nn.BatchNorm1d(900), torch.nn.Linear(900, 300))
    optimizer = torch.optim.AdamW(model.parameters())
    outcomes = []
    with checkpointer(root, state={"model": model, "optimizer": optimizer}, **options) as ckpt:
        for _ in ckpt.steps(steps):
            loss = model(torch.randn(16, 300)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            outcomes.append(ckpt.report(loss=loss))
    return outcomes


def test_what_is_saved_through_a_ring_is_the_same(tmp_path):
    plain = train(tmp_path / "plain")
    small = train(tmp_path / "small", capture_bytes="1 MiB")
    assert [outcome.saved for outcome in plain] == [outcome.saved for outcome in small] == [True] * 3
    for step in (1, 2, 3):
        one = pp.load(f"r:{step}", root=tmp_path / "plain")
        other = pp.load(f"r:{step}", root=tmp_path / "small")
        assert same(dict(one), dict(other))
    assert train(tmp_path / "small", 4, capture_bytes=2 * SMALLEST_RING)[0].step == 4


@pytest.mark.parametrize("call", ["create", "write", "fsync"])
def test_a_failed_save_through_a_ring_is_said_to_be_lost(tmp_path, call):
    ops = Failing(call)
    model = torch.nn.Linear(2000, 1000)
    with checkpointer(LocalStore(tmp_path, ops), state={"model": model}, capture_bytes="1 MiB") as ckpt:
        ckpt.report()
        ckpt.wait()
        ops.arm()
        ckpt.report()
        with pytest.raises(pp.SaveFailedError, match="no copy of that moment"):
            ckpt.wait()
        assert ckpt.report().saved
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("wrong", [0, -1, 4096, "much", "1 MiB/s", 1.5e9, True, "0.5 MiB", "", None.__class__])
def test_what_cannot_be_a_size_is_refused(tmp_path, wrong):
    with pytest.raises(pp.errors.ConfigError, match="capture_bytes"):
        checkpointer(tmp_path, state={"x": 1}, capture_bytes=wrong)
