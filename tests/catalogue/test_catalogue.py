"""The catalogue says what the files say, at once, whatever is done to them and to it."""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sqlalchemy
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import peakpoint as pp
from peakpoint.catalogue import Catalogue, SelectionQuery, schema
from peakpoint.catalogue.query import parse
from peakpoint.catalogue.ranking import ranking_keys
from peakpoint.errors import (
    ConfigError,
    CorruptError,
    FormatError,
    MissingExtraError,
    NotFoundError,
    PeakpointWarning,
    StoreError,
    TransientStoreError,
)
from peakpoint.format import layout
from peakpoint.format.events import Closed, Opened, Pinned
from peakpoint.format.manifest import encode_manifest
from peakpoint.format.sealed import digest
from peakpoint.repository import maintenance, reader
from peakpoint.repository.aliases import AliasChange, append, back_from, newest
from peakpoint.repository.audit import audit
from peakpoint.repository.journal import Journal
from peakpoint.repository.lost import damaged_checkpoints
from peakpoint.repository.root import ensure_repository, ensure_run
from peakpoint.rules import ranking_metrics
from peakpoint.rules.history import history
from peakpoint.rules.peaks import peaks
from peakpoint.store import LocalStore, MemoryStore
from rows import point, write
from strategies import START, manifest
from training import checkpointer

DAY = timedelta(days=1)
pytestmark = pytest.mark.filterwarnings("ignore::peakpoint.errors.PeakpointWarning")  # NaN is reported on purpose


def everything(catalogue):
    return list(catalogue.select(SelectionQuery(query=parse(""))))


def count(catalogue):
    """How many there are; reads no manifest."""
    return catalogue.select(SelectionQuery(query=parse(""))).count()


def facts(checkpoint):
    return repr(checkpoint)  # NaN is equal to itself there


def check(root, catalogue):
    """The catalogue against the files, read by the code that knows of no catalogue."""
    truth = {one.id: one for run in pp.open(root).runs() for one in run.checkpoints()}
    found = {one.id: one for one in everything(catalogue)}
    assert {key: facts(one) for key, one in found.items()} == {key: facts(one) for key, one in truth.items()}
    listed = {run.name: run for run in catalogue.runs()}
    assert listed.keys() == {run.name for run in pp.open(root).runs()}
    for run in pp.open(root).runs():
        one, events = listed[run.name], run.events()
        mine = [checkpoint for checkpoint in truth.values() if checkpoint.run == run.name]
        assert one.rules == tuple(rule.text for rule in run.rules())
        assert repr(one.peaks) == repr(tuple(peaks(history(events), ranking_metrics(run.rules()))))
        assert (one.checkpoints, one.size_bytes) == (len(mine), sum(checkpoint.size_bytes for checkpoint in mine))
        steps = {checkpoint.step for checkpoint in mine}
        assert dict(one.kept) == {peak.metric: peak.best_step in steps for peak in one.peaks}
        assert one.newest == max((checkpoint.created_at for checkpoint in mine), default=None)
        pinned = set(run.pinned()) & {checkpoint.id for checkpoint in mine}
        chosen = catalogue.select(SelectionQuery(query=parse(f"pinned and run == '{run.name}'")))
        assert {checkpoint.id for checkpoint in chosen} == pinned
    check_aliases(root, catalogue, truth.values(), listed)
    assert catalogue.compare() == []


def check_aliases(root, catalogue, checkpoints, listed):
    """The aliases against the newest record of each, by its number, whatever else is in the directories."""
    pointed = {}
    for file in sorted((root / "aliases").rglob("[0-9]*.json"), key=lambda path: int(path.stem)):
        record = json.loads(file.read_bytes())
        pointed[record["alias"]] = record["target"]
    pointed = {alias: (one["run"], one["checkpoint"]) for alias, one in pointed.items() if one is not None}
    assert {alias: place for place, names in catalogue.aliases().items() for alias in names} == pointed
    for alias, place in pointed.items():
        found = [(one.run, one.id) for one in catalogue.select(SelectionQuery(query=parse(f"alias == '{alias}'")))]
        assert found == [place for one in checkpoints if (one.run, one.id) == place], "of a run that is lost nothing"
    for name, run in listed.items():
        assert run.aliases == tuple(sorted(alias for alias, place in pointed.items() if place[0] == name))


# --- whatever is done ---------------------------------------------------------------------------------------------


def unless_archived(verb):
    with contextlib.suppress(pp.ConflictError):
        verb()


