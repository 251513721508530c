"""Manifests: what is written is what is read, and anything else is noticed."""

import itertools
import json
import math
from datetime import timedelta, timezone

import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peakpoint.errors import CorruptError, FormatError
from peakpoint.format.manifest import MANIFEST, FileRecord, TensorRecord, decode_manifest, encode_manifest
from peakpoint.format.metrics import metrics_from_json, metrics_to_json
from peakpoint.format.sealed import FORMAT, seal, unseal
from strategies import DIGEST, START, any_metrics, manifest, manifests

SMALL = encode_manifest(manifest(metrics={"val/loss": 0.1, "bad": math.nan}, asked="bäd"))
# any JSON value, with the spellings that trip up converters
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.sampled_from(["nan", "inf", "2026-03-01T12:00:00Z"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["m", "name", "a"]), inner, max_size=2),
    max_leaves=4,
)


def record(**changes):
    return {**json.loads(encode_manifest(manifest())), **changes}


def sealed(**changes):
    made = record(**changes)
    del made["seal"]
    return seal({name: value for name, value in made.items() if value is not ...})


@settings(max_examples=150)
@given(manifests)
def test_what_is_encoded_is_decoded(written):
    data = encode_manifest(written)
    found = decode_manifest(data)
    assert repr(found) == repr(written)  # repr tells NaN, -0.0 and types of containers where == does not
    assert encode_manifest(found) == data


@given(manifests)
def test_a_manifest_is_one_line_of_plain_json(written):
    data = encode_manifest(written)
    assert data.endswith(b"}\n")
    assert data.count(b"\n") == 1
    plain = json.loads(data, parse_constant=pytest.fail)
    sharded = [file for file in plain["files"] if "offsets" in file]
    assert plain["format"] == (2 if sharded else 1)
    assert len(sharded) == sum(bool(file.offsets) for file in written.files)
    assert plain["id"] == written.id
    assert list(plain)[-1] == "seal"


@given(any_metrics)
def test_metrics_survive_json_to_the_last_bit(metrics):
    text = json.dumps(metrics_to_json(metrics), allow_nan=False)
    found = metrics_from_json(json.loads(text))
    assert list(found) == list(metrics)
    for name, value in metrics.items():
        assert type(found[name]) is float
        assert found[name].hex() == float(value).hex()


def test_times_in_other_zones_stay_the_same_instant():
    at = START.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert decode_manifest(encode_manifest(manifest(created_at=at))).created_at == START


# --- damage -------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed():
    for place in range(len(SMALL)):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[place] ^= 1 << bit
            with pytest.raises(CorruptError, match=MANIFEST):
                decode_manifest(bytes(damaged))


def test_every_truncation_is_noticed():
    for length in range(len(SMALL) - 1):
        with pytest.raises(CorruptError, match=MANIFEST):
            decode_manifest(SMALL[:length])
    whole = repr(decode_manifest(SMALL))
    assert repr(decode_manifest(SMALL[:-1])) == whole  # only the newline is missing: nothing is lost


@pytest.mark.parametrize("data", [b"", b"\n", b"{}", b"{}\n", b"null", b"\x00" * 600, b'{"format":1}\n'])
def test_what_never_was_a_manifest_is_noticed(data):
    with pytest.raises(CorruptError, match=MANIFEST):
        decode_manifest(data)


@settings(max_examples=300)
@given(st.integers(0, len(SMALL)), st.integers(0, 40), st.binary(max_size=40))
@example(0, 0, SMALL)
@example(len(SMALL), 0, SMALL)
def test_overwritten_inserted_and_missing_stretches_are_noticed(begin, length, junk):
    damaged = SMALL[:begin] + junk + SMALL[begin + length :]
    try:
        found = decode_manifest(damaged)
    except CorruptError:
        return
    assert damaged.rstrip(b"\n") == SMALL.rstrip(b"\n")
    assert repr(found) == repr(decode_manifest(SMALL))


@given(st.binary(max_size=200))
def test_noise_is_corrupt(noise):
    with pytest.raises(CorruptError):
        decode_manifest(noise)


def test_the_seal_is_the_digest_of_every_byte_before_its_comma():
    body, comma, tail = SMALL.rpartition(b',"seal":"')
    assert comma
    assert tail == blake3(body).hexdigest()[:16].encode() + b'"}\n'
    assert seal({"a": 1}) == b'{"a":1,"seal":"' + blake3(b'{"a":1').hexdigest()[:16].encode() + b'"}\n'


