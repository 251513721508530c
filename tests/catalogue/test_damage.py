"""A catalogue that differs from the files is found and made anew; what hides in it is found by audit."""

import contextlib
import os
import random
import shutil
import sqlite3
import struct
import warnings

import pytest
import sqlalchemy

import peakpoint as pp
from peakpoint.catalogue import Catalogue, SelectionQuery
from peakpoint.catalogue import audit as audit_catalogue
from peakpoint.catalogue.query import parse
from peakpoint.catalogue.ranking import ranking_keys
from peakpoint.errors import CorruptError, PeakpointWarning, StoreError
from peakpoint.format import layout
from peakpoint.repository import maintenance
from peakpoint.store import LocalStore
from training import checkpointer

ACCURACIES = [0.5, 0.7, 0.9, 0.8, 0.6]  # the best is that of step 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "runs"
    for run in ("a", "b"):
        with checkpointer(root, run=run, keep=[pp.Last(9)]) as ckpt:
            for _, accuracy in zip(ckpt.epochs(5), ACCURACIES, strict=True):
                ckpt.report(acc=accuracy - 0.01 * (run == "b"))
        opened = pp.open(root).run(run)
        opened.record(f"{run}@latest", {"late": 0.25})
        opened.pin(f"{run}:epoch=2", "it is good")
    for directory, _, _ in os.walk(root):
        os.utime(directory, (1, 1))  # long ago, so that a refresh reads nothing again
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def steps(catalogue, where, by=None, **more):
    wish = SelectionQuery(query=parse(where), keys=ranking_keys(by or {}), **more)
    return [(one.run, one.step, dict(one.metrics)) for one in catalogue.select(wish)]


BY_ACC = {"acc": "max"}
WRONG = {
    "metric": ("UPDATE peakpoint_checkpoints SET m1 = 0.95 WHERE m1 = 0.5", "", BY_ACC),
    "metric that is missing": ("UPDATE peakpoint_checkpoints SET m1 = NULL WHERE m1 = 0.5", "step == 1", None),
    "step": ("UPDATE peakpoint_checkpoints SET step = 70 WHERE m1 = 0.5", "step > 60", None),
    "epoch": ("UPDATE peakpoint_checkpoints SET epoch = 70 WHERE m1 = 0.5", "epoch > 60", None),
    "sequence": ("UPDATE peakpoint_checkpoints SET sequence = 70 WHERE m1 = 0.5", "sequence > 60", None),
    "size": ("UPDATE peakpoint_checkpoints SET size = 1 WHERE m1 = 0.5", "size < 2", None),
    "created": ("UPDATE peakpoint_checkpoints SET created = created + 8e9", "created > '2100-01-01'", None),
    "pinned": ("UPDATE peakpoint_checkpoints SET pinned = TRUE", "pinned", None),
    "archived": ("UPDATE peakpoint_checkpoints SET archived = TRUE", "archived", None),
    "whole": ("UPDATE peakpoint_checkpoints SET whole = FALSE", "not whole", None),
    "run": ("UPDATE peakpoint_checkpoints SET run = 2 WHERE m1 = 0.9", "run == 'b'", BY_ACC),
    "name": ("UPDATE peakpoint_details SET name = 'a_best'", "name == 'a_best'", None),
    "id": ("UPDATE peakpoint_details SET id = 'abcdef'", "id == 'abcdef'", None),
    "reason": ("UPDATE peakpoint_reasons SET reason = 'luck'", "reason == 'luck'", None),
    "name of a run": ("UPDATE peakpoint_runs SET name = 'c' WHERE name = 'a'", "run == 'c'", None),
    "name of a metric": ("UPDATE peakpoint_metrics SET name = 'bcc' WHERE name = 'acc'", "epoch >= 0", None),
    "record": ("UPDATE peakpoint_details SET record = replace(record, '0.9', '0.1')", "acc > 0.85", None),
    "record that is none": ("UPDATE peakpoint_details SET record = '{\"met'", "acc > 0.85", None),
    "note": ("UPDATE peakpoint_noted SET metrics = '{\"late\": 0.5}' WHERE pinned IS NULL", "has(late)", None),
    "note that is none": ("UPDATE peakpoint_noted SET metrics = '{' WHERE pinned IS NULL", "has(late)", None),
}


