"""Loads of one checkpoint, ours and others', from the disk and from the page cache."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

import peakpoint as pp
from benchmarks.quiet import QuietCheckpointer
from benchmarks.saving import BLOCK, durable, fresh_memory


def forget(*paths):
    """Have the page cache drop files."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def remember(*paths):
    """Have the page cache hold files."""
    buffer = bytearray(BLOCK)
    for path in paths:
        with path.open("rb") as file:
            while file.readinto(buffer):
                pass


class Sides:
    """Each side returns seconds."""

    def __init__(self, place, case):
        self.case = case
        with QuietCheckpointer(place / "ours", run="b", state=case.state, keep=[pp.Last(1)]) as ckpt:
            ckpt.report(step=1)
        self.root = place / "ours"
        self.ours = list(self.root.rglob("*.safetensors"))
        self.stock, self.torch = place / "s.safetensors", place / "t.pt"
        save_file(case.tensors, self.stock)
        torch.save(case.state_dict(), self.torch)
        durable(self.stock, self.torch)
        self.memory = fresh_memory(case.bytes)

    def raw_direct_read(self):
        """The limit of reading."""
        data = memoryview(self.memory)
        begin = time.perf_counter()
        done = 0
        for path in self.ours:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            at = 0
            while read := os.preadv(fd, [data[done : done + BLOCK]], at):
                at, done = at + read, -(-(done + read) // 4096) * 4096
                if done >= len(data):
                    break
            os.close(fd)
        return time.perf_counter() - begin

    def hash_in_memory(self):
        """The limit of verifying, on every core."""
        data = memoryview(self.memory)
        begin = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda at: blake3(data[at : at + BLOCK]).digest(), range(0, len(data), BLOCK)))
        return time.perf_counter() - begin

    def verified(self):
        """Every tensor in hand, every byte compared."""
        begin = time.perf_counter()
        dict(pp.load("b@latest", root=self.root))
        return time.perf_counter() - begin

    def lazy(self):
        """Every tensor in hand, nothing read."""
        begin = time.perf_counter()
        dict(pp.load("b@latest", root=self.root, verify=False))
        return time.perf_counter() - begin

    def stock_safetensors(self):
        """Every tensor in hand, nothing read."""
        begin = time.perf_counter()
        load_file(self.stock)
        return time.perf_counter() - begin

    def torch_load(self):
        """Every tensor read."""
        begin = time.perf_counter()
        torch.load(self.torch, weights_only=True)
        return time.perf_counter() - begin

    def into_live(self):
        """Verified, and copied into the live model and optimizer."""
        begin = time.perf_counter()
        pp.load("b@latest", root=self.root, into=self.case.state)
        return time.perf_counter() - begin

    def torch_into_live(self):
        """Read, and copied into the live model and optimizer; nothing is verified."""
        begin = time.perf_counter()
        state = torch.load(self.torch, weights_only=True)
        self.case.model.load_state_dict(state["model"])
        self.case.optimizer.load_state_dict(state["optimizer"])
        return time.perf_counter() - begin


def measure(place, case, repeats, progress):
    """Seconds of each side, cold and warm."""
    place.mkdir()
    try:
        sides = Sides(place, case)
        files = [*sides.ours, sides.stock, sides.torch]
        named = {
            "raw direct read": sides.raw_direct_read,
            "hash in memory, every core": sides.hash_in_memory,
            "peakpoint, verified": sides.verified,
            "peakpoint, verify=False (mapped, nothing read)": sides.lazy,
            "safetensors load_file (mapped, nothing read)": sides.stock_safetensors,
            "torch.load": sides.torch_load,
            "peakpoint into live model and optimizer, verified": sides.into_live,
            "torch.load into live model and optimizer": sides.torch_into_live,
        }
        figures = {name: {"cold": [], "warm": []} for name in named}
        for turn in range(repeats + 1):
            for name, side in named.items():
                for state, prepare in (("cold", forget), ("warm", remember)):
                    prepare(*files)
                    seconds = side()
                    if turn:
                        figures[name][state].append(seconds)
                progress()
    finally:
        shutil.rmtree(place)
    return {"case": case.name, "bytes": case.bytes, "tensors": len(case.tensors), "sides": figures}
