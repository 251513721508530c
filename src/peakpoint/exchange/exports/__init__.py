"""Checkpoints as files that other tools open; see ``export.files``."""
