"""Signals of a scheduler: the next report saves and leaves."""

import os
import signal
import subprocess
import sys

import pytest

import peakpoint as pp
from training import checkpointer, kept, parts, same, train

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture
def heard():
    """Signals that the handlers installed beforehand have been given."""
    seen = []
    earlier = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in SIGNALS}
    yield seen
    for number, handler in earlier.items():
        signal.signal(number, handler)


def run(root, preempt, when=None, number=signal.SIGTERM, said=None, total=5):
    model, optimizer = parts(seed=0 if when is not None else 7)
    if not root.exists():
        model, optimizer = parts(seed=0)
    announce = ([] if said is None else said).append
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(root, state=state, keep=[pp.Best("x", "max")], preempt=preempt, announce=announce) as ckpt:
        for epoch in ckpt.epochs(total):
            train(model, optimizer)
            if epoch == when:
                os.kill(os.getpid(), number)
            ckpt.report(x=-epoch)
    return model.state_dict()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_next_report_saves_and_leaves(tmp_path, heard, number):
    said = []
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "a", pp.Preempt(), 2, number, said)
    assert left.value.code == 75
    assert heard == [number]
    newest = kept(tmp_path / "a")[-1]
    assert newest.epoch == 2
    assert newest.reasons[-1] == f"preempted by {number.name}"
    assert "leaving with exit code 75" in said[-1]
    assert pp.open(tmp_path / "a").run("r").holder() is None
    assert same(run(tmp_path / "a", pp.Preempt()), run(tmp_path / "b", None))


def test_the_handlers_are_put_back(tmp_path, heard):
    before = [signal.getsignal(number) for number in SIGNALS]
    run(tmp_path, pp.Preempt())
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert heard == []


def test_another_exit_code_and_other_signals(tmp_path, heard):
    with pytest.raises(SystemExit) as left:
        run(tmp_path, pp.Preempt(signals=(signal.SIGUSR1,), exit_code=9), 1, signal.SIGUSR1)
    assert left.value.code == 9
    with pytest.raises(pp.errors.ConfigError):
        pp.Preempt(exit_code=256)


def test_none_watches_none(tmp_path, heard):
    run(tmp_path, None, 1)
    assert heard == [signal.SIGTERM]
    assert [c.epoch for c in kept(tmp_path)] == [0, 4]  # the first, and the end


def test_a_signal_after_the_last_report_is_delivered_at_close(tmp_path, heard):
    with checkpointer(tmp_path, preempt=pp.Preempt()) as ckpt:
        ckpt.report()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == []
    assert heard == [signal.SIGTERM]


SCRIPT = """
import os, signal, sys, torch, peakpoint as pp
for name in sys.argv[3:]:
    signal.signal(signal.SIGUSR1, lambda *_: print(name, flush=True))
model = torch.nn.Linear(1, 1)
with pp.Checkpointer(sys.argv[1], run="r", state={"model": model}, keep=[pp.Every(steps=10**9)]) as ckpt:
    for epoch in ckpt.epochs(4):
        if epoch == 2:
            os.kill(os.getpid(), int(sys.argv[2]))
        ckpt.report()
        print(epoch, flush=True)
"""


def test_the_process_ends_with_the_exit_code(tmp_path):
    def start(number, *more):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(int(number)), *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    done = start(signal.SIGUSR1, "earlier")
    assert (done.returncode, done.stdout) == (75, "0\n1\nearlier\n"), done.stderr
    done = start(0)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
