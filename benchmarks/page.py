"""From the figures to docs/performance.md: ``python -m benchmarks.page`` writes it from benchmarks/results.json."""

import json
import textwrap
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
LIMITS = ("copy in memory", "raw direct write")
PEERS = ("safetensors", "torch.save", "DCP", "DCP async", "torch_checkpointing", "Lightning Fabric")
ARCHIVE, ZSTD, ZIPNN = "peakpoint archive", "zstd-19, all files together", "ZipNN, file by file"
MIB = 2**20
THIN = 'peakpoint, parts="model"'
LEAN = 'peakpoint, parts="model" but for the newest'
PACKED = "the same, archived at the end"
NAIVE = "torch.save, a file for each policy"
SELECTION = 'val_accuracy > 0.70 and sparsity >= 0.5 and epoch > 20 and run ~ "resnet50*"'
CASE = "the first 20 of the selection, newest first"
BEST = "the best 5 of the selection by val_accuracy"
BEST_OF_ALL = "the best of all by val_accuracy"
ALONE = "that run is looked at"
NAIVE_THIN = "torch.save, weights only but for the last"


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---" for _ in header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _text(*pieces):
    return textwrap.wrap(" ".join(pieces), 118, break_long_words=False, break_on_hyphens=False)


def _saving(result):
    sides = {name: (median(values["durable"]), median(values["stall"])) for name, values in result["sides"].items()}
    raw, copy = sides["raw direct write"][0], sides["copy in memory"][0]
    rows = []
    for name, (seconds, stall) in sides.items():
        rate = result["bytes"] / seconds / 1e9
        if name == "copy in memory":
            rows.append([f"*{name}*", f"{seconds:.3f}", f"{rate:.2f}", "", ""])
        elif name == "raw direct write":
            rows.append([f"*{name}*", f"{seconds:.3f}", f"{rate:.2f}", "1.00", ""])
        else:
            rows.append([name, f"{seconds:.3f}", f"{rate:.2f}", f"{raw / seconds:.2f}", f"{stall / copy:.2f}"])
    title = f"### {result['case']}: {result['bytes'] / 1e9:.3f} GB, {result['tensors']:,} tensors"
    header = ["durable save", "seconds", "GB/s", "of the raw direct write rate", "stall, in copies in memory"]
    return [title, "", *_table(header, rows)]


def _loading(result):
    rows = []
    for name, values in result["sides"].items():
        cold, warm = median(values["cold"]), median(values["warm"])
        rows.append([name, f"{cold * 1e3:,.1f}", f"{warm * 1e3:,.1f}"])
    title = f"### {result['case']}: {result['bytes'] / 1e9:.3f} GB, {result['tensors']:,} tensors"
    return [title, "", *_table(["load", "ms from the disk", "ms from the page cache"], rows)]


def _ranks(result):
    seconds = {name: median(values["durable"]) for name, values in result["saves"].items()}
    stalls = {name: median(values["stall"]) for name, values in result["saves"].items()}
    copy, raw = (seconds[name] for name in LIMITS)
    same, other = (
        {name: median(load[name] for load in result[loads]) for name in result[loads][0]}
        for loads in ("loads", "other_loads")
    )
    rows = []
    for name, value in seconds.items():
        memory = result["memory"].get(name)
        rows.append(
            [
                name if memory else f"*{name}*",
                f"{value:.3f}",
                f"{raw / value:.2f}",
                f"{stalls[name] / copy:.2f}" if memory else "",
                f"{memory['extra'] / result['bytes']:.2f}" if memory else "",
                f"{same[name]:.2f}" if name in same else "",
                f"{other[name]:.2f}" if name in other else "",
            ]
        )
    text = _text(
        f"GPT-2 124M with AdamW, divided by FSDP2 among 2 ranks on these cores, over gloo, on {result['date']}:",
        f"{result['bytes'] / 1e6:,.0f} MB a rank; always the slower rank. Loads are from the disk into the live",
        "model and optimizer, ours compared with digests. torch_checkpointing 0.1.1 writes the places of shards only",
        "where there is a GPU: what it saves here fits 2 ranks alone. Its asynchronous save, and that of DCP, ask for",
        "no change meanwhile.",
    )
    header = ["durable save", "seconds", "of the raw direct write rate", "stall, in copies in memory"]
    header += ["peak memory, in shards", "load, s", "load by 3 ranks, s"]
    return [
        *text,
        "",
        *_table(header, rows),
        f"A report that saves nothing takes {result['report_us']:,.0f} microseconds.",
        "",
    ]


