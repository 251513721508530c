"""The part of docs/cli.md about the commands, written from the commands: ``cli_page.py --write`` puts it there."""

import sys
from pathlib import Path

import click

from peakpoint.cli.commands import GROUPS
from peakpoint.cli.main import cli

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
BEGIN, END = "<!-- commands: written by .ci/cli_page.py -->\n", "<!-- end of the commands -->\n"
NUMBERS = {"INTEGER": "N", "INTEGER RANGE": "N", "FLOAT": "X", "FLOAT RANGE": "X"}


def sections() -> str:
    """Return a section for each command, by group."""
    lines: list[str] = []
    for title, entries in GROUPS.items():
        lines += [f"## {title}", ""]
        for entry in entries:
            command = cli.get_command(click.Context(cli), entry.name)
            assert command is not None, entry
            lines += section(entry.name, command)
    return "\n".join(lines)


def section(name: str, command: click.Command) -> list[str]:
    """Return the lines about one command: how it is called, what it does, its options."""
    context = click.Context(command, info_name=name)
    arguments = [param.make_metavar(context) for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option)]
    text = escaped(" ".join((command.help or "").split()))
    lines = [f"### `peakpoint {' '.join([name, *arguments])}`", "", text, ""]
    lines += [f"- {described(option, context)}" for option in options]
    return [*lines, ""]


def described(option: click.Option, context: click.Context) -> str:
    """Return an option with its value and its help, in a line."""
    value = "" if option.is_flag else " " + NUMBERS.get(metavar := option.make_metavar(context), metavar)
    record = option.get_help_record(context)
    words = " ".join((record[1] if record else "").replace("\b", "").split())
    return f"`{option.opts[-1]}{value}`: {escaped(words)}"


def escaped(text: str) -> str:
    """Return a text in which no star is Markdown."""
    return text.replace("*", "\\*")


def page() -> str:
    """Return the page with the sections as they are now."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{sections()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/cli.md is not what the commands say; run: python .ci/cli_page.py --write")
