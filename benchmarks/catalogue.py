"""Selecting among a million checkpoints, beside SQLite itself; and among 200 of 100 MB, beside a loop over the files.

``python -m benchmarks.catalogue DIRECTORY`` makes the repository and keeps it there for further runs.
"""

import datetime as dt
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.page import ALONE, BEST, BEST_OF_ALL, CASE, SELECTION
from benchmarks.quiet import QuietCheckpointer
from peakpoint.catalogue import Catalogue, SelectionQuery
from peakpoint.catalogue.query import parse
from peakpoint.catalogue.ranking import ranking_keys
from peakpoint.format import events, layout
from peakpoint.format.events import Closed, Opened, Reported, Saved, Started
from peakpoint.format.manifest import FileRecord, Manifest, encode_manifest
from peakpoint.repository import journal as journals
from peakpoint.repository.root import ensure_repository, ensure_run
from peakpoint.rules import Best, Last
from peakpoint.store import LocalStore

RUNS = 2000
EACH = 500
NAMES = ("resnet50", "resnet18", "vgg16", "mobilenet")
CASES = {
    CASE: (SELECTION, {}, 20),
    BEST: (SELECTION, {"val_accuracy": "max"}, 5),
    "the smallest of the selection, then the best": (SELECTION, {"size": "min", "val_accuracy": "max"}, 1),
    BEST_OF_ALL: ("", {"val_accuracy": "max"}, 1),
    "the smallest loss outside two models": ('not (run ~ "vgg*" or run ~ "mob*")', {"val_loss": "min"}, 1),
    "what nothing matches": ("val_accuracy > 0.70 and sparsity > 0.99 and epoch > 20", {"val_accuracy": "max"}, 5),
    "what hardly anything matches": ("latency_ms < 5.0001 and val_accuracy > 0.5", {"val_accuracy": "max"}, 5),
}
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
RULES = (Best("val_accuracy", "max"), Last(EACH))


def _metrics(epoch, count, draw):
    progress = epoch / count
    accuracy = 0.9 * (1 - 2.0 ** (-8 * progress)) - 0.05 * max(0, progress - 0.7) + draw.gauss(0, 0.004)
    return {
        "train_loss": 2 * 0.1**progress + draw.random() / 50,
        "train_accuracy": min(1.0, accuracy + 0.05),
        "val_loss": 2 * 0.2**progress + draw.random() / 20,
        "val_accuracy": accuracy,
        "sparsity": min(0.9, progress),
        "lr": 0.1 * (1 - progress),
        "grad_norm": draw.random(),
        "latency_ms": 5 + draw.random() * 3,
    }


def _manifest(run, number, count, draw, first):
    identity = f"{draw.getrandbits(64):016x}"
    size = 90_000_000 + draw.randrange(20_000_000)
    files = tuple(
        FileRecord(name=name, size=part, digest=f"{draw.getrandbits(256):064x}")
        for name, part in (("model.safetensors", size // 3), ("optimizer.safetensors", size - size // 3))
    )
    return Manifest(
        id=identity,
        run=run,
        name=f"{run}_epoch{number}",
        sequence=number + 1,
        report=number + 1,
        step=(number + 1) * 391,
        epoch=number,
        metrics=_metrics(number, count, draw),
        reasons=(f"one of the newest {EACH}",),
        asked=None,
        parts={"model": ("model.safetensors",), "optimizer": ("optimizer.safetensors",)},
        files=files,
        parent=None,
        forks=(),
        created_at=first + dt.timedelta(minutes=number),
        written_by={"host": "node7"},
        timing={},
    )


def _events(manifest):
    at = manifest.created_at
    yield Reported(at=at, report=manifest.report, step=manifest.step, epoch=manifest.epoch, metrics=manifest.metrics)
    yield Saved(
        at=at,
        checkpoint=manifest.id,
        name=manifest.name,
        sequence=manifest.sequence,
        report=manifest.report,
        reasons=manifest.reasons,
        size_bytes=manifest.size_bytes,
    )


def _write(store, manifest):
    directory = store.path(layout.checkpoint_prefix(manifest.run, manifest.name))
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))


def generate(root, runs, each, progress=lambda: None):
    """Manifests and journals as trainings write them, but for fsync; no weights, which nothing here opens."""
    store = LocalStore(root)
    ensure_repository(store, START)
    for number in range(runs):
        draw = random.Random(number)
        run = f"{NAMES[number % len(NAMES)]}-{number:04d}"
        first = START + dt.timedelta(hours=number)
        ensure_run(store, run, first, {"host": "node7"}, RULES)
        texts = tuple(rule.text for rule in RULES)
        lines = [Opened(at=first, by={}, rules=texts)]
        lines.append(Started(at=first, checkpoint=None, report=0))
        for place in range(each):
            manifest = _manifest(run, place, each, draw, first)
            _write(store, manifest)
            lines += _events(manifest)
        lines.append(Closed(at=first, why="closed"))
        journal = store.path(layout.journal_prefix(run))
        journal.mkdir(parents=True)
        (journal / "000001.jsonl").write_bytes(b"".join(map(events.encode, lines)))
        progress()


