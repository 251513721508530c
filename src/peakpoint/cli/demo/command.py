"""The command ``demo``."""

from pathlib import Path

import click

from peakpoint.cli.command import PATH, torch_side


@click.command()
@click.option("--out", type=PATH, default=Path("peakpoint-demo"), help="Where to work.")
@click.option("--epochs", type=click.IntRange(min=12), default=60, help="Epochs of each training.")
def demo(out: Path, epochs: int) -> None:
    """Train, kill in the middle of a save, resume: see that nothing is lost."""
    torch_side("peakpoint.cli.demo.show").run(out, epochs)
