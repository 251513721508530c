"""The changelog: nothing is lost, doubled or out of order, claims as brute force has them, no text makes structure."""

import json
import re
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import peakpoint as pp
from peakpoint.cli.main import cli
from peakpoint.format import layout
from peakpoint.format.events import (
    STOPPED,
    Archived,
    Changing,
    Closed,
    Measured,
    Opened,
    PartsDropped,
    Pinned,
    Promoted,
    Promoting,
    Removed,
    Reported,
    Restored,
    Saved,
    SaveFailed,
    Started,
    Undone,
    Unpinned,
    Withdrawn,
)
from peakpoint.format.sealed import seal
from peakpoint.reports import changelog
from peakpoint.reports.changelog import ChangelogEntry, markdown
from peakpoint.reports.changelog.claims import ClaimTracker
from peakpoint.repository import aliases, maintenance, reader, validations
from peakpoint.repository import journal as journals
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.root import ensure_repository, ensure_run
from peakpoint.rules import Moment, claims
from peakpoint.rules.history import newest_event
from peakpoint.store import LocalStore
from strategies import START, identity, names, one_rule, text_tuples, texts, times, trees, values
from training import checkpointer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RULES = ["best:m:max", "best:m:max:smooth=2", "topk:m:min:2", "last:1", "last:2", "every:2st", "every:2st:1", "thin:2"]
RULES += ["pareto:m:max:n:min", "best:late:max:pending=1"]


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


# --- a random life, noted by hand ---------------------------------------------------------------------------------


class Life:
    """Does things to a repository, and notes for each what the changelog must say."""

    def __init__(self, root):
        self.root, self.step, self.rules, self.ckpt = root, 0, [], None
        self.expected = []
        self.begun = False
        self.trashed = []

    @property
    def run(self):
        return pp.open(self.root).run("r")

    def there(self):
        return {one.id: one for one in self.run.annotated(self.rules)} if self.begun else {}

    def note(self, kind, checkpoint=None, *more):
        self.expected.append((kind, checkpoint, *more))

    def lost(self, before, after):
        """By brute force: every rule asked about everything, before and after."""
        for rule in self.rules:
            had, has = rule.claims(before), rule.claims(after)
            for one in had.keys() - has.keys():
                self.note("claim lost", one, rule.text)

    def open(self, rules, data):
        self.close()
        texts = tuple(rule.text for rule in rules)
        if self.begun and texts != tuple(rule.text for rule in self.rules):
            self.note("rules changed")
        self.rules = rules
        ref = data.draw(st.sampled_from(["auto", "never", *(f"r/{one}" for one in self.there())]))
        self.ckpt = checkpointer(self.root, state={"x": 1}, keep=rules, resume=ref)
        found = self.ckpt.resume()
        self.begun = True
        start = newest_event(self.run.events(), Started)
        self.note("begun" if found is None else "continued", start.checkpoint)

    def report(self, m, n):
        if self.ckpt is None:
            return
        self.step += 1
        before = self.there()
        outcome = self.ckpt.report({"m": m, "n": n}, step=self.step)
        self.ckpt.wait()
        if not outcome.saved:
            return
        now = self.there()
        [new] = now.keys() - before.keys()
        self.note("saved", new, "; ".join(outcome.reasons))
        self.lost(list(before.values()), [*before.values(), now[new]])
        for one in sorted(before.keys() - now.keys(), key=lambda one: before[one].sequence):
            self.note("removed", one)

    def close(self):
        if self.ckpt is not None:
            before = self.there()
            self.ckpt.close()  # which applies the rules where nothing was saved
            for one in sorted(before.keys() - self.there().keys(), key=lambda one: before[one].sequence):
                self.note("removed", one)
            self.note("ended")
            self.ckpt = None

    def on_one(self, what, data):
        there = self.there()
        if not there:
            return
        one = data.draw(st.sampled_from(list(there.values())))
        getattr(self, what)(one, f"r/{one.id}", data)

    def pin(self, one, ref, data):
        self.run.pin(ref, "because")
        self.note("pinned", one.id, "because")

    def unpin(self, one, ref, data):
        self.run.unpin(ref)
        self.note("unpinned", one.id)

    def measure(self, one, ref, data):
        before = list(self.there().values())
        name = data.draw(st.sampled_from(["m", "late"]))
        self.run.record(ref, {name: data.draw(st.integers(0, 4))}, source="by hand")
        self.note("measured", one.id, "by hand")
        self.lost(before, list(self.there().values()))

    def withdraw(self, one, ref, data):
        recorded = list(annotations_of(self.run.events()).metrics.get(one.id, {}))
        if recorded:
            before = list(self.there().values())
            self.run.withdraw(ref, recorded[0])
            self.note("withdrawn", one.id)
            self.lost(before, list(self.there().values()))

    def remove(self, one, ref, data):
        maintenance.remove(self.run, [one], "not wanted", undo_for=timedelta(hours=1))
        if one.id in self.run.aliased([one], self.run.events()):
            return
        self.note("removed", one.id)
        self.trashed.append(one.id)

    def undo(self):
        self.close()
        if self.trashed:
            before = list(self.there().values())
            back = self.trashed.pop()
            maintenance.undo(self.run, [back])
            self.note("undone", back)
            self.lost(before, list(self.there().values()))
            self.note("pinned", back, "brought back with undo")

    def promote(self, one, ref, data):
        store = self.run.store
        digest = reader.manifest_digest(store, one)
        target = aliases.AliasTarget(run="r", checkpoint=one.id, name=one.name, manifest=digest)
        forced = data.draw(st.sampled_from([(), ("it was never validated",)]))
        alias = data.draw(st.sampled_from(["champion", "small/champion"]))
        former = aliases.newest(store, alias)
        kind = data.draw(st.sampled_from(["promoted", "retired", *(["rolled back"] if former else [])]))
        target = None if kind == "retired" else target
        restores = 1 if kind == "rolled back" else None
        said = {"by": "anna", "why": "as I say", "forced": forced, "restores": restores}
        change = aliases.AliasChange(kind=kind, target=target, at=utc_now(), **said)
        aliases.append(store, alias, change, after=former)
        before = former.target and former.target.checkpoint if former else None
        self.note(kind, target and one.id, "as I say", alias, before, bool(forced))

    def validate(self, one, ref, data):
        finding = validations.Finding(check="x", outcome=data.draw(st.sampled_from(["passed", "failed"])), said="so")
        validation = validations.Validation(
            run="r",
            checkpoint=one.id,
            name=one.name,
            number=0,
            manifest="0" * 64,
            parts=("x",),
            at=utc_now(),
            by="anna",
            wanted=validations.ValidationSpec(),
            findings=(finding,),
        )
        validations.record(self.run.store, validation)
        self.note("validated", one.id, finding.outcome)


