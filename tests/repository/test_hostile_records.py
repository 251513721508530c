"""Sealed records whose members have the right type and a hostile value: refused by name, and none hides another."""

import copy
import json
import shutil
import warnings
from datetime import timedelta

import msgspec
import pytest
from blake3 import blake3

import peakpoint as pp
from peakpoint.errors import CorruptError, Error, FormatError
from peakpoint.format import layout
from peakpoint.format.events import decode, decode_report
from peakpoint.format.manifest import decode_manifest
from peakpoint.format.sealed import unseal
from peakpoint.production.promotion import promote
from peakpoint.production.proposal import propose
from peakpoint.reports import changelog, evaluation
from peakpoint.repository import aliases, audit, maintenance, packs, releases, trash, validations
from peakpoint.repository.packs.index import encode_index, read_index
from peakpoint.repository.run import read_run_record
from peakpoint.store import MemoryStore
from training import checkpointer, parts, train

RAW = "raw: "  # what no encoder writes
MISSING = object()
HOSTILE = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "negative": -1,
    "too large": 2**63,
    "huge": 10**400,
    "float": 1e308,
    "infinite": RAW + "1e999",
    "empty": "",
    "NUL": "a\x00b",
    "up": "../../../x",
    "absolute": "/etc/passwd",
    "surrogate": RAW + '"\\ud800x"',
    "long": "x" * 100_000,
    "list": [],
    "object": {},
    "deep": RAW + "[" * 5000 + "]" * 5000,
    "no zone": "2026-01-01T00:00:00",
    "last year": "9999-12-31T23:59:59-23:59",
    "first year": "0001-01-01T00:00:00+23:59",
    "twice": RAW + '1,"twice":2',
}
NO_COUNT = ("missing", "null", "true", "negative", "too large", "huge", "float", "infinite", "up", "list", "deep")
NO_NAME = ("true", "negative", "infinite", "empty", "NUL", "up", "absolute", "surrogate", "long", "list", "deep")
NO_TIME = ("true", "empty", "up", "surrogate", "long", "list", "deep", "no zone", "last year", "first year")
REFUSED = {
    **dict.fromkeys(("step", "report", "sequence", "size", "header", "depth"), NO_COUNT),
    **dict.fromkeys(("id", "run", "checkpoint"), NO_NAME),
    **dict.fromkeys(("at", "until", "created_at"), NO_TIME),
}
OPTIONAL = ("until", "checkpoint", "header", "size_bytes")


def sealed(members):
    """As ``seal`` does, also of what no encoder writes."""
    text = json.dumps(members)
    for value in HOSTILE.values():
        if isinstance(value, str) and value.startswith(RAW):
            text = text.replace(json.dumps(value), value.removeprefix(RAW))
    body = text[:-1].encode()
    return body + b',"seal":"' + blake3(body).hexdigest()[:16].encode() + b'"}\n'


def paths(value, path=()):
    """Every member at every depth; of lists the first element."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*path, key))


def changed(members, path, value):
    members = copy.deepcopy(members)
    parent = members
    for key in path[:-1]:
        parent = parent[key]
    if value is MISSING:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return members


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with every kind of record."""
    root = tmp_path_factory.mktemp("made") / "runs"
    for run in ("r", "packed"):
        model, optimizer = parts()
        rules = [pp.Best("loss", "min", parts="model"), pp.Every(epochs=1, parts="model"), pp.Last(1)]
        with checkpointer(root, run=run, state={"model": model, "optimizer": optimizer}, keep=rules) as ckpt:
            for _ in ckpt.epochs(4):
                ckpt.report(loss=train(model, optimizer))
    run = pp.open(root).run("r")
    run.record("r:1", {"late": 0.5})
    run.pin("r:1", "it is good")
    pp.validate("r:4", root=root, evaluate=lambda loaded: {"loss": 1.0})
    promote(propose(pp.open(root), "r:4", "champion"), "good", force=True)
    maintenance.remove(run, [pp.open(root).find_manifest("r:2")], "too many", undo_for=timedelta(days=9))
    maintenance.archive(pp.open(root).run("packed"))
    target = msgspec.to_builtins(aliases.read(run.store, "champion", 1).target)
    release = {
        "format": 1,
        "id": "x",
        "alias": "champion",
        "outcome": "refused",
        "at": "2026-01-01T00:00:00Z",
        "by": "I",
    }
    release |= {"candidate": target, "former": None, "validation": None, "record": 1, "steps": [], "reasons": []}
    (root / "releases").mkdir()
    (root / "releases" / "x.json").write_bytes(sealed(release | {"policy": ""}))
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


