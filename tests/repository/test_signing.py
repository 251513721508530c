"""What a signature covers, who can make one, and that nothing else passes for one."""

import base64
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from commands import command
from peakpoint.format import layout
from peakpoint.format.events import Removed
from peakpoint.format.manifest import encode_manifest
from peakpoint.format.sealed import digest
from peakpoint.repository import maintenance, signing
from peakpoint.repository.audit import audit
from peakpoint.repository.commit import combined_digest
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.reader import read_manifest
from peakpoint.repository.removal import drop_parts
from peakpoint.repository.signing import bundle as bundles
from peakpoint.repository.signing import keys as signing_keys
from peakpoint.store import LocalStore, MemoryStore
from training import checkpointer, parts, train

CURVES = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-521": ec.SECP521R1}
STOCK = [sys.executable, "-m", "model_signing"]


def private_pem(key, password=None):
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def public_pem(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def pair(directory, name="key", curve=ec.SECP256R1):
    """The files of a new private key and of its public key."""
    key = ec.generate_private_key(curve())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    private.write_bytes(private_pem(key))
    public.write_bytes(public_pem(key))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys):
    """A run of three checkpoints; the newest is signed."""
    root = tmp_path_factory.mktemp("signing") / "runs"
    model, optimizer = parts()
    with checkpointer(root, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in ckpt.epochs(3):
            ckpt.report(loss=train(model, optimizer))
    store, manifest = newest(root)
    signing.sign(store, manifest, private_key=keys[0])
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs")


def newest(root):
    return LocalStore(root), pp.open(root).find_manifest("r@latest")


def directory(root):
    store, manifest = newest(root)
    return store.path(layout.checkpoint_prefix(manifest.run, manifest.name))


def verify(root, public, **options):
    store, manifest = newest(root)
    return signing.verify(store, manifest, public_key=public, **options)


def refused(root, public, *says, **options):
    with pytest.raises(pp.errors.SignatureError) as raised:
        verify(root, public, **options)
    for words in says:
        assert words in str(raised.value)
    return str(raised.value)


def stock(*arguments):
    done = subprocess.run([*STOCK, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


# --- what holds -----------------------------------------------------------------------------------------------------


def test_signed_and_verified(root, keys):
    public = keys[1]
    found = verify(root, public)
    assert found.record == "signature-1.json"
    assert found.fingerprint == signing.public_key_fingerprint(public)
    there = {path.name for path in directory(root).iterdir()} - {"signature-1.json"}
    assert set(found.files) == there
    assert {"manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"} <= there
    assert verify(root, public, files=False).files == ("manifest.json",)
    assert audit(pp.open(root), deep=True).findings == []


def test_the_fingerprint_is_what_sha256sum_prints(keys):
    import hashlib

    assert signing.public_key_fingerprint(keys[1]) == hashlib.sha256(keys[1].read_bytes()).hexdigest()


@pytest.mark.parametrize("curve", CURVES)
def test_the_stock_tool_verifies_what_we_sign(made, tmp_path, curve):
    root = shutil.copytree(made, tmp_path / "runs")
    private, public = pair(tmp_path, curve=CURVES[curve])
    store, manifest = newest(root)
    record = signing.sign(store, manifest, private_key=private).record
    assert record == "signature-2.json"
    assert verify(root, public).record == record
    place = directory(root)
    ask = ["verify", "key", place, "--signature", place / record, "--public_key", public, "--ignore_unsigned_files"]
    assert stock(*ask) == (0, "Verification succeeded\n")
    flip(place / "model.safetensors", -1)
    code, said = stock(*ask)
    assert code != 0
    assert "model.safetensors" in said


def test_the_stock_tool_needs_no_options_where_there_is_one_signature(root, keys):
    place = directory(root)
    ask = ["verify", "key", place, "--signature", place / "signature-1.json", "--public_key", keys[1]]
    assert stock(*ask) == (0, "Verification succeeded\n")


def test_we_verify_what_the_stock_tool_signs(root, other):
    private, public = other
    place = directory(root)
    code, said = stock("sign", "key", place, "--signature", place / "signature-7.json", "--private_key", private)
    assert code == 0, said
    found = verify(root, public)
    assert found.record == "signature-7.json"
    assert set(found.files) == set(verify(root, public).files) >= {"manifest.json", "model.safetensors"}
    flip(place / "state.json", 5)
    refused(root, public, "state.json has changed since it was signed")


def test_several_signatures_one_that_holds_is_enough(root, keys, other):
    store, manifest = newest(root)
    assert signing.sign(store, manifest, private_key=other[0]).record == "signature-2.json"
    assert signing.sign(store, manifest, private_key=keys[0]).record == "signature-3.json"
    assert verify(root, keys[1]).record == "signature-3.json"
    (directory(root) / "signature-3.json").write_text("{}")
    assert verify(root, keys[1]).record == "signature-1.json"
    assert verify(root, other[1]).record == "signature-2.json"
    found = signing.signatures(store, "r", manifest.name)
    assert [one.record for one in found] == ["signature-3.json", "signature-2.json", "signature-1.json"]
    assert [one.fingerprint for one in found] == [
        None,
        signing.public_key_fingerprint(other[1]),
        signing.public_key_fingerprint(keys[1]),
    ]


def test_progress_counts_every_byte(root, keys):
    store, manifest = newest(root)
    seen = []
    signing.sign(store, manifest, private_key=keys[0], progress=seen.append)
    assert sum(seen) == manifest.size_bytes
    seen.clear()
    signing.verify(store, manifest, public_key=keys[1], progress=seen.append)
    assert sum(seen) == manifest.size_bytes


def test_any_store_will_do(root, keys):
    memory = MemoryStore()
    for path in root.rglob("*"):
        if path.is_file():
            memory.put(str(path.relative_to(root)), [path.read_bytes()])
    manifest = pp.open(memory).find_manifest("r@latest")
    assert signing.verify(memory, manifest, public_key=keys[1]).record == "signature-1.json"
    assert signing.sign(memory, manifest, private_key=keys[0]).record == "signature-2.json"
    assert signing.verify(memory, manifest, public_key=keys[1]).record == "signature-2.json"


# --- what does not --------------------------------------------------------------------------------------------------


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_flipped_bit_is_named(root, keys, file, at):
    flip(directory(root) / file, at)
    refused(root, keys[1], "signature-1.json", f"{file} has changed since it was signed")


def test_a_damaged_manifest_is_no_checkpoint(root, keys):
    store, manifest = newest(root)
    flip(directory(root) / "manifest.json", 30)
    with pytest.raises(pp.errors.CorruptError):
        signing.verify(store, manifest, public_key=keys[1])


def test_files_that_were_exchanged_are_named(root, keys):
    place = directory(root)
    before = min(path for path in place.parent.iterdir() if path != place)
    shutil.copy(before / "model.safetensors", place / "model.safetensors")
    refused(root, keys[1], "model.safetensors has changed since it was signed")


@pytest.mark.parametrize("grow", [b"", b"more"])
def test_a_file_that_was_cut_or_grew_is_named(root, keys, grow):
    path = directory(root) / "state.json"
    path.write_bytes(path.read_bytes()[:-3] if not grow else path.read_bytes() + grow)
    refused(root, keys[1], "state.json has changed since it was signed")


def test_a_file_that_is_missing_is_named(root, keys):
    (directory(root) / "optimizer.safetensors").unlink()
    refused(root, keys[1], "optimizer.safetensors is missing")


def forge(root, value=0.25):
    """Other weights, with digests and a seal that match them, as whoever may write can make them."""
    place = directory(root)
    _, manifest = newest(root)
    file = manifest.file("model.safetensors")
    data = bytearray((place / file.name).read_bytes())
    tensors = []
    for row in file.tensors:
        begin, end = file.header + row.begin, file.header + row.end
        data[begin:end] = torch.full(row.shape, value).numpy().tobytes()
        tensors.append(row._replace(digest=digest(data[begin:end])))
    (place / file.name).write_bytes(data)
    changed = replace(file, tensors=tuple(tensors), digest=combined_digest(file.header_digest, tensors))
    others = tuple(changed if one.name == file.name else one for one in manifest.files)
    (place / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=others)))


def test_a_forged_checkpoint_is_good_to_digests_and_refused_by_name(root, keys):
    before = newest(root)[1]
    forge(root)
    assert audit(pp.open(root), deep=True).findings == []  # digests find accidents only
    assert torch.all(pp.load("r@latest", root=root)["model"]["0.weight"] == 0.25)
    refused(root, keys[1], "manifest.json has changed since it was signed")
    refused(root, keys[1], "manifest.json has changed since it was signed", files=False)
    with pytest.raises(pp.errors.SignatureError, match=r"manifest\.json has changed since it was signed"):
        pp.load("r@latest", root=root, signed_by=keys[1])
    # one who read the manifest before the exchange is not told that what is there now is what he has
    with pytest.raises(pp.errors.SignatureError, match=r"manifest\.json is not the one that was read"):
        signing.verify(LocalStore(root), before, public_key=keys[1])


def test_a_manifest_in_hand_that_was_never_there_is_refused(root, keys):
    store, manifest = newest(root)
    file = manifest.files[0]
    for wrong in (
        replace(manifest, files=(replace(file, digest="0" * 64), *manifest.files[1:])),
        replace(manifest, files=(*manifest.files, replace(file, name="more.safetensors"))),
        replace(manifest, parts={**manifest.parts, "model": ("state.json",)}),
        replace(manifest, step=manifest.step + 1),
        replace(manifest, id="0" * 16),
    ):
        with pytest.raises(pp.errors.SignatureError, match="is not the one that was read"):
            signing.verify(store, wrong, public_key=keys[1], files=False)
        with pytest.raises(pp.errors.SignatureError, match="is not the one that was read"):
            signing.sign(store, wrong, private_key=keys[0])
    measured = replace(manifest, metrics={**manifest.metrics, "bleu": 0.5})  # as measured later
    assert signing.verify(store, measured, public_key=keys[1]).record == "signature-1.json"


def test_a_signature_of_another_checkpoint_is_refused(root, keys):
    store, _ = newest(root)
    place = directory(root)
    first = min(path for path in place.parent.iterdir() if path != place)
    shutil.copy(place / "signature-1.json", first / "signature-1.json")
    with pytest.raises(pp.errors.SignatureError, match=r"manifest\.json has changed"):
        signing.verify(store, read_manifest(store, "r", first.name), public_key=keys[1])


def test_unsigned_and_signed_by_somebody_else(root, keys, other):
    own, theirs = signing.public_key_fingerprint(keys[1]), signing.public_key_fingerprint(other[1])
    refused(root, other[1], "signed with another key", own, theirs)
    (directory(root) / "signature-1.json").unlink()
    refused(root, keys[1], "is not signed", "peakpoint sign")
    store, manifest = newest(root)
    signing.sign(store, manifest, private_key=other[0])
    refused(root, keys[1], "signed with another key", own, theirs)
    # a bundle may say what it likes about its key
    path = directory(root) / "signature-1.json"
    path.write_text(path.read_text().replace(theirs, own))
    refused(root, keys[1], "it was changed, or not made with the key")
    bundle = json.loads(path.read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    path.write_text(json.dumps(bundle))
    refused(root, keys[1], "it was changed, or not made with the key")
    assert verify(root, other[1]).record == "signature-1.json"


def changed(root, edit):
    """The bundle with a statement that was changed, and not signed again."""
    path = directory(root) / "signature-1.json"
    bundle = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    edit(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(bundle))


def test_a_statement_cannot_be_changed(root, keys):
    def forgotten(statement):
        statement["predicate"]["resources"].pop()

    changed(root, forgotten)
    refused(root, keys[1], "it was changed, or not made with the key")


def signed_statement(root, keys, edit):
    """A bundle whose statement the key's owner did sign."""
    key = serialization.load_pem_private_key(keys[0].read_bytes(), None)
    path = directory(root) / "signature-1.json"
    bundle = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload = edit(statement)
    payload = json.dumps(statement).encode() if payload is None else payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    sig = key.sign(bundles.authenticated(payload), ec.ECDSA(serialization_hash(key)))
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(sig).decode()
    path.write_text(json.dumps(bundle))


def serialization_hash(key):
    from cryptography.hazmat.primitives import hashes

    assert key.curve.key_size == 256
    return hashes.SHA256()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda s: s["predicate"]["resources"].append(resource("../../../peakpoint.json")),
            "'../../../peakpoint.json'",
        ),
        (lambda s: s["predicate"]["resources"].append(resource("/etc/passwd")), "'/etc/passwd'"),
        (lambda s: s["predicate"]["resources"].append(resource("dir/more")), "which is not a file of this checkpoint"),
        (lambda s: s["predicate"]["resources"].append(resource("state.json")), "names a file twice"),
        (lambda s: s["predicate"]["resources"].pop(0), "does not cover manifest.json"),
        (lambda s: s["predicate"]["resources"].pop(1), "does not cover model.safetensors"),
        (lambda s: s["predicate"]["resources"][0].update(algorithm="md5"), "SHA-256"),
        (lambda s: s["predicate"]["serialization"].update(method="shards"), "SHA-256"),
        (lambda s: s["predicate"].pop("resources"), "is not a statement about a model"),
        (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "is not a statement of type"),
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "is not a statement of type"),
        (lambda _: b"no json", "is not a statement about a model"),
        (lambda _: b"[" * 100_000, "is not a statement about a model"),
    ],
)
def test_a_statement_that_is_signed_and_says_something_else(root, keys, edit, says):
    signed_statement(root, keys, lambda statement: result if isinstance(result := edit(statement), bytes) else None)
    refused(root, keys[1], says)