def told(entry):
    """What ``Life`` notes of an entry."""
    id_, details = entry.details.get("id"), entry.details
    match entry.kind:
        case "saved" | "measured" | "pinned":
            return (entry.kind, id_, entry.why)
        case "claim lost":
            return (entry.kind, id_, details["rule"])
        case "promoted" | "rolled back" | "retired":
            return (entry.kind, id_, entry.why, entry.alias, details.get("former_id"), entry.forced)
        case "validated":
            return (entry.kind, id_, entry.after)
        case _:
            return (entry.kind, id_)


def settled(noted):
    """Claims that are lost at the same moment have no order among each other, nor have the removals of one save.

    (What a change of rules had given up already goes before what the save itself takes the place of.)
    """
    blocks = []
    for one in noted:
        if one[0] in {"claim lost", "removed"} and blocks and blocks[-1][0][0] == one[0]:
            blocks[-1].append(one)
        else:
            blocks.append([one])
    return [one for block in blocks for one in sorted(block)]


things = st.sampled_from(
    ["open", "pin", "unpin", "measure", "withdraw", "remove", "undo", "promote", "validate", "close"]
)


@pytest.mark.filterwarnings("ignore::peakpoint.PeakpointWarning")
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_nothing_is_lost_doubled_or_out_of_order(tmp_path_factory, data):
    life = Life(tmp_path_factory.mktemp("life"))
    for _ in range(data.draw(st.integers(1, 4))):
        rules = data.draw(st.lists(st.sampled_from(RULES), min_size=1, max_size=3, unique=True))
        life.open([pp.rules.parse(text) for text in rules], data)
        for _ in range(data.draw(st.integers(0, 8))):
            what = data.draw(st.sampled_from(["report", "report"]) | things)
            match what:
                case "report":
                    life.report(data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4)))
                case "open" | "close":
                    life.close()
                case "undo":
                    life.undo()
                case _:
                    life.on_one(what, data)
    life.close()
    found = changelog.entries(pp.open(life.root))
    assert settled(map(told, found)) == settled(life.expected)
    assert [one.at for one in found] == sorted(one.at for one in found)
    _check_periods(pp.open(life.root), found, data)
    text = markdown.by_day(found, "x")
    assert all(entry.alias in text for entry in found if entry.alias)
    whole = markdown.by_day(found, "x", everything=True)
    assert sum(re.match(r"- (\d{4}-\d\d-\d\d )?\d\d:\d\d ", line) is not None for line in whole.splitlines()) == len(
        found
    )


