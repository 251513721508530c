"""A task for tests of production: which of three numbers is the largest, from noisy weights."""

from pathlib import Path

import torch

import peakpoint as pp
from training import checkpointer

EXAMPLES = 400


def data():
    inputs = torch.randn(EXAMPLES, 3, generator=torch.Generator().manual_seed(1))
    return inputs, inputs.argmax(1)


def build():
    return torch.nn.Linear(3, 3)


def predictions(model):
    with torch.no_grad():
        return model(data()[0]).argmax(1)


def accuracy(model):
    return (predictions(model) == data()[1]).float().mean().item()


def evaluate(state):
    model = build()
    model.load_state_dict(state["model"])
    return pp.Evaluated(metrics={"accuracy": accuracy(model)}, predictions=predictions(model), labels=data()[1])


def raises(candidate):
    raise RuntimeError("a check of ours")


def noisy(noise, seed=0):
    """A model that is right as far as its weights are."""
    model = build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3) + noise * torch.randn(3, 3, generator=generator))
        model.bias.zero_()
    return model


def trained(root, noises=(0.9, 0.1, 0.5), run="r", said=None):
    """A run with a checkpoint for each noise; ``said`` is what is recorded instead of the truth."""
    model = build()
    with checkpointer(root, run=run, state={"model": model}) as ckpt:
        for step, noise in enumerate(noises, 1):
            model.load_state_dict(noisy(noise, seed=step).state_dict())
            ckpt.report(step=step, accuracy=accuracy(model) if said is None else said[step - 1])
    return pp.open(root)


def policy(root, more="", validation=""):
    """Write a policy for the champion."""
    text = f"""
format = 1
[champion]
rank = ["max accuracy"]
{more}
[champion.validation]
with = "production_task:evaluate"
model = "production_task:build"
{validation}
"""
    Path(root, "production.toml").write_text(text)


def in_process(repository, ref, wanted, *, alias, timeout, progress):
    """``peakpoint.production.validation.validate``, with a torch that is imported already."""
    return pp.validate(
        ref,
        root=repository.store,
        evaluate=wanted.evaluate,
        model=wanted.model,
        tolerance=wanted.tolerance,
        golden=wanted.golden,
        agreement=wanted.agreement,
        budgets=wanted.budgets,
        checks=wanted.checks,
        signature=wanted.signature,
        against=alias,
        progress=progress,
    )
