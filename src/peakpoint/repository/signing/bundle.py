"""The Sigstore bundle: a signed statement about the digests of files, as JSON.

Source: DSSE v1.0.0, https://github.com/secure-systems-lab/dsse; in-toto Statement v1,
https://github.com/in-toto/attestation; OpenSSF Model Signing v1.0, https://github.com/sigstore/model-transparency;
Sigstore bundle v0.3, https://github.com/sigstore/protobuf-specs.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from peakpoint.errors import SignatureError

LARGEST = 16 * 1024 * 1024  # bytes; enough for a hundred thousand files

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class VerificationMaterial(msgspec.Struct, rename="camel"):
    """The hint at the key of a bundle."""

    public_key: dict[str, Any] | None = None
    tlog_entries: list[Any] = []


class EnvelopeSignature(msgspec.Struct):
    """The signature of an envelope."""

    sig: bytes
    keyid: str = ""


class Envelope(msgspec.Struct, rename="camel"):
    """A payload with its signature."""

    payload: bytes
    payload_type: str
    signatures: list[EnvelopeSignature]


class Bundle(msgspec.Struct, rename="camel"):
    """A bundle that was made with a key."""

    media_type: str
    verification_material: VerificationMaterial
    dsse_envelope: Envelope

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the key that the bundle names, which is not signed; None when it names none."""
        hint = (self.verification_material.public_key or {}).get("hint")
        return hint if isinstance(hint, str) and _FINGERPRINT.fullmatch(hint) else None


class FileDigest(msgspec.Struct):
    """The digest of a file in a statement."""

    name: str
    algorithm: str
    digest: str


class Predicate(msgspec.Struct):
    """How files were hashed, and the digest of each."""

    serialization: dict[str, Any]
    resources: list[FileDigest]


class Statement(msgspec.Struct, rename={"type": "_type", "predicate_type": "predicateType"}):
    """An in-toto statement about a model."""

    type: str
    subject: list[dict[str, Any]]
    predicate_type: str
    predicate: Predicate


def encode_statement(name: str, digests: Mapping[str, str]) -> bytes:
    """Encode the statement that files have these digests.

    Args:
        name: the name of the model, for people.
        digests: file names to SHA-256 digests, in hexadecimal digits.
    """
    resources = [FileDigest(file, "sha256", digest) for file, digest in sorted(digests.items())]
    # the subject has one digest: that of the digests of the files, in their order
    combined = hashlib.sha256(b"".join(bytes.fromhex(resource.digest) for resource in resources)).hexdigest()
    subject = {"name": name, "digest": {"sha256": combined}}
    predicate = Predicate(_SERIALIZATION, resources)
    return msgspec.json.encode(Statement(_STATEMENT_TYPE, [subject], _PREDICATE_TYPE, predicate))


def authenticated(payload: bytes) -> bytes:
    """Return what is signed of a payload: DSSE's encoding, so that one of another type is never taken for it."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def encode_bundle(payload: bytes, signature: bytes, fingerprint: str) -> bytes:
    """Encode a signed statement, with the fingerprint of the key."""
    envelope = Envelope(payload, _PAYLOAD_TYPE, [EnvelopeSignature(signature)])
    return msgspec.json.encode(Bundle(_MEDIA_TYPE, VerificationMaterial({"hint": fingerprint}), envelope))


def decode_bundle(data: bytes) -> Bundle:
    """Decode a bundle; nothing of it is verified.

    Raises:
        SignatureError: the bytes are not a bundle, or one of another kind.
    """
    try:
        bundle = msgspec.json.decode(data, type=Bundle)
    except _UNREADABLE as error:
        raise SignatureError(f"it is not a Sigstore bundle: {error}") from error
    if bundle.media_type != _MEDIA_TYPE or bundle.dsse_envelope.payload_type != _PAYLOAD_TYPE:
        raise SignatureError(f"it is not a bundle of type {_MEDIA_TYPE} with a statement of type {_PAYLOAD_TYPE}")
    if bundle.verification_material.public_key is None:
        raise SignatureError("it was not made with a key; certificates and Sigstore's service are not supported")
    if len(bundle.dsse_envelope.signatures) != 1:
        raise SignatureError("it does not hold exactly one signature")
    return bundle


def decode_statement(payload: bytes) -> dict[str, str]:
    """Decode a statement: file names to SHA-256 digests.

    Raises:
        SignatureError: the payload is not a statement about a model, or was not made with the default hashing.
    """
    try:
        statement = msgspec.json.decode(payload, type=Statement)
    except _UNREADABLE as error:
        raise SignatureError(f"what is signed is not a statement about a model: {error}") from error
    if (statement.type, statement.predicate_type) != (_STATEMENT_TYPE, _PREDICATE_TYPE):
        raise SignatureError(f"what is signed is not a statement of type {_PREDICATE_TYPE}")
    resources = statement.predicate.resources
    algorithms = {resource.algorithm for resource in resources}
    if statement.predicate.serialization.get("method") != "files" or not algorithms <= {"sha256"}:
        raise SignatureError("it does not sign the SHA-256 digest of each file; sign with the default hashing")
    digests = {resource.name: resource.digest for resource in resources}
    if len(digests) != len(resources):
        raise SignatureError("it names a file twice")
    return digests
