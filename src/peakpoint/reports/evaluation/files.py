"""Reports as files: the suffix says of which kind."""

import csv
import importlib
import io
import itertools
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from peakpoint.errors import ConfigError, ConflictError, StoreError, needing
from peakpoint.format.metrics import json_value
from peakpoint.format.names import safe
from peakpoint.reports.evaluation import pages
from peakpoint.reports.evaluation.result import Evaluation
from peakpoint.store import translated

SUFFIXES = (".html", ".md", ".png", ".svg", ".json", ".csv")
_COLUMNS = ("run", "report", "step", "epoch", "metric", "value", "saved", "kept", "checkpoint")
_LOOK = 4096  # bytes at each end of a file in which its mark stands
_MOST_PICTURES = 60  # in one file


def write(
    evaluation: Evaluation, path: str | os.PathLike[str], *, force: bool = False, separate: bool = False
) -> list[Path]:
    """Write a report to a file, or to several in a directory. Each file appears whole or not at all.

    Args:
        evaluation: the result of ``evaluate``.
        path: a file that ends with one of ``SUFFIXES``; or a directory (one that exists, or a name without suffix),
            which gets ``report.html``, ``report.md`` with its figures, ``report.json`` and ``report.csv``.
        force: also replace files that are not earlier reports.
        separate: figures of each run instead of all runs in one.

    Returns:
        The files.

    Raises:
        ConflictError: a file exists that is not an earlier report.
        ConfigError: an unknown suffix, or nothing to draw.
        MissingExtraError: what a kind needs is not installed.
        StoreError: the file system refused.
    """
    target = Path(path)
    if not target.suffix and target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file without a suffix; choose a name that ends with {', '.join(SUFFIXES)}")
    if target.is_dir() or not target.suffix:
        files = _folder(evaluation, target, separate=separate)
    elif target.suffix.lower() in SUFFIXES:
        files = {target: _content(evaluation, target.suffix.lower(), separate=separate)}
    else:
        raise ConfigError(
            f"{target} cannot be written: its name must end with {', '.join(SUFFIXES)}, or be a directory"
        )
    for file in files:
        if not force and file.exists() and not _is_ours(file):
            raise ConflictError(
                f"{file} exists and is not an earlier report; choose another name, or replace it with --force"
            )
    for file, content in files.items():
        replace_file(file, content)
    return list(files)


def _folder(evaluation: Evaluation, folder: Path, *, separate: bool) -> dict[Path, bytes]:
    figures = _figures()
    pictures: dict[str, Any] = {}
    for panel in figures.panels(evaluation, separate=separate):
        stem = safe(panel.name)
        names = itertools.chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in itertools.count(2)))
        pictures[next(name for name in names if name not in pictures)] = panel
    files = {folder / name: figures.save([panel], ".png") for name, panel in pictures.items()}
    listed = [(name, panel.alt) for name, panel in pictures.items()]
    files |= {
        folder / f"report{suffix}": _content(evaluation, suffix, separate=separate)
        for suffix in (".html", ".json", ".csv")
    }
    return files | {folder / "report.md": pages.markdown(evaluation, listed).encode()}


def _content(evaluation: Evaluation, suffix: str, *, separate: bool) -> bytes:
    match suffix:
        case ".md":
            return pages.markdown(evaluation, ()).encode()
        case ".json":
            return msgspec.json.format(msgspec.json.encode(as_json(evaluation)), indent=2) + b"\n"
        case ".csv":
            return _csv(evaluation)
    figures = _figures()
    panels = figures.panels(evaluation, separate=separate)
    if suffix == ".html":
        return pages.html(evaluation, [(figures.svg(panel), panel.alt) for panel in panels]).encode()
    if not panels:
        raise ConfigError("there is nothing to draw: no run here has a finite value of a metric that is looked at")
    if len(panels) > _MOST_PICTURES:
        raise ConfigError(f"{len(panels)} pictures are too many for one file; give a directory, or name fewer runs")
    return bytes(figures.save(panels, suffix))


def _figures() -> Any:
    with needing("report", "figures need"):
        return importlib.import_module("peakpoint.reports.evaluation.figures")


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything but the single values, for programs; NaN and infinities are strings."""
    runs = [
        {
            "run": entry.name,
            "optimizer": evaluation.optimizers[entry.name],
            "reports": len(entry.history),
            "abandoned_reports": sum(map(len, entry.abandoned)),
            "saved": len(entry.saved),
            "checkpoints": len(entry.checkpoints),
            "rules": [rule.text for rule in entry.rules],
            **asdict(entry.settings),
            "ended": entry.ended,
        }
        for entry in evaluation.runs
    ]
    sections = {
        name: [asdict(entry) for entry in getattr(evaluation, name)] for name in ("groups", "tradeoffs", "comparisons")
    }
    peaks = [asdict(entry) | {"peak": asdict(entry.peak) | {"lost": entry.peak.lost}} for entry in evaluation.peaks]
    record = {"kind": pages.MARK, "root": evaluation.location, "runs": runs, "peaks": peaks, **sections}
    return dict(json_value(record | {"remarks": evaluation.remarks}))


def _csv(evaluation: Evaluation) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(row for run in evaluation.runs for row in run.rows())
    return text.getvalue().encode()


def _is_ours(file: Path) -> bool:
    """Whether a file is a report that was written earlier."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_LOOK)
            stream.seek(max(0, file.stat().st_size - _LOOK))
            tail = stream.read()
    except OSError as error:
        raise StoreError(error.errno, f"cannot look at {file}: {error.strerror}") from error
    return pages.MARK.encode() in head + tail or head.startswith(",".join(_COLUMNS).encode())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file, replacing one that is there: under another name first, durable, then renamed.

    Raises:
        StoreError: the file system refused.
    """
    temporary = file.with_name(f".tmp-{secrets.token_hex(8)}")
    with translated("write", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
