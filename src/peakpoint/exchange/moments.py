"""The moments of a foreign training in their order, from its checkpoints and its logs. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peakpoint.exchange.metric_logs import EPOCH, STEP, Row, key
from peakpoint.exchange.state_dicts import Foreign


@dataclass(frozen=True, slots=True)
class Moment:
    """One report to be.

    Attributes:
        epoch: the epoch's index, None when it is not known.
        step: steps completed.
        metrics: of this moment.
        taken: numbers of the checkpoints of this moment, as they were given.
        known: whether the checkpoints say where they were taken.
        counted: whether the step is no file's, but made up; see ``timeline``.
    """

    epoch: int | None
    step: int
    metrics: Mapping[str, float]
    taken: tuple[int, ...] = ()
    known: bool = True
    counted: bool = False


@dataclass(slots=True)
class _Place:
    epoch: int | None
    step: int | None
    metrics: dict[str, float]
    taken: list[int] = field(default_factory=list)


def timeline(checkpoints: Sequence[Foreign], rows: Sequence[Row], how: str = "auto") -> tuple[list[Moment], list[str]]:
    """Every moment, earliest first, and what people should know about the order.

    Checkpoints are ordered by step if all of them know it, otherwise by epoch. Those that know neither come first: a
    run must not continue from one of these while another is there. A checkpoint's own metrics come before a log's.

    Args:
        checkpoints: in the order that counts among those that know nothing.
        rows: of logs.
        how: what rows are joined by: ``"epoch"``, ``"step"``, or ``"auto"``.
    """
    places, lost = _places(checkpoints)
    if how == "auto":
        how = _joined_by(rows, places)
    notes, stray = _join(places, rows, how)
    axis = next((axis for axis in (STEP, EPOCH) if all(getattr(place, axis) is not None for place in places)), None)
    stray_axis = EPOCH if axis is None or (how == EPOCH and all(place.epoch is not None for place in places)) else axis
    fitting = [place for place in stray if getattr(place, stray_axis) is not None] if places else []
    if len(fitting) < len(stray):
        notes.append(f"{len(stray) - len(fitting)} rows of metrics join no checkpoint, and have no place among them")
    ordered = sorted([*places, *fitting], key=lambda place: _order(place, stray_axis if fitting else axis))
    return _numbered(lost, ordered, checkpoints), notes


def _joined_by(rows: Sequence[Row], places: Sequence[_Place]) -> str:
    """Whether rows go with moments by epoch or by step: by what more of them share.

    TensorBoard knows steps only, and many scripts give it the epoch for one: such rows may be joined by epoch, too.
    """
    by_step = len({row.step for row in rows} & ({place.step for place in places} - {None}))
    by_epoch = len({key(row, EPOCH) for row in rows} & ({place.epoch for place in places} - {None}))
    all_have = bool(rows) and all(row.epoch is not None for row in rows)
    return EPOCH if by_epoch > by_step or (by_epoch == by_step and all_have) else STEP


def _places(checkpoints: Sequence[Foreign]) -> tuple[list[_Place], list[int]]:
    """Moments of checkpoints; those with contradicting metrics are moments of their own. And those without any."""
    places: list[_Place] = []
    lost = []
    for number, one in enumerate(checkpoints):
        if one.epoch is None and one.step is None:
            lost.append(number)
            continue
        for place in places:
            same = (place.epoch, place.step) == (one.epoch, one.step)
            if same and all(place.metrics.get(name, value) == value for name, value in one.metrics.items()):
                place.metrics |= one.metrics
                place.taken.append(number)
                break
        else:
            places.append(_Place(one.epoch, one.step, dict(one.metrics), [number]))
    return places, lost


def _join(places: Sequence[_Place], rows: Sequence[Row], how: str) -> tuple[list[str], list[_Place]]:
    stray = []
    for row in rows:
        at = key(row, how)
        joined = [place for place in places if at is not None and getattr(place, how) == at]
        for place in joined:
            place.metrics = {**row.metrics, **place.metrics}
        if not joined:
            epoch, step = (at, row.step if row.epoch is not None else None) if how == EPOCH else (row.epoch, row.step)
            stray.append(_Place(epoch, step, dict(row.metrics)))
    if not rows:
        return [], []
    return [f"{len(rows) - len(stray)} of {len(rows)} rows of metrics join a checkpoint, by {how}"], stray


def _order(place: _Place, axis: str | None) -> tuple[int, int]:
    epoch, step = (-1 if value is None else value for value in (place.epoch, place.step))
    return (step, epoch) if axis == STEP else (epoch, step)


def _numbered(lost: Sequence[int], ordered: Sequence[_Place], checkpoints: Sequence[Foreign]) -> list[Moment]:
    """Steps for those that have none: of the moment before; where nobody tells a step, the number of the report."""
    moments = [
        Moment(None, 0 if ordered else report, dict(checkpoints[number].metrics), (number,), known=False, counted=True)
        for report, number in enumerate(lost, 1)
    ]
    told = any(place.step is not None for place in ordered)
    step = 0
    for report, place in enumerate(ordered, len(lost) + 1):
        step = place.step if place.step is not None else (step if told else report)
        counted = place.step is None
        moments.append(Moment(place.epoch, step, place.metrics, tuple(place.taken), counted=counted))
    return moments
