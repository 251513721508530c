"""Runs and checkpoints in a store: commit, read, journal, aliases, validations, signatures, removal, archive, audit."""
