"""Who does something, for records."""

import getpass
import socket


def present_user() -> str:
    """``"user on host"``; works for users without a name, as in containers."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "somebody"
    return f"{name} on {socket.gethostname()}"
