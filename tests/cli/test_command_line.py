"""The command line by hand: what it prints, its exit codes, what it imports, and what it exports."""

import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import peakpoint as pp
from commands import RUN, in_process, invoke, on_terminal
from peakpoint.cli import render
from peakpoint.cli.commands import ENTRIES, GROUPS, RENAMED
from peakpoint.cli.demo import show
from peakpoint.cli.main import cli
from peakpoint.repository import validations
from peakpoint.rules import check_ranking_metrics, parse_all
from training import checkpointer

MODULE = [sys.executable, "-m", "peakpoint"]


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(3, 3, bias=False)
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "runs"
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rules = [pp.Best("val/[red]acc", "max"), pp.Last(2)]
    with checkpointer(root, run="one", state={"model": model, "optimizer": optimizer}, keep=rules) as ckpt:
        for number, accuracy in enumerate([0.5, 0.9, 0.7, 0.6]):
            model.head(model.embed(torch.randn(2, 3))).sum().backward()
            optimizer.step()
            ckpt.report({"val/[red]acc": accuracy}, epoch=number)
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs ä")


def test_ls_says_what_is_kept_and_why(root):
    text = invoke("ls", root).output
    assert "one: 3 checkpoints" in text
    assert " best val/[red]acc (max): 0.9, next 0.7" in text
    assert "\x1b" not in text
    [run] = json.loads(invoke("ls", root, "--json").output)["runs"]
    assert [checkpoint["epoch"] for checkpoint in run["checkpoints"]] == [1, 2, 3]
    assert run["peaks"][0]["best"] == 0.9
    assert run["peaks"][0]["last"] == 0.6
    assert run["checkpoints"][0]["kept_because"][0]["rule"] == "best:val/[red]acc:max"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_fit_the_terminal(tmp_path, width):
    model = Tied()
    for run in ("resnet50-pruned-seed0", "other"):
        state, keep = {"model": model}, [*pp.rules.pruning("val_accuracy", "max", (0.5, 0.9)), pp.Best("a_loss", "min")]
        with checkpointer(tmp_path, run=run, state=state, keep=keep) as ckpt:
            for epoch in ckpt.epochs(4):
                metrics = {"val_accuracy": 0.9 - epoch / 70, "sparsity": epoch * 0.3, "a_loss": 0.5, "lr": 1e-3, "x": 1}
                ckpt.report(metrics)
    names = [one.name for one in pp.open(tmp_path).run("other").checkpoints()]
    title, *rows = on_terminal(width, "ls", tmp_path)
    assert title.endswith("lost")
    assert all(row.endswith("0.042857") for row in rows[:2])
    assert [row.split()[0] for row in rows[:2]] == ["other", "resnet50-pruned-seed0"]
    assert "…" not in "".join([title, *rows])
    for arguments in (["ls", tmp_path, "other"], ["keep", tmp_path, "other", "--rules", "last:2"]):
        lines = on_terminal(width, *arguments)
        assert max(map(len, lines)) <= width
        begins = [number for number, line in enumerate(lines) if line.startswith("epoch")]
        assert [lines[number].split()[0] for number in begins] == names
        assert max(after - before for before, after in itertools.pairwise(begins)) <= 6
    title, *rows = on_terminal(width, "select", tmp_path)
    assert title.split()[:2] == ["checkpoint", "epoch"]
    assert "val_accuracy" in title or "a_loss" in title
    assert [row.split()[0] for row in rows if row.startswith("other/")] == [f"other/{name}" for name in names[::-1]]
    assert len(rows) <= 3 * len(names)


