"""Pickles and folders that mean harm: they mislead nobody, and tensors hold the bytes of their file only."""

import io
import os
import pickle
import pickletools
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path, PosixPath

import pytest
import torch

import peakpoint as pp
from foreign_files import Call, on_distributed, replace_in_pickle, with_pickle
from peakpoint.exchange import dcp, inspection, pickles, sources
from peakpoint.exchange.state_dicts import ReadOptions

LEGACY = {"_use_new_zipfile_serialization": False}


def loaded(content, path, **options):
    torch.save(content, path, **options)
    return pickles.load(path)


def folder_with(metadata, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").write_bytes(metadata)
    return tmp_path / "folder"


@pytest.mark.parametrize("state", [b"N}U\x06parentK\x01s\x86", b"}U\x06parentK\x01s"], ids=["slots", "attributes"])
def test_metadata_sets_no_attribute_of_a_class(state, tmp_path):
    """Python's unpickler does: with ``parent`` of all paths, a file says where everything is written."""
    data = b"\x80\x02cpathlib\nPosixPath\n" + state + b"b."
    parent = PosixPath.parent
    with pytest.raises(pp.errors.CorruptError, match="a state for an object that has none"):
        dcp.read_folder(folder_with(data, tmp_path))
    assert PosixPath.parent is parent


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01a\x85R.", "names posix.system, which does not belong there"),
        (b"\x80\x02cposix\nsystem\nU\x01a\x85R.", "names posix.system, which does not belong there"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "names builtins.eval"),
        (b"\x80\x04\x8c\x07pathlib\x8c\x09Path.home\x93)R.", "names pathlib.Path.home"),
        (b"\x80\x04K\x01K\x02\x93.", "a name that is no text"),
        (b"(iposix\nsystem\n.", "no checkpoint needs INST"),
        (b"(cposix\nsystem\no.", "names posix.system"),
        (b"\x80\x02Ppid\n.", "no checkpoint needs PERSID"),
        (b"\x80\x02U\x07storageU\x01a\x86Q.", "refers to something outside"),
        (b"\x80\x02\x82\x01.", "unregistered extension|no checkpoint needs EXT1"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "a call of something that is no function"),
        (b"\x80\x02ctorch\nfloat32\n}b.", "a state for an object that has none"),
        (b"\x80\x02ctorch\nSize\n)}\x92.", "no checkpoint needs NEWOBJ_EX"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02a.", "damaged"),
        (b"\x80\x02N.", "is not metadata"),
    ],
    ids=repr,
)
def test_metadata_does_nothing_but_describe(data, words, tmp_path):
    with pytest.raises((pp.errors.FormatError, pp.errors.CorruptError), match=words):
        dcp.read_folder(folder_with(data, tmp_path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_honest_metadata_of_every_protocol_is_read(protocol, tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    on_distributed(tmp_path / "d", {"model": {"w": tensor}, "epoch": 3})
    path = tmp_path / "d" / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
    content = dcp.read_folder(tmp_path / "d")
    assert torch.equal(content["model"]["w"], tensor)
    assert content["epoch"] == 3


def change_metadata(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def in_chunks(folder, *places):
    """Write a tensor of four rows as chunks of the first two, which lie at the given rows."""
    on_distributed(folder, {"w": torch.ones(2, 3)})

    def change(metadata):
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        entry = metadata.state_dict_metadata["w"]
        [(index, info)] = [(index, info) for index, info in metadata.storage_data.items() if index.fqn == "w"]
        del metadata.storage_data[index]
        entry.size = torch.Size((4, 3))
        entry.chunks = [ChunkStorageMetadata(offsets=torch.Size(place), sizes=torch.Size((2, 3))) for place in places]
        for place in places:
            metadata.storage_data[MetadataIndex("w", torch.Size(place))] = info

    change_metadata(folder, change)


def test_chunks_cover_a_tensor(tmp_path):
    in_chunks(tmp_path / "d", (0, 0), (2, 0))
    assert torch.equal(dcp.read_folder(tmp_path / "d")["w"], torch.ones(4, 3))


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (((0, 0), (0, 0)), "chunks of 'w' overlap"),  # what no chunk covers would be what memory was before
        (((1, 0), (0, 0)), "chunks of 'w' overlap"),
        (((0, 0), (3, 0)), "is not within its shape"),
        (((0, 0), (2, 1)), "is not within its shape"),
        (((0, 0), (-2, 0)), "is not within its shape"),
        (((0, 0),), "has 6 of 12 elements"),
    ],
)
def test_chunks_that_do_not_cover_a_tensor_are_refused(places, words, tmp_path):
    in_chunks(tmp_path / "d", *places)
    with pytest.raises(pp.errors.CorruptError, match=words):
        dcp.read_folder(tmp_path / "d")


@pytest.mark.parametrize("name", ["../outside.distcp", "beside.pt", "/etc/passwd", ".", ""])
def test_metadata_leads_to_pieces_of_its_folder_only(name, tmp_path):
    on_distributed(tmp_path / "d", {"w": torch.ones(2, 3)})
    [piece] = (tmp_path / "d").glob("*.distcp")
    for copy in (tmp_path / "outside.distcp", tmp_path / "d" / "beside.pt"):
        copy.write_bytes(piece.read_bytes())

    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = name

    change_metadata(tmp_path / "d", change)
    with pytest.raises(pp.errors.CorruptError, match=rf"lists {re.escape(repr(name))}, which is not beside it"):
        dcp.read_folder(tmp_path / "d")


# --- files of torch.save ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
def test_bytes_come_back(options, tmp_path):
    values = {"empty": b"", "some": b"a\xff\x00", "changeable": bytearray(b"a\xff"), "none": bytearray()}
    assert loaded(values, tmp_path / "x.pth", **options) == values


def test_no_module_of_an_encoding_is_imported(tmp_path):
    sys.modules.pop("encodings.punycode", None)
    with pytest.raises(pp.errors.CorruptError):
        loaded({"x": Call(bytearray, "abc", "punycode")}, tmp_path / "x.pth")
    with_pickle(tmp_path / "y.pth", b"\x80\x02c_codecs\nencode\nU\x01aU\x08punycode\x86R.")
    with pytest.raises(pp.errors.CorruptError):
        pickles.load(tmp_path / "y.pth")
    assert "encodings.punycode" not in sys.modules


def test_attributes_of_a_parameter_take_no_method_s_place(tmp_path):
    shadows = {"numel": torch.Size, "detach": torch.Size, "data": torch.zeros(1), "__class__": torch.Tensor}
    call = Call(torch._utils._rebuild_parameter_with_state, torch.ones(1), True, OrderedDict(), shadows)
    parameter = loaded({"w": call}, tmp_path / "x.pth")["w"]
    assert type(parameter) is torch.nn.Parameter
    assert vars(parameter) == {}
    assert parameter.numel() == 1
    assert torch.equal(parameter.detach(), torch.ones(1))


def test_attributes_of_a_dict_take_no_method_s_place(tmp_path):
    call = Call(OrderedDict)
    call.call = (OrderedDict, (), {"items": 3, "keys": 3, "_metadata": 4}, None, iter({"w": 1}.items()))
    value = loaded({"x": call}, tmp_path / "x.pth")["x"]
    assert vars(value) == {"_metadata": 4}
    assert dict(value.items()) == {"w": 1}


@pytest.mark.parametrize("value", [3, [torch.ones(1)], Counter("a")], ids=repr)
def test_a_parameter_of_no_tensor_is_refused(value, tmp_path):
    with pytest.raises(pp.errors.CorruptError):
        loaded({"w": Call(torch._utils._rebuild_parameter, value, True, OrderedDict())}, tmp_path / "x.pth")


def typed(tensor):
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (4, (1,), (1,)),
        (1, (2, 2), (2, 1)),
        (-1, (4,), (1,)),
        (3, (4,), (-1,)),
        (0, (4,), (-10,)),
        (0, (-4,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2**62, 4), (2**62, 1)),
        (2**62, (2,), (2**62,)),
        (1, (3,), (2**63 - 1,)),
    ],
    ids=repr,
)
def test_a_tensor_stays_within_its_storage(offset, shape, stride, options, tmp_path):
    def call(*place):
        return {"w": Call(torch._utils._rebuild_tensor_v2, typed(torch.ones(4)), *place, False, OrderedDict())}

    assert torch.equal(loaded(call(1, (3,), (1,)), tmp_path / "good.pth", **options)["w"], torch.ones(3))
    with pytest.raises(pp.errors.CorruptError):
        loaded(call(offset, shape, stride), tmp_path / "x.pth", **options)


