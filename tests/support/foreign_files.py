"""Checkpoints as scripts and other tools write them, and files that mean harm."""

import argparse
import datetime as dt
import os
import pathlib
import pickle
import random
import warnings
from collections import Counter, OrderedDict

import numpy as np
import torch

from peakpoint.exchange.sources import find, read
from peakpoint.exchange.state_dicts import ReadOptions, storable


class Net(torch.nn.Module):
    """A small residual network."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        y = self.conv(x)
        return self.head((y + torch.relu(self.norm(y))).mean((2, 3)))


def objects(seed=0):
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)


def train_epoch(model, optimizer, scheduler, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 1, 4, 4)).square().sum().backward()
        optimizer.step()
    scheduler.step()


ACCURACY = [0.3, 0.5, 0.7, 0.6, 0.4]


def script(folder, epochs=5, **options):
    """A training script with a checkpoint an epoch; returns what is live at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    model, optimizer, scheduler = objects()
    args = argparse.Namespace(arch="net", optimizer="adamw", lr=0.01, out=pathlib.Path("runs/x"), seed=None)
    for epoch in range(epochs):
        train_epoch(model, optimizer, scheduler)
        torch.save(
            {
                "epoch": epoch,
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "scheduler_state_dict": scheduler.state_dict(),
                "metrics": {"val_accuracy": ACCURACY[epoch], "val": {"loss": np.float64(1 - ACCURACY[epoch])}},
                "best_acc1": torch.tensor(max(ACCURACY[: epoch + 1]), dtype=torch.float64),
                "sparsity": np.float32(0.5),
                "curve": np.arange(6, dtype=">f8").reshape(2, 3).T,
                "when": dt.datetime(2025, 3, 1, tzinfo=dt.UTC),
                "classes": Counter("aab"),
                "args": args,
            },
            # names that sort wrongly on purpose
            folder / f"e{9 - epoch}.pth",
            **options,
        )
    return model, optimizer, scheduler


def on_distributed(folder, state):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)


def read_alone(path, **options):
    """Read one checkpoint as an import does, in this process and into no run."""
    [source], _ = find(path)
    return storable(read(source, ReadOptions(**options)))[0]


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(kind, path, mark):
    """Write a file that creates ``mark`` when it is unpickled without care; returns the global to be named."""
    command = f"touch {mark}"
    weights = {"w": torch.ones(2)}
    if kind == "os.system":
        torch.save({"model": weights, "x": Call(os.system, command)}, path)
        return f"{os.system.__module__}.system"
    if kind == "eval":
        torch.save({"model": weights, "x": Call(eval, f"open({str(mark)!r}, 'w')")}, path)
        return "builtins.eval"
    if kind == "getattr":
        torch.save({"model": weights, "x": Call(getattr, Net, "mro")}, path)
        return "builtins.getattr"
    if kind == "optimizer":
        state = {"state": {0: {"exp_avg": torch.ones(2), "x": Call(os.system, command)}}, "param_groups": []}
        torch.save({"model": weights, "optimizer": state}, path)
        return f"{os.system.__module__}.system"
    if kind == "legacy":
        torch.save({"model": weights, "x": Call(os.system, command)}, path, _use_new_zipfile_serialization=False)
        return f"{os.system.__module__}.system"
    if kind == "class":
        torch.save(OrderedDict(weights, net=Net()), path)
        return "Net"
    raise AssertionError(kind)


