"""Time, as a value that tests can choose.

A clock is a function without arguments that returns an aware ``datetime`` in UTC. Nothing else in the package asks
the system for the time of day.
"""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The present time in UTC, with microseconds."""
    return datetime.now(UTC)
