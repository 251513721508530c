"""Disks that refuse: the training is told once, loses nothing that was there, and what was missed is made good."""

import errno
import math
import signal
import threading
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import peakpoint as pp
from failing import Failing
from peakpoint.errors import StoreError
from peakpoint.format.events import Saved, SaveFailed
from peakpoint.repository import maintenance
from peakpoint.store import LocalStore
from training import checkpointer, kept, same


def model_of(number):
    model = torch.nn.Linear(2, 1)
    set_to(model, number)
    return model


@torch.no_grad()
def set_to(model, number):
    model.weight.fill_(number)


def settle():
    """Wait until the save under way has ended, without asking the checkpointer."""
    for thread in threading.enumerate():
        if thread.name.startswith("peakpoint-save"):
            thread.join()


def loads(root, ref, number):
    return same(pp.load(ref, root=root)["model"]["weight"], model_of(number).weight)


WAYS = [
    ("create", "model.safetensors", errno.ENOSPC),
    ("write", "model.safetensors", errno.ENOSPC),
    ("fsync", "model.safetensors", errno.EIO),
    ("rename", "model.safetensors", errno.EIO),
    ("fsync", "state.json", errno.EIO),
    ("fsync", "manifest.json", errno.EIO),
    ("link", "manifest.json", errno.EDQUOT),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def test_a_missed_best_is_said_once_and_made_good_at_the_next_report(tmp_path, way):
    ops, said, model = Failing(*way), [], model_of(1)
    store = LocalStore(tmp_path, ops)
    with checkpointer(store, state={"model": model}, keep=[pp.Best("acc", "max")], announce=said.append) as ckpt:
        ckpt.report(acc=0.5)
        ckpt.wait()
        ops.arm()
        set_to(model, 2)
        assert ckpt.report(acc=0.9).saved
        settle()
        assert [c.metrics["acc"] for c in kept(tmp_path)] == [0.5]
        assert loads(tmp_path, "r@latest", 1)
        set_to(model, 3)
        with pytest.raises(pp.SaveFailedError, match="is durable now") as caught:
            ckpt.report(acc=0.1)
        assert caught.value.outcome.step == 3
        assert not caught.value.outcome.saved
        assert caught.value.__cause__.errno == way[2]
        assert "is now saved" in said[-1]
        assert [c.metrics["acc"] for c in kept(tmp_path)] == [0.9]
        assert not ckpt.report(acc=0.2).saved
        ckpt.wait()
    assert loads(tmp_path, "r@best:acc", 2)
    assert [report.metrics["acc"] for report in pp.open(tmp_path).run("r").history()] == [0.5, 0.9, 0.1, 0.2]


def test_the_report_that_tells_of_a_failure_is_itself_saved(tmp_path):
    ops, model = Failing("fsync"), model_of(1)
    with checkpointer(LocalStore(tmp_path, ops), state={"model": model}) as ckpt:
        ops.arm()
        ckpt.report(acc=0.5)
        set_to(model, 2)
        with pytest.raises(pp.SaveFailedError) as caught:
            ckpt.report(acc=0.6)
        assert caught.value.outcome.saved
    assert [c.metrics["acc"] for c in kept(tmp_path)] == [0.5, 0.6]
    assert loads(tmp_path, "r:1", 1)
    assert loads(tmp_path, "r:2", 2)


def test_wait_says_it_once_and_close_makes_it_good(tmp_path):
    ops, model = Failing("create"), model_of(1)
    with checkpointer(LocalStore(tmp_path, ops), state={"model": model}) as ckpt:
        ops.arm()
        ckpt.report(acc=0.5)
        with pytest.raises(pp.SaveFailedError, match="written again by the next report and by close"):
            ckpt.wait()
        ckpt.wait()
        set_to(model, 2)
    assert loads(tmp_path, "r@latest", 1)


def test_close_says_what_nobody_was_told_and_makes_it_good(tmp_path):
    ops, model = Failing("create"), model_of(1)
    ckpt = checkpointer(LocalStore(tmp_path, ops), state={"model": model})
    ops.arm()
    ckpt.report(acc=0.5)
    with pytest.raises(pp.SaveFailedError, match="is durable now"):
        ckpt.close()
    ckpt.close()
    assert loads(tmp_path, "r@latest", 1)
    with checkpointer(tmp_path, resume="must") as again:
        again.resume()


@pytest.mark.parametrize("call", ["create", "fsync"])
def test_a_disk_that_keeps_refusing(tmp_path, call):
    ops, model = Failing(call), model_of(1)
    ckpt = checkpointer(LocalStore(tmp_path, ops), state={"model": model}, keep=[pp.Best("acc", "max")])
    ckpt.report(acc=0.5)
    ckpt.wait()
    set_to(model, 3)  # what is the same would be shared, and not written
    ops.arm(math.inf)
    ckpt.report(acc=0.9)
    with pytest.raises(pp.SaveFailedError, match="still in memory"):
        ckpt.wait()
    for value in (0.1, 0.2):
        with pytest.raises(pp.SaveFailedError, match="still in memory"):
            ckpt.report(acc=value)
    set_to(model, 2)
    with pytest.raises(pp.SaveFailedError, match="replaced by a later checkpoint"):
        ckpt.report(acc=0.95)
    with pytest.raises(pp.SaveFailedError):
        ckpt.close()
    assert loads(tmp_path, "r@best:acc", 1)
    assert len(kept(tmp_path)) == 1
    with checkpointer(tmp_path, state={"model": model}, keep=[pp.Best("acc", "max")]) as again:
        assert again.resume().step == 1
        set_to(model, 2)
        again.report(acc=0.9)
    assert loads(tmp_path, "r@best:acc", 2)


def test_a_failure_does_not_hide_the_error_that_ends_the_training(tmp_path):
    ops = Failing("create")

    def work():
        with checkpointer(LocalStore(tmp_path, ops)) as ckpt:
            ops.arm(math.inf)
            ckpt.report(acc=0.5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        work()
    assert "No space left" in caught.value.__notes__[0]
    assert pp.open(tmp_path).run("r").holder() is None


def test_a_checkpoint_that_cannot_be_removed_only_warns(tmp_path):
    ops = Failing("unlink", "checkpoints/step1/manifest.json", errno.EIO)
    with checkpointer(LocalStore(tmp_path, ops), keep=[pp.Last(1)]) as ckpt:
        ckpt.report()
        ckpt.wait()
        ops.arm()

        def save():
            ckpt.report()
            ckpt.wait()

        with pytest.warns(pp.PeakpointWarning, match="step1"):
            save()
        assert [c.step for c in kept(tmp_path)] == [1, 2]
        ckpt.report()
    assert [c.step for c in kept(tmp_path)] == [3]


class Refusing(LocalStore):
    """Its logs refuse the next line that has ``word`` in it."""

    word = None

    def log(self, key):
        log = super().log(key)

        def refuse(line):
            if self.word is not None and self.word in line:
                self.word = None
                raise StoreError(errno.EIO, "the journal cannot be written")
            log.append(line)

        return SimpleNamespace(append=refuse, sync=log.sync, close=log.close)


def report_all(ckpt, first, accuracies):
    for step, accuracy in enumerate(accuracies, first):
        ckpt.report(step=step, acc=accuracy)
        ckpt.wait()


@pytest.mark.parametrize("word", [b'"saved"', b'"removed"', b'"parts-dropped"'])
def test_a_journal_that_refuses_after_a_commit_has_it_neither_failed_nor_written_twice(tmp_path, word):
    store = Refusing(tmp_path)
    keep = [pp.Best("acc", "max", parts="model"), pp.Last(2)]
    with checkpointer(store, state={"model": model_of(0.0), "extra": torch.zeros(2)}, keep=keep) as ckpt:
        report_all(ckpt, 1, [0.9, 0.1, 0.2])
        store.word = word
        with pytest.warns(pp.PeakpointWarning, match=r"is saved, but .* the journal cannot be written") as told:
            report_all(ckpt, 4, [0.95, 0.1, 0.1, 0.1])
        assert len(told) == 1
        found = kept(tmp_path)
        assert store.word is None
        assert [one.step for one in found] == [4, 6, 7]
        assert "extra" not in found[0].parts
    saved = [event.sequence for event in pp.open(tmp_path).run("r").events() if isinstance(event, Saved)]
    assert saved == [1, 2, 3, 4, 5, 6, 7]


class Small(LocalStore):
    """A disk with ``room`` bytes left."""

    room = 1 << 40

    def free(self):
        return self.room


def test_a_full_disk_is_said_at_once_and_made_good_when_there_is_space(tmp_path):
    store, model = Small(tmp_path), model_of(1)
    with checkpointer(store, state={"model": model}, keep=[pp.Best("acc", "max")]) as ckpt:
        ckpt.report(acc=0.5)
        store.room = 100
        set_to(model, 2)
        with pytest.warns(pp.PeakpointWarning, match="is NOT saved: .*no space for checkpoint"):
            outcome = ckpt.report(acc=0.9)
        assert (outcome.saved, outcome.name, outcome.reasons) == (False, None, ())
        set_to(model, 3)
        with pytest.raises(pp.SaveFailedError, match="still in memory") as caught:
            ckpt.wait()
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert loads(tmp_path, "r@best:acc", 1)
        store.room = 1 << 40
        assert not ckpt.report(acc=0.1).saved
        assert loads(tmp_path, "r@best:acc", 2)


def test_a_full_disk_is_raised_by_the_next_report(tmp_path):
    store = Small(tmp_path)
    with checkpointer(store) as ckpt:
        store.room = 100
        with pytest.warns(pp.PeakpointWarning, match="NOT saved"):
            ckpt.report(acc=0.5)
        store.room = 1 << 40
        with pytest.raises(pp.SaveFailedError) as caught:
            ckpt.report(acc=0.1)
        assert caught.value.outcome.saved
    assert [c.metrics["acc"] for c in kept(tmp_path)] == [0.5, 0.1]


def test_the_run_is_let_go_when_the_checkpointer_cannot_be_made(tmp_path):
    ops = Failing("create", "journal", errno.EIO)  # a full disk is no reason: there may be something to let go
    ops.arm()
    with pytest.raises(pp.errors.StoreError, match="Input/output error"):
        checkpointer(LocalStore(tmp_path, ops))
    with checkpointer(LocalStore(tmp_path, ops)) as ckpt:
        ckpt.report()
    assert len(kept(tmp_path)) == 1


def test_the_run_is_let_go_when_the_signals_cannot_be_watched(tmp_path):
    raised = []

    def make():  # in another thread signals cannot be watched: a warning, which is an error here
        try:
            checkpointer(tmp_path, preempt=pp.Preempt())
        except pp.PeakpointWarning as warning:
            raised.append(str(warning))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "not watched" in raised[0]
    with checkpointer(tmp_path) as ckpt:
        ckpt.report()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, 0, 10_000])
