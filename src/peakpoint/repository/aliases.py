"""Aliases: names such as ``champion`` that point at a checkpoint, with their history.

An alias is a directory of numbered records, each created only if absent, none ever changed. The record with the
highest number says what the alias points at; the ones before it are its history. Of several who add the next one at the
same time exactly one succeeds, which makes a change a compare-and-swap on the record that its maker has read. Every
record has the digest of the bytes of the one before it, so that a record that was changed or taken out shows.

``champion`` is an alias of the whole repository, ``resnet50/champion`` that of a family of models.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Literal

from peakpoint.errors import ConfigError, ConflictError, CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.names import check_text, did_you_mean
from peakpoint.format.sealed import FORMAT, decode_record, digest, seal
from peakpoint.repository.refs import check_alias, is_alias
from peakpoint.store import Store, establish

_NAME = re.compile(r"(?!\.)[^/\\\x00]{1,200}")  # of what is a directory, and text that every database takes
KEEPS = 3  # former holders that stay protected, where no policy says how many
Kind = Literal["promoted", "rolled back", "retired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasTarget:
    """The checkpoint that an alias points at.

    Attributes:
        run: the run's name.
        checkpoint: the id.
        name: the directory, for people.
        manifest: digest of the bytes of its manifest, and so of everything that the manifest has digests of.
    """

    run: str
    checkpoint: str
    name: str
    manifest: str

    @property
    def ref(self) -> str:
        """A ref that names this checkpoint and no other."""
        return f"{self.run}/{self.checkpoint}"

    @property
    def is_possible(self) -> bool:
        """Whether a checkpoint can have these names."""
        return all(map(_NAME.fullmatch, (self.run, self.checkpoint, self.name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasChange:
    """A change of an alias.

    Attributes:
        kind: what was done.
        target: what the alias points at from then on; None when it was retired.
        at: when; in a record never before the record in front of it.
        by: who.
        why: the reason, in words.
        restores: for a rollback: the number of the record whose target came back.
        validation: digest of the validation record that it rests on; None when there was none.
        forced: the objections that were overridden, a sentence each.
        comparison: the comparison with the former holder that was shown before.
        release: the id of the release that made it; None when it was made by hand.
        decision: of that release: the text of its policy, and the steps with what came of each.
        keeps: how many former holders are protected from retention from now on.
    """

    kind: Kind
    target: AliasTarget | None
    at: datetime
    by: str
    why: str
    restores: int | None = None
    validation: str | None = None
    forced: tuple[str, ...] = ()
    comparison: Mapping[str, Any] | None = None
    release: str | None = None
    decision: Mapping[str, Any] | None = None
    keeps: int = KEEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasRecord(AliasChange):
    """A change of an alias on record.

    Attributes:
        alias: its name.
        number: 1, 2, 3, ... without gaps.
        previous: digest of the bytes of the record before; None for the first.
        write: random, so that a writer knows its own record again when the reply was lost.
        digest: of this record's bytes; not part of them.
    """

    alias: str
    number: int
    previous: str | None
    write: str
    digest: str = field(default="", compare=False)

    @property
    def stands_for(self) -> int:
        """The number of the record that first pointed where this one does: its own, or the one that it restores."""
        return self.number if self.restores is None else self.restores


# the order of a record's members at rest
_MEMBERS = (
    *("alias", "number", "kind", "target", "at", "by", "why", "previous", "write"),
    *("restores", "validation", "forced", "comparison", "release", "decision", "keeps"),
)


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """The newest record of an alias, when it is damaged: another one can be added to it all the same.

    Attributes:
        alias: its name.
        number: the record's number.
        digest: of the record's bytes as they are.
        error: what is wrong.
    """

    alias: str
    number: int
    digest: str
    error: str


# --- which there are ------------------------------------------------------------------------------------------------


def names(store: Store) -> list[str]:
    """Return every alias that has a record, by name."""
    return list(numbers_by_alias(store))


def numbers_by_alias(store: Store) -> dict[str, list[int]]:
    """Return the numbers of the records of every alias, by name; what cannot be an alias is left to audit."""
    aliases = [name for first in directories(store) for name in (first, *directories(store, first))]
    return {alias: existing for alias in sorted(aliases) if (existing := numbers(store, alias))}


def directories(store: Store, family: str = "") -> list[str]:
    """Return the names that have a directory: in the repository, each of which may be a family too, or in a family."""
    children = store.children(layout.alias_prefix(family) if family else layout.ALIASES)
    subdirectories = [child[:-1] for child in children if child.endswith("/")]
    aliases = [f"{family}/{name}" if family else name for name in subdirectories]
    return [alias for alias in aliases if is_alias(alias)]


_NUMBERED = re.compile(r"(?!0{6})([0-9]{6}|[1-9][0-9]{6,17})\.json")
_BEYOND = 10**18  # no record has a number of so many digits


def numbers(store: Store, alias: str) -> list[int]:
    """Return the numbers of an alias's records, in order; none when there is no such alias."""
    matches = map(_NUMBERED.fullmatch, store.children(layout.alias_prefix(check_alias(alias))))
    return sorted(int(match[1]) for match in matches if match)


