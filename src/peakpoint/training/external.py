"""The writing side of checkpoints that no loop reports: what is made from others, and what other tools have saved."""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec
import torch

from peakpoint.errors import ConflictError
from peakpoint.format import layout, names
from peakpoint.format.events import Closed, Event, Opened, Reported, Saved, Started
from peakpoint.format.manifest import Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository.commit import BLOCK, StreamedImage, WholeImage, commit, unused_name
from peakpoint.repository.journal import Journal
from peakpoint.repository.packs import check_not_archived
from peakpoint.repository.provenance import Clock
from peakpoint.repository.reader import list_run
from peakpoint.repository.root import ensure_repository, ensure_run
from peakpoint.repository.run import rules_of
from peakpoint.repository.run_audit import clean_run
from peakpoint.state.tensor_files import FileLayout
from peakpoint.state.typed_json import Encoder
from peakpoint.store import Hold, Store, holder_note
from peakpoint.training.outcome import written_by
from peakpoint.training.position import Position


def streamed_image(placed: FileLayout, make: Callable[[str], torch.Tensor]) -> StreamedImage:
    """A tensor file whose tensors are made when they are written, one after the other.

    Args:
        placed: where everything goes in the file.
        make: the values of a stored tensor, contiguous, by its name.
    """

    def blocks() -> Iterator[memoryview]:
        yield memoryview(placed.header)
        for span in placed.spans:
            if span.end > span.begin:
                octets = make(span.name).reshape(-1).view(torch.uint8)
                data = memoryview(octets.numpy())  # type: ignore[arg-type] # an array is a buffer
                for begin in range(0, len(data), BLOCK):
                    yield data[begin : begin + BLOCK]

    # transient, so that no more than one tensor waits to be hashed
    return StreamedImage(placed.name, placed.size, len(placed.header), placed.spans, blocks, transient=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalCheckpoint:
    """A checkpoint to be.

    Attributes:
        part: the one part that it has.
        tree: of that part.
        image: its tensors.
        step: optimizer steps completed by what it was made from.
        metrics: measured on it.
        reason: one sentence: what it was made of, and how.
        asked: why somebody wanted it; protects it from rules.
        members: see ``Manifest``.
    """

    part: str
    tree: Any
    image: StreamedImage
    step: int
    metrics: Mapping[str, float]
    reason: str
    asked: str
    members: tuple[str, ...]


def check_run_for(store: Store, run: str) -> tuple[Manifest, ...]:
    """What a run holds, if one more that is made from others may go there.

    Raises:
        ConflictError: it holds checkpoints of a training, which would continue from the new one.
    """
    there = list_run(store, run)
    own = [one.name for one in there.manifests if not one.members] + [one.name for one in there.damaged]
    if own:
        raise ConflictError(
            f"run {run!r} holds {own[0]}, which was not made from other checkpoints: a training would continue from "
            "what is added; give another name with --run, run= in Python"
        )
    return there.manifests


def add(store: Store, run: str, made: ExternalCheckpoint, clock: Clock) -> Manifest:
    """Commit a checkpoint that no loop has reported; durable on return. When it raises, there is none.

    Raises:
        ConflictError: another process writes the run, or see ``check_run_for``.
        StoreError: the store refused.
    """
    with hold_run(store, run, clock) as (now, hold):
        there = check_run_for(store, run)
        ensure_run(store, run, now, _by(), ())
        clean_run(store, run, now)
        events = journals.read(store, run).events
        rules = tuple(rule.text for rule in rules_of(events))
        with open_journal(store, run, clock, _by(), rules, there[-1] if there else None) as journal:
            return _commit(store, journal, hold, _draft(store, run, made, there, events, journal.now()), made)


@contextlib.contextmanager
def hold_run(store: Store, run: str, clock: Clock) -> Iterator[tuple[datetime, Hold]]:
    """Hold a run, in a repository that exists then; gives the time, and the hold.

    Raises:
        ConflictError: another process writes the run, or it is archived.
    """
    now = clock()
    ensure_repository(store, now)
    hold = store.hold(layout.writer_lock(run), holder_note(now))
    try:
        check_not_archived(store, run, list_run(store, run).manifests)
        yield now, hold
    finally:
        hold.release()


@contextlib.contextmanager
def open_journal(
    store: Store,
    run: str,
    clock: Clock,
    by: Mapping[str, str],
    rules: tuple[str, ...],
    newest: Manifest | None,
    state: Mapping[str, str] | None = None,
) -> Iterator[Journal]:
    """The journal of a run that is held, to go on after its newest checkpoint.

    Args:
        store: where.
        run: which.
        clock: tells the time.
        by: who writes; its ``tool`` is why the segment ends.
        rules: those in force.
        newest: what the run goes on from; None for its beginning.
        state: what is told of the state.
    """
    journal = Journal(store, run, clock)
    try:
        journal.append(Opened(at=journal.now(), by=by, rules=rules, state=state or {}))
        origin = (None, 0) if newest is None else (newest.id, newest.report)
        journal.append(Started(at=journal.now(), checkpoint=origin[0], report=origin[1]))
        yield journal
        journal.append(Closed(at=clock(), why=by["tool"]))
    finally:
        journal.close()


def settle(journal: Journal, hold: Hold) -> None:
    """What must be so before a manifest is: the journal is durable, and the run still held.

    Raises:
        ConflictError: the hold was lost.
    """
    journal.sync()
    hold.check()


def with_free_name(store: Store, draft: Manifest, metric: str | None) -> Manifest:
    """A draft with a name that is free, made of its moment and of a metric."""
    name = names.checkpoint_name(
        names.DEFAULT_TEMPLATE,
        run=draft.run,
        id=draft.id,
        step=draft.step,
        epoch=draft.epoch,
        metric=metric,
        metrics=draft.metrics,
    )
    return replace(draft, name=unused_name(store, draft.run, name))


def record_report(journal: Journal, report: int, step: int, epoch: int | None, metrics: Mapping[str, float]) -> None:
    """Write down a moment."""
    journal.append(Reported(at=journal.now(), report=report, step=step, epoch=epoch, metrics=metrics))


def record_saved(journal: Journal, manifest: Manifest) -> None:
    """Write down that a checkpoint exists."""
    journal.append(
        Saved(
            at=journal.now(),
            checkpoint=manifest.id,
            name=manifest.name,
            sequence=manifest.sequence,
            report=manifest.report,
            reasons=manifest.reasons,
            size_bytes=manifest.size_bytes,
        )
    )


def _draft(
    store: Store, run: str, made: ExternalCheckpoint, there: Sequence[Manifest], events: Sequence[Event], at: datetime
) -> Manifest:
    newest = there[-1] if there else None
    used = [event.sequence for event in events if isinstance(event, Saved)]
    report = 1 if newest is None else newest.report + 1
    step = made.step if newest is None else max(made.step, newest.step + 1)
    draft = Manifest(
        id=secrets.token_hex(8),
        run=run,
        name="",
        sequence=1 + max([*used, 0 if newest is None else newest.sequence]),
        report=report,
        step=step,
        epoch=None,
        metrics=made.metrics,
        reasons=(made.reason,),
        asked=made.asked,
        parts={made.part: (made.image.name,), "rng": (), "loop": ()},
        files=(),
        parent=None,
        forks=(),
        created_at=at,
        written_by=_by(),
        timing={},
        members=made.members,
    )
    return with_free_name(store, draft, next(iter(made.metrics), None))


def _by() -> dict[str, str]:
    return written_by(trains=False) | {"tool": "peakpoint soup"}


def _state(made: ExternalCheckpoint, draft: Manifest) -> WholeImage:
    """Everything but the tensors: like what another tool has saved, it has no random generators."""
    position = Position(report=draft.report, step=draft.step, next_step=draft.step)
    record = {
        "format": 1,
        "parts": {made.part: made.tree},
        "rng": {},
        "loop": Encoder().encode(position.as_plain(), "the loop's position"),
        "optional": ["rng"],
    }
    return WholeImage(layout.STATE, msgspec.json.encode(record))


def _commit(store: Store, journal: Journal, hold: Hold, draft: Manifest, made: ExternalCheckpoint) -> Manifest:
    images = (made.image, _state(made, draft))
    record_report(journal, draft.report, draft.step, draft.epoch, draft.metrics)
    manifest = commit(store, draft, images, first=lambda: settle(journal, hold))
    record_saved(journal, manifest)
    return manifest
