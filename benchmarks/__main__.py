"""Saves and loads, ours and others', side by side: ``python -m benchmarks --help`` for more.

All sides are equally durable and take turns in one run; medians are printed, and ratios against the limits measured in
the same run: a copy of the state in memory, direct writes and reads of the same disk, hashing in memory.
"""

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import archiving, catalogue, loading, memory, page, ranks, reports, saving, space, training
from benchmarks.cases import CASES

FIGURES = ("saving", "training", "loading", "ranks", "memory", "space", "archive", "reports", "catalogue")


def machine():
    """What the figures belong to."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def read(arguments):
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="size of the states")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out most others")
    parser.add_argument("--place", type=Path, default=Path(), help="a directory on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--page", action="store_true", help="write benchmarks/results.json and docs/performance.md")
    return parser.parse_args(arguments)


def measure(options, place, progress):
    """All figures."""
    figures = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "repeats": options.repeats,
        "saving": [],
        "training": None,
        "loading": [],
        "ranks": None,
        "memory": {},
        "space": None,
        "archive": None,
        "reports": None,
        "catalogue": None,
    }
    task = progress.add_task("", total=None)

    def step(what):
        progress.update(task, description=what, completed=0)
        return lambda: progress.advance(task)

    for key in options.cases if "saving" in options.figures else ():
        case = CASES[key](options.scale)
        (place / key).mkdir()
        result = saving.measure(place / key, case, options.repeats, options.peers, step(f"saving {case.name}"))
        figures["saving"].append({"key": key, **result})
    for key in options.cases if "loading" in options.figures else ():
        case = CASES[key](options.scale)
        result = loading.measure(place / key, case, options.repeats, step(f"loading {case.name}"))
        figures["loading"].append({"key": key, **result})
    if "training" in options.figures:
        few = training.STEPS if options.scale == 1 else {1: 2, 10: 10}
        repeats = min(3, options.repeats)
        figures["training"] = training.measure(place / "t", options.scale, repeats, step("training"), few)
    if "memory" in options.figures:
        tell = step("peak memory")
        for side in memory.SIDES:
            (place / "m").mkdir()
            command = [sys.executable, "-m", "benchmarks.memory", side, str(options.scale), str(place / "m")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures["memory"][side] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(place / "m")
            tell()
    return figures | others(options, place, step)


def others(options, place, step):
    """Figures that are made of runs and not of single states."""
    figures, scale, whole = {}, options.scale, options.scale == 1
    if "ranks" in options.figures:
        figures["ranks"] = ranks.measure(place / "ranks", scale, options.repeats, step("several ranks"))
    if "space" in options.figures:
        figures["space"] = space.measure(place / "s", scale, options.repeats, step("space"))
    if "archive" in options.figures:
        figures["archive"] = archiving.measure(place / "a", scale, options.repeats, step("archive"))
    if "reports" in options.figures:
        count = reports.REPORTS if whole else reports.FEW
        figures["reports"] = reports.measure(place / "r", count, options.repeats, step("reports"))
    if "catalogue" in options.figures:
        size = (catalogue.RUNS, catalogue.EACH) if whole else (20, 20)
        figures["catalogue"] = catalogue.measure(place / "c", *size, options.repeats, step("catalogue"))
    return figures


def main(arguments=None):
    """Measure, print, write."""
    options = read(arguments)
    place = Path(tempfile.mkdtemp(prefix=".benchmark-", dir=options.place)).absolute()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            figures = measure(options, place, progress)
    finally:
        shutil.rmtree(place)
    figures = json.loads(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.page:
        if page.RESULTS.exists():  # what was not measured now stays
            before = json.loads(page.RESULTS.read_text(encoding="utf-8"))
            earlier = {name: before[name] for name in FIGURES if not figures[name] and name in before}
            figures |= earlier | ({"date": before["date"]} if earlier else {})
        page.RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        page.PAGE.write_text(page.render(figures), encoding="utf-8")
    console.print(Markdown(page.render(figures)))


if __name__ == "__main__":
    main()
