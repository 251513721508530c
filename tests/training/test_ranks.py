"""Several processes that train one model: every scenario of rank_scenarios.py, in an interpreter that forks."""

import hashlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import peakpoint as pp
from peakpoint.errors import ConfigError
from peakpoint.repository.root import Repository
from peakpoint.state import rng
from peakpoint.state.saved import read_trees
from peakpoint.store import LocalStore
from peakpoint.training import rank_reports
from training import checkpointer

SCRIPT = Path(__file__).parents[1] / "support" / "rank_scenarios.py"


@pytest.fixture(scope="module")
def results():
    """What each scenario has returned, by its name."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def of_ranks(result, size=2):
    """What the ranks have returned, all of which have ended well."""
    returned, statuses = result
    assert statuses == [0] * size, returned
    return returned


def errors(result, size=2):
    return [tuple(error) for error in of_ranks(result, size)]


def test_a_training_goes_on_exactly_on_every_rank(results):
    scenario = results["resumes_exactly"]
    straight = of_ranks(scenario["straight"])
    assert straight[0]["digest"] != straight[1]["digest"], "the ranks have generators of their own"
    assert sorted(straight[0]["drawn"] + straight[1]["drawn"]) == list(range(24))
    for place in ("inside", "end"):
        assert scenario[f"{place} killed"] == [[None, None], [9 << 8, 9 << 8]]
        assert of_ranks(scenario[f"{place} resumed"]) == straight
    assert scenario["names"] == ["0.bias", "0.weight", "2.bias", "2.weight"], "DistributedDataParallel is not seen"
    assert scenario["parts"] == ["model", "optimizer", "scheduler", "noise"]


def test_messages_of_any_size_arrive(results):
    assert of_ranks(results["messages_of_any_size"]) == [[True, True], [True, True]]


def test_metrics_are_those_of_rank_0_or_of_all(results):
    scenario = results["reduces"]
    *reduced, (name, value) = [{}, *scenario["metrics"][:-1], *scenario["metrics"][-1].items()][1:]
    assert reduced == [
        {"a": 1.0},
        {"a": 2.0, "b": -0.5},
        {"a": 3.0, "b": 0.0},
        {"a": 1.0, "b": -1.0},
        {"a": 4.0, "b": -1.0},
    ]
    assert name == "a"
    assert math.isnan(value)
    for other_names, unknown, only_one in of_ranks(scenario["ranks"]):
        assert other_names[0] == unknown[0] == "ConfigError"
        assert "rank 1 reports a1, and rank 0 a0" in other_names[1]
        assert "reduce= takes 'mean' or 'max' or 'min' or 'sum', not 'median'" in unknown[1]
        assert only_one[0] == "ConflictError"
        assert "reduce is 'max' on rank 1 and None on rank 0" in only_one[1]


def test_all_ranks_stop_early_by_the_metrics_of_rank_0(results):
    first, second = of_ranks(results["stops_together"])
    assert first == second
    assert first[0] == [0, 1, 2, 3]
    assert "patience 2" in first[1]
    assert first[2:] == [[], first[1]], "a training that has stopped stays so when it is run again"


def test_a_signal_on_one_rank_saves_and_ends_all(results):
    scenario = results["one_is_preempted"]
    assert scenario["ranks"] == [[None, None], [75 << 8, 75 << 8]]
    assert scenario["reasons"] == ["preempted by SIGTERM"]


def test_ranks_that_part_are_told_so_on_every_rank(results):
    for kind, text in errors(results["names_differ"]):
        assert kind == "ConfigError"
        assert "rank 0 calls it 'r0', rank 1 'r1'" in text
    (kind, first), (_, second) = errors(results["calls_differ"])
    assert kind == "ConflictError"
    assert first.startswith("rank 1 calls save() where rank 0 calls report()")
    assert second.startswith("rank 0 calls report() where rank 1 calls save()")


def test_an_error_on_one_rank_is_raised_on_all_and_they_can_go_on(results):
    scenario = results["one_rank_fails"]
    ranks = of_ranks(scenario["ranks"], 3)
    texts = [not_a_number[1] for not_a_number, _ in ranks]
    assert texts[1] == "metric 'loss' is 'much', a str; report one real number"
    assert texts[0] == texts[2] == f"rank 1: {texts[1]}"
    assert all("step is 2 on rank 2 and 1 on rank 0" in other_step[1] for _, other_step in ranks)
    assert scenario["metrics"] == [{"loss": 1.0}]


def test_a_missing_rank_is_named(results):
    returned, statuses = results["one_rank_makes_none"]
    assert statuses == [0, 0, 0]
    assert returned[1] is None
    for kind, text in (returned[0], returned[2]):
        assert kind == "ConflictError"
        assert text.startswith("this training has 3 ranks, and rank 1 made no Checkpointer within 0:00:03")
    scenario = results["one_rank_ends"]
    (failed, _), _ = scenario["ranks"][0]
    assert failed[0] == "ConflictError"
    assert failed[1].startswith("rank 1 of 2 did not come to report()")
    assert scenario["metrics"] == [{"loss": 1.0}], "what was saved before is durable"
    assert scenario["holder"] is None


def test_another_number_of_ranks_goes_on_from_what_all_share(results):
    scenario = results["other_sizes"]
    for size in (1, 3):
        ended = of_ranks(scenario[f"end {size}"], size)
        loose = of_ranks(scenario[f"loose {size}"], size)
        for ranks, epoch in ((ended, 2), (loose, 1)):
            assert [rank["failed"] for rank in ranks] == [None] * size
            assert [rank["next"] for rank in ranks] == [[epoch, False]] * size
            assert len({rank["weight"] for rank in ranks}) == 1
            for numbers in ("numbers", "noise"):
                assert len({tuple(rank[numbers]) for rank in ranks}) == size, "no two ranks draw the same numbers"
        goes_on = "2 processes saved this checkpoint, and " + (
            "1 process goes on" if size == 1 else "3 processes go on"
        )
        anew = "the random generators: each rank's are seeded anew"
        assert [anew in text and goes_on in text for text in ended[0]["warned"]] == [True]
        assert "not restored: the place inside epoch 1" in loose[0]["warned"][0]
        for refused in of_ranks(scenario[f"strict {size}"], size):
            kind, text = refused["failed"]
            assert kind == "MismatchError"
            assert text.startswith(goes_on)
            assert "Continue with 2 processes" in text


def test_ranks_that_train_different_models_are_warned_of(results):
    first, second = of_ranks(results["replicas_differ"])
    (warning,) = first
    assert "what state['model'] holds on rank 1 is not what rank 0 holds, which is saved" in warning
    assert second == []


def test_a_save_that_fails_is_an_error_on_every_rank(results):
    scenario = results["a_save_fails"]
    for waited, saved in of_ranks(scenario["ranks"]):
        assert waited[0] == "SaveFailedError"
        assert "No space left" in waited[1]
        assert saved
    assert [values["loss"] for values in scenario["metrics"]] == [1.0, 2.0, 3.0]


def test_ranks_that_do_not_see_the_same_directory_are_refused(results):
    for kind, text in errors(results["other_directories"]):
        assert kind == "StoreError"
        assert "is not the directory that rank 0 writes" in text
        assert "Ranks on several hosts need a directory that all of them see" in text


def test_a_group_that_ends_before_the_checkpointer_loses_nothing(results):
    scenario = results["the_group_ends_first"]
    for reported, closed in of_ranks(scenario["ranks"]):
        assert "comes after torch.distributed.destroy_process_group()" in reported[1]
        assert closed is None
    assert scenario["metrics"] == [{"loss": 1.0}]
    assert scenario["holder"] is None


def test_a_change_after_a_report_is_an_error_on_every_rank(results):
    scenario = results["steps_after_its_report"]
    for at_end, at_break in of_ranks(scenario["ranks"]):
        for kind, text in (at_end, at_break):
            assert kind == "ConfigError"
            assert "Nothing is lost: the present state is saved as epoch0_step1-2" in text
    assert scenario["counts"] == [1, 1]


def test_saves_on_request_and_two_runs_in_one_training(results):
    scenario = results["asks_and_waits"]
    first, second = of_ranks(scenario["ranks"])
    assert first == second
    assert [(name, saved) for name, saved, _ in first] == [("step0", True), ("step1", True), ("step1-2", True)]
    assert scenario["second"] == 7


def test_every_sample_comes_once_per_epoch_through_a_kill(results):
    scenario = results["loads_with_workers"]
    assert scenario["statuses"] == [9 << 8, 9 << 8]
    after = of_ranks(scenario["after"])
    for rank in (0, 1):
        assert len(scenario["before"][rank]["1"]) == 8, "killed after four batches of two"
        assert "0" not in after[rank]
    of_epoch = [number for ranks in (scenario["before"], after) for rank in ranks for number in rank["1"]]
    assert sorted(of_epoch) == list(range(30))


# --- pure ---------------------------------------------------------------------------------------------------------


def test_reduce_is_taken_by_one_process_as_well(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(loss=2.0, step=1, reduce="mean")
        with pytest.raises(ConfigError, match="not 'maximum'"):
            ckpt.report(loss=2.0, step=2, reduce="maximum")
    (checkpoint,) = pp.open(tmp_path).run("r").checkpoints()
    assert checkpoint.metrics == {"loss": 2.0}


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_seeded_states_are_those_right_after_seeding(seed):
    assert rng.restore(rng.seeded(seed)) == []
    assert random.random() == random.Random(seed).random()
    assert np.random.rand() == np.random.RandomState(seed % 2**32).rand()  # noqa: NPY002
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    for one, other in (
        (random.Random(), random.Random(seed)),
        (np.random.default_rng(), np.random.default_rng(seed)),
        (np.random.RandomState(), np.random.RandomState(seed % 2**32)),
    ):
        rng.seed_anew(one, seed)
        assert one.random() == other.random()


def test_one_process_goes_on_where_a_rank_of_two_saved_exactly_by_the_rule(tmp_path):
    """The rule of docs/format.md: seeds are the first 63 bits of a SHA-256."""
    subprocess.run([sys.executable, str(SCRIPT), "saves_once", str(tmp_path)], check=True)
    store = LocalStore(tmp_path)
    trees = read_trees(store, Repository(store).find_manifest("r@latest"))
    text = msgspec.json.encode([trees.rng, "", 1, 0], order="sorted")
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    with checkpointer(tmp_path) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="seeded anew"):
            ckpt.resume()
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))


def test_metrics_of_one_report_are_its_own():
    report = rank_reports.RankReport({"a": 1.0}, None, None, None, None, None)
    assert rank_reports.metrics_of([report]) == {"a": 1.0}
