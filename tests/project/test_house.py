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
    assert entries == {*ROOMS, "__init__.py", "__init__.pyi", "__main__.py", "_version.py", "errors.py", "py.typed"}


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


# --- measures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_are_counted_that_bear_code(house):
    assert house.code_lines('"""Doc.\n\nMore."""\n\n# why\nimport os  # what\n\nX = """a\n\nb"""\n"""Of X."""\n') == 4
    assert house.code_lines("def f(\n    a,\n):\n    return [\n        a,\n    ]\n") == 6


def test_placeholders_are_counted_where_they_are_names(house):
    tree = ast.parse("def f(found, *, size):\n    one = found.told + size  # given\n    return g(one, known='known')\n")
    assert house.placeholders(tree) == {"found": 2, "one": 2}
    assert sorted(house.name_uses(tree)) == ["found", "found", "g", "one", "one", "size", "size"]


def test_a_class_name_that_two_modules_define_is_doubled(house):
    classes = {"a.py": ["Plan", "Peak"], "b/c.py": ["_Plan"], "d.py": ["Rule"]}
    assert house.doubled_classes(classes) == {"Plan": ["a.py", "b/c.py"]}


@pytest.mark.parametrize("measure", ["code", "placeholders", "doubled"])
def test_a_room_above_a_ceiling_fails_the_check(house, tmp_path, capsys, measure):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "a.py").write_text("class Plan:\n    found = 1\n")
    (tmp_path / "store.py").write_text("class Plan:\n    size = 1\n")
    house.PACKAGE, house.CEILINGS = tmp_path, tmp_path / "house.toml"
    house.CEILINGS.write_text("")
    assert house.main(lower=True) == 0, capsys.readouterr().out
    assert house.main(lower=False) == 0
    lowered = house.CEILINGS.read_text().replace(f"{measure} = ", f"{measure} = -", 1)
    house.CEILINGS.write_text(lowered)
    assert house.main(lower=False) == 1
    assert f"ABOVE ITS CEILING: {measure}" in capsys.readouterr().out
    assert house.main(lower=True) == 1  # a ceiling only falls
    assert house.CEILINGS.read_text() == lowered


def test_long_modules_and_many_long_functions_fail_the_check(house, tmp_path, capsys):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "a.py").write_text("x = 1\n" * 451)
    house.PACKAGE, house.CEILINGS = tmp_path, tmp_path / "house.toml"
    house.CEILINGS.write_text("")
    assert house.main(lower=True) == 1
    assert "rules/a.py: 451 lines, ABOVE 450" in capsys.readouterr().out
    (tmp_path / "rules" / "a.py").write_text("def f():\n" + "    x = 1\n" * 25)
    house.CEILINGS.write_text("")
    assert house.main(lower=True) == 1
    assert "one function in ten has 26 lines or more, ABOVE 25" in capsys.readouterr().out


def test_the_package_is_below_its_ceilings(house, capsys):
    assert house.main(lower=False) == 0, capsys.readouterr().out
