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
_MOST = 2**53  # up to which floats count one by one
_UNFIT = re.compile(r"[\s:\x00-\x1f]+")


@dataclass(frozen=True, slots=True)
class Row:
    """What was logged of one moment.

    Attributes:
        epoch: as the log counts it, None when it does not.
        step: the same.
        metrics: by name.
    """

    epoch: int | None
    step: int | None
    metrics: Mapping[str, float]


def readable(given: str) -> str:
    """A text that can be written down; lone surrogates cannot."""
    return given.encode("utf-8", "replace").decode()


def whole(value: float | None) -> int | None:
    """A count from a number; None from everything else.

    Example:
        >>> whole(3.0), whole(2.5), whole(-1.0), whole(float("nan"))
        (3, None, None, None)
    """
    return int(value) if value is not None and value.is_integer() and 0 <= value < _MOST else None


def metric_name(given: str) -> str:
    """A name as metrics have it: without spaces and colons.

    Example:
        >>> metric_name("Loss/val: top 5")
        'Loss/val_top_5'
    """
    return _UNFIT.sub("_", readable(given))[:200] or "unnamed"


def as_number(value: Any) -> float | None:
    """A number from a number or a cell of text; None from everything else, also from true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def read(path: Path) -> list[Row]:
    """The rows of a log.

    Args:
        path: ``.json`` (a list of records, records by epoch, columns, or a ``trainer_state.json``), ``.jsonl``,
            ``.csv``, or TensorBoard's event file or folder.

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is none of these.
        MissingExtraError: TensorBoard's files need ``pip install 'peakpoint[tensorboard]'``.
    """
    if not path.exists():
        raise NotFoundError(f"there are no metrics in {path}: it does not exist")
    if path.is_dir() or "tfevents" in path.name:
        return merged(_tensorboard(path))
    try:
        with translated("read", path):
            text = path.read_text(encoding="utf-8-sig")
        records = _records(path, text)
    except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        raise FormatError(f"{path} is no JSON, JSON lines or CSV: {error}") from error
    rows = [row for record in records if (row := row_of(record)) is not None]
    if not rows:
        raise FormatError(f"{path} has no row with an epoch or a step ({', '.join(STEPS)}) and a number")
    return merged(rows)


def _records(path: Path, text: str) -> Iterable[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix.lower() in {".jsonl", ".ndjson"}:
        found: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        found = json.loads(text)
    if isinstance(found, dict):
        found = _records_of_dict(found)
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ValueError("it is neither a list of records nor records by epoch")
    return found


def _records_of_dict(given: Mapping[str, Any]) -> Any:
    if isinstance(given.get("log_history"), list):
        return given["log_history"]
    if given and all(isinstance(column, list) for column in given.values()):
        if len({len(column) for column in given.values()}) > 1:
            raise ValueError("its columns have different lengths")
        return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if all(isinstance(record, dict) for record in given.values()):
        return [{EPOCH: key, **record} for key, record in given.items()]
    return [given]


def row_of(record: Mapping[str, Any]) -> Row | None:
    """A row from columns by name; None when it has no number, or neither epoch nor step."""
    values = {name: number for name, value in record.items() if name and (number := as_number(value)) is not None}
    epoch = whole(values.pop(EPOCH, None))
    step = whole(next((values.pop(name) for name in STEPS if name in values), None))
    if not values or (epoch is None and step is None):
        return None
    return Row(epoch, step, {metric_name(name): value for name, value in values.items()})


def merged(rows: Iterable[Row], *, by: str = "auto") -> list[Row]:
    """One row for each epoch if every row has one, otherwise for each step, or as said; later values count."""
    rows = list(rows)
    by_epoch = by != STEP and all(row.epoch is not None for row in rows)
    found: dict[int, Row] = {}
    for row in rows:
        key = row.epoch if by_epoch else row.step if row.step is not None else row.epoch
        assert key is not None
        before = found.get(key, Row(row.epoch, row.step, {}))
        steps = [step for step in (before.step, row.step) if step is not None]
        found[key] = Row(row.epoch, max(steps, default=None), {**before.metrics, **row.metrics})
    return [found[key] for key in sorted(found)]


def _tensorboard(path: Path) -> list[Row]:
    with needing("tensorboard", f"reading {path} needs"):
        accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        tensor_util: Any = importlib.import_module("tensorboard.util.tensor_util")
    places = sorted({file.parent for file in path.rglob("*tfevents*")}) if path.is_dir() else [path]
    if not places:
        raise FormatError(f"{path} is a folder without event files of TensorBoard")
    rows = []
    for place in places:
        below = place.relative_to(path).as_posix() if path.is_dir() else "."
        prefix = "" if below == "." else f"{below}/"
        events = accumulator.EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0}).Reload()
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


def key(row: Row, how: str) -> int | None:
    """What a row is joined by."""
    if how == STEP:
        return row.step
    return row.step if row.epoch is None else row.epoch
