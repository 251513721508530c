"""Archived checkpoints come back bit for bit, are read like others, and never depend on luck."""

import os
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from archived_runs import bytes_on_disk, files, run_of, trained
from commands import command
from peakpoint.format import layout
from peakpoint.format.events import Removed
from peakpoint.format.sealed import seal, unseal
from peakpoint.repository import maintenance
from peakpoint.repository.archive import LONGEST_CHAIN
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.journal import Journal
from peakpoint.repository.packs.index import read_index
from peakpoint.store import MemoryStore
from training import checkpointer, parts, same, train

DAY = timedelta(days=1)


def test_archived_and_restored_bit_for_bit(tmp_path):
    backbone = torch.nn.Linear(200, 200).requires_grad_(False)  # a file that checkpoints share
    trained(tmp_path, backbone=backbone)
    before, space = files(tmp_path), bytes_on_disk(tmp_path)
    done = maintenance.archive(run_of(tmp_path))
    assert [one.bases for one in done][:2] == [0, 1]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert sum(one.packed_bytes for one in done) < 0.5 * sum(one.size_bytes for one in done)
    assert audit(pp.open(tmp_path), deep=True).clean
    assert [one.name for one in maintenance.restore(run_of(tmp_path))] == [one.manifest.name for one in done]
    assert files(tmp_path) == before
    assert bytes_on_disk(tmp_path) < 1.02 * space, "what was shared is shared again"
    assert not (tmp_path / "runs/r/archive").exists()
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_archived_checkpoints_are_read_like_others(tmp_path):
    weights = trained(tmp_path)
    maintenance.archive(run_of(tmp_path))
    for number, expected in enumerate(weights):
        loaded = pp.load(f"r:epoch={number}", root=tmp_path)
        assert same(dict(loaded["model"]), expected)
        assert same(loaded.tensor("model", "0.weight"), expected["0.weight"])
        loaded.verify()
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path, verify=False)["model"]), expected)
    other, _ = parts(seed=9, width=64)
    pp.load("r@latest", root=tmp_path, into=other)
    assert same(dict(other.state_dict()), weights[-1])


def test_another_run_goes_on_from_a_checkpoint_of_an_archived_run(tmp_path):
    expected = trained(tmp_path / "whole", epochs=6)
    trained(tmp_path / "r", epochs=4)
    maintenance.archive(run_of(tmp_path / "r"))
    model, optimizer = parts(width=64)
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(tmp_path / "r", run="q", state=state, keep=[pp.Last(99)], resume="r@latest") as ckpt:
        for _ in ckpt.epochs(6):
            ckpt.report(loss=train(model, optimizer))
    assert same(dict(pp.load("q@latest", root=tmp_path / "r")["model"]), expected[-1])
    assert audit(pp.open(tmp_path / "r"), deep=True).findings == []


def everything(root):
    """Every file below a root but the journal's, the lock and the catalogue."""
    skip = {"journal", "writer.lock"}
    return {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not skip & set(path.parts) and "catalogue" not in path.name
    }


