"""Metrics that other tools have logged: JSON, JSON lines, CSV, TensorBoard. Read into rows, joined to moments.

A row belongs to an epoch, a step or both. Where every row has an epoch in whole numbers, they are merged by epoch
and the last value of each column in an epoch counts, as in Lightning's ``metrics.csv`` with its many rows and blanks;
others are merged by step.
"""

import csv
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakpoint.errors import FormatError, NotFoundError, needing
from peakpoint.store import translated

EPOCH, STEP = "epoch", "step"
STEPS = (STEP, "global_step", "iteration", "iter")  # names that scripts give it
_LARGEST_COUNT = 2**53  # above it, floats skip whole numbers
_NOT_IN_NAMES = re.compile(r"[\s:\x00-\x1f]+")


@dataclass(frozen=True, slots=True)
class LogRow:
    """One moment of a log.

    Attributes:
        epoch: as the log counts it, None when it has none.
        step: as the log counts it, None when it has none.
    """

    epoch: int | None
    step: int | None
    metrics: Mapping[str, float]


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
        path: ``.json`` (a list of records, records by epoch, columns, or a ``trainer_state.json``), ``.jsonl``,
            ``.csv``, or TensorBoard's event file or folder.

    Raises:
        NotFoundError: the file does not exist.
        FormatError: the file is none of these.
        MissingExtraError: TensorBoard's files need ``pip install 'peakpoint[tensorboard]'``.
    """
    if not path.exists():
        raise NotFoundError(f"cannot read metrics from {path}: it does not exist")
    if _is_tensorboard(path):
        return merged(_tensorboard(path))
    try:
        with translated("read", path):
            text = path.read_text(encoding="utf-8-sig")
        records = _records(path, text)
    except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        raise FormatError(f"{path} is not JSON, JSON lines or CSV: {error}") from error
    rows = [row for record in records if (row := row_of(record)) is not None]
    if not rows:
        raise FormatError(f"{path} has no row with an epoch or a step ({', '.join(STEPS)}) and a number")
    return merged(rows)


def _records(path: Path, text: str) -> Iterable[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix.lower() in {".jsonl", ".ndjson"}:
        records: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        records = json.loads(text)
    if isinstance(records, dict):
        records = _records_of_dict(records)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("it is neither a list of records nor records by epoch")
    return records


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


def row_of(record: Mapping[str, Any]) -> LogRow | None:
    """Return a row from columns by name; None when it has no number, or neither epoch nor step."""
    values = {name: number for name, value in record.items() if name and (number := as_number(value)) is not None}
    epoch = as_count(values.pop(EPOCH, None))
    step = as_count(next((values.pop(name) for name in STEPS if name in values), None))
    if not values or (epoch is None and step is None):
        return None
    return LogRow(epoch, step, {metric_name(name): value for name, value in values.items()})


def merged(rows: Iterable[LogRow], *, by: str = "auto") -> list[LogRow]:
    """Merge rows of one epoch if every row has one, otherwise of one step; ``by`` decides. Later values count."""
    rows = list(rows)
    by_epoch = by != STEP and all(row.epoch is not None for row in rows)
    merged_rows: dict[int, LogRow] = {}
    for row in rows:
        place = row.epoch if by_epoch else row.step if row.step is not None else row.epoch
        assert place is not None
        earlier = merged_rows.get(place, LogRow(row.epoch, row.step, {}))
        steps = [step for step in (earlier.step, row.step) if step is not None]
        merged_rows[place] = LogRow(row.epoch, max(steps, default=None), {**earlier.metrics, **row.metrics})
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
        rows += [row for step, values in by_step.items() if (row := row_of({STEP: step, **values})) is not None]
    if not rows:
        raise FormatError(f"{path} has event files of TensorBoard, but no scalars in them")
    return rows


def key(row: LogRow, axis: str) -> int | None:
    """Return the epoch or step that joins a row to a moment."""
    if axis == STEP:
        return row.step
    return row.step if row.epoch is None else row.epoch
