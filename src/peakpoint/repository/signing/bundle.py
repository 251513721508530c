"""The Sigstore bundle: a signed statement about the digests of files.

Source: DSSE v1.0.0, https://github.com/secure-systems-lab/dsse; in-toto Statement v1,
https://github.com/in-toto/attestation; OpenSSF Model Signing v1.0, https://github.com/sigstore/model-transparency;
Sigstore bundle v0.3, https://github.com/sigstore/protobuf-specs.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from peakpoint.errors import SignatureError
from peakpoint.repository.signing.keys import algorithm, fingerprint_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

LARGEST = 16 * 1024 * 1024  # bytes; enough for a hundred thousand files

_MEDIA = "application/vnd.dev.sigstore.bundle.v0.3+json"
_IN_TOTO = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Key(msgspec.Struct):
    hint: str | None = None


class _Material(msgspec.Struct, rename="camel"):
    public_key: _Key | None = None
    tlog_entries: list[msgspec.Raw] = []


class _Made(msgspec.Struct):
    sig: bytes
    keyid: str = ""


class _Envelope(msgspec.Struct, rename="camel"):
    payload: bytes
    payload_type: str
    signatures: list[_Made]


class Bundle(msgspec.Struct, rename="camel"):
    """A bundle that was made with a key."""

    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope

    @property
    def fingerprint(self) -> str | None:
        """Of the key, as the bundle says, which is not signed; None when it says nothing that could be one."""
        key = self.verification_material.public_key
        return key.hint if key and key.hint and _FINGERPRINT.fullmatch(key.hint) else None


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str = "sha256"
    allow_symlinks: bool = False


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: list[_Resource]


class _Subject(msgspec.Struct):
    name: str
    digest: dict[str, str]


class _Statement(msgspec.Struct, rename={"type": "_type", "predicate_type": "predicateType"}):
    type: str
    subject: list[_Subject]
    predicate_type: str
    predicate: _Predicate


def make(name: str, digests: Mapping[str, str], key: "EllipticCurvePrivateKey") -> bytes:
    """Sign the SHA-256 digests of files.

    Args:
        name: of what they belong to, for people.
        digests: hexadecimal, by name of file.
        key: the private key.

    Returns:
        The bundle, as JSON.
    """
    rows = sorted(digests.items())
    statement = _Statement(
        type=_STATEMENT,
        subject=[_Subject(name, {"sha256": _digest_of([digest for _, digest in rows])})],
        predicate_type=_PREDICATE,
        predicate=_Predicate(_Serialization("files"), [_Resource(file, "sha256", digest) for file, digest in rows]),
    )
    payload = msgspec.json.encode(statement)
    made = _Made(key.sign(_authenticated(payload), algorithm(key)))
    material = _Material(_Key(fingerprint_of(key.public_key())))
    return msgspec.json.encode(Bundle(_MEDIA, material, _Envelope(payload, _IN_TOTO, [made])))


def _digest_of(digests: list[str]) -> str:
    """The digest of a whole: of the digests of its files, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _authenticated(payload: bytes) -> bytes:
    """DSSE's encoding of what is signed, so that a payload of another type is never taken for it."""
    return b"DSSEv1 %d %s %d %s" % (len(_IN_TOTO), _IN_TOTO.encode(), len(payload), payload)


def read(data: bytes) -> Bundle:
    """Read a bundle; nothing of it is verified.

    Raises:
        SignatureError: it is none, or of another kind.
    """
    try:
        bundle = msgspec.json.decode(data, type=Bundle)
    except _UNREADABLE as error:
        raise SignatureError(f"it is no Sigstore bundle: {error}") from error
    if bundle.media_type != _MEDIA or bundle.dsse_envelope.payload_type != _IN_TOTO:
        raise SignatureError(f"it is no bundle of type {_MEDIA} with a statement of type {_IN_TOTO}")
    if bundle.verification_material.public_key is None:
        raise SignatureError("it was not made with a key; certificates and Sigstore's service are not supported")
    if len(bundle.dsse_envelope.signatures) != 1:
        raise SignatureError("it does not hold exactly one signature")
    return bundle


def signed_digests(bundle: Bundle, key: "EllipticCurvePublicKey") -> dict[str, str]:
    """The SHA-256 digests that the owner of a key has signed, by name of file.

    Raises:
        SignatureError: another key made it, or it was changed, or it is no signature of a model.
    """
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - start-up time

    fingerprint = fingerprint_of(key)
    if bundle.fingerprint not in {None, fingerprint}:
        raise SignatureError(f"it was made with the key {bundle.fingerprint}, not with {fingerprint}")
    envelope = bundle.dsse_envelope
    try:
        key.verify(envelope.signatures[0].sig, _authenticated(envelope.payload), algorithm(key))
    except InvalidSignature as error:
        raise SignatureError(f"it was changed, or not made with the key {fingerprint}") from error
    try:
        statement = msgspec.json.decode(envelope.payload, type=_Statement)
    except _UNREADABLE as error:
        raise SignatureError(f"what is signed is no statement about a model: {error}") from error
    if (statement.type, statement.predicate_type) != (_STATEMENT, _PREDICATE):
        raise SignatureError(f"what is signed is no statement of type {_PREDICATE}")
    resources = statement.predicate.resources
    if statement.predicate.serialization.method != "files" or any(one.algorithm != "sha256" for one in resources):
        raise SignatureError("it does not sign the SHA-256 digest of each file; sign with the default hashing")
    digests = {one.name: one.digest for one in resources}
    if len(digests) != len(resources):
        raise SignatureError("it names a file twice")
    return digests
