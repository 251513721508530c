"""The moments of another tool's training in their order, from its checkpoints and its logs. Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peakpoint.exchange.metric_logs import EPOCH, STEP, LogRow, key
from peakpoint.exchange.state_dicts import ForeignCheckpoint


@dataclass(frozen=True, slots=True)
class ImportMoment:
    """One report of the run that an import makes.

    Attributes:
        epoch: the epoch's index, None when it is not known.
        step: steps completed.
        checkpoints: numbers of the checkpoints of this moment, as they were passed in.
        placed: whether the checkpoints say where they were taken.
        counted: whether the step is in no file, but made up; see ``timeline``.
    """

    epoch: int | None
    step: int
    metrics: Mapping[str, float]
    checkpoints: tuple[int, ...] = ()
    placed: bool = True
    counted: bool = False


@dataclass(slots=True)
class _Draft:
    epoch: int | None
    step: int | None
    metrics: dict[str, float]
    checkpoints: list[int] = field(default_factory=list)


def timeline(
    checkpoints: Sequence[ForeignCheckpoint], rows: Sequence[LogRow], join: str = "auto"
) -> tuple[list[ImportMoment], list[str]]:
    """Return every moment, earliest first, and what people should know about the order.

    Checkpoints are ordered by step if all of them have one, otherwise by epoch. Those without both come first: a run
    must not continue from one of these while it has another. A checkpoint's own metrics come before a log's.

    Args:
        checkpoints: in the order that counts among those without epoch and step.
        rows: of logs.
        join: what rows are joined by: ``"epoch"``, ``"step"``, or ``"auto"``.
    """
    drafts, unplaced = _drafts(checkpoints)
    if join == "auto":
        join = _best_join(rows, drafts)
    notes, unjoined = _join(drafts, rows, join)
    axis = next((axis for axis in (STEP, EPOCH) if all(getattr(draft, axis) is not None for draft in drafts)), None)
    by_epoch = axis is None or (join == EPOCH and all(draft.epoch is not None for draft in drafts))
    row_axis = EPOCH if by_epoch else axis
    sortable = [draft for draft in unjoined if getattr(draft, str(row_axis)) is not None] if drafts else []
    if len(sortable) < len(unjoined):
        notes.append(
            f"{len(unjoined) - len(sortable)} rows of metrics join no checkpoint, and have no place among them"
        )
    ordered = sorted([*drafts, *sortable], key=lambda draft: _order(draft, row_axis if sortable else axis))
    return _numbered(unplaced, ordered, checkpoints), notes


def _best_join(rows: Sequence[LogRow], drafts: Sequence[_Draft]) -> str:
    """Return what more of the rows and moments share, epochs or steps.

    TensorBoard has steps only, and many scripts give it the epoch for one: such rows may be joined by epoch, too.
    """
    by_step = len({row.step for row in rows} & ({draft.step for draft in drafts} - {None}))
    by_epoch = len({key(row, EPOCH) for row in rows} & ({draft.epoch for draft in drafts} - {None}))
    all_epochs = bool(rows) and all(row.epoch is not None for row in rows)
    return EPOCH if by_epoch > by_step or (by_epoch == by_step and all_epochs) else STEP


def _drafts(checkpoints: Sequence[ForeignCheckpoint]) -> tuple[list[_Draft], list[int]]:
    """Return the moments of checkpoints, one each where metrics contradict, and the numbers of those without any."""
    drafts: list[_Draft] = []
    unplaced = []
    for number, checkpoint in enumerate(checkpoints):
        epoch, step, metrics = checkpoint.epoch, checkpoint.step, checkpoint.metrics
        if epoch is None and step is None:
            unplaced.append(number)
            continue
        for draft in drafts:
            agrees = all(draft.metrics.get(name, value) == value for name, value in metrics.items())
            if agrees and (draft.epoch, draft.step) == (epoch, step):
                draft.metrics |= metrics
                draft.checkpoints.append(number)
                break
        else:
            drafts.append(_Draft(epoch, step, dict(metrics), [number]))
    return drafts, unplaced


def _join(drafts: Sequence[_Draft], rows: Sequence[LogRow], join: str) -> tuple[list[str], list[_Draft]]:
    """Put the metrics of rows into their moments; returns notes, and moments of the rows that join none."""
    unjoined = []
    drafts_at: defaultdict[int | None, list[_Draft]] = defaultdict(list)
    for draft in drafts:
        drafts_at[getattr(draft, join)].append(draft)
    for row in rows:
        value = key(row, join)
        joined = [] if value is None else drafts_at.get(value, [])
        for draft in joined:
            draft.metrics = {**row.metrics, **draft.metrics}
        if not joined:
            step = None if join == EPOCH and row.epoch is None else row.step
            unjoined.append(_Draft(value if join == EPOCH else row.epoch, step, dict(row.metrics)))
    if not rows:
        return [], []
    return [f"{len(rows) - len(unjoined)} of {len(rows)} rows of metrics join a checkpoint, by {join}"], unjoined


def _order(draft: _Draft, axis: str | None) -> tuple[int, int]:
    epoch, step = (-1 if value is None else value for value in (draft.epoch, draft.step))
    return (step, epoch) if axis == STEP else (epoch, step)


def _numbered(
    unplaced: Sequence[int], ordered: Sequence[_Draft], checkpoints: Sequence[ForeignCheckpoint]
) -> list[ImportMoment]:
    """Give a step to those without: of the moment before; where no file has a step, the number of the report."""
    moments = [
        ImportMoment(
            None, 0 if ordered else report, dict(checkpoints[number].metrics), (number,), placed=False, counted=True
        )
        for report, number in enumerate(unplaced, 1)
    ]
    any_step = any(draft.step is not None for draft in ordered)
    step = 0
    for report, draft in enumerate(ordered, len(unplaced) + 1):
        step = draft.step if draft.step is not None else (step if any_step else report)
        counted = draft.step is None
        moments.append(ImportMoment(draft.epoch, step, draft.metrics, tuple(draft.checkpoints), counted=counted))
    return moments