class Anything(RuleBasedStateMachine):
    """Trainings and people do things to a repository; one catalogue follows, another begins from nothing."""

    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="peakpoint-any-"))
        self.root = self.place / "runs"
        self.ckpt = None
        self.step = 0
        with checkpointer(self.root, run="first") as ckpt:
            ckpt.resume()
        self.catalogue = Catalogue(LocalStore(self.root), by_hand=0)
        self.catalogue.candidate_limit = 5

    def teardown(self):
        if self.ckpt is not None:
            self.ckpt.close()
        self.catalogue.close()
        shutil.rmtree(self.place)

    def runs(self):
        return [run for run in pp.open(self.root).runs() if run.checkpoints() and run.holder() is None]

    @initialize()
    def begin(self):
        self.start("r", ["best"])

    @rule(
        name=st.sampled_from(["r", "s"]),
        keep=st.lists(st.sampled_from(["best", "last", "low"]), min_size=1, max_size=2),
    )
    def start(self, name, keep):
        if self.ckpt is not None:
            self.ckpt.close()
        known = {"best": pp.Best("acc", "max"), "last": pp.Last(3), "low": pp.Best("loss", "min", parts="model")}
        if name in {run.name for run in pp.open(self.root).runs()}:
            maintenance.restore(pp.open(self.root).run(name))
        self.ckpt = checkpointer(
            self.root, run=name, keep=[known[k] for k in keep], undo_for=(keep[0] == "low" and "1h") or "0"
        )
        self.ckpt.resume()

    @rule(
        acc=st.sampled_from([0.1, 0.5, 0.9, math.nan, math.inf]),
        loss=st.none() | st.sampled_from([1.0, 0.2, -math.inf]),
    )
    def report(self, acc, loss):
        self.step += 1
        values = {"acc": acc} | ({} if loss is None else {"loss": loss}) | ({"rare": 1.0} if self.step % 7 == 0 else {})
        self.ckpt.report(values, step=self.step)
        self.ckpt.wait()

    @rule(undo=st.booleans(), pick=st.integers(0, 9))
    def remove(self, undo, pick):
        for run in pp.open(self.root).runs():
            there = run.manifests()
            if there:
                one = there[pick % len(there)]
                unless_archived(lambda: maintenance.remove(run, [one], "because", undo_for=DAY * undo))  # noqa: B023
                return

    @rule()
    def take_back(self):
        for run in pp.open(self.root).runs():
            if run.holder() is None and (there := maintenance.in_trash(run)):
                unless_archived(lambda: maintenance.undo(run, [there[0].manifest.id]))  # noqa: B023
                return

    @rule(pick=st.integers(0, 9), value=st.sampled_from([0.3, 2.0, math.nan]))
    def measure(self, pick, value):
        for run in pp.open(self.root).runs():
            there = run.manifests()
            if there:
                run.record(f"{run.name}/{there[pick % len(there)].id}", {"acc": value, "late": value})

    @rule(pick=st.integers(0, 9), name=st.sampled_from(["acc", "late"]))
    def withdraw(self, pick, name):
        for run in pp.open(self.root).runs():
            there = run.manifests()
            if there:
                with contextlib.suppress(NotFoundError):  # never measured
                    run.withdraw(f"{run.name}/{there[pick % len(there)].id}", name)

    @rule(pick=st.integers(0, 9), on=st.booleans())
    def pin(self, pick, on):
        for run in pp.open(self.root).runs():
            there = run.manifests()
            if there:
                ref = f"{run.name}/{there[pick % len(there)].id}"
                run.pin(ref, "why") if on else run.unpin(ref)

    @rule(back=st.booleans())
    def archive(self, back):
        for run in self.runs():
            (maintenance.restore if back else maintenance.archive)(run)

    @rule(texts=st.sampled_from(["best:acc:max:parts=model", "last:1", "best:loss:min"]))
    def keep(self, texts):
        for run in self.runs():
            rules = (pp.rules.parse(texts),)
            unless_archived(lambda: maintenance.apply_plan(run, run.plan(rules), rules))  # noqa: B023

    @rule(alias=st.sampled_from(["champion", "r/champion", "challenger-2"]), pick=st.integers(0, 9))
    def promote(self, alias, pick):
        for run in pp.open(self.root).runs():
            there = run.manifests()
            if there:
                point(LocalStore(self.root), alias, there[pick % len(there)], keeps=pick % 3)

    @rule(alias=st.sampled_from(["champion", "r/champion"]), retire=st.booleans())
    def roll_back_or_retire(self, alias, retire):
        store = LocalStore(self.root)
        present = newest(store, alias)
        if present is None or present.target is None:
            return
        before = next(back_from(store, present), None)
        if retire:
            change = AliasChange(kind="retired", target=None, at=START, by="me", why="x", keeps=0)
        elif before is not None:
            more = {"restores": before.stands_for, "target": before.target}
            change = AliasChange(kind="rolled back", at=START, by="me", why="x", **more)
        else:
            return
        append(store, alias, change, after=present)

    @rule()
    def litter(self):
        directory = LocalStore(self.root).path(layout.checkpoint_prefix("first", f"x{self.step}"))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "state.json").write_text("{}")

    @rule(pick=st.integers(0, 9))
    def delete_by_hand(self, pick):
        for run in self.runs():
            there = run.checkpoints()
            shutil.rmtree(there[pick % len(there)].path)
            return

    @precondition(lambda self: self.step > 3)
    @rule()
    def lose_a_run(self):
        name = self.ckpt.run
        for run in self.runs():
            if run.name != name:
                shutil.rmtree(self.root / "runs" / run.name)
                return

    @rule()
    def lose_the_index(self):
        self.catalogue.close()
        for suffix in ("", "-wal", "-shm"):
            (self.root / f"catalogue.sqlite{suffix}").unlink(missing_ok=True)
        self.catalogue = Catalogue(LocalStore(self.root), by_hand=0)
        self.catalogue.candidate_limit = 5

    @invariant()
    def the_catalogue_says_what_the_files_say(self):
        check(self.root, self.catalogue)


Anything.TestCase.settings = settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnything = Anything.TestCase


def test_the_same_in_both_databases(tmp_path, catalogue_url):
    root = tmp_path / "runs"
    keep = [pp.Best("acc", "max", parts="model"), pp.Last(2)]
    with checkpointer(root, keep=keep) as ckpt:
        ckpt.resume()
        catalogue = Catalogue(LocalStore(root), catalogue_url)
        for step, acc in enumerate([0.5, math.nan, 0.9, math.inf, 0.3], 1):
            ckpt.report({"acc": acc, **({"val/[x] loss".replace(" ", "_"): 1 / step} if step > 2 else {})}, step=step)
            ckpt.wait()
            check(root, catalogue)
        run = pp.open(root).run("r")
        run.record("r@latest", {"late": 2.0, "acc": 0.95})
        run.pin("r@latest", "figure 3")
        check(root, catalogue)
    maintenance.archive(run)
    check(root, catalogue)
    assert len(list(catalogue.select(SelectionQuery(query=parse("archived"))))) == len(run.checkpoints())
    maintenance.restore(run)
    check(root, catalogue)
    maintenance.remove(run, run.manifests()[:1], "x", undo_for=DAY)
    check(root, catalogue)
    maintenance.undo(run, [maintenance.in_trash(run)[0].manifest.id])
    check(root, catalogue)
    for alias, place in (("champion", 0), ("r/champion", -1), ("champion", -1), ("gone", 0)):
        point(LocalStore(root), alias, run.manifests()[place])
        check(root, catalogue)
    point(LocalStore(root), "gone", None)
    check(root, catalogue)
    again = Catalogue(LocalStore(root), catalogue_url)
    check(root, again)
    again.rebuild()
    check(root, catalogue)
    shutil.rmtree(root / "aliases" / "champion")
    check(root, catalogue)
    catalogue.close()
    again.close()


def test_settings_follow_the_runs_in_both_databases(tmp_path, catalogue_url):
    root = tmp_path / "runs"

    def trained(run, **given):
        with checkpointer(root, run=run, state={"x": 1}, **given) as ckpt:
            ckpt.resume()
            ckpt.report(step=1, acc=0.5)

    def runs(text):
        return {one.run for one in catalogue.select(SelectionQuery(query=parse(text)))}

    trained("a", config={"lr": 0.1, "opt": {"name": "sgd"}}, tags=["ablation"])
    catalogue = Catalogue(LocalStore(root), catalogue_url)
    trained("b", config={"lr": 0.001})
    assert runs('config.lr > 0.01 and tag == "ablation"') == {"a"}
    trained("b", config={"lr": 0.5, "text": "a\0b" + "x" * 5000}, tags=["ablation"])
    assert runs('config.lr > 0.01 and tag == "ablation"') == {"a", "b"}
    trained("a")
    assert runs("config.opt.name == 'sgd'") == {"a"}, "a training that gives none leaves them"
    check(root, catalogue)
    with catalogue._engine.begin() as connection:
        connection.execute(sqlalchemy.update(schema.settings).values(value=7.0))
    assert {one.run for one in catalogue.compare()} == {"a", "b"}
    catalogue.rebuild()
    check(root, catalogue)
    shutil.rmtree(root / "runs" / "b")
    assert runs("has(config.lr)") == {"a"}
    catalogue.close()


