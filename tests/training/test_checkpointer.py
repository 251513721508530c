"""What is saved, why, under which name, and who may write."""

import math
import os
import signal
import socket
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import numpy as np
import pytest
import torch

import peakpoint as pp
from peakpoint.repository.audit import audit
from peakpoint.store import FileOps, LocalStore, MemoryStore
from training import checkpointer, kept, parts, same, train


def test_a_moment_is_saved_if_and_only_if_a_rule_claims_it(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max"), pp.Every(steps=4)]) as ckpt:
        values = [0.5, 0.4, 0.6, 0.1, 0.2, 0.6, 0.7]
        outcomes = [ckpt.report(acc=value) for value in values]
    assert [outcome.saved for outcome in outcomes] == [True, False, True, True, False, False, True]
    for outcome in outcomes:
        assert bool(outcome.reasons) == outcome.saved == (outcome.name is not None)
    assert [c.step for c in kept(tmp_path)] == [4, 7]


def test_the_reasons_say_which_numbers_decided(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max"), pp.Last(1)]) as ckpt:
        ckpt.report(acc=0.5)
        second = ckpt.report(acc=0.75)
    assert second.reasons == ("best acc (max): 0.75, next 0.5 at step 1", "the newest")
    assert kept(tmp_path)[-1].reasons == second.reasons


def test_a_rule_of_minutes_goes_by_the_clock_that_was_given(tmp_path):
    now = [datetime(2026, 1, 1, 12, 0, tzinfo=UTC)]
    with checkpointer(tmp_path, keep=[pp.Every(minutes=60)], clock=lambda: now[0]) as ckpt:
        saved = []
        for _ in range(6):
            saved.append(ckpt.report().saved)
            now[0] += timedelta(minutes=25)
    assert saved == [True, False, False, True, False, True]
    assert kept(tmp_path)[1].created_at == datetime(2026, 1, 1, 13, 15, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        1,
        True,
        Fraction(1, 2),
        np.float32(0.5),
        np.int64(3),
        np.array([0.5]),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor([2]),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
)
def test_any_real_number_is_a_metric(tmp_path, value):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report({"val/acc": value})
    assert kept(tmp_path)[0].metrics == {"val/acc": float(value.item() if hasattr(value, "item") else value)}


@pytest.mark.parametrize(
    "value", ["0.5", None, 1j, [0.5], torch.zeros(2), np.zeros((2, 2)), torch.zeros(0), 10**400, torch.tensor(1j)]
)
def test_anything_else_is_not(tmp_path, value):
    with checkpointer(tmp_path) as ckpt, pytest.raises(pp.errors.ConfigError, match="acc"):
        ckpt.report(acc=value)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("name", ["a b", "a:b", "", "a\nb", 3])
def test_a_metric_needs_a_name_that_can_be_referred_to(tmp_path, name):
    with checkpointer(tmp_path) as ckpt, pytest.raises(pp.errors.ConfigError):
        ckpt.report({name: 0.5})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_value_that_is_not_finite_never_wins_and_is_said_once(tmp_path, bad, mode):
    with checkpointer(tmp_path, keep=[pp.Best("acc", mode)]) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="never counts as best") as seen:
            assert not ckpt.report(acc=bad).saved
        assert len(seen) == 1
        assert ckpt.report(acc=0.5).saved
        assert not ckpt.report(acc=bad).saved  # a second warning would be an error
    assert [c.metrics["acc"] for c in kept(tmp_path)] == [0.5]


@pytest.mark.parametrize(("mode", "values"), [("min", [0.5, 0.0, 0.25]), ("max", [-0.5, 0.0, -0.25])])
def test_zero_is_a_value_like_any_other(tmp_path, mode, values):
    with checkpointer(tmp_path, keep=[pp.Best("x", mode)]) as ckpt:
        assert [ckpt.report(x=value).saved for value in values] == [True, True, False]
    assert [c.metrics["x"] for c in kept(tmp_path)] == [0.0]


def test_a_missing_metric_is_said_once_for_each_metric(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max"), pp.TopK("acc", "max", 2), pp.Best("f1", "max")]) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="it has loss") as seen:
            assert not ckpt.report(loss=1.0).saved
        assert len(seen) == 2


def test_of_equal_values_the_earlier_stays(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max")]) as ckpt:
        assert [ckpt.report(acc=0.5).saved for _ in range(3)] == [True, False, False]
    assert [c.step for c in kept(tmp_path)] == [1]


def test_a_second_report_in_an_epoch_after_more_training_is_refused(tmp_path):
    model, optimizer = parts()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        loop = ckpt.epochs(2)
        next(loop)
        ckpt.report(loss=train(model, optimizer))
        ckpt.report(acc=0.5)  # another metric of the same moment
        train(model, optimizer)
        with pytest.raises(pp.errors.ConfigError, match="second report in epoch 0"):
            ckpt.report(loss=0.5)
        assert next(loop) == 1
        ckpt.report(loss=0.5)
        loop.close()


def test_a_report_before_resuming_is_refused(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report()
    for call in (lambda c: c.report(), lambda c: c.save("x"), lambda c: next(c.batches([1]))):
        with checkpointer(tmp_path) as ckpt, pytest.raises(pp.errors.ConfigError, match="has not been restored"):
            call(ckpt)
    assert len(kept(tmp_path)) == 1
    with checkpointer(tmp_path) as ckpt:
        ckpt.resume()
        ckpt.report()
    with checkpointer(tmp_path, resume="never") as ckpt:
        ckpt.report()
    assert len(kept(tmp_path)) == 3


def test_what_was_saved_on_request_stays(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(loss=0.5)
        outcome = ckpt.save("before the learning rate drops")
        for _ in range(3):
            ckpt.report(loss=0.4)
        for reason in ("", "  ", None):
            with pytest.raises(pp.errors.ConfigError, match="needs a reason"):
                ckpt.save(reason)
    assert outcome.reasons == ("saved on request: before the learning rate drops",)
    asked, newest = kept(tmp_path)
    assert (asked.name, asked.metrics) == (outcome.name, {"loss": 0.5})
    assert newest.step == 4


def test_a_save_after_more_training_has_no_metrics(tmp_path):
    model, optimizer = parts()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}, keep=[pp.Every(steps=100)]) as ckpt:
        train(model, optimizer)
        assert not ckpt.report(loss=0.5).saved
        train(model, optimizer)
        assert ckpt.save("x").step == 2
    assert kept(tmp_path)[0].metrics == {}


def test_early_stopping_ends_the_epochs_and_survives_a_restart(tmp_path):
    stop, losses = pp.EarlyStopping("loss", "min", patience=3), [3, 1, 2, 2, 2, 0, 0]

    def run(most):
        done = []
        with checkpointer(tmp_path, stop=stop) as ckpt:
            for epoch in ckpt.epochs(7):
                outcome = ckpt.report(loss=losses[epoch])
                done.append((epoch, outcome.should_stop))
                assert (outcome.why_stop is not None) == outcome.should_stop
                if len(done) == most:
                    break
        return done

    assert run(4) == [(0, False), (1, False), (2, False), (3, False)]
    assert run(9) == [(4, True)]
    assert run(9) == []


def test_names(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("val/loss", "min")]) as ckpt:
        for _ in ckpt.epochs(1):
            assert ckpt.report({"val/loss": 0.5}).name == "epoch0_step1_val-loss_0.5000"
    assert [c.name for c in kept(tmp_path)] == ["epoch0_step1_val-loss_0.5000"]


def test_names_that_are_taken_get_a_number(tmp_path):
    with checkpointer(tmp_path, name="same") as ckpt:
        names = [ckpt.report().name for _ in range(3)]
    assert [c.name for c in kept(tmp_path)] == ["same", "same-2", "same-3"]
    assert names == ["same", "same-2", "same-3"]


@pytest.mark.parametrize(
    "options",
    [
        {"run": "a/b"},
        {"run": ""},
        {"run": "../x"},
        {"name": "{nothing}"},
        {"name": "{value:q}"},
        {"name": "{run"},
        {"state": {}},
        {"state": [1]},
        {"state": {"a b": 1}},
        {"state": {"rng": 1}},
        {"keep": "last:1"},
        {"keep": [1]},
        {"keep": 3},
        {"keep": []},
        {"keep": [pp.Budget("1 GB")]},
        {"keep": [pp.Last]},
        {"keep": ["last:1"]},
        {"resume": True},
        {"resume": None},
        {"strict": "no"},
        {"overlap": None},
        {"stop": "val_loss"},
        {"preempt": True},
        {"name": 3},
        {"undo_for": [1]},
        {"on_save_error": True},
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, options):
    root = tmp_path / "runs"
    with pytest.raises(pp.errors.ConfigError):
        checkpointer(root, **options)
    assert not root.exists()


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (lambda ckpt: list(ckpt.epochs("10")), "such as 10, not '10'"),
        (lambda ckpt: list(ckpt.epochs(10.0)), "such as 10, not 10.0"),
        (lambda ckpt: list(ckpt.epochs(True)), "of at least 0"),
        (lambda ckpt: list(ckpt.steps(-1)), "of at least 0"),
        (lambda ckpt: ckpt.report(0.5), "such as report(loss=0.5)"),
        (lambda ckpt: ckpt.report(loss=torch.zeros(3)), "has the shape [3]; report one real number"),
        (lambda ckpt: ckpt.report(epoch=1.5), "epoch must be a whole number"),
        (lambda ckpt: ckpt.save(3), 'save("end of warmup")'),
        (lambda ckpt: list(ckpt.batches(3)), "takes a DataLoader"),
    ],
)
def test_a_wrong_argument_says_what_to_write_instead(call, instead):
    with checkpointer(MemoryStore()) as ckpt, pytest.raises(pp.errors.ConfigError) as caught:
        call(ckpt)
    assert instead in str(caught.value)


def test_a_checkpointer_without_a_place_says_what_to_give():
    with pytest.raises(pp.errors.ConfigError, match='such as "runs"'):
        checkpointer(None)
    with pytest.raises(pp.errors.ConfigError, match='write resume="must"'):
        checkpointer(MemoryStore(), resume=True)
    for wrong, advice in {
        "best": 'write resume="r@best"',
        "last": 'write resume="r@last"',
        "Must": "did you mean 'must'",
        "atuo": "did you mean 'auto'",
        "": "such as",
    }.items():
        with pytest.raises(pp.errors.ConfigError, match=f"not {wrong!r}") as caught:
            checkpointer(MemoryStore(), resume=wrong)
        assert advice in str(caught.value)
    with pytest.raises(pp.errors.ConfigError, match=r"not a torch\.nn\.modules\.linear\.Linear"):
        checkpointer(MemoryStore(), state=torch.nn.Linear(1, 1))


def test_a_state_that_cannot_be_kept_is_refused_and_leaves_no_checkpoint(tmp_path):
    state = {"model": torch.nn.Linear(1, 1), "thing": {"deep": [0]}}
    with checkpointer(tmp_path, state=state) as ckpt:
        state["thing"]["deep"][0] = object()
        with pytest.raises(pp.errors.ConfigError, match="deep"):
            ckpt.report()
        state["thing"]["deep"][0] = 1
        assert ckpt.report().saved
    assert len(kept(tmp_path)) == 1


def test_a_loop_in_a_loop_and_a_closed_checkpointer_are_refused(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        for _ in ckpt.epochs(1):
            with pytest.raises(pp.errors.ConfigError, match="inside another"):
                next(ckpt.steps(1))
        for bad in (-1, 1.5):
            with pytest.raises(pp.errors.ConfigError):
                next(ckpt.epochs(bad))
    ckpt.close()
    for call in (ckpt.report, ckpt.wait, ckpt.resume, lambda: ckpt.save("x"), lambda: next(ckpt.epochs(1))):
        with pytest.raises(pp.errors.ConfigError, match="is closed"):
            call()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    with checkpointer(tmp_path, clock=lambda: now):
        with pytest.raises(pp.ConflictError) as caught:
            checkpointer(tmp_path)
        for part in (socket.gethostname(), str(os.getpid()), "2026-01-02", "call close()"):
            assert part in str(caught.value)
        with checkpointer(tmp_path, run="other") as other:
            other.report()
    with checkpointer(tmp_path) as ckpt:
        ckpt.report()


HOLDER = """
import sys, torch, peakpoint as pp
ckpt = pp.Checkpointer(sys.argv[1], run="r", state={"n": torch.zeros(3)}, keep=[pp.Last(2)])
ckpt.report(); ckpt.wait(); ckpt.report()
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_writer_in_another_process_is_respected_and_taken_over_when_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(pp.ConflictError) as caught:
            checkpointer(tmp_path)
        for part in (socket.gethostname(), str(holder.pid), str(datetime.now(UTC).year)):
            assert part in str(caught.value)
        assert str(holder.pid) in pp.open(tmp_path).run("r").holder()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    state = {"n": torch.ones(3)}
    with checkpointer(tmp_path, state=state) as ckpt:
        assert ckpt.resume() is not None
        assert same(state["n"], torch.zeros(3))
        ckpt.report()


def test_a_root_with_spaces_and_letters_of_other_scripts(tmp_path):
    root = tmp_path / "zwei Wörter 実験" / "läuft's"
    with checkpointer(root) as ckpt:
        ckpt.report({"größe": 1.0})
    assert kept(root)[0].metrics == {"größe": 1.0}
    assert set(pp.load("r@latest", root=str(root))) == {"model"}
    with checkpointer(str(root), resume="must") as ckpt:
        assert ckpt.resume().step == 1


def test_a_root_in_memory():
    store = MemoryStore()
    model, optimizer = parts()
    with checkpointer(store, state={"model": model, "optimizer": optimizer}, keep=[pp.Best("loss", "min")]) as ckpt:
        for _ in ckpt.epochs(3):
            ckpt.report(loss=train(model, optimizer))
        with pytest.raises(pp.ConflictError):
            checkpointer(store)
    assert len(kept(store)) == 1
    with checkpointer(store, resume="must", state=dict(zip(("model", "optimizer"), parts(1), strict=True))) as ckpt:
        ckpt.resume()


def test_nothing_warns_in_an_ordinary_training(tmp_path, recwarn):
    model, optimizer = parts()
    said = []
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}, announce=said.append) as ckpt:
        for step in ckpt.steps(3):
            assert ckpt.report(loss=train(model, optimizer)).step == step + 1
    assert len(said) == 1
    assert "new run" in said[0]
    assert not recwarn.list
    assert warnings.filters


def test_a_reason_with_broken_bytes_is_refused_before_anything_is_saved(tmp_path):
    with checkpointer(tmp_path) as ckpt, pytest.raises(pp.errors.ConfigError, match="UTF-8"):
        ckpt.save("\udcff")
    assert kept(tmp_path) == []


def test_early_stopping_by_a_metric_that_is_not_reported_is_said_once(tmp_path):
    stop = pp.EarlyStopping("val_los", "min", patience=1)
    with checkpointer(tmp_path, stop=stop) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match=r"no 'val_los': early stopping .* did you mean 'val_loss'\?"):
            ckpt.report(step=1, val_loss=1.0)
        assert not ckpt.report(step=2, val_loss=2.0).should_stop


FORKED = """
import os, sys
import peakpoint as pp
with pp.Checkpointer(sys.argv[1], run="r", state={"x": 1}, keep=[pp.Last(9)], preempt=None) as ckpt:
    ckpt.report(step=1)
    ckpt.wait()
    child = os.fork()
    if child == 0:
        batches = lambda: next(ckpt.batches([1]))
        calls = ckpt.report, lambda: ckpt.save("why"), ckpt.wait, ckpt.resume, ckpt.close, batches
        for call in (*calls, lambda: next(ckpt.epochs(9)), lambda: next(ckpt.steps(9))):
            try:
                call()
            except pp.ConflictError as error:
                assert f"belongs to process {os.getppid()}" in str(error), error
            else:
                os._exit(3)
        raise SystemExit(7)  # leaves the block, and ends the interpreter
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    ckpt.report(step=2)
"""


def test_a_fork_may_not_use_the_checkpointer_and_harms_nothing(tmp_path):
    subprocess.run([sys.executable, "-W", "error", "-c", FORKED, str(tmp_path)], check=True, stderr=subprocess.DEVNULL)
    assert [c.step for c in kept(tmp_path)] == [1, 2]
    assert audit(pp.open(tmp_path), deep=True).findings == []
    assert pp.open(tmp_path).run("r").events()[-1].why == "closed"


def test_nothing_is_committed_when_the_run_is_not_held_any_more(tmp_path):
    first = checkpointer(tmp_path)
    first.report(step=1)
    first.wait()
    (tmp_path / "runs" / "r" / "writer.lock").unlink()
    with checkpointer(tmp_path) as second:
        second.resume()
        first.report(step=2)
        with pytest.raises(pp.SaveFailedError, match=r"writer\.lock was removed, replaced or overwritten"):
            first.wait()
        second.report(step=3)
        second.wait()
    with pytest.raises(pp.SaveFailedError):
        first.close()
    assert [c.step for c in kept(tmp_path)] == [1, 3]
    assert audit(pp.open(tmp_path), deep=True).of_kind("damage") == []


class Unsynced(FileOps):
    """Notes how many bytes of journals are not durable when a manifest comes to exist."""

    def __init__(self):
        self.journals, self.pending, self.at_manifests = {}, 0, []

    def create(self, path, *at):
        fd = super().create(path, *at)
        if path.suffix == ".jsonl":
            self.journals[fd] = path
        return fd

    def write(self, fd, data):
        written = super().write(fd, data)
        self.pending += written if fd in self.journals else 0
        return written

    def fsync(self, fd):
        super().fsync(fd)
        self.pending = 0 if fd in self.journals else self.pending

    def link(self, source, target, *at):
        if target.name == "manifest.json":
            self.at_manifests.append(self.pending)
        super().link(source, target, *at)


def test_the_history_of_a_checkpoint_is_durable_before_it_exists(tmp_path):
    ops = Unsynced()
    with checkpointer(LocalStore(tmp_path, ops)) as ckpt:
        for step in range(1, 4):
            ckpt.report(step=step)
    assert ops.at_manifests == [0, 0, 0]
