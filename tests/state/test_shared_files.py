"""No byte twice: what stands still is not written again and again, and every directory is whole all the same."""

import collections
import copy
import errno
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import peakpoint as pp
from peakpoint.repository.audit import audit
from peakpoint.store import FileOps, LocalStore
from training import checkpointer, kept, same


class Adapted(torch.nn.Module):
    """A backbone that stays as it is, and a head that learns."""

    def __init__(self, width=400):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
        self.norm = torch.nn.BatchNorm1d(width)
        self.head = torch.nn.Linear(width, 2)
        self.backbone.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)))


def parts():
    model = Adapted()
    return model, torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


def step(model, optimizer):
    loss = model(torch.randn(8, 400)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def on_disk(root):
    """Bytes of all files, each once however many names it has."""
    files = {path.stat().st_ino: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return sum(files.values())


def weights_of(checkpoint):
    return {name: t for path in sorted(checkpoint.path.glob("model*")) for name, t in load_file(path).items()}


def test_a_backbone_is_written_once_and_every_directory_is_whole(tmp_path):
    model, optimizer = parts()
    expected = []
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in range(10):
            step(model, optimizer)
            expected.append({name: value.clone() for name, value in model.state_dict().items()})
            ckpt.report()
    found = kept(tmp_path)
    backbone = sum(parameter.nbytes for parameter in model.backbone.parameters())
    changed = sum(one.size_bytes for one in found) - len(found) * (backbone + 4096)
    journals = sum(path.stat().st_size for path in tmp_path.rglob("*.json*") if path.name != "state.json")
    assert on_disk(tmp_path) <= 1.02 * (backbone + changed) + journals
    manifests = [pp.open(tmp_path).find_manifest(f"r/{one.name}") for one in found]
    assert [bool(manifest.file("model+frozen.safetensors").shared) for manifest in manifests] == [False] + [True] * 9
    assert {manifest.file("model+frozen.safetensors").shared for manifest in manifests[1:]} == {found[0].id}
    assert manifests[1].timing["shared_bytes"] > backbone
    assert manifests[1].written_bytes < manifests[1].size_bytes - backbone
    for one, weights in zip(found, expected, strict=True):
        assert weights_of(one).keys() == weights.keys()
        assert all(same(value, weights[name]) for name, value in weights_of(one).items())
        loaded = pp.load(f"r/{one.name}", root=tmp_path)
        assert same(dict(loaded["model"]), weights)
        assert loaded.tensor("model", "backbone.0.weight").shape == (400, 400)
    # removing all but one leaves it whole; audit names what went without a record
    gone = [*found[:4], *found[5:]]
    for one in gone:
        shutil.rmtree(one.path)
    damaged = [finding.where for finding in audit(pp.open(tmp_path), deep=True).findings]
    assert sorted(damaged) == sorted(f"runs/r/checkpoints/{one.name}" for one in gone)
    assert same(dict(pp.load(f"r/{found[4].name}", root=tmp_path)["model"]), expected[4])
    other, others = parts()
    with checkpointer(tmp_path, state={"model": other, "optimizer": others}) as ckpt:
        with pytest.warns(pp.PeakpointWarning) as warned:
            ckpt.resume()
        sentences = [str(warning.message) for warning in warned]
        assert len(sentences) == len(found) - 4, "one for each newer one, and one for all older ones"
        assert sum("4 checkpoints cannot be read (" in sentence for sentence in sentences) == 1
        assert same(dict(other.state_dict()), expected[4])
        ckpt.report(step=99)
    with pytest.warns(pp.PeakpointWarning, match="not considered for r:99: 9 checkpoints cannot be read"):
        newest = pp.open(tmp_path).find_manifest("r:99")
    assert newest.file("model+frozen.safetensors").shared == found[0].id


def test_bytes_that_changed_are_written(tmp_path):
    model, optimizer = parts()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.report(step=1)
        with torch.no_grad():
            model.backbone[0].bias[3] += 1
        ckpt.report(step=2)
        ckpt.report(step=3)
        optimizer.add_param_group({"params": list(model.backbone.parameters())})  # unfrozen
        model.backbone.requires_grad_(True)
        step(model, optimizer)
        ckpt.report(step=4)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    shared = [
        [file.name for file in pp.open(tmp_path).find_manifest(f"r:{number}").files if file.shared]
        for number in (1, 2, 3, 4)
    ]
    assert shared == [[], [], ["model.safetensors", "model+frozen.safetensors"], []], "nothing was trained before r:3"
    assert same(pp.load("r:1", root=tmp_path)["model"]["backbone.0.bias"] + torch.eye(400)[3], expected_bias(tmp_path))
    assert not list(kept(tmp_path)[3].path.glob("*frozen*"))
    assert same(dict(pp.load("r:4", root=tmp_path)["model"]), expected)


def expected_bias(root):
    return pp.load("r:2", root=root)["model"]["backbone.0.bias"]


class Unlinking(FileOps):
    """A file system that refuses hard links of data."""

    def __init__(self, error):
        self.error = error

    def link(self, source, target, *at):
        if "frozen" in str(source):
            raise OSError(self.error, os.strerror(self.error))
        super().link(source, target, *at)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_where_there_are_no_links_the_bytes_are_written(tmp_path, error):
    model, optimizer = parts()
    store = LocalStore(tmp_path, Unlinking(error))
    with checkpointer(store, state={"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.report(step=1)
        ckpt.report(step=2)
    assert not any(file.shared for file in pp.open(tmp_path).find_manifest("r:2").files)
    assert same(dict(pp.load("r:2", root=tmp_path)["model"]), dict(model.state_dict()))


def test_a_part_that_is_all_frozen_keeps_its_plain_name(tmp_path):
    teacher = torch.nn.Linear(300, 300).requires_grad_(False)
    model, optimizer = parts()
    with checkpointer(tmp_path, state={"teacher": teacher, "model": model, "optimizer": optimizer}) as ckpt:
        ckpt.report(step=1)
        ckpt.report(step=2)
    last = kept(tmp_path)[-1]
    assert last.parts["teacher"] == ("teacher.safetensors",)
    assert pp.open(tmp_path).find_manifest("r:2").file("teacher.safetensors").shared
    assert same(load_file(last.path / "teacher.safetensors")["weight"], teacher.weight)


def test_without_an_optimizer_nothing_is_called_frozen(tmp_path):
    with checkpointer(tmp_path, state={"model": Adapted()}) as ckpt:
        ckpt.report()
    assert kept(tmp_path)[0].parts["model"] == ("model.safetensors",)


# --- what stands still, whatever it is -------------------------------------------------------------------------------


class Mixed(torch.nn.Module):
    """A table that never changes, a head that learns, a weight without gradient, one with a learning rate of 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("table", torch.randn(500, 512))
        self.idle = torch.nn.Parameter(torch.randn(300, 512))
        self.slow = torch.nn.Parameter(torch.randn(200, 512))
        self.head = torch.nn.Parameter(torch.randn(400, 512))

    def forward(self):
        return (self.head.sum() + self.slow.sum() + self.table.sum()).pow(2)


def mixed():
    model = Mixed()
    rates = [{"params": [model.idle, model.head]}, {"params": [model.slow], "lr": 0.0}]
    return model, torch.optim.SGD(rates, lr=1e-6)


def learn(model, optimizer):
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


def copied(state):
    return {
        name: copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)
        for name, value in state.items()
    }


def plain(tree):
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray):
        return tree.dtype.str, tree.shape, tree.tobytes()
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def assert_holds(checkpoint, expected, root):
    """The checkpoint is what was saved, through this package and through stock safetensors."""
    assert same(plain(dict(pp.load(f"r/{checkpoint.name}", root=root))), plain(expected)), checkpoint.name
    weights = {name: t for path in checkpoint.path.glob("model*.safetensors") for name, t in load_file(path).items()}
    assert weights.keys() == expected["model"].keys()
    assert all(same(value, expected["model"][name]) for name, value in weights.items()), checkpoint.name


def times_written(root):
    """How many checkpoints wrote each tensor, rather than sharing the file that it is in."""
    times = collections.Counter()
    for one in kept(root):
        manifest = pp.open(root).find_manifest(f"r/{one.name}")
        for part, files in manifest.parts.items():
            for file in map(manifest.file, files):
                times.update({f"{part}.{tensor.name}": not file.shared for tensor in file.tensors})
    return dict(times)


def test_how_often_what_stands_still_is_written(tmp_path):
    model, optimizer = mixed()
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"model": model, "optimizer": optimizer, "mean": mean}
    expected = []
    with checkpointer(tmp_path, state=state) as ckpt:
        for _ in range(6):
            learn(model, optimizer)
            expected.append(copied(state))
            ckpt.report()
    times = times_written(tmp_path)
    # the table at once and again in a file of its own, then once more when what optimizers own is let in; that, whose
    # version counters prove nothing, only when two digests have been the same; a part as a whole needs no other file
    whole = {f"mean.{name}": 1 for name in mean}
    assert times == {"model.table": 3, "model.idle": 3, "model.slow": 3, "model.head": 6, **whole}
    sizes = {name: value.nbytes for name, value in model.state_dict().items()}
    bytes_written = 3 * (sizes["table"] + sizes["idle"] + sizes["slow"]) + 6 * sizes["head"]
    bytes_written += sum(value.nbytes for value in mean.values())
    assert bytes_written <= on_disk(tmp_path) <= 1.02 * bytes_written
    for one, held in zip(kept(tmp_path), expected, strict=True):
        assert_holds(one, held, tmp_path)
    # and after a restart it goes on so
    other, others = mixed()
    means = {name: torch.zeros_like(value) for name, value in mean.items()}
    with checkpointer(tmp_path, state={"model": other, "optimizer": others, "mean": means}) as ckpt:
        ckpt.resume()
        for _ in range(2):
            learn(other, others)
            ckpt.report()
    assert times_written(tmp_path) == {**times, "model.head": 8}
    assert audit(pp.open(tmp_path), deep=True).clean


def test_a_table_that_never_changes_is_written_twice(tmp_path):
    model, optimizer = mixed()
    del model.idle
    optimizer.param_groups[0]["params"] = [model.head]
    optimizer.param_groups[1]["lr"] = 1e-6
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in range(6):
            learn(model, optimizer)
            ckpt.report()
    assert times_written(tmp_path) == {"model.table": 2, "model.slow": 6, "model.head": 6}


def test_moments_of_what_is_no_longer_trained_are_written_three_times_more(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Linear(200, 200))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # which moves no version counter
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for number in range(9):
            if number == 3:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            model(torch.randn(8, 200)).pow(2).mean().backward()
            optimizer.step()
            expected = copied(ckpt.state)
            ckpt.report()
    times = times_written(tmp_path)
    # saves 1 to 3 while it learns; the fourth and fifth find the same digest twice, the sixth moves it
    assert {times[f"model.{name}"] for name in ("0.weight", "0.bias")} == {5}
    assert {times[f"optimizer.state.{n}.{name}"] for n in (0, 1) for name in ("exp_avg", "exp_avg_sq")} == {5}
    assert {times[f"model.{name}"] for name in ("1.weight", "1.bias")} == {9}
    assert_holds(kept(tmp_path)[-1], expected, tmp_path)


@pytest.mark.parametrize("overlap", [True, False])
def test_standing_still_changing_and_standing_still_again(tmp_path, overlap):
    model, optimizer = mixed()
    state = {"model": model, "optimizer": optimizer, "extra": {"t": torch.randn(200, 512), "n": torch.zeros(100, 512)}}
    expected = []
    with checkpointer(tmp_path, state=state, overlap=overlap) as ckpt:
        for number in range(30):
            learn(model, optimizer)
            state["extra"]["n"] += 1
            if number in (5, 6, 12):
                ckpt.wait()  # weights may not change outside step() while they are copied
                with torch.no_grad():
                    model.idle.mul_(2)
                    state["extra"]["t"].mul_(2)
            expected.append(copied(state))
            ckpt.report()
    for one, held in zip(kept(tmp_path), expected, strict=True):
        assert_holds(one, held, tmp_path)
    layouts = [
        tuple(tensor.name for tensor in pp.open(tmp_path).find_manifest(f"r/{one.name}").files[1].tensors)
        for one in kept(tmp_path)
    ]
    moves = sum(one != other for one, other in itertools.pairwise(layouts))
    assert moves <= 7, "in, in, out, in, out, in: files do not flap"
    assert set(layouts[-1]) == {"table", "idle", "slow"}


def test_changes_behind_the_back_of_version_counters_are_kept(tmp_path):
    model, optimizer = mixed()
    mean = {"a": torch.randn(300, 512), "b": torch.randn(300, 512)}
    state = {"model": model, "optimizer": optimizer, "mean": mean}
    expected = []
    with checkpointer(tmp_path, state=state) as ckpt:
        for number in range(12):
            learn(model, optimizer)
            ckpt.wait()
            if number in (3, 4, 7):
                model.table.data[7, 7] += 1
                model.idle.data += 1
                mean["a"].data.mul_(0.5)
            if number in (5, 9):
                mean["b"].numpy()[3] = number
            expected.append(copied(state))
            ckpt.report()
    for one, held in zip(kept(tmp_path), expected, strict=True):
        assert_holds(one, held, tmp_path)


def schedule_state():
    """Every kind of holder: parameters, buffers, tied weights, views that overlap, arrays, tensors in dicts."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    for number in range(3):
        model.register_parameter(f"p{number}", torch.nn.Parameter(torch.randn(40, 256)))
        model.register_buffer(f"b{number}", torch.randn(40, 256))
    model.tied = model.p0
    base = torch.randn(80, 256)
    model.register_buffer("low", base[:50])
    model.register_buffer("high", base[30:])
    optimizer = torch.optim.SGD([model.p0, model.p1], lr=0.1, momentum=0.9)
    extra = {"t": torch.randn(40, 256), "u": torch.randn(40, 256), "array": np.arange(20_000.0), "empty": torch.ones(0)}
    return {"model": model, "optimizer": optimizer, "extra": extra, "plain": {"x": torch.randn(40, 256)}}


def change(state, what, how):
    """Change one tensor of the state, in one of many ways."""
    model, extra = state["model"], state["extra"]
    if what == "array":
        extra["array"][5] += 1
        return
    if what in ("p0", "p1") and how == "step":
        for parameter in (model.p0, model.p1):
            parameter.grad = None
        getattr(model, what).grad = torch.ones(40, 256)
        state["optimizer"].step()
        return
    holder = extra if what in extra else state["plain"] if what == "x" else None
    tensor = getattr(model, what) if holder is None else holder[what]
    with torch.no_grad():
        if how == "silent":
            tensor.data[3, 3:5] += 1
        elif how == "same":
            tensor.copy_(tensor.clone())
        elif how == "replace" and holder is not None:
            holder[what] = tensor + 1
        elif how == "replace":
            tensor.data = tensor.data + 1
        elif how == "fresh" and holder is not None:
            holder[what] = tensor.clone()
        else:
            tensor[2, 5:].mul_(1.5)


names = st.sampled_from(["p0", "p1", "p2", "b0", "b1", "b2", "low", "high", "t", "u", "x", "array"])
ways = st.sampled_from(["write", "silent", "same", "replace", "fresh", "step"])
moments = st.tuples(st.lists(st.tuples(names, ways), max_size=3), st.sampled_from(["go on"] * 5 + ["restart"]))


@settings(deadline=None, max_examples=25)
@given(st.lists(moments, min_size=4, max_size=9), st.sets(st.integers(0, 8)), st.booleans())
def test_any_tensors_may_change_at_any_time(schedule, gone, overlap):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        state, expected = schedule_state(), []
        ckpt = checkpointer(root, state=state, overlap=overlap)
        ckpt.resume()
        for changes, then in schedule:
            if then == "restart":
                ckpt.close()
                state = schedule_state()
                ckpt = checkpointer(root, state=state, overlap=overlap)
                ckpt.resume()
            ckpt.wait()  # weights may not change outside step() while they are copied
            for what, how in changes:
                change(state, what, how)
            expected.append(copied(state))
            ckpt.report(step=len(expected))
        ckpt.close()
        found = kept(root)
        for number in gone & set(range(len(found))):
            shutil.rmtree(found[number].path)
        for number, (one, held) in enumerate(zip(found, expected, strict=True)):
            if number not in gone:
                assert same(plain(dict(pp.load(f"r/{one.name}", root=root))), plain(held)), number
                for path in one.path.glob("*.safetensors"):
                    load_file(path)
        damaged = {Path(finding.where).name for finding in audit(pp.open(root), deep=True).findings}
        assert damaged == {found[number].name for number in gone & set(range(len(found)))}, (
            "what went, and nothing else"
        )


def test_through_a_ring_nothing_is_shared_and_a_later_process_may_share(tmp_path):
    expected = []
    for capture_bytes in ("1 MiB", None, "1 MiB"):
        model, optimizer = mixed()
        state = {"model": model, "optimizer": optimizer, "mean": {"a": torch.randn(300, 512)}}
        with checkpointer(tmp_path, state=state, capture_bytes=capture_bytes) as ckpt:
            ckpt.resume()
            for _ in range(3):
                learn(model, optimizer)
                expected.append(copied(state))
                ckpt.report(step=len(expected))
    for one, held in zip(kept(tmp_path), expected, strict=True):
        assert_holds(one, held, tmp_path)
    shared = [
        any(file.shared for file in pp.open(tmp_path).find_manifest(f"r/{one.name}").files) for one in kept(tmp_path)
    ]
    assert shared == [False] * 3 + [False, True, True] + [False] * 3
