"""Enumerated crash points of upkeep, run like those of crashes.py, in an interpreter of its own.

A run of four checkpoints is there, and one verb works on it: ``archive``, ``restore``, ``trash`` (removal with a time
to change one's mind), ``undo``, ``keep`` (removal at once), ``soup`` (one more checkpoint, in a run of its own).
Wherever it is cut short, by SIGKILL or by a power cut, every checkpoint that it was not told to remove loads bit for
bit, one that was to go into the trash is either there or in the trash, nothing is damaged, and the verb, run again,
ends as if nothing had happened.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch

import peakpoint as pp
from crashes import Counting, Disk, Inode, Killing, Recording, in_child, materialise
from peakpoint.format import layout
from peakpoint.repository import audit, maintenance, trash
from peakpoint.rules.retention import Removal, RetentionPlan
from peakpoint.store import LocalStore
from training import QuietCheckpointer

torch.set_num_threads(1)
DAY = timedelta(days=1)
GOING = (1, 2)  # the epochs that verbs work on


def run_of(root, ops=None):
    return pp.open(LocalStore(root, ops)).run("r")


def make(root):
    """Four checkpoints; two of them lose their optimizer to no rule."""
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with QuietCheckpointer(root, run="r", state=state, keep=[pp.Last(9)]) as ckpt:
        for _ in ckpt.epochs(4):
            model(torch.randn(8, 30)).pow(2).mean().backward()
            optimizer.step()
            ckpt.report()


def chosen(run):
    return [manifest for manifest in run.manifests() if manifest.epoch in GOING]


def verb(kind, root, ops=None):
    run = run_of(root, ops)
    match kind:
        case "archive":
            maintenance.archive(run)
        case "restore":
            maintenance.restore(run)
        case "trash" | "keep":
            removals = [Removal(manifest, "told so") for manifest in chosen(run)]
            drops = [
                Removal(manifest, "told so", ("optimizer",))
                for manifest in run.manifests()
                if manifest.epoch == 0 and "optimizer" in manifest.parts
            ]
            plan = RetentionPlan({}, tuple(removals), tuple(drops))
            assert maintenance.apply_plan(run, plan, None, undo_for=DAY if kind == "trash" else timedelta(0)) == []
        case "soup":
            if not any(run.manifests() for run in pp.open(root).runs() if run.name == "s"):
                pp.soup([f"r:epoch={epoch}" for epoch in range(4)], root=LocalStore(root, ops), run="s")
        case "undo":
            there = [one.manifest.name for one in maintenance.in_trash(run)]
            maintenance.undo(run, there)


def prepare(kind, root):
    make(root)
    if kind == "restore":
        verb("archive", root)
    if kind == "undo":
        verb("trash", root)


def contents(root):
    """Everything that there is of each checkpoint, by epoch."""
    run = run_of(root)
    found = {}
    for manifest in run.manifests():
        loaded = pp.load(f"r/{manifest.name}", root=root)
        loaded.verify()
        model = loaded["model"]
        found[manifest.epoch] = {
            "model": b"".join(value.numpy().tobytes() for value in model.values()).hex(),
            "parts": sorted(loaded),
        }
    for run in pp.open(root).runs():
        for soup in run.manifests() if run.name == "s" else ():
            loaded = pp.load(f"s/{soup.name}", root=root)
            loaded.verify()
            found["soup", soup.step] = {name: value.tolist() for name, value in loaded["model"].items()}
    return found


def check(kind, root, whole):
    """After a crash."""
    repository = pp.open(root)
    damage = audit.audit(repository, deep=True).of_kind("damage")
    assert not damage, damage
    found = contents(root)
    removing = kind in {"trash", "keep", "undo"}
    in_trash = {entry.manifest.epoch for entry in trash.contents(repository.store, "r")}
    for epoch, expected in whole.items():
        if epoch in found:
            assert found[epoch]["model"] == expected["model"], f"epoch {epoch} has other bytes"
            assert found[epoch]["parts"] == expected["parts"] or (removing and epoch == 0), found[epoch]["parts"]
        else:
            assert removing, f"epoch {epoch} is gone"
            assert epoch in GOING, f"epoch {epoch} is gone"
            assert kind == "keep" or epoch in in_trash, f"epoch {epoch} can not be brought back"
    audit.clean(repository)
    assert audit.audit(repository, deep=True).clean


def names(root):
    """Every file but the journal's, and its size; names of packs are random."""
    skip = ("journal", "writer.lock", layout.TRASHED)
    return sorted(
        (str(path.relative_to(root)), path.stat().st_size)
        for path in root.rglob("*")
        if path.is_file() and not any(word in str(path) for word in skip) and path.suffix != ".json"
    )


