"""The commands ``import`` and ``export``: checkpoints of other tools, and for them."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console, RenderableType

from peakpoint.cli import tables
from peakpoint.cli.command import PATH, REF, ROOT, Answer, command, progress_bar, reads, torch_side
from peakpoint.cli.render import command_line, count, listed, literal, number, ref, text
from peakpoint.cli.terminal import complain
from peakpoint.errors import ConfigError, Error, FormatError
from peakpoint.format.amounts import read_bytes, size_text
from peakpoint.reports import card as cards
from peakpoint.reports.card.front_matter import front_matter
from peakpoint.repository.root import Repository, open_repository
from peakpoint.rules import parse_all

# --- import --------------------------------------------------------------------------------------------------------


_MOST_NAMES = 20  # files that are named
_HELD_OUT = re.compile(r"(^|[/_.-])(val|acc|loss)", re.IGNORECASE)


@command(click.argument("path", metavar="DIR_OR_FILE", type=PATH), ROOT, needs={"--join": "--metrics"})
@click.option("--run", required=True, help="The run that they become; a new one.")
@click.option("--metrics", type=PATH, help="A log: JSON, JSON lines, CSV, or TensorBoard's.")
@click.option(
    "--join", type=click.Choice(["auto", "epoch", "step"]), default="auto", help="What log and checkpoints share."
)
@click.option("--epochs-from", type=click.IntRange(0, 1), default=0, help="The number of the first epoch in the files.")
@click.option("--epoch-key", default="", show_default=False, help="Where in the files the epoch is: progress.epoch.")
@click.option("--step-key", default="", show_default=False, help="Where in the files the steps are.")
@click.option("--part", "parts", multiple=True, metavar="FROM=TO", help="A name in the files, and the part it becomes.")
@click.option(
    "--strip-prefix",
    default="",
    show_default=False,
    help="Removed from the names of the model's tensors, such as module.",
)
@click.option("--inert", multiple=True, metavar="MODULE.CLASS", help="Keep objects of it as records of their values.")
@click.option("--rules", "rule_text", help="Put these rules in force, and pin nothing.")
@click.option("--link", is_flag=True, help="Hard-link safetensors files that can serve as they are.")
@click.option("--skip-unreadable", is_flag=True, help="Import the others when a file cannot be read.")
@click.option("--dry-run", is_flag=True, help="Only show what would be imported.")
def import_(
    path: Path, root: Path, run: str, parts: tuple[str, ...], rule_text: str | None, *, dry_run: bool, **options: Any
) -> Answer:
    """Import checkpoints of other tools into a run; runs no code from the files, and changes none of them."""
    renamed = dict(map(_renamed_part, parts))
    rules = None if rule_text is None else parse_all(rule_text)
    imports = torch_side("peakpoint.exchange.imports", "import")
    with _interrupted(root, run), progress_bar("importing", _bytes(path)) as advance:
        report = imports.import_checkpoints(
            path, root, run=run, parts=renamed, rules=rules, dry_run=dry_run, progress=advance, **options
        )
    problems = [f"not imported: {source.error}" for source in report.checkpoints if source.status == "unreadable"]
    return Answer(
        {"dry_run": dry_run, **asdict(report)},
        lambda console: _print_report(console, root, path, report, dry_run=dry_run, pinned=rules is None),
        problems,
        FormatError.exit_code if problems else 0,
    )


@contextlib.contextmanager
def _interrupted(root: Path, run: str) -> Iterator[None]:
    """After Ctrl-C, say what has been imported."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            imported = len(open_repository(root).run(run).manifests())
        except Error:
            imported = 0
        checkpoints = count(imported, "checkpoint")
        complain(f"{checkpoints} in run {run}, each complete; the same command imports the rest")
        raise


