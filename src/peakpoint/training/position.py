"""The position of a training in its loops, and the way back to it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import msgspec
import torch

from peakpoint.errors import FormatError, MismatchError
from peakpoint.state import rng
from peakpoint.state.capture import Stateful

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(slots=True)
class Batches:
    """A place inside an epoch.

    Attributes:
        done: batches that the loop has received.
        start: the random generators when the pass over the data began.
        generator: the loader's own generator at that time, None when it has none.
    """

    done: Count
    start: dict[str, Any]
    generator: bytes | None


@dataclass(slots=True)
class Position:
    """The position of a loop; stored with every checkpoint.

    Attributes:
        report: reports made so far along this history.
        step: optimizer steps completed.
        epoch: the epoch of the last report, None outside epochs.
        next_epoch: the epoch to run when the loop is continued from here.
        next_step: the index that ``steps`` yields when the loop is continued from here.
        batches: the place inside ``next_epoch``, None at its beginning.
    """

    report: Count = 0
    step: Count = 0
    epoch: Count | None = None
    next_epoch: Count = 0
    next_step: Count = 0
    batches: Batches | None = None

    def as_plain(self) -> dict[str, Any]:
        """Return the plain values that ``from_plain`` reads."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Position":
        """The inverse of ``as_plain``.

        Raises:
            FormatError: the values are not those of a position.
        """
        try:
            position = msgspec.convert({field.name: values[field.name] for field in fields(cls)}, cls)
            if position.batches is not None:
                Batches(**values["batches"])  # a later release may note more, without which the place is another one
        except (KeyError, TypeError, msgspec.ValidationError) as error:
            raise FormatError(f"the checkpoint's loop position cannot be read: {error!r}") from error
        return position


def begin_pass(loader: Any) -> Batches:
    """Note the generators at the beginning of a pass over the data."""
    generator = getattr(loader, "generator", None)
    state = bytes(generator.get_state().numpy().tobytes()) if isinstance(generator, torch.Generator) else None
    return Batches(0, rng.take(), state)


def start_pass(loader: Any, *, restores_itself: bool) -> Iterator[Any]:
    """Return an iterator over all of the data.

    A loader that restores itself draws other numbers in its first ``iter`` after that than it would have drawn without
    a restart, so each of its passes takes exactly one number from the training's generator.
    """
    if not restores_itself:
        batches: Iterator[Any] = iter(loader)
        return batches
    torch.empty((), dtype=torch.int64).random_()  # so that the workers' seeds differ from pass to pass
    return _iterate_apart(loader)


def _iterate_apart(loader: Any) -> Iterator[Any]:
    """Return ``iter(loader)``, with the random generators left as they are."""
    generators = rng.take()
    batches: Iterator[Any] = iter(loader)
    rng.restore(generators)
    return batches


def continue_pass(loader: Any, place: Batches, *, restores_itself: bool) -> Iterator[Any]:
    """Return an iterator that goes on at ``place``.

    A loader that restores itself is simply iterated. Any other is started again with the generators as they were, its
    first batches are drawn and dropped, and the generators are put back to where the checkpoint had them: exact for
    every loader whose batches depend on nothing but those generators.

    Raises:
        MismatchError: the data ends before the place, or the loader had a generator of its own and has none now.
        FormatError: the states of the generators cannot be read.
    """
    if restores_itself:
        return _iterate_apart(loader)
    generators = rng.take()
    rng.restore(place.start)
    if place.generator is not None:
        _set_generator(loader, place.generator)
    batches: Iterator[Any] = iter(loader)
    for number in range(place.done):
        try:
            next(batches)
        except StopIteration as error:
            raise MismatchError(
                f"the checkpoint was taken after batch {place.done} of an epoch, but the loader now ends after "
                f"{number}; continue with the data and batch size that the run was started with"
            ) from error
    rng.restore(generators)
    return batches


def _set_generator(loader: Any, state: bytes) -> None:
    generator = getattr(loader, "generator", None)
    if not isinstance(generator, torch.Generator):
        raise MismatchError(
            "the checkpoint was taken inside an epoch of a loader with generator=; continue with such a loader, "
            "since the order of the batches came from that generator"
        )
    try:
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    except (RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"the state of the loader's generator cannot be read: {error!r}") from error


def is_restored(loader: Any, state: Mapping[str, Any]) -> bool:
    """Whether a loader keeps its own position and is part of the state, so that it comes back by itself."""
    return isinstance(loader, Stateful) and any(loader is part for part in state.values())
