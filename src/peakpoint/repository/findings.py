"""Findings of an audit."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """A finding of an audit.

    Attributes:
        kind: ``"litter"``, ``"damage"``, ``"foreign"``, ``"busy"`` or ``"unread"``, of what the store refuses to read.
        where: a key.
        what: one sentence.
    """

    kind: str
    where: str
    what: str


@dataclass(slots=True)
class Audit:
    """The result of an audit.

    Attributes:
        findings: in the order of the repository's tree.
        runs: how many were looked at.
        checkpoints: how many exist.
        bytes: how many their files have.
        deep: whether every byte was compared with its digest.
    """

    deep: bool
    findings: list[AuditFinding] = field(default_factory=list)
    runs: int = 0
    checkpoints: int = 0
    bytes: int = 0

    def of_kind(self, kind: str) -> list[AuditFinding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def clean(self) -> bool:
        """Whether there is neither litter nor damage, and everything was read."""
        return not any(map(self.of_kind, ("litter", "damage", "unread")))
