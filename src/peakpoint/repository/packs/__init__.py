"""Packs: the bytes of one checkpoint, stored as differences to the checkpoints before it.

::

    runs/<run>/archived.json         makes the run archived
    runs/<run>/archive/<id>.pack     the packed bytes of one checkpoint, then the index that locates them

A pack names the checkpoints whose bytes its differences need. These may be packed themselves, and may have been
removed since, so a pack is only removed when no other pack needs it.

This module answers which checkpoints of a run are in packs; ``index`` describes a pack, ``reader`` and ``writer`` read
and write it, and ``codec`` compresses.
"""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peakpoint.errors import ConflictError, CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.members import Count, Name, Time
from peakpoint.format.sealed import decode_record, encode_record
from peakpoint.store import Store, establish


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArchive:
    """The record that makes a run archived.

    Attributes:
        packed_bytes: id of each checkpoint to the bytes of its pack.
        by: who decided.
    """

    packed_bytes: Mapping[Name, Count]
    at: Time
    by: str


def run_archive(store: Store, run: str) -> RunArchive | None:
    """Return the record that makes a run archived; None when it is not.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
    """
    key = layout.archived_key(run)
    try:
        return decode_record(RunArchive, store.get(key), where=key)
    except NotFoundError:
        return None


def readable_run_archive(store: Store, run: str) -> RunArchive | None:
    """Return ``run_archive``, and None for an unreadable record: audit names it, and the packs tell the rest."""
    try:
        return run_archive(store, run)
    except (CorruptError, FormatError):
        return None


def mark_archived(store: Store, run: str, archive: RunArchive) -> None:
    """Make a run archived, durably."""
    establish(store, layout.archived_key(run), encode_record(archive))


def packed_bytes(store: Store, run: str, manifests: Iterable[Manifest]) -> dict[str, int]:
    """Return the checkpoints of a run whose bytes are in packs: id to the bytes of the pack.

    These are the ones that the run's record names, and those that lack files and have a pack, whatever the records
    say: a record may be lost, and earlier code wrote one for each checkpoint.
    """
    stored = set(store.children(layout.archive_prefix(run)))
    archive = readable_run_archive(store, run) if stored else None
    recorded = {} if archive is None else archive.packed_bytes
    packed = {}
    for manifest in manifests:
        if f"{manifest.id}{layout.PACK}" in stored and (manifest.id in recorded or not _has_files(store, manifest)):
            packed[manifest.id] = store.size(layout.pack_key(run, manifest.id)) or 0
    return packed


def _has_files(store: Store, manifest: Manifest) -> bool:
    children = set(store.children(layout.checkpoint_prefix(manifest.run, manifest.name)))
    return layout.ARCHIVED not in children and {file.name for file in manifest.files} <= children


def check_not_archived(store: Store, run: str, manifests: Iterable[Manifest]) -> None:
    """Refuse to change single checkpoints of an archived run.

    Raises:
        ConflictError: the run is archived.
    """
    if store.size(layout.archived_key(run)) is not None or packed_bytes(store, run, manifests):
        raise ConflictError(
            f"run {run!r} is archived, so its checkpoints cannot be changed; restore it first: "
            f"peakpoint archive {shlex.quote(store.location)} {shlex.quote(run)} --restore"
        )
