"""The benchmarks run; what they measure is nobody's business here."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import page

ROOT = Path(__file__).parents[1]


def test_a_small_benchmark_runs(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--scale", "0.02", "--repeats", "1", "--json", str(figures)]
    command += ["--place", str(tmp_path), "--no-peers", "--figures", "saving", "loading", "training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peakpoint" in done.stdout
    found = json.loads(figures.read_text())
    assert [result["tensors"] for result in found["saving"]] == [592, 322, 400, 3, 548]
    assert all(values["durable"] for result in found["saving"] for values in result["sides"].values())
    assert not list(tmp_path.glob(".benchmark-*")), "it cleans up"


def test_the_page_is_what_the_figures_say():
    assert page.PAGE.read_text() == page.render(json.loads(page.RESULTS.read_text()))
