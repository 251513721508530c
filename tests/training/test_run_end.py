"""How a training ends: its last state is saved, and what happened is said; and rules that never keep anything."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import torch

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, kept, parts, train

END = "the end of the training: the run continues from here"


def state():
    model, optimizer = parts()
    return {"model": model, "optimizer": optimizer}


def run(root, total, *, loop="epochs", announce=None, report=True, values=None, **options):
    """Train to the end; returns the indices."""
    live, indices = state(), []
    options = {"keep": [pp.Best("acc", "max")], **options}
    with checkpointer(root, state=live, announce=announce or (lambda text: None), **options) as ckpt:
        for index in getattr(ckpt, loop)(total):
            indices.append(index)
            train(live["model"], live["optimizer"])
            if report is True or index in report:
                ckpt.report(acc=1.0 / (index + 1) if values is None else values[index])
    return indices


@pytest.mark.parametrize("loop", ["epochs", "steps"])
def test_the_last_state_is_saved_whatever_the_rules_say(loop):
    store = MemoryStore()
    assert run(store, 4, loop=loop) == [0, 1, 2, 3]
    best, last = kept(store)
    assert (best.step, last.step, last.metrics, last.reasons) == (1, 4, {"acc": 0.25}, (END,))
    assert run(store, 6, loop=loop) == [4, 5]  # nothing is trained again
    assert [checkpoint.step for checkpoint in kept(store)] == [1, 6]


def test_what_was_trained_after_the_last_report_is_saved_without_metrics():
    store = MemoryStore()
    run(store, 5, loop="steps", report=(1, 3))
    last = kept(store)[-1]
    assert (last.step, last.metrics) == (5, {})
    assert run(store, 5, loop="steps") == []
    assert run(store, 6, loop="epochs", run="e", report=(1, 3)) == [0, 1, 2, 3, 4, 5]
    assert run(store, 6, loop="epochs", run="e") == []
    assert kept(store, "e")[-1].step == 6


def test_an_hourly_rule_loses_nothing_at_the_end():
    store, now = MemoryStore(), datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
    run(store, 3, keep=[pp.Every(minutes=60)], clock=lambda: now)
    assert [checkpoint.epoch for checkpoint in kept(store)] == [0, 2]


def test_an_early_stop_is_an_end():
    store, texts = MemoryStore(), []
    options = {"stop": pp.EarlyStopping("acc", "max", patience=2), "announce": texts.append}
    assert run(store, 9, **options) == [0, 1, 2]
    assert [checkpoint.epoch for checkpoint in kept(store)] == [0, 2]
    reason = "acc has not improved on 1 by more than 0 for 2 reports (patience 2)"
    assert texts[-1] == f"stopped early at epoch 2 because {reason}"
    assert run(store, 9, **options) == []
    assert texts[-1] == f"stopped early at epoch 2 because {reason}; nothing left to do"


@pytest.mark.parametrize(("loop", "kind"), [("epochs", "epochs"), ("steps", "steps")])
def test_a_finished_run_says_that_nothing_is_left_to_do(loop, kind):
    store, texts = MemoryStore(), []
    run(store, 3, loop=loop, announce=texts.append)
    assert "left to do" not in "".join(texts)
    run(store, 3, loop=loop, announce=texts.append)
    assert texts[-1] == f"nothing left to do: 3 of 3 {kind} are complete"
    run(store, 2, loop=loop, announce=texts.append)
    assert texts[-1] == f"nothing left to do: 3 {kind} are complete, and 2 are asked for"
    assert len(kept(store)) == 2


def own_loop(store, ending):
    live = state()
    with checkpointer(store, state=live, keep=[pp.Best("acc", "max")]) as ckpt:
        for accuracy in (0.5, 0.4):
            train(live["model"], live["optimizer"])
            ckpt.report(acc=accuracy)
        ending(ckpt, live)


def test_close_saves_the_last_report_of_a_loop_of_your_own():
    store = MemoryStore()
    own_loop(store, lambda ckpt, live: None)
    assert [(one.step, one.metrics["acc"]) for one in kept(store)] == [(1, 0.5), (2, 0.4)]


def fail(ckpt, live):
    raise RuntimeError("in the middle")


def train_on(ckpt, live):
    train(live["model"], live["optimizer"])


@pytest.mark.parametrize("ending", [fail, train_on])
def test_a_state_that_may_be_half_updated_is_not_saved_at_the_end(ending):
    store = MemoryStore()
    if ending is fail:
        with pytest.raises(RuntimeError, match="in the middle"):
            own_loop(store, ending)
    else:
        own_loop(store, ending)
    assert [one.step for one in kept(store)] == [1]


UNCAUGHT = """
import sys, torch, peakpoint as pp
model = torch.nn.Linear(2, 1); optimizer = torch.optim.SGD(model.parameters(), 0.1)
ckpt = pp.Checkpointer(sys.argv[1], run="r", state={"m": model, "o": optimizer}, keep=[pp.Best("acc", "max")])
for epoch in ckpt.epochs(3):
    optimizer.step()
    ckpt.report(acc=-epoch)
    if epoch == 1:
        raise SystemExit(3)
