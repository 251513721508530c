"""Reports as files: the suffix says of which kind."""

import csv
import importlib
import io
import itertools
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from peakpoint.errors import ConfigError, ConflictError, MissingExtraError, StoreError
from peakpoint.format.metrics import json_value
from peakpoint.format.names import safe
from peakpoint.reports.evaluation import pages

if TYPE_CHECKING:
    from peakpoint.reports.evaluation import Evaluation

SUFFIXES = (".html", ".md", ".png", ".svg", ".json", ".csv")
_COLUMNS = ("run", "report", "step", "epoch", "metric", "value", "saved", "kept", "checkpoint")
_LOOK = 4096  # bytes at each end of a file in which its mark stands
_MOST_PICTURES = 60  # in one file


def write(
    found: "Evaluation", path: str | os.PathLike[str], *, force: bool = False, separate: bool = False
) -> list[Path]:
    """Write a report to a file, or to several in a directory. Each file appears whole or not at all.

    Args:
        found: what ``evaluate`` returned.
        path: a file that ends with one of ``SUFFIXES``; or a directory (one that exists, or a name without suffix),
            which gets ``report.html``, ``report.md`` with its figures, ``report.json`` and ``report.csv``.
        force: also replace files that are no earlier reports.
        separate: figures of each run instead of all runs in one.

    Returns:
        The files.

    Raises:
        ConflictError: a file is there that is no earlier report.
        ConfigError: another suffix; or a picture of nothing.
        MissingExtraError: what a kind needs is not installed.
        StoreError: the disk said no.
    """
    target = Path(path)
    if not target.suffix and target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file without a suffix; give a name that ends with {', '.join(SUFFIXES)}")
    if target.is_dir() or not target.suffix:
        files = _folder(found, target, separate=separate)
    elif target.suffix.lower() in SUFFIXES:
        files = {target: _content(found, target.suffix.lower(), separate=separate)}
    else:
        raise ConfigError(f"{target} is no report: its name must end with {', '.join(SUFFIXES)}, or be a directory")
    for file in files:
        if not force and file.exists() and not _is_ours(file):
            raise ConflictError(
                f"{file} exists and is no report of ours; choose another name, or replace it with --force"
            )
    for file, content in files.items():
        replace_file(file, content)
    return list(files)


def _folder(found: "Evaluation", folder: Path, *, separate: bool) -> dict[Path, bytes]:
    figures = _figures()
    pictures: dict[str, Any] = {}
    for panel in figures.panels(found, separate=separate):
        names = (
            f"{safe(panel.name)}{more}.png" for more in itertools.chain([""], map("-{}".format, itertools.count(2)))
        )
        pictures[next(name for name in names if name not in pictures)] = panel
    files = {folder / name: figures.save([panel], ".png") for name, panel in pictures.items()}
    shown = [(name, panel.alt) for name, panel in pictures.items()]
    files |= {
        folder / f"report{suffix}": _content(found, suffix, separate=separate) for suffix in (".html", ".json", ".csv")
    }
    return files | {folder / "report.md": pages.markdown(found, shown).encode()}


def _content(found: "Evaluation", suffix: str, *, separate: bool) -> bytes:
    match suffix:
        case ".md":
            return pages.markdown(found, ()).encode()
        case ".json":
            return msgspec.json.format(msgspec.json.encode(as_json(found)), indent=2) + b"\n"
        case ".csv":
            return _csv(found)
    figures = _figures()
    panels = figures.panels(found, separate=separate)
    if suffix == ".html":
        return pages.html(found, [(figures.svg(panel), panel.alt) for panel in panels]).encode()
    if not panels:
        raise ConfigError("there is nothing to draw: no run here has a finite value of a metric that is looked at")
    if len(panels) > _MOST_PICTURES:
        raise ConfigError(f"{len(panels)} pictures are too many for one file; give a directory, or name fewer runs")
    return bytes(figures.save(panels, suffix))


def _figures() -> Any:
    try:
        return importlib.import_module("peakpoint.reports.evaluation.figures")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"figures need {error.name}, which is not installed: pip install 'peakpoint[report]'"
        ) from error


def as_json(found: "Evaluation") -> dict[str, Any]:
    """Everything but the single values, for programs; NaN and infinities as strings."""
    runs = [
        {
            "run": one.name,
            "optimizer": found.optimizers[one.name],
            "reports": len(one.history),
            "abandoned_reports": sum(map(len, one.abandoned)),
            "saved": len(one.saved),
            "checkpoints": len(one.checkpoints),
            "rules": [rule.text for rule in one.rules],
            "ended": one.ended,
        }
        for one in found.runs
    ]
    others = {name: [asdict(one) for one in getattr(found, name)] for name in ("groups", "tradeoffs", "comparisons")}
    peaks = [asdict(one) | {"peak": asdict(one.peak) | {"lost": one.peak.lost}} for one in found.peaks]
    record = {"kind": pages.MARK, "root": found.location, "runs": runs, "peaks": peaks, **others}
    return dict(json_value(record | {"remarks": found.remarks}))


def _rows(found: "Evaluation") -> Iterable[tuple[Any, ...]]:
    return (row for one in found.runs for row in one.rows())


def _csv(found: "Evaluation") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(found))
    return text.getvalue().encode()


def _is_ours(file: Path) -> bool:
    """Whether a file is a report that was written earlier."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_LOOK)
            opened.seek(max(0, file.stat().st_size - _LOOK))
            tail = opened.read()
    except OSError as error:
        raise StoreError(error.errno, f"cannot look at {file}: {error.strerror}") from error
    return pages.MARK.encode() in head + tail or head.startswith(",".join(_COLUMNS).encode())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file, replacing one that is there: under another name first, durable, then renamed.

    Raises:
        StoreError: the disk said no.
    """
    umask = os.umask(0)
    os.umask(umask)
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".tmp-")
        with open(descriptor, "wb") as opened:  # noqa: PTH123 - a descriptor
            opened.write(content)
            opened.flush()
            os.fsync(descriptor)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(file)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(error.errno, f"cannot write {file}: {error.strerror}") from error
