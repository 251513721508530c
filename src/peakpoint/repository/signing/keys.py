"""Keys in files: read with care, never printed. Imported by ``signing`` only when a key is used."""

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

from peakpoint.errors import ConfigError

PASSWORD = "PEAKPOINT_SIGNING_PASSWORD"  # noqa: S105 - the name of a variable of the environment

_LARGEST = 64 * 1024  # bytes; a key has less than one KiB, and a device has no end
_HASHES: dict[str, hashes.HashAlgorithm] = {  # the curves that Sigstore knows; a longer key signs a longer digest
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """Read the public key in a file.

    Raises:
        ConfigError: the file cannot be read, or is not a public key of a supported curve.
    """
    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(
            f"{path} is a private key, which only signing needs; give the public one: "
            f"openssl pkey -in {path} -pubout -out FILE"
        )
    if b"BEGIN CERTIFICATE" in data:
        raise ConfigError(f"{path} is a certificate; give its key: openssl x509 -in {path} -pubkey -noout > FILE")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is not a public key in PEM form, such as openssl pkey -pubout writes") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise _unsupported(path, key)
    return key


def read_private_key(path: Path, password: str | None) -> EllipticCurvePrivateKey:
    """Read the private key in a file, once, so that it may be a pipe.

    Errors of the library are not chained: nothing of the key can be printed with them.

    Raises:
        ConfigError: the file cannot be read, is not a private key of a supported curve, or has another password.
    """
    data = _read(path)
    if b"BEGIN PUBLIC KEY" in data and b"PRIVATE KEY-----" not in data:
        raise ConfigError(f"{path} is a public key; signing needs the private one that belongs to it")
    secret = None
    if b"ENCRYPTED" in data:
        password = os.environ.get(PASSWORD) if password is None else password
        if not password:
            raise ConfigError(f"the key {path} is encrypted; set {PASSWORD} to its password")
        secret = password.encode(errors="surrogateescape")  # the bytes that the environment has
    try:
        key = serialization.load_pem_private_key(data, secret)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        reason = "the password is wrong, or the file is damaged" if secret else "it is not a private key in PEM form"
        raise ConfigError(f"the key {path} cannot be used: {reason}") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
        raise _unsupported(path, key)
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST:
        raise ConfigError(f"{path} is not a key: it has more than {_LARGEST} bytes")
    return data


def _unsupported(path: Path, key: object) -> ConfigError:
    curve = getattr(getattr(key, "curve", None), "name", None)
    return ConfigError(
        f"the key {path} is {f'of the curve {curve}' if curve else 'not an elliptic curve key'}; P-256, P-384 or P-521 "
        "is needed: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out FILE"
    )


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the SHA-256 digest of a key in PEM form."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def sign(key: EllipticCurvePrivateKey, data: bytes) -> bytes:
    """Sign bytes with a private key."""
    return key.sign(data, ECDSA(_HASHES[key.curve.name]))


def is_signed(key: EllipticCurvePublicKey, signature: bytes, data: bytes) -> bool:
    """Return whether the owner of a key has signed bytes."""
    try:
        key.verify(signature, data, ECDSA(_HASHES[key.curve.name]))
    except InvalidSignature:
        return False
    return True
