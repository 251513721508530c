"""What is fuzzed: every parser of files, records and texts that somebody else may have written.

A target takes bytes. It may return, or raise an error of ``peakpoint.errors``; anything else is a find.
"""

import functools
import io
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import torch.distributed.checkpoint

from peakpoint import errors
from peakpoint.catalogue.query.parser import parse, parse_key
from peakpoint.exchange import metric_logs, pickles
from peakpoint.exchange.dcp import read_folder
from peakpoint.exchange.sources import find, read
from peakpoint.exchange.state_dicts import ReadOptions, from_dict, storable
from peakpoint.format import amounts, events, layout
from peakpoint.format.manifest import decode_manifest
from peakpoint.format.names import check_template
from peakpoint.format.sealed import decode_record, digest
from peakpoint.production import policy
from peakpoint.repository import aliases, journal, packs, refs, releases, trash, validations
from peakpoint.repository.packs.codec import unpack
from peakpoint.repository.packs.index import read_index
from peakpoint.repository.signing.bundle import decode_bundle, decode_statement
from peakpoint.rules import text as rules_text
from peakpoint.state.tensor_files import read_safetensors
from peakpoint.state.typed_json import Decoder
from peakpoint.store import MemoryStore

ALLOWED = (errors.Error,)
FOLDER = Path(tempfile.mkdtemp(prefix="peakpoint-fuzz-"))


def zipped(pickle: bytes) -> bytes:
    """A file of torch.save around a pickle, with the bytes of a few small tensors."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/byteorder", b"little")
        for number in range(8):
            archive.writestr(f"a/data/{number}", bytes(16))
        archive.writestr("a/version", b"3\n")
    return file.getvalue()


def sealed(body: bytes) -> bytes:
    """A record whose seal is right, around the bytes before it: whoever means harm can compute it."""
    return body + b',"seal":"' + digest(body)[:16].encode() + b'"}\n'


def store_with(key: str, data: bytes) -> MemoryStore:
    store = MemoryStore()
    store.put(key, [data])
    return store


def torch_file(data: bytes) -> None:
    content = pickles.load(data, where="x.pth", inert=["script.Config"])
    storable(from_dict(content, Path("x.pth"), ReadOptions()))


def dcp(data: bytes) -> None:
    folder = FOLDER / "dcp"
    if not folder.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process
            torch.distributed.checkpoint.save({"model": {"w": torch.ones(2)}, "epoch": 3}, checkpoint_id=folder)
    (folder / ".metadata").write_bytes(data)
    storable(from_dict(read_folder(folder), folder, ReadOptions()))


def safetensors(data: bytes) -> None:
    """The first two bytes are the length of the header, so that a mutation elsewhere does not break it."""
    path = FOLDER / "x.safetensors"
    path.write_bytes(data[:2] + bytes(6) + data[2:])
    read_safetensors(path)


def torch_shards(data: bytes) -> None:
    """The text that says where the pieces of the first of two files belong."""
    folder = FOLDER / "shards"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate((data.decode(errors="replace"), '{"w":{"saved_offsets":[1,0]}}'), 1):
        row = {"dtype": "U8", "shape": [1, 2], "data_offsets": [0, 2]}
        header = msgspec.json.encode({"__metadata__": {"DCP_SHARDING_INFO": text}, "w": row})
        name = f"shard-{number}-model-1-of-1.safetensors"
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + b"xy")
    [source], _ = find(folder)
    read(source, ReadOptions())


def log(suffix: str, data: bytes) -> None:
    path = FOLDER / f"log{suffix}"
    path.write_bytes(data)
    metric_logs.read(path)


def trainer_state(data: bytes) -> None:
    folder = FOLDER / "hf"
    if not folder.exists():
        folder.mkdir()
        header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
        (folder / "config.json").write_bytes(b"{}")
    (folder / "trainer_state.json").write_bytes(data)
    [source], _ = find(folder)
    read(source, ReadOptions())


def event(data: bytes) -> None:
    line = sealed(data.replace(b"\n", b""))
    events.decode(line, where="journal line 1")
    journal.read(store_with(f"{layout.journal_prefix('r')}/000001.jsonl", line + data), "r")


def alias(data: bytes) -> None:
    aliases.read(store_with(layout.alias_key("a", 1), sealed(data)), "a", 1)


def validation(data: bytes) -> None:
    validations.read(store_with(layout.validation_key("r", "c", 1), sealed(data)), "r", "c", 1)


def predictions(data: bytes) -> None:
    decode_record(validations.PredictionsRecord, sealed(data), where="x")


def release(data: bytes) -> None:
    releases.read_release(store_with(layout.release_key("x"), sealed(data)), "x")


def trashed(data: bytes) -> None:
    trash.read_trashed(store_with(layout.trashed_key("r", "c"), sealed(data)), "r", "c")


def dropped(data: bytes) -> None:
    decode_record(trash.DroppedParts, sealed(data), where="x")


def production_policy(data: bytes) -> None:
    policies = policy.read_text(data, where="production.toml", base=Path())
    for name in ("champion", "a/b"):
        policies.of(name)


def texts(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    readers: list[Callable[[str], object]] = [parse, parse_key, refs.parse_any, rules_text.parse_all, check_template]
    readers += [functools.partial(reader, "x") for reader in (amounts.read_bytes, amounts.read_duration)]
    readers += [functools.partial(reader, "x") for reader in (amounts.read_count, amounts.read_rate)]
    failures = 0
    for reader in readers:
        try:
            reader(text)
        except ALLOWED:
            failures += 1


def typed_json(data: bytes) -> None:
    try:
        tree = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return
    Decoder({"weight": torch.ones(1, 2), "bias": torch.ones(1), "w": torch.arange(4.0)}).decode(tree)


def pack_index(data: bytes) -> None:
    record = sealed(data)
    pack = bytes(1 << 16) + record + len(record).to_bytes(8, "little") + b"PEAKPACK"
    read_index(store_with(layout.pack_key("r", "c"), pack), "r", "c")


def run_archive(data: bytes) -> None:
    packs.run_archive(store_with(layout.archived_key("r"), sealed(data)), "r")


def pack_codec(data: bytes) -> None:
    methods = ("raw", "same", "plain", "delta", "trend", "plain-sparse", "trend-sparse")
    types = ("F32", "BF16", "I64", "")
    method, dtype = data[:1] or b"\0", data[1:2] or b"\0"
    bases = [bytes(range(16)), bytes(16)]
    unpack(data[2:], types[dtype[0] % len(types)], methods[method[0] % len(methods)], 16, bases)


def bundle(data: bytes) -> None:
    decode_statement(decode_bundle(data).dsse_envelope.payload)


def statement(data: bytes) -> None:
    decode_statement(data)


TARGETS: dict[str, Callable[[bytes], object]] = {
    "alias": alias,
    "bundle": bundle,
    "dcp": dcp,
    "dropped": dropped,
    "event": event,
    "log_csv": functools.partial(log, ".csv"),
    "log_json": functools.partial(log, ".json"),
    "log_jsonl": functools.partial(log, ".jsonl"),
    "manifest": lambda data: decode_manifest(sealed(data)),
    "pack_codec": pack_codec,
    "pack_index": pack_index,
    "pickle": lambda data: torch_file(zipped(data)),
    "policy": production_policy,
    "predictions": predictions,
    "release": release,
    "run_archive": run_archive,
    "safetensors": safetensors,
    "statement": statement,
    "texts": texts,
    "torch_file": torch_file,
    "torch_shards": torch_shards,
    "trainer_state": trainer_state,
    "trashed": trashed,
    "typed_json": typed_json,
    "validation": validation,
}
