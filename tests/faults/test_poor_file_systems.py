"""File systems that lack something: what they cannot promise is said once, and everything else works."""

import errno
import fcntl
import json
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import peakpoint as pp
from commands import command, in_process
from peakpoint.errors import ConfigError, ConflictError, PeakpointWarning, StoreError
from peakpoint.format import layout
from peakpoint.store import FileOps, LocalStore, MemoryStore
from training import checkpointer, kept, same

SUPPORT = Path(__file__).parents[1] / "support"
LOCK = layout.writer_lock("r")


def trained(store, values=(0.5, 0.25), **options):
    """Save once for each value; the warnings of it."""
    model = torch.nn.Linear(2, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with checkpointer(store, state={"model": model}, **options) as ckpt:
            ckpt.resume()
            for value in values:
                torch.nn.init.constant_(model.weight, value)
                ckpt.report(loss=value)
    assert all(warning.category is PeakpointWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def newest_weight(root):
    return pp.load("r@latest", root=root)["model"]["weight"][0, 0].item()


# --- directories that cannot be made durable ----------------------------------------------------------------------

NOT_SERVED = [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS]


@pytest.fixture
def refuse_directories(monkeypatch):
    """Has the system refuse to make directories durable, with a number."""
    fsync = os.fsync

    def refuse(number):
        def refusing(fd):
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", refusing)

    return refuse


@pytest.mark.parametrize("number", NOT_SERVED, ids=errno.errorcode.get)
def test_directories_that_cannot_be_made_durable_are_said_once(tmp_path, refuse_directories, number):
    refuse_directories(number)
    (sentence,) = trained(tmp_path / "runs")
    assert str(tmp_path / "runs") in sentence
    assert "does not make directories durable" in sentence
    assert newest_weight(tmp_path / "runs") == 0.25
    assert "clean" in command("audit", tmp_path / "runs", "--deep")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_other_errors_of_directories_stay_errors(tmp_path, refuse_directories, number):
    refuse_directories(number)
    with pytest.raises(StoreError) as caught:
        trained(tmp_path / "runs")
    assert caught.value.errno == number


def test_files_are_made_durable_before_they_get_their_names_all_the_same(tmp_path):
    class Ops(FileOps):
        def __init__(self):
            self.calls = []

        def fsync(self, fd):
            self.calls.append("fsync")
            super().fsync(fd)

        def rename(self, *names):
            self.calls.append("rename")
            super().rename(*names)

        def fsync_dir(self, path, dir_fd=None):
            raise OSError(errno.EINVAL, "Invalid argument")

    ops = Ops()
    LocalStore(tmp_path, ops).put("a", [b"x"])
    assert ops.calls == ["fsync", "rename"]


def test_commands_and_exports_say_it_too(tmp_path, refuse_directories):
    trained(tmp_path / "runs")
    refuse_directories(errno.EINVAL)
    for arguments in (
        ["pin", tmp_path / "runs", "r@latest", "--why", "figure 2"],
        ["export", tmp_path / "runs", "r@latest", "--to", tmp_path / "model.pth"],
    ):
        done = in_process(*arguments)
        assert done.returncode == 0
        assert done.stderr.count("does not make directories durable") == 1


# --- no locks -----------------------------------------------------------------------------------------------------

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP]


@pytest.fixture
def refuse_locks(monkeypatch):
    """Has the system refuse every lock, with a number."""
    control = fcntl.fcntl

    def refuse(number=errno.ENOLCK):
        def refusing(*_):
            raise OSError(number, os.strerror(number))

        def controlled(fd, request, *argument):
            return control(fd, request, *argument) if request in (fcntl.F_GETFL, fcntl.F_SETFL) else refusing()

        monkeypatch.setattr(fcntl, "fcntl", controlled)
        monkeypatch.setattr(fcntl, "flock", refusing)
        monkeypatch.setattr(fcntl, "lockf", refusing)

    return refuse


@pytest.fixture
def unlocked(tmp_path, refuse_locks):
    """A store on a file system without locks."""
    refuse_locks()
    return LocalStore(tmp_path / "runs")


def note(host=None, pid=None):
    return json.dumps({"host": host or socket.gethostname(), "pid": pid or str(os.getpid()), "since": "noon"}).encode()


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_said_once(tmp_path, refuse_locks, number):
    refuse_locks(number)
    (sentence,) = trained(tmp_path / "runs")
    assert str(tmp_path / "runs") in sentence
    assert "has no file locks" in sentence
    assert newest_weight(tmp_path / "runs") == 0.25
    assert len(trained(tmp_path / "runs", (0.125,))) == 1  # a new process would say it again, too
    assert newest_weight(tmp_path / "runs") == 0.125
    assert "clean" in command("audit", tmp_path / "runs", "--deep")


def test_without_locks_a_second_writer_on_this_machine_is_refused(unlocked):
    hold = unlocked.hold(LOCK, note())
    assert str(os.getpid()) in unlocked.holder(LOCK)
    with pytest.raises(ConflictError, match="this is the same process"):
        LocalStore(unlocked.root).hold(LOCK, note())
    hold.check()
    hold.release()
    assert unlocked.holder(LOCK) is None
    unlocked.hold(LOCK, note()).release()


def test_without_locks_forked_children_neither_hold_nor_let_go(unlocked):
    hold = unlocked.hold(LOCK, note())
    child = os.fork()
    if child == 0:
        hold.release()
        os._exit(unlocked.holder(LOCK) is None)
    assert os.waitpid(child, 0)[1] == 0
    hold.check()
    hold.release()


def test_without_locks_a_writer_on_another_machine_is_refused_until_it_lets_go(unlocked):
    unlocked.hold(LOCK, note(host="node7", pid="4711"))  # its process has gone, and nobody here can know
    elsewhere = LocalStore(unlocked.root)
    assert elsewhere.holder(LOCK) == "process 4711 on node7 since noon"
    with pytest.raises(ConflictError, match=r"has no locks: if that process has ended, delete .*writer\.lock"):
        elsewhere.hold(LOCK, note())
    unlocked.path(LOCK).unlink()
    hold = elsewhere.hold(LOCK, note())
    hold.check()
    hold.release()
    assert unlocked.path(LOCK).read_bytes() == b""  # so that other machines see that it was given back


def test_a_note_from_before_the_locks_were_lost_holds_nothing(tmp_path, refuse_locks):
    store = LocalStore(tmp_path / "runs")
    store.hold(LOCK, note(host="node7")).release()
    refuse_locks()
    store.hold(LOCK, note()).release()


def test_without_locks_whoever_was_overwritten_commits_nothing_more(unlocked):
    hold = unlocked.hold(LOCK, note())
    unlocked.path(LOCK).write_bytes(note(host="node8"))
    with pytest.raises(ConflictError, match="removed, replaced or overwritten"):
        hold.check()
    hold.release()
    assert unlocked.path(LOCK).read_bytes() == note(host="node8")  # that is no longer ours to clear


TRAINING = """
import sys
import peakpoint as pp
with pp.Checkpointer(sys.argv[1], run="r", state={"n": 1}, keep=[pp.Last(9)], preempt=None) as ckpt:
    ckpt.resume()
    ckpt.report(loss=0.5)
    ckpt.wait()
    print("saved", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("preload") / "no_locks.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SUPPORT / "no_locks.c", "-ldl"], check=True)
    return library


def test_processes_on_a_file_system_without_locks(tmp_path, preload):
    root = tmp_path / "runs"
    environment = os.environ | {
        "LD_PRELOAD": str(preload),
        "NO_LOCKS_ROOT": str(root),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def process(*arguments, **options):
        return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **options)

    def done(*arguments):
        with process(*arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ended:
            return *ended.communicate(), ended.returncode

    with process("-c", TRAINING, root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == "saved\n"
        assert f" is already being written by process {first.pid}" in done("-c", TRAINING, root)[1]
        assert f"being written by process {first.pid}" in done("-m", "peakpoint", "ls", root, "r")[0]
        first.kill()
    output, errors, code = done("-c", TRAINING, root)
    assert (output, code) == ("saved\n", 0)
    assert "has no file locks" in errors
    output, errors, code = done("-m", "peakpoint", "select", root, "loss < 1")  # SQLite needs locks as well
    assert (output.count("r/"), code) == (2, 0)


# --- no hard links, long names, capitals --------------------------------------------------------------------------


class NoLinks(FileOps):
    def link(self, source, target, *at):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_file_system_without_hard_links_is_said_once(tmp_path):
    (sentence,) = trained(LocalStore(tmp_path, NoLinks()), (0.5, 0.5, 0.5))
    assert f"{tmp_path}: this file system has no hard links" in sentence
    assert [checkpoint.step for checkpoint in kept(tmp_path)] == [1, 2, 3]
    assert "clean" in command("audit", tmp_path, "--deep")


def test_a_file_system_that_maps_no_files_is_read(tmp_path, monkeypatch):
    trained(tmp_path)
    real = mmap.mmap

    def refusing(fd, *arguments, **options):
        if fd >= 0:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real(fd, *arguments, **options)

    monkeypatch.setattr(mmap, "mmap", refusing)
    assert newest_weight(tmp_path) == 0.25
    assert trained(tmp_path, (0.125,)) == []


class ShortNames(FileOps):
    """Names of at most 143 bytes, as eCryptfs has."""

    def create(self, path, *at):
        if len(path.name) > 143:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return super().create(path, *at)

    def mkdir(self, path, *at):
        if len(path.name) > 143:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        super().mkdir(path, *at)


def test_names_that_are_too_long_for_a_file_system_lose_nothing(tmp_path):
    store = LocalStore(tmp_path, ShortNames())
    assert trained(store, (0.5,)) == []
    with pytest.raises(pp.SaveFailedError, match="choose a shorter run name, name= template or root"):
        trained(store, (0.25,), name="x" * 140 + "_{step}" * 5)
    assert newest_weight(tmp_path) == 0.5
    assert trained(store, (0.25,)) == []


class OneCase(MemoryStore):
    """A store that does not tell capital letters apart, and keeps those that a name was created with."""

    def _known(self, key):
        parts = []
        for part in key.split("/"):
            names = {name.rstrip("/").casefold(): name.rstrip("/") for name in super().children("/".join(parts))}
            parts.append(names.get(part.casefold(), part))
        return "/".join(parts)

    def put(self, key, chunks, size=None):
        super().put(self._known(key), chunks, size)

    def create(self, key, data):
        super().create(self._known(key), data)

    def get(self, key, *range_, **options):
        return super().get(self._known(key), *range_, **options)

    def size(self, key):
        return super().size(self._known(key))

    def children(self, prefix):
        return super().children(self._known(prefix) if prefix else "")


def test_names_that_differ_in_capitals_only_do_not_overwrite_each_other():
    store = OneCase()
    trained(store, (0.5,), run="r", name="best")
    with pytest.raises(ConfigError, match=r"the runs 'r' and 'R' would overwrite each other"):
        trained(store, run="R")
    with pytest.raises(ConfigError, match=r"the parts 'model' and 'Model' would overwrite each other"):
        checkpointer(store, run="s", state={"model": {"w": torch.ones(1)}, "Model": {"w": torch.zeros(1)}})
    trained(store, (0.25,), run="r", name="Best")
    assert [checkpoint.name for checkpoint in kept(store)] == ["best", "Best-2"]
    assert same(pp.load("r/best", root=store)["model"]["weight"], torch.full((1, 2), 0.5))


def test_a_store_that_tells_capitals_apart_takes_both():
    store = MemoryStore()
    trained(store, run="r")
    trained(store, run="R")
    with checkpointer(store, run="s", state={"model": {"w": torch.ones(1)}, "Model": {"w": torch.zeros(1)}}) as ckpt:
        ckpt.report(loss=1.0)
    assert [run.name for run in pp.open(store).runs()] == ["R", "r", "s"]


def test_where_no_file_can_be_written_anywhere_selections_are_made_in_memory(tmp_path, monkeypatch):
    store = MemoryStore()
    trained(store, (0.5, 0.25, 0.125))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    for _ in range(2):
        assert [checkpoint.step for checkpoint in pp.select(store, "loss < 0.4", by={"loss": "min"})] == [3, 2]
    assert list(tmp_path.iterdir()) == []


# --- free space that is not known ---------------------------------------------------------------------------------


def test_a_file_system_that_says_that_nothing_is_free_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0))
    assert trained(tmp_path / "runs") == []
    assert newest_weight(tmp_path / "runs") == 0.25
    assert LocalStore(tmp_path / "runs").free() is None


def test_a_file_system_that_does_not_say_what_is_free_is_tried(tmp_path, monkeypatch):
    def refusing(_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "statvfs", refusing)
    assert trained(tmp_path) == []
    assert LocalStore(tmp_path).free() is None


def test_directories_that_have_no_time_are_looked_at_each_time(tmp_path):
    def forget_times():  # as a bucket that is mounted by gcsfuse
        for directory, _, _ in os.walk(tmp_path):
            os.utime(directory, (0, 0))

    for number in (1, 2):
        trained(tmp_path, (0.5,))
        forget_times()
        assert len(list(pp.select(tmp_path))) == number
        forget_times()


def test_a_file_system_that_is_full_is_believed(tmp_path, monkeypatch):
    class Full(FileOps):
        def write(self, fd, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
    assert LocalStore(tmp_path, Full()).free() == 0
    assert list(tmp_path.iterdir()) == []


# --- real ones ----------------------------------------------------------------------------------------------------


def mounted(*arguments):
    return os.getuid() == 0 and not subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def mount_point(tmp_path):
    """An empty file system of its own."""
    point = tmp_path / "disk"
    point.mkdir()
    if not mounted("-t", "tmpfs", "tmpfs", point):
        pytest.skip("only root can mount a file system")
    yield point
    subprocess.run(["umount", "--recursive", point], check=True)


def test_a_repository_that_is_mounted_read_only_is_read(mount_point, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = mount_point / "runs"
    trained(root)
    assert mounted("-o", "remount,ro", mount_point)
    assert newest_weight(root) == 0.25
    assert [checkpoint.step for checkpoint in pp.select(root, "loss < 0.4")] == [2]
    for arguments in (["ls"], ["ls", "r"], ["show", "r@latest"], ["report"], ["explain", "r:1"], ["audit", "--deep"]):
        command(arguments[0], root, *arguments[1:])
    before = sorted(path.name for path in mount_point.rglob("*"))
    for act in (lambda: trained(root), lambda: pp.open(root).run("r").pin("r:1", "why")):
        with pytest.raises(StoreError, match="mounted read-only"):
            act()
    assert "mounted read-only" in in_process("rm", root, "r:1", "--yes").stderr
    assert sorted(path.name for path in mount_point.rglob("*")) == before


def test_a_run_goes_on_in_a_layer_over_a_read_only_one(mount_point):
    lower, upper, work, root = (mount_point / name for name in ("lower", "upper", "work", "root"))
    for directory in (lower, upper, work, root):
        directory.mkdir()
    trained(lower, (0.5,))
    if not mounted("-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", root):
        pytest.skip("the system has no overlay file system")
    assert trained(root, (0.25,)) == []
    command("keep", root, "r", "--rules", "last:1", "--undo-for", "0", "--yes")
    assert [checkpoint.step for checkpoint in kept(root)] == [2]
    assert newest_weight(root) == 0.25
    assert "clean" in command("audit", root, "--deep")
    assert [checkpoint.step for checkpoint in kept(lower)] == [1]
