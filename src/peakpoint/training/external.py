"""Checkpoints that no loop reports: made from others, or saved by other tools."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec

from peakpoint.errors import ConflictError
from peakpoint.format import layout
from peakpoint.format.events import Closed, Opened, Reported, Started
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository.commit import FileImage, commit, image_of
from peakpoint.repository.journal import Journal
from peakpoint.repository.packs import check_not_archived
from peakpoint.repository.provenance import Clock
from peakpoint.repository.reader import list_run
from peakpoint.repository.root import check_capitals, ensure_repository, ensure_run
from peakpoint.repository.run import rules_of
from peakpoint.repository.run_audit import clean_run
from peakpoint.state.typed_json import Encoder
from peakpoint.store import Hold, Store, holder_note
from peakpoint.training.position import Position
from peakpoint.training.records import draft_manifest, last_sequence, saved_event, with_free_name, written_by


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalCheckpoint:
    """A checkpoint that is made from others.

    Attributes:
        part: the only part.
        step: optimizer steps completed by the checkpoints it was made from.
        reason: one sentence: what it was made of, and how.
        asked: why somebody made it; protects it from rules.
        members: see ``Manifest``.
    """

    part: str
    tree: Any
    image: FileImage
    step: int
    metrics: Mapping[str, float]
    reason: str
    asked: str
    members: tuple[str, ...]


def check_run_for(store: Store, run: str) -> tuple[Manifest, ...]:
    """Return the checkpoints of a run to which one that is made from others may be added.

    Raises:
        ConflictError: it holds checkpoints of a training, which would continue from the new one.
    """
    listing = list_run(store, run)
    trained = [manifest.name for manifest in listing.manifests if not manifest.members]
    trained += [checkpoint.name for checkpoint in listing.damaged]
    if trained:
        raise ConflictError(
            f"run {run!r} holds {trained[0]}, which was not made from other checkpoints: a training would continue "
            "from what is added; give another name with --run, run= in Python"
        )
    return listing.manifests


def add(store: Store, run: str, checkpoint: ExternalCheckpoint, clock: Clock) -> Manifest:
    """Commit a checkpoint that no loop has reported; durable on return. When it raises, nothing was added.

    Raises:
        ConflictError: another process writes the run, or see ``check_run_for``.
        StoreError: the store refused.
    """
    by = written_by(trains=False) | {"tool": "peakpoint soup"}
    with hold_run(store, run, clock) as (now, hold):
        manifests = check_run_for(store, run)
        ensure_run(store, run, now, by, ())
        clean_run(store, run, now)
        events = journals.read(store, run).events
        rules = tuple(rule.text for rule in rules_of(events))
        newest = manifests[-1] if manifests else None
        report, step = (1, checkpoint.step) if newest is None else (newest.report + 1, newest.step + 1)
        position = Position(report=report, step=max(step, checkpoint.step))
        position.next_step = position.step
        with open_journal(store, run, clock, by, rules, newest) as journal:
            sequence = last_sequence(manifests, events) + 1
            draft = replace(
                draft_manifest(run, sequence, position, checkpoint.metrics, journal.now(), by),
                reasons=(checkpoint.reason,),
                asked=checkpoint.asked,
                parts={checkpoint.part: (checkpoint.image.name,), "rng": (), "loop": ()},
                members=checkpoint.members,
            )
            draft = with_free_name(store, draft, checkpoint.metrics)
            record_report(journal, draft.report, draft.step, draft.epoch, draft.metrics)
            images = checkpoint.image, state_image({checkpoint.part: checkpoint.tree}, position)
            return commit_external(store, journal, hold, draft, images)


@contextlib.contextmanager
def hold_run(store: Store, run: str, clock: Clock) -> Iterator[tuple[datetime, Hold]]:
    """Hold a run, making its repository if needed; gives the time and the hold.

    Raises:
        ConflictError: another process writes the run, or it is archived.
    """
    now = clock()
    ensure_repository(store, now)
    check_capitals(store, run)
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
    """Open the journal of a run that is held, to go on after its newest checkpoint.

    Args:
        by: who writes; its ``tool`` is why the segment ends.
        newest: the checkpoint that the run goes on from; None for its beginning.
        state: descriptions of the parts.
    """
    with contextlib.closing(Journal(store, run, clock)) as journal:
        journal.append(Opened(at=journal.now(), by=by, rules=rules, state=state or {}))
        origin = (None, 0) if newest is None else (newest.id, newest.report)
        journal.append(Started(at=journal.now(), checkpoint=origin[0], report=origin[1]))
        yield journal
        journal.append(Closed(at=clock(), why=by["tool"]))


def commit_external(
    store: Store,
    journal: Journal,
    hold: Hold,
    draft: Manifest,
    images: Sequence[FileImage],
    adopt: Callable[[str, str], bool] = lambda *_: False,
    written: Callable[[], Mapping[str, Sequence[FileRecord]]] = dict,
    timing: Callable[[], Mapping[str, float]] = dict,
) -> Manifest:
    """Commit a checkpoint of a run that is held, and write to the journal that it exists; see ``commit``.

    Raises:
        ConflictError: the hold was lost.
    """

    def settle() -> None:
        journal.sync()
        hold.check()

    manifest = commit(store, draft, images, first=settle, adopt=adopt, written=written, timing=timing)
    journal.append(saved_event(manifest, journal.now()))
    return manifest


def record_report(journal: Journal, report: int, step: int, epoch: int | None, metrics: Mapping[str, float]) -> None:
    """Write a report to the journal."""
    journal.append(Reported(at=journal.now(), report=report, step=step, epoch=epoch, metrics=metrics))


def state_image(trees: Mapping[str, Any], position: Position, optional: Sequence[str] = ()) -> FileImage:
    """Return everything but the tensors; there are no random generators, as in checkpoints of other tools.

    Args:
        trees: of the parts.
        optional: parts that a training which continues need not have.
    """
    record = {
        "format": 1,
        "parts": trees,
        "rng": {},
        "loop": Encoder().encode(position.as_plain(), "the loop's position"),
        "optional": [*optional, "rng"],
    }
    return image_of(layout.STATE, msgspec.json.encode(record))
