"""Protection by aliases: the checkpoints that retention must leave alone because of an alias."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format.events import Promoting
from peakpoint.repository.aliases import AliasRecord, AliasTarget, back_from, numbers_by_alias, read
from peakpoint.store import Store


def protected_by_aliases(
    store: Store, checkpoints: Iterable[str], promoting: Iterable[Promoting] = ()
) -> dict[str, str]:
    """Return the checkpoints that an alias points at, did lately, or is about to, with the reasons.

    While the newest record of an alias cannot be read, nobody knows what it protects, and everything is protected.

    Args:
        store: any store.
        checkpoints: the ids of all that might be removed.
        promoting: what the journal says of promotions that are under way, or were cut short.
    """
    reasons: dict[str, list[str]] = {}
    earlier_reasons: dict[str, list[str]] = {}
    numbers = numbers_by_alias(store)
    for event in promoting:
        if event.record > max(numbers.get(event.alias, ()), default=0):  # else the record says what came of it
            earlier_reasons.setdefault(event.checkpoint, []).append(f"about to become {event.alias}")
    for alias, alias_numbers in numbers.items():
        try:
            newest = read(store, alias, alias_numbers[-1])
        except (CorruptError, FormatError, NotFoundError) as error:
            return dict.fromkeys(checkpoints, f"what {alias} protects is not known: {error}")
        if newest.target is not None:
            reason = f"{alias} since {newest.at:%Y-%m-%d %H:%M} UTC"
            reasons.setdefault(newest.target.checkpoint, []).append(reason)
        for checkpoint in _former_holders(store, newest, alias_numbers[:-1]):
            earlier_reasons.setdefault(checkpoint, []).append(f"was {alias} (one of its last {newest.keeps})")
    return {checkpoint: "; ".join(texts) for checkpoint, texts in {**earlier_reasons, **reasons}.items()}


def _former_holders(store: Store, newest: AliasRecord, earlier: Sequence[int]) -> set[str]:
    """Return the checkpoints that an alias pointed at last, as many as it keeps, and as many that it can go back to.

    A checkpoint that was rolled back from again and again must not take the place of one that a rollback would restore.
    """
    latest = (_target(store, newest.alias, number) for number in reversed(earlier))
    return _first_others(newest, latest) | _first_others(newest, _restorable(store, newest))


def _first_others(newest: AliasRecord, targets: Iterable[AliasTarget | None]) -> set[str]:
    """Return the first checkpoints other than the present one, as many as the alias keeps."""
    current = None if newest.target is None else newest.target.checkpoint
    checkpoints = set[str]()
    for target in targets:
        if len(checkpoints) >= newest.keeps:
            break
        if target is not None and target.checkpoint != current:
            checkpoints.add(target.checkpoint)
    return checkpoints


def _target(store: Store, alias: str, number: int) -> AliasTarget | None:
    try:
        return read(store, alias, number).target
    except (CorruptError, FormatError, NotFoundError):
        return None  # audit names it; a former holder that is not known cannot be gone back to either


def _restorable(store: Store, newest: AliasRecord) -> Iterator[AliasTarget | None]:
    with contextlib.suppress(CorruptError, FormatError):  # the way ends there, also for a rollback
        for record in back_from(store, newest):
            yield record.target
