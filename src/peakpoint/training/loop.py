"""The loop of a checkpointer: its epochs, steps and batches, and its position."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import torch

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.state import rng
from peakpoint.state.step_guard import stepping
from peakpoint.training import data_order
from peakpoint.training.outcome import WarnOnce, warn
from peakpoint.training.position import Batches, DataPass, Position

LoopMethod = Callable[[int, Callable[[], bool], Callable[[], None]], Iterator[int]]  # ``Loop.epochs`` or ``Loop.steps``


def count(name: str, value: SupportsIndex) -> int:
    """Return ``value`` as a whole number of at least 0.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} must be a whole number, such as 10, not {value!r}") from error
    if isinstance(value, bool) or not 0 <= number < 2**63:
        refused = repr(value) if isinstance(value, bool) else str(number)[:30]
        raise ConfigError(f"{name} must be a whole number of at least 0 and less than 2**63, not {refused}")
    return number


class Loop:
    """Keeps the position up to date while the user's loop runs.

    Optimizer steps are counted at the first optimizer in the state; several optimizers usually step together.

    Args:
        state: part name to live object.
        strict: whether a place in the data that does not fit is refused; otherwise the pass begins anew.
    """

    def __init__(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        self.position = Position()
        self._state, self._strict = state, strict
        self.trained = False  # whether the optimizer has stepped since the last report
        self._counted = 0
        self._epoch: int | None = None
        self._step: int | None = None
        self._batches: Batches | None = None
        self._place: Batches | None = None  # where the next pass over the data continues
        self._in_pass = False
        self._passes = 0  # over data, begun in this epoch
        self._generators: dict[
            int, dict[str, Any]
        ] = {}  # of the loaders of the passes of this process, by their places
        self._seeds: dict[int, dict[str, int]] = {}  # of the generators, when the pass began
        self._warn_once = WarnOnce()
        self._reports_in_epoch = 0
        self.reported = False  # in the present iteration
        optimizers = [stepping(value) for value in state.values() if isinstance(value, torch.optim.Optimizer)]
        optimizer = next(filter(None, optimizers), None)
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

    @property
    def progress(self) -> tuple[int, int]:
        """What grows with every report and every step of the optimizer."""
        return self.position.report, self._counted

    @property
    def knows_steps(self) -> bool:
        """Whether the state has an optimizer, whose steps tell that something was trained."""
        return self._hook is not None

    def complete(self, kind: str) -> int:
        """Return how many epochs or steps are complete."""
        return self.position.next_epoch if kind == "epoch" else self.position.next_step

    def go_to(self, position: Position) -> None:
        """Continue from a position."""
        self.position, self._place = position, position.batches
        self._counted, self.trained = position.step, False

    def epochs(self, total: int, goes_on: Callable[[], bool], end: Callable[[], None]) -> Iterator[int]:
        """See ``Checkpointer.epochs``."""
        position = self.position
        try:
            while position.next_epoch < total and goes_on():
                self._epoch, self._reports_in_epoch, self._passes = position.next_epoch, 0, 0
                self.reported = False
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
                self.reported = False
                yield self._step
                end()
                position.next_step = self._step + 1
        finally:
            self._step = None

    @property
    def epoch(self) -> int | None:
        """The epoch whose body is running; None outside ``epochs``."""
        return self._epoch

    @property
    def batch(self) -> int | None:
        """The index of the present batch in its pass over the data, from 0; None outside ``batches``."""
        return None if self._batches is None else self._batches.done - 1

    def batches(self, loader: Iterable[Any], end: Callable[[], None]) -> Iterator[Any]:
        """See ``Checkpointer.batches``."""
        data_order.check_iterable(loader)
        if self._in_pass:
            raise ConfigError(
                "batches() inside another batches() of the same checkpointer: one place in the data is kept. Loop over "
                "the inner loader itself, or over one object whose __iter__ returns zip(first, second)"
            )
        number, self._passes = self._passes, self._passes + (self._epoch is not None)
        if self._place is not None and number < self._place.number:
            return  # all of it was done before the checkpoint
        self._in_pass = True
        try:
            place, source = self._begin_pass(loader, number)
            for batch in source:
                if place.done == 0 and number in self._generators:
                    self.position.passes[number].first = data_order.digest_of(batch)
                place = Batches(place.done + 1, place.start, place.number)
                self._batches = place
                self.reported = False
                yield batch
                end()
            if not place.done:
                self._warn_once(
                    "no batches",
                    "batches() was given data that has no batch: an iterator that was used up before, or a sampler in "
                    "the state that is at the end of its samples. Pass the loader itself, and leave such a sampler out "
                    "of state=",
                )
        finally:
            self._batches, self._in_pass = None, False
            self.note_generators()

    def _begin_pass(self, loader: Iterable[Any], number: int) -> tuple[Batches, Iterator[Any]]:
        """Return the place in a pass over the data, and an iterator over what remains of it."""
        place, self._place = self._place, None
        itself = data_order.restores_itself(loader, self._state)
        settings = data_order.settings_of(loader)
        generators = {} if itself else data_order.own_generators(loader)
        if place is not None and self._fits(settings, place, itself=itself):
            self._generators[number], self._seeds[number] = generators, data_order.seeds_of(generators)
            return place, self._continue_pass(loader, place, itself=itself)
        previous = self.position.passes[number] if number < len(self.position.passes) else None
        carried = {} if previous is None else self._carry_over(previous, generators, number)
        resumed = previous is not None and number not in self._generators
        if resumed and previous is not None and previous.kept and data_order.keeps_workers(loader):
            self._warn_of_workers("use the loader without persistent_workers=True")
            if not itself:
                data_order.start_workers(loader)
        reused = data_order.has_kept_workers(loader)
        keeps_workers = data_order.keeps_workers(loader) and (previous is None or reused)
        begin = data_order.take_all(generators)
        data_pass = DataPass(
            settings, reused=reused, kept=keeps_workers, begin=begin, generators=begin, carried=carried
        )
        self.position.passes[number : number + 1] = [data_pass]
        self._generators[number], self._seeds[number] = generators, data_order.seeds_of(generators)
        return Batches(0, rng.take(), number), data_order.start_pass(loader, itself=itself)

    def _fits(self, settings: Mapping[str, Any], place: Batches, *, itself: bool) -> bool:
        """Whether a pass can be continued with a loader of these settings.

        Raises:
            MismatchError: it cannot, and the training is strict.
        """
        differences, harmless = data_order.settings_differences(self.position.passes[place.number].settings, settings)
        if harmless:
            warn(
                f"the run goes on inside an epoch, and {' and '.join(harmless)}: random numbers that a Dataset draws, "
                "such as augmentations, differ in the rest of this epoch. The order of the samples is the same"
            )
        if not differences:
            return True
        text = (
            f"the run goes on inside an epoch, after batch {place.done}, and the loader would make other batches of "
            f"the rest: {'; '.join(differences)}"
        )
        if self._strict:
            raise MismatchError(
                f"{text}. Continue with the data and the settings as they were, or from a checkpoint between two "
                f'epochs (resume="RUN:epoch=N"); with strict=False this epoch is begun again',
                tuple(differences),
            )
        warn(f"{text}. The loader goes on at its own place" if itself else f"{text}. This epoch is begun again")
        return itself

    def _continue_pass(self, loader: Iterable[Any], place: Batches, *, itself: bool) -> Iterator[Any]:
        data_pass = self.position.passes[place.number]
        if place.number:
            warn(
                f"the run goes on inside an epoch, in pass {place.number + 1} over data of that epoch: the passes "
                "before it yield no batches, and other code of the loop's body runs again"
            )
        if itself:
            if getattr(loader, "num_workers", 0):
                self._warn_of_workers("leave the loader out of state=, or report between epochs")
            return data_order.iterate_apart(loader)
        if data_pass.reused:
            self._warn_of_workers("use the loader without persistent_workers=True")
        live = data_order.take_all(self._of_state(self._generators[place.number]))
        return data_order.continue_pass(loader, place, data_pass, {**data_pass.generators, **live})

    def _warn_of_workers(self, remedy: str) -> None:
        self._warn_once(
            "workers",
            "the random generators of the loader's worker processes (torch, Python, NumPy in a Dataset) begin anew: "
            "what they draw, such as augmentations, differs from a run that was never stopped. The order of the "
            f"samples is the same. To resume exactly, {remedy}",
        )

    def _of_state(self, generators: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the generators that are parts of the state, which come back with it."""
        parts = {id(part) for part in self._state.values()}
        return {place: generator for place, generator in generators.items() if id(generator) in parts}

    def _carry_over(self, previous: DataPass, generators: Mapping[str, Any], number: int) -> dict[str, bool | None]:
        """Begin a pass with the generators of the loader as the one before has left them, if that is what happens.

        In the process of the pass before it is only observed: somebody may seed them for each pass.
        """
        states = data_order.take_all(generators)
        carried = {place: previous.carried.get(place) for place in generators}
        for place, generator in generators.items():
            at_checkpoint = previous.generators.get(place)
            if number in self._generators:
                if states[place] == at_checkpoint:
                    carried[place] = True
                elif states[place] == previous.begin.get(place) or data_order.seeds_of({place: generator}) != {
                    place: self._seeds[number].get(place)
                }:
                    carried[place] = False
                else:
                    carried[place] = None
            elif at_checkpoint in (None, states[place]) or generator in self._of_state(generators).values():
                continue
            elif carried[place] or (carried[place] is None and states[place] == previous.begin.get(place)):
                rng.restore_to(generator, at_checkpoint)
            elif carried[place] is None:
                self._warn_once(
                    f"generator {place}",
                    f"the random generator {place} of the loader is not where the checkpoint had it, and is not part "
                    "of the state: if nothing seeds it for each epoch, the order of the batches differs from that of "
                    f'a run that was never stopped. Put it into state=, such as {{..., "order": loader.{place}}}',
                )
        return carried

    def note_generators(self) -> None:
        """Note where the generators of the loaders are, for a checkpoint."""
        for number, generators in self._generators.items():
            self.position.passes[number].generators = data_order.take_all(generators)

    def advance(self, step: SupportsIndex | None, epoch: SupportsIndex | None) -> None:
        """Move the position to a report.

        Raises:
            ConfigError: the step or epoch is not a whole number of at least 0.
        """
        own_step = None if step is None else count("step", step)
        own_epoch = None if epoch is None else count("epoch", epoch)
        if self._epoch is not None and self._batches is None:
            self._reports_in_epoch += 1
        self.reported = True
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

    def check_save(self) -> None:
        """Warn of a save on request where a run that is killed or continued would not do what was meant."""
        if self.reported and self.in_iteration:
            self._warn_once(
                "save after report",
                "ckpt.save() after ckpt.report() in the same iteration: a run that is killed between the two goes on "
                "with the next iteration, and never makes this save. Write ckpt.report(..., save=reason), which does "
                "both at once",
            )
        elif self._epoch is not None and self._batches is None and self.trained:
            self._warn_once(
                "save before report",
                f"ckpt.save() in epoch {self._epoch}, after training and before its report: a run that continues from "
                "this checkpoint trains the epoch once more from its beginning. Write ckpt.report(..., save=reason) at "
                "the end of the epoch, or loop over ckpt.batches(loader)",
            )

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
