"""Buckets: lost replies, servers that ignore conditions, leases of dead and of suspended holders, trainings."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import peakpoint as pp
from commands import command
from object_store import ACCESS, bucket_store
from peakpoint.errors import ConfigError, ConflictError, NotFoundError, StoreError
from peakpoint.repository.audit import audit
from peakpoint.store import open_store
from training import checkpointer, parts, same, train

NOTE = json.dumps({"host": "node7", "pid": "4711", "since": "2026-03-01T12:00:00+00:00"}).encode()


class Proxy:
    """Between a client and the server: ``spoil`` takes a request and its reply, and returns another reply or None."""

    def __init__(self, url, spoil):
        self._server = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._spoil = spoil
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, contextlib.suppress(OSError):
            request = self._message(client)
            if not request:
                return
            with socket.create_connection(self._server) as server:
                server.sendall(request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
                reply = b"".join(iter(lambda: server.recv(65536), b""))
            reply = self._spoil(request, reply)
            if reply is not None:
                client.sendall(reply.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))

    @staticmethod
    def _message(client):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = client.recv(65536)
            if not piece:
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = int(lengths[0]) if lengths else 0
        while len(body) < size:
            body += client.recv(65536)
        return head + b"\r\n\r\n" + body

    def close(self):
        self._socket.close()


@pytest.fixture
def proxied(object_store):
    """Make a store behind a proxy."""
    proxies = []

    def make(spoil):
        proxies.append(Proxy(object_store, spoil))
        return bucket_store(proxies[-1].url)

    yield make
    for proxy in proxies:
        proxy.close()


# --- what the wire does -------------------------------------------------------------------------------------------


def test_a_creation_whose_reply_was_lost_is_known_again(proxied):
    lost = []

    def spoil(request, reply):
        is_first = request.startswith(b"PUT") and b"/record " in request and not lost
        lost.extend([request] if is_first else [])
        return None if is_first else reply

    store = proxied(spoil)
    store.create("record", b"ours")
    assert len(lost) == 1
    assert store.get("record") == b"ours"
    with pytest.raises(ConflictError, match="record already exists"):
        store.create("record", b"ours")  # the same bytes, and yet another one


@pytest.mark.parametrize("name", ["if-none-match", "if-match"])
def test_a_server_that_ignores_conditions_is_refused_before_it_does_harm(proxied, name):
    def spoil(request, reply):
        is_refused = f"{name}: " in request.partition(b"\r\n\r\n")[0].decode().lower() and b" 412 " in reply[:20]
        return b'HTTP/1.1 200 OK\r\netag: "another"\r\ncontent-length: 0\r\n\r\n' if is_refused else reply

    store = proxied(spoil)
    for call in (lambda: store.create("a", b"1"), lambda: store.hold("lock", NOTE), lambda: store.log("j")):
        with pytest.raises(StoreError, match="ignores the condition If-"):
            call()
    assert store.children("") == []


def test_a_lease_that_was_taken_while_the_reply_was_lost_is_known_again(proxied):
    lost = []

    def spoil(request, reply):
        is_taking = request.startswith(b"PUT") and b"/lock " in request and b"if-match" in request.lower()
        is_first = is_taking and request.endswith(b"the second") and not lost
        lost.extend([request] if is_first else [])
        return None if is_first else reply

    store = proxied(spoil)
    store.hold("lock", NOTE).release()
    hold = store.hold("lock", b"the second")
    assert len(lost) == 1
    hold.check()
    hold.release()


def test_a_renewal_whose_reply_was_lost_loses_no_lease(proxied):
    lost = []

    def spoil(request, reply):
        is_renewal = request.startswith(b"PUT") and b"/lock " in request and b"if-match" in request.lower()
        is_first = is_renewal and not lost
        lost.extend([request] if is_first else [])
        return None if is_first else reply

    store = proxied(spoil)
    hold = store.hold("lock", NOTE)
    hold.check()
    hold.check()
    assert len(lost) == 1
    hold.release()
    assert store.holder("lock") is None


# --- leases -------------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys
from peakpoint.store import holder_note
from peakpoint.repository.provenance import utc_now
from object_store import bucket_store

store = bucket_store(sys.argv[1], float(sys.argv[3]), prefix=sys.argv[2])
note = holder_note(utc_now()) if sys.argv[4] == "here" else b'{"host":"node7","pid":"1","since":"x"}'
hold = store.hold("lock", note)
print("held", flush=True)
sys.stdin.readline()
try:
    hold.check()
    print("still held", flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
"""


@pytest.fixture
def holder(object_store):
    """Start a process that holds ``lock`` of a prefix."""
    processes = []

    def start(prefix, seconds, where):
        command = [sys.executable, "-c", HOLDER, object_store, prefix, str(seconds), where]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_holder_of_this_machine_that_was_killed_is_taken_over_at_once(object_store, holder):
    prefix = secrets.token_hex(6)
    store = bucket_store(object_store, 600.0, prefix=prefix)
    process = holder(prefix, 600.0, "here")
    with pytest.raises(ConflictError, match=f"process {process.pid} on"):
        store.hold("lock", NOTE)
    process.kill()
    process.wait()
    store.hold("lock", NOTE).release()


def test_a_dead_holder_elsewhere_is_taken_over_when_its_lease_has_ended(object_store, holder):
    prefix = secrets.token_hex(6)
    store = bucket_store(object_store, 1.0, prefix=prefix)
    process = holder(prefix, 1.0, "elsewhere")
    process.kill()
    process.wait()
    begin = time.monotonic()
    hold = store.hold("lock", NOTE)
    assert time.monotonic() - begin >= 1.0
    hold.check()
    hold.release()


