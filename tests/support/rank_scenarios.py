"""Trainings of several ranks, run by tests/training/test_ranks.py in an interpreter of its own that forks.

Prints a line of JSON for each scenario: its name, and what each rank has returned, with its exit code.
"""

import errno
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import peakpoint as pp
from peakpoint.store import FileOps, LocalStore
from peakpoint.training.ranks import _FRAME, Ranks
from ranks import in_ranks
from training import QuietCheckpointer


class Noisy(Dataset):
    """Samples that know their number; reading one draws a random number, as an augmentation does."""

    def __init__(self, count=24):
        self.count, self.drawn = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if number >= self.count:
            raise IndexError(number)
        self.drawn.append(number)
        return torch.full((4,), float(number)) / self.count + 0.1 * torch.rand(4)


def mean_in_order(size, bucket):
    """Add gradients in the order of the ranks: the order of gloo follows buckets that are built anew after a step."""
    gradients = [torch.empty_like(bucket.buffer()) for _ in range(size)]
    distributed.all_gather(gradients, bucket.buffer())
    future = torch.futures.Future()
    future.set_result(sum(gradients) / size)
    return future


class Training:
    """What a script would make: every rank has its own seed, data, generator and learning rate of its noise."""

    def __init__(self, rank, size):
        torch.manual_seed(100 + rank)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.parallel = DistributedDataParallel(self.model) if size > 1 else self.model
        if size > 1:
            self.parallel.register_comm_hook(size, mean_in_order)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.noise = torch.Generator().manual_seed(rank)
        self.data = Noisy()
        sampler = DistributedSampler(self.data, num_replicas=max(size, rank + 1), rank=rank, seed=5)
        self.loader = DataLoader(self.data, batch_size=2, sampler=sampler)
        self.sampler = sampler

    @property
    def state(self):
        return {
            "model": self.parallel,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "noise": self.noise,
        }

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = (self.parallel(batch + 0.01 * torch.rand(4, generator=self.noise)) - 1).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def digest(self):
        """Weights, moments and the next numbers of all generators."""
        tensors = [*self.model.state_dict().values()]
        tensors += [value for moments in self.optimizer.state.values() for value in moments.values()]
        tensors += [torch.rand(3), torch.rand(3, generator=self.noise)]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def train(root, rank, size, epochs, *, stop_after=None, ops=None, keep=None, **options):
    """Train, with two reports in an epoch; returns the digest and the samples of the last epoch."""
    training = Training(rank, size)
    rules = [pp.Last(3)] if keep is None else keep
    drawn = None
    with QuietCheckpointer(LocalStore(root, ops), run="r", state=training.state, keep=rules, **options) as ckpt:
        for epoch in ckpt.epochs(epochs):
            training.sampler.set_epoch(epoch)
            for batch in ckpt.batches(training.loader):
                loss = training.step(batch)
                if ckpt.batch == 1:
                    ckpt.report(loss=loss)
                    if stop_after == (epoch, "inside"):
                        ckpt.wait()
                        os._exit(9)
            training.scheduler.step()
            drawn, training.data.drawn = training.data.drawn, []
            ckpt.report(loss=loss, rank=rank)
            if stop_after == (epoch, "end"):
                ckpt.wait()
                os._exit(9)
    return {"digest": training.digest(), "drawn": drawn}


def checkpointer(root, training, *, state=None, **options):
    return QuietCheckpointer(root, run="r", state=state or training.state, keep=[pp.Last(9)], **options)


def caught(work):
    """Return the kind and the text of the error of some work, None without one."""
    try:
        work()
    except pp.Error as error:
        return [type(error).__name__, str(error)]
    return None


def ignore_replicas():
    """For trainings without DistributedDataParallel, which takes time: each rank has its own weights."""
    warnings.filterwarnings("ignore", "what state")


def metrics(root):
    return [dict(checkpoint.metrics) for checkpoint in pp.open(root).run("r").checkpoints()]


# --- scenarios ----------------------------------------------------------------------------------------------------


