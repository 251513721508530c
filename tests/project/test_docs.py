"""The documentation runs: its code, its commands, its links, and the examples in docstrings."""

import ast
import doctest
import importlib
import pkgutil
import pydoc
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest

import peakpoint
from peakpoint.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"(?<![\w/.])peakpoint(?:\.(?!json|toml|py)[A-Za-z_]\w*)+(?![\w/])")
NO_PROSE = re.compile(r"[#|!\[<*-]|\d+\.| {4}")  # titles, tables, pictures, lists
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "page"}
    for block in [*SETUP.findall(text), *PYTHON.findall(text)]:
        exec(compile(block, name(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if CONSOLE.search(page.read_text())], ids=name)
def test_the_commands_of_a_page_can_be_parsed(page):
    for block in CONSOLE.findall(page.read_text()):
        for line in block.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["peakpoint"]:
                command = cli.get_command(click.Context(cli), words[1])
                assert command is not None, line
                command.make_context(words[1], words[2:])


@pytest.mark.parametrize("page", [page for page in PAGES if TEST.search(page.read_text())], ids=name)
def test_the_tests_of_a_page_exist(page):
    for path, test in TEST.findall(page.read_text()):
        source = (ROOT / path).read_text()
        assert not test or f"def {test}(" in source, f"{path}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "report"], ids=name)
def test_every_paragraph_of_a_page_has_an_end(page):
    prose = re.sub(r"<!--.*?-->|^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
        text = paragraph.strip()
        assert not text or NO_PROSE.match(text) or text[-1] in ".:!?)`*", f"torn: ...{text[-80:]}"


def test_the_page_of_the_command_line_is_what_the_commands_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "cli_page.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented():
    text = "".join(page.read_text() for page in PAGES)
    for public in peakpoint.__all__:
        assert re.search(rf"\b{public}\b", text), public


def test_names_of_ours_in_messages_and_docstrings_are_those_of_something():
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for dotted in NAMED.findall(node.value):
                    assert pydoc.locate(dotted) is not None, f"{name(path)}: {dotted}"


MODULES = [
    module.name
    for module in pkgutil.walk_packages(peakpoint.__path__, "peakpoint.")
    if not module.name.startswith("peakpoint.cli.demo")
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_are_right(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("script", ["train.py", "prove_resume.py"])
def test_the_examples_run(script, tmp_path):
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if script == "train.py":
        again = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "resumed from step 96" in again.stdout
    else:
        assert done.stdout.startswith("equal, bit for bit")


def test_the_repository_speaks_of_itself_only():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    private = ("/" + "work/", "shared" + "/")
    for file in tracked:
        if not file.startswith(".git"):
            text = (ROOT / file).read_text(errors="ignore")
            assert not any(word in text for word in private), file


def test_the_index_of_decisions_has_each_with_its_status():
    page = (ROOT / "docs" / "decisions" / "README.md").read_text()
    entries = re.findall(r"^(\d+)\. \*\*(.*?)\*\*", page, re.DOTALL | re.MULTILINE)
    index = re.findall(r"^\| (\d+) \| (.*) \| (holds|(?:changed|replaced|withdrawn) by (\d+)) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    assert [row[:2] for row in index] == [(number, " ".join(title.split()).rstrip(".")) for number, title in entries]
    assert all(int(number) < int(later) <= len(entries) for number, _, _, later in index if later)
