"""What a shell is offered: commands, options, and the names of what is in a repository."""

import os
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

import peakpoint as pp
from commands import in_process
from peakpoint.cli.commands import ENTRIES
from peakpoint.cli.main import cli
from training import checkpointer

PROGRAM = "import sys; sys.argv[0] = 'peakpoint'; from peakpoint.cli.main import run; run()"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("completion") / "runs"
    for run in ("lenet", "resnet", "resnet-2"):
        with checkpointer(root, run=run, state={"x": 1}, keep=[pp.Last(2)]) as ckpt:
            for step in (1, 2):
                ckpt.report(step=step)
    assert in_process("promote", root, "lenet@latest", "--as", "champion", "--why", "x", "--force").returncode == 0
    (root / "runs" / "le\x1b[31m\nevil").mkdir()
    shutil.copy(root / "runs" / "lenet" / "run.json", root / "runs" / "le\x1b[31m\nevil")
    return root


def offered(*words):
    *arguments, incomplete = map(str, words)
    completion = ShellComplete(cli, {}, "peakpoint", "_PEAKPOINT_COMPLETE")
    return [item.value for item in completion.get_completions(arguments, incomplete)]


def test_commands_and_options_are_offered():
    assert offered("") == list(ENTRIES)
    assert offered("re") == [name for name in ENTRIES if name.startswith("re")]
    assert {"--deep", "--clean", "--json"} <= set(offered("audit", "somewhere", "--"))
    assert offered("export", "somewhere", "r@latest", "--as", "") == ["hf", "card"]


def test_runs_checkpoints_and_aliases_are_offered(root):
    names = [checkpoint.name for checkpoint in pp.open(root).run("lenet").checkpoints()]
    for command in ("ls", "keep", "archive", "report", "plan"):
        assert offered(command, root, "res") == ["resnet", "resnet-2"], command
    for command in ("show", "explain", "diff", "rm", "pin", "validate", "promote", "export", "sign", "soup", "record"):
        assert offered(command, root, "le") == [*(f"lenet/{name}" for name in sorted(names)), "lenet@latest"], command
    assert offered("show", root, f"lenet/{names[0]}"[:-1]) == [f"lenet/{name}" for name in sorted(names)]
    assert offered("diff", root, "lenet@latest", "resnet@") == ["resnet@latest"]
    assert offered("show", root, "") == ["@champion", "lenet@latest", "resnet-2@latest", "resnet@latest"]
    assert offered("show", root, "@") == ["@champion"]
    for words in (["rollback", root], ["history", root], ["promote", root, "x", "--as"], ["promote", root, "--notify"]):
        assert offered(*words, "ch") == ["champion"], words
    assert offered("ls", root, "nothing") == offered("ls", root / "nowhere", "") == offered("show", "", "") == []


def test_bash_gets_a_script_and_answers(root):
    def answer(**environment):
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout

    assert "complete -o nosort -F _peakpoint_completion peakpoint" in answer(_PEAKPOINT_COMPLETE="bash_source")
    words = {"COMP_WORDS": f"peakpoint rollback {root} ch", "COMP_CWORD": "3"}
    assert answer(_PEAKPOINT_COMPLETE="bash_complete", **words) == "plain,champion\n"
