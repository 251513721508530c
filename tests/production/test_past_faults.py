"""What production must not do: each of these it did once."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest

import peakpoint as pp
from peakpoint.format import layout
from peakpoint.format.events import Closed, Opened, Removed
from peakpoint.production import hooks, promotion
from peakpoint.production.policy import Improvement, Policy, SigningPolicy, ValidationPolicy, read_policies
from peakpoint.production.proposal import propose
from peakpoint.production.release import Release
from peakpoint.production.validation import with_golden
from peakpoint.repository import aliases, maintenance
from peakpoint.repository import journal as journals
from peakpoint.repository.alias_protection import protected_by_aliases
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import ValidationSpec
from peakpoint.store import LocalStore
from production_task import build, data, in_process, policy, trained
from promoting import repository, validated
from training import checkpointer


def promote(found, ref, alias="champion", **options):
    return promotion.promote(propose(found, ref, alias, **options), "a test", force=True)


def released(found, validate=in_process):
    return Release(found, "champion", read_policies(found.store), validate).run()


def removing(run, manifest):
    """What somebody leaves who is killed right after he has said that he removes a checkpoint."""
    removal(run, manifest).close()


def removal(run, manifest, *before):
    """The journal of somebody who has said that he removes a checkpoint, and does."""
    journal = journals.Journal(run.store, run.name, utc_now)
    for event in before:
        journal.append(event)
    facts = {"step": manifest.step, "epoch": None, "reason": "a test", "by": "somebody"}
    journal.append(Removed(at=utc_now(), checkpoint=manifest.id, name=manifest.name, **facts))
    journal.sync()
    return journal


# --- champions that are lost, or refused for ever -----------------------------------------------------------------


def test_one_who_gives_up_leaves_the_announcements_of_others(tmp_path):
    found = repository(tmp_path)
    promote(found, "r:2")
    late = propose(found, "r:1", "champion")
    promote(found, "r:3")

    class Slow(LocalStore):
        def create(self, key, data):
            if key == layout.alias_key("champion", 3):  # the first one has looked whether somebody removes it
                with pytest.raises(pp.errors.ConflictError, match="changed meanwhile"):
                    promotion.promote(late, "a second one, who has seen record 1", force=True)
                run = found.run("r")
                maintenance.remove(run, [run.find_manifest("r:1")], "a third one")
            return super().create(key, data)

    slow = Repository(Slow(tmp_path))
    promote(slow, "r:1")
    assert found.find("@champion").step == 1


def test_what_a_killed_removal_has_left_can_be_promoted_and_pinned(tmp_path):
    found = repository(tmp_path)
    removing(found.run("r"), found.find_manifest("r:2"))
    found.run("r").pin("r:2", "it is still there, and nobody removes it")
    promote(found, "r:2")


@pytest.mark.parametrize("act", ["promote", "pin"])
def test_a_removal_that_ends_before_it_is_looked_for_has_taken_the_checkpoint(tmp_path, act):
    found = repository(tmp_path)
    victim = found.find_manifest("r:1")

    class Slow(LocalStore):
        ending = False

        def get(self, key, *place, **limits):
            data = super().get(key, *place, **limits)
            if self.ending and key == layout.manifest_key("r", victim.name):
                self.ending = False
                self.delete(key)
                journal.append(Closed(at=utc_now(), why="noted"))
                journal.close()
            return data

    slow = Repository(Slow(tmp_path))
    proposal = propose(slow, "r:1", "champion")
    journal = removal(found.run("r"), victim)
    slow.store.ending = True
    with pytest.raises(pp.errors.ConflictError, match="being removed"):
        promotion.promote(proposal, "a test", force=True) if act == "promote" else slow.run("r").pin("r:1", "a test")
    assert aliases.numbers(found.store, "champion") == []


def test_workers_that_outlive_a_killed_training_remove_nothing(tmp_path):
    found = repository(tmp_path)
    journal = removal(found.run("r"), found.find_manifest("r:2"), Opened(at=utc_now(), by={}, rules=()))
    wait, end = os.pipe()
    worker = os.fork()
    if not worker:
        os.close(end)
        os.read(wait, 1)
        os._exit(0)
    try:
        journal.close()
        found.run("r").pin("r:2", "the worker still has the journal open, and nobody holds the run")
        hold = found.store.hold(layout.writer_lock("r"), b"{}")
        with pytest.raises(pp.errors.ConflictError, match="being removed"):
            found.run("r").pin("r:2", "now somebody does")
        hold.release()
    finally:
        os.close(end)
        os.waitpid(worker, 0)
        os.close(wait)


def test_what_a_roll_back_would_restore_is_protected(tmp_path):
    found = repository(tmp_path, (0.1, 0.2, 0.3, 0.4, 0.5))
    promote(found, "r:1")
    promote(found, "r:2")
    for bad in ("r:3", "r:4", "r:5"):
        promote(found, bad)
        promotion.rollback(found, "champion", "it is bad")
    back = next(aliases.back_from(found.store, aliases.holder(found.store, "champion")))
    assert back.target.checkpoint in protected_by_aliases(found.store, [back.target.checkpoint])


def test_an_alias_whose_newest_record_is_damaged_can_be_set_again_by_force(tmp_path):
    found = repository(tmp_path)
    promote(found, "r:1")
    promote(found, "r:2")
    path = tmp_path / layout.alias_key("champion", 2)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-30])
    promote(found, "r:3")


@pytest.mark.parametrize("suffix", ["predictions", "json"])
def test_a_damaged_validation_of_the_holder_does_not_stop_a_promotion_by_force(tmp_path, suffix):
    found = repository(tmp_path)
    validated(found, "r:1", predicted=[0, 1], labels=[0, 1])
    validated(found, "r:2", predicted=[0, 1], labels=[0, 1])
    promote(found, "r:1")
    for path in (tmp_path / layout.validations_of("r")).glob(f"{found.find('r:1').id}/*.{suffix}"):
        path.unlink() if suffix == "predictions" else path.write_bytes(b"{}")
    promote(found, "r:2")


def test_a_golden_file_that_is_gone_stops_neither_loading_nor_going_back(tmp_path):
    found = repository(tmp_path)
    promote(found, "r:1")
    text = 'format = 1\n[champion]\n[other.validation]\nmodel = "a:b"\ngolden = "gone.safetensors"\n'
    (tmp_path / "production.toml").write_text(text)
    assert pp.load("@champion", root=tmp_path)["x"] == 1


# --- aliases that move although nobody wants it -------------------------------------------------------------------


def test_a_release_after_a_roll_back_waits_for_somebody(tmp_path):
    found = trained(tmp_path, (0.9, 0.1, 0.11))
    promote(found, "r:1")
    policy(tmp_path)
    assert released(found).outcome == "promoted"
    promotion.rollback(found, "champion", "an incident")
    released(found)
    assert found.find("@champion").step == 1


def test_what_a_roll_back_has_gone_past_is_not_released_again(tmp_path):
    found = repository(tmp_path)
    for ref in ("r:1", "r:2", "r:3"):
        promote(found, ref)
    promotion.rollback(found, "champion", "both are bad", to=1)
    passed = aliases.rolled_back(aliases.history(found.store, "champion").records)
    assert passed.keys() == {found.find("r:2").id, found.find("r:3").id}


def test_a_release_refuses_to_guess_what_a_damaged_history_says(tmp_path):
    found = trained(tmp_path, (0.9, 0.5, 0.1))
    policy(tmp_path)
    promote(found, "r:1")
    promote(found, "r:3")
    promotion.rollback(found, "champion", "it is bad")
    promote(found, "r:2")
    path = tmp_path / layout.alias_key("champion", 3)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    with pytest.raises((pp.errors.CorruptError, pp.errors.FormatError)):
        released(found)


def test_a_roll_back_whose_hook_failed_can_be_repeated_as_it_says(tmp_path):
    found = repository(tmp_path)
    for ref in ("r:1", "r:2", "r:3"):
        promote(found, ref)
    (tmp_path / "production.toml").write_text('format = 1\n[champion]\n[[champion.hooks]]\ncommand = ["false"]\n')
    command = [sys.executable, "-m", "peakpoint", "rollback", tmp_path, "champion"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "the same command again tells the hooks again" in done.stderr:
        subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.find("@champion").step == 2


def test_the_last_that_a_hook_is_told_is_the_last_change(tmp_path):
    found = repository(tmp_path)
    first = promote(found, "r:1")
    text = 'format = 1\n[champion]\n[[champion.hooks]]\ncommand = ["true"]\n'
    (tmp_path / "production.toml").write_text(
        text + f'[[champion.hooks]]\ncommand = ["sh", "-c", "cat >> {tmp_path}/said; echo >> {tmp_path}/said"]\n'
    )
    asked = read_policies(found.store).of("champion")

    def between(hook):
        if hook == "true":  # while the first hook is at it, somebody else changes the alias, and tells
            hooks.tell(found.store, promote(found, "r:2"), asked)

    hooks.tell(found.store, first, asked, progress=between)
    assert found.find("@champion").id in (tmp_path / "said").read_text().splitlines()[-1]


def test_a_roll_back_leads_to_what_can_be_loaded(tmp_path):
    found = repository(tmp_path)
    promote(found, "r:1")
    promote(found, "r:2")
    asked = Policy(alias="champion", signing=SigningPolicy(public_key=str(tmp_path / "release.pub")))
    with pytest.raises(pp.Error):
        promotion.rollback(found, "champion", "a test", policy=asked)


# --- wrong answers ------------------------------------------------------------------------------------------------


def test_values_of_two_evaluations_are_not_compared(tmp_path):
    found = repository(tmp_path, (0.9, 0.8))
    hard, easy = ValidationSpec(evaluate="checks:hard"), ValidationSpec(evaluate="checks:easy")
    labels, right, wrong = [0, 0, 1, 1] * 9, [0, 0, 1, 1] * 9, [1, 1, 0, 0] * 9  # by class, as image folders give them
    validated(found, "r:1", wanted=hard, metrics={"accuracy": 0.0}, predicted=wrong, labels=labels)
    validated(found, "r:2", wanted=easy, metrics={"accuracy": 1.0}, predicted=right, labels=labels)
    promote(found, "r:1")
    better = Improvement(metric="accuracy", mode="max", minimum=0.1, significance=0.01)
    asked = Policy(alias="champion", validation=ValidationPolicy(evaluate="checks:easy"), improvement=better)
    assert propose(found, "r:2", "champion", policy=asked).objections


def test_an_agreement_with_the_champion_is_asked_for_when_there_is_one(tmp_path):
    found = repository(tmp_path)
    golden = tmp_path / "golden.safetensors"
    golden.write_bytes(b"inputs")
    asked = Policy(alias="champion", validation=ValidationPolicy(model="a:b", golden=str(golden), agreement=0.99))
    wanted = with_golden(asked.wanted)
    validated(found, "r:1", wanted=wanted)
    validated(found, "r:2", wanted=wanted)
    promote(found, "r:1")
    assert propose(found, "r:2", "champion", policy=asked).objections


def test_an_agreement_with_a_champion_that_cannot_be_read_is_none(tmp_path):
    from safetensors.torch import save_file

    for run in ("r", "q"):
        with checkpointer(tmp_path, run=run, state={"model": build()}) as ckpt:
            ckpt.report(step=1)
    save_file({"inputs": data()[0]}, tmp_path / "golden.safetensors")
    found = pp.open(tmp_path)
    promote(found, "r:1")
    (tmp_path / layout.manifest_key("r", found.find("r:1").name)).unlink()
    done = pp.validate("q:1", root=tmp_path, model=build, golden=tmp_path / "golden.safetensors", agreement=0.99)
    assert not done.passed


def test_a_validation_from_the_future_does_not_count(tmp_path):
    found = repository(tmp_path)
    validated(found, "r:1", at=utc_now() + timedelta(days=3650))
    assert propose(found, "r:1", "champion").objections


def test_one_record_of_an_alias_is_of_one_release(tmp_path):
    found = trained(tmp_path)
    policy(tmp_path)

    def overtaken(*args, **options):
        released(found)  # somebody else is as far, and faster
        return in_process(*args, **options)

    released(found, overtaken)
    (record,) = aliases.history(found.store, "champion").records
    assert record.release is not None


def test_a_significance_that_cannot_be_is_refused_with_the_file(tmp_path):
    found = repository(tmp_path)
    text = '[champion.improvement]\nmetric = "accuracy"\nmode = "max"\nsignificance = 1.0\n'
    (tmp_path / "production.toml").write_text(f"format = 1\n[champion]\n{text}")
    with pytest.raises(
        pp.errors.ConfigError, match=r"production\.toml, table \[champion\]: improvement: significance = 1\.0"
    ):
        promote(found, "r:1")


def test_a_hook_may_leave_something_running(tmp_path):
    found = repository(tmp_path)
    text = 'format = 1\n[champion]\n[[champion.hooks]]\ncommand = ["sh", "-c", "sleep 5 & exit 0"]\ntimeout = "1s"\n'
    (tmp_path / "production.toml").write_text(text)
    told = hooks.tell(found.store, promote(found, "r:1"), read_policies(found.store).of("champion"))
    assert told[0].error is None


def test_a_metric_that_was_recorded_anew_after_the_validation_makes_it_stale(tmp_path):
    found = trained(tmp_path, (0.9, 0.1))
    policy(tmp_path)
    done = pp.validate("r:1", root=tmp_path, evaluate="production_task:evaluate", model="production_task:build")
    assert done.passed
    assert done.metrics["accuracy"] < 0.6
    found.run("r").record("r:1", {"accuracy": 0.999})
    assert released(found).outcome == "refused"
