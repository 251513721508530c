"""Saves and loads of a model that FSDP2 divides among ranks, ours and others', in turns, on the processor with gloo."""

import argparse
import datetime as dt
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peakpoint as pp
from benchmarks.cases import gpt2_shapes
from benchmarks.loading import forget
from benchmarks.memory import peak_begins, status
from benchmarks.quiet import QuietCheckpointer
from benchmarks.saving import direct_write, durable, fresh_memory
from peakpoint.state.divided import own_shard

RANKS, OTHER_RANKS = 2, 3
SIDES = ("peakpoint", "DCP", "DCP async", "torch_checkpointing", "torch_checkpointing async")
REPORTS = 2000


class Training:
    """GPT-2 124M in float32 with AdamW, divided among all ranks."""

    def __init__(self, scale):
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        for number, shape in enumerate(gpt2_shapes(scale)):
            self.model.register_parameter(f"p{number}", torch.nn.Parameter(torch.randn(shape)))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            moments = {name: torch.rand_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}

    @property
    def state(self):
        """As the checkpointer takes it."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self):
        """As everybody else takes it."""
        return {"model": self.model.state_dict(), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}

    def step(self):
        """Change everything, as a step of the optimizer does."""
        torch._foreach_add_(self.shards(), 0.001)

    def shards(self):
        """What this rank has of it."""
        moments = [value for values in self.optimizer.state.values() for value in values.values()]
        return [own_shard(tensor.detach()) for tensor in [*self.model.parameters(), *moments]]


class Sides:
    """Each side saves into a folder of its name; returns seconds until the loop went on, and a function that waits."""

    def __init__(self, place, training, names=SIDES):
        self.place, self.training = place, training
        self.saves = {}
        self.ours = None
        for name in names:
            save = getattr(self, f"_{name.replace(' ', '_').lower()}")()
            if save is not None:
                self.saves[name] = save

    def _peakpoint(self):
        self.ours = QuietCheckpointer(
            self.place / "peakpoint", run="b", state=self.training.state, keep=[pp.Last(1000)]
        )
        self.ours.resume()

        def save():
            self.ours.report(step=1)
            return self.ours.wait

        return save

    def _dcp(self):
        def save():
            dcp.save(self.training.state_dict(), checkpoint_id=str(self.place / "DCP"))
            return lambda: self._sync("DCP")

        return save

    def _dcp_async(self):
        def save():
            future = dcp.async_save(self.training.state_dict(), checkpoint_id=str(self.place / "DCP async"))

            def wait():
                future.result()
                self._sync("DCP async")

            return wait

        return save

    def _torch_checkpointing(self):
        return self._manager("torch_checkpointing", "SyncCheckpointSaverConfig")

    def _torch_checkpointing_async(self):
        return self._manager("torch_checkpointing async", "AsyncCheckpointSaverConfig")

    def _manager(self, name, kind):
        manager = torch_checkpointing_manager(kind)
        if manager is None:
            return None

        def save():
            future = manager.save(str(self.place / name), self.training.state_dict())

            def wait():
                if future is not None:
                    future.result()
                self._sync(name)

            return wait

        return save

    def _sync(self, name):
        distributed.barrier()
        if distributed.get_rank() == 0:
            durable(self.place / name)

    def clean(self, name):
        """Remove what was saved."""
        distributed.barrier()
        if distributed.get_rank() == 0:
            checkpoints = self.place / "peakpoint" / "runs" / "b" / "checkpoints"
            for path in checkpoints.glob("*") if name == "peakpoint" else [self.place / name]:
                shutil.rmtree(path)
            os.sync()
        distributed.barrier()

    def close(self):
        """End our checkpointer."""
        if self.ours is not None:
            self.ours.close()


def torch_checkpointing_manager(kind="SyncCheckpointSaverConfig"):
    """One for the same number of ranks, the places of whose shards it does not write; None without the package.

    Version 0.1.1 gathers these places on CUDA devices alone.
    """
    try:
        from torch_checkpointing import CheckpointManager, config  # noqa: PLC0415
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig  # noqa: PLC0415
    except ImportError:
        return None
    # its direct I/O fails on files whose last bytes fill no page
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(CheckpointManager.Config(save=getattr(config, kind)(), storage_config=storage))


def slowest(seconds):
    """The largest of what the ranks have measured."""
    largest = torch.tensor([seconds])
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest.item()


def timed(work):
    """Seconds of some work on all ranks together; of the slowest."""
    distributed.barrier()
    begin = time.perf_counter()
    work()
    return slowest(time.perf_counter() - begin)


def loads(place, training):
    """Seconds until the checkpoint of each side is in the model and the optimizer, from the disk."""
    figures = {}

    def ours():
        with QuietCheckpointer(place / "peakpoint", run="b", state=training.state, keep=[pp.Last(1000)]) as ckpt:
            ckpt.resume()

    def others(read):
        state = training.state_dict()
        read(state)
        set_optimizer_state_dict(training.model, training.optimizer, state["optimizer"])

    manager = torch_checkpointing_manager() if distributed.get_world_size() == RANKS else None
    sides = {
        "peakpoint": ours,
        "DCP": lambda: others(lambda state: dcp.load(state, checkpoint_id=str(place / "DCP"))),
        "torch_checkpointing": manager
        and (lambda: others(lambda state: manager.load(str(place / "torch_checkpointing"), into=state))),
    }
    for name, load in sides.items():
        if load is not None:
            distributed.barrier()
            forget(*[path for path in (place / name).rglob("*") if path.is_file()])
            figures[name] = timed(load)
    return figures


def limits(place, training):
    """Seconds of a copy in memory of all shards, and of their direct write, by all ranks at the same time."""
    shards = training.shards()
    copies = [torch.empty_like(tensor) for tensor in shards]
    memory = fresh_memory(sum(tensor.nbytes for tensor in shards))
    path = place / f"raw{distributed.get_rank()}"
    torch._foreach_copy_(copies, shards)
    copy = timed(lambda: torch._foreach_copy_(copies, shards))
    write = timed(lambda: direct_write(path, memory))
    path.unlink()
    return {"copy in memory": copy, "raw direct write": write}


def saves(place, training, repeats):
    """Seconds of each side: until durable, until the loop went on; the last turn stays on the disk."""
    sides = Sides(place, training)
    figures = {name: {"durable": [], "stall": []} for name in ("copy in memory", "raw direct write", *sides.saves)}
    for turn in range(repeats + 1):
        for name, seconds in limits(place, training).items():
            if turn:
                figures[name]["durable"].append(seconds)
                figures[name]["stall"].append(seconds)
        for name, save in sides.saves.items():
            training.step()
            distributed.barrier()
            begin = time.perf_counter()
            wait = save()
            stall = time.perf_counter() - begin
            wait()
            seconds = slowest(time.perf_counter() - begin)
            stall = slowest(stall)
            if turn:  # the first is not counted: buffers are touched, libraries imported
                figures[name]["durable"].append(seconds)
                figures[name]["stall"].append(stall)
            if turn < repeats:
                sides.clean(name)
    sides.close()
    return figures


def reports(place, training):
    """Microseconds of a report that saves nothing."""
    seconds = []
    with QuietCheckpointer(place / "reports", run="b", state=training.state, keep=[pp.Best("loss", "min")]) as ckpt:
        ckpt.report(step=1, loss=0.0)
        for step in range(2, REPORTS):
            begin = time.perf_counter()
            ckpt.report(step=step, loss=1.0)
            seconds.append(time.perf_counter() - begin)
    return median(seconds) * 1e6


def memory(place, side, scale):
    """Bytes of this rank's shards, and how much more memory the process had at its peak than before."""
    small = Training(0.02)
    sides = Sides(place / "small", small, [side])
    for save in sides.saves.values():  # everything is imported
        save()()
    sides.close()
    training = Training(scale)
    sides = Sides(place, training, [side])
    size = sum(tensor.nbytes for tensor in training.shards())
    gc.collect()
    before = status("VmRSS")
    peak_begins()
    for save in sides.saves.values():
        for _ in range(3):
            training.step()
            save()()
            sides.clean(side)
    extra = status("VmHWM") - before
    sides.close()
    return {"bytes": size, "extra": int(slowest(float(extra)))}


