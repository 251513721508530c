"""Folders of ``torch.distributed.checkpoint``, read in one process.

torch's own reader unpickles the metadata, and everything but tensors, without restriction. Here every class that the
metadata may name is a bag of attributes, and every item goes through ``pickles.load``. Python's unpickler is not safe
for the metadata whatever its ``find_class`` allows: a ``BUILD`` sets attributes of the class itself, for the process.

Source: PyTorch, ``torch/distributed/checkpoint/{metadata,filesystem}.py``.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peakpoint.errors import CorruptError, FormatError
from peakpoint.exchange import pickles
from peakpoint.exchange.constructors import PATHS
from peakpoint.exchange.pickle_builder import PickleBuilder, StandIn, Unbuilt

DCP_METADATA, _PIECES = ".metadata", ".distcp"
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORD_NAMES = frozenset(
    f"{_METADATA}.{name}"
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
) | {"torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout"}
_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


class _MetadataRecord(StandIn):
    """A record of the metadata, as attributes."""

    def __init__(self, *_: Any) -> None:
        self.properties: Any = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update({str(name): value for name, value in state.items()})
        else:  # of TensorProperties: the dtype comes first
            self.properties = state


_RECORDS = {name: type(name.rpartition(".")[2], (_MetadataRecord,), {}) for name in _RECORD_NAMES}


class _MetadataBuilder(PickleBuilder):
    """Builds records, shapes, dtypes and paths only."""

    def __init__(self) -> None:
        super().__init__({**_RECORDS, "torch.Size": torch.Size, **PATHS}, _DTYPES, _refuse_storage)

    def named(self, name: str) -> Any:
        value = super().named(name)
        if isinstance(value, Unbuilt):
            raise FormatError(
                f".metadata was not loaded: it names {name}, which does not belong there; if you trust the folder, "
                "load it with torch and save the checkpoint again"
            )
        return value


def _refuse_storage(description: tuple[Any, ...]) -> Any:
    raise FormatError(f".metadata refers to something outside of it: {description!r}")


def dcp_files(folder: Path) -> list[Path]:
    """Return the files of a folder, and what Lightning lays beside them."""
    children = sorted(folder.iterdir())
    names = {DCP_METADATA, "meta.pt"}
    return [child for child in children if child.is_file() and (child.name in names or child.suffix == _PIECES)]


def read_folder(folder: Path, *, inert: Collection[str] = ()) -> dict[str, Any]:
    """Return the state dict of a folder, whole, on the CPU.

    Raises:
        FormatError: the folder names a class that is not allowed, or is of a kind that this release cannot read.
        CorruptError: it is cut short or damaged.
    """
    pickles.require_torch()
    metadata = _metadata(folder)
    files = {file.name: file for file in dcp_files(folder)}
    flat: dict[str, Any] = {}
    try:
        stored = {(index.fqn, vars(index).get("offset")): info for index, info in metadata.storage_data.items()}
        for name, entry in metadata.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                flat[name] = _item(files, stored[name, None], name, inert)
            else:
                flat[name] = _tensor(folder, files, stored, name, entry)
        return _nested(flat, metadata.planner_data or {})
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, FormatError | CorruptError):
            raise
        raise CorruptError(f"{folder} is damaged: {error!r}"[:400]) from error


def _metadata(folder: Path) -> Any:
    try:
        data = (folder / DCP_METADATA).read_bytes()
        pickles.check_operations(data, f"{folder}/.metadata")
        metadata = _MetadataBuilder().load(data)
    except FormatError as error:
        raise FormatError(f"{folder}/{error}") from error
    except pickles.UNREADABLE as error:
        raise CorruptError(f"{folder}/.metadata is damaged: its pickle cannot be built: {error}"[:400]) from error
    if type(metadata).__name__ != "Metadata" or not isinstance(getattr(metadata, "storage_data", None), dict):
        raise FormatError(f"{folder}/.metadata is not metadata of torch.distributed.checkpoint's own files")
    return metadata


def _item(files: Mapping[str, Path], info: Any, name: str, inert: Collection[str]) -> Any:
    """Read one stored item; its place comes from a file, so it is checked."""
    file = files.get(info.relative_path)
    if file is None:
        raise CorruptError(f"{files[DCP_METADATA]} lists {info.relative_path!r}, which is not beside it")
    if getattr(info, "transform_descriptors", None):
        raise FormatError(f"{file} holds {name!r} in a transformed form ({info.transform_descriptors})")
    if not 0 <= info.offset <= info.offset + info.length <= file.stat().st_size:
        raise CorruptError(f"{file} is cut short: {name!r} is incomplete")
    with file.open("rb") as stream:
        stream.seek(info.offset)
        data = stream.read(info.length)
    return pickles.load(data, where=f"{file} ({name})", inert=inert)


def _tensor(
    folder: Path, files: Mapping[str, Path], stored: Mapping[tuple[str, Any], Any], name: str, entry: Any
) -> torch.Tensor:
    """Put one tensor together from its chunks; every element must come from exactly one of them."""
    size, covered = torch.Size(entry.size), 0
    dtype = entry.properties.properties[0]
    chunks = []
    for chunk in entry.chunks:
        values = _item(files, stored[name, chunk.offsets], name, ())
        if not isinstance(values, torch.Tensor) or values.shape != chunk.sizes or values.dtype != dtype:
            raise CorruptError(f"{folder} is damaged: a chunk of {name!r} does not have the shape or type it declares")
        covered += values.numel()
        chunks.append((chunk.offsets, values.detach()))
    boxes = [_box(offsets, values.shape) for offsets, values in chunks]
    if covered != size.numel():
        raise CorruptError(f"{folder} is cut short: it has {covered} of {size.numel()} elements of {name!r}")
    if not all(0 <= side.start <= side.stop <= length for box in boxes for side, length in zip(box, size, strict=True)):
        raise CorruptError(f"{folder} is damaged: a chunk of {name!r} is not within its shape")
    if _overlap(boxes):
        raise CorruptError(f"{folder} is damaged: chunks of {name!r} overlap")
    if len(chunks) == 1 and chunks[0][1].shape == size:
        return chunks[0][1]
    tensor = torch.empty(size, dtype=dtype)
    for box, (_, values) in zip(boxes, chunks, strict=True):
        tensor[box] = values
    return tensor


def _box(offsets: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + length) for begin, length in zip(offsets, shape, strict=True))


def _overlap(boxes: Sequence[tuple[slice, ...]]) -> bool:
    """Whether two boxes have an element in common."""
    ordered = sorted(boxes, key=lambda box: [side.start for side in box])
    for number, box in enumerate(ordered):
        for other in itertools.islice(ordered, number + 1, None):
            if box and other[0].start >= box[0].stop:
                break
            if all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(box, other, strict=True)):
                return True
    return False


class _Level(dict[Any, Any]):
    """A level of a state dict while it is put together; a plain dict is an item."""


def _nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return a flat state dict with its levels; levels whose keys are the numbers 0, 1, 2, ... were lists."""
    root = _Level()
    for name, value in flat.items():
        *levels, last = paths.get(name, (name,))
        inner = root
        for level in levels:
            inner = inner.setdefault(level, _Level())
        inner[last] = value
    return {key: _finished(value) for key, value in root.items()}


def _finished(level: Any) -> Any:
    if not isinstance(level, _Level):
        return level
    if all(type(key) is int for key in level) and sorted(level) == list(range(len(level))):
        return [_finished(level[key]) for key in range(len(level))]
    return {key: _finished(value) for key, value in level.items()}
