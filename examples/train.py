"""A training that can be killed at any time and run again by the same command: ``python train.py OUT``."""

import sys
from pathlib import Path

import torch

import peakpoint as pp

out = Path(sys.argv[1])
torch.manual_seed(3)
inputs = torch.randn(256, 8)
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

with pp.Checkpointer(
    out / "runs",
    run="example",
    state={"model": model, "optimizer": optimizer},
    keep=[pp.Best("loss", "min"), pp.Every(epochs=5), pp.Last(2)],
) as ckpt:
    resumed = ckpt.resume()
    if resumed:
        print(f"resumed from step {resumed.step}")
    for _ in ckpt.epochs(12):
        for batch, target in loader:
            loss = torch.nn.functional.mse_loss(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ckpt.report(loss=loss)

torch.save(model.state_dict(), out / "final.pt.partial")
(out / "final.pt.partial").replace(out / "final.pt")
