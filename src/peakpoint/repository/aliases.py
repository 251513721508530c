"""Aliases: names such as ``champion`` that point at a checkpoint, with their history, and what they protect.

An alias is a directory of numbered records, each created only if absent, none ever changed. The record with the highest
number says what the alias points at; the ones before it are its history. Of several who want to add the next one at the
same time exactly one does, which makes a change a compare-and-swap on the record that its maker has seen. Every record
has the digest of the bytes of the one before it, so that a record that was changed or taken out shows.

``champion`` is an alias of the whole repository, ``resnet50/champion`` that of a family of models.
"""

import contextlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Literal

import msgspec

from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    FormatError,
    NotFoundError,
    StoreError,
)
from peakpoint.format import layout
from peakpoint.format.events import Promoting
from peakpoint.format.names import check_text, did_you_mean
from peakpoint.format.sealed import FORMAT, check_format, digest, seal, unseal
from peakpoint.repository.refs import check_alias, is_alias
from peakpoint.store import Store, establish

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasRecord:
    """One change of an alias.

    Attributes:
        alias: its name.
        number: 1, 2, 3, ... without gaps.
        kind: what was done.
        target: what it points at from then on; None when it was retired.
        at: when; never before the record in front of it.
        by: who.
        why: the reason, in words.
        previous: digest of the bytes of the record before; None for the first.
        write: random, so that a writer knows its own record again when the reply was lost.
        restores: for a roll back: the number of the record whose target came back.
        validation: digest of the validation record that it rests on; None when there was none.
        forced: what was refused and done all the same, a sentence each.
        comparison: the comparison with the former holder that was shown before.
        release: the id of the release that made it; None when it was made by hand.
        decision: of that release: the text of its policy, and the steps with what came of each.
        keeps: how many former holders are protected from retention from now on.
        digest: of this record's bytes; not part of them.
    """

    alias: str
    number: int
    kind: Kind
    target: AliasTarget | None
    at: datetime
    by: str
    why: str
    previous: str | None
    write: str
    restores: int | None = None
    validation: str | None = None
    forced: tuple[str, ...] = ()
    comparison: Mapping[str, Any] | None = None
    release: str | None = None
    decision: Mapping[str, Any] | None = None
    keeps: int = KEEPS
    digest: str = field(default="", compare=False)

    @property
    def stands_for(self) -> int:
        """The number of the record that first pointed where this one does: its own, or the one that it restores."""
        return self.number if self.restores is None else self.restores


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasChange:
    """What is to be recorded of an alias; the rest of a record follows from where it goes.

    The attributes are those of ``AliasRecord``.
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


def names(store: Store) -> list[str]:
    """Every alias that has a record, by name."""
    return list(listed(store))


def listed(store: Store) -> dict[str, list[int]]:
    """The numbers of the records of every alias, by name. What cannot be one is passed over; audit names it."""
    there = [name for first in directories(store) for name in (first, *directories(store, first))]
    found = {name: numbers(store, name) for name in sorted(there)}
    return {name: some for name, some in found.items() if some}


def directories(store: Store, family: str = "") -> list[str]:
    """The names that have a directory: of the repository, each of which may be a family, too, or those in a family."""
    children = store.children(layout.alias_prefix(family) if family else layout.ALIASES)
    there = [f"{family}/{child[:-1]}" if family else child[:-1] for child in children if child.endswith("/")]
    return [name for name in there if is_alias(name)]


_NUMBERED = re.compile(r"(?!0{6})([0-9]{6}|[1-9][0-9]{6,17})\.json")


def numbers(store: Store, alias: str) -> list[int]:
    """The numbers of an alias's records, in order; empty when there is no such alias."""
    there = map(_NUMBERED.fullmatch, store.children(layout.alias_prefix(check_alias(alias))))
    return sorted(int(one[1]) for one in there if one)


