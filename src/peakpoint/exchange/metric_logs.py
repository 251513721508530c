"""Metrics that other tools have logged: JSON, JSON lines, CSV, TensorBoard. Read into rows, joined to moments.

A row belongs to an epoch, a step or both. Where every row has an epoch in whole numbers, they are merged by epoch
and the last value of each column in an epoch counts, as in Lightning's ``metrics.csv`` with its many rows and blanks;
others are merged by step.
"""

import csv
import importlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peakpoint.errors import FormatError, NotFoundError, needing
from peakpoint.store import translated

EPOCH, STEP = "epoch", "step"
STEPS = (STEP, "global_step", "iteration", "iter")  # names that scripts give it
_LARGEST_COUNT = 2**53  # above it, floats skip whole numbers
_JSON = frozenset({".json", ".jsonl", ".ndjson"})
_DECIMAL_COMMA = re.compile(r"^(\s*[-+]?\d+),(\d+(?:[eE][-+]?\d+)?\s*)$")
_NO_VALUE = frozenset({"", "-", "--", "none", "null", "na", "n/a", "?"})  # as tools and people write it in tables
_NOT_IN_NAMES = re.compile(r"[\s:\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, slots=True)
class LogRow:
    """One moment of a log.

    Attributes:
        epoch: as the log counts it, None when it has none.
        step: as the log counts it, None when it has none.
        from_zero: whether the first epoch is known to be 0, whatever ``--epochs-from`` says.
    """

    epoch: int | None
    step: int | None
    metrics: Mapping[str, float]
    from_zero: bool = False


def readable(text: str) -> str:
    """Return a text without lone surrogates, which no file of text can hold."""
    return text.encode("utf-8", "replace").decode()


def as_count(value: float | None) -> int | None:
    """Return a count from a number; None from everything else.

    Example:
        >>> as_count(3.0), as_count(2.5), as_count(-1.0), as_count(float("nan"))
        (3, None, None, None)
    """
    return int(value) if value is not None and value.is_integer() and 0 <= value < _LARGEST_COUNT else None


def metric_name(text: str) -> str:
    """Return a name that a metric may have: without spaces and colons.

    Example:
        >>> metric_name("Loss/val: top 5")
        'Loss/val_top_5'
    """
    return _NOT_IN_NAMES.sub("_", readable(text))[:200] or "unnamed"


def metric_names(columns: Iterable[str]) -> dict[str, str]:
    """Return the name of the metric for each column; no two are the same.

    Example:
        >>> metric_names(["val loss", "val_loss", "val:loss"])
        {'val loss': 'val_loss_2', 'val_loss': 'val_loss', 'val:loss': 'val_loss_3'}
    """
    columns = list(dict.fromkeys(columns))
    used_names = {column for column in columns if metric_name(column) == column}
    names = {}
    for column in columns:
        name = column if column in used_names else metric_name(column)
        number = 1
        while column not in used_names and name in used_names:
            number += 1
            name = f"{metric_name(column)[:190]}_{number}"
        used_names.add(name)
        names[column] = name
    return names


def as_number(value: Any) -> float | None:
    """Return a number from a number or a cell of text; None from everything else, also from true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def read(path: Path) -> list[LogRow]:
    """Read the rows of a log.

    Args:
        path: a table with a line of names, TensorBoard's event file or folder, or JSON: a list of records, records by
            epoch, columns, a ``trainer_state.json``, or a record on each line.

    Raises:
        NotFoundError: the file does not exist.
        FormatError: the file is none of these, or has text among the numbers of a column.
        MissingExtraError: TensorBoard's files need ``pip install 'peakpoint[tensorboard]'``.
    """
    if not path.exists():
        raise NotFoundError(f"cannot read metrics from {path}: it does not exist")
    if _is_tensorboard(path):
        return merged(_tensorboard(path))
    try:
        with translated("read", path):
            text = path.read_text(encoding="utf-8-sig")
        records, completed = _records(path, text)
    except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        raise FormatError(f"{path} is not JSON, JSON lines or CSV: {error}") from error
    rows = rows_of(records, completed=completed)
    _check_cells(path, records)
    if not rows:
        columns = ", ".join(dict.fromkeys(readable(name) for record in records for name in record)) or "no columns"
        raise FormatError(
            f"{path} has no row with an epoch or a step ({', '.join(STEPS)}) and a number; it has {columns[:1000]}"
        )
    return merged(rows, by=STEP if all(row.from_zero and row.step is not None for row in rows) else "auto")


def _check_cells(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse text among the numbers of a column: it may stand for the best value.

    Raises:
        FormatError: names the first.
    """
    numbered = [_numbers_in(record) for record in records]
    columns = {name for values in numbered for name in values}
    for row, (record, values) in enumerate(zip(records, numbered, strict=True), 1):
        for name in (name for name in record if name in columns and name not in values):
            cell = record[name]
            if isinstance(cell, str) and cell.strip().lower() not in _NO_VALUE:
                raise FormatError(
                    f"{path}: row {row} has {readable(cell)[:50]!r} for {readable(name)!r}, which has numbers in other "
                    "rows: write a number there, or leave it empty"
                )


def _records(path: Path, text: str) -> tuple[list[Mapping[str, Any]], bool]:
    """Return the records of a log, and whether their epochs are those completed, as in ``trainer_state.json``."""
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"} or (suffix not in _JSON and not text.lstrip().startswith(("{", "["))):
        return _records_of_table(text), False
    try:
        records: Any = json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise
        records = [json.loads(line) for line in lines]
    completed = isinstance(records, dict) and isinstance(records.get("log_history"), list)
    if isinstance(records, dict):
        records = _records_of_dict(records)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("it is neither a list of records nor records by epoch")
    return records, completed


def _records_of_table(text: str) -> list[Mapping[str, Any]]:
    """Return the rows below a line of names; the separator is the one that the names have most of."""
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    names, *lines = csv.reader(io.StringIO(text), delimiter=separator) if header.strip() else [[]]
    names = [name.strip() for name in names]
    used_names, columns = set(names), dict[str, None]()
    for name in names:
        numbered = (f"{name} {number}" for number in itertools.count(2))
        column = (
            name if name not in columns else next(candidate for candidate in numbered if candidate not in used_names)
        )
        used_names.add(column)
        columns[column] = None
    if separator == ";":  # then a comma is that of decimals
        lines = [[_DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells] for cells in lines]
    return [dict(zip(columns, cells, strict=False)) for cells in lines]


def _records_of_dict(log: Mapping[str, Any]) -> Any:
    if isinstance(log.get("log_history"), list):
        return log["log_history"]
    if log and all(isinstance(column, list) for column in log.values()):
        if len({len(column) for column in log.values()}) > 1:
            raise ValueError("its columns have different lengths")
        return [dict(zip(log, values, strict=True)) for values in zip(*log.values(), strict=True)]
    if all(isinstance(record, dict) for record in log.values()):
        return [{EPOCH: epoch, **record} for epoch, record in log.items()]
    return [log]


def rows_of(records: Iterable[Mapping[str, Any]], *, completed: bool = False) -> list[LogRow]:
    """Return rows from records of columns by name, without records that have no number, or neither epoch nor step.

    Epochs with fractions are epochs completed, as transformers counts them: 0.5 is in the first, and so is 1.0.

    Args:
        completed: whether whole numbers are epochs completed, too.
    """
    numbered = [_numbers_in(record) for record in records]
    names = metric_names(column for values in numbered for column in values)
    rows = []
    for values in numbered:
        epoch, step = _pop_axis(values, (EPOCH,)), as_count(_pop_axis(values, STEPS))
        if values and (epoch is not None or step is not None):
            rows.append((epoch, step, {names[column]: value for column, value in values.items()}))
    completed = completed or any(epoch is not None and epoch % 1 for epoch, _, _ in rows if epoch != math.inf)
    index = epoch_of_completed if completed else as_count
    log_rows = [LogRow(index(epoch), step, metrics, from_zero=completed) for epoch, step, metrics in rows]
    return [row for row in log_rows if row.epoch is not None or row.step is not None]


def _numbers_in(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record; percentages as they are written, without the sign."""
    cells = {
        name: value.strip().removesuffix("%") if isinstance(value, str) else value for name, value in record.items()
    }
    return {name: number for name, value in cells.items() if name and (number := as_number(value)) is not None}


def axis_in(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column of an epoch or a step: by the first name that is there, in small letters or others.

    Example:
        >>> axis_in([" Epoch", "loss"], ["epoch"])
        ' Epoch'
    """
    spellings = {column.strip().lower(): column for column in columns}
    spellings |= {column: column for column in columns if column in names}
    return next((spellings[name] for name in names if name in spellings), None)


def _pop_axis(values: dict[str, float], names: Sequence[str]) -> float | None:
    column = axis_in(values, names)
    return None if column is None else values.pop(column)


def epoch_of_completed(completed: float | None) -> int | None:
    """Return the index of the epoch that was running, or was just complete, from the epochs completed."""
    return None if completed is None or not math.isfinite(completed) else max(math.ceil(completed) - 1, 0)


def merged(rows: Iterable[LogRow], *, by: str = "auto") -> list[LogRow]:
    """Merge rows of one epoch if every row has one, otherwise of one step; ``by`` decides. Later values count."""
    rows = list(rows)
    by_epoch = by != STEP and all(row.epoch is not None for row in rows)
    merged_rows: dict[int, LogRow] = {}
    for row in rows:
        place = row.epoch if by_epoch else row.step if row.step is not None else row.epoch
        assert place is not None
        earlier = merged_rows.get(place, replace(row, metrics={}))
        steps = [step for step in (earlier.step, row.step) if step is not None]
        metrics = {**earlier.metrics, **row.metrics}
        placed = earlier if row.epoch is None else row
        merged_rows[place] = replace(placed, step=max(steps, default=None), metrics=metrics)
    return [merged_rows[place] for place in sorted(merged_rows)]


def _is_tensorboard(path: Path) -> bool:
    return path.is_dir() or "tfevents" in path.name


def import_reader(path: Path) -> tuple[Any, ...]:
    """Return the modules that ``read`` needs for a log besides the standard library.

    Raises:
        MissingExtraError: they are not installed.
    """
    if not _is_tensorboard(path):
        return ()
    with needing("tensorboard", f"reading {path} needs"):
        return (
            importlib.import_module("tensorboard.backend.event_processing.event_accumulator"),
            importlib.import_module("tensorboard.util.tensor_util"),
        )


def _tensorboard(path: Path) -> list[LogRow]:
    accumulator, tensor_util = import_reader(path)
    folders = sorted({file.parent for file in path.rglob("*tfevents*")}) if path.is_dir() else [path]
    if not folders:
        raise FormatError(f"{path} is a folder without event files of TensorBoard")
    rows = []
    for folder in folders:
        below = folder.relative_to(path).as_posix() if path.is_dir() else "."
        prefix = "" if below == "." else f"{below}/"
        events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        by_step: dict[int, dict[str, float]] = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                by_step.setdefault(event.step, {})[prefix + tag] = event.value
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                value = tensor_util.make_ndarray(event.tensor_proto)
                if value.size == 1 and value.dtype.kind in "fiu":
                    by_step.setdefault(event.step, {})[prefix + tag] = float(value.reshape(-1)[0])
        rows += rows_of({STEP: step, **values} for step, values in by_step.items())
    if not rows:
        raise FormatError(f"{path} has event files of TensorBoard, but no scalars in them")
    return rows


def key(row: LogRow, axis: str) -> int | None:
    """Return the epoch or step that joins a row to a moment."""
    if axis == STEP:
        return row.step
    return row.step if row.epoch is None else row.epoch
