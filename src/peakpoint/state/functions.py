"""Functions that people name in a text: ``"package.module:name"``."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format.names import did_you_mean

RAISED_BY_PROGRAMS = (  # a module is a program: it may raise anything that programs do
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class MisnamedError(ConfigError):
    """There is no such function."""


def load_function(spec: str) -> Callable[..., Any]:
    """The function that ``spec`` names; modules are looked for in the working directory first.

    Importing a module runs it: name only what you would run.

    Args:
        spec: ``"package.module:name"``.

    Raises:
        MisnamedError: no colon, a module that cannot be imported, a name that it has not, or one that cannot be called.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise MisnamedError(f"{spec!r} names no function; give MODULE:FUNCTION, such as train:build_model")
    here = str(Path.cwd())
    if here not in sys.path:  # it stays: functions import more when they run
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except RAISED_BY_PROGRAMS as error:
        raise MisnamedError(
            f"{spec!r}: the module {module!r} cannot be imported from {here} or the Python path: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, name):
        names = [known for known, value in vars(found).items() if callable(value)]
        raise MisnamedError(f"{spec!r}: the module {module!r} has no {name!r}{did_you_mean(name, names)}")
    function = getattr(found, name)
    if not callable(function):
        raise MisnamedError(f"{spec!r} is a {type(function).__name__}, and cannot be called; name a function")
    called: Callable[..., Any] = function
    return called