def resumes_exactly(root):
    results = {"straight": in_ranks(2, lambda rank: train(root / "straight", rank, 2, 3))}
    for where in ((0, "inside"), (1, "end")):
        path = root / f"killed-{where[0]}"
        killed = in_ranks(2, lambda rank: train(path, rank, 2, 3, stop_after=where))  # noqa: B023
        results[f"{where[1]} killed"] = killed
        results[f"{where[1]} resumed"] = in_ranks(2, lambda rank: train(path, rank, 2, 3))  # noqa: B023
    results["names"] = sorted(pp.load("r@latest", root=root / "straight")["model"])
    results["parts"] = list(pp.load("r@latest", root=root / "straight"))
    return results


def reduces(root):
    def work(rank):
        ignore_replicas()
        warnings.filterwarnings("ignore", "a is nan")
        training = Training(rank, 1)
        with checkpointer(root, training) as ckpt:
            ckpt.report(a=1.0 + rank, step=1)
            for step, how in enumerate(("mean", "max", "min", "sum"), 2):
                ckpt.report(a=1.0 + 2 * rank, b=-float(rank), step=step, reduce=how)
            ckpt.report(a=float("nan") if rank else 5.0, step=6, reduce="max")
            other_names = caught(lambda: ckpt.report({f"a{rank}": 1.0}, step=7, reduce="sum"))
            unknown = caught(lambda: ckpt.report(a=1.0, step=7, reduce="median"))
            only_one = caught(lambda: ckpt.report(a=1.0, step=7, reduce="max" if rank else None))
        return [other_names, unknown, only_one]

    return {"ranks": in_ranks(2, work), "metrics": metrics(root)}


def stops_together(root):
    def work(rank):
        ignore_replicas()
        training = Training(rank, 1)
        stop = pp.EarlyStopping("loss", "min", patience=2)
        epochs = []
        with checkpointer(root, training, stop=stop) as ckpt:
            for epoch in ckpt.epochs(9):
                epochs.append(epoch)
                ckpt.report(loss=-epoch if rank else [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0][epoch])
            first = ckpt.why_stop
        with checkpointer(root, Training(rank, 1), stop=stop) as ckpt:
            again = list(ckpt.epochs(9))
            return [epochs, first, again, ckpt.why_stop]

    return in_ranks(2, work)


def one_is_preempted(root):
    def work(rank):
        ignore_replicas()
        training, rules = Training(rank, 1), [pp.Best("loss", "min")]
        with QuietCheckpointer(root, run="r", state=training.state, keep=rules, preempt=pp.Preempt()) as ckpt:
            for epoch in ckpt.epochs(5):
                if epoch == 1 and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                ckpt.report(loss=float(epoch))

    return {"ranks": in_ranks(2, work), "reasons": pp.open(root).run("r").checkpoints()[-1].reasons}


def names_differ(root):
    def work(rank):
        ignore_replicas()
        training = Training(rank, 1)
        return caught(lambda: pp.Checkpointer(root, run=f"r{rank}", state=training.state, keep=[pp.Last(1)]))

    return in_ranks(2, work)


def calls_differ(root):
    def work(rank):
        ignore_replicas()
        ckpt = checkpointer(root, Training(rank, 1))
        return caught(lambda: ckpt.save("why") if rank else ckpt.report(loss=1.0, step=1))

    return in_ranks(2, work)


def one_rank_fails(root):
    def work(rank):
        ignore_replicas()
        with checkpointer(root, Training(rank, 1)) as ckpt:
            failed = [caught(lambda: ckpt.report(loss="much" if rank == 1 else 1.0, step=1))]
            failed += [caught(lambda: ckpt.report(loss=1.0, step=1 + (rank == 2)))]
            ckpt.report(loss=1.0, step=2)  # they can go on
        return failed

    return {"ranks": in_ranks(3, work), "metrics": metrics(root)}


def one_rank_makes_none(root):
    def work(rank):
        return None if rank == 1 else caught(lambda: checkpointer(root, Training(rank, 1)))

    return in_ranks(3, work, seconds=3)


def one_rank_ends(root):
    def work(rank):
        ignore_replicas()
        training = Training(rank, 1)
        ckpt = checkpointer(root, training)
        ckpt.report(loss=1.0, step=1)
        if rank == 1:
            os._exit(9)
        failed = caught(lambda: ckpt.report(loss=1.0, step=2))
        return [failed, caught(ckpt.close)]

    results = in_ranks(2, work)
    return {"ranks": results, "metrics": metrics(root), "holder": pp.open(root).run("r").holder()}