def test_every_flipped_bit_of_a_short_record_is_noticed():
    """Whose last byte under the seal is a digit: another one would be good JSON."""
    line = seal({"a": 1})
    for place, bit in itertools.product(range(len(line)), range(8)):
        damaged = bytearray(line)
        damaged[place] ^= 1 << bit
        with pytest.raises((CorruptError, FormatError), match="here"):
            unseal(bytes(damaged), where="here")


def test_two_records_cannot_exchange_their_seals():
    one, two = encode_manifest(manifest(step=1)), encode_manifest(manifest(step=2))
    with pytest.raises(CorruptError):
        decode_manifest(one[:-28] + two[-28:])


@pytest.mark.parametrize("offsets", [[[0, 0]], [[0, 0], [0], [0]], [[0], [0, 0]], [[0, 0], [-1]], [[0, 0], [2**63]], 3])
def test_offsets_that_do_not_fit_the_tensors_are_refused(offsets):
    rows = [["w", "F32", [2, 3], 0, 24, DIGEST], ["b", "F32", [2], 24, 32, DIGEST]]
    file = {"name": "model+rank0.safetensors", "size": 100, "digest": DIGEST, "header": 68, "tensors": rows}
    fitting = decode_manifest(sealed(format=2, files=[file | {"offsets": [[4, 0], [4]]}]))
    assert fitting.files[0].offsets == ((4, 0), (4,))
    with pytest.raises((CorruptError, FormatError), match=r"`\$.files"):
        decode_manifest(sealed(format=2, files=[file | {"offsets": offsets}]))


# --- other formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [3, 0, "1", None, 1.5, [1], {}, ...])
def test_another_format_is_a_format_error_that_says_so(found):
    with pytest.raises(FormatError, match=r"manifest.json has format .*reads format 2: update"):
        decode_manifest(sealed(format=found))


def test_fields_that_a_later_release_adds_are_passed_over():
    assert decode_manifest(sealed(colour="blue")) == manifest()


@pytest.mark.parametrize("name", [name for name in record() if name not in ("format", "seal")])
def test_a_missing_field_is_a_format_error(name):
    with pytest.raises(FormatError, match=MANIFEST):
        decode_manifest(sealed(**{name: ...}))


@settings(max_examples=300)
@given(st.sampled_from([name for name in record() if name not in ("format", "seal")]), json_values)
@example("metrics", [1])
@example("metrics", None)
@example("metrics", {"m": None})
@example("metrics", {"m": 10**400})
@example("metrics", {"m": "x"})
@example("created_at", "yesterday")
def test_a_field_of_another_kind_is_a_format_error_or_a_value(name, value):
    """Whatever a sealed record holds, no other error leaves ``decode_manifest``."""
    try:
        found = decode_manifest(sealed(**{name: value}))
    except (FormatError, CorruptError) as error:
        assert MANIFEST in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert decode_manifest(encode_manifest(found)).id == found.id


def test_sealed_bytes_that_are_no_json_are_an_error_of_ours():
    for body in (b'{"a":\xff', b'{"a":', b"[1", b'{"a":"\xff"', b'{"a":1e999'):
        data = body + b',"seal":"' + blake3(body).hexdigest()[:16].encode() + b'"}\n'
        with pytest.raises((FormatError, CorruptError)):
            unseal(data, where="here")
        with pytest.raises((FormatError, CorruptError)):
            decode_manifest(data)


# --- the values ---------------------------------------------------------------------------------------------------


def test_size_and_files():
    tensor = TensorRecord("w", "F32", (2, 3), 0, 24, DIGEST)
    files = (
        FileRecord(
            name="model.safetensors", size=100, digest=DIGEST, header=76, header_digest=DIGEST, tensors=(tensor,)
        ),
        FileRecord(name="state.json", size=11, digest=DIGEST),
    )
    found = decode_manifest(encode_manifest(manifest(files=files)))
    assert found.files == files
    assert found.size_bytes == 111
    assert found.file("state.json").size == 11
    assert isinstance(found.files[0].tensors[0], TensorRecord)
    with pytest.raises(KeyError):
        found.file("other")
    assert manifest().size_bytes == 0
    assert FORMAT == 1
