"""A store in a local directory, durable through power cuts.

The protocol of every write: a temporary name in the target's own directory, fsync of the file, rename (or link, where
the name must be new), fsync of the directory. Nothing less survives every crash on every file system.
Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014. A failed fsync is never retried: the kernel
may then report success for data that is gone. Source: Rebello et al., "Can Applications Recover from fsync Failures?",
USENIX ATC 2020.

Below the root nothing is reached through a link, read, written or deleted that is none of our files; see ``safe_open``.
"""

import contextlib
import errno
import mmap
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from peakpoint.errors import ConflictError, FormatError, NotFoundError, StoreError
from peakpoint.store import locks, remarks, safe_open
from peakpoint.store.direct_io import (
    NO_DIRECT,
    WORTH_DIRECT,
    DirectReader,
    DirectWriter,
    FileOps,
    available_memory,
    is_cached,
    sync_directory,
)
from peakpoint.store.local_log import LocalLog
from peakpoint.store.os_errors import IgnoredErrors, translated
from peakpoint.store.pages import PAGE
from peakpoint.store.protocol import RECORD, Chunk, Filled, Filling, check_key, check_record, check_size

_TEMPORARY = ".tmp-"
_PROBE = f"{_TEMPORARY}probe"
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_MAPPING = frozenset({errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP})
_NOT_KNOWN = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EOVERFLOW})
_COARSEST = 3_000_000_000  # nanoseconds: two changes within the steps of a file system's clock look like one (FAT: 2 s)


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
        self._remarks = remarks.Remarks(root)
        self._durable: set[Path] = set()  # directories whose entry in their parent this process has made durable

    @property
    def location(self) -> str:
        """The directory."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Where the bytes of ``key`` are."""
        return self.root / check_key(key)

    def _sync_directory(self, path: Path, dir_fd: int | None = None) -> None:
        if not sync_directory(self._ops, path, dir_fd):
            self._remarks.add(remarks.NO_DIRECTORY_SYNC)

    def _directory(self, key: str) -> contextlib.AbstractContextManager[int]:
        """Open the directory that a key is in."""
        return safe_open.directory(self._root, check_key(key).split("/")[:-1])

    @contextlib.contextmanager
    def _parent_made(self, key: str) -> Iterator[int]:
        """A descriptor of the directory that a key is to be in, whose name is durable."""
        self._make_root(self.root)
        directory = self.root
        with contextlib.ExitStack() as open_directories:
            dir_fd = open_directories.enter_context(safe_open.directory(self._root, ()))
            for name in check_key(key).split("/")[:-1]:
                directory /= name
                try:
                    inner = safe_open.enter(dir_fd, name)
                except FileNotFoundError:
                    self._durable.discard(directory)
                    with contextlib.suppress(FileExistsError):
                        self._ops.mkdir(directory, dir_fd)
                    inner = safe_open.enter(dir_fd, name)
                open_directories.callback(os.close, inner)
                if directory not in self._durable:  # also one that is there already: its maker may have died before
                    self._sync_directory(directory.parent, dir_fd)
                    self._durable.add(directory)
                dir_fd = inner
            yield dir_fd

    def put(self, key: str, chunks: Iterable[Chunk], size: int | None = None) -> None:
        """See ``Store.put``."""
        path = self.path(key)
        with translated("write", path), self._parent_made(key) as dir_fd:
            safe_open.check_replaceable(dir_fd, path)
            temporary = self._write_temporary(dir_fd, path, chunks, size)
            self._ops.rename(temporary, path, dir_fd)
            self._sync_directory(path.parent, dir_fd)

    def create(self, key: str, data: bytes) -> None:
        """See ``Store.create``."""
        path = self.path(key)
        check_record(str(path), data)
        with translated("create", path), self._parent_made(key) as dir_fd:
            temporary = self._write_temporary(dir_fd, path, [data])
            try:
                self._link_new(dir_fd, temporary, path)
            except FileExistsError as error:
                self._ops.unlink(temporary, dir_fd)
                raise safe_open.name_taken(dir_fd, path) from error
            self._sync_directory(path.parent, dir_fd)

    def link(self, source: str, key: str) -> bool:
        """See ``Store.link``: a hard link, where the file system has them."""
        origin = self.path(source)
        try:
            with translated("read", origin), self._directory(source) as dir_fd:
                safe_open.check_file(safe_open.status(dir_fd, origin.name), origin)
                return self._link(origin, key, dir_fd)
        except NotFoundError:
            return False

    def adopt(self, origin: Path, key: str) -> bool:
        """Give a file from outside the store the further name ``key``, durably; whoever writes to it changes both.

        Returns:
            False when it is on another file system, or there are no hard links here; then nothing has happened.
        """
        origin = origin.resolve()
        with translated("read", origin):
            with safe_open.directory(os.fspath(origin.parent), ()) as dir_fd:
                fd = safe_open.open_file(dir_fd, origin)
            try:
                self._ops.fsync(fd)
            finally:
                os.close(fd)
        return self._link(origin, key, None)

    def _link(self, origin: Path, key: str, origin_fd: int | None) -> bool:
        path = self.path(key)
        with translated("link", path), self._parent_made(key) as dir_fd:
            safe_open.check_replaceable(dir_fd, path)
            temporary = _temporary(path)
            try:
                self._ops.link(origin, temporary, dir_fd, origin_fd)
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno not in (*_NO_LINKS, errno.EXDEV):
                    raise
                return False
            self._ops.rename(temporary, path, dir_fd)
            self._sync_directory(path.parent, dir_fd)
            return True

    def _link_new(self, dir_fd: int, temporary: Path, path: Path) -> None:
        try:
            self._ops.link(temporary, path, dir_fd, dir_fd)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # No hard links here (exFAT, some network mounts). Rename would replace silently, so look first; the
            # writer's lock keeps others away in between.
            self._remarks.add(remarks.NO_HARD_LINKS)
            with contextlib.suppress(FileNotFoundError):
                safe_open.status(dir_fd, path.name)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            self._ops.rename(temporary, path, dir_fd)
        else:
            self._ops.unlink(temporary, dir_fd)

    def _write_temporary(self, dir_fd: int, path: Path, chunks: Iterable[Chunk], size: int | None = None) -> Path:
        temporary = _temporary(path)
        fd = self._ops.create(temporary, dir_fd)
        try:
            try:
                large = size is not None and size >= WORTH_DIRECT
                output = DirectWriter(self._ops, fd, direct=self._direct and large)
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
                self._ops.unlink(temporary, dir_fd)
            raise
        if output.refused and self._direct:
            self._direct = False
            self._remarks.add(remarks.NO_DIRECT_IO)
        return temporary

    def _make_root(self, directory: Path) -> None:
        """Make the root, and what is above it, where links are followed."""
        if directory in self._durable and directory.is_dir():
            return
        if not directory.is_dir():
            if directory.parent != directory:
                self._make_root(directory.parent)
            with contextlib.suppress(FileExistsError):
                self._ops.mkdir(directory)
        self._sync_directory(directory.parent)
        self._durable.add(directory)

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[int]:
        """A file, open for reading."""
        with self._directory(key) as dir_fd:
            fd = safe_open.open_file(dir_fd, self.path(key))
        try:
            yield fd
        finally:
            os.close(fd)

    def get(self, key: str, begin: int = 0, end: int | None = None, *, max_size: int = RECORD) -> bytes:
        """See ``Store.get``."""
        path = f"{self._root}/{key}"
        with translated("read", path), self._open(key) as fd:
            size = os.fstat(fd).st_size - begin
            if end is None:
                check_size(path, size, max_size)
            return safe_open.read(fd, begin, max(0, size if end is None else min(size, end - begin)))

    def view(self, key: str) -> memoryview:
        """See ``Store.view``: a private mapping of the file, or its bytes where the file system maps none."""
        with translated("read", self.path(key)), self._open(key) as fd:
            size = os.fstat(fd).st_size
            if size:
                with IgnoredErrors(_NO_MAPPING):
                    return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))
            return memoryview(bytearray(safe_open.read(fd, 0, size)))

    def fill(self, key: str) -> Filling:
        """See ``Store.fill``: direct reads of a large file that is not in the page cache, a mapping of any other."""
        if hasattr(os, "O_DIRECT"):
            path = self.path(key)
            with translated("read", path), self._open(key) as fd:
                filling = self._fill_directly(fd, path)
            if filling is not None:
                return filling
        return Filled(self.view(key))

    def _fill_directly(self, fd: int, path: Path) -> DirectReader | None:
        size = os.fstat(fd).st_size
        # no more than half of the memory: what is mapped can be dropped when memory is short, this cannot
        if size < WORTH_DIRECT or is_cached(fd, size) or size > available_memory() // 2:
            return None
        duplicate = os.dup(fd)
        try:
            return DirectReader(self._ops, duplicate, size, path)
        except OSError as error:
            os.close(duplicate)
            if error.errno not in NO_DIRECT:
                raise
        return None

    def _status(self, key: str) -> os.stat_result:
        """The status of what has the name of a key, which may be a link."""
        with translated("look at", f"{self._root}/{key}"), self._directory(key) as dir_fd:
            return safe_open.status(dir_fd, key.rpartition("/")[2])

    def size(self, key: str) -> int | None:
        """See ``Store.size``."""
        try:
            status = self._status(key)
        except NotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def _entries(self, prefix: str) -> list[tuple[str, bool, str | None]]:
        """Each name, whether it is a directory's, and what it is if no store has made it."""
        names = check_key(prefix).split("/") if prefix else ()
        try:
            with translated("list", f"{self._root}/{prefix}"), safe_open.directory(self._root, names) as dir_fd:
                return safe_open.entries(dir_fd, _TEMPORARY)
        except NotFoundError:
            return []

    def children(self, prefix: str) -> list[str]:
        """See ``Store.children``."""
        return sorted(
            name + ("/" if is_directory else "")
            for name, is_directory, _ in self._entries(prefix)
            if not name.startswith(_TEMPORARY)
        )

    def foreign(self, prefix: str) -> dict[str, str]:
        """See ``Store.foreign``."""
        return {name: kind for name, _, kind in self._entries(prefix) if kind is not None}

    def stamp(self, prefix: str) -> str | None:
        """See ``Store.stamp``: when the directory last changed, once that is long enough ago to be told from now.

        A bucket that is mounted has directories from the year 1970, which never change.
        """
        directory = f"{self._root}/{check_key(prefix)}"  # asked for thousands of times: no Path, and nothing is opened
        try:
            status = os.stat(directory, follow_symlinks=False)  # noqa: PTH116 - the same
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError:
            return None
        if not stat.S_ISDIR(status.st_mode):
            return ""
        age = time.time_ns() - status.st_mtime_ns
        return f"{status.st_mtime_ns}.{status.st_ino}" if status.st_mtime_ns and age > _COARSEST else None

    def litter(self, prefix: str) -> list[str]:
        """See ``Store.litter``: files with temporary names."""
        start = f"{prefix}/" if prefix else ""
        return sorted(
            start + name for name, _, kind in self._entries(prefix) if name.startswith(_TEMPORARY) and kind is None
        )

    def delete(self, key: str) -> None:
        """See ``Store.delete``; what is no file is none of ours, and stays."""
        path = self.path(key)
        with contextlib.suppress(NotFoundError), translated("delete", path), self._directory(key) as dir_fd:
            if stat.S_ISREG(safe_open.status(dir_fd, path.name).st_mode):
                self._ops.unlink(path, dir_fd)
                self._sync_directory(path.parent, dir_fd)

    def prune(self, prefix: str) -> None:
        """See ``Store.prune``."""
        path = self.path(prefix)
        expected = IgnoredErrors({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})
        removing = translated("remove", path)
        with contextlib.suppress(NotFoundError), expected, removing, self._directory(prefix) as dir_fd:
            self._ops.rmdir(path, dir_fd)
            self._sync_directory(path.parent, dir_fd)

    def rename(self, prefix: str, new: str) -> bool:
        """See ``Store.rename``: ``rename(2)`` of the directory, which replaces none but an empty one."""
        source, target = self.path(prefix), self.path(new)
        in_the_way = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
        with translated("rename", source), self._directory(prefix) as dir_fd:
            os.close(safe_open.enter(dir_fd, source.name))
            try:
                self._ops.rename(source, target, dir_fd)
            except OSError as error:
                if error.errno not in in_the_way:
                    raise
                raise ConflictError(f"{target} already exists") from error
            self._sync_directory(source.parent, dir_fd)
        return True

    def log(self, key: str) -> LocalLog:
        """See ``Store.log``."""
        path = self.path(key)
        with translated("create", path), self._parent_made(key) as dir_fd:
            try:
                fd = self._ops.create(path, dir_fd)
            except FileExistsError as error:
                raise safe_open.name_taken(dir_fd, path) from error
            self._sync_directory(path.parent, dir_fd)
        return LocalLog(path, fd, self._ops)

    def hold(self, key: str, note: bytes) -> locks.ExclusiveLock:
        """See ``Store.hold``: a lock that the kernel lets go of when its process dies."""
        path = self.path(key)
        with translated("lock", path), self._parent_made(key) as dir_fd:
            fd = safe_open.open_file(dir_fd, path, os.O_RDWR | os.O_CREAT)
            hold = locks.ExclusiveLock(fd, path, note, partial(self._status, key))
        if hold.without_locks:
            self._remarks.add(remarks.NO_LOCKS)
        return hold

    def holder(self, key: str) -> str | None:
        """See ``Store.holder``: asks the kernel, takes no lock."""
        try:
            with translated("look at", self.path(key)), self._open(key) as fd:
                return locks.holder(fd)
        except (NotFoundError, FormatError):
            return None  # what is no file is held by nobody

    def reading(self, key: str) -> locks.SharedLock | None:
        """See ``Store.reading``: a shared lock."""
        try:
            with self._open(key) as fd:
                return locks.share(os.dup(fd))
        except (OSError, FormatError):
            return None

    def is_read(self, key: str) -> bool:
        """See ``Store.is_read``."""
        try:
            with self._open(key) as fd:
                return locks.is_shared(fd)
        except (OSError, FormatError):
            return False

    def remarks(self) -> list[str]:
        """See ``Store.remarks``: what this file system lacks."""
        return self._remarks.take()

    def free(self) -> int | None:
        """See ``Store.free``: what an ordinary user may still write.

        A file system that does not know says 0: there a small write has to succeed or to fail.
        """
        path = self.root.absolute()
        while not path.exists():
            path = path.parent
        with translated("ask for the free space of", path), IgnoredErrors(_NOT_KNOWN):
            status = os.statvfs(path)
            if available := status.f_bavail * status.f_frsize:
                return available
            return 0 if path == self.root.absolute() and self._is_full() else None
        return None

    def _is_full(self) -> bool:
        try:
            self.put(_PROBE, [bytes(PAGE)])
            self.delete(_PROBE)
        except StoreError as error:
            return error.is_full
        return False


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
