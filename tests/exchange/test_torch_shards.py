"""Import of what torch's ``HuggingFaceStorageWriter`` writes: each process its pieces of a model."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter, _consolidate_hf_safetensors
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import peakpoint as pp
from foreign_files import read_alone
from peakpoint.exchange.sources import find

NAME = "shard-0000{}-model-00001-of-00001.safetensors"
ROWS = torch.arange(35, dtype=torch.bfloat16).reshape(5, 7)
STATE = {"rows": ROWS, "columns": torch.randn(5, 7), "count": torch.tensor(9), "scale": torch.tensor(3.25)}
PROCESSES = (  # what each of three has, and where it begins
    {"rows": ((0, 0), ROWS[:2]), "columns": ((0, 0), STATE["columns"][:, :4])},
    {"rows": ((2, 0), ROWS[2:4]), "columns": ((0, 4), STATE["columns"][:, 4:]), "count": ((), STATE["count"])},
    {"rows": ((4, 0), ROWS[4:]), "columns": ((5, 0), torch.empty(0, 7)), "scale": ((), STATE["scale"])},
)


class HasPieces:
    """The one verb of a planner that the writer asks for data."""

    def __init__(self, pieces):
        self.pieces = pieces

    def resolve_data(self, item):
        return self.pieces[item.index.fqn][1].contiguous()


def save(folder, processes=PROCESSES, **options):
    """Have torch's own writer write the files of all processes in this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, **options)
        writer.set_up_storage_writer(is_coordinator=True)
        plans = [SavePlan([write_item(name, *piece) for name, piece in pieces.items()]) for pieces in processes]
        writer.prepare_local_plan(plans[0])
        for plan, pieces in zip(writer.prepare_global_plan(plans), processes, strict=True):
            writer.write_data(plan, HasPieces(pieces)).wait()
    return folder


def write_item(name, offsets, values):
    chunk = ChunkStorageMetadata(torch.Size(offsets), values.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=values.dtype), size=values.shape)
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def consolidated(folder):
    """Save without whole numbers, which torch cannot consolidate, and consolidate."""
    floats = [{name: piece for name, piece in pieces.items() if name != "count"} for pieces in PROCESSES]
    save(folder / "sharded", floats)
    names = dict.fromkeys(STATE.keys() - {"count"}, 1)
    _consolidate_hf_safetensors.consolidate_safetensors_files(str(folder / "sharded"), str(folder), names)
    return folder


def identical(tensors, state):
    return tensors.keys() == state.keys() and all(
        tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor) for name, tensor in state.items()
    )


