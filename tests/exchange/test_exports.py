"""Export to a file or a Hugging Face folder, and the way back."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import peakpoint as pp
from foreign_files import read_alone, script
from peakpoint.cli.main import cli
from peakpoint.rules.history import history
from training import checkpointer, same


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
    assert read_alone(tmp_path / "a.safetensors").metrics == {}


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


# --- names of wrappers, and masks -------------------------------------------------------------------------------------


def layers(seed=1):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model[0] = compiled(model[0])
    return model


def saved(root, model, run="r"):
    with checkpointer(root, run=run, state={"model": model}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    return model


FORMS = {"safetensors": "x.safetensors", "pth": "x.pth", "hf": "x"}


def written(root, to, *options, form="safetensors"):
    """Export, and read the file as other tools do; returns its tensors and what was printed."""
    folder = ["--as", "hf"] if form == "hf" else []
    printed = invoke("export", root, "r@latest", "--to", to / FORMS[form], *folder, *options)
    if form == "pth":
        return torch.load(to / "x.pth", weights_only=True), printed
    return load_file(to / "x" / "model.safetensors" if form == "hf" else to / "x.safetensors"), printed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [compiled, torch.nn.DataParallel, compiled_inside])
def test_the_names_are_those_of_the_model_without_its_wrapper(tmp_path, wrap, form):
    model = layers()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    saved(tmp_path / "runs", wrap(model))
    with pytest.warns(pp.PeakpointWarning, match="saved from a wrapped model: its names are written without"):
        tensors, _ = written(tmp_path / "runs", tmp_path, form=form)
    assert tensors.keys() == plain.keys()
    assert all(same(tensors[name], value) for name, value in plain.items())
    live = layers(2)
    live.load_state_dict(tensors)
    if form == "pth":  # with the versions of its modules
        assert tensors._metadata == layers().state_dict()._metadata


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(2, 2)


def test_a_layer_of_the_same_name_keeps_it_unless_asked(tmp_path):
    saved(tmp_path / "runs", Own())
    tensors, _ = written(tmp_path / "runs", tmp_path)
    assert set(tensors) == {"module.bias", "module.weight"}
    tensors, _ = written(tmp_path / "runs", tmp_path, "--strip-prefix", "module.", form="pth")
    assert set(tensors) == {"bias", "weight"}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_prefix_may_be_named_although_it_goes_by_itself(tmp_path, prefix):
    saved(tmp_path / "runs", compiled(layers()) if prefix == "_orig_mod." else torch.nn.DataParallel(layers()))
    tensors, _ = written(tmp_path / "runs", tmp_path, "--strip-prefix", prefix)
    assert tensors.keys() == layers().state_dict().keys()


def test_a_prefix_that_no_name_has_is_refused(tmp_path):
    saved(tmp_path / "runs", layers())
    with pytest.raises(pp.errors.ConfigError, match=r"no name in part 'model' begins with 'net\.'"):
        invoke("export", tmp_path / "runs", "r@latest", "--to", tmp_path / "x.pth", "--strip-prefix", "net.")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_folded_into_the_weights(tmp_path, form):
    model = layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=1)
    saved(tmp_path / "runs", model)
    for name in ("0", "2"):
        prune.remove(model.get_submodule(name), "weight")
    tensors, _ = written(tmp_path / "runs", tmp_path, "--fold-masks", form=form)
    assert tensors.keys() == layers().state_dict().keys()
    assert all(same(tensors[name], value) for name, value in model.state_dict().items())
    layers(2).load_state_dict(tensors)


def test_without_masks_there_is_nothing_to_fold(tmp_path):
    saved(tmp_path / "runs", layers())
    with pytest.raises(pp.errors.ConfigError, match=r"part 'model' has no masks of torch\.nn\.utils\.prune"):
        invoke("export", tmp_path / "runs", "r@latest", "--to", tmp_path / "x.pth", "--fold-masks")
    with pytest.raises(pp.errors.ConfigError, match="a card has none"):
        invoke("export", tmp_path / "runs", "r@latest", "--as", "card", "--fold-masks")
