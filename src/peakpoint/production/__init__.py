"""Validate, compare, promote, release, roll back, and tell others."""
