"""Parts that no rule needs are dropped; whatever a rule needs stays, also through crashes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint import rules as rules_module
from peakpoint.format.manifest import FileRecord
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.removal import drop_parts
from peakpoint.repository.trash import dropped_parts
from peakpoint.rules.retention import plan, protections
from strategies import DIGEST, START, manifest, one_rule, trees
from training import checkpointer, kept, parts, same, train

NEEDS = st.sampled_from(["", ":parts=a", ":parts=a+b", ":parts=c", ":parts=zz"])
KEEP = [pp.Best("acc", "max", parts="model"), pp.Last(2)]


def run(root, accuracies, keep=KEEP, **options):
    model, optimizer = parts()
    weights = {}
    with checkpointer(root, state={"model": model, "optimizer": optimizer}, keep=keep, **options) as ckpt:
        ckpt.resume()
        for step, accuracy in enumerate(accuracies, 1):
            train(model, optimizer)
            weights[step] = {name: value.clone() for name, value in model.state_dict().items()}
            ckpt.report(step=step, acc=accuracy)
            ckpt.wait()
    return weights


def test_a_best_loses_its_optimizer_and_keeps_its_weights(tmp_path):
    weights = run(tmp_path, [0.1, 0.9, 0.2, 0.3, 0.4])
    found = {one.step: one for one in kept(tmp_path)}
    assert {step: list(one.parts) for step, one in found.items()} == {
        2: ["model", "rng", "loop"],
        4: ["model", "optimizer", "rng", "loop"],
        5: ["model", "optimizer", "rng", "loop"],
    }
    assert found[2].size_bytes < found[5].size_bytes
    assert sorted(path.name for path in found[2].path.iterdir()) == [
        "dropped-1.json",
        "manifest.json",
        "model.safetensors",
        "state.json",
    ]
    loaded = pp.load("r:2", root=tmp_path)
    assert list(loaded) == ["model"]
    assert same(dict(loaded["model"]), weights[2])
    other, others = parts(seed=5)
    pp.load("r:2", root=tmp_path, into=other)
    assert same(dict(other.state_dict()), weights[2])
    with pytest.raises(pp.errors.NotFoundError, match="no part 'optimizer'"):
        pp.load("r:2", root=tmp_path, into=others, part="optimizer")
    assert audit(pp.open(tmp_path), deep=True).clean
    (record,) = dropped_parts(pp.open(tmp_path).store, "r", found[2].name)
    assert record.parts == ("optimizer",)
    assert "do not need optimizer" in record.why
    loaded.close()
    # and it can be removed like any other
    run(tmp_path, [0.95, 0.1, 0.1], resume="auto")
    assert found[2].path.exists() is False


def test_a_run_does_not_continue_from_what_is_not_whole(tmp_path):
    run(tmp_path, [0.9, 0.2, 0.3])
    for one in kept(tmp_path)[1:]:
        (one.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(pp.errors.CorruptError, match=r"(?s)no checkpoint of run 'r' is whole.*optimizer were dropped"):
        run(tmp_path, [0.5])


def test_a_pin_keeps_a_checkpoint_whole(tmp_path):
    model, optimizer = parts()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}, keep=KEEP) as ckpt:
        for step, accuracy in enumerate([0.9, 0.1, 0.2, 0.3], 1):
            train(model, optimizer)
            ckpt.report(step=step, acc=accuracy)
            ckpt.wait()
            if step == 1:
                pp.open(tmp_path).run("r").pin("r:1", "whole")
    assert "optimizer" in kept(tmp_path)[0].parts


@pytest.mark.parametrize("wrong", ["modle", ("model", "x"), "optimiser"])
def test_a_slip_in_the_name_of_a_part_is_refused(tmp_path, wrong):
    with pytest.raises(pp.errors.ConfigError, match="needs a part"):
        checkpointer(tmp_path, state={"model": torch.nn.Linear(1, 1)}, keep=[pp.Last(1, parts=wrong)])
    for bad in ((), 3, ("",), "a b"):
        with pytest.raises(pp.errors.ConfigError):
            pp.Last(1, parts=bad)


def test_what_a_crash_left_of_a_dropped_part_is_litter(tmp_path):
    run(tmp_path, [0.9, 0.2])
    store = pp.open(tmp_path).store
    one = pp.open(tmp_path).find_manifest("r:1")
    path = kept(tmp_path)[0].path / "optimizer.safetensors"
    data = path.read_bytes()
    left = drop_parts(store, one, ["optimizer"], at=START, why="test", by="test")
    assert pp.open(tmp_path).find_manifest("r:1") == left
    path.write_bytes(data)  # as if the process had died before the file went
    found = audit(pp.open(tmp_path), deep=True)
    assert [finding.what for finding in found.of_kind("litter")] == ["a file of a part that was dropped"]
    assert not found.of_kind("damage") + found.of_kind("foreign")
    clean(pp.open(tmp_path))
    assert not path.exists()
    assert audit(pp.open(tmp_path), deep=True).clean


@settings(max_examples=200)
@given(
    trees(),
    st.lists(st.tuples(one_rule, st.sampled_from(["", ":parts=a", ":parts=a+b", ":parts=c", ":parts=zz"])), max_size=4),
)
def test_what_a_rule_needs_is_never_dropped_and_a_plan_is_idempotent(tree, drawn):
    rules = [rules_module.parse(rule.text + needs) for rule, needs in drawn]
    manifests = [
        manifest(
            id=moment.id,
            sequence=moment.sequence,
            step=moment.step,
            epoch=moment.epoch,
            metrics=moment.metrics,
            created_at=moment.created_at,
            forks=moment.forks,
            parts={"a": ("a.s",), "b": ("b.s",), "c": (), "rng": (), "loop": ()},
            files=tuple(FileRecord(name=name, size=7, digest=DIGEST) for name in ("a.s", "b.s", "state.json")),
        )
        for moment in tree.records
    ]
    made = plan(manifests, rules)
    claimed = [(rule, rule.claims(manifests)) for rule in rules]
    protected = protections(manifests, {})
    for thinning in made.drop:
        one = thinning.manifest
        assert one.id not in protected
        for rule, found in claimed:
            if one.id in found:
                assert rule.needs is not None
                assert not set(rule.needs) & set(thinning.parts)
        assert set(thinning.parts) < {"a", "b", "c"}
    lost = {thinning.manifest.id: thinning.parts for thinning in made.drop}
    after = [manifest_without(one, lost.get(one.id, ())) for one in manifests if one.id in made.keep]
    again = plan(after, rules)
    assert again.remove == ()
    assert again.drop == ()


def manifest_without(one, gone):
    return replace(one, parts={part: files for part, files in one.parts.items() if part not in gone})
