"""Servers for tests: each is started when a test first asks for it, on a free port of this machine."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

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
