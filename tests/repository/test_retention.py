"""Retention: a pure plan with reasons, and its application in an order that survives being killed."""

import errno
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peakpoint import rules as rules_module
from peakpoint.errors import StoreError
from peakpoint.format import events as records
from peakpoint.format.events import Removed
from peakpoint.format.layout import checkpoint_prefix, manifest_key
from peakpoint.format.manifest import FileRecord, decode_manifest
from peakpoint.repository import journal as j
from peakpoint.repository.commit import commit, image_of
from peakpoint.repository.journal import Journal
from peakpoint.repository.reader import list_run
from peakpoint.repository.removal import remove
from peakpoint.rules import Best, Budget, Every, Last, claims
from peakpoint.rules.retention import Removal, plan, protections
from peakpoint.store import MemoryStore
from strategies import DIGEST, START, manifest, rule_lists, trees


@st.composite
def shelves(draw):
    """Manifests of a run that was resumed from here and there; some were asked for."""
    tree = draw(trees())
    return [
        manifest(
            id=moment.id,
            name=f"c{moment.sequence}",
            sequence=moment.sequence,
            step=moment.step,
            epoch=moment.epoch,
            metrics=moment.metrics,
            created_at=moment.created_at,
            forks=moment.forks,
            asked=draw(st.sampled_from([None, None, None, "for the paper", ""])),
            files=(FileRecord(name="state.json", size=moment.sequence, digest=DIGEST),),
        )
        for moment in tree.records
    ]


# --- the plan -----------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(shelves(), rule_lists)
def test_everything_is_kept_or_removed_and_each_for_a_reason(manifests, rules):
    made = plan(manifests, rules)
    going = {removal.manifest.id for removal in made.remove}
    assert going.isdisjoint(made.keep)
    assert going | set(made.keep) == {one.id for one in manifests}
    assert all(removal.reason.strip() for removal in made.remove)
    for found in made.keep.values():
        assert found
        assert all(claim.reason.strip() and claim.rule for claim in found)


@given(shelves(), rule_lists)
def test_the_newest_and_what_was_asked_for_are_always_kept(manifests, rules):
    kept = plan(manifests, rules).keep
    for one in manifests:
        if one.asked is not None:
            assert "protection:asked" in [claim.rule for claim in kept[one.id]]
    newest = [claim.rule for one in manifests[-1:] for claim in kept[one.id]]
    assert newest.count("protection:newest") == len(manifests[-1:])


@given(shelves(), rule_lists)
def test_whatever_a_rule_claims_is_kept_and_nothing_else_but_the_protected(manifests, rules):
    kept = plan(manifests, rules).keep
    claimed = claims(rules, manifests)
    for id_, found in claimed.items():
        assert kept[id_][: len(found)] == found
    protected = {one.id for one in manifests if one.asked is not None} | {one.id for one in manifests[-1:]}
    assert set(kept) == set(claimed) | protected


@settings(max_examples=200)
@given(shelves(), rule_lists)
def test_a_plan_over_what_a_plan_has_kept_removes_nothing(manifests, rules):
    made = plan(manifests, rules)
    left = [one for one in manifests if one.id in made.keep]
    again = plan(left, rules)
    assert again.remove == ()
    assert set(again.keep) == set(made.keep)


@given(shelves(), rule_lists, st.data())
def test_a_plan_that_was_carried_out_in_part_is_completed_by_the_next(manifests, rules, data):
    made = plan(manifests, rules)
    failed = {removal.manifest.id for removal in made.remove if data.draw(st.booleans())}
    left = [one for one in manifests if one.id in made.keep or one.id in failed]
    again = plan(left, rules)
    assert {removal.manifest.id for removal in again.remove} == failed
    assert set(again.keep) == set(made.keep)


@given(shelves(), rule_lists, st.randoms(use_true_random=False))
def test_the_order_of_the_manifests_does_not_matter(manifests, rules, random):
    shuffled = list(manifests)
    random.shuffle(shuffled)
    made, again = plan(manifests, rules), plan(shuffled, rules)
    assert again.remove == made.remove
    assert dict(again.keep) == dict(made.keep)
    order = [removal.manifest.sequence for removal in made.remove]
    assert order == sorted(order)


