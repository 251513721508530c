"""Damage and malice: every changed bit is noticed, and no file can make Peakpoint do more than refuse it."""

import ast
import base64
import copy
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peakpoint as pp
from commands import in_process
from foreign_files import bombs, with_pickle
from peakpoint.format.manifest import MANIFEST, decode_manifest, encode_manifest
from peakpoint.store import MemoryStore
from training import QuietCheckpointer

DAMAGED = (pp.errors.CorruptError, pp.errors.FormatError)
UNFIT = (*DAMAGED, pp.errors.MismatchError)


def build(seed=1):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "twister": np.random.RandomState(seed),
        "philox": np.random.Generator(np.random.Philox(seed)),
        "python": random.Random(seed),
        "torch": torch.Generator().manual_seed(seed),
        "values": {"a": [1, 2.5, (3,)], "array": np.arange(300.0) + seed, 5: "five"},
    }


def checkpointer(root, state, **options):
    return QuietCheckpointer(root, run="r", state=state, keep=[pp.Last(9)], **options)


def save(root, *seeds):
    for seed in seeds:
        with checkpointer(root, build(seed), resume="never", name=f"c{seed}") as ckpt:
            ckpt.report(step=seed, loss=0.5)


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A repository with the checkpoints c1 and c2, never changed."""
    root = tmp_path_factory.mktemp("master")
    save(root, 1, 2)
    return root


@pytest.fixture
def root(master, tmp_path):
    return Path(shutil.copytree(master, tmp_path / "repository"))


def folder(root, name="c2"):
    return root / "runs" / "r" / "checkpoints" / name


@pytest.fixture
def alone(root):
    """The repository with c2 only."""
    shutil.rmtree(folder(root, "c1"))
    return root


def load_everything(root, ref="r/c2"):
    """Whatever a user does with a checkpoint, in one go."""
    return dict(pp.load(ref, root=root))


def noticed(root):
    """Whether loading says that something is damaged; any other error passes through."""
    try:
        load_everything(root)
    except DAMAGED:
        return True
    return False


# --- damage -------------------------------------------------------------------------------------------------------


def regions(root):
    """File name to the first bytes of its parts: header, padding, each tensor, JSON, seal."""
    manifest = pp.open(root).find_manifest("r/c2")
    found = {MANIFEST: []}
    for file in manifest.files:
        found[file.name] = [file.header + tensor.begin for tensor in file.tensors]
    return found


def positions(root, per_file=70):
    """Every region of every file at its edges, and a sample between them."""
    chosen = random.Random(7)
    for name, starts in regions(root).items():
        size = (folder(root) / name).stat().st_size
        edges = {0, 1, 7, 8, 9, size // 2, size - 30, size - 20, size - 2, size - 1, *starts}
        edges |= {start - 1 for start in starts if start}
        sample = chosen.sample(range(size), min(size, per_file))
        yield from ((name, position) for position in sorted({*edges, *sample}))


def test_every_flipped_bit_is_noticed(alone):
    """In the weights, the headers and their padding, the tree, and the manifest: none is silent, none is a crash."""
    flips = list(positions(alone))
    assert len(flips) >= 300
    assert {name for name, _ in flips} == {path.name for path in folder(alone).iterdir()}
    chosen = random.Random(3)
    load_everything(alone)
    for name, position in flips:
        path = folder(alone) / name
        intact = path.read_bytes()
        bit = 1 << chosen.randrange(8)
        path.write_bytes(intact[:position] + bytes([intact[position] ^ bit]) + intact[position + 1 :])
        assert noticed(alone), f"bit {bit} of byte {position} of {name} was flipped and nobody noticed"
        path.write_bytes(intact)
    load_everything(alone)


def test_every_bit_of_one_byte(alone):
    for name, starts in regions(alone).items():
        path = folder(alone) / name
        intact = path.read_bytes()
        position = starts[-1] if starts else len(intact) // 3
        for bit in range(8):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ (1 << bit)]) + intact[position + 1 :])
            with pytest.raises(DAMAGED):
                load_everything(alone)
        path.write_bytes(intact)


def test_a_damaged_checkpoint_changes_no_live_object(root):
    path = folder(root) / "optimizer.safetensors"  # read after the model's file, which is good
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    live = build(5)
    before = copy.deepcopy(live["model"].state_dict())
    with pytest.raises(pp.errors.CorruptError, match=r"tensor '.*' in optimizer\.safetensors"):
        pp.load("r/c2", root=root, into={"model": live["model"], "optimizer": live["optimizer"]})
    for name, value in live["model"].state_dict().items():
        assert torch.equal(value, before[name])


def test_resuming_passes_over_the_damaged_one_and_says_so(root):
    path = folder(root) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    live = build(5)
    with (
        checkpointer(root, live) as ckpt,
        pytest.warns(pp.PeakpointWarning, match=r"skipped a checkpoint: .*c2 is damaged.*model\.safetensors"),
    ):
        report = ckpt.resume()
    assert report.step == 1
    assert torch.equal(live["model"][0].weight, build(1)["model"][0].weight)


def test_when_all_are_damaged_resuming_raises(root):
    for name in ("c1", "c2"):
        (folder(root, name) / "state.json").write_bytes(b"{}")
    live = build(5)
    before = live["model"][0].weight.detach().clone()
    with (
        checkpointer(root, live) as ckpt,
        pytest.raises(pp.errors.CorruptError, match="no checkpoint of run 'r' is whole"),
    ):
        ckpt.resume()
    assert torch.equal(live["model"][0].weight, before)


FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "values.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(alone, name):
    path = folder(alone) / name
    intact = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(intact) // 2, len(intact) - 4096, len(intact) - 2):
        if 0 <= length < len(intact):
            path.write_bytes(intact[:length])
            with pytest.raises(DAMAGED):
                load_everything(alone)


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_file_that_lacks_its_last_byte(root, name):
    path = folder(root) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(pp.errors.CorruptError, match=rf"{name} has \d+ bytes instead of \d+"):
        load_everything(root)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("more", [b"\x00", b" ", b"}", bytes(4096)], ids=["NUL", "space", "brace", "page"])
def test_extended_files(alone, name, more):
    path = folder(alone) / name
    with path.open("ab") as file:
        file.write(more)
    with pytest.raises(DAMAGED, match=r"damaged|corrupt"):
        load_everything(alone)


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_missing_files(root, name):
    (folder(root) / name).unlink()
    with pytest.raises(pp.errors.CorruptError, match=f"c2 is damaged: {name} is missing"):
        load_everything(root)


def test_a_checkpoint_that_has_lost_its_manifest_is_not_said_to_be_missing(root):
    (folder(root) / MANIFEST).unlink()
    with pytest.raises(pp.errors.CorruptError, match=r"c2 has lost its manifest\.json"):
        load_everything(root)
    with pytest.warns(pp.PeakpointWarning, match=r"not considered for r@latest: .*c2 has lost its manifest\.json"):
        assert pp.load("r@latest", root=root)["values"][5] == "five"


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_files_swapped_between_checkpoints(root, name):
    one, two = folder(root, "c1") / name, folder(root, "c2") / name
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert first != second
    for ref in ("r/c1", "r/c2"):
        with pytest.raises(pp.errors.CorruptError, match="damaged"):
            load_everything(root, ref)


def test_files_swapped_within_a_checkpoint(root):
    one, two = folder(root) / "model.safetensors", folder(root) / "optimizer.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(pp.errors.CorruptError):
        load_everything(root)


def test_a_manifest_in_another_directory(root):
    shutil.copy(folder(root, "c1") / MANIFEST, folder(root, "c2") / MANIFEST)
    assert [checkpoint.name for checkpoint in pp.open(root).run("r").checkpoints()] == ["c1"]
    live = build(5)
    with checkpointer(root, live) as ckpt, pytest.warns(pp.PeakpointWarning, match="renamed or copied"):
        assert ckpt.resume().step == 1
    shutil.rmtree(folder(root, "c1"))
    with pytest.raises(pp.errors.CorruptError, match=r"belongs to r/c1; the directory was renamed or copied"):
        load_everything(root)


@pytest.mark.parametrize("ref", ["r/c2"])
def test_a_checkpoint_whose_manifest_is_damaged_is_not_said_to_be_missing(root, ref):
    """It is there, and damaged: to say that there is none of that name sends the user looking elsewhere."""
    path = folder(root) / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(pp.errors.CorruptError, match="c2"):
        load_everything(root, ref)


def test_a_copied_directory_is_no_checkpoint(root):
    shutil.copytree(folder(root, "c1"), folder(root, "c3"))
    with pytest.raises(pp.errors.CorruptError, match="renamed or copied"):
        load_everything(root, "r/c3")
    assert load_everything(root, "r/c1")["values"][5] == "five"
    with pytest.warns(pp.PeakpointWarning, match="renamed or copied"):
        assert pp.open(root).run("r").latest().name == "c2"
    live = build(5)
    with checkpointer(root, live) as ckpt, pytest.warns(pp.PeakpointWarning, match="renamed or copied"):
        assert ckpt.resume().step == 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"{}",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"PK\x03\x04",
        b'{"format":1}\n',
        b'{"seal":"0000000000000000"}\n',
    ],
    ids=repr,
)
def test_a_manifest_that_is_none(root, text):
    for name in ("c1", "c2"):
        (folder(root, name) / MANIFEST).write_bytes(text)
    with pytest.raises(DAMAGED):
        load_everything(root)
    live = build(5)
    with checkpointer(root, live) as ckpt, pytest.raises(pp.errors.CorruptError):
        ckpt.resume()


# --- malice: whoever can write files can also fix every digest and seal -------------------------------------------


def reseal(root, *, name="c2", state=None, **changes):
    """Replace the tree or fields of the manifest, with every digest and seal in order."""
    path = folder(root, name) / MANIFEST
    manifest = decode_manifest(path.read_bytes())
    if state is not None:
        (folder(root, name) / "state.json").write_bytes(state)
        from peakpoint.format.sealed import digest

        files = tuple(
            replace(file, size=len(state), digest=digest(state)) if file.name == "state.json" else file
            for file in manifest.files
        )
        manifest = replace(manifest, files=files)
    path.write_bytes(encode_manifest(replace(manifest, **changes)))


def tree_of(root, name="c2"):
    return json.loads((folder(root, name) / "state.json").read_bytes())


def attempt(root, expected=UNFIT):
    """Load everything, into nothing and into live objects, and resume; returns whether anything was refused.

    Only the errors that say so may come out of any of it.
    """
    refused = 0
    live = build(5)

    def resume():
        with checkpointer(root, live, resume="r/c2") as ckpt:
            ckpt.resume()

    for act in (
        lambda: dict(pp.load("r/c2", root=root)),
        lambda: pp.load("r/c2", root=root, into={name: live[name] for name in ("model", "optimizer", "scheduler")}),
        resume,
    ):
        try:
            act()
        except expected:
            refused += 1
    return refused


def test_the_resealed_checkpoint_is_otherwise_good(root):
    """The control: what the tests below change is what makes the difference."""
    reseal(root, state=(folder(root) / "state.json").read_bytes())
    assert attempt(root) == 0
    reseal(root, state=json.dumps(tree_of(root)).encode())
    assert attempt(root) == 0


TEXTS = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"5",
    "text": b'"parts"',
    "empty": b"{}",
    "no parts": b'{"format":1,"rng":{},"loop":{}}',
    "parts a list": b'{"format":1,"parts":[],"rng":{},"loop":{}}',
    "parts a text": b'{"format":1,"parts":"model","rng":{},"loop":{}}',
    "parts a number": b'{"format":1,"parts":7,"rng":{},"loop":{}}',
    "parts null": b'{"format":1,"parts":null,"rng":null,"loop":null}',
    "parts empty": b'{"format":1,"parts":{},"rng":{},"loop":{}}',
    "not UTF-8": b'{"format":1,"parts":{"\xff":1}}',
    "cut short": b'{"format":1,"parts":{"model":',
    "pickle": b"\x80\x04\x95\x10\x00",
    "deep lists": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "deep part": b'{"format":1,"parts":{"model":' + b"[" * 900 + b"]" * 900 + b'},"rng":{},"loop":{}}',
    "huge number": b'{"format":1,"parts":{"model":' + b"9" * 5000 + b'},"rng":{},"loop":{}}',
    "huge exponent": b'{"format":1,"parts":{"model":1e999999},"rng":{},"loop":{}}',
    "newer format": b'{"format":2,"parts":{},"rng":{},"loop":{}}',
    "no format": b'{"parts":{},"rng":{},"loop":{}}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_tree_that_is_none(root, text):
    reseal(root, state=text)
    assert attempt(root) >= 2  # a tree of fewer parts can be loaded into nothing


@pytest.mark.parametrize("text", [TEXTS["newer format"], TEXTS["no format"]], ids=["newer", "none"])
def test_a_tree_of_another_format_is_refused_always(root, text):
    reseal(root, state=text)
    assert attempt(root, expected=pp.errors.FormatError) == 3


F8 = base64.b64encode(bytes(8)).decode()
HOSTILE = {
    "unknown type": {"$": "pickle", "v": "gASV"},
    "module": {"$": "os.system", "v": "true"},
    "type is a list": {"$": ["tuple"], "v": []},
    "type is null": {"$": None},
    "type only": {"$": "tensor"},
    "missing tensor": {"$": "tensor", "name": "nowhere"},
    "tensor of another part": {"$": "tensor", "name": "state.0.exp_avg"},
    "name is a dict": {"$": "tensor", "name": {}},
    "stride beyond memory": {"$": "tensor", "name": "0.weight", "stride": [10**15, 10**14]},
    "stride without end": {"$": "tensor", "name": "0.weight", "stride": [2**62, 2**62]},
    "negative stride": {"$": "tensor", "name": "0.weight", "stride": [-2, 1]},
    "stride of zero": {"$": "tensor", "name": "0.weight", "stride": [0, 1]},
    "view beyond": {
        "$": "tensor",
        "name": "0.weight",
        "view": {"dtype": "F32", "shape": [10**9], "stride": [1], "offset": 0},
    },
    "view before": {
        "$": "tensor",
        "name": "0.weight",
        "view": {"dtype": "F32", "shape": [1], "stride": [1], "offset": -400},
    },
    "view of strides beyond": {
        "$": "tensor",
        "name": "0.weight",
        "view": {"dtype": "U8", "shape": [2, 2], "stride": [2**40, 1], "offset": 0},
    },
    "view of nothing known": {
        "$": "tensor",
        "name": "0.weight",
        "view": {"dtype": "object", "shape": [], "stride": [], "offset": 0},
    },
    "array of objects": {"$": "ndarray", "dtype": "|O", "shape": [1], "v": F8},
    "structured array of objects": {
        "$": "ndarray",
        "dtype": base64.b64encode(b"[('a', 'O')]").decode(),
        "shape": [1],
        "v": F8,
    },
    "dtype with code": {
        "$": "ndarray",
        "dtype": base64.b64encode(b"__import__('os').abort()").decode(),
        "shape": [1],
        "v": F8,
    },
    "dtype, deep": {"$": "numpy.dtype", "v": base64.b64encode(b"[" * 5000 + b"]" * 5000).decode()},
    "array too large": {"$": "ndarray", "dtype": "<f8", "shape": [10**15], "v": F8},
    "array of negative size": {"$": "ndarray", "dtype": "<f8", "shape": [-1, -1], "v": F8},
    "set of lists": {"$": "set", "v": [[1]]},
    "dict with a list as key": {"$": "dict", "v": [[[1], 2]]},
    "dict of one": {"$": "dict", "v": [[1]]},
    "factory": {"$": "defaultdict", "factory": "eval", "v": {}},
    "device": {"$": "torch.device", "v": "moon"},
    "zone outside": {"$": "datetime", "v": "2020-01-01", "zone": "../../../../etc/passwd", "fold": 0},
    "zone a directory": {"$": "datetime", "v": "2020-01-01", "zone": "America", "fold": 0},
    "offset without end": {"$": "datetime", "v": "2020-01-01", "zone": [10**18, 0], "fold": 0},
    "time without end": {"$": "timedelta", "v": [10**18, 0, 0]},
    "Decimal": {"$": "Decimal", "v": "1e"},
    "bytes": {"$": "bytes", "v": "*"},
    "float": {"$": "float", "v": "00"},
    "path": {"$": "path", "class": "system", "v": "x"},
    "deque": {"$": "deque", "maxlen": 10**30, "v": []},
    "mapping is a list": {"$": "OrderedDict", "v": [1]},
    "metadata is a number": {"$": "OrderedDict", "v": {}, "metadata": 5},
}


@pytest.mark.parametrize("node", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("part", ["model", "values"])
def test_hostile_nodes(root, node, part):
    tree = tree_of(root)
    tree["parts"][part] = {"inside": [node]}
    reseal(root, state=json.dumps(tree).encode())
    if node.get("name") == "0.weight" and part == "values":
        node = dict(node, name="array")
    with pytest.raises(pp.errors.FormatError):
        dict(pp.load("r/c2", root=root))
    # parts that are asked for on their own do not depend on it
    assert attempt(root) == (3 if part == "model" else 2)


WRONG_PARTS = {
    "null": None,
    "number": 5,
    "huge": 10**18,
    "text": "state",
    "list": [1, [2]],
    "empty": {},
    "numbers": {"state": 5, "param_groups": 5},
    "lists": {"state": [1], "param_groups": [1, 2]},
    "nulls": {"state": None, "param_groups": None},
    "groups of nothing": {"state": {}, "param_groups": [{}]},
    "groups of numbers": {"state": {}, "param_groups": [{"params": 5}]},
    "params of lists": {"state": {}, "param_groups": [{"params": [[0], [1], [2], [3]]}]},
    "state of lists": {"state": {"$": "dict", "v": [[0, [1]]]}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    "state of numbers": {"state": {"$": "dict", "v": [[0, 5]]}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    "generator": {"generator": 5},
    "short generator": {"generator": {"$": "bytes", "v": F8}},
    "bit generator": {"bit_generator": "MT19937", "state": {"key": [1], "pos": 10**9}},
    "another bit generator": {"bit_generator": "PCG64", "state": 5},
}
PARTS = ["model", "optimizer", "scheduler", "twister", "philox", "python", "torch"]


@pytest.mark.parametrize("value", WRONG_PARTS.values(), ids=WRONG_PARTS)
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_the_wrong_kind(root, part, value):
    """Resuming either raises an error of ours or restores; an object that takes anything may take this too."""
    tree = tree_of(root)
    tree["parts"][part] = value
    reseal(root, state=json.dumps(tree).encode())
    refused = attempt(root)
    if part != "scheduler":  # which takes any dict
        assert refused >= 1


@pytest.mark.parametrize("part", ["model", "optimizer", "values"])
def test_parts_that_the_manifest_names_and_the_tree_has_not(root, part):
    tree = tree_of(root)
    del tree["parts"][part]
    reseal(root, state=json.dumps(tree).encode())
    assert attempt(root) >= 1


@pytest.mark.parametrize("position", [-1, -(2**31), 625, 2**31 - 1, 2**40])
def test_positions_outside_of_a_generators_buffer(root, position):
    """NumPy reads memory where a state says, whatever it says; such a state must not get that far."""
    tree = tree_of(root)
    tree["parts"]["twister"]["state"]["pos"] = position
    reseal(root, state=json.dumps(tree).encode())
    live = build(5)
    before = live["twister"].get_state(legacy=False)["state"]["pos"]
    with checkpointer(root, live, resume="r/c2") as ckpt, pytest.raises(pp.errors.MismatchError, match="twister"):
        ckpt.resume()
    assert live["twister"].get_state(legacy=False)["state"]["pos"] == before


@pytest.mark.parametrize("position", [-1, -(2**31), 5, 2**31 - 1])
def test_positions_outside_of_philoxs_buffer(root, position):
    tree = tree_of(root)
    tree["parts"]["philox"]["buffer_pos"] = position
    reseal(root, state=json.dumps(tree).encode())
    with checkpointer(root, build(5), resume="r/c2") as ckpt, pytest.raises(pp.errors.MismatchError, match="philox"):
        ckpt.resume()


def tuple_of(*values):
    return {"$": "tuple", "v": list(values)}


def text_of(data):
    return {"$": "bytes", "v": base64.b64encode(data).decode()}


WRONG_RNG = {
    "null": None,
    "list": [],
    "empty": {},
    "numbers": {"python": 1, "numpy": 2, "torch": 3, "cuda": 4, "mps": 5},
    "python, huge": {"python": tuple_of(3, tuple_of(*[10**18] * 625), None)},
    "python, negative": {"python": tuple_of(3, tuple_of(*[-1] * 625), None)},
    "python, position": {"python": tuple_of(3, tuple_of(*[1] * 624, 700), None)},
    "python, version": {"python": tuple_of(9, tuple_of(), None)},
    "numpy, short": {"numpy": tuple_of("MT19937", text_of(bytes(16)), 0, 0, 0.0)},
    "numpy, odd": {"numpy": tuple_of("MT19937", text_of(bytes(17)), 0, 0, 0.0)},
    "numpy, position": {"numpy": tuple_of("MT19937", text_of(bytes(2496)), 100_000, 0, 0.0)},
    "numpy, negative position": {"numpy": tuple_of("MT19937", text_of(bytes(2496)), -7, 0, 0.0)},
    "numpy, other": {"numpy": tuple_of("PCG64", text_of(bytes(2496)), 0, 0, 0.0)},
    "numpy, list": {"numpy": tuple_of("MT19937", [1], 0, 0, 0.0)},
    "torch, short": {"torch": text_of(bytes(16))},
    "torch, empty": {"torch": text_of(b"")},
    "torch, text": {"torch": "state"},
    "torch, garbage": {"torch": text_of(b"\xff" * 5056)},
    "cuda": {"cuda": 5},
    "unknown type": {"python": {"$": "pickle"}},
}


@pytest.mark.parametrize("change", WRONG_RNG.values(), ids=WRONG_RNG)
def test_generator_states_that_are_none(root, change):
    tree = tree_of(root)
    tree["rng"] = {**tree["rng"], **change} if change else change
    reseal(root, state=json.dumps(tree).encode())
    states = random.getstate(), torch.get_rng_state()
    with checkpointer(root, build(5), resume="r/c2") as ckpt, pytest.raises(pp.errors.FormatError):
        ckpt.resume()
    random.setstate(states[0])
    torch.set_rng_state(states[1])


WRONG_LOOP = {
    "null": None,
    "list": [1],
    "text": "loop",
    "empty": {},
    "text for a count": {"report": "1"},
    "negative": {"step": -1},
    "fraction": {"next_epoch": 1.5},
    "null for a count": {"next_step": None},
    "epoch": {"epoch": [1]},
    "batches a list": {"batches": [1]},
    "batches a number": {"batches": 5},
    "batches of nothing": {"batches": {}},
    "batches of more": {"batches": {"done": 1, "start": {}, "generator": None, "more": 1}},
    "batches without end": {"batches": {"done": -5, "start": {}, "generator": None}},
    "unknown type": {"report": {"$": "pickle"}},
}


@pytest.mark.parametrize("change", WRONG_LOOP.values(), ids=WRONG_LOOP)
def test_loop_positions_that_are_none(root, change):
    tree = tree_of(root)
    tree["loop"] = {**tree["loop"], **change} if isinstance(change, dict) and change else change
    reseal(root, state=json.dumps(tree).encode())
    live = build(5)
    before = live["model"][0].weight.detach().clone()
    with checkpointer(root, live, resume="r/c2") as ckpt, pytest.raises(pp.errors.FormatError):
        ckpt.resume()
    assert torch.equal(live["model"][0].weight, before)


@pytest.mark.parametrize(
    "batches",
    [
        {"done": 1, "start": 5, "generator": None},
        {"done": 1, "start": {}, "generator": None},
        {"done": 1, "start": None, "generator": {"$": "bytes", "v": F8}},
        {"done": 1, "start": None, "generator": 5},
        {"done": 10**15, "start": None, "generator": None},
    ],
    ids=["no generators", "empty generators", "short generator", "generator a number", "too far"],
)
def test_places_in_an_epoch_that_are_none(root, batches):
    tree = tree_of(root)
    tree["loop"]["batches"] = {**batches, "start": tree["rng"] if batches["start"] is None else batches["start"]}
    reseal(root, state=json.dumps(tree).encode())
    data = torch.utils.data.DataLoader(torch.arange(6), shuffle=True, generator=torch.Generator())

    def first_batch(ckpt):
        ckpt.resume()
        return next(iter(ckpt.batches(data)))

    with checkpointer(root, build(5), resume="r/c2") as ckpt, pytest.raises(UNFIT):
        first_batch(ckpt)


def changed_file(root, file, **changes):
    manifest = pp.open(root).find_manifest("r/c2")
    return tuple(replace(f, **changes) if f.name == file else f for f in manifest.files)


def changed_tensor(root, **changes):
    file = pp.open(root).find_manifest("r/c2").file("model.safetensors")
    tensors = tuple(t._replace(**changes) if t.name == "0.weight" else t for t in file.tensors)
    assert tensors != file.tensors
    return changed_file(root, file.name, tensors=tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F128"},
        {"dtype": "F64"},
        {"dtype": ""},
        {"shape": (1000, 1000)},
        {"shape": (-1,)},
        {"shape": ()},
        {"begin": 4},
        {"begin": -4096},
        {"begin": 2**62, "end": 2**62 + 24},
        {"end": 2**62},
        {"end": -1},
        {"name": "other"},
        {"digest": ""},
        {"digest": "zz" * 32},
        {"digest": "00" * 32},
    ],
    ids=str,
)
def test_tensor_records_in_a_hostile_manifest(root, changes):
    reseal(root, files=changed_tensor(root, **changes))
    with pytest.raises(UNFIT):
        dict(pp.load("r/c2", root=root))


BAD_FILES = [
    {"name": "../../../../peakpoint.json"},
    {"name": "/etc/passwd"},
    {"name": ""},
    {"name": "a\x00b"},
    {"name": "."},
    {"name": "nested/../state.json"},
    {"size": 0},
    {"size": -1},
    {"size": 2**63},
    {"digest": ""},
    {"header": 2**40},
    {"header": -8},
    {"header": 1},
]
BAD_TENSOR_FILES = [{"header": 0}, {"header_digest": ""}, {"tensors": ()}]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *(("state.json", changes) for changes in BAD_FILES),
        *(("model.safetensors", changes) for changes in BAD_FILES + BAD_TENSOR_FILES),
    ],
    ids=str,
)
def test_file_records_in_a_hostile_manifest(root, file, changes):
    manifest = pp.open(root).find_manifest("r/c2")
    parts = manifest.parts
    if "name" in changes and file != "state.json":
        parts = {**parts, "model": (changes["name"],)}
    reseal(root, files=changed_file(root, file, **changes), parts=parts)
    with pytest.raises(UNFIT):
        dict(pp.load("r/c2", root=root))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ()},
        {"files": None},
        {"files": ({"name": "state.json"},)},
        {"parts": []},
        {"parts": {"model": ("missing.safetensors",)}},
        {"parts": {"model": "model.safetensors"}},
        {"step": "1"},
        {"sequence": None},
        {"metrics": {"loss": "nothing"}},
        {"metrics": {"loss": None}},
        {"created_at": "yesterday"},
        {"forks": ((1,),)},
        {"run": "other"},
        {"name": "other"},
    ],
    ids=str,
)
def test_fields_of_a_hostile_manifest(root, changes):
    path = folder(root) / MANIFEST
    from peakpoint.format.sealed import seal, unseal

    record = unseal(path.read_bytes(), where=MANIFEST)
    path.write_bytes(seal({**record, **changes}))
    with pytest.raises((*DAMAGED, pp.errors.NotFoundError)):
        dict(pp.load("r/c2", root=root))
    # the checkpoint beside it is as good as before
    assert pp.load("r/c1", root=root)["values"][5] == "five"


@pytest.mark.parametrize("number", [0, 3, "1", None, [1]])
def test_manifests_of_another_format(root, number):
    from peakpoint.format.sealed import seal, unseal

    for name in ("c1", "c2"):
        path = folder(root, name) / MANIFEST
        record = unseal(path.read_bytes(), where=MANIFEST)
        path.write_bytes(seal({**record, "format": number}))
    with pytest.raises(pp.errors.FormatError, match="update it"):
        dict(pp.load("r@latest", root=root))


# --- any tree -----------------------------------------------------------------------------------------------------

TAGS = ["tensor", "ndarray", "dict", "OrderedDict", "tuple", "set", "float", "int", "bytes", "numpy", "datetime", "x"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["0.weight", "array", "F32", "<f8", "params", "MT19937", "", "inf"])
)
nodes = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(["state", "param_groups", "params", "0.weight", "last_epoch", "generator", "pos", "key"]),
            children,
            max_size=4,
        )
        | st.builds(
            lambda tag, fields: {"$": tag, **fields},
            st.sampled_from(TAGS),
            st.dictionaries(st.sampled_from(["v", "name", "dtype", "shape", "view", "stride"]), children, max_size=4),
        )
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def memory(master):
    """The same repository without files, for many tries."""
    store = MemoryStore()
    for path in sorted(master.rglob("*")):
        if path.is_file() and path.name != "writer.lock":
            store.put(path.relative_to(master).as_posix(), [path.read_bytes()])
    return store


def paths_in(tree, path=()):
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from paths_in(child, (*path, key))


def put_at(tree, path, node):
    if not path:
        return node
    changed = copy.copy(tree)
    changed[path[0]] = put_at(tree[path[0]], path[1:], node)
    return changed


@given(nodes, st.sampled_from(["model", "optimizer", "scheduler", "twister", "python", "torch"]), st.randoms())
@settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_node_anywhere_in_a_tree(memory, node, part, chooser):
    """One node of a good tree becomes another: it loads, or an error of ours says why not."""
    from peakpoint.format.sealed import digest

    store = MemoryStore()
    key = "runs/r/checkpoints/c2"
    for name in ("peakpoint.json", "runs/r/run.json"):
        store.put(name, [memory.get(name)])
    manifest = decode_manifest(memory.get(f"{key}/{MANIFEST}"))
    for file in manifest.files:
        store.put(f"{key}/{file.name}", [memory.get(f"{key}/{file.name}")])
    tree = json.loads(memory.get(f"{key}/state.json"))
    where = chooser.choice(list(paths_in(tree["parts"][part])))
    text = msgspec.json.encode(put_at(tree, ("parts", part, *where), node))
    files = tuple(
        replace(file, size=len(text), digest=digest(text)) if file.name == "state.json" else file
        for file in manifest.files
    )
    store.put(f"{key}/state.json", [text])
    store.put(f"{key}/{MANIFEST}", [encode_manifest(replace(manifest, files=files))])
    live = build(5)
    outcomes = []
    for into in (None, {part: live[part]}):
        try:
            outcomes.append(pp.load("r/c2", root=store, into=into))
        except UNFIT as error:
            outcomes.append(error)
    assert len(outcomes) == 2
    assert str(outcomes[1])


# --- files of other tools -----------------------------------------------------------------------------------------


def check_refused(folder, reasons, root):
    """Import a folder with one honest file: everything else is refused for its reason, and harms nothing."""
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, folder / "honest.pth")
    report = pp.import_checkpoints(folder, root, run="r", skip_unreadable=True)
    errors = {source.path.name: source.error for source in report.checkpoints}
    assert errors.pop("honest.pth") == ""
    assert errors.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, errors[name]), errors[name]
        assert name in errors[name]
    [checkpoint] = pp.open(root).run("r").checkpoints()
    assert checkpoint.epoch == 3
    assert torch.equal(pp.load("r@latest", root=root)["model"]["w"], torch.ones(2))


def test_files_that_would_take_the_memory_or_the_stack_are_refused(tmp_path):
    check_refused(tmp_path / "bombs", bombs(tmp_path / "bombs"), tmp_path / "root")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each may take 20 s of processor time
def test_files_that_would_take_for_ever_are_refused(tmp_path):
    check_refused(tmp_path / "bombs", bombs(tmp_path / "bombs", slow=True), tmp_path / "root")


def test_a_file_that_kills_its_reader_ends_the_import_with_an_error(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pth")
    with_pickle(tmp_path / "b.pth", b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")
    refused = in_process("import", tmp_path, tmp_path / "root", "--run", "r")
    assert refused.returncode == pp.errors.CorruptError.exit_code
    assert "b.pth was refused" in refused.stderr
    assert "Nothing was imported" in refused.stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("deep.json", b"[" * 200_000, ""),
        ("wide.csv", b",".join(b"%d" % number for number in range(100_000)) + b"\n" + b"0\n" * 100_000, ""),
        ("many.json", b"[" + b"{}," * 12_000_000 + b"{}]", "takes more memory than a file of its size may"),
    ],
    ids=["deep", "wide", "many"],
)
def test_a_log_that_would_take_the_memory_is_refused(name, text, reason, tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 0}, tmp_path / "a.pth")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DAMAGED, match=f"{name}.*{reason}"):
        pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "root", run="r", metrics=tmp_path / name)
    assert not (tmp_path / "root").exists()


# --- no code in files, none in the package that would run it ------------------------------------------------------

SOURCE = Path(pp.__file__).parent
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_KEYWORDS = {("allow_pickle", "True"), ("weights_only", "False")}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("os", "system")}


def offences(source):
    """Everything in a source that reads or runs code from data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {module}
            if any((module, alias.name) in FORBIDDEN_ATTRIBUTES for alias in node.names):
                yield f"line {node.lineno}: from {module} import load"
        else:
            names = set()
        yield from (f"line {node.lineno}: import {name}" for name in names & FORBIDDEN_MODULES)
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in FORBIDDEN_ATTRIBUTES:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in FORBIDDEN_KEYWORDS:
            yield f"line {node.value.lineno}: {node.arg}="


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import cloudpickle.x",
        "torch.load(x)",
        "load = torch.load",
        "from torch import load",
        "np.load(x)",
        "f(x, allow_pickle=True)",
        "eval(x)",
        "f = exec",
        "__import__('x')",
        "os.system('x')",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert list(offences(source))


