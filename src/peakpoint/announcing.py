"""Announcing in the journal of a run that an alias is about to point at one of its checkpoints."""

import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from peakpoint.errors import ConflictError, NotFoundError, PeakpointWarning
from peakpoint.format.events import Closed, Promoted, Promoting
from peakpoint.format.manifest import Manifest
from peakpoint.repository import journal as journals
from peakpoint.repository import reader
from peakpoint.repository.aliases import AliasRecord, Broken
from peakpoint.repository.annotations import notes
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.run import Run


@dataclass(slots=True)
class Announced:
    """A promotion that was announced.

    Attributes:
        record: the record of the alias, to be set when it is made.
    """

    record: AliasRecord | None = None


_AHEAD = timedelta(minutes=5)  # that clocks may differ


@contextmanager
def announced(
    run: Run, manifest: Manifest, alias: str, newest: AliasRecord | Broken | None, by: str, clock: Clock
) -> Iterator[Announced]:
    """Announce that an alias is about to point at a checkpoint, and afterwards what came of it.

    Args:
        run: of the checkpoint.
        manifest: of the checkpoint.
        alias: which.
        newest: its newest record, which the one to be made follows.
        by: who does it.
        clock: tells the time.

    Raises:
        GoingError: somebody is removing the checkpoint; nothing was done.
    """
    journal = journals.Journal(run.store, run.name, clock)
    facts: dict[str, Any] = {"checkpoint": manifest.id, "name": manifest.name, "alias": alias, "by": by}
    if isinstance(newest, AliasRecord) and newest.at - clock() > _AHEAD:
        warnings.warn(
            f"record {newest.number} of {alias} is of {newest.at:%Y-%m-%d %H:%M} UTC, which is still to come: a clock "
            "was wrong, and what served when cannot be told for that time",
            PeakpointWarning,
            stacklevel=4,
        )
    facts["token"] = secrets.token_hex(8)
    number = 1 if newest is None else newest.number + 1
    made = Announced()
    try:
        journal.append(Promoting(at=clock(), record=number, **facts))
        journal.sync()
        try:
            _check_stays(run, manifest)
            yield made
        finally:
            done, digest = (None, None) if made.record is None else (made.record.number, made.record.digest)
            journal.append(Promoted(at=clock(), record=done, digest=digest, **facts))
            journal.append(Closed(at=clock(), why=f"peakpoint {alias}"))
    finally:
        journal.close()


class GoingError(ConflictError):
    """A checkpoint is just being removed."""


def _check_stays(run: Run, manifest: Manifest) -> None:
    """Refuse a checkpoint that somebody is removing, or parts of it.

    Whoever removes has said so first, and looks at what is protected after that: one of the two sees the other.

    Raises:
        ConflictError: it is being removed, or gone, or has lost parts since it was looked at.
    """
    name = f"{run.name}/{manifest.name}"
    there = _manifest(run, manifest)
    going = there is None or run.is_being_removed(there)
    now = _manifest(run, manifest)  # once more: a removal may have been over before it was looked for
    if going or now is None:
        raise GoingError(
            f"{name} is just being removed, or parts of it are; nothing was done. peakpoint trash shows what can be "
            "brought back"
        )
    if now.parts != manifest.parts:
        raise GoingError(f"{name} has lost parts meanwhile; nothing was done, look at it again")


def _manifest(run: Run, like: Manifest) -> Manifest | None:
    """A checkpoint as it is now; None when it is gone."""
    try:
        found = reader.read_manifest(run.store, run.name, like.name)
    except NotFoundError:
        return None
    return found if found.id == like.id else None


def complete(run: Run, manifest: Manifest, record: AliasRecord, by: str) -> None:
    """Say what came of announcements whose makers were killed after the record was made."""
    there = notes(run.events()).promoting.values()
    mine = [one for one in there if (one.checkpoint, one.alias) == (manifest.id, record.alias)]
    over = [one for one in mine if one.record <= record.number]
    if not over:
        return
    journal = journals.Journal(run.store, run.name, utc_now)
    try:
        facts: dict[str, Any] = {"checkpoint": manifest.id, "name": manifest.name, "alias": record.alias, "by": by}
        for one in over:
            made = (record.number, record.digest) if one.record == record.number else (None, None)
            journal.append(Promoted(at=journal.now(), record=made[0], digest=made[1], token=one.token, **facts))
        journal.append(Closed(at=journal.now(), why=f"peakpoint {record.alias}"))
    finally:
        journal.close()
