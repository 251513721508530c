"""Checkpoints as files that other tools open; see ``exports.files``."""
