"""Promotion: what speaks against it, compare-and-swap, protection from retention, going back."""

import multiprocessing
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.errors import ConfigError, ConflictError, CorruptError, NotFoundError, RefusedError
from peakpoint.format import layout
from peakpoint.format.events import PartsDropped, Promoting, Removed
from peakpoint.production import promotion
from peakpoint.production.paired_test import paired, unpaired
from peakpoint.production.policy import Improvement, Policy, ValidationPolicy
from peakpoint.production.proposal import propose
from peakpoint.repository import aliases, journal, maintenance, removal
from peakpoint.rules.retention import Removal
from peakpoint.store import LocalStore
from promoting import Clock, repository, validated
from training import checkpointer


def promote(found, ref, alias="champion", why="it is good", *, force=False, policy=None, **options):
    """With the clock and the actor of ``options`` in both."""
    proposal = propose(found, ref, alias, policy=policy, **options)
    return promotion.promote(proposal, why, force=force, **options)


def names(found, alias="champion"):
    return [one.target and one.target.name for one in aliases.history(found.store, alias).records]


def holder(found, alias="champion"):
    return aliases.holder(found.store, alias).target.name


# --- what speaks against it ---------------------------------------------------------------------------------------


def objections(found, ref="r:1", alias="champion", **options):
    return propose(found, ref, alias, **options).objections


def test_what_was_never_validated_is_refused_and_by_force_it_is_on_record(tmp_path):
    found = repository(tmp_path)
    with pytest.raises(RefusedError, match="was not promoted to champion: it was never validated") as caught:
        promote(found, "r:1")
    assert caught.value.reasons == ("it was never validated",)
    assert aliases.names(found.store) == []
    record = promote(found, "r:1", force=True)
    assert record.forced == ("it was never validated",)
    assert record.validation is None
    assert aliases.history(found.store, "champion").records[0].forced == record.forced


def test_a_failed_validation_refuses_and_the_last_one_counts(tmp_path):
    found = repository(tmp_path)
    validated(found, "r:1", failures=["finite", "metrics"])
    assert objections(found) == (
        "its last validation failed: finite: finite is wrong",
        "its last validation failed: metrics: metrics is wrong",
    )
    validated(found, "r:1")
    assert objections(found) == ()
    validated(found, "r:1", failures=["latency"])
    assert objections(found) == ("its last validation failed: latency: latency is wrong",)


def test_a_validation_grows_stale(tmp_path):
    found = repository(tmp_path)
    clock = Clock()
    validated(found, "r:1", at=clock())
    policy = Policy(alias="champion", validation=ValidationPolicy(max_age="1h"))
    assert objections(found, policy=policy, clock=clock) == ()
    clock.now += timedelta(hours=1)
    (said,) = objections(found, policy=policy, clock=clock)
    assert said.startswith("its validation is stale: of 2030-01-01 12:00 UTC, older than 1:00:00")


def test_a_validation_that_was_compared_with_another_champion_is_stale(tmp_path):
    found = repository(tmp_path)
    first, second = (found.find(f"r:{step}").id for step in (1, 2))
    validated(found, "r:1")
    validated(found, "r:2", against=first)
    validated(found, "r:3", against=second)
    promote(found, "r:1")
    assert objections(found, "r:2") == ()
    assert objections(found, "r:3") == ("its validation is stale: it was not compared with the current champion",)


def test_a_validation_by_other_checks_than_the_policy_names_does_not_count(tmp_path):
    found = repository(tmp_path)
    asked = ValidationPolicy(evaluate="checks:evaluate", budgets={"parameters": 20})
    policy = Policy(alias="champion", validation=asked)
    validated(found, "r:1")
    (said,) = objections(found, policy=policy)
    assert said.startswith("its validation differs from what the policy asks in evaluate, budgets; peakpoint validate")
    validated(found, "r:1", wanted=policy.wanted)
    assert objections(found, policy=policy) == ()


