"""What is removed can be brought back for the time that was said, and takes its space no longer than that."""

import json
import shlex
from datetime import UTC, datetime, timedelta

import pytest

import peakpoint as pp
from archived_runs import bytes_on_disk, epochs, files, run_of, trained
from commands import command, on_terminal
from peakpoint.format import layout
from peakpoint.format.events import Opened, Removed
from peakpoint.format.sealed import seal
from peakpoint.repository import maintenance, removal
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.removal import remove
from peakpoint.rules.retention import Removal
from training import checkpointer, parts, same, train

DAY = timedelta(days=1)


class Clock:
    """Tells the time that it is set to."""

    def __init__(self):
        self.now = datetime(2026, 3, 1, tzinfo=UTC)

    def __call__(self):
        return self.now


def test_removed_and_brought_back_bit_for_bit(tmp_path):
    trained(tmp_path)
    before = files(tmp_path)
    name = run_of(tmp_path).find("r:epoch=1").name
    assert "removed 1 checkpoint" in command("rm", tmp_path, "r:epoch=1", "--yes", "--why", "a mistake")
    assert epochs(tmp_path) == [0, 2, 3, 4]
    with pytest.raises(pp.errors.NotFoundError):
        pp.load("r:epoch=1", root=tmp_path)
    assert audit(pp.open(tmp_path), deep=True).findings == []
    assert "a mistake" in command("undo", tmp_path, "--list")
    assert "in the trash until" in command("explain", tmp_path, "r:epoch=1")
    assert f"r/{name} is restored" in command("undo", tmp_path, f"r/{name}")
    assert files(tmp_path) == before
    assert epochs(tmp_path) == [0, 1, 2, 3, 4]
    assert "trash is empty" in command("undo", tmp_path, "--list")
    assert "exists" in command("explain", tmp_path, "r:epoch=1")
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_rules_put_into_the_trash_and_back(tmp_path):
    weights = trained(tmp_path)
    listed = json.loads(command("keep", tmp_path, "r", "--rules", "last:1", "--yes", "--json"))
    assert len(listed["goes"]) == 4
    found = json.loads(command("undo", tmp_path, "--list", "--json"))
    assert len(found["trash"]) == 4
    back = json.loads(command("undo", tmp_path, *[one["ref"] for one in found["trash"]], "--json"))
    assert len(back["back"]) == 4
    for number, expected in enumerate(weights):
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path)["model"]), expected)


def test_nothing_is_kept_when_the_space_is_wanted_at_once(tmp_path):
    trained(tmp_path)
    space = bytes_on_disk(tmp_path)
    output = command("keep", tmp_path, "r", "--rules", "last:1", "--yes", "--undo-for", "0")
    assert "cannot be undone" in output
    assert bytes_on_disk(tmp_path) < 0.3 * space
    assert "trash is empty" in command("undo", tmp_path, "--list")


def test_when_the_time_is_over_the_space_is_free(tmp_path):
    clock = Clock()
    trained(tmp_path)
    run = run_of(tmp_path)
    first, second = run.manifests()[:2]
    maintenance.remove(run, [first], "why", undo_for=DAY, clock=clock)
    maintenance.remove(run, [second], "why", undo_for=2 * DAY, clock=clock)
    assert [one.manifest.id for one in maintenance.in_trash(run, clock=clock)] == [first.id, second.id]
    clock.now += DAY
    assert [one.manifest.id for one in maintenance.in_trash(run, clock=clock)] == [second.id]
    (finding,) = audit(pp.open(tmp_path), clock=clock).findings
    assert (finding.kind, "could be restored until" in finding.what) == ("litter", True)
    with pytest.raises(pp.errors.NotFoundError, match="is not in the trash"):
        maintenance.undo(run, [first.name], clock=clock)
    assert [one.what for one in clean(pp.open(tmp_path), clock=clock)] == [finding.what]
    assert not (tmp_path / layout.checkpoint_prefix("r", first.name)).exists()
    assert (tmp_path / layout.checkpoint_prefix("r", second.name)).exists()
    assert maintenance.undo(run, [second.id[:6]], clock=clock)[0].name == second.name
    assert audit(pp.open(tmp_path), deep=True, clock=clock).findings == []


def test_the_trash_is_emptied_when_somebody_says_so(tmp_path):
    trained(tmp_path)
    command("rm", tmp_path, "r:epoch=0", "r:epoch=1", "--yes", "--undo-for", "30d")
    with pytest.raises(pp.errors.ConfigError, match="add --yes"):
        command("undo", tmp_path, "--empty")  # nobody can be asked
    on_terminal(80, "undo", tmp_path, "--empty", answer="n\n", code=pp.errors.ConfigError.exit_code)
    assert len(maintenance.in_trash(pp.open(tmp_path).run("r"))) == 2
    shown = on_terminal(80, "undo", tmp_path, "--empty", answer="y\n")
    assert any("permanently deleted 2 checkpoints" in line for line in shown)
    assert maintenance.in_trash(pp.open(tmp_path).run("r")) == []


