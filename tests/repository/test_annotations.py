"""What is said of checkpoints after their commit: measured, pinned, smoothed; and rules that look at it."""

import math
import sys
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.format.events import Measured, Removed, Reported, Saved, Started, Withdrawn
from peakpoint.repository import journal as journals
from peakpoint.repository.annotations import LiveAnnotations
from peakpoint.repository.removal import remove
from peakpoint.rules import smoothed_name
from peakpoint.rules.history import Smoothing, smoothed_metrics
from peakpoint.rules.retention import Removal
from strategies import START, manifest, values
from training import checkpointer, kept


def names(root):
    return [checkpoint.step for checkpoint in kept(root)]


def run_of(root):
    return pp.open(root).run("r")


# --- measured later -----------------------------------------------------------------------------------------------


def test_a_measurement_makes_a_checkpoint_the_best_while_the_training_runs(tmp_path):
    keep = [pp.Best("acc", "max", pending=2)]
    with checkpointer(tmp_path, keep=keep) as ckpt:
        for step in (1, 2):
            ckpt.report(step=step)
            ckpt.wait()
        run_of(tmp_path).record("r:1", {"acc": 0.9}, source="evaluate.py")
        run_of(tmp_path).record("r:2", {"acc": 0.5})
        for step in (3, 4, 5):
            ckpt.report(step=step)
            ckpt.wait()
    assert names(tmp_path) == [1, 4, 5], "1 is the best, 4 and 5 are not measured yet"
    assert run_of(tmp_path).best("acc").step == 1
    assert run_of(tmp_path).best("acc").metrics == {"acc": 0.9}
    assert pp.open(tmp_path).find_manifest("r:1").metrics == {}, "the manifest never changes"
    with checkpointer(tmp_path, keep=keep) as ckpt:  # the same after a restart
        ckpt.resume()
        ckpt.report(step=6, acc=0.95)
        ckpt.wait()
        assert not ckpt.report(step=7, acc=0.2).saved
    assert names(tmp_path) == [4, 5, 6], "6 is better than 1, and 4 and 5 are not measured yet"


