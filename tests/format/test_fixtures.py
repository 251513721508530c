"""What revision 46e833b has written is read by this one: a small repository with every kind of record and state.

``data/format-1`` is never made again (see ``data/make_format_1.py``), and no byte of it changes. What it says was
written down with that revision: ``data/format-1.tensors.json`` while it was made, ``data/format-1.expected.json`` from
what ``SECTIONS`` below gave. Members that later releases add are no difference; everything that was said still is.
"""

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import format_state
import peakpoint as pp
from commands import command
from peakpoint.format.events import KINDS, Withdrawn
from peakpoint.format.metrics import json_value
from peakpoint.production import policy
from peakpoint.reports import changelog
from peakpoint.repository import aliases, maintenance, validations
from peakpoint.repository.releases import read_release, release_ids
from peakpoint.repository.run import read_run_record
from training import checkpointer
from trees import same

DATA = Path(__file__).parents[1] / "data"
ORIGINAL = DATA / "format-1"
EXPECTED = json.loads((DATA / "format-1.expected.json").read_text())
# parts are not in the trash any more: what is dropped is gone, and what still is there comes back with the archive
EXPECTED["trash"] = [entry for entry in EXPECTED["trash"] if not entry[2]]
TENSORS = json.loads((DATA / "format-1.tensors.json").read_text())
LATER: set[type] = {Withdrawn}  # kinds of events that came after 46e833b
ARCHIVED = ("frozen", "mixed", "packed", "cut")  # runs with archived checkpoints
pytestmark = pytest.mark.filterwarnings("ignore::peakpoint.PeakpointWarning")


@pytest.fixture(autouse=True)
def catalogue(tmp_path, monkeypatch):
    """Keep the index out of what is read."""
    monkeypatch.setenv("PEAKPOINT_CATALOGUE", str(tmp_path / "catalogue.sqlite"))


@pytest.fixture
def root(tmp_path):
    return shutil.copytree(ORIGINAL, tmp_path / "format-1")


# --- the commands, in one place ---------------------------------------------------------------------------------------


def restore(root, run):
    """Bring all of a run back from its archive."""
    command("archive", root, run, "--restore")


def undo(root, ref):
    """Bring something back from the trash."""
    command("undo", root, ref)


def findings(root, *options, code=12):
    """What an audit finds; a line of one journal was torn in its middle, so that there is always damage."""
    return json.loads(command("audit", root, *options, "--json", code=code))["findings"]


# --- what it says -----------------------------------------------------------------------------------------------------


def json_of(value):
    """A record in plain JSON."""
    content = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return msgspec.json.decode(msgspec.json.encode(json_value(content), enc_hook=str))


def by_run(root, say):
    return {run.name: json_of(say(run)) for run in pp.open(root).runs()}


def manifests(root):
    return by_run(root, lambda run: [dataclasses.asdict(one) for one in run.manifests()])


def checkpoints(root):
    """With what was measured later and what is smoothed."""

    def say(run):
        known = {one.id: one.metrics for one in run.annotated()}
        return [[one.ref, one.id, one.size_bytes, one.metrics, known[one.id]] for one in run.checkpoints()]

    return by_run(root, say)


def events(root):
    return by_run(
        root, lambda run: [{"kind": type(one).__name__} | msgspec.structs.asdict(one) for one in run.events()]
    )


def history(root):
    return by_run(root, lambda run: [[one.report, one.step, one.epoch, one.metrics] for one in run.history()])


def kept(root):
    return by_run(root, lambda run: {id_: [claim.rule for claim in claims] for id_, claims in run.kept().items()})


def runs(root):
    return by_run(
        root,
        lambda run: [
            read_run_record(run.store, run.name),
            run.pinned(),
            [rule.text for rule in run.rules()],
            run.holder(),
        ],
    )


REFS = (
    "digits@latest",
    "digits@best:accuracy",
    "digits@best:loss:min",
    "digits:epoch=3",
    "digits:3",
    "digits/cf9996",
    "mixed/mixed_step6",
    "cut@latest",
    "old@best:val_acc:max",
    "@champion",
    "@champion:2",
    "@packed/best",
    "@packed/best:1",
    "@digits/candidate:1",
    "@canary",
)


def refs(root):
    return {ref: pp.open(root).find(ref).ref for ref in REFS}


def all_aliases(root):
    store = pp.open(root).store
    told = {alias: aliases.history(store, alias) for alias in aliases.names(store)}
    return {alias: [json_of(found.damage), [json_of(one) for one in found.records]] for alias, found in told.items()}