def _training(result):
    intervals = list(result["seconds_per_step"])
    base = {interval: median(result["seconds_per_step"][interval]["no saves"]) for interval in intervals}
    names = [name for name in result["seconds_per_step"][intervals[0]] if name != "no saves"]
    rows = [
        [name, *(f"{median(result['seconds_per_step'][i][name]) / base[i] - 1:+.1%}" for i in intervals)]
        for name in names
    ]
    step = ", ".join(f"{value * 1e3:.0f}" for value in base.values())
    text = f"{result['bytes'] / 1e6:.0f} MB of state, steps of {step} ms on both cores; time a step beyond that:"
    waited, copy = median(result["step_waits"]), median(result["memory_copies"])
    after = (
        f"With overlap the optimizer's step waited {waited * 1e3:.1f} ms for the rest of the copy, "
        f"{waited / copy:.2f} of a copy in memory; at most {max(result['step_waits']) / copy:.2f}."
    )
    return [text, "", *_table(["", *(f"a save every {i} steps" for i in intervals)], rows), after, ""]


def _memory(result):
    rows = [
        [name, f"{value['extra'] / MIB:,.0f}", f"{value['extra'] / value['bytes']:.2f}"]
        for name, value in result.items()
    ]
    return _table(["save of GPT-2 124M", "peak beyond the state, MiB", "in states"], rows)


def _sizes(result):
    """Bytes at the end and bytes written by each side, and how many times less than the files: medians of the runs."""
    found = {}
    for name in result["runs"][0]["sides"]:
        sides = [(run["sides"][name], run["sides"][NAIVE]) for run in result["runs"]]
        found[name] = {
            "bytes": median(mine["bytes"] for mine, _ in sides),
            "smaller": median(files["bytes"] / mine["bytes"] for mine, files in sides),
            "written": median(mine["written"] for mine, _ in sides),
            "less": median(files["written"] / mine["written"] for mine, files in sides),
        }
    return found


def _space(result):
    moments = [len({epoch for epochs in run["kept"].values() for epoch in epochs}) for run in result["runs"]]
    copies = [sum(len(epochs) for epochs in run["kept"].values()) for run in result["runs"]]
    last = {name: median(run["last_metrics"][name] for run in result["runs"]) for name in ("val_accuracy", "sparsity")}
    rows = [
        [
            name,
            f"{side['bytes'] / 1e6:.2f}",
            f"{side['smaller']:.2f}",
            f"{side['written'] / 1e6:.1f}",
            f"{side['less']:.2f}",
        ]
        for name, side in _sizes(result).items()
    ]
    tuned = result["fine_tuning"]
    least = tuned["backbone"] + tuned["checkpoints"] * tuned["changed"]
    return [
        *_text(
            f"{result['epochs']} epochs of LeNet-5 on scikit-learn's digits, enlarged to 32 by 32, with Adam and",
            f"pruning by magnitude up to a sparsity of {last['sparsity']:.2f} (accuracy {last['val_accuracy']:.3f} at",
            f"the end); medians of {len(moments)} seeds. Kept are the best by three metrics, every tenth epoch, the",
            f"last three, and the best at three sparsities: {median(copies):g} files when each policy has its own,",
            f"{median(moments):g} different moments, so that keeping each moment once saves little by itself. With",
            '`parts="model"` all but the last three keep their weights only, or all but the newest; the last row is a',
            "script that keeps the optimizer in the last three only. All sides keep the same moments; ours also keep",
            "random generators and digests. Bytes are what `du` says, with directories, manifests and journals.",
        ),
        "",
        *_table(["", "MB at the end", "times smaller", "MB written", "times less"], rows),
        *_text(
            f"{tuned['case']}: {tuned['checkpoints']} checkpoints on the disk, of a backbone of",
            f"{tuned['backbone'] / 1e6:.1f} MB and {tuned['changed'] / 1e6:.2f} MB that change:",
        ),
        "",
        *_table(
            ["", "MB", "of the backbone once and what changes"],
            [
                ["peakpoint", f"{tuned['bytes'] / 1e6:.2f}", f"{tuned['bytes'] / least:.4f}"],
                ["torch.save", f"{tuned['files'] / 1e6:.2f}", f"{tuned['files'] / least:.4f}"],
            ],
        ),
    ]