def test_a_holder_that_slept_through_its_lease_is_fenced_off(object_store, holder):
    prefix = secrets.token_hex(6)
    store = bucket_store(object_store, 1.0, prefix=prefix)
    process = holder(prefix, 1.0, "elsewhere")
    process.send_signal(signal.SIGSTOP)
    hold = store.hold("lock", NOTE)
    process.send_signal(signal.SIGCONT)
    process.stdin.write("check\n")
    assert process.stdout.readline() == "ConflictError\n"
    hold.check()
    hold.release()


def test_a_release_of_what_was_taken_over_leaves_the_new_holder_alone(object_store):
    store = bucket_store(object_store)
    hold = store.hold("lock", NOTE)
    state = store.read_lease("lock")
    assert store.write_lease("lock", b"another 1\n" + NOTE, state.tag) is not None
    hold.release()
    assert store.read_lease("lock").token == "another"
    with pytest.raises(ConflictError):
        hold.check()


# --- large objects ------------------------------------------------------------------------------------------------


def test_large_objects_go_up_in_parts_and_come_down_in_ranges(object_store):
    store = bucket_store(object_store)
    data = secrets.token_bytes(40 * 1024 * 1024 + 13)
    store.put("large", (data[begin : begin + 7_000_001] for begin in range(0, len(data), 7_000_001)))
    assert store.size("large") == len(data)
    filling = store.fill("large")
    filling.wait(20_000_000)
    assert filling.data[:20_000_000] == data[:20_000_000]
    filling.wait(len(data))
    filling.close()
    assert filling.data == data
    assert store.get("large", 39_999_999, 40_000_007) == data[39_999_999:40_000_007]


# --- URLs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///x", "s3://key:secret@bucket/x", "s3://bucket/x?access_key_id=secret", "s3://bucket/x#secret"],
)
def test_urls_with_what_does_not_belong_there_are_refused_without_a_word_of_it(url):
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX") as error:
        open_store(url)
    assert "secret" not in str(error.value)


def test_a_bucket_that_is_not_there_and_wrong_credentials_are_said(object_store, monkeypatch):
    for name, value in ACCESS.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    with pytest.raises(StoreError, match="there is no such bucket"):
        open_store(f"s3://nothing-of-this-name/x?endpoint={object_store}").children("")
    bucket_store(object_store).put("a", [b"1"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="the server refuses these credentials"):
        open_store(f"s3://conformance/x?endpoint={object_store}").get("a")


# --- a repository in a bucket -------------------------------------------------------------------------------------


@pytest.fixture
def root(object_store, monkeypatch):
    """The URL of a repository in a bucket."""
    for name, value in ACCESS.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    bucket_store(object_store).put("made", [b"the server makes the bucket"])
    return f"s3://conformance/{secrets.token_hex(6)}/models?endpoint={object_store}"


def test_a_training_goes_straight_into_a_bucket_and_on_from_it(root):
    resumed = parts()
    with checkpointer(root, state=dict(zip(("model", "optimizer"), resumed, strict=True))) as ckpt:
        for _ in ckpt.epochs(2):
            train(*resumed)
            ckpt.report(acc=0.5)
    again = parts()
    with checkpointer(root, state=dict(zip(("model", "optimizer"), again, strict=True))) as ckpt:
        assert ckpt.resume().step == 2
        assert same(again[0].state_dict(), resumed[0].state_dict())
        for _ in ckpt.epochs(3):
            train(*again)
            ckpt.report(acc=0.6)
    assert [one.step for one in pp.open(root).run("r").checkpoints()] == [1, 2, 3]
    assert same(pp.load("r@best:acc:max", root=root)["model"], again[0].state_dict())
    assert not [finding for finding in audit(pp.open(root), deep=True).findings if finding.kind != "incomplete"]


def test_two_trainings_of_one_run_are_refused(root):
    with checkpointer(root) as ckpt:
        ckpt.report()
        with pytest.raises(ConflictError, match=f"process {os.getpid()} on"):
            checkpointer(root)


def test_every_verb_takes_the_url(root, tmp_path):
    model, optimizer = parts()
    with checkpointer(root, state={"model": model, "optimizer": optimizer}) as ckpt:
        for epoch in ckpt.epochs(3):
            train(model, optimizer)
            ckpt.report(acc=epoch / 10)
    assert "acc" in command("ls", root)
    assert "acc" in command("ls", root, "r")
    shown = json.loads(command("show", root, "r@best:acc:max", "--json"))
    address, _, options = root.partition("?")
    assert shown["path"] == f"{address}/runs/r/checkpoints/{shown['name']}?{options}"
    with pytest.raises(ConfigError, match="cannot rename a run in one step"):
        command("rename", root, "r", "other")
    command("pin", root, "r:epoch=0", "--why", "a test")
    command("export", root, "r@latest", "--to", tmp_path / "m.safetensors")
    assert json.loads(command("select", root, "--max", "acc", "--json"))["selected"][0]["epoch"] == 2
    ref = pp.open(root).find("r:epoch=1").ref
    command("rm", root, ref, "--yes")
    assert len(pp.open(root).run("r").checkpoints()) == 2
    command("undo", root, ref)
    assert "passed" in command("validate", root, "r@latest")
    command("promote", root, "r@latest", "--as", "champion", "--why", "a test")
    assert json.loads(command("show", root, "@champion", "--json"))["epoch"] == 2
    assert "r" in command("plan", root, "r")
    command("archive", root, "r")
    assert same(pp.load("r:epoch=2", root=root)["model"], model.state_dict())
    command("archive", root, "r", "--restore")
    assert len(pp.open(root).run("r").checkpoints()) == 3
    with pytest.raises(NotFoundError):
        pp.open(f"{address}/elsewhere?{options}")