def resource(name):
    return {"name": name, "algorithm": "sha256", "digest": "0" * 64}


def test_records_that_the_stock_tool_signed_too_may_come_and_go(root, keys):
    signed_statement(root, keys, lambda s: s["predicate"]["resources"].append(resource("dropped-1.json")))
    assert verify(root, keys[1]).record == "signature-1.json"


def hostile(material, **more):
    """A bundle of the right form, with a signature that is none."""
    envelope = {"payload": "", "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}], **more}
    media = "application/vnd.dev.sigstore.bundle.v0.3+json"
    return json.dumps({"mediaType": media, "verificationMaterial": material, "dsseEnvelope": envelope}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe",
        b"{}",
        b"[]",
        b"null",
        b"[" * 200_000,
        b'{"mediaType": 1, "verificationMaterial": {"publicKey": {}}, "dsseEnvelope": {}}',
        hostile({"publicKey": {"hint": []}}),
        hostile({"publicKey": {}}, signatures=[]),
        hostile({"publicKey": {}}, signatures=[{"sig": "AAAA"}, {"sig": "AAAA"}]),
        hostile({"publicKey": {}}),
        hostile({"certificate": {"rawBytes": "AAAA"}}),
        hostile({"publicKey": {}}, payload="?"),
        hostile({"publicKey": {}}, payloadType="text/plain"),
        hostile({"publicKey": {"hint": "x" * 1_000_000}}),
        hostile({"publicKey": {"hint": "\x1b]0;owned\x07"}}),
        b"{" + b" " * (bundles.LARGEST + 1) + b"}",
    ],
    ids=lambda _: "bundle",
)
def test_a_hostile_bundle_is_refused_and_hides_no_good_one(root, keys, content):
    store, manifest = newest(root)
    place = directory(root)
    (place / "signature-2.json").write_bytes(content)
    assert verify(root, keys[1]).record == "signature-1.json"
    assert len(signing.signatures(store, "r", manifest.name)) == 2
    shown = command("show", root, "r@latest")
    assert "signature-2.json, names no key" in shown
    assert "\x1b" not in shown
    (place / "signature-1.json").unlink()
    message = refused(root, keys[1], "signature-2.json")
    assert len(message) < 500


