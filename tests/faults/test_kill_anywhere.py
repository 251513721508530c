"""An unmodified script, killed from outside at file events of its saves and run again by the same command."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import peakpoint as pp
from peakpoint.repository import audit

HERE = Path(__file__).parents[1] / "support"
POINTS = 24


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("preload") / "kill_at.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "kill_at.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def run(out, preload=None, at=0):
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if preload is not None:
        log = out.with_suffix(".log")
        environment |= {
            "LD_PRELOAD": str(preload),
            "KILL_ROOT": str(out / "runs"),
            "KILL_AT": str(at),
            "KILL_LOG": str(log),
        }
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", str(HERE / "killed_script.py"), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def newest_step(out):
    """The step of the newest complete checkpoint, None when there is none."""
    if not (out / "runs" / "peakpoint.json").is_file():
        return None
    repository = pp.open(out / "runs")
    manifests = repository.runs()[0].manifests() if repository.runs() else ()
    return manifests[-1].step if manifests else None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_script_killed_anywhere_resumes_by_the_same_command(tmp_path, preload, capsys):
    whole = run(tmp_path / "whole", preload)
    assert whole.returncode == 0, whole.stderr
    events = (tmp_path / "whole.log").read_text().split()
    kinds = Counter(events)
    assert {"write", "fsync", "renameat", "linkat", "unlinkat", "mkdirat", "openat64"} <= set(kinds), kinds
    expected = torch.load(tmp_path / "whole" / "final.pt", weights_only=True)
    ticks = sorted({1 + index * (len(events) - 1) // (POINTS - 1) for index in range(POINTS)})

    def one(tick):
        out = tmp_path / f"killed-{tick}"
        killed = run(out, preload, tick)
        assert killed.returncode == -signal.SIGKILL, (tick, killed.returncode, killed.stderr)
        step = newest_step(out)
        again = run(out)
        assert again.returncode == 0, (tick, again.stderr)
        said = re.findall(r"resumed from step (\d+)", again.stdout)
        assert said == ([] if step is None else [str(step)]), (tick, step, again.stdout)
        weights = torch.load(out / "final.pt", weights_only=True)
        assert all(torch.equal(weights[name], value) for name, value in expected.items()), tick
        assert not audit.audit(pp.open(out / "runs"), deep=True).of_kind("damage"), tick
        shutil.rmtree(out)
        return step

    with ThreadPoolExecutor(2) as pool:
        steps = list(pool.map(one, ticks))
    assert len(set(steps)) > 4, "the kills were to fall into different saves"
    with capsys.disabled():
        print(f"\nkilled at {len(ticks)} of {len(events)} file events: {dict(kinds)}")
