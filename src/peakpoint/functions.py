"""Functions that a user names on the command line or in a policy: ``package.module:function``."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.refs import near


def load_function(spec: str) -> Callable[..., Any]:
    """Import ``module:function``; modules in the working directory come first.

    Raises:
        ConfigError: it is not of that form, or there is no such module or function.
    """
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"{spec!r} names no function; write module:function, such as checks:evaluate")
    here = os.getcwd()  # noqa: PTH109 - a string is what sys.path takes
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{spec!r}: the module {module!r} cannot be imported from {here}: {error}") from error
    if not hasattr(found, name):
        have = [one for one in vars(found) if callable(getattr(found, one)) and not one.startswith("_")]
        raise ConfigError(f"{spec!r}: the module {found.__name__!r} has no {name!r}{near(name, have)}")
    function = getattr(found, name)
    if not callable(function):
        raise ConfigError(f"{spec!r} is a {type(function).__name__}, and cannot be called")
    return function  # type: ignore[no-any-return]
