"""An error does not tell whether the thing was done: one at every file operation in turn, before it or after it."""

import contextlib
import errno
import os
import warnings

import pytest
import torch

import peakpoint as pp
from peakpoint.errors import ConflictError, StoreError
from peakpoint.repository import audit
from peakpoint.store import FileOps, LocalStore, MemoryStore, establish
from training import checkpointer

NAMES = ("mkdir", "create", "write", "fsync", "fsync_dir", "rename", "link", "unlink", "rmdir")


class Failing(FileOps):
    """Fails some operations, instead of carrying them out or after that; may have no hard links."""

    def __init__(self, failing=(), *, done=False, links=True):
        self.failing, self.done, self.links, self.names = failing, done, links, []


def _around(name):
    def method(self, *arguments):
        fails = len(self.names) in self.failing
        self.names.append(name)
        if name == "link" and not self.links:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if fails and not self.done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        result = getattr(FileOps, name)(self, *arguments)
        if fails:
            if name == "create":
                os.close(result)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return result

    return method


for _name in NAMES:
    setattr(Failing, _name, _around(_name))


def train(root, ops):
    """Two saves of which one is kept, with a file that they share; the last step that is known to be durable."""
    state = {"model": {"w": torch.zeros(2)}, "frozen": {"table": torch.arange(8.0)}}
    acknowledged = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pp.PeakpointWarning)  # retention that could not follow
        with contextlib.suppress(pp.SaveFailedError, pp.errors.StoreError):
            with checkpointer(LocalStore(root, ops), state=state, keep=[pp.Last(1)], resume="never") as ckpt:
                for step in (1, 2):
                    state["model"]["w"].fill_(step)
                    with contextlib.suppress(pp.SaveFailedError):
                        ckpt.report(step=step)
                        ckpt.wait()
                        acknowledged = step
            acknowledged = 2
    return acknowledged


@pytest.mark.parametrize(
    ("done", "links", "times"),
    [
        pytest.param(False, True, 1, id="not done", marks=pytest.mark.slow),
        pytest.param(True, True, 1, id="done"),
        pytest.param(True, False, 1, id="done-without hard links", marks=pytest.mark.slow),
        pytest.param(True, True, 3, id="done-three in a row", marks=pytest.mark.slow),
        pytest.param(False, True, 3, id="not done-three in a row", marks=pytest.mark.slow),
        pytest.param(False, False, 5, id="not done-five in a row-without hard links", marks=pytest.mark.slow),
    ],
)
def test_errors_anywhere_make_no_two_of_an_id_and_lose_nothing(tmp_path, done, links, times):
    counting = Failing(links=links)
    assert train(tmp_path / "whole", counting) == 2
    for number in range(len(counting.names)):
        root = tmp_path / str(number)
        acknowledged = train(root, Failing(range(number, number + times), done=done, links=links))
        if not (root / "peakpoint.json").exists():
            assert not acknowledged
            continue
        repository = pp.open(root)
        where = f"operation {number}, {counting.names[number]}"
        manifests = [manifest for run in repository.runs() for manifest in run.manifests()]
        assert len({manifest.id for manifest in manifests}) == len(manifests), where
        assert len({manifest.step for manifest in manifests}) == len(manifests), where
        assert max([manifest.step for manifest in manifests], default=0) >= acknowledged, where
        for manifest in manifests:
            assert pp.load(f"r/{manifest.id}", root=root)["model"]["w"][0] == manifest.step, where
        assert not audit.audit(repository, deep=True).of_kind("damage"), where
        audit.clean(repository)
        assert audit.audit(repository).clean, where


@pytest.mark.parametrize("links", [True, False], ids=["", "without hard links"])
@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize("times", [1, 2, 9])
def test_a_record_is_there_and_durable_or_an_error_is_raised(tmp_path, done, links, times):
    whole = Failing(links=links)
    establish(LocalStore(tmp_path / "whole", whole), "d/a", b"mine")
    for number in range(len(whole.names)):
        ops = Failing(range(number, number + times), done=done, links=links)
        store = LocalStore(tmp_path / str(number), ops)
        try:
            establish(store, "d/a", b"mine")
        except StoreError:
            continue
        assert store.get("d/a") == b"mine"
        assert ops.names[-1] == "fsync_dir"
        assert len(ops.names) - 1 not in ops.failing


def test_a_record_of_others_is_not_taken_for_the_own_one():
    store = MemoryStore()
    establish(store, "a", b"theirs")
    with pytest.raises(ConflictError):
        establish(store, "a", b"mine")
    assert store.get("a") == b"theirs"
