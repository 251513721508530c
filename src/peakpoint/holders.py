"""What aliases point at now, and what that protects."""

from collections.abc import Iterable, Sequence

from peakpoint.aliases import AliasRecord, listed, read
from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.journal import Promoting
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
    """The checkpoints that an alias pointed at last, as many as it keeps."""
    found = set[str]()
    for number in reversed(earlier):
        if len(found) >= newest.keeps:
            break
        try:
            target = read(store, newest.alias, number).target
        except (CorruptError, FormatError, NotFoundError):
            continue  # audit names it; a former holder that is not known cannot be gone back to either
        if target is not None and target.checkpoint != held:
            found.add(target.checkpoint)
    return found
