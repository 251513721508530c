"""A finished checkpoint whose manifest or directory is gone is damage, which nobody deletes and everybody names."""

import contextlib
import json
import shlex
import shutil
from datetime import timedelta

import pytest

import peakpoint as pp
from archived_runs import trained
from commands import command, in_process, invoke
from peakpoint.errors import CorruptError
from peakpoint.format import layout
from peakpoint.format.events import Removed
from peakpoint.production.promotion import promote
from peakpoint.production.proposal import propose
from peakpoint.repository import audit, maintenance, reader
from peakpoint.repository.journal import Journal
from peakpoint.repository.lost import damaged_checkpoints
from peakpoint.repository.provenance import utc_now
from training import checkpointer, parts

DAY = timedelta(days=1)


@pytest.fixture
def root(tmp_path):
    """Three checkpoints; the last is the best."""
    trained(tmp_path, epochs=3, keep=[pp.Best("loss", "min"), pp.Last(9)])
    return tmp_path


def state():
    return dict(zip(("model", "optimizer"), parts(width=64), strict=True))


def directories(root):
    return sorted((root / "runs/r/checkpoints").iterdir())


def manifest_of(directory):
    return directory / "manifest.json"


DAMAGE = {
    "missing": lambda directory: manifest_of(directory).unlink(),
    "empty": lambda directory: manifest_of(directory).write_bytes(b""),
    "cut short": lambda directory: manifest_of(directory).write_bytes(manifest_of(directory).read_bytes()[:-20]),
    "no JSON": lambda directory: manifest_of(directory).write_bytes(b"\0" * 500),
    "seal": lambda directory: manifest_of(directory).write_bytes(
        manifest_of(directory).read_bytes().replace(b"1", b"2")
    ),
    "directory": shutil.rmtree,
    "all but the directory": lambda directory: [path.unlink() for path in directory.iterdir()],
}
every_damage = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


def damage_in(root):
    return [(one.where, one.what) for one in audit.audit(pp.open(root)).of_kind("damage")]


@every_damage
def test_what_is_left_is_kept_and_named_by_everybody(root, damage):
    directory = directories(root)[1]
    damage(directory)
    left = sorted(directory.rglob("*"))
    for arguments in (["audit", root], ["audit", root, "--clean"], ["ls", root, "r"], ["report", root, "r"]):
        done = in_process(*arguments)
        assert done.returncode in (12, 23), arguments
        assert directory.name in done.stdout + done.stderr, arguments
    assert in_process("audit", root).returncode == 12
    assert "peakpoint rm" in in_process("audit", root).stdout
    with checkpointer(root, state=state(), keep=[pp.Last(9)]) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match=rf"skipped a checkpoint: .*{directory.name}"):
            assert ckpt.resume().step == 3
        ckpt.report(step=4)
    assert sorted(directory.rglob("*")) == left
    assert [where for where, _ in damage_in(root)] == [f"runs/r/checkpoints/{directory.name}"]


@every_damage
def test_a_ref_names_it_or_passes_over_it_with_a_warning(root, damage):
    directory = directories(root)[2]
    damage(directory)
    with pytest.raises(CorruptError, match=directory.name):
        pp.load(f"r/{directory.name}", root=root)
    for ref in ("r@latest", "r@best:loss"):
        with pytest.warns(pp.PeakpointWarning, match=rf"not considered for {ref}: .*{directory.name}"):
            assert pp.open(root).find(ref).step < 3
    for verb in ("promote", "validate", "explain", "show", "pin"):
        more = {"promote": ["--as", "champion", "--why", "good"], "pin": ["--why", "it is good"]}.get(verb, [])
        done = in_process(verb, root, f"r/{directory.name}", *more)
        assert done.returncode == 12, (verb, done)
        assert directory.name in done.stderr


@every_damage
def test_rm_is_the_way_out(root, damage):
    directory = directories(root)[1]
    ref = f"r/{directory.name}"
    damage(directory)
    if (directory / "manifest.json").exists():
        done = in_process("archive", root, "r")
        assert done.returncode == 12
        assert f"peakpoint rm {root} {ref} --undo-for 0" in done.stderr
    done = in_process("rm", root, ref, "--yes")
    assert done.returncode == 2
    assert "add --undo-for 0" in done.stderr
    assert "nothing is removed yet" in command("rm", root, ref, "--undo-for", "0")
    assert json.loads(command("rm", root, ref, "--undo-for", "0", "--json"))["damaged"].keys() == {ref}
    assert len(damage_in(root)) == 1
    assert "removed 1 checkpoint" in command("rm", root, ref, "--undo-for", "0", "--yes", "--why", "bad disk")
    assert not directory.exists()
    assert audit.audit(pp.open(root)).findings == []
    assert "bad disk" in command("explain", root, "r:2")
    command("archive", root, "r")
    command("archive", root, "r", "--restore")
    assert len(directories(root)) == 2


def test_what_an_alias_points_at_stays(root):
    repository = pp.open(root)
    manifest = repository.run("r").manifests()[1]
    promote(propose(repository, f"r/{manifest.id}", "champion"), "good", force=True)
    manifest_of(directories(root)[1]).write_bytes(b"")
    done = in_process("rm", root, f"r/{manifest.name}", "--undo-for", "0", "--yes")
    assert done.returncode == 20
    assert "was not removed: champion since" in done.stderr
    assert directories(root)[1].exists()


def test_what_the_journal_does_not_know_is_removed_without_its_id(root):
    copy = shutil.copytree(directories(root)[0], directories(root)[0].with_name("copy"))
    command("rm", root, "r/copy", "--undo-for", "0", "--yes")
    assert not copy.exists()
    assert audit.audit(pp.open(root)).findings == []


