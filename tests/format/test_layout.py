"""Where things are in a repository: what is written is listed, for those who read the code and for all others."""

import inspect
import re
from pathlib import Path

import pytest

from peakpoint.format import layout

ROOT = Path(__file__).parents[2]
LISTED = re.compile(
    r"^ *((?:[a-z]+/)?[\w<>./-]+\.(?:json|jsonl|lock|pack|predictions|safetensors|toml|sqlite))\b", re.MULTILINE
)
PAGES = {
    "layout.py": layout.__doc__,
    "format.md": re.search(r"## Layout\n\n```\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL)[1],
}
NUMBER = 7


def made_of_placeholders():
    """What each function of the module makes, with ``<name>`` in the place of a name."""
    for name, function in inspect.getmembers(layout, inspect.isfunction):
        names = inspect.signature(function).parameters
        if function.__module__ == layout.__name__ and {"run", "alias", "release"} & set(names):
            values = {one: NUMBER if one == "number" else f"<{one}>" for one in names}
            yield name, function(**values).replace(f"{NUMBER:06d}", "<number>")


def pattern(line):
    return re.compile(re.sub(r"<\w+>", "[^/]+", line.replace(".", "[.]").replace("<alias>", ".+")))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_repository_is_listed(page):
    patterns = [pattern(line) for line in LISTED.findall(PAGES[page])]
    repository = ROOT / "tests/data/format-1"
    for path in sorted(repository.rglob("*")):
        if path.name in {"golden.safetensors", "signer.pub"} or path.name.startswith(".tmp-"):
            continue  # of its owner, and litter
        key = path.relative_to(repository).as_posix()
        assert path.is_dir() or [one for one in patterns if one.fullmatch(key)], f"{key} is not listed"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("function", "key"), [*made_of_placeholders()], ids=lambda value: value.split("/")[0])
def test_every_key_is_listed(page, function, key):
    lines = LISTED.findall(PAGES[page])
    known = key.replace("<checkpoint>", "<id>").replace("<release>", "<id>").replace("/<file>", "/<part>.safetensors")
    assert [one for one in lines if one == known or one.startswith(known + "/")], f"{function}: {known}"


def test_both_list_the_same():
    assert LISTED.findall(PAGES["layout.py"]) == LISTED.findall(PAGES["format.md"])
