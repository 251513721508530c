"""A store in a local directory, durable through power cuts.

The protocol of every write: a temporary name in the target's own directory, fsync of the file, rename (or link, where
the name must be new), fsync of the directory. Nothing less survives every crash on every file system.
Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014. A failed fsync is never retried: the kernel
may then report success for data that is gone. Source: Rebello et al., "Can Applications Recover from fsync Failures?",
USENIX ATC 2020.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from peakpoint.errors import ConflictError, NotFoundError, StoreError, TransientStoreError
from peakpoint.store.core import Chunk, Filled, Filling, check_key, held_by, holder_text
from peakpoint.store.files import NO_DIRECT, WORTH_DIRECT, DirectFilling, FileOps, Output, available_memory, is_cached

_TEMPORARY = ".tmp-"
_TRANSIENT = frozenset({errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT})
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_COARSEST = 3_000_000_000  # nanoseconds: two changes within the steps of a file system's clock look like one (FAT: 2 s)
_LOOKING = frozenset({"read", "look at", "list", "delete"})  # what is no file cannot be found
_HINTS = {
    errno.ENOSPC: "free some space, or let fewer checkpoints be kept",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check the owner and mode of the directory",
    errno.EPERM: "check the owner and mode of the directory",
    errno.EIO: "the disk reports an input/output error; check the kernel's log",
    errno.ENAMETOOLONG: "choose a shorter run name, name= template or root",
}


@contextlib.contextmanager
def translated(action: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into one of ours that says what was done, where, and what to do next."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot {action} {path}: it does not exist") from error
    except StoreError:
        raise
    except OSError as error:
        if action in _LOOKING and isinstance(error, IsADirectoryError | NotADirectoryError):
            raise NotFoundError(f"cannot {action} {path}: {error.strerror}") from error
        hint = _HINTS.get(error.errno or 0)
        message = f"cannot {action} {path}: {error.strerror}" + (f" ({hint})" if hint else "")
        kind = TransientStoreError if error.errno in _TRANSIENT else StoreError
        raise kind(error.errno, message) from error


class LocalStore:
    """Bytes under keys in a directory.

    Args:
        root: the directory; created with the first write.
        ops: the system calls to use.
    """

    def __init__(self, root: Path, ops: FileOps | None = None) -> None:
        self.root = root
        self._root = os.fspath(root)
        self._ops = ops or FileOps()
        self._direct = hasattr(os, "O_DIRECT")
        self._remarks: list[str] = []
        self._durable: set[Path] = set()  # directories whose entry in their parent this process has made durable

    @property
    def location(self) -> str:
        """The directory."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Where the bytes of ``key`` are."""
        return self.root / check_key(key)

    def put(self, key: str, chunks: Iterable[Chunk], size: int | None = None) -> None:
        """See ``Store.put``."""
        path = self.path(key)
        with translated("write", path):
            temporary = self._write_temporary(path, chunks, size)
            self._ops.rename(temporary, path)
            self._ops.fsync_dir(path.parent)

    def create(self, key: str, data: bytes) -> None:
        """See ``Store.create``."""
        path = self.path(key)
        with translated("create", path):
            temporary = self._write_temporary(path, [data])
            try:
                self._link_new(temporary, path)
            except FileExistsError as error:
                self._ops.unlink(temporary)
                raise ConflictError(f"{path} already exists") from error
            self._ops.fsync_dir(path.parent)

    def link(self, source: str, key: str) -> bool:
        """See ``Store.link``: a hard link, where the file system has them."""
        return self._link(self.path(source), key)

    def adopt(self, origin: Path, key: str) -> bool:
        """Give a file from outside the store the further name ``key``, durably; whoever writes to it changes both.

        Returns:
            False when it is on another file system, or there are no hard links here; then nothing has happened.
        """
        with translated("read", origin):
            fd = os.open(origin, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._ops.fsync(fd)
            finally:
                os.close(fd)
        return self._link(origin.resolve(), key)

    def _link(self, origin: Path, key: str) -> bool:
        path = self.path(key)
        with translated("link", path):
            self._make_dirs(path.parent)
            temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
            try:
                self._ops.link(origin, temporary)
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno not in (*_NO_LINKS, errno.EXDEV):
                    raise
                return False
            self._ops.rename(temporary, path)
            self._ops.fsync_dir(path.parent)
            return True

    def _link_new(self, temporary: Path, path: Path) -> None:
        try:
            self._ops.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # No hard links here (exFAT, some network mounts). Rename would replace silently, so look first; the
            # writer's lock keeps others away in between.
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            self._ops.rename(temporary, path)
        else:
            self._ops.unlink(temporary)

    def _write_temporary(self, path: Path, chunks: Iterable[Chunk], size: int | None = None) -> Path:
        self._make_dirs(path.parent)
        temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
        fd = self._ops.create(temporary)
        try:
            try:
                large = size is not None and size >= WORTH_DIRECT
                output = Output(self._ops, fd, direct=self._direct and large)
                if size is not None and large:
                    output.reserve(size)
                for chunk in chunks:
                    output.write(memoryview(chunk).cast("B"))
                output.check(size)
                self._ops.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that brought us here is the one to report
                self._ops.unlink(temporary)
            raise
        if output.refused and self._direct:
            self._direct = False
            self._remarks.append(
                f"{self.root}: this file system refuses direct I/O, so saves go through the page cache, which is slower"
            )
        return temporary

    def _make_dirs(self, directory: Path) -> None:
        if directory in self._durable and directory.is_dir():
            return
        if not directory.is_dir():
            if directory.parent != directory:
                self._make_dirs(directory.parent)
            with contextlib.suppress(FileExistsError):
                self._ops.mkdir(directory)
        # also for one that is there already: its maker may have died before this
        self._ops.fsync_dir(directory.parent)
        self._durable.add(directory)

    def get(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """See ``Store.get``."""
        path = self.path(key)
        note = LocalHold.note(path)
        if note is not None:
            return note[begin:end]
        with translated("read", path), path.open("rb") as file:
            file.seek(begin)
            return file.read() if end is None else file.read(max(0, end - begin))

    def view(self, key: str) -> memoryview:
        """See ``Store.view``: a private mapping of the file."""
        path = self.path(key)
        note = LocalHold.note(path)
        if note is not None:
            return memoryview(bytearray(note))
        with translated("read", path), path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(bytearray())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))

    def fill(self, key: str) -> Filling:
        """See ``Store.fill``: direct reads of a large file that is not in the page cache, a mapping of any other."""
        path = self.path(key)
        if LocalHold.note(path) is None and hasattr(os, "O_DIRECT"):
            with translated("read", path):
                filling = self._fill_directly(path)
            if filling is not None:
                return _Translating(filling, path)
        return Filled(self.view(key))

    def _fill_directly(self, path: Path) -> DirectFilling | None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            # no more than half of the memory: what is mapped can be dropped when memory is short, this cannot
            if size >= WORTH_DIRECT and not is_cached(fd, size) and size <= available_memory() // 2:
                filling = DirectFilling(self._ops, fd, size)
                fd = -1
                return filling
        except OSError as error:
            if error.errno not in NO_DIRECT:
                raise
        finally:
            if fd >= 0:
                os.close(fd)
        return None

    def size(self, key: str) -> int | None:
        """See ``Store.size``."""
        path = self.path(key)
        try:
            with translated("look at", path):
                status = path.stat()
                return status.st_size if stat.S_ISREG(status.st_mode) else None
        except NotFoundError:
            return None

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        directory = self.path(prefix) if prefix else self.root
        try:
            with translated("list", directory), os.scandir(directory) as entries:
                return list(entries)
        except NotFoundError:
            return []

    def children(self, prefix: str) -> list[str]:
        """See ``Store.children``."""
        return sorted(
            entry.name + ("/" if entry.is_dir() else "")
            for entry in self._entries(prefix)
            if not entry.name.startswith(_TEMPORARY)
        )

    def stamp(self, prefix: str) -> str | None:
        """See ``Store.stamp``: when the directory last changed, once that is long enough ago to be told from now."""
        directory = f"{self._root}/{check_key(prefix)}"  # asked for thousands of times: no Path
        try:
            status = os.stat(directory)  # noqa: PTH116 - the same
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError:
            return None
        age = time.time_ns() - status.st_mtime_ns
        return f"{status.st_mtime_ns}.{status.st_ino}" if age > _COARSEST else None

    def litter(self, prefix: str) -> list[str]:
        """See ``Store.litter``: files with temporary names."""
        start = f"{prefix}/" if prefix else ""
        return sorted(start + entry.name for entry in self._entries(prefix) if entry.name.startswith(_TEMPORARY))

    def delete(self, key: str) -> None:
        """See ``Store.delete``."""
        path = self.path(key)
        with contextlib.suppress(NotFoundError), translated("delete", path):
            self._ops.unlink(path)
            self._ops.fsync_dir(path.parent)

    def prune(self, prefix: str) -> None:
        """See ``Store.prune``."""
        path = self.path(prefix)
        try:
            with translated("remove", path):
                self._ops.rmdir(path)
                self._ops.fsync_dir(path.parent)
        except NotFoundError:
            return
        except StoreError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def log(self, key: str) -> "LocalLog":
        """See ``Store.log``."""
        path = self.path(key)
        with translated("create", path):
            self._make_dirs(path.parent)
            try:
                fd = self._ops.create(path)
            except FileExistsError as error:
                raise ConflictError(f"{path} already exists") from error
            self._ops.fsync_dir(path.parent)
        return LocalLog(path, fd, self._ops)

    def hold(self, key: str, note: bytes) -> "LocalHold":
        """See ``Store.hold``: a POSIX record lock, which the kernel lets go of when its process dies."""
        path = self.path(key)
        with translated("lock", path):
            self._make_dirs(path.parent)
            return LocalHold(path, note)

    def holder(self, key: str) -> str | None:
        """See ``Store.holder``: asks the kernel, takes no lock."""
        path = self.path(key)
        try:
            with translated("look at", path):
                return LocalHold.holder(path)
        except NotFoundError:
            return None

    def reading(self, key: str) -> "SharedHold | None":
        """See ``Store.reading``: a shared ``flock``, which needs a file that may be read."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # those who ask hold it for microseconds
        except OSError:  # a file system without such locks
            os.close(fd)
            return None
        return SharedHold(fd)

    def is_read(self, key: str) -> bool:
        """See ``Store.is_read``: whether an exclusive ``flock`` is refused."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
        finally:
            os.close(fd)
        return False

    def remarks(self) -> list[str]:
        """See ``Store.remarks``: whether direct I/O is refused."""
        said, self._remarks = self._remarks, []
        return said

    def free(self) -> int | None:
        """See ``Store.free``: what an ordinary user may still write."""
        path = self.root.absolute()
        while not path.exists():
            path = path.parent
        with translated("ask for the free space of", path):
            status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


