"""Made the fixtures of format 1: a small repository with every kind of record and state that revision 46e833b writes.

It was run once, with that revision, as ``PYTHONPATH=src:tests python tests/data/make_format_1.py``. The data are never
made again, and nothing runs this: it stays so that it can be read what the data are. Later releases read them; see
tests/format/test_fixtures.py. It wrote

- ``format-1/``, the repository,
- ``format-1.tensors.json``, every tensor of every checkpoint as it was when it was saved,
- ``format-1.sha256``, the digest of each file of the repository.
"""

import contextlib
import errno
import getpass
import hashlib
import itertools
import json
import os
import platform
import random
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import types
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from peakpoint.policy import read_policies
from peakpoint.retention import Thinning

import format_state
import peakpoint as pp
from peakpoint import aliases, clock, hooks, promotion, release, report, retention, signing, upkeep, validating
from peakpoint.store import FileOps, LocalStore

HERE = Path(__file__).parent
PLACE = Path("/tmp/example")  # stands in records, as that of what was imported
ROOT = PLACE / "runs"
CENTURY = timedelta(days=36525)
DAY = timedelta(days=1)
tensors = {}  # of every checkpoint, by its ref


# --- nothing in the data tells of the machine, and little is left to chance -----------------------------------------


class Clock:
    """Goes on by a second each time."""

    def __init__(self):
        self._now = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def now(self, zone):
        self._now += timedelta(seconds=1)
        return self._now


def settle():
    """Put fixed values in the place of what the system tells."""
    dice, ticks = random.Random(1), itertools.count()
    clock.datetime = Clock()
    secrets.token_hex = lambda size: dice.randbytes(size).hex()
    time.perf_counter = lambda: next(ticks) / 1000
    os.getpid = lambda: 4242
    socket.gethostname = lambda: "example"
    getpass.getuser = lambda: "someone"
    platform.platform = lambda: "a platform"
    validating._cpu = lambda: "a processor"
    report.script_version = validating.code_version = lambda *_: "46e833b" + 33 * "0"
    os.environ["PEAKPOINT_CATALOGUE"] = str(PLACE / "catalogue.sqlite")
    threading.excepthook = lambda _: None  # of savers that are killed
    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that many trainings use
    torch.manual_seed(1)
    warnings.simplefilter("ignore", pp.PeakpointWarning)


def full():
    return OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """Stands for the end of the process."""


class Trouble(FileOps):
    """Fails before an operation on a path, and stays dead when it was killed; a write is cut in half."""

    def __init__(self, operation, where, error=None):
        self.operation, self.where, self.error, self.dead = operation, where, error, False

    def check(self, operation, *arguments):
        if self.dead:
            raise Killed
        paths = [str(Path(f"/proc/self/fd/{one}").readlink() if isinstance(one, int) else one) for one in arguments]
        if operation == self.operation and any(self.where in path for path in paths):
            self.operation = ""
            self.dead = self.error is None
            raise Killed if self.dead else self.error


def _checked(name, paths):
    def method(self, *arguments):
        self.check(name, *arguments[:paths])
        return getattr(FileOps, name)(self, *arguments)

    return method


for _name, _paths in (
    ("mkdir", 1),
    ("create", 1),
    ("fsync", 1),
    ("rename", 2),
    ("link", 2),
    ("unlink", 1),
    ("rmdir", 1),
):
    setattr(Trouble, _name, _checked(_name, _paths))


