"""What the catalogue says beside what the files say.

A row is compared with the one that a refresh would write in its place, so nothing that is selected or ranked by is left
out. What an index of the database hides shows in the whole comparison only.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Table, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.changes import NOTES
from peakpoint.catalogue.database import DamagedError, check, read_json, translated
from peakpoint.catalogue.refresh import CheckpointEntry, plain_text, portions, rows_of, watched_by
from peakpoint.catalogue.schema import Columns
from peakpoint.errors import Error, NotFoundError
from peakpoint.format import layout
from peakpoint.format.events import Event, Opened
from peakpoint.format.metrics import metrics_from_json, metrics_to_json
from peakpoint.repository import journal as journals
from peakpoint.repository import reader
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.packs import readable_run_archive
from peakpoint.rules import history as histories
from peakpoint.rules.history import newest_event
from peakpoint.rules.peaks import extend_peaks
from peakpoint.store import Store

Facts = dict[str, Any]


class CatalogueMismatch(NamedTuple):
    """One thing that the catalogue says otherwise than the files.

    Attributes:
        run: of which run.
        what: one sentence.
        unreadable: whether the files do not say anything, as they cannot be read.
    """

    run: str
    what: str
    unreadable: bool = False


def compare_rows(
    connection: Connection, columns: Columns, store: Store, rows: Sequence[Any]
) -> list[CatalogueMismatch]:
    """Compare checkpoints that a selection has found with their manifests.

    Args:
        connection: to the catalogue.
        columns: of the catalogue.
        store: where the files are.
        rows: see ``selection``: with ``owner``, the key of the run, and ``metrics`` and ``pinned``, which were noted.
    """
    differences: list[CatalogueMismatch] = []
    standings: list[tuple[Any, reader.FoundCheckpoint]] = []
    archive_of = cache(partial(readable_run_archive, store))
    for row in rows:
        try:
            standing = reader.inspect(store, row.run, row.name, archive_of(row.run))
        except (Error, ValueError) as error:  # a name that no key can have is a ValueError
            differences.append(CatalogueMismatch(row.run, f"{row.run}/{row.name}: {error}", unreadable=True))
            continue
        if isinstance(standing, reader.FoundCheckpoint):
            standings.append((row, standing))
        elif standing is None:
            differences.append(CatalogueMismatch(row.run, f"{row.run}/{row.name} does not exist"))
        else:
            differences.append(CatalogueMismatch(row.run, str(standing.error), unreadable=True))
    entries = []
    for row, standing in standings:
        known = {**standing.manifest.metrics, **metrics_from_json(read_json(row.metrics or "{}"))}
        entries.append(CheckpointEntry(row.key, row.owner, standing, known, row.pinned is not None))
    return differences + list(_differing(connection, columns, entries))


def _differing(
    connection: Connection, columns: Columns, entries: Sequence[CheckpointEntry]
) -> Iterator[CatalogueMismatch]:
    """Those whose rows are not what a refresh would write."""
    readable = []
    for entry in entries:
        strange = [name for name in entry.metrics if name not in columns.keys]
        if strange:
            yield _difference(entry, f"there is no metric {strange[0]!r} in the catalogue")
        else:
            readable.append(entry)
    titles = {f"m{key}": name for name, key in columns.keys.items()}
    said: set[int] = set()
    for table, rows in rows_of(columns, readable):
        if table is schema.rarities and len(columns.keys) <= schema.WIDEST:
            continue  # which nobody asks
        wanted = _by_key(tuple(row.get(column.name) for column in table.columns) for row in rows)
        stored = _stored(connection, table, [entry.key for entry in readable])
        for entry in readable:
            mine, theirs = stored.get(entry.key, []), wanted.get(entry.key, [])
            if mine != theirs and entry.key not in said:
                said.add(entry.key)
                yield _difference(entry, _where(table, mine, theirs, titles))


def _by_key(rows: Iterable[Sequence[Any]]) -> dict[int, list[tuple[Any, ...]]]:
    grouped: dict[int, list[tuple[Any, ...]]] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(tuple(row))
    return {key: sorted(some, key=lambda row: row[:2]) for key, some in grouped.items()}


def _stored(connection: Connection, table: Table, keys: Sequence[int]) -> dict[int, list[tuple[Any, ...]]]:
    [of, *_] = table.columns
    rows: list[Sequence[Any]] = []
    for some in portions(keys):
        rows += connection.execute(select(table).where(of.in_(some))).all()
    return _by_key(rows)


def _difference(entry: CheckpointEntry, what: str) -> CatalogueMismatch:
    manifest = entry.standing.manifest
    return CatalogueMismatch(manifest.run, f"{manifest.run}/{manifest.name}: {what}")


def _where(table: Table, mine: Sequence[Any], theirs: Sequence[Any], titles: Mapping[str, str]) -> str:
    """What rows of a table say otherwise."""
    if len(mine) == len(theirs) == 1:
        for column, ours, files in zip(table.columns, mine[0], theirs[0], strict=True):
            if ours != files:
                title = titles.get(column.name, column.name)
                return f"{title} is {str(ours)[:80]!r} in the catalogue, and {str(files)[:80]!r} in the files"
    return (
        f"{len(mine)} rows of {table.name.removeprefix(schema.PREFIX)} in the catalogue should be {len(theirs)} others"
    )


# --- everything ---------------------------------------------------------------------------------------------------


def compare_all(engines: tuple[Engine, Engine], store: Store, runs: Sequence[str]) -> list[CatalogueMismatch]:
    """Compare all that the catalogue has of some runs with their files, and SQLite's indexes with its tables.

    Args:
        engines: one that writes, and one that reads.
        store: where the files are.
        runs: which.
    """
    writing, reading = engines
    differences: list[CatalogueMismatch] = []
    try:
        with translated(reading.url), reading.connect() as connection:
            columns = Columns.read(connection)
            for run in runs:
                differences += compare_run(connection, columns, store, run)
    except DamagedError as error:
        differences.append(CatalogueMismatch("", str(error)))
    return differences + [CatalogueMismatch("", what) for what in check(writing)]


def compare_run(connection: Connection, columns: Columns, store: Store, run: str) -> list[CatalogueMismatch]:
    """Compare all that the catalogue has of a run with its files."""
    table, details = columns.table.c, schema.details.c
    owner = connection.execute(select(schema.runs).where(schema.runs.c.name == run)).one_or_none()
    if owner is None:
        return (
            [CatalogueMismatch(run, f"run {run} is missing in the catalogue")]
            if store.size(layout.run_record(run)) is not None
            else []
        )
    joined = columns.table.join(schema.details, details.checkpoint == table.key)
    wanted = select(table.key, details.name, details.id).select_from(joined).where(table.run == owner.key)
    rows = {row.name: row for row in connection.execute(wanted)}
    try:
        events = journals.read(store, run).events
        looks = _looks(store, run)
    except NotFoundError:
        return []  # gone meanwhile
    except Error as error:
        return [CatalogueMismatch(run, f"run {run}: {error}", unreadable=True)]
    known = annotations_of(events)
    standings = {name: look for name, look in looks.items() if isinstance(look, reader.FoundCheckpoint)}
    names = sorted(rows.keys() ^ standings.keys())
    differences = [_alone(run, name, looks.get(name)) for name in names]
    entries = []
    for name in rows.keys() & standings.keys():
        manifest = standings[name].manifest
        metrics = {**manifest.metrics, **known.metrics.get(manifest.id, {})}
        entries.append(
            CheckpointEntry(rows[name].key, owner.key, standings[name], metrics, manifest.id in known.pinned)
        )
    differences += _differing(connection, columns, entries)
    if any(difference.unreadable for difference in differences):
        return differences  # the sums are others then, too
    facts = _facts(events, [standing.manifest for standing in standings.values()])
    mine = {name: getattr(owner, name) for name in facts}
    differences += [
        CatalogueMismatch(run, f"run {run}: {name} is {mine[name]!r} in the catalogue, and {value!r} in the files")
        for name, value in facts.items()
        if mine[name] != value
    ]
    if _notes_there(connection, owner.key) != _notes(events):
        differences.append(
            CatalogueMismatch(run, f"run {run}: what was noted of its checkpoints is not what its journal says")
        )
    return differences


def _alone(run: str, name: str, look: reader.FoundCheckpoint | reader.Damaged | None) -> CatalogueMismatch:
    """A checkpoint that only the catalogue or only the files have."""
    if isinstance(look, reader.Damaged):
        return CatalogueMismatch(run, str(look.error), unreadable=True)
    return CatalogueMismatch(run, f"{run}/{name} {'does not exist' if look is None else 'is missing in the catalogue'}")


def _looks(store: Store, run: str) -> dict[str, reader.FoundCheckpoint | reader.Damaged | None]:
    children = store.children(layout.checkpoints_prefix(run))
    names = [child[:-1] for child in children if child.endswith("/") and child.isascii()]
    archive = readable_run_archive(store, run)
    return {name: reader.inspect(store, run, name, archive) for name in names}


def _facts(events: Sequence[Event], manifests: Sequence[Any]) -> Facts:
    """What the row of a run says."""
    opened = newest_event(events, Opened)
    rules = list(opened.rules) if opened is not None else []
    history = histories.history(events)
    peaks, missing = extend_peaks((), {}, history, watched_by(rules))
    steps = {manifest.step for manifest in manifests}
    kept = {peak.metric: peak.best_step in steps for peak in peaks}
    return {
        "rules": json.dumps(rules),
        "peaks": json.dumps({"peaks": [asdict(peak) for peak in peaks], "missing": missing, "kept": kept}),
        "reports": len(history),
        "checkpoints": len(manifests),
        "size": sum(manifest.size_bytes for manifest in manifests),
        "newest": max((manifest.created_at.timestamp() for manifest in manifests), default=None),
    }


def _notes(events: Sequence[Event]) -> dict[str, tuple[str, str | None]]:
    known = annotations_of(events)
    named = {event.checkpoint for event in events if isinstance(event, NOTES)}
    return {
        identity: (
            json.dumps(metrics_to_json(known.metrics.get(identity, {}))),
            plain_text(known.pinned.get(identity)),
        )
        for identity in named
    }


def _notes_there(connection: Connection, run: int) -> dict[str, tuple[str, str | None]]:
    table = schema.noted.c
    rows = connection.execute(select(table.checkpoint, table.metrics, table.pinned).where(table.run == run))
    return {identity: (metrics, pinned) for identity, metrics, pinned in rows}
