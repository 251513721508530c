"""Metrics: numbers of whatever kind people report, and how they stand in JSON."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format.names import check_metric


def read_metrics(given: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats.

    Raises:
        ConfigError: a name that cannot be, or a value that is no real number.
    """
    values = {}
    for name, value in given.items():
        check_metric(name)
        number = value
        if hasattr(value, "item") and hasattr(value, "reshape"):  # of tensors, of arrays, and of NumPy
            if len(value.reshape(-1)) != 1:
                raise ConfigError(f"metric {name!r} has the shape {list(value.shape)}; report one number")
            number = value.item()
        if not isinstance(number, numbers.Real):
            raise ConfigError(f"metric {name!r} is {value!r}, a {type(value).__name__}; report a real number")
        try:
            values[name] = float(number)
        except OverflowError as error:
            raise ConfigError(f"metric {name!r} is too large for a float") from error
    return values


def metrics_to_json(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinities: they become ``"nan"``, ``"inf"`` and ``"-inf"``."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def metrics_from_json(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The inverse of ``metrics_to_json``."""
    return {name: float(value) for name, value in metrics.items()}
