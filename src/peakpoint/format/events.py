"""The events of a journal, and how each stands in its line."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

import msgspec

from peakpoint.errors import CorruptError
from peakpoint.format.metrics import metrics_from_json, metrics_to_json
from peakpoint.format.sealed import is_intact, seal, unseal


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A process began to write the run.

    Attributes:
        at: when.
        by: host, process id, versions.
        rules: the rules in force from now on, in text form.
        state: part name to the class of what was given for it, such as ``"torch.optim.adamw.AdamW"``; for people and
            reports, never to be imported.
    """

    at: datetime
    by: Mapping[str, str]
    rules: tuple[str, ...]
    state: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The history continues from a checkpoint, or from nothing.

    Attributes:
        at: when.
        checkpoint: the id that the state was restored from, None for a start from nothing.
        report: number of the last report that still counts; later ones were abandoned.
        requested: the ref that was asked for, None when it was left to Peakpoint.
    """

    at: datetime
    checkpoint: str | None
    report: int
    requested: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """The loop reported a moment.

    Attributes:
        at: when.
        report: 1, 2, 3, ... along the history.
        step: optimizer steps completed.
        epoch: the epoch's index, None outside epochs.
        metrics: as reported; NaN and infinities included.
    """

    at: datetime
    report: int
    step: int
    epoch: int | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint was committed."""

    at: datetime
    checkpoint: str
    name: str
    sequence: int
    report: int
    reasons: tuple[str, ...]
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """A checkpoint that was wanted did not become durable."""

    at: datetime
    checkpoint: str
    name: str
    reasons: tuple[str, ...]
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A checkpoint is about to be removed; recorded before the first file goes.

    ``until`` is when its files go, and the time to change one's mind ends; None when they go at once.
    """

    at: datetime
    checkpoint: str
    name: str
    step: int
    epoch: int | None
    reason: str
    by: str
    until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsDropped:
    """Parts of a checkpoint are about to be dropped; recorded before the first goes.

    ``until`` was as in ``Removed``; it is None in what is written now, and parts go at once.
    """

    at: datetime
    checkpoint: str
    name: str
    parts: tuple[str, ...]
    reason: str
    by: str
    until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    """The files of a checkpoint are in its pack."""

    at: datetime
    checkpoint: str
    name: str
    packed_bytes: int
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The files of an archived checkpoint are back."""

    at: datetime
    checkpoint: str
    name: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """A removal, or the dropping of parts, was taken back.

    Attributes:
        at: when.
        checkpoint: the id.
        name: its directory.
        parts: the parts that are back; none when the whole checkpoint is.
        by: who did it.
    """

    at: datetime
    checkpoint: str
    name: str
    parts: tuple[str, ...]
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Changing:
    """What a checkpoint's directory holds is about to change; recorded before.

    Whoever follows the journal looks at the directory until word comes of what was done, in a later event.
    """

    at: datetime
    checkpoint: str
    name: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A checkpoint was evaluated after its commit, here or elsewhere.

    Attributes:
        at: when it was recorded.
        checkpoint: its id.
        step: of the checkpoint, to which the values belong.
        metrics: the values; NaN and infinities included.
        part: the part that was evaluated, such as ``"ema"``; None when it was not said.
        source: what measured it, in words.
        by: who recorded it.
    """

    at: datetime
    checkpoint: str
    step: int
    metrics: Mapping[str, float]
    part: str | None
    source: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A checkpoint is protected from the rules until it is unpinned."""

    at: datetime
    checkpoint: str
    why: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpinned:
    """A checkpoint is no longer protected by a pin."""

    at: datetime
    checkpoint: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoting:
    """An alias is about to point at a checkpoint, which is protected until the record is there.

    Attributes:
        at: when.
        checkpoint: the id.
        name: its directory.
        alias: the alias.
        record: the number of the record that will point at it, unless somebody else makes the one of this number.
        token: random, for the word that comes of it.
        by: who does it.
    """

    at: datetime
    checkpoint: str
    name: str
    alias: str
    record: int
    token: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """What came of ``Promoting``.

    Attributes:
        at: when.
        checkpoint: the id.
        name: its directory.
        alias: the alias.
        record: the number of the record that points at it; None when it came to nothing.
        digest: of that record, so that one that is taken out or changed later is missed.
        token: of ``Promoting``.
        by: who did it.
    """

    at: datetime
    checkpoint: str
    name: str
    alias: str
    record: int | None
    digest: str | None
    token: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The process that had opened the run ended in an orderly way.

    Attributes:
        at: when.
        why: ``"closed"``, why the training was stopped early, or the signal or error that ended it.
    """

    at: datetime
    why: str


STOPPED = "stopped early: "  # and why, in ``Closed.why``

Event = (
    Opened
    | Started
    | Reported
    | Saved
    | SaveFailed
    | Removed
    | PartsDropped
    | Undone
    | Archived
    | Restored
    | Changing
    | Measured
    | Pinned
    | Unpinned
    | Promoting
    | Promoted
    | Closed
)

_KINDS: dict[str, type[Event]] = {
    "opened": Opened,
    "started": Started,
    "reported": Reported,
    "saved": Saved,
    "save-failed": SaveFailed,
    "removed": Removed,
    "parts-dropped": PartsDropped,
    "undone": Undone,
    "archived": Archived,
    "restored": Restored,
    "changing": Changing,
    "measured": Measured,
    "pinned": Pinned,
    "unpinned": Unpinned,
    "promoting": Promoting,
    "promoted": Promoted,
    "closed": Closed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_MEMBERS = {kind: tuple(member.name for member in fields(kind)) for kind in _NAMES}


def encode(event: Event) -> bytes:
    """One sealed line."""
    record: dict[str, Any] = {name: getattr(event, name) for name in _MEMBERS[type(event)]}
    if isinstance(event, Reported | Measured):
        record["metrics"] = metrics_to_json(event.metrics)
    return seal({"kind": _NAMES[type(event)], **record})


def decode(line: bytes, *, where: str) -> Event | None:
    """Read what ``encode`` wrote; None for a kind that a newer release has added.

    Raises:
        CorruptError: the line is damaged.
    """
    try:
        record = unseal(line, where=where, unsealed=CorruptError)
        kind = _KINDS.get(msgspec.convert(record.pop("kind"), str))
        if kind is None:
            return None
        if kind in (Reported, Measured):
            record["metrics"] = metrics_from_json(record["metrics"])
        return msgspec.convert(record, kind)
    except CorruptError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptError(f"{where} is not a journal record: {error}") from error


# how the lines of some kinds begin, by which they are told without being decoded
_REPORTED = b'{"kind":"reported",'
OPENED_LINE = b'{"kind":"opened",'
CLOSED_LINE = b'{"kind":"closed",'
LINES_OF_REMOVALS = tuple(
    b'{"kind":"%s",' % _NAMES[kind].encode() for kind in (Removed, PartsDropped, Undone, Saved, Closed)
)

_decode_reported = msgspec.json.Decoder(Reported).decode


def decode_report(line: bytes) -> Reported | None:
    """An undamaged report of finite metrics; None for everything else, which ``decode`` judges.

    A long run has a million of these lines and hardly any other.
    """
    if not line.startswith(_REPORTED) or not is_intact(line):
        return None
    try:
        return _decode_reported(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
