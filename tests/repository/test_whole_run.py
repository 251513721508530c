"""Whole runs: what may be removed, what stays, and what a kill leaves of one."""

import contextlib
import shutil
from datetime import timedelta

import pytest

import peakpoint as pp
from dying import Killed, Ops
from peakpoint.catalogue import Catalogue
from peakpoint.errors import ConfigError
from peakpoint.repository import maintenance, validations
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.whole_run import remove_run, rename_run
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
    refused(run, r"\(pinned: figure 3\)")
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
    refused(run, "somebody is reading step1")
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


# --- another name ---------------------------------------------------------------------------------------------------


def content(root, run):
    """Every byte of a run, but for its journal, its lock and its names."""
    directory = root / "runs" / run
    beside = ("journal", "writer.lock", "renamed.json")
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).parts[0] not in beside
    }


def test_a_run_keeps_everything_under_another_name(tmp_path):
    run = trained(tmp_path, "old", count=4, config={"lr": 0.1})
    run.record("old:2", {"late": 0.9})
    run.pin("old:1", "figure 3")
    validate(run, run.manifests()[1])
    trashed = run.manifests()[2].name
    maintenance.remove(run, run.manifests()[2:3], "why", undo_for=timedelta(hours=1))
    before, metrics = content(tmp_path, "old"), [dict(one.metrics) for one in run.checkpoints()]
    catalogue = Catalogue(LocalStore(tmp_path))
    assert [one.name for one in catalogue.runs()] == ["old"]
    new = rename_run(run, "new")
    assert content(tmp_path, "new") == before, "to the byte"
    assert [one.name for one in pp.open(tmp_path).runs()] == ["new"]
    assert [one.name for one in catalogue.runs()] == ["new"]
    assert [dict(one.metrics) for one in new.checkpoints()] == metrics
    assert {one.run for one in new.checkpoints()} == {one.run for one in pp.select(tmp_path, "late > 0.5")} == {"new"}
    assert (list(new.pinned().values()), new.settings().config, len(new.history())) == (["figure 3"], {"lr": 0.1}, 4)
    assert validations.newest(new.store, "new", new.manifests()[1].id).run == "new"
    assert maintenance.undo(new, [trashed])[0].run == "new", "also out of the trash"
    for checkpoint in new.checkpoints():
        checkpoint.load().verify()
    assert damage(tmp_path) == []
    maintenance.remove(new, new.manifests()[:1], "why", undo_for=timedelta(hours=1))
    assert maintenance.undo(new, [maintenance.in_trash(new)[0].manifest.id])[0].run == "new"
    assert catalogue.compare() == []
    catalogue.close()


def test_a_renamed_run_is_trained_on_archived_and_renamed_again(tmp_path):
    run = rename_run(rename_run(trained(tmp_path, "a"), "b"), "c")
    with checkpointer(tmp_path, run="c", keep=[pp.Last(9)]) as ckpt:
        assert ckpt.resume().step == 3
        ckpt.report(step=4, acc=0.4)
    maintenance.archive(run)
    assert damage(tmp_path) == []
    back = rename_run(run, "a")
    assert [one.step for one in back.checkpoints()] == [1, 2, 3, 4]
    for checkpoint in back.checkpoints():
        checkpoint.load().verify()
    maintenance.restore(back)
    assert damage(tmp_path) == []
    assert remove_run(back) == []
    assert damage(tmp_path) == []


def test_a_training_under_a_former_name_does_not_begin_from_nothing(tmp_path):
    rename_run(rename_run(trained(tmp_path, "a"), "b"), "c")
    for former in "ab":
        for resume in ("auto", "must", "c@latest"):
            with pytest.raises(ConfigError, match=f"run '{former}' in .* is called 'c' now: write run='c' to continue"):
                trained(tmp_path, former, resume=resume)
    assert [run.name for run in pp.open(tmp_path).runs()] == ["c"]
    trained(tmp_path, "a", resume="never")
    with checkpointer(tmp_path, run="a", keep=[pp.Last(9)]) as ckpt:
        assert ckpt.resume().step == 3, "the name is that of another run now"
    assert remove_run(pp.open(tmp_path).run("c")) == []
    assert trained(tmp_path, "b").latest().sequence == 3, "the name is free again"


