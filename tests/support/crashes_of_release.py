"""Enumerated crash points of production, run like those of crashes.py, in an interpreter of its own.

``first`` is a release where nothing is champion yet, ``next`` one that replaces a champion, ``rollback`` goes back from
it. A release here validates (with a record and predictions), compares, signs, promotes and tells a hook. Wherever it is
cut short, by SIGKILL or by a power cut, the alias points at a checkpoint that exists or is as it was, nothing is
damaged, and the same command, run again, ends with everything done exactly once; the hook is told at least once.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import peakpoint as pp
from crashes import Counting, Disk, Inode, Killing, Recording, in_child, materialise
from peakpoint.errors import NotFoundError
from peakpoint.format import layout
from peakpoint.production import promotion
from peakpoint.production.policy import read_text
from peakpoint.production.proposal import propose
from peakpoint.production.release import Release
from peakpoint.repository import aliases, audit, validations
from peakpoint.repository.root import Repository
from peakpoint.store import LocalStore
from promoting import repository, validated

LABELS = [0] * 40
PREDICTED = {1: [0] * 20 + [1] * 20, 2: [0] * 40, 3: [0] * 10 + [1] * 30}


def policies(base, root):
    text = f"""
    format = 1
    [champion]
    rank = ["max accuracy"]
    [champion.improvement]
    metric = "accuracy"
    mode = "max"
    significance = 0.05
    [champion.signing]
    public_key = "{base}/key.pub"
    [[champion.hooks]]
    command = ["sh", "-c", "cat >> {root}.told"]
    """
    return read_text(text.encode(), where="here", base=base)


def validate(found, ref, wanted, **_):
    """What a validation leaves behind, without a model."""
    step = found.find_manifest(ref).step
    return validated(found, ref, predicted=PREDICTED[step], labels=LABELS, wanted=wanted)


def verb(kind, base, root, ops=None):
    found = Repository(LocalStore(root, ops))
    if kind == "rollback":
        if aliases.newest(found.store, "champion").kind != "rolled back":
            promotion.rollback(found, "champion", "worse than it looked")
        return
    done = Release(
        found,
        "champion",
        policies(base, root),
        validate,
        private_key=base / "key",
        catalogue=str(base / f"{root.name}.sqlite"),
    ).run()
    assert done.outcome in {"promoted", "unchanged"}, done


def prepare(kind, base, root):
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", base / "key"], check=True)
    subprocess.run(
        ["openssl", "ec", "-in", base / "key", "-pubout", "-out", base / "key.pub"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    repository(root, accuracies=(0.5, 0.9, 0.2))
    found = pp.open(root)
    if kind != "first":
        validated(found, "r:1", predicted=PREDICTED[1], labels=LABELS)
        promotion.promote(propose(found, "r:1", "champion"), "the first")
    if kind == "rollback":
        promotion.promote(propose(found, "r:2", "champion"), "better", force=True)


def state(root):
    """What there is in the end: all of it but times and random names."""
    found = pp.open(root)
    store = found.store
    history = aliases.history(store, "champion")
    run = found.run("r")
    protected = run.aliased(run.manifests(), run.events())
    return {
        "damage": history.damage,
        "aliases": [(one.kind, found.find_manifest(one.target.ref).step, one.release) for one in history.records],
        "validations": [
            (found.find(f"r/{id_}").step, one.number, one.passed)
            for id_ in validations.checkpoints_with(store, "r")
            for one in validations.readable(store, "r", id_)[0]
        ],
        "signatures": sorted(child for one in found.run("r").manifests() for child in signatures(store, one)),
        "told": [child for child in store.children("aliases/champion") if "told" in child],
        "promoting": [why for why in protected.values() if "about to" in why],
    }


def signatures(store, manifest):
    prefix = layout.checkpoint_prefix("r", manifest.name)
    return [f"{manifest.step}/{child}" for child in store.children(prefix) if child.startswith("signature")]


def comparable(found):
    """Without the ids of releases, which depend on random ids."""
    return found | {"aliases": [(kind, step, release is not None) for kind, step, release in found["aliases"]]}


def check(kind, root):
    """After a crash: whatever is there is whole."""
    found = pp.open(root)
    damage = audit.audit(found, deep=True).of_kind("damage")
    assert not damage, damage
    try:
        step = found.find("@champion").step
    except NotFoundError:
        assert kind == "first", "there was a champion"
        step = None
    allowed = {"first": {None, 2}, "next": {1, 2}, "rollback": {1, 2}}[kind]
    assert step in allowed, step
    audit.clean(found)
    assert audit.audit(found, deep=True).clean, audit.audit(found).findings


def start(kind, base):
    prepared = base / "prepared"

    def reference(write):
        prepare(kind, base, prepared)
        done = base / "done"
        shutil.copytree(prepared, done)
        counting = Counting()
        verb(kind, base, done, counting)
        write(repr(counting.names))
        write(repr(comparable(state(done))))

    lines, status = in_child(reference)
    assert status == 0, lines
    return prepared, *map(eval, lines)


def kill(kind):
    base = Path(tempfile.mkdtemp())
    prepared, operations, expected = start(kind, base)
    points = 0
    for point in range(len(operations)):
        for when in ("before", "after"):
            root = base / f"{point}-{when}"
            shutil.copytree(prepared, root)
            lines, status = in_child(lambda _: verb(kind, base, root, Killing(point, when)))  # noqa: B023
            where = f"{kind}, {when} operation {point} ({operations[point]})"
            assert os.WIFSIGNALED(status), (where, lines)
            assert os.WTERMSIG(status) == signal.SIGKILL, (where, lines)

            def again(write):
                check(kind, root)  # noqa: B023
                verb(kind, base, root)  # noqa: B023
                once = comparable(state(root))  # noqa: B023
                verb(kind, base, root)  # noqa: B023
                assert comparable(state(root)) == once, "a third time does something"  # noqa: B023
                write(repr(once))

            lines, status = in_child(again)
            assert status == 0, f"{where}: {lines}"
            found = eval(lines[0])
            assert found == expected, f"{where}: another end: {found} instead of {expected}"
            told = Path(f"{root}.told")
            assert kind == "rollback" or told.read_text().count('"record"') in {1, 2}, where
            shutil.rmtree(root)
            points += 1
    shutil.rmtree(base)
    print(f"{kind}: killed at {points} points ({len(operations)} file operations, before and after each)")


def power(kind):
    base = Path(tempfile.mkdtemp())
    prepared, _, expected = start(kind, base)
    recorded = base / "recorded"
    shutil.copytree(prepared, recorded)
    disk = Disk()
    for path in [recorded, *sorted(recorded.rglob("*"))]:
        data = None if path.is_dir() else path.read_bytes()
        disk.names[path] = disk.durable[path] = None if data is None else Inode(data, data)
    recording = Recording()
    verb(kind, base, recorded, recording)
    dice = random.Random(5)
    chances = {"nothing unsynced": lambda: False, "everything": lambda: True, "some": lambda: dice.random() < 0.5}
    states = 0
    for number, operation in enumerate(recording.log):
        disk.apply(operation)
        for name, chance in chances.items():
            root = base / "cut"
            materialise(disk.after_power_cut(chance), recorded, root)
            try:
                check(kind, root)
                verb(kind, base, root)
                found = comparable(state(root))
                assert found == expected, f"another end: {found} instead of {expected}"
            except Exception as error:
                error.add_note(f"{kind}: power cut after operation {number} {operation[:2]}, {name} survived")
                raise
            shutil.rmtree(root)
            (base / "cut.sqlite").unlink(missing_ok=True)
            states += 1
    shutil.rmtree(base)
    print(f"{kind}: {states} disks after power cuts ({len(recording.log)} file operations)")


if __name__ == "__main__":
    warnings.simplefilter("error")
    {"kill": kill, "power": power}[sys.argv[1]](sys.argv[2])
