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
    histories: dict[str, CheckpointHistory] = {}
    for event in events:
        replay.take(event)
        match event:
            case Opened():
                texts = event.rules
            case Saved():
                histories[event.checkpoint] = CheckpointHistory(event, replay.moment(event.checkpoint), None)
            case Removed() if event.checkpoint in histories:
                history = histories[event.checkpoint]  # said before, when that removal came to nothing
                existing = [entry for entry in histories.values() if entry.removed is None or entry is history]
                names = {entry.record.id: entry.saved.name for entry in existing}
                records = [entry.record for entry in existing]
                claimed = tuple((text, _instead(text, records, names, event.checkpoint)) for text in texts)
                histories[event.checkpoint] = CheckpointHistory(history.saved, history.record, event, claimed)
            case Undone(checkpoint=checkpoint, parts=()) if checkpoint in histories:
                history = histories[checkpoint]
                histories[checkpoint] = CheckpointHistory(history.saved, history.record, None)
            case _:
                pass
    return list(histories.values())


def _instead(text: str, records: Sequence[CheckpointRecord], names: Mapping[str, str], own: str) -> tuple[str, ...]:
    """What a rule claimed when a checkpoint went, newest first."""
    rule = parse(text)
    if smoothing_windows([rule]):
        return ("it ranks by smoothed values, which are not recorded",)
    reasons = rule.claims(records)
    order = sorted((record for record in records if record.id in reasons), key=lambda record: -record.sequence)
    return tuple(f"{names[record.id]}: {reasons[record.id]}" for record in order if record.id != own)
