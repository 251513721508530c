"""Tensors in shards: any box of them is what slicing the whole gives, and what is no whole is refused."""

import itertools
import json
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import peakpoint as pp
import validated
from commands import command
from peakpoint.errors import ConfigError, CorruptError, FormatError, PeakpointWarning, StoreError
from peakpoint.exchange.exports.files import export
from peakpoint.exchange.exports.huggingface import export_folder
from peakpoint.exchange.exports.weights import WeightOptions
from peakpoint.format import layout
from peakpoint.format.manifest import SHARDED_FORMAT, encode_manifest
from peakpoint.format.shards import stored_tensors
from peakpoint.repository import maintenance
from peakpoint.repository.audit import audit, clean
from peakpoint.repository.commit import commit, put_files
from peakpoint.repository.root import Repository
from peakpoint.state.saved import read_state, read_tensors
from peakpoint.state.shards import read_box, read_tensor
from peakpoint.state.shared_storage import DTYPES
from sharded import box_of, mesh, random_tensor, rank_images, shard, stored
from training import checkpointer, parts, same, train
from trees import same as alike


@st.composite
def cut(draw, box):
    """Boxes that make up a box, cut again and again along any dimension, some of them empty."""
    offsets, sizes = box
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    if not dims or draw(st.integers(0, 2)) == 0:
        return [box]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(0 if draw(st.booleans()) else 1, sizes[dim] - 1))
    low, high = list(sizes), list(sizes)
    low[dim], high[dim] = at, sizes[dim] - at
    begin = list(offsets)
    begin[dim] += at
    return draw(cut((offsets, tuple(low)))) + draw(cut((tuple(begin), tuple(high))))


shapes = st.lists(st.integers(0, 5) | st.integers(1, 9), max_size=4).map(tuple).filter(lambda it: math.prod(it) < 2000)


@st.composite
def any_box(draw, shape):
    edges = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return tuple(begin for begin, _ in edges), tuple(end - begin for begin, end in edges)


@settings(max_examples=150)
@given(st.data(), shapes, st.sampled_from(list(DTYPES)), st.booleans())
def test_any_box_of_any_shards_is_what_slicing_gives(data, shape, dtype, verify):
    tensor = random_tensor(shape, dtype)
    pieces = data.draw(st.permutations(data.draw(cut(((0,) * len(shape), shape)))))
    store, manifest, whole = stored(tensor, pieces)
    assert (whole.shape, whole.dtype) == (shape, DTYPES[dtype])
    assert same(read_tensor(store, manifest, whole), tensor)
    offsets, sizes = data.draw(any_box(shape))
    expected = box_of(tensor, offsets, sizes).contiguous()
    assert same(read_box(store, manifest, whole, offsets, sizes, verify=verify), expected)
    target = random_tensor((2, *sizes), dtype, seed=1)[1]
    assert read_box(store, manifest, whole, offsets, sizes, target=target, verify=verify) is target
    assert same(target, expected)


class CountingStore:
    """Counts the bytes that are read of tensor files."""

    def __init__(self, store):
        self._store, self.read = store, {}

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get(self, key, begin=0, end=None):
        data = self._store.get(key, begin, end)
        file = key.rpartition("/")[2]
        self.read[file] = self.read.get(file, 0) + len(data)
        return data


def test_only_shards_that_have_some_of_a_box_are_read_and_without_digests_only_their_rows():
    tensor = random_tensor((12, 8), torch.float32)
    store, manifest, whole = stored(tensor, mesh(3, 2)(tensor))  # six shards of [4, 4]
    row = 4 * 4
    for verify, expected in ((True, {0: 4, 2: 4}), (False, {0: 1, 2: 2})):
        counting = CountingStore(store)
        read_box(counting, manifest, whole, (3, 0), (3, 4), verify=verify)
        assert counting.read == {f"model+rank{rank}.safetensors": rows * row for rank, rows in expected.items()}


