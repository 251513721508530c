"""What tests/production/test_subprocess_runner.py has called in a process apart; needs no torch."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from peakpoint.production.subprocess_runner import Ends


def main(given):
    ends = Ends(given)
    job = json.loads(ends.job())
    ends.send(b"begun")
    ACTS[job["act"]](ends, job)
    ends.send(b"done")


def talk(ends, job):
    """Print on every way there is, between lines."""
    for number in range(job["lines"]):
        print("printed", number)
        sys.stderr.write(f"complained {number}\n")
        os.write(1, b"x" * job["bytes"] + b"\n")
        subprocess.run(["echo", f"child {number}"], check=True)
        ends.send(b"line %d" % number)
    print("the end")


def leave_somebody(ends, job):
    child = subprocess.Popen(["sleep", "1000"])
    ends.send(b"%d" % child.pid)


def leave_somebody_and_hang(ends, job):
    leave_somebody(ends, job)
    signal.pause()


def tell(ends, job):
    told = {"path": sys.path, "cwd": str(Path.cwd()), "stdin": sys.stdin.read(), "pid": os.getpid()}
    told["collects"] = gc.isenabled()
    ends.send(json.dumps(told).encode())


def close(ends, job):
    os.closerange(0, 100)
    signal.pause()


def raise_it(ends, job):
    raise ValueError("said at the end")


def fork(ends, job):
    os.fork()
    ends.send(b"once")


def mute(ends, job):
    sys.stdout = sys.stderr = None
    ends.send(b"still heard")


ACTS = {
    "talk": talk,
    "leave somebody": leave_somebody,
    "leave somebody and hang": leave_somebody_and_hang,
    "tell": tell,
    "close": close,
    "mute": mute,
    "fork": fork,
    "raise": raise_it,
    "exit": lambda ends, job: os._exit(job["code"]),
    "kill": lambda ends, job: os.kill(os.getpid(), job["signal"]),
    "hang": lambda ends, job: signal.pause(),
}