def _renamed_part(text: str) -> tuple[str, str]:
    name, equals, part = text.rpartition("=")
    if not (name and equals and part):
        raise ConfigError(f"--part {text} names no part; give FROM=TO, such as --part generator=model")
    return name, part


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _print_report(console: Console, root: Path, path: Path, report: Any, *, dry_run: bool, pinned: bool) -> None:
    sources = report.checkpoints
    console.print(_table(sources, console.width))
    for note, repeats in Counter(note for source in sources for note in source.notes).items():
        console.print(f"  {literal(note)}" + ("" if repeats == len(sources) else f" ({count(repeats, 'file')})"))
    for note in report.notes:
        console.print(f"  {literal(note)}")
    if any(source.step_counted for source in sources):
        console.print("  (N): step guessed")
    if report.others:
        names = [str(file.relative_to(path) if file != path else file) for file in report.others]
        console.print(f"  not checkpoints: {literal(listed(names, _MOST_NAMES))}")
    new = sum(source.status in {"imported", "linked", "planned"} for source in sources)
    console.print(
        f"{count(new, 'checkpoint')} {'would be imported' if dry_run else 'imported'} into run {literal(report.run)}"
        f"{_skipped(sources)}; {count(report.reports, 'report')} in its history"
    )
    if new and not dry_run:
        console.print(f"To see them: {literal(command_line('ls', root, report.run))}", soft_wrap=True)
        if pinned:
            rules = '--rules "best:METRIC:max last:3"'
            console.print(f"All are pinned. To let rules decide instead, repeat the command with {rules}")
    if not (pinned or dry_run):
        show = literal(command_line("keep", root, report.run))
        console.print(f"The import pins none: the rules decide what stays. To see it: {show}", soft_wrap=True)


def _skipped(sources: Sequence[Any]) -> str:
    """Say which sources were not imported now, and why not."""
    counts = Counter(source.status for source in sources)
    reasons = {"there": "imported before", "removed": "imported before and removed since", "twin": "duplicate"}
    return "".join(f", {counts[status]} {reason}" for status, reason in reasons.items() if counts[status])


def _metric_names(sources: Sequence[Any]) -> list[str]:
    """Return the metrics of most interest, as many as a table has room for."""
    names = {name: None for source in sources for name in source.metrics}
    return sorted(names, key=lambda name: (_HELD_OUT.search(name) is None, name.startswith("best")))[:3]


_STATUSES = {"unreadable": "[red]unreadable[/]", "there": "imported before", "twin": "duplicate"}


def _table(sources: Sequence[Any], width: int) -> RenderableType:
    """Return one row for each source, with the columns that there is room for."""
    metrics = {
        literal(name): [number(source.metrics.get(name)) for source in sources] for name in _metric_names(sources)
    }
    columns = [
        tables.Column("file", [literal(source.path.name) for source in sources], right=False),
        tables.Column("kind", [literal(source.tool) for source in sources], right=False),
        tables.Column("epoch", [text(source.epoch) for source in sources]),
        tables.Column("step", [f"({source.step})" if source.step_counted else text(source.step) for source in sources]),
        *(tables.Column(title, cells) for title, cells in metrics.items()),
        tables.Column("parts", [literal(", ".join(source.parts)) for source in sources], right=False),
        tables.Column("size", [size_text(source.size_bytes) for source in sources]),
        tables.Column("status", [_STATUSES.get(source.status, str(source.status)) for source in sources], right=False),
    ]
    return tables.fitted_table(columns, ["parts", "kind", "size", *reversed(metrics)], width)


# --- export --------------------------------------------------------------------------------------------------------


_OPTIONS = {  # of one form only
    "hf": ("shard", "config"),
    "card": ("license", "data", "task", "base_model", "tags", "about", "force"),
}


