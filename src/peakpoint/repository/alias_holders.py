"""What every alias points at; one that cannot be read hides no other."""

from collections.abc import Iterable

from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.repository.aliases import AliasRecord, directories, numbers, read
from peakpoint.store import Store


def _listed(store: Store, family: str, errors: dict[str, str]) -> list[str]:
    try:
        return directories(store, family)
    except StoreError as error:
        errors[family or layout.ALIASES] = str(error)
        return []


def newest_of_all(store: Store) -> tuple[dict[str, AliasRecord], dict[str, str]]:
    """Read the newest record of every alias; where it cannot be read, the second mapping says why."""
    records: dict[str, AliasRecord] = {}
    errors: dict[str, str] = {}
    first = _listed(store, "", errors)
    for alias in sorted(first + [name for family in first for name in _listed(store, family, errors)]):
        try:
            for number in numbers(store, alias)[-1:]:
                records[alias] = read(store, alias, number)
        except (CorruptError, FormatError, NotFoundError, StoreError) as error:
            errors[alias] = str(error)
    return records, errors


def aliases_by_checkpoint(records: Iterable[AliasRecord]) -> dict[str, tuple[str, ...]]:
    """Return the id of each checkpoint that an alias points at, with the aliases."""
    aliases: dict[str, tuple[str, ...]] = {}
    for record in records:
        if record.target is not None:
            aliases[record.target.checkpoint] = (*aliases.get(record.target.checkpoint, ()), record.alias)
    return aliases