def test_large_shards_are_read_in_blocks():
    tensor = random_tensor((3, 4 * 1024 * 1024), torch.float32)  # rows of 16 MiB
    store, manifest, whole = stored(tensor, mesh(2)(tensor))
    sizes = []
    counting = CountingStore(store)
    counting.get = lambda key, begin, end: sizes.append(end - begin) or store.get(key, begin, end)
    assert same(read_box(counting, manifest, whole, (1, 5), (2, 7)), tensor[1:, 5:12].contiguous())
    assert max(sizes) == 32 * 1024 * 1024
    assert sum(sizes) == tensor.nbytes


@pytest.mark.parametrize(
    ("offsets", "sizes", "target", "message"),
    [
        ((0,), (2,), None, "has no box"),
        ((0, 3), (2, 2), None, "has no box"),
        ((-1, 0), (1, 1), None, "has no box"),
        ((0, 0), (-1, 1), None, "has no box"),
        ((0, 0), (2, 2), torch.empty(2, 3), "target= is"),
        ((0, 0), (2, 2), torch.empty(2, 2, dtype=torch.float16), "target= is"),
    ],
)
def test_a_box_outside_is_refused(offsets, sizes, target, message):
    store, manifest, whole = stored(torch.zeros(3, 4), [((0, 0), (3, 4))])
    with pytest.raises(ConfigError, match=message):
        read_box(store, manifest, whole, offsets, sizes, target=target)


# --- records that lie -----------------------------------------------------------------------------------------------


TENSOR = torch.arange(24.0).reshape(4, 6)


def quarters():
    return stored(TENSOR, mesh(2, 2)(TENSOR))[:2]


def changed(manifest, number, **changes):
    """The manifest with a file that says something else of its one tensor."""
    files = list(manifest.files)
    file = files[number]
    offsets = changes.pop("offsets", file.offsets[0])
    files[number] = replace(file, tensors=(file.tensors[0]._replace(**changes),), offsets=(offsets,))
    return replace(manifest, files=tuple(files))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"offsets": (0, 2)}, r"'w' in model\+rank0.safetensors and model\+rank1.safetensors overlap"),
        (1, {"offsets": (0, 0)}, "overlap"),
        (3, {"offsets": (2, 4)}, "leave a gap: 24 of 28 elements"),
        (3, {"offsets": (2**62, 3)}, "leave a gap"),
        (0, {"shape": (1, 3), "end": 12}, "leave a gap: 21 of 24"),
        (2, {"dtype": "I32"}, r"is I32 of 2 dimensions in model\+rank2.safetensors and F32 of 2 dimensions in model"),
        (2, {"shape": (6,), "offsets": (0,)}, "is F32 of 1 dimensions"),
        (0, {"shape": (0, 3), "end": 0}, "leave a gap"),
    ],
)
def test_shards_that_are_no_whole_are_corrupt(number, changes, message):
    store, manifest = quarters()
    with pytest.raises(CorruptError, match=message) as error:
        read(store, changed(manifest, number, **changes))
    assert "'w'" in str(error.value)
    assert "part 'model'" in str(error.value)


def read(store, manifest):
    return read_tensor(store, manifest, stored_tensors(manifest, "model")["w"])


@pytest.mark.parametrize("changes", [{"end": 20}, {"begin": 4}, {"dtype": "F99"}])
def test_records_that_contradict_themselves_are_refused(changes):
    store, manifest, _ = stored(TENSOR, [((0, 0), (4, 6))])
    with pytest.raises(FormatError, match=r"'w' in model\+rank0.safetensors has"):
        read(store, changed(manifest, 0, **changes))


def test_a_file_that_the_manifest_lacks_is_a_gap():
    store, manifest = quarters()
    files = tuple(file for file in manifest.files if file.name != "model+rank1.safetensors")
    lacking = replace(manifest, files=files, parts={"model": tuple(file.name for file in files)})
    with pytest.raises(CorruptError, match=r"leave a gap: 18 of 24 elements in model.rank0.safetensors, model.rank2"):
        read(store, lacking)


