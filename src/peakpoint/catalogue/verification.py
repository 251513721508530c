"""Compare what the catalogue says with what the files say.

A row is compared with the one that a refresh would write in its place, so nothing that is selected or ranked by is left
out. What an index of the database hides shows in the comparison of everything only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Table, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.changes import NOTES
from peakpoint.catalogue.database import DamagedError, check, read_json, translated
from peakpoint.catalogue.rows import CheckpointEntry, RunReports, checkpoint_rows, note_rows, portions, setting_rows
from peakpoint.catalogue.schema import Columns
from peakpoint.errors import Error, NotFoundError
from peakpoint.format import layout
from peakpoint.format.events import Event
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_from_json
from peakpoint.format.settings import settings_of
from peakpoint.repository import journal as journals
from peakpoint.repository import reader
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.lost import lost_checkpoints
from peakpoint.repository.packs import RunArchive, readable_run_archive
from peakpoint.store import Store


class CatalogueMismatch(NamedTuple):
    """One thing that the catalogue says otherwise than the files.

    Attributes:
        run: of which run.
        what: one sentence.
        unreadable: whether the files say nothing, as they cannot be read.
    """

    run: str
    what: str
    unreadable: bool = False


def _inspect(
    store: Store, run: str, name: str, archive: RunArchive | None
) -> reader.FoundCheckpoint | CatalogueMismatch:
    """A checkpoint as its directory tells it, or why the catalogue should not have it."""
    ref = f"{run}/{name}"
    try:
        state = reader.inspect(store, run, name, archive)
    except (Error, ValueError) as error:  # a name that no key can have is a ValueError
        return CatalogueMismatch(run, f"{ref}: {error}", unreadable=True)
    if isinstance(state, reader.Damaged):
        return CatalogueMismatch(run, str(state.error), unreadable=True)
    if state is not None:
        return state
    is_lost = any(damage.name == name for damage in lost_checkpoints(store, run, ()))
    return CatalogueMismatch(run, f"{ref} does not exist", unreadable=is_lost)


def compare_rows(
    connection: Connection, columns: Columns, store: Store, rows: Sequence[Any]
) -> list[CatalogueMismatch]:
    """Compare checkpoints that a selection gives out with their manifests.

    Args:
        connection: to the catalogue.
        columns: of the catalogue.
        store: where the files are.
        rows: see ``selection``: with ``owner``, the key of the run, and ``metrics`` and ``pinned``, which were noted.
    """
    mismatches: list[CatalogueMismatch] = []
    entries: list[CheckpointEntry] = []
    archive_of = cache(partial(readable_run_archive, store))
    for row in rows:
        checkpoint = _inspect(store, row.run, row.name, archive_of(row.run))
        if isinstance(checkpoint, CatalogueMismatch):
            mismatches.append(checkpoint)
            continue
        metrics = {**checkpoint.manifest.metrics, **metrics_from_json(read_json(row.metrics or "{}"))}
        entries.append(CheckpointEntry(row.key, row.owner, checkpoint, metrics, row.pinned is not None))
    return mismatches + list(_compare_entries(connection, columns, entries))


def _compare_entries(
    connection: Connection, columns: Columns, entries: Sequence[CheckpointEntry]
) -> Iterator[CatalogueMismatch]:
    """Those whose rows are not what a refresh would write; one mismatch for each."""
    unknown = {entry.key: name for entry in entries for name in entry.metrics if name not in columns.keys}
    entries_by_key = {entry.key: entry for entry in entries if entry.key not in unknown}
    sentences = {key: f"there is no metric {name!r} in the catalogue" for key, name in unknown.items()}
    titles = {f"m{key}": name for name, key in columns.keys.items()}
    for table, rows in checkpoint_rows(columns, list(entries_by_key.values())):
        if table is schema.rarities and len(columns.keys) <= schema.WIDEST:
            continue  # which no selection reads
        expected = _by_key(tuple(row.get(column.name) for column in table.columns) for row in rows)
        stored = _stored(connection, table, list(entries_by_key))
        for key in entries_by_key:
            rows_here, rows_due = stored.get(key, []), expected.get(key, [])
            if rows_here != rows_due:
                sentences.setdefault(key, _difference(table, rows_here, rows_due, titles))
    for entry in entries:
        if entry.key in sentences:
            manifest = entry.checkpoint.manifest
            yield CatalogueMismatch(manifest.run, f"{manifest.run}/{manifest.name}: {sentences[entry.key]}")


def _by_key(rows: Iterable[Sequence[Any]]) -> dict[int, list[tuple[Any, ...]]]:
    """Rows by their first column, each in the order of the first two."""
    grouped: dict[int, list[tuple[Any, ...]]] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(tuple(row))
    return {key: sorted(group, key=lambda row: row[:2]) for key, group in grouped.items()}


def _stored(connection: Connection, table: Table, keys: Sequence[int]) -> dict[int, list[tuple[Any, ...]]]:
    first_column = next(iter(table.columns))
    rows: list[Sequence[Any]] = []
    for some_keys in portions(keys):
        rows += connection.execute(select(table).where(first_column.in_(some_keys))).all()
    return _by_key(rows)


def _difference(table: Table, stored: Sequence[Any], expected: Sequence[Any], titles: Mapping[str, str]) -> str:
    """What rows of a table say otherwise."""
    if len(stored) == len(expected) == 1:
        for column, value, due in zip(table.columns, stored[0], expected[0], strict=True):
            if value != due:
                title = titles.get(column.name, column.name)
                return f"{title} is {str(value)[:80]!r} in the catalogue and {str(due)[:80]!r} in the files"
    name = table.name.removeprefix(schema.PREFIX)
    return f"the catalogue has {len(stored)} rows of {name} that differ from the {len(expected)} of the files"


# --- everything ---------------------------------------------------------------------------------------------------


def compare_all(engines: tuple[Engine, Engine], store: Store, runs: Sequence[str]) -> list[CatalogueMismatch]:
    """Compare all that the catalogue has of some runs with their files, and SQLite's indexes with its tables.

    Args:
        engines: one that writes, and one that reads.
        store: where the files are.
        runs: which.
    """
    writing, reading = engines
    mismatches: list[CatalogueMismatch] = []
    try:
        with translated(reading.url), reading.connect() as connection:
            columns = Columns.read(connection)
            for run in runs:
                mismatches += _compare_run(connection, columns, store, run)
    except DamagedError as error:
        mismatches.append(CatalogueMismatch("", str(error)))
    return mismatches + [CatalogueMismatch("", sentence) for sentence in check(writing)]


def _compare_run(connection: Connection, columns: Columns, store: Store, run: str) -> list[CatalogueMismatch]:
    """Compare all that the catalogue has of a run with its files."""
    row = connection.execute(select(schema.runs).where(schema.runs.c.name == run)).one_or_none()
    if row is None:
        is_run = store.size(layout.run_record(run)) is not None
        return [CatalogueMismatch(run, f"run {run} is missing in the catalogue")] if is_run else []
    try:
        events = journals.read(store, run).events
        directories = store.children(layout.checkpoints_prefix(run))
        archive = readable_run_archive(store, run)
    except NotFoundError:
        return []  # gone meanwhile
    except Error as error:
        return [CatalogueMismatch(run, f"run {run}: {error}", unreadable=True)]
    keys = _checkpoint_keys(connection, columns, row.key)
    names = {child[:-1] for child in directories if child.endswith("/") and child.isascii()}
    annotations = annotations_of(events)
    mismatches, entries, manifests = [], [], []
    for name in sorted(keys.keys() | names):
        checkpoint = _inspect(store, run, name, archive)
        if isinstance(checkpoint, CatalogueMismatch):
            mismatches += [checkpoint] if name in keys else []
            continue
        manifests.append(checkpoint.manifest)
        if name in keys:
            entries.append(CheckpointEntry.noted(keys[name], row.key, checkpoint, annotations))
        else:
            mismatches.append(CatalogueMismatch(run, f"{run}/{name} is missing in the catalogue"))
    mismatches += _compare_entries(connection, columns, entries)
    if any(mismatch.unreadable for mismatch in mismatches):
        return mismatches  # the sums are others then, too
    mismatches += _compare_totals(row, events, manifests) + _compare_notes(connection, row, events)
    return mismatches + _compare_settings(connection, row, events)


def _checkpoint_keys(connection: Connection, columns: Columns, run: int) -> dict[str, int]:
    """The checkpoints of a run in the catalogue: name to key."""
    table, details = columns.table, schema.details
    joined = table.join(details, details.c.checkpoint == table.c.key)
    rows = connection.execute(select(details.c.name, table.c.key).select_from(joined).where(table.c.run == run))
    return {name: key for name, key in rows}  # noqa: C416 - rows


def _compare_totals(row: Any, events: Sequence[Event], manifests: Sequence[Manifest]) -> list[CatalogueMismatch]:
    """Compare what the row of a run says with its journal and its manifests."""
    reports = RunReports().after(events)
    steps = {manifest.step for manifest in manifests}
    expected = {
        **reports.columns(peak.best_step in steps for peak in reports.peaks),
        "checkpoints": len(manifests),
        "size": sum(manifest.size_bytes for manifest in manifests),
        "newest": max((manifest.created_at.timestamp() for manifest in manifests), default=None),
    }
    return [
        CatalogueMismatch(row.name, f"run {row.name}: {name} is {value!r} in the catalogue and {due!r} in the files")
        for name, due in expected.items()
        if (value := getattr(row, name)) != due
    ]


def _compare_notes(connection: Connection, row: Any, events: Sequence[Event]) -> list[CatalogueMismatch]:
    ids = sorted({event.checkpoint for event in events if isinstance(event, NOTES)})
    table = schema.notes
    stored = map(dict, connection.execute(select(table).where(table.c.run == row.key)).mappings())
    if sorted(stored, key=lambda note: note["checkpoint"]) == note_rows(row.key, annotations_of(events), ids):
        return []
    return [CatalogueMismatch(row.name, f"run {row.name}: the notes and pins are not those of its journal")]


def _compare_settings(connection: Connection, row: Any, events: Sequence[Event]) -> list[CatalogueMismatch]:
    table = schema.settings
    stored = map(dict, connection.execute(select(table).where(table.c.run == row.key)).mappings())
    expected = setting_rows(row.key, settings_of(events))
    if sorted(stored, key=_place_of_setting) == sorted(expected, key=_place_of_setting):
        return []
    return [CatalogueMismatch(row.name, f"run {row.name}: the settings are not those of its journal")]


def _place_of_setting(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["name"], row["number"]
