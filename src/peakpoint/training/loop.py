"""The loop of a checkpointer: its epochs, steps and batches, and its position."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import torch

from peakpoint.errors import ConfigError
from peakpoint.training.position import Batches, Position, begin_pass, continue_pass, is_restored, start_pass

LoopMethod = Callable[[int, Callable[[], bool], Callable[[], None]], Iterator[int]]  # ``Loop.epochs`` or ``Loop.steps``


def count(name: str, value: SupportsIndex) -> int:
    """Return ``value`` as a whole number of at least 0.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name}={value!r} must be a whole number") from error
    if not 0 <= number < 2**63:
        raise ConfigError(f"{name}={str(number)[:30]} must not be negative, and be less than 2**63")
    return number


class Loop:
    """Keeps the position up to date while the user's loop runs.

    Optimizer steps are counted at the first optimizer in the state; several optimizers usually step together.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.position = Position()
        self.trained = False  # whether the optimizer has stepped since the last report
        self._counted = 0
        self._epoch: int | None = None
        self._step: int | None = None
        self._batches: Batches | None = None
        self._place: Batches | None = None  # where the next pass over the data continues
        self._reports_in_epoch = 0
        optimizer = next((value for value in state.values() if isinstance(value, torch.optim.Optimizer)), None)
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, *_: object) -> None:
        self._counted += 1
        self.trained = True

    def stop(self) -> None:
        """Remove the hook from the optimizer."""
        if self._hook is not None:
            self._hook.remove()

    @property
    def running(self) -> bool:
        """Whether a loop over ``epochs`` or ``steps`` is running."""
        return self._epoch is not None or self._step is not None

    @property
    def in_iteration(self) -> bool:
        """Whether the body of ``epochs``, ``steps`` or ``batches`` is running."""
        return self.running or self._batches is not None

    def go_to(self, position: Position) -> None:
        """Continue from a position."""
        self.position, self._place = position, position.batches
        self._counted, self.trained = position.step, False

    def epochs(self, total: int, goes_on: Callable[[], bool], end: Callable[[], None]) -> Iterator[int]:
        """See ``Checkpointer.epochs``."""
        position = self.position
        try:
            while position.next_epoch < total and goes_on():
                self._epoch, self._reports_in_epoch = position.next_epoch, 0
                yield self._epoch
                end()
                # an epoch without a report is complete all the same
                position.next_epoch = self._epoch + 1
                position.batches = self._place = None
        finally:
            self._epoch = None

    def steps(self, total: int, goes_on: Callable[[], bool], end: Callable[[], None]) -> Iterator[int]:
        """See ``Checkpointer.steps``."""
        position = self.position
        try:
            while position.next_step < total and goes_on():
                self._step = position.next_step
                yield self._step
                end()
                position.next_step = self._step + 1
        finally:
            self._step = None

    def restarts_workers(self, loader: Iterable[Any], state: Mapping[str, Any]) -> bool:
        """Whether the next pass goes on inside an epoch, with worker processes that begin anew."""
        workers = getattr(loader, "num_workers", 0)
        return self._place is not None and bool(workers) and is_restored(loader, state)

    def batches(self, loader: Iterable[Any], state: Mapping[str, Any], end: Callable[[], None]) -> Iterator[Any]:
        """See ``Checkpointer.batches``."""
        place, self._place = self._place, None
        restores_itself = is_restored(loader, state)
        if place is None:
            place, source = begin_pass(loader), start_pass(loader, restores_itself=restores_itself)
        else:
            source = continue_pass(loader, place, restores_itself=restores_itself)
        try:
            for batch in source:
                place = Batches(place.done + 1, place.start, place.generator)
                self._batches = place
                yield batch
                end()
        finally:
            self._batches = None

    def advance(self, step: SupportsIndex | None, epoch: SupportsIndex | None) -> None:
        """Move the position to a report.

        Raises:
            ConfigError: the step or epoch is not a whole number of at least 0.
        """
        own_step = None if step is None else count("step", step)
        own_epoch = None if epoch is None else count("epoch", epoch)
        if self._epoch is not None and self._batches is None:
            self._reports_in_epoch += 1
        position = self.position
        position.report += 1
        if own_step is not None:
            position.step = self._counted = own_step
        elif self._step is not None:
            position.step = self._step + 1
        else:
            position.step = position.report if self._hook is None else self._counted
        if self._step is not None:
            position.next_step = self._step + 1
        position.epoch = self._epoch if own_epoch is None else own_epoch
        position.batches = self._batches
        if self._epoch is not None:
            position.next_epoch = self._epoch + (self._batches is None)
        elif own_epoch is not None:
            position.next_epoch = own_epoch + 1
        self.trained = False

    def catch_up(self) -> None:
        """Move the position to a save between reports."""
        if self._hook is not None and self._step is None:
            self.position.step = self._counted
        if self._step is not None:
            self.position.next_step = self._step + 1
        self.position.batches = self._batches

    def check_place(self) -> None:
        """Refuse a second report in an epoch after more training.

        Raises:
            ConfigError: this is one.
        """
        if self._epoch is not None and self._batches is None and self._reports_in_epoch and self.trained:
            raise ConfigError(
                f"a second report in epoch {self._epoch} after more training: a report says that its epoch is "
                "complete, so a run that was killed here would skip the rest of it. To report inside an epoch, loop "
                "over ckpt.batches(loader)"
            )
