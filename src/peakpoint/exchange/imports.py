"""Import: checkpoints of other tools become committed checkpoints of a run."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError, CorruptError, FormatError
from peakpoint.exchange import metric_logs
from peakpoint.exchange.inspection import inspect, log_source
from peakpoint.exchange.intake import ImportedSource, Intake, SourceSummary
from peakpoint.exchange.moments import ImportMoment, timeline
from peakpoint.exchange.sources import CheckpointSource, find
from peakpoint.exchange.state_dicts import ReadOptions
from peakpoint.exchange.unread import kinds_of
from peakpoint.format import names
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.rules import Rule, check_rules
from peakpoint.store import Store, open_store

_AXES = (metric_logs.EPOCH, metric_logs.STEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did, or would do.

    Attributes:
        checkpoints: each source, in the order of the moments.
        reports: how many moments the history has, also those without a checkpoint.
        others: paths of files that are not checkpoints.
        notes: what people should know.
    """

    run: str
    checkpoints: tuple[ImportedSource, ...]
    reports: int
    others: tuple[Path, ...]
    notes: tuple[str, ...]


def import_checkpoints(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | Store,
    *,
    run: str,
    metrics: str | os.PathLike[str] | None = None,
    join: str = "auto",
    parts: Mapping[str, str] | None = None,
    strip_prefix: str = "",
    epochs_from: int = 0,
    epoch_key: str = "",
    step_key: str = "",
    inert: Iterable[str] = (),
    rules: Iterable[Rule] | None = None,
    link: bool = False,
    skip_unreadable: bool = False,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = utc_now,
) -> ImportReport:
    """Bring checkpoints of other tools into a run, as if they had been saved there.

    Reads files of ``torch.save`` (also Lightning's), safetensors files, folders of Hugging Face and of
    ``torch.distributed.checkpoint``, also of its ``HuggingFaceStorageWriter``. Runs no code of a file's; changes no
    source. Each checkpoint comes in whole or not at all. An import that was cut short, or whose folder has grown since,
    goes on when it is repeated: digests tell which sources were imported.

    Without ``rules`` every imported checkpoint is pinned, so that no later training removes it.

    Args:
        path: a file, or a folder that is searched with all folders below it.
        root: the repository, created when it does not exist.
        run: a new run, or one that this same import has begun.
        metrics: a log to be joined; see ``peakpoint.exchange.metric_logs.read``.
        join: what joins its rows to checkpoints: ``"epoch"``, ``"step"``, or ``"auto"``.
        parts: names in the files to names of parts, besides the usual ones.
        strip_prefix: taken from the names of a model's tensors, such as ``"module."``.
        epochs_from: what the files and the log call the first epoch, 0 or 1; not for files of tools that are known.
        epoch_key: where in the files the epoch is, such as ``"progress.epoch"``; by default under its usual names.
        step_key: where the steps are.
        inert: full names of classes to be kept as records of their values; see ``peakpoint.exchange.pickles``.
        rules: put these in force, and pin nothing.
        link: give safetensors files that can serve as they are a second name instead of copying them. Whoever writes
            into one of the two afterwards changes both.
        skip_unreadable: leave out what cannot be read; by default nothing is imported then.
        dry_run: only tell what would be done.
        progress: called with the bytes of each source that is done.

    Raises:
        NotFoundError: the path does not exist.
        ConfigError: an option is wrong, or a rule ranks by a metric that no source has.
        FormatError: a file is not a checkpoint, or names classes that are not built from files.
        CorruptError: a file is cut short, or was changed during the import.
        ConflictError: the run holds checkpoints of a training, or another import.
        StoreError: the repository cannot be written.

    Example:
        >>> import tempfile, pathlib, torch, peakpoint as pp
        >>> here = pathlib.Path(tempfile.mkdtemp())
        >>> model = torch.nn.Linear(2, 1)
        >>> torch.save({"model_state_dict": model.state_dict(), "epoch": 4, "val_acc": 0.7}, here / "epoch_4.pth")
        >>> done = pp.import_checkpoints(here / "epoch_4.pth", here / "runs", run="old")
        >>> dict(pp.open(here / "runs").run("old").latest().metrics)
        {'val_acc': 0.7}
    """
    names.check_run(run)
    options = ReadOptions(
        parts=dict(parts or {}),
        strip_prefix=strip_prefix,
        inert=frozenset(inert),
        epochs_from=epochs_from,
        epoch_key=epoch_key,
        step_key=step_key,
    )
    if join not in {"auto", *_AXES}:
        raise ConfigError(f"join={join!r}: choose auto, epoch or step")
    checked_rules = None if rules is None else check_rules(rules)
    sources, other_files = find(Path(path))
    log = None if metrics is None else Path(metrics)
    summaries, unreadable, rows = _summaries(sources, log, options, skip=skip_unreadable or dry_run)
    summaries, twins = _without_twins(summaries)
    _check_stripped(summaries, strip_prefix)
    moments, notes = _timeline(summaries, log, rows, join, epochs_from)
    intake = Intake(
        store=open_store(root),
        run=run,
        summaries=summaries,
        moments=moments,
        rules=checked_rules,
        options=options,
        link=link,
    )
    outcomes = intake.preview() if dry_run or intake.complete else intake.write(clock, progress)
    return ImportReport(
        run=run,
        checkpoints=(*(outcomes[number] for moment in moments for number in moment.checkpoints), *twins, *unreadable),
        reports=len(moments),
        others=tuple(other_files),
        notes=(*notes, *_doubts(moments, summaries, rows, epochs_from), *kinds_of(other_files)),
    )