MODEL_ONLY = pp.Best("loss", "min", parts="model")
REFUSED = {
    "keep": lambda root: command("keep", root, "r", "--rules", "last:1"),
    "keep --yes": lambda root: maintenance.apply_plan(run_of(root), run_of(root).plan([pp.Last(1)]), None),
    "parts": lambda root: maintenance.apply_plan(
        run_of(root), run_of(root).plan([pp.Best("loss", "min", parts="model")]), None
    ),
    "rm": lambda root: maintenance.remove(run_of(root), run_of(root).manifests()[:1], "x"),
    "rm of all, into the trash": lambda root: maintenance.remove(
        run_of(root), run_of(root).manifests(), "x", undo_for=DAY
    ),
    "undo": lambda root: maintenance.undo(run_of(root), ["epoch0"]),
    "training": lambda root: trained(root, epochs=6),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_nothing_changes_single_checkpoints_of_an_archived_run(tmp_path, verb):
    trained(tmp_path, epochs=4)
    maintenance.remove(run_of(tmp_path), run_of(tmp_path).manifests()[:1], "was in the trash before", undo_for=DAY)
    maintenance.archive(run_of(tmp_path))
    before = everything(tmp_path)
    with pytest.raises(pp.ConflictError, match="is archived") as refused:
        REFUSED[verb](tmp_path)
    assert "--restore" in str(refused.value) or "--undo-for 0" in str(refused.value)
    assert everything(tmp_path) == before
    assert maintenance.archive(run_of(tmp_path)) == []
    maintenance.restore(run_of(tmp_path))
    assert len(maintenance.undo(run_of(tmp_path), [maintenance.in_trash(run_of(tmp_path))[0].manifest.id])) == 1
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_notes_and_aliases_of_an_archived_run_go_on(tmp_path):
    trained(tmp_path, epochs=2)
    maintenance.archive(run_of(tmp_path))
    run = run_of(tmp_path)
    run.pin("r@latest", "figure 3")
    assert run.record("r@latest", {"accuracy": 0.5}).metrics["accuracy"] == 0.5
    command("promote", tmp_path, "r@latest", "--as", "champion", "--force", "--yes", "--why", "x")
    assert [one.epoch for one in pp.select(tmp_path, "archived")] == [1, 0]
    maintenance.restore(run)
    assert list(pp.select(tmp_path, "archived")) == []


def test_the_whole_of_an_archived_run_can_be_removed(tmp_path):
    trained(tmp_path, epochs=3)
    maintenance.archive(run_of(tmp_path))
    assert maintenance.remove(run_of(tmp_path), run_of(tmp_path).manifests(), "done with it") == []
    assert run_of(tmp_path).checkpoints() == []
    assert not list(tmp_path.rglob("*.pack"))
    assert not (tmp_path / layout.archived_key("r")).exists()
    assert len(trained(tmp_path, epochs=2)) == 2, "it begins anew"


def test_a_run_with_a_damaged_manifest_is_not_archived(tmp_path):
    trained(tmp_path, epochs=2)
    file = run_of(tmp_path).checkpoints()[0].path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"epoch":0', b'"epoch":7'))
    before = files(tmp_path)
    with pytest.raises(pp.errors.CorruptError, match="epoch0_step1"):
        maintenance.archive(run_of(tmp_path))
    assert files(tmp_path) == before
    assert not (tmp_path / "runs/r/archived.json").exists()


def test_a_removal_that_begins_during_an_archive_stops_one_of_the_two(tmp_path):
    trained(tmp_path, epochs=3)
    run = run_of(tmp_path)
    journal = Journal(run.store, "r", lambda: datetime.now(UTC))

    def announce(_):
        last = run.manifests()[-1]
        removed = Removed(at=journal.now(), checkpoint=last.id, name=last.name, step=3, epoch=2, reason="x", by="y")
        journal.append(removed)

    before = files(tmp_path)
    with pytest.raises(pp.ConflictError, match="being removed"):
        maintenance.archive(run, progress=announce)
    journal.close()
    assert files(tmp_path) == before
    assert not (tmp_path / layout.archived_key("r")).exists()
    assert not list(tmp_path.rglob("*.pack"))


def test_what_goes_into_the_trash_during_an_archive_keeps_its_files(tmp_path):
    weights = trained(tmp_path, epochs=3)
    run = run_of(tmp_path)
    going = []

    def remove(packed):
        if packed.manifest.epoch == 2:
            going.extend(maintenance.remove(run, run.manifests()[:1], "x", undo_for=DAY))

    first = run.checkpoints()[0].path / "model.safetensors"
    maintenance.archive(run, progress=remove)
    assert going == []
    assert first.exists(), "what is in the trash needs no pack"
    maintenance.restore(run)
    maintenance.undo(run, [maintenance.in_trash(run)[0].manifest.name])
    for number, expected in enumerate(weights):
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path)["model"]), expected)


