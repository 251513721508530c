"""Bringing the aliases up to date in the catalogue.

There are few, so what counts is that a look at them is cheap when nothing has changed: a stamp of each directory. Where
one is another, or cannot be had, all directories are listed and the newest record of each alias is read. They are read
after the table and before the lock: who finds another table behind the lock than before it begins anew. So what is
written is never older than what it replaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update

from peakpoint.catalogue import schema
from peakpoint.catalogue.changes import is_same
from peakpoint.catalogue.refresh import lock
from peakpoint.format import layout
from peakpoint.repository.aliases import AliasRecord, directories, heads
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
    engines: tuple[Engine, Engine], store: Store, tick: int, before: AliasSnapshot
) -> tuple[int, AliasSnapshot]:
    """Bring the table of aliases up to date.

    Args:
        engines: one that writes, and one that reads.
        store: where the files are.
        tick: of the catalogue at present.
        before: what was returned the last time.

    Returns:
        The catalogue's tick after it, and what was seen.
    """
    settled = before.tick == tick and before.stamps and not before.unread
    if settled and all(is_same(store, prefix, stamp) for prefix, stamp in before.stamps.items()):
        return tick, before
    writing, reading = engines
    while True:
        with reading.connect() as connection:
            old = _rows(connection)
        stamps = _stamps(store)
        found, unread = heads(store)
        new = {name: (record.number, record.digest) for name, record in found.items()}
        if new == old:
            return tick, AliasSnapshot(stamps, tick, unread)
        with writing.begin() as connection:
            lock(connection)
            now = connection.execute(select(schema.meta.c.tick)).scalar_one()
            if _rows(connection) == old:
                connection.execute(delete(schema.aliases))
                if found:
                    connection.execute(insert(schema.aliases), list(map(_row, found.values())))
                connection.execute(update(schema.meta).values(tick=now + 1))
                # what others have changed since is asked for anew
                return (
                    (now + 1, AliasSnapshot(stamps, now + 1, unread))
                    if now == tick
                    else (-1, AliasSnapshot(unread=unread))
                )


def _stamps(store: Store) -> dict[str, str | None]:
    """The stamps of all directories in which a record may come, also of those without one; before they are listed."""
    found = {layout.ALIASES: store.stamp(layout.ALIASES)}
    for first in directories(store):
        found[layout.alias_prefix(first)] = store.stamp(layout.alias_prefix(first))
        found |= {layout.alias_prefix(one): store.stamp(layout.alias_prefix(one)) for one in directories(store, first)}
    return found


def _rows(connection: Connection) -> dict[str, tuple[int, str]]:
    """Alias to number and digest of its newest record."""
    table = schema.aliases.c
    rows = connection.execute(select(table.name, table.number, table.digest))
    return {row.name: (row.number, row.digest) for row in rows}


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


def pointers(connection: Connection) -> dict[tuple[str, str], tuple[str, ...]]:
    """Run and id of each checkpoint that an alias points at, with the aliases by name."""
    table = schema.aliases.c
    rows = connection.execute(select(table.run, table.checkpoint, table.name).where(table.run.is_not(None)))
    found: dict[tuple[str, str], list[str]] = {}
    for run, checkpoint, name in rows:
        found.setdefault((run, checkpoint), []).append(name)
    return {place: tuple(sorted(aliases)) for place, aliases in found.items()}
