"""Check that the state did not change after its report, when an iteration of a loop ends."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peakpoint.errors import ConfigError, SaveFailedError
from peakpoint.format.manifest import Manifest
from peakpoint.training.loop import Loop
from peakpoint.training.outcome import Outcome, WarnOnce
from peakpoint.training.ranks import Ranks
from peakpoint.training.shared_writer import SharedWriter
from peakpoint.training.state_changes import StateChanges, StateSample, changes, sample


@dataclass(frozen=True, slots=True)
class LateChanges:
    """The changes after a report in its iteration.

    Attributes:
        saved: the moments of reports that are being saved, or were, although a training that continues from them would
            differ.
    """

    changes: StateChanges
    saved: tuple[Manifest, ...]

    @property
    def reason(self) -> str:
        """Why those checkpoints are removed."""
        return f"{self._changed_parts} after its report, in the same iteration of the loop"

    def error(self, consequence: str) -> ConfigError:
        """Make the error of the iteration; ``consequence`` says what has become of the state."""
        effect, hint = "a run resumed from that report would have these one step behind", ""
        if self.changes.stepped:
            effect = "a run resumed from that report would skip what was trained after it"
            hint = ". To report inside an epoch, loop over ckpt.batches(loader)"
        return ConfigError(
            f"{self._changed_parts} after ckpt.report() in the same iteration of the loop: {effect}. Make "
            "ckpt.report() the last line in the body of the loop, after scheduler.step() and the like, and run the "
            f"same command again{hint}. {consequence}"
        )

    @property
    def _changed_parts(self) -> str:
        names = " and ".join(f"state[{name!r}]" for name in self.changes.wrong)
        return f"{names} {'was stepped' if self.changes.stepped else 'changed'}"

    def warnings(self) -> Mapping[str, str]:
        """Return warnings of changes that are not errors, by a key for each kind."""
        texts = {}
        if self.changes.generators:
            texts["generators after report"] = (
                f"{' and '.join(self.changes.generators)} random numbers were drawn after ckpt.report() in the same "
                "iteration of the loop: a run resumed from that report draws other numbers. Make ckpt.report() the "
                "last line in the body of the loop, or give the code that draws after it a generator of its own"
            )
        if self.changes.weights:
            texts["weights after report"] = (
                f"{' and '.join(f'state[{name!r}]' for name in self.changes.weights)} changed after ckpt.report() in "
                "the same iteration of the loop, and not by a step of an optimizer: a run resumed from that report "
                "goes on with the weights of the report. Unless they are meant to differ (averaged weights, swapped "
                "in for an evaluation), make ckpt.report() the last line in the body of the loop"
            )
        return texts


class LateChangeCheck:
    """Samples the state when a report is made, and again when the iteration ends; refuses what has changed between.

    Done for the first iteration with a report, so that a mistake is noticed at once, and for every one that saves.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        writer: SharedWriter,
        loop: Loop,
        save: Callable[[Manifest], Outcome],
        ranks: Ranks,
    ) -> None:
        self._state, self._writer, self._loop, self._save, self._ranks = state, writer, loop, save, ranks
        self._warn_once = WarnOnce()
        self._first = True
        self._reports: list[tuple[StateSample, Manifest | None]] = []
        self._was_left = False  # in the middle, after a report
        self._pending: tuple[LateChanges, StateSample] | None = None

    def reported(self, moment: Manifest | None) -> None:
        """Note a report; ``moment`` is its checkpoint if it is being saved."""
        if self._first or moment is not None:
            self._reports.append((self._sample(), moment))

    def withdraw_reports(self) -> tuple[Manifest, ...]:
        """Forget the reports of this iteration; returns the moments that are being saved."""
        reports, self._reports = self._reports, []
        return tuple(moment for _, moment in reports if moment is not None)

    def end(self) -> None:
        """End an iteration.

        Raises:
            ConfigError: a change after a report makes its checkpoint wrong; the state has been saved again.
        """
        if not self._reports:
            return
        late_changes = next(filter(None, self._ranks.share("report", self._take_changes)), None)
        if late_changes is None:
            return
        if late_changes.changes.wrong:
            self._loop.catch_up()
            raise late_changes.error(self._save_again(late_changes))
        for key, text in late_changes.warnings().items():
            self._warn_once(key, text)

    def interrupted(self) -> None:
        """Note that the loop was left in the middle, by ``break`` or by an exception; which, is not known yet."""
        self._was_left = self._was_left or bool(self._reports)
        late_changes = self._take_changes()
        if late_changes is not None and late_changes.changes.wrong:
            self._pending = late_changes, self._sample()

    def end_interrupted(self) -> None:
        """End an iteration that was left by ``break``, once it is known that it was not an exception; see ``end``."""
        pending, was_left, self._pending, self._was_left = self._pending, self._was_left, None, False
        if not was_left:
            return
        pairs = self._ranks.share("report", lambda: pending and (pending[0], bool(changes(pending[1], self._sample()))))
        pair = next(filter(None, pairs), None)
        if pair is None:
            return
        late_changes, has_changed = pair
        if not has_changed:
            raise late_changes.error(self._save_again(late_changes))
        reports = ", ".join(f"report {moment.report} at step {moment.step}" for moment in late_changes.saved)
        raise late_changes.error(f"The checkpoints stay as they were at the report ({reports})" if reports else "")

    def _save_again(self, late_changes: LateChanges) -> str:
        """Save the state as it is now, and remove what was saved too early; returns a sentence on both."""
        if not late_changes.saved:
            return "Nothing was saved in this iteration"
        self._writer.forget({moment.id for moment in late_changes.saved})
        moment = replace(late_changes.saved[-1], id=secrets.token_hex(8), step=self._loop.position.step)
        if late_changes.changes.stepped:  # the metrics are those of other weights
            moment = replace(moment, metrics={}, reasons=("the training went on after its report",))
        try:
            name = self._save(moment).name
            self._writer.wait()
        except SaveFailedError as error:
            return f"The present state could not be saved, so that of the report stays: {error}"
        self._writer.remove(late_changes.saved, late_changes.reason)
        return f"Nothing is lost: the present state is saved as {name} and replaces that of the report"

    def _take_changes(self) -> LateChanges | None:
        """Return the changes after the reports of this iteration, and forget these."""
        reports, self._reports = self._reports, []
        if not reports:
            return None
        self._first = False
        end = self._sample()
        by_report = [changes(at_report, end) for at_report, _ in reports]
        if any(by_report):
            unsteady = changes(end, self._sample())  # a state that differs from itself shows nothing
            by_report = [changed - unsteady for changed in by_report]
        moments = [moment for _, moment in reports]
        wrong = [
            moment for changed, moment in zip(by_report, moments, strict=True) if changed.wrong and moment is not None
        ]
        return LateChanges(sum(by_report, StateChanges()), tuple(wrong)) if any(by_report) else None

    def _sample(self) -> StateSample:
        return sample(self._state, self._writer.guard.steps)