def test_chains_are_bounded(tmp_path):
    trained(tmp_path, epochs=LONGEST_CHAIN + 3, width=2)
    done = maintenance.archive(run_of(tmp_path))
    store = pp.open(tmp_path).store
    depths = [read_index(store, "r", one.manifest.id).depth for one in done]
    assert depths == [*range(1, LONGEST_CHAIN + 1), 1, 2, 3]


@given(st.integers(0, 2**32), st.integers(3, 7))
@settings(max_examples=12, deadline=None)
def test_layouts_that_change_come_back(tmp_path_factory, seed, epochs):
    """States whose layout changes, some of them dropped or removed before: what exists is always what was saved."""
    root, dice = tmp_path_factory.mktemp("r"), random.Random(seed)
    torch.manual_seed(seed)
    state = {"model": {"w": torch.randn(40, 30), "half": torch.randn(50).bfloat16(), "n": torch.arange(9)}}
    saved = {}
    with checkpointer(root, state={"model": state["model"]}) as ckpt:
        for step in range(1, epochs + 1):
            state["model"]["w"] = state["model"]["w"] * (1 + 1e-4 * torch.randn(40, 30))
            if dice.random() < 0.3:
                state["model"][f"new{step}"] = torch.randn(dice.randint(0, 2000))
            if dice.random() < 0.3:
                state["model"]["w"][torch.rand(40, 30) < 0.5] = 0
            ckpt.report(step=step)
            ckpt.wait()
            saved[step] = {name: value.clone() for name, value in state["model"].items()}
    run = pp.open(root).run("r")
    for verb in (maintenance.archive, maintenance.restore, maintenance.archive):
        if dice.random() < 0.5 and verb is not maintenance.restore:
            goes = dice.choice(run.manifests())
            assert maintenance.remove(run, [goes], "chance") == []
            del saved[goes.step]
        verb(run)
        assert {one.step for one in run.checkpoints()} == saved.keys()
        for step, expected in saved.items():
            assert same(dict(pp.load(f"r:{step}", root=root)["model"]), expected)
        assert audit(pp.open(root), deep=True).findings == []


def test_every_damage_to_a_pack_is_noticed(tmp_path):
    weights = trained(tmp_path, epochs=2, width=4)
    maintenance.archive(run_of(tmp_path))
    first = run_of(tmp_path).manifests()[0]
    path = tmp_path / "runs/r/archive" / f"{first.id}.pack"
    good = path.read_bytes()
    dice = random.Random(3)
    places = dice.sample(range(len(good)), 120)
    noticed = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        for ref, expected in (("r:epoch=0", weights[0]), ("r:epoch=1", weights[1])):
            try:
                loaded = pp.load(ref, root=tmp_path)
                loaded.verify()
                assert same(dict(loaded["model"]), expected)
            except pp.errors.CorruptError:
                noticed += 1
    assert noticed > len(places), "nearly all of them hurt both"
    for length in (0, 8, 16, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(pp.errors.CorruptError, match=first.id):
            pp.load("r:epoch=1", root=tmp_path)
    path.unlink()
    with pytest.raises(pp.errors.CorruptError, match=r"\.pack is missing"):
        pp.load("r:epoch=1", root=tmp_path)
    assert {finding.kind for finding in audit(pp.open(tmp_path)).findings} == {"damage"}
    with pytest.raises(pp.errors.CorruptError):
        maintenance.restore(run_of(tmp_path))
    clean(pp.open(tmp_path))
    path.write_bytes(good)
    assert audit(pp.open(tmp_path), deep=True).findings == [], "the packs are still read"
    for number, expected in enumerate(weights):
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path)["model"]), expected)
    with pytest.raises(pp.ConflictError, match="is archived"):  # the only copy is in the pack, and goes to no trash
        maintenance.remove(run_of(tmp_path), [first], "x", undo_for=DAY)
    clean(pp.open(tmp_path))
    assert len(maintenance.restore(run_of(tmp_path))) == 2, (
        "what lacks files is in the archive, whatever the records say"
    )
    assert audit(pp.open(tmp_path), deep=True).findings == []
    assert not list(tmp_path.rglob("*.pack"))


