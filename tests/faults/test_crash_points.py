"""Crash points, enumerated: crashes.py does the work in an interpreter of its own that forks and has no threads."""

import subprocess
import sys
from pathlib import Path

import pytest

VERBS = ["archive", "restore", "trash", "undo", "keep", "soup"]
RELEASES = ["first", "next", "rollback"]
KINDS = ["single", "several", "frozen", "thinned"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("power", "single"),
        *(pytest.param("power", kind, marks=pytest.mark.slow) for kind in KINDS[1:]),
        *(pytest.param("kill", kind, marks=pytest.mark.slow) for kind in KINDS),  # minutes
    ],
)
def test_nothing_durable_is_lost(what, kind, record_property):
    enumerate_points("crashes.py", what, kind, record_property)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("what", "verb"),
    [
        ("power", "trash"),
        *(pytest.param("power", verb, marks=pytest.mark.slow) for verb in VERBS if verb != "trash"),
        *(pytest.param("kill", verb, marks=pytest.mark.slow) for verb in VERBS),
    ],
)
def test_upkeep_can_be_cut_short_anywhere(what, verb, record_property):
    enumerate_points("crashes_of_upkeep.py", what, verb, record_property)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("what", "verb"),
    [
        ("power", "rollback"),
        ("kill", "rollback"),
        *(pytest.param(what, verb, marks=pytest.mark.slow) for verb in RELEASES[:2] for what in ("power", "kill")),
    ],
)
def test_production_can_be_cut_short_anywhere(what, verb, record_property):
    enumerate_points("crashes_of_release.py", what, verb, record_property)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("what", "size"), [("replicated", "2"), ("replicated", "3"), ("divided", "2")])
def test_ranks_can_be_killed_anywhere(what, size, record_property):
    enumerate_points("crashes_of_ranks.py", what, size, record_property)


def enumerate_points(script, what, kind, record_property):
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / script), what, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    record_property("points", done.stdout.strip())
    assert "points" in done.stdout or "disks" in done.stdout
