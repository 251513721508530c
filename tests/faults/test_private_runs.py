"""What one user, or a bad disk, does not let be read is left out and named, and keeps nobody from the rest."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import peakpoint as pp
from commands import in_process
from peakpoint.errors import StoreError
from peakpoint.production.promotion import promote
from peakpoint.production.proposal import propose
from peakpoint.reports import changelog, evaluation
from peakpoint.repository import audit
from peakpoint.repository.root import Repository
from peakpoint.store import LocalStore
from training import checkpointer

COMMANDS = {
    "ls": (0, ["ls"]),
    "ls --json": (23, ["ls", "--json"]),
    "audit": (23, ["audit"]),
    "audit --deep": (23, ["audit", "--deep"]),
    "changelog": (23, ["changelog"]),
    "report": (23, ["report"]),
    "select": (23, ["select", "--max", "acc"]),
    "undo": (23, ["undo", "--list"]),
    "undo --empty": (23, ["undo", "--empty", "--yes"]),
}
# who may not read what Python is made of imports everything before
CHILD = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import importlib, sqlalchemy.dialects.sqlite, rich.table, peakpoint.catalogue.catalogue, peakpoint.catalogue.access
from peakpoint.cli.commands import ENTRIES
for entry in ENTRIES.values():
    importlib.import_module("peakpoint.cli." + entry.function.partition(":")[0])
from commands import in_process
root, commands = sys.argv[2], json.loads(sys.argv[3])
for arguments in commands.values():  # as root, for all that is imported by then
    in_process(arguments[0], root, *arguments[1:])
os.setgid(65534); os.setuid(65534)
done = {name: in_process(arguments[0], root, *arguments[1:]) for name, arguments in commands.items()}
print(json.dumps({name: [result.returncode, result.stdout, result.stderr] for name, result in done.items()}))
"""


def save(root, run, accuracy):
    with checkpointer(root, run=run, keep=[pp.Best("acc", "max")]) as ckpt:
        ckpt.report(acc=accuracy)


@pytest.fixture
def root(tmp_path):
    for run, accuracy in (("mine", 0.5), ("theirs", 0.9)):
        save(tmp_path / "runs", run, accuracy)
    return tmp_path / "runs"