@given(shelves(), rule_lists)
def test_freed_bytes_are_those_of_the_files_that_go(manifests, rules):
    made = plan(manifests, rules)
    kept = sum(one.sequence for one in manifests if one.id in made.keep)
    assert made.freed_bytes == sum(one.sequence for one in manifests) - kept


@given(shelves())
def test_without_rules_only_the_protected_stay(manifests):
    made = plan(manifests, [])
    assert set(made.keep) == {one.id for one in manifests if one.asked is not None or one is manifests[-1]}
    assert all("no rules" in removal.reason for removal in made.remove)


def test_reasons_name_the_rules_and_the_request():
    manifests = [
        manifest(sequence=n, metrics={"m": float(-n)}, asked="for the paper" if n == 2 else None) for n in (1, 2, 3, 4)
    ]
    rules = [Best("m", "max"), Every(steps=1000)]
    made = plan(manifests, rules)
    assert [removal.manifest.sequence for removal in made.remove] == [3]
    assert made.remove[0].reason == "no rule claims it any more (best:m:max every:1000st)"
    found = plan(manifests, rules).keep
    assert [claim.rule for claim in found[manifests[0].id]] == ["best:m:max"]
    assert "for the paper" in found[manifests[1].id][0].reason
    assert [claim.rule for claim in found[manifests[3].id]] == ["protection:newest"]
    assert plan([], rules).keep == {}


# --- its application ----------------------------------------------------------------------------------------------


class Watched(MemoryStore):
    """Remembers the order of what happens, and refuses deletions on request."""

    def __init__(self):
        super().__init__()
        self.happened = []
        self.refuse = set()

    def log(self, key):
        return WatchedLog(super().log(key), self.happened)

    def delete(self, key):
        if key in self.refuse:
            raise StoreError(errno.EIO, f"cannot delete {key}: Input/output error")
        self.happened.append(("delete", key))
        super().delete(key)


class WatchedLog:
    def __init__(self, log, happened):
        self.log, self.happened, self.pending = log, happened, []

    def append(self, data):
        self.log.append(data)
        self.pending.append(records.decode(data, where="test"))

    def sync(self):
        self.log.sync()
        self.happened += [("durable", event) for event in self.pending]
        self.pending = []

    def close(self):
        self.sync()
        self.log.close()


def shop(count=4):
    """A store with checkpoints, as the writer makes them."""
    store = Watched()
    images = [image_of(name="model.safetensors", data=b"m" * 10), image_of(name="state.json", data=b"{}")]
    manifests = [
        commit(store, manifest(sequence=n, name=f"c{n}", metrics={"m": float(n)}, epoch=n), images, first=lambda: None)
        for n in range(1, count + 1)
    ]
    return store, manifests


def clock():
    return START


def test_removals_are_durably_recorded_before_the_first_file_goes():
    store, manifests = shop()
    journal = Journal(store, "r", clock)
    made = plan(manifests, [Last(1), Best("m", "min")])
    assert remove(store, journal, made.remove, by="rules") == {}
    recorded = [event for what, event in store.happened if what == "durable"]
    assert [event.checkpoint for event in recorded] == [manifests[1].id, manifests[2].id]
    first_delete = next(n for n, (what, _) in enumerate(store.happened) if what == "delete")
    assert first_delete == len(recorded)
    assert recorded[0] == Removed(
        at=START,
        checkpoint=manifests[1].id,
        name="c2",
        step=2,
        epoch=2,
        reason="no rule claims it any more (last:1 best:m:min)",
        by="rules",
    )
    assert j.read(store, "r").events == tuple(recorded)
    assert [one.name for one in list_run(store, "r").manifests] == ["c1", "c4"]


