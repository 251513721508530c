"""select and ls on the command line."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time

import pytest

import peakpoint as pp
from commands import RUN, in_process, invoke
from peakpoint.repository import maintenance
from training import checkpointer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("select") / "runs ä"
    for run, top in (("resnet50-a", 0.8), ("resnet18-b", 0.7), ("empty", None)):
        with checkpointer(root, run=run, keep=[pp.Best("acc", "max"), pp.Last(40)]) as ckpt:
            for epoch in ckpt.epochs(30 if top else 0):
                ckpt.report({"acc": top - 0.01 * abs(20 - epoch), "val/[bold]loss": 1.0 - top}, epoch=epoch)
    return root


def selected(root, *arguments):
    return [one["ref"].partition("/")[0] + f":{one['epoch']}" for one in found(root, *arguments)["selected"]]


def found(root, *arguments):
    return json.loads(invoke("select", root, *arguments, "--json").output)


def test_what_matches_is_listed_best_first(root):
    text = invoke("select", root, 'acc > 0.6 and run ~ "resnet50*"', "--max", "acc", "--top", "2").output
    lines = text.splitlines()
    assert lines[0].split() == ["checkpoint", "epoch", "step", "acc", "size", "created"]
    assert re.match(r"resnet50-a/\S+ +20 +21 +0.8 ", lines[1])
    assert len(lines) == 3
    assert "\x1b" not in text


def test_keys_count_in_the_order_in_which_they_are_given(root):
    assert selected(root, "epoch in (20, 21)", "--max", "epoch", "--max", "acc") == [
        "resnet50-a:21",
        "resnet18-b:21",
        "resnet50-a:20",
        "resnet18-b:20",
    ]
    assert selected(root, "epoch in (20, 21)", "--min", "acc", "--max", "epoch", "--top", "1") == ["resnet18-b:21"]
    assert selected(root, "epoch in (20, 21)", "--max", "epoch", "--min", "acc", "--top", "1") == ["resnet18-b:21"]
    assert selected(root, "epoch in (19, 21)", "--min", "acc", "--max", "epoch", "--max", "step", "--top", "2") == [
        "resnet18-b:21",
        "resnet18-b:19",
    ]


def test_twenty_are_shown_of_more(root):
    assert "and more; --top N" in invoke("select", root).output
    assert found(root)["more"] is True
    assert len(found(root)["selected"]) == 20
    assert len(found(root, "--all")["selected"]) == 60
    assert len(found(root, "--top", "33")["selected"]) == 33
    assert found(root, "run == 'resnet18-b' and epoch < 20")["more"] is False
    assert "and more" not in invoke("select", root, "--all").output


def test_refs_are_for_other_commands(root):
    ref = invoke("select", root, "--max", "acc", "--top", "1", "--refs").output.strip()
    assert invoke("show", root, ref).exit_code == 0
    assert invoke("select", root, "acc > 5", "--refs").output == ""
    assert "no checkpoint matches" in invoke("select", root, "acc > 5").output


def test_why_tells_what_each_clause_removed_and_what_came_next(root):
    text = invoke("select", root, "acc > 0.75 and epoch > 20", "--max", "acc", "--top", "1", "--why").output
    assert re.search(r"acc > 0.75 +51 +9\n", text)
    assert re.search(r"epoch > 20 +5 +4\n", text)
    assert "1 of 4 selected, by acc (max)" in text
    assert re.search(r"next, number 2: resnet50-a/\S+ with acc 0.78", text)
    why = found(root, "acc > 0.75 and epoch > 20", "--max", "acc", "--top", "1", "--why")["why"]
    assert [clause["removed"] for clause in why["clauses"]] == [51, 5, 0]
    assert [one["epoch"] for one in why["runners_up"]] == [22, 23, 24]


def test_within_one_standard_error_the_earliest_is_taken(root):
    assert selected(root, "--max", "acc", "--within-se", "--n-eval", "1000", "--top", "1") == ["resnet50-a:19"]
    text = invoke("select", root, "--max", "acc", "--within-se", "--n-eval", "1000", "--min", "step", "--why").output
    assert "one standard error (0.0126) of the best (0.8)" in text


def test_markup_of_users_is_text(root):
    text = invoke("select", root, "metric('val/[bold]loss') < 0.25", "--top", "1").output
    assert "val/[bold]loss" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["acc >"], 2, "not understood"),
        (["acx > 1"], 10, "did you mean 'acc'"),
        (["--max", "run"], 2, "not a number to rank by"),
        (["--max", "acc", "--min", "acc"], 2, "given twice"),
        (["--top", "0"], 2, "0 is not in the range"),
        (["--n-eval", "5"], 2, "--within-se"),
        (["--within-se", "--max", "acc"], 2, "give either the number of examples (--n-eval N), or the metric"),
        (["--within-se", "--min", "acc", "--n-eval", "9"], 2, "the standard error of an accuracy only"),
        (["--within-se", "--max", "acc", "--se", "x", "--percent"], 2, "--percent has no effect without --n-eval"),
        (["--all", "--top", "3"], 2, "--top has no effect with --all"),
        (["--within-se", "--n-eval", "10"], 2, "rank by a metric first"),
        (["--within-se", "--max", "acc", "--n-eval", "many"], 10, "no checkpoint has a metric 'many'"),
        (["--catalogue", "oracle://x/y"], 2, "'oracle'"),
        (["--catalogue", "postgresql://127.0.0.1:1/x"], 20, "cannot be used"),
    ],
)
def test_slips_get_a_sentence_and_an_exit_code(root, arguments, code, words):
    done = in_process("select", root, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_ls_is_a_line_for_each_run_and_more_of_those_named(root):
    text = invoke("ls", root).output
    assert re.search(r"resnet50-a +30 .* acc \(max\) +0.8 +epoch 20 +0.71 +0.09\n", text)
    assert re.search(r"empty +0 +0 B +0 *\n", text)
    assert "3 runs, 60 checkpoints" in text
    listed = json.loads(invoke("ls", root, "--json").output)["runs"]
    assert [(run["name"], run["checkpoint_count"], run["reports"]) for run in listed] == [
        ("resnet18-b", 30, 30),
        ("resnet50-a", 30, 30),
        ("empty", 0, 0),
    ]
    assert listed[1]["peaks"][0]["lost"] == pytest.approx(0.09)
    one = invoke("ls", root, "resnet50-a").output
    assert " best acc (max): 0.8" in one
    assert "resnet18-b" not in one


def test_ls_shows_thirty_runs_of_more(tmp_path):
    for number in range(33):
        with checkpointer(tmp_path, run=f"run{number}", state={"x": number}, keep=[pp.Last(1)]) as ckpt:
            ckpt.report(step=1)
    text = invoke("ls", tmp_path).output
    assert "and 3 more runs; --all" in text
    assert "run32 " in text
    assert "run1 " not in text
    assert "run1 " in invoke("ls", tmp_path, "--all").output
    assert len(json.loads(invoke("ls", tmp_path, "--json").output)["runs"]) == 33


def test_audit_makes_the_catalogue_anew(root):
    selected(root)
    [file] = root.glob("catalogue.sqlite")
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE mark (x)")
    connection.close()
    done = invoke("audit", root, "--rebuild")
    assert "rebuilt the catalogue" in done.output
    with sqlite3.connect(file) as connection, pytest.raises(sqlite3.OperationalError, match="no such table"):
        connection.execute("SELECT * FROM mark")
    connection.close()
    assert json.loads(invoke("audit", root, "--rebuild", "--json").output)["catalogue"] == str(file)
    assert len(found(root, "--all")["selected"]) == 60
    assert not list(root.glob("*damaged*"))


def test_selecting_starts_without_torch(root):
    code = f"import sys; sys.argv = ['peakpoint', 'select', {str(root)!r}]\ntry:\n    {RUN}\nfinally:\n"
    code += "    assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'too much'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_run_alone_is_listed_without_a_database(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report(step=1)
    code = f"import sys; sys.argv = ['peakpoint', 'ls', {str(tmp_path)!r}]\ntry:\n    {RUN}\nfinally:\n"
    code += "    assert 'sqlalchemy' not in sys.modules, 'too much'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_damaged_or_gone_is_marked(tmp_path):
    for run in ("one", "two"):
        with checkpointer(tmp_path, run=run, keep=[pp.Best("acc", "max"), pp.Last(2)]) as ckpt:
            for epoch in ckpt.epochs(4):
                ckpt.report(acc=0.9 - epoch / 10)
    best = pp.open(tmp_path).find("one@best:acc")
    (best.path / "model.safetensors").unlink()
    assert re.search(r"one/\S+ \(damaged\) ", invoke("select", tmp_path, "--max", "acc", "--top", "2").output)
    assert "model.safetensors is missing" in found(tmp_path, "run == 'one'", "--max", "acc")["selected"][0]["damaged"]
    piped = in_process("select", tmp_path, "run == 'one'", "--max", "acc", "--top", "1", "--refs")
    assert piped.stdout.strip() == best.ref
    assert "is missing" in piped.stderr
    assert "(gone)" not in invoke("ls", tmp_path).output
    maintenance.remove(pp.open(tmp_path).run("two"), [pp.open(tmp_path).find_manifest("two@best:acc")], "x")
    assert re.search(r"two .* 0.9 +epoch 0 \(removed\)", invoke("ls", tmp_path).output)
    assert re.search(r"acc +max +0.9 +epoch 0 \(removed\)", invoke("ls", tmp_path, "two").output)
    listed = {run["name"]: run["best_exists"] for run in json.loads(invoke("ls", tmp_path, "--json").output)["runs"]}
    assert listed == {"one": {"acc": True}, "two": {"acc": False}}
    assert json.loads(invoke("ls", tmp_path, "two", "--json").output)["runs"][0]["best_exists"] == {"acc": False}


@pytest.mark.parametrize("age", [0, 60])
def test_what_cannot_be_read_is_named_and_in_the_exit_code(tmp_path, age):
    for run, accuracy in (("good", 0.5), ("best", 0.9)):
        with checkpointer(tmp_path, run=run, keep=[pp.Last(1)]) as ckpt:
            ckpt.report(acc=accuracy)
    best = pp.open(tmp_path).find("best@latest")
    assert found(tmp_path, "--max", "acc")["unread"] == {}
    file = best.path / "manifest.json"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"0.9", b"0.8"))
    os.utime(best.path, (time.time() - age,) * 2)  # a directory that changed just now has no stamp to go by
    told = in_process("select", tmp_path, "--max", "acc", "--refs")
    assert (told.returncode, told.stdout.startswith("good/")) == (23, True)
    assert f"checkpoint '{best.ref}' is left out" in told.stderr
    for command in (("select", "--max", "acc", "--json"), ("ls", "--json")):
        told = in_process(command[0], tmp_path, *command[1:])
        assert told.returncode == 23
        assert list(json.loads(told.stdout)["unread"]) == [best.ref]
        assert "seal does not match" in json.loads(told.stdout)["unread"][best.ref]
        assert best.ref in told.stderr
    file.write_bytes(data)
    told = in_process("select", tmp_path, "--max", "acc", "--refs")
    assert (told.returncode, told.stdout.split()[0]) == (0, best.ref), "it is back as soon as its bytes are"
    assert in_process("audit", tmp_path).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_run_that_only_its_owner_may_read_keeps_nobody_from_the_others(tmp_path):
    for run, accuracy in (("mine", 0.5), ("theirs", 0.9)):
        with checkpointer(tmp_path / "runs", run=run, keep=[pp.Last(1)]) as ckpt:
            ckpt.report(acc=accuracy)
    (tmp_path / "runs" / "runs" / "theirs").chmod(0o700)
    for place in (tmp_path, *tmp_path.parents[:-2]):  # which pytest keeps to itself
        place.chmod(0o755)
    before = "import os, rich.table, peakpoint.cli.select, sqlalchemy.dialects.sqlite, peakpoint.catalogue"
    code = f"{before}; os.setgid(65534); os.setuid(65534); {RUN}"  # who may not read what Python is made of
    for arguments, exit_code in ((["select", "--max", "acc"], 23), (["ls", "--json"], 23), (["ls"], 0)):
        command = [sys.executable, "-c", code, arguments[0], str(tmp_path / "runs"), *arguments[1:]]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "none")}
        told = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert told.returncode == exit_code, told.stderr
        assert "mine" in told.stdout
        assert "theirs" in told.stderr
        assert "Permission denied" in told.stderr
