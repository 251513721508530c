"""Every verb that changes a repository, in any order and cut short anywhere, beside a plain model.

After each step everything that must be there is read and compared bit for bit, in archives too, and nothing else is.
"""

import math
import os
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import peakpoint as pp
from dying import DEATHS, FAULTS, Killed, Ops
from peakpoint.catalogue import Catalogue, SelectionQuery
from peakpoint.catalogue.query import parse
from peakpoint.format import layout
from peakpoint.production import promotion
from peakpoint.production.policy import read_policies
from peakpoint.production.proposal import propose
from peakpoint.production.release import Release
from peakpoint.repository import aliases, audit, maintenance, packs, whole_run
from peakpoint.repository.annotations import annotations_of
from peakpoint.store import LocalStore
from promoting import validated
from repository_model import GONE, PARTS, TRASH, Checkpoint, Model, claims, here
from training import QuietCheckpointer

RUNS = ("r", "s")
OTHER_NAME = "t"
NOTHING_RANKS = "the newest: no rule can rank yet"
ALIASES = ("champion", "staging")
RULES = ("best:acc:max", "best:acc:max:parts=model", "topk:acc:max:2:parts=model", "last:1", "last:2", "last:9")
NOTHING, HOUR, DAY = timedelta(0), timedelta(hours=1), timedelta(days=1)
SIZE = 100
SHM = "/dev/shm"
BASE = {part: torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed, part in enumerate(PARTS)}
POLICY = b'format = 1\n[champion]\nrank = ["max acc"]\n'


def tensor(part, value):
    """What a part of the checkpoint of that value holds: a little different in each."""
    return BASE[part] + value * 1e-4


@dataclass
class Training:
    ckpt: pp.Checkpointer
    ops: Ops
    state: dict
    rules: tuple
    at_once: bool | None  # whether what its rules remove is gone at once; None where that depends
    step: int
    metrics: dict  # of the last report: those of the state as long as nothing was trained since


def cuts(operations):
    """What happens at one of the first operations of a process, or nothing."""
    return st.just(()) | st.tuples(st.integers(0, operations), st.sampled_from(DEATHS + FAULTS))


picks = st.integers(0, 11)
runs = st.sampled_from(RUNS)
rule_texts = st.lists(st.sampled_from(RULES), min_size=1, max_size=3, unique=True).map(tuple)
accs = st.sampled_from([0.1, 0.5, 0.9, float("nan")])