def test_a_storage_stays_within_its_record(tmp_path):
    """Behind it are other records of the same archive, which are no weights."""
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(4)}, path)
    replace_in_pickle(path, lambda data: data.replace(b"K\x04tq", b"K\x05tq").replace(b"K\x04\x85", b"K\x05\x85"))
    for source in (path, path.read_bytes()):
        with pytest.raises(pp.errors.CorruptError):
            pickles.load(source, where="x.pth")


def pickles_of(data):
    """The pickles at the beginning of a file of the format before torch 1.6, and the bytes behind them."""
    stream = io.BytesIO(data)
    parts = []
    for _ in range(5):
        begin = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[begin : stream.tell()])
    return parts, data[stream.tell() :]


@pytest.mark.parametrize("keys", [[], ["other"], "twice", 3, [3]], ids=repr)
def test_every_storage_of_the_old_format_is_filled(keys, tmp_path):
    """Otherwise the tensor holds what the memory of the process held before."""
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(4)}, path, **LEGACY)
    parts, behind = pickles_of(path.read_bytes())
    [key] = pickle.loads(parts[-1])
    keys = [key, key] if keys == "twice" else keys
    path.write_bytes(b"".join(parts[:-1]) + pickle.dumps(keys, 2) + behind * 2)
    with pytest.raises(pp.errors.CorruptError):
        pickles.load(path)
    path.write_bytes(b"".join(parts[:-1]) + pickle.dumps([key], 2) + behind)
    assert torch.equal(pickles.load(path)["w"], torch.ones(4))


