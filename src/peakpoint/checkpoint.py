"""A checkpoint as readers see it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint, as its manifest tells it. Frozen; reading it touches no weight file.

    Attributes:
        run: the run's name.
        name: the directory's name, for people.
        id: the identity, 16 hexadecimal digits.
        sequence: place in the order of commits of the run, from 1.
        step: optimizer steps completed.
        epoch: the epoch's index as the loop counts it, from 0; None outside epochs.
        metrics: every metric of the moment.
        reasons: why it was saved, one sentence a claim.
        parts: part name to the names of its tensor files.
        size_bytes: of all files but the manifest.
        path: the directory; None in a store without directories.
        created_at: aware datetime, UTC.
        forks: see ``Manifest.forks``.
    """

    run: str
    name: str
    id: str
    sequence: int
    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    reasons: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    size_bytes: int
    path: Path | None
    created_at: datetime
    forks: tuple[tuple[int, int], ...]

    @property
    def ref(self) -> str:
        """A ref that names this checkpoint and no other."""
        return f"{self.run}/{self.name}"