def test_audit_finds_what_is_no_whole(tmp_path):
    two(tmp_path)
    manifest = shard(tmp_path, "r@latest", CUTS["rows"])
    key = layout.manifest_key("r", manifest.name)
    file = next(file for file in manifest.files if file.offsets)
    lying = replace(file, offsets=((1, *file.offsets[0][1:]), *file.offsets[1:]))
    (tmp_path / key).write_bytes(
        encode_manifest(replace(manifest, files=tuple(lying if old is file else old for old in manifest.files)))
    )
    (finding,) = audit(pp.open(tmp_path)).findings
    assert (finding.kind, finding.where) == ("damage", key)
    assert f"tensor {file.tensors[0].name!r}" in finding.what


@given(st.data(), shapes.filter(lambda shape: math.prod(shape) > 1))
@settings(max_examples=60)
def test_any_two_shards_that_overlap_are_noticed(data, shape):
    pieces = data.draw(cut(((0,) * len(shape), shape)))
    pieces = [piece for piece in pieces if math.prod(piece[1])]
    extra = data.draw(st.sampled_from(pieces))
    with pytest.raises(CorruptError, match="overlap"):
        stored(torch.zeros(shape), data.draw(st.permutations([*pieces, extra])))


def test_every_element_may_be_a_shard():
    tensor = torch.zeros(32, 16)
    store, manifest, _ = stored(tensor, mesh(32, 16)(tensor))
    assert len(stored_tensors(manifest, "model")["w"].shards) == 512
    assert same(read(store, manifest), tensor)


def test_the_manifest_counts_and_not_the_header():
    """A header that lies is as its digest says; nothing of it is used."""
    store, manifest = quarters()
    key = layout.file_key(manifest.run, manifest.name, "model+rank1.safetensors")
    data = store.get(key)
    lying = data.replace(b"[0,3]", b"[2,3]").replace(b"[2,3]", b"[3,2]")
    assert lying != data
    store.put(key, [lying])
    assert same(read(store, manifest), TENSOR)  # the bytes of the tensor are right
    with pytest.raises(CorruptError, match=r"the header of model.rank1.safetensors does not match its digest"):
        read_tensors(store, manifest, "model")


# --- whole checkpoints ----------------------------------------------------------------------------------------------


CUTS = {"rows": mesh(3), "columns": mesh(1, 2), "grid": mesh(2, 2), "alone": mesh()}


def two(root, run="r", **more):
    """Two checkpoints of a training with whole tensors; returns the states."""
    model, optimizer = parts(width=7)
    states = []
    with checkpointer(root, run=run, state={"model": model, "optimizer": optimizer, **more}) as ckpt:
        for _ in ckpt.epochs(2):
            train(model, optimizer)
            ckpt.report(loss=1.0 / (1 + len(states)))
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return states


