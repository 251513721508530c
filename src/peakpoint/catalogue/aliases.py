"""Bring the aliases up to date in the catalogue.

There are few, so what counts is that a look at them is cheap when nothing has changed: a stamp of each directory. Where
one is another, or cannot be had, all directories are listed and the newest record of each alias is read. What is
written was read behind the lock, so that it is never older than what it replaces.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update

from peakpoint.catalogue import schema
from peakpoint.catalogue.changes import is_same
from peakpoint.catalogue.refresh import lock
from peakpoint.errors import StoreError
from peakpoint.format import layout
from peakpoint.repository.alias_holders import newest_of_all
from peakpoint.repository.aliases import AliasRecord, directories
from peakpoint.store import Store


@dataclass(frozen=True, slots=True)
class AliasSnapshot:
    """The aliases as they were when they were looked at last.

    Attributes:
        stamps: of each of their directories.
        tick: of the catalogue that had them all then; None when it had not.
        unread: aliases whose newest record cannot be read, and why.
    """

    stamps: Mapping[str, str | None] = field(default_factory=dict)
    tick: int | None = None
    unread: Mapping[str, str] = field(default_factory=dict)


def refresh_aliases(
    engines: tuple[Engine, Engine], store: Store, tick: int, snapshot: AliasSnapshot
) -> tuple[int, AliasSnapshot]:
    """Bring the table of aliases up to date.

    Args:
        engines: one that writes, and one that reads.
        store: where the files are.
        tick: of the catalogue at present.
        snapshot: what was returned the last time.

    Returns:
        The catalogue's tick after it, -1 where another process has changed it, too, and what was seen.
    """
    settled = snapshot.tick == tick and snapshot.stamps and not snapshot.unread
    if settled and all(is_same(store, prefix, stamp) for prefix, stamp in snapshot.stamps.items()):
        return tick, snapshot
    writing, reading = engines
    with reading.connect() as connection:
        stored = _stored(connection)
    stamps = _stamps(store)
    records, unread = newest_of_all(store)
    if stored == _digests(records):
        return tick, AliasSnapshot(stamps, tick, unread)
    with writing.begin() as connection:
        lock(connection)
        now = connection.execute(select(schema.meta.c.tick)).scalar_one()
        stamps = _stamps(store)
        records, unread = newest_of_all(store)
        connection.execute(delete(schema.aliases))
        if records:
            connection.execute(insert(schema.aliases), list(map(_row, records.values())))
        connection.execute(update(schema.meta).values(tick=now + 1))
    return (now + 1, AliasSnapshot(stamps, now + 1, unread)) if now == tick else (-1, AliasSnapshot(unread=unread))


def _stamps(store: Store) -> dict[str, str | None]:
    """The stamps of all directories in which a record may come, also of those without one; before they are listed."""
    stamps = {layout.ALIASES: store.stamp(layout.ALIASES)}
    with contextlib.suppress(StoreError):  # what cannot be listed is looked at again every time
        for first in directories(store):
            stamps[layout.alias_prefix(first)] = store.stamp(layout.alias_prefix(first))
            prefixes = map(layout.alias_prefix, directories(store, first))
            stamps |= {prefix: store.stamp(prefix) for prefix in prefixes}
    return stamps


def _stored(connection: Connection) -> dict[str, tuple[int, str]]:
    """Alias to number and digest of its newest record."""
    table = schema.aliases.c
    rows = connection.execute(select(table.name, table.number, table.digest))
    return {row.name: (row.number, row.digest) for row in rows}


def _digests(records: Mapping[str, AliasRecord]) -> dict[str, tuple[int, str]]:
    return {name: (record.number, record.digest) for name, record in records.items()}


def _row(record: AliasRecord) -> dict[str, Any]:
    target = record.target
    return {
        "name": record.alias,
        "number": record.number,
        "digest": record.digest,
        "run": None if target is None else target.run,
        "checkpoint": None if target is None else target.checkpoint,
        "since": record.at.timestamp(),
    }


def alias_targets(connection: Connection) -> dict[tuple[str, str], tuple[str, ...]]:
    """Run and id of each checkpoint that an alias points at, with the aliases by name."""
    table = schema.aliases.c
    rows = connection.execute(select(table.run, table.checkpoint, table.name).where(table.run.is_not(None)))
    names: dict[tuple[str, str], list[str]] = {}
    for run, checkpoint, name in rows:
        names.setdefault((run, checkpoint), []).append(name)
    return {target: tuple(sorted(aliases)) for target, aliases in names.items()}