def _archive(result):
    lines = []
    for kind in result:
        megabytes = kind["bytes"] / 1e6
        rows = []
        for name, side in kind["sides"].items():
            rates = [megabytes / median(side[what]) for what in ("pack", "unpack")]
            rows.append(
                [name, f"{side['size'] / 1e6:.1f}", f"{side['size'] / kind['bytes']:.3f}", *(f"{r:.0f}" for r in rates)]
            )
        lines += [f"### {kind['kind']}: {kind['checkpoints']} checkpoints, {megabytes:.1f} MB", ""]
        lines += _table(["", "MB", "of it", "MB/s in", "MB/s out"], rows)
    return lines


def _reports(result):
    rows = [
        ["median", f"{result['median_us']:.1f} µs"],
        ["99 of 100 are below", f"{result['p99_us']:.1f} µs"],
        [f"median of the first {result['counted_at_each_end']:,}", f"{result['first_us']:.1f} µs"],
        [f"median of the last {result['counted_at_each_end']:,}", f"{result['last_us']:.1f} µs"],
        ["journal", f"{result['journal_bytes'] / 1e6:.1f} MB"],
        ["to open that run again and resume it", f"{median(result['resume_seconds']):.2f} s"],
        ["`peakpoint ls` of it", f"{median(result['ls_seconds']):.2f} s"],
    ]
    return [
        *_text(
            f"{result['reports']:,} reports of three metrics in one run that save nothing, beside",
            f"{result['checkpoints']} checkpoints, under rules for the best by each metric and every tenth epoch, with",
            "early stopping. `Last` is not among the rules: with it every report is saved.",
        ),
        "",
        *_table(["a report without a save", ""], rows),
    ]


def _catalogue(result):
    sides = {**result["queries"], **result["limits"]}
    rows = [[name, f"{median(seconds) * 1e3:.2f}"] for name, seconds in sides.items()]
    rows += [[f"one more checkpoint, {name}", f"{median(s) * 1e3:.2f}"] for name, s in result["adding"].items()]
    naive = result["naive"]
    ours, loop = median(naive["peakpoint"]), median(naive["glob and torch.load"])
    built = "" if result["build_seconds"] is None else f" Made from the files in {result['build_seconds']:.0f} s."
    return [
        *_text(
            f"{result['checkpoints']:,} checkpoints with 8 metrics in {result['runs']:,} runs, SQLite, a file of",
            f"{result['bytes'] / 1e9:.2f} GB, in a process that has asked before.{built} The selection is",
            f"`{SELECTION}`. Every time contains the look at the files.",
            f"`peakpoint ls` as a whole process: {median(result['ls_seconds']):.2f} s.",
        ),
        "",
        *_table(["", "ms"], rows),
        *_text(
            f"The best of {naive['checkpoints']} real checkpoints, {naive['bytes'] / 1e9:.1f} GB, in the page cache",
            "as far as they fit:",
        ),
        "",
        *_table(
            ["", "ms", "times faster"],
            [
                ["`Catalogue.select`", f"{ours * 1e3:.2f}", f"{loop / ours:,.0f}"],
                ["a loop over the files with `torch.load`", f"{loop * 1e3:,.0f}", "1"],
            ],
        ),
    ]


