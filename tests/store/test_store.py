"""The contract of a store: one suite for every store, and what only a disk can do wrong for the local one."""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from object_store import bucket_store
from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    Error,
    FormatError,
    NotFoundError,
    StoreError,
    TransientStoreError,
)
from peakpoint.store import (
    RECORD,
    SMALL,
    FileOps,
    LocalStore,
    MemoryStore,
    check_key,
    create_numbered,
    open_store,
)
from peakpoint.store.bucket import BucketStore

NOTE = json.dumps({"host": "node7", "pid": "4711", "since": "2026-03-01T12:00:00+00:00"}).encode()
CLIMBING = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", "./a", "a/./b", "a\\b", "a\x00b", "//"]


@pytest.fixture(params=["local", "memory", "bucket"])
def store(request, tmp_path):
    if request.param == "bucket":
        return bucket_store(request.getfixturevalue("object_store"))
    return LocalStore(tmp_path / "root") if request.param == "local" else MemoryStore()


@pytest.fixture
def local(tmp_path):
    return LocalStore(tmp_path / "root")


# --- the contract: bytes ------------------------------------------------------------------------------------------


def test_what_is_put_is_got(store):
    for data in (b"", b"x", bytes(range(256)) * 1000):
        store.put("a/b/c", [data])
        assert store.get("a/b/c") == data
        assert store.size("a/b/c") == len(data)


def test_chunks_of_every_kind_are_written_one_after_the_other(store):
    floats = memoryview(bytearray(16)).cast("f")
    floats[1] = 1.0
    store.put("a", [b"one", bytearray(b"two"), memoryview(b"-three-")[1:6], b"", floats])
    assert store.get("a") == b"onetwothree" + bytes(floats)
    store.put("a", [])
    assert store.get("a") == b""


def test_each_chunk_is_asked_for_when_the_one_before_has_been_written(store):
    """So that one buffer can be filled again and again."""
    buffer = bytearray(4)

    def chunks():
        for text in (b"one ", b"two ", b"six "):
            buffer[:] = text
            yield memoryview(buffer)

    store.put("a", chunks())
    assert store.get("a") == b"one two six "
    store.put("a", iter([b"x", b"y"]), size=2)
    assert store.get("a") == b"xy"


def test_a_put_whose_chunks_fail_leaves_the_old_value(store):
    def chunks():
        yield b"new"
        raise ZeroDivisionError

    store.put("a", [b"old"])
    with pytest.raises(ZeroDivisionError):
        store.put("a", chunks())
    assert store.get("a") == b"old"
    assert store.children("") == ["a"]


def test_put_replaces(store):
    store.put("a", [b"a long value"])
    store.put("a", [b"short"])
    assert store.get("a") == b"short"


def test_what_is_put_is_not_what_is_changed_later(store):
    data = bytearray(b"first")
    store.put("a", [data])
    store.create("b", data)
    data[:] = b"later"
    assert store.get("a") == store.get("b") == b"first"


def test_a_stamp_changes_with_the_names_or_is_none(store, tmp_path):
    assert store.stamp("a") in ("", None)
    store.put("a/b", [b"x"])
    seen = set()
    for change in (lambda: store.put("a/c", [b"y"]), lambda: store.delete("a/b"), lambda: store.put("a/b", [b"x"])):
        if (tmp_path / "root" / "a").exists():
            os.utime(tmp_path / "root" / "a", (len(seen) + 1,) * 2)  # long ago: only what comes now counts
        before = store.stamp("a")
        seen.add(before)
        assert store.stamp("a") == before
        change()
        after = store.stamp("a")
        assert after is None or after != before


def test_a_stamp_of_a_moment_ago_is_none(local):
    local.put("a/b", [b"x"])
    assert local.stamp("a") is None, "another change within the same tick of the clock could not be told"
    os.utime(local.path("a"), (5, 5))
    assert local.stamp("a") is not None
    assert local.stamp("a/b/c") == ""


def test_create_refuses_what_exists_and_leaves_it(store):
    store.create("a/b", b"one")
    with pytest.raises(ConflictError, match="already exists"):
        store.create("a/b", b"two")
    assert store.get("a/b") == b"one"
    store.put("a/c", [b"put"])
    with pytest.raises(ConflictError):
        store.create("a/c", b"two")
    assert store.get("a/c") == b"put"
    assert store.litter("a") == []
    store.delete("a/b")
    store.create("a/b", b"three")
    assert store.get("a/b") == b"three"


def test_of_many_who_create_one_wins(store):
    barrier = threading.Barrier(12)
    outcomes = []

    def work(number):
        barrier.wait()
        try:
            store.create("race/key", b"%d" % number * 1000)
        except Error as error:
            outcomes.append(error)
        else:
            outcomes.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(outcomes) == 12
    assert len(winners) == 1
    assert all(isinstance(outcome, ConflictError) for outcome in outcomes if not isinstance(outcome, int))
    assert store.get("race/key") == b"%d" % winners[0] * 1000
    assert store.children("race") == ["key"]
    assert store.litter("race") == []


def test_readers_see_the_old_or_the_new_never_a_mixture(store):
    versions = [bytes([65 + number]) * 300_000 for number in range(2)]
    store.put("a", [versions[0]])
    stop = threading.Event()

    def work():
        try:
            for number in range(1, 30):
                store.put("a", [versions[number % 2][:150_000], versions[number % 2][150_000:]])
        finally:
            stop.set()

    thread = threading.Thread(target=work)
    thread.start()
    seen = {store.get("a") in versions}
    while not stop.is_set():
        seen.add(store.get("a") in versions)
        seen.add(bytes(store.view("a")) in versions)
    thread.join()
    assert seen == {True}


@given(st.binary(max_size=40), st.integers(0, 50), st.none() | st.integers(0, 50))
@settings(max_examples=60)
def test_get_gives_ranges_like_slices(data, begin, end):
    with tempfile.TemporaryDirectory() as root:
        for store in (MemoryStore(), LocalStore(Path(root), NoFlush())):
            store.put("a", [data])
            assert store.get("a", begin, end) == data[begin:end]
            assert type(store.get("a", begin, end)) is bytes


def test_writing_to_a_view_changes_nothing_at_rest(store):
    store.put("a", [b"x" * 10_000])
    view = store.view("a")
    assert len(view) == 10_000
    view[:5] = b"12345"
    view[-1:] = b"9"
    assert bytes(view[:6]) == b"12345x"
    assert store.get("a") == b"x" * 10_000
    assert bytes(store.view("a")) == b"x" * 10_000
    assert view[5] == ord("x")
    store.put("a", [b"y" * 10_000])
    assert bytes(view[:6]) == b"12345x"  # the caller's own: neither replacing nor deleting takes it away
    store.delete("a")
    assert bytes(view[-3:]) == b"xx9"


