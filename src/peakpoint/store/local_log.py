"""Append-only files."""

import os
from pathlib import Path

from peakpoint.store.direct_io import FileOps
from peakpoint.store.os_errors import translated


class LocalLog:
    """See ``Log``: an open file, written at its end."""

    def __init__(self, path: Path, fd: int, ops: FileOps) -> None:
        self._path, self._fd, self._ops = path, fd, ops
        self._size = 0
        self._torn = False

    def append(self, data: bytes) -> None:
        r"""See ``Log.append``.

        A write that failed half-way is taken back. Where that fails, too, the next one begins with a newline, so that
        only the torn line is lost.
        """
        with translated("append to", self._path):
            line = memoryview(b"\n" + data if self._torn else data)
            unwritten = line
            try:
                while unwritten:
                    unwritten = unwritten[self._ops.write(self._fd, unwritten) :]
            except OSError:
                self._take_back(len(line) - len(unwritten))
                raise
            self._size += len(line)
            self._torn = False

    def _take_back(self, written: int) -> None:
        if not written:
            return
        try:
            self._ops.truncate(self._fd, self._size)
        except OSError:  # the error of the write is the one to report
            self._size += written
            self._torn = True

    def sync(self) -> None:
        """See ``Log.sync``."""
        with translated("make durable", self._path):
            self._ops.fsync(self._fd)

    def close(self) -> None:
        """See ``Log.close``."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1