def _check_periods(repository, found, data):
    """From the first moment on, up to the last one excluded."""
    since, until = (data.draw(st.sampled_from([None, *(one.at for one in found)])) for _ in range(2))
    if since is not None and until is not None and until <= since:
        with pytest.raises(pp.errors.ConfigError, match="is empty"):
            changelog.entries(repository, since=since, until=until)
        return
    inside = [one for one in found if (since is None or since <= one.at) and (until is None or one.at < until)]
    assert changelog.entries(repository, since=since, until=until) == inside
    kinds = data.draw(st.lists(st.sampled_from([*changelog.KINDS, "forced"]), min_size=1))
    some = [one for one in found if one.kind in kinds or ("forced" in kinds and one.forced)]
    assert changelog.entries(repository, kinds=kinds) == some


def test_a_newest_that_is_removed_takes_its_branch_along():
    """Two branches have the same epoch; which of them counts depends on the branch of the newest."""
    plain = {"step": 1, "metrics": {}, "created_at": START}
    one, two, three, four, five = (
        Moment(id=str(number), sequence=number, epoch=epoch, forks=forks, **plain)
        for number, epoch, forks in (
            (1, 0, ()),
            (2, 0, ((0, 2),)),
            (3, None, ((0, 3),)),
            (4, None, ((0, 2),)),
            (5, None, ((0, 5),)),
        )
    )
    followed = ClaimTracker()
    followed.set_rules([pp.Every(epochs=1)])
    assert [len(followed.add(moment)) for moment in (one, two, three)] == [0, 1, 1]
    followed.remove("3")
    assert followed.add(four) == []
    assert [(lost.checkpoint, lost.successor) for lost in followed.add(five)] == [("2", "1")]


@settings(max_examples=200, deadline=None)
@given(trees(), st.lists(one_rule, min_size=1, max_size=3), st.data())
def test_claims_that_are_followed_are_those_that_brute_force_finds(tree, rules, data):
    followed = ClaimTracker()
    followed.set_rules(rules)
    there = []
    for moment in tree.records:
        change = data.draw(st.sampled_from(["", "", "remove", "measure"])) if there else ""
        one = data.draw(st.sampled_from(there)) if change else None
        before = claims(rules, there)
        if change == "remove":
            there.remove(one)
            followed.remove(one.id)
        elif change == "measure":
            value = data.draw(st.sampled_from([0.0, 1.0, 5.0, float("nan")]))
            now = Moment(
                **{**{name: getattr(one, name) for name in Moment.__slots__}, "metrics": {**one.metrics, "m": value}}
            )
            there[there.index(one)] = now
            passed = followed.measure(one.id, {"m": value})
            assert _pairs(passed) == _gone(before, claims(rules, there))
        before = claims(rules, there)
        there.append(moment)
        passed = followed.add(moment)
        after = claims(rules, there)
        assert _pairs(passed) == _gone(before, after)
        for one in passed:
            assert one.successor is None or one.rule in {claim.rule for claim in after[one.successor]}


def _pairs(passed):
    return Counter((one.checkpoint, one.rule) for one in passed)


def _gone(before, after):
    had = Counter((id_, claim.rule) for id_, found in before.items() for claim in found)
    has = Counter((id_, claim.rule) for id_, found in after.items() for claim in found)
    return had - has


# --- a repository that is written by hand -------------------------------------------------------------------------


def at(days, hours=0):
    return START + timedelta(days=days, hours=hours)


def target_of(number, run="r"):
    return aliases.AliasTarget(run=run, checkpoint=identity(number), name=f"r_step{number}", manifest="0" * 64)


class Hand:
    """A repository whose ids and times are chosen."""

    def __init__(self, root):
        self.root = root
        self.store = LocalStore(root)
        ensure_repository(self.store, START)
        ensure_run(self.store, "r", START, {}, [])

    def segment(self, *events):
        journal = journals.Journal(self.store, "r", lambda: START)
        for event in events:
            journal.append(event)
        journal.close()
        return self.root / "runs/r/journal" / journal.segment

    def alias(self, kind, number, when, **members):
        target = members.pop("target", number)
        found = None if target is None else target_of(target)
        change = aliases.AliasChange(
            kind=kind, target=found, at=when, **{"by": "anna on desk", "why": "better", **members}
        )
        return aliases.append(self.store, "champion", change, after=aliases.newest(self.store, "champion"))

    def entries(self, **options):
        return changelog.entries(pp.open(self.root), **options)