def test_of_each_checkpoint_the_manifest_goes_first_and_nothing_is_left():
    store, manifests = shop()
    journal = Journal(store, "r", clock)
    remove(store, journal, plan(manifests, [Last(1)]).remove, by="rules")
    for one in manifests[:3]:
        mine = [
            key for what, key in store.happened if what == "delete" and key.startswith(checkpoint_prefix("r", one.name))
        ]
        assert mine[0] == manifest_key("r", one.name)
        assert len(mine) == 3
        assert store.children(checkpoint_prefix("r", one.name)) == []
    kept = decode_manifest(store.get(manifest_key("r", "c4")))
    assert [store.size(f"{checkpoint_prefix('r', 'c4')}/{file.name}") for file in kept.files] == [10, 2]


def test_nothing_to_remove_writes_nothing():
    store, manifests = shop()
    journal = Journal(store, "r", clock)
    assert remove(store, journal, plan(manifests, [Last(9)]).remove, by="rules") == {}
    assert store.happened == []
    assert j.read(store, "r").events == ()


def test_what_cannot_be_removed_is_told_stays_and_is_tried_again():
    store, manifests = shop()
    journal = Journal(store, "r", clock)
    store.refuse = {manifest_key("r", "c2")}
    failures = remove(store, journal, plan(manifests, [Last(1)]).remove, by="rules")
    (failure,) = failures.values()
    assert failure.startswith("c2 could not be removed: ")
    assert "Input/output error" in failure
    left = list_run(store, "r").manifests
    assert [one.name for one in left] == ["c2", "c4"]
    assert left[0] == manifests[1]  # whole: its manifest would have gone first
    assert store.size(f"{checkpoint_prefix('r', 'c2')}/state.json") == 2
    store.refuse = set()
    assert remove(store, journal, plan(left, [Last(1)]).remove, by="rules") == {}
    assert [one.name for one in list_run(store, "r").manifests] == ["c4"]


def test_a_removal_that_was_cut_short_leaves_litter_and_no_half_checkpoint():
    store, manifests = shop(2)
    store.refuse = {f"{checkpoint_prefix('r', 'c1')}/state.json"}
    failures = remove(store, Journal(store, "r", clock), plan(manifests, [Last(1)]).remove, by="rules")
    assert len(failures) == 1
    found = list_run(store, "r")
    assert [one.name for one in found.manifests] == ["c2"]
    assert found.without_manifest == ("c1",)


@pytest.mark.parametrize(("number", "until"), [(errno.EIO, None), (errno.ENOSPC, START), (errno.EDQUOT, START)])
def test_nothing_is_deleted_when_the_record_cannot_be_written(number, until):
    class Broken(Watched):
        def log(self, key):
            log = super().log(key)

            def refuse():
                raise StoreError(number, "cannot make durable")

            log.sync = refuse
            return log

    store = Broken()
    one = commit(store, manifest(name="c1"), [image_of(name="state.json", data=b"{}")], first=lambda: None)
    with pytest.raises(StoreError):
        remove(store, Journal(store, "r", clock), [Removal(one, "why")], by="somebody", until=until)
    assert store.happened == []
    assert list_run(store, "r").manifests == (one,)


def test_a_checkpoint_that_is_gone_already_is_no_failure():
    store, manifests = shop(2)
    journal = Journal(store, "r", clock)
    removals = [Removal(manifests[0], "twice"), Removal(replace(manifests[0], name="never-was"), "never was")]
    assert remove(store, journal, removals, by="x") == {}
    assert remove(store, journal, removals, by="x") == {}
    assert [one.name for one in list_run(store, "r").manifests] == ["c2"]


# --- pins and budgets ---------------------------------------------------------------------------------------------


@st.composite
def capped(draw):
    """Manifests, rules with a budget among them, and pins."""
    manifests = draw(shelves())
    rules = [*draw(rule_lists), Budget(draw(st.integers(1, 60)))]
    pinned = {one.id: "why" for one in manifests if draw(st.integers(0, 4)) == 0}
    return manifests, draw(st.permutations(rules)), pinned