def _timeline(
    summaries: Sequence[SourceSummary],
    log: Path | None,
    rows: Sequence[metric_logs.LogRow],
    join: str,
    epochs_from: int,
) -> tuple[list[ImportMoment], list[str]]:
    """Order the sources, joined with the rows of a log, or with the longest history in the files themselves."""
    rows = _shifted(rows, epochs_from)
    if log is not None and summaries:
        _check_joins(summaries, rows, join, log)
    inner = max((summary.checkpoint.rows for summary in summaries), key=len, default=())
    checkpoints = [summary.checkpoint for summary in summaries]
    if inner and all(row.step is not None for row in rows):
        rows = metric_logs.merged([*rows, *inner], by=metric_logs.STEP)  # one history, told twice or in two halves
        return timeline(checkpoints, rows, metric_logs.STEP if join == "auto" or log is None else join)
    return timeline(checkpoints, [*rows, *inner], join)


def _doubts(
    moments: Sequence[ImportMoment],
    summaries: Sequence[SourceSummary],
    rows: Sequence[metric_logs.LogRow],
    epochs_from: int,
) -> list[str]:
    """Return notes on what the files leave open."""
    notes = []
    unplaced = sum(not moment.placed for moment in moments)
    if unplaced:
        verbs = ("has", "it comes") if unplaced == 1 else ("have", "they come")
        notes.append(
            f"{unplaced} {verbs[0]} neither epoch nor step: {verbs[1]} before all others; if a file tells them under "
            "another name, say which with --epoch-key or --step-key"
        )
    counts = [(summary.checkpoint.epoch, summary.checkpoint.from_zero) for summary in summaries]
    counts += [(row.epoch, row.from_zero) for row in rows]
    unknown = any(epoch is not None and not from_zero for epoch, from_zero in counts)
    first = min((moment.epoch for moment in moments if moment.epoch is not None), default=0)
    if epochs_from == 0 and first == 1 and unknown:
        notes.append("the first epoch is 1, and epochs count from 0: if they count from 1 there, say --epochs-from 1")
    return notes


def _shifted(rows: Sequence[metric_logs.LogRow], first: int) -> list[metric_logs.LogRow]:
    counted = [row for row in rows if row.epoch is not None and not row.from_zero]
    if any(row.epoch < first for row in counted if row.epoch is not None):
        raise ConfigError(f"the log has an epoch before {first}, the first one by --epochs-from")
    return [row if row.epoch is None or row.from_zero else replace(row, epoch=row.epoch - first) for row in rows]


