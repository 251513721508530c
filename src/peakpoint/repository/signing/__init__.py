"""Signatures of checkpoints: who vouches for these bytes.

A digest finds accidents; whoever may write to a repository can write digests that match. A signature cannot be made
without the private key. It covers ``manifest.json``, and so every digest in it, and the digest of each file besides.

The signature is a Sigstore bundle as the OpenSSF's model signing makes it, so that its tool ``model_signing`` verifies
the directory of a checkpoint without Peakpoint.
"""

import hashlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peakpoint.errors import CorruptError, NotFoundError, SignatureError
from peakpoint.format import layout
from peakpoint.format.manifest import MANIFEST, Manifest
from peakpoint.format.sealed import decode_record
from peakpoint.repository import reader
from peakpoint.repository.signing import bundle as bundles
from peakpoint.repository.signing.keys import (
    PASSWORD,
    fingerprint_of,
    private_key_fingerprint,
    public_key_fingerprint,
    read_private_key,
    read_public_key,
)
from peakpoint.store import LocalStore, Store, create_numbered, establish

__all__ = [
    "PASSWORD",
    "Signature",
    "Signed",
    "private_key_fingerprint",
    "public_key_fingerprint",
    "sign",
    "signatures",
    "verify",
]

_BLOCK = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A signature that is there; only ``verify`` says what it is worth.

    Attributes:
        record: its name beside the manifest, such as ``"signature-1.json"``.
        fingerprint: of the public key, as the record says; None when the record says nothing that can be read.
    """

    record: str
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedSignature:
    """A signature that holds.

    Attributes:
        record: its name beside the manifest.
        fingerprint: of the key that made it.
        files: the files whose bytes were compared with it now; ``manifest.json`` is always among them.
    """

    record: str
    fingerprint: str
    files: tuple[str, ...]


def _nothing(size: int) -> None:
    """Progress that nobody watches."""


# --- signing --------------------------------------------------------------------------------------------------------


def sign(
    store: Store,
    manifest: Manifest,
    *,
    private_key: Path,
    password: str | None = None,
    progress: Callable[[int], None] = _nothing,
) -> Signature:
    """Sign a checkpoint: its manifest and every file that the manifest names.

    Every byte is compared with its digest first, so that no damage is vouched for. Parts that were dropped are not
    covered, nor are the records beside the manifest. Signing again adds a signature; those that are there stay.

    Args:
        store: where; any store.
        manifest: the checkpoint, as it was read.
        private_key: a file with an elliptic key (P-256, P-384, P-521) in PEM form.
        password: of the key, when it is encrypted; by default that in PEAKPOINT_SIGNING_PASSWORD.
        progress: called with the bytes of each file that has been read.

    Returns:
        The new signature, durable.

    Raises:
        ConfigError: the key cannot be used.
        CorruptError: the checkpoint is damaged.
        SignatureError: a file is a link to another, or the manifest is not the one that was read.
        NotFoundError: the checkpoint is gone.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    key = read_private_key(private_key, password)
    hold = reader.hold_for_reading(store, manifest)  # so that no rule takes it now
    try:
        digests = {MANIFEST: hashlib.sha256(_manifest_bytes(store, manifest)).hexdigest()}
        for file in manifest.files:
            _check_plain(store, layout.file_key(manifest.run, manifest.name, file.name))
            digests[file.name] = hashlib.sha256(reader.read(store, manifest, file)).hexdigest()
            progress(file.size)
        record = _put(store, manifest, bundles.make(manifest.name, digests, key))
    finally:
        if hold is not None:
            hold.release()
    return Signature(record=record, fingerprint=fingerprint_of(key.public_key()))


def _put(store: Store, manifest: Manifest, data: bytes) -> str:
    """Create the next record; of several who sign at once each gets a number of its own."""
    prefix = layout.checkpoint_prefix(manifest.run, manifest.name)
    there = max((layout.signature_number(child.removesuffix("/")) for child in store.children(prefix)), default=0)

    def create(number: int) -> str:
        record = f"{layout.SIGNATURE}{number}.json"
        establish(store, f"{prefix}/{record}", data)
        return record

    record = create_numbered(there + 1, create)
    if store.size(layout.manifest_key(manifest.run, manifest.name)) is None:  # removed meanwhile
        store.delete(f"{prefix}/{record}")
        store.prune(prefix)
        raise NotFoundError(f"{manifest.run}/{manifest.name} was removed while it was being signed")
    return record


def _records(store: Store, prefix: str) -> list[str]:
    """The names of the signatures in a directory, the newest first."""
    found = [child for child in store.children(prefix) if layout.is_signature(child)]
    return sorted(found, key=layout.signature_number, reverse=True)


def _manifest_bytes(store: Store, manifest: Manifest) -> bytes:
    """The bytes at rest of the manifest that the caller has.

    Raises:
        SignatureError: they are those of another one.
    """
    key = layout.manifest_key(manifest.run, manifest.name)
    _check_plain(store, key)
    data = store.get(key)
    there = decode_record(Manifest, data, where=MANIFEST)
    # what was dropped is left out, and metrics that were measured later are added, when a manifest is read
    same = replace(manifest, metrics=there.metrics, parts=there.parts, files=there.files)
    files = {file.name: file for file in there.files}
    of_it = all(files.get(file.name) == file for file in manifest.files)
    if same != there or not of_it or not manifest.parts.items() <= there.parts.items():
        raise SignatureError(f"{MANIFEST} is not the one that was read: it has been exchanged")
    return data


