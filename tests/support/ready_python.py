"""A stand-in for the interpreter, which has imported torch before it is started.

Started as ``ask``, with the arguments that ``run_apart`` gives, it has a server fork, and hands its arguments,
environment, working directory and open files over. The fork leads a session of its own. Who asks ends as the fork does,
and takes it along when it is killed. With other arguments it is the interpreter itself.

Started as ``serve`` it is that server: it has imported torch and Peakpoint, and done nothing.
"""

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import types
from pathlib import Path

OPTIONS = ["-P", "-u", "-X", "faulthandler", "-c"]  # of subprocess_runner.py
_HIGH = 200  # descriptors from here on are nobody's


def ask(address, arguments):
    if arguments[: len(OPTIONS)] != OPTIONS:
        os.execv(sys.executable, [sys.executable, *arguments])
    numbers = [int(path.name) for path in sorted(Path("/proc/self/fd").iterdir()) if path.exists()]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        order = [arguments[len(OPTIONS) :], dict(os.environ), str(Path.cwd()), numbers]
        socket.send_fds(server, [json.dumps(order).encode()], numbers)
        code = int(server.recv(16))
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address):
    """Fork for each who asks, until standard input is closed; return, in a fork, the code that it is to run."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    os.write(1, b".")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        if 0 in select.select([0, listener], [], [])[0]:
            os._exit(0)
        client, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            order, files, _, _ = socket.recv_fds(client, 1 << 20, 100)
            process = os.fork()
            if process:
                _wait(client, process)
            for link in (listener, client):
                link.detach()  # its number will be that of another file
            return _become(*json.loads(order), files)
        client.close()


def _wait(client, process):
    """End with the fork, or end it when who has asked is gone."""
    ended = os.pidfd_open(process)
    if ended not in select.select([client, ended], [], [])[0]:
        os.killpg(process, signal.SIGKILL)
        os._exit(0)
    with contextlib.suppress(OSError):
        client.send(str(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])).encode())
    os._exit(0)


def _become(arguments, environment, directory, numbers, files):
    """Take over what an interpreter gets from who starts it."""
    os.setsid()
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH) for file in files]
    os.closerange(0, _HIGH)
    for number, file in zip(numbers, kept, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    code, *rest = arguments
    sys.argv[:] = ["-c", *rest]
    return code


if __name__ == "__main__":
    kind, name, *others = sys.argv[1:]
    place = f"\0peakpoint-{name}"  # in no directory
    if kind == "ask":
        ask(place, others)
    import gc

    import peakpoint.exchange.inspection
    import peakpoint.training.checkpointer  # noqa: F401 - and with these torch

    gc.freeze()  # what is there is shared with the forks, as long as nobody writes to it
    text = serve(place)
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(text, vars(sys.modules["__main__"]))
