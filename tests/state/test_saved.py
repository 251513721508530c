"""Reading: lazily, one tensor at a time, past the page cache, and in pieces on their way to a GPU."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.state import device_copy
from peakpoint.store import FileOps, LocalStore
from peakpoint.store.direct_io import BLOCK, PAGE, DirectReader, is_cached
from training import checkpointer, parts, same

SIZE = 2 * BLOCK + 12_345


def threads():
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("peakpoint-read", "peakpoint-t"))
    ]


def cold(tmp_path, size=SIZE):
    """A store with one file that the page cache does not hold."""
    data = np.random.default_rng(0).bytes(size)
    store = LocalStore(tmp_path)
    store.put("d/a", [data])
    fd = os.open(tmp_path / "d" / "a", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(fd, size):
            pytest.skip("this file system keeps files in the page cache")
    finally:
        os.close(fd)
    return store, data


def open_files():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT") or not hasattr(os, "RWF_NOWAIT"), reason="Linux only")


@needs_direct
def test_a_cold_file_is_read_past_the_page_cache(tmp_path):
    store, data = cold(tmp_path)
    before = open_files()
    filling = store.fill("d/a")
    filling.wait(PAGE)
    assert filling.data[:PAGE] == data[:PAGE]
    filling.wait(SIZE)
    assert filling.data == data
    filling.close()
    assert open_files() == before
    assert threads() == []
    fd = os.open(tmp_path / "d" / "a", os.O_RDONLY)
    assert not is_cached(fd, SIZE), "it went past the cache"
    os.close(fd)
    filling.data[:3] = b"abc"
    assert store.get("d/a", 0, 3) == data[:3]
    assert store.get("d/a") == data  # through the page cache, which holds it now
    warm = store.fill("d/a")
    assert threads() == []
    assert warm.data == data


@needs_direct
def test_a_reading_can_be_given_up(tmp_path):
    store, _ = cold(tmp_path)
    before = open_files()
    store.fill("d/a").close()
    assert open_files() == before
    assert threads() == []


class FailingReads(FileOps):
    """Fails the reads from a place in the file on."""

    def __init__(self, begin, error):
        self.begin, self.error = begin, error

    def read(self, fd, memory, position):
        if position >= self.begin:
            if self.error is None:
                return 0
            raise OSError(self.error, os.strerror(self.error))
        return super().read(fd, memory, position)


@needs_direct
@pytest.mark.parametrize("error", [errno.EIO, None])
def test_an_error_while_reading_is_ours(tmp_path, error):
    store, data = cold(tmp_path)
    store = LocalStore(tmp_path, FailingReads(BLOCK, error))
    filling = store.fill("d/a")
    filling.wait(BLOCK)
    assert filling.data[:BLOCK] == data[:BLOCK]
    with pytest.raises(pp.errors.StoreError, match=r"cannot read .*d/a"):
        filling.wait(SIZE)
    filling.close()
    assert threads() == []


@needs_direct
def test_short_reads_that_end_anywhere(tmp_path):
    class Short(FileOps):
        def read(self, fd, memory, position):
            return super().read(fd, memory[: 1_000_001 if position else 8 * PAGE], position)

    _, data = cold(tmp_path, 4_500_000)
    fd = os.open(tmp_path / "d" / "a", os.O_RDONLY)
    filling = DirectReader(Short(), fd, len(data), tmp_path / "file")
    filling.wait(len(data))
    filling.close()
    assert filling.data == data


@needs_direct
def test_a_file_system_without_direct_io_is_mapped(tmp_path):
    class Refusing(FileOps):
        def set_direct(self, fd, *, on):
            raise OSError(errno.EINVAL, "no")

    _, data = cold(tmp_path)
    before = open_files()
    filling = LocalStore(tmp_path, Refusing()).fill("d/a")
    filling.wait(SIZE)
    assert filling.data == data
    del filling
    assert open_files() == before


# --- lazily -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model, optimizer = parts()
    model[0].weight.pow(2).sum().backward()
    optimizer.step()
    tied = torch.nn.Linear(3, 4)
    base = torch.arange(24.0)
    state = {
        "model": model,
        "optimizer": optimizer,
        "odd": {
            "a.b": {"c": torch.ones(2)},
            "list": [torch.zeros(3), {"x": torch.eye(2).T}],
            7: torch.tensor(7),
            "half": base[:12],
            "other": base[6:],
            "turned": torch.arange(6.0).reshape(2, 3).T,
            "tied": (tied.weight, tied.weight),
            "large": torch.rand(3_000_000),
        },
        "plain": 5,
    }
    with checkpointer(tmp_path, state=state) as ckpt:
        ckpt.report()
    return tmp_path, state


def test_every_tensor_can_be_read_alone(saved):
    root, state = saved
    loaded = pp.load("r@latest", root=root)
    whole = loaded["odd"]
    expected = {
        "a.b.c": whole["a.b"]["c"],
        "list.0": whole["list"][0],
        "list.1.x": whole["list"][1]["x"],
        "7": whole[7],
        "half": whole["half"],
        "other": whole["other"],
        "turned": whole["turned"],
        "tied.0": whole["tied"][0],
        "tied.1": whole["tied"][1],
        "large": whole["large"],
    }
    names = loaded.names("odd")
    assert names.keys() == expected.keys()
    for name, value in expected.items():
        alone = loaded.tensor("odd", name)
        assert same(alone, value), name
        assert alone.stride() == value.stride()
        assert names[name] == ("I64" if name == "7" else "F32", tuple(value.shape))
    for name, value in state["model"].state_dict().items():
        assert same(loaded.tensor("model", name), value)
    assert same(
        loaded.tensor("optimizer", "state.0.momentum_buffer"), loaded["optimizer"]["state"][0]["momentum_buffer"]
    )
    assert loaded.names("plain") == {}


def test_opening_reads_no_tensors(saved):
    root, _ = saved

    class Counting(LocalStore):
        read = ()

        def fill(self, key):
            self.read = (*self.read, key.rpartition("/")[2])
            return super().fill(key)

        def view(self, key):
            self.read = (*self.read, key.rpartition("/")[2])
            return super().view(key)

    store = Counting(root)
    loaded = pp.load("r@latest", root=store)
    assert list(loaded) == ["model", "optimizer", "odd", "plain"]
    assert len(loaded) == 4
    assert "odd" in loaded
    assert "rng" not in loaded
    assert set(store.read) == {"state.json"}
    assert loaded["plain"] == 5
    assert loaded.tensor("model", "0.weight").shape == (4, 3)
    assert set(store.read) == {"state.json"}
    assert loaded["model"] is loaded["model"]
    assert set(store.read) == {"state.json", "model.safetensors"}
    assert repr(loaded).startswith("<Loaded r/step0: model (4 tensors), optimizer (1 tensors), odd")


@pytest.mark.parametrize("verify", [True, False])
def test_verified_or_not_the_values_are_the_same_and_writing_changes_nothing_at_rest(saved, verify):
    root, state = saved
    loaded = pp.load("r@latest", root=root, verify=verify)
    assert same(loaded["odd"]["large"], state["odd"]["large"])
    loaded["odd"]["large"].zero_()
    assert same(pp.load("r@latest", root=root)["odd"]["large"], state["odd"]["large"])
    fresh, _ = parts(seed=1)
    pp.load("r@latest", root=root, into=fresh, verify=verify)
    assert same(dict(fresh.state_dict()), dict(state["model"].state_dict()))


def test_what_is_not_there_is_said_with_what_is(saved):
    root, _ = saved
    loaded = pp.load("r@latest", root=root)
    with pytest.raises(KeyError, match="modle"):
        loaded["modle"]
    with pytest.raises(pp.errors.NotFoundError, match=r"no part 'modle'.*model"):
        loaded.tensor("modle", "x")
    with pytest.raises(pp.errors.NotFoundError, match=r"no tensor '0.wieght'.*0\.weight"):
        loaded.tensor("model", "0.wieght")
    with pytest.raises(pp.errors.NotFoundError, match="no part 'rng'"):
        loaded.names("rng")


def test_a_file_that_is_gone_is_noticed_on_opening(saved):
    root, _ = saved
    (path,) = root.rglob("odd.safetensors")
    path.unlink()
    with pytest.raises(pp.errors.CorruptError, match=r"odd\.safetensors is missing"):
        pp.load("r@latest", root=root)


# --- to a GPU -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 17))
def test_the_loads_of_an_upload_are_every_byte_once(sizes, block):
    pairs = [
        (torch.zeros(size, dtype=torch.uint8), torch.randint(1, 255, (size,), dtype=torch.uint8)) for size in sizes
    ]
    staged = torch.zeros(block, dtype=torch.uint8)
    loads = list(device_copy.plan(pairs, block))
    assert all(sum(len(piece.source) for piece in load) == block for load in loads[:-1])
    for load in loads:
        at = 0
        for piece in load:
            assert piece.begin == at
            assert len(piece.source) == len(piece.target) > 0
            at += len(piece.source)
            staged[piece.begin : at] = piece.source
        assert at <= block
        for piece in load:
            piece.target.copy_(staged[piece.begin : piece.begin + len(piece.target)])
    assert all(torch.equal(target, source) for target, source in pairs)


def test_host_memory_is_left_to_torch():
    assert device_copy.send([(torch.zeros(3), torch.ones(3)), (torch.zeros(3), None)]) == set()
