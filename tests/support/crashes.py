"""Enumerated crash points: run by tests/faults/test_crash_points.py in an interpreter of its own.

``kill``: a training is killed with SIGKILL before and after each file operation of its saves; after every kill the
newest committed checkpoint loads, nothing acknowledged is lost, the audit is clean after cleaning, and the same
training, run again, ends with the same weights and the same checkpoints.

``power``: the file operations are recorded, and for every prefix of them disks are made as a power cut may leave them:
file contents only as of their last fsync, names only as of the last fsync of their directory, or any part of what came
after. Whatever had been acknowledged by then must be there, whole.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

import peakpoint as pp
from peakpoint.repository import audit
from peakpoint.store import FileOps, LocalStore
from training import QuietCheckpointer

EPOCHS = 4
torch.set_num_threads(1)  # no thread pool may exist when this process forks


def parts(kind):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    if kind == "single":
        return model, None, {"model": model}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    if kind == "frozen":  # a part whose file is shared from checkpoint to checkpoint
        notes = {
            "seen": [],
            "table": torch.arange(20_000.0),
            "count": torch.zeros(1),
        }  # the table is shared
        backbone = torch.nn.Linear(200, 100).requires_grad_(False)
        return model, optimizer, {"model": model, "optimizer": optimizer, "notes": notes, "backbone": backbone}
    return model, optimizer, {"model": model, "optimizer": optimizer, "notes": {"seen": []}}


def train(root, ops, kind, acknowledged=lambda step: None):
    """A little training that saves, removes and reports; returns its final weights."""
    model, optimizer, state = parts(kind)
    parts_needed = "model" if kind == "thinned" else None
    rules = [pp.Best("loss", "min", parts=parts_needed), pp.Every(epochs=3, parts=parts_needed), pp.Last(1)]
    with QuietCheckpointer(LocalStore(root, ops), run="r", state=state, keep=rules) as ckpt:
        for epoch in ckpt.epochs(EPOCHS):
            loss = (model(torch.randn(8, 3)) - 1).pow(2).mean()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if optimizer is None:
                        parameter.sub_(0.1 * parameter.grad)
            if optimizer is not None:
                optimizer.step()
                state["notes"]["seen"].append(epoch)
                if "count" in state["notes"]:
                    state["notes"]["count"] += 1
            model.zero_grad()
            ckpt.report(loss=loss.item() + 0.1 * (epoch == 1))
            ckpt.wait()
            acknowledged(epoch)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy().tobytes()


def kept(root):
    return sorted((c.epoch, tuple(c.metrics.items())) for c in pp.open(root).run("r").checkpoints())


def check(root, least, kind):
    """After a crash: what was acknowledged is there and whole, and nothing is damaged."""
    if not (root / "peakpoint.json").is_file():
        assert least < 0, "the repository is gone"
        return
    repository = pp.open(root)
    damage = audit.audit(repository, deep=True).of_kind("damage")
    assert not damage, damage
    names = [run.name for run in repository.runs()]
    manifests = repository.run("r").manifests() if names else ()
    newest = manifests[-1].epoch if manifests else -1
    assert newest >= least, f"epoch {least} was durable, the newest now is {newest}"
    if manifests:
        assert set(dict(pp.load("r@latest", root=root))) == set(parts(kind)[2]), "the newest is whole"
    for manifest in manifests:  # a kill in the middle of dropping an optimizer leaves the weights
        assert pp.load(f"r/{manifest.name}", root=root)["model"]
    audit.clean(repository)
    after = audit.audit(repository, deep=True)
    assert after.clean, after.findings


# --- kill ---------------------------------------------------------------------------------------------------------


class Operations(FileOps):
    """Calls ``before`` and ``after`` around each operation."""

    def before(self, name):
        """Nothing, unless overridden."""

    def after(self, name):
        """Nothing, unless overridden."""


def _around(name):
    def method(self, *arguments):
        self.before(name)
        result = getattr(FileOps, name)(self, *arguments)
        self.after(name)
        return result

    return method


NAMES = ("mkdir", "create", "write", "fsync", "fsync_dir", "rename", "link", "unlink", "rmdir")
for _name in NAMES:
    setattr(Operations, _name, _around(_name))


class Counting(Operations):
    def __init__(self):
        self.names = []

    def before(self, name):
        self.names.append(name)


class Killing(Operations):
    def __init__(self, point, when):
        self.left, self.when = point, when

    def before(self, name):
        if self.when == "before" and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, name):
        if self.when == "after" and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def in_child(work):
    """Run ``work(write)`` in a fork; returns what it wrote and its wait status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            warnings.simplefilter("error")
            work(lambda text: os.write(writing, f"{text}\n".encode()))
            code = 0
        except BaseException as error:  # noqa: BLE001 - the parent must hear of anything
            os.write(writing, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    return lines, os.waitpid(child, 0)[1]


def kill(kind):
    base = Path(tempfile.mkdtemp())
    train(base / "warm", None, kind)  # torch imports half of itself at the first optimizer: once, not in every fork

    def reference(write):
        counting = Counting()
        write(train(base / "reference", counting, kind).hex())
        write(json.dumps(counting.names))

    (weights, names), status = in_child(reference)
    assert status == 0
    operations = json.loads(names)
    expected = kept(base / "reference")
    points = 0
    for point in range(len(operations)):
        for when in ("before", "after"):
            root = base / f"{point}-{when}"
            lines, status = in_child(lambda write: train(root, Killing(point, when), kind, write))  # noqa: B023
            assert os.WIFSIGNALED(status), (point, when, lines)
            assert os.WTERMSIG(status) == signal.SIGKILL, (point, when, lines)
            least = max(map(int, lines), default=-1)

            def again(write):
                check(root, least, kind)  # noqa: B023
                write(train(root, None, kind).hex())  # noqa: B023

            lines, status = in_child(again)
            where = f"{kind}, {when} operation {point} ({operations[point]})"
            assert status == 0, f"{where}: {lines}"
            assert lines == [weights], f"{where}: other weights"
            assert kept(root) == expected, f"{where}: other checkpoints"
            audit.clean(pp.open(root))
            assert audit.audit(pp.open(root), deep=True).clean, where
            shutil.rmtree(root)
            points += 1
    shutil.rmtree(base)
    print(f"{kind}: killed at {points} points ({len(operations)} file operations, before and after each)")


# --- power --------------------------------------------------------------------------------------------------------


class Recording(FileOps):
    """Writes down every operation, with what it wrote."""

    def __init__(self):
        self.log, self.paths = [], {}

    def create(self, path, *at):
        fd = super().create(path, *at)
        self.paths[fd] = path
        self.log.append(("create", path))
        return fd

    def write(self, fd, data):
        done = super().write(fd, data)
        self.log.append(("write", self.paths[fd], bytes(data[:done])))
        return done

    def fsync(self, fd):
        super().fsync(fd)
        self.log.append(("fsync", self.paths[fd]))


for _name in ("mkdir", "fsync_dir", "rename", "link", "unlink", "rmdir"):

    def _record(self, *arguments, _name=_name):
        getattr(FileOps, _name)(self, *arguments)
        self.log.append((_name, *(path for path in arguments if isinstance(path, Path))))

    setattr(Recording, _name, _record)


@dataclass
class Inode:
    now: bytes = b""
    durable: bytes = b""


@dataclass
class Disk:
    """Names and contents as programs see them, and as they are on the platters."""

    names: dict = field(default_factory=dict)  # path -> Inode, or None for a directory
    pending: dict = field(default_factory=dict)  # directory -> changes of names since its last fsync
    durable: dict = field(default_factory=dict)

    def change(self, path, inode):
        """``inode`` is an Inode, None for a directory, or "gone"."""
        self.pending.setdefault(path.parent, []).append((path, inode))
        if inode == "gone":
            del self.names[path]
        else:
            self.names[path] = inode

    def apply(self, operation):
        match operation:
            case ("mkdir", path):
                self.change(path, None)
            case ("create", path):
                self.change(path, Inode())
            case ("write", path, data):
                self.names[path].now += data
            case ("fsync", path):
                self.names[path].durable = self.names[path].now
            case ("rename", source, target):
                inode = self.names[source]
                self.change(target, inode)
                self.change(source, "gone")
            case ("link", source, target):
                self.change(target, self.names[source])
            case ("unlink" | "rmdir", path):
                self.change(path, "gone")
            case ("fsync_dir", path):
                for child, inode in self.pending.pop(path, []):
                    self._settle(self.durable, child, inode)

    @staticmethod
    def _settle(names, path, inode):
        if inode == "gone":
            names.pop(path, None)
        else:
            names[path] = inode

    def after_power_cut(self, chance):
        """Names and contents that may be found afterwards: each unsynced thing is there with a chance."""
        names = dict(self.durable)
        for changes in self.pending.values():
            for path, inode in changes:  # a journalling file system keeps the order of one directory's changes
                if not chance():
                    break
                self._settle(names, path, inode)
        files = {}
        for path, inode in names.items():
            if inode is None:
                files[path] = None
            else:
                lost = inode.now[len(inode.durable) :]
                files[path] = inode.durable + (lost if chance() else b"\0" * (len(lost) if chance() else 0))
        return files


def materialise(files, recorded, root):
    """Make the files below ``root``; those whose directory is lost are lost with it."""
    root.mkdir()
    for path in sorted(files, key=lambda path: len(path.parts)):
        target = root / path.relative_to(recorded)
        if not target.parent.is_dir() or target == root:
            continue
        if files[path] is None:
            target.mkdir()
        else:
            target.write_bytes(files[path])


def power(kind):
    base = Path(tempfile.mkdtemp())
    recorded = base / "recorded"
    recording = Recording()
    acknowledged = []
    weights = train(recorded, recording, kind, lambda epoch: acknowledged.append((len(recording.log), epoch)))
    expected = kept(recorded)
    dice = random.Random(5)
    chances = {
        "nothing unsynced": lambda: False,
        "everything": lambda: True,
        "some": lambda: dice.random() < 0.5,
        "most": lambda: dice.random() < 0.8,
    }
    disk = Disk()
    states = 0
    for number, operation in enumerate(recording.log):
        disk.apply(operation)
        if operation[0] == "mkdir" and operation[1] == recorded:
            disk.durable[recorded] = None
        least = max((epoch for length, epoch in acknowledged if length <= number + 1), default=-1)
        for name, chance in chances.items():
            root = base / "cut"
            materialise(disk.after_power_cut(chance), recorded, root)
            try:
                check(root, least, kind)
                if number % 7 == 0:
                    assert train(root, None, kind) == weights, "other weights"
                    assert kept(root) == expected, "other checkpoints"
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
