"""The entries of a changelog."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

Kind = Literal[
    "saved",
    "imported",
    "save failed",
    "claim lost",
    "removed",
    "parts dropped",
    "undone",
    "archived",
    "restored",
    "pinned",
    "unpinned",
    "measured",
    "withdrawn",
    "begun",
    "continued",
    "rules changed",
    "stopped early",
    "ended",
    "validated",
    "promoted",
    "rolled back",
    "retired",
    "refused",
    "damage",
]
KINDS: tuple[str, ...] = get_args(Kind)
FORCED = "forced"  # changes of aliases that were refused and made with force
PRODUCTION: tuple[str, ...] = ("promoted", "rolled back", "retired", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangelogEntry:
    """One thing that was done, or that happened.

    Attributes:
        at: when it was recorded; None for damage, whose time is not known.
        run: the run's name; None when it concerns no run.
        checkpoint: ``RUN/NAME``, with its id in ``details`` where it is known; of a promotion the new holder.
        alias: the alias that was changed, or would have been.
        by: the user or process; ``"rules"`` for the rules of a training; "" when it is not recorded.
        why: the reason; "" when there is none.
        before: the former holder, rules or claim; None without one.
        after: the new ones.
        details: further figures, as plain JSON.
    """

    at: datetime | None
    kind: Kind
    run: str | None = None
    checkpoint: str | None = None
    alias: str | None = None
    by: str = ""
    why: str = ""
    before: str | None = None
    after: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forced(self) -> bool:
        """Whether it was refused and made with force."""
        return bool(self.details.get(FORCED))