# --- at once ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_found_as_soon_as_it_is_committed(tmp_path, catalogue_url):
    """Also one whose saver was killed between the manifest and the journal, and whose directory had been seen."""
    store = LocalStore(tmp_path / "runs")
    ensure_repository(store, START)
    ensure_run(store, "r", START, {}, ())
    journal = Journal(store, "r", lambda: START)  # never closed, as by a process that was killed
    catalogue = Catalogue(store, catalogue_url)
    assert everything(catalogue) == []
    directory = store.path(layout.checkpoint_prefix("r", "r_step1"))
    directory.mkdir(parents=True)
    assert everything(catalogue) == []
    os.utime(directory.parent, (1, 1))  # long ago, so that its stamp counts
    os.utime(directory, (1, 1))
    assert everything(catalogue) == []
    shutil.rmtree(directory)
    os.utime(directory.parent, (1, 1))
    directory.mkdir()
    os.utime(directory, (1, 1))
    os.utime(directory.parent, (1, 1))
    (directory / "manifest.json").write_bytes(encode_manifest(manifest()))
    os.utime(directory.parent, (1, 1))
    assert [one.name for one in everything(catalogue)] == ["r_step1"]
    (directory / "manifest.json").unlink()
    directory.rmdir()
    assert everything(catalogue) == []
    catalogue.close()
    journal.close()


def test_what_is_deleted_by_hand_is_missed(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(3)]) as ckpt:
        for _ in ckpt.steps(3):
            ckpt.report()
    settle(tmp_path)
    patient, watchful = Catalogue(LocalStore(tmp_path), by_hand=3600), Catalogue(LocalStore(tmp_path), by_hand=0)
    assert len(everything(patient)) == len(everything(watchful)) == 3
    settle(tmp_path)
    assert len(everything(patient)) == 3
    lost = pp.open(tmp_path).find("r:2")
    shutil.rmtree(lost.path)
    assert count(patient) == 3
    for catalogue in (watchful, patient):  # what one has seen all know
        with pytest.warns(pp.PeakpointWarning, match=rf"checkpoint '{lost.ref}' is left out: .* is missing"):
            assert count(catalogue) == 2
    run = pp.open(tmp_path).run("r")
    maintenance.remove_damaged(run, damaged_checkpoints(run.store, "r", reader.list_run(run.store, "r")), "gone")
    assert (count(watchful), count(patient)) == (2, 2)
    shutil.rmtree(pp.open(tmp_path).find("r:1").path)
    assert [one.step for one in everything(patient)] == [3], "what is given out is compared with the files"
    patient.close()
    watchful.close()


LONG_AGO = itertools.count(1000)


def settle(root):
    """Make every directory that has just changed look as if that had been long ago, each time later than before."""
    for directory, _, _ in os.walk(root):
        if os.stat(directory).st_mtime > 1e9:  # noqa: PTH116
            os.utime(directory, (next(LONG_AGO),) * 2)


def test_nothing_is_read_again_that_has_not_changed(tmp_path):
    class Counting(LocalStore):
        read: tuple = ()

        def get(self, key, begin=0, end=None, **limits):
            self.read = (*self.read, key)
            return super().get(key, begin, end, **limits)

    with checkpointer(tmp_path, keep=[pp.Last(9)]) as ckpt:
        ckpt.resume()
        for step in (1, 2, 3):
            ckpt.report(step=step, acc=0.5)
        ckpt.wait()
        settle(tmp_path)
        store = Counting(tmp_path)
        catalogue = Catalogue(store)
        assert len(everything(catalogue)) == 3
        store.read = ()
        assert count(catalogue) == 3
        assert store.read == ()
        ckpt.report(step=4, acc=0.5)
        ckpt.wait()
        assert count(catalogue) == 4
        read = {key.rpartition("/")[2] for key in store.read}
        assert read == {"000001.jsonl", "archived.json", "manifest.json", "run.json"}
        assert sum(key.endswith("manifest.json") for key in store.read) == 1
        catalogue.close()


def test_many_who_ask_at_once_see_everything(tmp_path, catalogue_url):
    """Threads and processes that all refresh the same catalogue while a training commits."""
    root = tmp_path / "runs"
    with checkpointer(root, keep=[pp.Last(100)]) as ckpt:
        ckpt.resume()
        code = (
            "import sys\nfrom peakpoint.catalogue import Catalogue, SelectionQuery\n"
            "from peakpoint.catalogue.query import parse\n"
            "from peakpoint.store import LocalStore\nfrom pathlib import Path\n"
            "catalogue = Catalogue(LocalStore(Path(sys.argv[1])), sys.argv[2])\nbefore = 0\n"
            "while before < 12:\n"
            "    now = catalogue.select(SelectionQuery(query=parse(''))).count()\n"
            "    assert now >= before\n    before = now\n"
        )
        command = [sys.executable, "-W", "error", "-c", code, str(root), catalogue_url]
        others = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
        catalogue = Catalogue(LocalStore(root), catalogue_url)
        failures = []

        def follow():
            try:
                while catalogue.select(SelectionQuery(query=parse(""))).count() < 12:
                    pass
            except Exception as error:  # noqa: BLE001 - to be told in the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=follow) for _ in range(2)]
        for thread in threads:
            thread.start()
        for step in range(1, 13):
            ckpt.report(step=step, **{f"m{step}": 1.0})  # new columns, too
            ckpt.wait()
            assert catalogue.select(SelectionQuery(query=parse(""))).count() == step
        for thread in threads:
            thread.join()
        for other in others:
            assert (other.wait(), other.stderr.read()) == (0, b"")
            other.stderr.close()
        assert failures == []
        check(root, catalogue)
        catalogue.close()


# --- aliases ------------------------------------------------------------------------------------------------------


