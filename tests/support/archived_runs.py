"""Runs with checkpoints to archive, and what is on the disk of them."""

from pathlib import Path

import peakpoint as pp
from training import checkpointer, parts, train


def files(root):
    """Every file of every checkpoint but the records beside the manifest."""
    found = {}
    for path in Path(root).glob("runs/*/checkpoints/*/*"):
        if path.suffix == ".safetensors" or path.name in {"state.json", "manifest.json"}:
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def bytes_on_disk(root):
    """Of checkpoints, hard links once."""
    found = {path.stat().st_ino: path.stat().st_size for path in Path(root).rglob("*.safetensors")}
    return sum(found.values())


def trained(root, epochs=5, keep=None, width=64, **more):
    """A run with a checkpoint an epoch; returns the weights of each."""
    model, optimizer = parts(width=width)
    weights = []
    state = {"model": model, "optimizer": optimizer, **more}
    with checkpointer(root, state=state, keep=keep or [pp.Last(99)]) as ckpt:
        for _ in ckpt.epochs(epochs):
            loss = train(model, optimizer)
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
            ckpt.report(loss=loss)
    return weights


def run_of(root):
    return pp.open(root).run("r")


def epochs(root):
    return [one.epoch for one in run_of(root).checkpoints()]
