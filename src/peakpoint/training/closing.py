"""The end of a checkpointer: by hand, by a block, by a signal, or with the interpreter."""

import os
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from peakpoint.errors import ConfigError, ConflictError, Error, SaveFailedError
from peakpoint.format.events import STOPPED
from peakpoint.format.manifest import Manifest
from peakpoint.training import exit_hook
from peakpoint.training.late_changes import LateChangeCheck
from peakpoint.training.loop import Loop
from peakpoint.training.outcome import Outcome, print_note, warn
from peakpoint.training.preemption import SignalWatch
from peakpoint.training.ranks import Ranks
from peakpoint.training.run_end import RunEnd
from peakpoint.training.shared_writer import SharedWriter


class Closing:
    """What a checkpointer does at its end; ``Checkpointer`` has the rest."""

    _closed = True  # until it is made
    _failed_saves = 0  # that were warned of
    _announce: Callable[[str], None] = staticmethod(print_note)
    run: str
    _process: int
    _exit_code: int
    _only_warns: bool
    _last_metrics: Mapping[str, float] | None
    _end: RunEnd
    _late_changes: LateChangeCheck
    _loop: Loop
    _signals: SignalWatch
    _ranks: Ranks
    _writer: SharedWriter

    @property
    def why_stop(self) -> str | None:
        """Why the loop should end, None when it should go on."""
        raise NotImplementedError

    def _save(self, moment: Manifest) -> Outcome:
        raise NotImplementedError

    def close(self) -> None:
        """Wait for the save under way, write a failed one again, and let go of the run. The second call does nothing.

        The state of the last report is saved if it is not yet, and nothing was trained since. When nothing was left to
        do since ``resume``, the rules are applied now.

        Raises:
            SaveFailedError: a save failed, and failed again; checkpoints committed earlier are untouched.
        """
        can_save = sys.exception() is None and self._ranks.can_meet
        save_last = can_save and self._loop.knows_steps and not self._loop.trained
        self._close(save_last=save_last, together=can_save)

    def _close_unfinished(self) -> None:
        """Close a training of which nobody knows how it ended: nothing that no rule has claimed is saved."""
        self._close(save_last=False, together=False)

    def _close(self, *, save_last: bool, together: bool) -> None:
        self._check_process()
        if self._closed:
            return
        try:
            if together:
                self._ranks.share("close", lambda: None)
            if together or self._ranks.size == 1:
                self._late_changes.end_interrupted()
            if save_last and self._writer.started:
                self._end.save_last(self._last_metrics or {})
        except Error as error:
            self.__exit__(type(error), error, None)
            raise
        why = "closed" if self.why_stop is None else f"{STOPPED}{self.why_stop}"
        # Ctrl-C right after the warning of what the rules will remove keeps it
        self._finish(why, apply_rules=sys.exception() is None, together=together)
        self._signals.deliver_again()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if self._closed or self._process != os.getpid():
            return
        self._late_changes.interrupted()  # the loop's own generator is still open
        try:
            if self._ranks.size == 1:  # the others may not come here
                self._late_changes.end_interrupted()
        except Error as late_change:
            error.add_note(f"peakpoint: besides, {late_change}")
        try:
            self._finish(f"{type(error).__name__}: {error}"[:500])
        except SaveFailedError as failed_save:
            if not isinstance(error, SaveFailedError):
                error.add_note(f"peakpoint: besides, {failed_save}")
        if not isinstance(error, SystemExit):
            self._signals.deliver_again()

    def __del__(self) -> None:
        if not self._closed and self._process == os.getpid():
            exit_hook.close_soon(self.run, self._close_unfinished)

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise ConfigError(f"the checkpointer of run {self.run!r} is closed; make a new one to go on")

    def _check_process(self) -> None:
        """Refuse a checkpointer that a fork has inherited: its threads, lock and journal are those of the parent."""
        if self._process != os.getpid():
            raise ConflictError(
                f"this checkpointer of run {self.run!r} belongs to process {self._process}, and this is a fork of it, "
                f"process {os.getpid()}: report and save in the process that trains, or make a checkpointer here"
            )

    def _save_or_warn(self, moment: Manifest) -> Outcome:
        """Save a moment; a failure of an earlier save is an error or a warning, as ``on_save_error`` says."""
        try:
            return self._save(moment)
        except SaveFailedError as error:
            if not isinstance(error.outcome, Outcome):
                raise
            self._raise_or_warn(error)
            return error.outcome

    def _raise_or_warn(self, error: SaveFailedError) -> None:
        if not self._only_warns:
            raise error
        self._failed_saves += 1
        warn(str(error))

    def _leave(self, signal: str, outcome: Outcome) -> None:
        """End a preempted process: everything is made durable, then earlier handlers run."""
        failed_before = self._failed_saves
        self._finish(f"preempted by {signal}", together=True)
        is_saved = outcome.saved and failed_before == self._failed_saves
        self._announce(
            f"{signal}: {'saved' if is_saved else 'NOT saved'} at step {outcome.step}; leaving with exit code "
            f"{self._exit_code}, run the same command again to go on"
        )
        self._signals.run_earlier()
        raise SystemExit(self._exit_code)

    def _finish(self, why: str, *, apply_rules: bool = False, together: bool = False) -> None:
        """Make everything durable, and let go of the run, the optimizers and the signals."""
        self._closed = True
        try:
            self._writer.finish(why, apply_rules=apply_rules, together=together)
        except SaveFailedError as error:
            self._raise_or_warn(error)
        finally:
            self._loop.stop()
            self._signals.stop()
        if self._failed_saves:
            times = "once" if self._failed_saves == 1 else f"{self._failed_saves} times"
            self._announce(f"a save failed {times} in this training; the warnings say which, and why")
