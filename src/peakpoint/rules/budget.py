"""A cap on the space that checkpoints take."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from peakpoint.format.amounts import read_bytes
from peakpoint.rules.record import ArgumentCheck, CheckpointRecord, Claim, Reasons


@dataclass(frozen=True, slots=True)
class Budget(metaclass=ArgumentCheck):
    """Caps the space of a run: what is claimed least goes first, the older before the newer.

    The only rule that wants less and not more: it claims nothing. What is protected (the newest checkpoint, those saved
    on request, pinned ones) never goes, even above the cap.

    Args:
        limit: bytes, or text such as ``"50 GB"``.

    Raises:
        ConfigError: no number of bytes.

    Example:
        >>> Budget("50 GB").text
        'budget:50000000000'
    """

    usage: ClassVar[str] = 'Budget("50 GB")'
    limit: int | str
    needs: ClassVar[tuple[str, ...]] = ()
    ranks_by: ClassVar[tuple[()]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", read_bytes("Budget", self.limit))

    @property
    def bytes(self) -> int:
        """The cap in bytes."""
        return int(self.limit)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"budget:{self.limit}"

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:  # noqa: ARG002
        """Nothing."""
        return {}

    def exceeded(
        self, records: Iterable[CheckpointRecord], claims: Mapping[str, Sequence[Claim]], protected: Collection[str]
    ) -> list[str]:
        """The ids of what must go, in this order, out of what is claimed or protected.

        Args:
            records: every checkpoint.
            claims: who claims what.
            protected: ids that must stay.
        """
        claimed_records = [record for record in records if record.id in claims or record.id in protected]
        total = sum(record.size_bytes for record in claimed_records)
        removed = []
        for record in sorted(claimed_records, key=lambda record: (len(claims.get(record.id, ())), record.sequence)):
            if total <= self.bytes:
                break
            if record.id not in protected and record.size_bytes:
                removed.append(record.id)
                total -= record.size_bytes
        return removed
