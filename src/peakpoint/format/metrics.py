"""Metrics: numbers of whatever kind people report, and how they stand in JSON."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format.names import check_metric


def number_in(value: Any, *, booleans: bool = False) -> float | None:
    """Return the number in something number-like, None when there is none.

    Numbers are real numbers, and tensors and arrays of one element, which are known by their ``item``. A number too
    large for a float is none, and neither are texts.

    Args:
        value: anything.
        booleans: whether true and false are the numbers 1 and 0.

    Example:
        >>> number_in(3), number_in("3"), number_in(True), number_in(True, booleans=True)
        (3.0, None, None, 1.0)
    """
    if hasattr(value, "item") and hasattr(value, "reshape"):
        value = value.item() if len(value.reshape(-1)) == 1 else None
    if (isinstance(value, bool) and not booleans) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def is_number(value: object) -> bool:
    """Whether a setting is a finite ``int`` or ``float``."""
    number = number_in(value) if isinstance(value, int | float) else None
    return number is not None and math.isfinite(number)


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as floats.

    Raises:
        ConfigError: a name that cannot be, or a value that is not a real number.
    """
    values = {}
    for name, value in metrics.items():
        check_metric(name)
        number = number_in(value, booleans=True)
        if number is None:
            if isinstance(value, int):
                raise ConfigError(f"metric {name!r} is too large for a float")
            shape = list(getattr(value, "shape", ()))
            problem = f"has the shape {shape}" if shape else f"is {value!r}, a {type(value).__name__}"
            raise ConfigError(f"metric {name!r} {problem}; report one real number")
        values[name] = number
    return values


def metrics_to_json(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics for JSON, which has no NaN and no infinities: they become ``"nan"``, ``"inf"`` and ``"-inf"``."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def metrics_from_json(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that ``metrics_to_json`` was given."""
    return {name: float(value) for name, value in metrics.items()}


def json_value(value: Any) -> Any:
    """Return a value for JSON: NaN and infinities at any depth become text, as in ``metrics_to_json``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: json_value(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(child) for child in value]
    return value
