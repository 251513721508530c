"""How much slower a training gets that is saved every K steps."""

import shutil
import time

import torch
import torch.distributed.checkpoint as dcp

import peakpoint as pp
from benchmarks.quiet import QuietCheckpointer
from benchmarks.saving import durable, quiet


class Training:
    """Steps of a perceptron with AdamW; 151 MB of state at scale 1."""

    def __init__(self, scale):
        torch.manual_seed(0)
        width = max(16, round(1024 * scale))
        layers = [module for _ in range(12) for module in (torch.nn.Linear(width, width), torch.nn.ReLU())]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.data = torch.randn(128, width)

    def step(self):
        """Forward, backward, update."""
        loss = self.model(self.data).pow(2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state_dict(self):
        """As others take it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


class Nothing:
    """No saves."""

    def __init__(self, place, training):
        self.place, self.training = place, training
        self.waits = []  # in optimizer steps, for the rest of the copy

    def save(self, number):
        """Save after this step."""

    def end(self):
        """Everything durable."""


class Ours(Nothing):
    """Peakpoint."""

    overlap = True

    def __init__(self, place, training):
        super().__init__(place, training)
        state = {"model": training.model, "optimizer": training.optimizer}
        self.ckpt = QuietCheckpointer(
            place, run="b", state=state, keep=[pp.Last(1)], resume="never", overlap=self.overlap
        )

    def save(self, number):
        """Report."""
        outcome = self.ckpt.report(step=number)
        self.waits.append(outcome.step_waited_seconds)

    def end(self):
        """Close."""
        self.ckpt.close()


class Plain(Ours):
    """Peakpoint, overlap=False."""

    overlap = False


class TorchSave(Nothing):
    """torch.save, made durable."""

    def save(self, number):
        """Over the last one but one."""
        path = self.place / f"{number % 2}.pt"
        torch.save(self.training.state_dict(), path)
        durable(path)


class DcpAsync(Nothing):
    """DCP async."""

    future = None

    def save(self, number):
        """When the one before is done."""
        self.end()
        with quiet():
            path = self.place / str(number % 2)
            self.future = dcp.async_save(self.training.state_dict(), checkpoint_id=str(path), no_dist=True)

    def end(self):
        """Wait."""
        if self.future is not None:
            self.future.result()


SIDES = {
    "no saves": Nothing,
    "peakpoint": Ours,
    "peakpoint, overlap=False": Plain,
    "torch.save": TorchSave,
    "DCP async": DcpAsync,
}
STEPS = {1: 10, 10: 30, 100: 100}


def measure(place, scale, repeats, progress, steps=STEPS):
    """Seconds a step for each interval and side."""
    figures, waits = {}, []
    size = 0
    copies = _copies(Training(scale))
    for interval, count in steps.items():
        figures[interval] = {name: [] for name in SIDES}
        for _ in range(repeats):
            for name, kind in SIDES.items():
                place.mkdir()
                training = Training(scale)
                training.step()
                size = sum(t.nbytes for t in training.model.parameters()) * 3
                side = kind(place, training)
                side.save(0)  # buffers are touched, libraries imported
                begin = time.perf_counter()
                for number in range(1, count + 1):
                    training.step()
                    if number % interval == 0:
                        side.save(number)
                side.end()
                if name == "peakpoint":
                    waits += side.waits[2:]  # the first is of an uncounted save
                figures[interval][name].append((time.perf_counter() - begin) / count)
                shutil.rmtree(place)
                progress()
    return {"bytes": size, "seconds_per_step": figures, "step_waits": waits, "memory_copies": copies}


def _copies(training):
    """Seconds that copies of the state in memory take."""
    sources = [tensor.detach() for tensor in training.model.parameters() for _ in range(3)]
    targets = [torch.empty_like(source) for source in sources]
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        torch._foreach_copy_(targets, sources)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]