def read(store: Store, alias: str, number: int) -> AliasRecord:
    """One record.

    Raises:
        NotFoundError: there is none of that number; the message says which there are.
        CorruptError: it is damaged, or that of another alias or number.
        FormatError: a newer release wrote it.
    """
    try:
        data = store.get(layout.alias_key(alias, min(number, _MOST)))  # which has more digits than any
    except NotFoundError as error:
        there = numbers(store, alias)
        have = f"it has records {there[0]} to {there[-1]}" if there else "it has none"
        raise NotFoundError(f"the alias {alias!r} has no record {number}; {have}") from error
    return _decode(data, alias, number)


_MOST = 10**18


def _decode(data: bytes, alias: str, number: int) -> AliasRecord:
    where = layout.alias_key(alias, number)
    content = unseal(data, where=where)
    check_format(content, where=where)
    content.pop("digest", None)
    try:
        found = msgspec.convert(content, AliasRecord)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where} is not a record of an alias that this release reads: {error}") from error
    if (found.alias, found.number) != (alias, number):
        raise CorruptError(f"{where} says that it is record {found.number} of {found.alias}: it was moved or copied")
    wrong = _contradiction(found)
    if wrong:
        raise CorruptError(f"{where} {wrong}: no release of Peakpoint has written that")
    return replace(found, digest=digest(data))


_NAME = re.compile(r"(?!\.)[^/\\\x00]{1,200}")  # of what is a directory, and text that every database takes


def _contradiction(record: AliasRecord) -> str | None:
    """What cannot be in a record, although each member is of its kind."""
    target = record.target
    if record.at.tzinfo is None:
        return "has a time without zone"
    if target is not None and not all(map(_NAME.fullmatch, (target.run, target.checkpoint, target.name))):
        return f"points at {target.run}/{target.name} ({target.checkpoint}), which can be no checkpoint"
    if (record.target is None) != (record.kind == "retired"):
        return f"is of kind {record.kind!r} and points at {'something' if record.target else 'nothing'}"
    if (record.restores is None) != (record.kind != "rolled back"):
        return f"is of kind {record.kind!r} and restores {record.restores}"
    if record.restores is not None and not 1 <= record.restores < record.number:
        return f"restores record {record.restores}, which is not before it"
    return "keeps fewer than no former holders" if record.keeps < 0 else None


def head(store: Store, alias: str) -> AliasRecord | None:
    """The newest record, which counts; None when there is no such alias.

    Raises:
        CorruptError: it is damaged.
    """
    there = numbers(store, alias)
    return read(store, alias, there[-1]) if there else None


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """The newest record of an alias, when it is damaged: another one can be added to it all the same.

    Attributes:
        alias: which.
        number: of the record.
        digest: of its bytes as they are.
        error: what is wrong.
    """

    alias: str
    number: int
    digest: str
    error: str


def tip(store: Store, alias: str) -> AliasRecord | DamagedRecord | None:
    """Like ``head``, for those who can do with a damaged record."""
    there = numbers(store, alias)
    if not there:
        return None
    try:
        return read(store, alias, there[-1])
    except CorruptError as error:
        return DamagedRecord(alias, there[-1], digest(store.get(layout.alias_key(alias, there[-1]))), str(error))


def holder(store: Store, alias: str) -> AliasRecord:
    """The newest record of an alias that points at a checkpoint.

    Raises:
        NotFoundError: there is no such alias, or it was retired; the message names near ones.
    """
    found = head(store, alias)
    if found is None:
        there = names(store)
        raise NotFoundError(
            f"there is no alias {alias!r}{did_you_mean(alias, there)}; aliases: {', '.join(there) or 'none yet'}; "
            f"peakpoint promote ROOT REF --as {alias} makes one"
        )
    if found.target is None:
        raise NotFoundError(f"the alias {alias!r} was retired at {found.at:%Y-%m-%d %H:%M} UTC by {found.by}")
    return found


