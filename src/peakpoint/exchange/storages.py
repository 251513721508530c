"""The memory of tensors in files of ``torch.save``: archives, and the format before torch 1.6.

Source: PyTorch, ``_load`` and ``_legacy_load`` in ``torch/serialization.py``.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from peakpoint.exchange.constructors import StorageKind


class ArchiveStorages:
    """Storages of an archive, mapped privately from a file where there is one."""

    def __init__(self, archive: Any, sizes: Mapping[str, int], path: Path | None) -> None:
        self._archive, self._sizes = archive, sizes
        self._mapped = None
        if path is not None:
            self._mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        self._swapped = archive.has_record("byteorder") and archive.get_record("byteorder").decode() != sys.byteorder
        self._storages: dict[str, Any] = {}

    def storage(self, description: tuple[Any, ...]) -> Any:
        """Return the storage that a pickle describes; the same one for the same key."""
        kind, key, _, count = description
        dtype = _dtype(kind)
        if key not in self._storages:
            self._storages[key] = _typed(self._memory(f"data/{key}", count * dtype.itemsize, dtype), dtype)
        return self._storages[key]

    def _memory(self, name: str, size: int, dtype: torch.dtype) -> Any:
        if size > self._sizes[name]:
            raise ValueError("a storage ends after its record")
        if self._mapped is None:
            memory = self._archive.get_storage_from_record(name, size, torch.UntypedStorage).untyped_storage()
        else:
            begin = self._archive.get_record_offset(name)
            memory = self._mapped[begin : begin + size]
        if memory.nbytes() != size:
            raise ValueError("a storage ends after its file")
        if self._swapped:
            memory = memory.clone()
            memory.byteswap(dtype)
        return memory


class LegacyStorages:
    """Storages whose bytes follow the pickles."""

    def __init__(self) -> None:
        self._storages: dict[str, Any] = {}

    def storage(self, description: tuple[Any, ...]) -> Any:
        """Return the storage that a pickle describes, whose bytes ``fill`` reads."""
        kind, key, _, count, view = description
        dtype = _dtype(kind)
        if key not in self._storages:
            self._storages[key] = _typed(_allocated(count * dtype.itemsize), dtype)
        if view is None:
            return self._storages[key]
        _, begin, length = view
        memory = self._storages[key].untyped()
        if not 0 <= begin <= begin + length <= memory.nbytes() // dtype.itemsize:
            raise ValueError("a view ends after its storage")
        return _typed(memory[begin * dtype.itemsize : (begin + length) * dtype.itemsize], dtype)

    def fill(self, stream: BinaryIO, keys: list[str]) -> None:
        """Read the bytes of the storages, in the order of their keys."""
        if sorted(keys) != sorted(self._storages):
            raise ValueError("bytes for other storages than those of the tensors")  # which stay as memory was before
        for key in keys:
            storage = self._storages[key]
            memory = storage.untyped()
            count = int.from_bytes(stream.read(8), "little")
            if count * storage.dtype.itemsize != memory.nbytes():
                raise ValueError("a storage does not have the size that it declares")
            if memory.nbytes():
                flat = torch.empty(0, dtype=torch.uint8).set_(memory)
                if stream.readinto(flat.numpy()) != memory.nbytes():  # type: ignore[attr-defined]
                    raise EOFError


def _dtype(kind: Any) -> torch.dtype:
    if not isinstance(kind, StorageKind):
        raise TypeError("a storage of something that is no type")
    return kind.dtype


def _allocated(size: int) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8).untyped_storage()


def _typed(memory: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    return torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
