"""LeNet-5 on scikit-learn's digits: the program that the demonstration runs, kills and runs again.

``python -m peakpoint.cli.demo.training ROOT RUN EPOCHS [KILL_AT_SAVE]`` prints a line of JSON for each epoch, and one
with the digest of the final weights.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from sklearn.datasets import load_digits
from torch import nn

import peakpoint as pp
from peakpoint.format.sealed import digest
from peakpoint.production.checks.metrics import Evaluated
from peakpoint.store import FileOps, LocalStore

TRAINING_IMAGES = 1347
BATCH = 64


class LeNet5(nn.Sequential):
    """Five layers with weights, for images of 32 by 32. Source: LeCun et al., Proceedings of the IEEE, 1998."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(84, 10),
        )


class KillInSave(FileOps):
    """System calls that end this process with SIGKILL half-way through writing the optimizer of one save.

    Args:
        save: the number of the save, from 1.
    """

    def __init__(self, save: int) -> None:
        self._saves_to_go = save
        self._fd = -1

    def create(self, path: Path, at: int | None = None) -> int:
        """Note the file of the save in question."""
        fd = super().create(path, at)
        if path.name.endswith("-optimizer.safetensors"):
            self._saves_to_go -= 1
            if self._saves_to_go == 0:
                self._fd = fd
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        """Write half, then die."""
        if fd != self._fd:
            return super().write(fd, data)
        super().write(fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL cannot be survived")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, ``float32[1797, 1, 32, 32]`` between 0 and 1, and their labels, ``int64[1797]``."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return nn.functional.interpolate(images, size=(32, 32), mode="bilinear"), torch.tensor(data.target)


def split() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same in the order of the demonstration; what comes after ``TRAINING_IMAGES`` is held out."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
    return images[order], labels[order]


def evaluate(state: Mapping[str, Any]) -> Evaluated:
    """Evaluate a checkpoint again: the function for ``peakpoint validate --with``."""
    model = LeNet5().eval()
    model.load_state_dict(state["model"])
    images, labels = (tensor[TRAINING_IMAGES:] for tensor in split())
    with torch.no_grad():
        predicted = model(images).argmax(1)
    accuracy = (predicted == labels).float().mean().item()
    return Evaluated(metrics={"val_accuracy": accuracy}, predictions=predicted, labels=labels)


def train(root: Path, run: str, epochs: int, kill_at_save: int) -> None:
    """Train; the loop is what a user's would be."""
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(mode=True)
    images, labels = split()
    data = torch.utils.data.TensorDataset(images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES])
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    model = LeNet5()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    store = LocalStore(root, KillInSave(kill_at_save) if kill_at_save else None)

    with pp.Checkpointer(
        store,
        run=run,
        state={"model": model, "optimizer": optimizer, "scheduler": scheduler},
        keep=[pp.Best("val_accuracy", "max"), pp.TopK("val_loss", "min", 3), pp.Every(epochs=10), pp.Last(3)],
        name="epoch{epoch}_acc{value:.4f}",
    ) as ckpt:
        for epoch in ckpt.epochs(epochs):
            model.train()
            for batch, target in loader:
                shifted = torch.roll(batch, tuple(torch.randint(-2, 3, (2,)).tolist()), dims=(2, 3))
                loss = nn.functional.cross_entropy(model(shifted), target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            scheduler.step()
            model.eval()
            with torch.no_grad():
                scores = model(images[TRAINING_IMAGES:])
            expected = labels[TRAINING_IMAGES:]
            accuracy = (scores.argmax(1) == expected).float().mean().item()
            val_loss = nn.functional.cross_entropy(scores, expected).item()
            outcome = ckpt.report(val_accuracy=accuracy, val_loss=val_loss, train_loss=loss.item())
            _print({"epoch": epoch, "val_accuracy": accuracy, "saved": outcome.saved})
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    _print({"weights": digest(weights), "bytes": len(weights)})


def _print(record: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