def test_signals_that_cannot_be_caught_are_refused(number):
    with pytest.raises(pp.errors.ConfigError, match="can catch"):
        pp.Preempt(signals=(number,))


def test_a_journal_that_cannot_be_closed_lets_go_of_run_and_signals(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    ops = Failing("write", "journal", errno.EIO)
    ckpt = checkpointer(LocalStore(tmp_path, ops), preempt=pp.Preempt())
    ckpt.report()
    ckpt.wait()
    ops.arm()
    with pytest.raises(pp.errors.StoreError):
        ckpt.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert pp.open(tmp_path).run("r").holder() is None
    assert len(kept(tmp_path)) == 1


# --- room on a full disk ------------------------------------------------------------------------------------------


class Disk(LocalStore):
    """A disk of a given size."""

    capacity = 1 << 40

    def free(self):
        return self.capacity - self.used()

    def used(self):
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


def save_all(store, steps, capacity=None, **options):
    """Reports with a state of 9 MB, the last of them on a disk that has so many bytes more; what was warned of."""
    tensor = torch.zeros(2_250_000)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with checkpointer(store, state={"model": {"tensor": tensor}}, **options) as ckpt:
            ckpt.resume()
            for step in steps:
                if step == steps[-1] and capacity is not None:
                    store.capacity = store.used() + capacity
                tensor.fill_(step)
                ckpt.report(step=step, acc=0.1)
                ckpt.wait()
    return [str(one.message) for one in said]


def test_the_trash_goes_first_when_the_disk_is_full(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    found = pp.open(tmp_path).run("r")
    maintenance.remove(found, found.manifests()[:1], "why", undo_for=timedelta(days=7))
    [said] = save_all(Disk(tmp_path), [4], 10_000_000)
    assert said == "the disk is full: to make space for step4, checkpoints were permanently deleted: 1 in the trash"
    assert ([one.step for one in kept(tmp_path)], maintenance.in_trash(found)) == ([2, 3, 4], [])


def test_what_no_rule_claims_goes_before_the_save_when_the_disk_is_full(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    announced, said = save_all(Disk(tmp_path), [4], 10_000_000, keep=[pp.Last(2)])
    assert "no longer keep 2 checkpoints" in announced
    assert (
        said == "the disk is full: to make space for step4, checkpoints were permanently deleted: 1 that no rule keeps"
    )
    assert [one.step for one in kept(tmp_path)] == [3, 4]


def test_a_disk_that_is_full_of_what_is_wanted_is_said_with_the_ways_out(tmp_path):
    save_all(tmp_path, [1, 2])
    save_all(tmp_path, [1, 2], run="other-run")
    other = pp.open(tmp_path).run("other-run")
    maintenance.remove(other, other.manifests()[:1], "why", undo_for=timedelta(days=7))
    with pytest.raises(pp.SaveFailedError) as caught:
        save_all(Disk(tmp_path), [3], 10_000_000)
    assert (
        "it needs 13.2 MB and 10.0 MB are free; "
        f"empty the trash of other-run (9.0 MB): peakpoint undo {tmp_path} --empty; "
        "remove some of the 2 checkpoints that the rules keep of this run (18.0 MB): "
        f"peakpoint rm {tmp_path} r/NAME --undo-for 0; free some space, or let the rules keep fewer checkpoints"
    ) in str(caught.value)
    assert [one.step for one in kept(tmp_path)] == [1, 2]


@pytest.mark.parametrize("call", ["create", "write"])
def test_a_disk_that_is_full_in_the_middle_of_a_save_is_freed_and_the_save_made_once_more(tmp_path, call):
    ops = Failing(call)
    store, model = LocalStore(tmp_path, ops), model_of(1)
    with checkpointer(store, state={"model": model}, keep=[pp.Last(1)], undo_for="1h") as ckpt:
        for number in (1, 2):
            set_to(model, number)
            ckpt.report()
            ckpt.wait()
        ops.arm()
        set_to(model, 3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ckpt.report()  # which says it already if the save is quick
            ckpt.wait()
        (text,) = [str(warning.message) for warning in said]
        assert "to make space for step3, checkpoints were permanently deleted: 1 in the trash" in text
        assert ops.left == 0
    assert loads(tmp_path, "r@latest", 3)
    assert SaveFailed not in map(type, pp.open(tmp_path).run("r").events())


def test_a_newest_that_nobody_has_read_frees_no_other(tmp_path):
    save_all(tmp_path, [1, 2, 3])
    with pytest.raises(pp.SaveFailedError, match="no space"):
        save_all(Disk(tmp_path), [4], 10_000_000, keep=[pp.Last(2)], resume="never")
    assert [one.step for one in kept(tmp_path)] == [1, 2, 3]