def test_the_trash_can_be_emptied(tmp_path):
    trained(tmp_path)
    command("rm", tmp_path, "r:epoch=0", "r:epoch=1", "--yes", "--undo-for", "30d")
    told = command("explain", tmp_path, "r:epoch=0")
    assert f"peakpoint undo {shlex.quote(str(tmp_path))} r/" in told
    assert "permanently deleted 2 checkpoints" in command("undo", tmp_path, "--empty", "--yes")
    told = command("explain", tmp_path, "r:epoch=0")
    assert "permanently deleted" in told
    assert "undo" not in told
    assert json.loads(command("explain", tmp_path, "r:epoch=0", "--json"))["in_trash"] is False
    assert len(list((tmp_path / "runs/r/checkpoints").iterdir())) == 3


def test_a_training_keeps_what_its_rules_remove(tmp_path):
    clock = Clock()
    model, optimizer = parts()
    keep = [pp.Best("acc", "max", parts="model"), pp.Last(1)]
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(tmp_path, state=state, keep=keep, undo_for="1h", clock=clock) as ckpt:
        for step, accuracy in enumerate([0.9, 0.1, 0.2, 0.3], 1):
            train(model, optimizer)
            ckpt.report(step=step, acc=accuracy)
            ckpt.wait()
            clock.now += timedelta(minutes=25)
    run = run_of(tmp_path)
    assert [one.step for one in run.checkpoints()] == [1, 4]
    there = maintenance.in_trash(run, clock=clock)
    assert [one.manifest.step for one in there] == [2, 3]
    maintenance.undo(run, [there[1].manifest.name], clock=clock)
    assert [one.step for one in run.checkpoints()] == [1, 3, 4]
    assert sorted(pp.load("r:3", root=tmp_path)) == ["model", "optimizer"]
    assert sorted(pp.load("r:1", root=tmp_path)) == ["model"]


def test_parts_that_rules_drop_are_gone_at_once(tmp_path):
    clock = Clock()
    model, optimizer = parts()
    keep = [pp.Best("acc", "max", parts="model"), pp.Last(1)]
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(tmp_path, state=state, keep=keep, undo_for="1h", clock=clock) as ckpt:
        for step, accuracy in enumerate([0.9, 0.1], 1):
            train(model, optimizer)
            ckpt.report(step=step, acc=accuracy)
            ckpt.wait()
    run = run_of(tmp_path)
    assert "optimizer" not in run.find("r:1").parts
    assert not (run.find("r:1").path / "optimizer.safetensors").exists()
    assert maintenance.in_trash(run, clock=clock) == []
    with pytest.raises(pp.errors.NotFoundError, match="is not in the trash"):
        maintenance.undo(run, [run.find("r:1").name], clock=clock)
    assert audit(pp.open(tmp_path), deep=True, clock=clock).findings == []


@pytest.mark.parametrize("whole", [True, False])
def test_parts_that_earlier_code_dropped_for_a_while_come_back_with_restore(tmp_path, whole):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    first = run.find("r:epoch=0")
    optimizer = (first.path / "optimizer.safetensors").read_bytes()
    until = datetime.now(UTC) + DAY
    record = {"format": 1, "parts": ["optimizer"], "files": ["optimizer.safetensors"], "at": until - DAY, "why": "x"}
    (first.path / "dropped-1.json").write_bytes(seal({**record, "by": "y", "until": until}))
    if not whole:
        (first.path / "optimizer.safetensors").write_bytes(optimizer[:-1] + bytes([optimizer[-1] ^ 1]))
    assert "optimizer" not in run.find("r:epoch=0").parts
    assert [one.name for one in maintenance.restore(run)] == [first.name] * whole
    assert ("optimizer" in pp.load("r:epoch=0", root=tmp_path)) is whole
    assert not audit(pp.open(tmp_path), deep=True).of_kind("damage")


