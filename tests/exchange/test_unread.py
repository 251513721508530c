"""Import: of what is not read, the error says what it is and the way there."""

import re
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch

import peakpoint as pp
from foreign_files import Net
from peakpoint.exchange import pickles
from peakpoint.exchange.sources import find
from training import QuietCheckpointer

HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(64)


def files(place, **contents):
    for name, content in contents.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return place


KINDS = {
    "Keras": {"model.keras": b"PK", "m.weights.h5": HDF5, "tf_model.h5": HDF5},
    "GGUF": {"m.gguf": b"GGUF\x03"},
    "NumPy": {"a.npz": b"PK"},
    "ONNX": {"a.onnx": b"\x08"},
    "TensorFlow checkpoint": {"ckpt-1.data-00000-of-00001": b"", "v/saved_model.pb": b""},
    "Orbax": {"1/_CHECKPOINT_METADATA": b"{}", "2/default/manifest.ocdbt": b""},
    "Flax": {"flax_model.msgpack": b""},
    "torch.export": {"a.pt2": b"PK"},
    "PaddlePaddle": {"a.pdparams": b""},
    "lacks its .metadata": {"__0_0.distcp": b""},
    "one rank": {"pytorch_model_fsdp_rank0.bin": b"", "optimizer_0_rank1.bin": b""},
    "one process": {"model+frozen+rank0.safetensors": b"", "model+rank1.safetensors": b""},
    "one of the shards": {"net-00001-of-00002.safetensors": b"", "a-2-of-10.bin": b""},
}


@pytest.mark.parametrize(("words", "name"), [(words, name) for words, names in KINDS.items() for name in names])
def test_kinds_are_known_by_their_names(words, name, tmp_path):
    files(tmp_path / "in", **{name: KINDS[words][name], "README.md": b""})
    for path in (tmp_path / "in", tmp_path / "in" / name):
        with pytest.raises(
            pp.errors.FormatError, match=rf"{re.escape(name.rpartition('/')[2])} is .*{words}|is .*: .*{words}"
        ) as caught:
            find(path)
        assert "not read: " in str(caught.value)


def test_kinds_beside_checkpoints_are_noted(tmp_path):
    files(tmp_path / "in", **{"a.gguf": b"", "b.gguf": b"", "c.onnx": b""})
    torch.save(Net().state_dict(), tmp_path / "in" / "a.pth")
    report = pp.import_checkpoints(tmp_path / "in", tmp_path / "root", run="r")
    said = [note for note in report.notes if "which is not read" in note]
    assert [note.partition(" ")[0] for note in said] == ["a.gguf", "c.onnx"], "one of each kind"
    assert len(report.others) == 3


def test_kinds_are_known_by_what_is_in_them(tmp_path):
    (tmp_path / "h.bin").write_bytes(HDF5)
    (tmp_path / "g.bin").write_bytes(b"GGUF\x03" + bytes(64))
    np.savez(tmp_path / "n.npz", a=np.ones(2))
    (tmp_path / "n.npz").rename(tmp_path / "n.pt")
    with zipfile.ZipFile(tmp_path / "k.pt", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does not want to be asked for these any more
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), tmp_path / "s.pt")
        program = torch.export.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),))
        torch.export.save(program, tmp_path / "e.pt2")
    (tmp_path / "e.pt2").rename(tmp_path / "e.pt")
    words = {
        "h.bin": "Keras",
        "g.bin": "GGUF",
        "n.pt": "NumPy",
        "k.pt": "Keras",
        "s.pt": "TorchScript",
        "e.pt": "torch.export",
    }
    for name, word in words.items():
        with pytest.raises(pp.errors.FormatError, match=rf"{name} is .*{word}.*not read: "):
            pickles.load(tmp_path / name)


@pytest.fixture
def root(tmp_path):
    model = Net()
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
    with QuietCheckpointer(tmp_path / "root", run="mine", state=state, keep=[pp.Last(2)]) as ckpt:
        for step in (1, 2):
            ckpt.report(step=step, loss=1.0)
    return tmp_path / "root"


def test_what_is_of_peakpoint_needs_no_import(root, tmp_path):
    [first, _] = pp.open(root).run("mine").checkpoints()
    for path, words in {
        root: "is a repository of Peakpoint",
        root / "runs" / "mine": "is a run of Peakpoint, which needs no import: copy the folder to ROOT/runs/mine",
        root / "runs": "is a run of Peakpoint",
        first.path: "is a checkpoint in a run of Peakpoint",
        first.path.parent: "is a checkpoint in a run of Peakpoint",
    }.items():
        with pytest.raises(pp.errors.FormatError, match=words):
            pp.import_checkpoints(path, tmp_path / "other", run="r")
    assert not (tmp_path / "other").exists()


def test_the_advice_to_copy_a_run_is_good(root, tmp_path):
    model = Net()
    with QuietCheckpointer(tmp_path / "other", run="theirs", state={"model": model}, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=1, loss=1.0)
    shutil.copytree(root / "runs" / "mine", tmp_path / "other" / "runs" / "mine")
    pp.load("mine@latest", root=tmp_path / "other", into=model)
    assert len(pp.open(tmp_path / "other").run("mine").checkpoints()) == 2
