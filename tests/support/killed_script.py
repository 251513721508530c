"""An ordinary training script, for test_kill_anywhere: ``killed_script.py OUT``."""

import sys
from pathlib import Path

import torch

import peakpoint as pp

out = Path(sys.argv[1])
torch.manual_seed(3)
data = torch.randn(64, 5)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=16, shuffle=True)
model = torch.nn.Sequential(
    torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

with pp.Checkpointer(
    out / "runs",
    run="script",
    state={"model": model, "optimizer": optimizer},
    keep=[pp.Best("loss", "min"), pp.Every(epochs=2), pp.Last(2)],
) as ckpt:
    resumed = ckpt.resume()
    if resumed:
        print(f"resumed from step {resumed.step}")
    for _ in ckpt.epochs(5):
        for (batch,) in loader:
            loss = (model(batch) - batch.sum(1, keepdim=True)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ckpt.report(loss=loss.item())

torch.save(model.state_dict(), out / "final.pt.partial")
(out / "final.pt.partial").replace(out / "final.pt")
