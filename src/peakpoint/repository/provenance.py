"""Provenance: who does something, when, and with which code.

A clock is a function without arguments that returns an aware ``datetime`` in UTC, so that tests can choose the time.
Nothing else in the package asks the system for it.
"""

import getpass
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

PATIENCE = 2.0  # seconds; a directory on a slow network must not keep a training waiting
_GIT_HOOK_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
)  # a git hook that starts the training would leave them


def code_version(directory: str | os.PathLike[str], patience: float = PATIENCE) -> str | None:
    """Return the commit, 40 or 64 hexadecimal digits, with ``-dirty`` when tracked files have uncommitted changes.

    Asks ``git`` once. Takes no lock, changes nothing and starts none of git's helpers.

    Args:
        directory: anywhere inside the repository.
        patience: seconds to wait for an answer.

    Returns:
        None where there is no git, no repository, no commit yet, or no answer in time.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_HOOK_VARIABLES}
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", os.fspath(directory), "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty"]
    try:
        answer = subprocess.run(  # noqa: S603 - git, found as the user's shell would find it
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=patience,
            check=False,
            env=environment,
            text=True,
            errors="replace",
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "")
    if answer.returncode or not set(commit) <= set("0123456789abcdef") or not commit:
        return None
    return commit + ("-dirty" if any(not line.startswith("#") for line in lines) else "")


@cache
def script_version() -> str | None:
    """Return ``code_version`` of the directory of the running script, or of the working directory without one.

    Read once in a process, which runs the code that existed when it began.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        return code_version(Path(script).resolve().parent if script else Path.cwd())
    except OSError:  # the working directory is gone
        return None


Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the present time in UTC, with microseconds."""
    return datetime.now(UTC)


def present_user() -> str:
    """Return ``"user on host"``; works for users without a name, as in containers."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "somebody"
    return f"{name} on {socket.gethostname()}"
