"""Functions that are named in a text: ``"package.module:name"``."""

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
    """The text names no function that exists."""


def load_function(spec: str) -> Callable[..., Any]:
    """Import the function that ``spec`` names; modules are looked for in the working directory first.

    Importing a module runs it: name only what you would run.

    Args:
        spec: ``"package.module:name"``.

    Raises:
        MisnamedError: no colon, a module that cannot be imported, or a name that it does not have or cannot be called.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise MisnamedError(f"{spec!r} does not name a function; give MODULE:FUNCTION, such as train:build_model")
    if module.endswith(".py"):
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        raise MisnamedError(f"{spec!r} names a file; give the module as Python imports it: {dotted}:{name}")
    directory = str(Path.cwd())
    if directory not in sys.path:  # it stays: functions import more when they run
        sys.path.insert(0, directory)
    try:
        imported = importlib.import_module(module)
    except RAISED_BY_PROGRAMS as error:
        raise MisnamedError(
            f"{spec!r}: the module {module!r} cannot be imported from {directory} or the Python path: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(imported, name):
        callables = [member for member, value in vars(imported).items() if callable(value)]
        raise MisnamedError(f"{spec!r}: the module {module!r} has no {name!r}{did_you_mean(name, callables)}")
    function = getattr(imported, name)
    if not callable(function):
        raise MisnamedError(f"{spec!r} is a {type(function).__name__}, and cannot be called; name a function")
    checked: Callable[..., Any] = function
    return checked