def test_a_validation_counts_until_the_part_that_was_validated_is_dropped(tmp_path):
    with checkpointer(tmp_path, state={"model": {"w": 1}, "optimizer": {"m": 2}}) as ckpt:
        ckpt.report(step=1, accuracy=0.5)
        ckpt.report(step=2, accuracy=0.4)
    found = pp.open(tmp_path)
    validated(found, "r:1")
    run = found.run("r")
    rules = [pp.Best("accuracy", "max", parts="model"), pp.Last(1)]
    assert maintenance.apply_plan(run, run.plan(rules), rules) == []
    assert "optimizer" not in run.find_manifest("r:1").parts
    assert objections(found) == ()
    with maintenance.writing(run, "drop") as events:
        thinning = Removal(run.find_manifest("r:1"), "x", ("model",))
        assert removal.remove(run.store, events, [thinning], by="x") == {}
    assert objections(found) == ("its part model was dropped after the validation",)


def test_who_may_not_is_refused_also_by_force(tmp_path):
    found = repository(tmp_path)
    validated(found, "r:1")
    policy = Policy(alias="champion", may_promote=("anna", "ci on *"))
    for who, allowed in (("anna on x", True), ("ci on build-7", True), ("bob on x", False), ("anna2 on x", False)):
        proposal = propose(found, "r:1", "champion", policy=policy, by=who)
        assert bool(proposal.refusals) is not allowed, who
    with pytest.raises(RefusedError, match=r"bob on x may not change champion: the policy allows anna, ci on \*$"):
        promote(found, "r:1", policy=policy, by="bob on x", force=True)
    promotion.promote(propose(found, "r:1", "champion", policy=policy, by="anna on x"), "x", by="anna on x")
    with pytest.raises(RefusedError, match="bob on x may not change champion"):
        promotion.rollback(found, "champion", "no", policy=policy, by="bob on x")


def test_a_checkpoint_whose_files_are_gone_is_refused_also_by_force(tmp_path):
    found = repository(tmp_path)
    validated(found, "r:1")
    (found.find("r:1").path / "state.json").unlink()
    with pytest.raises(RefusedError, match=r"state\.json"):
        promote(found, "r:1", force=True)


def test_a_reason_is_needed(tmp_path):
    found = repository(tmp_path)
    for act in (
        lambda: promote(found, "r:1", why="  ", force=True),
        lambda: promotion.rollback(found, "champion", ""),
        lambda: promotion.retire(found, "challenger_1", ""),
    ):
        with pytest.raises(ConfigError, match="needs a reason"):
            act()


# --- the comparison -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:loss is nan")
def test_the_comparison_says_which_metric_is_better_by_the_rules_directions(tmp_path):
    rules = [pp.Best("loss", "min"), pp.Best("odd", "max"), pp.TopK("odd", "min", 1), pp.Last(9)]
    with checkpointer(tmp_path, state={"x": 1}, keep=rules) as ckpt:
        ckpt.report(step=1, loss=0.5, other=1.0, only=1.0, odd=1.0)
        ckpt.report(step=2, loss=0.4, other=2.0, odd=2.0)
        ckpt.report(step=3, loss=float("nan"), other=2.0, odd=1.5)
    found = pp.open(tmp_path)
    promote(found, "r:1", force=True)
    pairs = {one.name: one for one in propose(found, "r:2", "champion").comparison.metrics}
    assert (pairs["loss"].champion, pairs["loss"].candidate, pairs["loss"].better) == (0.5, 0.4, True)
    assert pairs["other"].better is None, "no rule says which direction is better"
    assert pairs["odd"].better is None, "rules say both"
    assert "only" not in pairs
    (loss,) = [one for one in propose(found, "r:3", "champion").comparison.metrics if one.name == "loss"]
    assert loss.better is None
    assert promote(found, "r:3", force=True).comparison["metrics"][0]["candidate"] == "nan"


