"""The command ``sign``."""

from pathlib import Path

import click

from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import PATH, REF, ROOT
from peakpoint.cli.progress import progress_bar
from peakpoint.cli.render import count, ref
from peakpoint.format.manifest import Manifest
from peakpoint.repository import signing
from peakpoint.repository.root import Repository, open_repository


@click.command()
@ROOT
@REF
@click.option(
    "--key", type=PATH, required=True, metavar="FILE", help="The private key, PEM; with --verify the public one."
)
@click.option("--verify", is_flag=True, help="Verify that the key's owner signed the checkpoint as it is now.")
@answers
def sign(root: Path, ref: str, key: Path, *, verify: bool) -> Answer:
    """Sign a checkpoint: its manifest and every file of it, after comparing each byte with its digest.

    The password of an encrypted key is taken from PEAKPOINT_SIGNING_PASSWORD. With --verify the command exits with 15
    when the checkpoint is not signed with that key, or has changed since.
    """
    repository = open_repository(root)
    manifest = repository.find_manifest(ref)
    return _verify(repository, manifest, key) if verify else _sign(repository, manifest, key)


def _sign(repository: Repository, manifest: Manifest, key: Path) -> Answer:
    with progress_bar("signing", manifest.size_bytes) as advance:
        signature = signing.sign(repository.store, manifest, private_key=key, progress=advance)
    data = {"ref": ref(manifest), "id": manifest.id, "record": signature.record, "fingerprint": signature.fingerprint}
    files = count(len(manifest.files) + 1, "file")
    return Answer(data, f"signed {ref(manifest)}: {signature.record} covers {files}\nkey {signature.fingerprint}")


def _verify(repository: Repository, manifest: Manifest, key: Path) -> Answer:
    with progress_bar("verifying", manifest.size_bytes) as advance:
        verified = signing.verify(repository.store, manifest, public_key=key, progress=advance)
    data = {
        "ref": ref(manifest),
        "id": manifest.id,
        "record": verified.record,
        "fingerprint": verified.fingerprint,
        "files": verified.files,
    }
    files = count(len(verified.files), "file")
    text = f"{ref(manifest)} is unchanged since it was signed: {verified.record}, {files} compared"
    return Answer(data, f"{text}\nkey {verified.fingerprint}")
