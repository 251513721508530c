"""Opening what is below a directory, never through a link, whoever exchanges names at the same time.

Each component is opened on its own, relative to the one before, and must not be a link: what has been checked is what
is used. The directory itself may be one.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from peakpoint.errors import ConflictError, FormatError, StoreError

_REACH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
# what takes the place of a file after it was looked at is neither followed nor waited for
_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def kind(status: os.stat_result) -> str:
    """What is no file, in words."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "a device")


@contextlib.contextmanager
def directory(root: str, names: Iterable[str]) -> Iterator[int]:
    """A descriptor of a directory below ``root``, for calls that take one; it cannot list.

    Raises:
        OSError: it is not there, or a link stands in the way.
    """
    dir_fd = os.open(root, _REACH)
    try:
        for name in names:
            inner = enter(dir_fd, name)
            os.close(dir_fd)
            dir_fd = inner
        yield dir_fd
    finally:
        os.close(dir_fd)


def enter(dir_fd: int, name: str) -> int:
    """A descriptor of a directory in an open one."""
    try:
        return os.open(name, _REACH | os.O_NOFOLLOW, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and stat.S_ISLNK(status(dir_fd, name).st_mode):
            problem = f"{name} is a symbolic link, and none is followed below the root of a repository"
            raise OSError(errno.ELOOP, problem) from error
        raise


def status(dir_fd: int, name: str) -> os.stat_result:
    """``lstat(2)`` of a name in an open directory."""
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def open_file(dir_fd: int, path: Path, flags: int = os.O_RDONLY) -> int:
    """Open the file that has the name of ``path`` in an open directory.

    Raises:
        FormatError: it is no file; then it is not opened: pipes and devices notice that.
        OSError: it cannot be opened.
    """
    with contextlib.suppress(FileNotFoundError):  # the call that opens it says so, or makes it
        check_file(status(dir_fd, path.name), path)
    fd = os.open(path.name, flags | _CAREFULLY, 0o666, dir_fd=dir_fd)
    try:
        check_file(os.fstat(fd), path)
    except FormatError:
        os.close(fd)
        raise
    return fd


def check_file(status: os.stat_result, path: Path) -> None:
    """Refuse what is no file.

    Raises:
        FormatError: it is something else.
    """
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(
            f"{path} is {kind(status)}, where Peakpoint has files of its own: it is neither opened nor changed; "
            "move it away"
        )


def entries(dir_fd: int, temporary: str) -> list[tuple[str, bool, str | None]]:
    """What is in an open directory: each name, whether it is a directory's, and what it is if no store has made it.

    Args:
        dir_fd: the directory.
        temporary: what the names of unfinished writes begin with; a store makes no directories of such names.
    """
    listed: list[tuple[str, bool, str | None]] = []
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        with os.scandir(fd) as listing:
            for entry in listing:
                is_directory = entry.is_dir(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False) or (is_directory and not entry.name.startswith(temporary)):
                    listed.append((entry.name, is_directory, None))
                    continue
                with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                    listed.append((entry.name, is_directory, kind(entry.stat(follow_symlinks=False))))
    finally:
        os.close(fd)
    return sorted(listed)


def check_replaceable(dir_fd: int, path: Path) -> None:
    """Refuse to replace what is no file; see ``name_taken``."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(status(dir_fd, path.name).st_mode):
            raise name_taken(dir_fd, path)


def name_taken(dir_fd: int, path: Path) -> ConflictError | StoreError:
    """The error for a name that is there already: of a file, or of what no store has made."""
    entry = status(dir_fd, path.name)
    if stat.S_ISREG(entry.st_mode):
        return ConflictError(f"{path} already exists")
    return StoreError(errno.EEXIST, f"{path} is {kind(entry)}, where Peakpoint is to write a file; move it away")


def read(fd: int, begin: int, size: int) -> bytes:
    """Read ``size`` bytes, or all that there are."""
    data = os.pread(fd, size, begin)
    if len(data) in (0, size):
        return data
    pieces = [data]  # Linux reads 2 GiB at once
    while data and (size := size - len(data)):
        begin += len(data)
        data = os.pread(fd, size, begin)
        pieces.append(data)
    return b"".join(pieces)
