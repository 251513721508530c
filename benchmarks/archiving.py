"""The archive beside zstd-19 of the concatenated files and ZipNN per file: consecutive checkpoints of a transformer.

A transformer of 0.87 million weights learns to write Python from the source of the standard library, with AdamW; twenty
checkpoints of weights and moments, fifty steps apart. Once in float32, once in bfloat16, and once in float32 with the
smaller seven tenths of the weights set to zero.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import zstandard
from torch import nn

import peakpoint as pp
from benchmarks.page import ARCHIVE, ZIPNN, ZSTD
from benchmarks.quiet import QuietCheckpointer
from peakpoint.repository import maintenance

WIDTH, LAYERS, CONTEXT, BATCH = 128, 4, 64, 16
WARM, APART, CHECKPOINTS = 300, 50, 20
KINDS = {
    "float32": (torch.float32, 0.0),
    "bfloat16": (torch.bfloat16, 0.0),
    "float32, 70 % pruned": (torch.float32, 0.7),
}


def text():
    """Source code, as bytes."""
    source = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return torch.frombuffer(bytearray(source[:4_000_000]), dtype=torch.uint8).long()


class Transformer(nn.Module):
    """Predicts the next byte."""

    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, given):
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1], dtype=self.head.weight.dtype)
        inputs = self.bytes(given) + self.places(torch.arange(given.shape[1]))
        return self.head(self.body(inputs, mask=mask, is_causal=True))


def train(root, dtype, pruned, few, tell):
    """The run with its checkpoints."""
    torch.manual_seed(0)
    data, model = text(), Transformer().to(dtype)
    warm, apart, count = (3, 1, 3) if few else (WARM, APART, CHECKPOINTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, warm + apart * count)
    weights, masks = [weight for weight in model.parameters() if weight.dim() > 1], []
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    keep = [pp.Last(count)]
    with QuietCheckpointer(root, run="r", state=state, keep=keep) as ckpt:
        for step in range(1, warm + apart * count + 1):
            places = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,))
            given = torch.stack([data[place : place + CONTEXT + 1] for place in places])
            scores = model(given[:, :-1]).float()
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), given[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                if step == warm and pruned:
                    sizes = [weight.abs() for weight in weights]
                    masks = [size > size.flatten().kthvalue(int(pruned * size.numel())).values for size in sizes]
                for weight, mask in zip(weights, masks, strict=False):
                    weight.mul_(mask)
            if step > warm and (step - warm) % apart == 0:
                ckpt.report(step=step, loss=loss.item())
                tell()
    return loss.item()


def payload(root):
    """The files of the checkpoints but for manifests, in the order of their steps."""
    checkpoints = pp.open(root).run("r").checkpoints()
    return [path for one in checkpoints for path in sorted(one.path.iterdir()) if path.name != "manifest.json"]


def digest(root):
    """Of every byte of every file."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in payload(root))).hexdigest()


def in_archive(root):
    """Bytes on the disk that stand for the files: packs, and the records beside the manifests."""
    run = Path(root) / "runs" / "r"
    return sum(path.stat().st_size for path in [run / "archived.json", *(run / "archive").iterdir()])


def ours(root, repeats):
    """Archive and restore, comparing bits."""
    run, before, packing, unpacking = pp.open(root).run("r"), digest(root), [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        maintenance.archive(run)
        packing.append(time.perf_counter() - begin)
        size = in_archive(root)
        begin = time.perf_counter()
        maintenance.restore(run)
        unpacking.append(time.perf_counter() - begin)
        assert digest(root) == before, "restored bits differ"
    return {"size": size, "pack": packing, "unpack": unpacking}


def zstd(paths):
    """One frame of everything."""
    data = b"".join(path.read_bytes() for path in paths)
    begin = time.perf_counter()
    packed = zstandard.ZstdCompressor(level=19, threads=-1).compress(data)
    middle = time.perf_counter()
    assert zstandard.ZstdDecompressor().decompress(packed) == data
    return {"size": len(packed), "pack": [middle - begin], "unpack": [time.perf_counter() - middle]}


def one_zip_nn(path, name):
    """Size, seconds in and seconds out of one file."""
    import zipnn  # noqa: PLC0415 - built from source: only this figure needs it

    data = Path(path).read_bytes()
    begin = time.perf_counter()
    packed = zipnn.ZipNN(bytearray_dtype=name, threads=os.cpu_count()).compress(bytearray(data))
    middle = time.perf_counter()
    back = zipnn.ZipNN(bytearray_dtype=name, threads=os.cpu_count()).decompress(bytes(packed))
    end = time.perf_counter()
    assert bytes(back) == data
    return len(packed), middle - begin, end - middle


def zip_nn(paths, dtype):
    """Every file on its own, in a process of its own.

    ZipNN 0.5.4 corrupts the heap when it is called often or given text; state.json is packed with zstd-19 in its place.
    """
    name = str(dtype).removeprefix("torch.")
    done = []
    for path in paths:
        if path.suffix == ".json":
            one = zstd([path])
            done.append((one["size"], one["pack"][0], one["unpack"][0]))
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.archiving", str(path), name]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        done.append(json.loads(ran.stdout.splitlines()[-1]))
    size, packing, unpacking = map(sum, zip(*done, strict=True))
    return {"size": size, "pack": [packing], "unpack": [unpacking]}


def measure(place, scale, repeats, tell):
    """Sizes and seconds of every side, for every kind of weights."""
    found = []
    for number, (kind, (dtype, pruned)) in enumerate(KINDS.items()):
        root = place / str(number)
        loss = train(root, dtype, pruned, scale < 1, tell)
        paths = payload(root)
        size = sum(path.stat().st_size for path in paths)
        sides = {ZSTD: zstd(paths), ZIPNN: zip_nn(paths, dtype), ARCHIVE: ours(root, min(3, repeats))}
        checkpoints = len(pp.open(root).run("r").checkpoints())
        found.append({"kind": kind, "loss": loss, "checkpoints": checkpoints, "bytes": size, "sides": sides})
    return found


if __name__ == "__main__":
    print(json.dumps(one_zip_nn(*sys.argv[1:])))