def repacked(path, names, **options):
    """Pack an archive again, with other names of its files."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in contents.items():
            for new_name in names(name):
                archive.writestr(new_name, content)


def test_a_compressed_archive_is_refused(tmp_path):
    """Its tensors are mapped, and would be the compressed bytes."""
    path = tmp_path / "x.pth"
    torch.save({"w": torch.randint(256, (1000,), dtype=torch.uint8)}, path)  # which no compression makes smaller
    repacked(path, lambda name: [name], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(pp.errors.FormatError, match="compressed archive"):
        pickles.load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_of_an_archive_are_one_each(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(4)}, path)
    repacked(path, lambda name: [name])
    assert torch.equal(pickles.load(path)["w"], torch.ones(4))
    repacked(path, lambda name: [name, name] if name.endswith("data/0") else [name])
    with pytest.raises(pp.errors.FormatError, match="two files of one name"):
        pickles.load(path)
    torch.save({"w": torch.ones(4)}, path)
    repacked(path, lambda name: [name, "../../outside", "/etc/outside"] if name.endswith("data/0") else [name])
    assert torch.equal(pickles.load(path)["w"], torch.ones(4))
    assert not list(Path(tmp_path).rglob("outside"))


# --- folders ------------------------------------------------------------------------------------------------------


def test_pipes_devices_and_broken_links_are_not_opened(tmp_path):
    """Who opens a pipe waits for ever; a device has no end."""
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"model": {"w": torch.ones(1)}}, folder / "honest.pth")
    os.mkfifo(folder / "pipe.pth")
    os.mkfifo(folder / "pipe.safetensors")
    os.mkfifo(folder / ".metadata")
    (folder / "zero.pth").symlink_to("/dev/zero")
    (folder / "broken.pth").symlink_to(tmp_path / "nothing")
    (folder / "circle.pth").symlink_to(folder / "circle.pth")
    found, others = sources.find(folder)
    assert [source.path.name for source in found] == ["honest.pth"]
    names = {"pipe.pth", "pipe.safetensors", ".metadata", "zero.pth", "broken.pth", "circle.pth"}
    assert {path.name for path in others} == names
    for name in ("pipe.pth", "zero.pth"):
        with pytest.raises(pp.errors.FormatError, match=f"{name} is neither a file nor a folder"):
            sources.find(folder / name)
        with pytest.raises(pp.errors.FormatError, match=f"{name} is neither a file nor a folder"):
            pp.import_checkpoints(folder / "honest.pth", tmp_path / "root", run="r", metrics=folder / name)
    with pytest.raises(pp.errors.FormatError, match=r"pipe\.pth is neither a file nor a folder"):
        inspection.log_source(folder.rename(tmp_path / "logs"))
    assert not (tmp_path / "root").exists()


def test_a_link_to_a_file_is_the_file(tmp_path):
    """Caches of Hugging Face consist of links."""
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "blob")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.pth").symlink_to(tmp_path / "blob")
    [source], _ = sources.find(tmp_path / "folder")
    assert torch.equal(sources.read(source, ReadOptions()).parts["model"]["w"], torch.ones(1))


def test_a_file_that_comes_after_the_inspection_is_not_read(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    [source], _ = sources.find(folder)
    assert sources.read(source, ReadOptions()).parts.keys() == {"model"}
    with_pickle(folder / "optimizer.pt", b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.")
    with pytest.raises(pp.errors.CorruptError, match="changed during the import"):
        sources.read(source, ReadOptions())


def test_a_file_in_place_of_another_is_noticed_whatever_its_time_says(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.ones(1)}}, path)
    [source], _ = sources.find(path)
    before, times = source.stamp(), path.stat()
    torch.save({"model": {"w": torch.zeros(1)}}, path)
    while path.stat().st_ctime_ns == times.st_ctime_ns:  # its clock has steps of milliseconds
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert source.stamp() != before
