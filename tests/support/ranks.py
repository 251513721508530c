"""Ranks of a training: forks of one interpreter that has torch, since to start one takes seconds."""

import datetime as dt
import json
import os
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from torch import distributed

torch.set_num_threads(1)  # no thread pool may exist when this process forks


def in_ranks(size, work, *, seconds=60, always=False):
    """Run ``work(rank)`` in so many processes of one group; ``always``: also a single one.

    Returns:
        Of each rank what its work has returned, None if it was killed, and its wait status.
    """
    place = Path(tempfile.mkdtemp(prefix="ranks-"))
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _run(rank, size, work, place, seconds, always)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    results = []
    for rank in range(size):
        path = place / str(rank)
        results.append(json.loads(path.read_text()) if path.exists() else None)
    return results, statuses


def _run(rank, size, work, place, seconds, always):
    code = 1
    try:
        warnings.simplefilter("error")
        if size > 1 or always:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{place}/group",
                rank=rank,
                world_size=size,
                timeout=dt.timedelta(seconds=seconds),
            )
        result = work(rank)
        (place / str(rank)).write_text(json.dumps(result))
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - the parent must hear of anything
        (place / str(rank)).write_text(json.dumps({"traceback": traceback.format_exc()}))
    finally:
        os._exit(code)