"""


def test_an_interpreter_that_ends_for_whatever_reason_adds_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", UNCAUGHT, str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == 3
    assert [one.epoch for one in kept(tmp_path)] == [0]


# --- rules that never keep anything -------------------------------------------------------------------------------


def test_a_run_whose_rules_can_never_rank_says_so_and_keeps_the_newest():
    store = MemoryStore()
    live = state()
    with checkpointer(store, state=live, keep=[pp.Best("val_acuracy", "max")]) as ckpt:
        for epoch in ckpt.epochs(4):
            train(live["model"], live["optimizer"])
            if epoch == 0:
                with pytest.warns(pp.PeakpointWarning, match="has no 'val_acuracy'"):
                    assert not ckpt.report(val_accuracy=0.5, loss=1).saved
            elif epoch == 1:
                with pytest.warns(pp.PeakpointWarning, match="no rule has kept a checkpoint in 2 reports") as caught:
                    assert ckpt.report(val_accuracy=0.6, loss=1).saved
                text = str(caught[0].message)
                assert "'val_acuracy', and the reports have val_accuracy, loss; did you mean 'val_accuracy'?" in text
            else:
                assert ckpt.report(val_accuracy=0.6, loss=1).saved
            if epoch:
                ckpt.wait()
                assert [one.epoch for one in kept(store)] == [epoch]
    with checkpointer(store, state=live, keep=[pp.Best("val_accuracy", "max")]) as ckpt:
        for _ in ckpt.epochs(6):
            ckpt.report(val_accuracy=0.7)
    assert [one.epoch for one in kept(store)] == [4, 5]


def test_a_metric_without_a_finite_value_is_the_same_and_inside_an_epoch_some_reports_are_saved():
    store, saved = MemoryStore(), []
    with checkpointer(store, keep=[pp.TopK("acc", "max", 2), pp.Budget("1 GB")]) as ckpt:
        for _ in ckpt.epochs(1):
            for number in ckpt.batches(range(1, 10)):
                if number < 3:
                    with pytest.warns(pp.PeakpointWarning) as caught:
                        outcome = ckpt.report(acc=float("nan"))
                else:
                    outcome = ckpt.report(acc=float("nan"))
                saved += [number] if outcome.saved else []
    assert "acc, which has had no finite value" in str(caught[0].message)
    assert saved == [2, 4, 8]


@pytest.mark.parametrize(
    "keep",
    [
        [pp.Best("acc", "max", pending=2)],
        [pp.Best("acc", "max"), pp.Every(epochs=50)],
        [pp.Best("loss", "min", smooth=4)],
        [pp.Best("loss", "min", min_epoch=9)],
    ],
)
@pytest.mark.filterwarnings("ignore:the report at step:peakpoint.errors.PeakpointWarning")
def test_rules_that_wait_are_left_in_peace(keep):
    with checkpointer(MemoryStore(), keep=keep) as ckpt:
        for _ in range(3):
            ckpt.report(loss=1.0)


def test_after_a_resume_the_history_counts():
    store = MemoryStore()
    run(store, 2)
    run(store, 5)  # none of these is the best: a warning would be an error
    assert [one.epoch for one in kept(store)] == [0, 4]


# --- saves that fail ----------------------------------------------------------------------------------------------


class Full(MemoryStore):
    """A store that refuses manifests as long as somebody says so."""

    refuses = False

    def create(self, key, *arguments, **options):
        if self.refuses and key.endswith("manifest.json"):
            raise pp.errors.StoreError(28, "no space")
        return super().create(key, *arguments, **options)


def test_a_training_that_must_go_on_is_warned_of_saves_that_fail():
    store, texts, live = Full(), [], state()
    options = {"on_save_error": "warn", "announce": texts.append, "keep": [pp.Last(1)]}
    with checkpointer(store, state=live, **options) as ckpt:
        for epoch in ckpt.epochs(4):
            train(live["model"], live["optimizer"])
            store.refuses = epoch in (1, 2)
            if epoch == 2:
                with pytest.warns(pp.PeakpointWarning, match="failed: .*no space"):
                    assert ckpt.report(loss=1.0).saved
            else:
                assert ckpt.report(loss=1.0).saved
            if store.refuses:
                with pytest.warns(pp.PeakpointWarning, match="its state is still in memory"):
                    ckpt.wait()
            else:
                ckpt.wait()
    assert [one.epoch for one in kept(store)][-1] == 3
    assert any("whose save had failed, is now saved" in text for text in texts)
    assert texts[-1] == "a save failed 3 times in this training; the warnings say which, and why"


def test_by_default_a_save_that_fails_is_an_error():
    store = Full()
    ckpt = checkpointer(store, on_save_error="raise")
    store.refuses = True
    ckpt.report()
    with pytest.raises(pp.SaveFailedError):
        ckpt.wait()
    store.refuses = False
    ckpt.close()
    with pytest.raises(pp.errors.ConfigError, match=r"'raise' or 'warn', not 'warns'; did you mean 'warn'"):
        checkpointer(store, on_save_error="warns")


# --- reports that are saved on request ----------------------------------------------------------------------------


def test_a_report_can_be_kept_on_request_in_one_go():
    store, live = MemoryStore(), state()
    with checkpointer(store, state=live, keep=[pp.Best("acc", "max")]) as ckpt:
        for epoch in ckpt.epochs(3):
            train(live["model"], live["optimizer"])
            outcome = ckpt.report(acc=-epoch, save="end of warmup" if epoch == 1 else None)
            assert outcome.saved == (epoch < 2)
        with pytest.raises(pp.errors.ConfigError, match="needs a reason"):
            ckpt.report(save="")
    asked = kept(store)[1]
    assert (asked.epoch, asked.metrics, asked.reasons) == (1, {"acc": -1}, ("saved on request: end of warmup",))


@pytest.mark.parametrize(("first", "sentence"), [("report", "never makes this save"), ("save", "once more from its")])
def test_a_save_that_a_kill_would_lose_or_repeat_is_warned_of(first, sentence):
    live = state()
    with checkpointer(MemoryStore(), state=live) as ckpt:
        for _ in ckpt.epochs(1):
            train(live["model"], live["optimizer"])
            if first == "report":
                ckpt.report(loss=1.0)
            with pytest.warns(pp.PeakpointWarning, match=sentence):
                ckpt.save("why")
            ckpt.save("and again")
            if first == "save":
                ckpt.report(loss=1.0)


def test_a_save_in_batches_and_one_before_training_are_in_order():
    live = state()
    with checkpointer(MemoryStore(), state=live) as ckpt:
        for _ in ckpt.epochs(2):
            ckpt.save("before the epoch")
            for _ in ckpt.batches([1, 2]):
                train(live["model"], live["optimizer"])
                ckpt.save("inside")
            ckpt.report(loss=1.0)
        ckpt.save("at the end")


# --- several ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "size"), [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_second_rank_is_told_that_one_rank_writes(monkeypatch, rank, size):
    store = MemoryStore()
    with checkpointer(store):
        monkeypatch.setenv(rank, "1")
        monkeypatch.setenv(size, "4")
        with pytest.raises(pp.ConflictError) as caught:
            checkpointer(store)
        monkeypatch.setenv(size, "1")
        with pytest.raises(pp.ConflictError, match="this is the same process"):
            checkpointer(store)
    text = str(caught.value)
    assert "this process is rank 1 of 4, and torch.distributed is not in use" in text
    assert "call torch.distributed.init_process_group() before Checkpointer(...)" in text
    assert str(os.getpid()) in text
    assert "stop it" not in text


def test_one_rank_of_several_writes_as_ever(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    store = MemoryStore()
    run(store, 2)
    assert len(kept(store)) == 2
    assert torch.is_tensor(pp.load("r@latest", root=store)["model"]["0.weight"])


def test_torchrun_without_a_group_is_warned_of(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, value)
    with pytest.warns(pp.PeakpointWarning, match="this process is rank 1 of 2, and torch.distributed is not in use"):
        checkpointer(MemoryStore()).close()


WITHOUT_DISTRIBUTED = """
import importlib, sys
import torch

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
# as torch is where it was built without: of torch.distributed there is little more than is_available()
del torch._C._c10d_init, sys.modules["torch.distributed"]
torch.distributed = importlib.import_module("torch.distributed")
assert not hasattr(torch.distributed, "is_initialized")

import peakpoint as pp

with pp.Checkpointer(sys.argv[1], run="r", state={"model": model, "optimizer": optimizer}, keep=[pp.Last(1)]) as ckpt:
    for _ in ckpt.steps(int(sys.argv[2])):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        ckpt.report(loss=1.0)
"""


def test_torch_may_be_built_without_processes(tmp_path):
    for steps in ("2", "3"):  # the second resumes
        command = [sys.executable, "-c", WITHOUT_DISTRIBUTED, str(tmp_path), steps]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert [checkpoint.step for checkpoint in kept(tmp_path)] == [3]
    assert "weight" in pp.load("r@latest", root=tmp_path)["model"]
