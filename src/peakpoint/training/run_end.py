"""The end of a training: the last state is saved whatever the rules say, and people are told how it ended."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from peakpoint.format.manifest import Manifest
from peakpoint.training.loop import Loop
from peakpoint.training.outcome import Outcome
from peakpoint.training.shared_writer import SharedWriter

_REASON = "the end of the training: the run continues from here"


class RunEnd:
    """Knows whether the present state is saved, and says and does what belongs to the end of a loop.

    Args:
        save: saves a moment.
        announce: tells people.
    """

    def __init__(
        self, loop: Loop, writer: SharedWriter, save: Callable[[Manifest], Outcome], announce: Callable[[str], None]
    ) -> None:
        self._loop, self._writer, self._save, self._announce = loop, writer, save, announce
        self._saved_at = loop.progress

    def mark_saved(self) -> None:
        """Note that the present state is saved, or that there is nothing in it yet."""
        self._saved_at = self._loop.progress

    def end_loop(self, kind: str, begun: int, total: int, why_stop: str | None, metrics: Mapping[str, float]) -> None:
        """End a loop that has run to its end, or that is stopped.

        Args:
            kind: ``"epoch"`` or ``"step"``.
            begun: how many were complete when the loop began.
            total: how many there should be.
            why_stop: why there are no more; None when all are complete.
            metrics: of the last report.
        """
        complete = self._loop.complete(kind)
        self.save_last(metrics)
        if why_stop is not None:
            place = f"stopped early at {kind} {complete - 1}" if complete else "stopped early"
            self._announce(f"{place} because {why_stop}" + ("; nothing left to do" if begun == complete else ""))
        elif begun == complete:
            progress = f"{complete} of {total} {kind}s are complete"
            beyond = f"{complete} {kind}s are complete, and {total} are asked for"
            self._announce(f"nothing left to do: {progress if complete <= total else beyond}")

    def save_last(self, metrics: Mapping[str, float]) -> None:
        """Save the present state if it is not saved, with the metrics of the last report if they are still its own."""
        if self._saved_at == self._loop.progress or not self._loop.position.report:
            return
        own_metrics = {} if self._loop.trained else metrics
        self._loop.catch_up()
        moment = self._writer.moment(self._loop.position, own_metrics)
        self._save(replace(moment, reasons=(_REASON,)))
