"""Files at the level of the system: the calls themselves, and large files past the page cache.

Direct I/O moves whole pages between page-aligned memory and page-aligned places in a file, without a copy in between.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from peakpoint.store.os_errors import IgnoredErrors, translated
from peakpoint.store.pages import PAGE, address, allocate, pages, touch

BLOCK = 32 * 1024 * 1024
WORTH_DIRECT = 4 * 1024 * 1024  # smaller files are faster through the page cache
NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})
_NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})
_NOT_SERVED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class FileOps:
    """The system calls that change files and read large ones.

    The seam at which tests record them, fail them and kill the process. With ``dir_fd``, the descriptor of the open
    directory that a path is in, only the path's name is used, and nothing on the way to it.
    """

    def mkdir(self, path: Path, dir_fd: int | None = None) -> None:
        """``mkdirat(2)``; FileExistsError when it exists."""
        os.mkdir(_in(path, dir_fd), dir_fd=dir_fd)

    def create(self, path: Path, dir_fd: int | None = None) -> int:
        """``openat(2)`` for writing of a file that must not exist; the mode is left to the umask."""
        return os.open(_in(path, dir_fd), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)

    def write(self, fd: int, data: memoryview) -> int:
        """``write(2)``; may write less than all."""
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        """``ftruncate(2)``; the next ``write`` goes on at the new end."""
        os.ftruncate(fd, size)
        os.lseek(fd, size, os.SEEK_SET)

    def reserve(self, fd: int, size: int) -> None:
        """``posix_fallocate(3)``: room for ``size`` bytes; a full disk is found at once, and extents are large."""
        os.posix_fallocate(fd, 0, size)

    def set_direct(self, fd: int, *, on: bool) -> None:
        """Switch ``O_DIRECT`` of an open file; OSError where the file system refuses it."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def read(self, fd: int, memory: memoryview, position: int) -> int:
        """``pread(2)`` into ``memory``; may read less than all, 0 at the end of the file."""
        return os.preadv(fd, [memory], position)

    def fsync(self, fd: int) -> None:
        """``fsync(2)``."""
        os.fsync(fd)

    def fsync_dir(self, path: Path, dir_fd: int | None = None) -> None:
        """``fsync(2)`` of a directory; ``dir_fd`` is its own descriptor."""
        fd = os.open(path if dir_fd is None else ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path, dir_fd: int | None = None) -> None:
        """``renameat(2)`` within one directory."""
        os.rename(_in(source, dir_fd), _in(target, dir_fd), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def link(self, source: Path, target: Path, dir_fd: int | None = None, source_fd: int | None = None) -> None:
        """``linkat(2)``; FileExistsError when the target exists. A source that is a link is not followed."""
        names = _in(source, source_fd), _in(target, dir_fd)
        os.link(*names, src_dir_fd=source_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def unlink(self, path: Path, dir_fd: int | None = None) -> None:
        """``unlinkat(2)``."""
        os.unlink(_in(path, dir_fd), dir_fd=dir_fd)

    def rmdir(self, path: Path, dir_fd: int | None = None) -> None:
        """``unlinkat(2)`` of a directory."""
        os.rmdir(_in(path, dir_fd), dir_fd=dir_fd)


def _in(path: Path, dir_fd: int | None) -> str:
    return os.fspath(path) if dir_fd is None else path.name


def sync_directory(ops: FileOps, path: Path, dir_fd: int | None = None) -> bool:
    """Make the names in a directory durable; False on a file system that cannot, such as older SMB mounts.

    An input/output error or a full disk stays an error.
    """
    with IgnoredErrors(_NO_DIRECTORY_SYNC):
        ops.fsync_dir(path, dir_fd)
        return True
    return False


class DirectWriter:
    """Writes chunks to an open file: past the page cache where that is possible, through it otherwise.

    Direct I/O takes whole pages from page-aligned memory to page-aligned places in the file. The last bytes of a file
    are fewer than a page, so they go through the page cache, as does everything after them.

    Attributes:
        refused: whether the file system refuses direct I/O.
    """

    def __init__(self, ops: FileOps, fd: int, *, direct: bool) -> None:
        self._ops, self._fd = ops, fd
        self._position = 0
        self._direct = False
        self.refused = False
        if direct:
            self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        with IgnoredErrors(NO_DIRECT):
            self._ops.set_direct(self._fd, on=on)
            self._direct = on
            return
        self.refused = True

    def reserve(self, size: int) -> None:
        """Reserve space where the file system can."""
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with IgnoredErrors(_NOT_SERVED):
                self._ops.reserve(self._fd, size)

    def check(self, size: int | None) -> None:
        """Refuse a file that is not of the size that was announced: the space reserved would stay behind as zeros."""
        if size is not None and self._position != size:
            raise OSError(errno.EINVAL, f"{size} bytes were announced and {self._position} given")

    def write(self, data: memoryview) -> None:
        """Write all of ``data``."""
        if self._direct:
            data = self._write_pages(data)
        if len(data) and self._direct:
            self._switch(on=False)
        while data:
            written = self._ops.write(self._fd, data[:BLOCK])
            self._position, data = self._position + written, data[written:]

    def _write_pages(self, data: memoryview) -> memoryview:
        """Write the whole pages of ``data`` directly; returns what is left."""
        if data.readonly or address(data) % PAGE:
            return data
        while len(data) >= PAGE and self._position % PAGE == 0:
            try:
                written = self._ops.write(self._fd, data[: min(len(data) // PAGE * PAGE, BLOCK)])
            except OSError as error:
                if error.errno not in NO_DIRECT:
                    raise
                self.refused = True
                return data
            self._position, data = self._position + written, data[written:]
        return data


def is_cached(fd: int, size: int, samples: int = 64) -> bool:
    """Whether a file seems to be in the page cache, judged by some pages of it; True where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    page = bytearray(PAGE)
    for number in range(samples):
        try:
            os.preadv(fd, [page], (size - 1) * number // (samples - 1) // PAGE * PAGE, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NOT_SERVED:
                raise
            return True
    return True


def available_memory() -> int:
    """Bytes that could be allocated without swapping; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return 0


class DirectReader:
    """A file on its way into memory, past the page cache; see ``Filling``.

    One thread reads; another has the system provide the pages ahead of it, which is slower than the disk.

    Args:
        ops: the system calls.
        fd: the open file; it is closed at the end.
        size: of the file.
        path: of the file, for errors.

    Raises:
        OSError: the file system refuses direct I/O.
    """

    def __init__(self, ops: FileOps, fd: int, size: int, path: Path) -> None:
        ops.set_direct(fd, on=True)
        self._ops, self._fd, self._size, self._path = ops, fd, size, path
        self._memory: mmap.mmap = allocate(pages(size))
        self._pages = memoryview(self._memory)
        self.data = self._pages[:size]
        self._changed = threading.Condition()
        self._touched = 0
        self._ready = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"peakpoint-{name}")
            for name, work in (("touch", self._touch), ("read", self._read))
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the end of a thread: whoever waits raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _touch(self) -> None:
        for begin in range(0, len(self._pages), BLOCK):
            touch(self._pages[begin : begin + BLOCK])
            with self._changed:
                self._touched = min(begin + BLOCK, len(self._pages))
                self._changed.notify_all()
                if self._stopped:
                    return

    def _read(self) -> None:
        try:
            while self._ready < self._size:
                begin = self._ready
                with self._changed:
                    self._changed.wait_for(lambda: self._touched > begin or self._stopped or self._error is not None)  # noqa: B023
                    if self._stopped or self._error is not None:
                        return
                    end = min(begin // BLOCK * BLOCK + BLOCK, self._touched)
                count = self._read_some(begin, end)
                if count == 0:
                    raise OSError(errno.EIO, f"the file ended after {begin} of {self._size} bytes")
                with self._changed:
                    self._ready = begin + count
                    self._changed.notify_all()
        finally:
            os.close(self._fd)

    def _read_some(self, begin: int, end: int) -> int:
        with IgnoredErrors(NO_DIRECT):
            return self._ops.read(self._fd, self._pages[begin:end], begin)
        self._ops.set_direct(self._fd, on=False)  # a piece that is not aligned
        return self._ops.read(self._fd, self._pages[begin:end], begin)

    def wait(self, position: int) -> None:
        """See ``Filling.wait``."""
        with translated("read", self._path), self._changed:
            self._changed.wait_for(lambda: self._ready >= min(position, self._size) or self._error is not None)
            if self._ready < min(position, self._size) and self._error is not None:
                raise self._error

    def close(self) -> None:
        """See ``Filling.close``."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