def select_alias(catalogue, text="alias == 'champion'"):
    return [one.step for one in catalogue.select(SelectionQuery(query=parse(text)))]


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "old"])
def test_a_change_of_an_alias_is_seen_at_once(three, tmp_path, catalogue_url, old):
    """Also one whose directory had been seen empty, and by another catalogue."""
    root = shutil.copytree(three, tmp_path / "runs")
    store, [run] = LocalStore(root), pp.open(root).runs()
    (root / "aliases" / "champion").mkdir(parents=True)
    (root / "aliases" / "family" / "champion").mkdir(parents=True)
    catalogues = [Catalogue(store, catalogue_url) for _ in range(2)]
    expected = []
    for place in (None, 0, 2, 1, 1, None, 2):
        if place is not None:
            point(store, "champion", run.manifests()[place])
            point(store, "family/champion", run.manifests()[0])
            expected = [place + 1]
        for _ in range(2):
            if old:
                settle(root)
            assert [select_alias(catalogue) for catalogue in catalogues] == [expected] * 2
    code = (
        "import sys\nfrom pathlib import Path\nfrom peakpoint.store import LocalStore\n"
        "from peakpoint.repository.aliases import AliasChange, append, newest\n"
        "store = LocalStore(Path(sys.argv[1]))\nimport datetime\n"
        "change = AliasChange(kind='retired', target=None, at=datetime.datetime.now(datetime.UTC), by='me', why='x')\n"
        "append(store, 'champion', change, after=newest(store, 'champion'))\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(root)], check=True)
    assert [select_alias(catalogue) for catalogue in catalogues] == [[], []]
    assert select_alias(catalogues[0], "alias ~ '*'") == [1]
    for catalogue in catalogues:
        catalogue.close()


def test_aliases_are_not_read_again_while_nothing_changes(three, tmp_path):
    class Counting(LocalStore):
        read: tuple = ()

        def get(self, key, begin=0, end=None, **limits):
            self.read = (*self.read, key)
            return super().get(key, begin, end, **limits)

        def children(self, prefix):
            self.read = (*self.read, prefix)
            return super().children(prefix)

    root = shutil.copytree(three, tmp_path / "runs")
    point(LocalStore(root), "champion", pp.open(root).run("r").manifests()[0])
    settle(root)
    store = Counting(root)
    catalogue = Catalogue(store)
    assert select_alias(catalogue) == [1]
    store.read = ()
    assert catalogue.select(SelectionQuery(query=parse("alias == 'champion'"))).count() == 1
    assert store.read == ()
    pp.open(root).run("r").record("r@latest", {"acc": 0.7})
    assert select_alias(catalogue) == [1]
    assert select_alias(catalogue) == [1]
    assert [key for key in store.read if key.startswith("aliases")] == [], "a run that changes is no alias that does"
    catalogue.close()


def test_two_copies_with_one_catalogue_have_aliases_of_their_own(three, tmp_path, catalogue_url):
    for place in (0, 1):
        root = shutil.copytree(three, tmp_path / str(place))
        point(LocalStore(root), "champion", pp.open(root).run("r").manifests()[place])
        settle(root)
    catalogues = [Catalogue(LocalStore(tmp_path / str(place)), catalogue_url) for place in (0, 1)]
    for _ in range(3):
        assert [select_alias(catalogue) for catalogue in catalogues] == [[1], [2]]
    for catalogue in catalogues:
        catalogue.close()


def test_an_alias_points_into_one_run_also_where_another_has_the_same_id(tmp_path, catalogue_url):
    store = LocalStore(tmp_path / "runs")
    ensure_repository(store, START)
    for number, run in enumerate(("a", "b"), 1):
        ensure_run(store, run, START, {}, ())
        write(store, manifest(run=run, id="0123456789abcdef", step=number))
    point(store, "champion", pp.open(tmp_path / "runs").run("b").manifests()[0])
    catalogue = Catalogue(store, catalogue_url)
    assert select_alias(catalogue) == [2]
    assert {run.name: run.aliases for run in catalogue.runs()} == {"a": (), "b": ("champion",)}
    catalogue.close()


@pytest.mark.filterwarnings("always::peakpoint.errors.PeakpointWarning")
def test_an_alias_that_cannot_be_read_is_told_and_is_no_answer(three, tmp_path, catalogue_url):
    root = shutil.copytree(three, tmp_path / "runs")
    store, manifests = LocalStore(root), pp.open(root).run("r").manifests()
    for alias in ("champion", "challenger"):
        point(store, alias, manifests[0])
        point(store, alias, manifests[1])
    catalogue = Catalogue(store, catalogue_url)
    assert select_alias(catalogue, "has(alias)") == [2]
    file = root / "aliases" / "champion" / "000002.json"
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole.replace(b"because", b"BECAUSE"))
    for _ in range(2):
        with pytest.warns(PeakpointWarning, match="the alias 'champion' is left out: .*seal does not match"):
            assert select_alias(catalogue) == []
        assert list(catalogue.unread_aliases) == ["champion"]
    with pytest.warns(PeakpointWarning, match="champion"):
        assert select_alias(catalogue, "alias == 'challenger'") == [2]
    file.unlink()
    file.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_alias(catalogue) == [2]
    catalogue.close()


def test_many_who_ask_at_once_never_go_back_to_an_older_holder(three, tmp_path, catalogue_url):
    root = shutil.copytree(three, tmp_path / "runs")
    store, manifests = LocalStore(root), pp.open(root).run("r").manifests()
    point(store, "champion", manifests[0])
    catalogues = [Catalogue(LocalStore(root), catalogue_url) for _ in range(3)]
    done, failures = threading.Event(), []

    def follow(catalogue):
        try:
            while not done.is_set():
                select_alias(catalogue)
        except Exception as error:  # noqa: BLE001 - to be told in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=follow, args=(catalogue,)) for catalogue in catalogues[1:]]
    for thread in threads:
        thread.start()
    for number in range(1, 25):
        point(store, "champion", manifests[number % 3])
        assert select_alias(catalogues[0]) == [number % 3 + 1]
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    check(root, catalogues[1])
    for catalogue in catalogues:
        catalogue.close()


# --- an index that may go -----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    root = tmp_path / "runs"
    with checkpointer(root, keep=[pp.Best("acc", "max")]) as ckpt:
        for _ in ckpt.steps(1):
            ckpt.report(acc=0.5)
    pp.open(root).run("r").record("r@latest", {"late": 0.25})
    return root


def test_deleting_it_loses_nothing(small):
    before = [facts(one) for one in pp.select(small, "late == 0.25")]
    assert len(before) == 1
    for file in small.glob("catalogue.sqlite*"):
        file.unlink()
    assert [facts(one) for one in pp.select(small, "late == 0.25")] == before


