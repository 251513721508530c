"""Functions by name: the working directory first, and errors that say what there is."""

import sys

import pytest

from peakpoint.errors import ConfigError
from peakpoint.state.functions import load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "inner.py").write_text("def evaluate(x):\n    return x + 1\n\nvalue = 3\n")
    (tmp_path / "statistics.py").write_text("def mine():\n    return 'mine'\n")  # the name of a module of Python's
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    (tmp_path / "mistyped.py").write_text("def f(:\n")
    for name in ("statistics", "named", "named.inner", "breaks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before


def test_a_function_is_found_in_the_working_directory_first(here):
    assert load_function("named.inner:evaluate")(1) == 2
    assert load_function("statistics:mine")() == "mine"
    assert sys.path.count(str(here)) == 1, "what functions import when they run is found, too"
    del sys.modules["statistics"], sys.modules["named.inner"], sys.modules["named"]


@pytest.mark.parametrize(
    ("spec", "says", "cause"),
    [
        ("named.inner", "give MODULE:FUNCTION", None),
        (":evaluate", "give MODULE:FUNCTION", None),
        ("named.inner:", "give MODULE:FUNCTION", None),
        ("no_such:f", "the module 'no_such' cannot be imported from {here}", ModuleNotFoundError),
        ("breaks:f", "ZeroDivisionError", ZeroDivisionError),
        ("mistyped:f", "SyntaxError", SyntaxError),
        ("named.inner:evalute", "has no 'evalute'; did you mean 'evaluate'?", None),
        ("named.inner:value", "is a int, and cannot be called", None),
        ("..:f", "cannot be imported", None),
    ],
)
def test_what_names_no_function_is_refused(here, spec, says, cause):
    with pytest.raises(ConfigError) as raised:
        load_function(spec)
    assert says.format(here=here) in str(raised.value)
    assert cause is None or isinstance(raised.value.__cause__, cause)
