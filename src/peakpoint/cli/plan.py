"""The command ``plan``: what a run will write and keep."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.command import POSITIVE, ROOT_TYPE, Answer, command, progress_bar, reads, rules_help
from peakpoint.cli.completion import RUNS
from peakpoint.cli.render import UNITS, count, fields, literal, seconds
from peakpoint.errors import ConfigError
from peakpoint.format.amounts import read_count, read_duration, read_rate, size_text
from peakpoint.format.events import Reported, Saved
from peakpoint.format.names import did_you_mean
from peakpoint.reports.plan import networks, optimizers, sizes
from peakpoint.reports.plan.forecast import ARCHIVE_RATIO, Forecast, forecast, pace
from peakpoint.reports.plan.intervals import Failures, daly, young
from peakpoint.repository.packs import packed_bytes
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run, rules_of
from peakpoint.rules import FORMS, BestAtSparsity, Rule, parse_all, ranking_metrics
from peakpoint.rules.history import history


def _points(name: str, text: str) -> dict[int, float]:
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return {int(epoch): float(sparsity) for epoch, sparsity in pairs}
    except ValueError as error:
        raise ConfigError(f"{name} {text!r} is not a schedule; give EPOCH:SPARSITY pairs such as 0:0,50:0.9") from error


_DURATION = reads(read_duration)


@command(
    click.argument("root", type=ROOT_TYPE, required=False),
    click.argument("name", metavar="[RUN]", required=False, **RUNS),
    needs=dict.fromkeys(("--stall", "--durable", "--restart"), "--mtbf"),
    without=dict.fromkeys(("--params", "--preset", "--optimizer", "--epochs", "--rules", "--mtbf"), "--presets"),
)
@click.option("--params", callback=reads(read_count), help="Number of parameters, such as 25.6M or 1e6.")
@click.option("--preset", help=f"A known network instead: {', '.join(networks.NAMES)}.")
@click.option("--presets", "list_presets", is_flag=True, help="Only list the known networks with their sizes.")
@click.option("--optimizer", help=f"One of {', '.join(optimizers.NAMES)}.")
@click.option("--dtype", help=f"Type of the weights: {', '.join(optimizers.DTYPES)}.")
@click.option("--master", help="Type of the optimizer's copy of the weights and of its moments, such as float32.")
@click.option("--epochs", type=POSITIVE, help="How long the run is; by default as long as the run that exists.")
@click.option("--rules", "text", help=rules_help("those of the run"))
@click.option("--reports-per-epoch", type=POSITIVE, help="How often the loop reports; once by default.")
@click.option("--steps-per-epoch", type=POSITIVE, help="Optimizer steps of an epoch, for rules that count them.")
@click.option("--epoch-time", callback=_DURATION, help="How long an epoch takes without saves, such as 5min.")
@click.option("--sparsity", callback=reads(_points), help="EPOCH:SPARSITY pairs such as 0:0,50:0.9, straight between.")
@click.option("--seed", type=int, default=0, help="Seed of the curve that rises and then degrades.")
@click.option("--archive-ratio", type=click.FloatRange(min=0, min_open=True), help="Archived size as a fraction.")
@click.option("--bandwidth", callback=reads(read_rate), help="Bandwidth of an upload, such as 1Gbit/s.")
@click.option("--mtbf", callback=_DURATION, help="Mean time between failures, such as 8h: says how often to save.")
@click.option("--stall", callback=_DURATION, help="How long a save stalls the loop; of a run, as measured.")
@click.option("--durable", callback=_DURATION, help="How long until a save is durable; of a run, as measured.")
@click.option("--restart", callback=_DURATION, default="0", help="Time from a failure until the loop runs again.")
def plan(root: Path | None, name: str | None, text: str | None, *, list_presets: bool, **options: Any) -> Answer:
    """Predict what a run will write and keep, how large that is, and how often to save; nothing is written.

    Of a run that exists (ROOT RUN), of a known network (--preset), or of a number of parameters (--params).
    """
    if list_presets:
        presets = list(map(_preset, networks.NAMES))
        return Answer({"presets": presets}, lambda console: _print_presets(console, presets))
    sources = [root is not None, options["params"] is not None, options["preset"] is not None]
    if sum(sources) != 1 or (root is not None and name is None):
        raise ConfigError(
            "name one thing to plan: a run that exists (ROOT RUN), a known network (--preset resnet-50), or a number "
            "of parameters (--params 25.6M)"
        )
    options["rules"] = None if text is None else parse_all(text)
    if root is not None and name is not None:
        forbidden = [option for option in ("optimizer", "dtype", "master") if options[option] is not None]
        if forbidden:
            raise ConfigError(f"--{forbidden[0]} has no meaning for a run that exists: its sizes are measured")
        options |= _of_run(open_repository(root).run(name), options)
    else:
        options |= {"sizes": _of_numbers(options), "reports_per_epoch": options["reports_per_epoch"] or 1}
    schedule = ("epochs", "reports_per_epoch", "steps_per_epoch", "epoch_time", "sparsity", "seed")
    with progress_bar("simulating", None):
        prediction = forecast(
            options["sizes"], keep=options["rules"], **{option: options[option] for option in schedule}
        )
    costs, saving = _costs(prediction, options), _saving(prediction, options)
    data = _plan_json(prediction) | {"costs": costs, "interval": saving}
    return Answer(data, lambda console: _print_plan(console, prediction, costs, saving))


def _of_numbers(options: dict[str, Any]) -> sizes.Sizes:
    network = None if options["preset"] is None else networks.architecture(options["preset"])
    if not options["rules"] or options["epochs"] is None:
        raise ConfigError(f"a plan needs --epochs and --rules, such as 'best:val_accuracy:max last:3'. Forms: {FORMS}")
    precision = {option: options[option] for option in ("optimizer", "dtype", "master")}
    if network is not None:
        return sizes.from_network(network, **precision)
    if options["optimizer"] is None:
        names = ", ".join(optimizers.NAMES)
        raise ConfigError(f"--params alone does not say what the optimizer holds: give --optimizer, one of {names}")
    return sizes.from_count(options["params"], **precision | {"dtype": options["dtype"] or "float32"})


def _of_run(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a run has measured, where no option says otherwise."""
    events, manifests = run.events(), run.manifests()
    reports = history(events)
    rules = rules_of(events) if options["rules"] is None else options["rules"]
    if not rules:
        raise ConfigError(f"run {run.name!r} has no rules in force: give some with --rules, such as last:3")
    names = sorted({metric for report in reports for metric in report.metrics})
    for metric, _ in ranking_metrics(rules):
        if reports and metric not in names and not (options["sparsity"] and metric == "sparsity"):
            raise ConfigError(
                f"the rules rank by {metric!r}, which run {run.name!r} has never reported"
                f"{did_you_mean(metric, names)}; it reports {', '.join(names) or 'nothing'}"
            )
    packed = packed_bytes(run.store, run.name, manifests)
    unpacked = sum(manifest.size_bytes for manifest in manifests if manifest.id in packed)
    measured = pace(reports, manifests, {event.report for event in events if isinstance(event, Saved)})
    per_epoch = options["reports_per_epoch"] or measured.reports_per_epoch
    epochs = options["epochs"] or measured.epochs
    if not epochs:
        raise ConfigError(f"run {run.name!r} reports no epochs: give --epochs, and --reports-per-epoch")
    steps = None if measured.steps is None else max(1, round(measured.steps * per_epoch))
    epoch_time = None if not measured.seconds else timedelta(seconds=measured.seconds * per_epoch)
    return {
        "sizes": sizes.from_manifests(manifests, run.name),
        "rules": rules,
        "epochs": epochs,
        "reports_per_epoch": per_epoch,
        "steps_per_epoch": options["steps_per_epoch"] or steps,
        "epoch_time": epoch_time if options["epoch_time"] is None else options["epoch_time"],
        "sparsity": options["sparsity"] or _recorded(reports, rules),
        "packed": sum(packed.values()) / unpacked if unpacked else None,
    }


