"""Runs as a whole on the command line: their settings, the order in which they are listed, new names, removal."""

import json
import re

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


def listed(root, *arguments):
    return [run["name"] for run in json.loads(command("ls", root, *arguments, "--json"))["runs"]]


def test_runs_are_listed_best_first(tmp_path):
    for run, *values in (("net-a", 0.5, 0.1), ("net-b", 0.9, 0.2), ("other", 0.7)):
        trained(tmp_path, run, *values)
    trained(tmp_path, "low", 0.3, 0.8, metric="loss", keep=[pp.Best("loss", "min")])
    trained(tmp_path, "lower", 0.2, metric="loss", keep=[pp.Best("loss", "min")])
    assert listed(tmp_path, "--sort", "acc") == ["net-b", "other", "net-a", "lower", "low"], "those without it last"
    assert listed(tmp_path, "--sort", "loss") == ["lower", "low", "other", "net-b", "net-a"]
    assert listed(tmp_path, "--match", "net-*") == ["net-b", "net-a"]
    text = command("ls", tmp_path, "--sort", "acc", "--match", "*o*")
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["other", "lower", "low"]
    assert "loss (min)" not in text, "only the metric that they are sorted by"
    assert "3 runs, 3 checkpoints" in text
    assert "no runs yet of a name that matches x* in" in command("ls", tmp_path, "--match", "x*")
    for arguments, code, words in (
        (["--sort", "ac"], 10, "did you mean 'acc'"),
        (["--sort", "acc", "other"], 2, "leave them out"),
        (["--match", "low*", "--sort", "acc"], 10, "they rank by loss"),
    ):
        failed = in_process("ls", tmp_path, *arguments)
        assert (failed.returncode, words in failed.stderr) == (code, True), failed.stderr
    trained(tmp_path, "odd", 0.2, keep=[pp.Best("acc", "min")])
    failed = in_process("ls", tmp_path, "--sort", "acc")
    assert (failed.returncode, "choose with --match" in failed.stderr) == (2, True)
    assert listed(tmp_path, "--sort", "acc", "--match", "net*") == ["net-b", "net-a"]


def test_of_many_runs_the_best_are_shown(tmp_path):
    for number in range(31):
        trained(tmp_path, f"r{number:02}", number / 100, keep=[pp.Best("acc", "max")])
    text = command("ls", tmp_path, "--sort", "acc")
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["r30", "r29"]
    assert ("r00 " in text, "and 1 more run; --all lists them all" in text) == (False, True)
    assert "r00 " in command("ls", tmp_path, "--sort", "acc", "--all")


def test_a_measurement_is_taken_back(tmp_path):
    trained(tmp_path, "a", 0.5)
    command("record", tmp_path, "a@latest", "acc=0.99", "late=1")
    assert command("record", tmp_path, "a@latest", "--remove", "acc") == (
        f"a/{pp.open(tmp_path).run('a').latest().name} has its recorded acc no more\n"
    )
    assert command("select", tmp_path, "acc > 0.9", "--refs") == ""
    told = json.loads(command("explain", tmp_path, "a@latest", "--json"))
    assert [one["metrics"] for one in told["measured"]] == [{"late": 1.0}]
    assert "withdrawn: `acc 0.99` (" in command("changelog", tmp_path)
    assert "late" not in command("record", tmp_path, "a@latest", "--remove", "late", "--json")
    for arguments, code, words in (
        (["--remove", "acc"], 10, "no value of 'acc' was recorded"),
        (["x=1", "--remove", "acc"], 2, "one after the other"),
        ([], 2, "give at least one metric"),
    ):
        failed = in_process("record", tmp_path, "a@latest", *arguments)
        assert (failed.returncode, words in failed.stderr) == (code, True), failed.stderr


def test_a_run_is_renamed(tmp_path):
    trained(tmp_path, "a", 0.5)
    trained(tmp_path, "b", 0.6)
    assert "run a is called c now; a training of it needs run='c'" in command("rename", tmp_path, "a", "c")
    assert sorted(listed(tmp_path)) == ["b", "c"]
    assert command("select", tmp_path, "acc < 0.6", "--refs").startswith("c/")
    for arguments, code, words in ((["c", "b"], 11, "has a run 'b'"), (["a", "d"], 10, "it is called 'c' now")):
        failed = in_process("rename", tmp_path, *arguments)
        assert (failed.returncode, words in failed.stderr) == (code, True), failed.stderr


def test_a_whole_run_is_removed_after_its_plan_was_shown(tmp_path):
    for run in ("a", "b", "c"):
        trained(tmp_path, run, 0.5, 0.4)
    failed = in_process("rm", tmp_path, "a", "--run", "--yes")
    assert (failed.returncode, "add --undo-for 0" in failed.stderr) == (2, True)
    plan = command("rm", tmp_path, "a", "b", "--run", "--undo-for", "0")
    assert "a: 2 checkpoints, 2 reports, frees " in plan
    assert "nothing is removed yet; add --yes to remove them permanently: checkpoints, trash, journal" in plan
    assert listed(tmp_path) == ["c", "b", "a"]
    command("pin", tmp_path, "b@latest", "--why", "figure 3")
    failed = in_process("rm", tmp_path, "a", "b", "--run", "--undo-for", "0", "--yes")
    assert (failed.returncode, "(pinned: figure 3)" in failed.stderr) == (11, True)
    assert listed(tmp_path) == ["c", "b", "a"], "nothing of the others either"
    assert "removed permanently" in command("rm", tmp_path, "a", "--run", "--undo-for", "0", "--yes")
    assert listed(tmp_path) == ["c", "b"]
    assert in_process("rm", tmp_path, "a", "--run", "--undo-for", "0").returncode == 10
    assert "damaged" not in command("audit", tmp_path)


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
    assert re.search(r"config\.lr +0\.1 +0\.2\b", command("diff", tmp_path, "a:1", "a:2"))
