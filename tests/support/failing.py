"""File operations that fail."""

import errno
import os

from peakpoint.store import FileOps


class Failing(FileOps):
    """Raises ``error`` in ``call`` for paths that contain ``where``, ``times`` times after ``arm``."""

    def __init__(self, call, where="model.safetensors", error=errno.ENOSPC):
        self.call, self.where, self.error = call, where, error
        self.left = 0
        self.paths = {}

    def arm(self, times=1):
        self.left = times

    def check(self, call, path):
        if call == self.call and self.where in str(path) and self.left > 0:
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error), str(path))

    def create(self, path, *at):
        self.check("create", path)
        fd = super().create(path, *at)
        self.paths[fd] = path
        return fd

    def write(self, fd, data):
        self.check("write", self.paths[fd])
        return super().write(fd, data)

    def fsync(self, fd):
        self.check("fsync", self.paths[fd])
        super().fsync(fd)

    def rename(self, source, target, *at):
        self.check("rename", target)
        super().rename(source, target, *at)

    def link(self, source, target, *at):
        self.check("link", target)
        super().link(source, target, *at)

    def unlink(self, path, *at):
        self.check("unlink", path)
        super().unlink(path, *at)