class Repository(RuleBasedStateMachine):
    """Two runs, two aliases and a policy; trainings stay open while others work."""

    counts: ClassVar = Counter()

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="peakpoint-machine-", dir=SHM if Path(SHM).is_dir() else None))
        self.model = Model()
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.value = 0
        self.trainings = {}
        self.verified = {}
        self.errors = []
        self.looks = 0
        self.faulty = False  # whether the last verb was cut short, or has met a fault
        self.unclean = False  # whether somebody was cut short, or time has passed
        self.hook, threading.excepthook = threading.excepthook, self.ended
        for name in RUNS:
            ckpt = self.checkpointer(name, LocalStore(self.root, Ops()), self.zeros(), ("last:9",), {})
            ckpt.close()
            self.model.rules[name] = ("last:9",)
            self.model.archived[name] = False
        store = LocalStore(self.root, Ops())
        store.put(layout.POLICY, [POLICY])
        self.standing = Catalogue(store)  # which follows

    def ended(self, arguments):
        if not issubclass(arguments.exc_type, Killed):
            self.errors.append(arguments.exc_value)

    def teardown(self):
        try:
            for name in list(self.trainings):
                self.close(name, ())
                self.is_as_the_model_says()
            for name in RUNS:
                self.restore(name, ())
            self.is_as_the_model_says()
            self.clean(())
            self.is_as_the_model_says()
        finally:
            threading.excepthook = self.hook
            self.standing.close()
            for training in self.trainings.values():
                training.ops.dead = True
                with suppress(Killed, pp.Error):
                    training.ckpt.close()
            shutil.rmtree(self.root)

    # --- how a verb is done

    def clock(self):
        return self.now

    def zeros(self):
        return {part: {"w": torch.zeros(SIZE)} for part in sorted(PARTS)}

    def checkpointer(self, name, store, state, rules, options):
        keep = [pp.rules.parse(text) for text in rules]
        return QuietCheckpointer(store, run=name, state=state, keep=keep, clock=self.clock, **options)

    def does(self, verb, cut, act):
        """Do something as a process of its own; returns what it returned, and whether it was cut short."""
        ops, value, failed = Ops(*cut), None, False
        try:
            value = act(LocalStore(self.root, ops))
        except Killed:
            pass
        except pp.Error:
            if not ops.struck:
                raise
            failed = True
        self.count(verb, ops)
        return value, ops.dead or failed

    def count(self, verb, ops):
        self.counts[f"{verb}, {'killed' if ops.dead else 'failing'}" if ops.struck else verb] += 1
        self.unclean |= ops.struck
        self.faulty = ops.struck

    def refuses(self, verb, act, kind):
        with pytest.raises(kind) as caught:
            act(LocalStore(self.root, Ops()))
        assert isinstance(caught.value, pp.Error)
        assert str(caught.value)
        self.counts[f"{verb}, refused"] += 1

    def run_of(self, store, name):
        return pp.open(store).run(name)

    def trash(self, name):
        return maintenance.in_trash(self.run_of(LocalStore(self.root), name), clock=self.clock)

    def pick(self, checkpoints, pick):
        return checkpoints[pick % len(checkpoints)]

    # --- trainings

    @initialize(r=st.lists(accs, min_size=1, max_size=4), s=st.lists(accs, max_size=2))
    def first(self, r, s):
        self.train("r", ("last:9",), r, ())
        self.train("s", ("last:9",), s, ())

    @rule(
        name=runs,
        rules=rule_texts,
        resume=st.sampled_from(["auto", "auto", "auto", "never", "ref"]),
        undo_for=st.sampled_from([None, "0", "1h"]),
        pick=picks,
        cut=cuts(14),
    )
    def begin(self, name, rules, resume, undo_for, pick, cut):
        model, state, ops = self.model, self.zeros(), Ops(*cut)
        there = [one for one in model.here() if one.parts == PARTS]
        ref = self.pick(there, pick) if resume == "ref" and there else None
        options = {"resume": resume if resume != "ref" else "auto" if ref is None else f"{ref.run}/{ref.id}"}
        if undo_for is not None:
            options["undo_for"] = undo_for

        def act(store):
            return self.checkpointer(name, store, state, rules, options)

        if name in self.trainings or (model.archived[name] and model.here(name)):
            self.refuses("begin", act, pp.ConflictError)
            return
        try:
            ckpt = act(LocalStore(self.root, ops))
        except (Killed, pp.Error):
            if not ops.struck:
                raise
            self.count("begin", ops)
            model.may_be_rules[name] = {rules, model.rules[name]}
            model.applies(model.here(name), rules, cut_short=True)
            return
        at_once = {None: None, "0": True, "1h": False}[undo_for]
        training = Training(ckpt, ops, state, rules, at_once, 0, {})
        self.trainings[name] = training
        model.rules[name] = rules
        model.applies(model.here(name), rules, cut_short=True)
        self.count("begin", ops)
        stuck = resume != "never" and bool(model.here(name)) and model.newest_whole(name) is None
        with self.training(name):
            try:
                report = ckpt.resume()
            except pp.errors.CorruptError:
                assert stuck  # with a ref, too: a run that has begun from it goes on from its own
                ckpt.close()
                del self.trainings[name]
                return
            assert not stuck or ref is not None
            if report is not None:
                training.step = report.step
                origin = next(one for one in model.here() if report.ref == f"{one.run}/{one.name}")
                assert origin is ref or origin is model.newest_whole(name), report.ref
                training.metrics = dict(origin.reported) if origin.run == name else {}
                for part in PARTS:
                    assert torch.equal(state[part]["w"], tensor(part, origin.value)), "another state was restored"
            else:
                assert resume == "never" or not model.here(name)

    @contextmanager
    def training(self, name):
        """A call of a training, which may die of it, or fail; then it is closed, and writes again what it holds."""
        training, failed = self.trainings[name], False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", pp.PeakpointWarning
                )  # of NaN, and of what a fault has kept from being done
                yield
        except Killed:
            pass
        except pp.Error:
            if not training.ops.struck:
                raise
            failed = True
        if failed or training.ops.dead:
            del self.trainings[name]
            with suppress(Killed, pp.Error), warnings.catch_warnings():
                warnings.simplefilter("ignore", pp.PeakpointWarning)
                training.ckpt.close()
        training.ops.at = None

    def saves(self, name, act, draft, cut, wanted):
        model, training = self.model, self.trainings[name]
        training.ops.prepare(*cut)
        self.value += 1
        draft.value = self.value
        draft.sequence = 1 + max((one.sequence for one in model.checkpoints.values() if one.run == name), default=0)
        for part in PARTS:
            training.state[part]["w"].copy_(tensor(part, self.value))
        outcome = None
        with self.training(name):
            outcome = act(training.ckpt)
            training.ckpt.wait()
        self.count("save", training.ops)
        existing, is_wanted = model.here(name), wanted(model.here(name), draft)
        # while nothing has a value that rules by metrics can rank, some reports are saved all the same
        unranked = (
            not draft.asked and math.isnan(draft.acc) and not any(text.startswith("last") for text in training.rules)
        )
        if outcome is not None and outcome.reasons == (NOTHING_RANKS,):
            assert unranked, training.rules
            is_wanted = True
        may_be_saved = is_wanted or (outcome is None and unranked)
        if may_be_saved:
            cut_short = training.ops.struck or not is_wanted
            model.applies([*existing, draft], training.rules, cut_short=cut_short, at_once=training.at_once)
            model.pending += [draft]
        if name in self.trainings:
            assert outcome.saved == is_wanted, (outcome, training.rules)
            draft.name = outcome.name
        else:
            draft.becomes(GONE, cut_short=True)

    @precondition(lambda self: self.trainings)
    @rule(pick=picks, acc=accs, cut=cuts(30))
    def report(self, pick, acc, cut):
        name = self.pick(sorted(self.trainings), pick)
        training = self.trainings[name]
        training.step += 1
        training.metrics = {"acc": acc}
        draft = Checkpoint(name, 0, training.step, {"acc": acc})

        def wanted(existing, draft):
            return draft in claims(training.rules, [*existing, draft])

        self.saves(name, lambda ckpt: ckpt.report(step=training.step, acc=acc), draft, cut, wanted)

    @precondition(lambda self: self.trainings)
    @rule(pick=picks, cut=cuts(30))
    def ask(self, pick, cut):
        name = self.pick(sorted(self.trainings), pick)
        training = self.trainings[name]
        draft = Checkpoint(name, 0, training.step, dict(training.metrics), asked=True)
        self.saves(name, lambda ckpt: ckpt.save("a test"), draft, cut, lambda *_: True)

    @precondition(lambda self: self.trainings)
    @rule(pick=picks, cut=cuts(4))
    def end(self, pick, cut):
        self.close(self.pick(sorted(self.trainings), pick), cut)

    def close(self, name, cut):
        training = self.trainings[name]
        training.ops.prepare(*cut)
        with self.training(name):
            training.ckpt.close()
        self.count("end", training.ops)
        self.trainings.pop(name, None)
        self.model.applies(self.model.here(name), training.rules, cut_short=True)

    @precondition(lambda self: self.trainings)
    @rule(pick=picks)
    def kill(self, pick):
        name = self.pick(sorted(self.trainings), pick)
        self.counts["kill"] += 1
        self.unclean = True
        with self.training(name):
            self.trainings[name].ops.die()

    @rule(name=runs, rules=rule_texts, reports=st.lists(accs, min_size=1, max_size=4), cut=cuts(30))
    def train(self, name, rules, reports, cut):
        """A whole training in one step."""
        if name not in self.trainings:
            self.begin(name, rules, "auto", "0", 0, ())
        for number, acc in enumerate(reports):
            if name in self.trainings:
                self.is_as_the_model_says()
                self.report(sorted(self.trainings).index(name), acc, cut if number == len(reports) - 1 else ())
        if name in self.trainings:
            self.is_as_the_model_says()
            self.close(name, ())

    # --- what people say of checkpoints

    @precondition(lambda self: self.model.here())
    @rule(pick=picks, on=st.booleans(), cut=cuts(5))
    def pin(self, pick, on, cut):
        one = self.pick(self.model.here(), pick)

        def act(store):
            run, ref = self.run_of(store, one.run), f"{one.run}/{one.id}"
            run.pin(ref, "a test") if on else run.unpin(ref)

        _, cut_short = self.does("pin" if on else "unpin", cut, act)
        one.becomes_pinned(on, cut_short=cut_short)

    @precondition(lambda self: self.model.here())
    @rule(pick=picks, acc=accs, cut=cuts(5))
    def record(self, pick, acc, cut):
        one = self.pick(self.model.here(), pick)

        def act(store):
            return self.run_of(store, one.run).record(f"{one.run}/{one.id}", {"acc": acc})

        _, cut_short = self.does("record", cut, act)
        if cut_short:
            acc = self.run_of(LocalStore(self.root), one.run).find(f"{one.run}/{one.id}").metrics.get("acc")
        one.metrics = {} if acc is None else {"acc": acc}
        one.recorded = self.is_recorded(one) if cut_short else True

    def is_recorded(self, one):
        events = self.run_of(LocalStore(self.root), one.run).events()
        return "acc" in annotations_of(events).metrics.get(one.id, {})

    @precondition(lambda self: self.model.here())
    @rule(pick=picks, cut=cuts(5))
    def withdraw(self, pick, cut):
        recorded = [one for one in self.model.here() if one.recorded]
        one = self.pick(recorded or self.model.here(), pick)

        def act(store):
            return self.run_of(store, one.run).withdraw(f"{one.run}/{one.id}", "acc")

        if not one.recorded:
            self.refuses("withdraw", act, pp.errors.NotFoundError)
            return
        _, cut_short = self.does("withdraw", cut, act)
        one.recorded = cut_short and self.is_recorded(one)
        if not one.recorded:
            one.metrics = dict(one.reported)

    # --- whole runs

    @rule(name=runs, cut=cuts(14))
    def rename(self, name, cut):
        """To another name and back, so that the model need not know of it."""

        def act(store):
            other = whole_run.rename_run(self.run_of(store, name), OTHER_NAME, clock=self.clock)
            whole_run.rename_run(other, name, clock=self.clock)

        named = any(
            checkpoint is not None and self.model.checkpoints[checkpoint].run == name
            for records in self.model.aliases.values()
            for checkpoint, _ in records
        )
        if name in self.trainings or named:
            self.refuses("rename", act, pp.ConflictError)
            return
        self.does("rename", cut, act)
        names = {run.name for run in pp.open(LocalStore(self.root)).runs()}
        assert len(names & {name, OTHER_NAME}) == 1, "a run has one name"
        if OTHER_NAME in names:
            self.counts["rename, other name"] += 1
            self.has_moved(name)
            whole_run.rename_run(self.run_of(LocalStore(self.root), OTHER_NAME), name, clock=self.clock)

    def has_moved(self, name):
        """Under its other name a run is as whole as before."""
        repository = pp.open(LocalStore(self.root))
        for one in self.model.here(name):
            manifest = repository.find_manifest(f"{OTHER_NAME}/{one.id}")
            assert PARTS & set(manifest.parts) == one.parts
            loaded = pp.load(f"{OTHER_NAME}/{one.id}", root=LocalStore(self.root))
            for part in one.parts:
                assert torch.equal(loaded[part]["w"], tensor(part, one.value))
            loaded.close()
        self.is_undamaged()

    @rule(name=st.just("s"), cut=cuts(40))
    def remove_run(self, name, cut):
        """The first run stays, so that there is something to play with."""
        model = self.model

        def act(store):
            return whole_run.remove_run(self.run_of(store, name), clock=self.clock)

        aliased = model.aliased()
        protected = any(one.pinned or one.id in aliased for one in model.here(name))
        if name in self.trainings or protected:
            self.refuses("rm --run", act, pp.ConflictError)
            return
        if any(one.id in model.about for one in model.here(name)):
            return  # a promotion that was cut short may protect it
        foreign, cut_short = self.does("rm --run", cut, act)
        assert cut_short or self.faulty or foreign == []
        for one in [*model.here(name), *model.in_trash(name)]:
            one.becomes(GONE, cut_short=cut_short or self.faulty)
        store = LocalStore(self.root)
        if name not in {run.name for run in pp.open(store).runs()}:
            assert not any(one.place[0] == "here" and GONE not in one.may for one in model.here(name))
            self.clean(())
            self.checkpointer(name, store, self.zeros(), ("last:9",), {}).close()
            model.rules[name], model.archived[name] = ("last:9",), False

    # --- what goes, and comes back

    @precondition(lambda self: self.model.here())
    @rule(
        pick=picks,
        count=st.integers(1, 3),
        whole=st.just(False) | st.just(False) | st.booleans(),
        undo_for=st.sampled_from([NOTHING, HOUR, DAY]),
        cut=cuts(12),
    )
    def remove(self, pick, count, whole, undo_for, cut):
        name = self.pick(self.model.here(), pick).run
        there = self.model.here(name)
        chosen = there[pick % len(there) :][:count]

        if whole:
            chosen = there

        def act(store):
            run = self.run_of(store, name)
            going = [manifest for manifest in run.manifests() if manifest.id in {one.id for one in chosen}]
            return maintenance.remove(run, going, "a test", undo_for=undo_for, clock=self.clock)

        if self.model.archived[name] and (undo_for or len(chosen) < len(there)):
            self.refuses("rm", act, pp.ConflictError)
            return
        failures, cut_short = self.does("rm", cut, act)
        aliased = self.model.aliased()
        for one in chosen:
            failed = [failure for failure in failures or () if failure.startswith(f"{one.name} ")]
            if one.id in aliased:
                assert cut_short or failed, "an alias protects it"
            elif not failed or self.faulty:
                one.becomes(TRASH if undo_for else GONE, cut_short=cut_short or self.faulty)
            else:
                assert one.id in self.model.about, failed

    @precondition(lambda self: any(map(self.trash, RUNS)))
    @rule(name=runs, pick=picks, count=st.integers(1, 3), cut=cuts(14))
    def undo(self, name, pick, count, cut):
        there = self.trash(name)
        chosen = there[pick % len(there) :][:count] if there else []
        names = [one.manifest.name for one in chosen] or ["nothing"]

        def act(store):
            return maintenance.undo(self.run_of(store, name), names, clock=self.clock)

        held = name in self.trainings or self.model.archived[name]
        if held or not chosen:
            self.refuses("undo", act, pp.ConflictError if held else pp.errors.NotFoundError)
            return
        back, cut_short = self.does("undo", cut, act)
        for entry in chosen:
            one = self.model.checkpoints[entry.manifest.id]
            one.becomes(here(one.left), cut_short=cut_short)
            one.becomes_pinned(True, cut_short=cut_short)
        assert cut_short or {manifest.id for manifest in back} == {entry.manifest.id for entry in chosen}

    @rule(name=runs, rules=st.none() | rule_texts, undo_for=st.sampled_from([NOTHING, HOUR]), cut=cuts(14))
    def keep(self, name, rules, undo_for, cut):
        model = self.model
        texts = model.rules[name] if rules is None else rules

        def act(store):
            run = self.run_of(store, name)
            parsed = None if rules is None else tuple(map(pp.rules.parse, rules))
            plan = run.plan(parsed)
            if not model.about and name not in self.trainings:
                self.agrees(plan, model.here(name), texts)
            return maintenance.apply_plan(run, plan, parsed, undo_for=undo_for, clock=self.clock)

        if name in self.trainings or model.archived[name]:
            self.refuses("keep", act, pp.ConflictError)
            return
        failures, cut_short = self.does("keep", cut, act)
        cut_short |= self.faulty
        assert cut_short or not failures
        model.applies(model.here(name), texts, cut_short=cut_short, at_once=not undo_for)
        model.may_be_rules[name] = {texts, model.rules[name]} if cut_short else {texts}

    def agrees(self, plan, existing, texts):
        stays = self.model.retained(existing, texts)
        assert set(plan.keep) == {one.id for one in stays}
        drops = {one.id: one.parts - parts for one, parts in stays.items() if one.parts != parts}
        assert {thinning.manifest.id: set(thinning.parts) for thinning in plan.drop} == drops

    @precondition(lambda self: any(map(self.trash, RUNS)))
    @rule(name=runs, cut=cuts(8))
    def empty_trash(self, name, cut):
        def act(store):
            maintenance.empty_trash(self.run_of(store, name), clock=self.clock)

        there = self.trash(name)
        if name in self.trainings and there:
            self.refuses("trash --empty", act, pp.ConflictError)
            return
        _, cut_short = self.does("trash --empty", cut, act)
        for one in self.model.in_trash(name):
            one.becomes(GONE, cut_short=cut_short)
        if not cut_short:
            assert self.trash(name) == []

    @precondition(lambda self: any(map(self.trash, RUNS)))
    @rule(passes=st.sampled_from([HOUR, DAY, 30 * DAY]))
    def wait(self, passes):
        self.now += passes
        self.unclean = True
        self.counts["time passes"] += 1

    @precondition(lambda self: self.unclean)
    @rule(cut=cuts(8))
    def clean(self, cut):
        def act(store):
            repository = pp.open(store)
            audit.clean(repository, clock=self.clock)
            found = audit.audit(repository, deep=True, clock=self.clock)
            # what a failed cleaning leaves in a run that is being written is litter until that ends, and no damage
            assert found.clean or (cut and all(one.kind != "damage" for one in found.findings)), found.findings

        _, self.unclean = self.does("clean", cut, act)

    # --- the archive

    @rule(name=runs, cut=cuts(40))
    def archive(self, name, cut):
        def act(store):
            return maintenance.archive(self.run_of(store, name), clock=self.clock)

        if name in self.trainings:
            self.refuses("archive", act, pp.ConflictError)
            return
        packed, cut_short = self.does("archive", cut, act)
        if self.model.here(name):
            assert cut_short or packed or self.model.archived[name]
            self.is_archived(name, archived=True, cut_short=cut_short)

    @precondition(lambda self: any(self.model.archived.values()))
    @rule(name=runs, cut=cuts(30))
    def restore(self, name, cut):
        def act(store):
            return maintenance.restore(self.run_of(store, name), clock=self.clock)

        if name in self.trainings:
            self.refuses("restore", act, pp.ConflictError)
            return
        back, cut_short = self.does("restore", cut, act)
        if not cut_short:
            packed = self.model.here(name) if self.model.archived[name] else []
            assert {manifest.id for manifest in back} == {one.id for one in packed}
        self.is_archived(name, archived=False, cut_short=cut_short)

    def is_archived(self, name, *, archived, cut_short):
        self.model.may_be_archived[name] = {archived, self.model.archived[name]} if cut_short else {archived}

    # --- production

    @precondition(lambda self: self.model.here())
    @rule(alias=st.sampled_from(ALIASES), pick=picks, cut=cuts(10))
    def promote(self, alias, pick, cut):
        one = self.pick(self.model.here(), pick)

        def act(store):
            proposal = propose(pp.open(store), f"{one.run}/{one.id}", alias, clock=self.clock)
            return promotion.promote(proposal, "a test", force=True, clock=self.clock)

        _, cut_short = self.does("promote", cut, act)
        if self.model.holder(alias) != one.id:
            self.points(alias, one.id, None, cut_short=cut_short)

    def points(self, alias, checkpoint, restores, *, cut_short):
        """An alias has another record, unless somebody was cut short before it was made."""
        records = self.model.aliases.setdefault(alias, [])
        number = len(records) + 1
        if cut_short and aliases.numbers(LocalStore(self.root), alias)[-1:] != [number]:
            if not records:
                del self.model.aliases[alias]
            self.model.about += [checkpoint]
            return
        records.append((checkpoint, number if restores is None else restores))

    @precondition(lambda self: self.model.aliases)
    @rule(alias=st.sampled_from(ALIASES), cut=cuts(10))
    def roll_back(self, alias, cut):
        model = self.model

        def act(store):
            return promotion.rollback(pp.open(store), alias, "a test", clock=self.clock)

        held = model.holder(alias)
        ways = [] if held is None else list(model.way_back(alias))
        ways = [(number, one) for number, one in ways if one != held and model.checkpoints[one].place[0] == "here"]
        if not ways:
            self.refuses("rollback", act, pp.errors.NotFoundError)
            return
        done, cut_short = self.does("rollback", cut, act)
        number, checkpoint = ways[0]
        self.points(alias, checkpoint, model.aliases[alias][number - 1][1], cut_short=cut_short)
        assert cut_short or done.record.target.checkpoint == checkpoint

    @precondition(lambda self: self.model.aliases)
    @rule(alias=st.sampled_from(ALIASES), cut=cuts(4))
    def retire(self, alias, cut):
        def act(store):
            promotion.retire(pp.open(store), alias, "a test", clock=self.clock)

        if alias == "champion" or self.model.holder(alias) is None:
            self.refuses("retire", act, pp.errors.ConfigError if alias == "champion" else pp.errors.NotFoundError)
            return
        _, cut_short = self.does("retire", cut, act)
        self.points(alias, None, None, cut_short=cut_short)

    @precondition(lambda self: any("acc" in one.metrics for one in self.model.here()))
    @rule(cut=cuts(24))
    def release(self, cut):
        able = [one.acc for one in self.model.here() if one.acc == one.acc]

        def validate(repository, ref, wanted, **_):
            return validated(repository, ref, wanted=wanted, at=self.now)

        def act(store):
            policies = read_policies(store)
            return Release(pp.open(store), "champion", policies, validate, clock=self.clock).run()

        records = self.model.aliases.get("champion", [])
        done, cut_short = self.does("release", cut, act)
        if cut_short:
            made = aliases.newest(LocalStore(self.root), "champion")
            if made is not None and made.number > len(records):
                self.points("champion", made.target.checkpoint, None, cut_short=False)
            else:
                self.model.about += [one.id for one in self.model.here()]
            return
        if done.outcome == "promoted":
            chosen = self.model.checkpoints[done.record.target.checkpoint]
            assert chosen.place[0] == "here"
            if all(number == stands_for for number, (_, stands_for) in enumerate(records, 1)):
                assert chosen.acc == max(able)
            self.points("champion", chosen.id, None, cut_short=False)
        elif done.outcome == "unchanged":
            assert done.record.target.checkpoint == self.model.holder("champion")
        else:
            assert done.outcome == "nothing fits", done

    # --- what must be so

    @invariant()
    def is_as_the_model_says(self):
        assert not self.errors, self.errors
        model, repository = self.model, pp.open(LocalStore(self.root, Ops()))
        for name in RUNS:
            self.settles(repository.run(name))
        for name in RUNS:
            for one in model.here(name):
                self.is_readable(repository.store, one)
        for alias, records in model.aliases.items():
            held = records[-1][0]
            if held is not None:
                assert repository.find_manifest(f"@{alias}").id == held
        self.looks += 1
        if self.looks % 3 == 0:
            selected = [(one.run, one.id) for one in self.standing.select(SelectionQuery(query=parse("")))]
            assert sorted(selected) == sorted((one.run, one.id) for one in model.here())
        if self.looks % 5 == 0:
            self.is_undamaged()

    def is_undamaged(self):
        found = audit.audit(pp.open(LocalStore(self.root)), clock=self.clock)
        assert found.of_kind("damage") == [] == found.of_kind("foreign"), found.findings

    def settles(self, run):
        """Look where everything is, and settle what could be in several places."""
        model, name = self.model, run.name
        manifests = {manifest.id: manifest for manifest in run.manifests()}
        assert len(manifests) == len(run.manifests()), "ids are unique"
        trash = {entry.manifest.id: entry for entry in maintenance.in_trash(run, clock=self.clock)}
        pinned = run.pinned()
        drafts = [one for one in model.pending if one.run == name]
        for draft in drafts:
            model.pending.remove(draft)
            new = [one for one in manifests if one not in model.checkpoints]
            assert len(new) <= 1, "more than one is new"
            if not new:
                assert GONE in draft.may, f"{draft} is lost"
                continue
            found = manifests[new[0]]
            assert draft.step == found.step
            assert str(draft.metrics) == str(dict(found.metrics)), (draft, found.metrics)  # as NaN
            assert draft.name in ("", found.name)
            draft.id, draft.name, draft.sequence = found.id, found.name, found.sequence
            draft.metrics, draft.reported = dict(found.metrics), dict(found.metrics)
            model.checkpoints[draft.id] = draft
        for one in model.checkpoints.values():
            if one.run != name:
                continue
            if one.place == TRASH and one.until <= self.now:
                one.becomes(GONE, cut_short=False)
            place = GONE
            if one.id in manifests:
                place = here(PARTS & set(manifests[one.id].parts))
            elif one.id in trash:
                place, one.until = TRASH, trash[one.id].record.until
                assert self.now < one.until <= self.now + DAY
            one.is_seen(place)
            if place[0] == "here":
                assert (one.id in pinned) in (one.may_be_pinned or {one.pinned}), f"{one.name} is pinned or not"
                one.pinned = one.id in pinned
            one.may_be_pinned = set()
        assert set(manifests) == {one.id for one in model.here(name)}
        rules = tuple(one.text for one in run.rules())
        assert rules in model.may_be_rules.pop(name, {model.rules[name]})
        model.rules[name] = rules
        archived = packs.run_archive(run.store, name) is not None
        possible = model.may_be_archived.pop(name, {model.archived[name]})
        assert archived in possible or not manifests, f"{name} is archived, or not"
        model.archived[name] = archived

    def is_readable(self, store, one):
        """Compare every byte, unless nothing was written since that was done last."""
        stamp = [
            (entry.name, entry.stat().st_mtime_ns, entry.stat().st_ino, entry.stat().st_size)
            for prefix in (layout.checkpoint_prefix(one.run, one.name), layout.archive_prefix(one.run))
            if store.path(prefix).is_dir()
            for entry in os.scandir(store.path(prefix))
        ]
        if self.verified.get(one.id) == (sorted(stamp), one.parts):
            return
        loaded = pp.load(f"{one.run}/{one.id}", root=store)
        assert set(loaded) == one.parts
        for part in one.parts:
            assert torch.equal(loaded[part]["w"], tensor(part, one.value)), f"{part} of {one.name} has other bytes"
        loaded.verify()
        loaded.close()
        self.verified[one.id] = (sorted(stamp), one.parts)