def start(kind, base):
    """The run before the verb, and what must be there after it."""
    prepared = base / "prepared"

    def reference(write):
        prepare(kind, prepared)
        whole = base / "whole"
        shutil.copytree(prepared, whole)
        if kind == "undo":
            verb("undo", whole)
        write(repr(contents(whole)))
        done = base / "done"
        shutil.copytree(prepared, done)
        counting = Counting()
        verb(kind, done, counting)
        write(repr(counting.names))
        write(repr(contents(done)))
        write(repr(names(done)))

    lines, status = in_child(reference)
    assert status == 0, lines
    return (prepared, *map(eval, lines))


def kill(kind):
    base = Path(tempfile.mkdtemp())
    prepared, whole, operations, after, expected = start(kind, base)
    points = 0
    for point in range(len(operations)):
        for when in ("before", "after"):
            root = base / f"{point}-{when}"
            shutil.copytree(prepared, root)
            lines, status = in_child(lambda _: verb(kind, root, Killing(point, when)))  # noqa: B023
            where = f"{kind}, {when} operation {point} ({operations[point]})"
            assert os.WIFSIGNALED(status), (where, lines)
            assert os.WTERMSIG(status) == signal.SIGKILL, (where, lines)

            def again(write):
                check(kind, root, whole)  # noqa: B023
                verb(kind, root)  # noqa: B023
                write(repr((contents(root), names(root))))  # noqa: B023

            lines, status = in_child(again)
            assert status == 0, f"{where}: {lines}"
            assert eval(lines[0]) == (after, expected), f"{where}: another end"
            shutil.rmtree(root)
            points += 1
    shutil.rmtree(base)
    print(f"{kind}: killed at {points} points ({len(operations)} file operations, before and after each)")


def power(kind):
    base = Path(tempfile.mkdtemp())
    prepared, whole, *_ = start(kind, base)
    recorded = base / "recorded"
    shutil.copytree(prepared, recorded)
    disk = Disk()
    for path in [recorded, *sorted(recorded.rglob("*"))]:
        data = None if path.is_dir() else path.read_bytes()
        disk.names[path] = disk.durable[path] = None if data is None else Inode(data, data)
    recording = Recording()
    verb(kind, recorded, recording)
    dice = random.Random(5)
    chances = {
        "nothing unsynced": lambda: False,
        "everything": lambda: True,
        "some": lambda: dice.random() < 0.5,
    }
    states = 0
    for number, operation in enumerate(recording.log):
        disk.apply(operation)
        for name, chance in chances.items():
            root = base / "cut"
            materialise(disk.after_power_cut(chance), recorded, root)
            try:
                check(kind, root, whole)
            except Exception as error:
                error.add_note(f"{kind}: power cut after operation {number} {operation[:2]}, {name} survived")
                raise
            shutil.rmtree(root)
            states += 1
    shutil.rmtree(base)
    print(f"{kind}: {states} disks after power cuts ({len(recording.log)} file operations)")


if __name__ == "__main__":
    warnings.simplefilter("error")
    {"kill": kill, "power": power}[sys.argv[1]](sys.argv[2])
