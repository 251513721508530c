"""What is changed while somebody looks at it is no damage and no litter, and what is damaged still is."""

import contextlib
from datetime import UTC, datetime, timedelta

import pytest

import peakpoint as pp
from archived_runs import run_of, trained
from peakpoint.format import layout
from peakpoint.format.events import Removed
from peakpoint.production import promotion
from peakpoint.production.proposal import propose
from peakpoint.repository import audit, maintenance, removal
from peakpoint.repository.journal import Journal
from peakpoint.repository.removal import drop_parts
from peakpoint.repository.root import Repository
from peakpoint.rules.retention import Removal
from peakpoint.store import LocalStore
from training import checkpointer, parts

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)


class Meddled(LocalStore):
    """A store in which something happens once, right before a reader asks for a key that ends as is said."""

    def __init__(self, root, end, act):
        super().__init__(root)
        self._end, self._act = end, act

    def _meddle(self, key):
        if self._act is not None and key.endswith(self._end):
            act, self._act = self._act, None
            act()

    def size(self, key):
        self._meddle(key)
        return super().size(key)

    def get(self, key, begin=0, end=None, **limits):
        self._meddle(key)
        return super().get(key, begin, end, **limits)

    def fill(self, key):
        self._meddle(key)
        return super().fill(key)

    def view(self, key):
        self._meddle(key)
        return super().view(key)

    def put(self, key, chunks, size=None):
        self._meddle(f"{key} written")
        super().put(key, chunks, size)
        self._meddle(f"{key} put")

    @property
    def has_meddled(self):
        return self._act is None


def removed(run):
    """By one who has asked before whether somebody reads it."""
    remove(run, run.manifests()[0])


def remove(run, manifest):
    with contextlib.closing(Journal(run.store, run.name, lambda: NOW)) as journal:
        removal.remove(run.store, journal, [Removal(manifest, "why")], by="a test")


def trashed(run):
    maintenance.remove(run, run.manifests()[:1], "why", undo_for=DAY)


def dropped(run):
    drop_parts(run.store, run.manifests()[0], ["optimizer"], at=NOW, why="why", by="a test")


def archived(run):
    maintenance.archive(run)


def restored(run):
    maintenance.restore(run)


def begun_anew(run):
    """Another checkpoint has the name of a removed one."""
    name = run.manifests()[0].name
    removed(run)
    with checkpointer(run.store.root, name=name, resume="never") as ckpt:
        ckpt.report(step=9)


CHANGES = [removed, trashed, dropped, archived, restored, begun_anew]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_an_audit_knows_a_change_from_damage(tmp_path, change, deep):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    if change is restored:
        maintenance.archive(run)
    store = Meddled(tmp_path, "optimizer.safetensors", lambda: change(run))
    result = audit.audit(Repository(store), deep=deep)
    assert store.has_meddled
    assert result.clean, result.findings
    assert audit.audit(pp.open(tmp_path), deep=True).clean


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("change", [trashed, dropped])
def test_an_audit_finds_damage_beside_a_change(tmp_path, change, deep):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    lost = tmp_path / layout.file_key("r", run.manifests()[1].name, "model.safetensors")
    lost.unlink()
    store = Meddled(tmp_path, f"{lost.parent.name}/model.safetensors", lambda: change(run))
    (finding,) = audit.audit(Repository(store), deep=deep).of_kind("damage")
    assert finding.what.endswith("model.safetensors is missing")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", [removed, begun_anew])
def test_a_reader_is_told_that_a_checkpoint_has_just_gone(tmp_path, change, verify):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    name = run.manifests()[0].name
    store = Meddled(tmp_path, "optimizer.safetensors", lambda: change(run))
    with pytest.raises(pp.errors.NotFoundError, match="was removed a moment ago"):
        pp.load(f"r/{name}", root=store, verify=verify)["optimizer"]


def test_a_plan_does_not_count_a_checkpoint_that_has_just_gone_as_damaged(tmp_path):
    trained(tmp_path, epochs=3)
    run = run_of(tmp_path)
    store = Meddled(tmp_path, "state.json", lambda: removed(run))
    plan = Repository(store).run("r").plan([pp.Last(99)])
    assert {claim.rule for claims in plan.keep.values() for claim in claims} <= {"last:99", "protection:newest"}