def _saving_bars(results):
    saves = {result["key"]: result for result in results}

    def sides(key, kind="durable"):
        return {name: median(values[kind]) for name, values in saves[key]["sides"].items()}

    if "gpt2" in saves:
        durable, stall = sides("gpt2"), sides("gpt2", "stall")
        copy = durable["copy in memory"]
        peers = [name for name in PEERS if name in durable]
        fastest = min(peers, key=durable.__getitem__)
        ours = durable["peakpoint"]
        yield "durable, hashed save, of the raw direct write rate", ">=", 0.80, durable["raw direct write"] / ours
        yield f"times the fastest other, {fastest}, made durable", ">=", 1.8, durable[fastest] / ours
        yield "stall with overlap, in copies in memory", "<=", 0.05, stall["peakpoint"] / copy
        yield "stall without overlap, in copies in memory", "<=", 1.25, stall["peakpoint, overlap=False"] / copy
    if "tiny" in saves:
        durable = sides("tiny")
        ratio = durable["peakpoint"] / durable["safetensors"]
        yield "20,000 tiny tensors: seconds against safetensors", "<=", 1.0, ratio


def _loading_bars(results):
    for result in results:
        if result["key"] == "gpt2":
            cold = {name: median(values["cold"]) for name, values in result["sides"].items()}
            limit = max(cold["raw direct read"], cold["hash in memory, every core"])
            yield "verified load from the disk, of the limit", ">=", 0.8, limit / cold["peakpoint, verified"]
    for result in results:
        warm = {name: median(values["warm"]) for name, values in result["sides"].items()}
        allowed = max(0.020, 1.5 * warm["safetensors load_file (mapped, nothing read)"])
        lazy = warm["peakpoint, verify=False (mapped, nothing read)"]
        yield f"{result['case']}: lazy load, of the time allowed", "<=", 1.0, lazy / allowed


def _ranks_bars(result):
    durable = {name: median(values["durable"]) for name, values in result["saves"].items()}
    fastest = min((name for name in result["memory"] if name != "peakpoint"), key=durable.__getitem__)
    stall = median(result["saves"]["peakpoint"]["stall"]) / durable["copy in memory"]
    extra = result["memory"]["peakpoint"]["extra"]
    yield (
        f"2 ranks: times the fastest other, {fastest}, made durable",
        ">=",
        1.5,
        durable[fastest] / durable["peakpoint"],
    )
    yield "2 ranks: stall, in copies in memory", "<=", 0.05, stall
    yield "2 ranks: peak memory of a rank, of its shards + 64 MiB", "<=", 1.0, extra / (result["bytes"] + 64 * MIB)


def _training_bars(result):
    ratio = median(result["step_waits"]) / median(result["memory_copies"])
    yield "wait in the optimizer's step, in copies in memory", "<=", 1.0, ratio


def _memory_bars(result):
    whole, ring = result["peakpoint"], result["peakpoint, capture_bytes=256MiB"]
    allowed = 1.1 * whole["bytes"] + 64 * MIB
    yield "peak memory beyond the state, of 1.1 states + 64 MiB", "<=", 1.0, whole["extra"] / allowed
    yield "peak memory with capture_bytes=256MiB, of 320 MiB", "<=", 1.0, ring["extra"] / (320 * MIB)


def _space_bars(result):
    tuned = result["fine_tuning"]
    least = tuned["backbone"] + tuned["checkpoints"] * tuned["changed"]
    yield f"times smaller than a file for each policy: {LEAN}", ">=", 3.0, _sizes(result)[LEAN]["smaller"]
    yield "frozen backbone: bytes, of the backbone once and what changes", "<=", 1.02, tuned["bytes"] / least


def _archive_bars(result):
    for kind in result:
        sizes = {name: side["size"] for name, side in kind["sides"].items()}
        for other in (ZSTD, ZIPNN):
            what = f"archive of {kind['kind']}: bytes against {other}"
            yield what, "<=", 1.0, sizes[ARCHIVE] / sizes[other]