def _recorded(reports: Sequence[Reported], rules: Sequence[Rule]) -> dict[int, float]:
    """The sparsity that a run has reported, by epoch, if rules look at one."""
    name = next((rule.sparsity for rule in rules if isinstance(rule, BestAtSparsity)), "")
    values = [(report.epoch, report.metrics[name]) for report in reports if name in report.metrics]
    return {epoch: value for epoch, value in values if epoch is not None and 0 <= value <= 1}


def _costs(prediction: Forecast, options: dict[str, Any]) -> dict[str, Any]:
    """What space it takes in the archive, and what time an upload takes."""
    kept_bytes = prediction.span("bytes_kept")
    ratio, source = options["archive_ratio"], "as given"
    if ratio is None and options.get("packed") is not None:
        ratio, source = options["packed"], "as measured on the archived checkpoints of this run"
    if ratio is None:
        kind = "bfloat16" if prediction.sizes.bfloat16 else "float32"
        ratio, source = ARCHIVE_RATIO[kind], f"measured on a small transformer in {kind}, docs/performance.md"
    rate = options["bandwidth"]
    return {
        "archive_ratio": ratio,
        "archive_ratio_source": source,
        "archive_bytes": [round(size_bytes * ratio) for size_bytes in kept_bytes],
        "upload_bytes_per_second": rate,
        "upload_checkpoint_seconds": rate and prediction.sizes.bytes / rate,
        "upload_kept_seconds": rate and [size_bytes / rate for size_bytes in kept_bytes],
    }