def replace_in_pickle(path, change):
    """Rewrite the pickle of a file of torch.save, as an attacker would."""
    reader = torch._C.PyTorchFileReader(str(path))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    writer = torch._C.PyTorchFileWriter(str(path))
    records["data.pkl"] = change(records["data.pkl"])
    for name, data in records.items():
        if not name.startswith(".") and name != "version":
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def lying_dtype():
    """An array of objects whose dtype says that it holds none: NumPy would take its bytes for pointers."""
    kind = Call(np.dtype, "O8", False, True)
    kind.call = (np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
    array = Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")
    array.call = (*array.call, (1, (1,), kind, False, b"\x41" * 8))
    return array


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def generators(tool):
    """The states of the random generators, as a tool saves them."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}  # noqa: NPY002
    if tool == "accelerate":
        names = {"python": "random_state", "numpy": "numpy_random_seed", "cpu": "torch_manual_seed"}
        return {"step": 0, **{names[name]: state for name, state in states.items()}}
    return states


def with_pickle(path, data):
    """Write a file of torch.save with another pickle in it."""
    torch.save({"model": {"w": torch.ones(1)}}, path)
    replace_in_pickle(path, lambda _: data)


def bombs(folder, *, slow=False):
    """Write small files that take gigabytes, hours, or the stack of who reads them; returns paths and why."""
    weights = {"w": torch.ones(1)}
    folder.mkdir()

    def state(value, name):
        torch.save({"model": value}, folder / name)

    def dcp(name, data):
        (folder / name).mkdir()
        (folder / name / ".metadata").write_bytes(data)
        (folder / name / "__0_0.distcp").write_bytes(b"x")

    if slow:
        memoized = b"".join(b"h%ch%c\x86q%c" % (number, number, number + 1) for number in range(60))
        with_pickle(folder / "tuple_of_itself.pth", b"\x80\x02)q\x00" + memoized + b"}h\x3cK\x01s.")
        same_hash = (number * ((1 << 61) - 1) for number in range(1, 60_000))
        keys = b"".join(b"\x8a\x0c" + key.to_bytes(12, "little") + b"K\x01" for key in same_hash)
        with_pickle(folder / "same_hash.pth", b"\x80\x02}(" + keys + b"u.")
        laughs = []
        for _ in range(40):
            laughs = [laughs] * 4
        torch.save({"model": weights, "laughs": laughs}, folder / "laughs.pth")
        return {
            "tuple_of_itself.pth": "more time than a file of its size",
            "same_hash.pth": "more time than a file of its size",
            "laughs.pth": "more memory than a file of its size|more time",
        }
    with_pickle(folder / "deep_key.pth", b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")
    with_pickle(folder / "deep_value.pth", b"\x80\x02}U\x01a)" + b"\x85" * 500_000 + b"s.")
    with_pickle(folder / "long4.pth", b"\x80\x02}\x8b\xff\xff\xff\x7fK\x01s.")
    dcp("dcp_deep", b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")
    dcp("dcp_memo", b"\x80\x02K\x01r\xff\xff\xff\x7f.")
    dcp("dcp_frame", b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b".")
    dcp("dcp_text", b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b".")
    dcp("dcp_bytes", b"\x80\x04\x8e" + (1 << 35).to_bytes(8, "little") + b".")
    dcp("dcp_extension", b"\x80\x02\x82\x01.")
    state({"w": torch.ones(1).expand(2**40)}, "wide.pth")
    state({str(number): torch.ones(1).expand(2**27) for number in range(30)}, "wide_together.pth")
    torch.save({"model": weights, "x": Call(bytearray, 2**40)}, folder / "zeros.pth")
    for name, shape in {"product": (2**33, 2**33), "product_around_0": (0, 2**62, 8)}.items():
        layout = (0,) * len(shape), False, OrderedDict()
        storage = torch.ones(1).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        state({"w": Call(torch._utils._rebuild_tensor_v2, typed, 0, shape, *layout)}, f"{name}.pth")
    header = b'{"a":{"dtype":"U8","shape":[0,%d],"data_offsets":[0,0]}}' % 2**70
    (folder / "shape.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return {
        "deep_key.pth": "SIGSEGV",
        "deep_value.pth": "nested too deep",
        "long4.pth": "not enough data",
        "dcp_deep": "SIGSEGV",
        "dcp_memo": "memoizes at 2147483647",
        "dcp_frame": "cannot be built: pop from empty list",
        "dcp_text": "expected 4611686018427387904 bytes",
        "dcp_bytes": "expected 34359738368 bytes",
        "dcp_extension": "no checkpoint needs EXT1",
        "wide.pth": "would take 4398046511104",
        "wide_together.pth": "would take 16106127360",
        "zeros.pth": "cannot be built|more memory",
        "product.pth": "cannot be built",
        "product_around_0.pth": "which no memory has",
        "shape.safetensors": "its header cannot be read: Expected `int`",
    }