def test_an_archived_run_is_no_difference(root):
    with contextlib.closing(Catalogue(LocalStore(root))) as catalogue:
        maintenance.archive(pp.open(root).run("a"))
        before = catalogue.location, (root / "catalogue.sqlite").stat().st_ino
        assert {run for run, *_ in steps(catalogue, "archived")} == {"a"}
        assert list(audit_catalogue(pp.open(root))) == []
        assert before == (catalogue.location, (root / "catalogue.sqlite").stat().st_ino), "it was made anew"


@pytest.mark.parametrize("what", WRONG)
def test_what_is_given_out_is_what_the_files_say(root, catalogue_url, what):
    statement, where, by = WRONG[what]
    catalogue = Catalogue(LocalStore(root), catalogue_url)
    catalogue.refresh()
    right = steps(catalogue, where, by)
    with catalogue._engine.begin() as connection:
        assert connection.execute(sqlalchemy.text(statement)).rowcount
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert steps(catalogue, where, by) == right
    anew = [one for one in said if "differed from the files" in str(one.message)]
    assert steps(catalogue, where, by) == right
    if what == "name of a run":
        return  # which a refresh may have missed, and mended, before that
    assert anew
    assert bool(catalogue.compare()) is not bool(anew), "what was not given out is for an audit to find"
    catalogue.close()


@pytest.mark.parametrize(
    "what", ["peaks = '[]'", "peaks = replace(peaks, 'metric', 'metriC')", "rules = '7'", "newest = 'x'", "rules = '{'"]
)
def test_a_list_of_runs_is_made_anew_where_a_row_is_none(root, what):
    catalogue = Catalogue(LocalStore(root))
    catalogue.refresh()
    right = catalogue.runs()
    with catalogue._engine.begin() as connection:
        assert connection.execute(sqlalchemy.text(f"UPDATE peakpoint_runs SET {what}")).rowcount
    assert catalogue.runs() == right
    assert Catalogue(LocalStore(root)).runs() == right
    catalogue.close()


def test_one_that_is_nobodys_is_set_aside(root):
    catalogue = Catalogue(root)
    right = steps(catalogue, "", BY_ACC, top=1)
    with catalogue._engine.begin() as connection:
        connection.execute(sqlalchemy.text(WRONG["metric"][0]))
    with pytest.warns(PeakpointWarning, match="made anew"):
        assert steps(catalogue, "", BY_ACC, top=1) == right
    assert len(list(root.glob("catalogue.damaged-*.sqlite"))) == 1


def test_what_is_as_good_as_the_best_follows_from_the_files(root):
    catalogue = Catalogue(root)
    within = pp.WithinSE(n_eval=100)
    right = steps(catalogue, "", {"acc": "max", "size": "min"}, within=within)
    with catalogue._engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE peakpoint_checkpoints SET m1 = 0.99 WHERE m1 = 0.9"))
    with pytest.warns(PeakpointWarning, match="made anew"):
        assert steps(catalogue, "", {"acc": "max", "size": "min"}, within=within) == right


HIDDEN = {
    "metric": "UPDATE peakpoint_checkpoints SET m1 = 0.1 WHERE m1 = 0.9",
    "row": "DELETE FROM peakpoint_checkpoints WHERE m1 = 0.9",
    "rules": "UPDATE peakpoint_runs SET rules = '[]'",
    "note": "DELETE FROM peakpoint_noted",
}


@pytest.mark.parametrize("what", HIDDEN)
def test_what_hides_is_found_by_audit_and_mended_by_rebuilding(root, catalogue_url, what):
    repository, catalogue = pp.open(root), Catalogue(root, catalogue_url)
    catalogue.refresh()
    assert not list(audit_catalogue(repository, catalogue_url))
    with catalogue._engine.begin() as connection:
        assert connection.execute(sqlalchemy.text(HIDDEN[what])).rowcount
    found = list(audit_catalogue(repository, catalogue_url))
    assert {(one.kind, one.where) for one in found} == {("damage", catalogue.location)}
    assert all("differs from the files" in one.what and "--rebuild" in one.what for one in found)
    catalogue.rebuild()
    assert not list(audit_catalogue(repository, catalogue_url))
    catalogue.close()


def test_an_audit_makes_no_catalogue(root):
    assert not list(audit_catalogue(pp.open(root)))
    assert not list(root.glob("catalogue*"))


