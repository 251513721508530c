"""The manifest: the record whose existence *is* a checkpoint.

A manifest names every file of a checkpoint with its size and digest, every tensor in it, the metrics of the moment and
the reasons for the save. It is written last, appears atomically and never changes. docs/format.md is normative.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import UNSET, UnsetType

import peakpoint
from peakpoint.errors import CorruptError
from peakpoint.format.members import Count, Name, Time
from peakpoint.format.sealed import FORMAT, decode_record, encode_record

MANIFEST = "manifest.json"
SHARDED_FORMAT = 2  # of manifests with shards: a reader of the first format would take one shard for the tensor

Forks = tuple[tuple[int, int], ...]


class TensorRecord(NamedTuple):
    """One tensor in a safetensors file; a row, because there can be tens of thousands.

    Attributes:
        name: its key in the file.
        dtype: safetensors' name of the element type, such as ``"F32"``.
        shape: elements along each dimension; empty for a scalar.
        begin: first byte, counted from the start of the file's data section.
        end: one past the last byte.
        digest: BLAKE3 of the bytes, 64 hexadecimal digits.
    """

    name: str
    dtype: str
    shape: tuple[Count, ...]
    begin: Count
    end: Count
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a checkpoint.

    Attributes:
        name: its name in the checkpoint's directory.
        size: bytes.
        digest: BLAKE3 of the bytes or, when there are tensors, of the digests of the header and of each tensor.
        header: bytes before the data section, 0 when the file holds no tensors.
        header_digest: BLAKE3 of those bytes, "" when the file holds no tensors.
        tensors: in file order; empty for files that are not safetensors.
        shared: id of the checkpoint that wrote these bytes, when the file is another name (a hard link) of its file.
        offsets: of each tensor, in the order of ``tensors``: where it begins in the whole tensor, which other files
            have the rest of. Not written for files that hold whole tensors only.
    """

    name: Name
    size: Count
    digest: str
    header: Count = 0
    header_digest: str = ""
    tensors: tuple[TensorRecord, ...] = ()
    shared: str = ""
    offsets: tuple[tuple[Count, ...], ...] | UnsetType = UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint but for its bytes.

    Attributes:
        id: 16 hexadecimal digits, random, the checkpoint's identity.
        run: the run's name.
        name: the directory's name, for people.
        sequence: 1, 2, 3, ... in the order of commits in this run; never reused.
        report: number of the report at which it was taken; the history up to it belongs to this checkpoint.
        step: optimizer steps completed.
        epoch: the epoch's index as the loop counts it, from 0; None outside epochs.
        metrics: every metric of the moment; NaN and infinities are kept as they were.
        reasons: why it was saved, one sentence a claim.
        asked: the reason given to ``save(reason)``, which protects it from retention; None otherwise.
        parts: part name to the names of the files that hold its tensors (none for a part without tensors).
        files: every file but the manifest itself.
        parent: id of the checkpoint that this one continues, None for the first.
        forks: pairs (after, before): checkpoints with ``after < sequence < before`` belong to abandoned branches.
        created_at: aware datetime, UTC.
        written_by: what wrote it: host, process, versions.
        timing: seconds and bytes of the save, as far as known when the manifest was written.
        members: the checkpoints that this one was made from, as refs ``"run/id"``; empty for one of a training.
    """

    id: Name
    run: Name
    name: Name
    sequence: Count
    report: Count
    step: Count
    epoch: Count | None
    metrics: Mapping[str, float]
    reasons: tuple[str, ...]
    asked: str | None
    parts: Mapping[str, tuple[str, ...]]
    files: tuple[FileRecord, ...]
    parent: Name | None
    forks: Forks
    created_at: Time
    written_by: Mapping[str, str]
    timing: Mapping[str, float]
    members: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.files)

    @property
    def written_bytes(self) -> int:
        """Bytes of the files that were written for this checkpoint, and not shared with an earlier one."""
        return sum(file.size for file in self.files if not file.shared)

    def file(self, name: str) -> FileRecord:
        """Return the record of one file; KeyError when the manifest does not name it."""
        for file in self.files:
            if file.name == name:
                return file
        raise KeyError(name)


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as one sealed line of JSON; ``members`` is written only when there are some."""
    version = SHARDED_FORMAT if any(file.offsets for file in manifest.files) else FORMAT
    return encode_record(manifest, omit=() if manifest.members else ("members",), version=version)


def decode_manifest(data: bytes) -> Manifest:
    """Decode what ``encode_manifest`` wrote.

    Raises:
        CorruptError: the bytes are not those that were written.
        FormatError: a newer release wrote it.
    """
    manifest = decode_record(Manifest, data, where=MANIFEST, unsealed=CorruptError, newest=SHARDED_FORMAT)
    names = [file.name for file in manifest.files]
    absent = {name for part in manifest.parts.values() for name in part} - {*names}
    if MANIFEST in names or len({*names}) < len(names) or absent:
        problem = f"has no {', '.join(sorted(absent))}" if absent else "has a file twice, or itself"
        raise CorruptError(f"{MANIFEST} contradicts itself - at `$.files`, which {problem}; restore it from a backup")
    for file in manifest.files:
        if file.offsets and [*map(len, file.offsets)] != [len(tensor.shape) for tensor in file.tensors]:
            raise CorruptError(
                f"{MANIFEST} contradicts itself - at `$.files`, where the offsets of {file.name} do not fit its "
                "tensors; restore it from a backup"
            )
    return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint, as its manifest describes it; reading it touches no weight file.

    Attributes:
        run: the run's name.
        name: the directory's name, for people.
        id: the identity, 16 hexadecimal digits.
        sequence: place in the order of commits of the run, from 1.
        step: optimizer steps completed.
        epoch: the epoch's index as the loop counts it, from 0; None outside epochs.
        metrics: every metric of the moment.
        reasons: why it was saved, one sentence a claim.
        parts: part name to the names of its tensor files.
        size_bytes: of all files but the manifest.
        path: the directory; None in a store without directories.
        created_at: aware datetime, UTC.
        forks: see ``Manifest.forks``.
    """

    run: str
    name: str
    id: str
    sequence: int
    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    reasons: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    size_bytes: int
    path: Path | None
    created_at: datetime
    forks: tuple[tuple[int, int], ...]

    @property
    def ref(self) -> str:
        """A ref that names this checkpoint and no other."""
        return f"{self.run}/{self.name}"

    def load(self, part: str | None = None, *, into: Any = None, device: Any = None) -> Any:
        """Load it: see ``peakpoint.load``, which takes this as its source, and has further options."""
        return peakpoint.load(self, part=part, into=into, device=device)


def without_parts(manifest: Manifest, dropped: Collection[str]) -> Manifest:
    """Return a manifest without some parts, and without the files that only they have."""
    parts = {part: names for part, names in manifest.parts.items() if part not in dropped}
    remaining = {name for names in parts.values() for name in names}
    needless = {name for part in manifest.parts.keys() - parts for name in manifest.parts[part]} - remaining
    return replace(manifest, parts=parts, files=tuple(file for file in manifest.files if file.name not in needless))
