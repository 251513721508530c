"""Signatures of checkpoints: who vouches for these bytes.

A digest finds accidents; whoever may write to a repository can write digests that match. A signature cannot be made
without the private key. It covers ``manifest.json``, and so every digest in it, and the digest of each file besides.

The signature is a Sigstore bundle as the OpenSSF's model signing makes it, so that its tool ``model_signing`` verifies
the directory of a checkpoint without Peakpoint.
"""

import hashlib
import importlib
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peakpoint.errors import CorruptError, NotFoundError, SignatureError, needing
from peakpoint.format import layout
from peakpoint.format.manifest import MANIFEST, FileRecord, Manifest, decode_manifest
from peakpoint.repository import reader
from peakpoint.repository.signing import bundle as bundles
from peakpoint.store import LocalStore, Store, create_numbered, establish


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A signature as it says of itself; ``verify`` says what it is worth.

    Attributes:
        record: its name beside the manifest, such as ``"signature-1.json"``.
        fingerprint: the fingerprint of the public key; None when the record names none that can be read.
    """

    record: str
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedSignature:
    """A signature that holds.

    Attributes:
        record: its name beside the manifest.
        fingerprint: the fingerprint of the key that made it.
        files: the files whose bytes were compared now; ``manifest.json`` is always among them.
    """

    record: str
    fingerprint: str
    files: tuple[str, ...]


def _keys() -> Any:
    """Import the module of keys when one is used: it loads cryptography."""
    with needing("signing", "signatures need"):
        return importlib.import_module("peakpoint.repository.signing.keys")


def private_key_fingerprint(path: Path, password: str | None = None) -> str:
    """Return the fingerprint of the public key that belongs to a private one; errors as in ``sign``."""
    keys = _keys()
    return str(keys.fingerprint(keys.read_private_key(path, password).public_key()))


def public_key_fingerprint(path: Path) -> str:
    """Return the fingerprint of a public key: 64 hexadecimal digits.

    It is the SHA-256 digest of the key in PEM form, the one that Sigstore bundles carry; ``sha256sum`` prints it of a
    file that openssl wrote.

    Raises:
        ConfigError: the file is not a public key of the curves P-256, P-384 or P-521.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    keys = _keys()
    return str(keys.fingerprint(keys.read_public_key(path)))


# --- signing --------------------------------------------------------------------------------------------------------