class Torn(FileOps):
    """Writes half of a line of the journal, and says that the disk is full."""

    def __init__(self, text):
        self.text, self.error = text, full()

    def write(self, fd, data):
        if self.text in bytes(data) and self.error is not None:
            error, self.error = self.error, None
            os.write(fd, data[: len(data) // 2])
            raise error
        return super().write(fd, data)


def killed(act, *arguments, **options):
    """Do something that is killed."""
    try:
        act(*arguments, **options)
    except Killed:
        return
    raise AssertionError(f"{act} was not killed")


# --- helpers --------------------------------------------------------------------------------------------------------


def opened(ops=None):
    return pp.open(LocalStore(ROOT, ops))


def run_of(name, ops=None):
    return opened(ops).run(name)


def at(name, step):
    """The manifest of the newest checkpoint at a step."""
    return run_of(name).find_manifest(f"{name}:{step}")


def checkpointer(run, state, keep, ops=None, **options):
    options = {"preempt": None, "announce": [].append, **options}
    return pp.Checkpointer(LocalStore(ROOT, ops), run=run, state=state, keep=keep, **options)


def note(state, ckpt, outcome):
    """Note the tensors of what is being saved."""
    plain = {part: value.state_dict() if hasattr(value, "state_dict") else value for part, value in state.items()}
    told = {part: format_state.flat(value) for part, value in plain.items()}
    tensors[f"{ckpt.run}/{outcome.name}"] = {part: found for part, found in told.items() if found}


def reported(ckpt, state, step=None, **metrics):
    outcome = ckpt.report(metrics, step=step)
    if outcome.saved:
        note(state, ckpt, outcome)
    ckpt.wait()


def train(state):
    state["optimizer"].zero_grad()
    data = torch.randn(8, 3) + random.random() + np.random.rand()  # noqa: NPY002
    (state["model"](data) - 1).pow(2).mean().backward()
    state["optimizer"].step()
    state["notes"]["seen"].append(len(state["notes"]["seen"]))


# --- the runs -------------------------------------------------------------------------------------------------------


def digits():
    """A training: rules that remove and drop, branches, a failed save, every way to end."""
    keep = [pp.Best("accuracy", "max", parts="model"), pp.Best("accuracy", "max", smooth=2), pp.Last(1)]
    state = format_state.digits()
    with checkpointer("digits", state, keep) as ckpt:
        for epoch in ckpt.epochs(3):
            for batch in ckpt.batches([0, 1]):
                train(state)
                if epoch == 1 and batch == 0:
                    reported(ckpt, state, accuracy=0.2, loss=float("nan"))
                    asked = ckpt.save("before the schedule changes")
                    note(state, ckpt, asked)
                    ckpt.wait()
            reported(ckpt, state, accuracy=(0.55, 0.3, 0.4)[epoch], loss=(1.0, float("inf"), -float("inf"))[epoch])
    state = format_state.digits()
    stop = pp.EarlyStopping("accuracy", "max", goal=0.65)
    trouble = Trouble("create", "-model.safetensors", full())
    rules = [*keep, pp.Every(epochs=5)]
    with checkpointer("digits", state, rules, trouble, stop=stop, resume=f"digits/{asked.name}") as ckpt:
        for epoch in ckpt.epochs(5):
            for _ in ckpt.batches([0, 1]):
                train(state)
            with contextlib.suppress(pp.SaveFailedError):  # the next report writes it again
                reported(ckpt, state, accuracy=0.4 + 0.1 * epoch, loss=0.5)
    state = format_state.digits()
    with contextlib.suppress(ValueError), checkpointer("digits", state, keep) as ckpt:
        for _ in ckpt.epochs(9):
            train(state)
            reported(ckpt, state, accuracy=0.58, loss=0.25)
            raise ValueError("the data has ended")
    state = format_state.digits()
    try:
        with checkpointer("digits", state, keep, preempt=pp.Preempt()) as ckpt:
            for _ in ckpt.epochs(9):
                train(state)
                signal.raise_signal(signal.SIGTERM)
                reported(ckpt, state, accuracy=0.62, loss=0.2)
    except SystemExit:
        note(state, ckpt, run_of("digits").latest())
    run = run_of("digits")
    run.record("digits@latest", {"accuracy": 0.95, "drift": float("nan")}, part="model", source="evaluate.py")
    run.pin("digits@latest", "for the paper")
    run.pin("digits:3", "a mistake")
    run.unpin("digits:3")


def kinds():
    """The typed state."""
    state = {"values": format_state.values(), "tensors": format_state.tensors()}
    with checkpointer("kinds", state, [pp.Last(1), pp.Every(minutes=60, keep=24), pp.Budget("1 GB")]) as ckpt:
        reported(ckpt, state, step=1)


def frozen():
    """A file that checkpoints share; the one that wrote it first is archived."""
    model = torch.nn.ParameterDict({"base": torch.arange(16_500) / 4, "head": torch.ones(2)})
    model["base"].requires_grad_(False)
    state = {"model": model, "optimizer": torch.optim.SGD([model["head"]], lr=0.1)}
    with checkpointer("frozen", state, [pp.Last(9)]) as ckpt:
        for step in (1, 2):
            model["head"].data += 1
            reported(ckpt, state, step=step)
    upkeep.archive(run_of("frozen"), [at("frozen", 1)])


def small(step, size=8):
    return {"model": {"w": torch.linspace(0, 1, size) * (1 + step / 64)}, "extra": {"v": torch.full((3,), float(step))}}


def filled(name, count):
    """A run with a checkpoint for each of some steps."""
    state = small(0)
    with checkpointer(name, state, [pp.Last(99)]) as ckpt:
        for step in range(1, count + 1):
            for part, values in small(step).items():
                for key, value in values.items():
                    state[part][key].copy_(value)
            reported(ckpt, state, step=step, score=step / 10)


def thin(name, step, *, parts=("extra",), until=None, ops=None):
    """Drop parts of one checkpoint."""
    run, drop = run_of(name, ops), Thinning(at(name, step), parts, "nobody needs them")
    with upkeep.writing(run, "peakpoint keep") as events:
        ends = None if until is None else events.now() + until
        retention.thin(run.store, events, [drop], by="someone on example", until=ends)


def bin_():
    """The trash, and dropped parts."""
    filled("bin", 5)
    run = run_of("bin")
    upkeep.remove(run, [at("bin", 1)], "its time is over", undo_for=DAY)
    upkeep.remove(run, [at("bin", 2)], "a mistake, perhaps", undo_for=CENTURY)
    thin("bin", 3)
    thin("bin", 4, until=CENTURY)
    five = at("bin", 5)
    upkeep.remove(run, [five], "really a mistake", undo_for=DAY)
    upkeep.undo(run, [five.name])
    thin("bin", 5, until=DAY)
    upkeep.undo(run, [five.name])
    thin("bin", 5, until=DAY)


def mixed():
    """Archived checkpoints beside plain ones; what else can become of them."""
    filled("mixed", 7)
    thin("mixed", 6)
    run = run_of("mixed")
    upkeep.archive(run, [at("mixed", step) for step in (1, 2, 3, 4, 5, 6)])
    upkeep.remove(run, [at("mixed", 1)], "its pack is needed", undo_for=timedelta(0))
    upkeep.remove(run, [at("mixed", 2)], "archived, and in the trash", undo_for=CENTURY)
    thin("mixed", 3)
    thin("mixed", 4, until=CENTURY)
    upkeep.restore(run, [at("mixed", 5)])


def packed():
    """A run of which everything is archived, packed in every way."""
    state = {
        "model": {
            "line": torch.zeros(512),
            "walk": torch.randn(256).double(),
            "noise": torch.zeros(96),
            "half": torch.randn(64).bfloat16(),
            "pair": torch.randn(16, dtype=torch.complex64),
            "sparse": torch.zeros(256),
            "sparse noise": torch.zeros(256),
            "sparse line": torch.zeros(256),
            "count": torch.zeros(8, dtype=torch.int64),
            "mask": torch.zeros(16, dtype=torch.bool),
            "same": torch.ones(16),
        }
    }
    model = state["model"]
    start, slope, mask = torch.randn(512), torch.randn(512), torch.rand(256) < 0.5
    weights = torch.randn(256)
    with checkpointer("packed", state, [pp.Last(99)]) as ckpt:
        for step in range(1, 5):
            model["line"].copy_(start + step * slope)
            model["walk"].mul_(1 + 1e-9 * torch.randn(256).double())
            model["noise"].copy_(torch.randn(96) * 10.0 ** torch.randint(-30, 30, (96,)))
            model["half"].mul_(1.01)
            model["pair"].mul_(1.0001)
            model["sparse"].copy_(weights * (1 + 1e-6 * torch.randn(256)) * mask)
            model["sparse noise"].copy_(
                torch.randn(256) * 10.0 ** torch.randint(-30, 30, (256,)) * (torch.rand(256) < 0.5)
            )
            model["sparse line"].copy_((start[:256] + step * slope[:256]) * mask)
            model["count"].add_(step)
            model["mask"].logical_not_()
            reported(ckpt, state, step=step, score=step / 10)
    upkeep.archive(run_of("packed"))


def old():
    """What another tool has saved."""
    source = PLACE / "old"
    source.mkdir()
    for epoch in (3, 4):
        weights = {"w": torch.full((4,), float(epoch)), "b": torch.tensor([0.5])}
        content = {"model_state_dict": weights, "epoch": epoch, "val_acc": epoch / 10, "config": {"lr": 0.1}}
        torch.save(content, source / f"epoch_{epoch}.pth")
        os.utime(source / f"epoch_{epoch}.pth", (1767225600 + epoch,) * 2)
    (source / "log.csv").write_text("epoch,val_acc\n2,0.1\n3,0.3\n4,0.4\n5,nan\n")
    pp.import_checkpoints(source, ROOT, run="old", metrics=source / "log.csv")
    for manifest in run_of("old").manifests():
        weights = {"w": torch.full((4,), float(manifest.epoch)), "b": torch.tensor([0.5])}
        tensors[f"old/{manifest.name}"] = {"model": format_state.flat(weights)}


def soup():
    """A checkpoint made from others."""
    members = [at("mixed", step) for step in (5, 7)]
    made = pp.soup([f"mixed/{one.id}" for one in members], root=ROOT, why="to see whether it is better")
    mean = {"w": torch.stack([small(step)["model"]["w"].double() for step in (5, 7)]).mean(0).float()}
    tensors[made.checkpoint.ref] = {"model": format_state.flat(mean)}


def torn():
    """A journal with a line that was torn in its middle, and one at its end."""
    state = small(1)
    with checkpointer("torn", state, [pp.Last(9)], Torn(b'"report":2,')) as ckpt:
        reported(ckpt, state, step=1)
        try:
            ckpt.report(step=2)
        except pp.Error:
            reported(ckpt, state, step=3)
    run_of("torn").pin("torn:1", "to be torn")
    last = max((ROOT / "runs/torn/journal").iterdir())
    last.write_bytes(last.read_bytes()[:-40])


def cut():
    """What processes that were killed have left."""
    filled("cut", 5)
    upkeep.remove(run_of("cut"), [at("cut", 5)], "a mistake", undo_for=CENTURY)
    state = small(6)
    ckpt = checkpointer("cut", state, [pp.Last(99)], Trouble("link", "manifest.json"))
    ckpt.resume()
    ckpt.report(step=6)
    ckpt._saver.finish()
    ckpt._hold.release()
    name = "unlink", f"{at('cut', 1).name}/manifest.json"
    killed(upkeep.remove, run_of("cut", Trouble(*name)), [at("cut", 1)], "killed before anything went")
    name = "unlink", f"{at('cut', 2).name}/manifest.json"
    killed(
        upkeep.remove, run_of("cut", Trouble(*name)), [at("cut", 2)], "killed on the way to the trash", undo_for=CENTURY
    )
    name = "unlink", f"{at('cut', 3).name}/state.json"
    killed(upkeep.archive, run_of("cut", Trouble(*name)), [at("cut", 3)])
    name = "unlink", f"{at('cut', 4).name}/extra.safetensors"
    killed(thin, "cut", 4, ops=Trouble(*name))
    trashed = upkeep.in_trash(run_of("cut"))[0].manifest.name
    killed(upkeep.undo, run_of("cut", Trouble("link", f"{trashed}/manifest.json")), [trashed])


# --- production -----------------------------------------------------------------------------------------------------

POLICY = """\
format = 1

[champion]
select = "accuracy > 0.5 and run = 'digits'"
rank = ["max accuracy", "min size"]
may_promote = ["someone"]
keep_last = 1

[champion.within_se]
n_eval = 1000

[champion.validation]
with = "task:evaluate"
model = "task:build"
metrics = ["accuracy"]
golden = "golden.safetensors"
tolerance = 0.25
budgets = { parameters = 100, size_mb = 1 }
checks = ["task:bias"]
signature = { output = "F32[*, 3]" }
max_age = "30d"
timeout = "1h"

[champion.improvement]
metric = "accuracy"
mode = "max"
minimum = 0.01

[champion.signing]
public_key = "signer.pub"

[[champion.hooks]]
command = ["true"]

["digits/candidate"]
rank = ["min loss"]
"""


def task():
    """The functions that validations name."""
    module = sys.modules["task"] = types.ModuleType("task")
    model = format_state.digits()["model"]
    module.build = lambda: (model, torch.zeros(1, 3))
    answers = iter((0.75, 0.75, 0.875))
    module.evaluate = lambda _: pp.Evaluated(
        metrics={"accuracy": next(answers)}, predictions=[0, 1, 2, 1], labels=[0, 1, 2, 2], examples=list("abcd")
    )
    module.worse = lambda _: {"accuracy": 0.1, "loss": float("inf")}
    module.bias = lambda candidate: {"bias": candidate.model[1].bias.tolist(), "nan": float("nan")}


def validate(repository, ref, wanted, *, alias, timeout, progress):
    return pp.validate(
        ref,
        root=repository.store,
        evaluate=wanted.evaluate,
        model=wanted.model,
        metrics=wanted.metrics,
        tolerance=wanted.tolerance,
        golden=wanted.golden,
        agreement=wanted.agreement,
        budgets=wanted.budgets,
        checks=wanted.checks,
        signature=wanted.signature,
        against=alias,
        progress=progress,
    )


def promote(ref, alias, why, **options):
    return promotion.promote(promotion.propose(opened(), ref, alias), why, force=True, **options)


def production():
    """Validations, aliases, a release that promotes and one that is refused, signatures, hooks."""
    task()
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (ROOT / "signer.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    private = PLACE / "signer.pem"
    encoding, pkcs = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(encoding, pkcs, serialization.NoEncryption()))
    (ROOT / "production.toml").write_text(POLICY)
    safetensors.torch.save_file(
        {"inputs": torch.eye(3), "labels": torch.tensor([0, 1, 2])}, ROOT / "golden.safetensors"
    )
    repository, policies = opened(), read_policies(opened().store)
    first = repository.find_manifest("digits:epoch=3")
    signing.sign(repository.store, first, private_key=private)
    signing.sign(repository.store, at("mixed", 6), private_key=private)
    promote(f"digits/{first.id}", "champion", "the first")
    policy = policies.of("champion")
    release.release(repository, "champion", policies, validate, private_key=private)  # is refused: it is not better
    found = repository.find("digits@best:accuracy")
    validate(repository, found.ref, policy.wanted, alias="champion", timeout=None, progress=lambda _: None)
    release.release(repository, "champion", policies, validate, why="every Monday", private_key=private)
    promotion.rollback(repository, "champion", "it is slow")
    hooks.tell(repository.store, aliases.head(repository.store, "champion"), policy)
    # a failed check; a validation of a checkpoint that is gone since; one that was killed
    pp.validate("digits@latest", root=ROOT, model="task:build", evaluate="task:worse")
    gone = at("torn", 1)
    pp.validate(f"torn/{gone.id}", root=ROOT, budgets={"size_mb": 1})
    upkeep.remove(run_of("torn"), [gone], "validated, and gone")
    killed(
        pp.validate,
        f"torn/{run_of('torn').latest().id}",
        root=LocalStore(ROOT, Trouble("link", "000001.json")),
        evaluate=lambda _: pp.Evaluated(metrics={}, predictions=[1, 2], labels=[1, 1]),
    )
    # other aliases: of a family and retired; lost to another; killed before and after the record
    promote("digits@latest", "digits/candidate", "next")
    promotion.retire(repository, "digits/candidate", "not next")
    promote("packed@latest", "packed/best", "it is archived")
    late = promotion.propose(repository, "packed:1", "packed/best")
    promote("packed:3", "packed/best", "another is faster")
    with contextlib.suppress(pp.ConflictError):
        promotion.promote(late, "too late", force=True)
    for alias, operation, where in (("staging", "link", "staging/000001.json"), ("canary", "unlink", "000001.json")):
        proposal = promotion.propose(opened(Trouble(operation, where)), "mixed:7", alias)
        killed(promotion.promote, proposal, "killed", force=True)


def main():
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    settle()
    for make in (digits, kinds, frozen, bin_, mixed, packed, old, soup, torn, cut, production):
        make()
    data = HERE / "format-1"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(ROOT, data)
    files = sorted(path for path in data.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(data)}\n" for path in files]
    (HERE / "format-1.sha256").write_text("".join(lines))
    text = json.dumps(tensors, indent=1, sort_keys=True)
    (HERE / "format-1.tensors.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