@pytest.mark.parametrize("name", CUTS)
def test_checkpoints_in_shards_are_read_like_others(tmp_path, name):
    two(tmp_path)
    expected = dict(pp.load("r@latest", root=tmp_path))
    manifest = shard(tmp_path, "r@latest", CUTS[name])
    loaded = pp.load("r@latest", root=tmp_path)
    assert alike(dict(loaded), expected)
    assert alike(dict(pp.load("r@latest", root=tmp_path, verify=False)), expected)
    assert loaded.names("model")["0.weight"] == ("F32", (7, 3))
    assert same(loaded.tensor("model", "0.weight"), expected["model"]["0.weight"])
    assert same(dict(loaded.each("model")), dict(expected["model"]))
    loaded.verify()
    saved = read_state(pp.open(tmp_path).store, manifest, ["optimizer"])
    assert same(saved.value("optimizer", own=True), expected["optimizer"])
    model, optimizer = parts(seed=3, width=7)
    report = pp.load("r@latest", root=tmp_path, into={"model": model, "optimizer": optimizer})
    assert report.missing == ()
    assert same(dict(model.state_dict()), dict(expected["model"]))
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_a_training_resumes_from_shards(tmp_path):
    states = two(tmp_path)
    shard(tmp_path, "r@latest", CUTS["grid"])
    model, optimizer = parts(seed=3, width=7)
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.resume()
        assert same(dict(model.state_dict()), states[-1])
        for _ in ckpt.epochs(3):
            train(model, optimizer)
            ckpt.report(loss=0.1)
    assert len(pp.open(tmp_path).run("r").checkpoints()) == 3


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (flip, "tensor '[^']*' in model.rank1.safetensors does not match its digest"),
    ],
)
def test_damage_names_the_file_of_the_rank(tmp_path, damage, message):
    two(tmp_path)
    manifest = shard(tmp_path, "r@latest", CUTS["rows"])
    loaded = pp.load("r@latest", root=tmp_path)
    damage(tmp_path / layout.file_key(manifest.run, manifest.name, "model+rank1.safetensors"))
    for load in (lambda: loaded["model"], lambda: pp.load("r@latest", root=tmp_path, part="model")):
        with pytest.raises(CorruptError, match=rf"model\+rank1.safetensors.*|{message}") as error:
            load()
        assert re.search(message, str(error.value))
        assert "model+rank1.safetensors" in str(error.value)
    with pytest.raises(CorruptError, match=r"model\+rank1.safetensors") as error:
        dict(loaded.each("model"))
    assert "tensor '" in str(error.value)
    found = audit(pp.open(tmp_path), deep=True).findings
    assert [finding.where.rpartition("/")[2] for finding in found] == ["model+rank1.safetensors"]


def test_a_tree_that_says_another_shape_is_refused(tmp_path):
    two(tmp_path)
    manifest = shard(tmp_path, "r@latest", CUTS["rows"])
    files = tuple(file for file in manifest.files if file.name != "model+rank2.safetensors")
    names = {**manifest.parts, "model": ("model+rank0.safetensors", "model+rank1.safetensors")}
    saved = read_state(pp.open(tmp_path).store, replace(manifest, files=files, parts=names), ["model"])
    with pytest.raises(
        FormatError, match=r"'sharded' that cannot be read: .*0.weight' are F32\[6, 3\] together, not F32"
    ):
        saved.value("model")


def test_earlier_releases_refuse_shards(tmp_path):
    """They read format 1 alone, and no tag that they do not know: they would take one shard for the tensor."""
    two(tmp_path)
    plain = pp.open(tmp_path).find_manifest("r@latest")
    assert json.loads(encode_manifest(plain))["format"] == 1
    assert "offsets" not in encode_manifest(plain).decode()
    manifest = shard(tmp_path, "r@latest", CUTS["rows"])
    assert json.loads(encode_manifest(manifest))["format"] == SHARDED_FORMAT == 2
    state = (tmp_path / layout.file_key(manifest.run, manifest.name, layout.STATE)).read_text()
    assert '"sharded"' in state
    assert '"tensor"' not in state


def test_torch_reads_the_files_itself(tmp_path):
    with checkpointer(tmp_path, state={"model": parts(width=7)[0]}) as ckpt:
        ckpt.report()
    expected = pp.load("r@latest", root=tmp_path)["model"]
    manifest = shard(tmp_path, "r@latest", CUTS["grid"])
    folder = tmp_path / layout.checkpoint_prefix(manifest.run, manifest.name)
    target = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert same(target, dict(expected))
    with safe_open(folder / "model+rank3.safetensors", "pt") as file:
        assert json.loads(file.metadata()["DCP_SHARDING_INFO"])["0.weight"] == {"saved_offsets": [4, 2]}


