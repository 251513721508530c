"""Import of folders that are one checkpoint in several files: nothing in them is dropped without a word."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peakpoint as pp
from foreign_files import Net, generators, objects, on_distributed, train_epoch
from peakpoint.exchange.sources import find, read
from peakpoint.exchange.state_dicts import ReadOptions, storable
from peakpoint.state import rng
from training import QuietCheckpointer, same


def read_in(path):
    """Read what an import would bring in, without the import; returns the checkpoints, and the names of other files."""
    sources, others = find(path)
    checkpoints = [storable(read(source, ReadOptions())) for source in sources]
    names = [other.relative_to(path).as_posix() for other in others]
    return [replace(checkpoint, notes=(*checkpoint.notes, *notes)) for checkpoint, notes in checkpoints], names


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def gan(folder, *, binary=False):
    """What accelerate's save_state writes for two models, two optimizers, two schedulers and an object of one's own."""
    folder.mkdir(parents=True)
    states = []
    for number in range(2):
        tail = f"_{number}" if number else ""
        model, optimizer, scheduler = objects(seed=number)
        train_epoch(model, optimizer, scheduler)
        if binary:
            torch.save(model.state_dict(), folder / f"pytorch_model{tail}.bin")
        else:
            save_file(model.state_dict(), folder / f"model{tail}.safetensors")
        torch.save(optimizer.state_dict(), folder / f"optimizer{tail}.bin")
        torch.save(scheduler.state_dict(), folder / f"scheduler{tail}.bin")
        states.append((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    torch.save({"count": 3}, folder / "custom_checkpoint_0.pkl")
    torch.save({"sampler_iter_yielded": 2}, folder / "dl_state_dict_1.bin")
    torch.save(torch.amp.GradScaler("cpu").state_dict(), folder / "scaler.pt")
    return states


@pytest.mark.parametrize("binary", [False, True])
def test_every_model_of_a_folder_is_a_part(binary, tmp_path):
    states = gan(tmp_path / "ck", binary=binary)
    torch.save({"a": 1}, tmp_path / "ck" / "training_args.bin")
    (tmp_path / "ck" / "vocab.txt").write_text("a")
    [checkpoint], others = read_in(tmp_path / "ck")
    for number, (model, *objects_of_model) in enumerate(states):
        tail = f"_{number}" if number else ""
        assert same_tensors(checkpoint.parts[f"model{tail}"], model)
        assert same([checkpoint.parts[f"{part}{tail}"] for part in ("optimizer", "scheduler")], objects_of_model)
    assert checkpoint.parts["custom_checkpoint_0"] == {"count": 3}
    assert checkpoint.parts["scaler"]["scale"] == 65536.0
    assert checkpoint.extra == {"dl_state_dict_1": {"sampler_iter_yielded": 2}}
    assert others == ["training_args.bin", "vocab.txt"]


def test_what_another_file_holds_already_is_named(tmp_path):
    gan(tmp_path / "ck")
    for name in ("pytorch_model.bin", "optimizer.pt", "model-00001-of-00002.safetensors"):
        (tmp_path / "ck" / name).write_bytes(b"not read")
    _, others = read_in(tmp_path / "ck")
    assert others == ["model-00001-of-00002.safetensors", "optimizer.pt", "pytorch_model.bin"]


def test_what_is_hidden_is_named_and_not_entered(tmp_path):
    gan(tmp_path / "out" / "ck")
    (tmp_path / "out" / ".cache").mkdir()
    torch.save(Net().state_dict(), tmp_path / "out" / ".cache" / "a.pth")
    checkpoints, others = read_in(tmp_path / "out")
    assert (len(checkpoints), others) == (1, [".cache"])


def adapter(folder, step):
    """What the Trainer writes for a model of PEFT."""
    folder.mkdir(parents=True)
    weights = {"base.q.lora_A.weight": torch.full((2, 4), float(step)), "base.q.lora_B.weight": torch.zeros(4, 2)}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text('{"r": 2}')
    _, optimizer, scheduler = objects()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    log = [{"epoch": at / 4, "step": at, "eval_loss": 1 / at} for at in range(4, step + 1, 4)]
    state = {"global_step": step, "epoch": step / 4, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return weights


def test_folders_of_adapters_are_checkpoints_of_their_moments(tmp_path):
    weights = {step: adapter(tmp_path / "out" / f"checkpoint-{step}", step) for step in (4, 8)}
    assert pp.import_checkpoints(tmp_path / "out", tmp_path / "root", run="r").others == ()
    run = pp.open(tmp_path / "root").run("r")
    assert [(one.step, one.epoch, one.metrics) for one in run.checkpoints()] == [
        (4, 0, {"eval_loss": 0.25}),
        (8, 1, {"eval_loss": 0.125}),
    ]
    for one in run.checkpoints():
        loaded = pp.load(one.ref, root=tmp_path / "root")
        assert list(loaded) == ["model", "optimizer", "scheduler", "extra"]
        assert same(dict(loaded["model"]), weights[one.step])
        assert loaded["extra"]["adapter_config"] == {"r": 2}


def test_further_adapters_and_models_in_folders_are_parts(tmp_path):
    adapter(tmp_path / "peft", 4)
    (tmp_path / "peft" / "critic").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "peft" / "critic" / "adapter_model.safetensors")
    for name in ("adapter_config.json", "README.md"):
        (tmp_path / "peft" / "critic" / name).write_text("{}")
    [checkpoint], others = read_in(tmp_path / "peft")
    assert checkpoint.parts["critic"]["w"].tolist() == [1, 1, 1]
    assert len(checkpoint.parts["model"]) == 2
    assert others == ["critic/README.md"]
    gan(tmp_path / "diffusers")
    for name in ("model.safetensors", "model_1.safetensors"):
        (tmp_path / "diffusers" / name).unlink()
    (tmp_path / "diffusers" / "unet").mkdir()
    save_file({"w": torch.ones(4)}, tmp_path / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusers" / "unet" / "config.json").write_text('{"a": 1}')
    [checkpoint], _ = read_in(tmp_path / "diffusers")
    assert "optimizer_1" in checkpoint.parts
    assert checkpoint.parts["model"]["w"].shape == (4,)


def test_the_end_of_a_training_does_not_take_its_checkpoints_for_parts(tmp_path):
    for step in (4, 8):
        adapter(tmp_path / "out" / f"checkpoint-{step}", step)
    save_file({"w": torch.ones(2)}, tmp_path / "out" / "adapter_model.safetensors")
    for name in ("adapter_config.json", "trainer_state.json"):
        (tmp_path / "out" / name).write_text("{}")
    assert len(read_in(tmp_path / "out")[0]) == 3


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_put_together(suffix, indexed, tmp_path):
    state, stem = Net().state_dict(), "pytorch_model" if suffix == "bin" else "model"
    places = {name: f"{stem}-0000{1 + number % 3}-of-00003.{suffix}" for number, name in enumerate(state)}
    folder = tmp_path / "hf"
    folder.mkdir()
    for place in set(places.values()):
        tensors = {name: state[name].clone() for name in state if places[name] == place}
        (torch.save if suffix == "bin" else save_file)(tensors, folder / place)
    if indexed:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
        torch.save({"a": torch.ones(1)}, folder / f"{stem}-00009-of-00009.{suffix}")
    [checkpoint], others = read_in(folder)
    assert same_tensors(checkpoint.parts["model"], state)
    assert len(others) == indexed, "a shard that the index does not list"
    (folder / f"{stem}-00002-of-00003.{suffix}").unlink()
    with pytest.raises(pp.errors.CorruptError, match=r"which is not in|has 2 of the 3 shards"):
        read_in(folder)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.bin"])
def test_one_shard_is_no_model(name, tmp_path):
    """Neither alone nor in a folder that lacks the others."""
    state = {"w": torch.ones(2)}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    with pytest.raises(pp.errors.FormatError, match=f"{name} is one of the shards of a model.*: import the folder"):
        find(tmp_path / name)
    with pytest.raises(pp.errors.CorruptError, match=f"has 1 of the 2 shards of which {name} is one"):
        read_in(tmp_path)


def test_folders_of_fsdp(tmp_path):
    model, optimizer, scheduler = objects()
    train_epoch(model, optimizer, scheduler)
    for name in ("full", "sharded"):
        (tmp_path / name).mkdir()
        torch.save(scheduler.state_dict(), tmp_path / name / "scheduler.bin")
        torch.save({"a": 1}, tmp_path / name / "random_states_0.pkl")
    torch.save(model.state_dict(), tmp_path / "full" / "pytorch_model_fsdp.bin")
    torch.save(optimizer.state_dict(), tmp_path / "full" / "optimizer.bin")
    on_distributed(tmp_path / "sharded" / "pytorch_model_fsdp_0", {"model": model.state_dict()})
    on_distributed(tmp_path / "sharded" / "pytorch_model_fsdp_1", {"model": Net().state_dict()})
    on_distributed(tmp_path / "sharded" / "optimizer_0", {"optimizer": optimizer.state_dict()})
    for name in ("full", "sharded"):
        [checkpoint], others = read_in(tmp_path / name)
        assert others == []
        assert same_tensors(checkpoint.parts["model"], model.state_dict())
        assert checkpoint.parts["optimizer"]["param_groups"][0]["lr"] == 0.01
        assert {"scheduler", "optimizer"} <= checkpoint.parts.keys()
        assert ("model_1" in checkpoint.parts) == (name == "sharded")


def deepspeed(folder, *, stage=2):
    """A tag of DeepSpeed; returns the state of its model."""
    folder.mkdir(parents=True)
    state = Net().state_dict()
    content = {
        "module": state,
        "buffer_names": ["norm.running_mean"],
        "optimizer": None,
        "lr_scheduler": {"last_epoch": 4},
        "global_steps": 40,
        "skipped_steps": 0,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.15.0",
        "epoch": 3,
    }
    name = "mp_rank_00_model_states.pt" if stage < 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(content, folder / name)
    for rank in range(2):
        torch.save({"optimizer_state_dict": {}}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return state


def test_folders_of_deepspeed(tmp_path):
    states = {tag: deepspeed(tmp_path / "ds" / tag) for tag in ("global_step40", "global_step80")}
    (tmp_path / "ds" / "latest").write_text("global_step80")
    [checkpoint], _ = read_in(tmp_path / "ds" / "global_step40")
    assert (checkpoint.step, checkpoint.epoch, checkpoint.metrics) == (40, 3, {})
    assert same_tensors(checkpoint.parts["model"], states["global_step40"])
    assert checkpoint.parts["scheduler"] == {"last_epoch": 4}
    assert checkpoint.extra["ds_config"] == {"zero_optimization": {"stage": 2}}
    [note] = [note for note in checkpoint.notes if "LEFT OUT: 2 partitions of the optimizer" in note]
    assert "zero_to_fp32.py" in note
    assert len(read_in(tmp_path / "ds")[0]) == 2


def test_partitions_of_a_model_are_refused_and_the_tool_is_named(tmp_path):
    deepspeed(tmp_path / "ds" / "global_step40", stage=3)
    with pytest.raises(pp.errors.FormatError, match=r"model in partitions.*python .*zero_to_fp32\.py .*ds OUT"):
        read_in(tmp_path / "ds")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tag_of_deepspeed_inside_of_a_checkpoint_belongs_to_it(stage, tmp_path):
    folder = tmp_path / "checkpoint-40"
    gathered = Net().state_dict()
    state = deepspeed(folder / "global_step40", stage=stage)
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state_0.pth")
    if stage == 3:
        save_file(gathered, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 40, "epoch": 2.0, "log_history": []}))
    [checkpoint], others = read_in(folder)
    assert (checkpoint.step, checkpoint.epoch, others) == (40, 1, [])
    assert same_tensors(checkpoint.parts["model"], gathered if stage == 3 else state)


# --- random generators --------------------------------------------------------------------------------------------


def drawn():
    return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002 - the generators that are saved


@pytest.mark.parametrize(
    "names", [("rng_state.pth",), ("rng_state_0.pth", "rng_state_1.pth"), ("random_states_0.pkl",)]
)
def test_a_training_goes_on_with_the_generators_of_the_first_process(names, tmp_path):
    folder = tmp_path / "ck"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    numbers = []
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.save(generators("accelerate" if "random" in name else "transformers"), folder / name)
        numbers.append(drawn())
    [checkpoint], _ = read_in(folder)
    assert f"{names[0]} -> random generators" in checkpoint.notes
    torch.manual_seed(99)
    assert rng.restore(checkpoint.generators) == []
    assert drawn() == numbers[0]
    assert checkpoint.extra.keys() == {name.partition(".")[0] for name in names[1:]} | (
        {"random_states_0"} if "random" in names[0] else set()
    )


def test_a_training_says_which_generators_are_not_there(tmp_path):
    state = {"model": {"w": torch.ones(2)}, "epoch": 1, "torch_rng_state": torch.get_rng_state()}
    torch.save(state, tmp_path / "a.pth")
    wanted = torch.rand(1)
    pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "root", run="r")
    options = {"run": "r", "state": {"model": {"w": torch.zeros(2)}}, "keep": [pp.Last(1)]}
    with QuietCheckpointer(tmp_path / "root", **options) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="not restored: .*'s generator: it is not in") as caught:
            ckpt.resume()
        assert torch.rand(1) == wanted
    assert [str(warning.message).split("'")[0] for warning in caught] == ["not restored: Python", "not restored: NumPy"]


@pytest.mark.parametrize("form", ["flat", "nested", "listed"])
def test_generators_beside_state_dicts(form, tmp_path):
    states = generators("transformers")
    wanted = drawn()
    content = {"model": {"w": torch.ones(2)}, "epoch": 1, "loader_rng": torch.Generator().get_state()}
    if form == "flat":
        content |= {f"{name}_rng_state": state for name, state in states.items()}
    else:
        content["rng"] = states if form == "nested" else [states]
    torch.save(content, tmp_path / "a.pth")
    [checkpoint], _ = read_in(tmp_path / "a.pth")
    assert rng.restore(checkpoint.generators) == []
    assert drawn() == wanted
    assert checkpoint.extra.keys() == {"epoch", "loader_rng"}


# --- frameworks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_that_accelerate_writes_is_there(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    both = [accelerator.prepare(*objects(seed=seed)) for seed in range(2)]
    for each in both:
        train_epoch(*each, steps=3)
    meter = torch.optim.swa_utils.AveragedModel(Net())
    accelerator.register_for_checkpointing(meter)
    accelerator.save_state(str(tmp_path / "state"))
    wanted = drawn()
    report = pp.import_checkpoints(tmp_path / "state", tmp_path / "root", run="r")
    assert report.others == ()
    loaded = pp.load("r@latest", root=tmp_path / "root")
    for number, (model, optimizer, scheduler) in enumerate(both):
        tail = f"_{number}" if number else ""
        into = Net()
        pp.load("r@latest", root=tmp_path / "root", into=into, part=f"model{tail}")
        assert same(dict(into.state_dict()), dict(accelerator.unwrap_model(model).state_dict()))
        assert same(loaded[f"optimizer{tail}"]["state"], optimizer.state_dict()["state"])
        assert loaded[f"scheduler{tail}"] == scheduler.state_dict()
    pp.load("r@latest", root=tmp_path / "root", into=meter, part="custom_checkpoint_0")
    state = {"model": Net(), "model_1": Net(), "custom_checkpoint_0": meter}
    for number in range(2):
        tail = f"_{number}" if number else ""
        optimizer = torch.optim.AdamW(state[f"model{tail}"].parameters())
        state |= {f"optimizer{tail}": optimizer, f"scheduler{tail}": torch.optim.lr_scheduler.StepLR(optimizer, 3)}
    with QuietCheckpointer(tmp_path / "root", run="r", state=state, keep=[pp.Last(1)]) as ckpt:
        ckpt.resume()
        assert drawn() == wanted


def test_an_index_larger_than_any_is_not_read(tmp_path):
    """Indexes are read to find out which files belong together, before anything is inspected."""
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as file:
        file.truncate(1 << 27)
    (tmp_path / "config.json").write_text("{}")
    [source], _ = find(tmp_path)
    with pytest.raises(pp.errors.FormatError, match=r"index\.json has more than \d+ bytes"):
        read(source, ReadOptions())


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (b"[]", pp.errors.FormatError, "has no weight_map"),
        (b'{"weight_map": {"w": 3}}', pp.errors.FormatError, "has no weight_map"),
        (b'{"metadata": ' + b"[" * 100_000, pp.errors.CorruptError, "is not JSON"),
        (b"\xff", pp.errors.CorruptError, "is not JSON"),
    ],
    ids=["list", "number", "deep", "bytes"],
)
def test_an_index_that_is_none_is_refused(text, kind, words, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    (tmp_path / "config.json").write_text("{}")
    [source], _ = find(tmp_path)
    with pytest.raises(kind, match=words):
        read(source, ReadOptions())


def test_a_file_beside_whose_name_is_no_text_does_no_harm(tmp_path):
    on_distributed(tmp_path / "dcp", {"model": {"w": torch.ones(2)}, "epoch": 1})
    (tmp_path / "dcp" / os.fsdecode(b"\xff.distcp")).write_bytes(b"x")
    report = pp.import_checkpoints(tmp_path / "dcp", tmp_path / "root", run="r")
    assert [source.status for source in report.checkpoints] == ["imported"]