def test_the_view_of_nothing_is_empty_and_writable(store):
    store.put("a", [])
    view = store.view("a")
    assert len(view) == 0
    assert not view.readonly
    store.put("a", [b"1"])
    assert not store.view("a").readonly


def test_what_is_not_there(store):
    store.put("dir/a", [b"1"])
    for key in ("b", "dir/b", "x/y/z"):
        with pytest.raises(NotFoundError):
            store.get(key)
        with pytest.raises(NotFoundError):
            store.view(key)
        assert store.size(key) is None
    assert store.children("b") == []
    assert store.litter("b") == []


def test_what_only_has_names_below_it_is_no_key(store):
    store.put("dir/a", [b"1"])
    for read in (store.get, store.view, store.fill):
        with pytest.raises((NotFoundError, FormatError)):  # where there are directories, one is something else
            read("dir")
    assert store.size("dir") is None


def test_nothing_is_below_a_key(store):
    store.put("a", [b"1"])
    with pytest.raises(NotFoundError):
        store.get("a/b")
    with pytest.raises(NotFoundError):
        store.view("a/b")
    assert store.size("a/b") is None
    assert store.children("a") == []
    store.delete("a/b")
    assert store.get("a") == b"1"


def test_an_empty_store_can_be_asked_everything(store):
    assert store.children("") == []
    assert store.litter("") == []
    assert store.size("a") is None
    assert store.holder("a") is None
    store.delete("a/b")
    store.prune("a/b")
    assert store.children("") == []
    assert isinstance(store.location, str)
    assert store.free() is None or store.free() > 0


def test_children_are_the_names_directly_below(store):
    for key in ("b", "a/2", "a/10", "a/1/x", "a/1/y", "ab/c", "a.b"):
        store.put(key, [b"1"])
    assert store.children("") == ["a.b", "a/", "ab/", "b"]
    assert store.children("a") == ["1/", "10", "2"]
    assert store.children("a/1") == ["x", "y"]
    assert store.children("ab") == ["c"]


def test_children_are_sorted_with_their_slashes(store):
    for key in ("a/x", "a.b", "a-b/y", "a0", "B", "é/x", "z"):
        store.put(key, [b"1"])
    assert store.children("") == ["B", "a-b/", "a.b", "a/", "a0", "z", "é/"]


def test_delete_is_idempotent_and_touches_nothing_else(store):
    store.put("a/b", [b"1"])
    store.put("a/c", [b"2"])
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert store.size("a/b") is None
    assert store.children("a") == ["c"]


def test_prune_removes_empty_directories_only(store):
    store.put("a/b/c", [b"1"])
    store.prune("a/b")
    store.prune("a")
    assert store.get("a/b/c") == b"1"
    store.delete("a/b/c")
    store.prune("a/b")
    store.prune("a/b")
    store.prune("a")
    assert store.children("a/b") == []
    if not isinstance(store, BucketStore):  # SeaweedFS lists a prefix for a while after its last object
        assert store.children("") == []
    store.put("a/b/c", [b"2"])  # and it can come back
    assert store.get("a/b/c") == b"2"


def test_rename_moves_all_of_a_prefix_and_replaces_nothing(store):
    store.put("a/b/c", [b"1"])
    store.put("a/b/d/e", [b"2"])
    store.put("a/bb/c", [b"3"])
    store.put("a/there/c", [b"4"])
    if not store.rename("a/b", "a/new"):  # nothing has happened
        assert (store.get("a/b/c"), store.get("a/b/d/e"), store.children("a")) == (b"1", b"2", ["b/", "bb/", "there/"])
        return
    assert (store.get("a/new/c"), store.get("a/new/d/e"), store.children("a")) == (
        b"1",
        b"2",
        ["bb/", "new/", "there/"],
    )
    for prefix, new, kind in (("a/new", "a/there", ConflictError), ("a/b", "a/other", NotFoundError)):
        with pytest.raises(kind):
            store.rename(prefix, new)
    assert (store.get("a/new/c"), store.get("a/there/c")) == (b"1", b"4")


