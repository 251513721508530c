"""Arguments that many commands have."""

from pathlib import Path

import click

ROOT = click.argument("root", type=click.Path(path_type=Path))
REF = click.argument("ref")
JSON = click.option("--json", "json", is_flag=True, help="Print JSON for programs.")