def change(file, what):
    """Change the header of a file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    places = what(header, places) or places
    header["__metadata__"]["DCP_SHARDING_INFO"] = places if isinstance(places, str) else json.dumps(places)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_each_folder_becomes_one_checkpoint_at_the_step_in_its_name(tmp_path):
    for step in (100, 20):
        save(tmp_path / "out" / f"step-{step}")
    (tmp_path / "out" / "step-20" / "config.json").write_text('{"a": 20}')
    report = pp.import_checkpoints(tmp_path / "out", tmp_path / "root", run="r")
    assert [(source.path.name, source.step, source.tool) for source in report.checkpoints] == [
        ("step-20", 20, "torch.distributed.checkpoint"),
        ("step-100", 100, "torch.distributed.checkpoint"),
    ]
    notes = report.checkpoints[0].notes
    assert "shards 1 to 3 -> model; no file tells whether more were saved" in notes
    assert "step from the name of the folder" in notes
    assert report.others == ()
    for checkpoint in pp.open(tmp_path / "root").run("r").checkpoints():
        loaded = pp.load(checkpoint.ref, root=tmp_path / "root")
        assert identical(loaded["model"], STATE)
        assert ("extra" in loaded) == (checkpoint.step == 20)


def test_a_step_in_the_files_counts_more_than_that_of_the_name(tmp_path):
    save(tmp_path / "step-20")
    (tmp_path / "step-20" / "trainer_state.json").write_text('{"global_step": 21}')
    assert read_alone(tmp_path / "step-20").step == 21


def test_one_process_writes_such_a_folder_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        writer = HuggingFaceStorageWriter(str(tmp_path / "a"), save_distributed=True)
        torch.distributed.checkpoint.save(STATE, storage_writer=writer)
    checkpoint = read_alone(tmp_path / "a")
    assert identical(checkpoint.parts["model"], STATE)
    assert checkpoint.step is None


def test_several_files_of_each_process_are_one_model(tmp_path):
    places = {name: 1 + (name in {"columns", "scale"}) for name in STATE}
    save(tmp_path / "a", fqn_to_index_mapping=places)
    assert len(list((tmp_path / "a").iterdir())) == 6
    assert identical(read_alone(tmp_path / "a").parts["model"], STATE)
    (tmp_path / "a" / "shard-00002-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(pp.errors.CorruptError, match=r"'rows' leave a gap: 21 of 35 elements .*copy the files"):
        read_alone(tmp_path / "a")
    for file in (tmp_path / "a").glob("*-00001-of-00002.safetensors"):
        file.unlink()
    with pytest.raises(pp.errors.CorruptError, match=r"lacks shard-\*-model-00001-of-00002.safetensors"):
        read_alone(tmp_path / "a")


# --- what torch has consolidated ----------------------------------------------------------------------------------


def test_a_consolidated_folder_is_imported_once_and_from_the_shards(tmp_path):
    """The scalars that torch consolidates are 0; with a later torch the right ones, this holds as well."""
    folder = consolidated(tmp_path / "out" / "step-7")
    [source], others = find(tmp_path / "out")
    assert (source.path, others) == (folder, [])
    checkpoint = read_alone(tmp_path / "out")
    assert identical(checkpoint.parts["model"], {name: STATE[name] for name in STATE.keys() - {"count"}})
    assert checkpoint.step == 7
    assert "compared by shape only" in checkpoint.notes[0]
    assert read_alone(folder / "sharded").step == 7
    for shard in (folder / "sharded").iterdir():
        shard.unlink()
    assert identical({"rows": read_alone(folder).parts["model"]["rows"]}, {"rows": ROWS})


def test_the_last_shard_is_missed_by_what_was_consolidated(tmp_path):
    folder = consolidated(tmp_path / "a")
    (folder / "sharded" / NAME.format(3)).unlink()
    words = r"sharded lacks a file, or .* torch has consolidated: '(rows|scale)' is .*, and .* there; copy"
    with pytest.raises(pp.errors.CorruptError, match=words):
        read_alone(folder)


def test_what_was_consolidated_half_is_named(tmp_path):
    folder = consolidated(tmp_path / "a")
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(pp.errors.CorruptError, match=rf"{file} .*cut short.*; move it away to import {folder}/sharded"):
        read_alone(folder)
    file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert identical(read_alone(folder).parts["model"], {name: STATE[name] for name in STATE.keys() - {"count"}})


# --- what is refused ----------------------------------------------------------------------------------------------


def test_the_file_of_one_process_is_no_model(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(pp.errors.FormatError, match=r"what one process has saved of a model.*: import its folder"):
        find(tmp_path / "a" / NAME.format(1))
    for number in (1, 2):  # the pieces of the first begin at 0, as whole tensors do
        renamed = (tmp_path / "a" / NAME.format(number)).rename(tmp_path / f"renamed-{number}.safetensors")
        with pytest.raises(pp.errors.FormatError, match=f"{renamed} .*may hold what one process.*import their folder"):
            read_alone(renamed)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    renamed.rename(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(pp.errors.FormatError, match="may hold what one process"):
        read_alone(tmp_path / "hf")


def test_what_one_process_has_saved_whole_is_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        torch.distributed.checkpoint.save(STATE, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "a")))
    for path in (tmp_path / "a", tmp_path / "a" / "model-00001-of-00001.safetensors"):
        assert identical(read_alone(path).parts["model"], STATE)


def test_a_missing_file_is_named_and_nothing_is_imported(tmp_path):
    folder = save(tmp_path / "a")
    (folder / NAME.format(2)).unlink()
    words = r"a lacks shard-00002-model-\*-of-00001.safetensors: copy the files of all processes .*Nothing was imported"
    with pytest.raises(pp.errors.CorruptError, match=words):
        pp.import_checkpoints(folder, tmp_path / "root", run="r")
    assert not (tmp_path / "root").exists()
    (folder / NAME.format(3)).rename(folder / NAME.format(2))
    with pytest.raises(pp.errors.CorruptError, match=f"leave a gap: 2[01] of 35 elements in .*{NAME.format(2)}"):
        read_alone(folder)


def test_files_of_two_saves_are_no_model(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "a", [{name: ((0,) * tensor.dim(), tensor) for name, tensor in STATE.items()}])
    with pytest.raises(pp.errors.CorruptError, match=r"and shard-0000.* overlap; .*without those of another save"):
        read_alone(tmp_path / "a")
    (tmp_path / "a" / NAME.format(3)).rename(tmp_path / "a" / "shard-00003-model-00001-of-00002.safetensors")
    with pytest.raises(pp.errors.CorruptError, match="has files of several saves"):
        read_alone(tmp_path / "a")


def test_values_that_are_no_tensors_make_a_file_that_nothing_reads(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        writer = HuggingFaceStorageWriter(str(tmp_path / "a"), save_distributed=True)
        torch.distributed.checkpoint.save({**STATE, "epoch": 3}, storage_writer=writer)
    with pytest.raises(pp.errors.FormatError, match=f"{NAME.format(1)} begins with values that are no tensors"):
        read_alone(tmp_path / "a")


def offsets(*numbers):
    """Put the rows of the second process there."""
    return lambda _, places: places["rows"].update(saved_offsets=[*numbers])


def without_place(_, places):
    del places["rows"]


def other_type(header, _):
    header["rows"]["dtype"] = "F16"


def other_dimensions(header, places):
    header["rows"]["shape"], places["rows"]["saved_offsets"] = [2, 7, 1], [2, 0, 0]


def huge_shape(header, _):
    header["rows"]["shape"] = [2**40, 2**40]


HOSTILE = {
    "at negative rows": (offsets(-2, 0), "does not say where 'rows' belongs: .*>= 0"),
    "at a bool": (offsets(True, 0), "does not say where 'rows' belongs: .*got `bool`"),
    "at a fraction": (offsets(2.5, 0), "does not say where 'rows' belongs: .*got `float`"),
    "at text": (offsets("2", 0), "does not say where 'rows' belongs: .*got `str`"),
    "at nothing": (offsets(None, 0), "does not say where 'rows' belongs: .*got `null`"),
    "in one dimension": (offsets(2), r"has 'rows' of shape \(2, 7\) at \(2,\), which cannot be"),
    "in three dimensions": (offsets(2, 0, 0), r"has 'rows' of shape \(2, 7\) at \(2, 0, 0\), which cannot be"),
    "beyond what torch counts": (offsets(2**62, 0), "has 'rows' of shape .* at .*, which cannot be"),
    "beyond all numbers": (offsets(10**4000, 0), "'rows'"),
    "beyond the memory": (offsets(2**40, 0), f"'rows' leave a gap: 35 of {7 * (2**40 + 2)} elements in"),
    "on other rows": (offsets(1, 0), "'rows' in shard-00001-.* and shard-00002-.* overlap"),
    "with a gap": (offsets(5, 0), "'rows' leave a gap: 35 of 49 elements in shard-00001"),
    "without its place": (without_place, "00002-.* does not say where 'rows' belongs"),
    "of another type": (other_type, "'rows' is F16 .* in shard-00002-.* and BF16"),
    "of other dimensions": (other_dimensions, "'rows' is BF16 of 3 dimensions in shard-00002-"),
    "of a shape that lies": (huge_shape, "'rows' in .*00002-.* contradicts its bytes"),
    "no JSON": (lambda _, __: "{", "00002-.* does not say in DCP_SHARDING_INFO where"),
    "too deep": (lambda _, __: '{"rows": ' + "[" * 100_000, "00002-.* does not say in DCP_SHARDING_INFO where"),
    "a list": (lambda _, __: "[]", "00002-.* does not say in DCP_SHARDING_INFO where"),
    "half a character": (lambda _, __: "\ud800", "00002-.*(does not say in DCP_SHARDING_INFO|cannot be read)"),
}


@pytest.mark.parametrize(("what", "words"), HOSTILE.values(), ids=HOSTILE)
def test_files_that_lie_are_refused_with_the_way_on(what, words, tmp_path):
    folder = save(tmp_path / "a")
    change(folder / NAME.format(2), what)
    with pytest.raises((pp.errors.CorruptError, pp.errors.FormatError), match=words) as refused:
        read_alone(folder)
    assert "copy the files of all processes" in str(refused.value)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    file = save(tmp_path / "a") / NAME.format(2)
    data = file.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises((pp.errors.CorruptError, pp.errors.FormatError), match=f"{re.escape(str(file))} .*copy the"):
            read_alone(tmp_path / "a")


# --- as real processes write them ---------------------------------------------------------------------------------

RANK = """
import os, sys, warnings
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

