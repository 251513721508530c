"""Amounts as people write them: bytes, times, counts and rates."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from peakpoint.errors import ConfigError

_AMOUNT = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?(?:[eE]\+?\d{1,2})?)\s*([A-Za-z]*(?:/s)?)\s*")
_Units = Mapping[str, int | Decimal]
_BYTES: _Units = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", 1)},
}
_SECONDS: _Units = {"ms": Decimal("0.001"), "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_LONGEST = 36525 * 86400  # a century
UNDO_FOR = "24h"  # how long a removed checkpoint can be brought back by default
_COUNTS: _Units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_RATES: _Units = {
    **{f"{prefix}B/s": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))},
    **{f"{prefix}bit/s": Decimal(1000**power) / 8 for power, prefix in enumerate(("", "k", "M", "G", "T"))},
}


def _amount(value: str, units: _Units) -> Decimal | None:
    """Return a number with one of the units; None for everything else."""
    match = _AMOUNT.fullmatch(value)
    return Decimal(match[1]) * units[match[2]] if match and match[2] in units else None


def _quoted(name: str, value: object) -> str:
    """An argument as it was given: of a function, or of the command line."""
    return f"{name} {value}" if name.startswith("--") else f"{name}={value!r}"


def read_bytes(name: str, value: object) -> int:
    """Read a number of bytes from an int or from text such as ``"50 GB"`` or ``"256MiB"``.

    Args:
        name: the argument, for errors.

    Raises:
        ConfigError: it is neither, or not at least 1.

    Example:
        >>> from peakpoint.format.amounts import read_bytes
        >>> read_bytes("limit", "1.5 kB"), read_bytes("limit", "2 MiB")
        (1500, 2097152)
    """
    amount: int | Decimal | None = None
    if isinstance(value, str):
        amount = _amount(value.lower(), _BYTES)
    elif isinstance(value, int) and not isinstance(value, bool):
        amount = value
    if amount is None or amount < 1:
        raise ConfigError(f'{_quoted(name, value)} is not a number of bytes; give one such as "50 GB" or "256 MiB"')
    return int(amount)


def read_duration(name: str, value: object) -> timedelta:
    """Read a time span from a timedelta, or from text such as ``"90min"``, ``"24h"`` or ``"7d"``; 0 is one.

    Args:
        name: the argument, for errors.

    Raises:
        ConfigError: it is neither, negative, or longer than a century.

    Example:
        >>> from peakpoint.format.amounts import read_duration
        >>> read_duration("undo_for", "1.5h")
        datetime.timedelta(seconds=5400)
    """
    seconds: float | Decimal | None = None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif value in ("0", 0) and not isinstance(value, bool):
        seconds = 0
    elif isinstance(value, str):
        seconds = _amount(value, _SECONDS)
    if seconds is None or not 0 <= seconds <= _LONGEST:
        raise ConfigError(f'{_quoted(name, value)} is not a time span; give one such as "90min", "24h" or "7d"')
    return timedelta(seconds=float(seconds))


def read_count(name: str, value: str) -> int:
    """Read a count from text such as ``"25.6M"``, ``"175B"``, ``"1e6"`` or ``"61,706"``.

    Args:
        name: the argument, for errors.

    Raises:
        ConfigError: it is none, or not at least 1.

    Example:
        >>> from peakpoint.format.amounts import read_count
        >>> read_count("params", "25.6M"), read_count("params", "61,706"), read_count("params", "1.5e6")
        (25600000, 61706, 1500000)
    """
    count = _amount(value.replace(",", "").lower(), _COUNTS)
    if count is None or count < 1:
        raise ConfigError(f"{_quoted(name, value)} is not a number of at least 1; give one such as 25.6M or 175B")
    return int(count)


def read_rate(name: str, value: str) -> float:
    """Read bytes in a second from text such as ``"1Gbit/s"`` or ``"125MB/s"``.

    Args:
        name: the argument, for errors.

    Raises:
        ConfigError: it is none, or not above 0.

    Example:
        >>> from peakpoint.format.amounts import read_rate
        >>> read_rate("bandwidth", "1Gbit/s"), read_rate("bandwidth", "20 MB/s")
        (125000000.0, 20000000.0)
    """
    rate = _amount(value, _RATES)
    if not rate:
        raise ConfigError(f'{_quoted(name, value)} is not a rate; give one such as "1Gbit/s" or "125MB/s"')
    return float(rate)


def read_time(name: str, value: str, now: datetime) -> datetime:
    """Read a time in ISO 8601, such as ``2026-11-25T18:30+01:00``, or a time span before now, such as ``7d``.

    Args:
        name: the argument, for errors.
        value: the text; without a zone it is in UTC.
        now: the present time.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> from datetime import UTC, datetime
        >>> from peakpoint.format.amounts import read_time
        >>> read_time("--since", "2026-11-25", datetime.now(UTC)).isoformat()
        '2026-11-25T00:00:00+00:00'
    """
    try:
        if value == "0" or _amount(value, _SECONDS) is not None:
            return now - read_duration(name, value)
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{_quoted(name, value)} is not a time; give one such as 2026-11-25, 2026-11-25T18:30+01:00, or 7d for 7 "
            "days ago"
        ) from error


def size_text(count: float) -> str:
    """Return bytes in decimal units, such as ``"12.3 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def moment_label(step: int, epoch: int | None) -> str:
    """Return ``"epoch 3"`` or ``"step 400"``."""
    return f"step {step}" if epoch is None else f"epoch {epoch}"
