"""Processes that die, or are refused, at one of their file operations; simulated in this one."""

import errno
import os

from peakpoint.store import FileOps

DEATHS = ("before", "after", "half")
FAULTS = ("refused", "reply lost")


class Killed(BaseException):
    """The process is dead."""


class Ops(FileOps):
    """File operations of one process; nothing waits for a disk.

    Args:
        at: the number of the operation at which something happens; None for never.
        what: it dies ``before`` or ``after`` the operation, or after ``half`` of a write; or the operation is
            ``refused``, or done and its ``reply lost``, and the process goes on.
    """

    def __init__(self, at=None, what="before"):
        self.prepare(at, what)
        self.dead = False

    def prepare(self, at=None, what="before"):
        self.at, self.what = at, what
        self.struck = False  # whether it has happened

    def die(self):
        self.dead = True
        self.alive()

    def alive(self):
        if self.dead:
            raise Killed

    def fsync(self, *_, **__):
        self.alive()

    def fsync_dir(self, *_, **__):
        self.alive()

    def happens(self):
        self.struck, self.at = True, None
        if self.what in FAULTS:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.die()


def _counted(name):
    act = getattr(FileOps, name)

    def method(self, *arguments, **named):
        self.alive()
        now = self.at == 0
        if now and name == "write" and self.what == "half":
            act(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
        if now and self.what in ("before", "half", "refused"):
            self.happens()
        result = act(self, *arguments, **named)
        if now:
            self.happens()
        self.at = None if self.at is None else self.at - 1
        return result

    return method


for _name in ("mkdir", "create", "write", "truncate", "rename", "link", "unlink", "rmdir"):
    setattr(Ops, _name, _counted(_name))