def test_a_name_that_was_used_again(root):
    directory = directories(root)[1]
    manifest = pp.open(root).find_manifest("r:2")
    shutil.rmtree(directory)
    with checkpointer(root, state=state(), name=directory.name) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="skipped a checkpoint"):
            ckpt.resume()
        ckpt.report(step=7)
    assert pp.open(root).find(f"r/{directory.name}").step == 7
    [(_, what)] = damage_in(root)
    assert f"is another checkpoint, and {manifest.id} is missing" in what
    command("rm", root, f"r/{manifest.id}", "--undo-for", "0", "--yes")
    assert pp.open(root).find(f"r/{directory.name}").step == 7
    assert audit.audit(pp.open(root)).findings == []


def test_the_trash_and_what_came_back_from_it(root):
    run = pp.open(root).run("r")
    manifest = run.manifests()[1]
    maintenance.remove(run, [manifest], "too many", undo_for=DAY)
    assert damage_in(root) == []
    maintenance.undo(run, [manifest.name])
    assert damage_in(root) == []
    manifest_of(directories(root)[1]).unlink()
    assert len(damage_in(root)) == 1
    audit.clean(pp.open(root))
    assert len(damage_in(root)) == 1


def test_a_trash_record_that_is_damaged_can_be_removed(root):
    run = pp.open(root).run("r")
    manifest = run.manifests()[1]
    maintenance.remove(run, [manifest], "too many", undo_for=DAY)
    (directories(root)[1] / "trashed.json").write_bytes(b"{}")
    [(where, what)] = damage_in(root)
    assert (where, "in the trash, and cannot be restored" in what) == (
        layout.checkpoint_prefix("r", manifest.name),
        True,
    )
    audit.clean(pp.open(root))
    assert len(damage_in(root)) == 1
    command("rm", root, f"r/{manifest.name}", "--undo-for", "0", "--yes")
    assert audit.audit(pp.open(root)).findings == []


def segments(root):
    return sorted((root / "runs/r/journal").iterdir())


JOURNALS = {
    "missing": lambda root: [path.unlink() for path in segments(root)],
    "directory missing": lambda root: shutil.rmtree(root / "runs/r/journal"),
    "damaged": lambda root: segments(root)[0].write_bytes(
        segments(root)[0].read_bytes().replace(b'"saved"', b'"sbved"')
    ),
    "a segment missing": lambda root: segments(root)[0].unlink(),
}


@pytest.mark.parametrize("damage", JOURNALS)
def test_a_journal_that_cannot_tell_deletes_nothing(root, damage):
    pp.open(root).run("r").pin("r:1", "so that there is another segment")
    directory = directories(root)[1]
    JOURNALS[damage](root)
    assert any(where == "runs/r/journal" for where, _ in damage_in(root))
    manifest_of(directory).unlink()
    left = sorted(directory.iterdir())
    audit.clean(pp.open(root))
    assert sorted(directory.iterdir()) == left
    assert any("cannot tell whether it was a checkpoint" in what for _, what in damage_in(root))
    command("rm", root, f"r/{directory.name}", "--undo-for", "0", "--yes")
    assert not directory.exists()


def test_incomplete_saves_are_litter_as_ever(root):
    """The journal does not know of them, or says that they failed or were removed."""
    unknown = shutil.copytree(directories(root)[0], directories(root)[0].with_name("unknown"))
    manifest_of(unknown).unlink()
    manifest = pp.open(root).find_manifest("r:2")
    with contextlib.closing(Journal(pp.open(root).store, "r", utc_now)) as journal:
        about = {"checkpoint": manifest.id, "name": manifest.name, "step": manifest.step, "epoch": manifest.epoch}
        journal.append(Removed(at=utc_now(), **about, reason="no rule keeps it", by="rules"))
    manifest_of(directories(root)[1]).unlink()
    findings = audit.audit(pp.open(root)).findings
    assert {(one.kind, one.where) for one in findings} == {
        ("litter", "runs/r/checkpoints/unknown"),
        ("litter", layout.checkpoint_prefix("r", manifest.name)),
    }
    audit.clean(pp.open(root))
    assert len(directories(root)) == 2
    assert audit.audit(pp.open(root)).findings == []


def test_the_command_at_the_end_of_an_audit_ends_the_damage(root):
    manifest_of(directories(root)[0]).unlink()
    shutil.rmtree(directories(root)[1])
    *_, advice = invoke("audit", root).output.strip().splitlines()
    program, *arguments = shlex.split(advice)
    assert (program, arguments[0]) == ("peakpoint", "rm")
    assert invoke(*arguments, "--yes").exit_code == 0
    assert audit.audit(pp.open(root), deep=True).findings == []


def test_a_run_whose_checkpoints_are_all_gone_is_not_begun_anew_in_silence(root):
    shutil.rmtree(root / "runs/r/checkpoints")
    state = dict(zip(("model", "optimizer"), parts(width=64), strict=True))
    with (
        checkpointer(root, state=state) as ckpt,
        pytest.raises(CorruptError, match="no checkpoint of run 'r' is whole"),
    ):
        ckpt.resume()
    with checkpointer(root, state=state, resume="never") as ckpt:
        ckpt.report(step=1)


def test_a_removal_beside_the_look_is_no_loss(root):
    """The directories are read first; the journal, which is read then, knows of every removal before that."""
    run = pp.open(root).run("r")
    listing = reader.list_run(run.store, "r")
    maintenance.remove(run, run.manifests()[:1], "too many")
    with checkpointer(root, state=state()) as ckpt:
        ckpt.resume()
        ckpt.report(step=9)
    assert damaged_checkpoints(run.store, "r", listing) == ()
