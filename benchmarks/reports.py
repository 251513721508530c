"""What a report costs that saves nothing, over a run that is long; and what that run costs when it is opened again."""

import random
import shutil
import subprocess
import sys
import time
from statistics import median, quantiles

import torch

import peakpoint as pp
from benchmarks.quiet import QuietCheckpointer

REPORTS = 1_000_000
FEW = 10_000
EPOCHS = 100
KEEP = [
    pp.Best("val_accuracy", "max"),
    pp.Best("val_loss", "min"),
    pp.TopK("train_loss", "min", 3),
    pp.Every(epochs=10),
]
STOP = pp.EarlyStopping("val_loss", "min", patience=10**9)


def begin(root):
    """The run, opened for writing and resumed."""
    model = torch.nn.Linear(8, 8)
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
    ckpt = QuietCheckpointer(root, run="r", state=state, keep=KEEP, stop=STOP)
    ckpt.resume()
    return ckpt


def train(ckpt, count, progress):
    """Epochs that get better, so that there are checkpoints; then reports that get no better: seconds of each."""
    for epoch in range(EPOCHS):
        ckpt.report(epoch=epoch, val_accuracy=epoch / EPOCHS, val_loss=1 / (epoch + 1), train_loss=1 / (epoch + 1))
    ckpt.wait()
    seconds = []
    for number in range(count):
        noise = random.random()
        values = {"val_accuracy": noise / 2, "val_loss": 1 + noise, "train_loss": 1 + noise / 3}
        start = time.perf_counter()
        outcome = ckpt.report(values, step=EPOCHS + 1 + number)
        seconds.append(time.perf_counter() - start)
        assert not outcome.saved
        if number % 10_000 == 0:
            progress()
    ckpt.save("the end")  # so that all of the reports belong to what is resumed
    return seconds


def measure(place, count, turns, progress):
    """Microseconds of reports, bytes of the journal, seconds to resume and to list."""
    random.seed(0)
    place.mkdir()
    try:
        with begin(place) as ckpt:
            seconds = train(ckpt, count, progress)
        checkpoints = len(pp.open(place).run("r").checkpoints())
        journal = sum(path.stat().st_size for path in place.rglob("*.jsonl"))
        resume, ls = [], []
        for _ in range(turns):
            start = time.perf_counter()
            ckpt = begin(place)
            resume.append(time.perf_counter() - start)
            ckpt.close()
            start = time.perf_counter()
            command = [sys.executable, "-c", "from peakpoint.cli.main import run; run()", "ls", str(place)]
            subprocess.run(command, check=True, capture_output=True)
            ls.append(time.perf_counter() - start)
            progress()
    finally:
        shutil.rmtree(place)
    end = min(10_000, count // 2)
    return {
        "reports": count,
        "checkpoints": checkpoints,
        "median_us": median(seconds) * 1e6,
        "p99_us": quantiles(seconds, n=100)[-1] * 1e6,
        "first_us": median(seconds[:end]) * 1e6,
        "last_us": median(seconds[-end:]) * 1e6,
        "counted_at_each_end": end,
        "journal_bytes": journal,
        "resume_seconds": resume,
        "ls_seconds": ls,
    }
