"""The command that looks at two checkpoints: diff."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import render, tables
from peakpoint.cli.arguments import JSON, ROOT, torch_side
from peakpoint.cli.space import progress
from peakpoint.reports.diff import Difference, MetricDifference, TensorDifference, diff_manifests
from peakpoint.repository.root import open_repository

_WIDE = 120  # columns from which on a tensor is one line


@click.command()
@ROOT
@click.argument("a", metavar="REF")
@click.argument("b", metavar="REF")
@click.option(
    "--no-values", is_flag=True, help="From the manifests alone: opens no file of a checkpoint, needs no torch."
)
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="How many tensors to list.")
@click.option("--all", "everything", is_flag=True, help="List them all.")
@JSON
def diff(root: Path, a: str, b: str, no_values: bool, top: int, everything: bool, json: bool) -> None:  # noqa: FBT001
    """Say what differs between two checkpoints: metrics, rules, versions, values, tensor by tensor."""
    repository = open_repository(root)
    one, other = repository.find_manifest(a), repository.find_manifest(b)
    found = diff_manifests(repository, one, other)
    if not no_values:
        distances = torch_side("peakpoint.models.value_diff")
        total = sum(tensor.bytes for tensor in found.tensors if tensor.what in {"dtype", "values"})
        with progress("comparing", total) as advance:
            found = distances.measured(repository.store, one, other, found, advance)
    listed = found.tensors if everything else found.tensors[:top]
    if json:
        render.as_json(_diff_json(found, listed))
        return
    _print_diff(render.console(), found, listed)


def _diff_json(found: Difference, listed: Sequence[TensorDifference]) -> dict[str, Any]:
    record = asdict(found)
    record["metrics"] = [asdict(one) | {"change": one.change} for one in found.metrics]
    record["tensors"] = [asdict(one) for one in listed]
    return record | {"different_tensors": len(found.tensors), "identical": found.identical}


def _print_diff(console: Console, found: Difference, listed: Sequence[TensorDifference]) -> None:
    a, b = found.a, found.b
    rows = [("id", a.id, b.id), *((what, escape(one), escape(other)) for what, one, other in _rows(found))]
    rows += map(_metric_cells, found.metrics)
    console.print(tables.plain(("", f"a: {escape(a.ref)}", f"b: {escape(b.ref)}"), rows))
    console.print()
    for part, where in [(one, "a") for one in found.parts_only_in_a] + [(one, "b") for one in found.parts_only_in_b]:
        console.print(f"part {escape(part)} is only in {where}")
    if found.plain:
        values = [(escape(plain.path), *map(escape, _plain(plain.a, plain.b))) for plain in found.plain[:20]]
        console.print(tables.plain(("value", "a", "b"), values))
        if len(found.plain) > 20:
            console.print(f"and {len(found.plain) - 20} other values; --json lists them")
        console.print()
    if found.generators_same is not None:
        console.print(f"random generators: {'the same' if found.generators_same else 'in different states'}")
    _print_tensors(console, found, listed)


def _metric_cells(metric: MetricDifference) -> tuple[str, str, str]:
    shown = {"a": render.number(metric.a) or "none", "b": render.number(metric.b) or "none"}
    if metric.better:
        shown[metric.better] = f"[bold green]{shown[metric.better]} *[/]"
    if metric.change is not None:
        shown["b"] += f"  ({render.rounded(metric.change, metric.a or 0, metric.b or 0):+.6g})"
    return escape(metric.name), shown["a"], shown["b"]


_FLOAT = re.compile(r"(?<![\w.\"-])-?\d+(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+)(?![\w.\"-])")


def _plain(*sides: str | None) -> list[str]:
    """Two values that differ, their fractions in six digits unless that makes them the same."""
    long = [str(side)[:60] for side in sides]
    short = [
        side if side.startswith('"') else _FLOAT.sub(lambda found: render.number(float(found[0])), side)
        for side in map(str, sides)
    ]
    return [side[:60] for side in short] if len(set(short)) == len(short) else long


def _rows(found: Difference) -> list[tuple[str, str, str]]:
    """Facts of both sides; of those that are usually the same, the ones that differ."""
    a, b = found.a, found.b
    ats = [f"step {side.step}" + ("" if side.epoch is None else f", epoch {side.epoch}") for side in (a, b)]
    times = [f"{side.created_at:%Y-%m-%d %H:%M:%S} UTC" for side in (a, b)]
    rows = [
        ("at", ats[0], ats[1]),
        ("created", times[0], times[1]),
        ("size", render.size(a.size_bytes), render.size(b.size_bytes)),
        ("saved because", "\n".join(a.reasons), "\n".join(b.reasons)),
    ]
    often_same = [("rules", " ".join(a.rules), " ".join(b.rules))]
    for word, left, right in (("", a.written_by, b.written_by), ("class of ", a.classes, b.classes)):
        names = dict.fromkeys(name for name in [*left, *right] if name != "pid")  # it says nothing
        often_same += [(word + name, left.get(name, "none"), right.get(name, "none")) for name in names]
    return rows + [row for row in often_same if row[1] != row[2]]


def _print_tensors(console: Console, found: Difference, listed: Sequence[TensorDifference]) -> None:
    console.print(
        f"{render.count(found.same_tensors, 'tensor')} the same, {render.size(found.same_bytes)}; "
        f"{len(found.tensors)} different, {render.size(found.changed_bytes)}"
    )
    if not listed:
        return
    compared = any(one.distance for one in listed)
    heads: tuple[str, ...] = ("tensor", ">size", ">relative", ">L2", ">largest", ">cosine", ">changed", ">zeros")
    heads = heads if compared else heads[:2]
    between = "  " if console.width >= _WIDE else "\n"
    names = [f"{escape(f'{one.part}: {one.name}')}{between}[dim]{_what(one)}[/]" for one in listed]
    rows = [(name, render.size(one.bytes), *_figures(one)) for name, one in zip(names, listed, strict=True)]
    console.print(tables.plain(heads, [row[: len(heads)] for row in rows], unbroken=heads[1:]))
    if len(found.tensors) > len(listed):
        console.print(f"and {len(found.tensors) - len(listed)} more; --all lists them")


def _what(one: TensorDifference) -> str:
    def told(side: tuple[str, tuple[int, ...]] | None) -> str:
        return "" if side is None else f"{side[0]}[{', '.join(map(str, side[1]))}]"

    match one.what:
        case "values":
            what = told(one.a)
        case "only in a" | "only in b":
            what = f"{one.what}: {told(one.a or one.b)}"
        case _:
            what = f"{told(one.a)} and {told(one.b)}"
    broken = one.distance.not_finite if one.distance else (0, 0)
    return escape(what) + (f" [yellow]not finite: {broken[0]} and {broken[1]}[/]" if any(broken) else "")


def _figures(one: TensorDifference) -> list[str]:
    at = one.distance
    if at is None:
        return [""] * 6
    cosine = "" if at.cosine is None else f"{at.cosine:.5f}"
    changed = "" if at.changed is None else str(at.changed)
    zeros = f"{at.zeros[0]:.1%}" if at.zeros[0] == at.zeros[1] else f"{at.zeros[0]:.1%} {at.zeros[1]:.1%}"
    return [f"{at.relative:.4g}", f"{at.l2:.4g}", f"{at.largest:.4g}", cosine, changed, zeros]


COMMANDS = (diff,)
