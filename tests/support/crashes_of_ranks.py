"""Ranks that are killed at every file operation of their saves: run by tests/faults/test_crash_points.py.

``kill SIZE``: before each operation of rank 0, one rank or all of them are killed with SIGKILL. What had been
acknowledged is there, nothing is damaged, and the same training, run again, ends on every rank with the same bits.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from torch import distributed

import peakpoint as pp
from crashes import Counting, Operations
from peakpoint.errors import ConflictError
from peakpoint.repository import audit
from rank_scenarios import train
from ranks import in_ranks


class KillingOthers(Operations):
    """Kills processes before an operation, the own one last."""

    def __init__(self, point, victims):
        self.left, self.victims = point, victims

    def before(self, name):
        if self.left == 0:
            for victim in self.victims:
                os.kill(victim, signal.SIGKILL)
        self.left -= 1


def kill(size):
    base = Path(tempfile.mkdtemp(prefix="ranks-"))
    train(base / "warm", 0, 1, 1)  # torch imports half of itself at the first optimizer: once, not in every fork
    rules = [pp.Best("loss", "min"), pp.Last(1)]
    counting = Counting()

    def straight(rank):
        ended = train(base / "straight", rank, size, 2, keep=rules, ops=None if rank else counting)
        return [ended, counting.names]

    returned, statuses = in_ranks(size, straight)
    assert statuses == [0] * size, returned
    expected, operations = [ended for ended, _ in returned], returned[0][1]
    names = sorted(checkpoint.name for checkpoint in pp.open(base / "straight").run("r").checkpoints())
    for point in range(len(operations)):
        victim = [*range(size), "all"][point % (size + 1)]
        root = base / f"{point}"

        def cut_short(rank):
            pids = [None] * size
            distributed.all_gather_object(pids, os.getpid())
            victims = [*reversed(pids)] if victim == "all" else [pids[victim]]  # noqa: B023
            ops = None if rank else KillingOthers(point, victims)  # noqa: B023
            try:
                return train(root, rank, size, 2, keep=rules, ops=ops)  # noqa: B023
            except (ConflictError, RuntimeError) as error:  # the training's own group notices, too
                return repr(error)

        where = f"{size} ranks, {victim} killed before operation {point} ({operations[point]})"
        returned, statuses = in_ranks(size, cut_short, seconds=20)
        killed = [rank for rank in range(size) if statuses[rank] == signal.SIGKILL]
        assert killed == ([*range(size)] if victim == "all" else [victim]), (where, statuses, returned)
        if (root / "peakpoint.json").exists():
            assert not audit.audit(pp.open(root), deep=True).of_kind("damage"), where
        returned, statuses = in_ranks(size, lambda rank: train(root, rank, size, 2, keep=rules))  # noqa: B023
        assert statuses == [0] * size, (where, returned)
        for rank, ended in enumerate(returned):
            assert ended["digest"] == expected[rank]["digest"], f"{where}: other bits on rank {rank}"
        assert sorted(checkpoint.name for checkpoint in pp.open(root).run("r").checkpoints()) == names, where
        audit.clean(pp.open(root))
        assert audit.audit(pp.open(root), deep=True).clean, where
        shutil.rmtree(root)
    shutil.rmtree(base)
    print(f"{size} ranks: killed at {len(operations)} points, before every file operation of rank 0")


if __name__ == "__main__":
    kill(int(sys.argv[2]))
