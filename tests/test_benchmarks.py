"""The benchmarks run; what they measure is nobody's business here."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_small_benchmark_runs(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--scale", "0.05", "--repeats", "1", "--json", str(figures)]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, "--place", str(tmp_path)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peakpoint" in done.stdout
    assert json.loads(figures.read_text())["tensors"] == 592
    assert not list(tmp_path.glob(".benchmark-*")), "it cleans up"
