"""The kept corpus passes every time; from it each target is fuzzed for some seconds. ``__main__`` does it for hours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.__main__ import CORPUS
from tests.fuzz.targets import ALLOWED, TARGETS

ROOT = Path(__file__).parents[2]
RUNS = 3000


def outcome(target, path):
    try:
        TARGETS[target](path.read_bytes())
    except ALLOWED as error:
        return str(error)
    return ""


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus(target):
    """Each target reads one input at least, so that mutations start from something that is read to its end."""
    outcomes = {path.name: outcome(target, path) for path in sorted((CORPUS / target).iterdir())}
    assert "" in outcomes.values(), outcomes


def test_the_corpus_has_no_folder_without_a_target():
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_mutations_end_in_errors_of_ours_only(target, tmp_path):
    pytest.importorskip("atheris")
    fuzzing = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, f"-runs={RUNS}", "-seed=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert fuzzing.returncode == 0, fuzzing.stderr[-4000:]
    assert f"stat::number_of_executed_units: {RUNS}" in fuzzing.stderr