@settings(max_examples=200)
@given(capped(), st.randoms(use_true_random=False))
def test_budgets_hold_as_far_as_protections_allow(case, random):
    manifests, rules, pinned = case
    made = plan(manifests, rules, pinned)
    (limit,) = [rule.bytes for rule in rules if isinstance(rule, Budget)]
    left = [one for one in manifests if one.id in made.keep]
    protected = set(protections(manifests, pinned))
    assert protected <= set(made.keep)
    assert sum(one.size_bytes for one in left) <= limit or {one.id for one in left} <= protected
    # what went over the budget was claimed no more often than anything that stayed without protection
    counts = {id_: len(found) for id_, found in claims(rules, manifests).items()}
    for removal in made.remove:
        for one in left:
            if removal.manifest.id in counts and one.id not in protected:
                assert counts[removal.manifest.id] <= counts[one.id]
    shuffled = list(manifests)
    random.shuffle(shuffled)
    again = plan(shuffled, rules, pinned)
    assert again.keep.keys() == made.keep.keys()
    assert plan(left, rules, pinned).remove == (), "a plan over what a plan has kept removes nothing"


def sized(sequence, accuracy):
    """A checkpoint of 10 bytes, 3 of them its model."""
    return manifest(
        id=f"{sequence:016x}",
        sequence=sequence,
        metrics={"acc": accuracy},
        parts={"model": ("model.s",), "optimizer": ("optimizer.s",)},
        files=(
            FileRecord(name="model.s", size=3, digest=DIGEST),
            FileRecord(name="optimizer.s", size=7, digest=DIGEST),
        ),
    )


def test_a_budget_counts_what_is_left_after_parts_have_gone():
    best, newest = sized(1, 0.9), sized(2, 0.1)
    rules = [Best("acc", "max", parts="model"), Last(1), Budget(13)]
    made = plan([best, newest], rules)
    assert made.remove == ()
    (thinning,) = made.drop
    assert (thinning.manifest, thinning.parts) == (best, ("optimizer",))
    assert {file.name for file in best.files} - {file.name for file in thinning.remaining.files} == {"optimizer.s"}
    assert made.freed_bytes == 7
    assert [removal.manifest for removal in plan([best, newest], [*rules[:2], Budget(12)]).remove] == [best]


def test_a_damaged_checkpoint_neither_goes_nor_counts():
    broken, good, newest = sized(1, 0.9), sized(2, 0.8), sized(3, 0.1)
    damaged = {broken.id: "model.s is missing", newest.id: "optimizer.s has 1 bytes instead of 7"}
    made = plan([broken, good, newest], [Best("acc", "max")], damaged=damaged)
    assert made.remove == ()
    assert [claim.rule for claim in made.keep[good.id]] == ["best:acc:max", "protection:newest"]
    assert [claim.reason for claim in made.keep[broken.id]] == [
        "model.s is missing; rules do not remove it, peakpoint rm does"
    ]
    made = plan([broken, good, newest], [Budget(1)], damaged=damaged)
    assert made.remove == (), "the newest good one is what the run continues from"


def test_when_the_newest_has_lost_parts_the_newest_whole_one_stays():
    old, whole, cut = sized(1, 0.1), sized(2, 0.2), sized(3, 0.9)
    made = plan([old, whole, cut], [Best("acc", "max", parts="model")], cut={cut.id})
    assert [removal.manifest for removal in made.remove] == [old]
    assert made.keep[whole.id][0].reason == "the newest with all its parts: the run continues from here"
    assert made.keep[cut.id][-1].reason == "the newest"


@given(capped(), st.data())
def test_damage_and_lost_parts_leave_plans_idempotent_and_the_newest_good_one_there(case, data):
    manifests, rules, pinned = case
    some = st.sets(st.sampled_from([one.id for one in manifests])) if manifests else st.just(set())
    damaged, cut = dict.fromkeys(data.draw(some), "broken"), data.draw(some)
    made = plan(manifests, rules, pinned, damaged=damaged, cut=cut)
    assert damaged.keys() <= made.keep.keys()
    good = [one for one in manifests if one.id not in damaged and one.id not in cut]
    assert {one.id for one in good[-1:]} <= made.keep.keys()
    left = [one for one in manifests if one.id in made.keep]
    again = plan(data.draw(st.permutations(left)), rules, pinned, damaged=damaged, cut=cut)
    assert again.remove == ()


