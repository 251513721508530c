"""A process apart: what it says arrives in order, however it ends is told, and it leaves nobody behind."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peakpoint.errors import Error
from peakpoint.production.subprocess_runner import run_apart


def run(act, timeout=60.0, **job):
    """How it ended, and all that came of it, in order: lines as text, what was printed in lists."""
    heard = []

    def said(line):
        heard.append(line.decode())
        return line == b"done"

    def printed(data):
        if data:
            heard.append([data.decode()])

    how = run_apart(
        "talking", json.dumps({"act": act, **job}).encode(), timeout=timeout, on_line=said, on_output=printed
    )
    return how, heard


@pytest.fixture(params=["interpreter", "stand-in"])
def either(request, monkeypatch):
    """Processes of the interpreter, and of what stands in for it in other tests."""
    if request.param == "stand-in":
        monkeypatch.setattr(sys, "executable", request.getfixturevalue("ready_interpreter"))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_what_is_printed_comes_with_the_line_after_it(size):
    how, heard = run("talk", lines=5, bytes=size)
    assert how is None
    assert heard[0] == "begun"
    assert [one for one in heard if isinstance(one, str)] == ["begun", *(f"line {n}" for n in range(5)), "done"]
    for number in range(5):
        (text,) = heard[heard.index(f"line {number}") - 1]
        assert text.endswith(f"x\nchild {number}\n" if size else f"\nchild {number}\n")
        assert f"printed {number + 1}" not in text
        if size < 1000:
            assert text.startswith(f"printed {number}\ncomplained {number}\n")
    assert heard[-2] == ["the end\n"]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("job", "how"),
    [
        ({"act": "exit", "code": 0}, "the process ended by itself, with exit code 0,"),
        ({"act": "exit", "code": 7}, "the process ended by itself, with exit code 7,"),
        ({"act": "kill", "signal": signal.SIGSEGV}, "the process died with signal 11 (SIGSEGV)"),
        (
            {"act": "kill", "signal": signal.SIGKILL},
            "the process died with signal 9 (SIGKILL), as when memory runs out",
        ),
        (
            {"act": "kill", "signal": signal.SIGRTMIN + 3},
            f"the process died with signal {signal.SIGRTMIN + 3} (unknown)",
        ),
        ({"act": "raise"}, "the process ended by itself, with exit code 1,"),
    ],
)
def test_how_it_ended_is_told(job, how):
    ended, heard = run(**job)
    assert ended == how
    assert heard[0] == "begun"
    if job["act"] == "raise":
        assert heard[1][0].endswith("ValueError: said at the end\n")


@pytest.mark.parametrize("act", ["hang", "close"])
def test_one_that_hangs_is_stopped_even_if_it_has_closed_everything(act):
    how, heard = run(act, timeout=1.5)
    assert how == "it took longer than 1.5 s, and was stopped"
    assert heard in ([], ["begun"]), "it may have hung before"


def test_without_streams_lines_are_heard():
    assert run("mute") == (None, ["begun", "still heard", "done"])


def test_of_two_that_go_on_one_is_heard():
    assert run("fork") == (None, ["begun", "once", "done"])


def test_where_no_process_can_be_started_that_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    open_before = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(Error, match="/no/such/python"):
        run("tell")
    assert len(list(Path("/dev/fd").iterdir())) == open_before


@pytest.mark.usefixtures("either")
def test_it_has_the_same_path_and_directory_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how, heard = run("tell")
    told = json.loads(heard[1])
    assert how is None
    assert told["path"] == [one or str(tmp_path) for one in sys.path]
    assert (Path(told["cwd"]), told["stdin"]) == (tmp_path.resolve(), "")
    assert told["collects"], "garbage of functions"


def ends(watched):
    """Whether a process that is somebody else's ends soon."""
    try:
        return bool(select.select([watched], [], [], 30)[0])
    finally:
        os.close(watched)


NEEDS_PIDFD = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process of somebody else")


@NEEDS_PIDFD
def test_whom_it_has_started_goes_with_it():
    watched = []

    def said(line):
        if line.isdigit():
            watched.append(os.pidfd_open(int(line)))
        return line == b"done"

    job = b'{"act": "leave somebody"}'
    assert run_apart("talking", job, timeout=60, on_line=said, on_output=lambda _: None) is None
    assert ends(watched[0])


def test_an_interrupt_here_ends_it_there():
    heard = []

    def said(line):
        if line != b"begun":
            heard.append(json.loads(line)["pid"])
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_apart("talking", b'{"act": "tell"}', timeout=60, on_line=said, on_output=lambda _: None)
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)


STARTER = """
import sys
from peakpoint.production.subprocess_runner import run_apart

def said(line):
    if line != b"begun":
        print(line.decode(), flush=True)
    return False

run_apart("talking", b'{"act": "leave somebody and hang"}', timeout=600, on_line=said, on_output=lambda _: None)
"""


@NEEDS_PIDFD
def test_it_does_not_outlive_whoever_has_started_it():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, env=environment) as starter:
        pid = int(starter.stdout.readline())
        watched = os.pidfd_open(pid)
        starter.kill()
    assert ends(watched)
