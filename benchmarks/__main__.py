"""Saves of one state, ours and others', side by side: ``python -m benchmarks --help`` for more.

The state has the shapes of GPT-2 124M with AdamW in float32: 592 tensors, 1.49 GB at scale 1. All sides are equally
durable (fsync of file and directory) and take turns; medians are printed, and ratios against the limits measured in the
same run: one copy of the state in memory, and direct writes of the same size to the same disk.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

import peakpoint as pp
from peakpoint.capture import encode_state
from peakpoint.store import FileOps


def gpt2(scale):
    """A module and its optimizer after one step."""
    width, layers, words = 64 * max(1, round(12 * scale)), 12, max(64, round(50257 * scale))
    shapes = [(words, width), (1024, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    model = torch.nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"p{number}", torch.nn.Parameter(torch.randn(shape)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    return model, optimizer


def durable(path):
    """What torch.save and safetensors leave out."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    FileOps().fsync_dir(path.parent)


class Sides:
    """Each method saves the whole state durably and returns seconds."""

    def __init__(self, place, scale):
        self.place = place
        self.model, self.optimizer = gpt2(scale)
        _, files = encode_state({"model": self.model, "optimizer": self.optimizer})
        self.tensors = {f"{part}.{name}": tensor for part, own in files.items() for name, tensor in own.items()}
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.copies = [torch.empty_like(tensor) for tensor in self.tensors.values()]
        self.memory = mmap.mmap(-1, -(-self.bytes // 4096) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(self.memory), 4096):
            self.memory[at] = 1
        self.stalls, self.waits = [], []
        state = {"model": self.model, "optimizer": self.optimizer}
        quiet = {"announce": lambda _: None, "preempt": None}
        self.plain = pp.Checkpointer(
            place / "plain", run="b", state=state, keep=[pp.Last(1000)], overlap=False, **quiet
        )
        self.overlapped = pp.Checkpointer(place / "overlapped", run="b", state=state, keep=[pp.Last(1000)], **quiet)

    def memory_copy(self):
        begin = time.perf_counter()
        torch._foreach_copy_(self.copies, list(self.tensors.values()))
        return time.perf_counter() - begin

    def raw_direct_write(self):
        path = self.place / "raw"
        data = memoryview(self.memory)
        begin = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
        os.posix_fallocate(fd, 0, len(data))
        for at in range(0, len(data), 32 * 1024 * 1024):
            os.write(fd, data[at : at + 32 * 1024 * 1024])
        os.fsync(fd)
        os.close(fd)
        FileOps().fsync_dir(path.parent)
        return time.perf_counter() - begin

    def _ours(self, ckpt):
        begin = time.perf_counter()
        outcome = ckpt.report(step=1)
        stall = time.perf_counter() - begin
        ckpt.wait()
        return time.perf_counter() - begin, stall, outcome

    def peakpoint_without_overlap(self):
        return self._ours(self.plain)[0]

    def peakpoint(self):
        seconds, stall, _ = self._ours(self.overlapped)
        self.stalls.append(stall)
        return seconds

    def torch_save(self):
        begin = time.perf_counter()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.place / "t.pt")
        durable(self.place / "t.pt")
        return time.perf_counter() - begin

    def safetensors(self):
        begin = time.perf_counter()
        save_file(self.tensors, self.place / "s.safetensors")
        durable(self.place / "s.safetensors")
        return time.perf_counter() - begin

    def clean(self):
        for name in ("raw", "t.pt", "s.safetensors"):
            (self.place / name).unlink(missing_ok=True)
        for name in ("plain", "overlapped"):
            for path in (self.place / name / "runs" / "b" / "checkpoints").glob("*"):
                shutil.rmtree(path)
        os.sync()


NAMES = ("memory_copy", "raw_direct_write", "peakpoint", "peakpoint_without_overlap", "torch_save", "safetensors")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="size of the model, 1 is GPT-2 124M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--place", type=Path, default=Path(), help="a directory on the disk to be measured")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix=".benchmark-", dir=options.place))
    console = Console()
    try:
        sides = Sides(place, options.scale)
        for name in NAMES:  # once uncounted: buffers are touched, libraries imported
            getattr(sides, name)()
            sides.clean()
        sides.stalls.clear()
        seconds = {name: [] for name in NAMES}
        for _ in track(range(options.repeats), "saving in turns", console=console):
            for name in NAMES:
                seconds[name].append(getattr(sides, name)())
                sides.clean()
        sides.plain.close()
        sides.overlapped.close()
    finally:
        shutil.rmtree(place)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    stall = statistics.median(sides.stalls)
    raw, copy = medians["raw_direct_write"], medians["memory_copy"]
    table = Table(title=f"{sides.bytes / 1e9:.3f} GB in {len(sides.tensors)} tensors, durable, medians of turns")
    for column in ("", "seconds", "GB/s", "of the raw direct write rate"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in medians.items():
        rate = "" if name == "memory_copy" else f"{raw / value:.2f}"
        table.add_row(name.replace("_", " "), f"{value:.3f}", f"{sides.bytes / value / 1e9:.2f}", rate)
    console.print(table)
    console.print(f"report() returned after {stall * 1e3:.1f} ms, {stall / copy:.1%} of one copy in memory")
    if options.json:
        figures = {
            "bytes": sides.bytes,
            "tensors": len(sides.tensors),
            "seconds": seconds,
            "stall_seconds": sides.stalls,
        }
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
