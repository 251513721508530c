"""Amounts as people write them, and of cores."""

import os
import re
from datetime import timedelta

from peakpoint.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "pb": 10**15,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "pib": 2**50,
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def read_bytes(name: str, given: object) -> int:
    """A number of bytes from an int or from text such as ``"50 GB"`` or ``"256MiB"``.

    Args:
        name: the argument, for errors.
        given: what was given.

    Raises:
        ConfigError: it is neither, or not at least 1.

    Example:
        >>> from peakpoint.units import read_bytes
        >>> read_bytes("limit", "1.5 kB"), read_bytes("limit", "2 MiB")
        (1500, 2097152)
    """
    amount: float = 0
    if isinstance(given, int) and not isinstance(given, bool):
        amount = given
    elif isinstance(given, str) and (match := _AMOUNT.fullmatch(given)) and match[2].lower() in _UNITS:
        amount = float(match[1]) * _UNITS[match[2].lower()]
    if amount < 1:
        raise ConfigError(f'{name}={given!r} is no number of bytes; give an int or text such as "50 GB" or "256 MiB"')
    return int(amount)


_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d|w)\s*")
_LONGEST = 36525 * 86400  # a century


def read_duration(name: str, given: object) -> timedelta:
    """A time span from a timedelta, or from text such as ``"90min"``, ``"24h"`` or ``"7d"``; 0 is one.

    Args:
        name: the argument, for errors.
        given: what was given.

    Raises:
        ConfigError: it is neither, negative, or longer than a century.

    Example:
        >>> from peakpoint.units import read_duration
        >>> read_duration("undo_for", "1.5h")
        datetime.timedelta(seconds=5400)
    """
    seconds = -1.0
    if isinstance(given, timedelta):
        seconds = given.total_seconds()
    elif isinstance(given, str) and (match := _DURATION.fullmatch(given)):
        seconds = float(match[1]) * _SECONDS[match[2]]
    elif given in {"0", 0} and not isinstance(given, bool):
        seconds = 0
    if not 0 <= seconds <= _LONGEST:
        raise ConfigError(f'{name}={given!r} is no time span; give a timedelta or text such as "90min", "24h" or "7d"')
    return timedelta(seconds=seconds)


def cores() -> int:
    """How many threads of work this process may have running."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
