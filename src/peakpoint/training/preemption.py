"""Preemption: a scheduler's signal becomes a save at the next report and an orderly exit."""

import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.training.outcome import warn


@dataclass(frozen=True, slots=True)
class Preempt:
    """The reaction to a scheduler's signal that the machine will be taken away.

    The signals are noted when they arrive. The next report saves that moment, waits until it is durable, runs the
    handlers that were installed before, and leaves with ``SystemExit(exit_code)``. Run the same command again to go on.

    Args:
        signals: which signals announce it.
        exit_code: 75 by default, "try again later". Source: sysexits.h, EX_TEMPFAIL.

    Raises:
        ConfigError: an exit code outside 0 to 255, or a signal that no process can catch.
    """

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)
    exit_code: int = 75

    def __post_init__(self) -> None:
        if not isinstance(self.signals, Iterable):
            raise ConfigError(f"Preempt: signals are given as a tuple, such as (signal.SIGTERM,), not {self.signals!r}")
        if not isinstance(self.exit_code, int) or not 0 <= self.exit_code <= 255:
            raise ConfigError(f"Preempt: exit_code must be between 0 and 255, not {self.exit_code!r}")
        for number in self.signals:
            if number in (signal.SIGKILL, signal.SIGSTOP) or number not in signal.valid_signals():
                raise ConfigError(f"Preempt: {number!r} is not a signal that a process can catch")


class SignalWatch:
    """Notes the arrival of signals between ``__init__`` and ``stop``; None watches none."""

    def __init__(self, preempt: Preempt | None) -> None:
        self._earlier: dict[signal.Signals, Any] = {}
        self._arrived: list[signal.Signals] = []
        self._undelivered: list[tuple[signal.Signals, Any]] = []  # signals that had arrived at ``stop``, with handlers
        self._stopped = False
        if preempt is None:
            return
        if threading.current_thread() is not threading.main_thread():
            warn(
                "preemption signals are not watched: Python delivers them to the main thread only, and this "
                "Checkpointer was made in another; pass preempt=None to silence this warning"
            )
            return
        for number in preempt.signals:
            self._earlier[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of handlers
        if self._stopped:  # in another thread than the main one
            self._put_back()
            signal.raise_signal(number)
        else:
            self._arrived.append(signal.Signals(number))

    @property
    def arrived(self) -> signal.Signals | None:
        """The first signal that has arrived."""
        return self._arrived[0] if self._arrived else None

    def stop(self) -> None:
        """Put the earlier handlers back."""
        self._stopped = True
        self._undelivered = [(number, self._earlier[number]) for number in dict.fromkeys(self._arrived)]
        if threading.current_thread() is threading.main_thread():
            self._put_back()  # Python lets no other thread do it; there the next signal does
        self._arrived = []

    def _put_back(self) -> None:
        for number, handler in self._earlier.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._earlier = {}

    def run_earlier(self) -> None:
        """Run the handlers that were installed before, in the order in which the signals came."""
        for number, handler in self._undelivered:
            if callable(handler):
                handler(number, sys._getframe())  # noqa: SLF001 - handlers are called with a frame

    def deliver_again(self) -> None:
        """Raise every signal that had arrived again, for its own handler, or to end the process."""
        for number, _ in self._undelivered:
            signal.raise_signal(number)