BY = {"host": "node1", "pid": "77", "peakpoint": "1"}


def saved(number, when, **members):
    plain = {"name": f"r_step{number}", "sequence": number, "report": number, "reasons": ("the newest",)}
    return Saved(at=when, checkpoint=identity(number), **{**plain, **members})


def removed(number, when, reason="no rule claims it any more (last:1)", by="rules"):
    name = f"r_step{number}"
    return Removed(at=when, checkpoint=identity(number), name=name, step=number, epoch=None, reason=reason, by=by)


def told_of(number):
    return {"checkpoint": identity(number), "name": f"r_step{number}"}


def a_story(root):
    """Ten days with everything in them."""
    hand = Hand(root)
    trained = [Opened(at=at(0), by=BY, rules=("best:acc:max", "last:1"))]
    trained.append(Started(at=at(0), checkpoint=None, report=0))
    for number, value in enumerate([0.5, 0.7, 0.6, 0.8, 0.75, 0.9], 1):
        when = at(0, number)
        trained.append(Reported(at=when, report=number, step=number, epoch=number - 1, metrics={"acc": value}))
        trained.append(saved(number, when))
        trained += [removed(number - 1, when)] if number % 2 == 0 else []
    failed = {"reasons": ("the newest",), "error": "no space left"}
    trained.append(SaveFailed(at=at(0, 7), **told_of(7), **failed))
    trained.append(Closed(at=at(0, 8), why="stopped early: no better acc in 10 reports"))
    hand.segment(*trained)
    hand.alias("promoted", 2, at(1), validation="ab" * 32, comparison=None)
    hand.segment(Pinned(at=at(1, 1), checkpoint=identity(4), why="figure 3", by="anna on desk"))
    hand.segment(
        Opened(at=at(2), by={"user": "ben on desk"}, rules=("best:acc:max",)),
        PartsDropped(at=at(2), **told_of(4), parts=("optimizer",), reason="not needed", by="ben on desk"),
        Closed(at=at(2), why="peakpoint keep"),
    )
    hand.segment(
        Measured(
            at=at(2, 1),
            checkpoint=identity(4),
            step=4,
            metrics={"acc": 0.95},
            part=None,
            source="evaluate.py",
            by="ben on desk",
        )
    )
    hand.segment(
        Opened(at=at(3), by=BY, rules=("best:acc:max",)),
        Started(at=at(3), checkpoint=identity(6), report=6),
        Closed(at=at(3, 1), why="preempted by SIGTERM"),
    )
    hand.segment(
        Changing(at=at(4), **told_of(4), by="ben on desk"),
        Archived(at=at(4), **told_of(4), packed_bytes=10, by="ben on desk"),
        Restored(at=at(4, 1), **told_of(4), by="ben on desk"),
        removed(4, at(4, 2), "by mistake", "ben on desk"),
        Undone(at=at(4, 3), **told_of(4), parts=(), by="ben on desk"),
        Unpinned(at=at(4, 4), checkpoint=identity(4), by="ben on desk"),
        Closed(at=at(4, 5), why="peakpoint undo"),
    )
    comparison = {"said": "acc 0.9 to 0.95 (better)", "metrics": []}
    hand.alias("promoted", 4, at(5), validation="cd" * 32, comparison=comparison, release="r-17")
    hand.alias("promoted", 6, at(6), forced=("it was never validated",), why="customers wait")
    record = {"by": "ci", "alias": "champion", "at": at(6, 1), "steps": []}
    record["candidate"] = {"run": "r", "checkpoint": identity(5), "name": "r_step5", "manifest": "ab" * 32}
    record |= {"former": None, "validation": None, "policy": "format = 1"}
    refused = {"outcome": "refused", "record": None, "reasons": ["latency 40 ms, 20 at most"]}
    hand.store.create(layout.release_key("r-18"), seal({"format": 1, "id": "r-18", **record, **refused}))
    done = {"outcome": "promoted", "record": 2, "reasons": []}
    hand.store.create(layout.release_key("r-17"), seal({"format": 1, "id": "r-17", **record, **done}))
    hand.alias("rolled back", 4, at(7), restores=2, why="twice as slow")
    hand.alias("retired", 0, at(9), target=None, why="nobody uses it")
    hand.segment(Pinned(at=at(9, 1), checkpoint=identity(6), why="figure 4", by="anna on desk"))
    return hand


@pytest.fixture
def story(tmp_path):
    return a_story(tmp_path / "runs")


