"""Trainings that peak and then learn wrong labels by heart, for a report: ``python compare_optimizers.py OUT``.

Two optimizers with three seeds each, and one training that is pruned step by step. Takes some seconds on a CPU. Then:

    peakpoint report OUT --n-eval val_accuracy=1197
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import peakpoint as pp

TRAINING, EPOCHS = 600, 40
out = Path(sys.argv[1])
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order], labels[order]
wrong = torch.rand(TRAINING, generator=torch.Generator().manual_seed(1)) < 0.3
noisy = torch.where(wrong, (labels[:TRAINING] + 1) % 10, labels[:TRAINING])  # three in ten training labels are wrong


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))


def train_one_epoch(model, optimizer):
    total = 0.0
    for batch in torch.randperm(TRAINING).split(30):
        loss = torch.nn.functional.cross_entropy(model(images[batch]), noisy[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / TRAINING


@torch.no_grad()
def evaluate(model):
    scores = model(images[TRAINING:])
    right = (scores.argmax(1) == labels[TRAINING:]).float().mean()
    return {"val_accuracy": right, "val_loss": torch.nn.functional.cross_entropy(scores, labels[TRAINING:])}


@torch.no_grad()
def prune(model, sparsity):
    """Set the smallest weights of each layer to zero; the sparsity of all parameters is what comes of it."""
    for weight in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        count = int(sparsity * weight.numel())
        if count:
            weight[weight.abs() <= weight.abs().flatten().kthvalue(count).values] = 0
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    return zeros / sum(parameter.numel() for parameter in model.parameters())


kinds = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
}
for kind, make in kinds.items():
    for seed in range(3):
        model = network(seed)
        optimizer = make(model.parameters())
        keep = [pp.Best("val_accuracy", "max"), pp.Best("val_loss", "min"), pp.Last(1)]
        state = {"model": model, "optimizer": optimizer}
        with pp.Checkpointer(out, run=f"digits-{kind}-seed{seed}", state=state, keep=keep) as ckpt:
            for _ in ckpt.epochs(EPOCHS):
                ckpt.report(train_loss=train_one_epoch(model, optimizer), **evaluate(model))

model = network(0)
optimizer = kinds["adamw"](model.parameters())
keep = [
    pp.BestAtSparsity("val_accuracy", "max", targets=(0.0, 0.5, 0.7, 0.9, 0.95), tolerance=0.02),
    pp.Pareto({"val_accuracy": "max", "sparsity": "max"}),
    pp.Last(1),
]
state = {"model": model, "optimizer": optimizer}
# the weights are changed after the step, so everything is copied before report returns
with pp.Checkpointer(out, run="digits-pruned-adamw", state=state, keep=keep, overlap=False) as ckpt:
    for epoch in ckpt.epochs(EPOCHS):
        loss = train_one_epoch(model, optimizer)
        sparsity = prune(model, min(max(epoch - 5, 0) * 0.03, 0.98))
        ckpt.report(train_loss=loss, sparsity=sparsity, **evaluate(model))