def test_a_signature_holds_under_another_name(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from commands import command

    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    pem, private, public = serialization.Encoding.PEM, tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    trained(tmp_path / "runs", count=1)
    command("sign", tmp_path / "runs", "r@latest", "--key", private)
    command("rename", tmp_path / "runs", "r", "s")
    command("sign", tmp_path / "runs", "s@latest", "--key", public, "--verify")
    command("sign", tmp_path / "runs", "s@latest", "--key", private)


def kept_name(run, new, words, kind=pp.ConflictError):
    with pytest.raises(kind, match=words):
        rename_run(run, new)
    assert run.name in [one.name for one in pp.open(run.store).runs()]


def test_a_run_that_cannot_be_renamed_keeps_its_name(tmp_path):
    run, other = trained(tmp_path, "a"), trained(tmp_path, "b")
    kept_name(run, "b", "has a run 'b'")
    kept_name(run, "a", "has a run 'a'")
    kept_name(run, "no/name", "cannot name a run", pp.errors.ConfigError)
    (tmp_path / "runs" / "file").write_text("")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "b")
    kept_name(run, "file", "already exists")
    kept_name(run, "link", "is a symbolic link", pp.errors.StoreError)
    loaded = pp.load("a@latest", root=tmp_path)
    kept_name(run, "c", "somebody is reading")
    loaded.close()
    with checkpointer(tmp_path, run="a", keep=[pp.Last(9)]):
        kept_name(run, "c", "already being written")
    point(run.store, "champion", run.manifests()[0])
    point(run.store, "champion", other.manifests()[0])
    kept_name(run, "c", "records of the alias champion say it")
    kept_name(other, "c", "records of the alias champion say it")
    shutil.rmtree(tmp_path / "aliases")
    assert rename_run(run, "c").latest().step == 3


def test_killed_anywhere_a_run_has_one_name(tmp_path):
    original = tmp_path / "original"
    expected = [one.id for one in trained(original, "old", count=2).manifests()]
    names, number, struck = set(), 0, True
    while struck:
        root = tmp_path / str(number)
        shutil.copytree(original, root)
        ops = Ops(number, "after" if number % 2 else "before")
        with contextlib.suppress(Killed):
            rename_run(pp.open(LocalStore(root, ops)).run("old"), "new")
        [run] = pp.open(root).runs()
        names.add(run.name)
        assert [one.id for one in run.manifests()] == expected
        for checkpoint in run.checkpoints():
            checkpoint.load().verify()
        clean(pp.open(root))
        assert [finding.where for finding in audit(pp.open(root)).findings] == []
        if run.name == "old":
            assert rename_run(run, "new").latest().step == 2
        number, struck = number + 1, ops.struck
    assert names == {"old", "new"}


def test_what_cannot_rename_in_one_step_refuses():
    class Bucket(MemoryStore):
        def rename(self, prefix, new):
            return False

    run = trained(Bucket(), "a", count=1)
    kept_name(run, "b", "cannot rename a run in one step", pp.errors.ConfigError)
    assert rename_run(trained(MemoryStore(), "a", count=1), "b").latest().run == "b"


def test_a_damaged_record_of_names_is_said(tmp_path):
    run = rename_run(trained(tmp_path, "a", count=1), "b")
    (tmp_path / "runs" / "b" / "renamed.json").write_text("{}")
    found = {finding.where: finding.what for finding in damage(tmp_path)}
    assert "runs/b/renamed.json" in found
    with pytest.raises(pp.errors.FormatError, match=r"renamed\.json"):
        run.latest()
