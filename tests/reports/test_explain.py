"""The lives of checkpoints, and what other rules would have done, told from the journal alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.format.events import Reported, Saved
from peakpoint.reports.explain import checkpoint_histories
from peakpoint.repository import journal as journals
from peakpoint.repository.removal import remove
from peakpoint.rules import Best, BestAtSparsity, Last, Rule
from peakpoint.rules.retention import Removal
from peakpoint.rules.simulate import what_if
from strategies import START, bests, everies, lasts, metrics, paretos, thins, topks
from training import checkpointer, kept

replayed: st.SearchStrategy[Rule] = bests | topks | everies | lasts | paretos | thins


def events_of(reports):
    return [
        Reported(at=START, report=number, step=10 * number, epoch=number - 1, metrics=values)
        for number, values in enumerate(reports, 1)
    ]


def test_an_end_names_who_beat_it(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max"), pp.Last(1)]) as ckpt:
        for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.6], 1):
            ckpt.report(step=step, acc=accuracy)
            ckpt.wait()
    found = checkpoint_histories(pp.open(tmp_path).run("r").events())
    assert [life.record.step for life in found] == [1, 2, 3, 4]
    assert [life.removed is None for life in found] == [False, True, False, True]
    assert found[2].record.metrics == {"acc": 0.7}
    assert found[2].claimed_instead == (
        ("best:acc:max", ("step2_acc_0.9000: best acc (max): 0.9, next 0.7 at step 3",)),
        ("last:1", ("step4_acc_0.6000: the newest",)),
    )
    assert found[0].record.size_bytes == kept(tmp_path)[0].size_bytes


@pytest.mark.filterwarnings("ignore::peakpoint.PeakpointWarning")
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_lives_are_those_of_the_manifests_however_a_run_was_resumed(tmp_path_factory, data):
    root, step = tmp_path_factory.mktemp("tree"), 0
    for _ in range(data.draw(st.integers(1, 4))):
        existing = [f"r/{one.name}" for one in kept(root)] if step else []
        ref = data.draw(st.sampled_from(["auto", "never", *existing]))
        with checkpointer(root, state={"x": 1}, keep=[pp.Last(100)], resume=ref) as ckpt:
            resumed = ckpt.resume()
            if resumed and data.draw(st.booleans()):
                ckpt.save("again")
            for value in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)):
                step += 1
                ckpt.report(step=step, acc=value)
    run = pp.open(root).run("r")
    told = {life.record.id: life.record for life in checkpoint_histories(run.events())}
    for manifest in run.manifests():
        one = told[manifest.id]
        assert (one.sequence, one.step, one.forks) == (manifest.sequence, manifest.step, manifest.forks)
        assert dict(one.metrics) == dict(manifest.metrics) or manifest.asked


def test_an_end_that_came_to_nothing_at_first_has_the_reason_of_the_last(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(2)]) as ckpt:
        ckpt.report(step=1)
        ckpt.report(step=2)
    run = pp.open(tmp_path).run("r")
    old, _ = run.manifests()
    for why, spared in (("first", {old.id}), ("second", set())):
        journal = journals.Journal(run.store, "r", lambda: START)
        remove(run.store, journal, [Removal(old, why)], by="somebody", protected=lambda spared=spared: spared)
        journal.close()
    assert [life.removed and life.removed.reason for life in checkpoint_histories(run.events())] == ["second", None]


NO_RULE = ("the newest: no rule can rank yet",)  # of a training whose rules never keep anything


@pytest.mark.filterwarnings("ignore::peakpoint.PeakpointWarning")
@settings(max_examples=40, deadline=None)
@given(st.lists(metrics, min_size=1, max_size=8), st.lists(replayed, min_size=1, max_size=3))
def test_a_replay_keeps_what_the_training_kept(tmp_path_factory, reports, rules):
    root = tmp_path_factory.mktemp("replay")
    with checkpointer(root, state={"x": 1}, keep=rules, clock=lambda: START) as ckpt:
        for number, values in enumerate(reports, 1):
            ckpt.report(values, step=10 * number, epoch=number - 1)
            ckpt.wait()
    run = pp.open(root).run("r")
    found = what_if(run.events(), rules, 1000)
    by_rules = [one for one in run.checkpoints() if one.reasons != NO_RULE]
    assert [one.moment.step for one in found.kept] == [one.step for one in by_rules]
    assert found.saves == sum(isinstance(event, Saved) and event.reasons != NO_RULE for event in run.events())
    assert found.reports == len(reports)


def test_a_peak_that_no_rule_held_is_said_to_be_lost():
    events = events_of([{"acc": 0.1}, {"acc": 0.9}, {"acc": 0.3}])
    lost = what_if(events, [Last(1)], 10, also=[Best("acc", "max")])
    (peak,) = lost.peaks
    assert (peak.moment.step, peak.survives) == (20, False)
    (peak,) = what_if(events, [Last(1), Best("acc", "max")], 10).peaks
    assert peak.survives
    assert (lost.saves, lost.most, lost.bytes_kept, lost.bytes_written) == (3, 2, 10, 30)


def test_a_replay_of_smoothed_rules_and_budgets():
    events = events_of([{"acc": value} for value in (0.1, 0.2, 0.9, 0.3, 0.5, 0.6, 0.7, 0.2, 0.1)])
    found = what_if(events, [Best("acc", "max", smooth=3)], 10)
    assert [one.moment.step for one in found.kept] == [70]
    found = what_if(events, [BestAtSparsity("acc", "max"), Last(5), pp.Budget(20)], 10)
    assert [one.moment.step for one in found.kept] == [80, 90]
