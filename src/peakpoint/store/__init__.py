"""Bytes under keys: the one thing that Peakpoint asks of a disk, a bucket or a dictionary."""

import os
from pathlib import Path

from peakpoint.errors import ConfigError
from peakpoint.store.direct_io import FileOps, sync_directory
from peakpoint.store.local import LocalStore
from peakpoint.store.locks import has_locks
from peakpoint.store.memory import MemoryStore
from peakpoint.store.os_errors import translated
from peakpoint.store.protocol import (
    LARGE,
    RECORD,
    SMALL,
    Chunk,
    Filled,
    Filling,
    Hold,
    Log,
    Store,
    check_key,
    create_numbered,
    establish,
    holder_note,
)

__all__ = [
    "LARGE",
    "RECORD",
    "SMALL",
    "Chunk",
    "FileOps",
    "Filled",
    "Filling",
    "Hold",
    "LocalStore",
    "Log",
    "MemoryStore",
    "Store",
    "check_key",
    "create_numbered",
    "establish",
    "has_locks",
    "holder_note",
    "open_store",
    "sync_directory",
    "translated",
]


def open_store(root: str | os.PathLike[str] | Store) -> Store:
    """The store at ``root``: a directory's path, or a store, which is given back as it is.

    Raises:
        ConfigError: a URL, which this release does not serve, or an empty path.
    """
    if not isinstance(root, str | os.PathLike):
        return root
    text = os.fspath(root)
    if "://" in text:
        raise ConfigError(f"{text!r}: this release keeps repositories in local directories only; give a path")
    if not text:
        raise ConfigError("the repository's root is an empty path; give a directory")
    return LocalStore(Path(text).expanduser())
