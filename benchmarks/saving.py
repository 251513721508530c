"""Saves of one state, ours and others', in turns."""

import mmap
import os
import shutil
import time
import warnings
from contextlib import contextmanager

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import peakpoint as pp
from benchmarks.quiet import QuietCheckpointer
from peakpoint.store import FileOps

BLOCK = 32 * 1024 * 1024


def durable(*paths):
    """What others leave out: fsync of files and directories."""
    for path in paths:
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        FileOps().fsync_dir(path.parent)


@contextmanager
def quiet():
    """Without the warnings of the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fresh_memory(size):
    """Touched memory on huge pages, as direct I/O likes it."""
    memory = mmap.mmap(-1, -(-size // 4096) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(memory), 4096):
        memory[at] = 1
    return memory


def direct_write(path, memory):
    """Write memory durably, around the page cache: the limit of writing."""
    data = memoryview(memory)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    os.posix_fallocate(fd, 0, len(data))
    for at in range(0, len(data), BLOCK):
        os.write(fd, data[at : at + BLOCK])
    os.fsync(fd)
    os.close(fd)
    FileOps().fsync_dir(path.parent)


class Sides:
    """Each side saves the whole state; returns seconds until it was durable, and until it let the loop go on."""

    def __init__(self, place, case, peers):
        self.place, self.case = place, case
        self.copies = [torch.empty_like(tensor) for tensor in case.tensors.values()]
        self.memory = fresh_memory(case.bytes)
        options = {"keep": [pp.Last(1000)], "state": case.state}
        self.ours = {
            "peakpoint": QuietCheckpointer(place / "overlapped", run="b", **options),
            "peakpoint, overlap=False": QuietCheckpointer(place / "plain", run="b", overlap=False, **options),
        }
        self.sides = {"copy in memory": self.memory_copy, "raw direct write": self.raw_direct_write}
        self.sides |= {name: lambda ckpt=ckpt: self.peakpoint(ckpt) for name, ckpt in self.ours.items()}
        self.sides["safetensors"] = self.safetensors
        self.sides["torch.save"] = self.torch_save
        if peers:
            self.sides["DCP"] = self.dcp
            self.sides["DCP async"] = self.dcp_async
            self._add_torch_checkpointing()
            self._add_fabric()

    def _add_torch_checkpointing(self):
        try:
            from torch_checkpointing import CheckpointManager  # noqa: PLC0415
            from torch_checkpointing.config import SyncCheckpointSaverConfig  # noqa: PLC0415
            from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig  # noqa: PLC0415
        except ImportError:
            return
        # its direct I/O fails on files whose last bytes fill no page
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        config = CheckpointManager.Config(save=SyncCheckpointSaverConfig(), storage_config=storage)
        manager = CheckpointManager(config)
        self.sides["torch_checkpointing"] = lambda: self._save(
            "tc", lambda path: manager.save(path, self.case.state_dict())
        )

    def _add_fabric(self):
        try:
            from lightning_fabric import Fabric  # noqa: PLC0415
        except ImportError:
            return
        fabric = Fabric(accelerator="cpu", devices=1)
        self.sides["Lightning Fabric"] = lambda: self._save(
            "f.ckpt", lambda path: fabric.save(path, self.case.state_dict())
        )

    def _save(self, name, save):
        path = self.place / name
        begin = time.perf_counter()
        with quiet():
            save(str(path))
        durable(path)
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def memory_copy(self):
        begin = time.perf_counter()
        torch._foreach_copy_(self.copies, list(self.case.tensors.values()))
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def raw_direct_write(self):
        begin = time.perf_counter()
        direct_write(self.place / "raw", self.memory)
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def peakpoint(self, ckpt):
        begin = time.perf_counter()
        ckpt.report(step=1)
        stall = time.perf_counter() - begin
        ckpt.wait()
        return time.perf_counter() - begin, stall

    def torch_save(self):
        return self._save("t.pt", lambda path: torch.save(self.case.state_dict(), path))

    def safetensors(self):
        return self._save("s.safetensors", lambda path: save_file(self.case.tensors, path))

    def dcp(self):
        return self._save("dcp", lambda path: dcp.save(self.case.state_dict(), checkpoint_id=path, no_dist=True))

    def dcp_async(self):
        path = self.place / "dcp-async"
        begin = time.perf_counter()
        with quiet():
            future = dcp.async_save(self.case.state_dict(), checkpoint_id=str(path), no_dist=True)
            stall = time.perf_counter() - begin
            future.result()
        durable(path)
        return time.perf_counter() - begin, stall

    def clean(self):
        """Remove what was saved."""
        for path in self.place.iterdir():
            if path.name in ("overlapped", "plain"):
                for saved in (path / "runs" / "b" / "checkpoints").glob("*"):
                    shutil.rmtree(saved)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.sync()

    def close(self):
        """End our checkpointers."""
        for ckpt in self.ours.values():
            ckpt.close()


def measure(place, case, repeats, peers, progress):
    """Seconds until durable and until the loop went on, of each side."""
    sides = Sides(place, case, peers)
    try:
        figures = {name: {"durable": [], "stall": []} for name in sides.sides}
        for turn in range(repeats + 1):
            for name, side in sides.sides.items():
                seconds, stall = side()
                if turn:  # the first is not counted: buffers are touched, libraries imported
                    figures[name]["durable"].append(seconds)
                    figures[name]["stall"].append(stall)
                sides.clean()
                progress()
    finally:
        sides.close()
        sides.clean()
        shutil.rmtree(place)
    return {"case": case.name, "bytes": case.bytes, "tensors": len(case.tensors), "sides": figures}