def copied(root):
    """The bytes of the catalogue, all of them in one file."""
    catalogue = Catalogue(LocalStore(root))
    catalogue.refresh()
    catalogue.close()
    with contextlib.closing(sqlite3.connect(root / "catalogue.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return (root / "catalogue.sqlite").read_bytes()


def outcome(root, data):
    """What selections answer with this catalogue, and whether anybody was told that something is wrong with it."""
    for file in root.glob("catalogue*"):
        file.unlink()
    (root / "catalogue.sqlite").write_bytes(data)
    repository = pp.open(root)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        best = [(one.run, one.step) for one in pp.select(repository, by=BY_ACC, top=3)]
        good = [(one.run, one.step) for one in pp.select(repository, "acc > 0.75 and not pinned")]
        found = list(audit_catalogue(repository))
    return best, good, bool(told) or bool(found) or bool(list(root.glob("catalogue.damaged-*")))


def test_a_flipped_bit_of_a_value_gives_no_other_answer_unseen(root):
    data = copied(root)
    right = outcome(root, data)
    assert not right[-1]
    value = struct.pack(">d", 0.9)
    places = [place for place in range(len(data)) if data[place : place + 8] == value]
    assert len(places) >= 2, "in the table, and in the index"
    for place in places:
        flipped = bytearray(data)
        flipped[place + 1] ^= 0x20
        *answers, told = outcome(root, flipped)
        assert told or answers == list(right[:-1]), place


def test_a_flipped_bit_of_a_value_gives_no_other_answer_where_the_catalogue_is_small(root):
    data = copied(root)
    value = struct.pack(">d", 0.9)
    for place in (place for place in range(len(data)) if data[place : place + 8] == value):
        flipped = bytearray(data)
        flipped[place + 1] ^= 0x20
        (root / "catalogue.sqlite").write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeakpointWarning)  # whether it is said is another question
            assert [(one.run, one.step) for one in pp.select(root, by=BY_ACC, top=1)] == [("a", 3)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_flipped_bit_anywhere_gives_no_other_answer_unseen(root, seed):
    data, draw = copied(root), random.Random(seed)
    right = outcome(root, data)
    used = [place for place, byte in enumerate(data) if byte]
    for place in draw.sample(used, 25):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        try:
            *answers, told = outcome(root, flipped)
        except (CorruptError, StoreError):
            continue  # said, too
        assert told or answers == list(right[:-1]), place


# --- what cannot be read ------------------------------------------------------------------------------------------


class Refusing(LocalStore):
    """Raises an input/output error for some keys, so many times."""

    where, times = None, 0

    def get(self, key, begin=0, end=None, **limits):
        if self.where is not None and self.where in key and self.times > 0:
            self.times -= 1
            raise StoreError(5, f"cannot read {key}: Input/output error")
        return super().get(key, begin, end, **limits)


@pytest.mark.parametrize("where", ["a/checkpoints/epoch2_step3/manifest.json", "runs/a/journal", "runs/a/run.json"])
@pytest.mark.parametrize("known", [False, True])
def test_a_run_that_cannot_be_read_is_left_out_and_named(root, where, known):
    name = pp.open(root).find("a:epoch=2").name
    store = Refusing(root)
    if known:
        Catalogue(store).refresh()
        pp.open(root).run("a").record("a:epoch=1", {"late": 0.5})  # so that there is something to read
    store.where, store.times = where.replace("epoch2_step3", name), 99
    repository = pp.open(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeakpointWarning)
        chosen = pp.select(repository, by=BY_ACC)
        found = list(chosen)
    if not found or found[0].run == "a":  # the manifest was not needed
        assert known
        assert chosen.unread == {}
        return
    assert {one.run for one in found} == {"b"}
    assert list(chosen.unread) == ["a"]
    assert "Input/output error" in chosen.unread["a"]
    store.where = None
    again = pp.select(repository, by=BY_ACC, top=1)
    assert [one.run for one in again] == ["a"]
    assert again.unread == {}


def test_a_damaged_manifest_is_no_answer_and_named(root):
    repository = pp.open(root)
    best = pp.select(repository, by=BY_ACC, top=1).first()
    file = root / layout.manifest_key(best.run, best.name)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"0.9", b"0.8"))  # in place: no directory changes
    chosen = pp.select(repository, by=BY_ACC, top=1)
    with pytest.warns(PeakpointWarning, match=f"checkpoint '{best.ref}' is left out: .*seal does not match"):
        assert chosen.first().run == "b"
    assert list(chosen.unread) == [best.ref]
    with pytest.warns(PeakpointWarning, match="is left out"):
        assert list(pp.select(repository, by=BY_ACC, top=1).unread) == [best.ref]
