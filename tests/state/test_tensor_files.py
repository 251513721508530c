"""Tensors: every bit comes back, other tools read the same, shared memory is shared again and stored once."""

import json
import math
import warnings
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as safe_load
from safetensors.torch import load_file

from peakpoint.errors import ConfigError, FormatError
from peakpoint.format.manifest import FileRecord, TensorRecord
from peakpoint.repository.commit import file_record
from peakpoint.state.shared_storage import DTYPES
from peakpoint.state.tensor_files import PAGE, StagingBuffer, lay_out, tensors_of
from peakpoint.state.typed_json import Decoder, Encoder

ALL = sorted(DTYPES, key=str)
FILE = "part.safetensors"


def octets(tensor):
    """The logical values as bytes, whatever the layout in memory."""
    packed = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return packed.flatten().view(torch.uint8).numpy().tobytes()


def of_bytes(data, dtype, shape=None):
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat if shape is None else flat.reshape(shape)


def all_bits(dtype, count=512):
    """Values that use every bit pattern of a byte; booleans can only be 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).to(torch.bool)
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype)


def encode(value):
    encoder = Encoder()
    tree = msgspec.json.decode(msgspec.json.encode(encoder.encode(value, 'state["x"]')))
    return tree, encoder.tensors


def image_of(tensors, staging=None):
    (image,) = (staging or StagingBuffer()).fill({FILE: tensors})
    return image


def read(image):
    return tensors_of(file_record(image), memoryview(bytearray(image.data)))


def round_trip(value):
    """Tree and tensors, through the bytes of the file."""
    tree, tensors = encode(value)
    return Decoder(read(image_of(tensors)) if tensors else {}).decode(tree)


def header_of(image):
    size = int.from_bytes(image.data[:8], "little")
    return json.loads(bytes(image.data[8 : 8 + size]))


def assert_same(a, b):
    assert type(a) is type(b)
    assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
    assert octets(a) == octets(b)


# --- element types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_every_element_type_bit_for_bit(dtype):
    tensor = all_bits(dtype)
    given_ = {"flat": tensor, "matrix": tensor.clone().reshape(16, 32), "scalar": tensor[3].clone()}
    back = round_trip(given_)
    for name, value in given_.items():
        assert_same(value, back[name])


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_the_stock_library_reads_the_same(dtype, tmp_path):
    tensor = all_bits(dtype)
    tensors = {
        "flat": tensor,
        "matrix": tensor.clone().reshape(32, 16),
        "scalar": tensor[0].clone(),
        "transposed": tensor.clone().reshape(32, 16).t(),
        "empty": tensor[:0].clone(),
        "ünïcode ☃ 'quoted' \"twice\"": tensor[:3].clone(),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    path = tmp_path / FILE
    path.write_bytes(image_of(tensors).data)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    for name, value in tensors.items():
        assert_same(value.contiguous(), theirs[name])
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt", "written_by": "peakpoint"}
        for name, value in tensors.items():
            assert_same(value.contiguous(), file.get_tensor(name))
        assert octets(file.get_slice("matrix")[2:4]) == octets(tensors["matrix"][2:4])


# Which types exist depends on torch; each is either kept or refused by its name.
EVERY_DTYPE = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
OTHERS = sorted(EVERY_DTYPE - DTYPES.keys(), key=str)
QUANTIZED = {"torch.quint8", "torch.qint8", "torch.qint32", "torch.quint4x2", "torch.quint2x4"}


def test_the_kept_types_are_those_of_the_stock_library():
    from safetensors.torch import _TYPES

    assert {name: dtype for dtype, name in DTYPES.items()} == _TYPES
    assert OTHERS


@pytest.mark.parametrize("dtype", [dtype for dtype in OTHERS if str(dtype) not in QUANTIZED], ids=str)
def test_every_other_element_type_is_refused_by_name(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are experimental
        tensor = torch.empty(4, dtype=dtype)
    with pytest.raises(ConfigError) as caught:
        encode({"moments": tensor})
    assert str(caught.value).startswith('state["x"]["moments"] is a torch.Tensor: ')
    assert str(dtype) in str(caught.value)


# --- shapes and layouts -------------------------------------------------------------------------------------------

BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
LAYOUTS = {
    "0-d": torch.tensor(1.5),
    "empty": torch.empty(0),
    "empty 3d": torch.empty(2, 0, 3, dtype=torch.int64),
    "transposed": BASE.transpose(0, 3),
    "permuted": BASE.permute(2, 0, 3, 1),
    "step": BASE[:, :, ::2],
    "step last": BASE[..., ::3],
    "row": BASE[1, 2],
    "column": BASE[..., 2],
    "expanded": torch.tensor([1.0, 2.0]).reshape(2, 1).expand(2, 1000),
    "expanded scalar": torch.tensor(3.0).expand(4, 5),
    "channels last": BASE.contiguous(memory_format=torch.channels_last),
    "channels last 3d": torch.rand(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    "conjugate": torch.tensor([1 + 2j, -0.0 - 3j], dtype=torch.complex64).conj(),
    "imaginary part of a conjugate": torch.tensor([1 + 2j, 5 - 3j], dtype=torch.complex64).conj().imag,
    "real part": torch.tensor([1 + 2j, 5 - 3j], dtype=torch.complex64).real,
    "diagonal": torch.arange(9.0).reshape(3, 3).diagonal(),
    "overlapping windows": torch.arange(6.0).unfold(0, 3, 1),
    "one element": torch.ones(1, 1, 1).expand(1, 1, 1).transpose(0, 2),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tensor):
    before = octets(tensor)
    back = round_trip({"w": tensor})["w"]
    assert back.shape == tensor.shape
    assert back.dtype == tensor.dtype
    assert octets(back) == before
    assert not back.is_conj()
    assert not back.is_neg()


@pytest.mark.parametrize("name", ["channels last", "channels last 3d", "transposed", "permuted"])
def test_dense_layouts_come_back_with_their_strides(name):
    tensor = LAYOUTS[name]
    back = round_trip({"w": tensor})["w"]
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_channels_last_is_channels_last_again():
    back = round_trip({"w": LAYOUTS["channels last"]})["w"]
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert not back.is_contiguous()


@pytest.mark.parametrize("name", ["expanded", "step", "row", "overlapping windows"])
def test_a_view_alone_stores_its_own_elements_only(name):
    tensor = LAYOUTS[name]
    _, tensors = encode({"w": tensor})
    image = image_of(tensors)
    assert len(image.data) - image.header == tensor.numel() * tensor.element_size()


def test_a_small_slice_does_not_store_the_large_tensor_below_it():
    large = torch.zeros(10_000_000)
    _, tensors = encode({"w": large[5:8], "b": large[100:100]})
    image = image_of(tensors)
    assert len(image.data) - image.header == 12


# --- classes ------------------------------------------------------------------------------------------------------


def test_requires_grad_and_classes():
    given_ = {
        "plain": torch.ones(2),
        "wants": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "transient": torch.nn.Buffer(torch.ones(2), persistent=False),
        "computed": torch.ones(2, requires_grad=True) * 2,
    }
    back = round_trip(given_)
    for name, value in given_.items():
        assert_same(value, back[name])
        assert back[name].is_leaf
        assert isinstance(back[name], torch.nn.Buffer) == isinstance(value, torch.nn.Buffer)
    assert type(back["frozen"]) is torch.nn.Parameter
    assert [back[name].persistent for name in ("buffer", "transient")] == [True, False]
    back["wants"].sum().backward()
    assert torch.equal(back["wants"].grad, torch.ones(2))


def test_encoding_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    given_ = {"w": parameter, "view": parameter.detach()[1:]}
    before = [(t.data_ptr(), t.requires_grad, octets(t), t._version) for t in given_.values()]
    image_of(encode(given_)[1])
    assert [(t.data_ptr(), t.requires_grad, octets(t), t._version) for t in given_.values()] == before
    assert parameter.grad is not None


# --- shared memory ------------------------------------------------------------------------------------------------


def test_tied_tensors_are_stored_once_and_tied_again():
    weight = torch.nn.Parameter(torch.randn(100, 100))
    given_ = {"embedding": weight, "head": weight, "deep": [{"again": weight.detach()}], "view": weight.view(100, 100)}
    tree, tensors = encode(given_)
    assert list(tensors) == ["embedding"]
    image = image_of(tensors)
    assert len(image.data) - image.header == 100 * 100 * 4
    back = Decoder(read(image)).decode(tree)
    assert {t.data_ptr() for t in (back["embedding"], back["head"], back["deep"][0]["again"], back["view"])} == {
        back["embedding"].data_ptr()
    }
    assert [type(back[name]) for name in ("embedding", "head")] == [torch.nn.Parameter] * 2
    with torch.no_grad():
        back["head"].fill_(7)
    assert torch.equal(back["embedding"].detach(), torch.full((100, 100), 7.0))


def test_tied_weights_of_a_module():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 7)
            self.head = torch.nn.Linear(7, 11, bias=False)
            self.head.weight = self.embedding.weight

    given_ = Tied().state_dict()
    tree, tensors = encode(given_)
    assert len(tensors) == 1
    back = Decoder(read(image_of(tensors))).decode(tree)
    assert list(back) == list(given_)
    assert back["embedding.weight"].data_ptr() == back["head.weight"].data_ptr()


def test_tied_in_another_layout():
    weight = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    back = round_trip({"a": weight, "b": weight})
    assert back["a"].data_ptr() == back["b"].data_ptr()
    assert back["a"].stride() == back["b"].stride() == weight.stride()
    assert torch.equal(back["a"], weight)


SHARED = {
    "base covers": lambda s: {"part": s[2:5], "base": s, "rows": s.view(2, 5), "transposed": s.view(2, 5).t()},
    "base comes last": lambda s: {"a": s[:3], "b": s[1:9:2], "base": s},
    "base of two": lambda s: {"base": s[:6], "inside": s[2:4], "apart": s[7:]},
    "nobody covers": lambda s: {"low": s[:6], "high": s[4:]},
    "nobody covers, from the middle": lambda s: {"low": s[3:6], "high": s[5:9]},
    "interleaved": lambda s: {"even": s[::2], "odd": s[1::2]},
    "chain": lambda s: {"a": s[0:4], "b": s[3:7], "c": s[6:10]},
    "expanded": lambda s: {"wide": s[3:4].expand(5), "base": s[2:8]},
    "transposed only": lambda s: {"a": s[:8].view(2, 4).t(), "b": s[:4]},
    "other type": lambda s: {"base": s, "bits": s.view(torch.int32)},
    "smaller type": lambda s: {"octets": s.view(torch.uint8)[3:9], "base": s},
    "larger type": lambda s: {"base": s, "wide": s.view(torch.float64)[1:3]},
    "larger type, odd end": lambda s: {"number": s[:1], "octets": s.view(torch.uint8)[2:7]},
    "larger type, odd begin": lambda s: {"octets": s.view(torch.uint8)[11:23], "number": s[3:5]},
    "parameter and view": lambda s: {"w": torch.nn.Parameter(s), "first": s[:1]},
    "complex parts": lambda s: {"z": torch.view_as_complex(s.view(5, 2)), "real": s[::2], "all": s},
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_views_share_memory_again(make):
    """Writing through one shows in the others exactly as it did before."""
    given_ = make(torch.arange(10, dtype=torch.float32))
    # something before it in the file that leaves it at an odd place, and something of a like name
    extra = {"x": torch.ones(3, dtype=torch.uint8), f"{next(iter(given_))}.storage": torch.full((3,), 9.0)}
    back = round_trip({**extra, **given_})
    for name, value in {**extra, **given_}.items():
        assert_same(value, back[name])
        assert back[name].data_ptr() % value.element_size() == 0
    for written in given_:
        if 0 in given_[written].stride():
            continue
        with torch.no_grad():
            for number, pair in enumerate(zip(given_.items(), (back[name] for name in given_), strict=True)):
                (name, mine), theirs = pair
                if name == written:
                    mine.copy_(mine + 3 + number)
                    theirs.copy_(theirs + 3 + number)
        for name, value in given_.items():
            assert octets(value) == octets(back[name]), f"{name} after writing {written}"
    for name, value in extra.items():
        assert_same(value, back[name])


def test_overlapping_views_are_stored_once():
    base = torch.arange(1000.0)
    _, tensors = encode({"low": base[:600], "high": base[400:]})
    image = image_of(tensors)
    assert len(image.data) - image.header == 4000
    _, tensors = encode({"part": base[5:10], "base": base})
    assert list(tensors) == ["base"]


def test_slices_that_do_not_overlap_are_stored_apart_without_extra_bytes():
    base = torch.arange(1000.0)
    given_ = {"a": base[10:20], "b": base[20:25], "c": base[900:]}
    tree, tensors = encode(given_)
    assert list(tensors) == ["a", "b", "c"]
    image = image_of(tensors)
    assert len(image.data) - image.header == 4 * (10 + 5 + 100)
    back = Decoder(read(image)).decode(tree)
    back["a"].fill_(0)
    assert torch.equal(back["b"], base[20:25])


def test_a_name_like_that_of_shared_memory_is_not_taken():
    """The bytes below overlapping views need a name in the file; a tensor of the user's may have it already."""
    base = torch.arange(10.0)
    for given_ in (
        {"a": base[:6], "b": base[3:9], "a.storage": torch.full((3,), 5.0)},
        {"a.storage": torch.full((3,), 5.0), "a": base[:6], "b": base[3:9], "a": base[:6], "a.storage~2": base + 1},  # noqa: F601
    ):
        back = round_trip(given_)
        for name, value in given_.items():
            assert_same(value, back[name])