@pytest.mark.parametrize("damage", ["garbage", "half", "header", "pages"])
def test_a_damaged_one_is_made_anew(small, damage):
    Catalogue(small).refresh()
    file = small / "catalogue.sqlite"
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(file.read_bytes())
    if damage == "garbage":
        data[:] = b"not a database" * 1000
    elif damage == "half":
        del data[len(data) // 2 :]
    elif damage == "header":
        data[:16] = bytes(16)
    else:
        data[4096:] = os.urandom(len(data) - 4096)
    for old in small.glob("catalogue.sqlite-*"):
        old.unlink()
    file.write_bytes(data)
    assert [one.step for one in pp.select(small, "late == 0.25")] == [1]
    [kept] = small.glob("catalogue.damaged-*.sqlite")
    assert kept.read_bytes() == data, "it may be somebody's"
    assert [(one.kind, one.where) for one in audit(pp.open(small)).findings] == [("foreign", kept.name)]


def test_a_file_that_was_named_is_never_replaced(small, tmp_path):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"precious weights" * 100)
    with pytest.raises(ConfigError, match="is not a catalogue, or is damaged"):
        Catalogue(small, str(weights))
    assert weights.read_bytes() == b"precious weights" * 100


def test_one_of_a_newer_release_is_refused(small, catalogue_url):
    Catalogue(small, catalogue_url).close()
    other = Catalogue(LocalStore(small), catalogue_url)
    with other._engine.begin() as connection:
        connection.execute(sqlalchemy.update(schema.meta).values(version=99))
    with pytest.raises(FormatError, match="version 99"):
        Catalogue(small, catalogue_url)
    with other._engine.begin() as connection:
        connection.execute(sqlalchemy.update(schema.meta).values(version=1))
    other.close()


def older(store, catalogue_url):
    """An engine on a catalogue as an older release left it: without a column and a table, and with another one."""
    with contextlib.closing(Catalogue(store, catalogue_url)) as catalogue:
        catalogue.refresh()
    url = catalogue_url.replace("postgresql://", "postgresql+psycopg://")
    engine = sqlalchemy.create_engine(url if "://" in url else f"sqlite:///{url}")
    with engine.begin() as connection:
        for statement in (
            "ALTER TABLE peakpoint_checkpoints DROP COLUMN whole",
            "DROP TABLE peakpoint_aliases",
            "CREATE TABLE peakpoint_files (checkpoint INTEGER)",
            f"UPDATE peakpoint_meta SET version = {schema.VERSION - 1}",
        ):
            connection.execute(sqlalchemy.text(statement))
    return engine


def test_all_runs_are_read_again_for_a_column_that_an_older_one_lacks(small, catalogue_url):
    store = LocalStore(small)
    point(store, "champion", pp.open(small).run("r").manifests()[0])
    engine = older(store, catalogue_url)
    catalogues = [Catalogue(store, catalogue_url) for _ in range(2)]
    for catalogue in catalogues:
        request = SelectionQuery(query=parse("whole and alias == 'champion' and late > 0"))
        assert [checkpoint.step for checkpoint in catalogue.select(request)] == [1]
        check(small, catalogue)
    with engine.begin() as connection:
        assert schema.version_of(connection) == schema.VERSION
        assert not sqlalchemy.inspect(connection).has_table("peakpoint_files"), "of an older release"
        schema.drop_all(connection)
        assert not [name for name in sqlalchemy.inspect(connection).get_table_names() if name.startswith("peakpoint_")]
    for catalogue in catalogues:
        catalogue.close()
    engine.dispose()


def test_an_older_one_is_made_anew_in_one_step(small, catalogue_url, monkeypatch):
    engine = older(LocalStore(small), catalogue_url)

    monkeypatch.setattr(schema, "secrets", None)  # which fails after all tables were made
    with pytest.raises(AttributeError, match="randbits"):
        Catalogue(LocalStore(small), catalogue_url)
    with engine.connect() as connection:
        assert schema.version_of(connection) == schema.VERSION - 1
        assert connection.scalar(sqlalchemy.select(schema.runs.c.name)) == "r", "all or nothing"
    engine.dispose()


def test_an_older_one_of_another_repository_is_left_alone(small, tmp_path, catalogue_url):
    engine = older(LocalStore(small), catalogue_url)
    with checkpointer(tmp_path / "other") as ckpt:
        ckpt.report(step=1)
    with pytest.raises(ConfigError, match="belongs to the repository"):
        Catalogue(tmp_path / "other", catalogue_url)
    with engine.connect() as connection:
        assert connection.scalar(sqlalchemy.select(schema.runs.c.name)) == "r"
    engine.dispose()


def test_another_table_or_column_is_another_version():
    """A change of the tables needs a new number: otherwise an older catalogue would be taken for one of today."""
    tables = sorted(schema.meta.metadata.tables.values(), key=lambda table: table.name)
    columns = [
        (table.name, column.name, str(column.type), column.nullable, column.primary_key)
        for table in tables
        for column in table.columns
    ]
    assert (schema.VERSION, digest(repr(columns).encode())[:16]) == (5, "9dd27e24ee9f70e6")


@pytest.mark.parametrize("state", ["older", "none"])
def test_several_who_open_one_at_once_make_it_once(small, catalogue_url, state):
    store = LocalStore(small)
    if state == "older":
        older(store, catalogue_url).dispose()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        catalogues = [future.result() for future in [pool.submit(Catalogue, store, catalogue_url) for _ in range(6)]]
    for catalogue in catalogues:
        assert len(everything(catalogue)) == 1
    births = set()
    for catalogue in catalogues:
        with catalogue._reading.connect() as connection:
            births.add(connection.scalar(sqlalchemy.select(schema.meta.c.born)))
        catalogue.close()
    assert len(births) == 1


def test_each_repository_has_its_own(small, tmp_path, catalogue_url):
    Catalogue(small, catalogue_url).close()
    with checkpointer(tmp_path / "other") as ckpt:
        ckpt.report(step=1)
    with pytest.raises(ConfigError, match="belongs to the repository"):
        Catalogue(tmp_path / "other", catalogue_url)
    moved = shutil.move(small, tmp_path / "moved")
    assert [one.path.exists() for one in pp.select(moved, "")] == [True]
    shutil.copy(tmp_path / "moved" / "catalogue.sqlite", tmp_path / "other" / "catalogue.sqlite")
    assert [one.run for one in pp.select(tmp_path / "other", "")] == ["r"]