def _saving(prediction: Forecast, options: dict[str, Any]) -> dict[str, Any] | None:
    """How often to save, if the time between failures is known."""
    if options["mtbf"] is None:
        return None
    stall = prediction.sizes.stall if options["stall"] is None else options["stall"].total_seconds()
    if stall is None:
        raise ConfigError("--mtbf needs what a save costs: give --stall, such as 50ms, or plan from a run")
    durable = prediction.sizes.durable if options["durable"] is None else options["durable"].total_seconds()
    mtbf = options["mtbf"].total_seconds()
    failures = Failures(mtbf=mtbf, stall=stall, durable=durable or 0.0, restart=options["restart"].total_seconds())
    best = failures.best
    times = asdict(failures) | {"young": young(stall, mtbf), "daly": daly(stall, mtbf), "best": best}
    return {f"{name}_seconds": seconds for name, seconds in times.items()} | {
        "best_overhead": failures.overhead(best) if best > 0 else None,
        "rules_overhead": prediction.overhead(failures),
        "rules_wait": prediction.waits(failures),
    }


def _plan_json(prediction: Forecast) -> dict[str, Any]:
    record = asdict(prediction)
    for outlook in record["outlooks"]:
        outlook["longest_gap"] = max(outlook.pop("gaps"))
    return record | {"checkpoint_bytes": prediction.sizes.bytes, "naive_bytes": prediction.naive_bytes}


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(values[0]), show(values[-1])
    return low if low == high else f"{low} to {high}"


def _print_plan(console: Console, prediction: Forecast, costs: dict[str, Any], saving: dict[str, Any] | None) -> None:
    console.print(f"[bold]One checkpoint[/] of {literal(prediction.sizes.source)}")
    rows = []
    for part in prediction.sizes.parts:
        frozen = f"; {size_text(part.frozen)} of it do not change, and are written once" if part.frozen else ""
        rows.append((literal(part.name), size_text(part.bytes), literal(part.why + frozen)))
    rows.append(("[bold]all[/]", f"[bold]{size_text(prediction.sizes.bytes)}[/]", ""))
    console.print(tables.PlainTable(("part", ">size", "why"), rows))
    console.print(
        f"\n[bold]{count(prediction.epochs, 'epoch')}[/], {count(prediction.reports, 'report')}, under "
        f"{literal(' '.join(prediction.rules))}"
    )
    console.print(_outlook_table(prediction))
    for outlook in prediction.outlooks:
        console.print(f"[dim]{_SCENARIOS[outlook.name]}: {outlook.assumption}[/]")
    for rule in prediction.idle:
        console.print(f"[yellow]{literal(rule)} keeps nothing[/] in a run of this length")
    _print_costs(console, costs)
    if saving is not None:
        _print_saving(console, saving)


_SCENARIOS = {
    "likely": "rise, then degrade",
    "never improves": "never improve",
    "always improves": "always improve",
    "trades off": "trade off",
    "any": "any metrics",
}


# the fields of an outlook in the order of the table, and how they look
_FIGURES: dict[str, Callable[[int], str]] = {
    "saves": str,
    "bytes_written": size_text,
    "kept": str,
    "whole": str,
    "bytes_kept": size_text,
    "most": str,
    "bytes_most": size_text,
}