def test_what_is_damaged_in_an_archive_keeps_nothing_else_there(tmp_path):
    weights = trained(tmp_path, epochs=LONGEST_CHAIN + 2, width=2)
    maintenance.archive(run_of(tmp_path))
    *others, last = run_of(tmp_path).manifests()
    path = tmp_path / "runs/r/archive" / f"{last.id}.pack"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(pp.errors.CorruptError, match=f"run 'r' is restored, except for damaged checkpoints.*{last.id}"):
        maintenance.restore(run_of(tmp_path))
    for number, expected in enumerate(weights[:-1]):
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path)["model"]), expected)
    maintenance.remove(run_of(tmp_path), [last], "damaged")
    clean(pp.open(tmp_path))
    assert audit(pp.open(tmp_path), deep=True).findings == []
    assert len(maintenance.archive(run_of(tmp_path))) == len(others)


def test_a_damaged_record_of_an_archive_loses_nothing(tmp_path):
    weights = trained(tmp_path, epochs=2)
    maintenance.archive(run_of(tmp_path))
    record = tmp_path / layout.archived_key("r")
    good = record.read_bytes()
    for bad in (good[:-3], good.replace(b"packed", b"pocked"), b"", seal({"format": 9}), seal({"format": 1, "at": 7})):
        record.write_bytes(bad)
        assert "damage" in {finding.kind for finding in audit(pp.open(tmp_path)).findings}
        clean(pp.open(tmp_path))
        with pytest.raises(pp.ConflictError, match="--restore"):
            maintenance.remove(run_of(tmp_path), run_of(tmp_path).manifests()[:1], "x")
        assert len(maintenance.restore(run_of(tmp_path))) == 2
        assert audit(pp.open(tmp_path), deep=True).findings == []
        maintenance.archive(run_of(tmp_path))
    record.unlink()
    clean(pp.open(tmp_path))
    for number, expected in enumerate(weights):
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path)["model"]), expected)


def rewritten(root, whose, **changes):
    """The pack of a checkpoint with another index, sealed as it should be."""
    path = root / "runs/r/archive" / f"{whose}.pack"
    data = path.read_bytes()
    length = int.from_bytes(data[-16:-8], "little")
    body, index = data[: -16 - length], unseal(data[-16 - length : -16], where="test")
    sealed = seal({**index, **changes})
    path.write_bytes(body + sealed + len(sealed).to_bytes(8, "little") + data[-8:])


def test_hostile_packs_are_refused(tmp_path):
    trained(tmp_path, epochs=3, width=4)
    maintenance.archive(run_of(tmp_path))
    ids = [one.id for one in run_of(tmp_path).manifests()]
    good = {one: (tmp_path / "runs/r/archive" / f"{one}.pack").read_bytes() for one in ids}
    files = read_index(pp.open(tmp_path).store, "r", ids[2]).files
    plain = msgspec.to_builtins(files)
    holes = [{**plain[0], "pieces": plain[0]["pieces"][1:]}, *plain[1:]]
    outside = [{**plain[0], "pieces": [[*piece[:4], 10**12, 1] for piece in plain[0]["pieces"]]}, *plain[1:]]
    other = [{**plain[0], "record": {**plain[0]["record"], "size": 10**15}}, *plain[1:]]
    for changes in (
        {"bases": [ids[2]]},
        {"bases": [ids[1], "../../../etc"]},
        {"bases": []},
        {"checkpoint": ids[0]},
        {"files": holes},
        {"files": outside},
        {"files": other},
        {"files": []},
    ):
        rewritten(tmp_path, ids[2], **changes)
        with pytest.raises((pp.errors.CorruptError, pp.errors.FormatError, pp.errors.ConfigError)):
            pp.load("r:epoch=2", root=tmp_path).verify()
        (tmp_path / "runs/r/archive" / f"{ids[2]}.pack").write_bytes(good[ids[2]])
    rewritten(tmp_path, ids[0], bases=[ids[2]])  # a circle
    with pytest.raises(pp.errors.CorruptError, match="needs itself"):
        pp.load("r:epoch=2", root=tmp_path).verify()
    for bad in ({"format": 9}, {"depth": "deep"}, {"files": 7}):
        rewritten(tmp_path, ids[0], **bad)
        with pytest.raises(pp.errors.FormatError):
            pp.load("r:epoch=0", root=tmp_path).verify()