warnings.simplefilter("ignore")
folder = sys.argv[1]
dist.init_process_group("gloo")
count = dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2)).bfloat16()
model.register_buffer("scale", torch.tensor(3.25))
model.register_buffer("empty", torch.empty(0, 4))
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
fully_shard(model[0])
fully_shard(model)
sharded = model.state_dict()
mesh = init_device_mesh("cpu", (2, 2) if count == 4 else (1, count))
for name, places in {"ab": [Shard(0), Shard(1)], "aa": [Shard(0), Shard(0)], "c": [Replicate(), Shard(2)]}.items():
    state[name] = torch.randn(5, 9, 3)
    sharded[name] = distribute_tensor(state[name], mesh, places)
if dist.get_rank() == 0:
    torch.save(state, f"{folder}/state.pth")
dcp.save(sharded, storage_writer=dcp.HuggingFaceStorageWriter(f"{folder}/step-5", save_distributed=True))
floats = {name: tensor for name, tensor in sharded.items() if tensor.is_floating_point()}
writer = dcp.HuggingFaceStorageWriter(f"{folder}/both/step-6", save_distributed=True, enable_consolidation=True)
dcp.save(floats, storage_writer=writer)
dist.destroy_process_group()
os._exit(0)  # torch 2.13 sometimes aborts on rank 0 when the interpreter ends: "terminate called without an active ..."
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_processes_write_under_torchrun_is_put_together(count, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "rank.py"), str(tmp_path)], env=environment, check=True, timeout=300)
    state = torch.load(tmp_path / "state.pth")
    for name in ("step-5", "both"):
        pp.import_checkpoints(tmp_path / name, tmp_path / "root", run=name)
        [checkpoint] = pp.open(tmp_path / "root").run(name).checkpoints()
        assert checkpoint.step == (5 if name == "step-5" else 6)
        tensors = pp.load(checkpoint.ref, root=tmp_path / "root")["model"]
        floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        assert identical(tensors, state if name == "step-5" else floats)
    assert len(list((tmp_path / "step-5").iterdir())) == count
    (tmp_path / "step-5" / NAME.format(1)).unlink()
    with pytest.raises(pp.errors.CorruptError, match="lacks shard-00001-model"):
        pp.import_checkpoints(tmp_path / "step-5", tmp_path / "other", run="r")
