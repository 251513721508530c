"""Where moments go in a run that holds some already: nothing may come before what is there. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peakpoint.errors import ConflictError
from peakpoint.exchange.moments import Moment
from peakpoint.format.events import Reported
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json

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
    rest: Sequence[Reported] = (),
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
        rest: those after it, of logs or of an import that was cut short. They are told again, in their places.

    Raises:
        OutOfPlaceError: a moment is not what it was, or does not come after what is there.
    """
    if newest is None:
        return [Placed(report, moment, new=True) for report, moment in enumerate(moments, 1)]
    at = next((i for i, one in enumerate(moments) if any(there.get(n) is newest for n in one.taken)), None)
    counting = all(COUNTED in one.written_by for one in (*there.values(), newest))
    line = _Line(newest, rest, counting=counting and all(moment.counted for moment in moments))
    for index, moment in enumerate(moments):
        old = next((there[number] for number in moment.taken if number in there), None)
        # the report that a moment without a checkpoint of its own has been
        before = next((one.report for one in history if _is_of(moment, one)), None)
        if old is not None:
            _check_same(moment, there, old)
            if old is not newest and any(number not in there and number not in gone for number in moment.taken):
                raise _early(moment, line.base)
            line.found.append(Placed(old.report, replace(moment, step=old.step, metrics=old.metrics), new=False))
        elif index > at if at is not None else _after(moment, line.base):
            line.goes_on(moment)
        elif gone.issuperset(moment.taken) and (moment.taken or before):
            line.found.append(Placed(before or 0, moment, new=False))
        else:
            raise _early(moment, line.base) if moment.taken else _other(moment)
    return line.whole()


class _Line:
    """Goes on with a run after its newest checkpoint."""

    def __init__(self, newest: Manifest, rest: Sequence[Reported], *, counting: bool) -> None:
        self.base = Moment(newest.epoch, newest.step, newest.metrics, counted=COUNTED in newest.written_by)
        self.found: list[Placed] = []
        self._report, self._step, self._counting = newest.report, newest.step, counting
        self._waiting = list(rest)

    def _tell(self, moment: Moment) -> None:
        self.found.append(Placed(self._report, moment, new=True))

    def goes_on(self, moment: Moment) -> None:
        """Place a new moment, and in front of it what was told without a checkpoint."""
        while self._waiting and not (same := _same_place(self._waiting[0], moment, self.base)):
            if not _before(self._waiting[0], moment):
                break
            self._again(self._waiting.pop(0))
        if self._waiting and same:
            moment = replace(moment, metrics={**self._waiting.pop(0).metrics, **moment.metrics})
        self._report += 1
        if moment.counted:
            moment = replace(moment, step=self._report if self._counting else self._step)
        if moment.step < self._step:
            raise _early(moment, self.base)
        self._step = moment.step
        self._tell(moment)

    def _again(self, told: Reported) -> None:
        self._report += 1
        self._tell(Moment(told.epoch, told.step, told.metrics))

    def whole(self) -> list[Placed]:
        """All of it, with what was told and comes last."""
        for told in self._waiting:
            self._again(told)
        return self.found


def _same_place(report: Reported, moment: Moment, base: Moment) -> bool:
    """Whether a report is of this moment. A log's row without a step has got that of the moment before."""
    if report.epoch != moment.epoch:
        return False
    if moment.counted:
        return moment.epoch is not None or metrics_to_json(report.metrics) == metrics_to_json(moment.metrics)
    return report.step == moment.step or (moment.epoch is not None and report.step == base.step)


def _before(report: Reported, moment: Moment) -> bool:
    if report.epoch is not None and moment.epoch is not None and report.epoch != moment.epoch:
        return report.epoch < moment.epoch
    return not moment.counted and report.step < moment.step


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
        return _order(moment) > _order(last)
    if moment.epoch is not None and last.epoch is not None:
        return moment.epoch > last.epoch
    known = moment.epoch is not None or not moment.counted
    return known and last.counted and last.epoch is None


def _order(moment: Moment) -> tuple[int, int]:
    return moment.step, -1 if moment.epoch is None else moment.epoch


def _check_same(moment: Moment, there: Mapping[int, Manifest], old: Manifest) -> None:
    for number in moment.taken:
        one = there.get(number, old)
        if one.report != old.report or not _is_of(moment, one):
            raise _other(moment)


def _is_of(moment: Moment, told: Reported | Manifest) -> bool:
    """Whether something is of this moment, and tells all its metrics with these values; NaN is the same as NaN."""
    same = told.epoch == moment.epoch and (moment.counted or told.step == moment.step)
    return same and metrics_to_json(moment.metrics).items() <= metrics_to_json(told.metrics).items()