def append(store: Store, alias: str, change: AliasChange, *, after: AliasRecord | DamagedRecord | None) -> AliasRecord:
    """Add the next record, durably, if ``after`` still is the newest: a compare-and-swap.

    When the store has lost only its reply, the record is found there, and nothing is raised.

    Args:
        store: where.
        alias: which.
        change: what to record. Its time becomes that of the record before when a clock was behind.
        after: the newest record that the caller has seen; None when there was none.

    Raises:
        ConflictError: somebody else has changed the alias meanwhile; nothing was recorded.
        ConfigError: a name that cannot be, or texts that cannot be written.
        StoreError: the store refused, and the record is not there; or it cannot be told whether it is.
    """
    number = 1 if after is None else after.number + 1
    at = max(change.at, after.at) if isinstance(after, AliasRecord) else change.at
    given = {one.name: getattr(change, one.name) for one in fields(change)} | {"at": at}
    record = AliasRecord(
        alias=check_alias(alias),
        number=number,
        previous=None if after is None else after.digest,
        write=secrets.token_hex(8),
        **given,
    )
    check_text("who changes an alias", change.by)
    check_text("the reason", change.why)
    wrong = _contradiction(record)
    if wrong:
        raise ConfigError(f"a record of {alias} that {wrong}: nothing was recorded")
    content = {one.name: getattr(record, one.name) for one in fields(record)[:-1]}
    if record.decision is None:
        del content["decision"]  # a record that no release made stays as earlier versions write it
    data = seal({"format": FORMAT, **content})
    try:
        establish(store, layout.alias_key(alias, number), data)
    except (ConflictError, StoreError) as error:
        there = _there(store, alias, number, error)
        if there is not None and there.write == record.write:
            raise  # it is ours, and not provably durable
        raise _changed(alias, there, error) from error
    return replace(record, digest=digest(data))


def _there(store: Store, alias: str, number: int, error: Exception) -> AliasRecord | None:
    try:
        return read(store, alias, number)
    except (CorruptError, FormatError) as damage:
        raise damage from error
    except NotFoundError:
        return None


def _changed(alias: str, there: AliasRecord | None, error: ConflictError | StoreError) -> ConflictError | StoreError:
    if there is None:
        return error
    now = "is retired" if there.target is None else f"is {there.target.run}/{there.target.name}"
    return ConflictError(
        f"{alias} has been changed meanwhile: since {there.at:%Y-%m-%d %H:%M:%S} UTC it {now} (record {there.number} "
        f"by {there.by}: {there.why}); nothing was done, look at it and decide again"
    )


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
    there = numbers(store, alias)
    if not there:
        holder(store, alias)  # which says what there is
    found: list[AliasRecord] = []
    damage: list[str] = []
    before, last = None, 0
    for number in there:
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
            before, last = None, number
            continue
        try:
            record = _decode(data, alias, number)
            if number == last + 1 and record.previous != before:
                damage.append(f"{where} was not added to the record before it that is there: one of them was changed")
            found.append(record)
        except (CorruptError, FormatError) as error:
            damage.append(str(error))
        before, last = digest(data), number
    return AliasHistory(tuple(found), tuple(damage))


def alias_at(records: Sequence[AliasRecord], time: datetime) -> AliasRecord | None:
    """What an alias pointed at, at a time: the newest record that is not later.

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
        >>> said = {"alias": "champion", "target": None, "by": "me", "why": "?", "previous": None, "write": ""}
        >>> records = [AliasRecord(number=n, kind="promoted", at=day + timedelta(days=n), **said) for n in (1, 2)]
        >>> alias_at(records, day), alias_at(records, day + timedelta(days=1, hours=5)).number
        (None, 1)
    """
    if time.tzinfo is None:
        raise ConfigError(f"{time.isoformat()} has no time zone: which moment is meant? Add +00:00 for UTC")
    return next((record for record in reversed(records) if record.at <= time), None)


def rolled_back(records: Sequence[AliasRecord]) -> dict[str, AliasRecord]:
    """The checkpoints that an alias was rolled back from, or past, and has not pointed at since: id to the roll back.

    Args:
        records: of one alias, earliest first.
    """
    found: dict[str, AliasRecord] = {}
    for place, record in enumerate(records):
        gone_past = (one.target for one in records[:place] if one.number > record.stands_for)
        if record.kind == "rolled back":
            found |= {target.checkpoint: record for target in gone_past if target is not None}
        if record.target is not None:
            found.pop(record.target.checkpoint, None)
    return found