def test_the_story_has_every_kind(story):
    kinds = {one.kind for one in story.entries()}
    assert kinds == {*changelog.KINDS} - {"imported", "validated", "damage", "withdrawn"}


def test_the_story_in_markdown(story):
    assert markdown.by_day(story.entries(), "runs") == (GOLDEN / "changelog.md").read_text()


def test_who_came_in_whose_place(story):
    one, *_ = story.entries(kinds=["promoted"], since=at(6))
    assert (one.before, one.after, one.by, one.details["former_id"]) == (
        "r/r_step4",
        "r/r_step6",
        "anna on desk",
        identity(4),
    )
    lost = [one for one in story.entries(kinds=["claim lost"]) if one.details["rule"] == "best:acc:max"]
    assert [(one.checkpoint, one.details["taker"]) for one in lost] == [
        ("r/r_step1", "r/r_step2"),
        ("r/r_step2", "r/r_step4"),
        ("r/r_step4", "r/r_step6"),
        ("r/r_step6", "r/r_step4"),  # which was measured again
        ("r/r_step6", "r/r_step4"),  # which was removed by mistake, and brought back
    ]
    [rules] = story.entries(kinds=["rules changed"])
    assert (rules.before, rules.after, rules.by) == ("best:acc:max last:1", "best:acc:max", "ben on desk")


def test_what_was_forced_is_found_by_that_word(story):
    assert [one.details["record"] for one in story.entries(kinds=["forced"])] == [3]
    with pytest.raises(pp.errors.ConfigError, match="did you mean 'forced'"):
        story.entries(kinds=["forcd"])


def test_only_some_runs(story):
    ensure_run(story.store, "other", START, {}, [])
    assert story.entries(only=["other"]) == []
    assert story.entries(only=["r"]) == story.entries()
    change = aliases.AliasChange(kind="promoted", target=target_of(9, "other"), at=at(10), by="anna", why="another run")
    head = aliases.append(story.store, "champion", change, after=aliases.newest(story.store, "champion"))
    aliases.append(story.store, "champion", replace(change, target=target_of(6)), after=head)
    found = story.entries(only=["other"])
    assert [(one.before, one.after) for one in found] == [(None, "other/r_step9"), ("other/r_step9", "r/r_step6")]
    with pytest.raises(pp.errors.NotFoundError, match="no run 'x'"):
        story.entries(only=["x"])


# --- damage -------------------------------------------------------------------------------------------------------


def flip(path, line=0):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"at":"2', b'"at":"3', 1)
    path.write_bytes(b"".join(lines))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_damaged_line_costs_itself_and_is_told(tmp_path_factory, data):
    hand = a_story(tmp_path_factory.mktemp("damage") / "runs")
    before = hand.entries()
    files = sorted(
        [*hand.root.glob("runs/r/journal/*"), *hand.root.glob("aliases/champion/*"), *hand.root.glob("releases/*")]
    )
    file = data.draw(st.sampled_from(files))
    number = data.draw(st.integers(0, file.read_bytes().count(b"\n") - 1))
    flip(file, number)
    found = hand.entries()
    damage = [one for one in found if one.kind == "damage"]
    assert damage
    assert damage == found[: len(damage)]
    assert all(one.at is None and one.why for one in damage)
    assert any(file.stem in one.why for one in damage)
    if "journal" not in str(file):
        left = [one for one in found if one.at is not None]
        assert len(left) >= len(before) - 1
        assert {repr(one) for one in left if one.run == "r" and not one.alias} == {
            repr(one) for one in before if one.run == "r" and not one.alias
        }
    assert "## Damage" in markdown.by_day(found, "x")
    assert damage == hand.entries(since=at(1000))  # nobody knows when it came


