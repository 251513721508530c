"""Locks on files, which the kernel lets go of when their process dies, and what there is where it has none.

Whoever holds a run has an open-file-description lock. Unlike a POSIX record lock it does not go when somebody in the
same process opens and closes the file, as every backup does, and it excludes a second holder in the same process.
Forked children share it until each has closed its copy: a hook closes it, so that data-loader workers that outlive a
killed trainer do not keep its lock, and ``exec`` closes it, too. A library that forks in C runs no hook of Python's;
its child keeps the lock until it ends or executes something else.

NFS without its lock daemon and Lustre without the option ``flock`` refuse every lock. There, holders on one machine
exclude each other by a name in the kernel (a socket), which goes with its process, too. Whoever comes from another
machine sees the note of a holder that has not let go, alive or not, and is refused.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from peakpoint.errors import ConflictError, NotFoundError
from peakpoint.store.os_errors import IgnoredErrors
from peakpoint.store.protocol import held_by, holder_text, is_elsewhere, marked_without_locks

# F_OFD_GETLK and F_OFD_SETLK of fcntl(2); Python does not name those of macOS
_ASK, _TAKE = (92, 90) if sys.platform == "darwin" else (36, 37)
# struct flock of fcntl(2): (type, whence, start, len, pid) on Linux, (start, len, pid, type, whence) on macOS and BSD
_FLOCK, _TYPE = ("hhqqi", 0) if sys.platform == "linux" else ("qqihh", 3)
_REFUSED = frozenset({errno.EAGAIN, errno.EACCES})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_NOTE = 4096  # bytes of a note that are read


def _whole_file() -> bytes:
    fields = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return struct.pack(_FLOCK, *(fields if sys.platform == "linux" else (0, 0, 0, *fields[:2])))


def _take(fd: int) -> bool | None:
    """Lock an open file; whether it is locked now, or was already. None on a file system without locks."""
    with IgnoredErrors(_REFUSED):
        with IgnoredErrors({errno.EINVAL, *_NO_LOCKS}):
            fcntl.fcntl(fd, _TAKE, _whole_file())
            return True
        with IgnoredErrors(_NO_LOCKS):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kernel without such locks, as gVisor is
            return True
        return None
    return False


def is_locked(fd: int) -> bool | None:
    """Whether somebody has locked a file, through another descriptor than this. None without locks."""
    with IgnoredErrors({errno.EINVAL, *_NO_LOCKS}):
        return bool(struct.unpack_from(_FLOCK, fcntl.fcntl(fd, _ASK, _whole_file()))[_TYPE] != fcntl.F_UNLCK)
    with IgnoredErrors(_REFUSED):
        with IgnoredErrors(_NO_LOCKS):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # goes when it is closed
            return False
        return None
    return True


def has_locks(fd: int) -> bool:
    """Whether the file system of an open file has locks; takes none."""
    return is_locked(fd) is not None


def _name_in_kernel(fd: int) -> str:
    """The name by which the holders of an open file exclude each other on this machine."""
    status = os.fstat(fd)
    return f"\0peakpoint-{status.st_dev:x}-{status.st_ino:x}"


def _take_name(fd: int) -> socket.socket | None:
    """Take the name of an open file, until the socket is closed.

    Raises:
        OSError: ``EADDRINUSE``: somebody on this machine has it.
    """
    if sys.platform != "linux":
        return None
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(_name_in_kernel(fd))
    except OSError:
        name.close()
        raise
    return name


def _is_name_taken(fd: int) -> bool:
    if sys.platform != "linux":
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking, IgnoredErrors({errno.ECONNREFUSED, errno.ENOENT}):
        asking.connect(_name_in_kernel(fd))
        return True
    return False


class ExclusiveLock:
    """See ``Hold``.

    Args:
        fd: the open file, which is closed at the end.
        path: where it is.
        note: who holds it.
        status: the status of what is at ``path`` now.

    Attributes:
        without_locks: whether the file system has none.

    Raises:
        ConflictError: somebody holds it.
    """

    _of_process: ClassVar[set["ExclusiveLock"]] = set()  # of this process

    def __init__(self, fd: int, path: Path, note: bytes, status: Callable[[], os.stat_result]) -> None:
        self._fd, self._path, self._note, self._status = fd, path, note, status
        self._name: socket.socket | None = None
        self.without_locks = False
        self._of_process.add(self)
        try:
            self._begin()
        except BaseException:
            self._close()
            raise

    def _begin(self) -> None:
        is_locked = _take(self._fd)
        if is_locked is None:
            self._begin_without_locks()
        elif not is_locked:
            raise held_by(os.pread(self._fd, _NOTE, 0))
        note, self._note = self._note, b""  # on a full disk it is held without a note
        with IgnoredErrors({errno.ENOSPC, errno.EDQUOT}):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, note, 0)
            self._note = note
        self.check()  # somebody may have removed the file before it was locked

    def _begin_without_locks(self) -> None:
        self.without_locks = True
        note = os.pread(self._fd, _NOTE, 0)
        if is_elsewhere(note):
            raise held_by(note, f"; this file system has no locks: if that process has ended, delete {self._path}")
        try:
            self._name = _take_name(self._fd)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise held_by(note) from error
        self._note = marked_without_locks(self._note)

    def check(self) -> None:
        """See ``Hold.check``: the file is the one that is at its place, is locked, and has this holder's note."""
        if self._fd < 0:
            raise ConflictError(f"{self._path} is not held any more")
        if not self._is_sound():
            raise ConflictError(
                f"{self._path} was removed, replaced or overwritten while this process held it: another one may be "
                "writing here by now, so nothing more is committed; stop this process, see that no other one is at "
                "work, and start again"
            )

    def _is_sound(self) -> bool:
        try:
            is_same = os.path.samestat(os.fstat(self._fd), self._status())
        except NotFoundError:
            return False
        return is_same and _take(self._fd) is not False and os.pread(self._fd, len(self._note) + 1, 0) == self._note

    def release(self) -> None:
        """See ``Hold.release``."""
        with contextlib.suppress(OSError):  # then other machines are told whom to look for, and what to delete
            if self._fd >= 0 and self.without_locks and self._is_sound():
                os.ftruncate(self._fd, 0)
        self._close()

    def _close(self) -> None:
        self._of_process.discard(self)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._name is not None:
            self._name.close()

    @classmethod
    def release_inherited(cls) -> None:
        """Close the copies that a fork has made; the parent goes on holding what it holds."""
        for hold in list(cls._of_process):
            hold._close()  # noqa: SLF001 - a class method


os.register_at_fork(after_in_child=ExclusiveLock.release_inherited)


def holder(fd: int) -> str | None:
    """Who holds an open file, in words; takes no lock."""
    note, is_held = os.pread(fd, _NOTE, 0), is_locked(fd)
    if is_held is None:
        is_held = is_elsewhere(note) or _is_name_taken(fd)
    return holder_text(note) if is_held else None


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
