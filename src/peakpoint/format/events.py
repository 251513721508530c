"""The events of a journal, and how each stands in its line: ``kind``, then the fields in their order."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from peakpoint.errors import CorruptError
from peakpoint.format.members import Count, Name, Ordinal, Time, check_time
from peakpoint.format.metrics import metrics_from_json, metrics_to_json
from peakpoint.format.sealed import is_intact, seal, unseal


class Event(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag_field="kind",
    tag=lambda name: re.sub(r"\B(?=[A-Z])", "-", name).lower(),
):
    """What happened in a run; the ``kind`` of its line is the name of the class, such as ``save-failed``.

    Attributes:
        at: when.
    """

    at: Time


class CheckpointEvent(Event, frozen=True, kw_only=True):
    """What happened to a checkpoint.

    Attributes:
        checkpoint: the id.
        name: its directory.
    """

    checkpoint: Name
    name: Name


class Opened(Event, frozen=True, kw_only=True):
    """A process began to write the run.

    Attributes:
        by: host, process id, versions.
        rules: the rules in force from now on, in text form.
        state: part name to the class of what was given for it, such as ``"torch.optim.adamw.AdamW"``; for people and
            reports, never to be imported.
        config: plain values by name, as the training was given them; empty when it was given none.
        tags: words, likewise.
    """

    by: Mapping[str, str]
    rules: tuple[str, ...]
    state: Mapping[str, str] = msgspec.field(default_factory=dict)
    config: Mapping[str, Any] = msgspec.field(default_factory=dict)
    tags: tuple[str, ...] = ()


class Started(Event, frozen=True, kw_only=True):
    """The history continues from a checkpoint, or from nothing.

    Attributes:
        checkpoint: the id that the state was restored from, None for a start from nothing.
        report: number of the last report that still counts; later ones were abandoned.
        requested: the ref that was asked for, None when it was left to Peakpoint.
    """

    checkpoint: Name | None
    report: Count
    requested: str | None = None


class Reported(Event, frozen=True, kw_only=True):
    """The loop reported a moment.

    Attributes:
        report: 1, 2, 3, ... along the history.
        step: optimizer steps completed.
        epoch: the epoch's index, None outside epochs.
        metrics: as reported; NaN and infinities included.
    """

    report: Count
    step: Count
    epoch: Count | None
    metrics: Mapping[str, float]


class Saved(CheckpointEvent, frozen=True, kw_only=True):
    """A checkpoint was committed."""

    sequence: Count
    report: Count
    reasons: tuple[str, ...]
    size_bytes: Count = 0


class SaveFailed(CheckpointEvent, frozen=True, kw_only=True):
    """A checkpoint that was wanted did not become durable."""

    reasons: tuple[str, ...]
    error: str


class Removed(CheckpointEvent, frozen=True, kw_only=True):
    """A checkpoint is about to be removed; recorded before the first file goes.

    ``until`` is when its files go, and the time to change one's mind ends; None when they go at once.
    """

    step: Count
    epoch: Count | None
    reason: str
    by: str
    until: Time | None = None


class PartsDropped(CheckpointEvent, frozen=True, kw_only=True):
    """Parts of a checkpoint are about to be dropped; recorded before the first goes.

    ``until`` was as in ``Removed``; it is None in what is written now, and parts go at once.
    """

    parts: tuple[str, ...]
    reason: str
    by: str
    until: Time | None = None


class Archived(CheckpointEvent, frozen=True, kw_only=True):
    """The files of a checkpoint are in its pack."""

    packed_bytes: Count
    by: str


class Restored(CheckpointEvent, frozen=True, kw_only=True):
    """The files of an archived checkpoint are back."""

    by: str


class Undone(CheckpointEvent, frozen=True, kw_only=True):
    """A removal, or the dropping of parts, was taken back.

    Attributes:
        parts: the parts that are back; none when the whole checkpoint is.
        by: who did it.
    """

    parts: tuple[str, ...]
    by: str


class Changing(CheckpointEvent, frozen=True, kw_only=True):
    """What a checkpoint's directory holds is about to change; recorded before.

    Whoever follows the journal looks at the directory until word comes of what was done, in a later event.
    """

    by: str


class Measured(Event, frozen=True, kw_only=True):
    """A checkpoint was evaluated after its commit, here or elsewhere.

    Attributes:
        checkpoint: its id.
        step: of the checkpoint, to which the values belong.
        metrics: the values; NaN and infinities included.
        part: the part that was evaluated, such as ``"ema"``; None when it was not said.
        source: what measured it, in words.
        by: who recorded it.
    """

    checkpoint: Name
    step: Count
    metrics: Mapping[str, float]
    part: str | None
    source: str
    by: str


class Withdrawn(Event, frozen=True, kw_only=True):
    """Measurements of a checkpoint were wrong: all values that were recorded of these metrics are taken back."""

    checkpoint: Name
    metrics: tuple[str, ...]
    by: str


class Pinned(Event, frozen=True, kw_only=True):
    """A checkpoint is protected from the rules until it is unpinned."""

    checkpoint: Name
    why: str
    by: str


class Unpinned(Event, frozen=True, kw_only=True):
    """A checkpoint is no longer protected by a pin."""

    checkpoint: Name
    by: str


class Promoting(CheckpointEvent, frozen=True, kw_only=True):
    """An alias is about to point at a checkpoint, which is protected until the record is there.

    Attributes:
        alias: the alias.
        record: the number of the record that will point at it, unless somebody else makes the one of this number.
        token: random, for the word that comes of it.
        by: who does it.
    """

    alias: str
    record: Ordinal
    token: str
    by: str


class Promoted(CheckpointEvent, frozen=True, kw_only=True):
    """What came of ``Promoting``.

    Attributes:
        alias: the alias.
        record: the number of the record that points at it; None when it came to nothing.
        digest: of that record, so that one that is taken out or changed later is missed.
        token: of ``Promoting``.
        by: who did it.
    """

    alias: str
    record: Ordinal | None
    digest: str | None
    token: str
    by: str


class Closed(Event, frozen=True, kw_only=True):
    """The process that had opened the run ended in an orderly way.

    Attributes:
        why: ``"closed"``, why the training was stopped early, or the signal or error that ended it.
    """

    why: str


STOPPED = "stopped early: "  # and why, in ``Closed.why``

KINDS: dict[str, type[Event]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (*Event.__subclasses__(), *CheckpointEvent.__subclasses__())
    if kind is not CheckpointEvent
}


def encode(event: Event) -> bytes:
    """Encode an event as one sealed line."""
    if isinstance(event, Reported | Measured):
        event = msgspec.structs.replace(event, metrics=metrics_to_json(event.metrics))
    return seal(event)


def decode(line: bytes, *, where: str) -> Event | None:
    """Read what ``encode`` wrote; None for a kind that a newer release has added.

    Raises:
        CorruptError: the line is damaged.
    """
    try:
        record = unseal(line, where=where, unsealed=CorruptError)
        kind = KINDS.get(msgspec.convert(record["kind"], str))
        if kind is None:
            return None
        if kind in (Reported, Measured):
            record["metrics"] = metrics_from_json(record["metrics"])
        return _checked(msgspec.convert(record, kind))
    except CorruptError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptError(f"{where} is not a journal record: {error}") from error


def _checked(event: Event) -> Event:
    for name in event.__struct_fields__:
        check_time(name, getattr(event, name))
    return event


# how the lines of some kinds begin, by which they are told without being decoded
REPORTED_LINE = b'{"kind":"reported",'
OPENED_LINE = b'{"kind":"opened",'
CLOSED_LINE = b'{"kind":"closed",'

_decode_reported = msgspec.json.Decoder(Reported).decode


def decode_report(line: bytes) -> Reported | None:
    """An undamaged report of finite metrics; None for everything else, which ``decode`` judges.

    A long run has a million of these lines and hardly any other.
    """
    if not line.startswith(REPORTED_LINE) or not is_intact(line):
        return None
    try:
        event = _decode_reported(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return event if 1 < event.at.year < 9999 else None  # see check_time