ids = st.sampled_from([identity(1), identity(2), identity(3), "x", "x" * 16])
of_one = {"at": times, "checkpoint": ids}
named = {**of_one, "name": names | st.just("x")}
by_one = {**named, "by": texts}
wholes = st.integers(0, 5) | st.integers(0, 2**62)
rule_texts = st.lists(one_rule.map(lambda rule: rule.text) | st.sampled_from(RULES) | texts, max_size=3).map(tuple)
moments = {"step": wholes, "epoch": st.none() | wholes}
some_metrics = st.dictionaries(st.sampled_from(["m", "n", "val/loss"]), values, max_size=2)
TOLD = {
    "saved": st.builds(Saved, **named, sequence=wholes, report=wholes, reasons=text_tuples),
    "save failed": st.builds(SaveFailed, **named, reasons=text_tuples, error=texts),
    "removed": st.builds(Removed, **by_one, **moments, reason=texts, until=st.none() | times),
    "parts dropped": st.builds(PartsDropped, **by_one, parts=text_tuples, reason=texts),
    "undone": st.builds(Undone, **by_one, parts=text_tuples),
    "archived": st.builds(Archived, **by_one, packed_bytes=wholes),
    "restored": st.builds(Restored, **by_one),
    "measured": st.builds(
        Measured, **of_one, step=wholes, metrics=some_metrics, part=st.none(), source=texts, by=texts
    ),
    "withdrawn": st.builds(Withdrawn, **of_one, metrics=st.tuples(st.sampled_from(["m", "n"])), by=texts),
    "pinned": st.builds(Pinned, **of_one, why=texts, by=texts),
    "unpinned": st.builds(Unpinned, **of_one, by=texts),
    "stopped early": st.builds(Closed, at=times, why=texts.map(STOPPED.__add__)),
}
UNTOLD = [
    st.builds(Opened, at=times, by=st.dictionaries(texts, texts, max_size=2), rules=rule_texts),
    st.builds(Started, at=times, checkpoint=st.none() | ids, report=wholes, requested=st.none() | texts),
    st.builds(Reported, at=times, report=wholes, **moments, metrics=some_metrics),
    st.builds(Changing, **by_one),
    st.builds(Promoting, **by_one, alias=texts, record=st.integers(1, 9), token=texts),
]
journal_events = st.sampled_from(list(TOLD)).flatmap(lambda kind: TOLD[kind].map(lambda event: (kind, event)))
journal_events |= st.one_of(UNTOLD).map(lambda event: (None, event))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(journal_events, max_size=12), min_size=1, max_size=3))
def test_whatever_a_journal_says_each_thing_is_told_once(tmp_path_factory, segments):
    """Also what cannot be: checkpoints that come back before they were saved, rules of a later release."""
    hand = Hand(tmp_path_factory.mktemp("any") / "runs")
    for events in segments:
        hand.segment(*(event for _, event in events))
    found = hand.entries()
    expected = Counter((kind, event.at) for events in segments for kind, event in events if kind is not None)
    assert Counter((one.kind, one.at) for one in found if one.kind in TOLD) == expected
    page = markdown.by_day(found, "x", everything=True)
    assert all(character.isprintable() or character == "\n" for character in page)


def test_a_torn_line_is_none(story):
    before = story.entries()
    with (story.root / "runs/r/journal/000001.jsonl").open("ab") as file:
        file.write(b'{"kind":"saved"')
    assert story.entries() == before


def test_a_record_that_a_journal_speaks_of_is_missed(story):
    record = aliases.newest(story.store, "champion")
    said = {"checkpoint": identity(1), "name": "r_step1", "by": "anna", "alias": "champion"}
    story.segment(
        Promoted(at=at(9), **said, record=record.number, digest=record.digest, token="a"),
        Promoted(at=at(9), **said, record=None, digest=None, token="b"),
    )
    assert not story.entries(kinds=["damage"])
    (story.root / layout.alias_key("champion", record.number)).unlink()
    [damage] = story.entries(kinds=["damage"])
    assert damage.why == "aliases/champion/000005.json is missing: the journal of r says that it was made"
    story.alias("promoted", 6, at(10), why="another in its place")
    [damage] = story.entries(kinds=["damage"])
    assert "was changed since" in damage.why


def test_a_directory_that_is_no_alias_is_passed_over(story):
    odd = story.root / "aliases/no alias/000001.json"
    odd.parent.mkdir()
    odd.write_bytes((story.root / layout.alias_key("champion", 1)).read_bytes())
    assert story.entries(kinds=["damage"]) == []


def test_a_damaged_validation_leaves_the_others(tmp_path):
    hand = Hand(tmp_path / "runs")
    for said in ("one", "two"):
        validation = validations.Validation(
            run="r",
            checkpoint=identity(1),
            name="r_step1",
            number=0,
            manifest="0" * 64,
            parts=(),
            at=START,
            by="anna",
            wanted=validations.ValidationSpec(),
            findings=(validations.Finding(check="speed", outcome="failed", said=said),),
        )
        validations.record(hand.store, validation)
    flip(hand.root / layout.validation_key("r", identity(1), 1))
    damage, good = hand.entries()
    assert (damage.kind, good.kind, good.after, good.why) == ("damage", "validated", "failed", "speed: two")