def test_a_pin_that_comes_while_others_are_being_removed_is_heeded():
    store, one, other = MemoryStore(), manifest(sequence=1, name="a"), manifest(sequence=2, name="b")
    for draft in (one, other):
        commit(store, draft, [image_of("state.json", b"{}")], first=lambda: None)
    journal = Journal(store, "r", lambda: START)
    removals = [Removal(found, "no rule") for found in list_run(store, "r").manifests]

    def pinned():
        events = j.read(store, "r").events
        assert sum(isinstance(event, Removed) for event in events) == 2, "the removals are recorded first"
        return {one.id}

    failures = remove(store, journal, removals, by="rules", protected=pinned)
    assert list(failures.values()) == [
        "a was not removed: it is pinned, an alias points at it, or the run was archived a moment ago"
    ]
    assert [found.name for found in list_run(store, "r").manifests] == ["a"]


# --- plans as documents -------------------------------------------------------------------------------------------

PLANS = Path(__file__).parents[1] / "data" / "golden" / "plans"
HISTORY = [
    # accuracy, loss, sparsity
    (0.50, 0.90, 0.0),
    (0.61, 0.71, 0.1),
    (0.68, 0.60, 0.3),
    (0.72, 0.55, 0.497),
    (0.71, 0.58, 0.502),
    (0.70, 0.61, 0.6),
    (0.69, 0.57, 0.7),
    (0.695, 0.66, 0.709),
    (math.nan, math.inf, 0.8),
    (0.66, 0.70, 0.89),
    (0.64, 0.75, 0.9),
    (0.60, 0.83, 0.95),
]
SETS = {
    "research": rules_module.research("acc", "max"),
    "pruning": rules_module.pruning("acc", "max"),
    "several-metrics": rules_module.parse_all("best:acc:max best:loss:min topk:acc:max:3 last:2"),
    "thin": rules_module.parse_all("thin:2"),
    "budget": rules_module.parse_all("topk:acc:max:4 last:2 budget:4000"),
    "late": rules_module.parse_all("best:acc:max:warmup=700 best:bleu:max:pending=2 last:1"),
}


def document(name, rules):
    """A plan as people read it."""
    manifests = [
        manifest(
            sequence=number,
            name=f"epoch{number - 1}",
            step=100 * number,
            epoch=number - 1,
            metrics={"acc": accuracy, "loss": loss, "sparsity": sparsity},
            files=(FileRecord(name="state.json", size=1000, digest=DIGEST),),
        )
        for number, (accuracy, loss, sparsity) in enumerate(HISTORY, 1)
    ]
    made = plan(manifests, rules, {manifests[1].id: "figure 2"} if name == "budget" else {})
    going = {removal.manifest.id: removal.reason for removal in made.remove}
    lines = [f"rules: {' '.join(rule.text for rule in rules)}", ""]
    for one in manifests:
        values = ", ".join(f"{metric} {value:g}" for metric, value in one.metrics.items())
        lines.append(f"{'goes ' if one.id in going else 'stays'} {one.name}: {values}")
        if one.id in going:
            lines.append(f"      {going[one.id]}")
        else:
            lines += [f"      {claim.rule}: {claim.reason}" for claim in made.keep[one.id]]
    lines += ["", f"frees {made.freed_bytes} of {sum(one.size_bytes for one in manifests)} bytes"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", SETS)
def test_plans_read_as_they_did(name):
    path = PLANS / f"{name}.txt"
    text = document(name, SETS[name])
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        pytest.fail(f"{path} was missing and has been written: read it, and commit it")
    assert text == path.read_text()
