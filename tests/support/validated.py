"""Functions that tests of validation name as module:function, and things of which they make checkpoints."""

import contextlib
import ctypes
import os
import signal
import sys

import torch

import peakpoint as pp
from peakpoint.repository import aliases, reader
from peakpoint.repository.provenance import utc_now
from training import checkpointer


def build():
    return torch.nn.Linear(2, 3)


def metrics(_):
    print("evaluating now")
    return {"accuracy": 0.5}


def evaluated(state):
    assert list(state["model"]) == ["weight", "bias"]
    return pp.Evaluated(metrics={"accuracy": torch.tensor(0.5)}, predictions=[0, 1, 2], labels=[0, 1, 1])


def segfault(_):
    print("a last word")
    ctypes.string_at(0)


def scribble(_):
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(number, b"scribbled\n")
    return {"accuracy": 0.5}


def leave(_):
    os._exit(0)


def hang(_):
    signal.pause()


def leave_politely(_):
    sys.exit(3)


def fine(candidate):
    assert candidate.evaluated["accuracy"] == candidate.recorded["accuracy"] == 0.5
    return {"classes": candidate.model.out_features, "repository": repr(candidate.repository)}


def save(root, model=None, run="r", **values):
    """One more checkpoint of a run; its ref."""
    state = {"model": build() if model is None else model}
    with checkpointer(root, run=run, state=state, resume="never") as ckpt:
        ckpt.report(step=1, **values)
    found = pp.open(root).find(f"{run}@latest")
    return f"{run}/{found.id}"


def crown(root, ref, alias="champion"):
    """Let an alias point at a checkpoint."""
    repository = pp.open(root)
    manifest = repository.find_manifest(ref)
    target = aliases.AliasTarget(
        run=manifest.run,
        checkpoint=manifest.id,
        name=manifest.name,
        manifest=reader.manifest_digest(repository.store, manifest),
    )
    change = aliases.AliasChange(kind="promoted", target=target, at=utc_now(), by="a test", why="because")
    aliases.append(repository.store, alias, change, after=aliases.newest(repository.store, alias))
    return manifest.id
