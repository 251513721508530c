"""Checkpoints that other tools have written become a run; see ``importing.everything``."""
