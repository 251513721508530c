"""The position of a training in its loops, stored with every checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

import msgspec

from peakpoint.errors import FormatError

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(slots=True)
class Batches:
    """A place inside an epoch.

    Attributes:
        done: batches that the loop has received in the present pass over the data.
        start: the random generators when the pass began.
        number: the passes over data that the epoch had before this one.
    """

    done: Count
    start: dict[str, Any]
    number: Count = 0


@dataclass(slots=True)
class DataPass:
    """The last pass over a loader: by it a later one is recognised, or continued.

    Attributes:
        settings: those of the loader that decide about the batches.
        first: digest of the first batch, None when it has no content that is understood.
        reused: whether the worker processes of the pass before were used.
        kept: whether those of this pass stay for the next.
        begin: the states of the generators that belong to the loader when the pass began, by their places in it.
        generators: the same at the checkpoint.
        carried: of each, whether a pass begins with it as the one before has left it; None when that is not known.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    first: str | None = None
    reused: bool = False
    kept: bool = False
    begin: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, bool | None] = field(default_factory=dict)


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
        passes: the passes over data of an epoch, in their order.
    """

    report: Count = 0
    step: Count = 0
    epoch: Count | None = None
    next_epoch: Count = 0
    next_step: Count = 0
    batches: Batches | None = None
    passes: list[DataPass] = field(default_factory=list)

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
            plain = {name: values[name] for name in _names(cls) if name != "passes" or name in values}
            if isinstance(plain["batches"], Mapping):
                plain |= _of_first_release(plain)
                # a later release may note more, without which the place is another one
                Batches(**plain["batches"])
            for data_pass in plain.get("passes", ()):
                DataPass(**data_pass)
            position = msgspec.convert(plain, cls)
            if position.batches is not None:
                position.passes[position.batches.number]
        except (LookupError, TypeError, msgspec.ValidationError) as error:
            raise FormatError(f"the checkpoint's loop position cannot be read: {error!r}") from error
        return position


def _names(cls: type[Position]) -> list[str]:
    return [attribute.name for attribute in fields(cls)]


def _of_first_release(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a place as it is written today; the first release noted one generator of the loader beside it."""
    batches = dict(plain["batches"])
    if "generator" not in batches:
        return {}
    state = batches.pop("generator")
    return {"batches": batches, "passes": [{"begin": {} if state is None else {"generator": state}}]}