class SharedHold:
    """See ``Store.reading``.

    Args:
        fd: an open file with a shared lock, which goes when it is closed.
    """

    def __init__(self, fd: int) -> None:
        self._close = weakref.finalize(self, os.close, fd)

    def release(self) -> None:
        """See ``Hold.release``."""
        self._close()


class _Translating:
    """A filling whose errors say what was being read."""

    def __init__(self, filling: DirectFilling, path: Path) -> None:
        self._filling, self._path = filling, path
        self.data = filling.data
        self.close = filling.close

    def wait(self, position: int) -> None:
        """See ``Filling.wait``."""
        with translated("read", self._path):
            self._filling.wait(position)


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
            whole = memoryview(b"\n" + data if self._torn else data)
            rest = whole
            try:
                while rest:
                    rest = rest[self._ops.write(self._fd, rest) :]
            except OSError:
                self._take_back(len(whole) - len(rest))
                raise
            self._size += len(whole)
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


# struct flock of fcntl(2): (type, whence, start, len, pid) on Linux, (start, len, pid, type, whence) on macOS and BSD
_FLOCK, _TYPE = ("hhqqi", 0) if sys.platform == "linux" else ("qqihh", 3)


def _flock(kind: object) -> tuple[object, ...]:
    return (kind, os.SEEK_SET, 0, 0, 0) if sys.platform == "linux" else (0, 0, 0, kind, os.SEEK_SET)