def test_numpy_arrays_of_one_memory():
    """``from_numpy`` makes a storage for each slice; those that begin at the same byte are of different sizes."""
    array = np.arange(10.0)
    given_ = {"short": torch.from_numpy(array[:6]), "even": torch.from_numpy(array)[::2]}
    back = round_trip(given_)
    for name, value in given_.items():
        assert_same(value, back[name])
    back["short"][2] = 100
    assert back["even"][1] == 100


def test_a_lazy_conjugate_beside_its_tensor_is_refused():
    tensor = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ConfigError, match=r"'conj' is a lazy conjugate of another tensor in the state; \.clone\(\) it"):
        encode({"w": tensor, "conj": tensor.conj()})
    assert_same(round_trip({"w": tensor, "conj": tensor.conj().clone()})["w"], tensor)


def test_empty_tensors_are_not_tied():
    back = round_trip({"a": torch.empty(0), "b": torch.empty(0, 5), "c": torch.empty(0, dtype=torch.int8)})
    assert [tuple(t.shape) for t in back.values()] == [(0,), (0, 5), (0,)]
    assert back["c"].dtype == torch.int8


# --- the file -----------------------------------------------------------------------------------------------------


def mixed():
    return {
        "bool": torch.ones(3, dtype=torch.bool),
        "half": torch.ones(5, dtype=torch.float16),
        "f8": torch.ones(7, dtype=torch.float8_e5m2),
        "double": torch.ones(1, dtype=torch.float64),
        "float": torch.ones(3, 3),
        "none": torch.empty(0, 2),
        "complex": torch.ones(1, dtype=torch.complex64),
        "scalar": torch.tensor(3, dtype=torch.int16),
    }