def test_a_checkpoint_whose_process_was_killed_is_told_from_its_manifest(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(5)]) as ckpt:
        ckpt.report(step=1)
        ckpt.report(step=2)
    [file] = (tmp_path / "runs/r/journal").iterdir()
    file.write_bytes(b"".join(line for line in file.read_bytes().splitlines(keepends=True) if b'"saved"' not in line))
    found = changelog.entries(pp.open(tmp_path), kinds=["saved"])
    assert [one.details["recorded"] for one in found] == [False, False]
    (next((tmp_path / "runs/r/checkpoints").iterdir()) / "manifest.json").write_text("x")
    found = changelog.entries(pp.open(tmp_path))
    assert Counter(one.kind for one in found) == {"damage": 1, "begun": 1, "saved": 1, "ended": 1}


def test_a_removal_that_came_to_nothing_says_so(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(5)]) as ckpt:
        ckpt.report(step=1)
        ckpt.report(step=2)
    run = pp.open(tmp_path).run("r")
    one = run.manifests()[0]
    said = {"checkpoint": one.id, "name": one.name, "step": 1, "epoch": None, "by": "anna"}
    journal = journals.Journal(run.store, "r", utc_now)
    for reason in ("first", "second"):
        journal.append(Removed(at=utc_now(), reason=reason, **said))
    found = changelog.entries(pp.open(tmp_path), kinds=["removed"])
    assert [one.details["came_to_nothing"] for one in found] == [True, True]
    assert "was to be removed, but still exists" in markdown.by_day(found, "x")
    maintenance.remove(run, [one], "third")
    found = changelog.entries(pp.open(tmp_path), kinds=["removed"])
    assert [one.details.get("came_to_nothing", False) for one in found] == [True, True, False]