@pytest.mark.parametrize("key", CLIMBING)
def test_keys_that_are_no_keys_are_refused_by_every_method(store, key):
    with pytest.raises(ConfigError, match="is not a key"):
        check_key(key)
    calls = [
        lambda: store.put(key, [b"1"]),
        lambda: store.create(key, b"1"),
        lambda: store.get(key),
        lambda: store.view(key),
        lambda: store.size(key),
        lambda: store.delete(key),
        lambda: store.log(key),
        lambda: store.hold(key, NOTE),
        lambda: store.holder(key),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert store.children("") == []


@pytest.mark.parametrize("prefix", [key for key in CLIMBING if key])
def test_prefixes_that_are_no_keys_are_refused_as_well(store, prefix):
    store.put("a/b", [b"1"])
    for call in (store.children, store.litter, store.prune):
        with pytest.raises(ConfigError):
            call(prefix)


@given(st.text(max_size=12) | st.text("./\\ab\x00", max_size=8))
def test_a_key_stays_below_the_root(key):
    try:
        check_key(key)
    except ConfigError:
        return
    path = os.path.normpath(f"/root/{key}")
    assert path.startswith("/root/")
    assert path == f"/root/{key}"  # and has one spelling only


# --- the contract: logs -------------------------------------------------------------------------------------------


def test_a_log_grows_by_what_is_appended(store):
    log = store.log("j/1")
    assert store.get("j/1") == b""
    log.append(b"one\n")
    assert store.get("j/1") == b"one\n"  # before any sync
    log.append(b"")
    log.sync()
    log.append(b"two\n")
    log.close()
    log.close()
    assert store.get("j/1") == b"one\ntwo\n"
    assert store.size("j/1") == 8
    assert store.children("j") == ["1"]


def test_a_log_is_created_once(store):
    store.log("j/1").close()
    with pytest.raises(ConflictError, match="already exists"):
        store.log("j/1")
    store.create("j/2", b"x")
    with pytest.raises(ConflictError):
        store.log("j/2")
    assert store.get("j/2") == b"x"
    with pytest.raises(ConflictError):
        store.create("j/1", b"x")


def test_two_logs_do_not_mix(store):
    first, second = store.log("j/1"), store.log("j/2")
    for number in range(10):
        first.append(b"a%d" % number)
        second.append(b"b%d" % number)
    first.close()
    second.close()
    assert store.get("j/1") == b"".join(b"a%d" % number for number in range(10))
    assert store.get("j/2") == b"".join(b"b%d" % number for number in range(10))


# --- the contract: holds ------------------------------------------------------------------------------------------


def test_the_second_hold_is_a_conflict_that_says_who_holds(store):
    hold = store.hold("runs/r/lock", NOTE)
    for _ in range(2):
        with pytest.raises(ConflictError) as caught:
            store.hold("runs/r/lock", b"{}")
        for word in ("node7", "4711", "2026-03-01T12:00:00+00:00"):
            assert word in str(caught.value)
            assert word in store.holder("runs/r/lock")
    hold.release()
    assert store.holder("runs/r/lock") is None
    again = store.hold("runs/r/lock", b"{}")
    hold.release()  # nothing happens the second time: it is somebody else's now
    with pytest.raises(ConflictError):
        store.hold("runs/r/lock", NOTE)
    again.release()
    store.hold("runs/r/lock", NOTE).release()


def test_holds_of_different_keys_are_independent(store):
    first, second = store.hold("a/lock", NOTE), store.hold("b/lock", NOTE)
    first.release()
    assert store.holder("a/lock") is None
    assert store.holder("b/lock") is not None
    second.release()


def test_a_longer_note_before_leaves_nothing_behind(store):
    store.hold("lock", NOTE + b" " * 500).release()
    hold = store.hold("lock", b'{"host":"h","pid":"1","since":"now"}')
    assert store.holder("lock") == "process 1 on h since now"
    hold.release()


def test_who_holds_is_sure_of_it_until_it_is_given_back(store):
    hold = store.hold("lock", NOTE)
    hold.check()
    hold.check()
    hold.release()
    with pytest.raises(ConflictError, match="not held any more"):
        hold.check()
    again = store.hold("lock", NOTE)
    with pytest.raises(ConflictError):
        hold.check()  # another one holds it
    again.check()
    again.release()


def test_numbers_that_are_taken_are_passed_over_and_not_for_ever(store):
    for number in (1, 2, 4):
        store.create(f"n/{number}", b"")
    assert create_numbered(1, lambda number: store.create(f"n/{number}", b"") or number) == 3
    asked = []

    def taken(number):
        asked.append(number)
        raise ConflictError

    with pytest.raises(ConflictError):
        create_numbered(5, taken)
    assert asked == list(range(5, 1005))


def test_more_than_a_reader_expects_is_not_read(store):
    store.put("a", [b"12345"])
    assert store.get("a", max_size=5) == b"12345"
    assert store.get("a", 2, max_size=3) == b"345"
    assert store.get("a", 0, 5, max_size=1) == b"12345"
    with pytest.raises(FormatError, match=r"a has 5 bytes, .* at most 4"):
        store.get("a", max_size=4)


@pytest.mark.parametrize(
    "note", [b"", b"{}", b"no json", b"\xff\xfe", b'{"host":"\xff","pid":"1","since":"x"}', b"[]", b'{"pid":1}']
)
def test_a_note_that_says_nothing_is_still_a_hold(store, note):
    hold = store.hold("lock", note)
    assert "another process" in store.holder("lock")
    with pytest.raises(ConflictError, match="another process"):
        store.hold("lock", NOTE)
    hold.release()
    assert store.holder("lock") is None


def test_of_many_who_hold_one_wins(store):
    barrier = threading.Barrier(8)
    outcomes = []

    def work():
        barrier.wait()
        try:
            outcomes.append(store.hold("lock", NOTE))
        except ConflictError:
            outcomes.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [hold for hold in outcomes if hold is not None]
    assert len(outcomes) == 8
    assert len(winners) == 1
    winners[0].release()


# --- the contract: a machine against a dictionary -----------------------------------------------------------------


class NoFlush(FileOps):
    """Without fsync, for tests with many steps."""

    def fsync(self, fd):
        os.fstat(fd)

    def fsync_dir(self, path, *at):
        path.stat()


keys = st.sampled_from(["a", "b", "d/a", "d/b", "d/e/a", "d/e/b", "f/g/h/a"])
prefixes = st.sampled_from(["", "d", "d/e", "f", "f/g", "f/g/h", "x"])
payloads = st.binary(max_size=30)


class Machine(RuleBasedStateMachine):
    def make(self):
        raise NotImplementedError

    def reopen(self):
        """The same store as another process sees it."""

    def __init__(self):
        super().__init__()
        self.store = self.make()
        self.model = {}
        self.logs = {}
        self.holds = {}

    @rule(key=keys, chunks=st.lists(payloads, max_size=3))
    def put(self, key, chunks):
        if key not in self.logs:
            self.store.put(key, chunks)
            self.model[key] = b"".join(chunks)

    @rule(key=keys, data=payloads)
    def create(self, key, data):
        if key in self.model:
            with pytest.raises(ConflictError):
                self.store.create(key, data)
        else:
            self.store.create(key, data)
            self.model[key] = data

    @rule(key=keys)
    def delete(self, key):
        if key not in self.logs:
            self.store.delete(key)
            self.model.pop(key, None)

    @rule(prefix=prefixes.filter(bool))
    def prune(self, prefix):
        self.store.prune(prefix)

    @rule(key=keys)
    def log(self, key):
        if key in self.model:
            with pytest.raises(ConflictError):
                self.store.log(key)
        else:
            self.logs[key] = self.store.log(key)
            self.model[key] = b""

    @precondition(lambda self: self.logs)
    @rule(data=st.data(), payload=payloads)
    def append(self, data, payload):
        key = data.draw(st.sampled_from(sorted(self.logs)))
        self.logs[key].append(payload)
        self.model[key] += payload

    @precondition(lambda self: self.logs)
    @rule(data=st.data(), twice=st.booleans())
    def close(self, data, twice):
        log = self.logs.pop(data.draw(st.sampled_from(sorted(self.logs))))
        log.sync()
        log.close()
        if twice:
            log.close()

    @rule(name=st.sampled_from(["locks/1", "locks/2"]))
    def hold(self, name):
        if name in self.holds:
            with pytest.raises(ConflictError, match="4711"):
                self.store.hold(name, NOTE)
        else:
            self.holds[name] = self.store.hold(name, NOTE)

    @rule(name=st.sampled_from(["locks/1", "locks/2"]))
    def release(self, name):
        if name in self.holds:
            hold = self.holds.pop(name)
            hold.release()
            hold.release()

    @rule(key=keys, begin=st.integers(0, 12), end=st.none() | st.integers(0, 12))
    def get(self, key, begin, end):
        if key in self.model:
            assert self.store.get(key, begin, end) == self.model[key][begin:end]
        else:
            with pytest.raises(NotFoundError):
                self.store.get(key, begin, end)

    @rule(key=keys, junk=payloads)
    def scribble(self, key, junk):
        if key in self.model:
            view = self.store.view(key)
            assert bytes(view) == self.model[key]
            junk = junk[: len(view)]
            view[: len(junk)] = junk

    @rule()
    def look_again(self):
        self.reopen()

    @invariant()
    def the_same_bytes(self):
        for key in ("a", "b", "d/a", "d/e/b", "f/g/h/a"):
            data = self.model.get(key)
            assert self.store.size(key) == (None if data is None else len(data))
            if data is not None:
                assert self.store.get(key) == data

    @invariant()
    def the_same_children(self):
        # an empty directory is no name of the contract's; what is in it is compared one level below
        for prefix in ("", "d", "d/e", "f/g", "f/g/h", "x"):
            start = f"{prefix}/" if prefix else ""
            below = [key.removeprefix(start) for key in self.model if key.startswith(start)]
            files = sorted(name for name in below if "/" not in name)
            directories = {name.partition("/")[0] + "/" for name in below if "/" in name}
            found = self.store.children(prefix)
            assert [name for name in found if not name.endswith("/")] == files
            assert directories <= set(found)
            assert len(found) == len(set(found))
            assert self.store.litter(prefix) == []

    @invariant()
    def the_same_holders(self):
        for name in ("locks/1", "locks/2"):
            assert (self.store.holder(name) is not None) == (name in self.holds)

    def teardown(self):
        for log in self.logs.values():
            log.close()
        for hold in self.holds.values():
            hold.release()


class LocalMachine(Machine):
    def make(self):
        self.root = Path(tempfile.mkdtemp(prefix="peakpoint-test-"))
        return LocalStore(self.root / "root", NoFlush())

    def reopen(self):
        self.store = LocalStore(self.root / "root", NoFlush())

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.root)


