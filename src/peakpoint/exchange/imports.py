"""Import: checkpoints of other tools become committed checkpoints of a run."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError, CorruptError, FormatError
from peakpoint.exchange import metric_logs
from peakpoint.exchange.intake import Imported, Intake, Seen
from peakpoint.exchange.moments import timeline
from peakpoint.exchange.pickles import check_inert
from peakpoint.exchange.sources import Source, find, read
from peakpoint.exchange.state_dicts import EXTRA, Reading, keepable
from peakpoint.format import names
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.rules import Rule, check_rules
from peakpoint.store import Store, open_store

_AXES = (metric_logs.EPOCH, metric_logs.STEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did, or would do.

    Attributes:
        run: the run.
        checkpoints: each source, in the order of the moments.
        reports: how many moments the history has, also those without a checkpoint.
        others: files that were not looked at.
        notes: what people should know.
    """

    run: str
    checkpoints: tuple[Imported, ...]
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
    ``torch.distributed.checkpoint``. Runs no code of a file's; changes no source. Each checkpoint comes in whole or not
    at all. An import that was cut short goes on when it is repeated: what is there is known by its digest.

    Without ``rules`` every imported checkpoint is pinned, so that no later training removes it.

    Args:
        path: a file, or a folder that is searched with all folders below it.
        root: the repository, created when it does not exist.
        run: the run: a new one, or one that holds nothing but what was imported.
        metrics: a log to be joined; see ``peakpoint.exchange.metric_logs.read``.
        join: what its rows are joined by: ``"epoch"``, ``"step"``, or ``"auto"``.
        parts: names in the files to names of parts, besides those that are known.
        strip_prefix: taken from the names of a model's tensors, such as ``"module."``.
        epochs_from: what the files and the log call the first epoch: 0 or 1.
        inert: full names of classes to be kept as records of their values; see ``peakpoint.exchange.pickles``.
        rules: put these in force, and pin nothing.
        link: give safetensors files that can serve as they are a second name instead of copying them. Whoever writes
            into one of the two afterwards changes both.
        skip_unreadable: leave out what cannot be read; by default nothing is imported then.
        dry_run: write nothing.
        progress: called with the bytes of each source that is done.
        clock: tells the time.

    Raises:
        NotFoundError: there is nothing of that name.
        ConfigError: an option that cannot be, or a rule by a metric that nothing has.
        FormatError: no checkpoint, or one that names what is not built from files.
        CorruptError: a file is cut short, or was changed during the import.
        ConflictError: the run holds checkpoints of a training, or newer ones than those to be imported.
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
    inert = frozenset(inert)
    check_inert(inert)
    how = Reading(parts=_checked(parts or {}), strip_prefix=strip_prefix, inert=inert, epochs_from=epochs_from)
    if epochs_from not in (0, 1):
        raise ConfigError(f"epochs_from={epochs_from!r}: the first epoch is called 0 or 1")
    if join not in {"auto", *_AXES}:
        raise ConfigError(f"join={join!r} cannot be: give auto, epoch or step")
    given = None if rules is None else check_rules(rules)
    sources, others = find(Path(path))
    seen, unreadable = _look(sources, how, skip=skip_unreadable or dry_run)
    seen, twins = _without_twins(seen)
    _check_stripped(seen, strip_prefix)
    rows = [] if metrics is None else _shifted(metric_logs.read(Path(metrics)), epochs_from)
    if metrics is not None and seen:
        _check_joins(seen, rows, join, Path(metrics))
    own = max((one.found.rows for one in seen), key=len, default=())
    moments, notes = timeline([one.found for one in seen], [*rows, *own], "step" if own and not rows else join)
    store = open_store(root)
    intake = Intake(store=store, run=run, seen=seen, moments=moments, rules=given, how=how, link=link)
    done = intake.preview() if dry_run or intake.complete else intake.write(clock, progress)
    order = [number for moment in moments for number in moment.taken]
    lost = sum(not moment.known for moment in moments)
    if lost:
        say, come = ("says", "it comes") if lost == 1 else ("say", "they come")
        notes.append(f"{lost} {say} neither epoch nor step: {come} before all others")
    if epochs_from == 0 and min((moment.epoch for moment in moments if moment.epoch is not None), default=0) == 1:
        notes.append("the first epoch is 1, and epochs count from 0: if they count from 1 there, say --epochs-from 1")
    return ImportReport(
        run=run,
        checkpoints=(*(done[number] for number in order), *twins, *unreadable),
        reports=intake.reports,
        others=tuple(others),
        notes=tuple(notes),
    )


