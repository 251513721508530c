"""The newest is the newest: epochs and steps are found where each tool keeps them, and counted as it counts."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

import peakpoint as pp
from commands import in_process
from foreign_files import read_alone
from peakpoint.exchange.state_dicts import ReadOptions, from_dict

WEIGHTS = {"w": torch.ones(2)}


def read(content, **options):
    return from_dict({"model": WEIGHTS, **content}, Path("x.pth"), ReadOptions(**options))


def lightning(epoch, ready, **loop):
    progress = {"epoch_progress": {"current": {"ready": ready, "completed": epoch}}, **loop}
    return {"pytorch-lightning_version": "2.6.0", "epoch": epoch, "global_step": 40, "loops": {"fit_loop": progress}}


def fairseq(epoch, iterations):
    state = {"train_iterator": {"epoch": epoch, "iterations_in_epoch": iterations, "version": 2}}
    return {"extra_state": state, "optimizer_history": [{"num_updates": 3}, {"num_updates": 40}]}


NNUNET = {"current_epoch": 5, "trainer_name": "nnUNetTrainer", "init_args": {"fold": 0}}
MMENGINE = {"mmengine_version": "0.10.4"}
NANOGPT = {"iter_num": 40, "model_args": {"n_layer": 2}, "best_val_loss": 2.5}

KNOWN = {  # after five epochs and forty steps; the index of that epoch is 4
    "lightning": (lightning(4, 5), 4, 40, True),
    "lightning, saved after fit": (lightning(5, 5), 4, 40, True),
    "lightning, inside an epoch": (
        lightning(4, 5, **{"epoch_loop.batch_progress": {"is_last_batch": False}}),
        *(4, 40, False),
    ),
    "nnU-Net": (NNUNET, 4, None, True),
    "MMEngine, by epoch": ({"meta": {**MMENGINE, "epoch": 5, "iter": 40}}, 4, 40, True),
    "MMEngine, by step": ({"meta": {**MMENGINE, "epoch": 0, "iter": 40}}, None, 40, True),
    "nanoGPT": (NANOGPT, None, 40, True),
    "DeepSpeed": ({"global_steps": 40, "ds_version": "0.15", "global_samples": 640}, None, 40, True),
    "fairseq": (fairseq(6, 0), 4, 40, True),
    "fairseq, inside an epoch": (fairseq(5, 17), 4, 40, False),
    "fairseq, before all": (fairseq(1, 0), None, 40, True),
    "torchtune": ({"epochs_run": 5, "total_epochs": 9, "seed": 1}, 4, None, True),
    "torchtitan": ({"train_state": {"step": torch.tensor(40), "ntokens_seen": 8}}, None, 40, True),
}


@pytest.mark.parametrize("epochs_from", [0, 1])
@pytest.mark.parametrize(("content", "epoch", "step", "complete"), KNOWN.values(), ids=KNOWN)
def test_counters_of_tools_that_are_known(content, epoch, step, complete, epochs_from):
    checkpoint = read(content, epochs_from=epochs_from)
    assert (checkpoint.epoch, checkpoint.step, checkpoint.complete) == (epoch, step, complete)
    assert checkpoint.tool != "torch.save"
    assert checkpoint.epoch is None or checkpoint.from_zero
    assert not checkpoint.metrics.keys() & {"epoch", "current_epoch", "iter_num", "global_steps", "epochs_run"}


UNKNOWN = {
    "capitals": ({"Epoch": 4, "Step": 40}, 4, 40),
    "capitals in one word": ({"EPOCH": 4, "Global_Step": 40}, 4, 40),
    "the exact name first": ({"Epoch": 3, "epoch": 4}, 4, None),
    "current_epoch": ({"current_epoch": 4}, 4, None),
    "meta": ({"meta": {"epoch": 4, "iter": 40}}, 4, 40),
    "train_iterator": ({"extra_state": {"train_iterator": {"epoch": 4}}}, 4, None),
    "iter_num": ({"iter_num": 40}, None, 40),
    "global_steps": ({"global_steps": 40}, None, 40),
    "trainer": ({"trainer": {"iteration": 40, "epoch": 4}}, 4, 40),
    "tensors": ({"epoch": torch.tensor(4), "step": np.int64(40)}, 4, 40),
    "top before deeper": ({"epoch": 4, "meta": {"epoch": 9}}, 4, None),
}


@pytest.mark.parametrize(("content", "epoch", "step"), UNKNOWN.values(), ids=UNKNOWN)
def test_counters_under_usual_names_count_as_the_user_says(content, epoch, step):
    checkpoint = read(content)
    assert (checkpoint.epoch, checkpoint.step, checkpoint.from_zero) == (epoch, step, False)
    assert ("epoch from meta.epoch" in checkpoint.notes) == ("iter" in content.get("meta", {}))


def test_a_key_of_the_user_s_comes_before_usual_names():
    content = {"epoch": 1, "progress": {"done.epochs": 7, "args": argparse.Namespace(updates=40)}}
    checkpoint = read(content, epoch_key="progress.done.epochs", step_key="progress.args.updates")
    assert (checkpoint.epoch, checkpoint.step) == (7, 40)
    assert "epoch from progress.done.epochs" in checkpoint.notes
    assert not read(lightning(4, 5), epoch_key="epoch").from_zero, "what the user says counts from where the user says"


@pytest.mark.parametrize("key", ["progress.x", "progress", "name", "rate", "lost"])
def test_a_key_without_a_whole_number_is_refused_with_those_that_have_one(key):
    content = {"progress": {"epochs_done": 7}, "name": "net", "rate": 0.5, "lost": -1}
    with pytest.raises(
        pp.errors.FormatError, match=rf"x\.pth: --epoch-key {key}: .* the file has progress.epochs_done"
    ):
        read(content, epoch_key=key)


def test_numbers_that_may_be_counters_are_named():
    checkpoint = read({"progress": {"epochs_done": 7, "updates": torch.tensor(40)}, "lr": 0.1})
    assert (checkpoint.epoch, checkpoint.step) == (None, None)
    [note] = [note for note in checkpoint.notes if "--epoch-key" in note]
    assert "progress.epochs_done or progress.updates" in note


def test_metrics_whose_names_become_the_same_are_all_kept():
    checkpoint = read({"val loss": 0.5, "val_loss": 0.9, "metrics": {"val_loss": 0.7, "acc": 1.0}})
    assert checkpoint.metrics == {"val_loss_2": 0.5, "val_loss": 0.9, "metrics/val_loss": 0.7, "acc": 1.0}


# --- imports ------------------------------------------------------------------------------------------------------


def save_in_wrong_order(folder, content_of):
    """Save three files whose names sort wrongly."""
    folder.mkdir()
    for name, number in (("checkpoint_best", 7), ("checkpoint_final", 10), ("checkpoint_latest", 9)):
        content = {"model": WEIGHTS, **content_of(number), "mark": torch.tensor([number, number])}
        torch.save(content, folder / f"{name}.pth")


def test_the_newest_is_the_newest_wherever_the_epoch_is(tmp_path):
    save_in_wrong_order(tmp_path / "files", lambda number: {"history": {"rounds": number}})
    refused = in_process("import", tmp_path / "files", tmp_path / "root", "--run", "r", "--dry-run")
    assert "--epoch-key or --step-key" in refused.stdout
    root = tmp_path / "root"
    imported = in_process("import", tmp_path / "files", root, "--run", "r", "--epoch-key", "history.rounds")
    assert imported.returncode == 0, imported.stderr
    assert [checkpoint.epoch for checkpoint in pp.open(root).run("r").checkpoints()] == [7, 9, 10]
    assert pp.load("r@latest", root=root)["extra"]["mark"].tolist() == [10, 10]


def test_no_advice_on_epochs_of_tools_that_are_known(tmp_path):
    for epoch in (1, 2):
        torch.save({"state_dict": WEIGHTS, **lightning(epoch, epoch + 1)}, tmp_path / f"epoch={epoch}.ckpt")
    report = pp.import_checkpoints(tmp_path, tmp_path / "root", run="r")
    assert not any("--epochs-from" in note for note in report.notes)
    insisting = pp.import_checkpoints(tmp_path, tmp_path / "root", run="r", epochs_from=1)
    assert {source.status for source in insisting.checkpoints} == {"there"}, "it is for other files, and for logs"
    assert all(
        any("--epochs-from 1 is not for it" in note for note in source.notes) for source in insisting.checkpoints
    )
    assert [checkpoint.epoch for checkpoint in pp.open(tmp_path / "root").run("r").checkpoints()] == [1, 2]


def test_what_peakpoint_exports_is_known(tmp_path):
    torch.save({"model": WEIGHTS, "epoch": 1, "pytorch-lightning_version": "2.6.0"}, tmp_path / "a.ckpt")
    pp.import_checkpoints(tmp_path / "a.ckpt", tmp_path / "root", run="r")
    (tmp_path / "files").mkdir()
    exported = in_process("export", tmp_path / "root", "r@latest", "--to", tmp_path / "files" / "a.safetensors")
    assert exported.returncode == 0, exported.stderr
    report = pp.import_checkpoints(tmp_path / "files", tmp_path / "again", run="r")
    assert report.notes == ()
    assert pp.open(tmp_path / "again").run("r").latest().epoch == 1


@pytest.mark.parametrize(
    ("version", "tool"),
    [
        ("2.6.0", "lightning 2.6.0"),
        ("\ud800", "lightning ?"),
        ("2" * 100_000, f"lightning {'2' * 40}"),
        ([], "lightning"),
    ],
    ids=["honest", "broken", "long", "none"],
)
@pytest.mark.parametrize("best", [{"a.ckpt": 2.0}, "ab", [1], 3, None], ids=repr)
def test_odd_entries_of_lightning_do_not_bar_the_rest(version, tool, best, tmp_path):
    callbacks = {"ModelCheckpoint": {"monitor": "loss", "best_model_score": 1.0, "best_k_models": best}}
    content = {"state_dict": WEIGHTS, "pytorch-lightning_version": version, "callbacks": callbacks}
    torch.save(content, tmp_path / "a.ckpt")
    checkpoint = read_alone(tmp_path / "a.ckpt")
    assert checkpoint.tool == tool
    assert checkpoint.metrics == {"best_loss": 1.0} | ({"loss": 2.0} if isinstance(best, dict) else {})
