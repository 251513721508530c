"""The errors of the system in words of ours."""

import contextlib
import errno
from collections.abc import Collection, Iterator
from pathlib import Path

from peakpoint.errors import NotFoundError, StoreError, TransientStoreError

_TRANSIENT = frozenset({errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT})
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
def translated(action: str, path: Path | str) -> Iterator[None]:
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


class IgnoredErrors:
    """A block whose ``OSError`` is passed over if it has one of these numbers."""

    def __init__(self, numbers: Collection[int]) -> None:
        self._numbers = numbers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError) and error.errno in self._numbers
