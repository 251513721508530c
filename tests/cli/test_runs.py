"""Runs as a whole on the command line: their settings, the order in which they are listed, new names, removal."""

import json

import peakpoint as pp
from commands import command, in_process
from training import checkpointer


def trained(root, run, *values, keep=None, metric="acc", **given):
    """A run with a report for each value."""
    keep = [pp.Best(metric, "max"), pp.Last(1)] if keep is None else keep
    with checkpointer(root, run=run, state={"x": 1}, keep=keep, **given) as ckpt:
        ckpt.resume()
        for value in values:
            ckpt.report({metric: value}, step=len(pp.open(root).run(run).history()) + 1)
            ckpt.wait()


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_are_shown_and_found(tmp_path):
    trained(tmp_path, "a", 0.5, config={"lr": 0.1, "opt": {"name": "[red]sgd\x1b[2J"}}, tags=["ablation", "[b]"])
    trained(tmp_path, "b", 0.6, config={"lr": 0.001})
    shown = command("ls", tmp_path, "a")
    assert "config: lr 0.1, opt.name [red]sgd\\x1b[2J\n" in shown
    assert "tags: ablation, [b]\n" in shown
    assert "config" not in command("ls", tmp_path, "b").replace("config: lr 0.001", "")
    [run] = json.loads(command("ls", tmp_path, "a", "--json"))["runs"]
    assert (run["config"]["lr"], run["tags"]) == (0.1, ["ablation", "[b]"])
    assert command("select", tmp_path, 'config.lr > 0.01 and tag == "ablation"', "--refs").startswith("a/")
    failed = in_process("select", tmp_path, "config.lrr > 1")
    assert (failed.returncode, "did you mean 'config.lr'" in failed.stderr) == (10, True)


def test_show_says_what_a_checkpoint_was_trained_with(tmp_path):
    keep = [pp.Last(9)]
    trained(tmp_path, "a", 0.5, keep=keep, config={"lr": 0.1}, tags=["first"])
    trained(tmp_path, "a", 0.6, keep=keep, config={"lr": 0.2})
    told = [json.loads(command("show", tmp_path, f"a:{step}", "--json")) for step in (1, 2)]
    assert [(one["config"], one["tags"]) for one in told] == [({"lr": 0.1}, ["first"]), ({"lr": 0.2}, ["first"])]
    assert "lr 0.1" in command("show", tmp_path, "a:1")