def all_validations(root):
    store = pp.open(root).store

    def predictions(one):
        kept = validations.predictions_of(store, one)
        return None if kept is None else [kept.examples, list(kept.predicted), list(kept.labels)]

    return [
        [json_of(one), one.passed, predictions(one)]
        for run in pp.open(root).runs()
        for checkpoint in validations.checkpoints_with(store, run.name)
        for one in validations.readable(store, run.name, checkpoint)[0]
    ]


def releases(root):
    store = pp.open(root).store
    records = [read_release(store, release) for release in release_ids(store)]
    return [json_of(record) for record in sorted(records, key=lambda record: record.at)]


def table(found):
    """A policy as it was told when the fixtures were made."""
    hooks = [msgspec.structs.asdict(hook) | {"timeout": hook.seconds} for hook in found.hooks]
    same = ("alias", "select", "by", "max_age", "timeout", "improvement", "may_promote", "public_key", "base", "digest")
    renamed = {"within": found.within_se, "wanted": found.wanted, "keeps": found.keep_last, "hooks": hooks}
    return json_of({name: getattr(found, name) for name in same} | renamed)


def policies(root):
    found = policy.read_policies(pp.open(root).store)
    tables = {alias: table(found.of(alias)) for alias in found.content}
    return json.loads(json.dumps(tables).replace(str(root), "ROOT"))


def trash(root):
    there = json.loads(command("undo", root, "--list", "--json"))["trash"]
    return sorted([one["ref"], one["id"], [], one["until"], one["reason"], one["by"]] for one in there)


def audit(root):
    return sorted([one["kind"], one["where"]] for one in findings(root, "--deep"))


def select(root):
    repository = pp.open(root)
    asked = {
        "all": pp.select(repository, ""),
        "best": pp.select(repository, "accuracy > 0.5", by={"accuracy": "max"}),
        "archived": pp.select(repository, "archived"),
        "aliased": pp.select(repository, 'alias = "champion" or alias = "packed/best"'),
        "imported": pp.select(repository, "has(val_acc) and pinned"),
    }
    return {name: [one.ref for one in found] for name, found in asked.items()}


def told(root):
    """The changelog: what was done with which checkpoint, when."""
    found = changelog.entries(pp.open(root))
    return sorted([one.kind, str(one.at), str(one.run), str(one.checkpoint)] for one in found)


SECTIONS = {
    "runs": runs,
    "manifests": manifests,
    "checkpoints": checkpoints,
    "events": events,
    "history": history,
    "kept": kept,
    "refs": refs,
    "aliases": all_aliases,
    "validations": all_validations,
    "releases": releases,
    "policies": policies,
    "trash": trash,
    "audit": audit,
    "select": select,
    "changelog": told,
}


