"""Checkpoints that torch.distributed.checkpoint saves and loads, as checkpoints of a run."""

from peakpoint.distributed.reader import Reader
from peakpoint.distributed.writer import Writer

__all__ = ["Reader", "Writer"]
