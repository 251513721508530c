"""Ranks that are killed at file operations of their saves: run by tests/faults/test_crash_points.py.

``replicated SIZE``: before every SIZE-th operation of rank 0, one rank or all of them are killed with SIGKILL. With
``all`` as the last argument it is every operation, in minutes.
``divided SIZE``: the model is divided among the ranks, and the operations of rank 1 count as well.

What had been committed is there, nothing is damaged, and the same training, run again, ends on every rank with the same
bits.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from torch import distributed

import peakpoint as pp
import rank_scenarios
import shard_scenarios
from crashes import Counting, Operations
from peakpoint.errors import ConflictError
from peakpoint.repository import audit
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


def train_replicated(root, rank, size, ops):
    return rank_scenarios.train(root, rank, size, 2, keep=[pp.Best("loss", "min"), pp.Last(1)], ops=ops)["digest"]


def train_divided(root, rank, size, ops):
    """The loop of shard_scenarios, whose errors are those of a rank that is gone."""
    ended = shard_scenarios.train(root, size, rank, 3, ops=ops)
    for kind, text in ended["errors"]:
        raise ConflictError(f"{kind}: {text}")
    return ended["digests"]


def kill(train, size, writers, base, step):
    def straight(rank):
        counting = Counting() if rank in writers else None
        digest = train(base / "straight", rank, size, counting)
        return [digest, counting.names if counting else []]

    returned, statuses = in_ranks(size, straight)
    assert statuses == [0] * size, returned
    expected = [digest for digest, _ in returned]
    names = kept(base / "straight")
    places = [(writer, number) for writer in writers for number in range(len(returned[writer][1]))]
    missed = 0
    for turn, (writer, point) in enumerate(places[::step]):
        victim = [*range(size), "all"][turn % (size + 1)]
        root = base / f"{writer}-{point}"

        def cut_short(rank):
            pids = [None] * size
            distributed.all_gather_object(pids, os.getpid())
            own, others = pids[rank], [pid for pid in pids if pid != pids[rank]]
            victims = [*others, own] if victim == "all" else [pids[victim]]  # noqa: B023
            ops = KillingOthers(point, victims) if rank == writer else None  # noqa: B023
            try:
                return train(root, rank, size, ops)  # noqa: B023
            except (pp.Error, RuntimeError) as error:  # the training's own group notices, too
                return repr(error)

        operation = returned[writer][1][point]
        where = f"{size} ranks, {victim} killed before operation {point} ({operation}) of rank {writer}"
        results, statuses = in_ranks(size, cut_short, seconds=20)
        killed = [rank for rank in range(size) if statuses[rank] == signal.SIGKILL]
        if statuses == [0] * size:  # which of the ranks makes a directory differs, and so how many operations one has
            assert results == expected, where
            missed += 1
            shutil.rmtree(root)
            continue
        assert killed == ([*range(size)] if victim == "all" else [victim]), (where, statuses, results)
        if (root / "peakpoint.json").exists():
            assert not audit.audit(pp.open(root), deep=True).of_kind("damage"), where
        results, statuses = in_ranks(size, lambda rank: train(root, rank, size, None))  # noqa: B023
        assert statuses == [0] * size, (where, results)
        assert results == expected, f"{where}: other bits"
        assert kept(root) == names, where
        audit.clean(pp.open(root))
        assert audit.audit(pp.open(root), deep=True).clean, where
        shutil.rmtree(root)
    assert missed <= len(places[::step]) // 20, f"{missed} operations did not come"
    return len(places[::step]) - missed


def kept(root):
    return sorted(checkpoint.name for checkpoint in pp.open(root).run("r").checkpoints())


if __name__ == "__main__":
    what, ranks = sys.argv[1], int(sys.argv[2])
    place = Path(tempfile.mkdtemp(prefix="ranks-"))
    # torch imports half of itself at the first optimizer: once, not in every fork
    rank_scenarios.train(place / "warm", 0, 1, 1)
    killing = {"replicated": (train_replicated, ranks, [0]), "divided": (train_divided, ranks, [0, 1])}[what]
    every = 1 if "all" in sys.argv else 2 * ranks
    points = kill(*killing, place, every)
    shutil.rmtree(place)
    print(f"{what}, {ranks} ranks: killed at {points} points, before one in {every} of all file operations")
