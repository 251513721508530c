"""Folders of ``torch.distributed.checkpoint``, read in one process.

torch's own reader unpickles the metadata, and everything that is no tensor, without restriction. Here every class that
the metadata may name is a bag of attributes made for this one reading, and every item goes through ``pickles.load``.

Source: PyTorch, ``torch/distributed/checkpoint/{metadata,filesystem}.py``.
"""

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from peakpoint.errors import CorruptError, FormatError
from peakpoint.exchange import pickles

_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = frozenset(
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


class _Record:
    """What the metadata says of one thing."""

    def __init__(self, *_: Any) -> None:
        self.properties: Any = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update({str(name): value for name, value in state.items()})
        else:  # of TensorProperties: the dtype comes first
            self.properties = state


class _Unpickler(pickle.Unpickler):
    """Builds records, shapes, dtypes and paths, and nothing else."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._kinds = {name: type(name.rpartition(".")[2], (_Record,), {}) for name in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "torch.Size":
            return torch.Size
        found = self._kinds.get(full) or _DTYPES.get(full) or pickles.PATHS.get(full)
        if found is None:
            raise FormatError(
                f".metadata names {full}, which has no place there: Peakpoint has run nothing of it; save the "
                "checkpoint again where you trust it"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise FormatError(f".metadata refers to something outside of it: {pid!r}")


def read_folder(folder: Path, *, inert: Collection[str] = ()) -> dict[str, Any]:
    """The state dict of a folder, whole, on the CPU.

    Raises:
        FormatError: the folder names something that is not allowed, or is of a kind that this release does not read.
        CorruptError: it is cut short or damaged.
    """
    pickles.require_torch()
    found = _metadata(folder)
    flat: dict[str, Any] = {}
    try:
        stored = {(index.fqn, vars(index).get("offset")): info for index, info in found.storage_data.items()}
        for name, entry in found.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                flat[name] = _item(folder, stored[name, None], name, inert)
            else:
                flat[name] = _tensor(folder, stored, name, entry)
        return _nested(flat, found.planner_data or {})
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, FormatError | CorruptError):
            raise
        raise CorruptError(f"{folder} is damaged: {error!r}"[:400]) from error


def _metadata(folder: Path) -> Any:
    try:
        with (folder / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
    except FormatError as error:
        raise FormatError(f"{folder}/{error}") from error
    except pickles.UNREADABLE as error:
        raise CorruptError(f"{folder}/.metadata is damaged: {error!r}"[:400]) from error
    if type(found).__name__ != "Metadata" or not isinstance(getattr(found, "storage_data", None), dict):
        raise FormatError(f"{folder}/.metadata is no metadata of torch.distributed.checkpoint's own files")
    return found


def _item(folder: Path, info: Any, name: str, inert: Collection[str]) -> Any:
    """One stored item; its place is checked, since a file says it."""
    file = folder / str(info.relative_path)
    if Path(str(info.relative_path)).name != info.relative_path or not file.is_file():
        raise CorruptError(f"{folder} lists {info.relative_path!r}, which is not in it")
    if getattr(info, "transform_descriptors", None):
        raise FormatError(f"{folder} holds {name!r} in a transformed form ({info.transform_descriptors})")
    if not 0 <= info.offset <= info.offset + info.length <= file.stat().st_size:
        raise CorruptError(f"{file} is cut short: {name!r} is not all there")
    with file.open("rb") as stream:
        stream.seek(info.offset)
        data = stream.read(info.length)
    return pickles.load(data, where=f"{file} ({name})", inert=inert)


def _tensor(folder: Path, stored: Mapping[tuple[str, Any], Any], name: str, entry: Any) -> torch.Tensor:
    """One tensor, put together from its pieces; every element must come from exactly one of them."""
    size, covered = torch.Size(entry.size), 0
    dtype = entry.properties.properties[0]
    pieces = []
    for chunk in entry.chunks:
        piece = _item(folder, stored[name, chunk.offsets], name, ())
        if not isinstance(piece, torch.Tensor) or piece.shape != chunk.sizes or piece.dtype != dtype:
            raise CorruptError(f"{folder} is damaged: a piece of {name!r} is not of the shape or type that it says")
        covered += piece.numel()
        pieces.append((chunk.offsets, piece.detach()))
    if covered != size.numel():
        raise CorruptError(f"{folder} is cut short: {covered} of {size.numel()} elements of {name!r} are there")
    if len(pieces) == 1 and pieces[0][1].shape == size:
        return pieces[0][1]
    whole = torch.empty(size, dtype=dtype)
    for offsets, piece in pieces:
        place = tuple(slice(begin, begin + length) for begin, length in zip(offsets, piece.shape, strict=True))
        whole[place] = piece
    return whole


class _Level(dict[Any, Any]):
    """A level of a state dict while it is put together, as against a dict that was an item."""


def _nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A flat state dict with its levels back; levels whose keys are the numbers 0, 1, 2, ... were lists."""
    whole = _Level()
    for name, value in flat.items():
        *levels, last = paths.get(name, (name,))
        inner = whole
        for level in levels:
            inner = inner.setdefault(level, _Level())
        inner[last] = value
    return {key: _finished(value) for key, value in whole.items()}


def _finished(level: Any) -> Any:
    if not isinstance(level, _Level):
        return level
    if all(type(key) is int for key in level) and sorted(level) == list(range(len(level))):
        return [_finished(level[key]) for key in range(len(level))]
    return {key: _finished(value) for key, value in level.items()}
