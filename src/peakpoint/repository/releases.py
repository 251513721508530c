"""Records of releases as earlier versions wrote them; today the record of the alias holds the decision of a release."""

from collections.abc import Mapping
from dataclasses import dataclass

from peakpoint.errors import CorruptError
from peakpoint.format import layout
from peakpoint.format.members import Name, Ordinal, Time
from peakpoint.format.sealed import decode_record
from peakpoint.repository.aliases import AliasTarget
from peakpoint.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRecord:
    """A release on record.

    Attributes:
        alias: what was released to.
        outcome: ``"promoted"`` or ``"refused"``.
        candidate: what was to be promoted.
        former: the holder before; None when there was none.
        validation: digest of the validation it rested on.
        record: the number of the alias's record, if one was made.
        steps: ``name`` and what was ``said``, for each.
        reasons: why it was refused.
        policy: the text of the policy file.
    """

    id: Name
    alias: str
    outcome: str
    at: Time
    by: str
    candidate: AliasTarget
    former: AliasTarget | None
    validation: str | None
    record: Ordinal | None
    steps: tuple[Mapping[str, str], ...]
    reasons: tuple[str, ...]
    policy: str


def release_ids(store: Store) -> list[str]:
    """The ids of releases on record."""
    names = [child for child in store.children(layout.RELEASES) if child.endswith(".json")]
    return [name.removesuffix(".json") for name in names]


def read_release(store: Store, release: str) -> ReleaseRecord:
    """Read one record.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release of Peakpoint wrote it.
    """
    key = layout.release_key(release)
    record = decode_record(ReleaseRecord, store.get(key), where=key)
    if record.id != release:
        raise CorruptError(f"{key} is the record of another release: `$.id` is {record.id!r}")
    for member in ("candidate", "former"):
        target = getattr(record, member)
        if target is not None and not target.is_possible:
            raise CorruptError(f"{key} names what cannot be a checkpoint: `$.{member}`")
    return record
