"""Records of releases: what was selected, and what came of each step."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from peakpoint.errors import FormatError
from peakpoint.format import layout
from peakpoint.format.sealed import check_format, unseal
from peakpoint.repository.aliases import AliasTarget
from peakpoint.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a release.

    Attributes:
        name: ``select``, ``validate``, ``compare``, ``sign``, ``promote`` or ``tell``.
        said: what came of it, in one sentence.
    """

    name: str
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRecord:
    """A release on record.

    Attributes:
        id: its name.
        alias: what was released to.
        outcome: ``"promoted"`` or ``"refused"``.
        at: when.
        by: who.
        candidate: what was to be promoted.
        former: the holder before; None when there was none.
        validation: digest of the validation it rested on.
        record: the number of the alias's record, if one was made.
        steps: what came of each.
        reasons: why it was refused.
        policy: the text of the policy file.
    """

    id: str
    alias: str
    outcome: str
    at: datetime
    by: str
    candidate: AliasTarget
    former: AliasTarget | None
    validation: str | None
    record: int | None
    steps: tuple[Step, ...]
    reasons: tuple[str, ...]
    policy: str


def records(store: Store) -> list[ReleaseRecord]:
    """Every release on record, earliest first.

    Raises:
        CorruptError: one is damaged.
        FormatError: a newer release of Peakpoint wrote it.
    """
    keys = [f"{layout.RELEASES}/{child}" for child in store.children(layout.RELEASES) if child.endswith(".json")]
    return sorted((decode(unseal(store.get(key), where=key), where=key) for key in keys), key=lambda record: record.at)


def decode(record: Mapping[str, Any], *, where: str) -> ReleaseRecord:
    """Read the record of a release.

    Raises:
        FormatError: it is none that this version of Peakpoint reads.
    """
    check_format(record, where=where)
    try:
        return msgspec.convert(record, ReleaseRecord)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where} is not a record of a release that this version reads: {error}") from error
