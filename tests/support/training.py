"""A tiny training, and what its tests compare."""

import random

import numpy as np
import torch

import peakpoint as pp
from peakpoint.repository.provenance import utc_now


def parts(seed=0, width=4):
    """A model with dropout, and its optimizer; other seeds begin elsewhere."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that many trainings use
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, data=None):
    """One step on random data, or on the data given."""
    if data is None:
        data = torch.randn(8, 3) + random.random() + np.random.rand()  # noqa: NPY002
    optimizer.zero_grad()
    loss = (model(data) - 1).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


class QuietCheckpointer(pp.Checkpointer):
    """A checkpointer that prints nothing and watches no signals, with a clock and listener of the test's own."""

    def __init__(self, *arguments, clock=utc_now, announce=lambda text: None, preempt=None, **options):
        self._clock, self._announce = clock, announce
        super().__init__(*arguments, preempt=preempt, **options)


def checkpointer(root, *, run="r", state=None, keep=None, **options):
    """A quiet checkpointer that keeps everything, unless told otherwise."""
    state = {"model": torch.nn.Linear(2, 1)} if state is None else state
    return QuietCheckpointer(root, run=run, state=state, keep=[pp.Last(100)] if keep is None else keep, **options)


def kept(root, run="r"):
    """The checkpoints, earliest first."""
    return pp.open(root).run(run).checkpoints()


def same(one, other):
    """Whether two trees are equal to the bit."""
    if isinstance(one, torch.Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape
        return equal and _bytes(one) == _bytes(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