def _check_plain(store: Store, key: str) -> None:
    """Refuse what is a link, or no file: what is behind it changes without a change to the directory."""
    if not isinstance(store, LocalStore):
        return
    path = store.path(key)
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # it is missing, or cannot be looked at: reading it says so
    if not stat.S_ISREG(mode):
        raise SignatureError(f"{path.name} is a symbolic link, or no file at all; Peakpoint writes neither")


# --- verifying ------------------------------------------------------------------------------------------------------


def signatures(store: Store, run: str, name: str) -> tuple[Signature, ...]:
    """The signatures beside a manifest and the keys that they say they were made with, the newest first.

    Nothing is verified, and no extra is needed.
    """
    prefix = layout.checkpoint_prefix(run, name)
    return tuple(
        Signature(record=record, fingerprint=_claimed(store, f"{prefix}/{record}"))
        for record in _records(store, prefix)
    )


def _claimed(store: Store, key: str) -> str | None:
    try:
        return _bundle(store, key).fingerprint
    except (SignatureError, NotFoundError):
        return None


def _bundle(store: Store, key: str) -> bundles.Bundle:
    _check_plain(store, key)
    size = store.size(key)
    if size is not None and size > bundles.LARGEST:
        raise SignatureError(f"it has {size} bytes, and a signature has at most {bundles.LARGEST}")
    return bundles.read(store.get(key, 0, bundles.LARGEST))


def verify(
    store: Store,
    manifest: Manifest,
    *,
    public_key: Path,
    files: bool = True,
    progress: Callable[[int], None] = _nothing,
) -> VerifiedSignature:
    """Verify that the owner of a key has signed a checkpoint, and that it still is what was signed.

    One signature that was made with this key and holds is enough. It has to cover ``manifest.json`` as it is and every
    file that belongs to the checkpoint now; those of parts that were dropped since may be missing. Of an archived
    checkpoint the files are unpacked for it.

    Args:
        store: where; any store.
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
    key = read_public_key(public_key)
    fingerprint = fingerprint_of(key)
    ref, prefix = f"{manifest.run}/{manifest.name}", layout.checkpoint_prefix(manifest.run, manifest.name)
    try:
        data = _manifest_bytes(store, manifest)
    except SignatureError as error:
        raise SignatureError(f"{ref} is not what was signed: {error}") from error
    compared = _Files(store, manifest, data, progress)
    refused: list[str] = []
    for record in _records(store, prefix):
        try:
            digests = bundles.signed_digests(_bundle(store, f"{prefix}/{record}"), key)
            same = tuple(compared.compare(digests, every=files))
        except (SignatureError, NotFoundError) as error:
            refused.append(f"{record}: {error}")
        else:
            return VerifiedSignature(record=record, fingerprint=fingerprint, files=same)
    if not refused:
        raise SignatureError(f"{ref} is not signed: there is no signature beside its manifest; peakpoint sign adds one")
    raise SignatureError(f"{ref} does not count as signed with the key {fingerprint}: {'; '.join(refused)}")


class _Files:
    """The files of one checkpoint, each hashed once however many signatures there are."""

    def __init__(self, store: Store, manifest: Manifest, data: bytes, progress: Callable[[int], None]) -> None:
        self._store, self._manifest, self._progress = store, manifest, progress
        self._all = {
            file.name: file for file in decode_record(Manifest, data, where=MANIFEST).files
        }  # with those that were dropped
        self._here = {file.name for file in manifest.files}
        self._known = {MANIFEST: hashlib.sha256(data).hexdigest()}

    def compare(self, digests: Mapping[str, str], *, every: bool) -> Iterator[str]:
        """The names of the files that are what was signed.

        Raises:
            SignatureError: one is not, or was not signed.
        """
        for name in digests:
            if name not in self._all and name != MANIFEST and not layout.is_record(name):
                raise SignatureError(f"it signs {name[:200]!r}, which is no file of this checkpoint")
        for name in (MANIFEST, *sorted(self._here)):
            if name not in digests:
                raise SignatureError(f"it does not cover {name}")
        for name in (MANIFEST, *sorted(self._all)) if every else (MANIFEST,):
            found = self._digest(name) if name in digests else None
            if found is None:
                continue  # of a part that was dropped
            if found != digests[name]:
                raise SignatureError(f"{name} has changed since it was signed")
            yield name

    def _digest(self, name: str) -> str | None:
        """None when the file is gone and need not be there."""
        if name in self._known:
            return self._known[name]
        key = layout.file_key(self._manifest.run, self._manifest.name, name)
        _check_plain(self._store, key)
        size = self._store.size(key)
        if size is not None:
            self._known[name] = self._hashed(key, size)
        elif name not in self._here:
            return None
        else:
            self._known[name] = hashlib.sha256(self._unpacked(name)).hexdigest()
        self._progress(self._all[name].size)
        return self._known[name]

    def _unpacked(self, name: str) -> memoryview:
        try:
            return reader.read(self._store, self._manifest, self._all[name])
        except CorruptError as error:
            raise SignatureError(f"{name} cannot be read: {error}") from error

    def _hashed(self, key: str, size: int) -> str:
        digest = hashlib.sha256()
        for begin in range(0, size, _BLOCK):
            digest.update(self._store.get(key, begin, min(begin + _BLOCK, size)))
        return digest.hexdigest()