class LocalHold:
    """See ``Hold``.

    Record locks and not ``flock``: they are not inherited by forked data-loader workers, which can outlive a killed
    trainer and would keep its lock. Two things follow. They do not exclude the same process, so a table does. And
    closing *any* descriptor of the file lets go of the lock, so a file in the table is never opened a second time.
    """

    _held: ClassVar[dict[Path, tuple[int, bytes]]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, note: bytes) -> None:
        self._path = path.resolve()
        with self._guard:
            process, holder = self._held.get(self._path, (0, b""))
            if process == os.getpid():
                raise held_by(holder)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                holder = os.pread(fd, 4096, 0)
                os.close(fd)
                raise held_by(holder) from error
            except OSError:
                os.close(fd)
                raise
            try:
                os.ftruncate(fd, 0)
                os.pwrite(fd, note, 0)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # on a full disk it is held without a note
                    os.close(fd)
                    raise
            self._fd = fd
            self._held[self._path] = (os.getpid(), note)

    @classmethod
    def note(cls, path: Path) -> bytes | None:
        """The note of a file that this process holds, which nobody here may open; None for every other file."""
        if not cls._held:
            return None
        process, note = cls._held.get(path.resolve(), (0, b""))
        return note if process == os.getpid() else None

    @classmethod
    def holder(cls, path: Path) -> str | None:
        """See ``Store.holder``."""
        path = path.resolve()
        with cls._guard:
            process, note = cls._held.get(path, (0, b""))
            if process == os.getpid():
                return holder_text(note)
            with path.open("rb") as file:
                question = struct.pack(_FLOCK, *_flock(fcntl.F_WRLCK))
                answer = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
                free = answer[_TYPE] == fcntl.F_UNLCK
                return None if free else holder_text(file.read(4096))

    def release(self) -> None:
        """See ``Hold.release``."""
        with self._guard:
            process, _ = self._held.get(self._path, (0, b""))
            if process == os.getpid() and self._fd >= 0:
                del self._held[self._path]
                os.close(self._fd)
                self._fd = -1
