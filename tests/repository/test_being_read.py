"""A checkpoint that somebody is reading stays, whatever the rules say, and goes when it is not read any more."""

import gc
import signal
import subprocess
import sys

import pytest
import torch

import peakpoint as pp
from archived_runs import run_of, trained
from peakpoint.repository import maintenance
from peakpoint.store import LocalStore, MemoryStore
from training import checkpointer


def steps(root):
    return [one.step for one in run_of(root).checkpoints()]


def test_rules_wait_for_a_reader(tmp_path):
    state = {"model": torch.nn.Linear(3, 2), "big": {"x": torch.arange(1000)}}
    with checkpointer(tmp_path, state=state, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        loaded = pp.load("r:1", root=tmp_path)
        ckpt.report(step=2)
        ckpt.wait()
        assert steps(tmp_path) == [1, 2]
        (claim,) = run_of(tmp_path).kept()[loaded.manifest.id]
        assert (claim.rule, claim.reason) == ("protection:read", "somebody is reading it")
        assert loaded["big"]["x"].sum() == 499500, "its file is still there"
        loaded.close()
        loaded.close()
        ckpt.report(step=3)
        ckpt.wait()
        assert steps(tmp_path) == [3]


def test_a_reader_that_is_gone_holds_nothing(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        pp.load("r:1", root=tmp_path, into=torch.nn.Linear(2, 1))
        loaded = pp.load("r:1", root=tmp_path)
        del loaded
        gc.collect()
        ckpt.report(step=2)
        ckpt.wait()
        assert steps(tmp_path) == [2]


def test_a_reader_in_another_process_that_dies(tmp_path):
    trained(tmp_path, epochs=3)
    script = "import sys, peakpoint as pp; x = pp.load(sys.argv[1], root=sys.argv[2]); print(1, flush=True); input()"
    command = [sys.executable, "-c", script, "r:epoch=0", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        plan = run_of(tmp_path).plan([pp.Last(1)])
        assert [one.manifest.epoch for one in plan.remove] == [1]
        first = run_of(tmp_path).manifests()[:1]
        (failure,) = maintenance.remove(run_of(tmp_path), first, "not wanted")
        assert "somebody is reading it; try again later" in failure
        process.send_signal(signal.SIGKILL)
    assert [one.manifest.epoch for one in run_of(tmp_path).plan([pp.Last(1)]).remove] == [0, 1]
    assert maintenance.remove(run_of(tmp_path), first, "not wanted") == []
    assert len(steps(tmp_path)) == 2


def test_a_reader_needs_no_right_to_write(tmp_path):
    store = LocalStore(tmp_path)
    store.create("a", b"x")
    (tmp_path / "a").chmod(0o444)
    first, second = store.reading("a"), store.reading("a")
    assert store.is_read("a")
    first.release()
    first.release()
    assert store.is_read("a")
    second.release()
    assert not store.is_read("a")
    assert store.get("a") == b"x"
    assert store.reading("b") is None
    assert not store.is_read("b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "and leaves nothing"


def test_a_store_that_cannot_tell_says_so():
    store = MemoryStore()
    store.create("a", b"x")
    assert store.reading("a") is None
    assert not store.is_read("a")


def test_a_checkpoint_that_is_archived_while_it_is_read(tmp_path):
    weights = trained(tmp_path, epochs=2)
    loaded = pp.load("r:epoch=1", root=tmp_path)
    maintenance.archive(run_of(tmp_path))
    assert torch.equal(loaded["model"]["0.weight"], weights[1]["0.weight"])
    with pytest.raises(KeyError):
        loaded["nothing"]
