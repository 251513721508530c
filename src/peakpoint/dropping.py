"""Dropping parts of a checkpoint that nobody claims any more, such as the optimizer of a best model.

The manifest never changes. A record beside it, ``dropped-1.json``, ``dropped-2.json``, ..., says which parts are gone;
it is durable before their first file goes. Readers take manifest and records together: what was dropped is not there.
Files that a crash has left are litter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import msgspec

from peakpoint import layout
from peakpoint.errors import CorruptError, FormatError
from peakpoint.manifest import FORMAT, Manifest, check_format
from peakpoint.seal import seal, unseal
from peakpoint.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Parts that are gone.

    Attributes:
        parts: their names.
        files: the files that held their tensors.
        at: when.
        why: one sentence.
        by: who decided.
    """

    parts: tuple[str, ...]
    files: tuple[str, ...]
    at: datetime
    why: str
    by: str


def records(store: Store, run: str, name: str) -> Iterator[Dropped]:
    """The records in one directory.

    Raises:
        CorruptError: one is damaged.
        FormatError: a newer release wrote it.
    """
    prefix = layout.checkpoint_prefix(run, name)
    for child in store.children(prefix):
        if child.startswith(layout.DROPPED):
            found = unseal(store.get(f"{prefix}/{child}"), where=child)
            check_format(found, where=child)
            try:
                yield msgspec.convert(found, Dropped)
            except msgspec.ValidationError as error:
                raise FormatError(f"{child} is not a record of dropped parts that this release reads") from error


def left(manifest: Manifest, dropped: Sequence[Dropped]) -> Manifest:
    """A manifest without what was dropped."""
    if not dropped:
        return manifest
    parts = {part for record in dropped for part in record.parts}
    files = {file for record in dropped for file in record.files}
    return replace(
        manifest,
        parts={part: names for part, names in manifest.parts.items() if part not in parts},
        files=tuple(file for file in manifest.files if file.name not in files),
    )


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
    going = [part for part in parts if part in manifest.parts]
    staying = {file for part, files in manifest.parts.items() if part not in going for file in files}
    files = tuple(file for part in going for file in manifest.parts[part] if file not in staying)
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    taken = [child for child in store.children(prefix) if child.startswith(layout.DROPPED)]
    record = Dropped(parts=tuple(going), files=files, at=at, why=why, by=by)
    content = {"format": FORMAT, "parts": record.parts, "files": files, "at": at, "why": why, "by": by}
    store.create(f"{prefix}/{layout.DROPPED}{len(taken) + 1}.json", seal(content))
    for file in files:
        store.delete(layout.file_key(manifest.run, manifest.name, file))
    return left(manifest, [record])


def leftovers(store: Store, run: str, name: str) -> list[str]:
    """Keys of files of dropped parts that are still there."""
    present = set(store.children(layout.checkpoint_prefix(run, name)))
    try:
        gone = {file for record in records(store, run, name) for file in record.files}
    except (CorruptError, FormatError):
        return []  # the checkpoint counts as damaged; nothing of it is touched
    return [layout.file_key(run, name, file) for file in sorted(gone & present)]