def differences(expected, found, where="it"):
    """Where something that was expected is not found; more members of an object than expected are no difference."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in expected.items():
            if name in found:
                yield from differences(value, found[name], f"{where}.{name}")
            else:
                yield f"{where} has no {name}"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif expected != found:
        yield f"{where} was {expected!r} and is {found!r}"


# --- reading ----------------------------------------------------------------------------------------------------------


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return "".join(
        f"{hashlib.sha256(one.read_bytes()).hexdigest()}  {one.relative_to(root).as_posix()}\n" for one in files
    )


def test_no_byte_has_changed():
    assert digests(ORIGINAL) == (DATA / "format-1.sha256").read_text()


def test_every_kind_of_event_is_there(root):
    there = {type(event) for run in pp.open(root).runs() for event in run.events()}
    assert there == set(KINDS.values()) - LATER


@pytest.mark.parametrize("section", SECTIONS)
def test_it_says_what_it_said(root, section):
    assert not list(differences(EXPECTED[section], SECTIONS[section](root)))
    assert digests(root) == digests(ORIGINAL), "reading changes nothing"


def loads_exactly(root, ref):
    """Compare every tensor with what was saved."""
    loaded = pp.load(ref, root=root)
    loaded.verify()
    expected = {part: told for part, told in TENSORS[ref].items() if part in loaded}
    assert expected
    assert {part: found for part in loaded if (found := format_state.flat(loaded[part]))} == expected


def test_every_checkpoint_loads_exactly(root):
    there = [f"{one.run}/{one.name}" for run in pp.open(root).runs() for one in run.manifests()]
    assert len(there) == 26
    for ref in there:
        loads_exactly(root, ref)
    assert digests(root) == digests(ORIGINAL), "reading changes nothing"


def test_every_type_of_a_state_is_read_exactly(root):
    loaded = pp.load("kinds@latest", root=root)
    for part, expected in (("values", format_state.values()), ("tensors", format_state.tensors())):
        assert list(loaded[part]) == list(expected)
        for name, value in expected.items():
            assert same(value, loaded[part][name]), name
    tied = loaded["tensors"]["tied"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_signatures_hold(root):
    for ref in ("digits@latest", "digits/digits_epoch3_step8_accuracy0.7000", "mixed/mixed_step6", "@champion"):
        command("sign", root, ref, "--verify", "--key", root / "signer.pub")
        assert pp.load(ref, root=root, signed_by=root / "signer.pub")
    with pytest.raises(pp.errors.SignatureError):
        command("sign", root, "kinds@latest", "--verify", "--key", root / "signer.pub")


# --- going on from it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ARCHIVED)
def test_what_is_archived_in_pieces_is_not_archived_again(root, run):
    with pytest.raises(pp.ConflictError, match=f"{run} --restore"):
        maintenance.archive(pp.open(root).run(run))


@pytest.mark.parametrize("run", ARCHIVED)
def test_archived_checkpoints_are_restored_bit_for_bit(root, run):
    restore(root, run)
    for one in pp.open(root).run(run).manifests():
        directory = root / "runs" / run / "checkpoints" / one.name
        assert {file.name: file.size for file in one.files}.items() <= {
            path.name: path.stat().st_size for path in directory.iterdir()
        }.items()
        loads_exactly(root, f"{run}/{one.name}")
    assert not [one for one in findings(root, "--deep") if f"runs/{run}/" in one["where"] and one["kind"] == "damage"]


@pytest.mark.parametrize("ref", ["bin/bin_step2", "mixed/mixed_step2", "cut/cut_step5"])
def test_checkpoints_come_back_from_the_trash(root, ref):
    restore(root, ref.partition("/")[0])  # single archived checkpoints make a run an archived one
    undo(root, ref)
    assert pp.open(root).find(ref).ref == ref
    loads_exactly(root, ref)


@pytest.mark.parametrize("ref", ["bin/bin_step4", "mixed/mixed_step4"])
def test_dropped_parts_with_time_left_come_back(root, ref):
    assert "extra" not in pp.load(ref, root=root)
    restore(root, ref.partition("/")[0])
    assert "extra" in pp.load(ref, root=root)
    loads_exactly(root, ref)


def test_a_training_goes_on(root):
    state = format_state.digits()
    with checkpointer(root, run="digits", state=state, keep=[pp.Last(9)], strict=True) as ckpt:
        assert ckpt.resume().step == 10
        expected = TENSORS["digits/digits_epoch5_step10_accuracy0.6200"]
        assert format_state.flat(state["model"].state_dict()) == expected["model"]
        assert format_state.flat(state["optimizer"].state_dict()) == expected["optimizer"]
        assert state["notes"] == {"seen": list(range(10))}
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002 - what trainings use
        assert drawn == EXPECTED["drawn"]
        for epoch in ckpt.epochs(7):
            assert epoch == 6
            ckpt.report(step=11, accuracy=0.7)
    newest = pp.open(root).run("digits").manifests()[-1]
    assert (newest.sequence, newest.epoch, newest.parent) == (11, 6, pp.open(root).find("digits:10").id)


def test_a_training_goes_on_inside_an_epoch(root):
    state = format_state.digits()
    with checkpointer(root, run="digits", state=state, resume="digits:3") as ckpt:
        epoch = next(ckpt.epochs(2))
        assert (epoch, list(ckpt.batches([0, 1]))) == (1, [1])


def test_a_training_goes_on_after_a_kill(root):
    state = {"model": {"w": torch.zeros(8)}, "extra": {"v": torch.zeros(3)}}
    restore(root, "cut")  # whose archiving was cut short, too
    with checkpointer(root, run="cut", state=state) as ckpt:
        assert ckpt.resume().step == 3, "the newest that has all its parts"
        assert format_state.flat(state["model"]) == TENSORS["cut/cut_step3"]["model"]
        ckpt.report(step=9)
    assert [one.step for one in pp.open(root).run("cut").manifests()] == [1, 2, 3, 4, 9]
    assert not [one for one in findings(root) if "runs/cut/" in one["where"]]


def test_cleaning_takes_litter_alone(root):
    before = [f"{one.run}/{one.name}" for run in pp.open(root).runs() for one in run.manifests()]
    findings(root, "--clean")
    assert {one["kind"] for one in findings(root, "--deep")} == {"damage", "foreign"}
    assert [f"{one.run}/{one.name}" for run in pp.open(root).runs() for one in run.manifests()] == before
    for ref in before:
        loads_exactly(root, ref)
    assert not list(differences(EXPECTED["trash"], trash(root)))


def test_an_alias_goes_on(root):
    command("promote", root, "kinds@latest", "--as", "canary", "--why", "later", "--force", "--yes")
    found = pp.open(root)
    assert found.find("@canary").ref == "kinds/kinds_step1"
    assert not aliases.history(found.store, "canary").damage
    records = aliases.history(found.store, "champion").records
    assert aliases.alias_at(records, records[1].at).number == 2
