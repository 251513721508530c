"""The lives of checkpoints as the journal tells them, gone ones too.

Nothing here decides anything: it replays what was recorded, with the same rules as the trainer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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
        claimed_instead: for one that was removed: each rule in force, with what it claimed instead.
    """

    saved: Saved
    record: Moment
    removed: Removed | None
    claimed_instead: tuple[tuple[str, tuple[str, ...]], ...] = ()


def checkpoint_histories(events: Iterable[Event]) -> list[CheckpointHistory]:
    """Return every checkpoint that a run ever had, earliest first."""
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
                histories[event.checkpoint] = replace(history, removed=event, claimed_instead=claimed)
            case Undone(checkpoint=checkpoint, parts=()) if checkpoint in histories:
                histories[checkpoint] = replace(histories[checkpoint], removed=None, claimed_instead=())
            case _:
                pass
    return list(histories.values())


def _instead(
    text: str, records: Sequence[CheckpointRecord], names: Mapping[str, str], checkpoint: str
) -> tuple[str, ...]:
    """What a rule claimed when a checkpoint was removed, newest first."""
    rule = parse(text)
    if smoothing_windows([rule]):
        return ("it ranks by smoothed values, which are not recorded",)
    reasons = rule.claims(records)
    order = sorted((record for record in records if record.id in reasons), key=lambda record: -record.sequence)
    return tuple(f"{names[record.id]}: {reasons[record.id]}" for record in order if record.id != checkpoint)
