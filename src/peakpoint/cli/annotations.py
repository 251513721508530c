"""The commands ``pin``, ``unpin`` and ``record``: notes on a checkpoint."""

from pathlib import Path

import click

from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import REF, ROOT
from peakpoint.cli.render import manifest_json, ref
from peakpoint.errors import ConfigError
from peakpoint.format.manifest import Manifest
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run


@click.command()
@ROOT
@REF
@click.option("--why", required=True, help="The reason, for people.")
@answers
def pin(root: Path, ref: str, why: str) -> Answer:
    """Protect a checkpoint from the rules, also while its run is training."""
    run, manifest = open_repository(root).locate(ref)
    run.pin(f"{run.name}/{manifest.name}", why)
    return _annotated(run, manifest, "is pinned")


@click.command()
@ROOT
@REF
@answers
def unpin(root: Path, ref: str) -> Answer:
    """Remove the pin of a checkpoint, so that only rules keep it."""
    run, manifest = open_repository(root).locate(ref)
    run.unpin(f"{run.name}/{manifest.name}")
    return _annotated(run, manifest, "is not pinned")


@click.command()
@ROOT
@REF
@click.argument("values", metavar="METRIC=VALUE...", nargs=-1, required=True)
@click.option("--part", help="The part that was measured, such as ema.")
@click.option("--source", default="by hand", help="What measured it.")
@answers
def record(root: Path, ref: str, values: tuple[str, ...], part: str | None, source: str) -> Answer:
    """Add metrics that were measured after the save; rules use them at once."""
    run, manifest = open_repository(root).locate(ref)
    run.record(f"{run.name}/{manifest.name}", dict(map(_measurement, values)), part=part, source=source)
    return _annotated(run, manifest, f"has {', '.join(values)}")


def _measurement(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        if equals:
            return name, float(value)
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is not a measurement; give METRIC=VALUE, such as accuracy=0.74")


def _annotated(run: Run, manifest: Manifest, change: str) -> Answer:
    def data() -> object:
        annotated = next(candidate for candidate in run.known(()) if candidate.id == manifest.id)
        return manifest_json(annotated, run.kept().get(manifest.id, ()))

    return Answer(data, f"{ref(manifest)} {change}")
