"""Which error, and so which exit code, each kind of record raises for each thing that can be wrong with it."""

import pytest
from blake3 import blake3

from peakpoint.errors import CorruptError, FormatError
from peakpoint.format import layout
from peakpoint.format.events import decode
from peakpoint.format.manifest import decode_manifest
from peakpoint.format.sealed import digest, seal
from peakpoint.repository import aliases, packs, releases, trash, validations
from peakpoint.repository.packs.index import read_index
from peakpoint.repository.root import Repository
from peakpoint.repository.run import read_run_record
from peakpoint.store import MemoryStore

ID = "0123456789abcdef"


def stored(key, read):
    """Reads a record that is in a store under a key."""

    def read_stored(data):
        store = MemoryStore()
        store.put(key, [data])
        return read(store)

    return read_stored


def read_pack(data):
    store = MemoryStore()
    store.put(layout.pack_key("r", ID), [data, len(data).to_bytes(8, "little"), packs.index._MAGIC])
    return read_index(store, "r", ID)


def read_predictions(data):
    store = MemoryStore()
    store.put(layout.predictions_key("r", ID, digest(data)), [data])
    validation = validations.Validation.__new__(validations.Validation)
    for name, value in {"run": "r", "checkpoint": ID, "predictions": digest(data)}.items():
        object.__setattr__(validation, name, value)
    return validations.predictions_of(store, validation)


TRASHED = layout.trashed_key("r", "c")
DROPPED = layout.file_key("r", "c", "dropped-1.json")
# written by Peakpoint alone: bytes without a seal are damaged
ALWAYS_SEALED = {
    "manifest": decode_manifest,
    "alias": stored(layout.alias_key("a", 1), lambda store: aliases.read(store, "a", 1)),
    "pack": read_pack,
}
# bytes without a seal are another program's
OTHERS = {
    "repository": stored(layout.REPOSITORY, Repository),
    "run": stored(layout.run_record("r"), lambda store: read_run_record(store, "r")),
    "trash": stored(TRASHED, lambda store: trash.read_trashed(store, "r", "c")),
    "dropped parts": stored(DROPPED, lambda store: list(trash.dropped_parts(store, "r", "c"))),
    "archive": stored(layout.archived_key("r"), lambda store: packs.run_archive(store, "r")),
    "validation": stored(layout.validation_key("r", ID, 1), lambda store: validations.read(store, "r", ID, 1)),
    "predictions": read_predictions,
    "release": stored(layout.release_key("x"), lambda store: releases.read_release(store, "x")),
}
KINDS = ALWAYS_SEALED | OTHERS
WITHOUT_SEAL = [b"", b'{"format":1}\n', b"\x00" * 40]


def sealed(body):
    return body + b',"seal":"' + blake3(body).hexdigest()[:16].encode() + b'"}\n'


@pytest.mark.parametrize("data", [*WITHOUT_SEAL, sealed(b'{"format":')])
@pytest.mark.parametrize("kind", KINDS)
def test_what_carries_no_seal_or_is_no_json(kind, data):
    with pytest.raises((CorruptError, FormatError)) as caught:
        KINDS[kind](data)
    assert caught.type is (CorruptError if kind in ALWAYS_SEALED else FormatError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seal_that_does_not_match_is_damage(kind):
    with pytest.raises(CorruptError, match=r"seal does not match its bytes; restore the file from a backup") as caught:
        KINDS[kind](seal({"format": 1}).replace(b"1", b"2", 1))
    assert caught.type is CorruptError


@pytest.mark.parametrize("members", [{"format": 3}, {"other": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_another_format_is_a_newer_release(kind, members):
    newest = 2 if kind == "manifest" else 1  # 2 has shards
    with pytest.raises(FormatError, match=rf"this release of Peakpoint reads format {newest}: update it"):
        KINDS[kind](seal(members))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"repository", "run"}))
def test_members_of_another_kind_are_a_newer_release(kind):
    with pytest.raises(FormatError, match=r"cannot be read by this release of Peakpoint"):
        KINDS[kind](seal({"format": 1}))


@pytest.mark.parametrize("line", [*WITHOUT_SEAL, sealed(b'{"kind":'), seal({"kind": "closed"}), seal({"kind": 1})])
def test_whatever_is_wrong_with_a_line_of_a_journal_is_damage(line):
    with pytest.raises(CorruptError) as caught:
        decode(line, where="here")
    assert caught.type is CorruptError