def _outlook_table(prediction: Forecast) -> tables.PlainTable:
    heads = ("saves", "written", "kept", "whole", "bytes kept", "at most", "bytes at most")
    rows = [
        (_SCENARIOS[outlook.name], *(show(getattr(outlook, name)) for name, show in _FIGURES.items()))
        for outlook in prediction.outlooks
    ]
    epochs, naive = str(prediction.epochs), size_text(prediction.naive_bytes)
    rows.append(("[dim]every epoch, whole[/]", epochs, naive, epochs, epochs, naive, epochs, naive))
    return tables.PlainTable(("if the metrics", *(f">{head}" for head in heads)), rows)


def _print_costs(console: Console, costs: dict[str, Any]) -> None:
    console.print()
    if not costs["archive_bytes"][-1]:
        console.print("nothing is kept at the end")
        return
    archived = _span(costs["archive_bytes"], size_text)
    source = f"{costs['archive_ratio']:.2f} of the size, {costs['archive_ratio_source']}"
    console.print(f"If archived at the end: {archived} ({source})")
    if costs["upload_checkpoint_seconds"] is not None:
        console.print(
            f"upload: {_time(costs['upload_checkpoint_seconds'])} a checkpoint, "
            f"{_span(costs['upload_kept_seconds'], _time)} for what is kept at the end"
        )


def _time(duration: float) -> str:
    for unit, length in UNITS.items():
        if duration >= 2 * length:
            return f"{duration / length:.1f} {unit}"
    return seconds(duration) if duration else "0 s"


def _print_saving(console: Console, saving: dict[str, Any]) -> None:
    times = {name.removesuffix("_seconds"): _time(value) for name, value in saving.items() if value is not None}
    console.print(
        f"\nwith a failure every {times['mtbf']}, a stall of {times['stall']}, {times['durable']} until a save is "
        f"durable and {times['restart']} to restart"
    )
    overhead = "" if saving["best_overhead"] is None else f": costs {saving['best_overhead']:.2%} of the work"
    console.print(
        f"the best interval is [bold]{times['best']}[/] (Young {times['young']}, Daly {times['daly']}){overhead}"
    )
    if saving["best_seconds"] >= 1:
        rule = f"every:{saving['best_seconds'] / 60:.3g}min:1"
        console.print(f"as a rule: {rule}, for a loop that reports as often")
    if saving["rules_overhead"] is not None:
        waits = "; they save faster than saves become durable, and the loop waits" if saving["rules_wait"] else ""
        console.print(f"these rules cost {saving['rules_overhead']:.2%} of the work{waits}")
    else:
        console.print("To see what these rules cost, give --epoch-time")


# --- presets -------------------------------------------------------------------------------------------------------


def _preset(name: str) -> dict[str, Any]:
    network = networks.architecture(name)
    return fields(network, "name", "title", "parameters", "dtype", "source") | {
        "weights_bytes": sizes.from_network(network, optimizer="none").parts[0].bytes,
        "sgd_momentum_bytes": sizes.from_network(network, optimizer="sgd+momentum").bytes,
        "adam_bytes": sizes.from_network(network, optimizer="adam").bytes,
        "mixed_bytes": sizes.from_network(network, optimizer="adam", dtype="bfloat16", master="float32").bytes,
    }


def _print_presets(console: Console, presets: Sequence[dict[str, Any]]) -> None:
    heads = ("parameters", "weights", "with SGD's momentum", "with Adam's moments", "16 bits, mixed")
    rows = []
    for preset in presets:
        figures = [size_text(preset[f"{key}_bytes"]) for key in ("weights", "sgd_momentum", "adam", "mixed")]
        rows.append((f"{preset['name']} ({preset['dtype']})", f"{preset['parameters']:,}", *figures))
    console.print(tables.PlainTable(("network", *(f">{head}" for head in heads)), rows))
    console.print(
        "Adam keeps two numbers for each weight: three times the weights. Mixed: weights of 16 bits, and in the "
        "optimizer a copy of them and two moments in float32, 14 bytes a parameter, seven times its weights; in memory "
        "the gradients make it eight. Every whole checkpoint also holds about 14 kB of random generators."
    )
