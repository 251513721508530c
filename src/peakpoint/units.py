"""Amounts as people write them."""

import re

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
