"""The benchmarks run; what they measure is nobody's business here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import page, space

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_small_benchmark_runs(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--scale", "0.02", "--repeats", "1", "--json", str(figures)]
    command += [
        "--place",
        str(tmp_path),
        "--no-peers",
        "--figures",
        "saving",
        "loading",
        "ranks",
        "training",
        "reports",
        "catalogue",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peakpoint" in done.stdout
    found = json.loads(figures.read_text())
    assert [result["tensors"] for result in found["saving"]] == [592, 322, 400, 3, 548]
    assert all(values["durable"] for result in found["saving"] for values in result["sides"].values())
    assert {"peakpoint", "DCP", "DCP async"} <= found["ranks"]["saves"].keys() & found["ranks"]["memory"].keys()
    assert all(found["ranks"]["loads"][0].values())
    assert set(found["ranks"]["other_loads"][0]) == {"peakpoint", "DCP"}
    assert found["reports"]["reports"] == 10_000
    assert found["catalogue"]["checkpoints"] == 400
    assert all(found["catalogue"]["queries"].values())
    assert not list(tmp_path.glob(".benchmark-*")), "it cleans up"


def test_rules_keep_what_a_file_for_each_policy_keeps_in_less_space(tmp_path):
    found = space.compare(tmp_path / "s", seed=0, epochs=40, images=64)  # it asserts that all sides keep the same
    assert {policy: len(epochs) for policy, epochs in found["kept"].items()} == {
        "best_val_accuracy": 1,
        "best_val_loss": 1,
        "best_val_f1": 1,
        "epoch": 4,
        "last": 3,
        "best_at": 3,
    }
    assert found["kept"]["last"] == [37, 38, 39]
    whole, thin, files = (found["sides"][name] for name in ("peakpoint", page.THIN, page.NAIVE))
    assert thin["bytes"] < whole["bytes"] < files["bytes"]
    assert whole["written"] < files["written"]


def test_a_frozen_backbone_is_on_the_disk_once(tmp_path):
    found = space.fine_tune(tmp_path / "f", scale=0.25)
    assert found["bytes"] < found["backbone"] + found["checkpoints"] * (found["changed"] + 150_000)
    assert found["files"] > found["checkpoints"] * found["backbone"]


def test_the_page_is_what_the_figures_say():
    assert page.PAGE.read_text() == page.render(json.loads(page.RESULTS.read_text()))