def plays(examples, steps):
    """Play, and return how often each verb was done."""
    Repository.counts.clear()
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),  # to explain takes minutes
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Repository, settings=chosen)
    return Repository.counts


def says(counts, record_property):
    said = ", ".join(f"{count} {verb}" for verb, count in sorted(counts.items()))
    print(f"{sum(counts.values())} operations: {said}")
    record_property("operations", said)


def test_whatever_is_done_nothing_is_lost(record_property):
    says(plays(examples=6, steps=30), record_property)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_whatever_is_done_nothing_is_lost_in_thousands_of_operations(record_property):
    """``OPERATIONS=20000`` for more of them."""
    says(plays(examples=int(os.environ.get("OPERATIONS", "6000")) // 60, steps=60), record_property)


# --- what it has found: each was a loss once


def played(*steps):
    """Play steps that are known: the name of a verb, and its arguments."""
    machine = Repository()
    try:
        for verb, *arguments in steps:
            getattr(machine, verb)(*arguments)
            machine.is_as_the_model_says()
            machine.is_undamaged()
    finally:
        machine.teardown()


ALL, PARTED = ("last:9",), ("best:acc:max:parts=model", "last:1")


def test_a_base_that_loses_a_part_is_no_base_any_more():
    played(
        ("train", "r", ALL, [0.9, 0.5, 0.1], ()),
        ("pin", 1, True, ()),
        ("archive", "r", ()),
        ("restore", "r", ()),
        ("keep", "r", PARTED, NOTHING, ()),
        ("archive", "r", ()),
    )


def test_what_is_not_in_the_trash_is_not_said_to_be_back():
    played(
        ("train", "r", ALL, [0.9, 0.5], ()),
        ("keep", "r", PARTED, HOUR, ()),
        ("empty_trash", "r", ()),
        ("archive", "r", ()),
        ("undo", "r", 0, 1, ()),
    )


def test_an_archive_loses_no_parts_before_it_is_restored():
    played(
        ("train", "r", ALL, [0.9, 0.5, 0.1], ()),
        ("pin", 1, True, ()),
        ("archive", "r", ()),
        ("keep", "r", PARTED, NOTHING, ()),
        ("restore", "r", ()),
        ("keep", "r", PARTED, NOTHING, ()),
    )


@pytest.mark.parametrize("operation", range(6))
def test_what_is_half_removed_is_litter_and_no_damage(operation):
    played(
        ("train", "r", ALL, [0.9, 0.5], ()),
        ("remove", 0, 1, False, HOUR, ()),
        ("empty_trash", "r", (operation, "after")),
    )


@pytest.mark.parametrize("operation", range(12, 18))
def test_a_commit_whose_reply_is_lost_is_no_second_checkpoint(operation):
    played(("begin", "r", ALL, "auto", "0", 0, ()), ("ask", 0, (operation, "reply lost")))


def test_a_removal_cut_short_and_then_made_for_good_is_not_in_the_trash():
    for operation in range(4, 8):
        played(
            ("train", "r", ALL, [0.9, 0.5], ()),
            ("remove", 0, 1, False, HOUR, (operation, "after")),
            ("remove", 0, 1, False, NOTHING, (operation, "after")),
        )


@pytest.mark.parametrize("operation", range(10, 14))
def test_a_close_cut_short_lets_go_of_the_run(operation):
    played(
        ("train", "r", ALL, [0.9, 0.5, 0.1], ()),
        ("begin", "r", PARTED, "auto", None, 0, ()),
        ("report", 0, 0.5, (operation, "before")),
        ("keep", "r", PARTED, HOUR, ()),
    )
