"""Where moments go in a run that holds some already: nothing may come before what is there. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peakpoint.errors import ConflictError
from peakpoint.importing.timeline import Moment
from peakpoint.journal import Reported
from peakpoint.manifest import Manifest, metrics_to_json

COUNTED = "counted_step"  # in a manifest's written_by: no file has told the step


@dataclass(frozen=True, slots=True)
class Placed:
    """A moment and its place.

    Attributes:
        report: the number of the report.
        moment: with the step that it has in the run.
        new: whether the history has to be told.
    """

    report: int
    moment: Moment
    new: bool


def placed(
    moments: Sequence[Moment],
    there: Mapping[int, Manifest],
    gone: frozenset[int],
    newest: Manifest | None,
    history: Sequence[Reported],
) -> list[Placed]:
    """The place of every moment.

    What is there keeps its report and its step. What is new comes after the newest checkpoint: by its place among the
    sources if that checkpoint is one of them, otherwise by step where both tell it, and by epoch where they do not.

    Args:
        moments: in their order.
        there: number of a source to its checkpoint.
        gone: sources that have been here and were removed since.
        newest: the newest checkpoint.
        history: the reports up to it.

    Raises:
        OutOfPlaceError: a moment is not what it was, or does not come after what is there.
    """
    if newest is None:
        return [Placed(report, moment, new=True) for report, moment in enumerate(moments, 1)]
    at = next((i for i, one in enumerate(moments) if any(there.get(n) is newest for n in one.taken)), None)
    told = not all(COUNTED in one.written_by for one in (*there.values(), newest)) or any(
        not moment.counted for moment in moments
    )
    last = Moment(newest.epoch, newest.step, newest.metrics, counted=COUNTED in newest.written_by)
    report, found = newest.report, list[Placed]()
    for index, moment in enumerate(moments):
        old = next((there[number] for number in moment.taken if number in there), None)
        if old is not None:
            _check_same(moment, there, old)
            if old is not newest and any(number not in there and number not in gone for number in moment.taken):
                raise _early(moment, last)
            found.append(Placed(old.report, replace(moment, step=old.step), new=False))
        elif index > at if at is not None else _after(moment, last):
            report += 1
            if moment.counted:
                moment = replace(moment, step=last.step if told else report)  # noqa: PLW2901 - the same, with its step
            if moment.step < last.step:
                raise _early(moment, last)
            last = moment
            found.append(Placed(report, moment, new=True))
        elif (before := _found(moment, history)) is not None and gone.issuperset(moment.taken):
            found.append(Placed(before, moment, new=False))
        elif moment.taken and gone.issuperset(moment.taken):
            found.append(Placed(0, moment, new=False))
        else:
            raise _early(moment, last) if moment.taken else _other(moment)
    return found


class OutOfPlaceError(ConflictError):
    """A moment cannot go where it would have to.

    Attributes:
        number: of its source; None when it has none.
    """

    def __init__(self, moment: Moment, why: str) -> None:
        super().__init__(f"{why}: import all into another run")
        self.number = next(iter(moment.taken), None)


def _early(moment: Moment, last: Moment) -> OutOfPlaceError:
    return OutOfPlaceError(moment, f"it is of {_text(moment)}, and not after {_text(last)}, which is there")


def _other(moment: Moment) -> OutOfPlaceError:
    return OutOfPlaceError(moment, "what is there was imported with other files, metrics or options")


def _text(moment: Moment) -> str:
    if not moment.counted:
        return f"step {moment.step}" if moment.epoch is None else f"epoch {moment.epoch}, step {moment.step}"
    return "no known epoch or step" if moment.epoch is None else f"epoch {moment.epoch}"


def _after(moment: Moment, last: Moment) -> bool:
    if not moment.counted and not last.counted:
        return (moment.step, -1 if moment.epoch is None else moment.epoch) > (
            last.step,
            -1 if last.epoch is None else last.epoch,
        )
    if moment.epoch is not None and last.epoch is not None:
        return moment.epoch > last.epoch
    known = moment.epoch is not None or not moment.counted
    return known and last.counted and last.epoch is None


def _check_same(moment: Moment, there: Mapping[int, Manifest], old: Manifest) -> None:
    for number in moment.taken:
        one = there.get(number, old)
        same = (one.report, one.epoch, metrics_to_json(one.metrics)) == (
            old.report,
            moment.epoch,
            metrics_to_json(moment.metrics),
        )
        if not same or not (moment.counted or moment.step == one.step):
            raise _other(moment)


def _found(moment: Moment, history: Sequence[Reported]) -> int | None:
    """The report that a moment without a checkpoint of its own has been."""
    for one in history:
        same = (one.epoch, metrics_to_json(one.metrics)) == (moment.epoch, metrics_to_json(moment.metrics))
        if same and (moment.counted or one.step == moment.step):
            return one.report
    return None