# --- what stands on top ---------------------------------------------------------------------------------------------


def test_differences_look_through_shards(tmp_path):
    two(tmp_path)
    before = pp.diff("r:epoch=0", "r:epoch=1", root=tmp_path)
    shard(tmp_path, "r:epoch=1", CUTS["grid"])
    after = pp.diff("r:epoch=0", "r:epoch=1", root=tmp_path)
    assert after.tensors == before.tensors
    assert (after.same_tensors, after.same_bytes) == (before.same_tensors, before.same_bytes)
    assert after.changed_bytes == before.changed_bytes
    assert after.plain == before.plain
    shard(tmp_path, "r:epoch=0", CUTS["grid"])
    assert pp.diff("r:epoch=0", "r:epoch=1", root=tmp_path).tensors == before.tensors


def test_the_same_values_in_other_shards_are_no_difference(tmp_path):
    for run in ("one", "other"):
        two(tmp_path, run)
    shard(tmp_path, "one@latest", CUTS["rows"])
    shard(tmp_path, "other@latest", CUTS["grid"])
    difference = pp.diff("one@latest", "other@latest", root=tmp_path)
    assert difference.identical
    assert difference.changed_bytes == 0
    assert difference.same_tensors == len(pp.load("one@latest", root=tmp_path).names("model")) + 4


def test_soups_are_made_of_shards(tmp_path):
    two(tmp_path)
    expected = pp.load(pp.soup(["r:epoch=0", "r:epoch=1"], root=tmp_path, run="a").checkpoint, root=tmp_path)["model"]
    shard(tmp_path, "r:epoch=0", CUTS["grid"])
    shard(tmp_path, "r:epoch=1", CUTS["rows"])
    soup = pp.soup(["r:epoch=0", "r:epoch=1"], root=tmp_path, run="b").checkpoint
    assert alike(pp.load(soup, root=tmp_path)["model"], expected)


@pytest.mark.parametrize("cut", [mesh(3), mesh(2, 2)])
def test_archived_shards_come_back(tmp_path, cut):
    states = two(tmp_path)
    manifests = [shard(tmp_path, f"r:epoch={epoch}", cut) for epoch in (0, 1)]
    maintenance.archive(pp.open(tmp_path).run("r"))
    loaded = pp.load("r@latest", root=tmp_path)
    assert same(dict(loaded["model"]), states[1])
    assert same(loaded.tensor("model", "0.weight"), states[1]["0.weight"])
    assert audit(pp.open(tmp_path), deep=True).findings == []
    maintenance.restore(pp.open(tmp_path).run("r"))
    assert list(pp.open(tmp_path).run("r").manifests()) == manifests
    assert audit(pp.open(tmp_path), deep=True).findings == []


def test_shards_that_stay_are_shared(tmp_path):
    frozen = torch.nn.Linear(50, 50)
    model, optimizer = parts(width=7)
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer, "frozen": frozen}) as ckpt:
        for _ in ckpt.epochs(2):
            train(model, optimizer)
            ckpt.report()
    first = shard(tmp_path, "r:epoch=0", CUTS["rows"])
    second = shard(tmp_path, "r:epoch=1", CUTS["rows"], previous=first)
    shared = {file.name for file in second.files if file.shared}
    assert shared == {f"frozen+rank{rank}.safetensors" for rank in range(3)}
    assert {file.shared for file in second.files if file.shared} == {first.id}
    command("rm", tmp_path, f"r/{first.name}", "--yes", "--undo-for", "0")
    assert same(dict(pp.load("r@latest", root=tmp_path)["frozen"]), dict(frozen.state_dict()))