def sign(
    store: Store,
    manifest: Manifest,
    *,
    private_key: Path,
    password: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Signature:
    """Sign a checkpoint: its manifest and every file that the manifest names.

    Every byte is compared with its digest first, so that no damage is vouched for. Parts that were dropped are not
    covered, nor are the records beside the manifest. Signing again adds a signature and keeps the earlier ones.

    Args:
        store: any store.
        manifest: the checkpoint, as it was read.
        private_key: a file with an elliptic curve key (P-256, P-384, P-521) in PEM form.
        password: for an encrypted key; by default PEAKPOINT_SIGNING_PASSWORD.
        progress: called with the bytes of each file that has been read.

    Returns:
        The new signature, durable.

    Raises:
        ConfigError: the key cannot be used.
        CorruptError: the checkpoint is damaged.
        SignatureError: a file is a link to another, or the manifest is not the one that was read.
        NotFoundError: the checkpoint does not exist any more.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    keys = _keys()
    key = keys.read_private_key(private_key, password)
    with reader.hold_all(store, [manifest]):
        data, _ = _manifest_at_rest(store, manifest)
        digests = {MANIFEST: hashlib.sha256(data).hexdigest()}
        for file in manifest.files:
            _check_regular(store, layout.file_key(manifest.run, manifest.name, file.name))
            digests[file.name] = hashlib.sha256(reader.read(store, manifest, file)).hexdigest()
            progress(file.size)
        payload = bundles.encode_statement(manifest.name, digests)
        fingerprint = keys.fingerprint(key.public_key())
        signature = keys.sign(key, bundles.authenticated(payload))
        record = _add_record(store, manifest, bundles.encode_bundle(payload, signature, fingerprint))
    return Signature(record=record, fingerprint=fingerprint)


def _add_record(store: Store, manifest: Manifest, data: bytes) -> str:
    """Create the next record; of several who sign at once each gets a number of its own."""
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    numbers = (layout.signature_number(child.removesuffix("/")) for child in store.children(prefix))

    def create(number: int) -> str:
        record = f"{layout.SIGNATURE}{number}.json"
        establish(store, f"{prefix}/{record}", data)
        return record

    record = create_numbered(max(numbers, default=0) + 1, create)
    if store.size(layout.manifest_key(manifest.run, manifest.name)) is None:
        store.delete(f"{prefix}/{record}")
        store.prune(prefix)
        raise NotFoundError(f"{manifest.run}/{manifest.name} was removed while it was being signed")
    return record


def _manifest_at_rest(store: Store, manifest: Manifest) -> tuple[bytes, Manifest]:
    """Return the bytes of the manifest that the caller has read, and all that they say, dropped parts included.

    Raises:
        SignatureError: there is another manifest now.
    """
    key = layout.manifest_key(manifest.run, manifest.name)
    _check_regular(store, key)
    data = store.get(key)
    complete = replace(decode_manifest(data), run=manifest.run)  # which had another name, maybe
    # reading a manifest leaves dropped parts out, and adds metrics that were measured later
    is_same = replace(manifest, metrics=complete.metrics, parts=complete.parts, files=complete.files) == complete
    has_files = set(manifest.files) <= set(complete.files)
    if not (is_same and has_files and manifest.parts.items() <= complete.parts.items()):
        raise SignatureError(f"{MANIFEST} is not the one that was read: it has been exchanged")
    return data, complete


def _check_regular(store: Store, key: str) -> None:
    """Refuse a link, or what is not a file: the bytes behind it change without a change to the directory."""
    if not isinstance(store, LocalStore):
        return
    path = store.path(key)
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # reading it says what is wrong
    if not stat.S_ISREG(mode):
        raise SignatureError(f"{path.name} is a symbolic link or a special file; Peakpoint writes neither")


# --- verifying ------------------------------------------------------------------------------------------------------


def signatures(store: Store, run: str, name: str) -> tuple[Signature, ...]:
    """Return the signatures beside a manifest, the newest first, with the keys that they name.

    Nothing is verified, and no extra is needed.
    """
    prefix = layout.checkpoint_prefix(run, name)
    return tuple(
        Signature(record=record, fingerprint=_named_fingerprint(store, f"{prefix}/{record}"))
        for record in _records(store, prefix)
    )


def _records(store: Store, prefix: str) -> list[str]:
    """Return the names of the signatures in a directory, the newest first."""
    records = [child for child in store.children(prefix) if layout.is_signature(child)]
    return sorted(records, key=layout.signature_number, reverse=True)


def _named_fingerprint(store: Store, key: str) -> str | None:
    try:
        return _read_bundle(store, key).fingerprint
    except (SignatureError, NotFoundError):
        return None


def _read_bundle(store: Store, key: str) -> bundles.Bundle:
    _check_regular(store, key)
    size = store.size(key)
    if size is not None and size > bundles.LARGEST:
        raise SignatureError(f"it has {size} bytes, and a signature has at most {bundles.LARGEST}")
    return bundles.decode_bundle(store.get(key, 0, bundles.LARGEST))


def verify(
    store: Store,
    manifest: Manifest,
    *,
    public_key: Path,
    files: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> VerifiedSignature:
    """Verify that the owner of a key has signed a checkpoint, and that it still is what was signed.

    One signature that was made with this key and holds is enough. It has to cover ``manifest.json`` as it is and every
    file that belongs to the checkpoint now; those of parts that were dropped since may be missing. Files are compared
    with their digests in the manifest; those of an archived checkpoint are unpacked for it.

    Args:
        store: any store.
        manifest: the checkpoint, as it was read: the one that is used afterwards.
        public_key: a file with the public key in PEM form, from a place that the signer alone controls.
        files: compare the bytes of every file now. Without it only those of the manifest are, which is as good for
            bytes that are compared with the digests in this manifest when they are read.
        progress: called with the bytes of each file that has been compared.

    Raises:
        SignatureError: it is not signed, another key has signed it, or it is not what was signed; the message names the
            file, or both keys.
        ConfigError: the key cannot be used.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    keys = _keys()
    key = keys.read_public_key(public_key)
    try:
        data, complete = _manifest_at_rest(store, manifest)
    except SignatureError as error:
        raise SignatureError(f"{manifest.run}/{manifest.name} is not what was signed: {error}") from error
    record, names = _covering_signature(store, manifest, data, complete, key)
    compared = [MANIFEST]
    for file in sorted(complete.files, key=lambda file: file.name) if files else ():
        if file.name in names and _is_unchanged(store, manifest, file, record):
            compared.append(file.name)
            progress(file.size)
    return VerifiedSignature(record=record, fingerprint=keys.fingerprint(key), files=tuple(compared))


def _covering_signature(
    store: Store, manifest: Manifest, data: bytes, complete: Manifest, key: Any
) -> tuple[str, Collection[str]]:
    """Return the newest signature that was made with a key and covers the checkpoint, and the names that it signs.

    Raises:
        SignatureError: there is none; the message says what is wrong with each.
    """
    ref, prefix = f"{manifest.run}/{manifest.name}", layout.checkpoint_prefix(manifest.run, manifest.name)
    refusals: list[str] = []
    for record in _records(store, prefix):
        try:
            digests = _signed_digests(_read_bundle(store, f"{prefix}/{record}"), key)
            _check_coverage(digests, data, manifest, complete)
        except (SignatureError, NotFoundError) as error:
            refusals.append(f"{record}: {error}")
        else:
            return record, digests.keys()
    if not refusals:
        raise SignatureError(f"{ref} is not signed: there is no signature beside its manifest; peakpoint sign adds one")
    raise SignatureError(f"{ref} is not validly signed with the key {_keys().fingerprint(key)}: {'; '.join(refusals)}")


def _signed_digests(bundle: bundles.Bundle, key: Any) -> dict[str, str]:
    """Return the SHA-256 digests that the owner of a key has signed, by file name.

    Raises:
        SignatureError: another key made the bundle, or it was changed, or it does not sign a model.
    """
    keys, envelope = _keys(), bundle.dsse_envelope
    fingerprint = keys.fingerprint(key)
    if bundle.fingerprint not in {None, fingerprint}:
        raise SignatureError(f"it was signed with another key: {bundle.fingerprint} (expected {fingerprint})")
    if not keys.is_signed(key, envelope.signatures[0].sig, bundles.authenticated(envelope.payload)):
        raise SignatureError(f"it was changed, or not made with the key {fingerprint}")
    return bundles.decode_statement(envelope.payload)


def _check_coverage(digests: Mapping[str, str], data: bytes, manifest: Manifest, complete: Manifest) -> None:
    """Check that a signature covers the bytes of a manifest and every file of the checkpoint, and nothing foreign.

    Raises:
        SignatureError: it does not.
    """
    signable = {MANIFEST, *(file.name for file in complete.files)}
    for name in digests:
        if name not in signable and not layout.is_record(name):
            raise SignatureError(f"it signs {name[:200]!r}, which is not a file of this checkpoint")
    for name in (MANIFEST, *sorted(file.name for file in manifest.files)):
        if name not in digests:
            raise SignatureError(f"it does not cover {name}")
    if digests[MANIFEST] != hashlib.sha256(data).hexdigest():
        raise SignatureError(f"{MANIFEST} has changed since it was signed")


def _is_unchanged(store: Store, manifest: Manifest, file: FileRecord, record: str) -> bool:
    """Compare a file with its digests in the signed manifest; False where a dropped part has left none.

    Raises:
        SignatureError: the file has changed.
    """
    key = layout.file_key(manifest.run, manifest.name, file.name)
    _check_regular(store, key)
    if file not in manifest.files and store.size(key) is None:
        return False
    try:
        reader.read(store, manifest, file)
    except (CorruptError, NotFoundError) as error:  # the latter of a part that was dropped, with other bytes
        raise SignatureError(
            f"{manifest.run}/{manifest.name} is not what was signed: {record}: {file.name} has changed since it was "
            f"signed: {error}"
        ) from error
    return True