def test_nothing_in_the_package_runs_code_from_files():
    files = sorted(SOURCE.rglob("*.py"))
    assert SOURCE / "state" / "typed_json.py" in files
    assert len(files) > 20
    found = {str(path.relative_to(SOURCE)): list(offences(path.read_text())) for path in files}
    # what reads the files of other tools, restricted: tests/exchange/test_imports.py has the files that mean harm
    import_only = {
        "exchange/constructors.py": ["import pickle"],
        "exchange/pickles.py": ["import pickle"],
        "exchange/pickle_builder.py": ["import pickle"],
    }
    # what processes of one training send each other, as torch's own collectives of objects do; never a file
    messages_only = {"training/ranks.py": ["import pickle"]}
    kept = {name: [line.partition(": ")[2] for line in lines] for name, lines in found.items() if lines}
    assert kept == import_only | messages_only
    assert not any(re.search(r"pickle\.loads?\(", (SOURCE / name).read_text()) for name in import_only)


def test_a_pickle_in_place_of_a_file_is_not_opened(alone, tmp_path):
    """The sign of an opened pickle is a file that it makes."""
    import pickle

    sign = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (sign,))

    bomb = pickle.dumps(Bomb())
    for name in FILES:
        path = folder(alone) / name
        intact = path.read_bytes()
        path.write_bytes(bomb.ljust(len(intact), b"\x00"))
        with pytest.raises(DAMAGED):
            load_everything(alone)
        path.write_bytes(intact)
    reseal(alone, state=bomb)
    with pytest.raises(pp.errors.FormatError):
        load_everything(alone)
    assert not sign.exists()
    pickle.loads(bomb)
    assert sign.exists()  # it would have worked
