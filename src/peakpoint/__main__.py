"""``python -m peakpoint``: the command line."""

from peakpoint.cli.main import run

if __name__ == "__main__":
    run()
