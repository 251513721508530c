"""Export to a file or a Hugging Face folder, and the way back."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peakpoint as pp
from foreign_files import script
from peakpoint.cli.main import cli
from peakpoint.rules.history import history
from training import same


def invoke(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    script(folder / "script")
    pp.import_checkpoints(folder / "script", folder / "root", run="r")
    return folder / "root"


def test_a_file_that_was_exported_comes_back_the_same(root, tmp_path):
    for to, parts in (("a.pth", ["model", "optimizer", "scheduler", "extra"]), ("b.safetensors", ["model"])):
        invoke(
            "export", root, "r:epoch=2", "--to", tmp_path / to, *[word for part in parts for word in ("--part", part)]
        )
    with (tmp_path / "a.pth").open("rb"):
        pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "back", run="r")
        pp.import_checkpoints(tmp_path / "b.safetensors", tmp_path / "back", run="s")
    there, back = pp.load("r:epoch=2", root=root), pp.load("r@latest", root=tmp_path / "back")
    for part in ("model", "optimizer", "scheduler"):
        assert same(back[part], there[part])
    weights = pp.load("s@latest", root=tmp_path / "back")["model"]
    assert weights.keys() == there["model"].keys()
    assert all(same(weights[name], tensor) for name, tensor in there["model"].items())


def test_a_safetensors_file_says_which_checkpoint_it_is(root, tmp_path):
    invoke("export", root, "r:epoch=2", "--to", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        told = file.metadata()
    there = pp.open(root).run("r").manifests()[2]
    assert told == {
        "format": "pt",
        "written_by": "peakpoint",
        "run": "r",
        "name": there.name,
        "epoch": "2",
        "step": "6",
        "metrics": json.dumps(dict(there.metrics)),
    }
    pp.import_checkpoints(tmp_path / "b.safetensors", tmp_path / "back", run="s", link=True)
    [back] = pp.open(tmp_path / "back").run("s").manifests()
    assert (back.epoch, back.step, back.metrics) == (2, 6, there.metrics)
    assert (tmp_path / "b.safetensors").stat().st_nlink == 2, "its tensors can be read in place"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": "x"}', "[" * 100_000])
def test_other_metadata_called_metrics_is_none(text, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", {"metrics": text})
    pp.import_checkpoints(tmp_path / "a.safetensors", tmp_path / "root", run="r")
    assert pp.open(tmp_path / "root").run("r").latest().metrics == {}


@pytest.mark.parametrize("shard", ["5 GB", "100 B"])
def test_a_folder_of_hugging_face_and_back(shard, root, tmp_path):
    (tmp_path / "c.json").write_text('{"model_type": "net", "width": 4}')
    invoke(
        "export",
        root,
        "r:epoch=2",
        "--to",
        tmp_path / "hf",
        "--as",
        "hf",
        "--shard",
        shard,
        "--config",
        tmp_path / "c.json",
    )
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    weights = {}
    if shard == "5 GB":
        assert files == ["README.md", "config.json", "model.safetensors", "trainer_state.json"]
        assert "## How to load it" in (tmp_path / "hf" / "README.md").read_text()
        weights = load_file(tmp_path / "hf" / "model.safetensors")
    else:
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        for name, place in index["weight_map"].items():
            weights[name] = load_file(tmp_path / "hf" / place)[name]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        sizes = [load_file(tmp_path / "hf" / place) for place in set(index["weight_map"].values())]
        assert all(len(one) == 1 or sum(tensor.nbytes for tensor in one.values()) <= 100 for one in sizes)
    there = pp.load("r:epoch=2", root=root)["model"]
    assert weights.keys() == there.keys()
    assert all(same(weights[name], tensor) for name, tensor in there.items())
    pp.import_checkpoints(tmp_path / "hf", tmp_path / "back", run="r")
    run, origin = pp.open(tmp_path / "back").run("r"), pp.open(root).run("r")
    assert (run.latest().epoch, run.latest().step) == (2, 6)
    expected = history(origin.events(), origin.find("r:epoch=2").id)
    assert [(one.epoch, one.step, one.metrics) for one in run.history()] == [
        (one.epoch, one.step, one.metrics) for one in expected
    ]
    loaded = pp.load("r@latest", root=tmp_path / "back")
    assert all(same(loaded["model"][name], tensor) for name, tensor in there.items())
    assert loaded["extra"]["config"] == {"model_type": "net", "width": 4}
    invoke("export", tmp_path / "back", "r@latest", "--to", tmp_path / "again", "--as", "hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"model_type": "net", "width": 4}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "noformat"], 2, "or .pt; for a folder, say --as hf"),
        (["--to", "m.onnx"], 2, "must end with .safetensors, .pth or .pt"),
        (["--to", "hf", "--as", "hf", "--config", "none.json"], 10, "does not exist"),
        (["--to", "hf", "--as", "hf", "--config", "notes.txt"], 13, "not JSON"),
        (["--to", "hf", "--as", "hf", "--part", "optimizer"], 2, "export it to .pth"),
        (["--to", "no/hf", "--as", "hf"], 10, "make it first"),
        (["--to", ".", "--as", "hf"], 11, "exists"),
        (["--to", "hf", "--as", "hf", "--shard", "x"], 2, "number of bytes"),
        (["--to", "hf"], 2, "must end with"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(arguments, code, words, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("width: 4")
    with pytest.raises(pp.Error, match=re.escape(words)) as caught:
        invoke("export", root, "r@latest", *arguments)
    assert caught.value.exit_code == code
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
