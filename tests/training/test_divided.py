"""Models whose tensors are divided among ranks: every scenario of shard_scenarios.py, in an interpreter that forks."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import peakpoint as pp
from training import checkpointer

SCRIPT = Path(__file__).parents[1] / "support" / "shard_scenarios.py"
WAYS = ["1", "2", "3", "4", "replicas", "tensors", "none"]  # "none" is one process without torch.distributed


FAST = (
    "goes_on_exactly",
    "frozen_shards",
    "refusals",
    "one_disk_is_full_for_a_while",
    "stages_of_a_pipeline",
    "averages_beside_the_model",
    "one_rank_cannot_save",
)


@functools.cache
def scenarios(*names):
    """What scenarios have returned, by their names, all from one interpreter."""
    done = subprocess.run([sys.executable, str(SCRIPT), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def scenario(name):
    return scenarios(*FAST if name in FAST else (name,))[name]


def of_ranks(result):
    """What the ranks have returned, all of which have ended well."""
    returned, statuses = result
    assert set(statuses) == {0}, returned
    return returned


def digests(result):
    """The digests of all whole tensors, which every rank must have alike, without errors."""
    returned = of_ranks(result)
    assert all(rank.get("error") is None and not rank.get("errors") for rank in returned), returned
    assert all(rank["digests"] == returned[0]["digests"] for rank in returned)
    return returned[0]["digests"]


def test_a_training_goes_on_exactly():
    result = scenario("goes_on_exactly")
    assert digests(result["first"]) != digests(result["straight"])
    assert digests(result["second"]) == digests(result["straight"])
    assert result["clean"] == [True, True]


def test_every_rank_shares_its_shards_that_stay_as_they_are():
    result = scenario("frozen_shards")
    files = result["files"]
    for rank in (0, 1):
        name = f"model+frozen+rank{rank}.safetensors"
        assert [files[step][name] for step in ("step1", "step2", "step3")] == [[False, 3], [True, 3], [True, 3]]
        assert files["step3"][f"model+rank{rank}.safetensors"] == [False, 1]
    assert [file for file, (shared, _) in files["step4"].items() if shared] == [], "other shards"
    assert len(files["step4"]) == 5, "rank 2 has nothing of four rows"
    assert result["clean"]


def test_what_could_not_be_saved_whole_is_refused():
    result = scenario("refusals")
    for late, first in of_ranks(result["ranks"]):
        assert late[0] == first[0] == "ConfigError"
        assert "call fully_shard() before" in late[1]
        assert "is a FullyShardedDataParallel, whose state_dict() talks to all ranks" in first[1]
    assert result["saved"] == []


def test_models_of_which_each_rank_has_other_layers_are_refused():
    result = scenario("stages_of_a_pipeline")
    for rank, (kind, text) in enumerate(of_ranks(result["same"])):
        assert kind == "ConfigError"
        assert "rank 2 holds other values of model.a.weight at [0, 0] than rank 0" in text, rank
        assert text.startswith("rank 0: " if rank else "rank 2 holds")
    for kind, text in of_ranks(result["own"]):
        assert kind == "ConfigError"
        assert text.startswith("state['model'] has a parameter 'a.bias' on rank 0, not on rank 2: a run keeps models")


def test_averages_beside_the_model_stay_divided():
    result = scenario("averages_beside_the_model")
    straight, again = of_ranks(result["straight"]), of_ranks(result["again"])
    assert all(rank["divided"] for rank in (*straight, *again))
    assert {tuple(rank["values"]) for rank in (*straight, *again)} == {tuple(straight[0]["values"])}


def test_what_one_rank_cannot_save_is_an_error_of_all_that_names_it():
    result = scenario("one_rank_cannot_save")
    for name, text in (
        ("odd", 'state["settings"]'),
        ("gone", "and rank 1 has none: it cannot be saved whole"),
        ("another", "state= has the parts model, optimizer, more on rank 1, and model, optimizer on rank 0"),
    ):
        for rank, (refused,) in enumerate(of_ranks(result[name])):
            assert refused[0] == "ConfigError", (name, rank)
            assert text in refused[1], (name, rank)
            if name == "odd":
                assert refused[1].startswith("rank 1: ") == (rank == 0)


@pytest.mark.slow  # half a minute
def test_a_disk_that_takes_longer_than_the_ranks_wait_for_each_other_ends_no_training():
    for slow, result in scenario("a_slow_disk").items():
        assert all(of_ranks(result["ranks"])), f"rank {slow}: the reports say how long they have waited"
        assert result["clean"]


@pytest.mark.parametrize("has_gradients", [False, True])
def test_why_the_state_of_optimizers_is_not_read_through_torch(has_gradients, tmp_path):
    """``get_optimizer_state_dict`` changes an optimizer that has not stepped; with gradients it returns no moments."""

    def cold():
        model = torch.nn.Linear(3, 2)
        if has_gradients:
            model(torch.ones(1, 3)).sum().backward()
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = cold()
    through_torch = get_optimizer_state_dict(model, optimizer)
    assert {name: moments["step"] for name, moments in through_torch["state"].items()} == (
        {} if has_gradients else {"weight": 1, "bias": 1}
    )
    assert len(optimizer.state) == (0 if has_gradients else 2), "of the optimizer itself"

    model, optimizer = cold()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.report()
        assert not optimizer.state
        optimizer.step()
        ckpt.report()
    saved = [pp.load(f"r:{step}", root=tmp_path)["optimizer"]["state"] for step in (0, 1)]
    assert saved[0] == {}
    assert len(saved[1]) == (2 if has_gradients else 0), "torch steps on nothing without gradients"


@pytest.mark.slow  # 20 seconds
def test_a_damaged_shard_is_named_and_the_resume_takes_the_checkpoint_before():
    result = scenario("a_shard_is_damaged")
    for damage, text in (
        ("missing", "model+rank1.safetensors is missing"),
        ("truncated", "model+rank1.safetensors has"),
        ("flipped", "in model+rank1.safetensors"),
    ):
        ((kind, message),) = result[damage]
        assert kind == "CorruptError"
        assert text in message
        assert digests(result[f"{damage} resumed"]) == digests(result["first step"])


@pytest.mark.slow  # 10 seconds
def test_a_rank_whose_disk_is_full_fails_the_save_on_all():
    result = scenario("one_disk_is_full")
    for rank in of_ranks(result["ranks"]):
        assert rank["errors"]
        for kind, text in rank["errors"]:
            assert kind == "SaveFailedError"
            assert "rank 1: [Errno 28]" in text
            assert "there is no copy of that moment to be written again" in text
    assert result["saved"] == []


def test_a_rank_whose_disk_was_full_once_confuses_no_later_save():
    for full, result in scenario("one_disk_is_full_for_a_while").items():
        for rank, (first, second, third) in enumerate(of_ranks(result["ranks"])):
            assert (first, third) == (None, None), f"rank {rank}, full: {full}"
            assert second[0] == "SaveFailedError"
            assert "[Errno 28]" in second[1]
        assert result["folders"] == ["step1", "step3"], "of the other ranks, too, nothing is left of the second"
        assert result["weights"] == [[1.0], [3.0]]
        assert result["clean"]


@pytest.mark.slow  # a minute
def test_every_kind_of_optimizer_comes_back_to_other_ranks():
    result = scenario("kinds_of_optimizers")
    kinds = {name.rpartition(" ")[0] for name in result}
    assert len(kinds) == 7
    for kind in kinds:
        saved = digests(result[f"{kind} saved"])
        assert digests(result[f"{kind} loaded"]) == saved, kind
        assert any("exp_avg" in name for name in saved) == (kind != "cold")


@pytest.mark.slow  # minutes
@pytest.mark.timeout(900)
def test_what_any_ranks_have_saved_any_others_load_bit_for_bit():
    result = scenario("saved_by_any_loaded_by_any")
    for way in WAYS:
        saved = digests(result[f"saved {way}"])
        assert result[f"shapes {way}"]["table.weight"] == [7, 5]
        for other in WAYS:
            assert digests(result[f"{way} by {other}"]) == saved, f"saved by {way}, loaded by {other}"