class MemoryMachine(Machine):
    def make(self):
        return MemoryStore()


TestLocalMachine = LocalMachine.TestCase
TestMemoryMachine = MemoryMachine.TestCase
TestLocalMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestMemoryMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# --- the local store: files ---------------------------------------------------------------------------------------


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], indirect=True, ids=oct)
def test_modes_follow_the_umask(local, umask):
    local.put("d/put", [b"1"])
    local.create("d/created", b"1")
    local.log("d/log").close()
    local.hold("d/lock", NOTE).release()
    for name in ("put", "created", "log", "lock"):
        assert stat.S_IMODE(local.path(f"d/{name}").stat().st_mode) == 0o666 & ~umask
    for directory in (local.root, local.root / "d"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("name", ["with space", "ünïcödé", "模型", "a'b\"c", "new\nline", "-x", "$HOME", "a%20b", "*"])
def test_roots_of_any_name(tmp_path, name):
    store = LocalStore(tmp_path / name / "deep er")
    store.put("a/ü", [b"1"])
    store.create("a/b c", b"2")
    hold = store.hold("a/lock", NOTE)
    assert store.holder("a/lock") is not None
    assert store.children("a") == ["b c", "lock", "ü"]
    assert bytes(store.view("a/ü")) == b"1"
    assert store.free() > 0
    hold.release()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_root_is_created_with_the_first_write_only(local):
    assert local.children("") == []
    assert local.size("a") is None
    assert local.free() > 0
    local.delete("a")
    assert not local.root.exists()
    local.put("a", [b"1"])
    assert local.root.is_dir()


def test_a_link_to_the_root_is_the_same_store(tmp_path):
    real = LocalStore(tmp_path / "real")
    real.put("a", [b"1"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    linked = LocalStore(tmp_path / "link")
    assert linked.get("a") == b"1"
    hold = real.hold("lock", NOTE)
    with pytest.raises(ConflictError, match="4711"):
        linked.hold("lock", NOTE)
    assert linked.holder("lock") is not None
    hold.release()
    assert linked.holder("lock") is None


def test_views_are_mapped_not_read(local):
    local.put("a", [b"x" * 100])
    assert isinstance(local.view("a").obj, mmap.mmap)


def test_unfinished_writes_are_litter_and_no_children(local):
    local.put("d/a", [b"1"])
    (local.root / "d" / ".tmp-00000000-b").write_bytes(b"half")
    assert local.children("d") == ["a"]
    assert local.litter("d") == ["d/.tmp-00000000-b"]
    assert local.litter("") == []
    (local.root / ".tmp-00000000-c").write_bytes(b"half")
    assert local.litter("") == [".tmp-00000000-c"]
    for key in (*local.litter("d"), *local.litter("")):
        local.delete(key)
    assert local.litter("d") == local.litter("") == []


def test_open_store_takes_paths_and_stores(tmp_path, monkeypatch):
    memory = MemoryStore()
    assert open_store(memory) is memory
    store = open_store(str(tmp_path / "x"))
    assert isinstance(store, LocalStore)
    assert store.location == str(tmp_path / "x")
    assert open_store(tmp_path).location == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/x").location == str(tmp_path / "x")
    for wrong in ("gs://bucket/x", "https://example.org", "file:///tmp", ""):
        with pytest.raises(ConfigError):
            open_store(wrong)


# --- the local store: the order of system calls -------------------------------------------------------------------


class Recording(FileOps):
    """Writes down every call that changes something, before it is made."""

    def __init__(self):
        self.calls = []
        self.names = {}

    def mkdir(self, path, *at):
        self.calls.append(("mkdir", path.name))
        super().mkdir(path, *at)

    def create(self, path, *at):
        fd = super().create(path, *at)
        self.names[fd] = path.name
        self.calls.append(("create", path.name))
        return fd

    def write(self, fd, data):
        self.calls.append(("write", self.names[fd]))
        return super().write(fd, data)

    def fsync(self, fd):
        self.calls.append(("fsync", self.names[fd]))
        super().fsync(fd)

    def fsync_dir(self, path, *at):
        self.calls.append(("fsync_dir", path.name))
        super().fsync_dir(path, *at)

    def rename(self, source, target, *at):
        self.calls.append(("rename", source.name, target.name))
        super().rename(source, target, *at)

    def link(self, source, target, *at):
        self.calls.append(("link", source.name, target.name))
        super().link(source, target, *at)

    def unlink(self, path, *at):
        self.calls.append(("unlink", path.name))
        super().unlink(path, *at)

    def rmdir(self, path, *at):
        self.calls.append(("rmdir", path.name))
        super().rmdir(path, *at)


def test_put_flushes_the_file_before_the_rename_and_the_directory_after(tmp_path):
    ops = Recording()
    store = LocalStore(tmp_path / "root", ops)
    store.put("d/a", [b"1", b"2"])
    temporary = next(call[1] for call in ops.calls if call[0] == "create")
    assert temporary.startswith(".tmp-")
    assert ops.calls == [
        ("fsync_dir", tmp_path.parent.name),  # the directory above may have been made by somebody who died
        ("mkdir", "root"),
        ("fsync_dir", tmp_path.name),
        ("mkdir", "d"),
        ("fsync_dir", "root"),
        ("create", temporary),
        ("write", temporary),
        ("write", temporary),
        ("fsync", temporary),
        ("rename", temporary, "a"),
        ("fsync_dir", "d"),
    ]


def test_create_flushes_before_the_link_and_the_directory_after(tmp_path):
    ops = Recording()
    store = LocalStore(tmp_path, ops)
    store.put("d/x", [b""])
    ops.calls.clear()
    store.create("d/a", b"1")
    temporary = ops.calls[0][1]
    assert ops.calls == [
        ("create", temporary),
        ("write", temporary),
        ("fsync", temporary),
        ("link", temporary, "a"),
        ("unlink", temporary),
        ("fsync_dir", "d"),
    ]


def test_delete_prune_and_log_flush_the_directory_and_sync_the_file(tmp_path):
    ops = Recording()
    store = LocalStore(tmp_path, ops)
    store.put("d/x", [b""])
    ops.calls.clear()
    store.delete("d/x")
    store.prune("d")
    assert ops.calls == [("unlink", "x"), ("fsync_dir", "d"), ("rmdir", "d"), ("fsync_dir", tmp_path.name)]
    ops.calls.clear()
    log = store.log("d/j")
    assert ops.calls == [
        ("mkdir", "d"),
        ("fsync_dir", tmp_path.name),
        ("create", "j"),
        ("fsync_dir", "d"),
    ]
    ops.calls.clear()
    log.append(b"1")
    log.append(b"2")
    assert ops.calls == [("write", "j"), ("write", "j")]
    log.sync()
    assert ops.calls[2:] == [("fsync", "j")]
    log.close()
    assert ops.calls[3:] == [("fsync", "j")]


class Short(FileOps):
    """A system whose writes write a little only."""

    def write(self, fd, data):
        return os.write(fd, data[:7])


def test_short_writes_are_continued(tmp_path):
    store = LocalStore(tmp_path, Short())
    data = bytes(range(256))
    store.put("a", [data, b"", data])
    assert store.get("a") == data + data
    store.create("b", data)
    assert store.get("b") == data
    log = store.log("c")
    log.append(data)
    log.append(data)
    log.close()
    assert store.get("c") == data + data


# --- the local store: large files, past the page cache where that is possible -------------------------------------

LARGE = 4 * 1024 * 1024
PATTERN = bytes(range(251)) * (LARGE // 251 + 100)


class Whole(FileOps):
    """Stands for a file system that takes direct writes: checks that they are of whole pages to whole pages."""

    def __init__(self):
        self.direct = set()

    def set_direct(self, fd, *, on):
        (self.direct.add if on else self.direct.discard)(fd)

    def write(self, fd, data):
        if fd in self.direct:
            address = ctypes.addressof(ctypes.c_char.from_buffer(data))
            assert (address % 4096, len(data) % 4096, os.lseek(fd, 0, os.SEEK_CUR) % 4096) == (0, 0, 0)
        return os.write(fd, data)

    def create(self, path, *at):
        fd = super().create(path, *at)
        self.direct.discard(fd)
        return fd


class RefusesSwitch(FileOps):
    def set_direct(self, fd, *, on):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class RefusesWrite(Whole):
    """Takes the flag, and only then finds that it cannot."""

    def write(self, fd, data):
        if fd in self.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.write(fd, data)


class ShortDirect(Whole):
    """Writes an odd number of bytes now and then."""

    def write(self, fd, data):
        return super().write(fd, data) if len(data) < 100_000 else os.write(fd, data[:99_991])


class CannotReserve(FileOps):
    def reserve(self, fd, size):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("ops", [FileOps, Whole, RefusesSwitch, RefusesWrite, ShortDirect, CannotReserve])
@pytest.mark.parametrize(
    ("shift", "cuts"),
    [
        (0, [4096, LARGE]),
        (1, []),
        (512, [LARGE - 512]),
        (0, [5, 4096]),
        (0, [8192, 8193, LARGE]),
        (4096, [1_000_000, 1_000_000]),
    ],
)
def test_large_files_are_written_whole_however_they_lie_in_memory(tmp_path, ops, shift, cuts):
    store = LocalStore(tmp_path, ops())
    size = LARGE + 4096 + 17
    memory = memoryview(mmap.mmap(-1, size + 8192))
    memory[shift : shift + size] = PATTERN[:size]
    chunks = [memory[shift + begin : shift + end] for begin, end in zip([0, *cuts], [*cuts, size], strict=True)]
    store.put("a", chunks, size)
    assert store.get("a") == PATTERN[:size]
    store.put("a", [chunk.toreadonly() for chunk in chunks], size)
    assert store.get("a") == PATTERN[:size]


def test_whole_pages_of_large_files_are_written_directly_and_the_rest_is_not(tmp_path):
    class Counting(Whole):
        directly = 0

        def write(self, fd, data):
            written = super().write(fd, data)
            self.directly += written if fd in self.direct else 0
            return written

    ops = Counting()
    store = LocalStore(tmp_path, ops)
    store.put("a", [mmap.mmap(-1, LARGE), mmap.mmap(-1, 4097)], LARGE + 4097)
    assert ops.directly in (0, LARGE + 4096)  # 0 where the system knows no direct I/O
    assert store.get("a") == bytes(LARGE + 4097)
    assert store.remarks() == []


@pytest.mark.parametrize("ops", [RefusesSwitch, RefusesWrite])
@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system knows no direct I/O")
def test_refused_direct_io_is_remarked_once(tmp_path, ops):
    store = LocalStore(tmp_path, ops())
    for _ in range(2):
        store.put("a", [mmap.mmap(-1, LARGE)], LARGE)
    remarks = store.remarks()
    assert len(remarks) == 1
    assert str(tmp_path) in remarks[0]
    store.put("a", [mmap.mmap(-1, LARGE)], LARGE)
    assert store.remarks() == []


def test_a_store_without_trouble_has_nothing_to_remark(store):
    store.put("a", [b"1"], 1)
    assert store.remarks() == []


def test_a_disk_without_room_is_found_before_the_first_byte(tmp_path):
    class Full(Recording):
        def reserve(self, fd, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ops = Full()
    store = LocalStore(tmp_path, ops)
    store.put("a", [b"old"])
    ops.calls.clear()
    with pytest.raises(StoreError, match="free some space"):
        store.put("a", [bytes(LARGE)], LARGE)
    assert [call[0] for call in ops.calls] == ["create", "unlink"]
    assert store.get("a") == b"old"
    assert store.litter("") == []


# --- the local store: failures ------------------------------------------------------------------------------------


class Failing(FileOps):
    """Fails the named calls, when armed; writes half of the data first, as a full disk does."""

    def __init__(self, number, *calls):
        self.number, self.calls, self.armed, self.half = number, calls, False, True

    def fail(self, call):
        if self.armed and call in self.calls:
            raise OSError(self.number, os.strerror(self.number))

    def mkdir(self, path, *at):
        self.fail("mkdir")
        super().mkdir(path, *at)

    def create(self, path, *at):
        self.fail("create")
        return super().create(path, *at)

    def write(self, fd, data):
        if self.armed and "write" in self.calls and self.half and len(data) > 1:
            self.half = False
            return super().write(fd, data[: len(data) // 2])
        self.fail("write")
        return super().write(fd, data)

    def truncate(self, fd, size):
        self.fail("truncate")
        super().truncate(fd, size)

    def fsync(self, fd):
        self.fail("fsync")
        super().fsync(fd)

    def fsync_dir(self, path, *at):
        self.fail("fsync_dir")
        super().fsync_dir(path, *at)

    def rename(self, source, target, *at):
        self.fail("rename")
        super().rename(source, target, *at)

    def link(self, source, target, *at):
        self.fail("link")
        super().link(source, target, *at)

    def unlink(self, path, *at):
        self.fail("unlink")
        super().unlink(path, *at)

    def rmdir(self, path, *at):
        self.fail("rmdir")
        super().rmdir(path, *at)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def open_files():
    return len(names_in(Path("/dev/fd")))


HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "quota",
    errno.EIO: "check the kernel's log",
    errno.EROFS: "read-only",
    errno.EACCES: "owner and mode",
}


@pytest.mark.parametrize("number", HINTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["write", "fsync", "create"])
def test_a_write_that_fails_leaves_the_old_value_and_no_litter(tmp_path, call, number):
    ops = Failing(number, call)
    store = LocalStore(tmp_path, ops)
    store.put("d/a", [b"old"])
    ops.armed = True
    before = open_files()
    with pytest.raises(StoreError) as caught:
        store.put("d/a", [b"new value"])
    assert caught.value.errno == number
    assert isinstance(caught.value, OSError)
    assert not isinstance(caught.value, TransientStoreError)
    assert str(tmp_path / "d" / "a") in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert HINTS[number] in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    ops.half = True
    with pytest.raises(StoreError):
        store.create("d/b", b"new value")
    assert open_files() == before
    assert store.get("d/a") == b"old"
    assert store.size("d/b") is None
    assert store.litter("d") == []
    assert names_in(tmp_path / "d") == ["a"]
    ops.armed = False
    store.put("d/a", [b"new value"])  # and works again once the disk does
    assert store.get("d/a") == b"new value"


@pytest.mark.parametrize("call", ["rename", "link", "fsync_dir", "mkdir"])
def test_failures_later_on_leave_old_or_new_and_litter_that_can_be_found(tmp_path, call):
    ops = Failing(errno.EIO, call)
    store = LocalStore(tmp_path, ops)
    store.put("d/a", [b"old"])
    ops.armed = True
    for work in (
        lambda: store.put("d/a", [b"new"]),
        lambda: store.create("d/b", b"new"),
        lambda: store.put("e/f/a", [b"new"]),
    ):
        with contextlib.suppress(StoreError):
            work()
    ops.armed = False
    assert store.get("d/a") in (b"old", b"new")
    assert store.size("d/b") in (None, 3)
    known = {"d/" + name for name in store.children("d")} | set(store.litter("d"))
    assert known == {"d/" + name for name in names_in(tmp_path / "d")}
    for key in store.litter("d"):
        store.delete(key)
    store.put("e/f/a", [b"again"])
    assert store.get("e/f/a") == b"again"


@pytest.mark.parametrize(
    ("call", "work"),
    [
        ("rename", lambda store: store.put("d/a", [b"new"])),
        ("fsync_dir", lambda store: store.put("d/a", [b"new"])),
        ("link", lambda store: store.create("d/b", b"new")),
        ("fsync_dir", lambda store: store.create("d/b", b"new")),
        ("mkdir", lambda store: store.put("e/a", [b"new"])),
        ("mkdir", lambda store: store.hold("e/lock", NOTE)),
        ("create", lambda store: store.log("d/j")),
        ("fsync_dir", lambda store: store.log("d/j")),
        ("unlink", lambda store: store.delete("d/a")),
        ("fsync_dir", lambda store: store.delete("d/a")),
        ("rmdir", lambda store: store.prune("empty")),
        ("fsync_dir", lambda store: store.prune("empty")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_failure_is_told(tmp_path, call, work):
    """A success that is none is worse than an error: no method swallows a failing call."""
    ops = Failing(errno.EIO, call)
    store = LocalStore(tmp_path, ops)
    store.put("d/a", [b"old"])
    (tmp_path / "empty").mkdir()
    ops.armed = True
    with pytest.raises(StoreError, match="Input/output error") as caught:
        work(store)
    assert caught.value.errno == errno.EIO


def test_a_failing_fsync_is_never_tried_again(tmp_path):
    class Counting(Failing):
        flushed = 0

        def fsync(self, fd):
            self.flushed += 1
            super().fsync(fd)

    ops = Counting(errno.EIO, "fsync")
    store = LocalStore(tmp_path, ops)
    ops.armed = True
    with pytest.raises(StoreError):
        store.put("a", [b"1"])
    assert ops.flushed == 1


def test_a_failure_of_the_cleaning_does_not_hide_the_first_one(tmp_path):
    ops = Failing(errno.ENOSPC, "write", "unlink")
    store = LocalStore(tmp_path, ops)
    ops.armed = True
    with pytest.raises(StoreError, match="free some space"):
        store.put("a", [b"12"])
    assert len(store.litter("")) == 1
    assert store.children("") == []


@pytest.mark.parametrize(
    ("calls", "kept"), [(["write"], b"one\ntwo\nthree\n"), (["write", "truncate"], b"one\ntorn-\ntwo\nthree\n")]
)
def test_logs_tell_their_failures_and_go_on_after_them(tmp_path, calls, kept):
    ops = Failing(errno.ENOSPC, *calls)
    store = LocalStore(tmp_path, ops)
    log = store.log("j")
    log.append(b"one\n")
    ops.armed = True
    with pytest.raises(StoreError, match="free some space"):
        log.append(b"torn-line\n")
    ops.armed = False
    log.append(b"two\n")
    log.append(b"three\n")
    log.close()
    assert store.get("j") == kept


def test_a_log_whose_last_sync_fails_says_so_and_lets_go(tmp_path):
    ops = Failing(errno.EIO, "fsync")
    store = LocalStore(tmp_path, ops)
    before = open_files()
    log = store.log("j")
    log.append(b"1")
    ops.armed = True
    with pytest.raises(StoreError, match="make durable"):
        log.sync()
    with pytest.raises(StoreError, match="make durable"):
        log.close()
    assert open_files() == before
    log.close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT], ids=errno.errorcode.get)
def test_what_may_pass_is_transient(tmp_path, number):
    ops = Failing(number, "fsync")
    store = LocalStore(tmp_path, ops)
    ops.armed = True
    with pytest.raises(TransientStoreError) as caught:
        store.put("a", [b"1"])
    assert caught.value.errno == number


def test_names_that_are_too_long_are_errors_of_ours(local):
    for work in (lambda key: local.put(key, [b""]), lambda key: local.create(key, b""), local.log):
        with pytest.raises(StoreError, match="choose a shorter") as caught:
            work("d/" + "x" * 300)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_a_file_where_a_directory_should_be_is_an_error_of_ours(tmp_path):
    (tmp_path / "root").write_bytes(b"a file")
    store = LocalStore(tmp_path / "root")
    for work in (lambda: store.put("a", [b""]), lambda: store.create("a", b""), lambda: store.log("a")):
        with pytest.raises(StoreError):
            work()
    with pytest.raises(StoreError):
        store.hold("a", NOTE)
    assert (tmp_path / "root").read_bytes() == b"a file"


# --- the local store: what it has not made -------------------------------------------------------------------------


def strange(path):
    """One of each kind of what is no file and no directory, at a path and beside it; returns their words by name."""
    path.symlink_to("elsewhere")
    os.mkfifo(path.with_name("pipe"))
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # addresses must be short
        server.bind("socket")
    (path.parent / ".tmp-directory").mkdir()
    return {
        ".tmp-directory": "a directory",
        path.name: "a symbolic link",
        "pipe": "a named pipe",
        "socket": "a socket",
    }


def test_what_no_store_has_made_is_listed_refused_and_left_alone(local):
    local.put("d/elsewhere", [b"precious"])
    words = strange(local.path("d/link"))
    assert local.foreign("d") == words
    assert local.foreign("") == {}
    assert local.children("d") == ["elsewhere", "link", "pipe", "socket"]
    assert local.litter("d") == []
    for name, what in words.items():
        key = f"d/{name}"
        for work in (local.get, local.view, local.fill, lambda key: local.hold(key, NOTE)):
            with pytest.raises(FormatError, match=f"{name} is {what}"):
                work(key)
        for work in (lambda key: local.put(key, [b"1"]), lambda key: local.create(key, b"1"), local.log):
            with pytest.raises(StoreError, match=f"{name} is {what}"):
                work(key)
        with pytest.raises(StoreError):
            local.link("d/elsewhere", key)
        with pytest.raises(FormatError):
            local.link(key, "d/other")
        assert local.size(key) is local.holder(key) is local.reading(key) is None
        assert not local.is_read(key)
        local.delete(key)
        if name != ".tmp-directory":
            local.prune(key)
    assert local.foreign("d") == words
    assert local.get("d/elsewhere") == b"precious"


def test_nothing_is_reached_through_a_link(local, tmp_path):
    (tmp_path / "outside" / "e").mkdir(parents=True)
    (tmp_path / "outside" / "e" / "a").write_bytes(b"precious")
    (tmp_path / "outside" / ".tmp-a").write_bytes(b"precious")
    local.put("d/a", [b"1"])
    local.path("d/link").symlink_to(tmp_path / "outside")
    for work in (
        lambda: local.get("d/link/e/a"),
        lambda: local.view("d/link/e/a"),
        lambda: local.fill("d/link/e/a"),
        lambda: local.size("d/link/e/a"),
        lambda: local.children("d/link"),
        lambda: local.litter("d/link"),
        lambda: local.foreign("d/link/e"),
        lambda: local.put("d/link/e/a", [b"2"]),
        lambda: local.put("d/link/new/a", [b"2"]),
        lambda: local.create("d/link/b", b"2"),
        lambda: local.link("d/a", "d/link/b"),
        lambda: local.link("d/link/e/a", "d/b"),
        lambda: local.delete("d/link/.tmp-a"),
        lambda: local.prune("d/link/e"),
        lambda: local.log("d/link/j"),
        lambda: local.hold("d/link/lock", NOTE),
        lambda: local.holder("d/link/lock"),
    ):
        with pytest.raises(StoreError, match="link is a symbolic link, and none is followed") as caught:
            work()
        assert caught.value.errno == errno.ELOOP
    assert local.reading("d/link/e/a") is None
    assert local.stamp("d/link") == ""
    assert names_in(tmp_path / "outside") == [".tmp-a", "e"]
    assert names_in(tmp_path / "outside" / "e") == ["a"]
    assert names_in(local.path("d")) == ["a", "link"]


def test_a_link_that_takes_the_place_of_a_directory_meanwhile_is_not_followed(tmp_path):
    """What was looked at is what is used: the names below a directory are its own, wherever it is now."""
    (tmp_path / "outside").mkdir()

    class Exchanging(FileOps):
        def fsync(self, fd):
            super().fsync(fd)
            (tmp_path / "root" / "d").rename(tmp_path / "root" / "moved")
            (tmp_path / "root" / "d").symlink_to(tmp_path / "outside")

    LocalStore(tmp_path / "root", Exchanging()).put("d/a", [b"1"])
    assert names_in(tmp_path / "outside") == []
    assert (tmp_path / "root" / "moved" / "a").read_bytes() == b"1"


def test_a_link_is_no_file_to_be_adopted_as_it_is(local, tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert local.adopt(tmp_path / "link", "d/a")  # what it points at: the place is the caller's
    assert local.get("d/a") == b"1"
    assert stat.S_ISREG(local.path("d/a").lstat().st_mode)
    with pytest.raises(FormatError, match="a named pipe"):
        local.adopt(tmp_path / "pipe", "d/b")


def test_a_file_of_absurd_size_is_refused_unread(local):
    local.put("d/a", [b"1"])
    os.truncate(local.path("d/a"), 2**40)
    for most in (SMALL, RECORD):
        with pytest.raises(FormatError, match=rf"d/a has {2**40} bytes, .* at most {most}"):
            local.get("d/a", max_size=most)
    with pytest.raises(FormatError):
        local.get("d/a", 100)
    assert local.get("d/a", 0, 3) == b"1\0\0"


# --- the local store: without hard links --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK], ids=errno.errorcode.get)
def test_without_hard_links_create_still_creates_once(tmp_path, number):
    ops = Failing(number, "link")
    ops.armed = True
    store = LocalStore(tmp_path, ops)
    store.create("d/a", b"one")
    assert store.get("d/a") == b"one"
    with pytest.raises(ConflictError, match="already exists"):
        store.create("d/a", b"two")
    assert store.get("d/a") == b"one"
    assert names_in(tmp_path / "d") == ["a"]


def test_without_hard_links_the_directory_is_flushed_as_well(tmp_path):
    class NoLinks(Recording):
        def link(self, source, target, *at):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    ops = NoLinks()
    store = LocalStore(tmp_path, ops)
    store.create("a", b"one")
    temporary = next(call[1] for call in ops.calls if call[0] == "create")
    assert ops.calls[-3:] == [("fsync", temporary), ("rename", temporary, "a"), ("fsync_dir", tmp_path.name)]


# --- the local store: locks between processes ---------------------------------------------------------------------

HOLDER = """
import json, os, sys
from pathlib import Path
from peakpoint.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
note = {"host": "elsewhere", "pid": str(os.getpid()), "since": "noon"}
hold = store.hold("runs/r/lock", json.dumps(note).encode())
print("held", flush=True)
if sys.stdin.readline() == "release\\n":
    hold.release()
    print("released", flush=True)
    sys.stdin.readline()
"""

TRY = """
import sys
from pathlib import Path
from peakpoint.errors import ConflictError
from peakpoint.store import LocalStore
try:
    LocalStore(Path(sys.argv[1])).hold("runs/r/lock", b"{}").release()
    print("got it")
except ConflictError as error:
    print(error)
"""

FORK = """
import json, os, sys
from pathlib import Path
from peakpoint.errors import ConflictError
from peakpoint.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
hold = store.hold("runs/r/lock", json.dumps({"host": "h", "pid": str(os.getpid()), "since": "noon"}).encode())
parent, child = os.getpid(), os.fork()
if child == 0:
    try:
        holder = store.holder("runs/r/lock")
        assert holder is not None and str(parent) in holder, holder
        try:
            store.hold("runs/r/lock", b"{}")
        except ConflictError as error:
            assert str(parent) in str(error), error
        else:
            raise AssertionError("the child holds as well")
        hold.release()  # the child's copy: no effect
        holder = store.holder("runs/r/lock")
        assert holder is not None and str(parent) in holder, holder
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status), flush=True)
assert store.holder("runs/r/lock") is not None
if os.fork() == 0:  # one that outlives a killed parent, as data-loader workers do
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    os._exit(0)
os.wait()
"""


@pytest.fixture
def spawn(tmp_path):
    """Starts a script on a root; what is left of it at the end is killed."""
    started = []

    def start(script, root):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()  # which ends what it has forked
        process.stdout.close()


def try_to_hold(root):
    """What another process is told that wants the lock."""
    return subprocess.run(
        [sys.executable, "-c", TRY, str(root)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def test_a_lock_of_another_live_process_is_a_conflict_that_names_it(local, spawn):
    other = spawn(HOLDER, local.root)
    assert other.stdout.readline() == "held\n"
    for _ in range(3):  # and asking does not disturb
        assert local.holder("runs/r/lock") == f"process {other.pid} on elsewhere since noon"
        with pytest.raises(ConflictError, match=f"process {other.pid} on elsewhere since noon"):
            local.hold("runs/r/lock", NOTE)
    assert str(other.pid) in try_to_hold(local.root)
    other.stdin.write("release\n")
    other.stdin.flush()
    assert other.stdout.readline() == "released\n"
    assert local.holder("runs/r/lock") is None
    local.hold("runs/r/lock", NOTE).release()


def test_a_lock_of_a_killed_process_is_taken_over(local, spawn):
    other = spawn(HOLDER, local.root)
    assert other.stdout.readline() == "held\n"
    other.kill()
    other.wait()
    assert local.holder("runs/r/lock") is None
    hold = local.hold("runs/r/lock", NOTE)
    assert "4711" in local.holder("runs/r/lock")
    assert str(other.pid) not in try_to_hold(local.root)
    hold.release()


def test_asking_and_being_refused_do_not_lose_the_lock(local):
    hold = local.hold("runs/r/lock", NOTE)
    assert local.holder("runs/r/lock") is not None
    assert LocalStore(local.root).holder("runs/r/lock") is not None
    with pytest.raises(ConflictError):
        LocalStore(local.root).hold("runs/r/lock", NOTE)
    assert local.size("runs/r/lock") == len(NOTE)
    assert local.children("runs/r") == ["lock"]
    assert "4711" in try_to_hold(local.root)
    hold.release()
    assert try_to_hold(local.root) == "got it"


def test_reading_the_key_of_a_lock_does_not_lose_it(local):
    hold = local.hold("runs/r/lock", NOTE)
    assert local.get("runs/r/lock") == NOTE
    assert bytes(local.view("runs/r/lock")) == NOTE
    assert "4711" in try_to_hold(local.root)
    hold.release()


def test_a_backup_in_the_process_of_the_holder_does_not_lose_the_lock(local, tmp_path):
    hold = local.hold("runs/r/lock", NOTE)
    shutil.copytree(local.root, tmp_path / "backup")
    assert local.path("runs/r/lock").read_bytes() == NOTE
    assert "4711" in try_to_hold(local.root)
    hold.check()
    hold.release()


def overwrite(path):
    path.write_bytes(b"{}")


def exchange(path):
    path.unlink()
    path.write_bytes(NOTE)


def link_to_itself(path):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


@pytest.mark.parametrize("take", [Path.unlink, exchange, overwrite, link_to_itself], ids=lambda take: take.__name__)
def test_who_holds_learns_that_the_file_was_removed_replaced_or_overwritten(local, take):
    hold = local.hold("runs/r/lock", NOTE)
    take(local.path("runs/r/lock"))
    with pytest.raises(ConflictError, match="was removed, replaced or overwritten"):
        hold.check()
    hold.release()


def test_of_two_who_hold_after_a_removal_the_second_is_right(local):
    first = local.hold("runs/r/lock", NOTE)
    local.path("runs/r/lock").unlink()
    second = local.hold("runs/r/lock", NOTE)
    second.check()
    with pytest.raises(ConflictError):
        first.check()
    first.release()
    second.check()
    assert "4711" in try_to_hold(local.root)
    second.release()


def test_forked_children_of_the_holder_neither_hold_nor_keep_the_lock(local, spawn):
    holder = spawn(FORK, local.root)
    assert holder.stdout.readline() == "child 0\n"
    worker = holder.stdout.readline()
    assert worker.strip().isdigit()
    assert local.holder("runs/r/lock") is not None
    holder.kill()
    holder.wait()
    assert local.holder("runs/r/lock") is None  # although the worker is alive, with all that it inherited
    local.hold("runs/r/lock", NOTE).release()


def test_the_note_of_a_new_holder_replaces_a_longer_one_of_an_old_holder_at_rest(local):
    """Other processes read the note from the file, and would read the rest of the old one."""
    local.hold("runs/r/lock", NOTE + b" " * 500).release()
    hold = local.hold("runs/r/lock", b'{"host":"h","pid":"1","since":"now"}')
    assert "process 1 on h since now" in try_to_hold(local.root)
    hold.release()
    assert local.path("runs/r/lock").read_bytes() == b'{"host":"h","pid":"1","since":"now"}'


def test_a_lock_survives_being_asked_for_before_it_exists(local):
    assert local.holder("runs/r/lock") is None
    assert not local.root.exists()
    local.put("runs/r/x", [b""])
    assert local.holder("runs/r/lock") is None
    assert local.children("runs/r") == ["x"]


def test_errors_of_stores_are_told_apart():
    assert not issubclass(NotFoundError, StoreError)
    assert not issubclass(ConflictError, OSError)
    assert issubclass(TransientStoreError, StoreError)
    assert not issubclass(CorruptError, StoreError)