KEY = ec.derive_private_key(12345, ec.SECP256R1())
DIGESTS = {"manifest.json": "1" * 64, "a": "2" * 64}
PAYLOAD = bundles.encode_statement("n", DIGESTS)
GOOD = bundles.encode_bundle(
    PAYLOAD, signing_keys.sign(KEY, bundles.authenticated(PAYLOAD)), signing_keys.fingerprint(KEY.public_key())
)


@settings(max_examples=150)
@given(data=st.data())
def test_a_bundle_with_any_byte_changed_is_read_or_refused(data):
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = signing._signed_digests(bundles.decode_bundle(bytes(changed)), KEY.public_key())
    except pp.errors.SignatureError:
        assert changed != GOOD
        return
    assert found == DIGESTS  # a change that means nothing, such as in keyid


@pytest.mark.parametrize("file", ["model.safetensors", "signature-1.json", "manifest.json"])
def test_links_are_refused(root, keys, tmp_path, file):
    store, manifest = newest(root)
    path = directory(root) / file
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(pp.errors.SignatureError, match=f"{file} is a symbolic link"):
        signing.verify(store, manifest, public_key=keys[1])
    if file != "signature-1.json":
        with pytest.raises(pp.errors.SignatureError, match="is a symbolic link"):
            signing.sign(store, manifest, private_key=keys[0])