def back_from(store: Store, present: AliasRecord) -> Iterator[AliasRecord]:
    """What an alias pointed at before, the latest first: the records that a roll back can restore.

    A roll back is not a new state: going back again from it leads to what was there before the restored one.

    Raises:
        CorruptError: a record on the way is damaged or missing.
    """
    at = present
    while at.stands_for > 1:
        number = at.stands_for - 1
        try:
            at = read(store, present.alias, number)
        except NotFoundError as error:
            raise CorruptError(f"{layout.alias_key(present.alias, number)} is missing") from error
        if at.target is not None:
            yield at


def heads(store: Store) -> tuple[dict[str, AliasRecord], dict[str, str]]:
    """The newest record of every alias, and for those where it cannot be read, why."""
    found: dict[str, AliasRecord] = {}
    unread: dict[str, str] = {}
    for alias, there in listed(store).items():
        try:
            found[alias] = read(store, alias, there[-1])
        except (CorruptError, FormatError, NotFoundError, StoreError) as error:
            unread[alias] = str(error)
    return found, unread


def pointing(records: Iterable[AliasRecord]) -> dict[str, tuple[str, ...]]:
    """The id of each checkpoint that an alias points at, with the aliases."""
    found: dict[str, tuple[str, ...]] = {}
    for record in records:
        if record.target is not None:
            found[record.target.checkpoint] = (*found.get(record.target.checkpoint, ()), record.alias)
    return found


def protected_by_aliases(
    store: Store, checkpoints: Iterable[str], promoting: Iterable[Promoting] = ()
) -> dict[str, str]:
    """Which checkpoints retention must leave alone because of an alias: id to why.

    It points at them, did lately, or is about to. While the newest record of an alias cannot be read, nobody knows what
    it protects, and everything is protected.

    Args:
        store: where.
        checkpoints: the ids of all that might go.
        promoting: what the journal says of promotions that are under way, or were cut short.
    """
    found: dict[str, list[str]] = {}
    former: dict[str, list[str]] = {}
    every = listed(store)
    for event in promoting:
        if event.record > max(every.get(event.alias, ()), default=0):  # else the record says what came of it
            former.setdefault(event.checkpoint, []).append(f"about to become {event.alias}")
    for alias, there in every.items():
        try:
            newest = read(store, alias, there[-1])
        except (CorruptError, FormatError, NotFoundError) as error:
            return dict.fromkeys(checkpoints, f"what {alias} protects is not known: {error}")
        held = None if newest.target is None else newest.target.checkpoint
        if held is not None:
            found.setdefault(held, []).append(f"{alias} since {newest.at:%Y-%m-%d %H:%M} UTC")
        for checkpoint in _former(store, newest, there[:-1], held):
            former.setdefault(checkpoint, []).append(f"was {alias} (one of its last {newest.keeps})")
    return {checkpoint: "; ".join(why) for checkpoint, why in {**former, **found}.items()}


def _former(store: Store, newest: AliasRecord, earlier: Sequence[int], held: str | None) -> set[str]:
    """The checkpoints that an alias pointed at last, as many as it keeps, and as many that it can be rolled back to.

    What was rolled back from again and again must not take the places of what a roll back would restore.
    """
    found = _first(newest.keeps, (_target(store, newest.alias, number) for number in reversed(earlier)), held)
    return found | _first(newest.keeps, _way_back(store, newest), held)


def _first(count: int, targets: Iterable[AliasTarget | None], held: str | None) -> set[str]:
    found = set[str]()
    for target in targets:
        if len(found) >= count:
            break
        if target is not None and target.checkpoint != held:
            found.add(target.checkpoint)
    return found


def _target(store: Store, alias: str, number: int) -> AliasTarget | None:
    try:
        return read(store, alias, number).target
    except (CorruptError, FormatError, NotFoundError):
        return None  # audit names it; a former holder that is not known cannot be gone back to either


def _way_back(store: Store, newest: AliasRecord) -> Iterator[AliasTarget | None]:
    with contextlib.suppress(CorruptError, FormatError):  # it ends there, also for a roll back
        for record in back_from(store, newest):
            yield record.target