def _check_stripped(summaries: Sequence[SourceSummary], prefix: str) -> None:
    if prefix and summaries and not any(summary.checkpoint.stripped for summary in summaries):
        raise ConfigError(f"--strip-prefix {prefix}: no name of a tensor begins with it in any of the files")


def _check_joins(summaries: Sequence[SourceSummary], rows: Sequence[metric_logs.LogRow], join: str, path: Path) -> None:
    """Refuse a log that has no moment in common with the files."""
    in_files: dict[str, set[int | None]] = {
        axis: {getattr(summary.checkpoint, axis) for summary in summaries} for axis in _AXES
    }
    in_log: dict[str, set[int | None]] = {axis: {getattr(row, axis) for row in rows} for axis in _AXES}
    joined = {
        axis: sum(metric_logs.key(row, axis) in values - {None} for row in rows) for axis, values in in_files.items()
    }
    if any(count for axis, count in joined.items() if join in {"auto", axis}):
        return
    hint = next((f"; --join {axis} would join {count} of them" for axis, count in joined.items() if count), "")
    raise ConfigError(
        f"no row of {path} joins a checkpoint{'' if join == 'auto' else f' by {join}'}: its {len(rows)} rows have "
        f"{_ranges(in_log)}, and the files have {_ranges(in_files)}{hint}"
    )


def _ranges(values: Mapping[str, set[int | None]]) -> str:
    texts = []
    for axis, of_axis in values.items():
        numbers = sorted(number for number in of_axis if number is not None)
        several = f"{axis}s {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else ""
        texts.append(several or (f"{axis} {numbers[0]}" if numbers else f"no {axis}s"))
    return " and ".join(texts)


def _summaries(
    sources: Sequence[CheckpointSource], log: Path | None, options: ReadOptions, *, skip: bool
) -> tuple[list[SourceSummary], list[ImportedSource], Sequence[metric_logs.LogRow]]:
    """Inspect every source and the log, so that an unreadable one is noticed before anything is written."""
    sources = sorted(sources, key=lambda source: _natural(source.path))
    for source in sources:
        names.check_text("the name of the source", str(source.path.absolute()))
    stamps = [source.stamp() for source in sources]
    inspected = inspect([*sources, *([] if log is None else [log_source(log)])], options, all_of_them=skip)
    summaries, unreadable = [], []
    for source, stamp, contents in zip(sources, stamps, inspected, strict=False):
        error = contents.error()
        if error is None:
            assert contents.checkpoint is not None
            digest = source.digest()
            summaries.append(SourceSummary(source=source, stamp=stamp, digest=digest, checkpoint=contents.checkpoint))
            continue
        if not isinstance(error, FormatError | CorruptError | ConfigError):
            raise error
        if not skip:
            hint = "; --skip-unreadable imports the others" if len(sources) > 1 else ""
            raise type(error)(f"{error}{hint}. Nothing was imported")
        outcome = ImportedSource(path=source.path, tool=source.kind, metrics={}, status="unreadable")
        unreadable.append(replace(outcome, error=str(error), size_bytes=source.size_bytes))
    if log is not None and (error := inspected[-1].error()) is not None:
        raise error
    return summaries, unreadable, inspected[-1].rows


def _without_twins(summaries: Sequence[SourceSummary]) -> tuple[list[SourceSummary], list[ImportedSource]]:
    """Return the first of sources with the same bytes, and the outcomes of the others."""
    originals: dict[str, SourceSummary] = {}
    twins = []
    for summary in summaries:
        original = originals.setdefault(summary.digest, summary)
        if original is not summary:
            names_of_both = summary.source.path.name, original.source.path.name
            note = "{} has the same bytes as {}: it is imported once".format(*names_of_both)
            twins.append(replace(summary.outcome("twin"), parts=(), notes=(note,)))
    return list(originals.values()), twins


def _natural(path: Path) -> list[Any]:
    """Return a key that sorts numbers in names by value: ``e9`` before ``e10``."""
    return [(0, int(text), "") if text.isdecimal() else (1, 0, text) for text in re.split(r"(\d+)", str(path))]