def test_data_begins_on_a_page_and_tensors_on_their_element():
    tensors = mixed()
    image = image_of(tensors)
    header = header_of(image)
    assert image.header % PAGE == 0
    assert image.header == 8 + int.from_bytes(image.data[:8], "little")
    assert bytes(image.data[8 : image.header]).rstrip(b" ").endswith(b"}")
    position = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        assert begin == position, "no holes: the stock library refuses them"
        assert begin % tensors[name].element_size() == 0
        assert end - begin == tensors[name].numel() * tensors[name].element_size()
        assert entry["shape"] == list(tensors[name].shape)
        position = end
    assert image.header + position == len(image.data)
    assert [(s.name, s.begin, s.end) for s in image.spans] == [
        (name, *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"
    ]


def test_a_header_longer_than_a_page(tmp_path):
    tensors = {f"{'long name ' * 20}{i}": torch.tensor(i) for i in range(100)}
    image = image_of(tensors)
    assert image.header > PAGE
    assert image.header % PAGE == 0
    path = tmp_path / FILE
    path.write_bytes(image.data)
    assert {name: int(value) for name, value in load_file(path).items()} == {n: int(t) for n, t in tensors.items()}


@pytest.mark.parametrize("length", range(3900, 4100, 7))
def test_headers_around_the_page_size(length):
    image = image_of({"n" * length: torch.tensor([1.0, 2.0])})
    assert image.header % PAGE == 0
    (back,) = safe_load(bytes(image.data)).values()
    assert back.tolist() == [1.0, 2.0]


def test_five_thousand_tiny_tensors(tmp_path):
    given_ = {f"layer.{i}": torch.tensor([i], dtype=[torch.int16, torch.float32][i % 2]) for i in range(5000)}
    path = tmp_path / FILE
    tree, tensors = encode(given_)
    image = image_of(tensors)
    path.write_bytes(image.data)
    theirs = load_file(path)
    back = Decoder(read(image)).decode(tree)
    for i in range(5000):
        assert back[f"layer.{i}"].item() == theirs[f"layer.{i}"].item() == given_[f"layer.{i}"].item()
        assert back[f"layer.{i}"].dtype == given_[f"layer.{i}"].dtype
    assert list(back) == list(given_)


# --- the staging buffer -------------------------------------------------------------------------------------------


def address(image):
    return np.frombuffer(image.data, dtype=np.uint8).ctypes.data


def test_an_image_does_not_change_with_later_training():
    model = torch.nn.Linear(10, 10)
    image = image_of(encode(model.state_dict())[1])
    before = bytes(image.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight.zero_()
    assert bytes(image.data) == before


def test_a_second_fill_reuses_the_memory():
    staging = StagingBuffer()
    weight = torch.full((1000,), 1.0)
    first = image_of({"w": weight}, staging)
    place, size, old = address(first), staging.size, bytes(first.data)
    weight.fill_(2.0)
    second = image_of({"w": weight}, staging)
    assert address(second) == place
    assert staging.size == size
    assert bytes(first.data) == bytes(second.data) != old  # the first image is overwritten, as documented
    assert read(second)["w"].tolist() == [2.0] * 1000


def test_tensors_that_move_into_a_second_file_need_no_new_memory():
    staging = StagingBuffer()
    tensors = {f"layer{number}.weight": torch.full((1000 + number,), float(number)) for number in range(300)}
    for bytes_more in range(0, 4096, 512):  # wherever the pages end
        tensors["more"] = torch.ones(bytes_more, dtype=torch.uint8)
        staging.fill({"a.safetensors": tensors, "b.safetensors": {"x": torch.ones(3)}})
        size = staging.size
        for apart in ([], ["layer7.weight"], list(tensors)[:150], list(tensors)[1:]):
            main = {name: tensor for name, tensor in tensors.items() if name not in apart}
            files = {"a.safetensors": main, "a+frozen.safetensors": {name: tensors[name] for name in apart}}
            images = staging.fill({**files, "b.safetensors": {"x": torch.ones(3)}})
            assert staging.size == size
            for image, expected in zip(images, files.values(), strict=False):
                assert safe_load(bytes(image.data)).keys() == expected.keys()
        staging = StagingBuffer()


def test_layouts_may_grow_shrink_and_change():
    staging = StagingBuffer()
    steps = [
        {"w": torch.arange(10.0)},
        {"w": torch.arange(100_000.0)},
        {"w": torch.arange(5.0)},
        {"w": torch.arange(5)},
        {"w": torch.arange(5.0).reshape(5, 1)},
        {"v": torch.arange(5.0)},
        {"v": torch.arange(5.0), "w": torch.ones(3, dtype=torch.float16)},
        {"w": torch.ones(3, dtype=torch.float16), "v": torch.arange(5.0)},
        {"w": torch.tensor(1.0)},
        {"w": torch.empty(0)},
        {"w": torch.arange(10.0)},
    ]
    sizes = []
    for tensors in steps:
        image = image_of(tensors, staging)
        theirs = safe_load(bytes(image.data))
        assert theirs.keys() == tensors.keys()
        for name, value in tensors.items():
            assert_same(value, theirs[name])
        sizes.append(staging.size)
    assert sizes == sorted(sizes), "it never shrinks"
    assert sizes[1] == sizes[-1] > sizes[0]


def test_memory_that_grew_leaves_older_images_readable():
    staging = StagingBuffer()
    first = image_of({"w": torch.arange(10.0)}, staging)
    image_of({"w": torch.zeros(1_000_000)}, staging)
    assert read(first)["w"].tolist() == list(range(10))


def test_several_files_stand_on_pages_of_their_own():
    staging = StagingBuffer()
    files = {
        "a.safetensors": {"w": torch.arange(3.0)},
        "b.safetensors": {"w": torch.arange(2000.0), "v": torch.tensor(True)},
        "c.safetensors": {"none": torch.empty(0)},
    }
    images = staging.fill(files)
    assert [image.name for image in images] == list(files)
    for image in images:
        assert address(image) % PAGE == 0
        theirs = safe_load(bytes(image.data))
        for name, value in files[image.name].items():
            assert_same(value, theirs[name])
    places = sorted((address(image), len(image.data)) for image in images)
    assert all(begin + size <= after for (begin, size), (after, _) in pairwise(places))


def test_the_layout_alone_says_the_size():
    tensors = mixed()
    layout = lay_out(FILE, tensors)
    image = image_of(tensors)
    assert layout.size == len(image.data)
    assert bytes(image.data[: len(layout.header)]) == layout.header


# --- records that contradict themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        TensorRecord("w", "F99", (2,), 0, 8, ""),
        TensorRecord("w", "F32", (3,), 0, 8, ""),
        TensorRecord("w", "F32", (2,), 0, 7, ""),
        TensorRecord("w", "F32", (2,), 8, 0, ""),
        TensorRecord("w", "F32", (2,), -8, 0, ""),
        TensorRecord("w", "F32", (-1, -2), 0, 8, ""),
        TensorRecord("w", "F32", (0,), 0, 8, ""),
        TensorRecord("w", "F32", (2**40, 2**40), 0, 8, ""),
    ],
    ids=str,
)
def test_records_that_contradict_themselves(record):
    file = FileRecord(name=FILE, size=16, digest="", header=8, header_digest="", tensors=(record,))
    with pytest.raises(FormatError, match=r"tensor 'w' in part\.safetensors"):
        tensors_of(file, memoryview(bytearray(16)))


