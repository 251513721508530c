"""The lives of checkpoints as the journal tells them, gone ones too.

Nothing here decides anything: it replays what was recorded, with the same rules as the trainer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peakpoint.format.events import Event, Opened, Removed, Saved, Undone
from peakpoint.rules import CheckpointRecord, Moment, parse
from peakpoint.rules.history import RunReplay, smoothing_windows


@dataclass(frozen=True, slots=True)
class CheckpointHistory:
    """One checkpoint from its commit to its end.

    Attributes:
        saved: the commit.
        record: what rules looked at.
        removed: the end; None when it exists.
        beaten: for one that was removed: each rule in force, with what it claimed instead.
    """

    saved: Saved
    record: Moment
    removed: Removed | None
    claimed_instead: tuple[tuple[str, tuple[str, ...]], ...] = ()


def checkpoint_histories(events: Iterable[Event]) -> list[CheckpointHistory]:
    """Every checkpoint that a run ever had, earliest first."""
    replay = RunReplay()
    texts: tuple[str, ...] = ()
    found: dict[str, CheckpointHistory] = {}
    for event in events:
        replay.take(event)
        match event:
            case Opened():
                texts = event.rules
            case Saved():
                found[event.checkpoint] = CheckpointHistory(event, replay.moment(event.checkpoint), None)
            case Removed() if event.checkpoint in found:
                life = found[event.checkpoint]  # said before, when that removal came to nothing
                there = [one for one in found.values() if one.removed is None or one is life]
                names = {other.record.id: other.saved.name for other in there}
                others = [other.record for other in there]
                beaten = tuple((text, _instead(text, others, names, event.checkpoint)) for text in texts)
                found[event.checkpoint] = CheckpointHistory(life.saved, life.record, event, beaten)
            case Undone(checkpoint=checkpoint, parts=()) if checkpoint in found:
                life = found[checkpoint]
                found[checkpoint] = CheckpointHistory(life.saved, life.record, None)
            case _:
                pass
    return list(found.values())


def _instead(text: str, records: Sequence[CheckpointRecord], names: Mapping[str, str], own: str) -> tuple[str, ...]:
    """What a rule claimed when a checkpoint went, newest first."""
    rule = parse(text)
    if smoothing_windows([rule]):
        return ("it ranks by smoothed values, which are not recorded",)
    reasons = rule.claims(records)
    order = sorted((record for record in records if record.id in reasons), key=lambda record: -record.sequence)
    return tuple(f"{names[record.id]}: {reasons[record.id]}" for record in order if record.id != own)