def test_shards_go_to_the_trash_and_back_and_are_dropped(tmp_path):
    states = two(tmp_path)
    manifest = shard(tmp_path, "r@latest", CUTS["rows"])
    ref = f"r/{manifest.name}"
    command("rm", tmp_path, ref, "--yes")
    command("undo", tmp_path, ref)
    assert same(dict(pp.load(ref, root=tmp_path)["model"]), states[1])
    assert audit(pp.open(tmp_path), deep=True).findings == []
    command("rm", tmp_path, ref, "--yes", "--undo-for", "0")
    assert not (tmp_path / layout.checkpoint_prefix(manifest.run, manifest.name)).exists()


def test_a_part_in_shards_is_dropped_with_all_its_files(tmp_path):
    states = two(tmp_path)
    manifest = shard(tmp_path, "r:epoch=0", CUTS["rows"])
    run = pp.open(tmp_path).run("r")
    with checkpointer(
        tmp_path,
        state=dict(zip(("model", "optimizer"), parts(width=7), strict=True)),
        keep=[pp.Best("loss", "max", parts="model"), pp.Last(1)],
    ) as ckpt:
        with pytest.warns(PeakpointWarning, match="rules have changed"):
            ckpt.resume()
        for _ in ckpt.epochs(3):
            ckpt.report(loss=0.1)
    directory = tmp_path / layout.checkpoint_prefix(manifest.run, manifest.name)
    assert sorted(path.name for path in directory.glob("*.safetensors")) == [
        f"model+rank{rank}.safetensors" for rank in range(3)
    ]
    assert same(dict(pp.load("r:epoch=0", root=tmp_path)["model"]), states[0])
    assert run.find("r:epoch=0").parts.keys() == {"model", "rng", "loop"}


def test_what_an_interrupted_save_left_is_cleaned(tmp_path):
    two(tmp_path)
    manifest = shard(tmp_path, "r@latest", CUTS["rows"])
    draft = replace(manifest, id="0" * 16, name="unfinished", sequence=3, files=(), parts={})
    images = list(rank_images("model+frozen", {"w": TENSOR}, CUTS["rows"]))
    put_files(pp.open(tmp_path).store, draft, images)
    (left,) = audit(pp.open(tmp_path)).findings
    assert (left.kind, left.where) == ("litter", "runs/r/checkpoints/unfinished")
    clean(pp.open(tmp_path))
    assert not (tmp_path / left.where).exists()


def test_a_commit_that_fails_leaves_no_file_of_any_rank(tmp_path):
    store, manifest = quarters()
    draft = replace(manifest, name="other", files=())
    records = put_files(store, draft, list(rank_images("model", {"w": TENSOR}, CUTS["rows"])))

    def refuse():
        raise StoreError("full")

    with pytest.raises(StoreError, match="full"):
        commit(store, draft, [], written=lambda: {"model": records}, first=refuse)
    assert store.children(layout.checkpoint_prefix("r", "other")) == []


def test_the_command_line_knows_shards(tmp_path):
    two(tmp_path)
    shard(tmp_path, "r@latest", CUTS["rows"])
    assert "model+rank2.safetensors" in command("show", tmp_path, "r@latest")
    assert "model (3 ranks)" in command("show", tmp_path, "r@latest")
    assert "loss" in command("ls", tmp_path)
    assert json.loads(command("select", tmp_path, "run == 'r'", "--min", "loss", "--json"))["selected"][0]["epoch"] == 1


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_exports_are_whole(tmp_path, suffix):
    two(tmp_path)
    command("export", tmp_path, "r@latest", "--to", tmp_path / f"whole.{suffix}")
    shard(tmp_path, "r@latest", CUTS["grid"])
    command("export", tmp_path, "r@latest", "--to", tmp_path / f"joined.{suffix}")
    assert (tmp_path / f"joined.{suffix}").read_bytes().replace(b"joined", b"whole_") == (
        tmp_path / f"whole.{suffix}"
    ).read_bytes().replace(b"whole", b"whole_")