def other_sizes(root):
    results = {}
    for name, stop_after in (("end", (1, "end")), ("inside", (1, "inside"))):
        path = root / name
        in_ranks(2, lambda rank: train(path, rank, 2, 3, stop_after=stop_after, keep=[pp.Last(9)]))  # noqa: B023
    for size in (1, 3):

        def resume(rank, path, size, **options):
            training = Training(rank, size)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                failed = []
                with checkpointer(path, training, **options) as ckpt:
                    failed.append(caught(ckpt.resume))
                    texts = [str(warning.message) for warning in seen]
                    next_epoch = ckpt._loop.position.next_epoch
                    inside = ckpt._loop.position.batches is not None
                    return {
                        "failed": failed[0],
                        "warned": texts,
                        "next": [next_epoch, inside],
                        "numbers": torch.rand(2).tolist(),
                        "noise": torch.rand(2, generator=training.noise).tolist(),
                        "weight": training.model[0].weight.sum().item(),
                    }

        results[f"end {size}"] = in_ranks(size, lambda rank: resume(rank, root / "end", size))  # noqa: B023
        results[f"strict {size}"] = in_ranks(size, lambda rank: resume(rank, root / "inside", size))  # noqa: B023
        results[f"loose {size}"] = in_ranks(
            size,
            lambda rank: resume(rank, root / "inside", size, strict=False),  # noqa: B023
        )
    return results


def replicas_differ(root):
    def work(rank):
        training = Training(rank, 1)  # no DistributedDataParallel
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with checkpointer(root, training) as ckpt:
                ckpt.report(loss=1.0, step=1)
                ckpt.report(loss=1.0, step=2)
        return [str(warning.message) for warning in seen]

    return in_ranks(2, work)


class Full(FileOps):
    full = False

    def write(self, fd, data):
        if self.full and len(data) > 200:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)


def a_save_fails(root):
    def work(rank):
        ignore_replicas()
        warnings.filterwarnings("ignore", "the failed save could not be recorded|the disk is full")
        training, ops = Training(rank, 1), Full()
        with checkpointer(LocalStore(root, ops), training) as ckpt:
            ckpt.report(loss=1.0, step=1)
            ckpt.wait()
            ops.full = True
            ckpt.report(loss=2.0, step=2)
            waited = caught(ckpt.wait)
            ops.full = False
            return [waited, ckpt.report(loss=3.0, step=3).saved]

    return {"ranks": in_ranks(2, work), "metrics": metrics(root)}


def other_directories(root):
    def work(rank):
        path = root / str(rank)
        for place in (root / "0", root / "1"):
            place.mkdir(parents=True, exist_ok=True)
        return caught(lambda: checkpointer(path, Training(rank, 2)))

    return in_ranks(2, work)


def the_group_ends_first(root):
    def work(rank):
        ignore_replicas()
        ckpt = checkpointer(root, Training(rank, 1))
        ckpt.report(loss=1.0, step=1)
        distributed.destroy_process_group()
        return [caught(lambda: ckpt.report(loss=1.0, step=2)), caught(ckpt.close)]

    return {"ranks": in_ranks(2, work), "metrics": metrics(root), "holder": pp.open(root).run("r").holder()}


def steps_after_its_report(root):
    def work(rank):
        training = Training(rank, 2)

        def loop(ckpt, leave):
            for _ in ckpt.epochs(3):
                training.step(torch.ones(2, 4))
                ckpt.report(loss=1.0)
                training.scheduler.step()
                if leave:
                    break

        with checkpointer(root / "end", training) as ckpt:
            at_end = caught(lambda: loop(ckpt, False))
        left = checkpointer(root / "left", training)
        loop(left, True)
        return [at_end, caught(left.close)]

    results = in_ranks(2, work)
    counts = [len(pp.open(root / name).run("r").checkpoints()) for name in ("end", "left")]
    return {"ranks": results, "counts": counts}


