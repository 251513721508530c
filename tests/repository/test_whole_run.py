"""Whole runs: what may be removed, what stays, and what a kill leaves of one."""

import contextlib
import shutil
from datetime import timedelta

import pytest

import peakpoint as pp
from dying import Killed, Ops
from peakpoint.catalogue import Catalogue
from peakpoint.repository import maintenance, validations
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.whole_run import remove_run
from peakpoint.store import LocalStore, MemoryStore
from rows import point
from strategies import START
from training import checkpointer


def trained(root, run="r", count=3, **given):
    with checkpointer(root, run=run, keep=[pp.Last(9)], **given) as ckpt:
        ckpt.resume()
        for step in range(1, count + 1):
            ckpt.report(step=step, acc=step / 10)
    return pp.open(root).run(run)


def validate(run, manifest):
    """Record a validation; the digest is that of no manifest."""
    spec = validations.ValidationSpec()
    members = {"run": run.name, "checkpoint": manifest.id, "name": manifest.name, "number": 0, "manifest": "0" * 64}
    findings = (validations.Finding(check="x", outcome="passed", said="so"),)
    record = validations.Validation(**members, parts=("x",), at=START, by="me", wanted=spec, findings=findings)
    validations.record(run.store, record)


def damage(root):
    return [finding for finding in audit(pp.open(root)).findings if finding.kind in ("damage", "foreign")]


def files(root):
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "catalogue" not in path.name
    )


def full(root):
    """A run with everything that a run can have beside checkpoints that count."""
    run = trained(root, count=5)
    maintenance.remove(run, run.manifests()[:1], "why", undo_for=timedelta(hours=1))
    validate(run, run.manifests()[0])
    (run.checkpoints()[0].path / "manifest.json").write_text("{")
    (run.checkpoints()[0].path / "manifest.json").unlink()
    incomplete = root / "runs" / "r" / "checkpoints" / "incomplete"
    incomplete.mkdir()
    (incomplete / "state.json").write_text("{}")
    (root / "runs" / "r" / "journal" / ".tmp-1").write_text("")
    return run


def test_nothing_is_left_of_a_run(tmp_path):
    trained(tmp_path, "other")
    before = files(tmp_path)
    assert remove_run(full(tmp_path)) == []
    assert files(tmp_path) == before
    assert [run.name for run in pp.open(tmp_path).runs()] == ["other"]
    assert not (tmp_path / "runs" / "r").exists()
    assert damage(tmp_path) == []
    assert trained(tmp_path).latest().sequence == 3, "the name is free again"


def test_an_archived_run_is_removed(tmp_path):
    run = trained(tmp_path)
    maintenance.archive(run)
    assert remove_run(run) == []
    assert not (tmp_path / "runs" / "r").exists()


def test_it_works_in_every_store():
    store = MemoryStore()
    trained(store, "other")
    run = trained(store)
    assert remove_run(run) == []
    assert [run.name for run in pp.open(store).runs()] == ["other"]
    assert store.children("runs/r") == []


def test_what_others_have_written_stays(tmp_path):
    run = trained(tmp_path)
    notes = tmp_path / "runs" / "r" / "notes.txt"
    notes.write_text("mine")
    mine = run.latest().path / "mine.bin"
    mine.write_text("mine")
    catalogue = Catalogue(LocalStore(tmp_path))
    assert [one.name for one in catalogue.runs()] == ["r"]
    assert remove_run(run) == ["checkpoints/", "notes.txt"]
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == [notes, mine]
    assert pp.open(tmp_path).runs() == []
    assert catalogue.runs() == [], "also where its directory stays"
    catalogue.close()


def refused(run, words):
    before = files(run.store.root)
    with pytest.raises(pp.ConflictError, match=words):
        remove_run(run)
    assert [name for name in files(run.store.root) if "/journal/" not in name] == [
        name for name in before if "/journal/" not in name
    ]


def test_what_is_protected_stays(tmp_path):
    run = trained(tmp_path)
    run.pin("r:1", "figure 3")
    refused(run, "is pinned: figure 3")
    run.unpin("r:1")
    point(run.store, "champion", run.manifests()[0])
    refused(run, "champion since")
    point(run.store, "champion", None, keeps=1)
    refused(run, "was champion")
    point(run.store, "champion", None, keeps=0)
    (run.checkpoints()[1].path / "manifest.json").write_text("{")
    refused(run, "is damaged, and may be what champion points at or did")
    shutil.rmtree(tmp_path / "aliases")
    assert remove_run(run) == []


def test_a_run_that_somebody_uses_stays(tmp_path):
    with checkpointer(tmp_path, keep=[pp.Last(9)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        run = pp.open(tmp_path).run("r")
        refused(run, "already being written")
    loaded = pp.load("r@latest", root=tmp_path)
    refused(run, "somebody is reading r_step1")
    loaded.close()
    assert remove_run(run) == []


def test_killed_anywhere_it_is_whole_or_smaller_or_gone_and_the_next_call_ends_it(tmp_path):
    original = tmp_path / "original"
    trained(original, "other", count=1)
    run = trained(original, count=2)
    validate(run, run.manifests()[0])
    number, kept = 0, []
    while not kept or kept[-1] is not None:
        root = tmp_path / str(number)
        shutil.copytree(original, root)
        ops = Ops(number)
        with contextlib.suppress(Killed):
            remove_run(pp.open(LocalStore(root, ops)).run("r"))
        assert damage(root) == []
        names = [run.name for run in pp.open(root).runs()]
        kept.append(len(pp.open(root).run("r").manifests()) if "r" in names else 0)
        for checkpoint in pp.open(root).run("r").checkpoints() if "r" in names else ():
            pp.load(checkpoint).verify()
        if "r" in names:
            remove_run(pp.open(root).run("r"))
        elif number % 2:
            clean(pp.open(root))
            assert files(root / "runs" / "r") in ([], ["writer.lock"])
        else:
            assert trained(root).latest().sequence == 3, "a new run of that name begins from nothing"
            assert damage(root) == []
        assert [run.name for run in pp.open(root).runs()] == (
            ["other"] if "r" in names or number % 2 else ["other", "r"]
        )
        if not ops.struck:
            kept.append(None)
        number += 1
    assert kept[:-1] == sorted(kept[:-1], reverse=True)
    assert {2, 1, 0} <= set(kept)