def test_a_pipe_does_not_stop_anything(root, keys):
    os.mkfifo(directory(root) / "signature-2.json")
    assert verify(root, keys[1]).record == "signature-1.json"
    assert "names no key" in command("show", root, "r@latest")


def test_a_stranger_in_the_directory_does_not_matter(root, keys):
    (directory(root) / "notes.txt").write_text("mine")
    (directory(root) / "signature-mine.json").write_text("mine")
    assert verify(root, keys[1]).record == "signature-1.json"
    kinds = {(finding.kind, Path(finding.where).name) for finding in audit(pp.open(root)).findings}
    assert kinds == {("foreign", "notes.txt"), ("foreign", "signature-mine.json")}


def test_what_is_damaged_is_not_signed(root, keys):
    flip(directory(root) / "model.safetensors", -1)
    store, manifest = newest(root)
    with pytest.raises(pp.errors.CorruptError, match=r"in model\.safetensors|model\.safetensors"):
        signing.sign(store, manifest, private_key=keys[0])
    assert [one.record for one in signing.signatures(store, "r", manifest.name)] == ["signature-1.json"]


def test_what_is_gone_is_not_signed(root, keys):
    store, manifest = newest(root)
    (directory(root) / "manifest.json").unlink()
    with pytest.raises(pp.errors.NotFoundError):
        signing.sign(store, manifest, private_key=keys[0])