class NoWholeFiles:
    """Refuses to read a tensor file as a whole."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def fill(self, key):
        assert not key.endswith(".safetensors")
        return self._store.fill(key)

    view = fill


def test_exports_read_one_tensor_at_a_time(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 6, bias=False))
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[1].register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    model[1].register_buffer("row", model[1].weight.detach()[1])
    with checkpointer(tmp_path, state={"model": model}) as ckpt:
        ckpt.report()
    repository = Repository(NoWholeFiles(pp.open(tmp_path).store))
    for fold, name in ((False, "0.weight_orig"), (True, "0.weight")):
        to = tmp_path / f"{fold}.safetensors"
        export(repository, "r@latest", to, weights=WeightOptions(fold_masks=fold))
        weights, expected = load_file(to), dict(pp.load("r@latest", root=tmp_path)["model"])
        if fold:
            expected["0.weight"] = expected.pop("0.weight_orig") * expected.pop("0.weight_mask")
        assert name in weights
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        export_folder(repository, "r@latest", tmp_path / f"{fold}", shard=100, options=WeightOptions(fold_masks=fold))
        files = sorted((tmp_path / f"{fold}").glob("*.safetensors"))
        assert len(files) > 1
        parts_of = [load_file(file) for file in files]
        assert sorted(itertools.chain(*parts_of)) == sorted(expected)


def test_folders_of_hugging_face_are_whole(tmp_path):
    two(tmp_path)
    shard(tmp_path, "r@latest", CUTS["grid"])
    command("export", tmp_path, "r@latest", "--as", "hf", "--to", tmp_path / "folder")
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert same(dict(sorted(weights.items())), dict(sorted(pp.load("r@latest", root=tmp_path)["model"].items())))


@pytest.mark.slow  # transformers is large
def test_transformers_opens_what_is_exported_of_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=8)
        model = transformers.GPT2LMHeadModel(config).eval()
        with checkpointer(tmp_path / "runs", state={"model": model}) as ckpt:
            ckpt.report()
        shard(tmp_path / "runs", "r@latest", CUTS["grid"])
        config.save_pretrained(tmp_path)
        options = ("--shard", "8KB", "--config", tmp_path / "config.json", "--to", tmp_path / "hf")
        command("export", tmp_path / "runs", "r@latest", "--as", "hf", *options)
        assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
        opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
        tokens = torch.arange(8)[None]
        assert torch.equal(opened(tokens).logits, model(tokens).logits)
    assert alike(dict(opened.state_dict()), dict(model.state_dict()))


def test_validations_find_the_same_in_shards(tmp_path):
    for run, cut in (("whole", None), ("rows", CUTS["rows"]), ("grid", CUTS["grid"])):
        torch.manual_seed(0)
        ref = validated.save(tmp_path, run=run, accuracy=0.5)
        if cut is not None:
            shard(tmp_path, ref, cut)
    golden = tmp_path / "golden.safetensors"
    save_file({"inputs": torch.ones(1, 2)}, golden)
    results = {
        run: pp.validate(
            f"{run}@latest",
            root=tmp_path,
            evaluate=validated.evaluated,
            model=validated.build,
            golden=golden,
            checks=[validated.fine],
        )
        for run in ("whole", "rows", "grid")
    }
    assert all(result.passed for result in results.values())
    (_, *expected) = [(finding.check, finding.said) for finding in results["whole"].findings]
    for run, ranks in (("rows", 3), ("grid", 4)):
        integrity, *findings = results[run].findings
        assert f"of {ranks + 1} files match" in integrity.said
        assert [(finding.check, finding.said) for finding in findings] == expected
    manifest = pp.open(tmp_path).find_manifest("rows@latest")
    flip(tmp_path / layout.file_key(manifest.run, manifest.name, "model+rank1.safetensors"))
    (failure, *_) = pp.validate("rows@latest", root=tmp_path).failures
    assert failure.check == "integrity"
    assert "model+rank1.safetensors" in failure.said