def test_what_is_imported_is_told_as_that(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": torch.nn.Linear(2, 1).state_dict(), "epoch": 3}, tmp_path / "model_epoch3.pth")
    done = invoke("import", tmp_path / "model_epoch3.pth", tmp_path / "runs", "--run", "r")
    assert done.exit_code == 0
    found = changelog.entries(pp.open(tmp_path / "runs"))
    assert [one.kind for one in found] == ["pinned", "imported"]
    assert found[1].why.startswith("imported from model_epoch3.pth")
    assert found[1].by.startswith("peakpoint import, process")


def test_what_is_noted_beside_a_training_counts_from_its_time_on(tmp_path):
    """Its segment comes after that of the training, which goes on after it."""
    with checkpointer(tmp_path, keep=[pp.Best("m", "max"), pp.Last(2)]) as ckpt:
        ckpt.report(step=1, m=1.0)
        ckpt.wait()
        pp.open(tmp_path).run("r").record("r@latest", {"m": 0.0}, source="again")
        ckpt.report(step=2, m=0.5)
        ckpt.wait()
    found = changelog.entries(pp.open(tmp_path))
    assert [one.kind for one in found] == ["begun", "saved", "measured", "saved", "claim lost", "ended"]
    assert found[4].before.endswith("best m (max): 0")


def test_clocks_that_disagree_keep_the_order_of_a_run(tmp_path):
    """The second machine's clock is two hours behind: its entries stand earlier, and its claims are still right."""
    hand = Hand(tmp_path / "runs")
    report = {"epoch": None, "step": 1}
    hand.segment(
        Opened(at=at(0, 5), by=BY, rules=("best:acc:max",)),
        Started(at=at(0, 5), checkpoint=None, report=0),
        Reported(at=at(0, 5), report=1, metrics={"acc": 0.5}, **report),
        saved(1, at(0, 5)),
    )
    hand.segment(
        Opened(at=at(0, 3), by=BY, rules=("best:acc:max",)),
        Started(at=at(0, 3), checkpoint=identity(1), report=1),
        Reported(at=at(0, 3), report=2, metrics={"acc": 0.6}, **report),
        saved(2, at(0, 3)),
    )
    found = hand.entries()
    assert [one.kind for one in found] == ["continued", "saved", "claim lost", "begun", "saved"]
    assert (found[2].checkpoint, found[2].details["taker"]) == ("r/r_step1", "r/r_step2")


# --- periods ------------------------------------------------------------------------------------------------------


def test_times():
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert changelog.since("7d", clock=lambda: noon) == noon - timedelta(days=7)
    assert changelog.since("0", clock=lambda: noon) == noon
    assert changelog.since("2026-03-01 12:00") == noon == changelog.until("2026-03-01T13:00+01:00")
    assert changelog.since("2026-03-01") + timedelta(days=1) == changelog.until("2026-03-01")
    for text in ("yesterday", "", "2026-13-01", "7", "-7d", "9999-12-31T23:00-05:00"):
        with pytest.raises(pp.errors.ConfigError, match="is not a time; give one such as 2026-11-25"):
            changelog.since(text)


def test_a_time_without_zone_is_refused(story):
    with pytest.raises(pp.errors.ConfigError, match="has no time zone"):
        story.entries(since=datetime(2026, 3, 1))  # noqa: DTZ001


def test_the_edges_of_a_period(story):
    """Its first moment is in it, its end is not; a date at the end means the whole day."""
    assert [one.kind for one in story.entries(since=at(6), until=at(6, 1))] == ["promoted"]
    assert [one.kind for one in story.entries(since=at(6), until=changelog.until("2026-03-07"))] == [
        "promoted",
        "refused",
    ]


# --- texts --------------------------------------------------------------------------------------------------------

MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")
PLAIN = {"text", "text_special"}


def structure(text):
    """Everything of a page but its words."""
    found = []
    for token in MARKDOWN.parse(text):
        found.append((token.type, token.tag))
        found += [(child.type, child.tag) for child in token.children or () if child.type not in PLAIN]
    return found


def an_account(text):
    """One entry of each kind, with a text of somebody wherever there can be one."""
    details = {"rule": text, "ranks": True, "parts": [text], "record": 3, "release": text, "forced": [text]}
    details |= {"comparison": {"said": text}, "validation": text, "restores": 2}
    texts_ = {"by": text, "why": text, "before": text, "after": text, "alias": "a", "checkpoint": f"r/{text}"}
    return [
        ChangelogEntry(at=None if kind == "damage" else at(number), kind=kind, run="r", details=details, **texts_)
        for number, kind in enumerate(changelog.KINDS)
    ]


HOSTILE = [
    "# x",
    "</b><script>",
    "[a](http://b)",
    "![a](b)",
    "`" * 5,
    "\n\n# x\n",
    "\x1b[31m",
    "&#35;",
    "www.x.org",
    "a@b.org",
]
hostile = st.lists(st.sampled_from(HOSTILE) | texts, min_size=1, max_size=4).map("".join).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(text=hostile)
def test_no_text_makes_structure(text):
    for everything in (False, True):
        page = markdown.by_day(an_account(text), text, everything=everything)
        assert structure(page) == structure(markdown.by_day(an_account("words"), "words", everything=everything))
        assert all(character.isprintable() or character == "\n" for character in page)


@given(hostile)
def test_no_text_becomes_a_link_where_links_are_found_in_words(text):
    found = markdown.escaped(text + " http://a.b www.a.b a@b.c")
    assert not re.search(r"(?<!\\)://|www\.|(?<!\\)@", found)


def test_a_long_text_is_cut():
    assert len(markdown.escaped("x" * 100_000)) < 500


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(story, tmp_path):
    assert "# Changelog of" in invoke("changelog", story.root).output
    found = json.loads(invoke("changelog", story.root, "--json").output)
    assert [one["kind"] for one in found] == [one.kind for one in story.entries()]
    some = json.loads(invoke("changelog", story.root, "--json", "--kind", "promoted", "--run", "r").output)
    assert [one["details"]["record"] for one in some] == [1, 2, 3]
    period = ("--since", "2026-03-07", "--until", "2026-03-07")
    assert [one["kind"] for one in json.loads(invoke("changelog", story.root, *period, "--json").output)] == [
        "promoted",
        "refused",
    ]
    assert "Nothing was recorded" in invoke("changelog", story.root, "--since", "1h", "--kind", "saved").output
    page = tmp_path / "CHANGELOG.md"
    for _ in range(2):
        done = invoke("changelog", story.root, "--to", page)
        assert done.output == f"wrote {page} ({len(found)} entries)\n"
    assert "## Production" in page.read_text()
    page = tmp_path / "all.json"
    invoke("changelog", story.root, "--to", page)
    assert json.loads(page.read_text()) == found


def test_a_file_of_somebody_else_is_not_replaced(story, tmp_path):
    page = tmp_path / "CHANGELOG.md"
    page.write_text("mine")
    with pytest.raises(pp.Error, match="is not a changelog of Peakpoint"):
        invoke("changelog", story.root, "--to", page)
    assert page.read_text() == "mine"
    assert invoke("changelog", story.root, "--to", page, "--force").exit_code == 0


def test_an_empty_repository_has_a_changelog(tmp_path):
    hand = Hand(tmp_path / "runs")
    assert hand.entries() == []
    assert "Nothing was recorded" in markdown.by_day([], "x")