def messages_of_any_size(root):
    """Around the end of the first piece of a message, every size there is."""

    def work(rank):
        ranks = Ranks("r")
        sizes = [0, 1, *range(_FRAME - 200, _FRAME + 9), 3_000_000]
        shared = [ranks.share("save", lambda: bytes([rank]) * size) for size in sizes]  # noqa: B023
        led = [ranks.lead("save", lambda: b"x" * size) for size in sizes]  # noqa: B023
        ranks.close()
        expected = [[bytes([0]) * size, bytes([1]) * size] for size in sizes]
        return [shared == expected, led == [b"x" * size for size in sizes]]

    return in_ranks(2, work)


def asks_and_waits(root):
    def work(rank):
        ignore_replicas()
        training = Training(rank, 1)
        other = Training(rank, 1)
        with checkpointer(root, training) as ckpt:
            second = pp.Checkpointer(root, run="second", state=other.state, keep=[pp.Last(1)])
            outcomes = [ckpt.save("first"), ckpt.report(loss=1.0, step=1, save="too"), ckpt.save("third")]
            ckpt.wait()
            second.report(loss=2.0, step=7)
            second.close()
            return [[outcome.name, outcome.saved, list(outcome.reasons)] for outcome in outcomes]

    return {"ranks": in_ranks(2, work), "second": pp.open(root).run("second").checkpoints()[0].step}


def loads_with_workers(root):
    """Every sample once per epoch, although all ranks are killed in the middle of one."""

    def work(rank, stop_after=None):
        ignore_replicas()
        for text in ("'set_vital' is deprecated", "the random generators of the loader's worker processes"):
            warnings.filterwarnings("ignore", text)
        training = Training(rank, 1)
        sampler = DistributedSampler(range(30), num_replicas=2, rank=rank, seed=1)
        loader = StatefulDataLoader(range(30), batch_size=2, sampler=sampler, num_workers=2)
        samples = {}
        with checkpointer(root, training, state={"model": training.model, "loader": loader}) as ckpt:
            for epoch in ckpt.epochs(2):
                sampler.set_epoch(epoch)
                for batch in ckpt.batches(loader):
                    samples.setdefault(epoch, []).extend(batch.tolist())
                    ckpt.report(loss=1.0)
                    if stop_after == (epoch, ckpt.batch):
                        ckpt.wait()
                        return samples
                ckpt.report(loss=1.0)
        return samples

    def killed(rank):
        samples = work(rank, (1, 3))
        Path(root / f"{rank}.json").write_text(json.dumps(samples))
        os._exit(9)

    killed_ranks, statuses = in_ranks(2, killed)
    assert statuses == [9 << 8] * 2, killed_ranks
    before = [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {"statuses": statuses, "before": before, "after": in_ranks(2, work)}


def saves_once(root):
    """Not a scenario: makes a checkpoint of two ranks for a test."""

    def work(rank):
        ignore_replicas()
        torch.manual_seed(rank)
        model = torch.nn.Linear(2, 1)
        with QuietCheckpointer(root, run="r", state={"model": model}, keep=[pp.Last(1)]) as ckpt:
            ckpt.report(step=1)

    assert in_ranks(2, work)[1] == [0, 0]


SCENARIOS = {
    function.__name__: function
    for function in (
        resumes_exactly,
        reduces,
        stops_together,
        one_is_preempted,
        names_differ,
        calls_differ,
        one_rank_fails,
        one_rank_makes_none,
        one_rank_ends,
        other_sizes,
        replicas_differ,
        a_save_fails,
        other_directories,
        the_group_ends_first,
        steps_after_its_report,
        messages_of_any_size,
        asks_and_waits,
        loads_with_workers,
    )
}


if __name__ == "__main__":
    if "saves_once" in sys.argv:
        sys.exit(saves_once(Path(sys.argv[2])))
    # torch imports half of itself at the first optimizer: once, not in every fork
    train(Path(tempfile.mkdtemp(prefix="ranks-")), 0, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.distributed.nn
    for name in sys.argv[1:] or SCENARIOS:
        begin = time.perf_counter()
        result = SCENARIOS[name](Path(tempfile.mkdtemp(prefix="ranks-")))
        print(json.dumps([name, result]), flush=True)
        sys.stderr.write(f"{name} {time.perf_counter() - begin:.1f} s\n")
