"""What a shell offers for an argument: runs, checkpoints and aliases of the repository that stands before it."""

from collections.abc import Callable, Iterable
from typing import Any

import click

from peakpoint.errors import Error
from peakpoint.format import layout
from peakpoint.repository import aliases
from peakpoint.repository.root import Repository, open_repository


def _offered(list_names: Callable[[Repository, str], Iterable[str]]) -> dict[str, Any]:
    """Return the options of an argument that has names of a repository completed; offers none that cannot be typed."""

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        root = context.params.get("root") or next(iter(context.args), None)  # before an option without its value
        if root is None:
            return []
        try:
            names = sorted(list_names(open_repository(root), incomplete))
        except Error:
            return []
        return [name for name in names if name.startswith(incomplete) and name.isprintable()]

    return {"shell_complete": complete}


def _checkpoints(repository: Repository, incomplete: str) -> list[str]:
    """Return refs: of aliases and the newest of each run; with names where only one run can be meant."""
    run_names = [run.name for run in repository.runs() if run.name.isprintable()]
    refs = [f"@{alias}" for alias in aliases.names(repository.store)] + [f"{run}@latest" for run in run_names]
    begun = [run for run in run_names if f"{run}/".startswith(incomplete) or incomplete.startswith(f"{run}/")]
    if len(begun) == 1:
        prefix = layout.checkpoints_prefix(begun[0])
        refs += [f"{begun[0]}/{name.rstrip('/')}" for name in repository.store.children(prefix) if name.endswith("/")]
    return refs


RUNS = _offered(lambda repository, _: [run.name for run in repository.runs()])
CHECKPOINTS = _offered(_checkpoints)
ALIASES = _offered(lambda repository, _: aliases.names(repository.store))