# --- anything -----------------------------------------------------------------------------------------------------


@st.composite
def any_tensor(draw):
    dtype = draw(st.sampled_from(ALL))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = math.prod(shape)
    if dtype == torch.bool:
        tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:
        data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        tensor = of_bytes(data, dtype) if data else torch.empty(0, dtype=dtype)
    tensor = tensor.reshape(shape)
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))]
    return tensor


@given(st.dictionaries(st.text(max_size=10), any_tensor(), max_size=8))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_tensors_come_back_and_other_tools_read_them(given_):
    tree, tensors = encode(given_)
    if not tensors:
        assert not given_
        return
    image = image_of(tensors)
    back = Decoder(read(image)).decode(tree)
    assert list(back) == list(given_)
    for name, value in given_.items():
        assert_same(value, back[name])
    theirs = safe_load(bytes(image.data))
    assert theirs.keys() == tensors.keys()
    for name, value in tensors.items():
        assert octets(theirs[name]) == octets(value)


@st.composite
def views_of_one_storage(draw):
    """What ``as_strided`` can make of 64 bytes."""
    memory = torch.arange(64, dtype=torch.uint8)
    views = {}
    for number in range(draw(st.integers(2, 5))):
        dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
        flat = memory.view(dtype)
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
        stride = draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
        room = len(flat) - 1 - sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if room >= 0:
            views[f"v{number}"] = flat.as_strided(shape, stride, draw(st.integers(0, room)))
    return memory, views


@given(views_of_one_storage(), st.integers(0, 63))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_views_of_one_memory(made, where):
    """Changing one byte of memory changes the same elements of the same views as it did before."""
    memory, views = made
    back = round_trip(views)
    for name, value in views.items():
        assert_same(value, back[name])
    before = {name: octets(value) for name, value in views.items()}
    memory[where] = 255
    changed = {name: octets(value) for name, value in views.items() if octets(value) != before[name]}
    for name in changed:
        places = torch.arange(64).as_strided(views[name].shape, views[name].stride())
        if len(places.unique()) < places.numel():
            continue  # one element of memory is several of its own
        back[name].copy_(views[name])
        for other, value in changed.items():
            assert octets(back[other]) == value, f"writing {name} does not show in {other}"
        break