def test_values_that_were_evaluated_for_both_come_before_recorded_ones(tmp_path):
    found = repository(tmp_path, accuracies=(0.7, 0.9))
    validated(found, "r:1", metrics={"accuracy": 0.71})
    promote(found, "r:1")
    validated(found, "r:2")
    (pair,) = propose(found, "r:2", "champion").comparison.metrics
    assert (pair.champion, pair.candidate, pair.source) == (0.7, 0.9, "recorded")
    validated(found, "r:2", metrics={"accuracy": 0.88})
    (pair,) = propose(found, "r:2", "champion").comparison.metrics
    assert (pair.champion, pair.candidate, pair.source) == (0.71, 0.88, "validated")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=40))
def test_predictions_are_compared_example_by_example(tmp_path_factory, rows):
    old, new, labels = map(list, zip(*rows, strict=True))
    found = repository(tmp_path_factory.mktemp("paired"), accuracies=(0.7, 0.9))
    validated(found, "r:1", predicted=old, labels=labels)
    promote(found, "r:1")
    validated(found, "r:2", predicted=new, labels=labels)
    comparison = propose(found, "r:2", "champion").comparison
    assert comparison.paired == paired(old, new, labels)
    flipped = [(i, c, a, b) for i, (a, b, c) in enumerate(rows) if a == c != b]
    assert list(comparison.flips) == flipped[:10]


def test_predictions_on_other_examples_are_not_compared(tmp_path):
    found = repository(tmp_path)
    validated(found, "r:1", predicted=[0, 1], labels=[0, 0])
    promote(found, "r:1")
    assert propose(found, "r:2", "champion").comparison.unpaired == (
        "the candidate has no stored predictions; validate it with --golden or --with to store them"
    )
    validated(found, "r:2", predicted=[0, 1], labels=[0, 1])
    comparison = propose(found, "r:2", "champion").comparison
    assert comparison.paired is None
    assert comparison.unpaired == "the predictions of the two are on different examples"
    assert comparison.apart == (0.5, *unpaired(0.5, 1.0, 2, 2))


def test_an_improvement_that_the_policy_asks_for_is_judged(tmp_path):
    found = repository(tmp_path, accuracies=(0.7, 0.705, 0.9))
    policy = Policy(
        alias="champion", improvement=Improvement(metric="accuracy", mode="max", minimum=0.01, significance=0.05)
    )
    for step, predicted in ((1, [1] * 20), (2, [1] * 20), (3, [0] * 20)):
        validated(found, f"r:{step}", predicted=predicted, labels=[0] * 20)
    promote(found, "r:1", policy=policy)
    assert objections(found, "r:2", policy=policy) == (
        "accuracy rose by 0.005, less than the 0.01 that the policy asks for",
    )
    assert objections(found, "r:3", policy=policy) == ()
    other = Policy(alias="champion", improvement=Improvement(metric="f1", mode="max"))
    assert objections(found, "r:3", policy=other) == (
        "the policy asks for an improvement of f1, which one of the two lacks",
    )


@pytest.mark.filterwarnings("ignore:not considered")
def test_a_holder_that_is_damaged_can_be_replaced(tmp_path):
    found = repository(tmp_path)
    promote(found, "r:1", force=True)
    path = found.find("r:1").path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":7'))
    validated(found, "r:2")
    comparison = propose(found, "r:2", "champion").comparison
    assert comparison.unpaired.startswith("the current holder cannot be read")
    assert promote(found, "r:2").number == 2


# --- compare and swap ---------------------------------------------------------------------------------------------


def test_a_proposal_that_has_seen_another_champion_changes_nothing(tmp_path):
    found = repository(tmp_path)
    mine = propose(found, "r:1", "champion")
    promote(found, "r:2", force=True, why="I was first")
    with pytest.raises(ConflictError, match=r"champion has been changed meanwhile.*I was first"):
        promotion.promote(mine, "me too", force=True)
    assert names(found) == [found.find("r:2").name]
    claims = found.run("r").plan([pp.Last(1)]).keep.get(found.find("r:1").id, ())
    assert [claim.rule for claim in claims] == [], "what came to nothing protects nothing"


def test_promoting_what_is_there_already_changes_nothing(tmp_path):
    found = repository(tmp_path)
    first = promote(found, "r:1", force=True)
    assert promote(found, "r:1") == first
    assert len(names(found)) == 1