def _checked(parts: Mapping[str, str]) -> dict[str, str]:
    for part in parts.values():
        names.check_part(part)
    if len({part for part in parts.values() if part != EXTRA}) < sum(part != EXTRA for part in parts.values()):
        raise ConfigError(f"two names become one part: {', '.join(parts.values())}")
    return dict(parts)


def _shifted(rows: Sequence[metric_logs.Row], first: int) -> list[metric_logs.Row]:
    if any(row.epoch is not None and row.epoch < first for row in rows):
        raise ConfigError(f"the log has an epoch before {first}, which was said to be the first")
    return [row if row.epoch is None else replace(row, epoch=row.epoch - first) for row in rows]


def _check_stripped(seen: Sequence[Seen], prefix: str) -> None:
    if prefix and seen and not any(one.found.stripped for one in seen):
        raise ConfigError(f"--strip-prefix {prefix}: no name of a tensor begins with it in any of the files")


def _check_joins(seen: Sequence[Seen], rows: Sequence[metric_logs.Row], how: str, path: Path) -> None:
    """Refuse a log that has nothing to do with the files."""
    files: dict[str, set[int | None]] = {axis: {getattr(one.found, axis) for one in seen} for axis in _AXES}
    joined = {axis: sum(metric_logs.key(row, axis) in here - {None} for row in rows) for axis, here in files.items()}
    if any(count for axis, count in joined.items() if how in {"auto", axis}):
        return
    own: dict[str, set[int | None]] = {axis: {getattr(row, axis) for row in rows} for axis in _AXES}
    other = next((f"; --join {axis} would join {count} of them" for axis, count in joined.items() if count), "")
    raise ConfigError(
        f"no row of {path} joins a checkpoint{'' if how == 'auto' else f' by {how}'}: its {len(rows)} rows have "
        f"{_spread(own)}, and the files have {_spread(files)}{other}"
    )


def _spread(values: Mapping[str, set[int | None]]) -> str:
    found = []
    for axis, given in values.items():
        numbers = sorted(number for number in given if number is not None)
        many = f"{axis}s {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else ""
        found.append(many or (f"{axis} {numbers[0]}" if numbers else f"no {axis}s"))
    return " and ".join(found)


def _look(sources: Sequence[Source], how: Reading, *, skip: bool) -> tuple[list[Seen], list[Imported]]:
    """Read every source once, so that what cannot be read is found before anything is written."""
    seen, unreadable = [], []
    for source in sorted(sources, key=lambda source: _natural(source.path)):
        try:
            seen.append(_see(source, how))
        except (FormatError, CorruptError, ConfigError) as error:
            if not skip:
                hint = "; --skip-unreadable imports the others" if len(sources) > 1 else ""
                raise type(error)(f"{error}{hint}. Nothing was imported") from error
            told = Imported(path=source.path, tool=source.kind, metrics={}, status="unreadable", error=str(error))
            unreadable.append(replace(told, size_bytes=source.size_bytes))
    return seen, unreadable


def _without_twins(seen: Sequence[Seen]) -> tuple[list[Seen], list[Imported]]:
    """The first of each source that is there several times, and what is said of the others."""
    first: dict[str, Seen] = {}
    twins = []
    for one in seen:
        other = first.setdefault(one.digest, one)
        if other is not one:
            note = f"{one.source.path.name} has the same bytes as {other.source.path.name}: it comes in once"
            twins.append(replace(one.told("twin"), parts=(), notes=(note,)))
    return list(first.values()), twins


def _natural(path: Path) -> list[Any]:
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", str(path))]


def _see(source: Source, how: Reading) -> Seen:
    names.check_text("the name of the source", str(source.path.absolute()))
    stamp = source.stamp()
    found, dropped = keepable(read(source, how))
    summary = replace(found, parts=dict.fromkeys(found.parts), extra=dict.fromkeys(found.extra))
    summary = replace(summary, notes=(*found.notes, *dropped))
    return Seen(source=source, stamp=stamp, digest=source.digest(), found=summary)
