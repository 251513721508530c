"""What report has called saved is durable before the interpreter ends, however the training ends."""

import gc
import os
import signal
import subprocess
import threading

import pytest

import peakpoint as pp
from peakpoint.format.sealed import gc_paused
from peakpoint.repository.audit import audit
from peakpoint.training.preemption import SignalWatch
from ready_python import OPTIONS
from training import checkpointer, kept, parts

SCRIPT = """
import errno, gc, multiprocessing, os, pathlib, sys, torch, peakpoint as pp
from peakpoint.store import FileOps, LocalStore

class Quiet(pp.Checkpointer):
    _announce = staticmethod(str)

def begin(run, root=sys.argv[1]):
    state = {"model": torch.nn.Linear(2000, 1000)}
    ckpt = Quiet(root, run=run, state=state, keep=[pp.Last(2)], preempt=None)
    for epoch in ckpt.epochs(2):
        assert ckpt.report(acc=epoch).saved
    return ckpt

class Full(FileOps):
    armed = times = 0
    def write(self, fd, data):
        if self.armed and len(data) > 100_000 and self.times:
            self.times -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)

def begin_full(times):
    ops = Full()
    ckpt = begin("r", LocalStore(pathlib.Path(sys.argv[1]), ops))
    ckpt.wait()
    with torch.no_grad():
        ckpt.state["model"].weight.add_(1)
    ops.armed, ops.times = True, times
    assert ckpt.report(acc=2, epoch=2).saved
    return ckpt

def in_a_function(): begin("r")
def a_cycle():
    holder = [begin("r")]
    holder.append(holder)
    del holder
    gc.collect()
def forked():
    global ckpt
    ckpt = begin("r")
    child = os.fork()
    if not child:
        sys.exit(5)
    assert os.waitpid(child, 0)[1] >> 8 == 5
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start(); child.join()
    assert child.exitcode == 0
def a_child():
    child = multiprocessing.get_context("fork").Process(target=begin, args=("r",))
    child.start(); child.join()
    assert child.exitcode == 0
def at_exit():
    global ckpt
    ckpt = begin("r")
    import atexit
    atexit.register(ckpt.close)

if __name__ == "__main__":
    exec(sys.argv[2])
"""


@pytest.fixture
def run(ready_interpreter):
    """Run the script in a process that ends as an interpreter does."""

    def run(root, ending):
        command = [ready_interpreter, *OPTIONS, SCRIPT, str(root), ending]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run


def whole(root, run="r"):
    """The epochs whose checkpoints exist, after looking at every byte."""
    assert pp.open(root).run(run).holder() is None
    assert audit(pp.open(root), deep=True).clean
    return [checkpoint.epoch for checkpoint in kept(root, run)]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("ckpt = begin('r')", 0),
        ("in_a_function()", 0),
        ("a_cycle()", 0),
        ("ckpt = begin('r'); sys.exit(3)", 3),
        ("begin('r'); sys.exit(3)", 3),
        ("ckpt = begin('r'); raise ValueError('of the training')", 1),
        ("ckpt = begin('r'); other = begin('other'); begin('third')", 0),
        ("forked()", 0),
        ("a_child()", 0),
        ("at_exit()", 0),
    ],
)
def test_the_last_save_is_durable_without_close(run, tmp_path, ending, code):
    done = run(tmp_path, ending)
    assert done.returncode == code, done.stderr
    assert ("of the training" in done.stderr) == (code == 1)
    assert done.stderr == "" or code == 1
    for name in pp.open(tmp_path).runs():
        assert whole(tmp_path, name.name) == [0, 1]


@pytest.mark.parametrize("ending", ["ckpt = begin_full({})", "begin_full({})"])
def test_a_save_that_fails_at_the_end_is_written_once_more_and_said(run, tmp_path, ending):
    done = run(tmp_path / "a", ending.format(1))
    assert "run 'r' ended without close()" in done.stderr
    assert "durable now" in done.stderr
    assert whole(tmp_path / "a") == [1, 2]
    done = run(tmp_path / "b", ending.format(-1))
    assert done.returncode == 0  # what cannot be changed is said
    for text in (
        "ended without close()",
        "exit code of this process does not show this error",
        "epoch2",
        "No space",
        "is lost",
    ):
        assert text in done.stderr
    assert whole(tmp_path / "b") == [0, 1]


def closed_beside():
    for thread in threading.enumerate():
        if thread.name.startswith("peakpoint-close"):
            thread.join()


def test_a_run_that_nothing_refers_to_is_let_go(tmp_path):
    model, optimizer = parts()
    ckpt = checkpointer(tmp_path, state={"model": model, "optimizer": optimizer})
    with gc_paused():  # while the thread of the save collects, a collection here does nothing
        ckpt.report(step=1)
        del ckpt
        assert gc.collect()
    closed_beside()
    assert whole(tmp_path) == [None]
    assert not optimizer._optimizer_step_pre_hooks
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}, resume="must") as ckpt:
        ckpt.resume()


def test_signals_are_delivered_after_another_thread_has_stopped_watching():
    seen = []
    earlier = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        watch = SignalWatch(pp.Preempt(signals=(signal.SIGUSR1,)))
        thread = threading.Thread(target=watch.stop)
        thread.start()
        thread.join()
        for times in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1] * times
    finally:
        signal.signal(signal.SIGUSR1, earlier)
