"""What aliases point at now, and what that protects."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from peakpoint.aliases import AliasRecord, Target, back_from, listed, read
from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format.events import Promoting
from peakpoint.store import Store


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


def protected(store: Store, checkpoints: Iterable[str], promoting: Iterable[Promoting] = ()) -> dict[str, str]:
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


def _first(count: int, targets: Iterable[Target | None], held: str | None) -> set[str]:
    found = set[str]()
    for target in targets:
        if len(found) >= count:
            break
        if target is not None and target.checkpoint != held:
            found.add(target.checkpoint)
    return found


def _target(store: Store, alias: str, number: int) -> Target | None:
    try:
        return read(store, alias, number).target
    except (CorruptError, FormatError, NotFoundError):
        return None  # audit names it; a former holder that is not known cannot be gone back to either


def _way_back(store: Store, newest: AliasRecord) -> Iterator[Target | None]:
    with contextlib.suppress(CorruptError, FormatError):  # it ends there, also for a roll back
        for record in back_from(store, newest):
            yield record.target