def test_a_measurement_that_is_made_while_a_run_is_being_opened_is_seen(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
    run = run_of(tmp_path)
    run.record("r:1", {"acc": 0.5})
    before = journals.read(run.store, "r")
    run.record("r:1", {"acc": 0.9})
    run.pin("r:1", "a good one")
    ledger = LiveAnnotations(run.store, "r", "none.jsonl", before, run.manifests(), [])
    ledger.refresh()
    assert [seen.metrics for seen in ledger.view(run.manifests())] == [{"acc": 0.9}]
    assert list(ledger.pinned.values()) == ["a good one"]


def test_of_several_values_the_last_counts(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max"), pp.Last(2)]) as ckpt:
        ckpt.report(step=1, acc=0.5)
        ckpt.wait()
        run_of(tmp_path).record("r:1", {"acc": 0.9})
        assert ckpt.report(step=2, acc=0.8).reasons == ("the newest",)
        ckpt.wait()
        run_of(tmp_path).record("r:1", {"acc": 0.1, "other": math.nan})
        reasons = ckpt.report(step=3, acc=0.7).reasons
    assert reasons == ("the newest",)
    best = run_of(tmp_path).best("acc")
    assert (best.step, best.metrics["acc"]) == (2, 0.8)
    assert names(tmp_path) == [2, 3]


def test_a_measurement_is_taken_back_and_rules_see_it_while_the_training_runs(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max"), pp.Best("late", "max", pending=1)]) as ckpt:
        ckpt.report(step=1, acc=0.5)
        ckpt.wait()
        run = run_of(tmp_path)
        run.record("r:1", {"acc": 0.99, "late": 0.9, "other": 1.0}, source="a slip")
        assert not ckpt.report(step=2, acc=0.7, late=0.1).saved
        assert run.withdraw("r:1", "acc", "late").metrics == {"acc": 0.5, "other": 1.0}, "as the training reported it"
        assert run.best("acc").metrics["acc"] == 0.5
        assert ckpt.report(step=3, acc=0.6, late=0.2).saved
        ckpt.wait()
        before = run.events()
        for wrong in ("acc", "others"):
            with pytest.raises(pp.errors.NotFoundError, match="recorded: other"):
                run.withdraw("r:1", "other", wrong)
        with pytest.raises(pp.errors.ConfigError, match="at least one"):
            run.withdraw("r:1")
        assert run.events() == before
        run.record("r:1", {"late": 0.3})
        assert run.best("late").metrics["late"] == 0.3, "it can be measured again"
    assert [type(event).__name__ for event in run.events() if isinstance(event, Measured | Withdrawn)] == [
        "Measured",
        "Withdrawn",
        "Measured",
    ]


@pytest.mark.parametrize("wrong", [{}, {"a b": 1.0}, {"acc": "high"}, {"acc": True}, {"acc": None}])
def test_what_is_no_measurement_is_refused_and_nothing_written(tmp_path, wrong):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(step=1)
    before = run_of(tmp_path).events()
    with pytest.raises(pp.errors.ConfigError):
        run_of(tmp_path).record("r:1", wrong)
    with pytest.raises(pp.errors.NotFoundError, match=r"no part 'ema' in .*parts: model"):
        run_of(tmp_path).record("r:1", {"acc": 1.0}, part="ema")
    assert run_of(tmp_path).events() == before


def test_many_record_at_once_while_a_training_runs(tmp_path):
    keep = [pp.Best("acc", "max", pending=50)]
    with checkpointer(tmp_path, keep=keep) as ckpt:
        for step in range(1, 9):
            ckpt.report(step=step)
            ckpt.wait()

        def measure(step):
            run_of(tmp_path).record(f"r:{step}", {"acc": float(step % 5)}, source=f"{step}")

        threads = [threading.Thread(target=measure, args=(step,)) for step in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ckpt.report(step=9)
        ckpt.wait()
    assert names(tmp_path) == [4, 9]
    measured = [event for event in run_of(tmp_path).events() if isinstance(event, Measured)]
    assert sorted(event.step for event in measured) == list(range(1, 9))


# --- pins ---------------------------------------------------------------------------------------------------------


def test_a_pin_protects_until_it_is_taken_away(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        run_of(tmp_path).pin("r:1", "for the paper")
        ckpt.report(step=2)
        ckpt.report(step=3)
        ckpt.wait()
        assert names(tmp_path) == [1, 3]
        claims = run_of(tmp_path).kept()[kept(tmp_path)[0].id]
        assert [claim.reason for claim in claims] == ["pinned: for the paper"]
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.resume()
        ckpt.report(step=4)
        ckpt.wait()
        assert names(tmp_path) == [1, 4]
        run_of(tmp_path).unpin("r:1")
        run_of(tmp_path).unpin("r:1")
        ckpt.report(step=5)
    assert names(tmp_path) == [5]
    with pytest.raises(pp.errors.NotFoundError):
        run_of(tmp_path).pin("r:1", "too late")
    with pytest.raises(pp.errors.ConfigError, match="reason"):
        run_of(tmp_path).pin("r:5", " ")


def test_a_pin_that_comes_while_a_training_starts_is_seen(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(step=1)
    run, one = run_of(tmp_path), kept(tmp_path)[0]
    before = journals.read(run.store, "r")
    run.pin("r:1", "right now")
    run.record("r:1", {"acc": 0.5})
    ledger = LiveAnnotations(run.store, "r", "000009.jsonl", before, run.manifests(), ())
    ledger.refresh()
    assert ledger.pinned == {one.id: "right now"}
    assert ledger.view(run.manifests())[0].metrics == {"acc": 0.5}


def test_notes_count_in_the_order_that_they_have_after_a_restart(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(step=1)
    run, one = run_of(tmp_path), kept(tmp_path)[0]
    ledger = LiveAnnotations(run.store, "r", "000009.jsonl", journals.read(run.store, "r"), run.manifests(), ())
    slow = journals.Journal(run.store, "r", lambda: START)  # it is earlier, and writes later
    run.record("r:1", {"acc": 0.5})
    ledger.refresh()
    slow.append(
        Measured(at=START, checkpoint=one.id, step=1, metrics={"acc": 0.9}, part=None, source="slow", by="somebody")
    )
    slow.close()
    ledger.refresh()
    assert [one.metrics for one in ledger.view(run.manifests())] == [{"acc": 0.5}]
    assert [one.metrics for one in run.annotated()] == [{"acc": 0.5}]


def removed_by_hand(root, ref):
    """What ``peakpoint rm`` does."""
    run = run_of(root)
    journal = journals.Journal(run.store, "r", lambda: START)
    assert remove(run.store, journal, [Removal(run.find_manifest(ref), "by hand")], by="somebody") == {}
    journal.close()


def test_what_was_removed_by_hand_no_longer_keeps_others_from_being_saved(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Best("acc", "max")]) as ckpt:
        ckpt.report(step=1, acc=0.9)
        ckpt.report(step=2, acc=0.5)
        ckpt.wait()
        removed_by_hand(tmp_path, "r:1")
        assert ckpt.report(step=3, acc=0.6).saved, "it is the best that there is"
    assert names(tmp_path) == [3]


def test_a_name_that_is_used_again_belongs_to_the_new_checkpoint(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        (first,) = kept(tmp_path)
        removed_by_hand(tmp_path, "r:1")
        ckpt.save("for the paper")
        ckpt.report(step=2)
        ckpt.wait()
        asked, _ = kept(tmp_path)
    assert (asked.name, asked.reasons) == (first.name, ("saved on request: for the paper",))
    assert asked.id != first.id


# --- smoothed -----------------------------------------------------------------------------------------------------


@given(st.lists(values, max_size=12), st.integers(2, 4))
def test_means_are_those_of_the_last_finite_values(reported, window):
    smoothing = Smoothing(frozenset({("m", window)}))
    for number, value in enumerate(reported, 1):
        smoothing.report({"m": value})
        finite = [v for v in reported[:number] if math.isfinite(v)][-window:]
        found = smoothing.means()[smoothed_name("m", window)]
        if len(finite) < window:
            assert math.isnan(found)
        else:
            largest = Fraction(sys.float_info.max)
            exact = sum(Fraction(v / window) for v in finite)
            assert found == float(min(max(exact, -largest), largest))


@settings(max_examples=60)
@given(st.data())
def test_what_is_derived_from_the_journal_is_what_the_training_saw(data):
    """Reports, saves and resumes in any order; a branch sees its own past and no other."""
    wanted = frozenset({("m", 2), ("m", 3)})
    events, seen, manifests = [], {}, []
    history: list[tuple[int, float]] = []
    places: dict[str | None, list[tuple[int, float]]] = {None: []}
    for number in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["report", "report", "save", "resume"]))
        if what == "report":
            value = data.draw(st.sampled_from([1.0, 2.0, 4.0, math.nan]))
            report = len(history) + 1
            history = [*history, (report, value)]
            events.append(Reported(at=START, report=report, step=0, epoch=None, metrics={"m": value}))
        elif what == "save":
            one = manifest(id=f"c{number}", sequence=number + 1, report=len(history))
            manifests.append(one)
            places[one.id] = history
            smoothing = Smoothing(wanted, [{"m": value} for _, value in history])
            seen[one.id] = smoothing.means()
            fields = {"name": one.name, "sequence": one.sequence, "report": one.report, "reasons": ()}
            events.append(Saved(at=START, checkpoint=one.id, **fields))
        else:
            origin = data.draw(st.sampled_from(list(places)))
            history = places[origin]
            events.append(Started(at=START, checkpoint=origin, report=len(history)))
    assert repr(smoothed_metrics({one.id: one.report for one in manifests}, events, wanted)) == repr(seen)


def curve(root, values_, **options):
    saved = []
    with checkpointer(root, keep=[pp.Best("acc", "max", smooth=3)], **options) as ckpt:
        ckpt.resume()
        for number, value in values_:
            if ckpt.report(step=number, acc=value).saved:
                saved.append(number)
    return saved


def test_a_lucky_evaluation_does_not_win_a_smoothed_best(tmp_path):
    accuracies = [0.1, 0.2, 0.9, 0.3, 0.5, 0.6, 0.7, 0.2, 0.1]
    numbered = list(enumerate(accuracies, 1))
    assert curve(tmp_path / "a", numbered) == [3, 4, 5, 7]
    assert names(tmp_path / "a") == [7], "and not 3, which was highest"
    # interrupted after report 6, it goes on from its newest checkpoint, 5, and sees the same past
    assert curve(tmp_path / "b", numbered[:6]) == [3, 4, 5]
    assert curve(tmp_path / "b", numbered[5:]) == [7]
    assert names(tmp_path / "b") == [7]
    assert "best acc over 3 reports (max): 0.6" in run_of(tmp_path / "b").kept()[kept(tmp_path / "b")[0].id][0].reason


def test_a_budget_lets_the_least_claimed_go_first_and_never_the_newest(tmp_path):
    model = torch.nn.Linear(1000, 25)  # about 0.1 MB
    keep = [pp.Best("acc", "max"), pp.Every(steps=1), pp.Budget("0.4 MB")]
    with checkpointer(tmp_path, state={"model": model}, keep=keep) as ckpt:
        for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
            ckpt.report(step=step, acc=accuracy)
            ckpt.wait()
    assert names(tmp_path) == [2, 4, 5], "the best is claimed twice, the newest is protected"
    removed = [event for event in run_of(tmp_path).events() if isinstance(event, Removed)]
    assert [event.reason for event in removed] == [
        "over the budget (budget:400000) and claimed least, by 1 rule",
        "over the budget (budget:400000) and claimed least, by 1 rule",
    ]
    with checkpointer(tmp_path, state={"model": model}, keep=[pp.Last(3), pp.Budget(1)]) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="no longer keep 3 checkpoints"):
            ckpt.resume()
        ckpt.report(step=6)
    assert names(tmp_path) == [6]
