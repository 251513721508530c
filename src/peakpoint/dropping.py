"""Dropping parts of a checkpoint that nobody claims any more, such as the optimizer of a best model.

The manifest never changes. A record beside it, ``dropped-1.json``, ``dropped-2.json``, ..., says which parts are gone;
it is durable before their first file goes. Readers take manifest and records together: what was dropped is not there.
Files that a crash has left are litter. Parts go at once: only whole checkpoints go through the trash.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import msgspec

from peakpoint.errors import CorruptError, FormatError
from peakpoint.format import layout
from peakpoint.format.manifest import FORMAT, Manifest, check_format, without
from peakpoint.format.sealed import seal, unseal
from peakpoint.store import Store, establish


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
