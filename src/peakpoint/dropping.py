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
        until: as long the files stay, and the parts can be brought back; None when they went at once.
    """

    parts: tuple[str, ...]
    files: tuple[str, ...]
    at: datetime
    why: str
    by: str
    until: datetime | None = None


def records(store: Store, run: str, name: str) -> Iterator[Dropped]:
    """The records in one directory.

    Raises:
        CorruptError: one is damaged.
        FormatError: a newer release wrote it.
    """
    prefix = layout.checkpoint_prefix(run, name)
    for child in store.children(prefix):
        if child.startswith(layout.DROPPED):
            yield _read(store, prefix, child)


def _read(store: Store, prefix: str, child: str) -> Dropped:
    found = unseal(store.get(f"{prefix}/{child}"), where=child)
    check_format(found, where=child)
    try:
        return msgspec.convert(found, Dropped)
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


def drop(
    store: Store,
    manifest: Manifest,
    parts: Sequence[str],
    *,
    at: datetime,
    why: str,
    by: str,
    until: datetime | None = None,
) -> Manifest:
    """Drop parts; idempotent, and to be repeated when it was interrupted.

    Args:
        store: where.
        manifest: the checkpoint, without what was dropped before.
        parts: the names of parts.
        at: the time.
        why: one sentence.
        by: who decides.
        until: as long the files stay, so that the parts can be brought back; None lets them go at once.

    Returns:
        The manifest without them.

    Raises:
        StoreError: the store refused. If the record exists, the parts are gone, and what is left of them is litter.
    """
    going = [part for part in parts if part in manifest.parts]
    staying = {file for part, files in manifest.parts.items() if part not in going for file in files}
    files = tuple(file for part in going for file in manifest.parts[part] if file not in staying)
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    record = Dropped(parts=tuple(going), files=files, at=at, why=why, by=by, until=until)
    content = {"format": FORMAT, "parts": record.parts, "files": files, "at": at, "why": why, "by": by}
    if until is not None:
        content["until"] = until
    store.create(f"{prefix}/{layout.DROPPED}{_next(store, prefix)}.json", seal(content))
    for file in files if until is None else ():
        store.delete(layout.file_key(manifest.run, manifest.name, file))
    return left(manifest, [record])


def _next(store: Store, prefix: str) -> int:
    numbers = [
        child.removeprefix(layout.DROPPED).removesuffix(".json")
        for child in store.children(prefix)
        if child.startswith(layout.DROPPED)
    ]
    return 1 + max((int(number) for number in numbers if number.isascii() and number.isdecimal()), default=0)


def bring_back(store: Store, manifest: Manifest) -> tuple[str, ...]:
    """Bring back all parts whose files are still there.

    Returns:
        Their names.
    """
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    children = store.children(prefix)
    back: list[str] = []
    for child in children:
        if child.startswith(layout.DROPPED):
            record = _read(store, prefix, child)
            if record.until is not None and (set(record.files) <= set(children) or layout.ARCHIVED in children):
                store.delete(f"{prefix}/{child}")
                back += record.parts
    return tuple(back)


def leftovers(store: Store, run: str, name: str, now: datetime) -> list[str]:
    """Keys of files of dropped parts that are still there and can no longer be brought back."""
    present = set(store.children(layout.checkpoint_prefix(run, name)))
    try:
        dropped = list(records(store, run, name))
    except (CorruptError, FormatError):
        return []  # the checkpoint counts as damaged; nothing of it is touched
    gone = {file for record in dropped if record.until is None or record.until <= now for file in record.files}
    return [layout.file_key(run, name, file) for file in sorted(gone & present)]