def test_show_tells_everything_of_one_checkpoint(root):
    text = invoke("show", root, "one@best:val/[red]acc").output
    assert "val/[red]acc = 0.9" in text
    assert "model.safetensors" in text
    shown = json.loads(invoke("show", root, "one:epoch=1", "--json").output)
    assert shown["metrics"] == {"val/[red]acc": 0.9}
    assert {file["name"] for file in shown["files"]} == {"model.safetensors", "optimizer.safetensors", "state.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ls", "{root}/nothing"], 10, "not a Peakpoint repository"),
        (["ls", "{root}", "onee"], 10, "has no run 'onee'; did you mean 'one'?"),
        (["show", "{root}", "one"], 2, "forms:"),
        (["show", "{root}", "one:epoch=9"], 10, "it has epochs 1, 2, 3"),
        (["show", "{root}", "one@best:acc"], 10, "val/[red]acc"),
        (["show", "{root}", "one/no"], 10, "no checkpoint named"),
        (["export", "{root}", "one@latest", "--to", "{root}/x.zip"], 2, "must end with"),
        (["export", "{root}", "one@latest", "--to", "{root}/no/x.pth"], 10, "does not exist"),
        (["export", "{root}", "one@latest", "--to", "{root}/x.pth", "--part", "modell"], 10, "did you mean 'model'"),
        (["rm", "{root}"], 2, "Missing argument"),
        (["export", "{root}", "one@latest"], 2, "--to names no file or folder"),
        (["export", "{root}", "one@latest", "--to", "x.pth", "--license", "mit"], 2, "--license is for --as card"),
        (["export", "{root}", "one@latest", "--as", "card", "--shard", "1 GB"], 2, "--shard is for --as hf"),
        (["undo", "{root}"], 2, "give the RUN/NAME of what to restore, or --list, or --empty"),
        (["undo", "{root}", "--list", "--empty"], 2, "or --list, or --empty"),
        (["undo", "{root}", "one"], 2, "names nothing in the trash; give RUN/NAME"),
        (["promote", "{root}"], 2, "give REF and --as ALIAS, or --retire ALIAS, or --notify ALIAS"),
        (["promote", "{root}", "one@latest", "--why", "x"], 2, "give REF and --as ALIAS"),
        (["promote", "{root}", "one@latest", "--as", "champion"], 2, "give the reason"),
        (["promote", "{root}", "--retire", "a", "--notify", "a"], 2, "or --notify ALIAS"),
        (["promote", "{root}", "--retire", "a", "--why", "x", "--dry-run"], 2, "are for promoting REF"),
        (["promote", "{root}", "--notify", "champion"], 10, "there is no alias 'champion'"),
        (["history", "{root}", "--at", "7d"], 2, "--at is for one alias"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_wrong_input_gets_one_clear_error(root, arguments, code, words):
    done = in_process(*(argument.format(root=root) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_repository_record_is_said(root):
    (root / "peakpoint.json").write_text("{}")
    done = in_process("ls", root)
    assert done.returncode == 13
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(root):
    done = subprocess.run(
        f'"{sys.executable}" -c "{RUN}" ls "{root}" --json | head -n 1',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_audit_finds_damage_and_cleans_litter_only(root):
    folder = next((root / "runs" / "one" / "checkpoints").iterdir())
    bare = folder.with_name("cut-short")
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(b"half")
    (bare / "mine.txt").write_text("keep me")
    for place in (root, root / "runs", root / "runs" / "one", folder.parent, folder):
        (place / ".tmp-0123-x").write_bytes(b"x")
    found = json.loads(invoke("audit", root, "--json").output)
    assert sum(finding["kind"] == "litter" for finding in found["findings"]) == 6
    dry = json.loads(invoke("audit", root, "--clean", "--dry-run", "--json").output)
    assert dry["removed"] == []
    cleaned = json.loads(invoke("audit", root, "--clean", "--deep", "--json").output)
    assert len(cleaned["removed"]) == 6
    assert (bare / "mine.txt").read_text() == "keep me"
    assert not (bare / "model.safetensors").exists()
    shutil.rmtree(bare)
    assert json.loads(invoke("audit", root, "--deep", "--json").output)["clean"]

    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert in_process("audit", root).returncode == 0, "sizes are as they were"
    deep = in_process("audit", root, "--deep", "--json")
    assert deep.returncode == 12
    assert "does not match its digest" in deep.stdout
    file.unlink()
    assert in_process("audit", root).returncode == 12


def test_a_run_that_is_being_written_is_left_alone(root):
    with checkpointer(root, run="two"):
        bare = root / "runs" / "two" / "checkpoints" / "under-way"
        bare.mkdir(parents=True)
        found = json.loads(invoke("audit", root, "--clean", "--json").output)
        assert bare.exists()
        assert [finding["kind"] for finding in found["findings"]] == ["busy"]
        assert "being written" in invoke("ls", root).output
        assert "being written by process" in invoke("ls", root, "two").output
    with checkpointer(root, run="two"):
        assert not bare.exists(), "opening a run removes what its last writer left"


def test_every_command_of_the_table_is_there():
    assert len(ENTRIES) == sum(map(len, GROUPS.values())) == 27
    for name in ENTRIES:
        command = cli.get_command(None, name)
        assert command.name == name
        assert not command.hidden


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_help_page_is_not_cut_off_and_loads_no_command(width):
    code = (
        "import sys, atexit\n"
        f"modules = {sorted(entry.function.partition(':')[0] for entry in ENTRIES.values())}\n"
        "loaded = lambda: [module for module in modules if f'peakpoint.cli.{module}' in sys.modules]\n"
        "atexit.register(lambda: print('LOADED', loaded()))\n"
        f"sys.argv = ['peakpoint', '--help']\n{RUN}"
    )
    environment = os.environ | {"COLUMNS": str(width)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "LOADED []" in done.stdout
    text = " ".join(done.stdout.split())
    for title, entries in GROUPS.items():
        assert f"{title}:" in text
        assert all(f"{entry.name} {entry.help}" in text for entry in entries)
    assert max(map(len, done.stdout.splitlines())) <= width


def test_a_wrong_command_names_near_ones_and_a_former_one_the_new():
    done = in_process("promot", "x")
    assert (done.returncode, "did you mean 'promote'" in done.stderr) == (2, True)
    for former, command in RENAMED.items():
        assert former not in ENTRIES
        done = in_process(former, "x")
        assert (done.returncode, f"'{former}' is now: peakpoint {command}" in done.stderr) == (2, True)
        assert command.split()[0] in ENTRIES


def test_it_is_a_module_as_well(root):
    done = subprocess.run([*MODULE, "ls", str(root), "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["runs"][0]["name"]) == (0, "one")


def test_rm_shows_a_plan_and_removes_with_yes(root):
    def count():
        return len(pp.open(root).run("one").checkpoints())

    plan = invoke("rm", root, "one:epoch=2")
    assert "nothing is removed yet" in plan.output
    assert "number 2 of the newest 2 (last:2)" in plan.output
    invoke("rm", root, "one:epoch=2", "--yes", "--dry-run")
    assert count() == 3
    done = json.loads(invoke("rm", root, "one:epoch=2", "--yes", "--why", "wrong data", "--json").output)
    assert len(done["removed"]) == 1
    assert count() == 2
    assert any(getattr(event, "reason", "") == "wrong data" for event in pp.open(root).run("one").events())


def test_exports_open_elsewhere(root, tmp_path):
    invoke("export", root, "one@best:val/[red]acc", "--to", tmp_path / "m.safetensors")
    state = load_file(tmp_path / "m.safetensors")
    Tied().load_state_dict(state)
    assert torch.equal(state["embed.weight"], state["head.weight"])
    invoke("export", root, "one@best:val/[red]acc", "--to", tmp_path / "m.pth")
    assert torch.equal(torch.load(tmp_path / "m.pth", weights_only=True)["head.weight"], state["head.weight"])
    invoke("export", root, "one@latest", "--to", tmp_path / "b.pt", "--part", "model", "--part", "optimizer")
    both = torch.load(tmp_path / "b.pt", weights_only=True)
    assert both["optimizer"]["state"][0]["momentum_buffer"].shape == (3, 3)
    assert in_process("export", root, "one@latest", "--to", tmp_path / "b.pt").returncode == 11
    optimizer = tmp_path / "o.safetensors"
    assert in_process("export", root, "one@latest", "--to", optimizer, "--part", "optimizer").returncode == 2
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["b.pt", "m.pth", "m.safetensors"]


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["show"], ["audit", "--deep"], ["rm"]])
def test_the_command_line_starts_without_torch(root, arguments):
    if arguments != ["--help"]:
        arguments = [
            arguments[0],
            str(root),
            *(["one@latest"] if arguments[0] in ("show", "rm") else []),
            *arguments[1:],
        ]
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('IMPORTED', [m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules]))\n"
        f"import peakpoint\nsys.argv = ['peakpoint', *{arguments!r}]\n{RUN}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout


def test_public_names_resolve_and_a_missing_torch_is_explained():
    assert len(pp.__all__) <= 35
    assert dir(pp) == sorted(pp.__all__)
    for name in pp.__all__:
        assert getattr(pp, name) is not None
    from peakpoint import Best, errors

    assert (Best, errors) == (pp.Best, pp.errors)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pp.nonsense  # noqa: B018
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, No())\n"
        "import peakpoint as pp\n"
        "pp.Best('a', 'max'); pp.open\n"
        "try:\n    pp.Checkpointer\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'peakpoint[torch]'" in done.stdout


# --- what stays and why -------------------------------------------------------------------------------------------


def test_keep_shows_a_plan_and_removes_with_yes(root):
    text = invoke("keep", root, "one", "--rules", "last:1").output
    assert "removed" in text
    assert "2 would" not in text
    assert "1 of 3 checkpoints kept" in text
    assert "add --yes" in text
    assert len(pp.open(root).run("one").checkpoints()) == 3
    assert "add --yes" in invoke("keep", root, "one", "--rules", "last:1", "--yes", "--dry-run").output
    found = json.loads(invoke("keep", root, "one", "--rules", "last:1", "--json").output)
    assert [one["epoch"] for one in found["stays"]] == [3]
    assert [one["epoch"] for one in found["goes"]] == [1, 2]
    assert found["freed_bytes"] == sum(one["size_bytes"] for one in found["goes"])
    assert not found["applied"]
    assert "removed 2 checkpoints" in invoke("keep", root, "one", "--rules", "last:1", "--yes").output
    run = pp.open(root).run("one")
    assert [one.epoch for one in run.checkpoints()] == [3]
    assert [rule.text for rule in run.rules()] == ["last:1"], "the rules that were carried out are in force"
    assert "nothing to remove" in invoke("keep", root, "one").output


@pytest.mark.parametrize(
    "words", [["keep", "{root}", "one", "--rules", "last:1", "--yes"], ["rm", "{root}", "one:epoch=1", "--yes"]]
)
def test_the_commands_that_are_printed_can_be_pasted(root, words):
    assert " " in str(root)
    names = {one.name for one in pp.open(root).run("one").checkpoints()}
    text = invoke(*(word.format(root=root) for word in words)).output
    undo, empty = (line.strip() for line in text.splitlines() if line.startswith("  peakpoint "))
    assert len(pp.open(root).run("one").checkpoints()) < 3
    assert "is restored" in invoke(*shlex.split(undo)[1:]).output
    assert {one.name for one in pp.open(root).run("one").checkpoints()} == names
    assert "the trash is empty" in invoke(*shlex.split(empty)[1:]).output


def test_the_commands_that_the_demo_prints_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no peakpoint there
    file = io.StringIO()
    show._show_next_commands(Console(file=file, width=40), tmp_path / "a place")
    commands = [line.strip() for line in file.getvalue().splitlines() if line.startswith("  ")]
    assert len(commands) == 10
    done = subprocess.run(shlex.split(commands[0]), capture_output=True, text=True, check=False)
    assert f"{tmp_path / 'a place'} is not a Peakpoint repository" in done.stderr


def test_neither_keep_nor_rm_takes_the_newest_good_one(root):
    best, good, newest = pp.open(root).run("one").checkpoints()
    (newest.path / "optimizer.safetensors").write_bytes(b"cut short")
    assert "optimizer.safetensors has 9 bytes" in invoke("ls", root).output.replace("\n", " ")
    done = invoke("keep", root, "one", "--rules", "best:val/[red]acc:min", "--yes", "--json")
    told = json.loads(done.stdout)
    assert [one["name"] for one in told["goes"]] == [best.name]
    assert {one["name"]: [claim["rule"] for claim in one["kept_because"]] for one in told["stays"]} == {
        good.name: ["best:val/[red]acc:min", "protection:newest"],
        newest.name: ["protection:damaged"],
    }
    refused = in_process("rm", root, f"one/{good.name}", "--yes")
    assert (refused.returncode, good.path.exists()) == (2, True)
    assert "is the newest good checkpoint of run 'one', and stays" in refused.stderr
    assert "9 bytes" in refused.stderr
    gone = invoke("rm", root, f"one/{newest.name}", f"one/{good.name}", "--yes", "--undo-for", "0")
    assert "\nremoved 2 checkpoints\n" in gone.output


def test_keep_does_not_get_into_the_way_of_a_training(root):
    model = Tied()
    with checkpointer(root, run="one", state={"model": model}, resume="never", keep=[pp.Last(3)]):
        assert "1 of 3" in invoke("keep", root, "one", "--rules", "last:1", "--dry-run").output
        command = [sys.executable, "-c", RUN, "keep", root, "one", "--rules", "last:1", "--yes"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "already being written by process" in done.stderr
        assert "wait until it ends, or stop it" in done.stderr
        assert "Traceback" not in done.stderr
    assert len(pp.open(root).run("one").checkpoints()) == 3


@pytest.mark.parametrize("wrong", ["bset:acc:max", "last:0", "best:acc:up", ""])
def test_rules_that_cannot_be_are_refused(root, wrong):
    done = in_process("keep", root, "one", "--rules", wrong, "--yes")
    assert done.returncode == pp.errors.ConfigError.exit_code
    assert done.stderr.startswith("peakpoint: ")
    assert len(pp.open(root).run("one").checkpoints()) == 3


@pytest.mark.parametrize("how", [[], ["--yes", "--undo-for", "0"], ["--what-if"], ["--json"]])
def test_a_metric_that_nothing_has_is_refused_before_the_best_goes(root, how):
    for rule in ("best:val/[red]ac:max", "pareto:val/[red]acc:max:val/[red]ac:min"):
        words = f"no report has the metric 'val/[red]ac' of the rule {rule}; did you mean 'val/[red]acc'?"
        with pytest.raises(pp.errors.ConfigError, match=re.escape(words)):
            invoke("keep", root, "one", "--rules", f"{rule} last:1", *how)
    assert len(pp.open(root).run("one").checkpoints()) == 3


def test_metrics_that_were_measured_later_and_those_awaited_are_none_that_nothing_has(root):
    invoke("record", root, "one:epoch=1", "bleu=0.5")
    assert invoke("keep", root, "one", "--rules", "best:bleu:max last:1").exit_code == 0
    assert invoke("keep", root, "one", "--rules", "best:rouge:max:pending=2 last:1").exit_code == 0
    with pytest.raises(pp.errors.ConfigError, match=r"'sparsty' of the rule best-at:bleu:.*; there are bleu, val/"):
        check_ranking_metrics(parse_all("best-at:bleu:max:sparsty:0.5:0.01"), {"bleu", "val/acc"})


def test_what_if_says_whether_the_peak_survives(root):
    text = invoke("keep", root, "one", "--what-if", "--rules", "last:1").output
    assert "4 reports" in text
    assert "best val/[red]acc (max): 0.9 at epoch 1, step 2, would be lost" in text
    text = invoke("keep", root, "one", "--what-if", "--rules", "best:val/[red]acc:max").output
    assert "would be kept" in text
    found = json.loads(invoke("keep", root, "one", "--what-if", "--price", "10", "--json").output)
    assert [one["epoch"] for one in found["kept"]] == [1, 2, 3]
    assert found["per_month"] == pytest.approx(found["bytes_kept"] / 1e9 * 10)
    assert json.loads(invoke("keep", root, "one", "--what-if", "--json").output)["per_month"] is None
    assert "a month" not in invoke("keep", root, "one", "--what-if").output
    assert re.search(
        r"kept \(0\.\d+ a month at 10 a GB\), ", invoke("keep", root, "one", "--what-if", "--price", 10).output
    )
    assert len(pp.open(root).run("one").checkpoints()) == 3


def test_explain_what_is_here_and_what_is_gone(root):
    text = invoke("explain", root, "one:epoch=1").output
    assert "exists (epoch 1, step 2)" in text
    assert "- best val/[red]acc (max): 0.9, next 0.7 at epoch 2, step 3\n" in text
    assert "last:2 keeps " in text
    text = invoke("explain", root, "one:epoch=0").output
    assert re.search(r"was removed on 20..-..-.. \(epoch 0, step 1\)", text)
    assert "val/[red]acc = 0.5" in text
    assert "kept instead" in text
    found = json.loads(invoke("explain", root, "one:epoch=0", "--json").output)
    assert found["exists"] is False
    assert found["removed"]["by"] == "rules"
    assert found["claimed_instead"]["last:2"]
    assert json.loads(invoke("explain", root, "one@latest", "--json").output)["exists"] is True
    done = in_process("explain", root, "one:epoch=77")
    assert done.returncode == pp.errors.NotFoundError.exit_code
    assert "the journal has no record of such a checkpoint either" in done.stderr


def test_numbers_have_the_digits_that_people_read(tmp_path):
    kept = [pp.Best("acc", "max"), pp.Best("loss", "min", min_epoch=0), pp.Last(2)]
    state = {"x": torch.zeros(2), "o": {"lr": 0.1 + 0.2, "n": 0.1, "s": [0.1 + 0.2, 1, "1.0.23456789"]}}
    with checkpointer(tmp_path, run="r", state=state, keep=kept) as ckpt:
        for epoch in ckpt.epochs(2):
            state["o"]["lr"] *= 1.0000000001 if epoch else 1
            state["o"]["n"] += 0.2 * epoch
            state["o"]["s"][1] += epoch
            ckpt.report(acc=torch.tensor((0.706, 0.700)[epoch]), loss=torch.tensor((0.701, 0.9)[epoch]))
    assert pp.open(tmp_path).run("r").history()[0].metrics["loss"] != 0.701, "it is a float32"
    text = re.sub(" +\n", "\n", invoke("ls", tmp_path).output)
    assert re.search(r"acc +max +0\.706 +epoch 0 +0\.7 +epoch 1 +0\.006\n", text)
    assert "best acc (max): 0.706, next 0.7 at epoch 1, step 2\n" in text, "the reason alone says it"
    assert "best loss (min): 0.701, next 0.9 at epoch 1, step 2 (best:loss:min:min_epoch=0)" in text
    assert "the newest (last:2)" in text
    assert "protection:" not in text
    assert "loss = 0.701\n" in re.sub(" +\n", "\n", invoke("show", tmp_path, "r:epoch=0").output)
    text = invoke("diff", tmp_path, "r:epoch=0", "r:epoch=1").output
    assert "(-0.006)" in text
    assert "0.30000000000000004" in text, "two that differ behind the sixth digit are shown as they are"
    assert re.search(r"0\.1 +0\.3\n", re.sub(" +\n", "\n", text))
    assert '[0.3,2,"1.0.23456789"]' in text
    assert render.rounded(3e-9, 1.0, 1.0) == 3e-9


def test_record_pin_and_unpin(root):
    name = pp.open(root).run("one").checkpoints()[0].name
    assert invoke("record", root, f"one/{name}", "bleu=0.5", "test/acc=1e-3", "--source", "eval.py").exit_code == 0
    assert pp.open(root).run("one").best("bleu", mode="max").name == name
    assert "bleu = 0.5, test/acc = 0.001" in invoke("explain", root, f"one/{name}").output
    assert "bleu = 0.5" in invoke("show", root, f"one/{name}").output
    for wrong in ("bleu", "bleu=high", "=3"):
        done = in_process("record", root, f"one/{name}", wrong)
        assert done.returncode == pp.errors.ConfigError.exit_code
        assert done.stderr.startswith("peakpoint: ")
    assert "is pinned" in invoke("pin", root, f"one/{name}", "--why", "paper").output
    assert "pinned: paper" in invoke("ls", root).output
    assert "pinned: paper" in invoke("keep", root, "one", "--rules", "last:1").output
    assert json.loads(invoke("unpin", root, f"one/{name}", "--json").output)["name"] == name
    assert "pinned: paper" not in invoke("ls", root).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["pin", "one@latest", "--why", "\udcff"],
        ["record", "one@latest", "acc=1", "--source", "\udcff"],
        ["rm", "one@latest", "--yes", "--why", "\udcff"],
    ],
)
def test_text_with_broken_bytes_is_refused_and_nothing_done(root, arguments):
    before = pp.open(root).run("one").events()
    result = in_process(arguments[0], root, *arguments[1:])
    assert result.returncode == 2
    assert result.stderr.startswith("peakpoint: ")
    assert "cannot be written as UTF-8" in result.stderr
    assert pp.open(root).run("one").events() == before


def test_rules_that_need_a_part_no_checkpoint_has_are_refused(root):
    done = in_process("keep", root, "one", "--rules", "last:1:parts=modle", "--yes")
    assert done.returncode == 2, done.stdout
    assert "needs a part 'modle', which no checkpoint of the run has; did you mean 'model'?" in done.stderr
    done = in_process("keep", root, "one", "--rules", "")
    assert (done.returncode, "--rules is empty" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "line",
    [
        "keep ROOT one --price 3 | --price has no effect without --what-if; add that, or leave --price out",
        "keep ROOT one --what-if --yes | --yes has no effect with --what-if; leave one of them out",
        "keep ROOT one --what-if --undo-for 7d | --undo-for has no effect with --what-if",
        "report ROOT --separate | --separate has no effect without --to",
        "report ROOT --force | --force has no effect without --to",
        "changelog ROOT --force | --force has no effect without --to",
        "audit ROOT --dry-run | --dry-run has no effect without --clean",
        "archive ROOT one --restore --level 3 | --level has no effect with --restore",
        "soup ROOT one:epoch=1 one:epoch=2 --device cpu | --device has no effect without --model",
        "diff ROOT one:epoch=1 one:epoch=2 --top 3 --all | --top has no effect with --all",
        "plan ROOT one --restart 5min | --restart has no effect without --mtbf",
        "plan --presets --epochs 3 | --epochs has no effect with --presets",
        "validate ROOT one@latest --tolerance 1 | --tolerance has no effect without --with",
        "promote ROOT --notify champion --why x | --why has no effect with --notify",
        "import ROOT ROOT --run x --join step | --join has no effect without --metrics",
        "export ROOT one@latest --as card --part model | --part has no effect with --as card",
        "export ROOT one@latest --to d --as hf --shard 1xx | --shard 1xx is not a number of bytes",
        "keep ROOT one --undo-for 5x | --undo-for 5x is not a time span; give one such as",
        "changelog ROOT --since x | --since x is not a time",
        "record ROOT one@latest a=1,b=2 | 'a=1,b=2' holds several measurements; separate them by spaces: a=1 b=2",
        "record ROOT one@latest epoch=3 | epoch is what a checkpoint was saved at",
        "record ROOT one@latest step=3 | give another name",
        "validate ROOT one@latest --against nobody | there is no such alias",
        "validate ROOT one@latest --budget latency_ms=3 | needs a model to run",
        "validate ROOT one@latest --with nope:f | the module 'nope' cannot be imported",
        "show ROOT one | 'one' names a run but no checkpoint",
        "plan | name one thing to plan",
    ],
)
def test_what_would_have_no_effect_or_cannot_be_is_refused_in_words_of_the_user(root, line):
    command, _, words = line.partition(" | ")
    before = pp.open(root).run("one").events()
    result = in_process(*(str(root) if word == "ROOT" else word for word in command.split()))
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr
    assert pp.open(root).run("one").events() == before
    manifest = pp.open(root).find_manifest("one@latest")
    assert not validations.survey(pp.open(root).store, "one", manifest.id).validations


def test_programs_get_why_checkpoints_were_kept_and_what_was_recorded(root):
    invoke("record", root, "one:epoch=1", "bleu=0.5")
    assert json.loads(invoke("explain", root, "one:epoch=1", "--json").output)["metrics"]["bleu"] == 0.5
    [removed] = json.loads(invoke("rm", root, "one:epoch=1", "--json").output)["would_remove"]
    assert removed["kept_because"][0]["rule"] == "best:val/[red]acc:max"
    soup = json.loads(invoke("soup", root, "one:epoch=1", "one:epoch=2", "--why", "try", "--json").output)
    assert soup["checkpoint"]["kept_because"]
    assert in_process("show", root, "noe").returncode == pp.errors.NotFoundError.exit_code
    assert "is no longer pinned" not in invoke("unpin", root, "one@latest").output
    invoke("pin", root, "one@latest", "--why", "x")
    assert "is no longer pinned" in invoke("unpin", root, "one@latest").output
