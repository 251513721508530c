"""Keys in files: read with care, never printed."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peakpoint.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

PASSWORD = "PEAKPOINT_SIGNING_PASSWORD"  # noqa: S105 - the name of a variable of the environment

_LARGEST = 64 * 1024
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what Sigstore knows of elliptic keys


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - start-up time
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"signatures need {error.name}, which is not installed: pip install 'peakpoint[signing]'"
        ) from error
    return serialization


def algorithm(key: "EllipticCurvePublicKey | EllipticCurvePrivateKey") -> "ECDSA":
    """How a key signs: the longer it is, the longer the digest."""
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 - start-up time
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 - start-up time

    match key.curve.key_size:
        case 256:
            return ec.ECDSA(hashes.SHA256())
        case 384:
            return ec.ECDSA(hashes.SHA384())
        case _:
            return ec.ECDSA(hashes.SHA512())


def read_public_key(path: Path) -> "EllipticCurvePublicKey":
    """The public key in a file.

    Raises:
        ConfigError: it cannot be read, or is something else.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    library, data = _library(), _bytes(path)
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(
            f"{path} is a private key, which only signing needs; give the public one: "
            f"openssl pkey -in {path} -pubout -out FILE"
        )
    if b"BEGIN CERTIFICATE" in data:
        raise ConfigError(f"{path} is a certificate; give its key: openssl x509 -in {path} -pubkey -noout > FILE")
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - start-up time

    try:
        key = library.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key in PEM form, such as openssl pkey -pubout writes") from error
    _check_curve(path, key)
    found: EllipticCurvePublicKey = key
    return found


def read_private_key(path: Path, password: str | None) -> "EllipticCurvePrivateKey":
    """The private key in a file, which is read once, so that it may be a pipe.

    Errors of the library are not chained: nothing of the key can be printed with them.

    Raises:
        ConfigError: it cannot be read, is something else, or its password is another one.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    library, data = _library(), _bytes(path)
    if b"BEGIN PUBLIC KEY" in data and b"PRIVATE KEY-----" not in data:
        raise ConfigError(f"{path} is a public key; signing needs the private one that belongs to it")
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - start-up time

    secret = None
    if b"ENCRYPTED" in data:
        password = os.environ.get(PASSWORD) if password is None else password
        if not password:
            raise ConfigError(f"the key {path} is encrypted; set {PASSWORD} to its password")
        secret = password.encode(errors="surrogateescape")  # the bytes that the environment has
    try:
        key = library.load_pem_private_key(data, secret)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        why = "its password is another one, or it is damaged" if secret else "it is no private key in PEM form"
        raise ConfigError(f"the key {path} cannot be used: {why}") from None
    _check_curve(path, key)
    found: EllipticCurvePrivateKey = key
    return found


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST:
        raise ConfigError(f"{path} is no key: it has more than {_LARGEST} bytes")
    return data


def _check_curve(path: Path, key: object) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        found = f"of the curve {curve}" if curve else "of another kind"
        raise ConfigError(
            f"the key {path} is {found}; one of the curves P-256, P-384 or P-521 is needed: "
            "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out FILE"
        )


def fingerprint_of(key: "EllipticCurvePublicKey") -> str:
    """See ``public_key_fingerprint``."""
    library = _library()
    form = library.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(library.Encoding.PEM, form)).hexdigest()


def private_key_fingerprint(path: Path, password: str | None = None) -> str:
    """The fingerprint of the public key that belongs to a private one; errors as in ``sign``."""
    return fingerprint_of(read_private_key(path, password).public_key())


def public_key_fingerprint(path: Path) -> str:
    """The fingerprint of a public key: 64 hexadecimal digits.

    It is the SHA-256 digest of the key in PEM form, the one that Sigstore bundles carry; ``sha256sum`` prints it of a
    file that openssl wrote.

    Raises:
        ConfigError: the file is no public key of the curves P-256, P-384 or P-521.
        MissingExtraError: ``pip install 'peakpoint[signing]'``.
    """
    return fingerprint_of(read_public_key(path))
