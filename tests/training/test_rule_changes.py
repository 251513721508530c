"""What a change of rules lets go is said before anything goes, and can be brought back."""

import os
import signal
import warnings
from datetime import UTC, datetime, timedelta

import pytest
import torch

import peakpoint as pp
from peakpoint.cli.main import cli
from peakpoint.format import layout
from peakpoint.format.events import Opened
from peakpoint.repository import maintenance
from peakpoint.store import FileOps, LocalStore
from training import checkpointer, kept

HOUR = timedelta(hours=1)


class Clock:
    """Tells the time that it is set to."""

    def __init__(self):
        self.now = datetime(2026, 3, 1, tzinfo=UTC)

    def __call__(self):
        return self.now


def state():
    model = torch.nn.Linear(2, 1)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def run(root, rules, *curve, metric="acc", **options):
    """One report for each value; returns what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with checkpointer(root, state=state(), keep=pp.rules.parse_all(rules), **options) as ckpt:
            ckpt.resume()
            first = steps(root)[-1] + 1 if steps(root) else 1
            for step, value in enumerate(curve, first):
                ckpt.report({metric: value}, step=step)
                ckpt.wait()
    return [str(one.message) for one in said if issubclass(one.category, pp.PeakpointWarning)]


def steps(root):
    return [one.step for one in kept(root)]


def trashed(root, clock=None):
    found = pp.open(root).run("r")
    return [
        one.manifest.step
        for one in (maintenance.in_trash(found, clock=clock) if clock else maintenance.in_trash(found))
    ]


def test_the_best_by_a_metric_of_another_name_is_announced_and_comes_back(tmp_path):
    assert run(tmp_path, "best:val_acc:max last:1", 0.7, 0.9, 0.8, metric="val_acc") == []
    [said] = run(tmp_path, "best:acc:max last:1", 0.8)
    assert said.startswith(
        "the rules have changed and no longer keep 1 checkpoint: step2_val_acc_0.9000; by the earlier rules the best "
        "val_acc, 0.9, is step2_val_acc_0.9000. What they do not keep is removed with the next save or at the end of "
        "this training"
    )
    assert f"for 24 h with: peakpoint undo {tmp_path} r/NAME" in said
    assert f"peakpoint pin {tmp_path} r/NAME" in said
    assert (steps(tmp_path), trashed(tmp_path)) == ([4], [2]), "3 went from save to save"
    cli(["undo", str(tmp_path), "r/step2_val_acc_0.9000"], standalone_mode=False)
    assert pp.open(tmp_path).run("r").best("val_acc", mode="max").metrics == {"val_acc": 0.9}


def test_the_best_is_announced_also_when_it_is_the_newest(tmp_path):
    run(tmp_path, "best:val_acc:max last:1", 0.7, 0.9, metric="val_acc")
    [said] = run(tmp_path, "best:acc:max last:1", 0.8)
    assert "by the earlier rules the best val_acc, 0.9, is step2_val_acc_0.9000" in said
    assert (steps(tmp_path), trashed(tmp_path)) == ([3], [2])


def test_what_the_same_rules_let_go_is_not_announced_and_takes_no_space(tmp_path):
    run(tmp_path, "best:acc:max last:2", 0.7, 0.9, 0.8)
    assert run(tmp_path, "last:2 best:acc:max", 0.8, 0.95) == []
    assert (steps(tmp_path), trashed(tmp_path)) == ([4, 5], [])


def test_many_are_counted_and_some_are_named(tmp_path):
    run(tmp_path, "last:9", *range(9))
    [said] = run(tmp_path, "last:2", 1)
    assert "no longer keep 8 checkpoints: step1, step2, step3, ... and 5 more. What" in said
    assert (steps(tmp_path), trashed(tmp_path)) == ([9, 10], [*range(1, 9)])


def test_rules_that_keep_more_are_not_announced(tmp_path):
    run(tmp_path, "last:2", 1, 2, 3)
    assert run(tmp_path, "last:5 every:1st", 1) == []


def test_a_smoothed_best_of_the_rules_before_is_known(tmp_path):
    run(tmp_path, "best:acc:max:smooth=2", 0.1, 0.9, 0.8, 0.2, 0.1)
    assert steps(tmp_path) == [3, 5]  # the best, and the end
    [said] = run(tmp_path, "best:loss:min", 1.0, metric="loss")
    assert "step3" in said


def test_whoever_stops_a_training_that_has_announced_it_keeps_everything_and_is_told_again(tmp_path):
    run(tmp_path, "last:3", 1, 2, 3)

    def stop(how):
        ckpt = checkpointer(tmp_path, keep=[pp.Last(1)], state=state())
        with pytest.warns(pp.PeakpointWarning) as said, pytest.raises(KeyboardInterrupt):
            how(ckpt)
        assert any("no longer keep 3 checkpoints" in str(one.message) for one in said)
        assert steps(tmp_path) == [1, 2, 3]

    def inside(ckpt):
        with ckpt:
            ckpt.resume()
            raise KeyboardInterrupt

    def closed(ckpt):
        try:
            ckpt.resume()
            raise KeyboardInterrupt
        finally:
            ckpt.close()

    stop(inside)
    stop(closed)
    pp.open(tmp_path).run("r").pin("r:1", "wanted")
    assert "no longer keep 2 checkpoints: step2, step3" in run(tmp_path, "last:1", 4)[0]
    assert (steps(tmp_path), trashed(tmp_path)) == ([1, 4], [2, 3])


def test_a_pin_after_the_announcement_counts(tmp_path):
    run(tmp_path, "last:3", 1, 2, 3)
    with checkpointer(tmp_path, state=state(), keep=[pp.Last(1)]) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="no longer keep"):
            ckpt.resume()
        pp.open(tmp_path).run("r").pin("r:1", "wanted")
        ckpt.report(step=4)
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize(
    ("undo_for", "says", "there"), [("2h", "for 2 h with", [1, 2, 3, 4]), ("0", "permanently deleted", [])]
)
def test_a_time_that_was_asked_for_is_that_of_everything(tmp_path, undo_for, says, there):
    run(tmp_path, "last:3", 1, 2, 3)
    [said] = run(tmp_path, "last:1", 4, 5, undo_for=undo_for)
    assert says in said
    assert (steps(tmp_path), trashed(tmp_path)) == ([5], there)


def test_what_a_change_has_put_into_the_trash_goes_when_its_time_is_over(tmp_path):
    clock = Clock()
    run(tmp_path, "last:3", 1, 2, 3, clock=clock)
    with checkpointer(tmp_path, state=state(), keep=[pp.Last(1)], clock=clock) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="no longer keep"):
            ckpt.resume()
        for step, hours, there in [(4, 23, [1, 2, 3]), (5, 2, []), (6, 1, [])]:
            ckpt.report(step=step)
            ckpt.wait()
            clock.now += hours * HOUR
            assert trashed(tmp_path, clock) == there
        assert len(list((tmp_path / layout.checkpoints_prefix("r")).iterdir())) == 1


def test_parts_that_the_rules_before_needed_are_announced(tmp_path):
    run(tmp_path, "best:acc:max last:1", 0.9, 0.5, 0.4)
    [said] = run(tmp_path, "best:acc:max:parts=model last:1", 0.3)
    assert "no longer need optimizer of 1 checkpoint; this is removed" in said
    assert "optimizer" not in kept(tmp_path)[0].parts


def test_rules_of_a_newer_release_keep_everything(tmp_path):
    run(tmp_path, "last:2", 1, 2)
    found = pp.open(tmp_path).run("r")
    with maintenance.writing(found, "a newer release") as journal:
        journal.append(Opened(at=journal.now(), by={}, rules=("newest:9",)))
    assert "no longer keep 1 checkpoint: step1." in run(tmp_path, "last:2", 3)[0]


def test_a_metric_that_the_loop_calls_otherwise_is_said_at_the_first_report_and_costs_nothing(tmp_path):
    run(tmp_path, "best:val_acc:max last:1", 0.9, 0.8, metric="val_acc")
    [said] = run(tmp_path, "best:val_acc:max last:1", 0.95, 0.5)
    assert "the report at step 3 has no 'val_acc': rules that rank by it skip such reports; it has acc" in said
    assert steps(tmp_path) == [1, 4]


# --- rules that could not be applied ------------------------------------------------------------------------------


class Killing(FileOps):
    """Kills the process when the manifest of step 2 is about to go."""

    def unlink(self, path, *at):
        if "step2/manifest.json" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        super().unlink(path, *at)


def three_steps(store, **options):
    with checkpointer(store, keep=[pp.Last(1)], **options) as ckpt:
        for _ in ckpt.steps(3):
            ckpt.report()
            ckpt.wait()


@pytest.fixture
def cut_short(tmp_path):
    """A run of which the process was killed between its last commit and the removal of the one before."""
    child = os.fork()
    if child == 0:
        three_steps(LocalStore(tmp_path, Killing()))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert steps(tmp_path) == [2, 3]
    return tmp_path


def test_rules_are_applied_although_nothing_is_left_to_train(cut_short):
    three_steps(cut_short)
    assert (steps(cut_short), trashed(cut_short)) == ([3], [])


def test_a_change_of_rules_is_applied_although_nothing_is_left_to_train(tmp_path):
    run(tmp_path, "last:3", 1, 2, 3)
    assert "no longer keep" in run(tmp_path, "last:1")[0]
    assert (steps(tmp_path), trashed(tmp_path)) == ([3], [1, 2])


def test_a_training_that_has_not_begun_removes_nothing(cut_short):
    checkpointer(cut_short, keep=[pp.Last(1)]).close()
    with pytest.raises(pp.errors.MismatchError):
        three_steps(cut_short, state={"model": torch.nn.Linear(9, 9)})
    assert steps(cut_short) == [2, 3]


@pytest.mark.parametrize("how", ["never", "r:2"])
def test_a_newest_that_nobody_has_read_costs_no_other(cut_short, how):
    with checkpointer(cut_short, keep=[pp.Last(1)], resume=how) as ckpt:
        ckpt.resume()
    assert steps(cut_short) == [2, 3]


def test_a_damaged_newest_costs_no_other(cut_short):
    file = cut_short / layout.file_key("r", "step3", "model.safetensors")
    damaged = file.read_bytes()[:-1] + b"x"
    file.unlink()  # step 2 has a link to it
    file.write_bytes(damaged)
    with (
        checkpointer(cut_short, keep=[pp.Last(1)]) as ckpt,
        pytest.warns(pp.PeakpointWarning, match="skipped"),
    ):
        ckpt.resume()
    assert steps(cut_short) == [2, 3]
