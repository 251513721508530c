"""Several ranks that save and load with torch.distributed.checkpoint: the scenarios of distributed_scenarios.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "distributed_scenarios.py"
SIZES = (1, 2, 3, 4)

pytestmark = pytest.mark.slow  # half a minute


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


@pytest.mark.parametrize("size", SIZES)
def test_what_ranks_save_is_whole_for_one_process_bit_for_bit(results, size):
    scenario = results["saved_and_loaded"]
    (had, *others) = of_ranks(scenario[f"saved {size}"], size)
    assert all(other == had for other in others)
    assert scenario[f"whole {size}"] == had
    assert {path.split(".")[1] for path in had} == {"model", "optim", "boxes", "plain", "note", "tokens"}
    assert scenario[f"audit {size}"]
    files = scenario[f"files {size}"]
    shards = [f"model+rank{rank}.safetensors" for rank in range(size)] if size > 1 else ["model.safetensors"]
    assert [file for file in files if file.startswith("model")] == shards


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("saved", SIZES)
def test_any_number_of_ranks_loads_it_bit_for_bit(results, saved, size):
    scenario = results["saved_and_loaded"]
    assert of_ranks(scenario[f"loaded {saved} {size}"], size) == [scenario[f"whole {saved}"]] * size


def test_a_rank_that_is_killed_leaves_no_checkpoint(results):
    scenario = results["a_rank_is_killed"]
    assert scenario["ranks"] == [["failed", None, "failed"], [0, 9, 0]]
    assert scenario["checkpoints"] == 0
    assert scenario["findings"] == [["litter", "runs/r/checkpoints/step1"]]
    of_ranks(scenario["again"], 3)
    assert scenario["clean"], "the next save has deleted what was left"


def test_a_rank_whose_disk_is_full_fails_the_save_of_all_and_the_next_one_is_made(results):
    scenario = results["a_disk_is_full"]
    for failures in of_ranks(scenario["ranks"]):
        ((rank, (kind, text)),) = failures.items()
        assert (rank, kind) == ("1", "StoreError")
        assert "model+rank1.safetensors: No space left" in text
    assert scenario["steps"] == [2]
    assert scenario["holder"] is None
    assert scenario["clean"]


def test_a_flipped_byte_is_found_with_its_file_and_tensor(results):
    for failures in of_ranks(results["a_byte_is_flipped"]):
        assert failures["1"][0] == "CorruptError"
        assert "tensor '0.weight' in model+rank1.safetensors does not match its digest" in failures["1"][1]


def test_shards_inside_of_what_only_one_rank_writes_are_refused(results):
    for failures in of_ranks(results["a_tuple_has_shards"]):
        (kind, text) = failures["0"]
        assert kind == "ConfigError"
        assert text.startswith('state["a"]["b"] has tensors inside that are divided among ranks')


def test_ranks_must_read_the_same_checkpoint_and_write_into_the_same_directory(results):
    for read, saved in of_ranks(results["ranks_differ"]):
        assert read["0"][0] == saved["0"][0] == "ConflictError"
        assert "give a ref that always means the same, such as 'r/step2_loss_1.0000'" in read["0"][1]
        assert "which a rank has written, is not in" in saved["0"][1]


def test_async_save_keeps_the_state_of_its_call(results):
    scenario = results["saves_beside_the_training"]
    (had, other) = of_ranks(scenario["saved"])
    assert had == other
    assert had == scenario["whole"] | {".tokens": "17"}


@pytest.mark.parametrize("size", ["1", "2"])
def test_ranks_load_what_a_checkpointer_has_saved(results, size):
    scenario = results["loads_what_a_checkpointer_saved"][size]
    assert of_ranks(scenario["ranks"], 4) == [scenario["saved"]] * 4