def test_where_nothing_can_be_written_it_is_in_the_cache(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = (
        "import os, sys\nimport peakpoint as pp\nfrom peakpoint.catalogue import Catalogue\n"
        "list(pp.select(sys.argv[2], ''))  # imports what there is to import\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(len(list(pp.select(sys.argv[1]))), Catalogue(sys.argv[1]).location)\n"
    )
    if os.getuid() != 0:
        pytest.skip("only root can become somebody who may not write")
    (tmp_path / "cache").mkdir()
    opened = [path for path in (tmp_path, *tmp_path.parents) if path.name.startswith(("pytest", "popen", "test_"))]
    for path in (*opened, *(path for path in small.rglob("*") if path.is_dir()), small):
        path.chmod(0o755)
    for path in small.rglob("*"):
        path.chmod(path.stat().st_mode | 0o044)
    (tmp_path / "cache").chmod(0o777)
    other = shutil.copytree(small, tmp_path / "other")
    done = subprocess.run(
        [sys.executable, "-c", code, str(small), str(other)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"1 {tmp_path / 'cache' / 'peakpoint'}")
    assert not (small / "catalogue.sqlite").exists()


def test_where_sqlite_cannot_work_it_is_elsewhere(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (small / "catalogue.sqlite").mkdir()  # what a file system without the right locks comes to
    assert len(list(pp.select(small))) == 1
    assert Catalogue(small).location.startswith(str(tmp_path / "cache" / "peakpoint"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    homeless = Catalogue(small)
    assert count(homeless) == 1
    file = Path(homeless.location)
    assert file.exists()
    del homeless
    assert not file.exists()


def test_what_cannot_be_reached_is_said(small, monkeypatch):
    with pytest.raises(StoreError, match="cannot be used") as caught:
        Catalogue(small, "postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="mysql"):
        Catalogue(small, "mysql://x/y")
    with pytest.raises(ConfigError, match="cannot be read"):
        Catalogue(small, "://")
    with pytest.raises(ConfigError, match="does not exist"):
        Catalogue(small, str(small / "no" / "such" / "place.sqlite"))
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"peakpoint\[postgres\]"):
        Catalogue(small, "postgresql://127.0.0.1/x")


def test_the_environment_names_it(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PEAKPOINT_CATALOGUE", str(tmp_path / "elsewhere.db"))
    assert len(list(pp.select(small, ""))) == 1
    assert (tmp_path / "elsewhere.db").exists()
    assert not (small / "catalogue.sqlite").exists()


def test_of_a_store_without_directories_it_is_a_file_for_as_long_as_it_is_used():
    store = MemoryStore()
    with checkpointer(store, keep=[pp.Last(2)]) as ckpt:
        for _ in ckpt.steps(3):
            ckpt.report(acc=0.5)
    catalogue = Catalogue(store)
    wish = SelectionQuery(query=parse("acc == 0.5"), keys=ranking_keys({"step": "max"}))
    assert [one.step for one in catalogue.select(wish)] == [3, 2]
    file = Path(catalogue.location)
    assert file.exists()
    del catalogue
    assert not file.exists()


# --- odd things ---------------------------------------------------------------------------------------------------


def test_more_metrics_than_there_are_columns(tmp_path, catalogue_url):
    store = LocalStore(tmp_path / "runs")
    ensure_repository(store, START)
    ensure_run(store, "r", START, {}, ())
    for number in range(3):
        values = {f"layer{place:03d}/sparsity": place / 1000 + number for place in range(schema.WIDEST + 20)}
        write(store, manifest(sequence=number + 1, metrics=values | ({"rare": math.nan} if number else {})))
    catalogue = Catalogue(store, catalogue_url)
    last = f"metric('layer{schema.WIDEST + 19:03d}/sparsity')"
    found = catalogue.select(SelectionQuery(query=parse(f"{last} > 1 and {last} < 2.1 or has(rare)")))
    assert [one.sequence for one in found] == [2]
    by = catalogue.select(SelectionQuery(query=parse(f"{last} > 0"), keys=ranking_keys({last[8:-2]: "max"}), top=2))
    assert [one.sequence for one in by] == [3, 2]
    assert [clause.left for clause in by.why().clauses] == [3, 3]
    catalogue.close()


def test_hostile_names_are_data(tmp_path, catalogue_url):
    names = ["x'; DROP TABLE peakpoint_runs; --", 'a"b', "m1", "key", "%s", "?", "\u202e", "``"]
    names = [name.replace(" ", "_") for name in names]
    with checkpointer(tmp_path / "runs", keep=[pp.Last(1)]) as ckpt:
        ckpt.report(dict.fromkeys(names, 0.5), step=1)
        ckpt.save("nul \x00 'quote\" \u202e")
    catalogue = Catalogue(LocalStore(tmp_path / "runs"), catalogue_url)
    for name in names:
        quoted = name.replace('"', '\\"')
        text = f'metric("{quoted}") == 0.5'
        assert len(list(catalogue.select(SelectionQuery(query=parse(text))))) >= 1, name
    assert catalogue.metrics() == tuple(sorted(names))
    check(tmp_path / "runs", catalogue)
    catalogue.close()


def test_numbers_that_are_too_large_are_refused_or_infinite(small, catalogue_url):
    catalogue = Catalogue(LocalStore(small), catalogue_url)
    huge = catalogue.select(SelectionQuery(query=parse("late * 1e308 * 1e308 > 1")))
    if catalogue_url.startswith("postgresql"):
        with pytest.raises(ConfigError, match="cannot be computed"):
            list(huge)
    else:
        assert len(list(huge)) == 1
    assert list(catalogue.select(SelectionQuery(query=parse("size > 9007199254740992 or step < -3e9")))) == []
    catalogue.close()


def test_damaged_manifests_are_told_and_do_not_stop_the_rest(small):
    with checkpointer(small, run="other", keep=[pp.Last(2)]) as ckpt:
        for _ in ckpt.steps(2):
            ckpt.report(acc=0.1)
    broken = pp.open(small).run("other").checkpoints()[0].path / "manifest.json"
    whole = broken.read_bytes()
    broken.write_bytes(whole.replace(b"0.1", b"0.9"))
    catalogue = Catalogue(small)
    assert sorted((one.run, one.step) for one in pp.select(small, "")) == [("other", 2), ("r", 1)]
    [listed] = [run for run in catalogue.runs() if run.name == "other"]
    assert "seal does not match" in listed.damaged[0]
    broken.unlink()
    broken.write_bytes(whole)
    assert len(list(pp.select(small, ""))) == 3
    assert all(not run.damaged for run in Catalogue(small).runs())


def test_a_segment_that_was_written_anew_is_read_anew(small):
    """Nobody should; a backup that is put back does."""
    catalogue = Catalogue(small)
    assert len(list(pp.select(small, "has(late)"))) == 1
    shutil.rmtree(small / "runs" / "r" / "journal")
    Journal(LocalStore(small), "r", lambda: START).close()
    assert len(list(pp.select(small, "has(acc)"))) == 1
    assert [one.metrics for one in pp.select(small, "")] == [{"acc": 0.5}]
    with pytest.raises(NotFoundError):
        pp.select(small, "latte > 1")
    assert catalogue.runs()[0].reports == 0


def test_audit_knows_its_files(small):
    repository = pp.open(small)
    list(pp.select(repository, ""))
    assert [finding for finding in audit(repository).findings if "catalogue" in finding.where] == []
    assert json.dumps([one.step for one in pp.select(repository, "")]) == "[1]"


# --- somebody looks in the middle ---------------------------------------------------------------------------------


class Followed(LocalStore):
    """A disk that somebody looks at before and after everything that is done to it, and that can fail."""

    look = staticmethod(lambda: None)
    left = math.inf

    def _follow(self, action):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.look()
        found = action()
        self.look()
        return found

    def put(self, key, chunks, size=None):
        return self._follow(lambda: super(Followed, self).put(key, chunks, size))

    def create(self, key, data):
        return self._follow(lambda: super(Followed, self).create(key, data))

    def delete(self, key):
        return self._follow(lambda: super(Followed, self).delete(key))

    def prune(self, prefix):
        return self._follow(lambda: super(Followed, self).prune(prefix))


def _remove(run):
    maintenance.remove(run, run.manifests()[:2], "x", undo_for=DAY)


def _remove_for_good(run):
    maintenance.remove(run, run.manifests()[:2], "x")


def _take_back(run):
    for one in maintenance.in_trash(run):
        maintenance.undo(run, [one.manifest.id])


def _drop(run):
    rules = (pp.Best("acc", "max", parts="model"), pp.Last(3, parts="model"))
    maintenance.apply_plan(run, run.plan(rules), rules)


def _measure(run):
    run.record("r@latest", {"late": 0.5})
    run.pin("r@latest", "why")


DONE = {
    "remove": [_remove],
    "remove for good": [_remove_for_good],
    "take back": [_remove, _take_back],
    "drop parts": [_drop],
    "archive": [maintenance.archive],
    "restore": [maintenance.archive, maintenance.restore],
    "measure": [_measure, _remove, _measure],
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    with checkpointer(root, state={"model": torch.nn.Linear(2, 2), "more": torch.ones(3)}, keep=[pp.Last(3)]) as ckpt:
        for step in (1, 2, 3):
            ckpt.report(step=step, acc=step / 10)
    return root


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "old"])
@pytest.mark.parametrize("what", DONE)
def test_who_looks_in_the_middle_of_something_sees_its_end(three, tmp_path, what, old):
    root = shutil.copytree(three, tmp_path / "runs")
    catalogue = Catalogue(LocalStore(root), by_hand=0)
    store = Followed(root)
    store.look = lambda: (settle(root / "runs") if old else None, everything(catalogue))
    for action in DONE[what]:
        action(pp.open(store).run("r"))
    if old:
        settle(root / "runs")
    check(root, catalogue)
    catalogue.close()


@pytest.mark.parametrize("what", ["take back", "drop parts", "archive", "restore"])
def test_who_looks_after_a_crash_sees_what_it_left(three, tmp_path, what):
    for count in range(100):
        root = shutil.copytree(three, tmp_path / f"runs{count}")
        catalogue = Catalogue(LocalStore(root))
        store = Followed(root)
        store.look = lambda root=root, catalogue=catalogue: (settle(root / "runs"), everything(catalogue))
        for action in DONE[what][:-1]:
            action(pp.open(store).run("r"))
        store.left = count
        try:
            DONE[what][-1](pp.open(store).run("r"))
        except KeyboardInterrupt:
            settle(root / "runs")
            check(root, catalogue)
        else:
            return
        finally:
            catalogue.close()
            shutil.rmtree(root)
    pytest.fail("it never ends")


# --- other pasts --------------------------------------------------------------------------------------------------


def short(root, values, run="r", **more):
    with checkpointer(root, run=run, keep=[pp.Best("acc", "max"), pp.Last(9)], name="{run}_{step}") as ckpt:
        ckpt.resume()
        for step, acc in enumerate(values, 1):
            ckpt.report(step=step, acc=acc, **more)
            ckpt.wait()


def test_a_run_of_the_same_name_is_another_run(tmp_path, catalogue_url):
    short(tmp_path / "runs", [0.1, 0.2])
    catalogue = Catalogue(LocalStore(tmp_path / "runs"), catalogue_url)
    check(tmp_path / "runs", catalogue)
    shutil.rmtree(tmp_path / "runs" / "runs" / "r")
    short(tmp_path / "runs", [0.4, 0.8])
    check(tmp_path / "runs", catalogue)
    assert len(list(catalogue.select(SelectionQuery(query=parse("acc > 0.5"))))) == 1
    catalogue.close()


def test_a_backup_that_is_put_back_is_what_there_is(tmp_path):
    root = tmp_path / "runs"
    short(root, [0.1, 0.2])
    shutil.copytree(root / "runs", tmp_path / "backup")
    run = pp.open(root).run("r")
    run.pin("r@latest", "soon forgotten")
    catalogue = Catalogue(root)
    check(root, catalogue)
    shutil.rmtree(root / "runs")
    shutil.copytree(tmp_path / "backup", root / "runs")
    pp.open(root).run("r").record("r:1", {"new": 0.5})
    check(root, catalogue)
    assert not list(catalogue.select(SelectionQuery(query=parse("pinned"))))
    assert len(list(catalogue.select(SelectionQuery(query=parse("new == 0.5"))))) == 1


def test_two_copies_can_share_one_catalogue_and_are_not_confused(tmp_path, catalogue_url):
    short(tmp_path / "one", [0.1, 0.2])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for root, value in (("one", 1.0), ("two", 2.0)):
        pp.open(tmp_path / root).run("r").record("r@latest", {"late": value})
    for _ in range(2):
        for root, value in (("one", 1.0), ("two", 2.0)):
            found = pp.select(tmp_path / root, catalogue=catalogue_url, where="has(late)")
            assert [(one.metrics["late"], one.path.exists()) for one in found] == [(value, True)]


# --- held over a change -------------------------------------------------------------------------------------------


def test_what_is_held_over_a_change_stays_right(tmp_path, catalogue_url):
    root = tmp_path / "runs"
    ensure_repository(LocalStore(root), START)
    ensure_run(LocalStore(root), "many", START, {}, ())
    for number in range(1, 270):
        write(LocalStore(root), manifest(run="many", sequence=number, step=number, metrics={"acc": 0.7}))
    catalogue = Catalogue(LocalStore(root), catalogue_url)
    selection = catalogue.select(SelectionQuery(query=parse("acc > 0.5"), keys=ranking_keys({"step": "min"})))
    count = selection.count()
    assert count > 250
    walk = iter(selection)
    begin = [next(walk) for _ in range(3)]
    late = list(selection)[-1]
    pp.open(root).run("many").pin(late.ref, "read again, and its key stays")
    other = Catalogue(LocalStore(root), catalogue_url)
    assert other.select(SelectionQuery(query=parse("pinned"))).count() == 1
    maintenance.remove(pp.open(root).run("many"), pp.open(root).run("many").manifests()[-2:-1], "x")
    short(root, [0.0], run="new")
    other.refresh()
    rest = list(walk)
    assert late.id in {one.id for one in rest}
    assert all(one.metrics["acc"] > 0.5 for one in begin + rest)
    assert len(begin) + len(rest) == count - 1
    walk = iter(selection)
    next(walk)
    other.rebuild()
    if catalogue_url.startswith("postgresql"):  # a file that was deleted lives on for those who have it open
        with pytest.raises(TransientStoreError, match="made anew"):
            list(walk)
    catalogue.close()
    other.close()


def test_a_selection_that_is_held_asks_the_catalogue_that_is_there(tmp_path, postgres):
    root = tmp_path / "runs"
    short(root, [0.1], run="b", loss=0.1)
    catalogue = Catalogue(LocalStore(root), postgres)
    held = catalogue.select(SelectionQuery(query=parse("loss < 0.5")))
    assert [one.run for one in held] == ["b"]
    with checkpointer(root, run="a", keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1, first=0.9)
    Catalogue(LocalStore(root), postgres).rebuild()
    assert [one.run for one in held] == ["b"]
    catalogue.close()


# --- one bad thing ------------------------------------------------------------------------------------------------


def test_one_run_that_cannot_be_read_keeps_nobody_from_the_others(small, recwarn):
    for run in ("bad", "newer"):
        short(small, [0.3], run=run)
    write(LocalStore(small), manifest(run="bad", sequence=9, step=2**63))  # more than a database, or a reader, takes
    journal = Journal(LocalStore(small), "newer", lambda: START)
    journal.append(Opened(at=START, by={}, rules=("best:acc:max", "brightest:acc")))
    journal.append(Closed(at=START, why="closed"))
    journal.close()
    (small / "runs" / "newer" / "checkpoints" / os.fsdecode(b"\xff\xfe")).mkdir()
    catalogue = Catalogue(small)
    found = catalogue.select(SelectionQuery(query=parse("")))
    assert sorted(one.run for one in found) == ["bad", "newer", "r"], "only the checkpoint is left out"
    assert any("'bad/r_step9' is left out" in str(warning.message) for warning in recwarn)
    assert list(catalogue.unread) == ["bad/r_step9"]
    [newer] = [run for run in catalogue.runs() if run.name == "newer"]
    assert [peak.metric for peak in newer.peaks] == ["acc"]


def test_numbers_that_no_database_takes_are_refused_when_they_are_reported(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        for wrong in (2**63, -1):
            with pytest.raises(ConfigError, match="less than"):
                ckpt.report(step=wrong)


def test_tables_of_others_are_left_alone(small, catalogue_url):
    url = catalogue_url.replace("postgresql://", "postgresql+psycopg://")
    engine = sqlalchemy.create_engine(url if "://" in url else f"sqlite:///{url}")
    with engine.begin() as connection:
        for table in ("files", "runs", "details", "reasons"):
            connection.execute(sqlalchemy.text(f"CREATE TABLE {table} (x TEXT)"))
            connection.execute(sqlalchemy.text(f"INSERT INTO {table} VALUES ('precious')"))
    catalogue = Catalogue(LocalStore(small), catalogue_url)
    assert len(everything(catalogue)) == 1
    catalogue.rebuild()
    assert len(everything(catalogue)) == 1
    with engine.begin() as connection:
        for table in ("files", "runs", "details", "reasons"):
            assert connection.scalar(sqlalchemy.text(f"SELECT x FROM {table}")) == "precious"
    catalogue.close()
    engine.dispose()


def test_a_damaged_file_is_set_aside_once(small):
    one, two = Catalogue(LocalStore(small)), Catalogue(LocalStore(small))
    everything(one)
    everything(two)
    file = small / "catalogue.sqlite"
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with file.open("r+b") as raw:
        raw.write(b"precious" * 100_000)
    for catalogue in (one, two, one, two):
        try:
            assert len(everything(catalogue)) == 1
        except CorruptError:  # in the middle of reading; it is made anew by the next refresh
            assert len(everything(catalogue)) == 1
    kept = [path.read_bytes()[:8] for path in small.glob("catalogue.damaged-*.sqlite")]
    assert kept == [b"precious"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_forks_shares_nothing(small, catalogue_url):
    catalogue = Catalogue(LocalStore(small), catalogue_url)
    assert len(everything(catalogue)) == 1
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = all(len(everything(catalogue)) == 1 for _ in range(20))
            finally:
                os._exit(0 if good else 1)
        children.append(child)
    assert all(len(everything(catalogue)) == 1 for _ in range(20))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    catalogue.close()


@pytest.mark.slow
def test_many_notes_are_read_in_portions(tmp_path, catalogue_url):
    short(tmp_path / "runs", [0.1])
    store = LocalStore(tmp_path / "runs")
    journal = Journal(store, "r", lambda: START)
    for number in range(70_000):
        journal.append(Pinned(at=START, checkpoint=f"{number:016x}", why="x", by="me"))
    journal.append(Closed(at=START, why="noted"))
    journal.close()
    catalogue = Catalogue(store, catalogue_url)
    check(tmp_path / "runs", catalogue)
    catalogue.close()


def test_many_clauses_are_told_in_no_time(small):
    text = " and ".join(f"step > -{number}" for number in range(400))
    why = pp.select(small, text).why()
    assert (why.candidates, len(why.clauses), why.chosen) == (1, 400, 1)
