"""The records of every kind of checkpoint: of a training, a soup or an import."""

import os
import platform
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime

import torch

from peakpoint._version import __version__
from peakpoint.format import names
from peakpoint.format.events import Event, Saved
from peakpoint.format.manifest import Forks, Manifest
from peakpoint.repository.commit import unused_name
from peakpoint.repository.provenance import script_version
from peakpoint.store import Store
from peakpoint.training.position import Position


def written_by(*, trains: bool = True) -> dict[str, str]:
    """Return host, process id and versions for records; if this process trains, also that of its code in git."""
    code = script_version() if trains else None
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "peakpoint": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({} if code is None else {"code": code}),
    }


def draft_manifest(
    run: str,
    sequence: int,
    position: Position,
    metrics: Mapping[str, float],
    at: datetime,
    by: Mapping[str, str],
    parent: str | None = None,
    forks: Forks = (),
) -> Manifest:
    """Return the manifest of a moment, without a name, reasons, parts and files."""
    return Manifest(
        id=secrets.token_hex(8),
        run=run,
        name="",
        sequence=sequence,
        report=position.report,
        step=position.step,
        epoch=position.epoch,
        metrics=metrics,
        reasons=(),
        asked=None,
        parts={},
        files=(),
        parent=parent,
        forks=forks,
        created_at=at,
        written_by=by,
        timing={},
    )


def with_free_name(
    store: Store, draft: Manifest, preferred: Iterable[str], template: str = names.DEFAULT_TEMPLATE
) -> Manifest:
    """Return a draft with a free name, made of its moment and the first of the preferred metrics that it has."""
    name = names.checkpoint_name(
        template,
        run=draft.run,
        id=draft.id,
        step=draft.step,
        epoch=draft.epoch,
        metric=next((metric for metric in preferred if metric in draft.metrics), None),
        metrics=draft.metrics,
    )
    return replace(draft, name=unused_name(store, draft.run, name))


def saved_event(manifest: Manifest, at: datetime) -> Saved:
    """Return what the journal says of a checkpoint that was committed."""
    return Saved(
        at=at,
        checkpoint=manifest.id,
        name=manifest.name,
        sequence=manifest.sequence,
        report=manifest.report,
        reasons=manifest.reasons,
        size_bytes=manifest.size_bytes,
    )


def last_sequence(manifests: Iterable[Manifest], events: Iterable[Event]) -> int:
    """Return the highest sequence number that a run has ever used, 0 when none."""
    used = [manifest.sequence for manifest in manifests]
    used += [event.sequence for event in events if isinstance(event, Saved)]
    return max(used, default=0)
