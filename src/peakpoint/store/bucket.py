"""A store in a bucket of S3, or of what speaks like it.

Every object is written whole, by one request or one multipart upload, so that readers see the old or the new one. What
must be created once is created under the condition that it does not exist (``If-None-Match: *``), which the server
promises; one that ignores the condition is found out before the first such request, and refused. A request whose reply
was lost may have been carried out: what is created carries a mark of its own, by which it is known again.
"""

import contextlib
import errno
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from peakpoint.errors import (
    ConfigError,
    ConflictError,
    MissingExtraError,
    NotFoundError,
    StoreError,
    TransientStoreError,
)
from peakpoint.store.lease import SECONDS, Lease, LeaseState, lease_state
from peakpoint.store.protocol import RECORD, Chunk, Filled, Filling, check_key, check_record, check_size, holder_text

_PART = 16 * 1024 * 1024  # bytes of a part of an upload, and of a range that is read
_PARALLEL = 8
_MARK = "peakpoint-write"  # metadata of what was created once
_PROBE = ".peakpoint-probe-"
_OPTIONS = ("endpoint", "region")


def open_bucket(url: str) -> "BucketStore":
    """Return the store at ``s3://BUCKET/PREFIX``, with ``?endpoint=URL&region=NAME`` for servers other than Amazon's.

    Credentials come from the environment, as Amazon's own tools read them, or from the machine's role.

    Raises:
        ConfigError: the URL names no bucket, or has what does not belong there; credentials are not printed.
        MissingExtraError: obstore is not installed.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.fragment or {*options} - {*_OPTIONS}:
        raise ConfigError(
            "a repository in a bucket is s3://BUCKET/PREFIX, with ?endpoint=URL&region=NAME where the server is not "
            "Amazon's; credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the "
            "machine's role, never from the URL"
        )
    try:
        from obstore.store import S3Store  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("a repository in a bucket needs obstore: pip install 'peakpoint[s3]'") from error
    prefix = parts.path.strip("/")
    location = f"s3://{parts.netloc}/{prefix}".rstrip("/") + (f"?{urlencode(options, safe=':/')}" if options else "")
    client = S3Store(
        parts.netloc,
        client_options={"allow_http": options.get("endpoint", "").startswith("http://")},
        **cast("Any", {"virtual_hosted_style_request": False} | options if options else {}),
    )
    return BucketStore(location, client, prefix)


class BucketStore:
    """Bytes under keys below a prefix of a bucket.

    Args:
        location: of the prefix, for people and for ``open_bucket``.
        client: of obstore, for the bucket.
        prefix: before every key; empty for none.
        lease_seconds: how long a hold lasts whose process has died.
    """

    def __init__(self, location: str, client: Any, prefix: str = "", lease_seconds: float = SECONDS) -> None:
        import obstore  # noqa: PLC0415 - an extra

        self.location = location
        self._api, self._errors = cast("Any", obstore), cast("Any", obstore.exceptions)
        self._client, self._prefix = client, f"{check_key(prefix)}/" if prefix else ""
        self._lease_seconds = lease_seconds
        self._is_probed = False

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    @contextlib.contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, self._errors.GenericError) as error:
            if "NoSuchBucket" in str(error):
                message = f"cannot {verb} {key} in {self.location}: there is no such bucket; make it, or mend the name"
                raise StoreError(errno.ENOENT, message) from error
            if isinstance(error, FileNotFoundError):
                raise NotFoundError(f"{key} does not exist in {self.location}") from error
            raise self._transient(verb, key, error) from error
        except (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError) as error:
            message = f"cannot {verb} {key} in {self.location}: the server refuses these credentials"
            raise StoreError(errno.EACCES, message) from error
        except self._errors.BaseError as error:
            raise self._transient(verb, key, error) from error

    def _transient(self, verb: str, key: str, error: Exception) -> TransientStoreError:
        reason = str(error).partition("\n")[0]
        return TransientStoreError(errno.EIO, f"cannot {verb} {key} in {self.location}: {reason}")

    def put(self, key: str, chunks: Iterable[Chunk], size: int | None = None) -> None:
        """See ``Store.put``. Chunks are copied, so that several parts can be on their way."""
        path, copies = self._path(key), (bytes(chunk) for chunk in chunks)
        with self._translated("write", key):
            if size is not None and size <= _PART:
                self._api.put(self._client, path, b"".join(copies), use_multipart=False)
            else:
                self._api.put(self._client, path, copies, chunk_size=_PART, max_concurrency=_PARALLEL)

    def create(self, key: str, data: bytes) -> None:
        """See ``Store.create``."""
        check_record(key, data)
        if self._create(key, bytes(data)) is None:
            raise ConflictError(f"{key} already exists in {self.location}")

    def _create(self, key: str, data: bytes) -> str | None:
        """Create an object; returns its tag, or None when there is one."""
        path, mark = self._path(key), secrets.token_hex(8)
        self._probe()
        with self._translated("create", key):
            try:
                tag: str = self._api.put(self._client, path, data, mode="create", attributes={_MARK: mark})["e_tag"]
            except self._errors.AlreadyExistsError:
                try:
                    existing = self._api.get(self._client, path, options={"head": True})
                except FileNotFoundError:
                    return None
                if existing.attributes.get(_MARK) != mark:
                    return None
                tag = existing.meta["e_tag"]
        return tag

    def _probe(self) -> None:
        """Ensure that the server honours conditions: some accept and ignore them."""
        if self._is_probed:
            return
        path = f"{self._prefix}{_PROBE}{secrets.token_hex(8)}"
        with self._translated("create", "a record"):
            try:
                tag = self._api.put(self._client, path, b"1", mode="create")["e_tag"]
                with contextlib.suppress(self._errors.AlreadyExistsError):
                    self._api.put(self._client, path, b"2", mode="create")
                    raise self._ignores("If-None-Match: *")
                self._api.put(self._client, path, b"3", mode={"e_tag": tag})
                with contextlib.suppress(self._errors.PreconditionError):
                    self._api.put(self._client, path, b"4", mode={"e_tag": tag})
                    raise self._ignores("If-Match")
            finally:
                self._api.delete(self._client, path)
        self._is_probed = True

    def _ignores(self, condition: str) -> StoreError:
        return StoreError(
            errno.ENOTSUP,
            f"the server of {self.location} ignores the condition {condition}, without which two who write at the same "
            "time would overwrite each other: use another server, or a newer release of it",
        )

    def link(self, source: str, key: str) -> bool:
        """See ``Store.link``: there are no two names of one object."""
        check_key(source)
        check_key(key)
        return False

    def get(self, key: str, begin: int = 0, end: int | None = None, *, max_size: int = RECORD) -> bytes:
        """See ``Store.get``."""
        path = self._path(key)
        with self._translated("read", key):
            if begin == 0 and end is None:
                content = self._api.get(self._client, path)
                check_size(key, content.meta["size"], max_size)
                return bytes(content.bytes())
            size = self._api.head(self._client, path)["size"]
            stop = size if end is None else min(end, size)
            if end is None:
                check_size(key, max(size - begin, 0), max_size)
            return bytes(self._api.get_range(self._client, path, start=begin, end=stop)) if begin < stop else b""

    def view(self, key: str) -> memoryview:
        """See ``Store.view``; not lazy."""
        filling = self.fill(key)
        try:
            filling.wait(len(filling.data))
        finally:
            filling.close()
        return filling.data

    def fill(self, key: str) -> Filling:
        """See ``Store.fill``: ranges of one version of the object, several at a time."""
        path = self._path(key)
        with self._translated("read", key):
            content = self._api.get(self._client, path)  # its bytes begin to come when they are asked for
            meta = content.meta
            if meta["size"] <= _PART:
                return Filled(memoryview(bytearray(content.bytes())))
        data = memoryview(bytearray(meta["size"]))

        def read(begin: int) -> None:
            end = min(begin + _PART, len(data))
            with self._translated("read", key):
                content = self._api.get(
                    self._client, path, options={"range": (begin, end), "if_match": meta["e_tag"] or None}
                )
                data[begin:end] = memoryview(content.bytes())

        return BucketFilling(data, read)

    def size(self, key: str) -> int | None:
        """See ``Store.size``."""
        path = self._path(key)
        try:
            with self._translated("look at", key):
                size: int = self._api.head(self._client, path)["size"]
        except NotFoundError:
            return None
        return size

    def children(self, prefix: str) -> list[str]:
        """See ``Store.children``."""
        path = self._prefix + (f"{check_key(prefix)}/" if prefix else "")
        with self._translated("list", prefix or "everything"):
            listing = self._api.list_with_delimiter(self._client, path or None)
        names = [meta["path"][len(path) :] for meta in listing["objects"]]
        names += [common.rstrip("/")[len(path) :] + "/" for common in listing["common_prefixes"]]
        return sorted(name for name in names if name and not name.startswith(_PROBE))

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
        """See ``Store.litter``: parts of uploads that were cut short are none of the names."""
        if prefix:
            check_key(prefix)
        return []

    def delete(self, key: str) -> None:
        """See ``Store.delete``."""
        path = self._path(key)
        with contextlib.suppress(NotFoundError), self._translated("delete", key):
            self._api.delete(self._client, path)

    def prune(self, prefix: str) -> None:
        """See ``Store.prune``: there are no directories here."""
        check_key(prefix)

    def rename(self, prefix: str, new: str) -> bool:
        """See ``Store.rename``: not in one step."""
        check_key(prefix)
        check_key(new)
        return False

    def log(self, key: str) -> "BucketLog":
        """See ``Store.log``."""
        self.create(key, b"")
        return BucketLog(self, key)

    def hold(self, key: str, note: bytes) -> Lease:
        """See ``Store.hold``: a lease."""
        check_key(key)
        return Lease(self, key, note, self._lease_seconds)

    def holder(self, key: str) -> str | None:
        """See ``Store.holder``: also of one that has died, until somebody takes its lease over."""
        state = self.read_lease(key)
        return holder_text(state.note) if state is not None and state.token else None

    def read_lease(self, key: str) -> LeaseState | None:
        """See ``LeaseObjects.read_lease``."""
        path = self._path(key)
        try:
            with self._translated("read", key):
                content = self._api.get(self._client, path)
                return lease_state(bytes(content.bytes()), content.meta["e_tag"] or "")
        except NotFoundError:
            return None

    def write_lease(self, key: str, data: bytes, tag: str | None) -> str | None:
        """See ``LeaseObjects.write_lease``."""
        if tag is None:
            return self._create(key, data)
        self._probe()
        path = self._path(key)
        with self._translated("write", key):
            try:
                new_tag: str = self._api.put(self._client, path, data, mode={"e_tag": tag})["e_tag"]
            except (self._errors.PreconditionError, FileNotFoundError):
                return None
        return new_tag

    def reading(self, key: str) -> None:
        """See ``Store.reading``: what is being read stays what it was when it is deleted."""

    def is_read(self, key: str) -> bool:  # noqa: ARG002 - of the protocol
        """See ``Store.is_read``: cannot tell."""
        return False

    def remarks(self) -> list[str]:
        """See ``Store.remarks``: nothing."""
        return []

    def free(self) -> int | None:
        """See ``Store.free``: not known."""
        return None


class BucketFilling:
    """See ``Filling``: ranges on their way, several at a time."""

    def __init__(self, data: memoryview, read: Any) -> None:
        self.data = data
        self._pool = ThreadPoolExecutor(_PARALLEL, "peakpoint-range")
        self._ranges: list[Future[None]] = [self._pool.submit(read, begin) for begin in range(0, len(data), _PART)]

    def wait(self, position: int) -> None:
        """See ``Filling.wait``."""
        for part in self._ranges[: -(-position // _PART)]:
            part.result()

    def close(self) -> None:
        """See ``Filling.close``."""
        self._pool.shutdown(cancel_futures=True)


class BucketLog:
    """See ``Log``: every record is durable at once, by writing the whole anew."""

    def __init__(self, store: BucketStore, key: str) -> None:
        self._store, self._key, self._data = store, key, b""

    def append(self, data: bytes) -> None:
        """See ``Log.append``."""
        extended = self._data + data
        self._store.put(self._key, [extended], len(extended))
        self._data = extended

    def sync(self) -> None:
        """See ``Log.sync``."""

    def close(self) -> None:
        """See ``Log.close``."""
