"""Archived checkpoints come back bit for bit, are read like others, and never depend on luck."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint import packs, upkeep
from peakpoint.archiving import CHAIN
from peakpoint.audit import audit
from peakpoint.cli.main import cli
from peakpoint.seal import seal, unseal
from peakpoint.store import MemoryStore
from training import checkpointer, parts, same, train


def files(root):
    """Every file of every checkpoint but the records beside the manifest."""
    found = {}
    for path in Path(root).glob("runs/*/checkpoints/*/*"):
        if path.suffix == ".safetensors" or path.name in {"state.json", "manifest.json"}:
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def bytes_on_disk(root):
    """Of checkpoints, hard links once."""
    found = {path.stat().st_ino: path.stat().st_size for path in Path(root).rglob("*.safetensors")}
    return sum(found.values())


def trained(root, epochs=5, keep=None, width=64, **more):
    """A run with a checkpoint an epoch; returns the weights of each."""
    model, optimizer = parts(width=width)
    weights = []
    state = {"model": model, "optimizer": optimizer, **more}
    with checkpointer(root, state=state, keep=keep or [pp.Last(99)]) as ckpt:
        for _ in ckpt.epochs(epochs):
            loss = train(model, optimizer)
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
            ckpt.report(loss=loss)
    return weights


def run_of(root):
    return pp.open(root).run("r")


def archived(root):
    """Whether each checkpoint is."""
    return [not (one.path / "state.json").exists() for one in run_of(root).checkpoints()]


def command(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_archived_and_restored_bit_for_bit(tmp_path):
    backbone = torch.nn.Linear(200, 200).requires_grad_(False)  # a file that checkpoints share
    trained(tmp_path, backbone=backbone)
    before, space = files(tmp_path), bytes_on_disk(tmp_path)
    done, damaged = upkeep.archive(run_of(tmp_path))
    assert damaged == []
    assert [one.bases for one in done][:2] == [0, 1]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert sum(one.packed_bytes for one in done) < 0.5 * sum(one.size_bytes for one in done)
    assert audit(pp.open(tmp_path), deep=True).clean
    assert [one.name for one in upkeep.restore(run_of(tmp_path))] == [one.manifest.name for one in done]
    assert files(tmp_path) == before
    assert bytes_on_disk(tmp_path) < 1.02 * space, "what was shared is shared again"
    assert not (tmp_path / "runs/r/archive").exists()
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_archived_checkpoints_are_read_like_others(tmp_path):
    weights = trained(tmp_path)
    upkeep.archive(run_of(tmp_path))
    for number, expected in enumerate(weights):
        loaded = pp.load(f"r:epoch={number}", root=tmp_path)
        assert same(dict(loaded["model"]), expected)
        assert same(loaded.tensor("model", "0.weight"), expected["0.weight"])
        loaded.verify()
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path, verify=False)["model"]), expected)
    other, _ = parts(seed=9, width=64)
    pp.load("r@latest", root=tmp_path, into=other)
    assert same(dict(other.state_dict()), weights[-1])


def test_a_training_goes_on_from_an_archived_checkpoint(tmp_path):
    expected = trained(tmp_path / "whole", epochs=6)
    trained(tmp_path / "r", epochs=4)
    upkeep.archive(run_of(tmp_path / "r"))
    assert same(trained(tmp_path / "r", epochs=6), expected[4:])
    assert audit(pp.open(tmp_path / "r"), deep=True).findings == []
    assert [one.epoch for one in run_of(tmp_path / "r").checkpoints()] == list(range(6))


def test_rules_remove_archived_checkpoints_and_packs_stay_while_they_are_needed(tmp_path):
    weights = trained(tmp_path, epochs=5)
    upkeep.archive(run_of(tmp_path))
    packed = sorted(path.name for path in (tmp_path / "runs/r/archive").iterdir())
    assert len(packed) == 5
    first, *others = run_of(tmp_path).manifests()
    upkeep.remove(run_of(tmp_path), [first], "a base of the others")
    assert audit(pp.open(tmp_path), deep=True).findings == [], "its pack is still needed"
    for number in range(1, 5):
        assert same(dict(pp.load(f"r:epoch={number}", root=tmp_path)["model"]), weights[number])
    upkeep.remove(run_of(tmp_path), others[1:], "the rest")
    command("audit", tmp_path, "--clean")
    assert len(list((tmp_path / "runs/r/archive").iterdir())) == 2, "one is there, and needs another"
    assert same(dict(pp.load("r:epoch=1", root=tmp_path)["model"]), weights[1])
    upkeep.restore(run_of(tmp_path))
    assert not (tmp_path / "runs/r/archive").exists()


def test_chains_are_bounded(tmp_path):
    trained(tmp_path, epochs=CHAIN + 3, width=2)
    done, _ = upkeep.archive(run_of(tmp_path))
    store = pp.open(tmp_path).store
    depths = [packs.read_index(store, "r", one.manifest.id).depth for one in done]
    assert depths == [*range(1, CHAIN + 1), 1, 2, 3]


@given(st.integers(0, 2**32), st.integers(3, 7))
@settings(max_examples=12, deadline=None)
def test_any_order_of_archiving_removing_and_restoring(tmp_path_factory, seed, epochs):
    """States whose layout changes; subsets archived, removed, restored: what exists is always what was saved."""
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
    for _ in range(6):
        run = pp.open(root).run("r")
        there = list(run.manifests())
        some = dice.sample(there, dice.randint(0, len(there)))
        match dice.choice(["archive", "archive", "restore", "remove"]):
            case "archive":
                assert upkeep.archive(run, some)[1] == []
            case "restore":
                upkeep.restore(run, some)
            case "remove":
                upkeep.remove(run, some[:1], "chance")
        left = {one.step for one in run.checkpoints()}
        assert left == {one.step for one in there} - ({some[0].step} if len(left) < len(there) else set())
        for step in left:
            assert same(dict(pp.load(f"r:{step}", root=root)["model"]), saved[step])
        pp.open(root)
    assert not audit(pp.open(root), deep=True).of_kind("damage")
    upkeep.restore(pp.open(root).run("r"))
    assert not list(root.glob("runs/r/archive/*"))


def test_every_damage_to_a_pack_is_noticed(tmp_path):
    weights = trained(tmp_path, epochs=2, width=4)
    upkeep.archive(run_of(tmp_path))
    first, last = run_of(tmp_path).manifests()
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
            except pp.CorruptError:
                noticed += 1
    assert noticed > len(places), "nearly all of them hurt both"
    for length in (0, 8, 16, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(pp.CorruptError, match=first.id):
            pp.load("r:epoch=1", root=tmp_path)
    path.unlink()
    with pytest.raises(pp.CorruptError, match=r"\.pack is missing"):
        pp.load("r:epoch=1", root=tmp_path)
    assert {finding.kind for finding in audit(pp.open(tmp_path)).findings} == {"damage"}
    with pytest.raises(pp.CorruptError):
        upkeep.restore(run_of(tmp_path))
    path.write_bytes(good)
    assert audit(pp.open(tmp_path), deep=True).findings == []
    assert [one.id for one in upkeep.restore(run_of(tmp_path))] == [first.id, last.id]


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
    upkeep.archive(run_of(tmp_path))
    ids = [one.id for one in run_of(tmp_path).manifests()]
    good = {one: (tmp_path / "runs/r/archive" / f"{one}.pack").read_bytes() for one in ids}
    files = packs.read_index(pp.open(tmp_path).store, "r", ids[2]).files
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
        with pytest.raises((pp.CorruptError, pp.FormatError, pp.ConfigError)):
            pp.load("r:epoch=2", root=tmp_path).verify()
        (tmp_path / "runs/r/archive" / f"{ids[2]}.pack").write_bytes(good[ids[2]])
    rewritten(tmp_path, ids[0], bases=[ids[2]])  # a circle
    with pytest.raises(pp.CorruptError, match="needs itself"):
        pp.load("r:epoch=2", root=tmp_path).verify()
    for bad in ({"format": 9}, {"depth": "deep"}, {"files": 7}):
        rewritten(tmp_path, ids[0], **bad)
        with pytest.raises(pp.FormatError):
            pp.load("r:epoch=0", root=tmp_path).verify()


def test_a_damaged_checkpoint_stays_as_it_is_and_the_others_are_archived(tmp_path):
    trained(tmp_path, epochs=4, width=4)
    second = run_of(tmp_path).checkpoints()[1]
    target = second.path / "model.safetensors"
    data = bytearray(target.read_bytes())
    data[-3] ^= 1
    target.write_bytes(data)
    output = command("archive", tmp_path, "r", code=12)
    assert "3 checkpoints" in output
    assert "not archived" in output
    assert target.read_bytes() == data
    assert archived(tmp_path) == [True, False, True, True]


def test_a_store_without_directories_can_be_archived(tmp_path):
    store = MemoryStore()
    weights = trained(store, epochs=3)
    done, _ = upkeep.archive(pp.open(store).run("r"))
    assert len(done) == 3
    assert same(dict(pp.load("r:epoch=2", root=store)["model"]), weights[2])
    assert len(upkeep.restore(pp.open(store).run("r"))) == 3
    assert same(dict(pp.load("r:epoch=0", root=store)["model"]), weights[0])


def test_a_run_that_is_being_written_is_left_alone(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(step=1)
        ckpt.wait()
        for verb in (upkeep.archive, upkeep.restore):
            with pytest.raises(pp.ConflictError, match=f"process {os.getpid()}"):
                verb(run_of(tmp_path))


def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    trained(tmp_path, epochs=1)
    script = "import sys; sys.modules['zstandard'] = None; from peakpoint.cli.main import run; run()"
    for verb in ("archive", "restore"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, str(tmp_path), "r"], capture_output=True, text=True, check=False
        )
        if verb == "archive":
            assert done.returncode == 2
            assert "pip install 'peakpoint[archive]'" in done.stderr
            assert "Traceback" not in done.stderr
            upkeep.archive(run_of(tmp_path))
        else:
            assert done.returncode == 2, done.stderr


def test_the_commands_say_what_they_do(tmp_path):
    trained(tmp_path, epochs=3)
    assert "would archive 3 checkpoints" in command("archive", tmp_path, "r", "--dry-run")
    assert "1 checkpoint" in command("archive", tmp_path, "r", "r:epoch=1")
    output = command("archive", tmp_path, "r")
    assert "2 checkpoints" in output
    assert "the one before" in output
    assert "nothing to archive" in command("archive", tmp_path, "r")
    assert "archived in" in command("ls", tmp_path)
    assert "in a pack of" in command("show", tmp_path, "r@latest")
    assert "in a pack of" in command("explain", tmp_path, "r@latest")
    assert "restored 1 checkpoint" in command("restore", tmp_path, "r", "r@latest")
    assert "restored 2 checkpoints" in command("restore", tmp_path, "r")
    assert "nothing to restore" in command("restore", tmp_path, "r")
    shutil.copytree(tmp_path / "runs/r", tmp_path / "runs/q")
    with pytest.raises(pp.ConfigError, match="refs of one run"):
        CliRunner().invoke(cli, ["archive", str(tmp_path), "q", "r@latest"], catch_exceptions=False)


def test_keep_can_archive_what_it_would_remove(tmp_path):
    weights = trained(tmp_path, epochs=4)
    output = command("keep", tmp_path, "r", "--rules", "last:1", "--archive", "--yes")
    assert "archived 3 checkpoints" in output
    assert archived(tmp_path) == [True, True, True, False]
    assert same(dict(pp.load("r:epoch=1", root=tmp_path)["model"]), weights[1])
    assert "nothing would go" in command("keep", tmp_path, "r", "--rules", "last:1", "--archive", "--yes")