# --- reading --------------------------------------------------------------------------------------------------------


def read(store: Store, alias: str, number: int) -> AliasRecord:
    """Read one record.

    Raises:
        NotFoundError: no record has that number; the message says which there are.
        CorruptError: it is damaged, or that of another alias or number.
        FormatError: a newer release wrote it.
    """
    try:
        data = store.get(layout.alias_key(alias, min(number, _BEYOND)))
    except NotFoundError as error:
        existing = numbers(store, alias)
        span = f"it has records {existing[0]} to {existing[-1]}" if existing else "it has none"
        raise NotFoundError(f"the alias {alias!r} has no record {number}; {span}") from error
    return _decode(data, alias, number)


def _decode(data: bytes, alias: str, number: int) -> AliasRecord:
    where = layout.alias_key(alias, number)
    record = decode_record(AliasRecord, data, where=where, unsealed=CorruptError)
    if (record.alias, record.number) != (alias, number):
        raise CorruptError(f"{where} says that it is record {record.number} of {record.alias}: it was moved or copied")
    contradiction = _contradiction(record)
    if contradiction:
        raise CorruptError(f"{where} {contradiction}: no release of Peakpoint has written that")
    return replace(record, digest=digest(data))


def _contradiction(record: AliasRecord) -> str | None:
    """Return what is wrong with a record although each member is of its type: that is damage, not another release."""
    target = record.target
    if record.at.tzinfo is None:
        return "has a time without zone"
    if target is not None and not target.is_possible:
        return f"points at {target.run}/{target.name} ({target.checkpoint}), which cannot be a checkpoint: `$.target`"
    if (target is None) != (record.kind == "retired"):
        return f"is of kind {record.kind!r} and points at {'a checkpoint' if target else 'nothing'}"
    if (record.restores is None) != (record.kind != "rolled back"):
        return f"is of kind {record.kind!r} and restores {record.restores}"
    if record.restores is not None and not 1 <= record.restores < record.number:
        return f"restores record {record.restores}, which is not before it"
    return "keeps fewer than no former holders" if record.keeps < 0 else None


def newest(store: Store, alias: str) -> AliasRecord | DamagedRecord | None:
    """Read the newest record of an alias, which counts; None when there is no such alias.

    Raises:
        FormatError: a newer release wrote it.
    """
    existing = numbers(store, alias)
    if not existing:
        return None
    try:
        return read(store, alias, existing[-1])
    except CorruptError as error:
        data = store.get(layout.alias_key(alias, existing[-1]))
        return DamagedRecord(alias, existing[-1], digest(data), str(error))


def holder(store: Store, alias: str) -> AliasRecord:
    """Read the newest record of an alias that points at a checkpoint.

    Raises:
        NotFoundError: there is no such alias, or it was retired; the message names near ones.
        CorruptError: the record is damaged.
        FormatError: a newer release wrote it.
    """
    record = newest(store, alias)
    if record is None:
        aliases = names(store)
        raise NotFoundError(
            f"there is no alias {alias!r}{did_you_mean(alias, aliases)}; aliases: {', '.join(aliases) or 'none yet'}; "
            f"peakpoint promote ROOT REF --as {alias} makes one"
        )
    if isinstance(record, DamagedRecord):
        raise CorruptError(record.error)
    if record.target is None:
        raise NotFoundError(f"the alias {alias!r} was retired at {record.at:%Y-%m-%d %H:%M} UTC by {record.by}")
    return record


# --- changing -------------------------------------------------------------------------------------------------------


def append(store: Store, alias: str, change: AliasChange, *, after: AliasRecord | DamagedRecord | None) -> AliasRecord:
    """Add the next record, durably, if ``after`` still is the newest: a compare-and-swap.

    When the store has lost only its reply, the record is found there, and nothing is raised.

    Args:
        store: any store.
        alias: its name.
        change: what to record. Its time becomes that of the record before when a clock was behind.
        after: the newest record that the caller has read; None when there was none.

    Raises:
        ConflictError: somebody else has changed the alias meanwhile; nothing was recorded.
        ConfigError: the alias cannot have this name, or a text cannot be written.
        StoreError: the store refused, and the record is not there; or it cannot be told whether it is.
    """
    number = 1 if after is None else after.number + 1
    values = {member.name: getattr(change, member.name) for member in fields(AliasChange)}
    if isinstance(after, AliasRecord):
        values["at"] = max(change.at, after.at)
    previous = None if after is None else after.digest
    record = AliasRecord(
        alias=check_alias(alias), number=number, previous=previous, write=secrets.token_hex(8), **values
    )
    check_text("who changes an alias", change.by)
    check_text("the reason", change.why)
    contradiction = _contradiction(record)
    if contradiction:
        raise ConfigError(f"a record of {alias} that {contradiction}: nothing was recorded")
    data = seal({"format": FORMAT} | {member: getattr(record, member) for member in _MEMBERS})
    try:
        establish(store, layout.alias_key(alias, number), data)
    except (ConflictError, StoreError) as error:
        winner = _read_if_any(store, alias, number)
        if winner is None or winner.write == record.write:
            raise  # it is not there, or it is ours and not provably durable
        raise _conflict(winner) from error
    return replace(record, digest=digest(data))


