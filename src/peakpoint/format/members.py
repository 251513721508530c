"""Types of the members of records: what is of the right JSON type may still be nothing that Peakpoint has written."""

from datetime import datetime
from typing import Annotated

from msgspec import Meta

LARGEST = 2**63 - 1

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
"""A size, a step, a number of things."""

Ordinal = Annotated[int, Meta(ge=1, le=LARGEST)]
"""A number that is counted from 1."""

Name = Annotated[str, Meta(pattern=r"\A(?!\.)[^/\\\x00-\x1f\x7f]{1,255}\Z")]
"""An id, or the name of a file or directory: one component of a path, which leads nowhere else."""

Time = Annotated[datetime, Meta(tz=True)]
"""A moment: a time with a zone."""


def check_time(name: str, value: object) -> None:
    """Refuse a time at the edge of the calendar, which no other zone and no database can express.

    Args:
        name: the member, for errors.
        value: its value; everything that is no time passes.

    Raises:
        ValueError: it is one.
    """
    if isinstance(value, datetime) and not 1 < value.year < 9999:
        raise ValueError(f"the year {value.year} - at `$.{name}`")
