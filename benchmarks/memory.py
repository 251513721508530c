"""Peak memory of a save, in a process of its own; ``python -m benchmarks.memory SIDE SCALE PLACE`` prints JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import peakpoint as pp
from benchmarks.cases import gpt2
from benchmarks.quiet import QuietCheckpointer
from benchmarks.saving import quiet

SIDES = (
    "peakpoint",
    "peakpoint, overlap=False",
    "peakpoint, capture_bytes=256MiB",
    "safetensors",
    "torch.save",
    "DCP",
    "DCP async",
)
OURS = {
    "peakpoint": {},
    "peakpoint, overlap=False": {"overlap": False},
    "peakpoint, capture_bytes=256MiB": {"capture_bytes": "256MiB"},
}


def status(name):
    """A figure of the kernel's about this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_begins():
    """Have the kernel measure the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def save(side, case, place):
    """One save."""
    with quiet():
        if side == "safetensors":
            save_file(case.tensors, place / "s.safetensors")
        elif side == "torch.save":
            torch.save(case.state_dict(), place / "t.pt")
        elif side == "DCP":
            dcp.save(case.state_dict(), checkpoint_id=str(place / "dcp"), no_dist=True)
        else:
            dcp.async_save(case.state_dict(), checkpoint_id=str(place / "dcp-async"), no_dist=True).result()


def main(side, scale, place):
    """Print bytes of the state, and how much more memory the process had at its peak than before."""
    small = gpt2(0.01)
    with QuietCheckpointer(place / "w", run="b", state=small.state, keep=[pp.Last(1)]) as ckpt:
        ckpt.report(step=0)  # everything is imported
    if side not in OURS:
        save(side, small, place)
    case = gpt2(scale)
    before = status("VmRSS")
    peak_begins()
    if side in OURS:
        with QuietCheckpointer(place / "o", run="b", state=case.state, keep=[pp.Last(1)], **OURS[side]) as ckpt:
            for step in range(3):
                ckpt.report(step=step)
    else:
        for _ in range(3):
            save(side, case, place)
    json.dump({"bytes": case.bytes, "extra": status("VmHWM") - before}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