def _read_if_any(store: Store, alias: str, number: int) -> AliasRecord | None:
    try:
        return read(store, alias, number)
    except NotFoundError:
        return None


def _conflict(winner: AliasRecord) -> ConflictError:
    state = "is retired" if winner.target is None else f"is {winner.target.run}/{winner.target.name}"
    return ConflictError(
        f"{winner.alias} has been changed meanwhile: since {winner.at:%Y-%m-%d %H:%M:%S} UTC it {state} (record "
        f"{winner.number} by {winner.by}: {winner.why}); nothing was done, look at it and decide again"
    )


# --- history --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AliasHistory:
    """All records of an alias.

    Attributes:
        records: earliest first, without those that cannot be read.
        damage: one sentence for each record that is missing, damaged, or not the one that the next one was added to.
    """

    records: tuple[AliasRecord, ...]
    damage: tuple[str, ...]


def history(store: Store, alias: str) -> AliasHistory:
    """Read and check the whole chain of an alias.

    Raises:
        NotFoundError: there is no such alias.
    """
    existing = numbers(store, alias)
    if not existing:
        holder(store, alias)  # which says which aliases there are
    records: list[AliasRecord] = []
    damage: list[str] = []
    previous, last = None, 0  # digest and number of the record before
    for number in existing:
        where = layout.alias_key(alias, number)
        if number > last + 1:
            gap = layout.alias_key(alias, last + 1) + (f" to {number - 1:06d}" if number > last + 2 else "")
            damage.append(f"{gap} is missing: somebody has taken it out")
        try:
            data = store.get(where)
        except NotFoundError:
            continue  # taken out at this moment: the next one misses it, or the next look
        except FormatError as error:
            damage.append(str(error))
            previous, last = None, number
            continue
        try:
            record = _decode(data, alias, number)
            if number == last + 1 and record.previous != previous:
                damage.append(f"{where} was not added to the record before it that is there: one of them was changed")
            records.append(record)
        except (CorruptError, FormatError) as error:
            damage.append(str(error))
        previous, last = digest(data), number
    return AliasHistory(tuple(records), tuple(damage))


def alias_at(records: Sequence[AliasRecord], time: datetime) -> AliasRecord | None:
    """Return what an alias pointed at, at a time: the newest record that is not later.

    Args:
        records: of one alias, earliest first.
        time: an aware time.

    Returns:
        None before the first record; a record without target when the alias was retired then.

    Raises:
        ConfigError: a time without zone.

    Example:
        >>> from datetime import UTC, datetime, timedelta
        >>> day = datetime(2026, 11, 25, tzinfo=UTC)
        >>> members = {"alias": "champion", "target": None, "by": "me", "why": "?", "previous": None, "write": ""}
        >>> records = [AliasRecord(number=n, kind="promoted", at=day + timedelta(days=n), **members) for n in (1, 2)]
        >>> alias_at(records, day), alias_at(records, day + timedelta(days=1, hours=5)).number
        (None, 1)
    """
    if time.tzinfo is None:
        raise ConfigError(f"{time.isoformat()} has no time zone: which moment is meant? Add +00:00 for UTC")
    return next((record for record in reversed(records) if record.at <= time), None)


def rolled_back(records: Sequence[AliasRecord]) -> dict[str, AliasRecord]:
    """Return the checkpoints that an alias was rolled back from, or past, and has not pointed at since.

    Args:
        records: of one alias, earliest first.

    Returns:
        The ids, with the rollback.
    """
    rollbacks: dict[str, AliasRecord] = {}
    for place, record in enumerate(records):
        if record.kind == "rolled back":
            passed_targets = (earlier.target for earlier in records[:place] if earlier.number > record.stands_for)
            rollbacks |= {target.checkpoint: record for target in passed_targets if target is not None}
        if record.target is not None:
            rollbacks.pop(record.target.checkpoint, None)
    return rollbacks


def back_from(store: Store, current: AliasRecord) -> Iterator[AliasRecord]:
    """Read what an alias pointed at before, the latest first: the records that a rollback can restore.

    A rollback is not a new state: going back again from it leads to what was there before the restored one.

    Raises:
        CorruptError: a record on the way is damaged or missing.
    """
    record = current
    while record.stands_for > 1:
        number = record.stands_for - 1
        try:
            record = read(store, current.alias, number)
        except NotFoundError as error:
            raise CorruptError(f"{layout.alias_key(current.alias, number)} is missing") from error
        if record.target is not None:
            yield record