def _reports_bars(result):
    yield "report without a save, in microseconds", "<=", 100.0, result["median_us"]
    ratio = result["last_us"] / result["first_us"]
    yield f"{result['reports']:,} reports: the last against the first", "<=", 1.2, ratio


def _catalogue_bars(result):
    million = f"{result['checkpoints']:,} checkpoints"
    for name, seconds in result["queries"].items():
        if name in (CASE, BEST, BEST_OF_ALL):
            yield f"{million}: {name}, ms", "<=", 20.0, median(seconds) * 1e3
    yield f"{million}: peakpoint ls, s", "<=", 0.5, median(result["ls_seconds"])
    yield f"{million}: one more, ms", "<=", 2.0, median(result["adding"][ALONE]) * 1e3
    naive = result["naive"]
    ratio = median(naive["glob and torch.load"]) / median(naive["peakpoint"])
    yield f"{naive['checkpoints']} checkpoints of 100 MB: times faster than loading them all", ">=", 1000.0, ratio


BARS = {
    "saving": _saving_bars,
    "loading": _loading_bars,
    "ranks": _ranks_bars,
    "training": _training_bars,
    "memory": _memory_bars,
    "space": _space_bars,
    "archive": _archive_bars,
    "reports": _reports_bars,
    "catalogue": _catalogue_bars,
}


def bars(figures):
    """What was aimed at, what was reached, and whether that is enough."""
    found = [bar for name, of in BARS.items() if figures.get(name) for bar in of(figures[name])]
    return [
        (what, sign, bar, value, value >= bar if sign == ">=" else value <= bar) for what, sign, bar, value in found
    ]


def render(figures):
    """The page."""
    machine = figures["machine"]
    lines = [
        "# Performance",
        "",
        "Written by `make bench` from `benchmarks/results.json`; change neither by hand. The sides of a table took",
        f"turns in one run; medians of {figures['repeats']} turns. All saves are equally durable: fsync of files and",
        "directories. Ours are hashed besides. Absolute times belong to one machine with a noisy disk: compare within",
        "a table.",
        "",
        ", ".join([f"{machine['cores']} cores", machine["processor"], machine["system"], f"Python {machine['python']}"])
        + f", torch {machine['torch']}, {figures['date']}.",
        "",
        "## What was aimed at",
        "",
        *_table(
            ["", "aim", "reached", ""],
            [
                [
                    what,
                    f"{'at least' if sign == '>=' else 'at most'} {bar:g}",
                    f"{value:.3f}",
                    "yes" if good else "**no**",
                ]
                for what, sign, bar, value, good in bars(figures)
            ],
        ),
        "## Saving",
        "",
        "The stall is how long the training loop waited for the call. With overlap the rest of the copy is made while",
        "the next forward and backward pass runs; others that save in the background ask for no change meanwhile.",
        "",
    ]
    for result in figures["saving"]:
        lines += _saving(result)
    lines += ["## Training on", ""]
    if figures["training"]:
        lines += _training(figures["training"])
    lines += ["## Loading", ""]
    for result in figures["loading"]:
        lines += _loading(result)
    if figures.get("ranks"):
        lines += ["## Several ranks", "", *_ranks(figures["ranks"])]
    lines += ["## Memory", "", *_memory(figures["memory"]), "## Space", ""]
    if figures["space"]:
        lines += _space(figures["space"])
    if figures.get("archive"):
        lines += [
            "## Archive",
            "",
            "Consecutive checkpoints, weights and both moments of AdamW, of a transformer with 0.87 million weights",
            "that learns from the source of Python's standard library, fifty steps apart. Restored bits are compared.",
            "Ours is durable, and the way in includes unpacking everything and comparing it with its digests.",
            "",
            *_archive(figures["archive"]),
        ]
    lines += ["## Reports", ""]
    if figures["reports"]:
        lines += _reports(figures["reports"])
    if figures.get("catalogue"):
        lines += ["## Catalogue", "", *_catalogue(figures["catalogue"])]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
