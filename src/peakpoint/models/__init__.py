"""Checkpoints as models: load, average, soup, ensemble, differences of values."""
