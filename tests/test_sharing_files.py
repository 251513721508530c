"""No byte twice: frozen parameters are written once, and every directory is whole all the same."""

import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import peakpoint as pp
from peakpoint.audit import audit
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
    # removing all but one leaves it whole
    for one in [*found[:4], *found[5:]]:
        shutil.rmtree(one.path)
    assert audit(pp.open(tmp_path), deep=True).clean
    assert same(dict(pp.load(f"r/{found[4].name}", root=tmp_path)["model"]), expected[4])
    other, others = parts()
    with checkpointer(tmp_path, state={"model": other, "optimizer": others}) as ckpt:
        ckpt.resume()
        assert same(dict(other.state_dict()), expected[4])
        ckpt.report(step=99)
    assert pp.open(tmp_path).find_manifest("r:99").file("model+frozen.safetensors").shared == found[0].id


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

    def link(self, source, target):
        if "frozen" in str(source):
            raise OSError(self.error, os.strerror(self.error))
        super().link(source, target)


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
