"""Values as people read them, and checkpoints as programs do. Nothing here decides anything."""

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from peakpoint.cli.tables import Column
from peakpoint.cli.terminal import complain, is_terminal
from peakpoint.errors import printable, printable_lines
from peakpoint.format.amounts import size_text
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.settings import Settings
from peakpoint.repository import alias_holders
from peakpoint.repository.run import Run
from peakpoint.rules import Claim

_MOST_NAMES = 10  # checkpoints that one command line names
_WIDE = 200  # columns when the output is not a terminal: nothing is cut off
UNITS = {"d": 86400, "h": 3600, "min": 60}  # of time, in seconds


def literal(text: str) -> str:
    r"""Return markup that shows a text of users as it is, on one line.

    Example:
        >>> print(literal("[red]" + chr(27) + "c"))
        \[red]\x1bc
    """
    return escape(printable(text))


class _PrintableConsole(Console):
    """A console on which only its own styles control the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make text of markup; escaped here, so that tables are as wide as what they show."""
        return super().render_str(printable_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; also what never was markup is escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable_lines(segment.text), segment.style)


def console(*, stderr: bool = False) -> Console:
    """Return a console with colours on a terminal, plain text otherwise."""
    width = None if is_terminal(sys.stderr if stderr else sys.stdout) else _WIDE
    # no emoji: best:fire:max is a rule
    return _PrintableConsole(stderr=stderr, width=width, highlight=False, soft_wrap=False, emoji=False)


def count(number: int, noun: str) -> str:
    """``"1 checkpoint"``, ``"2 checkpoints"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def seconds(value: float) -> str:
    """``"2.7 ms"`` or ``"1.25 s"``."""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def text(value: object) -> str:
    """A value as it is, nothing for None."""
    return "" if value is None else str(value)


def listed(names: Sequence[str], most: int) -> str:
    """``"a, b and 3 more"``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def number(value: float | None) -> str:
    """A metric, in six significant digits."""
    return "" if value is None else f"{value:.6g}"


def rounded(difference: float, *values: float) -> float:
    """A difference, without the digits that six significant ones of the values do not have: 0.706 - 0.7 is 0.006."""
    scale = max(map(abs, values))
    if not (0 < scale < math.inf) or not math.isfinite(difference):
        return difference
    return round(difference, 5 - math.floor(math.log10(scale))) or difference


def money(value: float) -> str:
    """A price, with two digits of what is below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def age(moment: datetime) -> str:
    """``"3 min ago"``."""
    elapsed = (datetime.now(UTC) - moment).total_seconds()
    for unit, length in UNITS.items():
        if elapsed >= length:
            return f"{elapsed / length:.0f} {unit} ago"
    return f"{max(elapsed, 0):.0f} s ago"


def ref(checkpoint: Manifest | Checkpoint) -> str:
    """``RUN/NAME``, as commands take it."""
    return f"{checkpoint.run}/{checkpoint.name}"


def setting_list(settings: Settings) -> str:
    """Settings as ``lr 0.1, optimizer.name adamw``, in markup."""
    return literal(", ".join(f"{name} {value}" for name, value in settings.texts().items()))


# --- commands that can be pasted -----------------------------------------------------------------------------------


def command_line(*words: object) -> str:
    """Return a command of ours that can be pasted into a shell."""
    return "peakpoint " + shlex.join(map(str, words))


def undo_hint(root: Path, refs: Sequence[str], undo_for: timedelta) -> str:
    """Say how to take a removal back, and until when.

    Args:
        refs: what was removed, each as RUN/NAME.
    """
    if not undo_for:
        return "The space is free; this cannot be undone."
    until = datetime.now(UTC) + undo_for
    some = refs if len(refs) <= _MOST_NAMES else [*refs[:1], "..."]
    return (
        f"To undo, until {until:%Y-%m-%d %H:%M} UTC:\n  {command_line('undo', root, *some)}\n"
        f"To free the space now:\n  {command_line('undo', root, '--empty')}"
    )


# --- checkpoints ---------------------------------------------------------------------------------------------------


def fields(record: object, *names: str) -> dict[str, Any]:
    """Return some fields of a record, for programs."""
    return {name: getattr(record, name) for name in names}


def checkpoint_json(checkpoint: Manifest | Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint for programs."""
    names = ("run", "name", "id", "sequence", "step", "epoch", "metrics", "size_bytes", "created_at")
    return {"ref": ref(checkpoint), **fields(checkpoint, *names), "saved_because": checkpoint.reasons}


def manifest_json(manifest: Manifest, claims: Sequence[Claim]) -> dict[str, Any]:
    """Describe a checkpoint and why it is kept, for programs."""
    return checkpoint_json(manifest) | {"kept_because": claims}


def short_json(manifest: Manifest) -> dict[str, Any]:
    """Name a checkpoint and its size, for programs."""
    return {"ref": ref(manifest), **fields(manifest, "id", "size_bytes")}


def claims_text(claims: Iterable[Claim]) -> str:
    """Reasons why a checkpoint is kept, a line each."""
    return "\n".join(map(claim_text, claims)) or "[yellow]no rule keeps it: removed at the next save[/]"


# the beginnings of reasons that say all that their rule says
_REASONS = {
    "best": "best ",
    "best-at": "best ",
    "topk": "rank ",
    "pareto": "Pareto-optimal ",
    "every": "every ",
    "thin": "thin",
}


def claim_text(claim: Claim) -> str:
    """The reason, and the rule where the reason does not say it: options, and what is simply the newest."""
    kind = claim.rule.partition(":")[0]
    plain = "=" not in claim.rule.replace(":smooth=", "")
    if kind == "protection" or (plain and kind in _REASONS and claim.reason.startswith(_REASONS[kind])):
        return literal(claim.reason)
    return f"{literal(claim.reason)} [dim]({literal(claim.rule)})[/]"


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    table = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def left_out(unread: Mapping[str, str]) -> list[str]:
    """Say of runs and checkpoints, RUN/NAME, why they cannot be read."""
    kinds = {name: "checkpoint" if "/" in name else "run" for name in unread}
    return [f"{kinds[name]} {name!r} cannot be read and is left out: {why}" for name, why in unread.items()]


def print_list(console: Console, lines: Iterable[str]) -> None:
    """Print lines of markup as a list."""
    for line in lines:
        console.print(f"  - {line}")


def sizes(manifests: Iterable[Manifest]) -> str:
    """The bytes of checkpoints together."""
    return size_text(sum(manifest.size_bytes for manifest in manifests))


# --- aliases -------------------------------------------------------------------------------------------------------


def alias_text(names: Iterable[str]) -> str:
    """Aliases as refs, a line each."""
    return "\n".join(f"[bold magenta]@{literal(name)}[/]" for name in names)


def alias_columns(names: Sequence[Iterable[str]]) -> list[Column]:
    """A column of the aliases of each row, if any has one."""
    cells = list(map(alias_text, names))
    return [Column("aliases", cells, right=False)] if any(cells) else []


def aliases_of(run: Run) -> dict[str, tuple[str, ...]]:
    """Return the ids of the checkpoints of a run that aliases point at, with the aliases; warn of damaged ones."""
    newest, damaged = alias_holders.newest_of_all(run.store)
    for alias, why in damaged.items():
        complain(f"cannot read what alias {alias!r} points at: {why}")
    in_run = (record for record in newest.values() if record.target is not None and record.target.run == run.name)
    return alias_holders.aliases_by_checkpoint(in_run)
