"""What goes into a report, and what comes out of it."""

import os
import platform
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peakpoint._version import __version__
from peakpoint.errors import PeakpointWarning
from peakpoint.repository.provenance import script_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a report.

    Attributes:
        saved: whether this moment is being saved; it is durable after ``wait``.
        reasons: why, one sentence a claim; empty when it is not saved.
        should_stop: whether the loop should end.
        why_stop: why; None when it should go on.
        name: the checkpoint's name; None when this moment is not saved.
        step: optimizer steps completed.
        epoch: the epoch's index, None outside epochs.
        waited_seconds: how long this report waited for the save before it.
        capture_seconds: how long this report took to copy what it had to copy at once.
        step_waited_seconds: how long the optimizers waited, since the save before, for the rest of its copy.
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


def say(text: str) -> None:
    """Print to standard error, where it disturbs no output that is piped on."""
    sys.stderr.write(f"peakpoint: {text}\n")
    sys.stderr.flush()


def warn(message: str) -> None:
    """Warn at the line of the training, however many frames of ours are between."""
    frame, level = sys._getframe(), 1  # noqa: SLF001 - from Python 3.12 on: skip_file_prefixes
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("peakpoint."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PeakpointWarning, stacklevel=level)


def written_by(*, trains: bool = True) -> dict[str, str]:
    """This process, for records: host, process id, versions; if it trains, that of the code where git knows it."""
    code = script_version() if trains else None
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "peakpoint": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({} if code is None else {"code": code}),
    }


def classes(state: Mapping[str, Any]) -> dict[str, str]:
    """The class of each part, for people and reports.

    Example:
        >>> classes({"model": torch.nn.Linear(1, 1)})
        {'model': 'torch.nn.modules.linear.Linear'}
    """
    return {part: f"{type(value).__module__}.{type(value).__qualname__}" for part, value in state.items()}