ACTS, PROCESSES = 4, 8


def _promoter(root, number, said):
    found = pp.open(root)
    done = []
    for act in range(ACTS):
        while True:
            try:
                # the same checkpoint twice in a row is no change: each process has its own, and goes to and fro
                ref = f"r:{1 + (number + act * PROCESSES) % (2 * PROCESSES)}"
                proposal = propose(found, ref, "champion")
                if proposal.unchanged:
                    break
                record = promotion.promote(proposal, f"process {number}, act {act}", force=True)
                done.append((record.number, record.digest, record.why))
                break
            except ConflictError:
                continue
    said.put(done)


@pytest.mark.slow
def test_eight_processes_that_promote_at_once_make_one_history_without_gaps_or_lost_acts(tmp_path):
    repository(tmp_path, accuracies=[0.5] * 2 * PROCESSES)
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    processes = [context.Process(target=_promoter, args=(tmp_path, number, said)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    acknowledged = [act for _ in processes for act in said.get(timeout=120)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = LocalStore(tmp_path)
    history = aliases.history(store, "champion")
    assert history.damage == ()
    assert [one.number for one in history.records] == list(range(1, len(history.records) + 1))
    assert sorted(acknowledged) == [(one.number, one.digest, one.why) for one in history.records]
    assert len(acknowledged) > PROCESSES
    for before, after in zip(history.records, history.records[1:], strict=False):
        assert (after.previous, after.at >= before.at) == (before.digest, True)
    assert pp.open(tmp_path).find("@champion").name == history.records[-1].target.name


# --- retention ----------------------------------------------------------------------------------------------------


def test_a_training_that_goes_on_keeps_the_champion_and_the_last_ones(tmp_path):
    policy = Policy(alias="champion", keep_last=2)
    with checkpointer(tmp_path, state={"x": 1}, keep=[pp.Last(1)]) as ckpt:
        for step in range(1, 7):
            ckpt.report(step=step)
            ckpt.wait()
            found = pp.open(tmp_path)
            if step < 5:
                promote(found, "r@latest", why=f"step {step}", force=True, policy=policy)
    steps = [one.step for one in found.run("r").checkpoints()]
    assert steps == [2, 3, 4, 6], "the champion of step 4, two former ones, and the newest"
    kept = found.run("r").kept()
    assert [claim.reason for claim in kept[found.find("r:2").id]] == ["was champion (one of its last 2)"]
    assert kept[found.find("r:4").id][0].reason.startswith("champion since 20")


def test_rm_refuses_what_an_alias_points_at(tmp_path):
    found = repository(tmp_path)
    promote(found, "r:1", force=True)
    run = found.run("r")
    (failure,) = maintenance.remove(run, [run.find_manifest("r:1")], "away")
    assert "was not removed: champion since" in failure
    assert found.find("@champion").step == 1


class Watching:
    """A store that calls back before its N-th operation."""

    def __init__(self, store, at, then):
        self._store, self._left, self._then = store, at, then
        self.operations = 0

    def __getattr__(self, name):
        method = getattr(self._store, name)
        if name not in {"put", "create", "delete", "get", "children", "size", "log", "link", "prune", "is_read"}:
            return method

        def watched(*arguments, **options):
            self.operations += 1
            if self.operations == self._left:
                self._then()
            return method(*arguments, **options)

        return watched


def _consistent(root):
    """Whatever an alias points at exists; returns whether there is one."""
    found = pp.open(root)
    there = aliases.names(found.store)
    for alias in there:
        assert found.find(f"@{alias}").step == 1
    return bool(there)


@pytest.mark.parametrize("undo_for", [timedelta(0), timedelta(days=1)])
def test_a_promotion_at_any_moment_of_a_removal_never_leaves_an_alias_of_nothing(tmp_path, undo_for):
    outcomes = set()
    point = 0
    while True:
        point += 1
        root = tmp_path / f"{point}"
        repository(root)
        proposal = propose(pp.open(root), "r:1", "champion")

        def between(proposal=proposal):
            try:
                promotion.promote(proposal, "at the same time", force=True)
            except (ConflictError, NotFoundError) as error:
                outcomes.add("conflict" if isinstance(error, ConflictError) else type(error).__name__)

        store = Watching(LocalStore(root), point, between)
        run = _run(store)
        maintenance.remove(run, [run.find_manifest("r:1")], "at the same time", undo_for=undo_for)
        outcomes.add(_consistent(root))
        if store.operations < point:
            break
    assert outcomes == {True, False, "conflict"}
    assert point > 10


def _run(store):
    from peakpoint.repository.root import Repository

    return Repository(store).run("r")


@pytest.mark.parametrize("undo_for", [timedelta(0), timedelta(days=1)])
def test_a_removal_at_any_moment_of_a_promotion_never_leaves_an_alias_of_nothing(tmp_path, undo_for):
    outcomes = set()
    point = 0
    while True:
        point += 1
        root = tmp_path / f"{point}"
        repository(root)

        def between(root=root):
            run = pp.open(root).run("r")
            maintenance.remove(run, [one for one in run.manifests() if one.step == 1], "too", undo_for=undo_for)

        store = Watching(LocalStore(root), point, between)
        try:
            found = _run(store)
            proposal = propose(_repository(store), "r:1", "champion")
            promotion.promote(proposal, "at the same time", force=True)
            outcomes.add("promoted")
        except (ConflictError, NotFoundError, RefusedError) as error:
            outcomes.add("conflict" if isinstance(error, ConflictError) else type(error).__name__)
        del found
        outcomes.add(_consistent(root))
        if store.operations < point:
            break
    assert {"promoted", "conflict", True, False} <= outcomes
    assert point > 10


def _repository(store):
    from peakpoint.repository.root import Repository

    return Repository(store)


def test_a_removal_that_came_to_nothing_bars_no_promotion(tmp_path):
    found = repository(tmp_path)
    manifest = found.find_manifest("r:1")
    with maintenance.writing(found.run("r"), "a removal that a pin has stopped") as events:
        events.append(
            Removed(at=events.now(), checkpoint=manifest.id, name=manifest.name, step=1, epoch=None, reason="x", by="x")
        )
        with pytest.raises(ConflictError, match="is being removed"):
            promote(found, "r:1", force=True)
    assert promote(found, "r:1", force=True).number == 1


def test_a_promotion_that_was_killed_protects_until_the_alias_changes(tmp_path):
    found = repository(tmp_path)
    manifest = found.find_manifest("r:1")
    killed = journal.Journal(found.store, "r", Clock())
    killed.append(
        Promoting(
            at=killed.now(), checkpoint=manifest.id, name=manifest.name, alias="champion", record=1, token="t", by="x"
        )
    )
    killed.close()
    run = found.run("r")
    assert [claim.reason for claim in run.plan([pp.Last(1)]).keep[manifest.id]] == ["about to become champion"]
    promote(found, "r:2", force=True)
    assert manifest.id not in run.plan([pp.Last(1)]).keep


# --- going back ---------------------------------------------------------------------------------------------------


def test_going_back_goes_further_back_each_time(tmp_path):
    found = repository(tmp_path, accuracies=[0.5] * 4)
    clock = Clock()
    for step in (1, 2, 3):
        promote(found, f"r:{step}", force=True, clock=clock)
    back = [promotion.rollback(found, "champion", "worse than it looked", clock=clock) for _ in range(2)]
    assert [found.find_manifest(one.record.target.ref).step for one in back] == [2, 1]
    assert [one.record.restores for one in back] == [2, 1]
    with pytest.raises(NotFoundError, match="no earlier champion left to roll back to"):
        promotion.rollback(found, "champion", "further")
    promote(found, "r:4", force=True, clock=clock)
    assert found.find("@champion").step == 4
    promotion.rollback(found, "champion", "again", clock=clock)
    assert found.find("@champion").step == 1
    records = aliases.history(found.store, "champion").records
    assert [one.kind for one in records] == ["promoted"] * 3 + ["rolled back"] * 2 + ["promoted", "rolled back"]
    for record in records:
        assert aliases.alias_at(records, record.at) == record
        assert aliases.alias_at(records, record.at + timedelta(milliseconds=500)) == record
    assert aliases.alias_at(records, records[0].at - timedelta(seconds=1)) is None


def test_going_back_to_a_record_by_its_number(tmp_path):
    found = repository(tmp_path)
    for step in (1, 2, 3):
        promote(found, f"r:{step}", force=True)
    assert found.find_manifest(promotion.rollback(found, "champion", "x", to=1).record.target.ref).step == 1
    for number, message in ((9, "has no record 9"), (4, "points already where record 4 points"), (1, "points already")):
        with pytest.raises((NotFoundError, ConfigError), match=message):
            promotion.rollback(found, "champion", "x", to=number)
    assert [found.find(f"@champion:{number}").step for number in (1, 2, 3, 4)] == [1, 2, 3, 1]


@pytest.mark.filterwarnings("ignore:not considered")
def test_former_holders_that_are_gone_or_damaged_are_passed_over(tmp_path):
    found = repository(tmp_path, accuracies=[0.5] * 4)
    for step in (1, 2, 3, 4):
        promote(found, f"r:{step}", force=True)
    path = found.find("r:3").path
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes().replace(b'"step":3', b'"step":7'))
    state = found.find("r:2").path / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    done = promotion.rollback(found, "champion", "worse")
    assert done.record.restores == 1
    assert [one.split(":")[0] for one in done.passed_over] == ["record 3", "record 2"]


def test_a_damaged_record_on_the_way_back_ends_it_and_a_number_goes_past_it(tmp_path):
    found = repository(tmp_path)
    for step in (1, 2, 3):
        promote(found, f"r:{step}", force=True)
    (tmp_path / layout.alias_key("champion", 2)).write_bytes(b"{}")
    with pytest.raises(NotFoundError, match=r"(?s)with --to N:.*000002\.json is corrupt"):
        promotion.rollback(found, "champion", "worse")
    assert promotion.rollback(found, "champion", "worse", to=1).record.number == 4


def test_a_roll_back_opens_no_file_of_a_checkpoint_but_its_manifest(tmp_path):
    repository(tmp_path)
    for step in (1, 2):
        promote(pp.open(tmp_path), f"r:{step}", force=True)
    read = []

    class Reading(Watching):
        def __getattr__(self, name):
            method = getattr(self._store, name)

            def watched(*arguments, **options):
                read.append((name, arguments[0] if arguments else ""))
                return method(*arguments, **options)

            return watched if name in {"get", "view", "fill"} else method

    promotion.rollback(_repository(Reading(LocalStore(tmp_path), 0, None)), "champion", "worse")
    assert [key for _, key in read if key.endswith("manifest.json")]
    assert not [key for _, key in read if key.endswith(("state.json", ".safetensors"))]


def test_a_roll_back_reads_no_more_of_a_long_journal(tmp_path):
    amounts = []
    for reports in (3, 3000):
        root = tmp_path / f"{reports}"
        with checkpointer(root, state={"x": 1}, keep=[pp.TopK("loss", "min", 2)]) as ckpt:
            for step in range(1, reports + 1):
                ckpt.report(step=step, loss=step)
        found = pp.open(root)
        for step in (1, 2):
            promote(found, f"r:{step}", force=True)
        amounts.append(0)

        class Weighing(Watching):
            def __getattr__(self, name):
                method = getattr(self._store, name)

                def watched(*arguments, **options):
                    data = method(*arguments, **options)
                    amounts[-1] += len(data)
                    return data

                return watched if name in {"get", "view"} else method

        promotion.rollback(_repository(Weighing(LocalStore(root), 0, None)), "champion", "worse")
    assert amounts[1] < amounts[0] + 10_000
    assert amounts[1] < 60_000, "bytes"


def test_two_who_roll_back_at_once_go_back_once(tmp_path):
    counts = set()
    point = 0
    while True:
        point += 1
        root = tmp_path / f"{point}"
        found = repository(root)
        for step in (1, 2, 3):
            promote(found, f"r:{step}", force=True)

        def between(root=root):
            promotion.rollback(pp.open(root), "champion", "the other")

        store = Watching(LocalStore(root), point, between)
        try:
            promotion.rollback(_repository(store), "champion", "the one")
        except ConflictError:
            counts.add(("conflict", len(names(found)) - 3))
        else:
            counts.add(("done", len(names(found)) - 3))
        if store.operations < point:
            break
    assert counts == {("conflict", 1), ("done", 2), ("done", 1)}, "both only when one had ended before the other looked"


# --- retiring, refs -----------------------------------------------------------------------------------------------


def test_a_champion_is_never_without_a_checkpoint_and_a_challenger_may_be(tmp_path):
    found = repository(tmp_path)
    for alias in ("champion", "resnet/champion", "challenger_1"):
        promote(found, "r:1", alias, force=True)
    for alias in ("champion", "resnet/champion"):
        with pytest.raises(ConfigError, match="is never without a checkpoint"):
            promotion.retire(found, alias, "x")
    promotion.retire(found, "challenger_1", "it lost")
    with pytest.raises(NotFoundError, match="was retired"):
        found.find("@challenger_1")
    with pytest.raises(NotFoundError, match="was retired"):
        promotion.retire(found, "challenger_1", "it lost")
    promote(found, "r:2", "challenger_1", force=True)
    assert found.find("@challenger_1").step == 2
    assert found.find("@challenger_1:1").step == 1


def test_an_alias_is_a_ref(tmp_path):
    found = repository(tmp_path)
    promote(found, "r@best:accuracy:max", force=True)
    assert found.find("@champion").step == 2
    assert pp.load("@champion", root=tmp_path)["x"] == 1
    for ref, message in (
        ("@champoin", "there is no alias 'champoin'; did you mean 'champion'?"),
        ("@champion:2", "has no record 2"),
        ("@champion:0", "the number of a record"),
        ("@../x", "cannot name an alias"),
        ("@a/b/c", "cannot name an alias"),
        ("@", "cannot name an alias"),
    ):
        with pytest.raises((NotFoundError, ConfigError), match=message.replace("?", r"\?")):
            found.find(ref)


def test_a_manifest_that_was_rewritten_after_the_promotion_is_refused(tmp_path):
    from peakpoint.format.sealed import seal, unseal

    found = repository(tmp_path)
    promote(found, "r:1", force=True)
    path = tmp_path / layout.manifest_key("r", found.find("r:1").name)
    content = unseal(path.read_bytes(), where="here")
    path.write_bytes(seal(content | {"metrics": {"accuracy": 0.99}}))
    assert found.find("r:1").metrics["accuracy"] == 0.99, "by itself it is a good manifest"
    with pytest.raises(CorruptError, match="has another manifest than when it became champion"):
        found.find("@champion")


def test_a_promotion_beside_a_training_that_drops_parts(tmp_path):
    """What was dropped is no reason against it; what is just being dropped is."""
    keep = [pp.Best("accuracy", "max", parts="model"), pp.Last(1)]
    with checkpointer(tmp_path, state={"model": {"w": 1}, "optimizer": {"m": 2}}, keep=keep) as ckpt:
        for step, accuracy in ((1, 0.9), (2, 0.5), (3, 0.4)):
            ckpt.report(step=step, accuracy=accuracy)
            ckpt.wait()
        found = pp.open(tmp_path)
        assert "optimizer" not in found.find_manifest("r:1").parts, "it has just gone"
        assert promote(found, "r:1", force=True).number == 1
    manifest = found.find_manifest("r:3")
    with maintenance.writing(found.run("r"), "a drop") as events:
        events.append(
            PartsDropped(
                at=events.now(), checkpoint=manifest.id, name=manifest.name, parts=("optimizer",), reason="x", by="x"
            )
        )
        with pytest.raises(ConflictError, match="or a part of it is"):
            promote(found, "r:3", force=True)
    assert promote(found, "r:3", force=True).number == 2
