"""Locks on files, which the kernel lets go of when their process dies.

Whoever holds a run has an open-file-description lock. Unlike a POSIX record lock it does not go when somebody in the
same process opens and closes the file, as every backup does, and it excludes a second holder in the same process.
Forked children share it until each has closed its copy: a hook closes it, so that data-loader workers that outlive a
killed trainer do not keep its lock, and ``exec`` closes it, too. A library that forks in C runs no hook of Python's;
its child keeps the lock until it ends or executes something else.
"""

import errno
import fcntl
import os
import struct
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from peakpoint.errors import ConflictError, NotFoundError
from peakpoint.store.os_errors import IgnoredErrors
from peakpoint.store.protocol import held_by, holder_text

# F_OFD_GETLK and F_OFD_SETLK of fcntl(2); Python does not name those of macOS
_ASK, _TAKE = (92, 90) if sys.platform == "darwin" else (36, 37)
# struct flock of fcntl(2): (type, whence, start, len, pid) on Linux, (start, len, pid, type, whence) on macOS and BSD
_FLOCK, _TYPE = ("hhqqi", 0) if sys.platform == "linux" else ("qqihh", 3)
_REFUSED = frozenset({errno.EAGAIN, errno.EACCES})
_NOTE = 4096  # bytes of a note that are read


def _whole_file() -> bytes:
    fields = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return struct.pack(_FLOCK, *(fields if sys.platform == "linux" else (0, 0, 0, *fields[:2])))


def _take(fd: int) -> bool:
    """Lock an open file; whether it is locked now, or was already."""
    with IgnoredErrors(_REFUSED):
        with IgnoredErrors({errno.EINVAL}):
            fcntl.fcntl(fd, _TAKE, _whole_file())
            return True
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kernel without such locks, as gVisor is
        return True
    return False


def is_locked(fd: int) -> bool:
    """Whether somebody has locked a file, through another descriptor than this."""
    with IgnoredErrors({errno.EINVAL}):
        return bool(struct.unpack_from(_FLOCK, fcntl.fcntl(fd, _ASK, _whole_file()))[_TYPE] != fcntl.F_UNLCK)
    with IgnoredErrors(_REFUSED):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # goes when it is closed
        return False
    return True


class ExclusiveLock:
    """See ``Hold``.

    Args:
        fd: the open file, which is closed at the end.
        path: where it is.
        note: who holds it.
        status: the status of what is at ``path`` now.

    Raises:
        ConflictError: somebody holds it.
    """

    _of_process: ClassVar[set["ExclusiveLock"]] = set()  # of this process

    def __init__(self, fd: int, path: Path, note: bytes, status: Callable[[], os.stat_result]) -> None:
        self._fd, self._path, self._note, self._status = fd, path, note, status
        self._of_process.add(self)
        try:
            self._begin()
        except BaseException:
            self.release()
            raise

    def _begin(self) -> None:
        if not _take(self._fd):
            raise held_by(os.pread(self._fd, _NOTE, 0))
        note, self._note = self._note, b""  # on a full disk it is held without a note
        with IgnoredErrors({errno.ENOSPC, errno.EDQUOT}):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, note, 0)
            self._note = note
        self.check()  # somebody may have removed the file before it was locked

    def check(self) -> None:
        """See ``Hold.check``: the file is the one that is at its place, is locked, and has this holder's note."""
        if self._fd < 0:
            raise ConflictError(f"{self._path} is not held any more")
        try:
            is_same = os.path.samestat(os.fstat(self._fd), self._status())
        except NotFoundError:
            is_same = False
        if not is_same or not _take(self._fd) or os.pread(self._fd, len(self._note) + 1, 0) != self._note:
            raise ConflictError(
                f"{self._path} was removed, replaced or overwritten while this process held it: another one may be "
                "writing here by now, so nothing more is committed; stop this process, see that no other one is at "
                "work, and start again"
            )

    def release(self) -> None:
        """See ``Hold.release``."""
        self._of_process.discard(self)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @classmethod
    def release_inherited(cls) -> None:
        """Close the copies that a fork has made; the parent goes on holding what it holds."""
        for hold in list(cls._of_process):
            hold.release()


os.register_at_fork(after_in_child=ExclusiveLock.release_inherited)


def holder(fd: int) -> str | None:
    """Who holds an open file, in words; takes no lock."""
    return holder_text(os.pread(fd, _NOTE, 0)) if is_locked(fd) else None


class SharedLock:
    """See ``Store.reading``: a shared ``flock``, which needs a file that may be read.

    Args:
        fd: an open file with a shared lock, which goes when it is closed.
    """

    def __init__(self, fd: int) -> None:
        self._close = weakref.finalize(self, os.close, fd)

    def check(self) -> None:
        """See ``Hold.check``: nobody can take it away."""

    def release(self) -> None:
        """See ``Hold.release``."""
        self._close()


def share(fd: int) -> SharedLock | None:
    """Say that an open file is being read; None, and the file closed, on a file system without such locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # those who ask hold it for microseconds
    except OSError:
        os.close(fd)
        return None
    return SharedLock(fd)


def is_shared(fd: int) -> bool:
    """Whether somebody says that an open file is being read: an exclusive lock is refused."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _REFUSED
    return False
