"""Bytes under keys: the one thing that Peakpoint asks of a disk, a bucket or a dictionary."""

import os
from pathlib import Path

from peakpoint.errors import ConfigError
from peakpoint.store.bucket import BucketStore, open_bucket
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
    "BucketStore",
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
    """The store at ``root``: a directory's path, the URL of a bucket, or a store, which is given back as it is.

    Raises:
        ConfigError: a URL that is none of a bucket that this release serves, or an empty path.
        MissingExtraError: it is in a bucket, and obstore is not installed.
    """
    if not isinstance(root, str | os.PathLike):
        return root
    text = os.fspath(root)
    if text.startswith("s3://"):
        return open_bucket(text)
    if "://" in text:
        scheme = text.partition("://")[0]
        raise ConfigError(f"a repository is a directory, or s3://BUCKET/PREFIX; there is no store for {scheme}://")
    if not text:
        raise ConfigError("the repository's root is an empty path; give a directory")
    return LocalStore(Path(text).expanduser())
