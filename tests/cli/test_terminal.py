"""What is printed controls no terminal, whatever the texts of users hold, and can be printed everywhere."""

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peakpoint as pp
from commands import RUN, in_process, on_terminal
from peakpoint.cli.commands import ENTRIES
from peakpoint.errors import printable
from promoting import validated
from training import checkpointer

# a title, a cleared screen, C1, overprinting, reversed and isolated text, unseen characters, line ends, and markup
CODES = "\x1b]0;P\x07\x1b[2J\x9b31m\x85\x08\r\x7f\u202e\u2066\u200b\u2028\u3164\ufe0f\U000e0041[red]QQ[/red][/][link=x]"
FILE = CODES.replace("/", "")
HOSTILE = f"a{CODES}b\tc\nforged"
METRIC = "m\x9b31m\x7f\u202e\u200b\U000e0041[red]QQ[/red][/]"
EVALUATE = f"def evaluate(state):\n    print({HOSTILE!r})\n    raise ValueError({HOSTILE!r})\n"
SCORE = f"def score(state):\n    raise ValueError({HOSTILE!r})\n"
HOOK = f"import sys\nprint({HOSTILE!r})\nsys.exit(3)\n"


def controls(text):
    """The characters of a text that a terminal obeys, or that nobody sees."""
    return {character for character in text if not (character == "\n" or printable(character) == character)}


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A repository with such a text wherever one can be."""
    monkeypatch.setenv("LOGNAME", HOSTILE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(tmp_path)
    root = tmp_path / f"runs{FILE}"
    state = {"x": {HOSTILE: 1, "v": HOSTILE}, "model": torch.nn.Linear(2, 1)}
    keep = [pp.Best(METRIC, "max"), pp.Last(5)]
    for run in ("r", "s"):
        settings = {"config": {"note": HOSTILE + run}, "tags": [HOSTILE]}
        with checkpointer(root, run=run, state=state, keep=keep, **settings) as ckpt:
            for epoch in range(3):
                state["x"]["v"] += "!"
                ckpt.report({METRIC: epoch / 3}, epoch=epoch)
            ckpt.save(HOSTILE)
    run = pp.open(root).run("r")
    run.pin("r:epoch=0", HOSTILE)
    run.record("r:epoch=0", {METRIC + "2": 1.0}, source=HOSTILE)
    assert in_process("rm", root, "r:epoch=1", "--why", HOSTILE, "--yes").returncode == 0
    (tmp_path / "hook.py").write_text(HOOK, encoding="utf-8")
    (tmp_path / "evil.py").write_text(EVALUATE + SCORE, encoding="utf-8")
    policy = f"format = 1\n[champion]\n[[champion.hooks]]\ncommand = {json.dumps([sys.executable, 'hook.py'])}\n"
    (root / "production.toml").write_text(policy, encoding="utf-8")
    (root / "hook.py").write_text(HOOK, encoding="utf-8")
    validated(pp.open(root), "r:epoch=2", failures=[HOSTILE])
    validated(pp.open(root), "r@latest")
    assert in_process("promote", root, "r@latest", "--as", "champion", "--why", HOSTILE, "--force").returncode == 1
    for folder in (root, root / "runs", root / "runs" / "r", root / "aliases"):
        (folder / f"foreign{FILE}").mkdir(parents=True)
        (folder / f"foreign{FILE}" / FILE).write_text(HOSTILE, encoding="utf-8")
    foreign = tmp_path / f"foreign{FILE}"
    foreign.mkdir()
    torch.save({"model": {HOSTILE: torch.zeros(1)}, "epoch": 1, METRIC: 0.5}, foreign / f"{FILE}.pt")
    (foreign / f"{FILE}2.pt").write_bytes(HOSTILE.encode())
    return root


LINES = {  # at least one for each command
    "ls": [[], ["r"], [HOSTILE], ["--sort", METRIC], ["--sort", HOSTILE], ["--match", HOSTILE]],
    "show": [["r@latest"], ["r:epoch=0"], ["r:epoch=2"], [HOSTILE], ["r/" + CODES]],
    "report": [
        [],
        ["--group-by", HOSTILE],
        ["--group-by", "config.note"],
        ["--metric", HOSTILE],
        ["--n-eval", HOSTILE],
    ],
    "plan": [["r"], ["r", "--rules", f"best:{METRIC}:min last:2"], ["r", "--rules", HOSTILE], ["r", "--epochs", CODES]],
    "select": [
        [],
        ["config.note != 'x'"],
        ["--max", METRIC, "--why"],
        [HOSTILE],
        [f"metric({METRIC!r}) > 0", "--why"],
        ["--max", HOSTILE],
    ],
    "diff": [["r:epoch=0", "r@latest"], ["r:epoch=0", "s@latest", "--no-values"], ["r:epoch=0", HOSTILE]],
    "record": [
        ["r@latest", f"{METRIC}=1"],
        ["r@latest", HOSTILE],
        ["r@latest", "a=1", "--part", HOSTILE],
        ["r@latest", "--remove", HOSTILE],
    ],
    "soup": [
        ["r:epoch=0", "r:epoch=2", "--why", HOSTILE],
        ["r:epoch=0", "--run", HOSTILE],
        ["r:epoch=0", "r:epoch=2", "--kind", "greedy", "--with", "evil:score", "--metric", f"{METRIC}:max"],
        ["r:epoch=0", "--with", HOSTILE],
    ],
    "keep": [["r"], ["r", "--what-if"], ["r", "--rules", HOSTILE], ["r", "--rules", "last:1", "--yes"]],
    "explain": [["r@latest"], ["r:epoch=1"], ["r:epoch=0"], [f"r/{CODES}"]],
    "pin": [["r@latest", "--why", HOSTILE], [HOSTILE, "--why", "x"]],
    "unpin": [["r:epoch=0"], [HOSTILE]],
    "rm": [["r:epoch=2"], ["r@latest", "--yes"], [HOSTILE], ["s", "--run", "--undo-for", "0", "--yes"]],
    "rename": [["s", "t"], ["r", "t"], ["r", HOSTILE], [HOSTILE, "t"]],
    "undo": [["--list"], ["r/" + CODES], [HOSTILE]],
    "archive": [["r", "--dry-run"], [HOSTILE]],
    "audit": [[], ["--deep"], ["--clean"]],
    "validate": [["r@latest", "--with", "evil:evaluate"], ["r@latest", "--with", HOSTILE], [HOSTILE]],
    "promote": [
        ["r:epoch=2", "--as", "champion", "--why", HOSTILE, "--force"],
        ["r:epoch=0", "--as", "champion", "--why", HOSTILE],
        ["r:epoch=0", "--as", HOSTILE, "--why", HOSTILE],
        ["--notify", "champion"],
        ["--retire", HOSTILE, "--why", "x"],
    ],
    "rollback": [["champion", "--why", HOSTILE], [HOSTILE]],
    "release": [[], ["--alias", HOSTILE]],
    "history": [[], ["champion"], [HOSTILE]],
    "sign": [["r@latest", "--key", HOSTILE]],
    "changelog": [[], ["--all"], ["--run", HOSTILE], ["--kind", HOSTILE], ["--since", HOSTILE]],
    "export": [
        ["r@latest", "--as", "card"],
        ["r@latest", "--to", HOSTILE],
        ["r@latest", "--part", HOSTILE, "--to", "x.pt"],
    ],
    "import": [["--run", "i", "--dry-run"], ["--run", "i", "--skip-unreadable"], ["--run", HOSTILE]],
    "demo": [[]],
}


def line_of(command, arguments, root):
    foreign = root.parent / f"foreign{FILE}"
    return [command, *([foreign] if command == "import" else []), root, *arguments]


def test_every_command_is_tried():
    assert set(LINES) == set(ENTRIES)


@pytest.mark.parametrize("command", LINES)
def test_nothing_that_users_write_controls_the_terminal(hostile, command, ready_interpreter, monkeypatch):
    monkeypatch.setattr(sys, "executable", ready_interpreter)  # of the processes of import and validate
    for arguments, options in itertools.product(LINES[command], ([], ["--json"])):
        result = in_process(*line_of(command, arguments, hostile), *options)
        printed = result.stdout + result.stderr
        assert printed.strip(), arguments
        assert not controls(printed), (arguments, printed)
        assert "\nforged" not in result.stdout or command == "validate", (arguments, printed)
        if command != "diff":  # which folds it
            unescaped = "".join(printed.replace("\\", "").split())
            assert set(re.findall("(.{0,5})QQ", unescaped)) <= {"[red]", "-red-"}, (arguments, printed)
        if options and result.returncode == 0:
            json.loads(result.stdout)


def test_a_terminal_gets_colours_and_nothing_else(hostile):
    for arguments in (["ls", hostile, "r"], ["show", hostile, "r@latest"], ["report", hostile], ["history", hostile]):
        shown = "\n".join(on_terminal(80, *arguments))  # without the codes of colours
        assert not controls(shown), arguments
        assert "\\x" in shown


def test_a_training_prints_and_warns_of_names_as_they_are_written(tmp_path, capsys):
    keep = [pp.Best(METRIC, "max"), pp.Last(2)]
    with pp.Checkpointer(tmp_path, run="r", state={"x": 1}, keep=keep, preempt=None) as ckpt:
        with pytest.warns(pp.PeakpointWarning) as warned:
            ckpt.report({METRIC: float("nan")}, step=1)
        ckpt.save(HOSTILE)
    printed = capsys.readouterr().err + "\n".join(str(warning.message) for warning in warned)
    assert "m\\x9b31m" in printed
    assert not controls(printed)
    with pytest.raises(pp.errors.NotFoundError) as caught:
        pp.open(tmp_path).run(HOSTILE)
    assert not controls(str(caught.value))


# --- other terminals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("terminal") / "runs"
    keep = [pp.Best("val_accuracy", "max"), pp.Last(2)]
    with checkpointer(root, run="resnet", state={"x": 1}, keep=keep) as ckpt:
        for epoch in ckpt.epochs(9):
            ckpt.report(val_accuracy=0.7123 + epoch / 37 - (epoch > 5) / 10, sparsity=epoch / 9)
    pp.open(root).run("resnet").pin("resnet@latest", "für später …")
    return root


def process(*arguments, **options):
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, **options)


def numbers(lines):
    """The numbers in lines, but for the age of a checkpoint."""
    return set(re.findall(r"\d[\d.]*\d|\d", re.sub(r"\d+\s+(s|min|h) +ago", "", " ".join(lines))))


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "resnet"], ["keep", "resnet"], ["report"], ["select", "--why"]])
def test_no_number_is_broken_or_cut_where_there_is_little_room(trained, arguments):
    command, *others = arguments
    expected = numbers(on_terminal(300, command, trained, *others))
    for width in (40, 60):
        lines = on_terminal(width, command, trained, *others)
        assert numbers(lines) <= expected, lines
        assert all(len(line) <= width for line in lines if str(trained) not in line), "but for a command to paste"


@pytest.mark.parametrize(
    ("command", "others", "shown"),
    [
        ("show", ["resnet@latest"], rb"f\xfcr sp\xe4ter ..."),
        ("show", ["resnet@latest", "--json"], rb"f\u00fcr sp\u00e4ter \u2026"),
        ("report", [], b"_.-=*#-+*"),
        ("näh", [], rb"No such command 'n\xe4h'"),
    ],
)
def test_what_an_encoding_lacks_is_printed_as_something_else(trained, command, others, shown):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = process(command, trained, *others, stdout=subprocess.PIPE, env=environment)
    printed = result.stdout + result.stderr
    assert printed.isascii()
    assert shown in printed


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["changelog"], ["--help"], ["show", "--help"]])
def test_output_to_a_full_disk_is_one_sentence(trained, arguments):
    command, *others = arguments
    place = [] if "--help" in arguments else [trained]
    with Path("/dev/full").open("w") as full:
        result = process(command, *place, *others, stdout=full)
    assert result.stderr == b"peakpoint: the output cannot be written: No space left on device\n"
    assert result.returncode == pp.errors.StoreError.exit_code


def test_closed_streams_change_no_exit_code(trained):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", RUN, "ls", trained, "nothing"]
        assert subprocess.run(command, stderr=full, check=False).returncode == pp.errors.NotFoundError.exit_code
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        line = f'"{sys.executable}" -c "{RUN}" ls "{trained}" --json {closed}'
        result = subprocess.run(line, shell=True, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("most", [5, 8, 12, 16])
def test_few_open_files_are_one_sentence_or_enough(trained, most):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    for arguments in (["ls", trained], ["select", trained], ["audit", trained, "--deep"]):
        result = process(*arguments, stdout=subprocess.PIPE, preexec_fn=limit)
        assert b"Traceback" not in result.stderr
        if result.returncode:
            assert result.returncode == pp.errors.StoreError.exit_code
            assert re.fullmatch(
                rb"peakpoint: .*(Too many open files; .* ulimit -n 1024|open database file)\n", result.stderr
            )
