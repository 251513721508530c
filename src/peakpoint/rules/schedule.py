"""Rules that go by time and order."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar

from peakpoint.errors import ConfigError
from peakpoint.format.metrics import is_number
from peakpoint.rules.record import CheckpointRecord, NeedsParts, Reasons, by_sequence, check_whole, lineage

_SHORTEST_MINUTES, _LONGEST_MINUTES = 1e-9, 1e15  # what clocks and calendars can still tell apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Every(NeedsParts):
    """Claims one checkpoint in every interval: of epochs, of steps or of minutes.

    The first record in each interval is claimed. With ``epochs=10`` intervals begin when 10, 20, 30, ... epochs are
    complete (epoch indices 9, 19, 29, ...); with ``steps=1000`` at steps 1000, 2000, ..., so that a loop that reports
    every 391 steps still gets one checkpoint a thousand; with ``minutes=60`` at every full hour of UTC. When a run was
    resumed from an older checkpoint, the newest branch goes before abandoned ones.

    Args:
        epochs: interval in epochs. Give exactly one of the three.
        steps: interval in optimizer steps.
        minutes: interval in minutes of wall time; may be a fraction.
        keep: claim only in the newest ``keep`` intervals that have a checkpoint; all by default.
        parts: see ``NeedsParts``.

    Raises:
        ConfigError: none or several intervals, or one that is not positive.

    Example:
        >>> Every(minutes=60, keep=24).text
        'every:60min:24'
    """

    usage: ClassVar[str] = "Every(epochs=10), Every(steps=1000) or Every(minutes=60)"
    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        self._check_parts()
        intervals = [name for name in ("epochs", "steps", "minutes") if getattr(self, name) is not None]
        if len(intervals) != 1:
            raise ConfigError("Every takes exactly one of epochs=, steps= and minutes=")
        if self.minutes is not None:
            if not (is_number(self.minutes) and _SHORTEST_MINUTES <= self.minutes <= _LONGEST_MINUTES):
                raise ConfigError(
                    f"Every: minutes must be a number from {_SHORTEST_MINUTES} to {_LONGEST_MINUTES}, "
                    f"not {str(self.minutes)[:40]}"
                )
        else:
            check_whole("Every", intervals[0], getattr(self, intervals[0]))
        if self.keep is not None:
            check_whole("Every", "keep", self.keep)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        suffix = ("" if self.keep is None else f":{self.keep}") + self._parts_text
        intervals = {"ep": self.epochs, "st": self.steps, "min": self.minutes}
        return next(f"every:{value!r}{unit}{suffix}" for unit, value in intervals.items() if value is not None)

    def interval(self, record: CheckpointRecord) -> int:
        """The number of the interval that ``record`` falls into; 0 is before the first boundary, and claims nothing."""
        if self.epochs is not None:
            return 0 if record.epoch is None else (record.epoch + 1) // self.epochs
        if self.steps is not None:
            return record.step // self.steps
        assert self.minutes is not None
        return int(record.created_at.timestamp() // (60 * self.minutes))

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The first record of each of the newest ``keep`` intervals."""
        current = {record.id for record in lineage(records)}
        first: dict[int, CheckpointRecord] = {}
        for record in sorted(records, key=lambda record: (record.id not in current, record.sequence)):
            number = self.interval(record)
            if number > 0:
                first.setdefault(number, record)
        numbers = sorted(first)[-self.keep :] if self.keep is not None else sorted(first)
        return {first[number].id: self._reason(number) for number in numbers}

    def _reason(self, number: int) -> str:
        newest = "" if self.keep is None else f", among the newest {self.keep}"
        if self.epochs is not None:
            return f"every {self.epochs} epochs: first with {number * self.epochs} complete{newest}"
        if self.steps is not None:
            return f"every {self.steps} steps: first from step {number * self.steps}{newest}"
        assert self.minutes is not None
        start = datetime.fromtimestamp(number * 60 * self.minutes, UTC)
        return f"every {self.minutes:g} minutes: first from {start:%Y-%m-%d %H:%M:%S} UTC{newest}"


@dataclass(frozen=True, slots=True)
class Last(NeedsParts):
    """Claims the ``n`` checkpoints committed last: to continue from.

    Every report is newer than the ones before it, so with ``Last`` among the rules every report is saved.

    Args:
        n: how many, at least 1.
        parts: see ``NeedsParts``.

    Raises:
        ConfigError: ``n`` is not a whole number of at least 1.

    Example:
        >>> Last(3).text
        'last:3'
    """

    usage: ClassVar[str] = "Last(3)"
    n: int

    def __post_init__(self) -> None:
        self._check_parts()
        check_whole("Last", "n", self.n)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"last:{self.n}{self._parts_text}"

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The newest ``n`` in the order of commits."""
        newest = by_sequence(records)[-self.n :]
        return {
            record.id: "the newest" if distance == 0 else f"number {distance + 1} of the newest {self.n}"
            for distance, record in enumerate(reversed(newest))
        }


@dataclass(frozen=True, slots=True)
class Thin(NeedsParts):
    """Claims many recent checkpoints and few old ones: the gaps grow with the age by powers of ``base``.

    Commits are numbered, and lie in blocks of 1, ``base``, ``base ** 2``, ... commits. A block counts as soon as all of
    it is at least as old (in commits) as it is wide, and the first checkpoint of each is claimed: with ``base=2`` about
    three for every doubling of the age. What was removed is never missed later: the first of a large block is also the
    first of the smaller one that it was in.

    The newest is always claimed, so with ``Thin`` among the rules every report is saved.

    Args:
        base: how fast the gaps grow, at least 2.
        parts: see ``NeedsParts``.

    Raises:
        ConfigError: ``base`` is not a whole number of at least 2.

    Example:
        >>> Thin(base=2).text
        'thin:2'
    """

    usage: ClassVar[str] = "Thin(base=2)"
    base: int = 2

    def __post_init__(self) -> None:
        self._check_parts()
        check_whole("Thin", "base", self.base, 2)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"thin:{self.base}{self._parts_text}"

    def _width(self, sequence: int, newest: int) -> int:
        """The largest block around a commit that is wholly as old as it is wide; all of its members agree on it."""
        width = 1
        while newest - (sequence // (width * self.base) + 1) * width * self.base + 1 >= width * self.base:
            width *= self.base
        return width

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The first record of each block."""
        reasons: Reasons = {}
        ordered = by_sequence(records)
        blocks: set[tuple[int, int]] = set()  # width and number of each block
        for record in ordered:
            newest = ordered[-1].sequence
            width = self._width(record.sequence, newest)
            if (width, record.sequence // width) not in blocks:
                blocks.add((width, record.sequence // width))
                age = newest - record.sequence
                reasons[record.id] = f"thinned by {self.base}: {age} commits old, first of its block of {width}"
        return reasons