def test_a_run_that_lacks_a_file_stays_as_it_is(tmp_path):
    trained(tmp_path, epochs=2, width=4)
    (run_of(tmp_path).checkpoints()[1].path / "state.json").unlink()
    with pytest.raises(pp.errors.CorruptError, match="is damaged"):
        maintenance.archive(run_of(tmp_path))
    assert not list(tmp_path.rglob("*.pack"))


def test_a_run_with_a_damaged_checkpoint_stays_as_it_is(tmp_path):
    trained(tmp_path, epochs=4, width=4)
    second = run_of(tmp_path).checkpoints()[1]
    target = second.path / "model.safetensors"
    data = bytearray(target.read_bytes())
    data[-3] ^= 1
    target.write_bytes(data)
    before = files(tmp_path)
    with pytest.raises(pp.errors.CorruptError, match=f"{second.name} is damaged"):
        command("archive", tmp_path, "r")
    assert files(tmp_path) == before
    assert not list(tmp_path.rglob("*.pack"))
    maintenance.remove(run_of(tmp_path), run_of(tmp_path).manifests()[1:2], "damaged")
    assert "3 checkpoints" in command("archive", tmp_path, "r")


def test_a_store_without_directories_can_be_archived(tmp_path):
    store = MemoryStore()
    weights = trained(store, epochs=3)
    done = maintenance.archive(pp.open(store).run("r"))
    assert len(done) == 3
    assert same(dict(pp.load("r:epoch=2", root=store)["model"]), weights[2])
    assert len(maintenance.restore(pp.open(store).run("r"))) == 3
    assert same(dict(pp.load("r:epoch=0", root=store)["model"]), weights[0])


def test_a_run_that_is_being_written_is_left_alone(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        for verb in (maintenance.archive, maintenance.restore):
            with pytest.raises(pp.ConflictError, match=f"process {os.getpid()}"):
                verb(run_of(tmp_path))


def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    trained(tmp_path, epochs=1)
    script = "import sys; sys.modules['zstandard'] = None; from peakpoint.cli.main import run; run()"
    for verb in ([], ["--restore"]):
        done = subprocess.run(
            [sys.executable, "-c", script, "archive", str(tmp_path), "r", *verb],
            capture_output=True,
            text=True,
            check=False,
        )
        if not verb:
            assert done.returncode == 2
            assert "pip install 'peakpoint[archive]'" in done.stderr
            assert "Traceback" not in done.stderr
            maintenance.archive(run_of(tmp_path))
        else:
            assert done.returncode == 2, done.stderr


def test_the_commands_say_what_they_do(tmp_path):
    trained(tmp_path, epochs=3)
    assert "would archive 3 checkpoints" in command("archive", tmp_path, "r", "--dry-run")
    output = command("archive", tmp_path, "r")
    assert "3 checkpoints" in output
    assert "the one before" in output
    assert "r --restore" in output
    assert "nothing to archive" in command("archive", tmp_path, "r")
    assert "archived in" in command("ls", tmp_path)
    assert "packed into" in command("show", tmp_path, "r@latest")
    assert "packed into" in command("explain", tmp_path, "r@latest")
    assert "would restore 3 checkpoints" in command("archive", tmp_path, "r", "--restore", "--dry-run")
    assert "restored 3 checkpoints" in command("archive", tmp_path, "r", "--restore")
    assert "nothing to restore" in command("archive", tmp_path, "r", "--restore")
    command("archive", tmp_path, "r")