PRIVATE = {
    "run": "runs/theirs",
    "record": "runs/theirs/run.json",
    "journal": "runs/theirs/journal",
    "segment": "runs/theirs/journal/000001.jsonl",
    "checkpoints": "runs/theirs/checkpoints",
    "checkpoint": "runs/theirs/checkpoints/*",
    "manifest": "runs/theirs/checkpoints/*/manifest.json",
    "weights": "runs/theirs/checkpoints/*/model.safetensors",
}
# what a command does not look at is nothing that it could miss
UNSEEN = {
    "record": {"changelog", "report", "undo", "undo --empty"},
    "journal": {"undo", "undo --empty"},
    "segment": {"undo", "undo --empty"},
    "checkpoint": {"changelog"},
    "manifest": {"changelog", "undo", "undo --empty"},
    "weights": {*COMMANDS} - {"audit --deep"},
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("what", PRIVATE)
def test_what_only_its_owner_may_read_is_left_out_and_named(root, tmp_path, what):
    for place in (tmp_path, *tmp_path.parents[:-2]):  # which pytest keeps to itself
        place.chmod(0o755)
    for place in root.glob(PRIVATE[what]):
        place.chmod(0o700 if place.is_dir() else 0o600)
    commands = {name: arguments for name, (_, arguments) in COMMANDS.items()}
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(sys.path), str(root), json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    for name, (code, stdout, stderr) in json.loads(done.stdout).items():
        if name in UNSEEN.get(what, ()):
            assert code == 0, (name, stdout, stderr)
            continue
        assert code == COMMANDS[name][0], (name, stdout, stderr)
        assert "theirs" in stdout + stderr, name
        assert "Permission denied" in " ".join((stdout + stderr).split()), name
        assert "mine" in stdout or "undo" in name or "audit" in name, (name, stdout)


class BadDisk(LocalStore):
    """Refuses everything below a key."""

    bad = "runs/theirs"

    def _refuse(self, key):
        if key == self.bad or key.startswith(f"{self.bad}/"):
            raise StoreError(5, f"cannot read {key}: Input/output error")

    def get(self, key, begin=0, end=None, **limits):
        self._refuse(key)
        return super().get(key, begin, end, **limits)

    def size(self, key):
        self._refuse(key)
        return super().size(key)

    def _entries(self, prefix):
        self._refuse(prefix)
        return super()._entries(prefix)


@pytest.mark.parametrize("bad", ["runs/theirs", "runs/theirs/journal", "runs/theirs/checkpoints"])
def test_a_bad_disk_hides_one_run_and_no_other(root, bad):
    store = BadDisk(root)
    store.bad = bad
    repository = Repository(store)
    result = audit.audit(repository, deep=True)
    assert not result.clean
    assert [(one.kind, one.where) for one in result.findings if one.kind == "damage"] == []
    assert {one.where for one in result.of_kind("unread")} == {"runs/theirs"}
    assert result.checkpoints >= 1
    report = evaluation.evaluate(repository)
    assert ([run.name for run in report.runs], list(report.unread)) == (["mine"], ["theirs"])
    damage = [entry for entry in changelog.entries(repository) if entry.kind == "damage"]
    assert [entry.run for entry in damage] == ["theirs"]
    with pytest.warns(pp.PeakpointWarning, match=r"run 'theirs' is left out: .*Input/output error"):
        assert [one.run for one in pp.select(repository, by={"acc": "max"})] == ["mine"]
    audit.clean(repository)


@pytest.mark.parametrize("bad", ["aliases", "aliases/champion", "aliases/family"])
def test_aliases_that_cannot_be_read_hide_nothing_else(root, bad):
    for alias in ("champion", "family/champion", "other"):
        promote(propose(pp.open(root), "mine@latest", alias), "good", force=True)
    store = BadDisk(root)
    store.bad = bad
    result = audit.audit(Repository(store))
    assert {(one.kind, one.where) for one in result.findings} >= {("unread", bad)}
    assert not [one for one in result.findings if one.kind == "unread" and one.where != bad]
    entries = changelog.entries(Repository(store))
    assert len([entry for entry in entries if entry.kind == "damage"]) == 1
    assert len([entry for entry in entries if entry.kind == "promoted"]) == (0 if bad == "aliases" else 2)
    with pytest.warns(pp.PeakpointWarning, match="is left out: .*Input/output error"):
        assert len(list(pp.select(Repository(store), by={"acc": "max"}))) == 2


def test_a_run_that_is_a_link_to_nothing_is_none(root):
    (root / "runs/link").symlink_to(root / "nothing")
    for name, (_, arguments) in COMMANDS.items():
        done = in_process(arguments[0], root, *arguments[1:])
        assert done.returncode == 0, (name, done)
    assert "runs/link" in in_process("audit", root).stdout


class Vanishing(LocalStore):
    """Loses a run right after the runs were listed."""

    def children(self, prefix):
        found = super().children(prefix)
        if prefix == "runs" and "theirs/" in found:
            shutil.rmtree(self.path("runs/theirs"))
        return found


@pytest.mark.parametrize(
    "read",
    [
        lambda repository: [run.name for run in evaluation.evaluate(repository).runs],
        lambda repository: sorted({entry.run for entry in changelog.entries(repository)}),
        lambda repository: [one.run for one in pp.select(repository, by={"acc": "max"})],
        lambda repository: ["mine"] if audit.audit(repository).clean else [],
    ],
    ids=["report", "changelog", "select", "audit"],
)
def test_a_run_that_goes_meanwhile_is_not_missed(root, read):
    assert read(Repository(Vanishing(root))) == ["mine"]
