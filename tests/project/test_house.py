"""The plan of the house: rooms, who may import whom, and what the page of the architecture says of it."""

import ast
import importlib
import importlib.util
import pydoc
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "peakpoint"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
ROWS = [row.split(" | ") for row in next(one for one in CONTRACTS if one["type"] == "layers")["layers"]]
ROOMS = sorted(room for row in ROWS for room in row if room != "errors")


def test_the_top_of_the_package_is_rooms_and_little_else():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "__main__.py", "_version.py", "errors.py", "py.typed"}


def test_the_picture_is_the_contract():
    picture = re.search(r"```\n(.*?)```", PAGE, re.DOTALL)[1]
    rows = [re.split(r"  +", line.strip().partition("  ")[2].strip()) for line in picture.splitlines()]
    assert rows == ROWS


@pytest.mark.parametrize("room", ROOMS)
def test_the_page_says_what_a_room_is_for(room):
    sentence = importlib.import_module(f"peakpoint.{room}").__doc__.split("\n\n")[0].replace("\n", " ").strip()
    assert sentence.endswith(".")
    assert f"| `{room}` | {sentence} |" in PAGE


def test_no_module_of_ours_is_imported_inside_a_function():
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    assert not [name for name in names if name.startswith("peakpoint")], f"{path}: {function.name}"


def test_what_the_page_names_is_there():
    """In the tour and in the table of what to touch."""
    for named in re.findall(r"`((?:src/peakpoint/|tests/|docs/)?[a-z_]+(?:/[a-z_]+)*(?:/|\.py|\.md))`", PAGE):
        places = (ROOT / named, PACKAGE / named)
        assert any(place.exists() for place in places), named


def test_what_the_page_names_with_its_room_is_there():
    for dotted in re.findall(rf"`((?:{'|'.join(ROOMS)})(?:\.(?!json)[A-Za-z_]\w*)+)`", PAGE):
        assert pydoc.locate(f"peakpoint.{dotted}") is not None, dotted


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes():
    spec = importlib.util.spec_from_file_location("sizes", ROOT / ".ci" / "sizes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_are_counted_that_bear_code(sizes):
    assert sizes.code_lines('"""Doc.\n\nMore."""\n\n# why\nimport os  # what\n\nX = """a\n\nb"""\n"""Of X."""\n') == 4
    assert sizes.code_lines("def f(\n    a,\n):\n    return [\n        a,\n    ]\n") == 6


def test_a_room_above_its_ceiling_fails_the_check(sizes, tmp_path, capsys):
    assert sizes.main(lower=False) == 0, capsys.readouterr().out
    (tmp_path / "rooms").write_text(sizes.CEILINGS.read_text().replace("rules = ", "rules = 1 # "))
    sizes.CEILINGS = tmp_path / "rooms"
    assert sizes.main(lower=False) == 1
    assert re.search(r"rules +[\d,]+ +1  TOO LARGE", capsys.readouterr().out)
