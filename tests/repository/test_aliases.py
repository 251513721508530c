"""Aliases: one chain whoever writes it and whatever replies are lost; what it protects; what tampering shows."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import peakpoint as pp
from commands import in_process
from commands import invoke as invoked
from peakpoint.catalogue import Catalogue
from peakpoint.cli import runs
from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    FormatError,
    NotFoundError,
    PeakpointWarning,
    StoreError,
    TransientStoreError,
)
from peakpoint.format import layout
from peakpoint.format.events import Closed, Promoted, Promoting, Removed
from peakpoint.format.sealed import seal, unseal
from peakpoint.repository import aliases, maintenance, reader, removal
from peakpoint.repository.alias_holders import aliases_by_checkpoint, newest_of_all
from peakpoint.repository.alias_protection import protected_by_aliases
from peakpoint.repository.aliases import (
    AliasChange,
    AliasTarget,
    alias_at,
    append,
    back_from,
    history,
    holder,
    names,
    newest,
    numbers,
    numbers_by_alias,
    read,
)
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.journal import Journal
from peakpoint.repository.refs import AliasRef, check_alias, parse_any
from peakpoint.repository.removal import remove
from peakpoint.rules.retention import Removal
from peakpoint.store import LocalStore, MemoryStore
from rows import point
from strategies import START, identity
from training import checkpointer


def invoke(*arguments, code=0):
    found = invoked(*arguments)
    assert found.exit_code == code, found.stderr
    return found


HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def target(number):
    return AliasTarget(run="r", checkpoint=identity(number), name=f"n{number}", manifest="0" * 64)


def change(kind="promoted", number=1, **more):
    given = {"at": START, "by": "somebody", "why": "because", **more}
    return AliasChange(kind=kind, target=None if kind == "retired" else target(number), **given)


def put(store, *numbers_, alias="champion", **more):
    """Promote one after the other; the last record."""
    for number in numbers_:
        append(store, alias, change(number=number, **more), after=newest(store, alias))
    return newest(store, alias)


# --- the chain ----------------------------------------------------------------------------------------------------

kinds = st.sampled_from(["promoted", "promoted", "rolled back", "retired"])
acts = st.lists(st.tuples(kinds, st.integers(0, 3), st.integers(-3, 3)), max_size=14)


@settings(max_examples=150, deadline=None)
@given(acts)
def test_whatever_is_done_there_is_one_chain_and_the_way_back_is_that_of_a_stack(done):
    """The oracle is a stack: promoting and retiring push, a roll back pops down to what it restores."""
    store, stack, made = MemoryStore(), [], []
    for kind, pick, hours in done:
        present, at = newest(store, "a"), START + hours * HOUR
        if kind != "rolled back":
            made.append(append(store, "a", change(kind, pick, at=at), after=present))
            stack.append(made[-1])
        else:
            below = [one for one in stack[-2::-1] if one.target is not None]
            if not below:
                continue
            back = below[pick % len(below)]
            again = dataclasses.replace(change(kind, at=at), target=back.target, restores=back.number)
            made.append(append(store, "a", again, after=present))
            del stack[stack.index(back) + 1 :]
        expected = [one.number for one in stack[-2::-1] if one.target is not None]
        ways = list(back_from(store, made[-1]))
        assert [one.stands_for for one in ways] == expected
        assert [one.target for one in ways] == [made[number - 1].target for number in expected]
    if not made:
        assert (names(store), newest(store, "a")) == ([], None)
        return
    found = history(store, "a")
    assert (found.records, found.damage) == (tuple(made), ())
    assert [one.number for one in made] == list(range(1, len(made) + 1)) == numbers(store, "a")
    assert [one.digest for one in found.records] == [one.digest for one in made]
    assert [one.at for one in made] == sorted(one.at for one in made), "a clock that was set back changes no order"
    for moment in {one.at + shift * HOUR / 2 for one in made for shift in (-1, 0, 1)}:
        assert alias_at(found.records, moment) == max(
            (one for one in made if one.at <= moment), key=lambda one: one.number, default=None
        )


def test_every_member_of_a_record_comes_back():
    more = {
        "validation": "v" * 64,
        "forced": ("the gate was closed",),
        "comparison": {"metrics": {"acc": [0.5, None]}},
        "release": "7",
        "keeps": 0,
    }
    store = MemoryStore()
    made = append(store, "a/b.c+1", change(why="ä\x00\n'", **more), after=None)
    assert read(store, "a/b.c+1", 1) == made
    assert {name: getattr(made, name) for name in more} == more
    assert made.target.ref == f"r/{identity(1)}"


def test_a_time_without_zone_names_no_moment():
    with pytest.raises(ConfigError, match="no time zone"):
        alias_at([], datetime(2026, 3, 1))  # noqa: DTZ001 - what is refused


def test_who_has_not_seen_the_newest_record_changes_nothing():
    store = MemoryStore()
    first = put(store, 1)
    put(store, 2)
    for after in (None, first):
        with pytest.raises(
            ConflictError, match=r"champion has been changed meanwhile.*r/n[12] \(record [12] by somebody"
        ):
            append(store, "champion", change(number=3), after=after)
    append(store, "champion", change("retired"), after=newest(store, "champion"))
    with pytest.raises(ConflictError, match="it is retired"):
        append(store, "champion", change(number=3), after=read(store, "champion", 2))
    with pytest.raises(NotFoundError, match=r"was retired at 2026-03-01 12:00 UTC by somebody"):
        holder(store, "champion")
    assert len(history(store, "champion").records) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        change(why="\ud800"),
        change(by="\udcff"),
        dataclasses.replace(change(), target=None),
        dataclasses.replace(change("retired"), target=target(1)),
        change(restores=1),
        change("rolled back"),
        change("rolled back", restores=1),
        change(keeps=-1),
        change(at=datetime(2026, 3, 1)),  # noqa: DTZ001 - what is refused
        dataclasses.replace(change(), target=dataclasses.replace(target(1), name="../..")),
    ],
)
def test_what_no_record_can_say_is_refused_before_it_is_written(wrong):
    store = MemoryStore()
    with pytest.raises(ConfigError):
        append(store, "champion", wrong, after=None)
    assert store.children("") == []


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "/a", "a/", "..", ".a", "a.", "a.json", "a/b.json", "ä", "a b", "-a", "a" * 65, "a\n", 7, None],
)
def test_names_that_cannot_be_are_refused(name):
    store = MemoryStore()
    for action in (
        check_alias,
        lambda name: append(store, name, change(), after=None),
        lambda name: numbers(store, name),
    ):
        with pytest.raises(ConfigError, match="cannot name an alias"):
            action(name)


def test_families_and_what_lies_about_in_the_directories(tmp_path):
    store = LocalStore(tmp_path)
    for alias in ("champion", "resnet50/champion", "resnet50", "a.b/c+d"):
        put(store, 1, alias=alias)
    for odd in (
        "champion/000000.json",
        "champion/0000002.json",
        "champion/2.json",
        "champion/0000000000000000002.json",
        "champion/000002.json.bak",
        "champion/000002.json/x",
        "champion/.tmp-1-000002.json",
        "a b/000001.json",
        "-x/000001.json",
        "000009.json",
        "empty/note.txt",
        "resnet50/champion/deeper/000001.json",
        "fämily/x/000001.json",
    ):
        (tmp_path / "aliases" / odd).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aliases" / odd).write_text("{}")
    assert names(store) == ["a.b/c+d", "champion", "resnet50", "resnet50/champion"]
    assert set(map(tuple, numbers_by_alias(store).values())) == {(1,)}
    assert protected_by_aliases(store, []).keys() == {identity(1)}
    assert not newest_of_all(store)[1]


def test_a_name_that_is_none_is_answered_with_near_ones():
    store = MemoryStore()
    with pytest.raises(NotFoundError, match="aliases: none yet; peakpoint promote ROOT REF --as champion makes one"):
        holder(store, "champion")
    put(store, 1)
    for action in (holder, history):
        with pytest.raises(NotFoundError, match="no alias 'champian'; did you mean 'champion'"):
            action(store, "champian")
    for number in (2, 0, -1, 10**18, 10**1000):
        with pytest.raises(NotFoundError, match=r"no record .*; it has records 1 to 1"):
            read(store, "champion", number)
    assert parse_any("@resnet50/champion:12") == AliasRef("resnet50/champion", 12)
    for text in ("@", "@champion:", "@champion:0", "@champion:x", "@champion:1:2", "@../x", "@a/b/c"):
        with pytest.raises(ConfigError):
            parse_any(text)


# --- tampering ----------------------------------------------------------------------------------------------------


def test_every_byte_that_is_changed_is_noticed():
    store = MemoryStore()
    put(store, 1, 2, 3)
    for number in (1, 2, 3):
        key = layout.alias_key("champion", number)
        whole = store.get(key)
        for place in range(len(whole)):
            for bit in (1, 128):
                store.put(key, [whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]])
                assert history(store, "champion").damage, (number, place)
                with pytest.raises((CorruptError, FormatError)):
                    read(store, "champion", number)
        for length in range(len(whole) - 1):  # without its newline it is whole, but not what the next one was added to
            store.put(key, [whole[:length]])
            assert history(store, "champion").damage
        store.put(key, [whole])
        assert not history(store, "champion").damage


def test_a_record_that_is_changed_and_sealed_anew_shows_unless_it_is_the_newest():
    store = MemoryStore()
    put(store, 1, 2, 3)
    for number in (1, 2, 3):
        key = layout.alias_key("champion", number)
        whole = store.get(key)
        store.put(key, [seal(unseal(whole, where=key) | {"why": "another"})])
        found = history(store, "champion")
        assert len(found.records) == 3
        assert bool(found.damage) == (number < 3), "of the newest the journal tells, and audit compares"
        store.put(key, [whole])


def test_what_is_taken_out_is_missed_unless_it_is_the_newest():
    store = MemoryStore()
    put(store, *range(1, 8))
    for gone, said in [
        ({1}, ["000001.json is missing"]),
        ({3}, ["000003.json is missing"]),
        ({2, 3, 5}, ["000002.json to 000003 is missing", "000005.json is missing"]),
        ({7}, []),
    ]:
        left = MemoryStore()
        for number in set(range(1, 8)) - gone:
            left.put(layout.alias_key("champion", number), [store.get(layout.alias_key("champion", number))])
        damage = history(left, "champion").damage
        assert len(damage) == len(said)
        assert all(one in two for one, two in zip(said, damage, strict=True))


def test_a_number_of_anybody_does_not_keep_the_audit_busy():
    store = MemoryStore()
    put(store, 1)
    store.put(layout.alias_key("champion", 10**17), [b"{}"])
    assert len(history(store, "champion").damage) == 2
    assert isinstance(newest(store, "champion"), aliases.DamagedRecord)
    with pytest.raises(CorruptError):
        holder(store, "champion")


@pytest.mark.parametrize(
    ("members", "error", "words"),
    [
        ({"number": 1}, CorruptError, "moved or copied"),
        ({"alias": "challenger"}, CorruptError, "moved or copied"),
        ({"restores": 2, "kind": "rolled back"}, CorruptError, "not before it"),
        ({"restores": 0, "kind": "rolled back"}, CorruptError, "not before it"),
        ({"kind": "retired"}, CorruptError, "points at a checkpoint"),
        ({"target": None}, CorruptError, "points at nothing"),
        ({"at": "2026-03-01T12:00:00"}, CorruptError, "without zone"),
        ({"keeps": -1}, CorruptError, "no former holders"),
        (
            {"target": {"run": "../..", "checkpoint": "x", "name": "y", "manifest": ""}},
            CorruptError,
            "cannot be a ch",
        ),
        (
            {"target": {"run": "r", "checkpoint": "x", "name": "y/z", "manifest": ""}},
            CorruptError,
            "cannot be a ch",
        ),
        ({"kind": "crowned"}, FormatError, "cannot be read by this release"),
        ({"at": None}, FormatError, "cannot be read by this release"),
        ({"keeps": "many"}, FormatError, "cannot be read by this release"),
        ({"format": 2}, FormatError, "has format 2; this release of Peakpoint reads format 1"),
    ],
)
def test_a_record_that_contradicts_itself_is_no_answer(members, error, words):
    store = MemoryStore()
    put(store, 1, 2)
    key = layout.alias_key("champion", 2)
    store.put(key, [seal(unseal(store.get(key), where=key) | members)])
    with pytest.raises(error, match=words):
        holder(store, "champion")
    assert words in history(store, "champion").damage[0]
    assert list(newest_of_all(store)[1]) == ["champion"]
    assert protected_by_aliases(store, ["x"])["x"].startswith("what champion protects is not known")


def test_members_that_a_newer_release_has_added_are_passed_over():
    store = MemoryStore()
    put(store, 1)
    key = layout.alias_key("champion", 1)
    store.put(key, [seal(unseal(store.get(key), where=key) | {"mood": "good", "digest": "x"})])
    assert holder(store, "champion").target == target(1)
    assert holder(store, "champion").digest != "x"


# --- lost replies -------------------------------------------------------------------------------------------------


class Losing(MemoryStore):
    """Does what it is asked, and raises all the same."""

    error: Exception | None = None
    before = False

    def create(self, key, data):
        if self.before:
            raise self.error
        super().create(key, data)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [ConflictError("it exists"), TransientStoreError("timeout"), StoreError("no reply")])
def test_a_record_whose_reply_was_lost_is_made(error):
    store = Losing()
    store.error = error
    made = append(store, "champion", change(), after=None)
    assert append(store, "champion", change(number=2), after=made).number == 2
    assert [one.target for one in history(store, "champion").records] == [target(1), target(2)]


@pytest.mark.parametrize("error", [TransientStoreError("timeout"), StoreError("no space")])
def test_a_record_that_was_not_made_is_told(error):
    store = Losing()
    store.error, store.before = error, True
    with pytest.raises(type(error), match=str(error)):
        append(store, "champion", change(), after=None)
    assert names(store) == []


def test_the_record_of_somebody_else_is_not_taken_for_the_own_one():
    """The same change by the same person at the same time is another act."""
    store = Losing()
    append(store, "champion", change(), after=None)
    store.error, store.before = TransientStoreError("timeout"), True
    with pytest.raises(ConflictError, match="meanwhile"):
        append(store, "champion", change(), after=None)


def test_a_damaged_record_in_the_way_is_told():
    store = MemoryStore()
    store.put(layout.alias_key("champion", 1), [b"garbage"])
    with pytest.raises(CorruptError, match="is corrupt"):
        append(store, "champion", change(), after=None)


# --- several at once ----------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[1] / "support" / "aliases_at_once.py"


def at_once(place, store, count, each, seeds):
    """Let processes change one alias at once; one chain must hold each act that was reported as done exactly once."""
    commands = [
        [sys.executable, "-W", "error", SCRIPT, place, str(me), str(each), seeds and str(me)] for me in range(count)
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    others = [subprocess.Popen(command, **pipes) for command in commands]
    for other in others:
        assert other.stdout.readline() == "ready\n", other.stderr.read()
    for other in others:
        other.stdin.write("go\n")
        other.stdin.flush()
    told = [other.communicate(timeout=120) for other in others]
    assert [err for _, err in told if err] == []
    assert [other.returncode for other in others] == [0] * count
    lines = [line.split() for out, _ in told for line in out.splitlines()]
    done = {what: (int(number), digest) for state, what, *rest in lines if state == "done" for number, digest in [rest]}
    failed = [what for state, what, *_ in lines if state == "failed"]
    found = history(store, "family/champion")
    assert found.damage == ()
    assert [one.number for one in found.records] == list(range(1, len(done) + 1))
    assert {one.why: (one.number, one.digest) for one in found.records} == done
    assert len(done) + len(failed) == count * each
    assert bool(failed) == bool(seeds)
    for me in map(str, range(count)):  # each in its own order
        mine = [int(one.why.partition("-")[2]) for one in found.records if one.by == me]
        assert mine == sorted(mine)


def test_of_processes_on_one_disk_each_gets_its_place(tmp_path):
    at_once(str(tmp_path), LocalStore(tmp_path), 8, 6, "")


def test_of_processes_on_one_disk_that_loses_replies_each_gets_its_place(tmp_path):
    at_once(str(tmp_path), LocalStore(tmp_path), 3, 8, "faults")


@pytest.mark.parametrize("seeds", ["", "faults"], ids=["reliable", "replies are lost"])
def test_of_processes_at_one_object_store_each_gets_its_place(bucket, seeds):
    at_once(bucket.location, bucket, 8, 4, seeds)


def test_an_object_store_serves_as_a_place_for_aliases(bucket):
    assert (names(bucket), newest(bucket, "champion"), bucket.size("aliases/champion/000001.json")) == ([], None, None)
    put(bucket, 1, 2)
    put(bucket, 3, alias="family/champion", keeps=0)
    assert names(bucket) == ["champion", "family/champion"]
    with pytest.raises(ConflictError, match="meanwhile"):
        append(bucket, "champion", change(number=9), after=None)
    assert [one.target for one in history(bucket, "champion").records] == [target(1), target(2)]
    assert protected_by_aliases(bucket, []).keys() == {identity(1), identity(2), identity(3)}


# --- what is protected --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "f/a"]), st.none() | st.integers(0, 4), st.integers(0, 3)), max_size=12
    )
)
def test_what_is_protected_is_what_is_held_and_was_held_last(done):
    store, model = MemoryStore(), {}
    for alias, number, keeps in done:
        made = change("retired" if number is None else "promoted", number or 0, keeps=keeps)
        append(store, alias, made, after=newest(store, alias))
        model.setdefault(alias, []).append((number, keeps))
    expected = {}
    for alias, past in sorted(model.items()):
        present, keeps = past[-1]
        former = list(dict.fromkeys(number for number, _ in past[-2::-1] if number not in (None, present)))
        for number in former[:keeps]:
            expected.setdefault(identity(number), []).append(("was", alias))
        if present is not None:
            expected.setdefault(identity(present), []).append(("is", alias))
    found = protected_by_aliases(store, [])
    assert found.keys() == expected.keys()
    for checkpoint, why in found.items():
        held = [alias for how, alias in expected[checkpoint] if how == "is"]
        said = [f"{alias} since 2026-03-01 12:00 UTC" for alias in held]
        said = said or [f"was {alias} (one of its last {model[alias][-1][1]})" for _, alias in expected[checkpoint]]
        assert why == "; ".join(said)
    heads, unread = newest_of_all(store)
    assert unread == {}
    assert aliases_by_checkpoint(heads.values()) == {
        checkpoint: tuple(alias for how, alias in held if how == "is")
        for checkpoint, held in expected.items()
        if any(how == "is" for how, _ in held)
    }


def test_a_former_holder_that_cannot_be_read_is_no_former_holder():
    store = MemoryStore()
    put(store, 1, 2, 3, 4, 5, keeps=2)
    store.put(layout.alias_key("champion", 4), [b"garbage"])
    assert protected_by_aliases(store, []).keys() == {identity(5), identity(3), identity(2)}


def events(*names_):
    """Of a checkpoint and aliases: ``+a5`` begins record 5, ``-a5`` is done, ``~a5`` came to nothing."""
    facts = {"at": START, "checkpoint": "c", "by": "me"}
    made = {
        "+": lambda alias, number, **token: Promoting(name="n", alias=alias, record=number, **token, **facts),
        "-": lambda alias, number, **token: Promoted(
            name="n", alias=alias, record=number, digest="d", **token, **facts
        ),
        "~": lambda alias, _, **token: Promoted(name="n", alias=alias, record=None, digest=None, **token, **facts),
    }
    return [made[name[0]](name[1], int(name[2]), token=name[1:]) for name in names_]


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (["+a3"], "about to become a"),
        (["+a3", "-a3"], None),
        (["+a3", "~a3"], None),
        (["+b1", "+a3"], "about to become b; about to become a"),
        (["+a3", "+b1", "-a3"], "about to become b"),
        (["+a2"], None),  # the record is there, and says what came of it
        (["+a1", "+a3"], "about to become a"),
        (["~a3", "+a3"], "about to become a"),
    ],
)
def test_what_is_about_to_be_promoted_is_protected_until_the_record_is_there(said, left):
    store = MemoryStore()
    put(store, 1, 2, alias="a")
    found = protected_by_aliases(store, [], annotations_of(events(*said)).promoting.values())
    assert found.pop("c", None) == left
    assert found.keys() == {identity(1), identity(2)}


# --- retention ----------------------------------------------------------------------------------------------------


def trained(root, steps=4, keep=4, **options):
    with checkpointer(root, keep=[pp.Last(keep)], **options) as ckpt:
        for step in range(1, steps + 1):
            ckpt.report(step=step, acc=step / 10)
    return pp.open(root).run("r")


def steps(run):
    return [one.step for one in run.manifests()]


def test_a_training_leaves_alone_what_aliases_point_at_until_they_do_no_more(tmp_path):
    store = LocalStore(tmp_path)
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        for step in range(1, 12):
            ckpt.report(step=step)
            ckpt.wait()
            run = pp.open(tmp_path).run("r")
            if step in (2, 4, 5):
                point(store, "champion", run.manifests()[-1], keeps=1)
            if step == 8:
                point(store, "champion", None, keeps=0)
            expected = {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 4, 5], 6: [4, 5, 6], 7: [4, 5, 7], 9: [9]}
            assert steps(run) == expected.get(step, steps(run))
    assert steps(run) == [11]


def test_a_training_goes_on_while_an_alias_is_damaged_and_removes_nothing(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        store = LocalStore(tmp_path)
        point(store, "champion", pp.open(tmp_path).run("r").manifests()[0])
        file = store.path(layout.alias_key("champion", 1))
        whole = file.read_bytes()
        file.write_bytes(b"garbage")
        for step in (2, 3):
            ckpt.report(step=step)
        ckpt.wait()
        run = pp.open(tmp_path).run("r")
        assert steps(run) == [1, 2, 3]
        assert all("what champion protects is not known" in why.reason for why in run.kept()[run.manifests()[1].id])
        file.write_bytes(whole)
        ckpt.report(step=4)
        ckpt.wait()
        assert steps(run) == [1, 4]


def test_a_plan_spares_what_is_aliased_and_so_does_carrying_it_out(tmp_path):
    run = trained(tmp_path)
    rules = (pp.Last(1),)
    before = run.plan(rules)
    assert [one.manifest.step for one in before.remove] == [1, 2, 3]
    point(run.store, "champion", run.manifests()[1])  # after the plan was made
    assert maintenance.apply_plan(run, before, rules) == [
        (
            f"{before.remove[1].manifest.name} was not removed: it is pinned, an alias points at it, "
            "or the run was archived a moment ago"
        )
    ]
    assert steps(run) == [2, 4]
    after = run.plan(rules)
    assert after.remove == ()
    assert [claim.rule for claim in after.keep[run.manifests()[0].id]] == ["protection:aliased"]


def test_parts_of_what_is_aliased_are_not_dropped(tmp_path):
    run = trained(tmp_path)
    rules = (pp.Last(4, parts="model"), pp.Best("acc", "max"))
    before = run.plan(rules)
    state = {"model": 1, "more": 2}
    assert before.drop == (), "the state has one part only"
    shutil.rmtree(tmp_path)
    run = trained(tmp_path, state=state)
    before = run.plan(rules)
    assert [one.manifest.step for one in before.drop] == [1, 2, 3]
    point(run.store, "champion", run.manifests()[1])
    [told] = maintenance.apply_plan(run, before, rules)
    assert "was not removed: it is pinned, an alias points at it" in told
    assert [sorted({"model", "more"} & one.parts.keys()) for one in run.manifests()] == [
        ["model"],
        ["model", "more"],
        ["model"],
        ["model", "more"],
    ]
    assert reader.manifest_digest(run.store, run.manifests()[1]) == newest(run.store, "champion").target.manifest


def test_who_promotes_while_it_is_being_removed_is_seen_or_sees_it(tmp_path):
    """Whatever comes first, at any moment of a removal: never an alias that points at nothing."""
    for moment in range(4):
        root = tmp_path / str(moment)
        run = trained(root)
        victim = run.manifests()[0]
        refused = []

        def promote(run=run, victim=victim, refused=refused):
            """The order of writing that docs/format.md prescribes."""
            journal = Journal(run.store, "r", lambda: START)
            facts = {
                "at": START,
                "checkpoint": victim.id,
                "name": victim.name,
                "alias": "champion",
                "by": "me",
                "token": "t",
            }
            journal.append(Promoting(record=1, **facts))
            journal.sync()
            made = None
            if run.is_being_removed(victim) or victim.id not in {one.id for one in run.manifests()}:
                refused.append(True)
            else:
                made = point(run.store, "champion", victim)
            number, digest = (None, None) if made is None else (made.number, made.digest)
            journal.append(Promoted(**facts, record=number, digest=digest))
            journal.append(Closed(at=START, why="promoted"))
            journal.close()

        class Watched(Journal):
            def sync(self, moment=moment, promote=promote):
                if moment == 1:
                    promote()
                super().sync()
                if moment == 2:
                    promote()

        if moment == 0:
            promote()
        journal = Watched(run.store, "r", lambda: START)

        def protected(run=run, moment=moment, promote=promote):
            found = run.aliased(run.manifests(), run.events())
            if moment == 3:
                promote()
            return found

        told = remove(run.store, journal, [Removal(victim, "x")], by="rules", protected=protected)
        journal.close()
        aliased, there = names(run.store) == ["champion"], victim.id in {one.id for one in run.manifests()}
        assert (aliased, there, bool(refused)) == ((True, True, False) if moment == 0 else (False, there, True))
        assert there == bool(told)
        if there:
            point(run.store, "champion", victim)  # what was spared can be promoted and pinned later
            run.pin(f"r/{victim.id}", "figure 3")
            assert not maintenance.in_trash(run)


def test_what_is_aliased_is_not_removed_by_hand(tmp_path):
    run = trained(tmp_path)
    one, two, three, _ = run.manifests()
    point(run.store, "champion", one, keeps=1)
    point(run.store, "champion", two, keeps=1)
    told = maintenance.remove(run, [one, two, three], "x")
    assert told[0] == f"{one.name} was not removed: was champion (one of its last 1)"
    assert told[1].startswith(f"{two.name} was not removed: champion since ")
    assert steps(run) == [1, 2, 4]
    assert not [event for event in run.events() if isinstance(event, Removed) and event.checkpoint != three.id]
    for options in ((), ("--yes",), ("--yes", "--json"), ("--dry-run",)):
        with pytest.raises(ConflictError, match=f"aliases protect r/{two.name}: champion since "):
            invoke("rm", tmp_path, f"r/{two.name}", "r@latest", *options)
    told = in_process("rm", tmp_path, "@champion:1", "--yes")
    assert (told.returncode, told.stdout) == (11, ""), "no plan is shown that will not be carried out"
    assert f"aliases protect r/{one.name}: was champion (one of its last 1)" in told.stderr
    assert steps(run) == [1, 2, 4], "nothing of it"
    point(run.store, "champion", None, keeps=0)
    invoke("rm", tmp_path, f"r/{two.name}", "--yes")
    assert steps(run) == [1, 4]


def test_what_was_cut_short_protects_until_that_record_is_there(tmp_path):
    run = trained(tmp_path)
    one = run.manifests()[0]
    journal = Journal(run.store, "r", lambda: START)
    journal.append(
        Promoting(at=START, checkpoint=one.id, name=one.name, alias="champion", record=1, token="t", by="me")
    )
    journal.close()  # and no word of what came of it
    assert [claim.reason for claim in run.plan((pp.Last(1),)).keep[one.id]] == ["about to become champion"]
    assert maintenance.remove(run, [one], "x") == [f"{one.name} was not removed: about to become champion"]
    with checkpointer(tmp_path, keep=[pp.Last(2)], undo_for="0") as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="rules have changed"):
            ckpt.resume()
        ckpt.report(step=5)
        ckpt.wait()
        assert steps(run) == [1, 4, 5]
        point(run.store, "champion", run.manifests()[1])
        ckpt.report(step=6)
    assert steps(run) == [4, 5, 6]


def test_an_archived_one_and_one_that_was_brought_back_are_the_same_checkpoint(tmp_path):
    run = trained(tmp_path, state={"model": list(range(100))})
    one = run.manifests()[0]
    point(run.store, "champion", one)
    maintenance.archive(run)
    assert pp.open(tmp_path).find("@champion").id == one.id
    point(run.store, "champion", None, keeps=0)
    maintenance.restore(run)
    maintenance.remove(run, [one], "x", undo_for=DAY)
    with pytest.raises(
        NotFoundError, match=r"record 1 of champion points at r/\S+ \(\w{16}\), which does not exist any more"
    ):
        pp.open(tmp_path).find("@champion:1")
    maintenance.undo(run, [one.id])
    assert pp.open(tmp_path).find("@champion:1").id == one.id
    with pytest.raises(NotFoundError, match="retired"):
        pp.open(tmp_path).find("@champion")
    with pytest.raises(NotFoundError, match="record 2 of champion retired it"):
        pp.open(tmp_path).find("@champion:2")


def test_another_checkpoint_in_the_directory_is_not_what_was_promoted(tmp_path):
    run = trained(tmp_path)
    one, two = run.manifests()[:2]
    store = run.store
    point(store, "champion", one)
    key = layout.manifest_key("r", one.name)
    whole = store.get(key)
    store.put(key, [seal(unseal(whole, where=key) | {"metrics": {"acc": 1.0}})])
    with pytest.raises(CorruptError, match="another manifest than when it became champion"):
        pp.open(tmp_path).find("@champion")
    store.put(key, [seal(unseal(whole, where=key) | {"id": two.id})])
    with pytest.raises(NotFoundError, match=f"{two.id} has its directory now"):
        pp.open(tmp_path).find("@champion")
    store.put(key, [whole])
    assert pp.open(tmp_path).find("@champion").step == 1


# --- audit --------------------------------------------------------------------------------------------------------


def findings(root):
    return [(one.kind, one.where, one.what) for one in audit(pp.open(root)).findings]


@pytest.fixture
def promoted(tmp_path):
    """A repository with aliases whose changes the journal tells of."""
    run = trained(tmp_path)
    journal = Journal(run.store, "r", lambda: START)
    for alias, place in (("champion", 0), ("champion", 1), ("champion", 2), ("family/champion", 3)):
        one = run.manifests()[place]
        made = point(run.store, alias, one)
        facts = {"at": START, "checkpoint": one.id, "name": one.name, "alias": alias, "by": "me", "token": alias}
        journal.append(Promoted(**facts, record=made.number, digest=made.digest))
    journal.append(Promoted(**facts, record=None, digest=None))
    journal.append(Closed(at=START, why="promoted"))
    journal.close()
    return run


def test_an_audit_finds_nothing_where_nothing_is_wrong(promoted):
    assert findings(promoted.store.root) == []
    maintenance.remove(promoted, [], "x")
    promoted.store.put("releases/20260301.json", [b"{}"])
    promoted.store.put(layout.told_key("family/champion", 1), [b"{}"])
    with contextlib.closing(Journal(promoted.store, "r", lambda: START)) as journal:
        removal.remove(promoted.store, journal, [Removal(promoted.manifests()[0], "x")], by="me")
    assert findings(promoted.store.root) == [], "a former holder may be gone"


def test_an_audit_finds_what_was_done_to_aliases(promoted, tmp_path):
    store, newest = promoted.store, layout.alias_key("champion", 3)
    whole = store.get(newest)
    store.put(newest, [seal(unseal(whole, where=newest) | {"why": "another"})])
    [(kind, where, what)] = findings(tmp_path)
    assert (kind, where) == ("damage", newest)
    assert what == "changed since the promotion at 2026-03-01 12:00 UTC by me (journal of r)"
    store.delete(newest)
    [(kind, where, what)] = findings(tmp_path)
    assert (kind, where) == ("damage", newest)
    assert what == "the record of the promotion at 2026-03-01 12:00 UTC by me (journal of r) is missing"
    store.put(newest, [whole])
    store.delete(layout.alias_key("champion", 2))
    assert [(kind, where) for kind, where, _ in findings(tmp_path)] == [
        ("damage", "aliases/champion"),
        ("damage", layout.alias_key("champion", 2)),
    ]
    result = invoke("audit", tmp_path, code=12)
    assert "000002.json is missing: somebody has taken it out" in result.stdout.replace("\n", " ")


def test_an_audit_finds_an_alias_that_points_at_nothing(promoted, tmp_path):
    one = promoted.manifests()[2]
    key = layout.manifest_key("r", one.name)
    promoted.store.put(key, [seal(unseal(promoted.store.get(key), where=key) | {"metrics": {"acc": 1.0}})])
    what = f"champion points at r/{one.name}, a checkpoint that"
    where = layout.alias_key("champion", 3)
    assert findings(tmp_path) == [("damage", where, f"{what} has another manifest than when it was promoted")]
    shutil.rmtree(promoted.store.path(layout.checkpoint_prefix("r", one.name)))
    first, (kind, key, lost) = findings(tmp_path)
    assert first == ("damage", where, f"{what} does not exist")
    assert (kind, key) == ("damage", layout.checkpoint_prefix("r", one.name))
    assert "is missing, although the journal says that it was saved" in lost
    shutil.rmtree(tmp_path / "runs")
    assert len(findings(tmp_path)) == 2, "both aliases"


def test_an_audit_knows_litter_from_what_others_have_put_there(promoted, tmp_path):
    litter = [
        "aliases/.tmp-1-x",
        "aliases/champion/.tmp-1-000004.json",
        "aliases/family/.tmp-2-x",
        "aliases/family/champion/.tmp-3-000002.json",
        "releases/.tmp-4-1.json",
    ]
    foreign = [
        "aliases/notes.txt",
        "aliases/a b/",
        "aliases/champion/000000.json",
        "aliases/champion/000009.told.json",
        "aliases/champion/old/",
        "aliases/family/champion/deeper/",
        "releases/notes.txt",
        "releases/more/",
    ]
    for name in [*litter, *foreign]:
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"{}")
    foreign.remove("aliases/champion/old/")  # a family's name and an alias's: empty, so it is nothing
    found = findings(tmp_path)
    assert sorted(where for kind, where, _ in found if kind == "litter") == sorted(litter)
    assert sorted(where for kind, where, _ in found if kind == "foreign") == sorted(foreign)
    assert sorted(one.where for one in clean(pp.open(tmp_path))) == sorted(litter)
    assert {kind for kind, _, _ in findings(tmp_path)} == {"foreign"}
    assert [(tmp_path / name).exists() for name in foreign] == [True] * len(foreign)


# --- shown --------------------------------------------------------------------------------------------------------


def test_aliases_are_shown_wherever_checkpoints_are(promoted, tmp_path):
    one = promoted.manifests()[2]
    with checkpointer(tmp_path, run="other", keep=[pp.Last(2)]) as ckpt:
        ckpt.report(step=1, acc=0.1)
    lines = invoke("ls", tmp_path).output.splitlines()
    assert lines[0].split()[:2] == ["run", "aliases"]
    assert any(line.split()[:2] == ["r", "@champion"] for line in lines)
    assert "@family/champion" in lines[lines.index(next(line for line in lines if line.startswith("r "))) + 1]
    listed_ = {run["name"]: run["aliases"] for run in json.loads(invoke("ls", tmp_path, "--json").output)["runs"]}
    assert listed_ == {"r": ["champion", "family/champion"], "other": []}
    assert "aliases" not in invoke("ls", tmp_path, "other").output, "no column for nothing"
    shown = invoke("ls", tmp_path, "r").output
    assert "@champion" in shown
    assert "champion since 2026-03-01 12:00 UTC" in shown
    assert "was champion (one of its last 3)" in shown
    [run] = json.loads(invoke("ls", tmp_path, "r", "--json").output)["runs"]
    assert run["aliases"] == ["champion", "family/champion"]
    assert [one["aliases"] for one in run["checkpoints"]] == [[], [], ["champion"], ["family/champion"]]
    assert "@champion" in invoke("select", tmp_path, "step == 3").output
    assert "aliases" not in invoke("select", tmp_path, "step == 2").output
    [chosen] = json.loads(invoke("select", tmp_path, "alias == 'champion'", "--json").output)["selected"]
    assert (chosen["id"], chosen["aliases"]) == (one.id, ["champion"])
    assert invoke("select", tmp_path, "alias ~ '*champion' and step < 4", "--refs").output.strip() == f"r/{one.name}"
    shown = [line.split() for line in invoke("show", tmp_path, "@champion").output.splitlines()]
    assert ["aliases", "@champion"] in shown
    assert json.loads(invoke("show", tmp_path, "@champion", "--json").output)["aliases"] == ["champion"]
    explained = json.loads(invoke("explain", tmp_path, "@champion", "--json").output)
    assert explained["aliases"] == ["champion"]
    assert {"rule": "protection:aliased", "reason": "champion since 2026-03-01 12:00 UTC"} in explained["kept_because"]
    assert "  - champion since 2026-03-01 12:00 UTC" in invoke("explain", tmp_path, f"r/{one.name}").output
    plan = invoke("keep", tmp_path, "r", "--rules", "last:1", "--dry-run").output
    assert "champion since 2026-03-01 12:00 UTC" in plan


def test_an_alias_that_cannot_be_read_is_told_wherever_aliases_are_shown(promoted, tmp_path):
    promoted.store.put(layout.alias_key("champion", 3), [b"garbage"])
    with checkpointer(tmp_path, run="other", keep=[pp.Last(2)]) as ckpt:
        ckpt.report(step=1, acc=0.1)
    for command in (["ls"], ["ls", "--json"], ["ls", "r"], ["show", "r:1"], ["explain", "r:1", "--json"]):
        result = invoke(command[0], tmp_path, *command[1:])
        assert "'champion'" in result.stderr, command
        assert "is corrupt" in result.stderr, command
        assert "@champion" not in result.stdout
    with pytest.warns(PeakpointWarning, match="the alias 'champion' is left out: .*is corrupt"):
        assert "@champion" not in invoke("select", tmp_path).stdout
    with pytest.raises(CorruptError, match="is corrupt"):
        invoke("show", tmp_path, "@champion")


def test_tables_fit_narrow_terminals_with_aliases_as_without(promoted, tmp_path):
    listed_ = Catalogue(tmp_path)
    listed_.refresh()

    def printed(width):
        console = Console(width=width, file=io.StringIO())
        console.print(runs.runs_table(console, listed_.runs(), set()))
        return console.file.getvalue()

    assert "@family/champion" in printed(120)
    for width in (60, 30):
        assert max(map(len, printed(width).splitlines())) <= width
        assert "best" in printed(width)


def test_a_record_that_the_disk_does_not_give_is_told():
    class Broken(MemoryStore):
        def get(self, key, begin=0, end=None, **limits):
            if key.startswith("aliases/a/"):
                raise StoreError("input/output error")
            return super().get(key, begin, end, **limits)

    store = Broken()
    for alias in ("a", "b"):
        append(store, alias, change(), after=None)
    found, unread = newest_of_all(store)
    assert (list(found), unread) == (["b"], {"a": "input/output error"})
    with pytest.raises(StoreError):
        protected_by_aliases(store, [])  # nothing is removed then, and the next save tries again