@command(ROOT, REF)
@click.option("--to", type=PATH, help="FILE.safetensors, .pth, .pt or DIR.")
@click.option("--as", "form", type=click.Choice(["hf", "card"]), help="A folder for Hugging Face, or a model card.")
@click.option("--part", "parts", multiple=True, help="Which part, may be repeated for .pth; model by default.")
@click.option(
    "--strip-prefix", default="", show_default=False, help="Removed from the names of tensors, such as module."
)
@click.option("--fold-masks", is_flag=True, help="Write weights of torch.nn.utils.prune with their masks applied.")
@click.option("--shard", callback=reads(read_bytes), default="5 GB", help="hf: the most bytes of one file.")
@click.option("--config", type=PATH, help="hf: becomes config.json.")
@click.option("--license", metavar="ID", help="card: such as apache-2.0.")
@click.option("--data", metavar="TEXT", help="card: what the model was trained and evaluated on.")
@click.option("--task", metavar="ID", help="card: such as image-classification.")
@click.option("--base-model", metavar="ID", help="card: the model on the Hub that it was made of.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="card: a further tag; may be repeated.")
@click.option("--about", type=PATH, metavar="FILE.md", help="card: text of yours that is put in.")
@click.option("--force", is_flag=True, help="card: replace files that are not an earlier card, too.")
def export(root: Path, ref: str, to: Path | None, form: str | None, **options: Any) -> Answer:
    """Export a checkpoint to a file or folder that other tools open, or write its model card.

    A card goes into DIR as README.md, with curve.png; without --to it is printed.
    """
    _refuse_options_of_other_forms(form)
    repository = open_repository(root)
    if form == "card":
        if options["strip_prefix"] or options["fold_masks"]:
            raise ConfigError("--strip-prefix and --fold-masks change weights, and a card has none; leave them out")
        if options["parts"]:
            raise ConfigError("--part has no effect with --as card, which describes the checkpoint; leave --part out")
        return _card(repository, ref, to, options)
    if to is None:
        raise ConfigError("--to names no file or folder; give FILE.safetensors, FILE.pth, FILE.pt or DIR")
    return _export(repository, ref, to, form, options)


def _refuse_options_of_other_forms(form: str | None) -> None:
    context = click.get_current_context()
    for owner, names in _OPTIONS.items():
        for option in context.command.params:
            given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
            if form != owner and option.name in names and given:
                raise ConfigError(f"{option.opts[-1]} is for --as {owner}; add it, or leave {option.opts[-1]} out")


def _export(repository: Repository, text: str, to: Path, form: str | None, options: Mapping[str, Any]) -> Answer:
    parts = options["parts"]
    weights = torch_side("peakpoint.exchange.exports.weights").WeightOptions(
        options["strip_prefix"], options["fold_masks"]
    )
    if form == "hf":
        folders = torch_side("peakpoint.exchange.exports.huggingface")
        settings = {name: options[name] for name in _OPTIONS["hf"]}
        manifest = folders.export_folder(repository, text, to, parts[0] if parts else "", options=weights, **settings)
    else:
        manifest = torch_side("peakpoint.exchange.exports.files").export(repository, text, to, parts, weights)
    size_bytes = to.stat().st_size if to.is_file() else sum(file.stat().st_size for file in to.iterdir())
    data = {"ref": ref(manifest), "to": str(to), "size_bytes": size_bytes}
    return Answer(data, f"{ref(manifest)} -> {to} ({size_text(size_bytes)})")


def _card(repository: Repository, text: str, to: Path | None, options: Mapping[str, Any]) -> Answer:
    texts = {name: options[name] for name in ("license", "data", "task", "base_model", "tags")}
    about = "" if options["about"] is None else cards.about_text(options["about"])
    description = cards.ModelDescription(about=about, **texts)
    card = cards.gather(repository, text, description)
    files = [] if to is None else cards.write(card, to, force=options["force"])
    page = cards.markdown(card) if to is None else files[0].read_text(encoding="utf-8")
    data = {
        "ref": ref(card.manifest),
        "id": card.manifest.id,
        "front_matter": front_matter(card),
        "markdown": page,
        "files": list(map(str, files)),
    }
    if to is None:
        return Answer(data, page.removesuffix("\n"))
    lines = [f"wrote {file} ({size_text(file.stat().st_size)})" for file in files]
    if len(files) == 1:
        lines.append("no curve: no rule ranks by a metric that has values, or Matplotlib is missing")
    return Answer(data, "\n".join(lines))
