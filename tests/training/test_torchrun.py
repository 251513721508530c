"""The script of docs/several-processes.md, as its reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peakpoint as pp
from peakpoint.repository.audit import audit

PAGE = Path(__file__).parents[2] / "docs" / "several-processes.md"


def torchrun(place, name, ranks):
    """Run a script of the page; returns what it has printed."""
    (script,) = re.findall(rf"^```python\n(# {name}\.py.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (place / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py"]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    # torch 2.13 sometimes aborts when an interpreter with a device mesh ends, also without Peakpoint
    has_aborted = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or has_aborted, done.stderr
    return done.stderr


@pytest.mark.slow  # seconds for each start of a rank
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_script_of_the_page_runs_under_torchrun(tmp_path, ranks):
    assert torchrun(tmp_path, "train", ranks).count("peakpoint: new run 'ddp'") == 1
    repository = pp.open(tmp_path / "runs")
    assert audit(repository, deep=True).clean
    newest = repository.run("ddp").checkpoints()[-1]
    assert newest.epoch == 2
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    pp.load(newest, into=model)
    assert torchrun(tmp_path, "train", ranks).count("nothing left to do: 3 of 3 epochs are complete") == 1


@pytest.mark.slow
def test_the_divided_model_of_the_page_is_loaded_by_one_process(tmp_path):
    assert torchrun(tmp_path, "train_divided", 2).count("peakpoint: new run 'divided'") == 1
    assert audit(pp.open(tmp_path / "runs"), deep=True).clean
    newest = pp.open(tmp_path / "runs").run("divided").checkpoints()[-1]
    assert newest.step == 20
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    pp.load(newest, into=model)
    assert pp.load(newest).tensor("model", "0.weight").shape == (64, 8)
    assert torchrun(tmp_path, "train_divided", 3).count("nothing left to do: 20 of 20 steps are complete") == 1
