"""The outcome of a report, and what a training says to people."""

import sys
import warnings
from dataclasses import dataclass

from peakpoint.errors import PeakpointWarning, printable_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a report.

    Attributes:
        saved: whether this moment is being saved; it is durable after ``wait``.
        reasons: why, one sentence a claim; empty when it is not saved.
        should_stop: whether the loop should end.
        why_stop: why; None when it should go on.
        name: the checkpoint's name; None when this moment is not saved.
        step: optimizer steps completed.
        epoch: the epoch's index, None outside epochs.
        waited_seconds: how long this report waited for the previous save.
        capture_seconds: how long this report copied before it returned.
        step_waited_seconds: how long the optimizers waited for the rest of the previous copy.
    """

    saved: bool
    reasons: tuple[str, ...]
    should_stop: bool
    why_stop: str | None
    name: str | None
    step: int
    epoch: int | None
    waited_seconds: float
    capture_seconds: float
    step_waited_seconds: float


class WarnOnce:
    """Warns once for each key."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        """Warn, unless something with this key was warned of."""
        if key not in self._keys:
            self._keys.add(key)
            warn(message)


def print_note(text: str) -> None:
    """Print to standard error, where it disturbs no output that is piped on."""
    sys.stderr.write(f"peakpoint: {printable_lines(text)}\n")
    sys.stderr.flush()


def warn(message: str) -> None:
    """Warn at the line of the training, however many frames of ours are between."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - from Python 3.12 on: skip_file_prefixes
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("peakpoint."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PeakpointWarning, stacklevel=level)
