"""What an account is made of."""

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
FORCED = "forced"  # promotions, roll backs and retirements that were refused and done all the same
PRODUCTION: tuple[str, ...] = ("promoted", "rolled back", "retired", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangelogEntry:
    """One thing that was done, or that happened.

    Attributes:
        at: when it was recorded; None for damage, of which nobody knows when it came.
        kind: what.
        run: the run's name; None when it is about no run.
        checkpoint: ``RUN/NAME``; its id is in ``details`` where it is known. For a promotion the new holder.
        alias: the alias that was changed, or about to be.
        by: who, in words; ``"rules"`` when the rules of a training did; "" when it is not recorded.
        why: the reason, in words; "" when there is none.
        before: what it was: the former holder, the rules, the claim; None where there was nothing.
        after: what it is from then on.
        details: further figures; plain JSON.
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
        """Whether it was refused and done all the same."""
        return bool(self.details.get(FORCED))