def work(options):
    """What one rank does."""
    if options.what == "memory":
        return memory(options.place, options.side, options.scale)
    training = Training(options.scale)
    if options.what == "load":
        loads(options.place, training)  # everything is imported
        return [loads(options.place, training) for _ in range(options.repeats)]
    figures = saves(options.place, training, options.repeats)
    size = sum(tensor.nbytes for tensor in training.shards())
    loads(options.place, training)
    same = [loads(options.place, training) for _ in range(options.repeats)]
    return {"bytes": size, "saves": figures, "loads": same, "report_us": reports(options.place, training)}


def main():
    """Be one rank; the first writes the figures beside the file of the group."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("what", choices=("save", "load", "memory"))
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--group", type=Path, required=True, help="a file that does not exist yet")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{options.group}",
        rank=options.rank,
        world_size=options.ranks,
        timeout=dt.timedelta(minutes=10),
    )
    figures = work(options)
    if options.rank == 0:
        options.group.with_name("figures").write_text(json.dumps(figures))
    distributed.barrier()
    os._exit(0)  # torch 2.13 sometimes aborts when an interpreter with a device mesh ends


def in_ranks(count, place, *arguments):
    """Run so many of these processes; returns the figures."""
    own = Path(tempfile.mkdtemp(dir=place))
    threads = str(max(1, (os.cpu_count() or 1) // count))
    command = [
        sys.executable,
        "-m",
        "benchmarks.ranks",
        *arguments,
        "--place",
        str(place),
        "--group",
        str(own / "group"),
    ]
    texts = [own / f"rank{rank}" for rank in range(count)]
    processes = []
    for rank, text in enumerate(texts):
        with text.open("w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, "OMP_NUM_THREADS": threads}}
            processes.append(subprocess.Popen([*command, "--rank", str(rank), "--ranks", str(count)], **options))
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError("\n".join(text.read_text() for text in texts))
    return json.loads((own / "figures").read_text())


def measure(place, scale, repeats, progress):
    """All figures of several ranks."""
    place.mkdir()
    size = ["--scale", str(scale), "--repeats", str(repeats)]
    try:
        figures = in_ranks(RANKS, place, "save", *size) | {"date": dt.datetime.now(dt.UTC).date().isoformat()}
        progress()
        figures["other_loads"] = in_ranks(OTHER_RANKS, place, "load", *size)
        progress()
        figures["memory"] = {}
        for side in figures["saves"]:
            if side in SIDES:
                apart = place / "memory" / side
                apart.mkdir(parents=True)
                figures["memory"][side] = in_ranks(RANKS, apart, "memory", "--side", side, *size)
                progress()
    finally:
        shutil.rmtree(place)
    return figures


if __name__ == "__main__":
    main()