# --- one record ---------------------------------------------------------------------------------------------------


def in_store(key, read):
    """Reads bytes that are in a store under a key."""

    def read_stored(data):
        store = MemoryStore()
        store.put(key, [data])
        return read(store)

    return read_stored


def read_event(line):
    report = decode_report(line)
    assert report is None or report == decode(line, where="here")
    return decode(line, where="here")


def read_pack(data):
    store = MemoryStore()
    store.put(layout.pack_key("r", "c"), [bytes(2**16), data, len(data).to_bytes(8, "little"), packs.index._MAGIC])
    return read_index(store, "r", "c")


@pytest.fixture(scope="module")
def kinds(made):
    """Name of a kind of record to the members of one, and what reads it."""
    run = pp.open(made).run("r")
    store, name = run.store, maintenance.in_trash(run)[0].manifest.name
    dropped = next(made.glob("runs/r/checkpoints/*/dropped-1.json"))
    packed = pp.open(made).run("packed").manifests()[-1].id
    [validated] = validations.checkpoints_with(store, "r")
    keys = {
        "run": (layout.run_record("r"), lambda store: read_run_record(store, "r")),
        "alias": (layout.alias_key("champion", 1), lambda store: aliases.read(store, "champion", 1)),
        "trash": (layout.trashed_key("r", name), lambda store: trash.read_trashed(store, "r", name)),
        "archive": (layout.archived_key("packed"), lambda store: packs.run_archive(store, "packed")),
        "validation": (
            layout.validation_key("r", validated, 1),
            lambda store: validations.read(store, "r", validated, 1),
        ),
        "release": (layout.release_key("x"), lambda store: releases.read_release(store, "x")),
        "dropped parts": (
            layout.file_key("r", dropped.parent.name, dropped.name),
            lambda store: list(trash.dropped_parts(store, "r", dropped.parent.name)),
        ),
    }
    found = {kind: (store.get(key), in_store(key, read)) for kind, (key, read) in keys.items()}
    found["manifest"] = (store.get(layout.manifest_key("r", run.manifests()[-1].name)), decode_manifest)
    found["pack"] = (encode_index(read_index(store, "packed", packed))[:-16], read_pack)
    for segment in sorted(made.glob("runs/*/journal/*")):
        for line in segment.read_bytes().splitlines(keepends=True):
            found["event " + unseal(line, where="here")["kind"]] = (line, read_event)
    return {kind: (unseal(data, where=kind), read) for kind, (data, read) in found.items()}


def test_every_kind_is_there(kinds):
    assert len([kind for kind in kinds if kind.startswith("event ")]) >= 10
    for members, read in kinds.values():
        assert read(sealed(members)) is not None


def refusal(read, data):
    """What reading says against it; None when it says nothing."""
    try:
        read(data)
    except (CorruptError, FormatError) as error:
        return str(error)
    return None


def test_hostile_values_are_refused_by_the_name_of_their_member(kinds):
    for kind, (members, read) in kinds.items():
        for path in paths(members):
            labels = REFUSED.get(path[-1], ())
            for label, value in HOSTILE.items():
                told = refusal(read, sealed(changed(members, path, value)))
                if label in labels and not (label in ("missing", "null") and path[-1] in OPTIONAL):
                    assert told is not None, (kind, path, label)
                    assert label not in ("negative", "NUL", "no zone") or any(str(key) in told for key in path), (
                        kind,
                        path,
                        label,
                        told,
                    )


def test_members_of_a_newer_release_are_passed_over(kinds):
    for members, read in kinds.values():
        for value in (None, -1, "../x", {"deeper": [{}]}):
            assert refusal(read, sealed({**members, "newer": value})) is None


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"parts": {"model": ["nothing.safetensors"]}},
        {"files": [{"name": "manifest.json", "size": 1, "digest": "0" * 64}]},
    ],
)
def test_a_manifest_that_contradicts_itself(kinds, change):
    members, read = kinds["manifest"]
    with pytest.raises(CorruptError, match=r"manifest\.json contradicts itself - at `\$\.files`"):
        read(sealed(members | change))


