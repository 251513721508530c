"""Trainings whose tensors are divided among ranks, run by tests/training/test_divided.py in an interpreter that forks.

Prints a line of JSON for each scenario: its name, and what it has returned.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import peakpoint as pp
from peakpoint.repository.audit import audit
from peakpoint.store import FileOps, LocalStore
from rank_scenarios import Full, caught, metrics
from ranks import in_ranks
from training import QuietCheckpointer


class Model(torch.nn.Module):
    """Uneven rows, tied weights, frozen ones, a buffer that is not divided."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = torch.nn.Embedding(7, 5, dtype=dtype)
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(5, 8, dtype=dtype), torch.nn.GELU(), torch.nn.Linear(8, 5, dtype=dtype)
        )
        self.norm = torch.nn.LayerNorm(5, dtype=dtype)
        self.frozen = torch.nn.Linear(5, 5, bias=False, dtype=dtype).requires_grad_(False)
        self.head = torch.nn.Linear(5, 7, bias=False, dtype=dtype)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor([1.5, 2.5]))

    def forward(self, tokens):
        hidden = self.table(tokens)
        return self.head(self.frozen(self.norm(hidden + self.inner(hidden))) * self.scale[0].to(hidden.dtype))


SHAPES = {1: (1,), 2: (2,), 3: (3,), 4: (4,)}