def test_of_several_who_sign_at_once_none_is_lost(root, keys, other):
    store, manifest = newest(root)
    with ThreadPoolExecutor(6) as pool:
        made = list(
            pool.map(lambda key: signing.sign(store, manifest, private_key=key).record, [keys[0], other[0]] * 3)
        )
    assert sorted(made) == [f"signature-{number}.json" for number in range(2, 8)]
    assert len(signing.signatures(store, "r", manifest.name)) == 7


class _Hasty(MemoryStore):
    """The checkpoint is removed between its reading and the signature."""

    def create(self, key, data):
        super().create(key, data)
        self.delete(f"{key.rpartition('/')[0]}/manifest.json")


def test_a_checkpoint_that_goes_while_it_is_signed_leaves_nothing(root, keys):
    store, manifest = newest(root)
    hasty, prefix = _Hasty(), layout.checkpoint_prefix("r", manifest.name)
    for child in store.children(prefix):
        hasty.put(f"{prefix}/{child}", [store.get(f"{prefix}/{child}")])
    with pytest.raises(pp.errors.NotFoundError, match="was removed while it was being signed"):
        signing.sign(hasty, manifest, private_key=keys[0])
    assert "signature-2.json" not in hasty.children(prefix)


# --- the life of a signed checkpoint --------------------------------------------------------------------------------


def test_dropped_parts_may_be_missing_and_nothing_else(root, keys, other):
    store, manifest = newest(root)
    left = drop_parts(store, manifest, ["optimizer"], at=utc_now(), why="space", by="test")
    assert not (directory(root) / "optimizer.safetensors").exists()
    found = verify(root, keys[1])
    assert set(found.files) == {"manifest.json", "model.safetensors", "state.json"}
    # a signature from now on covers what is left
    signing.sign(store, left, private_key=other[0])
    assert set(verify(root, other[1]).files) == {"manifest.json", "model.safetensors", "state.json"}
    # whoever may write can forge the record, and so drop parts, but cannot exchange one that is there
    flip(directory(root) / "model.safetensors", -1)
    refused(root, keys[1], "model.safetensors has changed")
    exchanged = (directory(root) / "model.safetensors").read_bytes()
    drop_parts(store, left, ["model"], at=utc_now(), why="to hide it", by="test")
    (directory(root) / "model.safetensors").write_bytes(exchanged)
    refused(root, keys[1], "model.safetensors has changed")


def test_parts_brought_back_need_a_signature_that_covers_them(root, keys, other):
    store, manifest = newest(root)
    content = (directory(root) / "optimizer.safetensors").read_bytes()
    left = drop_parts(store, manifest, ["optimizer"], at=utc_now(), why="space", by="test")
    signing.sign(store, left, private_key=other[0])
    (directory(root) / "optimizer.safetensors").write_bytes(content)
    assert "optimizer.safetensors" in verify(root, keys[1]).files  # there again
    (directory(root) / "dropped-1.json").unlink()
    refused(root, other[1], "does not cover optimizer.safetensors")
    assert verify(root, keys[1]).record == "signature-1.json"


