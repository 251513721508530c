"""The trash: removed checkpoints that can be brought back for a while.

A record beside the manifest, ``trashed.json``, holds the manifest's bytes and the time until which the files stay; when
it is durable, the manifest goes. From then on the checkpoint does not exist: no reader, rule or resume sees it. To
bring it back the manifest is created again from the record. A crash in between leaves the checkpoint existing.
"""

from dataclasses import dataclass
from datetime import datetime

import msgspec

from peakpoint.dropping import left, records
from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import FORMAT, MANIFEST, Manifest, check_format, decode
from peakpoint.format.sealed import seal, unseal
from peakpoint.store import Store, establish


@dataclass(frozen=True, slots=True, kw_only=True)
class Trashed:
    """A checkpoint in the trash.

    Attributes:
        manifest: the bytes of its manifest, as text.
        until: when its files may go.
        at: when it was removed.
        why: one sentence.
        by: who decided.
    """

    manifest: str
    until: datetime
    at: datetime
    why: str
    by: str

    def decoded(self) -> Manifest:
        """The manifest.

        Raises:
            CorruptError: it is damaged.
            FormatError: a newer release wrote it.
        """
        return decode(self.manifest.encode(), where=MANIFEST)


def discard(store: Store, manifest: Manifest, *, until: datetime, at: datetime, why: str, by: str) -> None:
    """Make a checkpoint cease to exist, keeping its files; idempotent, and to be repeated when it was interrupted.

    Raises:
        StoreError: the store refused. If the manifest is gone, the checkpoint is in the trash.
    """
    key = layout.manifest_key(manifest.run, manifest.name)
    record = layout.trashed_key(manifest.run, manifest.name)
    try:
        text = store.get(key).decode()
    except NotFoundError:
        return  # somebody else has removed it
    content = {"format": FORMAT, "manifest": text, "until": until, "at": at, "why": why, "by": by}
    store.put(record, [seal(content)])  # in the place of one by an attempt that was cut short, or by one at this moment
    store.delete(key)


def read(store: Store, run: str, name: str) -> Trashed | None:
    """The record in one directory; None when what was there is not in the trash.

    Raises:
        CorruptError: it is damaged.
        FormatError: a newer release wrote it.
    """
    key = layout.trashed_key(run, name)
    try:
        record = unseal(store.get(key), where=key)
    except NotFoundError:
        return None
    check_format(record, where=key)
    try:
        return msgspec.convert(record, Trashed)
    except msgspec.ValidationError as error:
        raise FormatError(f"{key} is not a record of a removed checkpoint that this release reads") from error


@dataclass(frozen=True, slots=True)
class InTrash:
    """A checkpoint that can be brought back.

    Attributes:
        manifest: of the checkpoint, without the parts that had been dropped.
        record: says until when, why and by whom it was removed.
    """

    manifest: Manifest
    record: Trashed


def contents(store: Store, run: str) -> list[InTrash]:
    """What is in the trash of a run, the first that goes first; damaged records are left out (audit names them)."""
    entries = []
    for child in store.children(layout.checkpoints_prefix(run)):
        name = child.removesuffix("/")
        if name == child or store.size(layout.manifest_key(run, name)) is not None:
            continue
        try:
            record = read(store, run, name)
            if record is not None:
                manifest = left(record.decoded(), list(records(store, run, name)))
                entries.append(InTrash(manifest, record))
        except (CorruptError, FormatError):
            continue
    return sorted(entries, key=lambda entry: (entry.record.until, entry.manifest.sequence))


def bring_back(store: Store, record: Trashed) -> Manifest:
    """Make a checkpoint exist again; the caller knows that its files are whole.

    Returns:
        Its manifest.
    """
    manifest = record.decoded()
    establish(store, layout.manifest_key(manifest.run, manifest.name), record.manifest.encode())
    store.delete(layout.trashed_key(manifest.run, manifest.name))
    return manifest