def divided(way, rank, dtype=torch.float32):
    """The model, divided among ranks: by FSDP2, with replicas, or with tensor parallelism besides."""
    torch.manual_seed(3)
    model = Model(dtype)
    if way == "none":
        return model
    if way in ("replicas", "tensors"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
        if way == "tensors":
            plan = {"inner.0": ColwiseParallel(), "inner.2": RowwiseParallel()}
            parallelize_module(model, mesh["second"], plan)
            mesh = mesh["first"]
    else:
        mesh = init_device_mesh("cpu", SHAPES[way])
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def size_of(way):
    return way if isinstance(way, int) else {"none": 1, "replicas": 4, "tensors": 4}[way]


def whole(value):
    tensor = value.full_tensor() if isinstance(value, DTensor) else value
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def digests(model, optimizer):
    """Of the whole tensors of a model and of its moments by the names of the parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}.{name}": value for name, value in moments.items()}
    return {name: hashlib.sha256(whole(value)).hexdigest()[:16] for name, value in sorted(tensors.items())}


@contextlib.contextmanager
def closing_caught(outcomes):
    try:
        yield
    except pp.Error as error:
        outcomes.append([type(error).__name__, str(error)])


def train(root, way, rank, steps, *, kind="foreach", dtype=torch.float32, ops=None, gradients=False, **options):
    """Train, and return the digests of what was trained."""
    warnings.simplefilter("ignore")
    model = divided(way, rank, dtype)
    flags = {kind: True} if kind != "cold" else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **flags)
    torch.manual_seed(50 + (rank // 2 if way == "tensors" else rank))  # tensor parallelism needs the same data
    state = {"model": model, "optimizer": optimizer}
    outcomes = []
    with (
        closing_caught(outcomes),
        QuietCheckpointer(LocalStore(root, ops), run="r", state=state, keep=[pp.Last(9)], **options) as ckpt,
    ):
        for _ in ckpt.steps(steps):
            tokens = torch.randint(7, (4, 3))
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
            loss.backward()
            if kind != "cold":
                optimizer.step()
            if not gradients:
                optimizer.zero_grad()
            outcomes.append(caught(lambda: ckpt.report(loss=loss.item())))  # noqa: B023
    return {"digests": digests(model, optimizer), "errors": [error for error in outcomes if error]}


def resume(root, way, rank, **options):
    """Continue on other ranks, and return the digests of what was restored."""
    warnings.simplefilter("ignore")
    model = divided(way, rank, options.pop("dtype", torch.float32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with QuietCheckpointer(root, run="r", state={"model": model, "optimizer": optimizer}, keep=[pp.Last(9)]) as ckpt:
        error = caught(ckpt.resume)
        return {"digests": digests(model, optimizer), "error": error}


def ranks(way, work):
    """Run on the ranks of a way; FSDP2 needs a group for one rank, too."""
    return in_ranks(size_of(way), work, always=way != "none")


# --- scenarios ----------------------------------------------------------------------------------------------------

WAYS = (1, 2, 3, 4, "replicas", "tensors", "none")


def saved_by_any_loaded_by_any(root):
    results = {}
    for way in WAYS:
        results[f"saved {way}"] = ranks(way, lambda rank: train(root / str(way), way, rank, 2))  # noqa: B023
        loaded = pp.load("r@last", root=root / str(way))
        results[f"shapes {way}"] = {name: list(tensor.shape) for name, tensor in loaded["model"].items()}
        for other in WAYS:
            results[f"{way} by {other}"] = ranks(other, lambda rank: resume(root / str(way), other, rank))  # noqa: B023
    return results


def kinds_of_optimizers(root):
    results = {}
    for name, options in {
        "foreach": {},
        "fused": {"kind": "fused"},
        "cold": {"kind": "cold"},
        "gradients": {"gradients": True},
        "bfloat16": {"dtype": torch.bfloat16},
        "through a buffer": {"capture_bytes": "1 MiB"},
        "without overlap": {"overlap": False},
    }.items():
        path = root / name
        dtype = options.get("dtype", torch.float32)
        results[f"{name} saved"] = in_ranks(2, lambda rank: train(path, 2, rank, 2, **options))  # noqa: B023
        results[f"{name} loaded"] = in_ranks(3, lambda rank: resume(path, 3, rank, dtype=dtype))  # noqa: B023
    return results


def goes_on_exactly(root):
    return {
        "straight": in_ranks(2, lambda rank: train(root / "a", 2, rank, 4)),
        "first": in_ranks(2, lambda rank: train(root / "b", 2, rank, 2)),
        "second": in_ranks(2, lambda rank: train(root / "b", 2, rank, 4)),
        "clean": [audit(pp.open(root / name), deep=True).clean for name in "ab"],
    }


def frozen_shards(root):
    """Adapters are trained beside frozen weights: by two ranks, again by two that resume, and by three."""

    def work(rank, size, steps):
        warnings.simplefilter("ignore")
        model = torch.nn.Sequential(torch.nn.Linear(256, 256).requires_grad_(False), torch.nn.Linear(256, 4))
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        state = {"model": model, "optimizer": optimizer}
        with QuietCheckpointer(root, run="r", state=state, keep=[pp.Last(9)]) as ckpt:
            for _ in ckpt.steps(steps):
                model(torch.randn(2, 256)).sum().backward()
                optimizer.step()
                ckpt.report()

    in_ranks(2, lambda rank: work(rank, 2, 2))
    in_ranks(2, lambda rank: work(rank, 2, 3))
    in_ranks(3, lambda rank: work(rank, 3, 4))
    files = {}
    for manifest in pp.open(root).run("r").manifests():
        folder = root / "runs" / "r" / "checkpoints" / manifest.name
        files[manifest.name] = {
            file.name: [bool(file.shared), (folder / file.name).stat().st_nlink]
            for file in manifest.files
            if file.offsets
        }
    return {"files": files, "clean": audit(pp.open(root), deep=True).clean}


def a_shard_is_damaged(root):
    results = {"first step": in_ranks(2, lambda rank: train(root / "one", 2, rank, 1))}
    for damage in ("missing", "truncated", "flipped"):
        path = root / damage
        in_ranks(2, lambda rank: train(path, 2, rank, 2))  # noqa: B023
        (file,) = path.glob("runs/r/checkpoints/step2/model+rank1.safetensors")
        data = bytearray(file.read_bytes())
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(data[:-1])
        else:
            data[-1] ^= 1
            file.write_bytes(data)
        results[damage] = [caught(lambda: dict(pp.load("r:2", root=path)["model"]))]  # noqa: B023
        results[f"{damage} resumed"] = in_ranks(2, lambda rank: resume(path, 2, rank))  # noqa: B023
    return results


def one_disk_is_full(root):
    def work(rank):
        ops = Full()
        ops.full = rank == 1
        return train(root, 2, rank, 3, ops=ops)

    results = in_ranks(2, work)
    return {"ranks": results, "saved": metrics(root), "litter": sorted(str(p) for p in root.rglob("*+rank1*"))}


def one_disk_is_full_for_a_while(root):
    """Of the three saves of three ranks the second fails on one of them."""

    def work(rank, full):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 48)
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
        ops, failures = Full(), []
        with QuietCheckpointer(
            LocalStore(root / str(full), ops), run="r", state={"model": model}, keep=[pp.Last(9)]
        ) as ckpt:
            for step in (1, 2, 3):
                with torch.no_grad():
                    model.weight.fill_(step)
                ops.full = rank == full and step == 2
                ckpt.report(step=step)
                failures.append(caught(ckpt.wait))
                ops.full = False
        return failures

    results = {}
    for full in (0, 1, 2):
        ranks = in_ranks(3, lambda rank: work(rank, full))  # noqa: B023
        place = root / str(full)
        folders = sorted(path.name for path in place.glob("runs/r/checkpoints/*"))
        weights = [pp.load(f"r/{name}", root=place)["model"]["weight"] for name in folders]
        results[full] = {
            "ranks": ranks,
            "folders": folders,
            "weights": [tensor.unique().tolist() for tensor in weights],
            "clean": audit(pp.open(place), deep=True).clean,
        }
    return results


def stages_of_a_pipeline(root):
    """Each pair of four ranks has another layer, under the same names, and then under names of its own."""

    def work(rank, names):
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
        torch.manual_seed(rank // 2)
        model = torch.nn.Sequential()
        model.add_module(names[rank // 2], torch.nn.Linear(6, 4))
        fully_shard(model, mesh=mesh["data"])
        place = root / "".join(names)

        def save():
            with QuietCheckpointer(place, run="r", state={"model": model}, keep=[pp.Last(1)]) as ckpt:
                ckpt.report(step=1)

        return caught(save)

    return {
        kind: in_ranks(4, lambda rank: work(rank, names))  # noqa: B023
        for kind, names in {"same": ("a", "a"), "own": ("a", "b")}.items()
    }


class Average:
    """A mean of weights whose state is divided as they are."""

    def __init__(self, model):
        self.mean = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def averages_beside_the_model(root):
    """In a dict, and in an object of their own: divided before and after, also by other ranks."""

    def work(rank, size, steps):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        plain = {"means": [weight.detach().clone() for weight in model.parameters()]}
        state = {"model": model, "plain": plain, "average": Average(model)}
        with QuietCheckpointer(root, run="r", state=state, keep=[pp.Last(9)]) as ckpt:
            for step in ckpt.steps(steps):
                for mean in [*plain["means"], *state["average"].mean.values()]:
                    mean.add_(1 + step)
                ckpt.report()
        means = [*plain["means"], *state["average"].mean.values()]
        return {
            "divided": all(isinstance(mean, DTensor) for mean in means),
            "values": [hashlib.sha256(whole(mean)).hexdigest()[:16] for mean in means],
        }

    return {
        "straight": in_ranks(2, lambda rank: work(rank, 2, 3)),
        "again": in_ranks(3, lambda rank: work(rank, 3, 3)),
    }


class Slow(FileOps):
    """A disk that takes seconds for each file of tensors."""

    seconds = 0.0

    def fsync(self, fd):
        if os.fstat(fd).st_size > 4096:
            time.sleep(self.seconds)
        super().fsync(fd)


def a_slow_disk(root):
    """Of one of two ranks, whose group waits for 4 seconds at most: three saves, and the training goes on."""

    def work(rank, slow):
        warnings.simplefilter("ignore")
        model = torch.nn.Linear(64, 48)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        ops = Slow()
        state, store = {"model": model}, LocalStore(root / str(slow), ops)
        waited = 0.0
        with QuietCheckpointer(store, run="r", state=state, keep=[pp.Last(9)]) as ckpt:
            ops.seconds = 5.0 if rank == slow else 0.0
            for _ in ckpt.steps(3):
                waited += ckpt.report().waited_seconds
        return waited > 4.0

    results = {}
    for slow in (0, 1):
        ranks = in_ranks(2, lambda rank: work(rank, slow), seconds=4)  # noqa: B023
        results[slow] = {"ranks": ranks, "clean": audit(pp.open(root / str(slow)), deep=True).clean}
    return results


def one_rank_cannot_save(root):
    """Something on rank 1 cannot be kept; a moment of its optimizer is gone; it has another part."""

    def begin(name, **more):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
        state = {"model": model, "optimizer": optimizer, **more}
        return optimizer, QuietCheckpointer(root / name, run="r", state=state, keep=[pp.Last(9)])

    def odd(rank):
        settings = {"key": 1}
        _, ckpt = begin("odd", settings=settings)
        if rank:
            settings["key"] = begin  # a function
        refused = caught(lambda: ckpt.report(step=1))
        settings["key"] = 1
        return [refused, caught(ckpt.close)][:1]

    def gone(rank):
        optimizer, ckpt = begin("gone")
        ckpt.report(step=1)
        ckpt.wait()
        if rank:
            del next(iter(optimizer.state.values()))["exp_avg"]
        return [caught(lambda: ckpt.report(step=2)), caught(ckpt.close)][:1]

    def another(rank):
        return [caught(lambda: begin("another", **({"more": 1} if rank else {})))]

    return {work.__name__: in_ranks(2, work) for work in (odd, gone, another)}


def refusals(root):
    def work(rank):
        warnings.simplefilter("ignore")
        model = Model()
        ckpt = QuietCheckpointer(root / "late", run="r", state={"model": model}, keep=[pp.Last(1)])
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        late = caught(lambda: ckpt.report(step=1))
        ckpt.close()
        first = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
        state = {"model": torch.nn.Sequential(first)}
        return [late, caught(lambda: QuietCheckpointer(root / "first", run="r", state=state, keep=[pp.Last(1)]))]

    return {"ranks": in_ranks(2, work), "saved": metrics(root / "late")}


SCENARIOS = {
    function.__name__: function
    for function in (
        goes_on_exactly,
        frozen_shards,
        a_shard_is_damaged,
        one_disk_is_full,
        one_disk_is_full_for_a_while,
        stages_of_a_pipeline,
        averages_beside_the_model,
        a_slow_disk,
        one_rank_cannot_save,
        refusals,
        kinds_of_optimizers,
        saved_by_any_loaded_by_any,
    )
}


if __name__ == "__main__":
    # torch imports half of itself at the first optimizer: once, not in every fork
    train(Path(tempfile.mkdtemp(prefix="ranks-")), "none", 0, 1)
    for name in sys.argv[1:] or SCENARIOS:
        print(json.dumps([name, SCENARIOS[name](Path(tempfile.mkdtemp(prefix="ranks-")))]), flush=True)
