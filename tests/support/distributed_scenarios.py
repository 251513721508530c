"""Ranks that use torch.distributed.checkpoint, run by tests/distributed/test_by_ranks.py in an interpreter that forks.

Prints a line of JSON for each scenario: its name, and what it has returned.
"""

import errno
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import peakpoint as pp
from peakpoint.distributed import Reader, Writer
from peakpoint.repository.audit import audit
from peakpoint.store import FileOps, LocalStore
from ranks import in_ranks
from training import QuietCheckpointer


class Training:
    """A model of uneven shapes, with weights of two element types, sharded where several ranks train it."""

    def __init__(self, seed, size):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 1, bias=False), torch.nn.BatchNorm1d(1)
        )
        self.model[2].to(torch.bfloat16)
        if size > 1:
            ways = (2, 2) if size == 4 else (size,)  # replicas of shards on four
            mesh = init_device_mesh("cpu", ways, mesh_dim_names=("replicas", "shards")[-len(ways) :])
            for layer in (self.model[0], self.model[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model[1], mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        hidden = self.model[1](self.model[0](torch.rand(6, 5)))
        self.model[3](self.model[2](hidden.to(torch.bfloat16)).float()).pow(2).sum().backward()
        self.optimizer.step()

    def state(self, size):
        return {
            "model": get_model_state_dict(self.model),
            "optim": get_optimizer_state_dict(self.model, self.optimizer),
            "boxes": boxes(size, torch.randint(0, 100, (5, 6)), torch.rand(3, 5).to(torch.bfloat16)),
            "plain": {"mean": torch.rand(3, 1), "count": torch.tensor(4)},
            "note": {"a": (1, 2.5, None), "text": "x"},
            "tokens": 17,
        }


def boxes(size, *tensors):
    """Tensors on a mesh of two dimensions, where there are ranks for it."""
    if size < 4:
        return {str(number): tensor for number, tensor in enumerate(tensors)}
    mesh = init_device_mesh("cpu", (2, 2))
    places = [(Shard(0), Shard(1)), (Replicate(), Shard(1))]
    return {
        str(number): distribute_tensor(tensor, mesh, place)
        for number, (tensor, place) in enumerate(zip(tensors, places, strict=True))
    }


def digests(state):
    """A digest of every tensor, whole, and every other value, by the path to it."""
    result = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, child in value.items():
                walk(child, f"{path}.{key}")
        elif isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            octets = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            result[path] = [str(whole.dtype), list(whole.shape), hashlib.sha256(octets).hexdigest()]
        else:
            result[path] = repr(value)

    walk(state, "")
    return result


def save(root, size, step=1):
    """Save with so many ranks; returns the digests of what each had."""

    def work(rank):
        quiet()
        state = Training(1, size).state(size)
        before = digests(state)
        dcp.save(state, storage_writer=Writer(root, run="r", step=step, metrics={"loss": 1.0}))
        return before

    return in_ranks(size, work)


def quiet():
    warnings.filterwarnings("ignore", "torch.distributed is disabled")


# --- scenarios ----------------------------------------------------------------------------------------------------


def saved_and_loaded(root):
    results = {}
    for size in (1, 2, 3, 4):
        path = root / str(size)
        results[f"saved {size}"] = save(path, size)
        whole = pp.load("r@latest", root=path)
        extra = dict(whole["extra"])
        results[f"whole {size}"] = digests({**{part: whole[part] for part in whole if part != "extra"}, **extra})
        results[f"audit {size}"] = audit(pp.open(path), deep=True).clean
        results[f"files {size}"] = sorted(file.name for file in pp.open(path).find_manifest("r@latest").files)
        for other in (1, 2, 3, 4):

            def work(rank):
                quiet()
                state = Training(2 + rank, other).state(other)  # noqa: B023
                dcp.load(state, storage_reader=Reader(path, "r@latest"))  # noqa: B023
                return digests(state)

            results[f"loaded {size} {other}"] = in_ranks(other, work)
    return results


class FailingWrites(FileOps):
    """A disk that refuses large writes, or the end of the process at the first."""

    def __init__(self, *, kill=False):
        super().__init__()
        self.kill = kill

    def write(self, fd, data):
        if len(data) < 2000:
            return super().write(fd, data)
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def caught(work):
    """Return the kind and the text of the error of each rank that some work has met; None without one."""
    try:
        work()
    except dcp.api.CheckpointException as error:
        return {rank: [type(failure).__name__, str(failure)] for rank, (failure, _) in error.failures.items()}


def a_rank_is_killed(root):
    def work(rank):
        store = LocalStore(root, FailingWrites(kill=True) if rank == 1 else None)
        try:
            dcp.save(Training(1, 3).state(3), storage_writer=Writer(store, run="r", step=1))
        except RuntimeError:  # of gloo
            return "failed"

    results = {"ranks": in_ranks(3, work, seconds=5)}
    results["checkpoints"] = len(pp.open(root).run("r").checkpoints())
    results["findings"] = [[finding.kind, finding.where] for finding in audit(pp.open(root), deep=True).findings]
    results["again"] = save(root, 3)
    results["clean"] = audit(pp.open(root), deep=True).clean
    return results


def a_disk_is_full(root):
    def work(rank):
        state = Training(1, 2).state(2)
        store = LocalStore(root, FailingWrites() if rank == 1 else None)
        failures = caught(lambda: dcp.save(state, storage_writer=Writer(store, run="r", step=1)))
        dcp.save(state, storage_writer=Writer(root, run="r", step=2))
        return failures

    results = {"ranks": in_ranks(2, work)}
    repository = pp.open(root)
    results["steps"] = [checkpoint.step for checkpoint in repository.run("r").checkpoints()]
    return results | {"holder": repository.run("r").holder(), "clean": audit(repository, deep=True).clean}


def a_byte_is_flipped(root):
    assert save(root, 2)[1] == [0, 0]
    manifest = pp.open(root).find_manifest("r@latest")
    file = manifest.file("model+rank1.safetensors")
    row = next(row for row in file.tensors if row.name == "0.weight")
    path = root / "runs" / "r" / "checkpoints" / manifest.name / file.name
    data = bytearray(path.read_bytes())
    data[file.header + row.begin] ^= 1
    path.write_bytes(data)

    def work(rank):
        state = Training(2, 2).state(2)
        return caught(lambda: dcp.load(state, storage_reader=Reader(root, "r@latest")))

    return in_ranks(2, work)


def a_tuple_has_shards(root):
    def work(rank):
        shard = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
        return caught(lambda: dcp.save({"a": {"b": (shard,)}}, storage_writer=Writer(root, run="r", step=1)))

    return in_ranks(2, work)


def ranks_differ(root):
    for step in (1, 2):
        assert save(root / "runs", 2, step=step)[1] == [0, 0]

    def work(rank):
        state = {"plain": {"count": torch.tensor(0)}}
        ref = f"r:{2 - rank}"
        read = caught(lambda: dcp.load(state, storage_reader=Reader(root / "runs", ref)))
        state |= {"other": {"count": torch.tensor(1)}}  # a tensor for each rank
        saved = caught(lambda: dcp.save(state, storage_writer=Writer(root / str(rank), run="s", step=1)))
        return [read, saved]

    return in_ranks(2, work)


def saves_beside_the_training(root):
    def work(rank):
        state = Training(1, 2).state(2)
        before = digests(state)
        saving = dcp.async_save(state, storage_writer=Writer(root, run="r", step=1))
        for tensor in (state["plain"]["mean"], state["model"]["0.weight"].to_local()):
            tensor.zero_()
        saving.result()
        return before

    saved = in_ranks(2, work)
    whole = pp.load("r@latest", root=root)
    return {"saved": saved, "whole": digests({part: whole[part] for part in whole if part != "extra"})}


def loads_what_a_checkpointer_saved(root):
    results = {}
    for size in (1, 2):
        path = root / str(size)

        def train(rank):
            warnings.simplefilter("ignore")  # buffers of BatchNorm differ
            training = Training(1, size)  # noqa: B023
            whole = boxes(1, torch.arange(30).reshape(5, 6), torch.ones(3, 5))
            state = {"model": training.model, "boxes": whole, "tokens": 5}
            with QuietCheckpointer(path, run="r", state=state, keep=[pp.Last(1)]) as ckpt:  # noqa: B023
                ckpt.report(step=1)

        def load(rank):
            empty = boxes(4, torch.zeros(5, 6, dtype=int), torch.zeros(3, 5))
            state = {"model": get_model_state_dict(Training(2, 4).model), "boxes": empty, "tokens": 0}
            dcp.load(state, storage_reader=Reader(path, "r@latest"))  # noqa: B023
            return digests(state)

        assert in_ranks(size, train)[1] == [0] * size
        whole = pp.load("r@latest", root=path)
        results[size] = {"saved": digests({part: whole[part] for part in whole}), "ranks": in_ranks(4, load)}
    return results


SCENARIOS = {
    function.__name__: function
    for function in (
        saved_and_loaded,
        a_rank_is_killed,
        a_disk_is_full,
        a_byte_is_flipped,
        a_tuple_has_shards,
        ranks_differ,
        saves_beside_the_training,
        loads_what_a_checkpointer_saved,
    )
}


if __name__ == "__main__":
    quiet()
    Training(0, 1)  # torch imports half of itself at the first optimizer: once, not in every fork
    for name in sys.argv[1:] or SCENARIOS:
        begin = time.perf_counter()
        result = SCENARIOS[name](Path(tempfile.mkdtemp(prefix="ranks-")))
        print(json.dumps([name, result]), flush=True)
        sys.stderr.write(f"{name} {time.perf_counter() - begin:.1f} s\n")
