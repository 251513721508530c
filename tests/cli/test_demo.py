"""The demonstration, and what its repository is good for: from a selection to production and back."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def peakpoint(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "peakpoint", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "runs"
    said = peakpoint("demo", "--out", root, "--epochs", 12)
    assert "equal, all " in said
    assert "again, record 3" in said
    return root


def test_from_a_selection_to_production_and_back(demo):
    checks = ("--with", "peakpoint.cli.demo.training:evaluate", "--model", "peakpoint.cli.demo.training:LeNet5")
    best, other = peakpoint("select", demo, "--max", "val_accuracy", "--top", 2, "--refs").split()
    for number, ref in ((4, other), (5, best)):
        assert "checks passed, 3 skipped)" in peakpoint("validate", demo, ref, *checks)
        assert f"(record {number - 3})" in peakpoint(
            "promote", demo, ref, "--as", "challenger_1", "--why", "the best of the demonstration"
        )
    assert "Rolled back: challenger_1 is" in peakpoint("rollback", demo, "challenger_1", "--why", "too good")
    history = json.loads(peakpoint("history", demo, "challenger_1", "--json"))
    assert [one["kind"] for one in history["records"]] == ["promoted", "promoted", "rolled back"]
    assert history["damage"] == []
    assert history["records"][1]["comparison"]["paired"]["examples"] == 450
    account = json.loads(peakpoint("changelog", demo, "--json"))
    entries = account["entries"] if isinstance(account, dict) else account
    mine = [one for one in entries if one["alias"] == "challenger_1" and one["kind"] != "validated"]
    assert [one["kind"] for one in mine] == ["promoted", "promoted", "rolled back"]
    assert mine[2]["why"] == "too good"
    page = peakpoint("changelog", demo)
    assert "**challenger\\_1** rolled back from" in page
    assert "challenger_1" in peakpoint("export", demo, "@challenger_1", "--as", "card")
    assert peakpoint("audit", demo, "--deep").rstrip().endswith("clean")


def test_a_release_of_the_demonstration(demo):
    table = """
        select = "val_accuracy > 0.5"
        rank = ["max val_accuracy", "min epoch"]
        validation = { with = "peakpoint.cli.demo.training:evaluate", model = "peakpoint.cli.demo.training:LeNet5" }
        """
    (demo / "production.toml").write_text(f"format = 1\n[champion]\n{table}\n[shadow]\n{table}")
    waits = json.loads(peakpoint("release", demo, "--json"))
    assert waits["outcome"] == "unchanged", "the demonstration has ended with a roll back"
    first = json.loads(peakpoint("release", demo, "--alias", "shadow", "--json"))
    assert first["outcome"] == "promoted"
    assert json.loads(peakpoint("release", demo, "--alias", "shadow", "--json"))["outcome"] == "unchanged"
    assert json.loads(peakpoint("history", demo, "shadow", "--json"))["records"][-1]["release"] == first["id"]
