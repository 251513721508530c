"""The command that looks ahead: plan."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import render, tables
from peakpoint.cli.arguments import JSON, reads, rules_help
from peakpoint.cli.space import progress
from peakpoint.errors import ConfigError
from peakpoint.format.amounts import read_count, read_duration, read_rate
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
    points = {}
    for pair in text.split(","):
        epoch, _, value = pair.partition(":")
        try:
            points[int(epoch)] = float(value)
        except ValueError as error:
            raise ConfigError(
                f"{name}={text!r} is no schedule; give EPOCH:SPARSITY pairs such as 0:0,50:0.9"
            ) from error
    return points


_DURATION = reads(read_duration)
_LEAST = click.IntRange(min=1)


@click.command()
@click.argument("root", type=click.Path(path_type=Path), required=False)
@click.argument("name", metavar="[RUN]", required=False)
@click.option("--params", callback=reads(read_count), help="Number of parameters, such as 25.6M or 1e6.")
@click.option("--preset", help=f"A known network instead: {', '.join(networks.NAMES)}.")
@click.option("--presets", is_flag=True, help="Only list the known networks with their sizes.")
@click.option("--optimizer", help=f"One of {', '.join(optimizers.NAMES)}.")
@click.option("--dtype", help=f"Of the weights: {', '.join(optimizers.DTYPES)}.")
@click.option("--master", help="Of a copy of the weights in the optimizer, and of its moments, such as float32.")
@click.option("--epochs", type=_LEAST, help="How long the run is; of a run that exists, as long as it is by default.")
@click.option("--rules", "text", help=rules_help("those of the run"))
@click.option("--reports-per-epoch", type=_LEAST, help="How often the loop reports; once by default.")
@click.option("--steps-per-epoch", type=_LEAST, help="Optimizer steps of an epoch, for rules that count them.")
@click.option("--epoch-time", callback=_DURATION, help="How long an epoch takes without saves, such as 5min.")
@click.option("--sparsity", callback=reads(_points), help="EPOCH:SPARSITY pairs such as 0:0,50:0.9, straight between.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the curve that rises and then degrades.")
@click.option("--archive-ratio", type=click.FloatRange(min=0, min_open=True), help="What the archive leaves of a byte.")
@click.option("--bandwidth", callback=reads(read_rate), help="Of an upload, such as 1Gbit/s.")
@click.option("--mtbf", callback=_DURATION, help="Mean time between failures, such as 8h: says how often to save.")
@click.option(
    "--stall", callback=_DURATION, help="How long a save stalls the loop, such as 50ms; of a run, as measured."
)
@click.option("--durable", callback=_DURATION, help="How long until a save is durable; of a run, as measured.")
@click.option("--restart", callback=_DURATION, default="0", help="From a failure until the loop runs again.")
@JSON
def plan(
    root: Path | None,
    name: str | None,
    presets: bool,  # noqa: FBT001
    json: bool,  # noqa: FBT001
    text: str | None,
    **given: Any,
) -> None:
    """Say what a run will write and keep, how large that is, and how often to save; nothing is written.

    Of a run that exists (ROOT RUN), of a known network (--preset), or of a number of parameters (--params).
    """
    if presets:
        _print_presets(json=json)
        return
    sources = [root is not None, given["params"] is not None, given["preset"] is not None]
    if sum(sources) != 1 or (root is not None and name is None):
        raise ConfigError("plan of what? give ROOT RUN, or --params 25.6M, or --preset resnet-50")
    given["rules"] = None if text is None else parse_all(text)
    if root is not None and name is not None:
        forbidden = [option for option in ("optimizer", "dtype", "master") if given[option] is not None]
        if forbidden:
            raise ConfigError(f"--{forbidden[0]} has no meaning for a run that exists: its sizes are measured")
        given |= _of_run(open_repository(root).run(name), given)
    else:
        given |= {"sizes": _of_numbers(given), "reports_per_epoch": given["reports_per_epoch"] or 1}
    options = ("epochs", "reports_per_epoch", "steps_per_epoch", "epoch_time", "sparsity", "seed")
    with progress("playing the run", None):
        found = forecast(given["sizes"], keep=given["rules"], **{option: given[option] for option in options})
    costs, saving = _costs(found, given), _saving(found, given)
    if json:
        render.as_json(_plan_json(found) | {"costs": costs, "interval": saving})
        return
    _print_plan(render.console(), found, costs, saving)


def _of_numbers(given: dict[str, Any]) -> sizes.Sizes:
    network = None if given["preset"] is None else networks.architecture(given["preset"])
    if not given["rules"] or given["epochs"] is None:
        raise ConfigError(f"a plan needs --epochs and --rules, such as 'best:val_accuracy:max last:3'. Forms: {FORMS}")
    options = {option: given[option] for option in ("optimizer", "dtype", "master")}
    if network is not None:
        return sizes.from_network(network, **options)
    if given["optimizer"] is None:
        raise ConfigError(
            f"--params alone does not say what the optimizer holds: give --optimizer, one of "
            f"{', '.join(optimizers.NAMES)}"
        )
    return sizes.from_count(given["params"], **options | {"dtype": given["dtype"] or "float32"})


def _of_run(run: Run, given: dict[str, Any]) -> dict[str, Any]:
    """What a run has measured, beside what was given, which goes before."""
    events, manifests = run.events(), run.manifests()
    reports = history(events)
    rules = rules_of(events) if given["rules"] is None else given["rules"]
    if not rules:
        raise ConfigError(f"run {run.name!r} has no rules in force: give some with --rules, such as last:3")
    names = sorted({metric for report in reports for metric in report.metrics})
    for metric, _ in ranking_metrics(rules):
        if reports and metric not in names and not (given["sparsity"] and metric == "sparsity"):
            raise ConfigError(
                f"the rules rank by {metric!r}, which run {run.name!r} has never reported"
                f"{did_you_mean(metric, names)}; it reports {', '.join(names) or 'nothing'}"
            )
    packed = packed_bytes(run.store, run.name, manifests)
    whole = sum(one.size_bytes for one in manifests if one.id in packed)
    measured = pace(reports, manifests, {event.report for event in events if isinstance(event, Saved)})
    per_epoch = given["reports_per_epoch"] or measured.reports_per_epoch
    epochs = given["epochs"] or measured.epochs
    if not epochs:
        raise ConfigError(f"run {run.name!r} reports no epochs: give --epochs, and --reports-per-epoch")
    steps = None if measured.steps is None else max(1, round(measured.steps * per_epoch))
    seconds = None if not measured.seconds else timedelta(seconds=measured.seconds * per_epoch)
    return {
        "sizes": sizes.from_manifests(manifests, run.name),
        "rules": rules,
        "epochs": epochs,
        "reports_per_epoch": per_epoch,
        "steps_per_epoch": given["steps_per_epoch"] or steps,
        "epoch_time": seconds if given["epoch_time"] is None else given["epoch_time"],
        "sparsity": given["sparsity"] or _recorded(reports, rules),
        "packed": sum(packed.values()) / whole if whole else None,
    }


def _recorded(reports: Sequence[Reported], rules: Sequence[Rule]) -> dict[int, float]:
    """The sparsity that a run has reported, by epoch, if rules look at one."""
    name = next((rule.sparsity for rule in rules if isinstance(rule, BestAtSparsity)), "")
    found = {one.epoch: one.metrics[name] for one in reports if one.epoch is not None and name in one.metrics}
    return {epoch: value for epoch, value in found.items() if 0 <= value <= 1}


def _costs(found: Forecast, given: dict[str, Any]) -> dict[str, Any]:
    """What space it takes in the archive, and what time an upload takes."""
    kept = found.span("bytes_kept")
    ratio, source = given["archive_ratio"], "as given"
    if ratio is None and given.get("packed") is not None:
        ratio, source = given["packed"], "as measured on the archived checkpoints of this run"
    if ratio is None:
        kind = "bfloat16" if found.sizes.bfloat16 else "float32"
        ratio, source = ARCHIVE_RATIO[kind], f"measured on a small transformer in {kind}, docs/performance.md"
    rate = given["bandwidth"]
    return {
        "archive_ratio": ratio,
        "archive_ratio_source": source,
        "archive_bytes": [round(size * ratio) for size in kept],
        "upload_bytes_per_second": rate,
        "upload_checkpoint_seconds": rate and found.sizes.bytes / rate,
        "upload_kept_seconds": rate and [size / rate for size in kept],
    }


def _saving(found: Forecast, given: dict[str, Any]) -> dict[str, Any] | None:
    """How often to save, if the time between failures is known."""
    if given["mtbf"] is None:
        return None
    stall = found.sizes.stall if given["stall"] is None else given["stall"].total_seconds()
    if stall is None:
        raise ConfigError("--mtbf needs what a save costs: give --stall, such as 50ms, or plan from a run")
    durable = found.sizes.durable if given["durable"] is None else given["durable"].total_seconds()
    mtbf = given["mtbf"].total_seconds()
    failures = Failures(mtbf=mtbf, stall=stall, durable=durable or 0.0, restart=given["restart"].total_seconds())
    best = failures.best
    return {
        "mtbf_seconds": mtbf,
        "stall_seconds": stall,
        "durable_seconds": failures.durable,
        "restart_seconds": failures.restart,
        "young_seconds": young(stall, mtbf),
        "daly_seconds": daly(stall, mtbf),
        "best_seconds": best,
        "best_overhead": failures.overhead(best) if best > 0 else None,
        "rules_overhead": found.overhead(failures),
        "rules_wait": found.waits(failures),
    }


def _plan_json(found: Forecast) -> dict[str, Any]:
    record = asdict(found)
    for outlook in record["outlooks"]:
        outlook["longest_gap"] = max(outlook.pop("gaps"))
    return record | {"checkpoint_bytes": found.sizes.bytes, "naive_bytes": found.naive_bytes}


def _span(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(values[0]), show(values[-1])
    return low if low == high else f"{low} to {high}"


def _print_plan(console: Console, found: Forecast, costs: dict[str, Any], saving: dict[str, Any] | None) -> None:
    console.print(f"[bold]One checkpoint[/] of {escape(found.sizes.source)}")
    table = tables.plain(("part", ">size", "why"))
    for part in found.sizes.parts:
        still = f"; {render.size(part.frozen)} of it do not change, and are written once" if part.frozen else ""
        table.add_row(escape(part.name), render.size(part.bytes), escape(part.why + still))
    table.add_row("[bold]all[/]", f"[bold]{render.size(found.sizes.bytes)}[/]", "")
    console.print(table)
    console.print(
        f"\n[bold]{render.count(found.epochs, 'epoch')}[/], {render.count(found.reports, 'report')}, under "
        f"{escape(' '.join(found.rules))}"
    )
    heads = ("saves", "written", "kept", "whole", "bytes kept", "at most", "bytes at most")
    table = tables.plain(("if the metrics", *(f">{head}" for head in heads)))
    for one in found.outlooks:
        row = [one.saves, render.size(one.bytes_written), one.kept, one.whole, render.size(one.bytes_kept)]
        table.add_row(_SAID[one.name], *map(str, row), str(one.most), render.size(one.bytes_most))
    naive = render.size(found.naive_bytes)
    epochs = str(found.epochs)
    table.add_row("[dim]every epoch, whole[/]", epochs, naive, epochs, epochs, naive, epochs, naive)
    console.print(table)
    for one in found.outlooks:
        console.print(f"[dim]{_SAID[one.name]}: {one.assumption}[/]")
    for text in found.idle:
        console.print(f"[yellow]{escape(text)} claims nothing[/] in a run of this length")
    _print_costs(console, costs)
    if saving is not None:
        _print_saving(console, saving)


_SAID = {
    "likely": "rise, then degrade",
    "never improves": "never improve",
    "always improves": "always improve",
    "trades off": "trade off",
    "any": "go in any way",
}


def _print_costs(console: Console, costs: dict[str, Any]) -> None:
    console.print()
    if not costs["archive_bytes"][-1]:
        console.print("nothing is kept at the end")
        return
    console.print(
        f"archived at the end: {_span(costs['archive_bytes'], render.size)}, {costs['archive_ratio']:.2f} of it "
        f"({costs['archive_ratio_source']})"
    )
    if costs["upload_checkpoint_seconds"] is not None:
        console.print(
            f"upload: {_time(costs['upload_checkpoint_seconds'])} a checkpoint, "
            f"{_span(costs['upload_kept_seconds'], _time)} for what is kept at the end"
        )


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return render.seconds(seconds) if seconds else "0 s"


def _print_saving(console: Console, saving: dict[str, Any]) -> None:
    given = {name.removesuffix("_seconds"): _time(value) for name, value in saving.items() if value is not None}
    console.print(
        f"\nwith a failure every {given['mtbf']}, a stall of {given['stall']}, {given['durable']} until a save is "
        f"durable and {given['restart']} to restart"
    )
    loss = "" if saving["best_overhead"] is None else f": costs {saving['best_overhead']:.2%} of the work"
    console.print(f"the best interval is [bold]{given['best']}[/] (Young {given['young']}, Daly {given['daly']}){loss}")
    if saving["best_seconds"] >= 1:
        rule = f"every:{saving['best_seconds'] / 60:.3g}min:1"
        console.print(f"as a rule that is {rule}, for a loop that reports as often")
    if saving["rules_overhead"] is not None:
        waits = "; they save faster than saves become durable, and the loop waits" if saving["rules_wait"] else ""
        console.print(f"these rules cost {saving['rules_overhead']:.2%} of the work{waits}")
    else:
        console.print("--epoch-time would say what these rules cost")


def _print_presets(*, json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for network in map(networks.architecture, networks.NAMES):
        weights = sizes.from_network(network, optimizer="none")
        rows.append(
            {
                "name": network.name,
                "title": network.title,
                "parameters": network.parameters,
                "dtype": network.dtype,
                "weights_bytes": weights.parts[0].bytes,
                "sgd_momentum_bytes": sizes.from_network(network, optimizer="sgd+momentum").bytes,
                "adam_bytes": sizes.from_network(network, optimizer="adam").bytes,
                "mixed_bytes": sizes.from_network(network, optimizer="adam", dtype="bfloat16", master="float32").bytes,
                "source": network.source,
            }
        )
    if json:
        render.as_json({"presets": rows})
        return
    console = render.console()
    heads = ("parameters", "weights", "with SGD's momentum", "with Adam's moments", "16 bits, mixed")
    table = tables.plain(("network", *(f">{head}" for head in heads)))
    for row in rows:
        figures = [render.size(row[f"{key}_bytes"]) for key in ("weights", "sgd_momentum", "adam", "mixed")]
        table.add_row(f"{row['name']} ({row['dtype']})", f"{row['parameters']:,}", *figures)
    console.print(table)
    console.print(
        "Adam keeps two numbers for each weight: three times the weights. Mixed: weights of 16 bits, and in the "
        "optimizer a copy of them and two moments in float32, 14 bytes a parameter, seven times its weights; in memory "
        "the gradients make it eight. With every whole checkpoint go about 14 kB of random generators."
    )


COMMANDS = (plan,)
