"""What is removed for good frees a disk without a byte or an inode left, and its reason is on record afterwards."""

import contextlib
import errno
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
import torch

import peakpoint as pp
from archived_runs import epochs, run_of, trained
from commands import command, in_process
from peakpoint.errors import StoreError
from peakpoint.format.events import Removed
from peakpoint.repository import audit, maintenance, removal
from peakpoint.repository.journal import Journal
from peakpoint.repository.run import Run
from peakpoint.rules.retention import Removal
from peakpoint.store import FileOps, LocalStore
from training import checkpointer

DAY = timedelta(days=1)


class Full(FileOps):
    """A disk that lacks room for ``lacking``, the bytes or the inodes of files, until ``removals`` files were removed.

    The last page of a file has room for a few bytes more.
    """

    def __init__(self, lacking="bytes", error=errno.ENOSPC, removals=1):
        self.lacking, self.error, self.removals, self.left = lacking, error, removals, 20

    def check(self, needed):
        if self.removals > 0 and needed == self.lacking:
            raise OSError(self.error, os.strerror(self.error))

    def create(self, path, *at):
        self.check("inodes")
        return super().create(path, *at)

    def write(self, fd, data):
        if self.left:
            data, self.left = data[: self.left], 0
        else:
            self.check("bytes")
        return super().write(fd, data)

    def unlink(self, path, *at):
        super().unlink(path, *at)
        self.removals -= 0 if path.name.startswith(".tmp-") else 1


def on(ops, root):
    return Run(LocalStore(root, ops), "r")


def reasons(root):
    return [event.reason for event in run_of(root).events() if isinstance(event, Removed)]


disks = pytest.mark.parametrize(
    "ops",
    [
        Full,
        lambda: Full("bytes", errno.EDQUOT),
        lambda: Full("inodes"),
        lambda: Full("bytes", removals=4),
    ],
    ids=["no byte", "no byte of the quota", "no inode", "no byte for long"],
)


@disks
def test_a_removal_by_hand_frees_it(tmp_path, ops):
    trained(tmp_path, epochs=3)
    run = on(ops(), tmp_path)
    assert maintenance.remove(run, run.manifests()[:2], "too many") == []
    assert epochs(tmp_path) == [2]
    assert reasons(tmp_path) == ["too many", "too many"]
    assert "by" in json.loads(command("explain", tmp_path, "r:epoch=0", "--json"))["removed"]
    assert audit.audit(pp.open(tmp_path), deep=True).findings == []


@disks
def test_rules_free_it_and_are_in_force(tmp_path, ops):
    trained(tmp_path, epochs=4)
    run = on(ops(), tmp_path)
    assert maintenance.apply_plan(run, run.plan([pp.Last(1)]), [pp.Last(1)]) == []
    assert epochs(tmp_path) == [3]
    assert len(reasons(tmp_path)) == 3
    assert [rule.text for rule in run_of(tmp_path).rules()] == ["last:1"]
    assert audit.audit(pp.open(tmp_path), deep=True).findings == []


@disks
def test_the_trash_is_emptied(tmp_path, ops):
    trained(tmp_path, epochs=3)
    run = on(ops(), tmp_path)
    maintenance.remove(run_of(tmp_path), run.manifests()[:2], "too many", undo_for=DAY)
    assert len(maintenance.empty_trash(run)) == 2
    assert maintenance.in_trash(run) == []
    assert audit.audit(pp.open(tmp_path), deep=True).findings == []


def by_hand(run):
    maintenance.remove(run, run.manifests()[:1], "too many", undo_for=DAY)


def by_rules(run):
    maintenance.apply_plan(run, run.plan([pp.Last(1)]), None, undo_for=DAY)


@disks
@pytest.mark.parametrize("way", [by_hand, by_rules])
def test_the_trash_needs_room_and_the_way_out_is_named(tmp_path, ops, way):
    trained(tmp_path, epochs=3)
    with pytest.raises(StoreError, match=r"nothing was removed.* with --undo-for 0, needs no free space"):
        way(on(ops(), tmp_path))
    assert epochs(tmp_path) == [0, 1, 2]
    assert reasons(tmp_path) == []
    assert audit.audit(pp.open(tmp_path), deep=True).findings == []


def test_a_disk_that_is_filled_again_at_once(tmp_path):
    trained(tmp_path, epochs=3)
    run = on(Full(removals=99), tmp_path)
    (failure,) = maintenance.remove(run, run.manifests()[:2], "too many")
    assert "the removal is not recorded in the journal" in failure
    assert epochs(tmp_path) == [2]
    told = in_process("explain", tmp_path, "r:epoch=0")
    assert "The journal does not say when or why" in told.stdout
    assert "not considered" in told.stderr
    assert json.loads(in_process("explain", tmp_path, "r:epoch=0", "--json").stdout)["removed"] is None
    found = audit.audit(pp.open(tmp_path), deep=True).findings
    assert [(one.kind, "is missing, although the journal says" in one.what) for one in found] == [("damage", True)] * 2


def test_a_removal_that_was_cut_short_before_its_record(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    first = run.manifests()[0]
    removal.delete(run.store, first)
    assert "The journal does not say when or why" in in_process("explain", tmp_path, "r:epoch=0").stdout
    with checkpointer(tmp_path, keep=[pp.Last(99)], resume="never") as ckpt:
        ckpt.report(step=9)
    assert [one.kind for one in audit.audit(pp.open(tmp_path), deep=True).findings] == ["damage"]
    command("rm", tmp_path, f"r/{first.name}", "--undo-for", "0", "--yes")
    assert audit.audit(pp.open(tmp_path), deep=True).findings == []
    assert "removed by hand" in command("explain", tmp_path, "r:epoch=0")


def test_what_is_protected_before_the_record_stays(tmp_path):
    trained(tmp_path, epochs=3)
    run = on(Full(), tmp_path)
    first, second, _ = run.manifests()
    answers = [set(), {second.id}]  # asked before the first removal, and when it has made room
    journal = Journal(run.store, "r", lambda: datetime(2026, 3, 1, tzinfo=UTC))
    removals = [Removal(first, "why"), Removal(second, "why")]
    failures = removal.remove(run.store, journal, removals, by="a test", protected=lambda: answers.pop(0))
    (failure,) = failures.values()
    journal.close()
    assert failure.startswith(f"{second.name} was not removed")
    assert epochs(tmp_path) == [1, 2]


def test_an_event_that_must_be_on_record_now_is_refused(tmp_path):
    trained(tmp_path, epochs=1)
    with pytest.raises(StoreError, match="No space left"):
        on(Full(removals=9), tmp_path).pin("r:epoch=0", "for the paper")
    assert run_of(tmp_path).pinned() == {}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill(root):
    with (root / "fill").open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def test_a_real_disk_is_freed(small_disk):
    root = small_disk / "runs"
    with checkpointer(root, state={"w": torch.zeros(50_000)}) as ckpt:
        for step in range(1, 7):
            ckpt.report(step=step)
            ckpt.wait()
    command("rm", root, "r:1", "--yes")
    for words in (
        ["undo", root, "--empty", "--yes"],
        ["rm", root, "r:2", "--undo-for", "0", "--yes"],
        ["keep", root, "r", "--rules", "last:1", "--undo-for", "0", "--yes"],
        ["audit", root, "--clean"],
    ):
        fill(small_disk)
        command(*words)
    assert [one.step for one in pp.open(root).run("r").checkpoints()] == [6]
    assert len([one for one in pp.open(root).run("r").events() if isinstance(one, Removed)]) == 5
