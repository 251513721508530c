"""A store in a dictionary: for tests, and as the simplest statement of what a store does."""

import threading
from collections.abc import Iterable

from peakpoint.errors import ConflictError, NotFoundError
from peakpoint.store.protocol import RECORD, Chunk, Filled, check_key, check_record, check_size, held_by, holder_text


class MemoryStore:
    """Bytes under keys in this process; gone when it ends."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._holders: dict[str, MemoryHold] = {}
        self._lock = threading.Lock()

    @property
    def location(self) -> str:
        """``memory:`` and the identity of the dictionary."""
        return f"memory:{id(self):x}"

    def put(self, key: str, chunks: Iterable[Chunk], size: int | None = None) -> None:  # noqa: ARG002
        """See ``Store.put``."""
        data = bytearray()
        for chunk in chunks:
            data += chunk
        with self._lock:
            self._objects[check_key(key)] = bytes(data)

    def create(self, key: str, data: bytes) -> None:
        """See ``Store.create``."""
        check_record(key, data)
        with self._lock:
            if check_key(key) in self._objects:
                raise ConflictError(f"{key} already exists in {self.location}")
            self._objects[key] = bytes(data)

    def link(self, source: str, key: str) -> bool:
        """See ``Store.link``: bytes objects never change, so they can have two names."""
        with self._lock:
            data = self._objects.get(check_key(source))
            if data is not None:
                self._objects[check_key(key)] = data
        return data is not None

    def get(self, key: str, begin: int = 0, end: int | None = None, *, max_size: int = RECORD) -> bytes:
        """See ``Store.get``."""
        try:
            data = self._objects[check_key(key)][begin:end]
        except KeyError as error:
            raise NotFoundError(f"{key} does not exist in {self.location}") from error
        if end is None:
            check_size(key, len(data), max_size)
        return data

    def view(self, key: str) -> memoryview:
        """See ``Store.view``; not lazy."""
        return memoryview(bytearray(self.get(key, end=self.size(key))))

    def fill(self, key: str) -> Filled:
        """See ``Store.fill``."""
        return Filled(self.view(key))

    def size(self, key: str) -> int | None:
        """See ``Store.size``."""
        data = self._objects.get(check_key(key))
        return None if data is None else len(data)

    def children(self, prefix: str) -> list[str]:
        """See ``Store.children``."""
        start = f"{check_key(prefix)}/" if prefix else ""
        names = set()
        with self._lock:
            for key in self._objects:
                if key.startswith(start):
                    name, slash, _ = key[len(start) :].partition("/")
                    names.add(name + slash)
        return sorted(names)

    def foreign(self, prefix: str) -> dict[str, str]:
        """See ``Store.foreign``: nothing."""
        if prefix:
            check_key(prefix)
        return {}

    def stamp(self, prefix: str) -> str | None:
        """See ``Store.stamp``: cannot promise."""
        check_key(prefix)
        return None

    def litter(self, prefix: str) -> list[str]:
        """See ``Store.litter``: nothing."""
        if prefix:
            check_key(prefix)
        return []

    def delete(self, key: str) -> None:
        """See ``Store.delete``."""
        with self._lock:
            self._objects.pop(check_key(key), None)

    def prune(self, prefix: str) -> None:
        """See ``Store.prune``: there are no directories here."""
        check_key(prefix)

    def rename(self, prefix: str, new: str) -> bool:
        """See ``Store.rename``."""
        start, new_start = f"{check_key(prefix)}/", f"{check_key(new)}/"
        with self._lock:
            keys = [key for key in self._objects if key.startswith(start)]
            if not keys:
                raise NotFoundError(f"there is no {prefix} in {self.location}")
            if any(key.startswith(new_start) for key in self._objects):
                raise ConflictError(f"{new} already exists in {self.location}")
            for key in keys:
                self._objects[new_start + key.removeprefix(start)] = self._objects.pop(key)
        return True

    def log(self, key: str) -> "MemoryLog":
        """See ``Store.log``."""
        self.create(key, b"")
        return MemoryLog(self, key)

    def hold(self, key: str, note: bytes) -> "MemoryHold":
        """See ``Store.hold``."""
        with self._lock:
            if key in self._holders:
                raise held_by(self._holders[key].note)
            self._holders[check_key(key)] = hold = MemoryHold(self._holders, key, note)
        return hold

    def holder(self, key: str) -> str | None:
        """See ``Store.holder``."""
        hold = self._holders.get(check_key(key))
        return None if hold is None else holder_text(hold.note)

    def reading(self, key: str) -> None:
        """See ``Store.reading``: bytes that are read here are copies, and need no such word."""

    def is_read(self, key: str) -> bool:  # noqa: ARG002 - of the protocol
        """See ``Store.is_read``: cannot tell."""
        return False

    def remarks(self) -> list[str]:
        """See ``Store.remarks``: nothing."""
        return []

    def free(self) -> int | None:
        """See ``Store.free``: not known."""
        return None


class MemoryLog:
    """See ``Log``."""

    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store, self._key = store, key

    def append(self, data: bytes) -> None:
        """See ``Log.append``."""
        self._store.put(self._key, [self._store.view(self._key), data])

    def sync(self) -> None:
        """See ``Log.sync``."""

    def close(self) -> None:
        """See ``Log.close``."""


class MemoryHold:
    """See ``Hold``."""

    def __init__(self, holders: dict[str, "MemoryHold"], key: str, note: bytes) -> None:
        self._holders, self._key, self.note = holders, key, note

    def check(self) -> None:
        """See ``Hold.check``."""
        if self._holders.get(self._key) is not self:
            raise ConflictError(f"{self._key} is not held any more")

    def release(self) -> None:
        """See ``Hold.release``."""
        if self._holders.get(self._key) is self:
            del self._holders[self._key]
