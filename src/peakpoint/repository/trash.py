"""The trash, and dropped parts: records of what went.

A record beside the manifest, ``trashed.json``, holds the manifest's bytes and the time until which the files stay; when
it is durable, the manifest goes, and the checkpoint can be brought back for a while. From then on the checkpoint does
not exist: no reader, rule or resume sees it. To bring it back the manifest is created again from the record. A crash in
between leaves the checkpoint existing.

Parts that nobody claims any more, such as the optimizer of a best model, go at once; only whole checkpoints go through
the trash. A record beside the manifest, ``dropped-1.json``, ``dropped-2.json``, ..., says which parts are gone; it is
durable before their first file goes. Readers take manifest and records together: what was dropped is not there. Files
that a crash has left are litter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import msgspec

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import MANIFEST, Manifest, without
from peakpoint.format.sealed import FORMAT, check_format, decode_record, seal, unseal
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
        return decode_record(Manifest, self.manifest.encode(), where=MANIFEST)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Parts that are gone.

    Attributes:
        parts: their names.
        files: the files that held their tensors.
        at: when.
        why: one sentence.
        by: who decided.
        until: as long the files stay; None when they went at once. Earlier code wrote others, nothing does now.
        key: of the record.
    """

    parts: tuple[str, ...]
    files: tuple[str, ...]
    at: datetime
    why: str
    by: str
    until: datetime | None = None
    key: str = ""


def records(store: Store, run: str, name: str) -> Iterator[Dropped]:
    """The records in one directory.

    Raises:
        CorruptError: one is damaged.
        FormatError: a newer release wrote it.
    """
    prefix = layout.checkpoint_prefix(run, name)
    for child in store.children(prefix):
        if layout.is_dropped(child):
            content = unseal(store.get(f"{prefix}/{child}"), where=child)
            check_format(content, where=child)
            try:
                yield replace(msgspec.convert(content, Dropped), key=f"{prefix}/{child}")
            except msgspec.ValidationError as error:
                raise FormatError(f"{child} is not a record of dropped parts that this release reads") from error


def left(manifest: Manifest, dropped: Sequence[Dropped]) -> Manifest:
    """A manifest without what was dropped."""
    return without(manifest, {part for record in dropped for part in record.parts}) if dropped else manifest


def drop(store: Store, manifest: Manifest, parts: Sequence[str], *, at: datetime, why: str, by: str) -> Manifest:
    """Drop parts; idempotent, and to be repeated when it was interrupted.

    Args:
        store: where.
        manifest: the checkpoint, without what was dropped before.
        parts: the names of parts.
        at: the time.
        why: one sentence.
        by: who decides.

    Returns:
        The manifest without them.

    Raises:
        StoreError: the store refused. If the record exists, the parts are gone, and what is left of them is litter.
    """
    remaining = without(manifest, parts)
    files = [file.name for file in manifest.files if file not in remaining.files]
    going = [part for part in parts if part in manifest.parts]
    content = {"format": FORMAT, "parts": going, "files": files, "at": at, "why": why, "by": by}
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    number = 1 + max((layout.number(child, layout.DROPPED, ".json") for child in store.children(prefix)), default=0)
    establish(store, f"{prefix}/{layout.DROPPED}{number}.json", seal(content))
    for name in files:
        store.delete(layout.file_key(manifest.run, manifest.name, name))
    return remaining


def leftovers(store: Store, run: str, name: str, now: datetime) -> list[str]:
    """Keys of files of dropped parts that are still there and can no longer be brought back."""
    present = set(store.children(layout.checkpoint_prefix(run, name)))
    try:
        dropped = list(records(store, run, name))
    except (CorruptError, FormatError):
        return []  # the checkpoint counts as damaged; nothing of it is touched
    gone = {file for record in dropped if record.until is None or record.until <= now for file in record.files}
    return [layout.file_key(run, name, file) for file in sorted(gone & present)]