def test_an_archived_checkpoint_verifies_and_can_be_signed(root, keys, other):
    pytest.importorskip("zstandard")
    run = pp.open(root).run("r")
    maintenance.archive(run)
    assert not list(root.rglob("*.safetensors"))
    store, manifest = newest(root)
    assert "model.safetensors" in verify(root, keys[1]).files
    signing.sign(store, manifest, private_key=other[0])
    assert verify(root, other[1]).record == "signature-2.json"
    assert audit(pp.open(root), deep=True).findings == []
    assert "0.weight" in pp.load("r@latest", root=root, signed_by=keys[1])["model"]
    maintenance.restore(run)
    assert verify(root, other[1]).record == "signature-2.json"


def test_signatures_go_to_the_trash_and_come_back(root, keys):
    store, manifest = newest(root)
    run = pp.open(root).run("r")
    maintenance.remove(run, [manifest], "a mistake", undo_for=timedelta(days=1))
    assert audit(pp.open(root)).findings == []
    maintenance.undo(run, [manifest.name])
    assert verify(root, keys[1]).record == "signature-1.json"
    command("rm", root, "r@latest", "--yes", "--undo-for", "0")
    assert not store.path(layout.checkpoint_prefix("r", manifest.name)).exists()
    assert audit(pp.open(root)).findings == []


def test_a_signature_that_a_crash_left_alone_is_litter(root):
    place = directory(root)
    store, manifest = newest(root)
    with contextlib.closing(Journal(store, "r", utc_now)) as journal:
        about = {"checkpoint": manifest.id, "name": manifest.name, "step": manifest.step, "epoch": manifest.epoch}
        journal.append(Removed(at=utc_now(), **about, reason="no rule keeps it", by="rules"))
    (place / "manifest.json").unlink()
    found = audit(pp.open(root)).findings
    assert [finding.kind for finding in found] == ["litter"]
    command("audit", root, "--clean")
    assert not place.exists()


# --- loading --------------------------------------------------------------------------------------------------------


def test_load_takes_only_what_was_signed(root, keys, other):
    assert "0.weight" in pp.load("r@latest", root=root, signed_by=keys[1])["model"]
    with pytest.raises(pp.errors.SignatureError, match="signed with another key"):
        pp.load("r@latest", root=root, signed_by=str(other[1]))
    first = pp.open(root).run("r").checkpoints()[0]
    with pytest.raises(pp.errors.SignatureError, match="is not signed"):
        pp.load(f"r/{first.name}", root=root, signed_by=keys[1])
    with pytest.raises(pp.errors.ConfigError, match="signed_by= needs verify=True"):
        pp.load("r@latest", root=root, signed_by=keys[1], verify=False)


def test_bytes_that_changed_after_signing_are_never_used(root, keys):
    flip(directory(root) / "model.safetensors", -1)
    model, _ = parts(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pp.errors.CorruptError, match=r"model\.safetensors"):
        pp.load("r@latest", root=root, into=model, signed_by=keys[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(pp.errors.CorruptError, match=r"model\.safetensors"):
        pp.load("r@latest", root=root, signed_by=keys[1])["model"]
    flip(directory(root) / "state.json", 5)
    with pytest.raises(pp.errors.CorruptError, match=r"state\.json"):
        pp.load("r@latest", root=root, signed_by=keys[1])


# --- keys -----------------------------------------------------------------------------------------------------------


def test_encrypted_keys(root, tmp_path, monkeypatch):
    monkeypatch.delenv(signing_keys.PASSWORD, raising=False)
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(private_pem(key, b"geheim"))
    public.write_bytes(public_pem(key))
    store, manifest = newest(root)
    with pytest.raises(pp.errors.ConfigError, match="is encrypted; set PEAKPOINT_SIGNING_PASSWORD"):
        signing.sign(store, manifest, private_key=private)
    with pytest.raises(pp.errors.ConfigError, match="the password is wrong") as raised:
        signing.sign(store, manifest, private_key=private, password="falsch")
    assert "falsch" not in str(raised.value)
    signing.sign(store, manifest, private_key=private, password="geheim")
    monkeypatch.setenv(signing_keys.PASSWORD, "geheim")
    signing.sign(store, manifest, private_key=private)
    assert verify(root, public).record == "signature-3.json"
    plain, _ = pair(tmp_path, "plain")
    signing.sign(store, manifest, private_key=plain)  # the password is of another key: not needed here


def test_a_password_may_be_any_bytes(root, tmp_path, monkeypatch):
    private = tmp_path / "key.pem"
    private.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), b"gehe\xffim"))
    monkeypatch.setenv(signing_keys.PASSWORD, os.fsdecode(b"gehe\xffim"))
    store, manifest = newest(root)
    assert signing.sign(store, manifest, private_key=private).record.startswith("signature-")


