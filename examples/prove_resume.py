"""Show on your own loop that N steps after a resume equal N steps without one.

Put your training into ``train``: it builds everything from nothing, as your script does, and leaves its loop after
``stop_after`` reports. The training is run once without interruption, and once stopped and continued; then every
tensor and plain value of the two last checkpoints is compared bit for bit. What differs is missing from the state.
"""

import sys
import tempfile
from pathlib import Path

import torch

import peakpoint as pp


def train(root, stop_after):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pp.Checkpointer(root, run="proof", state={"model": model, "optimizer": optimizer}, keep=[pp.Last(1)]) as ckpt:
        for _ in ckpt.epochs(6):
            for (batch,) in loader:
                loss = model(batch).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ckpt.report(loss=loss)
            stop_after -= 1
            if stop_after == 0:
                break


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)  # noqa: PLR0124 - NaN


with tempfile.TemporaryDirectory() as place:
    train(Path(place) / "whole", stop_after=0)
    train(Path(place) / "stopped", stop_after=3)
    train(Path(place) / "stopped", stop_after=0)
    whole = pp.load("proof@latest", root=Path(place) / "whole")
    stopped = pp.load("proof@latest", root=Path(place) / "stopped")
    different = [part for part in whole if not same(whole[part], stopped[part])]  # parts are read here
print(f"different: {', '.join(different)}" if different else f"equal, bit for bit: {', '.join(whole)}")
sys.exit(bool(different))