def _timed(call, turns):
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def queries(root, turns):
    """Milliseconds of each case in a warm process, with the look at the files before it, and without."""
    catalogue = Catalogue(LocalStore(root))
    catalogue.refresh()
    found = {"the look at the files that every selection begins with": _timed(catalogue.refresh, turns)}
    for name, (where, by, top) in CASES.items():
        wish = SelectionQuery(query=parse(where), keys=ranking_keys(by), top=top)
        found[name] = _timed(lambda wish=wish: list(catalogue.select(wish)), turns)
    counted = SelectionQuery(query=parse(SELECTION))
    found["how many the selection has"] = _timed(catalogue.select(counted).count, max(1, turns // 5))
    catalogue.close()
    return found


def limits(root, turns):
    """SQLite without us: one look into an index, and one pass over the table."""
    connection = sqlite3.connect(root / "catalogue.sqlite")
    connection.execute("PRAGMA mmap_size=1073741824")
    [[key]] = connection.execute("SELECT key FROM peakpoint_metrics WHERE name = 'val_accuracy'")
    best = f"SELECT key FROM peakpoint_checkpoints WHERE m{key} IS NOT NULL ORDER BY m{key} DESC LIMIT 1"
    scan = f"SELECT count(*) FROM peakpoint_checkpoints WHERE m{key} + 0 > 0.7"
    found = {
        "SQLite, the best by an index": _timed(lambda: connection.execute(best).fetchall(), turns),
        "SQLite, a pass over all rows": _timed(lambda: connection.execute(scan).fetchall(), max(1, turns // 5)),
    }
    connection.close()
    return found


def adding(root, turns):
    """One more checkpoint appears in the files of a run, again and again; seconds until the catalogue has each."""
    store = LocalStore(root)
    catalogue = Catalogue(store)
    catalogue.refresh()
    runs = sorted(path.name for path in (root / "runs").iterdir())
    draw = random.Random()
    found = {}
    for title, only in ((ALONE, True), ("every run is looked at", False)):
        run = draw.choice(runs)
        journal = journals.Journal(store, run, lambda: dt.datetime.now(dt.UTC))
        catalogue.refresh()
        begin = len(store.children(layout.checkpoints_prefix(run)))
        seconds, added = [], []
        for number in range(begin, begin + turns):
            manifest = _manifest(run, number, EACH, draw, dt.datetime.now(dt.UTC))
            _write(store, manifest)
            for event in _events(manifest):
                journal.append(event)
            start = time.perf_counter()
            catalogue.refresh(only=run if only else None)
            seconds.append(time.perf_counter() - start)
            added.append(manifest.id)
        for identity in added:
            assert catalogue.select(SelectionQuery(query=parse(f'id == "{identity}"'))).first().run == run
        journal.append(Closed(at=dt.datetime.now(dt.UTC), why="closed"))
        journal.close()
        found[title] = seconds
    catalogue.close()
    return found


def listing(root, turns):
    """Seconds of ``peakpoint ls`` as a whole process, its bytecode compiled as that of an installed package is."""
    command = [sys.executable, "-c", "from peakpoint.cli.main import run; run()", "ls", str(root)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return _timed(lambda: subprocess.run(command, check=True, capture_output=True, env=environment), turns)


def naive(place, count, size, turns):
    """The best of real checkpoints: ours, and a loop that loads every file, as scripts do."""
    place.mkdir()
    (place / "files").mkdir()
    model = {f"p{number}": torch.randn(size // 4 // 8) for number in range(8)}
    with QuietCheckpointer(place / "ours", run="r", state={"model": model}, keep=[Last(count)]) as ckpt:
        for epoch in range(count):
            for tensor in model.values():
                tensor.add_(0.001)
            accuracy = random.random()
            ckpt.report(epoch=epoch, val_accuracy=accuracy)
            torch.save(
                {"model_state_dict": model, "epoch": epoch, "metrics": {"val_accuracy": accuracy}},
                place / "files" / f"epoch{epoch}.pth",
            )

    def load_all():
        found = [(torch.load(path)["metrics"]["val_accuracy"], path) for path in (place / "files").glob("*.pth")]
        return max(found)

    catalogue = Catalogue(place / "ours")
    wish = SelectionQuery(query=parse(""), keys=ranking_keys({"val_accuracy": "max"}))
    assert catalogue.select(wish).first().metrics["val_accuracy"] == load_all()[0]
    result = {
        "checkpoints": count,
        "bytes": sum(path.stat().st_size for path in (place / "files").iterdir()),
        "peakpoint": _timed(lambda: catalogue.select(wish).first(), turns * 10),
        "glob and torch.load": _timed(load_all, max(1, turns // 2)),
    }
    shutil.rmtree(place)
    return result


def measure(place, runs, each, turns, progress=lambda: None):
    """Everything; the repository stays in ``place``."""
    root = place / "million"
    made = None
    if not root.exists():
        generate(root, runs, each, progress)
        start = time.perf_counter()
        catalogue = Catalogue(LocalStore(root))
        catalogue.refresh(lambda *_: progress())
        catalogue.close()
        made = time.perf_counter() - start
    small = runs * each < 100_000
    adding(root, turns)  # the first of them find the disk's cache cold
    return {
        "runs": runs,
        "checkpoints": runs * each,
        "build_seconds": made,
        "bytes": (root / "catalogue.sqlite").stat().st_size,
        "queries": queries(root, turns * 10),
        "limits": limits(root, turns * 10),
        "adding": adding(root, turns * 10),
        "ls_seconds": listing(root, turns),
        "naive": naive(place / "naive", 10 if small else 200, 10_000_000 if small else 100_000_000, turns),
    }


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:4] or (RUNS, EACH)), turns=5)
    for group in ("queries", "limits", "adding"):
        for title, seconds in found[group].items():
            print(f"{median(seconds) * 1e3:10.2f} ms  {title}")
    print(f"{median(found['ls_seconds']):10.3f} s   ls")
    print(json.dumps({key: value for key, value in found.items() if isinstance(value, int | float)}))
    print({name: median(value) for name, value in found["naive"].items() if isinstance(value, list)})