def test_what_is_no_key_is_refused_with_what_to_do(root, keys, tmp_path):
    private, public = keys
    store, manifest = newest(root)
    wrong = {
        "rsa": private_pem(rsa.generate_private_key(65537, 2048)),
        "ed": private_pem(ed25519.Ed25519PrivateKey.generate()),
        "k1": private_pem(ec.generate_private_key(ec.SECP256K1())),
        "text": b"no key",
        "empty": b"",
        "cut": private.read_bytes()[:60],
        "certificate": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "large": b"A" * 100_000,
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(pp.errors.ConfigError, match=name) as raised:
            signing.sign(store, manifest, private_key=tmp_path / name)
        assert raised.value.__cause__ is None
        with pytest.raises(pp.errors.ConfigError, match=name):
            signing.verify(store, manifest, public_key=tmp_path / name)
    for name, key in {
        "rsa.pub": rsa.generate_private_key(65537, 2048),
        "k1.pub": ec.generate_private_key(ec.SECP256K1()),
    }.items():
        (tmp_path / name).write_bytes(public_pem(key))
        with pytest.raises(pp.errors.ConfigError, match="P-256, P-384 or P-521"):
            signing.public_key_fingerprint(tmp_path / name)
    with pytest.raises(pp.errors.ConfigError, match="is a public key; signing needs the private one"):
        signing.sign(store, manifest, private_key=public)
    with pytest.raises(pp.errors.ConfigError, match=r"openssl pkey -in .* -pubout"):
        signing.verify(store, manifest, public_key=private)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(pp.errors.ConfigError, match="cannot be read"):
            signing.public_key_fingerprint(missing)
    assert [one.record for one in signing.signatures(store, "r", manifest.name)] == ["signature-1.json"]


# --- the command line -----------------------------------------------------------------------------------------------


def run(*arguments):
    program = [sys.executable, "-c", "from peakpoint.cli.main import run; run()", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_the_commands(root, keys, other):
    said = command("sign", root, "r@latest", "--key", other[0])
    assert "signature-2.json covers 4 files" in said
    fingerprint = signing.public_key_fingerprint(other[1])
    assert fingerprint in said
    assert "is unchanged since it was signed: signature-2.json, 4 files compared" in command(
        "sign", root, "r@latest", "--verify", "--key", other[1]
    )
    found = json.loads(command("sign", root, "r@latest", "--verify", "--key", other[1], "--json"))
    assert (found["record"], found["fingerprint"]) == ("signature-2.json", fingerprint)
    assert json.loads(command("sign", root, "r@latest", "--key", other[0], "--json"))["record"] == "signature-3.json"
    assert f"signature-3.json, key {fingerprint}" in command("show", root, "r@latest")
    shown = json.loads(command("show", root, "r@latest", "--json"))["signatures"]
    assert shown[0] == {"record": "signature-3.json", "fingerprint": fingerprint}


def test_a_refusal_is_one_line_and_exit_code_15(root, keys):
    flip(directory(root) / "model.safetensors", -1)
    done = run("sign", root, "r@latest", "--verify", "--key", keys[1], "--json")
    assert done.returncode == 15
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "model.safetensors has changed since it was signed" in done.stderr
    done = run("sign", root, "r@latest", "--key", keys[1])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_key_from_a_pipe(root, keys):
    script = (
        f"{shlex.join([sys.executable, '-m', 'peakpoint', 'sign', str(root), 'r@latest', '--key'])} <(cat {keys[0]})"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(root, keys[1]).record == "signature-2.json"


def test_what_a_missing_extra_says(root, keys):
    hide = "import sys; sys.modules['cryptography'] = None; from peakpoint.cli.main import run; run()"
    arguments = ["sign", str(root), "r@latest", "--verify", "--key", str(keys[1])]
    done = subprocess.run([sys.executable, "-c", hide, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'peakpoint[signing]'" in done.stderr
    shown = [sys.executable, "-c", hide, "show", str(root), "r@latest"]
    assert "signature-1.json" in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
