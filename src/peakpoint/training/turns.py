"""The reports of one turn of a loop, and whether the state still was theirs when the turn ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format.manifest import Manifest
from peakpoint.state.step_guard import StepGuard
from peakpoint.training.moves import Look, Moves, look, moves


@dataclass(frozen=True, slots=True)
class Late:
    """What moved after a report in its turn.

    Attributes:
        moves: what moved.
        saved: the moments of reports that are being saved, or were, although a training that continues from them would
            differ.
    """

    moves: Moves
    saved: tuple[Manifest, ...]

    @property
    def reason(self) -> str:
        """Why those checkpoints go."""
        return f"{self._what} after its report, in the same turn of the loop"

    def error(self, done: str) -> ConfigError:
        """The error of the turn; ``done`` says what has become of the state."""
        so, inside = "a run resumed from that report would have these one step behind", ""
        if self.moves.stepped:
            so = "a run resumed from that report would skip what was trained after it"
            inside = ". To report inside an epoch, loop over ckpt.batches(loader)"
        return ConfigError(
            f"{self._what} after ckpt.report() in the same turn of the loop: {so}. Make ckpt.report() the last thing "
            f"in the body of the loop, after scheduler.step() and the like, and run the same command again{inside}. "
            f"{done}"
        )

    @property
    def _what(self) -> str:
        names = " and ".join(f"state[{name!r}]" for name in self.moves.wrong)
        return f"{names} {'was stepped' if self.moves.stepped else 'moved'}"

    def warnings(self) -> Mapping[str, str]:
        """What is no error, by a key for each kind."""
        said = {}
        if self.moves.generators:
            said["generators after report"] = (
                f"{' and '.join(self.moves.generators)} random numbers were drawn after ckpt.report() in the same turn "
                "of the loop: a run resumed from that report draws other numbers. Make ckpt.report() the last thing "
                "in the body of the loop, or give what draws after it a generator of its own"
            )
        if self.moves.weights:
            said["weights after report"] = (
                f"{' and '.join(f'state[{name!r}]' for name in self.moves.weights)} changed after ckpt.report() in the "
                "same turn of the loop, and not by a step of an optimizer: a run resumed from that report goes on with "
                "the weights of the report. Unless they are meant to differ (averaged weights, swapped in for an "
                "evaluation), make ckpt.report() the last thing in the body of the loop"
            )
        return said


class Turns:
    """Looks at the state when a report is made, and again when the turn of the loop ends.

    Done for the first turn with a report, so that a mistake is noticed at once, and for every turn that saves.

    Args:
        state: the parts of the state.
        guard: counts the steps of the optimizers.
    """

    def __init__(self, state: Mapping[str, Any], guard: StepGuard) -> None:
        self._state, self._guard = state, guard
        self._first = True
        self._reports: list[tuple[Look, Manifest | None]] = []
        self._left: tuple[Late, Look] | None = None

    def reported(self, moment: Manifest | None) -> None:
        """A report has been made; ``moment`` is what is being saved of it."""
        if self._first or moment is not None:
            self._reports.append((self._look(), moment))

    def taken_back(self) -> tuple[Manifest, ...]:
        """Forget the reports of this turn; returns the moments that are being saved."""
        reports, self._reports = self._reports, []
        return tuple(moment for _, moment in reports if moment is not None)

    def ended(self) -> Late | None:
        """The body of the loop has run to its end; returns what moved after a report."""
        reports, self._reports = self._reports, []
        if not reports:
            return None
        self._first = False
        now = self._look()
        moved = [moves(seen, now) for seen, _ in reports]
        if any(moved):
            unsteady = moves(now, self._look())  # what differs from itself says nothing
            moved = [each - unsteady for each in moved]
        wrong = [moment for each, (_, moment) in zip(moved, reports, strict=True) if each.wrong and moment is not None]
        return Late(sum(moved, Moves()), tuple(wrong)) if any(moved) else None

    def left(self) -> None:
        """The loop has been left in the middle, by ``break`` or by an exception; nobody knows which yet."""
        late = self.ended()
        if late is not None and late.moves.wrong:
            self._left = late, self._look()

    def owed(self) -> tuple[Late, bool] | None:
        """What moved before the loop was left, and whether the state is still what it was then; told once."""
        left, self._left = self._left, None
        return None if left is None else (left[0], not moves(left[1], self._look()))

    def _look(self) -> Look:
        return look(self._state, self._guard.steps)