@pytest.mark.parametrize(
    "name", ["manifest.json", "trashed.json", "dropped-2.json", "signature-1.json", "archived.json"]
)
def test_dropped_parts_drop_no_records(root, name):
    """What a record of dropped parts names is deleted when the run is cleaned."""
    record = next(root.glob("runs/r/checkpoints/*/dropped-1.json"))
    record.write_bytes(sealed(unseal(record.read_bytes(), where="here") | {"files": [name]}))
    audit.clean(pp.open(root))
    assert (record.parent / "manifest.json").exists()
    assert any(record.parent.name in one.where for one in audit.audit(pp.open(root)).of_kind("damage"))


def test_a_record_of_the_trash_restores_nothing_elsewhere(root):
    [record] = root.glob("runs/r/checkpoints/*/trashed.json")
    elsewhere = record.parent.with_name("elsewhere")
    record.parent.rename(elsewhere)
    assert maintenance.in_trash(pp.open(root).run("r")) == []
    [damage] = [one for one in audit.audit(pp.open(root)).of_kind("damage") if "elsewhere" in one.where]
    assert "was moved" in damage.what


# --- among others -------------------------------------------------------------------------------------------------


def everything(root):
    """Read all that there is in every way."""
    repository = pp.open(root)
    runs = repository.runs()
    return [
        lambda: [(run.checkpoints(), run.plan(), run.pinned(), run.history()) for run in runs],
        lambda: evaluation.evaluate(repository),
        lambda: changelog.entries(repository),
        lambda: list(pp.select(repository, "created > '2020-01-01'", by={"loss": "min"})),
        lambda: [maintenance.in_trash(run) for run in runs],
        lambda: aliases.history(repository.store, "champion"),
    ]


FILES = [
    "aliases/champion/000001.json",
    "releases/x.json",
    "runs/packed/archived.json",
    "runs/r/run.json",
    "runs/r/checkpoints/*/manifest.json",
    "runs/r/checkpoints/*/dropped-1.json",
    "runs/r/checkpoints/*/trashed.json",
    "runs/r/validations/*/000001.json",
    "runs/r/journal/000001.jsonl",
]
WORST = ["missing", "negative", "up", "last year"]


@pytest.mark.parametrize("shift", [0, *(pytest.param(shift, marks=pytest.mark.slow) for shift in range(1, len(WORST)))])
@pytest.mark.parametrize("pattern", FILES)
def test_one_bad_record_hides_no_other(root, pattern, shift):
    """Nothing but errors of ours comes of it, and an audit goes on to the end."""
    file = min(root.glob(pattern))
    intact = file.read_bytes()
    checkpoints = audit.audit(pp.open(root)).checkpoints
    first, _, others = intact.partition(b"\n")
    members = unseal(first + b"\n", where="here")
    for number, path in enumerate(path for path in paths(members) if len(path) < 2 + (shift > 0)):
        label = WORST[(number + shift) % len(WORST)]
        file.write_bytes(sealed(changed(members, path, HOSTILE[label])) + others)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pp.PeakpointWarning)
            result = audit.audit(pp.open(root))
            for read in everything(root):
                try:
                    read()
                except Error:
                    continue
        assert result.checkpoints >= checkpoints - 1, (path, label)
        assert {one.kind for one in result.findings} <= {"damage", "litter", "foreign"}, (path, label)
    file.write_bytes(intact)
    assert audit.audit(pp.open(root)).checkpoints == checkpoints


def test_rules_that_no_release_knows_hide_no_other_run(root):
    segment = root / "runs/r/journal/000001.jsonl"
    first, _, others = segment.read_bytes().partition(b"\n")
    segment.write_bytes(sealed(unseal(first + b"\n", where="here") | {"rules": ["no:such"]}) + others)
    report = evaluation.evaluate(pp.open(root))
    assert ([run.name for run in report.runs], list(report.unread)) == (["packed"], ["r"])