@pytest.mark.parametrize("harm", ["a bit", "a file"])
def test_what_is_damaged_in_the_trash_is_named_and_does_not_come_back(tmp_path, harm):
    trained(tmp_path, epochs=3)
    run = run_of(tmp_path)
    first, second = run.manifests()[:2]
    maintenance.remove(run, [first, second], "why", undo_for=DAY)
    path = tmp_path / layout.file_key("r", first.name, "model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data) if harm == "a bit" else path.unlink()
    (finding,) = audit(pp.open(tmp_path), deep=True).findings
    assert (finding.kind, finding.where) == ("damage", layout.file_key("r", first.name, "model.safetensors"))
    with pytest.raises(pp.errors.CorruptError, match="Nothing was restored"):
        maintenance.undo(run, [second.name, first.name])
    assert len(run.manifests()) == 1
    assert [manifest.name for manifest in maintenance.undo(run, [second.name])] == [second.name]


def test_pins_and_names_after_a_return(tmp_path):
    trained(tmp_path)
    run = run_of(tmp_path)
    first = run.manifests()[0]
    maintenance.remove(run, [first], "why", undo_for=DAY)
    with checkpointer(tmp_path, resume="never", name="{epoch:04d}") as ckpt:
        ckpt.report(step=1)
    assert first.name not in {one.name for one in run.manifests()}
    maintenance.undo(run, [first.name])
    run.pin(f"r/{first.name}", "wanted after all")
    assert run.pinned() == {first.id: "wanted after all"}
    assert first.id in {one.id for one in run.manifests()}


def killed_while_removing(root):
    """A run whose training was killed between the record of the trash and the end of the manifest."""
    trained(root, epochs=3)
    run = run_of(root)
    first, store = run.manifests()[0], pp.open(root).store
    journal = Journal(store, "r", utc_now)
    until = utc_now() + timedelta(days=1)
    journal.append(Opened(at=utc_now(), by={}, rules=("last:1",)))
    about = {"checkpoint": first.id, "name": first.name, "step": first.step, "epoch": first.epoch}
    journal.append(Removed(at=utc_now(), reason="why", by="rules", until=until, **about))
    journal.close()
    with pytest.raises(OSError, match="killed"):
        removal.move_to_trash(Killing(store), first, until=until, at=utc_now(), why="why", by="rules")
    return run


class Killing:
    """A store whose process dies when a manifest is to be deleted."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def delete(self, key):
        if key.endswith("manifest.json"):
            raise OSError("killed")
        self._store.delete(key)


def test_what_a_killed_training_was_removing_is_cleaned(tmp_path):
    run = killed_while_removing(tmp_path)
    litter = audit(pp.open(tmp_path)).of_kind("litter")
    assert [one.what for one in litter] == ["the record of an interrupted removal"]
    clean(pp.open(tmp_path))
    assert audit(pp.open(tmp_path), deep=True).clean
    assert len(run.manifests()) == 3


def test_a_run_whose_training_was_killed_while_removing_is_archived(tmp_path):
    run = killed_while_removing(tmp_path)
    assert len(maintenance.archive(run)) == 3
    assert len(run.manifests()) == 3


def test_a_removal_that_was_cut_short_leaves_the_checkpoint(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    first = run.manifests()[0]
    text = run.store.get(layout.manifest_key("r", first.name))
    removal.move_to_trash(run.store, first, until=datetime.now(UTC) + DAY, at=datetime.now(UTC), why="x", by="y")
    run.store.create(layout.manifest_key("r", first.name), text)  # as if it had not been deleted
    assert first.id in {one.id for one in run.manifests()}
    (finding,) = audit(pp.open(tmp_path)).findings
    assert "interrupted" in finding.what
    assert maintenance.in_trash(run) == []
    journal = Journal(run.store, "r", lambda: datetime.now(UTC))
    assert remove(run.store, journal, [Removal(first, "again")], by="z", until=datetime.now(UTC) + DAY) == {}
    journal.close()
    assert [one.record.why for one in maintenance.in_trash(run)] == ["again"]


def test_a_damaged_record_is_damage_and_stays(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    first = run.manifests()[0]
    maintenance.remove(run, [first], "why", undo_for=DAY)
    path = tmp_path / layout.trashed_key("r", first.name)
    good = path.read_bytes()
    for bad in (good[:-9], good.replace(b"why", b"who"), b"", seal({"format": 1, "manifest": 7})):
        path.write_bytes(bad)
        assert {finding.kind for finding in audit(pp.open(tmp_path)).findings} == {"damage"}
        clean(pp.open(tmp_path))
        assert (path.parent / "model.safetensors").exists()
        with pytest.raises(pp.errors.NotFoundError):
            maintenance.undo(run, [first.name])
    path.write_bytes(good)
    maintenance.undo(run, [first.name])
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_wrong_input(tmp_path):
    trained(tmp_path, epochs=2)
    for arguments in (["undo", tmp_path, "r"], ["rm", tmp_path, "r@latest", "--undo-for", "soon"]):
        with pytest.raises(pp.errors.ConfigError):
            command(*arguments)
    with pytest.raises(pp.errors.NotFoundError, match="no run"):
        command("undo", tmp_path, "q/x")
    with pytest.raises(pp.errors.NotFoundError, match="is not in the trash"):
        command("undo", tmp_path, "r/x")
    with pytest.raises(pp.errors.ConfigError, match="is not a time span"):
        checkpointer(tmp_path, undo_for="a while")