def test_a_training_passes_over_a_checkpoint_that_goes_while_it_resumes(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    model, optimizer = parts(width=64)
    store = Meddled(tmp_path, "model.safetensors", lambda: remove(run, run.manifests()[-1]))
    with (
        pytest.warns(pp.PeakpointWarning, match="was removed a moment ago"),
        checkpointer(store, state={"model": model, "optimizer": optimizer}) as ckpt,
    ):
        assert ckpt.resume().epoch == 0


def test_the_newest_is_found_while_it_takes_the_place_of_the_one_before(tmp_path):
    state = {"x": 1}
    with checkpointer(tmp_path, state=state, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()

        def go_on():
            ckpt.report(step=2)
            ckpt.wait()

        assert Repository(Meddled(tmp_path, "manifest.json", go_on)).find("r@latest").step == 2


def test_a_removal_by_hand_that_is_at_work_is_no_litter(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    manifest = run.manifests()[0]
    journal = Journal(run.store, "r", lambda: NOW)
    event = Removed(
        at=NOW, checkpoint=manifest.id, name=manifest.name, step=1, epoch=0, reason="why", by="a test", until=None
    )
    journal.append(event)
    run.store.delete(layout.manifest_key("r", manifest.name))
    (finding,) = audit.audit(pp.open(tmp_path)).findings
    assert (finding.kind, "another process" in finding.what) == ("busy", True)
    journal.close()
    (finding,) = audit.audit(pp.open(tmp_path)).findings
    assert finding.kind == "litter", "it was cut short"


def test_what_comes_and_goes_under_an_audit_is_not_found(tmp_path):
    trained(tmp_path, epochs=1)
    directory = tmp_path / layout.checkpoint_prefix("r", "another")
    directory.mkdir()
    (directory / "state.json").touch()
    store = Meddled(tmp_path, "model.safetensors", lambda: audit.clean(pp.open(tmp_path)))
    assert audit.audit(Repository(store)).findings == []


def test_an_audit_follows_an_alias_that_moves(tmp_path):
    trained(tmp_path, epochs=3)
    found = pp.open(tmp_path)
    promotion.promote(propose(found, "r:epoch=0", "champion"), "why", force=True)
    first = found.run("r").manifests()[0]

    def move():
        promotion.promote(propose(found, "r:epoch=1", "champion"), "why", force=True)
        remove(found.run("r"), first)

    store = Meddled(tmp_path, layout.manifest_key("r", first.name), move)
    result = audit.audit(Repository(store))
    assert store.has_meddled
    assert result.clean, result.findings


def test_cleaning_leaves_the_record_of_a_removal_that_is_at_work(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    name = run.manifests()[0].name
    store = Meddled(tmp_path, "trashed.json put", lambda: audit.clean(pp.open(tmp_path)))
    assert maintenance.remove(Repository(store).run("r"), run.manifests()[:1], "why", undo_for=DAY) == []
    assert store.has_meddled
    assert [manifest.name for manifest in maintenance.undo(run, [name])] == [name]


def test_what_is_archived_right_before_it_goes_into_the_trash_stays(tmp_path):
    """Its files would go to no trash: there would be nothing to bring back."""
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    store = Meddled(tmp_path, ".jsonl", lambda: maintenance.archive(run))
    (failure,) = maintenance.remove(Repository(store).run("r"), run.manifests()[:1], "why", undo_for=DAY)
    assert "or the run was archived a moment ago" in failure
    assert store.has_meddled
    assert len(maintenance.restore(run)) == 2


def test_two_that_put_a_checkpoint_into_the_trash_at_once(tmp_path):
    trained(tmp_path, epochs=2)
    run = run_of(tmp_path)
    first = run.manifests()[0]
    store = Meddled(tmp_path, "trashed.json written", lambda: trashed(run))
    assert maintenance.remove(Repository(store).run("r"), [first], "why", undo_for=DAY) == []
    assert store.has_meddled
    assert [manifest.epoch for manifest in run.manifests()] == [1]
    assert audit.audit(pp.open(tmp_path), deep=True).clean
    assert [manifest.id for manifest in maintenance.undo(run, [first.name])] == [first.id]
