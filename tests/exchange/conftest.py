"""Imports here do not wait for torch each; tests/faults/test_hostile_files.py has the process of inspection start."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def inspected_in_forks(processes_have_torch):
    """Have files be inspected by forks of one process, each with limits of its own."""
